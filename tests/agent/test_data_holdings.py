"""The fold of who holds what: announcements by version, deltas, leaders, counts, and what the engine hears of it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.data.holdings import (
    CHANGES_KEPT,
    FORGET_AFTER_MS,
    GONE_AFTER_MS,
    Change,
    Holdings,
    Item,
    Own,
    Told,
    read_note,
    read_told,
)
from agent.meshos.events import Blob, PlacementIntent, ReplicaLeader, ReplicaUpdate, Tick
from agent.meshos.state import MeshOsState, fold
from discovery.errors import RemoteError

ME = 100
KEY: Any = ("artifact", "model")


def item(
    name: str = "model", hash: str = "aa", count: int = 2, at_ms: int = 1, kind: Any = "artifact"
) -> Item:
    return Item(kind, name, hash, 10, count, at_ms, "")


class Mesh:
    """This node's fold, and what others tell it."""

    def __init__(self) -> None:
        self.fold = Holdings(ME)
        self.owns: dict[int, Own] = {ME: Own(1)}
        self.live = {ME}

    def holds(self, node: int, *items: Item) -> Mesh:
        own = self.owns.setdefault(node, Own(1))
        for one in items:
            own.add(one)
        return self.told(node)

    def drops(self, node: int, name: str = "model", kind: Any = "artifact") -> Mesh:
        self.owns[node].remove(kind, name)
        return self.told(node)

    def told(self, node: int) -> Mesh:
        self.live.add(node)
        self.fold.live(self.live, (), 0)
        if node == ME:
            self.fold.own(self.owns[ME])
        elif not self.fold.heard(node, self.owns[node].told(self.fold.version(node))):
            assert self.fold.heard(node, self.owns[node].told())
        return self

    def events(self) -> list[Any]:
        return self.fold.events()


# --- what the engine hears


def test_counted_artifact_is_a_chain_with_count_holders_and_leader() -> None:
    mesh = Mesh().holds(7, item()).holds(ME, item())
    assert mesh.events() == [
        PlacementIntent("model", 2),
        ReplicaUpdate("model", "added", 7),
        ReplicaUpdate("model", "added", ME, leader=ME),
    ]
    assert mesh.events() == []


def test_uncounted_artifact_is_a_blob_and_no_chain() -> None:
    mesh = Mesh().holds(7, item(count=0))
    assert mesh.events() == [Blob("model", "added", 7)]
    assert mesh.drops(7).events() == [Blob("model", "removed", 7)]


def test_blob_whose_count_becomes_known_turns_into_a_chain_and_back() -> None:
    mesh = Mesh().holds(7, item(count=0)).holds(8, item(count=0))
    mesh.events()
    mesh.fold.spec({KEY: 3})
    assert mesh.events() == [
        Blob("model", "removed", 7),
        Blob("model", "removed", 8),
        PlacementIntent("model", 3),
        ReplicaUpdate("model", "added", 7),
        ReplicaUpdate("model", "added", 8, leader=8),
    ]
    mesh.fold.spec({})
    assert mesh.events() == [
        ReplicaUpdate("model", "removed", 7),
        ReplicaUpdate("model", "removed", 8, leader=None),
        PlacementIntent("model", None),
        Blob("model", "added", 7),
        Blob("model", "added", 8),
    ]


def test_leader_that_gives_up_its_copy_is_one_event() -> None:
    mesh = Mesh().holds(7, item()).holds(9, item())
    mesh.events()
    assert mesh.drops(9).events() == [ReplicaUpdate("model", "removed", 9, leader=7)]


def test_leader_that_vanishes_leads_no_more_and_still_counts() -> None:
    mesh = Mesh().holds(7, item()).holds(9, item())
    mesh.events()
    mesh.fold.live({7}, (), 5_000)
    assert mesh.events() == [ReplicaLeader("model", 7)]
    assert mesh.fold.holders(KEY) == [7, 9] and mesh.fold.live_holders(KEY) == [7]
    mesh.fold.live({7, 9}, (), 6_000)
    assert mesh.events() == [ReplicaLeader("model", 9)]


def test_nobody_leads_what_no_live_node_holds() -> None:
    mesh = Mesh().holds(9, item())
    mesh.events()
    mesh.fold.live((), (), 0)
    assert mesh.events() == [ReplicaLeader("model", None)]


@pytest.mark.parametrize(("left", "after_ms"), [((9,), GONE_AFTER_MS), ((), FORGET_AFTER_MS)])
def test_node_that_is_gone_stops_holding_after_its_time(left: tuple[int, ...], after_ms: int) -> None:
    mesh = Mesh().holds(7, item()).holds(9, item())
    mesh.events()
    mesh.fold.live({7}, left, 1_000)
    mesh.fold.live({7}, left, 1_000 + after_ms - 1)
    assert mesh.events() == [ReplicaLeader("model", 7)]
    mesh.fold.live({7}, left, 1_000 + after_ms)
    assert mesh.events() == [ReplicaUpdate("model", "removed", 9)]
    assert mesh.fold.version(9) is None


def test_node_that_is_back_in_time_keeps_its_place() -> None:
    mesh = Mesh().holds(7, item()).holds(9, item())
    mesh.fold.live({7}, {9}, 1_000)
    mesh.fold.live({7, 9}, (), GONE_AFTER_MS)
    mesh.fold.live({7, 9}, (), 3 * GONE_AFTER_MS)
    assert mesh.fold.live_holders(KEY) == [7, 9]


def test_later_version_of_a_name_counts_only_its_own_holders() -> None:
    mesh = Mesh().holds(7, item()).holds(9, item())
    mesh.events()
    mesh.holds(8, item(hash="bb", at_ms=2, count=5))
    assert mesh.fold.outdated(KEY) == [7, 9]
    assert mesh.events() == [
        PlacementIntent("model", 5),
        ReplicaUpdate("model", "added", 8),
        ReplicaUpdate("model", "removed", 7),
        ReplicaUpdate("model", "removed", 9, leader=8),
    ]


def test_later_version_that_only_the_dead_hold_does_not_hide_the_earlier() -> None:
    mesh = Mesh().holds(7, item()).holds(8, item(hash="bb", at_ms=2))
    mesh.fold.live({7}, (), 0)
    current = mesh.fold.current(KEY)
    assert current is not None and current.hash == "aa" and mesh.fold.leader(KEY) == 7
    mesh.fold.live({7, 8}, (), 0)
    assert mesh.fold.leader(KEY) == 8


def test_spec_count_of_what_nobody_holds_is_told_and_goes_with_the_spec() -> None:
    mesh = Mesh()
    mesh.fold.spec({KEY: 3})
    assert mesh.events() == [PlacementIntent("model", 3)]
    mesh.fold.spec({})
    assert mesh.events() == [PlacementIntent("model", None)]


# --- announcements


def test_delta_brings_another_up_to_date_and_everything_does_where_it_is_too_far_behind() -> None:
    own, fold_ = Own(1), Holdings(ME)
    for at in range(10):
        own.add(item(f"a{at}"))
    assert fold_.heard(7, own.told())
    own.remove("artifact", "a3")
    told = own.told(fold_.version(7))
    assert told.since == 10 and len(told.changes) == 1
    assert fold_.heard(7, told) and len(fold_.held_by(7)) == 9
    for at in range(CHANGES_KEPT + 1):
        own.add(item(f"b{at}"))
    assert own.told(fold_.version(7)).since is None
    assert own.told((1, own.number + 1)).since is None, "a version that never was"
    assert own.told((2, 1)).since is None, "of another process"


def test_delta_onto_another_version_is_not_taken() -> None:
    own, fold_ = Own(1), Holdings(ME)
    own.add(item("a"))
    first = own.told()
    own.add(item("b"))
    own.add(item("c"))
    gap = own.told((1, 2))
    assert fold_.heard(7, first)
    assert not fold_.heard(7, gap)
    assert fold_.heard(7, own.told()) and len(fold_.held_by(7)) == 3


def test_older_announcement_is_ignored_and_a_new_process_replaces_everything() -> None:
    old, fold_ = Own(1), Holdings(ME)
    old.add(item("a"))
    late = old.told()
    old.add(item("b"))
    assert fold_.heard(7, old.told()) and fold_.heard(7, late)
    assert len(fold_.held_by(7)) == 2
    assert fold_.heard(7, Own(2).told()) and fold_.held_by(7) == []


def test_announcement_whose_digest_does_not_fit_is_not_believed() -> None:
    own, fold_ = Own(1), Holdings(ME)
    own.add(item("a"))
    forged = msgspec.structs.replace(own.told(), digest="0" * 32)
    assert not fold_.heard(7, forged)
    assert fold_.counters["bad_digest"] == 1 and fold_.version(7) is None
    assert fold_.heard(7, own.told())


def test_note_tells_whether_anything_is_news() -> None:
    own, fold_ = Own(1), Holdings(ME)
    own.add(item("a"))
    fold_.heard(7, own.told())
    note = read_note(msgspec.to_builtins(own.note()))
    assert note is not None and fold_.knows(7, note)
    own.add(item("b"))
    assert not fold_.knows(7, own.note()) and not fold_.knows(8, own.note())


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        [],
        [[1, 1], "aa", None],
        [[1], "aa", None, []],
        [[1, 1], 5, None, []],
        [[1, 1], "aa", "x", []],
        [[1, 1], "aa", None, [[["disk", "x"], False]]],
        [[1, 1], "aa", None, [[["artifact", "x\n"], False]]],
        [[1, 1], "aa", None, [[["artifact", "x", "../.."], False]]],
        [[1, 1], "aa", None, [[["artifact", "x", "aa", -1], False]]],
        [[1, 1], "a" * 40, None, []],
    ],
)
def test_nonsense_is_a_remote_error_and_no_note(body: Any) -> None:
    with pytest.raises(RemoteError):
        read_told(body)
    assert read_note(body) is None or body == []


# --- properties

names = st.sampled_from(["a", "b", "c"])
nodes = st.sampled_from([ME, 3, 7, 200])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), nodes, names, st.sampled_from(["aa", "bb"]), st.integers(0, 3)),
        st.tuples(st.just("remove"), nodes, names),
        st.tuples(st.just("live"), st.sets(nodes)),
        st.tuples(st.just("restart"), nodes),
        st.tuples(st.just("lose"), nodes),
        st.tuples(st.just("spec"), st.dictionaries(names, st.integers(1, 4), max_size=2)),
    ),
    max_size=25,
)


def play(moves: list[Any], told_late: bool) -> tuple[Holdings, MeshOsState]:
    """The moves, folded as they are told; `told_late` tells the engine only at the end."""
    holdings, engine = Holdings(ME), MeshOsState(ME)
    owns = {node: Own(1) for node in (ME, 3, 7, 200)}
    clock = itertools.count(1)
    holdings.live(owns, (), 0)

    def hear(node: int) -> None:
        if not holdings.heard(node, owns[node].told(holdings.version(node))):
            assert holdings.heard(node, owns[node].told())

    for move in moves:
        match move:
            case ("add", node, name, hash, count):
                owns[node].add(item(name, hash, count, {"aa": 1, "bb": 2}[hash]))
                hear(node)
            case ("remove", node, name):
                owns[node].remove("artifact", name)
                hear(node)
            case ("live", alive):
                holdings.live(alive, (), 0)
            case ("restart", node):
                fresh = Own(owns[node].incarnation + 1)
                for held in owns[node].held.items.values():
                    fresh.add(held)
                owns[node] = fresh
                hear(node)
            case ("lose", node):
                hear(node)
            case ("spec", counts):
                holdings.spec({("artifact", name): count for name, count in counts.items()})
        if not told_late:
            for event in holdings.events():
                fold(engine, msgspec.structs.replace(event, at_ms=next(clock)))
    for event in holdings.events():
        fold(engine, msgspec.structs.replace(event, at_ms=next(clock)))
    fold(engine, Tick(at_ms=next(clock)))
    return holdings, engine


@settings(max_examples=150, deadline=None)
@given(steps)
def test_engine_ends_in_what_the_fold_says_however_late_it_is_told(moves: list[Any]) -> None:
    holdings, engine = play(moves, told_late=False)
    _, late = play(moves, told_late=True)
    for state in (engine, late):
        chains = {str(k): (set(c.holders), c.leader) for k, c in state.chains.items() if c.holders}
        blobs = {str(k): set(v) for k, v in state.blobs.items()}
        assert not chains.keys() & blobs.keys(), "never both at once"
        for name in ("a", "b", "c"):
            key: Any = ("artifact", name)
            holders = set(holdings.holders(key))
            if holdings.count(key) is None:
                assert blobs.get(name, set()) == holders and name not in chains
            else:
                assert chains.get(name, (set(), None)) == (
                    (holders, holdings.leader(key)) if holders else (set(), None)
                )
                assert name not in blobs
    assert engine.desired.counts == late.desired.counts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), names), max_size=40), st.randoms(use_true_random=False))
def test_deltas_in_any_order_and_number_end_where_everything_does(
    moves: list[tuple[bool, str]], rnd: random.Random
) -> None:
    own, fold_ = Own(1), Holdings(ME)
    said: list[Told] = [own.told()]
    for add, name in moves:
        changed = own.add(item(name)) if add else own.remove("artifact", name)
        if changed:
            said.append(own.told((1, rnd.randrange(own.number))))
    rnd.shuffle(said)
    for told in said:
        fold_.heard(7, told)
    if not fold_.knows(7, own.note()):
        assert fold_.heard(7, own.told())
    assert {held.key for held in fold_.held_by(7)} == set(own.held.items)
    assert isinstance(said[0].changes, list) and all(isinstance(c, Change) for c in said[0].changes)
