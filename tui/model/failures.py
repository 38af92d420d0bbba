"""The failures of the fleet: the rings of all nodes merged, newest first, and the columns that show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.asked import Asked, ToldRow
from tui.model.spans import Line
from tui.model.table import Column, Scene, hidden, text_cell
from tui.model.text import clean, shorten, width

Cell = Callable[["Failure", Scene, int], Line]


class Failure(ToldRow):
    """One record of a ring. Its age is by its own node's clock, and then by the viewer's."""

    __slots__ = ("action", "at_ms", "from_replica", "key", "source", "target")

    def __init__(self, data: Mapping[str, Any], now: float) -> None:
        super().__init__(data, now)
        self.at_ms = number(data.get("at_ms"))
        self.source = clean(data.get("source"))
        self.action = clean(data.get("action"))
        self.target = clean(data.get("target"))
        self.from_replica = clean(data.get("from_replica"))
        self.id = f"{self.node_id or self.node}/{self.at_ms}/{self.action}/{self.target}"
        self.key = (-(self.at_ms or 0.0), self.node, self.action, self.target)

    def left_ms(self, now: float) -> float | None:
        """Until its gate opens or it is tried again; None without either, negative once that has passed."""
        until = self.figure("until_ms")
        if until is not None:
            return until - (now - self.received) * 1000
        after, age = self.figure("retry_after_ms"), self.age_ms(now)
        return None if after is None or age is None else after - age

    def then(self, now: float) -> str:
        """`gate 4:20`, `retry 0:03`; empty where nothing is waited for any more."""
        left = self.left_ms(now)
        if left is None or left <= 0:
            return ""
        return f"{'retry' if self.figure('until_ms') is None else 'gate'} {ages.countdown(left)}"

    @property
    def story(self) -> str:
        """Why, and where it was read when its node can't tell it any more."""
        mark = f"from the replica on {self.from_replica}" if self.from_replica else ""
        return ", ".join(part for part in (self.reason, mark) if part)

    def whole(self, now: float) -> str:
        """Everything about it in one paragraph."""
        age = self.age_ms(now)
        parts = [
            f"{self.action} {self.target}".strip() or "failure",
            f"on {self.node}",
            f"told by {self.source}" if self.source else "",
            self.story or "no reason given",
            self.then(now),
            "" if age is None else f"{ages.age(age)} ago",
        ]
        return "; ".join(part for part in parts if part)

    def words(self) -> list[str]:
        return [self.source, self.action, self.target, self.from_replica]


class Failures(Asked[Failure]):
    """Every failure of the view, as last asked for."""

    def __init__(self) -> None:
        super().__init__(Failure)


def _when(failure: Failure, scene: Scene, cells: int) -> Line:
    return [(ages.clock(failure.at_ms), "text")]


def _age(failure: Failure, scene: Scene, cells: int) -> Line:
    return [(ages.age(failure.age_ms(scene.now)), "text")]


def _then(failure: Failure, scene: Scene, cells: int) -> Line:
    return [(failure.then(scene.now), "hot")] if failure.then(scene.now) else []


FAILURES: tuple[Column[Failure], ...] = (
    Column("time", "TIME", "number", (8,), 4, _when, lambda f, now: f.at_ms, "when, by the clock of its node"),
    Column("age", "AGE", "duration", (4,), 0, _age, lambda f, now: f.age_ms(now), "how long ago", right=True),
    Column(
        "node", "NODE", "text", (14, 40), 0, text_cell(lambda f: f.node, "name"), lambda f, now: f.node or None,
        "the node that failed at it", ideal=lambda f, s: width(f.node), grows=(0,),
    ),
    Column(
        "mesh", "MESH", "word", (5, 16), 6, text_cell(lambda f: f.mesh), lambda f, now: f.mesh or None,
        "the mesh it is in", needs="meshes", ideal=lambda f, s: width(f.mesh),
    ),
    Column(
        "source", "SOURCE", "word", (8, 16), 5, text_cell(lambda f: f.source), lambda f, now: f.source or None,
        "which part of the node tells it", ideal=lambda f, s: width(f.source),
    ),
    Column(
        "action", "ACTION", "word", (10, 30), 3, text_cell(lambda f: f.action), lambda f, now: f.action or None,
        "what was tried", needs="action", ideal=lambda f, s: width(f.action), grows=(3,),
    ),
    Column(
        "target", "TARGET", "text", (8, 32), 1, text_cell(lambda f: f.target), lambda f, now: f.target or None,
        "on what", ideal=lambda f, s: width(f.target), grows=(1,),
    ),
    Column(
        "next", "NEXT", "duration", (10,), 1, _then, lambda f, now: f.left_ms(now),
        "until the gate opens, or it is tried again", needs="next",
    ),
    Column(
        "reason", "REASON", "text", (14, 400), 1, text_cell(lambda f: f.story, cut=shorten), lambda f, now: f.story or None,
        "why, and the replica it was read from", ideal=lambda f, s: width(f.story), grows=(2,),
    ),
)  # fmt: skip


FAILURES_HIDDEN: tuple[Column[Failure], ...] = (
    hidden("id", "word", "the id of its node", lambda f, now: f.node_id or None),
    hidden("from_replica", "text", "the replica it was read from", lambda f, now: f.from_replica or None),
    hidden(
        "retry", "duration", "after how long it is tried again", lambda f, now: f.figure("retry_after_ms")
    ),
)


def failure_facts(rows: list[Failure]) -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    facts = {"meshes"} if len({failure.mesh for failure in rows}) > 1 else set()
    facts |= {"action"} if any(failure.action for failure in rows) else set()
    return frozenset(facts | ({"next"} if any(f.then(f.received) for f in rows) else set()))


def failure_lead(failure: Failure, scene: Scene) -> Line:
    """The sign before a failure: held or tried again, told by a dead node's replica, or over."""
    if failure.then(scene.now):
        return [("!", "hot")]
    return [(scene.glyphs.state("dead"), "dead")] if failure.from_replica else [(scene.glyphs.bullet, "text")]
