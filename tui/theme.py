"""Roles and their looks: dark, light, and without any colour.

Colour carries state only, plus one accent for focus. The state colours keep apart for the common colour blindnesses
(blue-green, amber, sky, mauve, vermilion), and no state is told by colour alone. Dim means old.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from rich.segment import Segment
from rich.style import Style

_STATES_DARK = {
    "alive": "#35c493",
    "degraded": "#f2b33d",
    "updating": "#63b9f2",
    "draining": "#d79ac6",
    "joining": "#c3ccd6",
    "leaving": "#9aa8b5",
    "dead": "#ff7350",
}
_STATES_LIGHT = {
    "alive": "#00725a",
    "degraded": "#8f5700",
    "updating": "#005f9e",
    "draining": "#8a3d78",
    "joining": "#4b5763",
    "leaving": "#5d6a76",
    "dead": "#b93408",
}
_DARK = {
    **_STATES_DARK,
    "text": "#d3dae2",
    "name": "#eef2f6",
    "soft": "#8996a4",
    "dim": "#6b7885",
    "hot": "#ffffff",
    "track": "#34404c",
    "spark": "#7f93a6",
    "accent": "#8ecbff",
    "error": "#ff7350",
    "ok": "#35c493",
    "frame": "#4a5866",
}
_LIGHT = {
    **_STATES_LIGHT,
    "text": "#1f2830",
    "name": "#0b1117",
    "soft": "#5b6772",
    "dim": "#7d8790",
    "hot": "#000000",
    "track": "#cdd4da",
    "spark": "#55626e",
    "accent": "#0a5ea8",
    "error": "#b93408",
    "ok": "#00725a",
    "frame": "#9aa5af",
}
_GROUNDS_DARK = {
    "base": "#10151b",
    "bar": "#1a222b",
    "cursor": "#26384c",
    "panel": "#171f28",
    "banner": "#4a3510",
}
_GROUNDS_LIGHT = {
    "base": "#fbfcfd",
    "bar": "#e9edf1",
    "cursor": "#d3e4f5",
    "panel": "#f1f4f7",
    "banner": "#fbe6bd",
}
_BOLD = frozenset({"hot", "title", "accent", "dead", "error", "key", "name-cursor"})
_ALIASES = {"title": "name", "key": "accent", "name-cursor": "name", "head": "soft"}


@dataclass
class Theme:
    """A look. `style(role, ground)` is the only thing that widgets ask."""

    name: str
    dark: bool = True
    colours: dict[str, str] = field(default_factory=dict)
    grounds: dict[str, str] = field(default_factory=dict)
    signs: dict[int, int] | None = None
    """Replacements for signs that the terminal can't draw in one cell."""
    _cache: dict[tuple[str, str], Style] = field(default_factory=dict, repr=False)

    def style(self, role: str, ground: str = "base") -> Style:
        """The style of a role on a ground; an unknown role looks like text."""
        found = self._cache.get((role, ground))
        if found is None:
            found = self._cache[role, ground] = self._make(role, ground)
        return found

    def segment(self, text: str, role: str, ground: str = "base") -> Segment:
        """A piece of text in the style of its role."""
        return Segment(text if self.signs is None else text.translate(self.signs), self.style(role, ground))

    def _make(self, role: str, ground: str) -> Style:
        bold = role in _BOLD
        if not self.colours:
            return Style(
                bold=bold or None,
                dim=role in ("dim", "soft", "track", "frame") or None,
                underline=role == "head" or None,
                reverse=ground in ("cursor", "banner") or role == "caret" or None,
            )
        if role == "caret":
            return Style(color=self.grounds["base"], bgcolor=self.colours["accent"])
        if role == "dim" and ground == "cursor":
            role = "soft"
        name = _ALIASES.get(role, role)
        colour = self.colours.get(name, self.colours["text"])
        return Style(color=colour, bgcolor=self.grounds.get(ground, self.grounds["base"]), bold=bold or None)

    @property
    def background(self) -> str:
        return self.grounds.get("base", "ansi_default")


DARK = Theme("dark", True, _DARK, _GROUNDS_DARK)
LIGHT = Theme("light", False, _LIGHT, _GROUNDS_LIGHT)
PLAIN = Theme("plain", True)
"""No colour at all: bold, dim, underline and reverse only."""


def choose(wanted: str = "auto") -> Theme:
    """The look for `auto`, `dark`, `light` or `plain`; NO_COLOR beats them all. Auto reads COLORFGBG, else is dark."""
    if os.environ.get("NO_COLOR") or wanted == "plain":
        return PLAIN
    if wanted == "auto":
        ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
        wanted = "light" if ground.isdigit() and int(ground) in (7, 15) else "dark"
    return LIGHT if wanted == "light" else DARK
