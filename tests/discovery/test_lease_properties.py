"""Whatever befalls nodes, clocks and notes: once it is over there is one holder, and nobody ever yielded to the dead."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heappop, heappush
from math import inf
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discovery import lease as ls
from discovery.identity import node_id

CONFIG = ls.LeaseConfig()
CALM_S = 15.0
"""Longer than a ttl, the longest pause before claiming, and the last one's rank."""


def _pub(index: int) -> bytes:
    return bytes([index + 1]) * 32


def _sign(index: int) -> Callable[[bytes], bytes]:
    return lambda data: blake2b(data, key=_pub(index)).digest()


def _verify(pub: bytes, data: bytes, sig: bytes) -> bool:
    return blake2b(data, key=pub).digest() == sig


@dataclass
class Node:
    index: int
    kind: str
    offset: float
    rate: float
    lease: ls.Lease = None  # type: ignore[assignment]
    epoch: int = 0
    up: bool = True
    paused: bool = False
    can_publish: bool = True
    view: dict[int, str] = field(default_factory=dict)
    waiting: list[tuple[bytes, float, int]] = field(default_factory=list)
    changes: list[ls.Changed] = field(default_factory=list)

    @property
    def id(self) -> int:
        return node_id(_pub(self.index))

    @property
    def runs(self) -> bool:
        return self.up and not self.paused


class World:
    """Leases without a pool: notes take any time or none, views may be wrong; for a while."""

    def __init__(self, seed: int, kinds: list[str]) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.loss = 0.0
        self.delay_s = 0.001
        self.cut: set[frozenset[int]] = set()
        self.heap: list[tuple[float, int, Any]] = []
        self.seq = 0
        self.nodes = [
            Node(i, kind, self.rng.uniform(0, 1e5), self.rng.uniform(0.98, 1.02))
            for i, kind in enumerate(kinds)
        ]
        for node in self.nodes:
            self.start(node)

    def clock(self, node: Node) -> float:
        return node.offset + node.rate * self.now

    def start(self, node: Node) -> None:
        node.up, node.paused = True, False
        node.waiting.clear()
        node.lease = ls.Lease(
            mesh="alpha",
            pub=_pub(node.index),
            candidate=node.kind in ("gateway", "console"),
            sign=_sign(node.index),
            verify=_verify,
            config=CONFIG,
            now=self.clock(node),
        )
        node.lease.floor(node.epoch, self.clock(node))
        node.view = self.truth()
        node.lease.set_candidates(node.view, self.clock(node))

    def truth(self) -> dict[int, str]:
        return {n.id: n.kind for n in self.nodes if n.up and n.kind in ("gateway", "console")}

    def see(self, node: Node, view: dict[int, str]) -> None:
        node.view = view
        node.lease.set_candidates(view, self.clock(node))
        self.after(node)

    def push(self, at: float, what: Any) -> None:
        self.seq += 1
        heappush(self.heap, (at, self.seq, what))

    def send(self, source: Node, target: Node, body: bytes, age_s: float) -> None:
        if frozenset((source.index, target.index)) in self.cut or self.rng.random() < self.loss:
            return
        delay = self.delay_s * self.rng.random()
        self.push(self.now + delay, (target.index, body, age_s, source.id))

    def spread(self, source: Node, body: bytes, age_s: float) -> None:
        for target in self.nodes:
            if target is not source:
                self.send(source, target, body, age_s)

    def after(self, node: Node) -> None:
        by_id = {n.id: n for n in self.nodes}
        while effects := node.lease.drain():
            for effect in effects:
                match effect:
                    case ls.Persist(epoch):
                        assert epoch > node.epoch
                        node.epoch = epoch
                    case ls.Spread(body, age_s):
                        self.spread(node, body, age_s)
                    case ls.Tell(nodes, body, age_s):
                        for target in nodes:
                            self.send(node, by_id[target], body, age_s)
                    case ls.Publish():
                        assert node.lease.mine
                        node.lease.published(node.can_publish, self.clock(node))
                    case ls.Changed():
                        node.changes.append(effect)

    def hear(self, node: Node, body: bytes, age_s: float, sender: int) -> None:
        """Hands a note in; whoever gives way by it must give way to a living claim of somebody else."""
        was_mine, now = node.lease.mine, self.clock(node)
        news = node.lease.heard(body, age_s, sender, now)
        lapsed = any(isinstance(e, ls.Changed) and e.reason == "paused" for e in node.lease._effects)
        if was_mine and not node.lease.mine and not lapsed:
            claim = ls.open_claim(ls.unpack(body), _verify)
            assert age_s < claim.ttl_ms / 1000 and not claim.released and claim.holder_id != node.id
            assert node.lease.holder == claim.holder_id
        if news:
            self.spread(node, body, age_s)
        self.after(node)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due, first = inf, None
            for node in self.nodes:
                if node.runs:
                    at = max(self.now, (node.lease.deadline() - node.offset) / node.rate + 1e-9)
                    if at < due:
                        due, first = at, node
            if self.heap and self.heap[0][0] <= min(due, end):
                at, _, (index, body, age_s, sender) = heappop(self.heap)
                self.now = max(self.now, at)
                target = self.nodes[index]
                if target.paused:
                    target.waiting.append((body, age_s, sender))
                elif target.up:
                    self.hear(target, body, age_s, sender)
            elif first is not None and due <= end:
                self.now = due
                first.lease.wake(self.clock(first))
                self.after(first)
            else:
                break
        self.now = end

    def resume(self, node: Node) -> None:
        node.paused = False
        node.lease.wake(self.clock(node))
        self.after(node)
        waiting, node.waiting = node.waiting, []
        for body, age_s, sender in waiting:
            self.hear(node, body, age_s, sender)

    def push_pull(self, one: Node, other: Node) -> None:
        if frozenset((one.index, other.index)) in self.cut:
            return
        for a, b in ((one, other), (other, one)):
            held = b.lease.held(self.clock(b))
            if held is not None:
                self.hear(a, held[0], held[1], b.id)
        one.lease.synced(self.clock(one))
        self.after(one)

    def calm(self) -> None:
        """All that runs runs on, hears everything and sees who is there."""
        self.loss, self.delay_s = 0.0, 0.001
        self.cut.clear()
        for node in self.nodes:
            node.can_publish = True
            if node.up and node.paused:
                self.resume(node)
        running = [node for node in self.nodes if node.up]
        for node in running:
            self.see(node, self.truth())
        for one in running:
            for other in running:
                if one is not other and "compute" in (one.kind, other.kind):
                    self.push_pull(one, other)

    def report(self) -> str:
        return "; ".join(
            f"{n.index}{'' if n.runs else ' (off)'}: {n.lease.holder} at {n.lease.epoch}.{n.lease.renewal}"
            f"{' mine' if n.lease.mine else ''}"
            for n in self.nodes
        )

    def settled(self) -> Node:
        """The one holder, which everybody names."""
        running = [node for node in self.nodes if node.runs]
        holders = [node for node in running if node.lease.mine]
        assert len(holders) == 1, self.report()
        assert {node.lease.holder for node in running} == {holders[0].id}, self.report()
        return holders[0]


KINDS = st.lists(st.sampled_from(["gateway", "console", "compute"]), min_size=1, max_size=5).filter(
    lambda kinds: any(kind != "compute" for kind in kinds)
)
INDEX = st.integers(0, 4)
OP = st.one_of(
    st.tuples(st.just("run"), st.sampled_from([0.01, 0.3, 0.6, 1.9, 2.1, 4.0, 6.1, 9.0, 40.0])),
    st.tuples(st.sampled_from(["pause", "resume", "kill", "start", "resign", "mute", "unmute"]), INDEX),
    st.tuples(st.sampled_from(["cut", "join", "unsee", "see", "push_pull"]), INDEX, INDEX),
    st.tuples(
        st.just("weather"), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.001, 0.5, 3.0, 20.0])
    ),
)


def act(world: World, op: tuple[Any, ...]) -> None:
    what, *args = op
    if what == "run":
        world.run(args[0])
        return
    if what == "weather":
        world.loss, world.delay_s = args
        return
    node = world.nodes[args[0] % len(world.nodes)]
    other = world.nodes[args[-1] % len(world.nodes)]
    pair = frozenset((node.index, other.index))
    if what == "start" and not node.up:
        world.start(node)
    elif what == "resume" and node.up and node.paused:
        world.resume(node)
    elif what == "kill" and node.up and sum(n.up and n.kind != "compute" for n in world.nodes) > 1:
        node.up = False
    elif not node.runs:
        return
    elif what == "pause":
        node.paused = True
    elif what == "resign":
        node.lease.resign(world.clock(node))
        world.after(node)
        world.see(node, {id_: kind for id_, kind in node.view.items() if id_ != node.id})
    elif what in ("mute", "unmute"):
        node.can_publish = what == "unmute"
    elif what == "cut":
        world.cut.add(pair)
    elif what == "join":
        world.cut.discard(pair)
    elif what == "unsee":
        world.see(node, {id_: kind for id_, kind in node.view.items() if id_ != other.id})
    elif what == "see" and other.kind != "compute":
        world.see(node, {**node.view, other.id: other.kind})
    elif what == "push_pull" and other.runs and other is not node:
        world.push_pull(node, other)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), KINDS, st.lists(OP, max_size=40))
def test_after_anything_claims_settle_on_one_holder_and_stay_there(
    seed: int, kinds: list[str], ops: list[tuple[Any, ...]]
) -> None:
    world = World(seed, kinds)
    for op in ops:
        act(world, op)
    world.calm()
    world.run(CALM_S)
    world.heap.clear()
    world.run(CALM_S)
    holder = world.settled()
    told = [len(node.changes) for node in world.nodes]
    world.run(60.0)
    assert world.settled() is holder
    assert [len(node.changes) for node in world.nodes] == told, "it flaps"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.lists(OP, max_size=25))
def test_two_candidates_are_never_both_silent_for_long(seed: int, ops: list[tuple[Any, ...]]) -> None:
    """Whatever they heard, and even if nothing reaches them any more: where two run, somebody publishes."""
    world = World(seed, ["gateway", "console"])
    for op in ops:
        act(world, op)
    for node in world.nodes:
        if not node.up:
            world.start(node)
        elif node.paused:
            world.resume(node)
        node.can_publish = True
        world.see(node, world.truth())
    silent, end = 0.0, world.now + 3 * CALM_S
    while silent < CALM_S and world.now < end:
        world.run(0.5)
        silent = 0.0 if any(node.lease.mine for node in world.nodes) else silent + 0.5
    assert silent < CALM_S, world.report()
