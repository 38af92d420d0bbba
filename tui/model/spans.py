"""Lines as pieces of text with a role each. Screens give roles their colours; a headless table drops them."""

from __future__ import annotations

from collections.abc import Iterable

from tui.model.text import head, width

Span = tuple[str, str]
"""(text, role). A role is a word of `tui.theme`: a state, `text`, `dim`, `accent`, `warn`, …"""
Line = list[Span]


def plain(line: Iterable[Span]) -> str:
    """The text of a line."""
    return "".join(text for text, _ in line)


def line_width(line: Iterable[Span]) -> int:
    """Cells of a line."""
    return sum(width(text) for text, _ in line)


def fit(line: Line, cells: int, role: str = "text") -> Line:
    """`line` cut or filled to exactly `cells`."""
    used = 0
    out: Line = []
    for text, span_role in line:
        size = width(text)
        if used + size > cells:
            text = head(text, cells - used)
            size = width(text)
            if text:
                out.append((text, span_role))
            used += size
            break
        out.append((text, span_role))
        used += size
    if used < cells:
        out.append((" " * (cells - used), role))
    return out


def spread(left: Line, right: Line, cells: int, role: str = "text") -> Line:
    """`left` and `right` at the two ends of a line; `right` leaves whole when both don't fit."""
    space = cells - line_width(left) - line_width(right)
    if space < 1:
        return fit(left, cells, role)
    return [*left, (" " * space, role), *right]


def keep(pieces: Iterable[Line], cells: int, separator: Span) -> Line:
    """As many whole pieces, in order, as fit into `cells`; nothing is cut inside a piece."""
    out: Line = []
    used = 0
    for piece in pieces:
        size = line_width(piece) + (width(separator[0]) if out else 0)
        if used + size > cells:
            continue
        if out:
            out.append(separator)
        out.extend(piece)
        used += size
    return out
