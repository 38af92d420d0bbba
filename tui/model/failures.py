"""The failures of the fleet: the rings of all nodes merged, newest first, and the columns that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.asked import Asked
from tui.model.locator import Kind, Value
from tui.model.spans import Line
from tui.model.table import Column, Scene
from tui.model.text import clean, elide, shorten, width

Cell = Callable[["Failure", Scene, int], Line]


class Failure:
    """One record of a ring. `data` is the row as received; ages and countdowns go on by the viewer's own clock."""

    __slots__ = (
        *("_search", "action", "at_ms", "data", "from_replica", "id", "key", "mesh", "node", "node_id"),
        *("reason", "received", "source", "target"),
    )

    def __init__(self, data: Mapping[str, Any], now: float) -> None:
        self.data = data
        self.received = now
        self.at_ms = number(data.get("at_ms"))
        self.node_id = clean(data.get("node_id"))
        self.node = clean(data.get("node")) or self.node_id
        self.mesh = clean(data.get("mesh"))
        self.source = clean(data.get("source"))
        self.action = clean(data.get("action"))
        self.target = clean(data.get("target"))
        self.reason = clean(data.get("reason"))
        self.from_replica = clean(data.get("from_replica"))
        self.id = f"{self.node_id or self.node}/{self.at_ms}/{self.action}/{self.target}"
        self.key = (-(self.at_ms or 0.0), self.node, self.action, self.target)
        self._search: str | None = None

    def figure(self, key: str) -> float | None:
        """A number of the row, None where it is unknown or nonsense."""
        return number(self.data.get(key))

    def age_ms(self, now: float) -> float | None:
        """Since it happened, by its own node's clock and then by the viewer's."""
        age = self.figure("age_ms")
        return None if age is None else age + (now - self.received) * 1000

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

    @property
    def search(self) -> str:
        """What bare words and regular expressions look at."""
        if self._search is None:
            words = [self.node, self.node_id, self.mesh, self.source, self.action, self.target, self.reason]
            self._search = " ".join(word for word in (*words, self.from_replica) if word).lower()
        return self._search


def rows_of(documents: Iterable[object], now: float = 0.0) -> list[Failure]:
    """Failures from documents that were read once, each with an id of its own, as `qd failures` prints them."""
    book = Failures()
    book.fold({"rows": list(documents)}, now)
    return list(book.rows.values())


class Failures(Asked[Failure]):
    """Every failure of the view, as last asked for."""

    def __init__(self) -> None:
        super().__init__(Failure)


def _text(
    of: Callable[[Failure], str], role: str = "text", cut: Callable[[str, int, str], str] = elide
) -> Cell:
    def cell(failure: Failure, scene: Scene, cells: int) -> Line:
        text = of(failure)
        return [(cut(text, cells, scene.glyphs.ellipsis), role)] if text else [(ages.UNKNOWN, "soft")]

    return cell


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
        "node", "NODE", "text", (14, 40), 0, _text(lambda f: f.node, "name"), lambda f, now: f.node or None,
        "the node that failed at it", ideal=lambda f, s: width(f.node), grows=(3,),
    ),
    Column(
        "mesh", "MESH", "word", (5, 16), 6, _text(lambda f: f.mesh), lambda f, now: f.mesh or None,
        "the mesh it is in", needs="meshes", ideal=lambda f, s: width(f.mesh),
    ),
    Column(
        "source", "SOURCE", "word", (8, 16), 5, _text(lambda f: f.source), lambda f, now: f.source or None,
        "which part of the node tells it", ideal=lambda f, s: width(f.source),
    ),
    Column(
        "action", "ACTION", "word", (10, 30), 0, _text(lambda f: f.action), lambda f, now: f.action or None,
        "what was tried", needs="action", ideal=lambda f, s: width(f.action), grows=(2,),
    ),
    Column(
        "target", "TARGET", "text", (8, 32), 2, _text(lambda f: f.target), lambda f, now: f.target or None,
        "on what", ideal=lambda f, s: width(f.target), grows=(4,),
    ),
    Column(
        "next", "NEXT", "duration", (10,), 1, _then, lambda f, now: f.left_ms(now),
        "until the gate opens, or it is tried again", needs="next",
    ),
    Column(
        "reason", "REASON", "text", (14, 400), 1, _text(lambda f: f.story, cut=shorten), lambda f, now: f.story or None,
        "why, and the replica it was read from", ideal=lambda f, s: width(f.story), grows=(4,),
    ),
)  # fmt: skip


def _hidden(key: str, kind: Kind, about: str, value: Callable[[Failure, float], Value]) -> Column[Failure]:
    return Column(key, "", kind, (1,), 99, lambda f, s, w: [], value, about, needs="never")


FAILURES_HIDDEN: tuple[Column[Failure], ...] = (
    _hidden("id", "word", "the id of its node", lambda f, now: f.node_id or None),
    _hidden("from_replica", "text", "the replica it was read from", lambda f, now: f.from_replica or None),
    _hidden(
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
