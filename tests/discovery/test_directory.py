"""Meshes and their nodes as others tell of them: who is believed, for how long, and what never counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from hashlib import sha512
from math import inf, nan
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery import directory as d
from discovery.directory import Directory, DirectoryConfig, Entry, Listing
from discovery.errors import RemoteError
from discovery.identity import Identity, verify
from discovery.lifecycle import Evidence, State
from discovery.member import RECORD_CONTEXT, Addr, Member, Record, SignedRecord, Vitals, seal_record
from discovery.summary import SUMMARY_CONTEXT, SignedSummary, Summary, seal_summary

TTL_S = 6.0
ADDR = ("10.0.0.9", 7000)


def pub(name: object) -> bytes:
    return sha512(repr(name).encode()).digest()[:32]


def sign_as(key: bytes) -> Callable[[bytes], bytes]:
    """Stands in for ed25519 where thousands of signatures are made: whoever knows the key's name can sign."""
    return lambda data: sha512(key + data).digest()


def fits(key: bytes, data: bytes, sig: bytes) -> bool:
    return sign_as(key)(data) == sig


def summary(mesh: str = "beta", key: bytes | None = None, **changes: Any) -> SignedSummary:
    key = key or pub(mesh)
    fields = {
        "mesh": mesh,
        "mesh_pub": key,
        "epoch": 1,
        "renewal": 0,
        "publisher": pub(f"{mesh} gateway"),
        "publisher_name": f"{mesh}.gateway.1",
        "addrs": [ADDR],
        "counts": {State.ALIVE: 3},
        **changes,
    }
    return seal_summary(Summary(**fields), sign_as(key))


def signed_record(mesh: str, node: object, **changes: Any) -> SignedRecord:
    fields = {
        "pub": pub(node),
        "mesh": mesh,
        "name": f"{mesh}.n",
        "kind": "compute",
        "incarnation": 1,
        "version": 1,
        "state": State.ALIVE,
        "addrs": [ADDR],
        **changes,
    }
    return seal_record(Record(**fields), sign_as(fields["pub"]))


def entry(mesh: str = "beta", node: object = 1, *, state: State = State.ALIVE, **changes: Any) -> Entry:
    """An entry as an honest publisher makes it, but for `changes`; what belongs to the record goes there."""
    own = {
        key: changes.pop(key) for key in list(changes) if key in Record.__struct_fields__ and key != "state"
    }
    dead = state is State.DEAD
    record = signed_record(mesh, node, state=State.ALIVE if dead else state, **own)
    fields = {"since_ms": 5_000, "seen_ms": 100, "received_ms": 4_000, **changes}
    if dead:
        fields = {"evidence": Evidence.SILENT, **fields}
    return Entry(**{"record": record, "state": state, **fields})


def node_of(node: object) -> int:
    return int.from_bytes(pub(node)[:8], "little")


def book(**changes: Any) -> Directory:
    return Directory(**{"home": "alpha", "home_pub": pub("alpha"), "verify": fits, **changes})


def fed(*entries: Entry, now: float = 0.0, **changes: Any) -> Directory:
    one = book(**changes)
    one.heard(summary(), 0, now)
    one.feed("beta", entries, [], now, full=True)
    one.drain()
    return one


def kinds(directory: Directory) -> list[str]:
    return [type(event).__name__ for event in directory.drain()]


def beta(directory: Directory) -> Listing:
    return directory.listings["beta"]


# summaries


def test_a_mesh_heard_of_first_is_listed_pinned_and_passed_on() -> None:
    one = book()
    assert one.heard(summary(), 1.5, 10.0, ADDR)
    assert one.drain() == [d.Pinned("beta", pub("beta")), d.Seen("beta")]
    assert beta(one).summary.counts == {State.ALIVE: 3}
    assert not beta(one).fed
    assert one.expires_in_s("beta", 10.0) == 4.5
    assert one.held(11.0) == [(summary(), 2.5)]


def test_a_mere_renewal_extends_life_and_is_not_passed_on() -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    one.drain()
    assert not one.heard(summary(renewal=1, version=5, cpu=None), 0, 2.0)
    assert one.expires_in_s("beta", 2.0) == TTL_S
    assert one.drain() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 2},
        {"renewal": 1, "counts": {State.ALIVE: 2, State.DEAD: 1}},
        {"renewal": 1, "addrs": [("10.0.0.10", 7000)]},
        {"renewal": 1, "publisher": pub("other")},
        {"renewal": 1, "publisher_name": "beta.other"},
        {"renewal": 1, "cpu": 10},
        {"version": 1, "counts": {State.ALIVE: 4}},
    ],
)
def test_a_newer_summary_that_says_something_new_is_passed_on_once(changes: dict[str, Any]) -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    assert one.heard(summary(**changes), 0.1, 1.0)
    assert not one.heard(summary(**changes), 0.1, 1.0)
    assert not one.heard(summary(), 0.1, 1.0)
    assert beta(one).signed == summary(**changes)


def test_a_load_that_creeps_is_passed_on_when_it_has_moved_five_points() -> None:
    one = book()
    loads = [100, 120, 149, 150, 170, 199, 220]
    news = [one.heard(summary(renewal=i, cpu=cpu), 0, float(i)) for i, cpu in enumerate(loads)]
    assert news == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("older", [{"epoch": 1, "renewal": 99}, {"epoch": 2, "renewal": 4}, {"epoch": 2}])
def test_an_older_summary_of_a_live_mesh_changes_nothing(older: dict[str, Any]) -> None:
    one = book()
    one.heard(summary(epoch=2, renewal=5), 0, 0.0)
    one.drain()
    assert not one.heard(summary(**{**older, "counts": {}}), 0, 5.9)
    assert one.expires_in_s("beta", 5.9) == pytest.approx(0.1)
    assert (one.drain(), one.counters["old_summary"]) == ([], 1)


@pytest.mark.parametrize("age_s", [TTL_S, 7.0, 1e12, inf, nan])
def test_a_summary_past_its_ttl_is_not_taken(age_s: float) -> None:
    one = book()
    assert not one.heard(summary(), age_s, 0.0)
    assert (dict(one.listings), one.drain(), one.counters["late_summary"]) == ({}, [], 1)


def test_a_ttl_out_of_all_proportion_counts_as_the_longest_allowed() -> None:
    one = book()
    one.heard(summary(ttl_ms=600_000), 0, 0.0)
    assert one.expires_in_s("beta", 0.0) == DirectoryConfig.ttl_max_s


def test_a_mesh_unheard_for_its_ttl_expires_is_revived_by_a_renewal_and_keeps_its_rows() -> None:
    one = fed(entry())
    assert one.deadline() == TTL_S
    one.wake(5.99)
    assert one.drain() == []
    one.wake(TTL_S)
    assert one.drain() == [d.Expired("beta", TTL_S)]
    assert (beta(one).expired, beta(one).expired_at, one.held(TTL_S)) == (True, TTL_S, [])
    assert one.find(node_of(1)) is not None
    assert one.heard(summary(renewal=1), 0, 20.0)
    assert one.drain() == [d.Revived("beta")]
    assert one.find(node_of(1)) is not None
    assert one.expires_in_s("beta", 20.0) == TTL_S


def test_a_mesh_past_its_ttl_counts_as_expired_even_before_anybody_woke() -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    one.drain()
    assert not beta(one).live(TTL_S)
    assert one.held(TTL_S) == []
    one.heard(summary(renewal=1), 0, 7.0)
    assert kinds(one) == ["Expired", "Revived"]


def test_an_expired_mesh_is_dropped_after_ten_minutes_with_its_rows() -> None:
    one = fed(entry(), entry(node=2))
    one.wake(605.9)
    assert kinds(one) == ["Expired"]
    one.wake(606.0)
    assert one.drain() == [
        d.Dropped("beta"),
        d.RowsChanged("beta", (), tuple(sorted([node_of(1), node_of(2)]))),
    ]
    assert (dict(one.listings), one.rows, one.find(node_of(1)), one.deadline()) == ({}, 0, None, inf)


def test_a_replayed_summary_never_makes_a_silent_mesh_live_again() -> None:
    one = book()
    recording = [summary(renewal=i) for i in range(4)]
    for i, signed in enumerate(recording):
        one.heard(signed, 0, 2.0 * i)
    for at in (11.9, 12.0, 13.0, 100.0, 611.0, 612.0, 700.0, 10_000.0):
        for signed in recording:
            assert not one.heard(signed, 0, at)
        assert [listing.mesh for listing in one.listings.values() if listing.live(at)] == ["beta"] * (
            at < 12.0
        )
    assert "Revived" not in kinds(one)


def test_a_younger_copy_counts_but_never_beyond_one_ttl_from_when_it_was_first_taken() -> None:
    one = book()
    one.heard(summary(), 5.0, 10.0)
    one.heard(summary(), 3.0, 10.5)
    assert one.expires_in_s("beta", 10.5) == 3.0
    one.heard(summary(), 0.0, 13.0)
    assert one.expires_in_s("beta", 13.0) == 3.0


def test_a_mesh_that_expired_on_a_liars_word_is_revived_by_a_younger_copy_and_passed_on() -> None:
    one = book()
    one.heard(summary(), 5.0, 0.0)
    one.wake(1.0)
    assert one.heard(summary(), 1.5, 1.5)
    assert [type(event) for event in one.drain()][2:] == [d.Expired, d.Revived]
    one.wake(6.0)
    assert one.drain() == [d.Expired("beta", TTL_S)]


def test_a_ttl_that_was_shortened_counts_at_once() -> None:
    one = book()
    one.heard(summary(ttl_ms=60_000), 0, 0.0)
    one.heard(summary(renewal=1), 0, 1.0)
    assert one.deadline() == 7.0
    one.wake(7.0)
    assert beta(one).expired


@pytest.mark.parametrize("host", ["example.org", "", "fe80::1%\x1b[2J", "10.0.0.1 "])
def test_a_summary_whose_address_is_none_is_refused(host: str) -> None:
    one = book()
    assert not one.heard(summary(addrs=[ADDR, (host, 22)]), 0, 0.0)
    assert (dict(one.listings), one.counters) == ({}, {"bad_addr": 1})


def test_a_copy_that_claims_a_greater_age_shortens_nothing() -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    one.heard(summary(), 5.9, 1.0)
    one.heard(summary(renewal=1), 5.9, 2.0)
    assert one.expires_in_s("beta", 2.0) == 4.0
    one.heard(summary(renewal=1), 0, 2.0)
    assert one.expires_in_s("beta", 2.0) == TTL_S


def test_a_publisher_whose_epoch_began_anew_is_told_the_newest_and_is_believed_once_it_goes_on_above() -> (
    None
):
    one = book()
    newest = summary(epoch=7, renewal=3)
    one.heard(newest, 0, 0.0)
    one.wake(6.0)
    one.drain()
    anew = [summary(epoch=1, renewal=i, publisher=pub("anew")) for i in range(4)]
    assert not one.heard(anew[0], 0, 10.0)
    assert one.drain() == [d.Behind("beta", node_of("anew"), newest)]
    one.heard(anew[1], 0, 12.0)
    assert one.drain() == []
    one.heard(anew[2], 0, 15.0)
    assert kinds(one) == ["Behind"]
    publisher = book(home="beta", home_pub=pub("beta"))
    assert not publisher.heard(newest, 10.0, 0.0)
    assert publisher.home_order == (7, 3)
    assert one.heard(summary(epoch=8, publisher=pub("anew")), 0, 16.0)
    assert kinds(one) == ["Revived", "PublisherChanged"]


def test_nobody_is_told_to_be_behind_on_a_strangers_word() -> None:
    one = book()
    one.heard(summary(epoch=7), 0, 0.0)
    one.wake(6.0)
    one.drain()
    forged = SignedSummary(summary(epoch=1).blob, bytes(64))
    assert not one.heard(forged, 0, 10.0)
    assert not one.heard(summary(epoch=1), TTL_S, 10.0)
    assert one.drain() == []


def test_a_takeover_is_told_and_blanks_no_row() -> None:
    one = fed(entry(), entry(node=2))
    assert one.heard(summary(epoch=2, publisher=pub("other")), 0, 3.0)
    assert one.drain() == [d.PublisherChanged("beta", pub("beta gateway"), pub("other"), 2)]
    assert set(beta(one).members) == {node_of(1), node_of(2)}
    assert beta(one).fed_at == 0.0


def test_a_summary_of_ones_own_mesh_is_no_news_and_tells_the_order_to_go_on_above() -> None:
    one = book()
    assert not one.heard(summary("alpha", epoch=4, renewal=2), 1e6, 0.0)
    assert not one.heard(summary("alpha", epoch=3), 0, 0.0)
    assert one.home_order == (4, 2)
    one.heard(SignedSummary(summary("alpha", epoch=9).blob, bytes(64)), 0, 0.0)
    assert one.home_order == (4, 2)
    assert (dict(one.listings), one.drain()) == ({}, [])


def test_a_home_without_a_key_takes_no_notice_of_its_own_name() -> None:
    one = book(home_pub=None)
    assert not one.heard(summary("alpha"), 0, 0.0)
    assert (dict(one.listings), one.impostors, one.drain()) == ({}, {}, [])


def test_an_expired_mesh_told_by_a_member_of_ones_own_is_listed_as_expired() -> None:
    one = book()
    assert not one.heard(summary(), 48.0, 100.0, even_expired=True)
    assert one.drain() == [d.Pinned("beta", pub("beta")), d.Seen("beta"), d.Expired("beta", 48.0)]
    assert beta(one).expired
    assert one.feed("beta", [entry()], [], 100.0, full=True)
    one.wake(657.9)
    assert "beta" in one.listings
    one.wake(658.0)
    assert "beta" not in one.listings
    assert not one.heard(summary("gamma"), 606.0, 100.0, even_expired=True)
    assert "gamma" not in one.listings


def test_a_newer_summary_told_late_neither_blanks_a_live_mesh_nor_revives_a_silent_one() -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    one.heard(summary(renewal=1, ttl_ms=60_000), 61.0, 1.0, even_expired=True)
    assert (one.expires_in_s("beta", 1.0), beta(one).summary.renewal) == (5.0, 0)
    one.wake(6.0)
    one.drain()
    assert not one.heard(summary(renewal=1, ttl_ms=60_000), 61.0, 10.0, even_expired=True)
    assert (beta(one).expired, beta(one).summary.renewal, one.drain()) == (True, 1, [])
    assert (beta(one).expired_at, beta(one).silent_s(10.0)) == (9.0, 61.0)


# impostors


def test_another_key_under_a_heard_name_is_an_impostor_however_high_its_epoch() -> None:
    one = fed(entry())
    before = (beta(one).summary, beta(one).until, dict(beta(one).members))
    fake = summary(key=pub("stranger"), epoch=2**62, publisher_name="evil")
    assert not one.heard(fake, 0, 1.0, ("10.9.9.9", 1))
    assert one.drain() == [d.ImpostorSeen("beta", pub("stranger"), "evil", ("10.9.9.9", 1), 1)]
    shown = beta(one).impostors[pub("stranger")]
    assert (shown.addr, shown.last_at, shown.count, shown.publisher) == (("10.9.9.9", 1), 1.0, 1, "evil")
    assert (beta(one).summary, beta(one).until, dict(beta(one).members)) == before
    assert one.held(1.0) == [(summary(), 1.0)]


def test_an_impostor_is_told_of_once_a_minute_and_forgotten_ten_minutes_after_its_last_word() -> None:
    one = book(pins={"beta": pub("beta")})
    for at in range(0, 121, 2):
        one.heard(summary(key=pub("stranger"), epoch=at), 0, float(at))
    told = one.drain()
    assert [type(event) for event in told] == [d.ImpostorSeen] * 3
    assert [event.count for event in told if isinstance(event, d.ImpostorSeen)] == [1, 31, 61]
    one.wake(719.9)
    assert set(one.impostors) == {"beta"}
    one.wake(720.0)
    assert one.impostors == {}


def test_an_impostor_of_a_pinned_mesh_never_heard_is_shown_without_a_listing() -> None:
    one = book(pins={"beta": pub("beta")})
    one.heard(summary(key=pub("stranger")), 0, 0.0)
    assert dict(one.listings) == {}
    assert set(one.impostors["beta"]) == {pub("stranger")}
    one.heard(summary(), 0, 1.0)
    assert set(beta(one).impostors) == {pub("stranger")}


def test_an_impostor_of_ones_own_mesh_is_told() -> None:
    one = book()
    assert not one.heard(summary("alpha", key=pub("stranger"), publisher_name="evil"), 0, 0.0, ADDR)
    assert one.drain() == [d.ImpostorSeen("alpha", pub("stranger"), "evil", ADDR, 1)]
    assert set(one.impostors["alpha"]) == {pub("stranger")}
    assert one.home_order == (0, 0)


def test_impostors_beyond_the_limit_are_counted_and_push_out_none_that_speaks() -> None:
    one = book(config=DirectoryConfig(max_impostors=3), pins={"beta": pub("beta")})
    for i in range(50):
        one.heard(summary(key=pub(("stranger", i))), 0, i / 10)
    assert set(one.impostors["beta"]) == {pub(("stranger", i)) for i in range(3)}
    assert (kinds(one), one.counters["impostors_full"]) == (["ImpostorSeen"] * 3, 47)
    one.heard(summary(key=pub("later")), 0, 60.0)
    assert pub("later") in one.impostors["beta"]


def test_an_impostor_that_can_not_sign_for_its_key_is_none() -> None:
    one = book(pins={"beta": pub("beta")})
    one.heard(SignedSummary(summary(key=pub("stranger")).blob, bytes(64)), 0, 0.0)
    assert (one.impostors, one.drain(), one.counters["bad_summary"]) == ({}, [], 1)


def test_an_impostor_that_talks_without_end_is_looked_at_once_a_second() -> None:
    checked = []

    def counting(key: bytes, data: bytes, sig: bytes) -> bool:
        checked.append(key)
        return fits(key, data, sig)

    one = book(pins={"beta": pub("beta")}, verify=counting)
    for i in range(100):
        one.heard(summary(key=pub("stranger"), renewal=i), 0, i / 50)
    assert len(checked) == 2
    assert one.impostors["beta"][pub("stranger")].count == 100


def test_a_mesh_pinned_anew_is_dropped_and_its_new_key_believed() -> None:
    one = fed(entry())
    one.heard(summary(key=pub("reborn")), 0, 1.0)
    one.drain()
    one.pin("beta", pub("reborn"))
    assert kinds(one) == ["Dropped", "RowsChanged"]
    assert one.impostors == {}
    assert one.heard(summary(key=pub("reborn")), 0, 2.0)
    assert beta(one).pub == pub("reborn")
    assert not one.heard(summary(), 0, 2.0)
    assert set(beta(one).impostors) == {pub("beta")}


def test_a_mesh_that_was_dropped_stays_pinned() -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    one.wake(10_000.0)
    one.drain()
    one.heard(summary(key=pub("stranger"), epoch=9), 0, 10_000.0)
    assert kinds(one) == ["ImpostorSeen"]
    assert one.heard(summary(renewal=1), 0, 10_001.0)
    assert kinds(one) == ["Seen"]


# limits


def test_meshes_beyond_the_limit_are_refused_until_one_has_expired() -> None:
    one = book(config=DirectoryConfig(max_meshes=2), pins={"mine": pub("mine")})
    assert one.heard(summary("a"), 3.0, 0.0) and one.heard(summary("b"), 0, 0.0)
    assert not one.heard(summary("c"), 0, 1.0)
    assert one.counters["meshes_full"] == 1
    assert one.heard(summary("mine"), 0, 1.0)
    assert one.heard(summary("c", renewal=1), 0, 3.0)
    assert set(one.listings) == {"b", "mine", "c"}


def test_pins_beyond_the_limit_cost_the_oldest_that_is_neither_listed_nor_configured() -> None:
    one = book(config=DirectoryConfig(max_meshes=2, max_pins=3), pins={"mine": pub("mine")})
    for i in range(8):
        assert one.heard(summary(f"m{i}"), 0, 700.0 * i)
    one.drain()
    for mesh in ("m0", "m6", "mine"):
        one.heard(summary(mesh, key=pub("stranger"), epoch=9), 0, 5_000.0)
    assert set(one.impostors) == {"m6", "mine"}
    assert pub("stranger") == one.listings["m0"].pub


def test_rows_beyond_the_limits_are_refused_and_counted() -> None:
    one = book(config=DirectoryConfig(max_rows=5, max_rows_of_mesh=3))
    for mesh in ("beta", "gamma"):
        one.heard(summary(mesh), 0, 0.0)
        one.feed(mesh, [entry(mesh, (mesh, i)) for i in range(4)], [], 0.0, full=True)
    assert [len(listing.members) for listing in one.listings.values()] == [3, 2]
    assert (one.rows, one.counters["rows_full"]) == (5, 3)
    one.feed("beta", [entry("beta", ("new", i)) for i in range(3)], [], 1.0, full=True)
    assert set(beta(one).members) == {node_of(("new", i)) for i in range(3)}


def test_keys_first_seen_bind_the_next_process_too_and_no_more_of_them_than_fit() -> None:
    first = book(config=DirectoryConfig(max_pins=2), pins={"mine": pub("mine")})
    for i in range(3):
        first.heard(summary(f"m{i}"), 0, 700.0 * i)
    assert first.remembered == {"m1": pub("m1"), "m2": pub("m2")}
    later = book(config=DirectoryConfig(max_pins=1), remembered={**first.remembered, "alpha": pub("old")})
    assert later.remembered == {}
    later = book(config=DirectoryConfig(max_pins=2), remembered=first.remembered)
    later.heard(summary("m2", key=pub("stranger")), 0, 0.0)
    assert later.heard(summary("m2"), 0, 0.0)
    assert kinds(later) == ["ImpostorSeen", "Seen"]
    later.heard(summary("m3"), 0, 0.0)
    assert set(later.remembered) == {"m2", "m3"}


def test_configured_pins_cost_the_others_no_room() -> None:
    one = book(config=DirectoryConfig(max_meshes=2, max_pins=3))
    for i in range(5):
        one.pin(f"mine{i}", pub(i))
        one.pin(f"mine{i}", pub(i))
    for i in range(3):
        one.heard(summary(f"m{i}"), 0, 700.0 * i)
    one.heard(summary("m0", key=pub("stranger"), epoch=9), 0, 1_400.0)
    assert set(one.impostors) == {"m0"}


# rows


def test_a_row_is_in_this_nodes_own_clock() -> None:
    vitals = Vitals(cpu=300)
    one = fed(
        entry(suspect=True, vitals=vitals, vitals_age_ms=2_500, addr=("10.0.0.3", 7)),
        now=1_000.0,
    )
    row = one.find(node_of(1))
    assert row is not None
    assert (row.since, row.last_seen, row.received) == (995.0, 999.9, 996.0)
    assert (row.vitals, row.vitals_at, row.suspect_since, row.addr) == (
        vitals,
        997.5,
        1000.0,
        ("10.0.0.3", 7),
    )
    assert (row.record.name, row.state, row.present, one.mesh_of(node_of(1))) == (
        "beta.n",
        State.ALIVE,
        True,
        "beta",
    )


def test_a_dead_node_comes_with_its_evidence_and_who_found_it() -> None:
    one = fed(entry(state=State.DEAD, evidence=Evidence.EXITED, by=["beta.a", "beta.b"], suspect=True))
    row = one.find(node_of(1))
    assert row is not None
    assert (row.state, row.evidence, row.by_names) == (State.DEAD, Evidence.EXITED, ("beta.a", "beta.b"))
    assert not row.present


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (entry("gamma"), "wrong_mesh"),
        (entry(state=State.DEAD, evidence=None), "impossible_evidence"),
        (entry(state=State.DEAD, evidence=Evidence.LEFT), "impossible_evidence"),
        (entry(evidence=Evidence.SILENT), "impossible_evidence"),
        (entry(by=["beta.a"]), "impossible_evidence"),
        (msgspec.structs.replace(entry(), state=State.DRAINING), "impossible_state"),
        (entry(vitals=Vitals()), "ageless_vitals"),
        (entry(vitals_age_ms=1), "ageless_vitals"),
        (entry(state=State.DEAD, by=["\x1b[2J"]), "illegal_name"),
        (entry(addr=("example.org", 22)), "bad_addr"),
        (entry(addr=("fe80::1%\x1b[2J", 22)), "bad_addr"),
        (msgspec.structs.replace(entry(), record=SignedRecord(entry().record.blob, bytes(64))), "bad_record"),
        (msgspec.structs.replace(entry(), record=SignedRecord(b"", bytes(64))), "bad_record"),
        (msgspec.structs.replace(entry(), record=SignedRecord(b"\x91" * 900, bytes(64))), "bad_record"),
        (entry(name="Not A Name"), "bad_record"),
    ],
)
def test_an_entry_that_can_not_be_is_refused_counted_and_leaves_the_others_alone(
    bad: Entry, code: str
) -> None:
    one = fed(entry(node="held"))
    assert one.feed("beta", [entry(node="a"), bad, entry(node="b")], [], 1.0, full=False)
    assert set(beta(one).members) == {node_of("held"), node_of("a"), node_of("b")}
    assert one.counters == {code: 1}


def test_a_feed_of_many_unproven_records_is_refused_whole() -> None:
    one = fed(entry())
    forged = [
        msgspec.structs.replace(entry(node=i), record=SignedRecord(entry(node=i).record.blob, bytes(64)))
        for i in range(9)
    ]
    assert not one.feed("beta", [entry(node="good"), *forged], [node_of(1)], 1.0, full=True)
    assert set(beta(one).members) == {node_of(1)}
    assert (one.counters["feed_refused"], one.drain()) == (1, [])


def test_a_feed_of_a_mesh_nobody_published_is_refused() -> None:
    one = book()
    assert not one.feed("beta", [entry()], [], 0.0, full=True)
    assert not one.feed("alpha", [entry("alpha")], [], 0.0, full=True)
    assert (one.rows, one.counters["unknown_mesh"]) == (0, 2)


def test_a_second_key_for_a_known_id_is_refused_in_any_mesh() -> None:
    twin = pub(1)[:8] + bytes(24)
    one = fed(entry())
    one.heard(summary("gamma"), 0, 0.0)
    one.feed("beta", [entry(node="x", pub=twin)], [], 1.0, full=True)
    one.feed("gamma", [entry("gamma", "y", pub=twin)], [], 1.0, full=True)
    row = one.find(node_of(1))
    assert row is not None and row.record.pub == pub(1)
    assert (one.counters["second_key"], len(one.listings["gamma"].members)) == (2, 0)


def test_a_node_in_two_meshes_is_kept_in_both_and_found_in_the_live_one_then_in_the_latest_fed() -> None:
    one = fed(entry())
    one.heard(summary("gamma"), 0, 1.0)
    one.feed("gamma", [entry("gamma", 1)], [], 1.0, full=True)
    node = node_of(1)
    assert (one.mesh_of(node), one.rows) == ("gamma", 2)
    one.refreshed("beta", 2.0)
    assert one.mesh_of(node) == "beta"
    one.wake(6.5)
    assert one.mesh_of(node) == "gamma"
    one.feed("gamma", [], [node], 6.6, full=False)
    assert one.mesh_of(node) == "beta"
    one.feed("beta", [], [node], 6.6, full=False)
    assert (one.mesh_of(node), one.find(node), one.rows) == (None, None, 0)


def test_an_older_record_in_a_delta_is_refused_and_in_a_full_feed_believed() -> None:
    one = fed(entry(incarnation=2))
    one.feed("beta", [entry(incarnation=1, version=9)], [], 1.0, full=False)
    assert beta(one).members[node_of(1)].record.incarnation == 2
    assert one.counters == {"old_record": 1}
    one.feed("beta", [entry(incarnation=1, version=9)], [], 1.0, full=True)
    assert beta(one).members[node_of(1)].record.incarnation == 1


def test_changed_rows_are_told_once_a_drain_and_unchanged_ones_not_at_all() -> None:
    one = fed(entry(node=1), entry(node=2), entry(node=3), entry(node=4))
    one.feed("beta", [entry(node=i, seen_ms=600, since_ms=5_500) for i in (1, 2, 3, 4)], [], 0.5, full=False)
    assert one.drain() == []
    one.feed("beta", [entry(node=1, state=State.DEGRADED, version=2)], [node_of(3)], 1.0, full=False)
    one.feed("beta", [entry(node=1, state=State.ALIVE, version=3)], [node_of(4)], 1.1, full=False)
    one.feed("beta", [entry(node=4)], [], 1.2, full=False)
    assert one.drain() == [d.RowsChanged("beta", tuple(sorted([node_of(1), node_of(4)])), (node_of(3),))]
    assert one.drain() == []


def test_a_row_that_came_and_went_between_two_drains_is_told_as_gone() -> None:
    one = fed()
    one.feed("beta", [entry()], [], 1.0, full=False)
    one.feed("beta", [], [node_of(1)], 1.0, full=False)
    assert one.drain() == [d.RowsChanged("beta", (), (node_of(1),))]


def test_rows_of_a_mesh_count_as_known_from_the_first_full_feed() -> None:
    one = book()
    one.heard(summary(), 0, 0.0)
    one.feed("beta", [entry()], [], 1.0, full=False)
    assert (len(beta(one).members), beta(one).fed) == (1, False)
    one.feed("beta", [], [], 2.0, full=True)
    assert (len(beta(one).members), beta(one).fed_at) == (0, 2.0)


def test_rows_share_the_words_that_they_have_in_common() -> None:
    one = fed(*(entry(node=i, build="0a1b2c3d4e5f", tags={"zone": "north"}, addr=ADDR) for i in (1, 2)))
    first, second = (row.record for row in beta(one).members.values())
    assert first.mesh is second.mesh and first.kind is second.kind and first.build is second.build
    assert next(iter(first.tags.values())) is next(iter(second.tags.values()))


@pytest.mark.parametrize(
    "changes",
    [
        {"suspect": True},
        {"vitals": Vitals(cpu=1), "vitals_age_ms": 0},
        {"addr": ("10.0.0.3", 7)},
        {"seen_ms": 5_000},
        {"state": State.DEAD},
        {"version": 2},
    ],
)
def test_whatever_a_viewer_could_show_otherwise_is_a_change(changes: dict[str, Any]) -> None:
    one = fed(entry())
    one.feed("beta", [entry(**changes)], [], 0.0, full=False)
    assert one.drain() == [d.RowsChanged("beta", (node_of(1),), ())]


def test_a_publisher_that_met_a_node_just_now_does_not_make_it_young_again() -> None:
    one = fed(entry(since_ms=90_000, received_ms=80_000), now=100.0)
    one.feed("beta", [entry(since_ms=1_000, received_ms=1_000, suspect=True)], [], 100.0, full=True)
    row = one.find(node_of(1))
    assert row is not None and (row.since, row.received, row.suspect_since) == (10.0, 20.0, 100.0)
    one.feed("beta", [entry(since_ms=1_000, received_ms=1_000, version=2)], [], 100.0, full=True)
    assert (row.since, row.received, row.suspect_since) == (99.0, 99.0, None)


def test_a_record_is_verified_once_however_often_it_is_fed() -> None:
    checked: list[bytes] = []

    def counting(key: bytes, data: bytes, sig: bytes) -> bool:
        if data.startswith(RECORD_CONTEXT):
            checked.append(sig)
        return fits(key, data, sig)

    one = book(verify=counting)
    one.heard(summary(), 0, 0.0)
    one.open(entry().record)
    for at in range(5):
        one.feed("beta", [entry(suspect=bool(at % 2))], [], float(at), full=bool(at % 2))
    forged = msgspec.structs.replace(entry(node=2), record=SignedRecord(entry(node=2).record.blob, bytes(64)))
    for _ in range(5):
        one.feed("beta", [forged], [], 5.0, full=False)
    assert checked == [entry().record.sig, bytes(64)]


def test_a_keepalive_makes_known_rows_current_and_keeps_no_mesh_alive() -> None:
    one = fed(entry())
    one.refreshed("beta", 5.0)
    assert beta(one).fed_at == 5.0
    one.wake(6.0)
    assert beta(one).expired
    bare = book()
    bare.heard(summary(), 0, 0.0)
    bare.refreshed("beta", 1.0)
    bare.refreshed("nobody", 1.0)
    assert not beta(bare).fed


def test_awakenings_of_many_meshes_fall_together() -> None:
    one = book()
    for i in range(40):
        one.heard(summary(f"m{i}"), 0, i / 1_000)
    awakenings = 0
    while one.deadline() < 100.0:
        one.wake(one.deadline())
        awakenings += 1
    assert awakenings == 2
    assert all(listing.expired for listing in one.listings.values())


# entries


def member(**changes: Any) -> Member:
    signed = signed_record("beta", 1)
    record = msgspec.msgpack.decode(signed.blob, type=Record)
    fields = {"record": record, "signed": signed, "state": State.ALIVE, "since": 90.0, "last_seen": 99.0}
    return Member(**{**fields, "received": 95.0, **changes})


def test_a_member_arrives_as_the_row_that_its_publisher_has() -> None:
    mine = member(vitals=Vitals(cpu=5), vitals_at=98.0, addr=("10.0.0.2", 9), suspect_since=99.5)
    one = fed(*d.decode_entries(d.encode_entries([d.entry_of(mine, 100.0, str)])), now=1_000.0)
    row = one.find(node_of(1))
    assert row is not None
    assert (row.since, row.last_seen, row.received, row.vitals_at) == (990.0, 999.0, 995.0, 998.0)
    assert (row.record, row.signed, row.addr, row.suspect_since) == (
        mine.record,
        mine.signed,
        mine.addr,
        1000.0,
    )


def test_an_entry_names_who_found_it_dead_also_when_passed_on_a_second_time() -> None:
    dead = member(state=State.DEAD, evidence=Evidence.EXITED, evidence_by=(7, 8), suspect_since=1.0)
    told = d.entry_of(dead, 100.0, lambda node: f"n{node}")
    assert (told.by, told.evidence, told.suspect) == (["n7", "n8"], Evidence.EXITED, False)
    row = fed(told, now=100.0).find(node_of(1))
    assert row is not None
    assert d.entry_of(row, 100.0, str) == told


def test_a_publishers_own_row_is_always_just_seen() -> None:
    assert d.entry_of(member(last_seen=0.0), 100.0, str, mine=True).seen_ms == 0
    assert d.entry_of(member(last_seen=101.0), 100.0, str).seen_ms == 0


def test_the_largest_entries_of_one_call_fit_into_a_frame() -> None:
    record = SignedRecord(bytes(900), bytes(64))
    vitals = Vitals(1000, 1000, 1000, 65535, 65535, 2**31)
    largest = Entry(
        record,
        State.DEAD,
        2**48,
        2**48,
        2**48,
        True,
        Evidence.EXITED,
        ["n" * 128] * 8,
        vitals,
        2**48,
        ("h" * 64, 1),
    )
    body = d.encode_entries([largest] * d.ENTRIES_PER_CALL)
    assert d.decode_entries(body) == [largest] * d.ENTRIES_PER_CALL


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        b"\x91" * 5_000,
        d.encode_entries([entry()])[:-1],
        d.encode_entries([entry()] * 1_001),
        bytes(1_000_001),
        msgspec.msgpack.encode([[[b"", bytes(64)], 7, 0, 0, 0]]),
        msgspec.msgpack.encode([[[b"", bytes(64)], 1, -1, 0, 0]]),
        msgspec.msgpack.encode([[[b"", bytes(64)], 1, 2**49, 0, 0]]),
        msgspec.msgpack.encode([[[b"", bytes(64)], 1, 0, 0, 0, False, None, ["x"] * 9]]),
    ],
)
def test_entries_out_of_bounds_are_the_senders_fault(body: bytes) -> None:
    with pytest.raises(RemoteError):
        d.decode_entries(body)


def test_an_entry_of_a_newer_publisher_is_taken_without_what_it_adds() -> None:
    newer = [*msgspec.msgpack.decode(msgspec.msgpack.encode(entry())), "more"]
    assert d.decode_entries(msgspec.msgpack.encode([newer])) == [entry()]


def test_real_keys_prove_what_stands_in_for_them_here_does() -> None:
    mesh, node = Identity.generate(), Identity.generate()
    one = book(verify=verify)
    fields = msgspec.structs.asdict(msgspec.msgpack.decode(summary().blob, type=Summary))
    signed = seal_summary(Summary(**{**fields, "mesh_pub": mesh.pub}), mesh.sign)
    assert not one.heard(SignedSummary(signed.blob, node.sign(SUMMARY_CONTEXT + signed.blob)), 0, 0.0)
    assert one.heard(signed, 0, 0.0)
    record = msgspec.structs.replace(member().record, pub=node.pub)
    good = msgspec.structs.replace(entry(), record=seal_record(record, node.sign))
    bad = msgspec.structs.replace(entry(), record=seal_record(record, mesh.sign))
    one.feed("beta", [bad], [], 0.0, full=False)
    assert one.rows == 0
    one.feed("beta", [good], [], 0.0, full=False)
    assert one.find(node.id) is not None


# properties

ORDERS = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.sampled_from("ab"))


def ordered(order: tuple[int, int, int, str], **changes: Any) -> SignedSummary:
    epoch, renewal, version, publisher = order
    return summary(epoch=epoch, renewal=renewal, version=version, publisher=pub(publisher), **changes)


@settings(deadline=None)
@given(st.lists(ORDERS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_summaries_in_any_order_and_number_end_in_the_same_listing(
    orders: list[tuple[int, int, int, str]], random: Any
) -> None:
    shuffled = orders + random.choices(orders, k=len(orders))
    random.shuffle(shuffled)
    outcomes = []
    for sequence in (orders, shuffled, sorted(orders), sorted(orders, reverse=True)):
        one = book()
        for order in sequence:
            one.heard(ordered(order), 1.0, 0.0)
        outcomes.append((beta(one).summary, beta(one).signed, beta(one).until))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert beta(one).summary.order == max(orders)[:2]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), ORDERS, st.floats(0, 8), st.floats(0, 5)),
        max_size=25,
    )
)
def test_impostors_never_change_a_pinned_mesh(
    steps: list[tuple[int, tuple[int, int, int, str], float, float]],
) -> None:
    alone, beset = fed(entry()), fed(entry())
    now = 0.0
    for who, order, age_s, pause_s in steps:
        now += pause_s
        if who:
            assert not beset.heard(ordered(order, key=pub(("stranger", who))), age_s, now)
        else:
            assert alone.heard(ordered(order), age_s, now) == beset.heard(ordered(order), age_s, now)
        alone.wake(now)
        beset.wake(now)
        assert alone.held(now) == beset.held(now)
        views = [
            [(one.signed, one.until, one.expired, one.members) for one in directory.listings.values()]
            for directory in (alone, beset)
        ]
        assert views[0] == views[1]
    told = [event for event in beset.drain() if not isinstance(event, d.ImpostorSeen)]
    assert told == alone.drain()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.floats(-1, 9), st.floats(0, 7), st.booleans(), st.booleans()),
        max_size=30,
    )
)
def test_nothing_is_live_a_ttl_after_it_was_first_taken_without_newer_news(
    steps: list[tuple[int, float, float, bool, bool]],
) -> None:
    one = book()
    first: dict[bytes, float] = {}
    now = 0.0
    for renewal, age_s, pause_s, late, woken in steps:
        now += pause_s
        signed = summary(renewal=renewal)
        one.heard(signed, age_s, now, even_expired=late)
        if "beta" in one.listings and beta(one).signed == signed:
            first.setdefault(signed.sig, now)
        if woken:
            one.wake(now)
        for at in (now, now + 2.9, now + TTL_S):
            for listing in one.listings.values():
                since = at - first[listing.signed.sig]
                assert not (listing.live(at) and since >= TTL_S - 1e-9)
            assert len(one.held(at)) == sum(listing.live(at) for listing in one.listings.values())
        for listing in one.listings.values():
            assert listing.expired or now < listing.until or not woken


ENTRIES = st.builds(
    lambda node, incarnation, version, dead: entry(
        node=node,
        incarnation=incarnation,
        version=version,
        state=State.DEAD if dead else State.ALIVE,
    ),
    st.integers(0, 5),
    st.integers(0, 2),
    st.integers(0, 2),
    st.booleans(),
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(ENTRIES, max_size=5), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        max_size=12,
    )
)
def test_feeds_and_goings_leave_what_a_plain_dict_would_hold(
    feeds: list[tuple[list[Entry], list[int], bool]],
) -> None:
    one = fed()
    model: dict[int, Entry] = {}
    shown: set[int] = set()
    for at, (entries, gone, full) in enumerate(feeds):
        one.feed("beta", entries, map(node_of, gone), float(at), full=full)
        for node in map(node_of, gone):
            model.pop(node, None)
        named = {order_of(new)[0] for new in entries}
        if full:
            model = {node: held for node, held in model.items() if node in named}
        for new in entries:
            node, order = order_of(new)
            held = model.get(node)
            if full or held is None or new.record == held.record or order > order_of(held)[1]:
                model[node] = new
        changed = [event for event in one.drain() if isinstance(event, d.RowsChanged)]
        for event in changed:
            shown = (shown | set(event.changed)) - set(event.gone)
        rows = beta(one).members
        assert {node: (row.signed, row.state) for node, row in rows.items()} == {
            node: (held.record, held.state) for node, held in model.items()
        }
        assert shown == set(model)
        assert one.rows == len(model)
        assert all(one.find(node) is row for node, row in rows.items())


def order_of(one: Entry) -> tuple[int, tuple[int, int]]:
    record = msgspec.msgpack.decode(one.record.blob, type=Record)
    return record.id, (record.incarnation, record.version)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 500), st.binary(max_size=3))
def test_any_bytes_are_entries_or_the_senders_fault(noise: bytes, at: int, patch: bytes) -> None:
    good = d.encode_entries([entry(), entry(node=2, vitals=Vitals(), vitals_age_ms=1)])
    for body in (noise, good[:at] + patch + good[at + len(patch) :]):
        try:
            entries = d.decode_entries(body)
        except RemoteError:
            continue
        one = fed()
        one.feed("beta", entries, [], 0.0, full=False)
        assert one.rows <= len(entries)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 250), st.binary(max_size=3), st.floats(allow_nan=True))
def test_any_bytes_are_a_summary_or_are_counted(noise: bytes, at: int, patch: bytes, age_s: float) -> None:
    good = summary().blob
    for blob in (noise, good[:at] + patch + good[at + len(patch) :], b"\x91" * 800):
        one = book()
        if blob != good:
            assert not one.heard(SignedSummary(blob, summary().sig), age_s, 0.0)
            assert sum(one.counters.values()) == 1
            assert (dict(one.listings), one.drain()) == ({}, [])


ANYONE: list[tuple[str, Addr | None]] = [("beta", None), ("alpha", ADDR), ("gamma", ADDR)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(ANYONE), st.integers(0, 3), st.floats(0, 300)),
        max_size=40,
    )
)
def test_whatever_happens_the_tables_agree_with_each_other(
    steps: list[tuple[int, tuple[str, Addr | None], int, float]],
) -> None:
    one = book(config=DirectoryConfig(max_meshes=1, max_pins=2, max_rows=3, max_impostors=1))
    listed: set[str] = set()
    now = 0.0
    for action, (mesh, addr), number, pause_s in steps:
        now += pause_s
        if action == 0:
            one.heard(summary(mesh, epoch=number), 0, now, addr)
        elif action == 1:
            one.heard(summary(mesh, key=pub(number), epoch=9), 0, now, addr)
        elif action == 2:
            one.feed(mesh, [entry(mesh, i) for i in range(number)], [], now, full=bool(number % 2))
        elif action == 3:
            one.feed(mesh, [], [node_of(number)], now, full=False)
        one.wake(now)
        for event in one.drain():
            if isinstance(event, d.Seen):
                assert event.mesh not in listed
                listed.add(event.mesh)
            elif isinstance(event, d.Dropped):
                listed.remove(event.mesh)
        assert listed == set(one.listings)
        assert one.deadline() > now
        assert one.rows == sum(len(listing.members) for listing in one.listings.values()) <= 3
        owners = {node for listing in one.listings.values() for node in listing.members}
        assert all(one.find(node) is not None for node in owners)
        assert all(one.find(node_of(i)) is None for i in range(4) if node_of(i) not in owners)
        for name, listing in one.listings.items():
            assert listing.impostors is one.impostors.get(name, listing.impostors)


def test_every_pair_of_summaries_has_one_that_counts() -> None:
    orders = list(itertools.product((1, 2), (1, 2), (1, 2), "ab"))
    for old, new in itertools.product(orders, orders):
        one = book()
        one.heard(ordered(old), 0, 0.0)
        one.heard(ordered(new), 0, 0.0)
        if old[:3] != new[:3]:
            assert beta(one).signed == ordered(max(old, new))
        else:
            assert beta(one).signed.blob == max(ordered(old).blob, ordered(new).blob)
