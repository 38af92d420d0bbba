"""The table of moves, over every pair of states."""

from __future__ import annotations

import itertools

import pytest

from discovery.lifecycle import (
    EVIDENCE_TEXT,
    MOVES,
    PRESENT,
    By,
    Evidence,
    State,
    diagram,
    may_move,
    settable,
)

J, A, D, U, R, L, X = State

BY_HAND = {
    J: {A, D, R, L, X},
    A: {D, R, U, L, X},
    D: {A, R, U, L, X},
    U: {J, A, D, R, L, X},
    R: {A, D, U, L, X},
    L: {X},
    X: {J, A, D, U, R, L},
}
"""The legal moves, written down a second time from the prose."""


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_a_move_is_legal_exactly_when_the_prose_says_so(old: State, new: State) -> None:
    assert may_move(old, new) == (new in BY_HAND[old])


@pytest.mark.parametrize("pair", list(MOVES))
def test_a_move_to_dead_is_made_by_observers_and_no_other_is(pair: tuple[State, State]) -> None:
    assert (MOVES[pair] is By.OBSERVER) == (pair[1] is X)


@pytest.mark.parametrize("state", State)
def test_an_operator_may_set_what_an_operators_op_can_lead_to(state: State) -> None:
    assert settable(state) == (state in (A, U, R))


@pytest.mark.parametrize("state", State)
def test_present_is_every_state_but_leaving_and_dead(state: State) -> None:
    assert (state in PRESENT) == (state not in (L, X))


def test_the_numbers_that_travel_never_change() -> None:
    words = ["joining", "alive", "degraded", "updating", "draining", "leaving", "dead"]
    assert [(state.value, state.word) for state in State] == list(enumerate(words))


def test_every_evidence_has_its_sentence() -> None:
    assert set(EVIDENCE_TEXT) == set(Evidence)


def test_the_diagram_shows_each_move_of_the_table_once() -> None:
    lines = diagram().splitlines()
    arrows = [line for line in lines if "-->" in line]
    assert len(arrows) == len(set(arrows))
    shown = sum(1 for (old, _) in MOVES if old is not X)
    assert len(arrows) == shown + 3
