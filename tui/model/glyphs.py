"""The signs on the screen, once for Unicode and once for terminals that draw some of them two cells wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STATES = ("dead", "degraded", "draining", "updating", "leaving", "joining", "alive")
"""Every state a row may show, trouble first: the default order of the fleet."""
RANK = {state: at for at, state in enumerate(STATES)}


@dataclass(frozen=True)
class Glyphs:
    """One set of signs. Every one of them is one cell wide, but `ellipsis`."""

    name: str
    states: dict[str, str]
    spark: str
    """Eight levels, lowest first."""
    bar: tuple[str, str, str]
    """Full, half and rest."""
    mark: str
    bullet: str
    separator: str
    rule: str
    ellipsis: str
    arrow: str
    up: str
    down: str
    box: str
    """Top left, top right, bottom left, bottom right, horizontal, vertical."""
    tree: str
    """Branch, last branch, trunk, edge."""
    relayed: str
    """The edge of a path that goes by relay."""
    lease: str
    """Before who holds a mesh's lease."""
    daemons: dict[str, str]
    """A daemon's state."""

    def state(self, state: str) -> str:
        return self.states.get(state, "?")

    def daemon(self, state: str) -> str:
        return self.daemons.get(state, "?")


UNICODE = Glyphs(
    name="unicode",
    states={
        "joining": "○",
        "alive": "●",
        "degraded": "◐",
        "updating": "↻",
        "draining": "▽",
        "leaving": "←",
        "dead": "✕",
    },
    spark="▁▂▃▄▅▆▇█",
    bar=("━", "╸", "─"),
    mark="✓",
    bullet="▪",
    separator="·",
    rule="─",
    ellipsis="…",
    arrow="→",
    up="▲",
    down="▼",
    box="╭╮╰╯─│",
    tree="├╰│─",
    relayed="┄",
    lease="⚑",
    daemons={
        "starting": "○",
        "running": "●",
        "stopping": "▽",
        "stopped": "□",
        "backing_off": "↻",
        "crash_looping": "✕",
    },
)

ASCII = Glyphs(
    name="ascii",
    states={
        "joining": "o",
        "alive": "*",
        "degraded": "!",
        "updating": "@",
        "draining": "v",
        "leaving": "<",
        "dead": "x",
    },
    spark="_.:-=+*#",
    bar=("#", "=", "."),
    mark="+",
    bullet="|",
    separator="|",
    rule="-",
    ellipsis="..",
    arrow=">",
    up="^",
    down="v",
    box="++++-|",
    tree="|`|-",
    relayed=".",
    lease="L",
    daemons={
        "starting": "o",
        "running": "*",
        "stopping": "v",
        "stopped": "-",
        "backing_off": "@",
        "crash_looping": "x",
    },
)

SETS = {"unicode": UNICODE, "ascii": ASCII}
ASCII_SIGNS = str.maketrans("–…→·×↑↓⚑┄", "-~>|xAVL.")
"""Signs that stand in sentences, for terminals that draw them two cells wide; each becomes one of one cell."""


def spark(history: Sequence[int | None], cells: int, glyphs: Glyphs = UNICODE) -> str:
    """A sparkline of permille samples, newest at the right; each cell shows the highest of its samples.

    The highest, not the mean: a spike that was there is to be seen. Unknown samples are blank.
    """
    samples = list(history)
    if cells <= 0:
        return ""
    per = max(1, -(-len(samples) // cells))
    line = ""
    for end in range(len(samples), 0, -per):
        known = [value for value in samples[max(0, end - per) : end] if value is not None]
        line = (glyphs.spark[min(7, max(0, max(known)) * 8 // 1001)] if known else " ") + line
    return line.rjust(cells)


def bar(value: float | None, cells: int, glyphs: Glyphs = UNICODE) -> tuple[str, str]:
    """The filled and the empty part of a bar for a share of 1; together `cells` wide. Unknown is all empty."""
    full, half, rest = glyphs.bar
    halves = round(max(0.0, min(1.0, value or 0.0)) * cells * 2)
    filled = full * (halves // 2) + (half if halves % 2 else "")
    return filled, rest * (cells - len(filled))
