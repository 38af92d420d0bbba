"""The loads of a fleet at an earlier moment: what each node recorded in its chain at or before it, and how old that was.

They are asked for an hour at a time and kept, so that going back and forth asks nothing twice. What was recorded long
before the moment says nothing about it, and is not shown.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tui.model import ages
from tui.model.asked import MOST, MOST_SILENT
from tui.model.text import clean

WINDOW_MS = 3_600_000
NEAR_MS = 180_000
"""Nodes record once a minute: what was recorded longer ago than three times that is no load of the moment."""
WINDOWS_KEPT = 8
RETRY_MS = 10_000
"""After so long a question that failed, or that a node left without an answer, is asked again."""
SAMPLES_MOST = 1_024


@dataclass(frozen=True)
class Load:
    """What a node recorded. Shares of the host from 0 to 1, None where unknown; `age_ms`: how long before the moment;
    `holder`: who holds the copy of its chain that it comes from, empty by the node's own word."""

    cpu: float | None
    mem: float | None
    disk: float | None
    running: int | None
    total: int | None
    age_ms: float
    holder: str = ""


@dataclass
class _Window:
    asked_ms: float = 0.0
    """When it was asked for, by the wall clock of who tells: nothing later can be in it."""
    answered: bool = False
    error: str = ""
    silent: tuple[str, ...] = ()
    samples: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """From when to when the loads are wanted, Unix milliseconds by the clock of who tells, and of which mesh."""

    from_ms: int
    to_ms: int
    mesh: str | None


class Loads:
    """The windows asked for so far, the last used kept."""

    def __init__(self) -> None:
        self._windows: dict[tuple[int, str | None], _Window] = {}

    def question(self, moment_ms: float, mesh: str | None, now_ms: float) -> Question | None:
        """What is to be asked to know the loads at that moment; None when that is known, or was asked just now."""
        key = _key(moment_ms, mesh)
        window = self._windows.get(key)
        if window is not None:
            fresh = now_ms - window.asked_ms < RETRY_MS
            if window.error or not window.answered:
                if fresh:
                    return None
            elif window.asked_ms >= moment_ms and (not window.silent or fresh):
                return None
        start = key[0] * WINDOW_MS
        return Question(start - NEAR_MS, start + WINDOW_MS, mesh)

    def asking(self, question: Question, now_ms: float) -> None:
        """It is asked now; what was known stays until the answer."""
        key = _key(question.to_ms - 1, question.mesh)
        window = self._windows.pop(key, None) or _Window()
        window.asked_ms = now_ms
        self._windows[key] = window
        while len(self._windows) > WINDOWS_KEPT:
            del self._windows[next(iter(self._windows))]

    def fold(self, question: Question, answer: object) -> None:
        """Takes `{"rows","silent"}`. Nonsense in it is left out, never raised."""
        window = self._windows.get(_key(question.to_ms - 1, question.mesh))
        if window is None:
            return
        given: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
        window.answered, window.error = True, ""
        window.silent = tuple(sorted({clean(n) for n in _list(given, "silent")[:MOST_SILENT]} - {""}))
        window.samples, window.holders = {}, {}
        for row in _list(given, "rows")[:MOST]:
            node = row.get("node_id") if isinstance(row, Mapping) else None
            if not isinstance(node, str):
                continue
            told = [
                s
                for s in _list(row, "samples")[:SAMPLES_MOST]
                if isinstance(s, (list, tuple)) and len(s) >= 6
            ]
            found = [tuple(s) for s in told if ages.number(s[0]) is not None]
            window.samples[node] = sorted(found, key=lambda s: s[0])
            window.holders[node] = clean(row.get("from_replica") or "")

    def failed(self, question: Question, why: str) -> None:
        """No answer came."""
        if (window := self._windows.get(_key(question.to_ms - 1, question.mesh))) is not None:
            window.error = clean(why) or "no answer"

    def at(self, moment_ms: float, mesh: str | None) -> dict[str, Load]:
        """By node id what was recorded last at or before that moment, near enough to it."""
        window = self._windows.get(_key(moment_ms, mesh))
        found: dict[str, Load] = {}
        for node, told in window.samples.items() if window is not None else ():
            place = bisect_right(told, moment_ms, key=lambda s: s[0]) - 1
            if place >= 0 and moment_ms - told[place][0] <= NEAR_MS:
                at_ms, cpu, mem, disk, running, total = told[place][:6]
                shares = (_share(cpu), _share(mem), _share(disk))
                counts = (_count(running), _count(total))
                found[node] = Load(
                    *shares, *counts, moment_ms - at_ms, window.holders[node] if window else ""
                )
        return found

    def standing(self, moment_ms: float, mesh: str | None) -> str:
        """What the loads shown for that moment are, in words."""
        window = self._windows.get(_key(moment_ms, mesh))
        if window is not None and window.error:
            return f"loads: {window.error}"
        if window is None or not window.answered:
            return "loads: asking the chains…"
        said = "loads as recorded by then" if self.at(moment_ms, mesh) else "no loads were recorded near it"
        count = len(window.silent)
        return f"{said}; {count} node{'s' * (count != 1)} silent" if count else said


def _key(moment_ms: float, mesh: str | None) -> tuple[int, str | None]:
    return int(moment_ms // WINDOW_MS), mesh


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    found = given.get(key)
    return found if isinstance(found, list) else []


def _share(permille: Any) -> float | None:
    value = ages.number(permille)
    return value / 1000 if value is not None and 0 <= value <= 1000 else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
