"""What a measurement gives: samples of one thing in one unit, beside the bar that was promised for it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Samples of one thing. `bar` is the most (or with `at_least`, the least) that the median should be."""

    what: str
    unit: str
    samples: Sequence[float]
    bar: float | None = None
    at_least: bool = False
    note: str = ""
    runs: int | None = field(default=None)
    """How often it was tried, where one try gives many samples."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the bar; None without one."""
        if self.bar is None or not self.samples:
            return None
        return self.median >= self.bar if self.at_least else self.median <= self.bar

    def cells(self) -> list[str]:
        """The row of the table."""
        bar = "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {number(self.bar)} {self.unit}"
        if not self.samples:
            return [self.what, "–", "–", "0", bar, "", self.note]
        span = f"{number(min(self.samples))} … {number(max(self.samples))}"
        runs = (
            str(len(self.samples)) if self.runs is None else f"{self.runs} × {len(self.samples) // self.runs}"
        )
        verdict = {True: "met", False: "**over**", None: ""}[self.met]
        return [self.what, f"{number(self.median)} {self.unit}", span, runs, bar, verdict, self.note]

    def line(self) -> str:
        """For the progress shown meanwhile."""
        return " · ".join(cell for cell in self.cells() if cell)

    def document(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "median": self.median if self.samples else None,
            "samples": [round(s, 6) for s in self.samples],
            "bar": self.bar,
            "at_least": self.at_least,
            "met": self.met,
            "note": self.note,
        }


def number(value: float) -> str:
    """Three significant digits, thousands with a comma."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(figures: Iterable[Figure]) -> str:
    """The figures as a Markdown table."""
    head = ["what", "median", "range", "runs", "bar", "", "note"]
    lines = [head, ["---"] * len(head), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
