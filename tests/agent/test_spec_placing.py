"""Placement: every node works out the same, nothing moves that needn't, and nothing is given up too early."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.spec.model import DaemonSpec, FleetSpec
from agent.spec.placing import (
    PLACEMENT_SETTLE_MS,
    Candidate,
    Planner,
    Settling,
    Shortfall,
    may_run,
    own_affair,
    placed,
    plan,
)


def daemon(name: str = "web", **fields: object) -> DaemonSpec:
    return DaemonSpec(name=name, command=["x"], **fields)


def node(number: int, **fields: object) -> Candidate:
    return Candidate(number, f"n{number}", "compute", **fields)


def spec(*daemons: DaemonSpec) -> FleetSpec:
    return FleetSpec(daemon=list(daemons))


candidates = st.builds(
    lambda ids, flags: [
        Candidate(
            i, f"n{i}", "console" if flag % 7 == 0 else "compute", {}, flag % 5 != 0, flag % 3 == 0, keeps
        )
        for i, (flag, keeps) in zip(ids, flags, strict=False)
    ],
    st.lists(st.integers(0, 2**64 - 1), unique=True, min_size=0, max_size=12),
    st.lists(
        st.tuples(st.integers(0, 100), st.sets(st.sampled_from(["web", "db"])).map(frozenset)),
        min_size=12,
        max_size=12,
    ),
)
counts = st.integers(1, 6)


@settings(max_examples=40, deadline=None)
@given(candidates, counts, st.randoms())
def test_same_view_in_any_order_gives_the_same_nodes(
    view: list[Candidate], count: int, random: object
) -> None:
    shuffled = list(view)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    web = daemon(count=count)
    assert placed(web, view) == placed(web, shuffled)
    for me in view:
        assert (me.id in placed(web, view)) == ("web" in plan(spec(web), me.id, shuffled).here)


@settings(max_examples=40, deadline=None)
@given(candidates, counts)
def test_count_is_met_by_that_many_different_nodes_or_by_all_there_are(
    view: list[Candidate], count: int
) -> None:
    able = [c for c in view if c.eligible and c.kind != "console" and (not c.cordoned or "web" in c.keeps)]
    found = placed(daemon(count=count), view)
    assert len(found) == len(set(found)) == min(count, len(able)) and set(found) <= {c.id for c in able}
    shortfalls = plan(spec(daemon(count=count)), 0, view).shortfalls
    assert shortfalls == ((Shortfall("web", count, len(found)),) if len(found) < count else ())


@settings(max_examples=40, deadline=None)
@given(candidates, counts, st.data())
def test_node_that_goes_moves_only_its_own_daemons(
    view: list[Candidate], count: int, data: st.DataObject
) -> None:
    if not view:
        return
    gone = data.draw(st.sampled_from(view))
    before = placed(daemon(count=count), view)
    after = placed(daemon(count=count), [c for c in view if c is not gone])
    assert set(before) - {gone.id} <= set(after)
    if gone.id not in before:
        assert before == after


@settings(max_examples=40, deadline=None)
@given(candidates, counts, st.integers(0, 2**64 - 1))
def test_node_that_comes_takes_at_most_one_place_of_a_daemon(
    view: list[Candidate], count: int, number: int
) -> None:
    if any(c.id == number for c in view):
        return
    before = placed(daemon(count=count), view)
    after = placed(daemon(count=count), [*view, node(number)])
    assert set(after) - set(before) <= {number} and len(set(before) - set(after)) <= 1


@settings(max_examples=40, deadline=None)
@given(candidates, counts)
def test_cordoned_node_loses_nothing_that_it_keeps_and_gains_nothing(
    view: list[Candidate], count: int
) -> None:
    found = set(placed(daemon(count=count), view))
    keepers = {c.id for c in view if c.cordoned and c.eligible and c.kind != "console" and "web" in c.keeps}
    assert keepers <= found or (len(keepers) > count and found < keepers)
    assert not found & {c.id for c in view if c.cordoned and "web" not in c.keeps}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(candidates, counts), max_size=3), st.lists(st.integers(1, 12), max_size=6))
def test_planner_that_remembers_says_what_one_that_does_not_would(
    views: list[tuple[list[Candidate], int]], sizes: list[int]
) -> None:
    planner = Planner()
    views += [([node(n) for n in range(size)], 3) for size in sizes]
    for view, count in views:
        wanted = spec(daemon(count=count), daemon("db", count=2, on="kind=compute"), daemon("log", all=True))
        assert planner.plan(wanted, 1, view) == plan(wanted, 1, view)


def test_planner_works_out_only_what_a_change_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.spec import placing

    asked = []
    weight = placing._weight
    monkeypatch.setattr(placing, "_weight", lambda name, of: asked.append(of) or weight(name, of))
    planner, wanted = Planner(), spec(*(daemon(f"d{n}", count=2) for n in range(20)))
    view = [node(n) for n in range(50)]
    planner.plan(wanted, 1, view)
    assert len(asked) == 20 * 50
    asked.clear()
    planner.plan(wanted, 1, [*view, node(99)])
    assert asked == [99] * 20
    asked.clear()
    gone = planner.plan(wanted, 1, view[1:]).placed
    assert len(asked) < 20 * 50 / 4 and gone == plan(wanted, 1, view[1:]).placed


def test_cordon_of_a_node_that_keeps_its_daemons_moves_nothing() -> None:
    view = [node(n) for n in range(1, 8)]
    web = daemon(count=3)
    before = placed(web, view)
    cordoned = [replace(c, cordoned=True, keeps=frozenset({"web"})) if c.id in before else c for c in view]
    assert placed(web, cordoned) == before


def test_all_is_every_eligible_node_that_matches_cordoned_or_not() -> None:
    view = [node(1), node(2, cordoned=True), node(3, eligible=False), replace(node(4), kind="console")]
    assert placed(daemon(all=True), view) == [1, 2]
    assert plan(spec(daemon(all=True)), 9, view).shortfalls == ()


def test_neither_count_nor_all_means_one() -> None:
    assert len(placed(daemon(), [node(n) for n in range(5)])) == 1


def test_daemons_spread_over_the_nodes() -> None:
    view = [node(n * 0x9E3779B97F4A7C15 % 2**64) for n in range(1, 11)]
    load = Counter(i for n in range(300) for i in placed(daemon(f"d{n}", count=2), view))
    assert len(load) == 10 and min(load.values()) > 30 and max(load.values()) < 95


def test_selector_that_no_node_matches_is_a_shortfall_in_words() -> None:
    found = plan(spec(daemon(on="tag.gpu=*", count=2)), 1, [node(1)])
    assert [str(s) for s in found.shortfalls] == ["web: 2 wanted, no node can run it"]


def test_node_that_is_not_in_its_own_view_runs_nothing() -> None:
    assert plan(spec(daemon(all=True)), 9, [node(1)]).here == {}


@pytest.mark.parametrize(
    ("state", "maintenance", "may"),
    [
        ("alive", "active", True),
        ("degraded", "active", True),
        ("joining", "active", True),
        ("updating", "active", True),
        ("draining", "active", False),
        ("leaving", "active", False),
        ("dead", "active", False),
        ("alive", "entering_maintenance", False),
        ("draining", "maintenance", False),
        ("draining", "drain_failed", False),
        ("alive", "exiting_maintenance", True),
        ("alive", "recovery", True),
    ],
)
def test_node_may_run_daemons_in_these_states(state: str, maintenance: str, may: bool) -> None:
    assert may_run(state, maintenance) is may


# --- settling


def winner_and_loser(count: int = 1) -> tuple[Candidate, Candidate]:
    """Two nodes, the first of which comes first for `web`."""
    a, b = node(1), node(2)
    return (a, b) if placed(daemon(count=count), [a, b]) == [1] else (b, a)


def test_daemon_lost_to_a_newcomer_is_given_up_only_once_the_view_held_still() -> None:
    first, me = winner_and_loser()
    wanted, settling = spec(daemon()), Settling()
    assert set(settling.step(wanted, plan(wanted, me.id, [me]), 0)) == {"web"} and settling.due_ms is None
    both = plan(wanted, me.id, [me, first])
    assert set(settling.step(wanted, both, 10_000)) == {"web"}
    assert settling.due_ms == 10_000 + PLACEMENT_SETTLE_MS
    assert set(settling.step(wanted, both, 10_000 + PLACEMENT_SETTLE_MS - 1)) == {"web"}
    assert settling.step(wanted, both, 10_000 + PLACEMENT_SETTLE_MS) == {} and settling.due_ms is None


def test_newcomer_that_goes_again_and_comes_back_starts_the_wait_anew() -> None:
    first, me = winner_and_loser()
    wanted, settling = spec(daemon()), Settling(1000)
    alone, both = plan(wanted, me.id, [me]), plan(wanted, me.id, [me, first])
    for at_ms, view in ((0, alone), (1, both), (900, alone), (950, both)):
        assert set(settling.step(wanted, view, at_ms)) == {"web"}
    assert set(settling.step(wanted, both, 1_900)) == {"web"}
    assert settling.step(wanted, both, 1_950) == {}


def test_nodes_that_have_nothing_to_do_with_a_daemon_do_not_delay_it() -> None:
    first, me = winner_and_loser()
    wanted, settling = spec(daemon(on="kind=compute")), Settling(1000)
    first, me = (first, me) if placed(wanted.daemon[0], [first, me]) == [first.id] else (me, first)
    settling.step(wanted, plan(wanted, me.id, [me]), 0)
    for at_ms in range(1, 1001, 100):
        other = replace(node(100 + at_ms), kind="broker")
        assert settling.step(wanted, plan(wanted, me.id, [me, first, other]), at_ms)
    assert settling.step(wanted, plan(wanted, me.id, [me, first]), 1_001) == {}


def test_daemon_gained_counts_at_once() -> None:
    first, me = winner_and_loser()
    wanted, settling = spec(daemon()), Settling()
    assert settling.step(wanted, plan(wanted, me.id, [me, first]), 0) == {}
    assert set(settling.step(wanted, plan(wanted, me.id, [me]), 1)) == {"web"}


def test_changed_spec_counts_at_once_and_only_for_what_it_changes() -> None:
    first, me = winner_and_loser()
    old, settling = spec(daemon(), daemon("db", all=True)), Settling()
    settling.step(old, plan(old, me.id, [me]), 0)
    other = spec(daemon(), daemon("db", all=True, env={"A": "1"}))
    now = settling.step(other, plan(other, me.id, [me, first]), 1)
    assert set(now) == {"web", "db"} and now["db"].env == {"A": "1"}
    changed = spec(daemon(env={"B": "2"}), daemon("db", all=True, env={"A": "1"}))
    assert set(settling.step(changed, plan(changed, me.id, [me, first]), 2)) == {"db"}
    assert settling.step(spec(), plan(spec(), me.id, [me, first]), 3) == {}


def test_own_drain_and_own_tags_count_at_once() -> None:
    wanted, settling = spec(daemon(on="tag.zone=a", all=True)), Settling()
    me = node(1, tags={"zone": "a"})
    for other in (replace(me, eligible=False), replace(me, tags={"zone": "b"})):
        assert settling.step(wanted, plan(wanted, 1, [me]), 0)
        assert settling.step(wanted, plan(wanted, 1, [other, node(2, tags={"zone": "a"})]), 1) == {}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(1, 6)), st.integers(0, 2_000)), max_size=12), counts)
def test_settled_intents_hold_everything_the_plan_wants_here(
    views: list[tuple[set[int], int]], count: int
) -> None:
    wanted, settling, at_ms = spec(*(daemon(f"d{n}", count=count) for n in range(4))), Settling(), 0
    for others, passed in views:
        at_ms += passed
        now = plan(wanted, 1, [node(n) for n in {1, *others}])
        acted = settling.step(wanted, now, at_ms)
        assert acted.items() >= dict(now.here).items() and set(acted) <= set(now.here) | now.outranked
    end = plan(wanted, 1, [node(n) for n in range(1, 7)])
    settling.step(wanted, end, at_ms)
    assert settling.step(wanted, end, at_ms + PLACEMENT_SETTLE_MS) == dict(end.here)


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, False),
        ({"all": True}, True),
        ({"on": "node=n1"}, True),
        ({"on": "kind=compute,node=n1"}, True),
        ({"on": "node=n*"}, False),
        ({"on": "kind=compute", "count": 2}, False),
    ],
)
def test_daemon_is_a_nodes_own_affair_where_no_other_could_run_it_instead(
    fields: dict[str, Any], own: bool
) -> None:
    assert own_affair(DaemonSpec(name="d", command=["true"], **fields)) is own
