"""What holds for any run of events: replay, idempotence, order, and that looking at less finds the same."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.meshos.actions import RequestEviction, StartDaemon, key_of
from agent.meshos.events import (
    DaemonLifecycle,
    Event,
    LocalReplicaIntent,
    NodeHealth,
    PlacementIntent,
    ReplicaLeader,
    ReplicaUpdate,
    RttSample,
    Scores,
    Tick,
    encode_line,
)
from agent.meshos.reconcile import ARMS, reconcile, run_pass, write_back
from agent.meshos.replay import play, read
from agent.meshos.snapshot import SnapshotBuilder, document
from agent.meshos.state import MeshOsState, fold
from tests.agent.meshos_events import ME, SPARSE, runs

THOROUGH = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)


def walked(events: list[Event], state: MeshOsState | None = None) -> MeshOsState:
    """The state after these events, every tick reconciled and written back."""
    state = state or MeshOsState(ME)
    for event in events:
        fold(state, event)
        if isinstance(event, Tick):
            run_pass(state)
    return state


@THOROUGH
@given(runs())
def test_looking_at_what_changed_finds_what_looking_at_everything_finds(events: list[Event]) -> None:
    state = MeshOsState(ME, SPARSE)
    for event in events:
        fold(state, event)
        if isinstance(event, Tick):
            whole = reconcile(state)
            if state.last_full_pass_ms is not None:
                assert reconcile(state, ARMS, state.work) == whole
            assert run_pass(state) == whole


@THOROUGH
@given(runs())
def test_reconcile_is_idempotent_and_changes_nothing(events: list[Event]) -> None:
    state = walked(events[:-1])
    fold(state, events[-1])
    SnapshotBuilder(state)
    actions = reconcile(state)
    assert reconcile(state) == actions
    assert state.changed == set()
    write_back(state, actions)
    assert reconcile(state) == []


@THOROUGH
@given(runs())
def test_actions_come_arm_by_arm_each_by_id_and_never_twice_in_a_tick(events: list[Event]) -> None:
    state = MeshOsState(ME)
    for event in events:
        fold(state, event)
        if isinstance(event, Tick):
            actions = run_pass(state)
            keys = [key_of(action) for action in actions]
            assert len(keys) == len(set(keys))
            evicted = [action.chain for action in actions if isinstance(action, RequestEviction)]
            assert len(evicted) == len(set(evicted))


@THOROUGH
@given(runs())
def test_no_arm_starves_another(events: list[Event]) -> None:
    state = MeshOsState(ME)
    for event in events:
        fold(state, event)
        if isinstance(event, Tick):
            alone = [action for arm in ARMS for action in reconcile(state, (arm,))]
            assert reconcile(state) == alone
            run_pass(state)


@THOROUGH
@given(runs())
def test_replay_of_a_written_run_is_byte_identical(events: list[Event]) -> None:
    state, builder = MeshOsState(ME), None
    lines = [b'{"this_node":100}\n', *map(encode_line, events)]
    once = [json.dumps(found) for found in play(read(lines), admit=True)]
    again = [json.dumps(found) for found in play(read(lines), admit=True)]
    assert once == again
    walked(events, state)
    builder = SnapshotBuilder(state)
    assert json.loads(once[-1])["snapshot"] == json.loads(json.dumps(document(builder.last, state.now_ms)))


@THOROUGH
@given(runs())
def test_snapshot_built_step_by_step_equals_one_built_at_the_end(events: list[Event]) -> None:
    state = MeshOsState(ME)
    builder = SnapshotBuilder(state)
    for event in events:
        fold(state, event)
        if isinstance(event, Tick):
            run_pass(state)
        builder.build()
    assert document(builder.last, state.now_ms) == document(SnapshotBuilder(state).last, state.now_ms)


@THOROUGH
@given(runs())
def test_daemon_in_its_gate_is_never_started(events: list[Event]) -> None:
    state = MeshOsState(ME)
    for event in events:
        fold(state, event)
        if isinstance(event, Tick):
            for action in run_pass(state):
                if isinstance(action, StartDaemon):
                    until_ms = state.gate_of(action.daemon)
                    assert until_ms is None or state.last_tick_ms >= until_ms


FACTS = (RttSample, NodeHealth, PlacementIntent, ReplicaUpdate, ReplicaLeader, LocalReplicaIntent, Scores)


def about(event: Any) -> Any:
    """What a fact is about: facts about different things may come in any order."""
    name = type(event).__name__
    if isinstance(event, ReplicaUpdate):
        return name, event.chain, event.holder
    if isinstance(event, Scores):
        return name, str(event.chain)
    return name, getattr(event, "chain", None), getattr(event, "peer", None)


@THOROUGH
@given(runs(), st.randoms())
def test_reconcile_does_not_depend_on_the_order_of_facts_at_one_time(
    events: list[Event], rng: random.Random
) -> None:
    facts: dict[Any, Event] = {}
    for event in events:
        if isinstance(event, FACTS):
            if isinstance(event, ReplicaUpdate):
                event = msgspec.structs.replace(event, leader=msgspec.UNSET)
            facts[about(event)] = msgspec.structs.replace(event, at_ms=1000)
    ordered = list(facts.values())
    shuffled = ordered.copy()
    rng.shuffle(shuffled)
    one, other = MeshOsState(ME), MeshOsState(ME)
    for state, order in ((one, ordered), (other, shuffled)):
        for event in [*order, Tick(at_ms=1000)]:
            fold(state, event)
    assert reconcile(one) == reconcile(other)


def test_drain_does_not_hide_a_crash_that_came_before() -> None:
    """Crashes count while draining: the gate is there when the drain is lifted."""
    state = MeshOsState(ME)
    for at_ms in (0, 100, 200, 300, 400):
        fold(state, DaemonLifecycle("web", "started", at_ms=at_ms))
        fold(state, DaemonLifecycle("web", "crashed", at_ms=at_ms + 50))
    assert state.daemons["web"].backoff.looping
