"""Text from other machines, made safe and fitted to cells.

Names and reasons are somebody else's bytes: `clean` takes out whatever could move a cursor, change a colour or turn
the reading direction, before anything else looks at them. Widths are counted in terminal cells, not in characters.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_DROPPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
ELLIPSIS = "…"


def clean(value: object) -> str:
    """`value` as one line without control, format or unassigned characters; tabs and newlines become spaces."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    kept = []
    for char in text:
        if char in "\n\r\t":
            kept.append(" ")
        elif unicodedata.category(char) not in _DROPPED:
            kept.append(char)
    return "".join(kept)


def char_width(char: str) -> int:
    """Cells of one character: 0 for combining marks, 2 for wide ones, else 1."""
    if char.isascii():
        return 1
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def width(text: str) -> int:
    """Cells that `text` takes on a terminal."""
    return len(text) if text.isascii() else _wide_width(text)


@lru_cache(8192)
def _wide_width(text: str) -> int:
    return sum(map(char_width, text))


def head(text: str, cells: int) -> str:
    """The longest beginning of `text` that fits into `cells`."""
    if text.isascii():
        return text[: max(0, cells)]
    used = 0
    for at, char in enumerate(text):
        used += char_width(char)
        if used > cells:
            return text[:at]
    return text


def tail(text: str, cells: int) -> str:
    """The longest end of `text` that fits into `cells`."""
    if text.isascii():
        return text[len(text) - cells :] if cells > 0 else ""
    used = 0
    for at in range(len(text) - 1, -1, -1):
        used += char_width(text[at])
        if used > cells:
            return text[at + 1 :]
    return text


def elide(text: str, cells: int, ellipsis: str = ELLIPSIS) -> str:
    """`text`, with its middle taken out where it is longer than `cells`: both ends of a name tell it apart.

    The end gets the larger part, because ids stand there.
    """
    if width(text) <= cells:
        return text
    room = cells - width(ellipsis)
    if room <= 0:
        return head(text, cells)
    end = (room * 3 + 4) // 5
    return head(text, room - end) + ellipsis + tail(text, end)


def shorten(text: str, cells: int, ellipsis: str = ELLIPSIS) -> str:
    """`text`, ended at a word with an ellipsis where it is longer than `cells`. A long word is elided where little would
    be left without it."""
    if width(text) <= cells:
        return text
    kept = head(text, cells - width(ellipsis) - 1)
    if text[len(kept) : len(kept) + 1] not in ("", " "):
        kept = kept[: max(0, kept.rfind(" "))]
        if width(kept) < cells // 3:
            word, *more = text[len(kept) :].split(maxsplit=1)
            kept, end = f"{kept} " if kept else "", ellipsis if more else ""
            room = cells - width(kept) - width(end)
            return kept + (
                f"{word}{end}" if width(word) <= room else elide(word, room + width(end), ellipsis)
            )
    return f"{kept.rstrip()} {ellipsis}" if kept.strip() else elide(text, cells, ellipsis)


def pad(text: str, cells: int, right: bool = False) -> str:
    """`text` filled with blanks to `cells`, at its left when `right`; longer text is elided."""
    used = width(text)
    if used > cells:
        text = elide(text, cells)
        used = width(text)
    blank = " " * (cells - used)
    return blank + text if right else text + blank


def wrap(text: str, cells: int) -> list[str]:
    """`text` in lines of at most `cells`, broken between words; a word longer than a line is broken inside."""
    cells = max(1, cells)
    lines: list[str] = []
    line = ""
    for word in text.split():
        while width(word) > cells:
            if line:
                lines.append(line)
                line = ""
            part = head(word, cells) or word[:1]
            lines.append(part)
            word = word[len(part) :]
        if not word:
            continue
        joined = f"{line} {word}" if line else word
        if width(joined) > cells:
            lines.append(line)
            line = word
        else:
            line = joined
    return [*lines, line] if line or not lines else lines
