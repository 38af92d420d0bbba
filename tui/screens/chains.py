"""Chains: what the mesh keeps and who holds it, under-held first; Enter shows the holders in the fleet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tui.model import chains
from tui.model.locator import Locator
from tui.model.spans import Line
from tui.model.table import Scene
from tui.screens.asked import AskedView
from tui.screens.base import View

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


MESHES = 8
"""Meshes that are asked side by side; more of them are shown one by one, by `@mesh`."""


class ChainsView(AskedView):
    """The table of chains and artifacts."""

    view = "chains"
    noun = ("chain or artifact", "chains and artifacts")
    unknown = "keeps no chains: update it"
    beats = 2
    sort_columns = ("name", "kind", "held", "size", "leader")
    markable = False
    lead = staticmethod(chains.chain_lead)
    facts = staticmethod(chains.chain_facts)

    @staticmethod
    def detail(item: chains.Chain, scene: Scene) -> str:
        return item.detail(scene.now)

    async def ask(self, client: Any) -> dict[str, Any]:
        """Every mesh in view, each by one of its nodes; a mesh that doesn't say is named among the silent."""
        wanted, own = self._mesh(), client.mesh
        others = sorted(set(self.deck.fleet.meshes()) - {own})
        if self.deck.options.elsewhere is None:
            others = []
        meshes = [wanted] if wanted else [own, *others[: MESHES - 1]]
        found = await asyncio.gather(*(self._of(client, mesh) for mesh in meshes), return_exceptions=True)
        told = {m: answer for m, answer in zip(meshes, found, strict=True) if isinstance(answer, dict)}
        first = found[0]
        if isinstance(first, BaseException) and (not told or len(meshes) == 1):
            raise first
        silent = [chains.of_mesh(mesh) for mesh in meshes if mesh not in told]
        return {
            "rows": [row for answer in told.values() for row in answer["rows"]],
            "silent": [*silent, *(name for answer in told.values() for name in answer["silent"])],
            "answered_by": next(iter(told.values()))["answered_by"] if len(told) == 1 else "",
        }

    async def _of(self, client: Any, mesh: str) -> dict[str, Any]:
        found: dict[str, Any] = await (await self.client_of(client, mesh)).chains(mesh)
        return found

    def summary(self) -> Line:
        return self.deck.chains.summary()

    def opens(self) -> Locator | None:
        chain: chains.Chain | None = self.table.current
        return chain.holders_place() if chain is not None else None

    def row(self) -> None:
        """No node: a chain has several."""

    def nothing(self) -> list[Line]:
        mesh = self._mesh() or self.deck.fleet.mesh
        return [
            [(f"   {mesh or 'this mesh'} keeps no chain and no artifact", "text")],
            [("   qd put FILE", "name"), (" keeps a file,  ", "soft"), ("[[chain]]", "name"),
             (" in a spec for ", "soft"), ("qd apply", "name"), (" makes a chain", "soft")],
        ]  # fmt: skip


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return ChainsView(deck)
