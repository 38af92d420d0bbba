"""The fold: samples kept and forgotten by the loop's time, a failure ring, no sequence that breaks it."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.meshos.actions import MarkAvoid
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    ActionOutcome,
    Admin,
    AdminOp,
    Alone,
    Event,
    Health,
    Leaving,
    LocalFailure,
    NodeHealth,
    RttSample,
    SelfHealth,
    Shutdown,
    Started,
    Synced,
    Tick,
    UpdateFailed,
    UpdateStarted,
    decode_line,
    encode_line,
)
from agent.meshos.own import Transition
from agent.meshos.reconcile import run_pass
from agent.meshos.snapshot import SnapshotBuilder, document
from agent.meshos.state import MeshOsState, fold
from discovery.errors import LocalError

ME = 100


def folded(*events: Event, config: MeshOsConfig | None = None) -> MeshOsState:
    state = MeshOsState(ME, config)
    for event in events:
        fold(state, event)
    return state


def test_rtt_the_latest_sample_of_a_peer_counts() -> None:
    state = folded(RttSample(7, 10.0, at_ms=1), RttSample(7, 30.0, at_ms=5))
    assert (state.rtt[7].rtt_ms, state.rtt[7].at_ms) == (30.0, 5)


def test_samples_older_than_30_seconds_are_forgotten_at_a_tick() -> None:
    events = [RttSample(7, 10.0, at_ms=1000), NodeHealth(8, Health.DEGRADED, "slow", at_ms=1000)]
    state = folded(*events, Tick(at_ms=31_000))
    assert (set(state.rtt), set(state.health)) == ({7}, {8})
    fold(state, Tick(at_ms=31_001))
    assert (state.rtt, state.health) == ({}, {})


def test_samples_renewed_outlive_older_ones_of_others() -> None:
    state = folded(
        RttSample(7, 1.0, at_ms=0),
        RttSample(8, 1.0, at_ms=10),
        RttSample(7, 1.0, at_ms=20),
        Tick(at_ms=30_015),
    )
    assert set(state.rtt) == {7}


@pytest.mark.parametrize("rtt_ms", [math.nan, -1.0, math.inf, -math.inf])
def test_rtt_that_is_no_measurement_is_ignored(rtt_ms: float) -> None:
    assert folded(RttSample(7, rtt_ms, at_ms=1)).rtt == {}


def test_samples_about_oneself_are_ignored() -> None:
    state = folded(RttSample(ME, 300.0), NodeHealth(ME, Health.UNREACHABLE))
    assert (state.rtt, state.health) == ({}, {})


def test_ids_of_different_types_are_different_peers() -> None:
    state = folded(RttSample(7, 1.0), RttSample("7", 2.0))
    assert {peer: rtt.rtt_ms for peer, rtt in state.rtt.items()} == {7: 1.0, "7": 2.0}


def test_time_running_backwards_counts_as_the_latest_seen() -> None:
    state = folded(RttSample(7, 1.0, at_ms=5000), RttSample(8, 1.0, at_ms=10), Tick(at_ms=20))
    assert state.rtt[8].at_ms == state.last_tick_ms == state.now_ms == 5000


def test_avoid_entry_ends_at_its_time() -> None:
    state = folded(RttSample(7, 300.0, at_ms=0), Tick(at_ms=0))
    run_pass(state)
    fold(state, Tick(at_ms=299_999))
    assert set(state.avoid) == {7}
    fold(state, Tick(at_ms=300_000))
    assert state.avoid == {}


@pytest.mark.parametrize("outcome", ["failed", "gated", "dropped"])
def test_outcome_that_is_no_success_is_a_failure_record(outcome: str) -> None:
    state = folded(ActionOutcome("mark_avoid", 7, outcome, "why", 250, 900, at_ms=40))  # type: ignore[arg-type]
    assert msgspec.to_builtins(state.failures[0]) == {
        "at_ms": 40,
        "source": "action",
        "action": "mark_avoid",
        "target": 7,
        "reason": "why",
        "retry_after_ms": 250,
        "until_ms": 900,
    }
    assert state.counts.actions_dropped == (outcome == "dropped")


def test_outcome_acknowledges_what_was_emitted() -> None:
    state = folded(RttSample(7, 300.0), RttSample(8, 300.0), Tick())
    run_pass(state)
    fold(state, ActionOutcome("mark_avoid", 7, "dispatched"))
    assert list(state.emitted) == [("mark_avoid", 8)]
    assert list(state.failures) == []


def test_emitted_action_that_nobody_acknowledges_is_believed_lost_after_a_minute() -> None:
    state = folded(RttSample(7, 300.0), Tick())
    run_pass(state)
    fold(state, Tick(at_ms=59_999))
    assert state.emitted
    fold(state, Tick(at_ms=60_000))
    assert not state.emitted


def test_failure_ring_keeps_the_last_256() -> None:
    state = folded(*[LocalFailure("probe", "p", str(n), at_ms=n) for n in range(300)])
    assert len(state.failures) == 256
    assert state.failures[0].reason == "44"
    assert state.counts.failures == 300


def test_events_of_a_recorded_run_have_the_names_and_fields_of_the_contract() -> None:
    lines = [
        '{"at_ms":5,"event":"tick"}',
        '{"at_ms":5,"event":"rtt_sample","peer":7,"rtt_ms":251}',
        '{"at_ms":5,"event":"node_health","peer":"seven","health":"unreachable"}',
        '{"at_ms":5,"event":"admin","admin":{"op":"drain","node":100,"deadline_ms":300000}}',
        '{"at_ms":5,"event":"action_outcome","kind":"mark_avoid","target":7,"outcome":"failed"}',
        '{"at_ms":5,"event":"shutdown"}',
    ]
    assert [decode_line(line) for line in lines] == [
        Tick(at_ms=5),
        RttSample(7, 251.0, at_ms=5),
        NodeHealth("seven", Health.UNREACHABLE, at_ms=5),
        Admin(AdminOp("drain", 100, 300_000), at_ms=5),
        ActionOutcome("mark_avoid", 7, "failed", at_ms=5),
        Shutdown(at_ms=5),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"event":"moonrise"}',
        '{"event":"rtt_sample","peer":7}',
        '{"event":"rtt_sample","peer":true,"rtt_ms":1}',
        '{"event":"node_health","peer":7,"health":"fine"}',
        '{"event":"admin","admin":{"op":"explode","node":1}}',
        '{"event":"tick","at_ms":"soon"}',
    ],
)
def test_line_that_is_no_event_is_refused_as_such(line: str) -> None:
    with pytest.raises(LocalError, match="not an event"):
        decode_line(line)


IDS = st.integers(0, 12) | st.sampled_from(["a", "b", "7", ""]) | st.integers(2**63, 2**64 - 1) | st.just(ME)
RTTS = st.floats() | st.sampled_from([249.9, 250.0, 250.1, 1e9])
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Tick, late_ms=st.integers(0, 2000)),
    st.builds(Started, updated=st.booleans()),
    st.builds(Synced),
    st.builds(Alone),
    st.builds(Leaving, reason=st.text(max_size=5)),
    st.builds(UpdateStarted, deadline_ms=st.integers(-5, 10**15)),
    st.builds(UpdateFailed, reason=st.text(max_size=5)),
    st.builds(SelfHealth, cpu=st.none() | st.integers(-5, 2000), mem=st.none() | st.integers(-5, 2000)),
    st.builds(RttSample, peer=IDS, rtt_ms=RTTS),
    st.builds(NodeHealth, peer=IDS, health=st.sampled_from(Health), reason=st.text(max_size=5)),
    st.builds(
        Admin,
        st.builds(
            AdminOp,
            op=st.sampled_from(["drain", "resume", "cordon", "uncordon"]),
            node=IDS,
            deadline_ms=st.none() | st.integers(-5, 10**15),
        ),
    ),
    st.builds(
        ActionOutcome,
        kind=st.sampled_from(["mark_avoid", "start_daemon", ""]),
        target=st.none() | IDS,
        outcome=st.sampled_from(["dispatched", "failed", "gated", "dropped"]),
        reason=st.text(max_size=5),
    ),
    st.builds(LocalFailure, source=st.just("probe"), target=st.text(max_size=5), reason=st.text(max_size=5)),
    st.just(Shutdown()),
)
TIMED = st.tuples(st.integers(-10, 400_000), EVENTS)


def play(timed: list[tuple[int, Event]]) -> tuple[bytes, list[MarkAvoid], list[Transition]]:
    """What a run shows in the end, the actions it asked for and the moves it made."""
    state = MeshOsState(ME)
    builder = SnapshotBuilder(state)
    actions: list[MarkAvoid] = []
    moves: list[Transition] = []
    for at_ms, event in timed:
        move = fold(state, msgspec.structs.replace(event, at_ms=at_ms))
        if move is not None:
            moves.append(move)
        if isinstance(event, Tick):
            actions += run_pass(state)
            builder.build()
    return msgspec.json.encode(document(builder.build(), state.now_ms)), actions, moves


@settings(max_examples=200)
@given(st.lists(TIMED, max_size=60))
def test_fold_any_sequence_never_raises_and_replays_byte_for_byte(timed: list[tuple[int, Event]]) -> None:
    assert play(timed) == play(timed)


@given(st.lists(TIMED, max_size=40))
def test_replay_of_written_lines_ends_in_the_same_bytes(timed: list[tuple[int, Event]]) -> None:
    finite = [(at, e) for at, e in timed if not isinstance(e, RttSample) or math.isfinite(e.rtt_ms)]
    lines = [encode_line(msgspec.structs.replace(event, at_ms=at_ms)) for at_ms, event in finite]
    again = [(event.at_ms, event) for event in map(decode_line, lines)]
    assert play(again) == play(finite)


@given(st.lists(TIMED, max_size=60))
def test_snapshot_built_step_by_step_equals_one_built_at_the_end(timed: list[tuple[int, Event]]) -> None:
    state = MeshOsState(ME)
    builder = SnapshotBuilder(state)
    for at_ms, event in timed:
        fold(state, msgspec.structs.replace(event, at_ms=at_ms))
        if isinstance(event, Tick):
            run_pass(state)
        builder.build()
    whole = SnapshotBuilder(state).last
    assert document(builder.last, state.now_ms) == document(whole, state.now_ms)
    assert ME not in whole.peers
    assert len(whole.recent_failures) <= 256


def test_engine_loads_neither_loop_nor_clock_nor_socket() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import agent.meshos.reconcile, agent.meshos.snapshot\n"
        "rooms = {'asyncio', 'socket', 'sqlite3', 'psutil', 'asyncssh', 'textual'}\n"
        "print(sorted(rooms & set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
