"""Any event of the engine, in a world small enough that they meet: for property tests."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
from hypothesis import strategies as st

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    ActionOutcome,
    Admin,
    AdminOp,
    Alone,
    BackoffRestored,
    Backpressure,
    Blob,
    DaemonHealth,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    Health,
    Id,
    Leaving,
    LocalFailure,
    LocalReplicaIntent,
    MaintenanceObserved,
    NodeHealth,
    PeerState,
    PlacementIntent,
    ReplicaLeader,
    ReplicaUpdate,
    Restored,
    RttSample,
    Scores,
    SelfHealth,
    Started,
    Stopping,
    Surveyed,
    Synced,
    Tick,
    UpdateFailed,
    UpdateStarted,
)
from agent.meshos.states import MaintenanceState

ME = 100
NODES: st.SearchStrategy[Id] = st.sampled_from([ME, ME, 1, 2, 3, "a", "1"])
CHAINS: st.SearchStrategy[Id] = st.sampled_from([1, 2, 3, "1", "admin"])
DAEMONS: st.SearchStrategy[Id] = st.sampled_from(["web", "db", 7])
BLOBS: st.SearchStrategy[Id] = st.sampled_from(["x", "y", 5])
SCORE = st.none() | st.floats(0, 1) | st.just(float("nan"))
KINDS = (
    "start_daemon",
    "stop_daemon",
    "apply_backoff",
    "pull_replica",
    "drop_replica",
    "request_placement",
    "request_eviction",
    "migrate_blob",
    "mark_avoid",
    "commit_maintenance_transition",
)
OPS = (
    "drain",
    "resume",
    "cordon",
    "uncordon",
    "enter_maintenance",
    "exit_maintenance",
    "restart_all_daemons",
    "clear_avoid_list",
    "drop_replicas",
    "invalidate_placement",
)
WORLD: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        DaemonIntent,
        daemon=DAEMONS,
        intent=st.sampled_from(["run", "run", "stop", "none"]),
        node=st.none() | NODES,
        after=st.lists(DAEMONS, max_size=2).map(tuple),
        version=st.sampled_from(["", "v1", "v2"]),
    ),
    st.builds(
        DaemonLifecycle,
        daemon=DAEMONS,
        signal=st.sampled_from(
            ["starting", "started", "started", "crashed", "exited_cleanly", "health", "saturation"]
        ),
        health=st.sampled_from(DaemonHealth),
        saturation=st.none() | st.floats(),
        version=st.sampled_from([None, "", "v1"]),
    ),
    st.builds(PlacementIntent, chain=CHAINS, count=st.none() | st.integers(0, 3)),
    st.builds(
        ReplicaUpdate,
        chain=CHAINS,
        change=st.sampled_from(["added", "added", "removed"]),
        holder=NODES,
        leader=st.just(msgspec.UNSET) | st.none() | NODES,
    ),
    st.builds(ReplicaLeader, chain=CHAINS, leader=st.none() | NODES),
    st.builds(LocalReplicaIntent, chain=CHAINS, intent=st.sampled_from(["hold", "hold", "drop", "none"])),
    st.builds(Blob, blob=BLOBS, change=st.sampled_from(["added", "removed"]), holder=NODES),
    st.builds(
        Scores, chain=CHAINS, scores=st.dictionaries(st.sampled_from(["100", "1", "2", "3", "a"]), SCORE)
    ),
    st.builds(RttSample, peer=NODES, rtt_ms=st.sampled_from([1.0, 250.0, 250.1, 900.0, float("nan"), None])),
    st.builds(NodeHealth, peer=NODES, health=st.sampled_from(Health)),
    st.builds(PeerState, peer=NODES, cordoned=st.booleans(), draining=st.booleans()),
    st.builds(
        Admin,
        st.builds(
            AdminOp,
            op=st.sampled_from(OPS),
            node=NODES,
            deadline_ms=st.none() | st.integers(-5, 100_000),
            chains=st.lists(CHAINS, max_size=2).map(tuple),
        ),
    ),
    st.builds(MaintenanceObserved, node=NODES, state=st.sampled_from(MaintenanceState)),
    st.builds(
        ActionOutcome,
        kind=st.sampled_from(KINDS),
        target=CHAINS | DAEMONS | BLOBS,
        outcome=st.sampled_from(["dispatched", "failed", "gated", "dropped"]),
        retry_after_ms=st.none() | st.just(5),
    ),
    st.builds(Backpressure, on=st.booleans(), depth=st.integers(0, 2000)),
    st.builds(SelfHealth, cpu=st.sampled_from([None, 0, 999]), mem=st.just(0)),
    st.builds(LocalFailure, source=st.just("probe"), target=st.just("p"), reason=st.just("x")),
    st.sampled_from(
        [
            Started(),
            Started(survey=True),
            Synced(),
            Alone(),
            UpdateStarted(1000),
            UpdateFailed("x"),
            Stopping(),
            Leaving("signal"),
        ]
    ),
    st.builds(
        Restored,
        cordoned=st.booleans(),
        maintenance=st.sampled_from(MaintenanceState),
    ),
    st.just(Surveyed()),
    st.builds(
        BackoffRestored,
        daemon=DAEMONS,
        until_ms=st.none() | st.integers(-(10**9), 10**9),
        looping=st.booleans(),
        delay_ms=st.integers(0, 100_000),
        crashes_ms=st.lists(st.integers(-(10**9), 10**9), max_size=7).map(tuple),
        since_ms=st.integers(-(10**9), 10**9),
    ),
)
STEP_MS = st.sampled_from([0, 0, 1, 250, 500, 999, 5000, 30_000, 60_000, 300_000])
TICKED: st.SearchStrategy[Event] = st.one_of(WORLD, WORLD, WORLD, st.just(Tick()))


@st.composite
def short_runs(draw: st.DrawFn, max_size: int = 50) -> list[Event]:
    """A few events at times that never decrease, with a tick at the end; they shrink well."""
    now_ms, found = 0, []
    for step_ms, event in draw(st.lists(st.tuples(STEP_MS, TICKED), max_size=max_size)):
        now_ms += step_ms
        found.append(msgspec.structs.replace(event, at_ms=now_ms))
    return [*found, Tick(at_ms=now_ms)]


def long_run(seed: int) -> list[Event]:
    """Many events of a busy life: everything comes up, every arm has something to say."""
    rng = random.Random(seed)
    pick = rng.choice
    nodes: list[Id] = [ME, 1, 2, 3, "a"]
    chains: list[Id] = [1, 2, 3, "1", "admin"]
    daemons: list[Id] = ["web", "db", 7]
    makers: list[Callable[[], Event]] = [
        lambda: DaemonIntent(
            pick(daemons),
            pick(["run", "run", "run", "stop"]),
            pick([None, None, ME, 1]),
            pick([(), (), (pick(daemons),)]),
            pick(["", "v1"]),
            pick(["", "", "", "needs 2 cores"]),
        ),
        lambda: DaemonLifecycle(
            pick(daemons),
            pick(["starting", "started", "started", "crashed", "exited_cleanly"]),
            version=pick([None, "", "v1"]),
        ),
        lambda: DaemonLifecycle(pick(daemons), "health", pick(list(DaemonHealth))),
        lambda: PlacementIntent(pick(chains), rng.randrange(4)),
        lambda: ReplicaUpdate(pick(chains), "added", pick(nodes), pick([msgspec.UNSET, ME, ME, 1, None])),
        lambda: ReplicaUpdate(pick(chains), pick(["added", "removed"]), pick(nodes)),
        lambda: ReplicaLeader(pick(chains), pick([ME, ME, ME, 1, None])),
        lambda: LocalReplicaIntent(pick(chains), pick(["hold", "hold", "drop", "none"])),
        lambda: Blob(pick(["x", "y", 5]), pick(["added", "added", "removed"]), pick([ME, ME, 1, "a"])),
        lambda: Scores(pick(chains), {str(node): pick([None, rng.random()]) for node in [*nodes, 9]}),
        lambda: RttSample(pick(nodes), pick([1.0, 250.0, 250.1, 900.0])),
        lambda: NodeHealth(pick(nodes), pick(list(Health))),
        lambda: PeerState(pick(nodes), pick([True, False]), pick([True, False, False])),
        lambda: Admin(
            AdminOp(pick(OPS), pick([ME, ME, 1, "a"]), pick([None, 0, 5000]), chains=(pick(chains),))
        ),
        lambda: MaintenanceObserved(pick([ME, ME, 1]), pick(list(MaintenanceState))),
        lambda: ActionOutcome(
            pick(KINDS),
            pick([*chains, *daemons, "x"]),
            pick(["dispatched", "failed", "gated", "dropped"]),
            retry_after_ms=pick([None, 5]),
        ),
        lambda: pick([Synced(), Synced(), Backpressure(True, 1), Backpressure(False, 1), SelfHealth(999, 0)]),
    ]
    now_ms, found = 0, []
    for _ in range(rng.randrange(20, 150)):
        now_ms += pick([0, 0, 0, 1, 250, 500, 999, 5000, 30_000, 60_000, 300_000])
        event = pick(makers)() if rng.random() < 0.75 else Tick()
        found.append(msgspec.structs.replace(event, at_ms=now_ms))
    return [*found, Tick(at_ms=now_ms)]


def runs() -> st.SearchStrategy[list[Event]]:
    """Runs of events at times that never decrease, each with a tick at its end."""
    return st.integers(0, 2**32).map(long_run) | short_runs()


SPARSE = MeshOsConfig(full_pass_interval_ms=10**15)
"""Looks at everything once and never again."""
