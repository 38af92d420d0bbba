"""Fleet: a row a node, trouble first; on a wide terminal with everything about the row under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.containers import Horizontal

from tui.model import columns, page
from tui.model.locator import Locator
from tui.model.rows import Change, Row
from tui.model.spans import Line, keep, line_width, plain, spread
from tui.model.status import build_text, lease_text, state_counts
from tui.model.table import Scene, Table
from tui.model.text import wrap
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.widgets.page import PageView
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

WIDE = 140
"""From this width on the detail pane is there."""
PANE = 52
COLUMN_ORDER = ("state", "name", "cpu", "mem", "rtt", "age")
"""What `s` goes through, after the default order."""


class TableBased(View):
    """A view that is a table: the cursor, marks, order and export of it."""

    table: Table[Any]
    grid: TableView
    sort_columns: tuple[str, ...] = ()

    @property
    def locator(self) -> Locator:
        return self.table.locator

    def set_locator(self, locator: Locator) -> None:
        self.table.set_locator(locator, self.deck.now())
        if self.grid.is_mounted:
            self.grid.repaint()
            self.grid.show_cursor()

    def tick(self) -> None:
        if self.table.timed:
            self.table.rebuild(self.deck.now())
        self.grid.repaint()

    def restyle(self) -> None:
        self.grid.glyphs = self.deck.glyphs
        self.grid.relayout()

    def cursor_id(self) -> str | None:
        return self.table.cursor

    def place(self) -> tuple[str | None, float]:
        return self.table.cursor, self.grid.scroll_y

    def restore(self, cursor: str | None, scroll: float) -> None:
        if cursor is not None:
            self.table.go(cursor)
        self.grid.repaint()
        self.grid.reveal(scroll)
        self.grid.show_cursor()

    def move(self, key: str) -> None:
        room = max(1, self.grid.size.height - 2)
        table = self.table
        if key == "first":
            table.move_to(0)
        elif key == "last":
            table.move_to(len(table.order) - 1)
        else:
            table.move({"up": -1, "down": 1, "page_up": -room, "page_down": room}.get(key, 0))
        self.grid.show_cursor()
        self.grid.repaint()

    def mark(self) -> None:
        if self.table.cursor is not None and self.table.current is not None:
            self.table.toggle(self.table.cursor)
            self.move("down")

    def mark_all(self) -> None:
        self.table.mark_all()
        self.grid.repaint()

    def clear_marks(self) -> bool:
        had = bool(self.table.marks)
        self.table.marks.clear()
        self.grid.repaint()
        return had

    def hidden_marks(self) -> int:
        return len(self.table.marks - set(self.table.order))

    def next_sort(self) -> None:
        """The next column to order by; after the last one the default again."""
        sort = self.table.locator.sort
        choices = [None, *self.sort_columns]
        at = choices.index(sort[0][0]) if sort and sort[0][0] in choices else 0
        column = choices[(at + 1) % len(choices)]
        down = column is not None and self.table.schema[column].kind in ("share", "number", "duration")
        self.set_locator(self.table.locator.with_sort(*([(column, down)] if column else [])))

    def turn_sort(self) -> None:
        """Turns the first column's order round."""
        sort = self.table.locator.sort
        if sort:
            (column, down), *rest = sort
            self.set_locator(self.table.locator.with_sort((column, not down), *rest))

    def copy_text(self) -> str:
        item = self.table.current
        if item is None:
            return ""
        scene = self.grid.scene
        cells = [plain(place.column.cell(item, scene, place.width)).strip() for place in self.grid.placed]
        return "  ".join(cell for cell in cells if cell)

    def export(self) -> tuple[list[str], list[list[str]], list[Any]] | None:
        items = [self.table.items[node] for node in self.table.order]
        if not items:
            return None
        titles, rows = VIEWS[self.view].cells(items, self.deck.now(), self.deck.fleet.my_id)
        return titles, rows, [item.data for item in items]

    def sort_text(self) -> str:
        sort = self.table.locator.sort
        return "by " + ", ".join(column + (" down" if down else "") for column, down in sort) if sort else ""


class FleetView(TableBased):
    """The table of nodes and the pane beside it."""

    view = "fleet"
    sort_columns = COLUMN_ORDER

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
        self.pane = PageView(self._pane_lines, ground="panel")

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield self.grid
            yield self.pane

    def on_mount(self) -> None:
        self.pane.styles.width = PANE
        self._fit()
        self.table.rebuild(self.deck.now())

    def on_resize(self) -> None:
        self._fit()

    def _fit(self) -> None:
        self.pane.display = self.deck.size.width >= WIDE

    def _pane_lines(self, cells: int) -> list[Line]:
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

    def tick(self) -> None:
        super().tick()
        self.pane.remake()

    def move(self, key: str) -> None:
        super().move(key)
        self.pane.remake()

    def set_locator(self, locator: Locator) -> None:
        super().set_locator(locator)
        if self.pane.is_mounted:
            self.pane.remake()

    def restyle(self) -> None:
        super().restyle()
        self.pane.remake(force=True)

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


__all__ = ["FleetView", "Scene", "TableBased", "make"]
