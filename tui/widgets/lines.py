"""A few lines of spans, painted as they are: headers, banners, footers."""

from __future__ import annotations

from collections.abc import Callable

from textual import events
from textual.geometry import Region
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from tui.model.spans import Line, fit
from tui.theme import DARK, Theme


def paint(line: Line, cells: int, theme: Theme, ground: str) -> Strip:
    """A line as a strip of exactly `cells`, every segment styled, blanks too. Neighbours of one role are one segment:
    what is done to a strip on its way to the terminal costs by the segment."""
    segments = []
    said, role = "", ""
    for text, next_role in fit(line, cells):
        if next_role == role or (next_role == "text" and text.isspace()):
            said += text
            role = role or next_role
        else:
            if said:
                segments.append(theme.segment(said, role, ground))
            said, role = text, next_role
    if said:
        segments.append(theme.segment(said, role, ground))
    return Strip(segments, cells)


class Themed(Widget):
    """A widget that draws spans in the look of its app."""

    @property
    def look(self) -> Theme:
        return getattr(self.app, "look", DARK)


class Lines(Themed, can_focus=False, inherit_bindings=False):
    """Draws `lines`, made by whoever owns it for the width it has; as high as they are, and hidden when there are none."""

    DEFAULT_CSS = "Lines { height: auto; width: 1fr; }"

    def __init__(
        self, make: Callable[[int], list[Line]], ground: str = "base", *, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self._make = make
        self.ground = ground
        self.lines: list[Line] = []
        self.pick: Callable[[int, int], None] | None = None
        """Called with the column and line of a click."""
        self.keep_end = False
        """Whether its last lines are the ones to show until the layout gives it room for all."""

    def remake(self) -> None:
        """Asks for the lines again and repaints those that differ."""
        width = self.size.width or self.app.size.width
        lines = self._make(width)
        if lines == self.lines:
            return
        before, self.lines = self.lines, lines
        if len(before) != len(lines):
            self.styles.height = len(lines)
            self.display = bool(lines)
            self.refresh(layout=True)
            return
        for y, (old, new) in enumerate(zip(before, lines, strict=True)):
            if old != new:
                self.refresh(Region(0, y, self.size.width, 1))

    def on_mount(self) -> None:
        self.styles.height = len(self.lines)
        self.remake()
        self.display = bool(self.lines)

    def on_resize(self) -> None:
        self.lines = self._make(self.size.width)
        self.refresh()

    def get_content_height(self, container: object, viewport: object, width: int) -> int:
        return len(self.lines)

    def render_line(self, y: int) -> Strip:
        at = y + max(0, len(self.lines) - self.size.height) if self.keep_end else y
        line = self.lines[at] if at < len(self.lines) else []
        return paint(line, self.size.width, self.look, self.ground)

    def on_click(self, event: events.Click) -> None:
        if self.pick is not None:
            event.stop()
            self.pick(event.x, event.y)


class Sheet(ScrollView, Themed, can_focus=False, inherit_bindings=False):
    """A scroll view of lines that knows beforehand how many cells its scrollbar leaves."""

    DEFAULT_CSS = "Sheet { scrollbar-size-vertical: 1; overflow-x: hidden; overflow-y: auto; height: 1fr; }"

    def room(self, lines: int) -> int:
        """Cells for the lines themselves, when there are so many of them."""
        return max(0, self.size.width - (lines > self.size.height))

    def reveal(self, y: float) -> None:
        """Scrolls to a line; once more after the layout, which may only then know how far it can go."""
        self.scroll_to(y=y, animate=False, immediate=True)
        if round(self.scroll_y) != round(max(0.0, y)):
            self.call_after_refresh(self.scroll_to, y=y, animate=False, immediate=True)
