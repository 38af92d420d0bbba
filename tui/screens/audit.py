"""Audit: every op on record, the newest first, with its outcome and the verdict on its signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tui.model import audit
from tui.model.rows import Row
from tui.model.spans import Line
from tui.screens.asked import AskedView
from tui.screens.base import View

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class AuditView(AskedView):
    """The table of ops on record."""

    view = "audit"
    noun = ("op", "ops")
    unknown = "keeps no audit: update it"
    beats = 3
    sort_columns = ("op", "target", "operator", "result", "signature")
    markable = False
    lead = staticmethod(audit.entry_lead)
    facts = staticmethod(audit.audit_facts)

    async def ask(self, client: Any) -> dict[str, Any]:
        """The end of the record, joined to what is held; all of it where that doesn't fit. An answer about a mesh that is
        no longer the one shown is not taken."""
        while True:
            mesh = self._mesh() or client.mesh
            answer = await self._of(client, mesh)
            if mesh == (self._mesh() or client.mesh):
                return answer

    async def _of(self, client: Any, mesh: str) -> dict[str, Any]:
        book = self.deck.audit
        client = await self.client_of(client, mesh)
        names = {row.id: row.name for row in self.deck.fleet.rows.values()}
        if book.by == client.name and (offset := book.ask_from()):
            told = await client.audit(mesh, offset)
            if (rows := book.joined(offset, told["rows"])) is not None:
                return {**told, "rows": rows, "names": names, "first": book.first}
        return {**await client.audit(mesh), "names": names}

    def other_mesh(self) -> None:
        """What is held is of the mesh before."""
        self.deck.audit.forget()
        self._fresh()

    def summary(self) -> Line:
        session, out = self.deck.session, self.deck.audit.summary()
        if self._mesh() is None and session.client is not None:
            return [(f"of {session.client.mesh}", "accent"), *([("  ", "text"), *out] if out else [])]
        return out

    def row(self) -> Row | None:
        entry: audit.Entry | None = self.table.current
        return None if entry is None else self.deck.fleet.rows.get(entry.text("target"))

    def nothing(self) -> list[Line]:
        mesh = self._mesh() or self.deck.fleet.mesh
        return [
            [(f"   no op is on record in {mesh or 'this mesh'}", "text")],
            [("   qd audit --export DIR", "name"), (" writes what ssh-keygen verifies", "soft")],
        ]  # fmt: skip


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return AuditView(deck)
