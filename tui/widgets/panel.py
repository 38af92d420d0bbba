"""A box over the view that takes every key until it is closed: confirmations, help, palette, lists."""

from __future__ import annotations

from collections.abc import Callable

from textual import events
from textual.strip import Strip

from tui.model.glyphs import UNICODE, Glyphs
from tui.model.spans import Line, fit, line_width
from tui.model.text import head, width
from tui.widgets.lines import Themed


class Dialog:
    """What a panel shows. `body` scrolls, `foot` stays; `key` answers every key, True while the panel stays open."""

    title = ""
    wish = 76
    """Cells it would like to be wide."""
    cursor_line: int | None = None
    """Line of the body to keep in sight."""
    sticky_end = False
    """Opens at its end."""

    def body(self, cells: int) -> list[Line]:
        return []

    def foot(self, cells: int) -> list[Line]:
        return []

    def key(self, key: str, character: str | None) -> bool:
        """Closes on Escape, Enter and q."""
        return key not in ("escape", "enter", "q")

    def paste(self, text: str) -> None:
        """Takes pasted text, where there is a field for it."""


class Panel(Themed, can_focus=False, inherit_bindings=False):
    """Draws a `Dialog` in a frame in the middle of the screen."""

    DEFAULT_CSS = "Panel { layer: over; position: absolute; display: none; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.dialog: Dialog | None = None
        self.glyphs: Glyphs = UNICODE
        self.scroll = 0
        self._body: list[Line] = []
        self._foot: list[Line] = []
        self._on_close: Callable[[], None] | None = None

    def open(self, dialog: Dialog) -> None:
        """Shows a dialog in place of whatever was open."""
        self.dialog = dialog
        self.scroll = 10**6 if dialog.sticky_end else 0
        self.display = True
        self.remake()

    def close(self) -> None:
        self.dialog = None
        self.display = False

    def remake(self) -> None:
        """Asks the dialog for its lines, places the box and paints."""
        if self.dialog is None:
            return
        screen = self.app.size
        cells = max(10, min(self.dialog.wish, screen.width - (4 if screen.width >= 60 else 0)))
        inner = cells - 4
        self._body = self.dialog.body(inner)
        self._foot = self.dialog.foot(inner)
        high = min(
            len(self._body) + len(self._foot) + 2, max(3, screen.height - (2 if screen.height >= 16 else 0))
        )
        room = self._room(high)
        if self.dialog.cursor_line is not None:
            line = self.dialog.cursor_line
            self.scroll = min(max(self.scroll, line - room + 1), line)
        self.scroll = max(0, min(self.scroll, len(self._body) - room))
        self.styles.width = cells
        self.styles.height = high
        self.styles.offset = ((screen.width - cells) // 2, max(0, (screen.height - high) // 2))
        self.refresh(layout=True)

    def _room(self, high: int) -> int:
        return max(0, high - 2 - len(self._foot))

    def key(self, key: str, character: str | None) -> None:
        """Scrolling is the panel's, the rest is the dialog's."""
        dialog = self.dialog
        if dialog is None:
            return
        room = max(1, self._room(self.size.height))
        step = {"up": -1, "down": 1, "pageup": -room, "pagedown": room}.get(key)
        if step is not None and dialog.cursor_line is None:
            self.scroll += step
        elif not dialog.key(key, character):
            if self.dialog is dialog:
                self.close()
            return
        self.remake()

    def render_line(self, y: int) -> Strip:
        cells, high = self.size.width, self.size.height
        top_left, top_right, low_left, low_right, rule, side = tuple(self.glyphs.box)
        make = self.look.segment
        inner = cells - 4
        room = self._room(high)
        if y == 0 or y == high - 1:
            left, right = (top_left, top_right) if y == 0 else (low_left, low_right)
            said = (
                f" {head(self.dialog.title, cells - 8)} "
                if y == 0 and self.dialog and self.dialog.title
                else ""
            )
            more = ""
            if y == high - 1 and len(self._body) > room:
                more = f" {self.scroll + 1}-{min(len(self._body), self.scroll + room)} of {len(self._body)} "
            fill = max(0, cells - 3 - width(said) - len(more))
            parts = [
                (left + rule, "frame"),
                (said, "title"),
                (rule * fill, "frame"),
                (more, "soft"),
                (right, "frame"),
            ]
        else:
            at = y - 1
            if at < room:
                line = self._body[at + self.scroll] if at + self.scroll < len(self._body) else []
            else:
                line = self._foot[at - room] if at - room < len(self._foot) else []
            ground = "cursor" if line and line[0][1] == "@cursor" else "panel"
            parts_in = fit(line[1:] if ground == "cursor" else line, inner)
            segments = [make(side + " ", "frame", "panel")]
            segments += [make(text, role, ground) for text, role in parts_in]
            segments.append(make(" " + side, "frame", "panel"))
            return Strip(segments, cells)
        return Strip([make(text, role, "panel") for text, role in fit(parts, cells)], cells)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.key("down", None)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.key("up", None)


def chosen(line: Line) -> Line:
    """A line drawn as the one under the cursor."""
    return [("", "@cursor"), *line]


__all__ = ["Dialog", "Panel", "chosen", "line_width"]
