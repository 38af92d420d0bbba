"""One line of text being typed: a value and a caret, moved by keys."""

from __future__ import annotations

from dataclasses import dataclass

from tui.model.spans import Line
from tui.model.text import clean, width

LIMIT = 500


@dataclass
class LineEdit:
    """`key` takes a key and says whether it was one for editing."""

    text: str = ""
    caret: int = 0

    def set(self, text: str) -> None:
        self.text = text
        self.caret = len(text)

    def insert(self, text: str) -> None:
        """Types or pastes; control characters are left out."""
        text = clean(text)[: LIMIT - len(self.text)]
        self.text = self.text[: self.caret] + text + self.text[self.caret :]
        self.caret += len(text)

    def key(self, key: str, character: str | None) -> bool:
        """Edits by one key, with the keys of a shell. False when it is none of them."""
        text, at = self.text, self.caret
        if key in ("backspace", "ctrl+h"):
            if at:
                self.text, self.caret = text[: at - 1] + text[at:], at - 1
        elif key in ("delete", "ctrl+d"):
            self.text = text[:at] + text[at + 1 :]
        elif key in ("left", "ctrl+b"):
            self.caret = max(0, at - 1)
        elif key in ("right", "ctrl+f"):
            self.caret = min(len(text), at + 1)
        elif key in ("home", "ctrl+a"):
            self.caret = 0
        elif key in ("end", "ctrl+e"):
            self.caret = len(text)
        elif key == "ctrl+u":
            self.text, self.caret = text[at:], 0
        elif key == "ctrl+k":
            self.text = text[:at]
        elif key == "ctrl+w":
            start = len(text[:at].rstrip().rpartition(" ")[0])
            start += start > 0
            self.text, self.caret = text[:start] + text[at:], start
        elif character is not None and character.isprintable():
            self.insert(character)
        else:
            return False
        return True

    def spans(self, cells: int, role: str = "text") -> Line:
        """The line with its caret, scrolled so that the caret is in sight."""
        start = 0
        while width(self.text[start : self.caret]) > max(1, cells - 2):
            start += 1
        under = self.text[self.caret : self.caret + 1] or " "
        return [
            (self.text[start : self.caret], role),
            (under, "caret"),
            (self.text[self.caret + 1 :], role),
        ]
