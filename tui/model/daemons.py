"""The daemons of the fleet as their nodes tell of them: what runs, what ails, and what waits for how long."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from agent.spec.resources import cores_text, size_text
from tui.model import ages
from tui.model.ages import number
from tui.model.asked import Asked, ToldRow
from tui.model.text import clean

STATES = ("crash_looping", "backing_off", "stopping", "starting", "stopped", "running")
"""Every state of a daemon, trouble first."""
WAITING = frozenset({"backing_off", "crash_looping"})
"""States that end by themselves, at `until_ms`."""
ROLES = {
    "crash_looping": "dead",
    "backing_off": "degraded",
    "stopping": "draining",
    "starting": "joining",
    "stopped": "leaving",
    "running": "alive",
}
"""The colour of a state: that of a node's state which means the same to who looks."""
AMOUNT_MAX = 2**62
"""Cores or bytes; more than that is nonsense."""
KNOWN_S = 15.0
"""So long the daemons of a node are named in a forecast; after that they are only counted."""


class Daemon(ToldRow):
    """One daemon on one node."""

    __slots__ = ("health", "held_back", "name", "rank", "state")

    def __init__(self, data: Mapping[str, Any], now: float) -> None:
        super().__init__(data, now)
        self.name = clean(data.get("name"))
        self.state = clean(data.get("state"))
        self.health = clean(data.get("health"))
        self.held_back = clean(data.get("held_back"))
        self.id = f"{self.node_id or self.node}/{self.name}"
        self.rank = self._rank()

    def _rank(self) -> int:
        """Trouble first; what is stopped because it should be is no trouble."""
        if self.state == "crash_looping":
            return 0
        if self.ails and self.health == "unhealthy":
            return 1
        if self.state == "backing_off":
            return 2
        if self.ails or self.waits:
            return 3
        return {"stopping": 4, "starting": 5, "running": 6, "stopped": 7}.get(self.state, 3)

    @property
    def ails(self) -> bool:
        """Whether it runs and says that it is not well."""
        return self.state == "running" and self.health in ("degraded", "unhealthy")

    @property
    def waits(self) -> bool:
        """Whether it should run and doesn't, and nothing is under way."""
        return self.state == "stopped" and (bool(self.held_back) or self.intent == "run")

    @property
    def intent(self) -> str:
        """`run`, `stop`, or empty."""
        return clean(self.data.get("intent"))

    @property
    def word(self) -> str:
        return self.state.replace("_", " ") or "unknown"

    @property
    def role(self) -> str:
        """The colour of its state, or of its health where that is worse."""
        if self.ails:
            return "dead" if self.health == "unhealthy" else "degraded"
        return ROLES.get(self.state, "text")

    @property
    def status(self) -> str:
        """What it last said of itself."""
        return clean(self.data.get("status"))

    @property
    def needs(self) -> str:
        """What is set aside for it, in words; empty where it doesn't say."""
        return amounts(self.data.get("resources"))

    def left_ms(self, now: float) -> float | None:
        """What is left of its backoff or crash-loop gate, never below 0; None without one."""
        if self.state not in WAITING:
            return None
        left = self.figure("until_in_ms")
        left = self.figure("until_ms") if left is None else left
        return None if left is None else max(0.0, left - (now - self.received) * 1000)

    def next_text(self, now: float) -> str:
        """`in 4:20` until it is started again; empty where nothing is waited for."""
        left = self.left_ms(now)
        return "" if left is None else f"in {ages.countdown(left)}" if left > 0 else "now"

    def detail(self, now: float) -> str:
        """The line below a daemon that needs explaining; empty for one that doesn't."""
        parts = []
        if self.state in WAITING or self.ails or self.state not in STATES:
            parts.append(self.reason)
        if self.state in WAITING and (wait := self.next_text(now)):
            parts.append(f"started again {wait}")
        if self.held_back and self.state != "running":
            parts.append(f"held back: {self.held_back}")
        elif self.waits:
            parts.append(self.reason or "should run and does not; its node has not said why")
        return ", ".join(part for part in parts if part)

    def whole(self, now: float) -> str:
        """Everything about it in one paragraph."""
        age = self.age_ms(now)
        pid = self.figure("pid")
        health = "" if not self.health else f"{self.health}: {self.reason}" if self.reason else self.health
        parts = [
            f"{self.name} on {self.node}",
            self.word + (f" for {ages.age(age)}" if age is not None else ""),
            f"started again {self.next_text(now)}" if self.next_text(now) else "",
            health or self.reason,
            f"held back: {self.held_back}" if self.held_back else "",
            f"says: {self.status}" if self.status else "",
            f"needs {self.needs}" if self.needs and not self.held_back else "",
            f"should {self.intent}" if self.intent else "no intent: nobody asked for it",
            f"pid {pid:.0f}" if pid is not None else "",
        ]
        return "; ".join(part for part in parts if part)

    def words(self) -> list[str]:
        return [self.name, self.word, self.state, self.health, self.held_back, self.status, self.intent]


def amounts(given: object) -> str:
    """`0.5 cores, 512M memory` of `{"cpu": cores, "memory": bytes}`; empty where neither is known."""
    if not isinstance(given, Mapping):
        return ""
    cpu, memory = number(given.get("cpu")), number(given.get("memory"))
    said = []
    if cpu is not None and 0 <= cpu < AMOUNT_MAX:
        said.append(f"{cores_text(round(cpu * 1000))} core{'s' * (cpu != 1)}")
    if memory is not None and 0 <= memory < AMOUNT_MAX:
        said.append(f"{size_text(int(memory))} memory")
    return ", ".join(said)


def make(data: Mapping[str, Any], now: float) -> Daemon | None:
    """A daemon out of a row; None for one without a name."""
    return Daemon(data, now) if isinstance(data.get("name"), str) and clean(data["name"]) else None


def daemon_key(daemon: Daemon) -> tuple[int, str, str, str]:
    """The default order: trouble first, then by name and node."""
    return daemon.rank, daemon.name, daemon.node, daemon.node_id


def daemon_height(daemon: Daemon) -> int:
    """Lines of a daemon: two when there is something to say about it."""
    return 2 if daemon.detail(daemon.received) else 1


class Daemons(Asked[Daemon]):
    """Every daemon of the view, as last asked for; and those of single nodes, as their own pages told of them."""

    def __init__(self) -> None:
        super().__init__(make)
        self._pages: dict[str, tuple[float, tuple[str, ...]]] = {}

    def learn(self, node_id: str, documents: object, now: float) -> None:
        """Takes the daemons of one node from its own page."""
        if isinstance(documents, list):
            self._pages = {n: page for n, page in self._pages.items() if now - page[0] <= KNOWN_S}
            self._pages[node_id] = now, tuple(_running(Daemons.read(documents, now)))

    def names(self, now: float) -> dict[str, tuple[str, ...]]:
        """Node id → names of the daemons that run there, of those nodes that told it within KNOWN_S."""
        found: dict[str, list[Daemon]] = {}
        for daemon in self.rows.values():
            if now - daemon.received <= KNOWN_S:
                found.setdefault(daemon.node_id, []).append(daemon)
        told = {node: tuple(_running(rows)) for node, rows in found.items()}
        return {n: names for n, (at, names) in self._pages.items() if now - at <= KNOWN_S} | told

    def counts(self, mesh: str | None = None) -> Counter[str]:
        """Daemons a state, of one mesh or of all."""
        return Counter(daemon.state for daemon in self.rows.values() if mesh in (None, daemon.mesh))


def _running(rows: Iterable[Daemon]) -> list[str]:
    return sorted(daemon.name for daemon in rows if daemon.state in ("running", "starting", "stopping"))


def saturation(daemon: Daemon) -> float | None:
    """How full it is, 0 to 1; None where it doesn't say or says nonsense."""
    value = daemon.figure("saturation")
    return None if value is None or math.isnan(value) else max(0.0, min(1.0, value))
