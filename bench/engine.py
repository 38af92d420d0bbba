"""What the behaviour engine costs: folding, ticks of an idle and of a busy node, publishing a snapshot."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from agent.loop import MeshLoop
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    ActionOutcome,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    Health,
    LocalReplicaIntent,
    NodeHealth,
    PlacementIntent,
    ReplicaUpdate,
    RttSample,
    Scores,
    Tick,
)
from agent.meshos.reconcile import reconcile, run_pass
from agent.meshos.snapshot import SnapshotBuilder
from agent.meshos.state import MeshOsState, fold
from bench.figures import Figure
from bench.fleet import Hangar

ME = 100_000
PEERS = 1000
CHAINS = 10_000
DAEMONS = 200
CHANGED = 100
NOBODY_ELSE = MeshOsConfig(full_pass_interval_ms=10**15)
"""So that a full pass, measured apart, doesn't come in between."""
SIZE = f"{PEERS:,} peers, {CHAINS:,} chains, {DAEMONS} daemons"


def measure(hangar: Hangar) -> Iterator[Figure]:
    runs = hangar.runs(200, 30)
    yield _fold(hangar.runs(7, 3))
    state, now_ms = settled()
    yield from _ticks(state, now_ms, runs)
    yield from _loop(runs)
    yield _publish(runs)


def world(seed: int = 1) -> list[Event]:
    """A node that leads half of its chains, all as they should be, with scores that move nothing."""
    rng = random.Random(seed)
    events: list[Event] = [NodeHealth(peer, Health.HEALTHY) for peer in range(PEERS)]
    events += [RttSample(peer, rng.uniform(0.2, 200)) for peer in range(PEERS)]
    for chain in range(CHAINS):
        mine = chain % 2 == 0
        holders = [ME, *rng.sample(range(PEERS), 2)] if mine else rng.sample(range(PEERS), 3)
        events += [ReplicaUpdate(chain, "added", node, leader=holders[0]) for node in holders]
        events.append(PlacementIntent(chain, 3))
        if mine:
            events.append(LocalReplicaIntent(chain, "hold"))
            nodes = [*holders, *rng.sample(range(PEERS), 3)]
            events.append(Scores(chain, {str(node): rng.uniform(0.5, 0.6) for node in nodes}))
    for daemon in range(DAEMONS):
        events += [DaemonIntent(f"d{daemon}", "run"), DaemonLifecycle(f"d{daemon}", "started")]
    return events


def settled() -> tuple[MeshOsState, int]:
    """The state of that world after a first pass over everything."""
    state = MeshOsState(ME, NOBODY_ELSE)
    for event in world():
        fold(state, event)
    fold(state, Tick(at_ms=500))
    if actions := run_pass(state):
        raise RuntimeError(f"the world is not as it should be: {actions[:3]}")
    return state, 500


def timed(act: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    began = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - began)


def _fold(runs: int) -> Figure:
    """The stream of a busy node: what probes, supervisors and replication tell."""
    rng = random.Random(2)
    mix: list[Event] = []
    for at_ms in range(0, 100_000, 2):
        roll = rng.random()
        peer, chain, daemon = rng.randrange(PEERS), rng.randrange(CHAINS), f"d{rng.randrange(DAEMONS)}"
        if roll < 0.4:
            mix.append(RttSample(peer, rng.uniform(1, 200), at_ms=at_ms))
        elif roll < 0.6:
            mix.append(NodeHealth(peer, Health.HEALTHY, at_ms=at_ms))
        elif roll < 0.8:
            change = "added" if rng.random() < 0.5 else "removed"
            mix.append(ReplicaUpdate(chain, change, peer, at_ms=at_ms))  # type: ignore[arg-type]
        elif roll < 0.9:
            mix.append(DaemonLifecycle(daemon, "saturation", saturation=rng.random(), at_ms=at_ms))
        else:
            mix.append(ActionOutcome("pull_replica", chain, "dispatched", at_ms=at_ms))
    rates = []
    for _ in range(runs):
        state, _ = settled()
        began = time.perf_counter()
        for event in mix:
            fold(state, event)
        rates.append(len(mix) / (time.perf_counter() - began))
    return Figure("engine: fold", "events/s", rates, bar=150_000, at_least=True, note=SIZE)


def _ticks(state: MeshOsState, now_ms: int, runs: int) -> Iterator[Figure]:
    builder = SnapshotBuilder(state)

    def tick() -> None:
        nonlocal now_ms
        now_ms += 50
        fold(state, Tick(at_ms=now_ms))
        run_pass(state)
        builder.build()

    tick()
    yield Figure("engine: idle tick", "ms", [timed(tick) for _ in range(runs)], bar=1.0, note=SIZE)
    rng = random.Random(3)
    samples = []
    for _ in range(runs):
        for chain in rng.sample(range(CHAINS), CHANGED):
            holder = next(iter(state.chains[chain].holders - {ME}))
            fold(state, ReplicaUpdate(chain, "removed", holder, at_ms=now_ms))
        samples.append(timed(tick))
        for chain in [key for key, chain in state.chains.items() if len(chain.holders) < 3]:
            fold(state, ReplicaUpdate(chain, "added", rng.randrange(PEERS), at_ms=now_ms))
        tick()
    yield Figure(f"engine: tick, {CHANGED} of {CHAINS:,} chains changed", "ms", samples, bar=5.0, note=SIZE)
    full = [timed(lambda: reconcile(state)) for _ in range(runs)]
    yield Figure("engine: full pass", "ms", full, bar=60.0, note=SIZE)


def _loop(runs: int) -> Iterator[Figure]:
    """The tick as the loop makes it, its probes polled: most repeat themselves, every tenth poll is taken anew."""
    now = 1000.0
    loop = MeshLoop(ME, NOBODY_ELSE, on_transition=print, on_action=lambda action: True, clock=lambda: now)
    for event in world():
        fold(loop.state, event)
    rtts = [(peer, 5.0) for peer in range(PEERS)]
    healths = [(peer, Health.HEALTHY, "") for peer in range(PEERS)]
    loop.install_rtt_probe("rtt", lambda: rtts)
    loop.install_health_probe("health", lambda: healths)
    samples = []
    for _ in range(runs):
        now += 0.5
        samples.append(timed(loop.tick))
    note = "two probes that tell of every peer at every tick"
    yield Figure("engine: idle tick of the loop with its probes", "ms", samples, note=f"{SIZE}; {note}")


def _publish(runs: int) -> Figure:
    state, now_ms = settled()
    builder = SnapshotBuilder(state)
    before = builder.build()
    samples = []
    for n in range(runs):
        fold(state, DaemonLifecycle("d7", "saturation", saturation=n / runs, at_ms=now_ms))
        samples.append(timed(builder.build))
        now = builder.last
        if (
            now is before
            or now.replicas is not before.replicas
            or now.daemons["d1"] is not before.daemons["d1"]
        ):
            raise RuntimeError("an unchanged section was not shared")
        before = now
    return Figure(
        "engine: publish a snapshot, one daemon changed",
        "ms",
        samples,
        bar=1.0,
        note=f"{SIZE}; the rest is shared",
    )
