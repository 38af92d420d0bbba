"""What is, as far as this node knows: the state that the fold changes and reconcile looks at.

Beside what is known it keeps what makes a pass cheap: which ids may need a look since the last one (`work`),
which come due by themselves (`wake`), and which sections of the snapshot no longer hold (`changed`; whoever
publishes a snapshot clears it). None of that decides anything: a pass over everything gives the same actions.
"""

from __future__ import annotations

import heapq
from collections import deque

import msgspec

from agent.meshos.actions import CHAIN_KINDS, DAEMON_KINDS, Action, Key
from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import DaemonControl
from agent.meshos.daemons import Daemon
from agent.meshos.desired import Desired
from agent.meshos.events import Id
from agent.meshos.health import OwnHealth
from agent.meshos.maintenance import Maintenance
from agent.meshos.own import OwnLife
from agent.meshos.peers import UNTOUCHED, AvoidEntry, Mirror, PeerHealth, Rtt
from agent.meshos.replicas import Chain

CONTROLS_KEPT = 64
NAMED = 3
"""How many of a kind are named where many may stand."""


class Emitted(msgspec.Struct, frozen=True):
    """An action that went out and that the executor has not acknowledged."""

    action: Action
    at_ms: int


class FailureRecord(msgspec.Struct, frozen=True):
    """Something that went wrong and was survived. `retry_after_ms` is a duration, `until_ms` a loop time."""

    at_ms: int
    source: str
    action: str | None
    target: Id | None
    reason: str
    retry_after_ms: int | None = None
    until_ms: int | None = None


class Counts:
    """What only ever grows: the `stats` section."""

    __slots__ = (
        "actions_dispatched",
        "actions_dropped",
        "actions_emitted",
        "actions_failed",
        "actions_gated",
        "backpressure_edges",
        "failures",
        "ops_refused",
        "transitions",
        "transitions_refused",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    actions_dispatched: int
    actions_dropped: int
    actions_emitted: int
    actions_failed: int
    actions_gated: int
    backpressure_edges: int
    failures: int
    ops_refused: int
    transitions: int
    transitions_refused: int

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in sorted(self.__slots__)}


class Work:
    """Which ids a pass has to look at."""

    __slots__ = ("all_daemons", "chains", "daemons", "peers")

    def __init__(self) -> None:
        self.daemons: set[Id] = set()
        self.all_daemons = False
        self.chains: set[Id] = set()
        self.peers: set[Id] = set()


class MeshOsState:
    """Everything the engine knows. Samples stand in the order of their times: what expires is in front."""

    __slots__ = (
        "avoid",
        "backpressure",
        "blobs",
        "blobs_here",
        "chains",
        "changed",
        "changed_chains",
        "changed_daemons",
        "changed_peers",
        "config",
        "controls",
        "counts",
        "daemons",
        "dead",
        "desired",
        "emitted",
        "failures",
        "health",
        "held_by",
        "in_flight",
        "last_full_pass_ms",
        "last_tick_ms",
        "led",
        "life",
        "mirrors",
        "now_ms",
        "own_health",
        "rtt",
        "scores",
        "surveyed",
        "this_node",
        "timers",
        "timers_set",
        "troubled",
        "uncounted",
        "unreachable",
        "unreachable_since",
        "work",
    )

    def __init__(self, this_node: Id, config: MeshOsConfig | None = None) -> None:
        self.this_node = this_node
        self.config = config or MeshOsConfig()
        self.now_ms = 0
        """The latest time folded."""
        self.last_tick_ms = 0
        self.last_full_pass_ms: int | None = None
        self.desired = Desired()
        self.surveyed = True
        """Whether what is not known here isn't there; False for a while after a start."""

        self.life = OwnLife()
        self.own_health = OwnHealth()
        self.backpressure = False

        self.daemons: dict[Id, Daemon] = {}
        self.troubled: dict[Id, str] = {}
        """Daemons that make this node Degraded, and why."""

        self.rtt: dict[Id, Rtt] = {}
        self.health: dict[Id, PeerHealth] = {}
        self.avoid: dict[Id, AvoidEntry] = {}
        self.mirrors: dict[Id, Mirror] = {}
        self.unreachable: set[Id] = set()
        self.unreachable_since: dict[Id, int] = {}
        self.dead: set[Id] = set()
        """Unreachable for so long that they no longer count as holders."""
        self.uncounted: set[Id] = set()
        """Nodes that don't count as holders: dead, draining, in maintenance or on the way there."""

        self.chains: dict[Id, Chain] = {}
        self.led: set[Id] = set()
        self.held_by: dict[Id, set[Id]] = {}
        """Node → the chains it holds."""
        self.scores: dict[str, dict[str, float]] = {}
        """Chain → node → score, by their ids as text."""
        self.blobs: dict[Id, frozenset[Id]] = {}
        self.blobs_here: set[Id] = set()

        self.emitted: dict[Key, Emitted] = {}
        self.in_flight: dict[Key, int] = {}
        """What is not asked for again, until a loop time at the latest."""
        self.failures: deque[FailureRecord] = deque(maxlen=self.config.recent_failures_capacity)
        self.counts = Counts()
        self.controls: deque[DaemonControl] = deque(maxlen=CONTROLS_KEPT)
        """What daemons are to be told; whoever tells them empties it."""

        self.work = Work()
        self.timers: list[tuple[int, int, str, Id | Key]] = []
        self.timers_set = 0
        self.changed: set[str] = set()
        self.changed_peers: set[Id] = set()
        self.changed_daemons: set[Id] = set()
        self.changed_chains: set[Id] = set()

    # --- this node

    @property
    def maintenance(self) -> Maintenance:
        return self.life.maintenance

    @property
    def draining(self) -> bool:
        """Whether this node is to become, or stay, empty."""
        life = self.life
        return life.stopping is not None or life.drain is not None or life.maintenance.draining

    @property
    def causes(self) -> list[str]:
        """Why this node is Degraded by itself, in words."""
        causes = self.own_health.causes(self.config)
        if self.troubled:
            told = sorted(f"daemon {key} {why}" for key, why in self.troubled.items())
            causes += told[:NAMED]
            if len(told) > NAMED:
                causes.append(f"{len(told) - NAMED} more daemons in trouble")
        return causes

    def left(self) -> list[str]:
        """What keeps this node from being empty, in words."""
        running = [key for key, daemon in self.daemons.items() if daemon.running]
        held = self.held_by.get(self.this_node, set()) - set(self.config.exempt_chains)
        return [
            f"{len(ids)} {what if len(ids) == 1 else what + 's'} {doing} ({_some(ids)})"
            for ids, what, doing in (
                (running, "daemon", "running"),
                (held, "replica", "held"),
                (self.blobs_here, "artifact", "held"),
            )
            if ids
        ]

    # --- rows

    def daemon(self, key: Id) -> Daemon:
        """The daemon of that id, made if there is none."""
        found = self.daemons.get(key)
        if found is None:
            found = self.daemons[key] = Daemon(self.now_ms)
        return found

    def chain(self, key: Id) -> Chain:
        """The chain of that id, made if there is none."""
        found = self.chains.get(key)
        if found is None:
            found = self.chains[key] = Chain()
        return found

    def gate_of(self, daemon: Id) -> int | None:
        """The loop time until which a daemon may not be started; None: it may."""
        found = self.daemons.get(daemon)
        return None if found is None else found.backoff.until_ms

    def node_draining(self, node: Id) -> bool:
        """Whether a node is to become, or stay, empty."""
        if node == self.this_node:
            return self.draining
        return self.mirrors.get(node, UNTOUCHED).draining

    def recount(self, node: Id) -> None:
        """Takes note that it may have changed whether a node counts as a holder."""
        counts = not (node in self.dead or self.node_draining(node))
        if counts is (node not in self.uncounted):
            return
        if counts:
            self.uncounted.discard(node)
        else:
            self.uncounted.add(node)
        self.work.chains.update(self.held_by.get(node, ()))

    # --- actions under way

    def fly(self, key: Key, until_ms: int) -> None:
        """An action is under way, until that loop time at the latest."""
        self.in_flight[key] = until_ms
        self.wake(until_ms, "flight", key)

    def free(self, key: Key) -> None:
        """An action is under way no longer: what it was about is looked at again."""
        if self.in_flight.pop(key, None) is None:
            return
        kind, target = key
        if target is None:
            return
        if kind in DAEMON_KINDS:
            self.work.daemons.add(target)
            self.changed.add("daemons")
            self.changed_daemons.add(target)
        elif kind in CHAIN_KINDS:
            self.work.chains.add(target)

    def wake(self, at_ms: int, what: str, about: Id | Key) -> None:
        """Has the first Tick at or after `at_ms` look at something."""
        self.timers_set += 1
        heapq.heappush(self.timers, (at_ms, self.timers_set, what, about))

    def fail(self, record: FailureRecord) -> None:
        """Puts a failure on the ring."""
        self.failures.append(record)
        self.counts.failures += 1
        self.changed.update(("recent_failures", "stats"))


def _some(ids: list[Id] | set[Id]) -> str:
    """The first few of these, for people."""
    first = heapq.nsmallest(NAMED, ids, key=lambda key: (isinstance(key, str), key))
    return ", ".join(map(str, first)) + (", …" if len(ids) > NAMED else "")
