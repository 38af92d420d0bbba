"""Meshes: a row a mesh, trouble first; Enter narrows the fleet to it. On a wide terminal with everything about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.model import mesh_columns, mesh_page
from tui.model.locator import Locator
from tui.model.meshes import MeshRow
from tui.model.rows import Change
from tui.model.spans import Line, spread
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.screens.tables import PanedTable
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class MeshesView(PanedTable):
    """The table of meshes and the pane beside it."""

    view = "meshes"
    markable = False
    sort_columns = ("mesh", "nodes", "publisher", "lease", "cpu", "age")

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.table = VIEWS["meshes"].new_table()
        self.table.items = dict(deck.fleet.directory.rows)
        self.grid = TableView(
            self.table,
            lead=lambda mesh, scene: mesh_columns.lead(mesh, scene.glyphs),
            detail=lambda mesh, scene: mesh.detail(scene.now),
            facts=lambda found: mesh_columns.mesh_facts(found, deck.fleet.mesh),
            old=lambda mesh, now: mesh.expired or deck.blind(),
            empty=self._empty,
        )
        self.grid.clock = deck.now
        self.grid.here = lambda: deck.fleet.mesh
        self.grid.glyphs = deck.glyphs

    def pane_lines(self, cells: int) -> list[Line]:
        mesh = self.mesh()
        if mesh is None:
            return []
        deck = self.deck
        return mesh_page.pane(mesh, deck.fleet, deck.now(), cells, deck.glyphs)

    def _empty(self) -> list[Line]:
        deck = self.deck
        if deck.fleet.received is None:
            return [[("   no agent has answered yet; the meshes come with the first one", "soft")]]
        if self.table.items:
            wanted = self.table.locator.filter_text() or f"@{self.table.locator.mesh}"
            return [
                [("   no mesh passes ", "text"), (wanted, "name")],
                [("   Esc", "key"), (" clears the filter", "soft")],
            ]
        return [
            [(f"   {deck.session.agent} tells of no meshes, not even its own: update it", "text")],
            [("   ", "text"), (deck.key_of("view_fleet"), "key"), (" shows the nodes it sees", "soft")],
        ]

    def mesh(self) -> MeshRow | None:
        """The mesh under the cursor."""
        return self.table.current

    def mesh_name(self) -> str:
        mesh = self.mesh()
        return mesh.name if mesh else ""

    def opens(self) -> Locator | None:
        mesh = self.mesh()
        if mesh is None or not mesh.named:
            return None
        return Locator("fleet", (), self.deck.views["fleet"].locator.sort, mesh.name)

    def folded(self, change: Change) -> None:
        now = self.deck.now()
        before, self.table.items = self.table.items, dict(self.deck.fleet.directory.rows)
        if change.full or change.moved or before.keys() != self.table.items.keys():
            self.table.rebuild(now)
            self.grid.relayout()
        else:
            self.table.apply(self.table.items.keys(), (), now)
        self.grid.repaint()
        self.pane.remake()

    def title(self, cells: int) -> Line:
        table = self.table
        left: Line = [(" meshes", "title")]
        if table.locator.mesh:
            left.append((f" @{table.locator.mesh}", "accent"))
        if table.locator.terms:
            left.append((f" {table.locator.filter_text()}", "accent"))
        total, shown = len(table.items), len(table.order)
        noun = "mesh" if total == 1 else "meshes"
        left.append((f"  {total} {noun}" if shown == total else f"  {shown} of {total} {noun}", "text"))
        live = sum(not mesh.expired for mesh in table.items.values())
        nodes = sum(int(mesh.total or 0) for mesh in table.items.values())
        left.append((f"  {live} live" if live != total else "", "text"))
        left.append((f"  {nodes} nodes", "text"))
        said = f"{self.sort_text() or 'trouble first'}, as {self.deck.session.agent} sees them "
        return spread(left, [(said, "soft")], cells)


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return MeshesView(deck)
