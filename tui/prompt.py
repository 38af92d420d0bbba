"""The line at the bottom: `/` filters while it is typed, `:` goes to a locator or does an action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tui.model.lineedit import LineEdit
from tui.model.locator import LocatorError
from tui.model.spans import Line
from tui.model.text import head, pad, shorten, width

CANDIDATES = 6


@dataclass
class Prompt:
    """`lead` is `/` or `:`. `live` gets the text at every change, `done` at Enter; both may raise LocatorError."""

    lead: str
    live: Callable[[str], None] | None
    done: Callable[[str], None]
    undo: Callable[[], None]
    """Puts back what was before, at Escape."""
    complete: Callable[[str], Sequence[tuple[str, str]]]
    """(completion of the whole line, what it is) for a text up to the caret."""
    history: list[str]
    edit: LineEdit = field(default_factory=LineEdit)
    error: LocatorError | None = None
    candidates: list[tuple[str, str]] = field(default_factory=list)
    at: int = -1
    _stem: str = ""
    _back: int = 0

    def key(self, key: str, character: str | None) -> bool:
        """Takes a key; True while the prompt stays open."""
        if key == "escape":
            self.undo()
            return False
        if key == "enter":
            return not self._enter()
        if key in ("tab", "shift+tab"):
            self._tab(1 if key == "tab" else -1)
            return True
        if key in ("up", "down"):
            self._recall(1 if key == "up" else -1)
        elif key in ("backspace", "ctrl+h") and not self.edit.text:
            self.undo()
            return False
        else:
            self.edit.key(key, character)
            self.candidates = []
        self._changed()
        return True

    def paste(self, text: str) -> None:
        self.edit.insert(text)
        self._changed()

    def _changed(self) -> None:
        self.error = None
        if self.live is not None:
            try:
                self.live(self.edit.text)
            except LocatorError as why:
                self.error = why
                self.undo()

    def _enter(self) -> bool:
        try:
            self.done(self.edit.text)
        except LocatorError as why:
            self.error = why
            return False
        text = self.edit.text.strip()
        if text and (not self.history or self.history[-1] != text):
            self.history.append(text)
        return True

    def _tab(self, step: int) -> None:
        if not self.candidates:
            self._stem = self.edit.text
            self.candidates = list(self.complete(self._stem))
            self.at = -1
            if not self.candidates:
                return
        self.at = (self.at + step) % len(self.candidates)
        self.edit.set(self.candidates[self.at][0])
        self._changed()
        if len(self.candidates) == 1:
            self.candidates = []

    def _recall(self, step: int) -> None:
        self._back = max(0, min(len(self.history), self._back + step))
        self.edit.set(self.history[-self._back] if self._back else "")
        self.candidates = []

    def lines(self, cells: int, most: int) -> list[Line]:
        """Candidates, the error at its place, the line itself: the latter is always there."""
        room = max(0, most - 1 - (self.error is not None))
        shown = min(CANDIDATES, room, len(self.candidates))
        first = max(0, min(self.at - shown // 2, len(self.candidates) - shown))
        out: list[Line] = []
        wide = max((width(text) for text, _ in self.candidates), default=0)
        for at, (text, about) in enumerate(self.candidates[first : first + shown], first):
            role = "accent" if at == self.at else "text"
            name = pad(text, min(wide, cells // 2))
            out.append(
                [
                    (" > " if at == self.at else "   ", role),
                    (name, role),
                    ("  ", "text"),
                    (shorten(about, cells // 2 - 6), "soft"),
                ]
            )
        if self.error is not None and most > 1:
            start = 1 + len(self.lead) + width(head(self.edit.text, self.error.pos))
            said = f"^ {self.error.text}"
            start = max(0, min(start, cells - width(said) - 1))
            out.append([(" " * start, "text"), (shorten(said, cells - start), "error")])
        out.append([(" ", "text"), (self.lead, "key"), *self.edit.spans(cells - 3)])
        return out
