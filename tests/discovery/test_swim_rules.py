"""The deciding rules of `swim`, each over every pair; the formulas against numbers worked out by hand."""

from __future__ import annotations

import itertools
from math import inf, log
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.identity import Identity
from discovery.lifecycle import Evidence, State
from discovery.member import Record, seal_record, supersedes
from discovery.swim.broadcasts import Broadcasts
from discovery.swim.config import (
    SwimConfig,
    refusals_needed,
    retransmit_limit,
    suspicion_min_s,
    suspicion_timeout_s,
    vitals_spacing_s,
)
from discovery.swim.rules import (
    Ruling,
    TombRuling,
    Tombstone,
    bears_witness,
    dialable,
    is_loopback,
    ruling,
    same_host,
    tomb_ruling,
)
from discovery.swim.timers import Timers

ONE = Identity.from_seed(bytes(31) + b"\1")


def record(incarnation: int, version: int = 1, state: State = State.ALIVE, **changes: Any) -> Record:
    fields = {"pub": ONE.pub, "mesh": "alpha", "name": "n1", "kind": "compute", "addrs": [("10.0.0.1", 7000)]}
    return Record(incarnation=incarnation, version=version, state=state, **{**fields, **changes})


def tomb(incarnation: int, evidence: Evidence) -> Tombstone:
    state = State.LEAVING if evidence is Evidence.LEFT else State.ALIVE
    mine = record(incarnation, state=state)
    return Tombstone(mine, seal_record(mine, ONE.sign), evidence, 0.0)


RECORDS = [
    record(i, v, s) for i in (1, 2, 3) for v in (1, 2) for s in (State.ALIVE, State.DRAINING, State.LEAVING)
]
TOMBS = [None, *(tomb(i, e) for i in (1, 2, 3) for e in Evidence)]


@pytest.mark.parametrize("new", RECORDS)
def test_a_record_is_ruled_on_as_the_prose_says_for_every_pair(new: Record) -> None:
    """What is held is never itself a goodbye: a member that left has a tombstone and no row."""
    for held, mine in itertools.product([None, *(r for r in RECORDS if r.state is not State.LEAVING)], TOMBS):
        got = ruling(new, held, mine)
        leaving = new.state is State.LEAVING
        if mine is not None and new.incarnation < mine.incarnation:
            assert got is Ruling.IGNORE
        elif mine is not None and new.incarnation == mine.incarnation:
            late_goodbye = leaving and mine.evidence is not Evidence.LEFT
            assert got is (Ruling.DEPART if late_goodbye else Ruling.IGNORE)
        elif held is not None and not supersedes(new, held):
            assert got is Ruling.IGNORE
        else:
            assert got is (Ruling.DEPART if leaving else Ruling.ADOPT)


def test_nothing_but_a_higher_incarnation_comes_back_from_any_tombstone() -> None:
    for new, mine in itertools.product(RECORDS, TOMBS[1:]):
        if ruling(new, None, mine) is Ruling.ADOPT:
            assert mine is not None and new.incarnation > mine.incarnation


@pytest.mark.parametrize("incarnation", [1, 2, 3])
def test_anothers_tombstone_never_buries_a_member_that_i_hold_present(incarnation: int) -> None:
    for held, mine in itertools.product([record(1), record(2), record(3)], TOMBS):
        if mine is not None and held.incarnation <= mine.incarnation:
            continue
        got = tomb_ruling(incarnation, held, mine)
        if mine is not None and incarnation <= mine.incarnation:
            assert got is TombRuling.IGNORE
        else:
            assert got is (TombRuling.REFUTED if held.incarnation > incarnation else TombRuling.CHECK)


@pytest.mark.parametrize("incarnation", [1, 2, 3])
def test_anothers_tombstone_of_a_node_not_in_view_is_kept_unless_mine_is_as_good(incarnation: int) -> None:
    for mine in TOMBS:
        known = mine is not None and incarnation <= mine.incarnation
        assert tomb_ruling(incarnation, None, mine) is (TombRuling.IGNORE if known else TombRuling.KEEP)


@pytest.mark.parametrize(
    ("host", "near", "far"),
    [
        ("10.0.0.1", True, True),
        ("192.168.1.4", True, True),
        ("2001:db8::1", True, True),
        ("127.0.0.1", True, False),
        ("127.9.9.9", True, False),
        ("::1", True, False),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("224.0.0.1", False, False),
        ("ff02::1", False, False),
        ("255.255.255.255", False, False),
        ("example.com", False, False),
        ("", False, False),
        ("10.0.0.1 ", False, False),
        ("127.1", False, False),
    ],
)
def test_an_address_is_dialled_only_when_it_can_mean_its_owner(host: str, near: bool, far: bool) -> None:
    assert dialable((host, 7000), True) is near
    assert dialable((host, 7000), False) is far
    assert is_loopback((host, 7000)) is (near and not far)


def test_processes_share_a_host_only_when_both_say_which() -> None:
    assert same_host(record(1, host=b"a"), record(1, host=b"a"))
    assert not same_host(record(1, host=b"a"), record(1, host=b"b"))
    assert not same_host(record(1, host=b""), record(1, host=b""))


@pytest.mark.parametrize(
    ("at", "accuser_host", "witness"),
    [
        (("10.0.0.1", 7000), b"other", True),
        (("127.0.0.1", 7000), b"other", False),
        (("::1", 7000), b"other", False),
        (("10.0.0.9", 7000), b"other", False),
        (("127.0.0.1", 7000), b"same", True),
        (("10.0.0.9", 7000), b"same", True),
        (("10.0.0.1", 7000), b"same", True),
    ],
)
def test_a_refusal_at_an_address_of_the_accusers_own_host_counts_only_when_both_run_there(
    at: tuple[str, int], accuser_host: bytes, witness: bool
) -> None:
    accuser = record(1, addrs=[("10.0.0.9", 7001)], host=accuser_host)
    assert bears_witness(at, accuser, record(1, host=b"same")) is witness


LAN = SwimConfig.lan()


@pytest.mark.parametrize(("n", "least"), [(1, 4.0), (2, 4.0), (10, 4.0), (100, 8.0), (1000, 12.0)])
def test_the_least_suspicion_grows_with_the_logarithm_of_the_pool(n: int, least: float) -> None:
    assert suspicion_min_s(n, LAN) == pytest.approx(least)


@pytest.mark.parametrize(
    ("n", "confirmed", "timeout"),
    [
        (2, 0, 4.0),
        (3, 0, 24.0),
        (3, 1, 4.0),
        (10, 0, 24.0),
        (10, 1, 24 - 20 * log(2) / log(3)),
        (10, 2, 4.0),
        (10, 9, 4.0),
        (100, 0, 48.0),
        (100, 2, 8.0),
    ],
)
def test_suspicion_runs_from_six_times_the_least_down_to_it_by_confirmations(
    n: int, confirmed: int, timeout: float
) -> None:
    assert suspicion_timeout_s(n, confirmed, LAN) == pytest.approx(timeout)


def test_a_fixed_suspicion_ignores_pool_and_confirmations() -> None:
    config = SwimConfig.lan(suspicion_fixed_s=7.5)
    assert {suspicion_timeout_s(n, c, config) for n in (1, 2, 50) for c in (0, 3)} == {7.5}


@pytest.mark.parametrize(("n", "limit"), [(1, 4), (9, 4), (10, 8), (99, 8), (100, 12), (999, 12)])
def test_retransmits_grow_with_the_logarithm_of_the_pool(n: int, limit: int) -> None:
    assert retransmit_limit(n, LAN) == limit


@pytest.mark.parametrize(("n", "spacing"), [(1, 2.0), (100, 2.0), (500, 10.0)])
def test_vitals_are_spaced_so_that_a_pool_says_at_most_fifty_a_second(n: int, spacing: float) -> None:
    assert vitals_spacing_s(n, LAN) == spacing


@pytest.mark.parametrize(("others", "needed"), [(0, 1), (1, 1), (2, 2), (50, 2)])
def test_two_must_be_refused_or_one_where_there_is_only_one(others: int, needed: int) -> None:
    assert refusals_needed(others) == needed


def test_the_profiles_differ_only_where_the_table_says() -> None:
    wan = SwimConfig.wan()
    assert (wan.probe_interval_s, wan.probe_timeout_s, wan.indirect_probes) == (3.0, 1.5, 3)
    assert (wan.gossip_interval_s, wan.gossip_fanout, wan.push_pull_interval_s) == (0.5, 4, 30.0)
    assert (LAN.probe_interval_s, LAN.probe_timeout_s, LAN.indirect_probes) == (1.0, 0.4, 3)
    assert (LAN.gossip_interval_s, LAN.gossip_fanout, LAN.push_pull_interval_s) == (0.1, 3, 15.0)
    assert SwimConfig.wan(dead_shown_s=5).dead_shown_s == 5


# timers


def test_timers_come_out_in_order_once_each() -> None:
    timers = Timers()
    for key, at in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        timers.set(key, at)
    assert timers.next() == 1.0
    assert [timers.pop(2.5), timers.pop(2.5), timers.pop(2.5)] == [("a", 1.0), ("b", 2.0), None]
    assert timers.next() == 3.0 and len(timers) == 1


def test_a_timer_set_again_or_cancelled_forgets_its_earlier_deadline() -> None:
    timers = Timers()
    timers.set("a", 1.0)
    timers.set("a", 5.0)
    timers.set("b", 2.0)
    timers.cancel("b")
    timers.cancel("never set")
    assert timers.next() == 5.0 and timers.pop(4.9) is None and timers.at("b") is None
    timers.sooner("a", 9.0)
    assert timers.at("a") == 5.0
    timers.sooner("a", 3.0)
    assert timers.at("a") == 3.0


def test_shifted_timers_keep_their_distances() -> None:
    timers = Timers()
    timers.set("a", 1.0)
    timers.set("b", 2.0)
    timers.shift(10.0)
    assert (timers.at("a"), timers.at("b"), timers.next()) == (11.0, 12.0, 11.0)
    timers.clear()
    assert timers.next() == inf


def test_a_timer_rearmed_for_ever_takes_no_room() -> None:
    timers = Timers()
    for i in range(100_000):
        timers.set("a", float(i))
    assert len(timers._heap) < 100 and timers.next() == 99_999.0


# broadcasts


def test_news_is_told_as_often_as_the_limit_and_no_more() -> None:
    queue = Broadcasts()
    queue.put("a", b"x" * 50)
    assert [queue.take(1000, 3) for _ in range(4)] == [[b"x" * 50]] * 3 + [[]]
    assert not len(queue)


def test_the_least_told_goes_first_and_then_the_newest() -> None:
    queue = Broadcasts()
    queue.put("a", b"a" * 60)
    queue.take(1000, 9)
    queue.put("b", b"b" * 60)
    queue.put("c", b"c" * 60)
    assert [message[:1] for message in queue.take(130, 9)] == [b"c", b"b"]
    assert [message[:1] for message in queue.take(200, 9)][2] == b"a"


def test_newer_news_of_a_subject_replaces_the_older_and_is_told_anew() -> None:
    queue = Broadcasts()
    queue.put("a", b"old" * 20)
    queue.take(1000, 9)
    assert queue.put("a", b"new" * 20) and not queue.put("a", b"new" * 20)
    assert queue.take(1000, 9) == [b"new" * 20] and len(queue) == 1


def test_dropped_news_is_not_told() -> None:
    queue = Broadcasts()
    queue.put("a", b"a" * 50)
    queue.drop("a")
    queue.drop("never there")
    assert queue.take(1000, 9) == [] and not len(queue)


def test_a_flood_of_news_keeps_its_bound() -> None:
    queue = Broadcasts()
    for i in range(10_000):
        queue.put(i, b"x" * 10)
    assert len(queue) <= 4_096


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(41, 400)), max_size=40), st.integers(0, 1200))
def test_what_is_taken_fits_into_the_room(news: list[tuple[int, int]], room: int) -> None:
    queue = Broadcasts()
    for subject, size in news:
        queue.put(subject, bytes(size))
    while taken := queue.take(room, 4):
        assert sum(map(len, taken)) <= room
