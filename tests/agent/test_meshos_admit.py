"""Admit: every row of its rule, slots that are given out once and given back exactly, and the desk in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.meshos.actions import (
    Action,
    ApplyBackoff,
    CommitMaintenanceTransition,
    DropReplica,
    MarkAvoid,
    MigrateBlob,
    PullReplica,
    RequestEviction,
    RequestPlacement,
    StartDaemon,
    StopDaemon,
)
from agent.meshos.admit import ADMIT, Admission, Defer, Gate, Slots
from agent.meshos.config import MeshOsConfig
from agent.meshos.desk import Desk, Dropped, Go, Held, Put
from agent.meshos.events import Id
from agent.meshos.states import MaintenanceState

CONFIG = MeshOsConfig()


def pull(chain: Id) -> PullReplica:
    return PullReplica(chain, 2)


@pytest.fixture
def gate() -> Admission:
    return Admission(CONFIG)


# --- pulls


def test_pulls_get_slots_250_ms_apart_first_come_first_served(gate: Admission) -> None:
    verdicts = [gate.admit(pull(chain), 1000) for chain in range(4)]
    assert verdicts == [ADMIT, *[Defer(250 * k, "pull-cooldown", True) for k in (1, 2, 3)]]


def test_pull_comes_back_at_its_slot_and_goes(gate: Admission) -> None:
    for chain in range(3):
        gate.admit(pull(chain), 1000)
    assert gate.admit(pull(2), 1499) == Defer(1, "pull-cooldown", True)
    assert gate.admit(pull(1), 1250) == ADMIT
    assert gate.admit(pull(2), 1500) == ADMIT


def test_pull_after_the_cooldown_goes_at_once(gate: Admission) -> None:
    gate.admit(pull(1), 1000)
    assert gate.admit(pull(2), 1250) == ADMIT


def test_chain_stabilises_for_a_minute_after_a_pull(gate: Admission) -> None:
    gate.admit(pull(1), 1000)
    gate.dispatched(pull(1))
    assert gate.admit(pull(1), 2000) == Defer(59_000, "chain-stabilising")
    assert gate.admit(DropReplica(1), 60_999) == Defer(1, "chain-stabilising")
    assert gate.admit(DropReplica(1), 61_000) == ADMIT
    assert gate.admit(pull(1), 61_001) == Defer(59_999, "chain-stabilising")


def test_deferral_for_a_stabilising_chain_takes_no_slot(gate: Admission) -> None:
    gate.admit(DropReplica(1), 1000)
    assert gate.admit(pull(1), 1000) == Defer(60_000, "chain-stabilising")
    assert gate.admit(pull(2), 1000) == ADMIT


def test_deferred_pull_reserves_its_chain_with_its_slot(gate: Admission) -> None:
    gate.admit(pull(1), 1000)
    gate.admit(pull(2), 1000)
    assert gate.admit(DropReplica(2), 1000) == Defer(60_250, "chain-stabilising")


def test_pulls_of_a_drain_wait_for_the_same_cooldown(gate: Admission) -> None:
    """Whoever asks: an action carries no mark of where it comes from."""
    assert [gate.admit(pull(chain), 0) == ADMIT for chain in range(3)] == [True, False, False]


def test_pause_does_not_let_pulls_burst(gate: Admission) -> None:
    """Every deferred pull is late at once: they go out 250 ms apart all the same, in their order."""
    for chain in range(20):
        gate.admit(pull(chain), 0)
    went: list[tuple[Id, int]] = []
    due = dict.fromkeys(range(1, 20), 60000)
    for now_ms in range(60_000, 70_000, 10):
        for chain in [c for c, at_ms in due.items() if at_ms <= now_ms]:
            verdict = gate.admit(pull(chain), now_ms)
            if verdict == ADMIT:
                went.append((chain, now_ms))
                del due[chain]
            else:
                assert isinstance(verdict, Defer) and verdict.slot
                due[chain] = now_ms + verdict.retry_after_ms
    assert went == [(chain, 60_000 + 250 * (chain - 1)) for chain in range(1, 20)]


def test_pull_that_is_a_little_late_costs_the_next_one_as_little(gate: Admission) -> None:
    for chain in range(4):
        gate.admit(pull(chain), 0)
    assert gate.admit(pull(1), 253) == ADMIT
    assert gate.admit(pull(2), 500) == Defer(3, "pull-cooldown", True)
    assert gate.admit(pull(2), 503) == ADMIT


# --- the others


def test_start_of_a_gated_daemon_is_gated_until_until_itself() -> None:
    gate = Admission(CONFIG, gate_of={"web": 5000}.get)
    assert gate.admit(StartDaemon("web"), 4999) == Gate(5000, "daemon-backoff")
    assert gate.admit(StartDaemon("web"), 5000) == ADMIT
    assert gate.admit(StartDaemon("db"), 0) == ADMIT


def test_stop_is_never_gated() -> None:
    gate = Admission(CONFIG, gate_of={"web": 5000}.get)
    assert gate.admit(StopDaemon("web", 9000), 0) == ADMIT


def test_migrations_are_ten_a_second_a_zone() -> None:
    gate = Admission(CONFIG, zone_of=lambda node: "a" if node == 1 else "b")
    first = [gate.admit(MigrateBlob(n, 1), 0) for n in range(12)]
    assert first[:10] == [ADMIT] * 10
    assert first[10:] == [Defer(1000, "migration-rate", True)] * 2
    assert gate.admit(MigrateBlob(99, 2), 0) == ADMIT
    assert gate.admit(MigrateBlob(10, 1), 1000) == ADMIT


@pytest.mark.parametrize(
    "action",
    [
        RequestPlacement(1, ()),
        RequestEviction(1, 2),
        RequestEviction(1, 2, True),
        MarkAvoid(1, "", 1),
        ApplyBackoff("web", 1),
        CommitMaintenanceTransition(MaintenanceState.ACTIVE),
        StopDaemon("web", 1),
    ],
)
def test_the_rest_is_admitted_however_often(gate: Admission, action: Action) -> None:
    assert [gate.admit(action, 0) for _ in range(50)] == [ADMIT] * 50


@pytest.mark.parametrize(
    ("action", "deferred"),
    [
        (MigrateBlob(1, 2), True),
        (RequestEviction(1, 2, True), True),
        (RequestEviction(1, 2), False),
        (pull(1), False),
        (StartDaemon("web"), False),
        (StopDaemon("web", 1), False),
    ],
)
def test_backpressure_defers_migrations_and_scheduler_evictions(
    gate: Admission, action: Action, deferred: bool
) -> None:
    gate.depth(1000)
    assert (gate.admit(action, 0) == Defer(5000, "backpressure")) is deferred


@pytest.mark.parametrize(
    ("depths", "edges"),
    [
        ([999], [None]),
        ([1000], [True]),
        ([1000, 2000, 201], [True, None, None]),
        ([1000, 200], [True, False]),
        ([1000, 200, 999, 1000], [True, False, None, True]),
        ([200, 0], [None, None]),
    ],
)
def test_backpressure_turns_on_at_1000_and_off_at_200(
    gate: Admission, depths: list[int], edges: list[bool | None]
) -> None:
    assert [gate.depth(depth) for depth in depths] == edges


# --- giving back


def test_failed_pull_gives_back_its_slot_and_its_chain(gate: Admission) -> None:
    gate.admit(pull(1), 1000)
    gate.release(pull(1))
    assert gate.admit(pull(2), 1000) == ADMIT
    assert gate.admit(DropReplica(1), 1000) == ADMIT


def test_failed_pull_gives_back_its_own_slot_and_no_other(gate: Admission) -> None:
    for chain in range(4):
        gate.admit(pull(chain), 0)
    gate.release(pull(2))
    assert gate.admit(pull(9), 0) == Defer(500, "pull-cooldown", True)
    assert gate.admit(pull(10), 0) == Defer(1000, "pull-cooldown", True)


def test_dispatched_pull_gives_nothing_back(gate: Admission) -> None:
    gate.admit(pull(1), 0)
    gate.dispatched(pull(1))
    gate.release(pull(1))
    assert gate.admit(pull(2), 0) == Defer(250, "pull-cooldown", True)


def test_failed_drop_gives_its_chain_back(gate: Admission) -> None:
    gate.admit(DropReplica(1), 0)
    gate.release(DropReplica(1))
    assert gate.admit(pull(1), 0) == ADMIT


def test_failed_migration_gives_its_place_back(gate: Admission) -> None:
    for n in range(10):
        gate.admit(MigrateBlob(n, 1), 0)
    gate.release(MigrateBlob(3, 1))
    assert gate.admit(MigrateBlob(77, 1), 0) == ADMIT
    assert gate.admit(MigrateBlob(78, 1), 0) == Defer(1000, "migration-rate", True)


ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.builds(pull, st.integers(0, 9)),
    st.builds(DropReplica, st.integers(0, 9)),
    st.builds(MigrateBlob, st.integers(0, 30), st.just(1)),
)
HISTORY = st.lists(st.tuples(st.sampled_from([0, 0, 50, 250, 1000, 60_000]), ACTIONS), max_size=30)


@settings(max_examples=300, deadline=None)
@given(HISTORY, ACTIONS, HISTORY)
def test_every_reservation_of_a_failed_dispatch_is_given_back(
    before: list[tuple[int, Action]], tried: Action, after: list[tuple[int, Action]]
) -> None:
    """The gate answers as if the act that failed had never come."""

    def play(gate: Admission, history: list[tuple[int, Action]], now_ms: int) -> tuple[list[Any], int]:
        verdicts = []
        for step_ms, action in history:
            now_ms += step_ms
            verdicts.append(gate.admit(action, now_ms))
            if verdicts[-1] == ADMIT:
                gate.dispatched(action)
        return verdicts, now_ms

    one, other = Admission(CONFIG), Admission(CONFIG)
    _, now_ms = play(one, before, 0)
    play(other, before, 0)
    if one._held.get((tried.KIND, tried.target)) is None:
        one.admit(tried, now_ms)
        one.release(tried)
    assert play(one, after, now_ms) == play(other, after, now_ms)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from([0, 10, 90, 100, 500]), st.sampled_from("rrrgb"), st.integers(0, 9)),
        max_size=40,
    ),
)
def test_slots_never_let_out_more_than_the_rate(number: int, history: list[tuple[int, str, int]]) -> None:
    slots, now_ms, held = Slots(number, 100), 0, [0] * 0
    out: list[int] = []
    for step_ms, act, which in history:
        now_ms += step_ms
        if act == "r" or not held:
            held.append(slots.reserve(now_ms))
        elif act == "b":
            slots.give_back(held.pop(which % len(held)), out=False)
        else:
            at = which % len(held)
            if held[at] <= now_ms:
                later_ms = slots.go(held[at], now_ms)
                if later_ms is None:
                    held.pop(at)
                    out.append(now_ms)
                else:
                    assert later_ms > now_ms
                    held[at] = later_ms
    for first in range(len(out) - number):
        assert out[first + number] - out[first] >= 100


# --- the desk


def desk(gate_of: Callable[[Id], int | None] = lambda daemon: None, **config: Any) -> Desk:
    settings_ = MeshOsConfig(**config)
    return Desk(settings_, Admission(settings_, gate_of))


def run(desk: Desk, until_ms: int, step_ms: int = 10) -> list[tuple[int, Action]]:
    """What goes out and when, every dispatch succeeding."""
    out = []
    for now_ms in range(0, until_ms + 1, step_ms):
        while (step := desk.step(now_ms)) is not None:
            if isinstance(step, Go):
                desk.went(step.action)
                out.append((now_ms, step.action))
    return out


def test_hundred_queued_pulls_all_go_out_a_cooldown_apart() -> None:
    busy = desk()
    for chain in range(100):
        assert busy.submit(pull(chain))
    out = run(busy, 25_000)
    assert out == [(250 * chain, pull(chain)) for chain in range(100)]
    assert (busy.dropped, len(busy)) == (0, 0)


def test_waiting_room_is_bounded() -> None:
    busy = desk(action_queue_capacity=3)
    assert [busy.submit(StopDaemon(n, 0)) for n in range(5)] == [True, True, True, False, False]


def test_same_action_again_keeps_the_place_of_the_first_and_says_the_latest() -> None:
    busy = desk()
    busy.submit(PullReplica(1, 2))
    busy.submit(PullReplica(1, 3))
    assert run(busy, 0) == [(0, PullReplica(1, 3))]
    assert busy.merged == 1


def test_gated_action_is_not_kept() -> None:
    busy = desk({"web": 900}.get)
    busy.submit(StartDaemon("web"))
    assert busy.step(0) == Held(StartDaemon("web"), Gate(900, "daemon-backoff"))
    assert (busy.step(0), len(busy), busy.gated) == (None, 0, 1)


def test_retry_goes_through_admit_again_and_16_strikes_are_the_most() -> None:
    busy = desk()
    busy.submit(pull(1))
    tried, now_ms, dropped = 0, 0, None
    while dropped is None:
        step = busy.step(now_ms)
        if isinstance(step, Go):
            tried += 1
            dropped = busy.failed(step.action, 100, now_ms)
        now_ms += 100
    assert (tried, busy.retries, busy.dropped) == (17, 17, 1)
    assert "more than 16 times" in dropped.reason
    busy.submit(pull(2))
    assert busy.step(now_ms) == Go(pull(2))


def test_deferrals_that_are_not_for_a_slot_count_to_16() -> None:
    busy = desk(backpressure_high=1, backpressure_low=0)
    busy.submit(MigrateBlob(1, 2))
    steps = [busy.step(now_ms) for now_ms in range(0, 17 * 5000, 5000)]
    assert all(isinstance(step, Put) for step in steps[:16])
    assert isinstance(steps[16], Dropped)


def test_failure_without_retry_is_the_end() -> None:
    busy = desk()
    busy.submit(pull(1))
    step = busy.step(0)
    assert isinstance(step, Go)
    assert busy.failed(step.action, None, 0) is None
    assert (len(busy), busy.step(10**6)) == (0, None)


def test_deferred_action_that_is_due_goes_before_what_waits() -> None:
    busy = desk()
    for chain in (1, 2):
        busy.submit(pull(chain))
    while busy.step(0):
        pass
    busy.submit(StopDaemon("a", 0))
    first = busy.step(250)
    assert isinstance(first, Go) and first.action == pull(2)


def test_backpressure_edges_of_the_desk_come_once_each() -> None:
    busy = desk(backpressure_high=5, backpressure_low=2)
    for n in range(6):
        busy.submit(StopDaemon(n, 0))
    run(busy, 0)
    assert list(busy.edges()) == [(True, 6), (False, 2)]


def test_gate_forgets_windows_that_are_over(gate: Admission) -> None:
    for chain in range(5):
        gate.admit(DropReplica(chain), 0)
    gate.forget(60_000)
    assert gate._stabilising == {}
