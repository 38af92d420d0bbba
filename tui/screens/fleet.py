"""Fleet: a row a node, trouble first; on a wide terminal with everything about the row under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.model import columns, page
from tui.model.rows import Change, Row
from tui.model.spans import Line, keep, line_width, spread
from tui.model.status import build_text, lease_text, state_counts
from tui.model.text import wrap
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.screens.tables import PanedTable
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class FleetView(PanedTable):
    """The table of nodes and the pane beside it."""

    view = "fleet"
    sort_columns = ("state", "name", "cpu", "mem", "rtt", "age")

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.table = VIEWS["fleet"].new_table()
        self.table.items = dict(deck.fleet.rows)
        self.grid = TableView(
            self.table,
            lead=lambda row, scene: [(scene.glyphs.state(row.state), row.state)],
            detail=lambda row, scene: columns.detail(row, scene.now, deck.fleet.mesh_of(row)),
            facts=lambda rows: columns.fleet_facts(rows, deck.fleet.my_id, deck.fleet.directory.holders),
            old=lambda row, now: row.expired or row.late(now) or deck.blind(),
            empty=self._empty,
        )
        self.grid.clock = deck.now
        self.grid.me = lambda: deck.fleet.my_id
        self.grid.holders = lambda: deck.fleet.directory.holders
        self.grid.glyphs = deck.glyphs

    def pane_lines(self, cells: int) -> list[Line]:
        row = self.row()
        return (
            [] if row is None else page.pane(row, self.deck.fleet, self.deck.now(), cells, self.deck.glyphs)
        )

    def _empty(self) -> list[Line]:
        deck = self.deck
        if deck.fleet.received is None:
            return [[("   no agent has answered yet; the rows come with the first one", "soft")]]
        locator = self.table.locator
        if self.table.items:
            mesh = deck.fleet.directory.rows.get(locator.mesh or "")
            said: list[Line] = [
                [("   no node passes ", "text"), (locator.filter_text() or f"@{locator.mesh}", "name")]
            ]
            if mesh is not None and not locator.terms:
                why = mesh.detail(deck.now()) or "its nodes are not known here yet"
                said = [[(f"   {part}", "text")] for part in wrap(f"{mesh.name}: {why}", deck.size.width - 8)]
            return [*said, [("   Esc", "key"), (" clears the filter", "soft")]]
        return [[("   this agent knows no nodes, not even itself: it has just started", "soft")]]

    def row(self) -> Row | None:
        return self.table.current

    def targets(self) -> list[Row]:
        return self.table.targets()

    def log_names(self) -> list[str]:
        return [row.name for row in self.table.targets()] if self.table.marks else []

    def folded(self, change: Change) -> None:
        now = self.deck.now()
        if change.full or change.moved:
            # A copy: between a frame and its paint the fleet goes on, and the screen may still be asked to draw.
            self.table.items = dict(self.deck.fleet.rows)
        if change.full:
            self.table.rebuild(now)
        else:
            self.table.apply(change.rows, change.gone, now)
        if change.meshes and change.moved:
            self.grid.relayout()  # who holds a lease may be the first thing to be noted beside a row
        self.grid.repaint()
        self.pane.remake()

    def title(self, cells: int) -> Line:
        table, fleet = self.table, self.deck.fleet
        mesh = table.locator.mesh
        total, shown = len(table.items), len(table.order)
        left: Line = [(" fleet", "title")]
        if mesh:
            left.append((f" @{mesh}", "accent"))
        if table.locator.terms:
            left.append((f" {table.locator.filter_text()}", "accent"))
        noun = "node" if total == 1 else "nodes"
        left.append((f"  {total} {noun}  " if shown == total else f"  {shown} of {total} {noun}  ", "text"))
        left += state_counts(fleet, mesh, self.deck.glyphs)
        if table.marks:
            left.append((f"  {len(table.marks)} marked", "accent"))
        lease = lease_text(fleet.directory.rows.get(mesh or ""), self.deck.now(), self.deck.glyphs)
        parts = [self.sort_text() or "trouble first", lease, build_text(fleet)]
        pieces: list[Line] = [[(part, "soft")] for part in parts if part]
        room = cells - line_width(left) - 2
        right = keep(pieces, room, (f" {self.deck.glyphs.separator} ", "soft"))
        return spread(left, [*right, (" ", "soft")], cells)


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return FleetView(deck)
