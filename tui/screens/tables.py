"""What the views that are tables have in common: cursor, marks, order, export; a pane beside one; following its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.containers import Horizontal

from tui.model.locator import Locator
from tui.model.spans import Line, plain
from tui.model.table import Table
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.widgets.lines import Lines
from tui.widgets.page import PageView
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

WIDE = 140
"""From this width on the pane is there."""
PANE = 52


class TableBased(View):
    """A view that is a table: the cursor, marks, order and export of it."""

    table: Table[Any]
    grid: TableView
    sort_columns: tuple[str, ...] = ()
    """What `s` goes through, after the default order."""
    markable = True
    """Whether its rows can be marked: ops act on nodes."""

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
        if self.markable and self.table.cursor is not None and self.table.current is not None:
            self.table.toggle(self.table.cursor)
            self.move("down")

    def mark_all(self) -> None:
        if self.markable:
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


class PanedTable(TableBased):
    """A table with a pane beside it, where there is room: everything about the row under the cursor."""

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.pane = PageView(self.pane_lines, ground="panel")

    def pane_lines(self, cells: int) -> list[Line]:
        """What the pane shows."""
        return []

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


class FollowingTable(TableBased):
    """A table whose newest line is its last, and whose cursor stays on it until somebody looks back."""

    markable = False
    whole: Lines
    """The line under the cursor in full, below the table."""

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.follow = True
        self.unseen = 0
        """What came while it was not following."""

    def move(self, key: str) -> None:
        super().move(key)
        self.whole.remake()
        at_end = self.table.cursor == (self.table.order[-1] if self.table.order else None)
        if key == "last":
            self.follow, self.unseen = True, 0
        elif not at_end:
            self.follow = False

    def toggle_follow(self) -> None:
        """Follows what comes, or stops where it is."""
        if self.follow:
            self.follow = False
        else:
            self.move("last")

    def following(self) -> Line:
        """Whether it follows, and how to; for the end of the title."""
        if self.follow:
            return [("following ", "text")]
        new = f"{self.unseen} new below, " if self.unseen else ""
        return [(new, "hot"), (self.deck.key_of("follow"), "key"), (" follows ", "text")]

    def renew(self, items: Mapping[str, Any], fresh: int) -> None:
        """Shows these lines, `fresh` of which are new."""
        self.table.items = items
        self.table.touched = True
        self.table.rebuild(self.deck.now())
        if self.follow:
            self.unseen = 0
            self.table.move_to(len(self.table.order) - 1)
        else:
            self.unseen += fresh
        if self.grid.is_mounted:
            self.grid.relayout()
            if self.follow:
                self.grid.show_cursor()
            self.whole.remake()
