"""Reconcile: the locality arm, write-back, and what is in flight is not asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.meshos.actions import MarkAvoid
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import ActionOutcome, Id, RttSample, Tick
from agent.meshos.reconcile import ARMS, Look, locality, reconcile, run_pass, write_back
from agent.meshos.state import MeshOsState, fold

ME = 100


def measured(*samples: tuple[Id, float], config: MeshOsConfig | None = None) -> MeshOsState:
    state = MeshOsState(ME, config)
    for peer, rtt_ms in samples:
        fold(state, RttSample(peer, rtt_ms, at_ms=1000))
    fold(state, Tick(at_ms=1000))
    return state


def avoided(state: MeshOsState) -> list[Id]:
    return [action.peer for action in reconcile(state)]


@pytest.mark.parametrize(("rtt_ms", "marked"), [(249.9, []), (250.0, []), (250.01, [7]), (9000.0, [7])])
def test_locality_marks_a_peer_strictly_above_250_ms(rtt_ms: float, marked: list[Id]) -> None:
    assert avoided(measured((7, rtt_ms))) == marked


def test_locality_mark_carries_reason_and_300_seconds() -> None:
    assert reconcile(measured((7, 312.4))) == [MarkAvoid(7, "rtt 312 ms, over 250 ms", 300_000)]


def test_locality_limits_come_from_the_config() -> None:
    config = MeshOsConfig(degraded_rtt_ms=10.0, avoid_ttl_ms=7)
    assert reconcile(measured((7, 11.0), config=config)) == [MarkAvoid(7, "rtt 11 ms, over 10 ms", 7)]


def test_locality_sorts_by_id_numbers_before_strings() -> None:
    assert avoided(measured(("b", 300.0), (12, 300.0), ("10", 300.0), (9, 300.0))) == [9, 12, "10", "b"]


def test_locality_peer_already_avoided_is_not_marked_again_until_its_entry_ends() -> None:
    state = measured((7, 300.0))
    assert len(run_pass(state)) == 1
    for at_ms in range(1500, 301_000, 20_000):
        fold(state, RttSample(7, 400.0, at_ms=at_ms))
        fold(state, Tick(at_ms=at_ms))
        assert run_pass(state) == []
    fold(state, RttSample(7, 400.0, at_ms=300_999))
    fold(state, Tick(at_ms=301_000))
    assert run_pass(state) == [MarkAvoid(7, "rtt 400 ms, over 250 ms", 300_000)]


def test_locality_peer_that_got_faster_stays_avoided_until_its_entry_ends() -> None:
    state = measured((7, 300.0))
    run_pass(state)
    fold(state, RttSample(7, 1.0, at_ms=2000))
    fold(state, Tick(at_ms=2000))
    assert set(state.avoid) == {7}


def test_locality_expired_sample_marks_nobody() -> None:
    state = measured((7, 300.0))
    fold(state, Tick(at_ms=31_001))
    assert avoided(state) == []


def test_reconcile_changes_nothing_and_repeats_itself() -> None:
    state = measured((7, 300.0), (8, 300.0))
    state.changed.clear()
    assert reconcile(state) == reconcile(state)
    assert (state.avoid, state.emitted, state.changed) == ({}, {}, set())


def test_write_back_counts_from_the_last_tick() -> None:
    state = measured((7, 300.0))
    fold(state, RttSample(8, 1.0, at_ms=1400))
    run_pass(state)
    assert (state.avoid[7].since_ms, state.avoid[7].until_ms) == (1000, 301_000)


@given(
    st.dictionaries(st.integers(0, 50) | st.text(max_size=2), st.floats(0, 600), max_size=30), st.randoms()
)
def test_reconcile_is_order_free_and_empty_after_write_back(rtts: dict[Id, float], rng: Any) -> None:
    samples = list(rtts.items())
    state = measured(*samples)
    rng.shuffle(samples)
    actions = reconcile(state)
    assert reconcile(measured(*samples)) == actions
    assert [action.peer for action in actions] == avoided(state)
    assert {action.peer for action in actions} == {p for p, rtt in rtts.items() if rtt > 250 and p != ME}
    write_back(state, actions)
    assert reconcile(state) == []


class Push(msgspec.Struct, frozen=True, tag_field="kind", tag="push"):
    """An action that ends by an outcome, as those of later arms do."""

    KIND: ClassVar[str] = "push"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    target: Id


def pushing(look: Look) -> Iterator[Any]:
    yield Push("x")


ARMS_WITH_PUSH = (*ARMS, pushing)


def test_action_in_flight_is_not_emitted_again_until_its_outcome_frees_it() -> None:
    state = measured()
    assert run_pass(state, ARMS_WITH_PUSH) == [Push("x")]
    assert run_pass(state, ARMS_WITH_PUSH) == []
    fold(state, ActionOutcome("push", "x", "failed", "no route"))
    assert run_pass(state, ARMS_WITH_PUSH) == [Push("x")]


def test_action_in_flight_is_free_again_after_a_minute() -> None:
    state = measured()
    run_pass(state, ARMS_WITH_PUSH)
    fold(state, Tick(at_ms=60_999))
    assert run_pass(state, ARMS_WITH_PUSH) == []
    fold(state, Tick(at_ms=61_000))
    assert run_pass(state, ARMS_WITH_PUSH) == [Push("x")]


def test_arms_speak_in_their_order() -> None:
    state = measured((7, 300.0))
    assert [action.KIND for action in reconcile(state, (pushing, locality))] == ["push", "mark_avoid"]


def test_emitted_actions_are_bounded_and_the_oldest_go() -> None:
    state = measured(*[(n, 300.0) for n in range(5)], config=MeshOsConfig(action_queue_capacity=3))
    run_pass(state)
    assert [key[1] for key in state.emitted] == [2, 3, 4]
    assert state.counts.actions_emitted == 5
