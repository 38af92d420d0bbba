"""The default scorer: the formula's terms one by one, who is not eligible, and what holds for any nodes at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.data.scoring import Candidate, nobody_else, ranked, scores

ME = 1
FINE = Candidate(2, disk=0.5, cpu=0.2, mem=0.4, rtt_ms=0.0)


def alone(candidate: Candidate) -> float | None:
    return scores([candidate], [], ME).get(candidate.id)


def test_formula_is_the_one_that_is_documented() -> None:
    assert alone(FINE) == pytest.approx(0.4 * 0.5 + 0.2 * 0.6 + 0.2 * 1 + 0.2 * 1)
    assert alone(Candidate(2)) == pytest.approx(0.4 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.2)
    assert alone(Candidate(ME)) == pytest.approx(0.4 * 0.5 + 0.2 * 0.5 + 0.2 + 0.2)
    assert alone(replace(FINE, rtt_ms=50.0)) == pytest.approx(0.2 + 0.12 + 0.1 + 0.2)
    assert alone(replace(FINE, pending=10)) == pytest.approx(0.16 + 0.12 + 0.2 + 0.2)


@pytest.mark.parametrize("why", ["cordoned", "draining", "avoided"])
def test_node_that_is_not_eligible_has_no_score_even_as_a_holder(why: str) -> None:
    out = replace(FINE, **{why: True})
    assert scores([out], [], ME) == {} == scores([out], [2], ME)
    assert alone(replace(FINE, live=False)) is None


def test_full_disk_makes_a_node_ineligible_unless_it_holds_the_thing() -> None:
    full = replace(FINE, disk=0.96)
    assert scores([full], [], ME) == {}
    assert 2 in scores([full], [2], ME)


def test_zone_that_has_a_holder_is_worth_less_and_a_holders_own_copy_does_not_count() -> None:
    a, b, c = (replace(FINE, id=n, zone=z) for n, z in ((2, "east"), (3, "east"), (4, "west")))
    graded = scores([a, b, c], [2], ME)
    assert graded[2] == graded[4] > graded[3]
    assert ranked([a, b, c], [2], (), ME) == [4, 3]


def test_ranking_leaves_out_holders_and_the_excluded_and_of_equals_takes_the_highest_id() -> None:
    same = [replace(FINE, id=n) for n in (2, 3, 4, 5)]
    assert ranked(same, [5], [3], ME) == [4, 2]


def test_copies_on_their_way_spread_placements() -> None:
    nodes = [replace(FINE, id=n) for n in (2, 3)]
    pending = {2: 0, 3: 0}
    for _ in range(10):
        best = ranked([replace(n, pending=pending[n.id]) for n in nodes], [], (), ME)[0]
        pending[best] += 1
    assert pending == {2: 5, 3: 5}


shares = st.one_of(st.none(), st.floats(0, 1), st.just(math.nan))
candidates = st.builds(
    Candidate,
    id=st.integers(1, 8),
    live=st.booleans(),
    cordoned=st.booleans(),
    draining=st.booleans(),
    avoided=st.booleans(),
    disk=shares,
    cpu=shares,
    mem=shares,
    rtt_ms=st.one_of(st.none(), st.floats(0, 1e6), st.just(math.inf), st.just(math.nan)),
    zone=st.sampled_from(["", "a", "b"]),
    pending=st.integers(0, 1000),
)
fleets = st.lists(candidates, max_size=8, unique_by=lambda c: c.id)


@settings(max_examples=40, deadline=None)
@given(fleets, st.sets(st.integers(1, 8)))
def test_scores_are_from_0_to_1_and_only_of_eligible_nodes(fleet: list[Candidate], holders: set[int]) -> None:
    graded = scores(fleet, holders, ME)
    assert all(0 <= value <= 1 for value in graded.values())
    for candidate in fleet:
        if not candidate.live or candidate.cordoned or candidate.draining or candidate.avoided:
            assert candidate.id not in graded


@settings(max_examples=40, deadline=None)
@given(fleets, st.sets(st.integers(1, 8)), st.permutations(range(8)))
def test_order_of_nodes_plays_no_part(fleet: list[Candidate], holders: set[int], order: list[int]) -> None:
    shuffled = [fleet[at] for at in order if at < len(fleet)]
    assert scores(fleet, holders, ME) == scores(shuffled, holders, ME)
    assert ranked(fleet, holders, (), ME) == ranked(shuffled, holders, (), ME)


@given(candidates, st.floats(0, 1), st.floats(0, 1))
def test_more_free_disk_less_load_or_a_nearer_node_is_never_worse(
    candidate: Candidate, one: float, other: float
) -> None:
    better, worse = sorted((one, other))
    for field, scale in (("disk", 1.0), ("cpu", 1.0), ("rtt_ms", 500.0)):
        good = alone(replace(candidate, mem=None, **{field: better * scale}))
        bad = alone(replace(candidate, mem=None, **{field: worse * scale}))
        assert bad is None or (good is not None and good >= bad)


def test_who_may_take_a_copy_no_more_is_told_with_each_reason() -> None:
    one, two, three = Candidate(1), Candidate(2, cordoned=True), Candidate(3, draining=True)
    full, gone = Candidate(4, disk=0.99), Candidate(5, live=False)
    assert nobody_else([one, two], []) is None
    assert nobody_else([one, gone], [1]) == "every live node has one"
    assert nobody_else([gone], []) == "no node is live"
    assert nobody_else([two], []) == "no node may take it: 1 taking nothing new"
    why = "no other node may take it: 1 draining or in maintenance, 1 short of disk, 1 taking nothing new"
    assert nobody_else([one, two, three, full], [1]) == why
