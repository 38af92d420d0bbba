"""This node's own lifecycle: every legal walk, each move once, with its reason, and no illegal one ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    Admin,
    AdminOp,
    Alone,
    Event,
    Leaving,
    SelfHealth,
    Started,
    Synced,
    Tick,
    UpdateFailed,
    UpdateStarted,
)
from agent.meshos.own import Transition, refusal
from agent.meshos.state import MeshOsState, fold
from discovery.lifecycle import State, may_move

ME = 100
HOT, COLD = SelfHealth(990, 400), SelfHealth(100, 400)


def admin(op: Any, node: int = ME, **fields: Any) -> Admin:
    return Admin(AdminOp(op, node, **fields))


def walk(*events: Event, state: MeshOsState | None = None) -> tuple[MeshOsState, list[Transition]]:
    """The state after these events, one a second, and the moves made."""
    state = state or MeshOsState(ME)
    moves = []
    for event in events:
        at_ms = state.now_ms + 1000
        move = fold(state, type(event)(**{**_fields(event), "at_ms": at_ms}))
        if move is not None:
            moves.append(move)
    return state, moves


def _fields(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__}


def trail(moves: list[Transition]) -> list[str]:
    return [move.new.word for move in moves]


def test_start_synced_is_alive_with_reasons() -> None:
    _, moves = walk(Started(), Synced())
    assert trail(moves) == ["joining", "alive"]
    assert [move.reason for move in moves] == ["started", "synced with a first peer"]
    assert moves[0].old is None
    assert moves[1] == Transition(2000, State.JOINING, State.ALIVE, "synced with a first peer")


def test_start_alone_is_alive_for_that_reason() -> None:
    _, moves = walk(Started(), Alone("alone for 2 s"))
    assert (moves[-1].new, moves[-1].reason) == (State.ALIVE, "alone for 2 s")


def test_joined_again_moves_nothing() -> None:
    _, moves = walk(Synced(), Synced(), Alone())
    assert trail(moves) == ["alive"]


def test_update_to_its_end_reads_as_one_trail_over_two_processes() -> None:
    _, before = walk(Started(), Synced(), UpdateStarted(120_000, "op-key", "01OP"))
    _, after = walk(Started(updated=True, by="op-key", op_id="01OP"), Synced())
    assert trail(before + after) == ["joining", "alive", "updating", "joining", "alive"]
    assert (after[0].old, after[0].reason) == (State.UPDATING, "updated")
    assert (before[-1].by, before[-1].op_id, after[0].op_id) == ("op-key", "01OP", "01OP")


def test_started_a_second_time_moves_nothing() -> None:
    _, moves = walk(Started(), Started(updated=True), Synced(), Started())
    assert trail(moves) == ["joining", "alive"]


@pytest.mark.parametrize(
    ("earlier", "back"),
    [
        ((), State.ALIVE),
        ((HOT, HOT, HOT), State.DEGRADED),
        ((admin("drain", by="ann", op_id="01D"),), State.DRAINING),
    ],
)
def test_update_failed_goes_back_to_what_it_interrupted_with_the_reason(
    earlier: tuple[Event, ...], back: State
) -> None:
    state, moves = walk(
        Synced(), *earlier, UpdateStarted(1000, "bob", "01U"), UpdateFailed("self-check: exit 1")
    )
    assert moves[-1] == Transition(
        state.now_ms, State.UPDATING, back, "update failed: self-check: exit 1", "bob", "01U"
    )
    assert state.life.update is None


def test_update_failed_without_an_update_moves_nothing() -> None:
    _, moves = walk(Synced(), UpdateFailed("why"))
    assert trail(moves) == ["alive"]


def test_health_that_changes_while_updating_shows_when_the_update_failed() -> None:
    _, moves = walk(Synced(), UpdateStarted(1000), HOT, HOT, HOT, UpdateFailed("x"))
    assert trail(moves) == ["alive", "updating", "degraded"]


def test_update_past_its_deadline_is_not_ended_by_the_fold() -> None:
    state, _ = walk(Synced(), UpdateStarted(500), Tick(), Tick())
    assert state.life.state is State.UPDATING


def test_drain_and_resume_say_who_and_which_op() -> None:
    _, moves = walk(Synced(), admin("drain", by="ann", op_id="01D"), admin("resume", by="bob", op_id="01R"))
    assert [(move.new, move.reason, move.by, move.op_id) for move in moves[1:]] == [
        (State.DRAINING, "drain", "ann", "01D"),
        (State.ALIVE, "resumed", "bob", "01R"),
    ]


def test_drain_beats_automatic_health_and_resume_shows_it() -> None:
    state, moves = walk(Synced(), admin("drain"), HOT, HOT, HOT)
    assert state.life.state is State.DRAINING
    _, moves = walk(admin("resume", by="bob"), state=state)
    assert (moves[0].new, moves[0].reason, moves[0].by) == (State.DEGRADED, "cpu over 95 % for 15 s", "bob")


def test_drain_takes_the_default_deadline_or_its_own() -> None:
    state, _ = walk(Synced(), admin("drain"))
    assert state.life.drain is not None
    assert state.life.drain.deadline_at_ms - state.life.drain.since_ms == 300_000
    state, _ = walk(Synced(), admin("drain", deadline_ms=0))
    assert state.life.drain is not None
    assert state.life.drain.deadline_at_ms == state.life.drain.since_ms


def test_drain_past_its_deadline_stays_draining() -> None:
    state, moves = walk(Synced(), admin("drain", deadline_ms=1000), *[Tick()] * 10)
    assert state.life.state is State.DRAINING
    assert trail(moves) == ["alive", "draining"]


def test_drain_again_sets_a_new_deadline_and_moves_nothing() -> None:
    state, moves = walk(
        Synced(), admin("drain", deadline_ms=1000), admin("drain", deadline_ms=9000, op_id="2nd")
    )
    assert trail(moves) == ["alive", "draining"]
    assert state.life.drain is not None
    assert state.life.drain.deadline_at_ms == state.now_ms + 9000
    assert state.life.drain.op_id == "2nd"
    assert state.life.drain.since_ms == state.now_ms - 1000


def test_drain_before_joining_shows_once_joined_and_names_its_operator() -> None:
    state, moves = walk(Started(), admin("drain", by="ann", op_id="01D"))
    assert state.life.cordoned
    assert trail(moves) == ["joining"]
    _, moves = walk(Synced(), state=state)
    assert (moves[0].new, moves[0].reason, moves[0].by, moves[0].op_id) == (
        State.DRAINING,
        "drain",
        "ann",
        "01D",
    )


def test_drain_cordons_and_resume_lifts_only_the_drains_cordon() -> None:
    state, _ = walk(Synced(), admin("drain"))
    assert state.life.cordoned
    walk(admin("resume"), state=state)
    assert not state.life.cordoned
    walk(admin("cordon"), admin("drain"), admin("resume"), state=state)
    assert state.life.cordoned
    walk(admin("uncordon"), state=state)
    assert not state.life.cordoned


def test_cordon_moves_nothing() -> None:
    _, moves = walk(Synced(), admin("cordon"), admin("uncordon"))
    assert trail(moves) == ["alive"]


def test_resume_of_a_node_that_is_not_drained_moves_nothing() -> None:
    _, moves = walk(Synced(), admin("resume"))
    assert trail(moves) == ["alive"]


def test_admin_op_for_another_node_changes_nothing_here() -> None:
    state, moves = walk(Synced(), admin("drain", node=101))
    assert trail(moves) == ["alive"]
    assert not state.life.cordoned


def test_degraded_and_back_say_why() -> None:
    _, moves = walk(Synced(), HOT, HOT, HOT, COLD, COLD, COLD)
    assert [(move.new, move.reason) for move in moves[1:]] == [
        (State.DEGRADED, "cpu over 95 % for 15 s"),
        (State.ALIVE, "cpu back under 90 % for 15 s"),
    ]


def test_degraded_for_another_reason_moves_nothing_but_says_the_new_reason() -> None:
    state, moves = walk(Synced(), *[SelfHealth(990, 990)] * 3, *[SelfHealth(100, 990)] * 3)
    assert trail(moves) == ["alive", "degraded"]
    assert moves[1].reason == "cpu over 95 % for 15 s, memory over 95 % for 15 s"
    assert state.life.reason == "memory over 95 % for 15 s"


def test_degraded_while_joining_shows_once_joined() -> None:
    _, moves = walk(Started(), HOT, HOT, HOT, Synced())
    assert trail(moves) == ["joining", "degraded"]


def test_leaving_is_final_and_keeps_its_reason() -> None:
    state, moves = walk(
        Synced(), Leaving("control_op", "ann", "01K"), Leaving("signal"), admin("drain"), Synced(), HOT
    )
    assert moves[-1] == Transition(2000, State.ALIVE, State.LEAVING, "control_op", "ann", "01K")
    assert trail(moves) == ["alive", "leaving"]
    assert state.life.state is State.LEAVING


@pytest.mark.parametrize(
    "before", [(), (Synced(),), (Synced(), UpdateStarted(1000)), (Synced(), admin("drain"))]
)
def test_leaving_is_possible_from_anywhere(before: tuple[Event, ...]) -> None:
    state, _ = walk(*before, Leaving("signal"))
    assert state.life.state is State.LEAVING


@pytest.mark.parametrize(
    ("state", "op", "code"),
    [
        (State.JOINING, "update", "bad_state"),
        (State.ALIVE, "update", None),
        (State.DEGRADED, "update", None),
        (State.DRAINING, "update", None),
        (State.UPDATING, "update", "in_update"),
        (State.LEAVING, "update", "bad_state"),
        (State.JOINING, "drain", None),
        (State.DRAINING, "drain", None),
        (State.UPDATING, "drain", "in_update"),
        (State.UPDATING, "resume", "in_update"),
        (State.LEAVING, "resume", "bad_state"),
        (State.ALIVE, "resume", None),
    ],
)
def test_refusal_by_state_and_op(state: State, op: str, code: str | None) -> None:
    refused = refusal(state, op)
    assert (refused.code if refused else None) == code


def test_refused_op_is_counted_and_without_effect() -> None:
    state, moves = walk(
        Started(), UpdateStarted(1000), Synced(), UpdateStarted(1000), admin("drain"), UpdateStarted(9)
    )
    assert trail(moves) == ["joining", "alive", "updating"]
    assert state.life.drain is None
    assert state.counts.ops_refused == 3


EVENTS = st.one_of(
    st.builds(Started, updated=st.booleans()),
    st.builds(Synced),
    st.builds(Alone),
    st.builds(Tick, late_ms=st.sampled_from([0, 499, 500, 90_000])),
    st.builds(
        SelfHealth, cpu=st.sampled_from([None, 0, 900, 950, 951, 1000]), mem=st.sampled_from([None, 0, 990])
    ),
    st.builds(UpdateStarted, deadline_ms=st.integers(0, 10_000)),
    st.builds(UpdateFailed, reason=st.just("why")),
    st.builds(
        Admin,
        st.builds(
            AdminOp,
            op=st.sampled_from(["drain", "resume", "cordon", "uncordon"]),
            node=st.sampled_from([ME, 7]),
            deadline_ms=st.none() | st.integers(0, 10_000),
        ),
    ),
    st.builds(Leaving, reason=st.just("signal")),
)


@given(st.lists(EVENTS, max_size=40), st.booleans())
def test_moves_of_any_sequence_are_legal_chained_and_each_a_change(events: list[Event], leave: bool) -> None:
    state, moves = walk(*[e for e in events if leave or not isinstance(e, Leaving)])
    shown: State | None = None
    for move in moves:
        if move.old is None:
            assert move.new is State.JOINING
        else:
            assert may_move(move.old, move.new)
            assert move.old is (shown if shown is not None else State.JOINING) or move.new is State.JOINING
        assert move.reason
        shown = move.new
    assert state.life.state is (shown or State.JOINING)
    assert state.counts.transitions == len(moves)
    if State.LEAVING in [move.new for move in moves]:
        assert moves[-1].new is State.LEAVING


@given(st.lists(EVENTS, max_size=30))
def test_state_always_agrees_with_what_is_known(events: list[Event]) -> None:
    state, _ = walk(*events)
    life = state.life
    assert life.state is life.target(bool(state.causes))


def test_budget_of_100_percent_is_never_over() -> None:
    config = MeshOsConfig(cpu_budget_permille=1000, mem_budget_permille=1000)
    _, moves = walk(Synced(), *[SelfHealth(1000, 1000)] * 10, state=MeshOsState(ME, config))
    assert trail(moves) == ["alive"]
