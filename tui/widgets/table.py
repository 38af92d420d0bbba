"""The row-model table: a scroll view that draws lines out of a `Table` and repaints only those that differ."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip

from tui.model.glyphs import UNICODE, Glyphs
from tui.model.spans import Line, line_width
from tui.model.table import Placed, Scene, Table, layout
from tui.model.text import pad, shorten, width
from tui.widgets.lines import Sheet, paint

SAMPLE = 150
"""Rows looked at to fit columns to their content: the first ones in order, so that scrolling changes no width."""


class TableView(Sheet, can_focus=False, inherit_bindings=False):
    """Shows a `Table`. Its first line is the header and stays; the model scrolls under it."""

    class Opened(Message):
        """A row was double-clicked."""

    class Moved(Message):
        """The cursor was put on a row with the mouse."""

    def __init__(
        self,
        table: Table[Any],
        lead: Callable[[Any, Scene], Line],
        detail: Callable[[Any, Scene], str],
        facts: Callable[[list[Any]], frozenset[str]],
        old: Callable[[Any, float], bool],
        empty: Callable[[], list[Line]],
        *,
        id: str | None = None,
    ) -> None:
        super().__init__(id=id)
        self.table = table
        self.lead = lead
        """The sign before a row, one cell wide."""
        self.detail = detail
        self.facts = facts
        self.old = old
        self.empty = empty
        self.scene = Scene()
        self.placed: list[Placed[Any]] = []
        self.clock: Callable[[], float] = lambda: 0.0
        self.me: Callable[[], str] = lambda: ""
        self.here: Callable[[], str] = lambda: ""
        self.holders: Callable[[], Collection[str]] = tuple
        self.find: Callable[[], str] = str
        self.glyphs: Glyphs = UNICODE
        self._painted: dict[int, tuple[Line, str]] = {}
        self._made: dict[int, tuple[Line, str]] = {}
        """Lines that `repaint` has made and that are still to be painted."""
        self._drawn_width = 0
        self._revision = -1

    # -- keeping up with the model

    @property
    def cells(self) -> int:
        """The width that rows are drawn in."""
        return self.room(self.table.lines + 1)

    def relayout(self) -> None:
        """Places the columns anew: the size, the rows or what they hold have changed."""
        rows = [self.table.items[node] for node in self.table.order[:SAMPLE]]
        self.scene = Scene(
            self.clock(), self.me(), self.table.locator.mesh, self.glyphs, self.facts(rows), self.here(), self.holders(),
            self.find(),
        )  # fmt: skip
        width = self.cells
        self.placed = layout(self.table.columns, width, self.scene, rows, gap=2 if width >= 110 else 1)
        self._drawn_width = width
        self._revision = self.table.revision
        self._made.clear()
        self.virtual_size = Size(width, self.table.lines + 1)
        self.refresh()

    def repaint(self) -> None:
        """Draws what differs from the screen: after a change of rows, of the cursor, or of the clock."""
        if self.table.revision != self._revision or self.cells != self._drawn_width:
            self.relayout()
            return
        self.scene = replace(self.scene, now=self.clock(), holders=self.holders(), find=self.find())
        width = self.cells
        for y in range(self.size.height):
            made = self._line(y)
            before = self._painted.get(y)
            if before != made:
                self._made[y] = made
                x, cells = _span(before, made, width)
                self.refresh(Region(x, y, cells, 1))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        self._made.clear()
        super().watch_scroll_y(old_value, new_value)

    def on_resize(self) -> None:
        self.relayout()
        self.show_cursor()

    def show_cursor(self) -> None:
        """Scrolls so that the cursor's row is on the screen."""
        span = None if self.table.cursor is None else self.table.span(self.table.cursor)
        if span is None:
            return
        first, height = span
        top, room = round(self.scroll_y), max(1, self.size.height - 1)
        if first < top:
            self.reveal(first)
        elif first + height > top + room:
            self.reveal(min(first, first + height - room))

    # -- drawing

    def _line(self, y: int) -> tuple[Line, str]:
        if y == 0:
            return self._header(), "bar"
        at = self.table.at_line(y - 1 + round(self.scroll_y))
        if at is None:
            if not self.table.order:
                lines = self.empty()
                return (lines[y - 2] if 0 <= y - 2 < len(lines) else []), "base"
            return [], "base"
        node, inner = at
        item = self.table.items[node]
        ground = "cursor" if node == self.table.cursor else "base"
        line = self._row(node, item) if inner == 0 else self._detail(item)
        if self.old(item, self.scene.now):
            line = [(text, "dim") for text, _ in line]
        return line, ground

    def _header(self) -> Line:
        sorts = dict(self.table.locator.sort)
        out: Line = [("   ", "head")]
        for place in self.placed:
            title = place.column.title
            role = "head"
            if place.column.key in sorts:
                title = (title or place.column.key.upper()) + (
                    self.glyphs.down if sorts[place.column.key] else self.glyphs.up
                )
                role = "title"
            self._gap(out, place)
            out.append((pad(title, place.width, place.column.right)[: place.width], role))
        return out

    @staticmethod
    def _gap(out: Line, place: Placed[Any]) -> None:
        used = sum(len(text) for text, _ in out)
        if used < place.x:
            out.append((" " * (place.x - used), "text"))

    def _row(self, node: str, item: Any) -> Line:
        mark = self.glyphs.mark if node in self.table.marks else " "
        out: Line = [(mark, "accent"), *self.lead(item, self.scene), (" ", "text")]
        x, blanks = 3, 0
        for place in self.placed:
            cell = place.column.cell(item, self.scene, place.width)
            spare = place.width - line_width(cell)
            blanks += place.x - x + (spare if place.column.right else 0)
            if blanks > 0:
                out.append((" " * blanks, "text"))
            out += cell
            blanks = 0 if place.column.right else spare
            x = place.x + place.width
        return out

    def _detail(self, item: Any) -> Line:
        text = shorten(self.detail(item, self.scene), self.cells - 6, self.glyphs.ellipsis)
        return [("     ", "text"), (text, "text")]

    def render_line(self, y: int) -> Strip:
        width = self.cells
        line, ground = self._made.pop(y) if y in self._made else self._line(y)
        self._painted[y] = (line, ground)
        return paint(line, width, self.look, ground)

    # -- mouse

    def on_click(self, event: events.Click) -> None:
        event.stop()
        at = self.table.at_line(event.y - 1 + round(self.scroll_y)) if event.y > 0 else None
        if at is None:
            return
        self.table.go(at[0])
        self.repaint()
        self.post_message(self.Opened() if event.chain == 2 else self.Moved())


def _span(before: tuple[Line, str] | None, after: tuple[Line, str], cells: int) -> tuple[int, int]:
    """(x, width) of what differs between two drawings of a line: a terminal over a slow link gets no more than that."""
    if before is None or before[1] != after[1]:
        return 0, cells
    old, new = before[0], after[0]
    head = tail = 0
    most = min(len(old), len(new))
    while head < most and old[head] == new[head]:
        head += 1
    while tail < most - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    sizes = [width(text) for text, _ in new]
    x, end = sum(sizes[:head]), sum(sizes)
    if line_width(old) != end:
        return x, max(1, cells - x)
    return x, max(1, end - x - sum(sizes[len(sizes) - tail :]))
