"""Lines that scroll: a node's page, the detail pane."""

from __future__ import annotations

from collections.abc import Callable

from textual.geometry import Region, Size
from textual.strip import Strip

from tui.model.spans import Line
from tui.widgets.lines import Sheet, paint


class PageView(Sheet, can_focus=False, inherit_bindings=False):
    """Draws the lines that `make(cells)` gives, as many as there are."""

    def __init__(
        self, make: Callable[[int], list[Line]], ground: str = "base", *, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self._make = make
        self.ground = ground
        self.lines: list[Line] = []

    def remake(self, force: bool = False) -> None:
        """Asks for the lines again and repaints those that differ."""
        width = self.size.width
        if not width or not self.display:
            return
        before = self.lines
        cells = self.room(len(before)) or width
        self.lines = self._make(cells)  # mostly it scrolls when it did before: lines are made once, not twice
        if self.room(len(self.lines)) != cells:
            self.lines = self._make(self.room(len(self.lines)))
        if force or len(before) != len(self.lines):
            self.virtual_size = Size(width, len(self.lines))
            self.refresh()
            return
        top = round(self.scroll_y)
        for y, (old, new) in enumerate(zip(before, self.lines, strict=True)):
            if old != new and top <= y < top + self.size.height:
                self.refresh(Region(0, y - top, width, 1))

    def on_resize(self) -> None:
        self.remake(force=True)

    def render_line(self, y: int) -> Strip:
        at = y + round(self.scroll_y)
        line = self.lines[at] if at < len(self.lines) else []
        return paint(line, self.room(len(self.lines)), self.look, self.ground)

    def scroll_by(self, lines: int) -> None:
        self.scroll_to(y=max(0, self.scroll_y + lines), animate=False, immediate=True)
