"""Resources: what a daemon needs goes only where it fits, and what runs stays where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.spec.model import DaemonSpec, FleetSpec, Resources
from agent.spec.placing import Candidate, Plan, Planner, Shortfall, plan
from agent.spec.resources import UNKNOWN, Books, Capacity, needs_text, size_text

M, G = 1 << 20, 1 << 30


def daemon(name: str, cpu: float | None = None, memory: int | None = None, **fields: object) -> DaemonSpec:
    needs = Resources(cpu=cpu, memory=memory) if cpu or memory else None
    return DaemonSpec(name=name, command=["x"], resources=needs, **fields)


def node(number: int, cores: float = 4, memory: int = 2 * G, **fields: object) -> Candidate:
    return Candidate(
        number, f"n{number}", "compute", capacity=Capacity(round(cores * 1000), memory), **fields
    )


def spec(*daemons: DaemonSpec) -> FleetSpec:
    return FleetSpec(daemon=list(daemons))


def running(view: list[Candidate], of: Plan, wanted: FleetSpec) -> list[Candidate]:
    """The same nodes once each runs what the plan gives it, and says so."""
    sized = {d.name for d in wanted.daemon if d.resources}
    return [
        replace(c, keeps=frozenset(n for n, ids in of.placed.items() if c.id in ids and n in sized))
        for c in view
    ]


def taken(of: Plan, wanted: FleetSpec) -> Mapping[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for each in wanted.daemon:
        for at in of.placed[each.name] if each.resources else ():
            cores, memory = found.get(at, (0, 0))
            found[at] = cores + each.resources.millicores, memory + (each.resources.memory or 0)
    return found


daemons = st.lists(
    st.builds(
        lambda name, cpu, memory, count, kind: daemon(
            name,
            cpu or None,
            memory * 256 * M or None,
            **({"all": True} if kind == 0 else {"on": "node=n1"} if kind == 1 else {"count": count}),
        ),
        st.text("abcd", min_size=1, max_size=3),
        st.sampled_from([0, 0.5, 1, 2.5]),
        st.integers(0, 5),
        st.integers(1, 4),
        st.integers(0, 8),
    ),
    max_size=10,
    unique_by=lambda each: each.name,
)
views = st.lists(
    st.builds(
        lambda number, cores, memory, known, eligible: replace(
            node(number, cores, memory * 512 * M, eligible=eligible),
            **({} if known else {"capacity": UNKNOWN}),
        ),
        st.integers(0, 30),
        st.sampled_from([0.5, 1, 2, 4]),
        st.integers(1, 5),
        st.integers(0, 6),
        st.integers(0, 6).map(bool),
    ),
    max_size=7,
    unique_by=lambda each: each.id,
)


@settings(max_examples=60, deadline=None)
@given(daemons, views)
def test_no_node_is_given_more_than_it_has(listed: list[DaemonSpec], view: list[Candidate]) -> None:
    found = plan(spec(*listed), 1, view)
    has = {c.id: c.capacity for c in view}
    for at, (cores, memory) in taken(found, spec(*listed)).items():
        assert has[at].millicores is None or cores <= has[at].millicores  # type: ignore[operator]
        assert has[at].memory is None or memory <= has[at].memory  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(daemons, views)
def test_daemon_is_wanting_only_where_no_node_that_may_run_it_has_room(
    listed: list[DaemonSpec], view: list[Candidate]
) -> None:
    wanted = spec(*listed)
    found = plan(wanted, 1, view)
    used = taken(found, wanted)
    short = {s.daemon for s in found.shortfalls}
    for each in listed:
        placed, held = set(found.placed[each.name]), found.held.get(each.name, {})
        assert not placed & held.keys()
        meant = {c.id: c for c in view if c.eligible and each.on in ("", f"node={c.name}")}
        assert placed | held.keys() <= meant.keys()
        if each.all:
            assert placed | held.keys() == meant.keys()
        if each.all or each.name in short:
            for at in meant.keys() - placed:
                books = Books()
                cores, memory = used.get(at, (0, 0))
                books.take(at, UNKNOWN, Resources(cpu=cores / 1000, memory=memory))
                assert each.resources and books.take(at, meant[at].capacity, each.resources)


@settings(max_examples=60, deadline=None)
@given(daemons, views, st.randoms())
def test_equal_views_agree_in_whatever_order_they_are_listed(
    listed: list[DaemonSpec], view: list[Candidate], random: object
) -> None:
    others, turned = list(view), list(listed)
    random.shuffle(others)  # type: ignore[attr-defined]
    random.shuffle(turned)  # type: ignore[attr-defined]
    one, two = plan(spec(*listed), 1, view), plan(spec(*turned), 1, others)
    assert (one.placed, one.held, one.here) == (two.placed, two.held, two.here)


@settings(max_examples=80, deadline=None)
@given(daemons, views, st.data())
def test_plan_stands_however_few_of_its_daemons_are_told_of_yet(
    listed: list[DaemonSpec], view: list[Candidate], data: st.DataObject
) -> None:
    wanted = spec(*listed)
    found = plan(wanted, 1, view)
    told = [
        replace(
            c, keeps=frozenset(data.draw(st.sets(st.sampled_from(sorted(c.keeps))))) if c.keeps else c.keeps
        )
        for c in running(view, found, wanted)
    ]
    assert plan(wanted, 1, told).placed == found.placed


@settings(max_examples=80, deadline=None)
@given(daemons, views, daemons, views, st.data())
def test_what_runs_stays_whatever_daemons_and_nodes_come_and_go(
    listed: list[DaemonSpec],
    view: list[Candidate],
    added: list[DaemonSpec],
    come: list[Candidate],
    data: st.DataObject,
) -> None:
    before = spec(*listed)
    found = plan(before, 1, view)
    left = data.draw(st.lists(st.sampled_from(listed), unique_by=lambda d: d.name)) if listed else []
    names, ids = {d.name for d in listed}, {c.id for c in view}
    after = spec(*left, *(d for d in added if d.name not in names))
    stay = [c for c in running(view, found, before) if data.draw(st.booleans())]
    there = [*stay, *(c for c in come if c.id not in ids)]
    now = plan(after, 1, there)
    for each in left:
        if each.resources:
            assert set(found.placed[each.name]) & {c.id for c in stay} <= set(now.placed[each.name])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(daemons, views), max_size=4))
def test_planner_that_remembers_says_what_one_that_does_not_would(
    steps: list[tuple[list[DaemonSpec], list[Candidate]]],
) -> None:
    planner = Planner()
    for listed, view in steps:
        wanted = spec(*listed)
        found = plan(wanted, 1, view)
        assert planner.plan(wanted, 1, view) == found
        assert planner.plan(wanted, 1, running(view, found, wanted)).placed == found.placed


def test_ranks_are_not_worked_out_once_all_who_shall_have_taken_a_daemon_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from agent.spec import placing

    asked = []
    weight = placing._weight
    monkeypatch.setattr(placing, "_weight", lambda name, of: asked.append(of) or weight(name, of))
    planner, view = Planner(), [node(n) for n in range(40)]
    wanted = spec(*(daemon(f"d{n}", 0.5, count=2) for n in range(10)))
    found = planner.plan(wanted, 1, view)
    assert len(asked) == 10 * 40
    told = running(view, found, wanted)
    planner.plan(wanted, 1, [*told[:20], *view[20:]])
    planner.plan(wanted, 1, told[1:])
    short = sum(0 in ids for ids in found.placed.values())
    assert len(asked) == 10 * 40 + short * 39


def test_counted_daemon_goes_to_the_next_in_rank_where_the_first_is_full() -> None:
    view = [node(1), node(2), node(3)]
    first = plan(spec(daemon("web", memory=G)), 1, view).placed["web"][0]
    small = [replace(c, capacity=Capacity(4000, G - 1)) if c.id == first else c for c in view]
    found = plan(spec(daemon("web", memory=G)), first, small)
    assert found.placed["web"] != (first,) and len(found.placed["web"]) == 1
    assert found.here == {} and found.outranked == {"web"} and found.held == {} and found.shortfalls == ()


def test_new_daemon_with_an_earlier_name_takes_no_room_of_one_that_runs() -> None:
    old = spec(daemon("web", memory=2 * G))
    view = running([node(1)], plan(old, 1, [node(1)]), old)
    new = plan(spec(daemon("aaa", memory=M), *old.daemon), 1, view)
    assert new.placed == {"aaa": (), "web": (1,)}
    assert new.held == {"aaa": {1: "needs 1M memory, 0 free of 2.0G"}}
    fresh = plan(spec(daemon("aaa", memory=M), *old.daemon), 1, [node(1)])
    assert fresh.placed == {"aaa": (1,), "web": ()}, "where nothing runs yet, the name decides"


def test_daemon_that_no_other_node_can_run_is_given_room_before_those_that_others_can() -> None:
    wanted = spec(daemon("a", memory=G), daemon("z", memory=2 * G, on="node=n1"))
    assert plan(wanted, 1, [node(1)]).placed == {"a": (), "z": (1,)}


def test_daemon_that_fits_not_everywhere_says_where_and_why() -> None:
    wanted = spec(daemon("log", memory=512 * M, all=True), daemon("web", 1.5, memory=G, count=3))
    view = [node(1, 1), node(2, 4, 380 * M), node(3)]
    found = plan(wanted, 2, view)
    assert found.placed == {"log": (1, 3), "web": (3,)} and found.here == {}
    assert found.held["log"] == {2: "needs 512M memory, 380M free of 380M"}
    assert found.held["web"] == {
        1: "needs 1.5 cores, 1 free of 1",
        2: "needs 1.0G memory, 380M free of 380M",
    }
    (short,) = found.shortfalls
    assert (short.daemon, short.wanted, short.placed) == ("web", 3, 1)
    assert str(short).startswith("web: 3 wanted, 1 node can run it; n") and " needs 1" in str(short)
    assert plan(wanted, 9, [node(3)]).shortfalls == (Shortfall("web", 3, 1),), (
        "no more nodes is another matter"
    )


def test_as_many_nodes_hold_a_counted_daemon_back_as_are_wanting() -> None:
    found = plan(spec(daemon("web", memory=G, count=2)), 1, [node(n, memory=M) for n in range(5)])
    assert len(found.held["web"]) == 2


def test_node_whose_capacity_is_not_known_is_taken_to_be_able() -> None:
    wanted = spec(daemon("web", 64, memory=1 << 40))
    assert plan(wanted, 1, [replace(node(1), capacity=UNKNOWN)]).placed == {"web": (1,)}
    assert plan(wanted, 1, [replace(node(1), capacity=Capacity(None, G))]).placed == {"web": ()}


def test_daemon_without_resources_counts_nothing_and_fits_everywhere() -> None:
    wanted = spec(daemon("big", memory=2 * G), *(daemon(f"d{n}") for n in range(50)))
    assert all(ids == (1,) for ids in plan(wanted, 1, [node(1)]).placed.values())


def test_cordoned_node_is_given_none_with_resources_and_keeps_what_it_has() -> None:
    wanted = spec(daemon("web", memory=G))
    assert plan(wanted, 1, [node(1, cordoned=True)]).placed == {"web": ()}
    assert plan(wanted, 1, [node(1, cordoned=True, keeps=frozenset({"web"})), node(2)]).placed == {
        "web": (1,)
    }


def test_of_two_nodes_that_both_run_one_the_first_in_rank_keeps_it() -> None:
    wanted = spec(daemon("web", memory=G))
    first = plan(wanted, 1, [node(1), node(2)]).placed
    both = [node(n, keeps=frozenset({"web"})) for n in (1, 2)]
    assert plan(wanted, 1, both).placed == first


def test_room_of_one_that_another_node_runs_too_is_given_away_only_once_it_has_ended() -> None:
    wanted = spec(daemon("web", memory=2 * G), daemon("new", memory=G, all=True))
    both = [node(n, keeps=frozenset({"web"})) for n in (1, 2)]
    found = plan(wanted, 1, both)
    assert found.placed["new"] == () and len(found.placed["web"]) == 1
    ended = [c if c.id in found.placed["web"] else replace(c, keeps=frozenset()) for c in both]
    assert {*plan(wanted, 1, ended).placed["new"], *found.placed["web"]} == {1, 2}


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1K"), (512 * M, "512M"), (G - 1, "1023M"), (2 * G, "2.0G")],
)
def test_size_is_cut_never_rounded_up(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("needs", "text"),
    [
        (Resources(cpu=0.5, memory=512 * M), "0.5 cores and 512M memory"),
        (Resources(cpu=1), "1 core"),
        (Resources(memory=3 * G + G // 2), "3.5G memory"),
    ],
)
def test_needs_are_said_in_the_words_of_the_spec(needs: Resources, text: str) -> None:
    assert needs_text(needs) == text
