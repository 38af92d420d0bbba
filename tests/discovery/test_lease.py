"""The soft lease of one node, by plain calls: what it claims, follows, ignores and gives up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from hashlib import blake2b
from math import inf
from typing import Any, TypeVar

import pytest

from discovery import lease as ls
from discovery.errors import RemoteError
from discovery.identity import Identity, node_id, verify

CONFIG = ls.LeaseConfig()
E = TypeVar("E")


def pub(index: int) -> bytes:
    return bytes([index]) * 32


def sign_as(index: int) -> Callable[[bytes], bytes]:
    return lambda data: blake2b(data, key=pub(index)).digest()


def check(key: bytes, data: bytes, sig: bytes) -> bool:
    return blake2b(data, key=key).digest() == sig


A, B, C, D = (node_id(pub(i)) for i in (1, 2, 3, 4))
ALL = {A: "gateway", B: "gateway", C: "console"}


def claim(index: int, epoch: int, renewal: int = 1, **changes: Any) -> ls.Claim:
    fields = {"mesh": "alpha", "ttl_ms": 6000, "tier": 1 if index == 3 else 0, **changes}
    return ls.Claim(epoch=epoch, renewal=renewal, holder=pub(index), **fields)


def note(index: int, epoch: int, renewal: int = 1, *, by: int | None = None, **changes: Any) -> bytes:
    made = claim(index, epoch, renewal, **changes)
    return ls.pack(ls.seal_claim(made, sign_as(by or index)))


def lease(index: int, *, candidate: bool = True, ids: dict[int, str] | None = None) -> ls.Lease:
    """One that has listened and sees the three; the time is 0."""
    made = ls.Lease(
        mesh="alpha",
        pub=pub(index),
        candidate=candidate,
        sign=sign_as(index),
        verify=check,
        config=CONFIG,
        now=0.0,
    )
    made.set_candidates(ALL if ids is None else ids, 0.0)
    made.synced(0.0)
    return made


def holding(index: int, *, epoch: int = 1, renewals: int = 1) -> ls.Lease:
    """One that holds at `epoch` and has renewed so often, the last time at 2 s × renewals."""
    made = lease(index, ids={node_id(pub(index)): ALL[node_id(pub(index))]})
    made.floor(epoch - 1, 0.0)
    run(made, 2.0 * renewals)
    assert made.mine and (made.epoch, made.renewal) == (epoch, renewals)
    made.set_candidates(ALL, 2.0 * renewals)
    made.drain()
    return made


def run(one: ls.Lease, until: float) -> None:
    while one.deadline() <= until:
        one.wake(one.deadline())


def told(one: ls.Lease, kind: type[E]) -> list[E]:
    return [effect for effect in one.drain() if isinstance(effect, kind)]


def opened(body: bytes) -> ls.Claim:
    return ls.open_claim(ls.unpack(body), check)


# the rule between two claims

EVERY_CLAIM = [
    (claim(index, epoch, renewal, tier=tier), live, fresh)
    for index, tier in ((1, 1), (2, 0), (3, 0))
    for epoch in (4, 5)
    for renewal in (0, 1)
    for live in (False, True)
    for fresh in (False, True)
]


def by_the_book(one: tuple[ls.Claim, bool, bool], other: tuple[ls.Claim, bool, bool]) -> bool:
    """SEMANTICS 4 in the order of its words: whether `one` prevails over `other`."""
    (mine, my_live, my_fresh), (its, its_live, its_fresh) = one, other
    if my_live != its_live:
        return my_live
    stand = (my_live and my_fresh and mine.renewal > 0, its_live and its_fresh and its.renewal > 0)
    if stand[0] != stand[1]:
        return stand[0]
    if mine.epoch != its.epoch:
        return mine.epoch > its.epoch
    if mine.tier != its.tier:
        return mine.tier < its.tier
    return mine.holder_id < its.holder_id


def test_of_every_pair_of_claims_of_two_holders_exactly_one_prevails_as_the_rule_says() -> None:
    for one, other in itertools.product(EVERY_CLAIM, repeat=2):
        if one[0].holder == other[0].holder:
            continue
        weights = [
            ls.weight(made, live=live, stands=fresh and made.renewal > 0)
            for made, live, fresh in (one, other)
        ]
        assert (weights[0] > weights[1]) is by_the_book(one, other), (one, other)
        assert (weights[0] > weights[1]) is not (weights[1] > weights[0]), (one, other)


def test_a_claim_against_a_live_holder_is_followed_as_the_rule_says() -> None:
    """The holder is B at epoch 5, or I am B; it renewed `held_age_s` ago."""
    for mine, epoch, renewal, index, age_s, held_age_s in itertools.product(
        (True, False), (4, 5, 6), (0, 7), (1, 3), (0.0, 4.0, 7.0), (0.5, 4.5)
    ):
        now = 2.0 + held_age_s
        if mine:
            one = holding(2, epoch=5)
        else:
            one = lease(4, ids={**ALL, D: "console"})
            one.heard(note(2, 5, 1), 0.0, B, 2.0)
        one.heard(note(index, epoch, renewal), age_s, node_id(pub(index)), now)
        heard = (claim(index, epoch, renewal), age_s < 6, age_s < 3)
        held = (claim(2, 5, 1), True, held_age_s < 3)
        expected = node_id(pub(index)) if by_the_book(heard, held) else B
        case = (mine, epoch, renewal, index, age_s, held_age_s)
        assert one.holder == expected, case
        assert one.mine is (mine and expected == B), case


# claims as bytes


def test_a_sealed_claim_opens_to_itself_and_fits_a_note() -> None:
    node = Identity.from_seed(bytes(32))
    made = ls.Claim(mesh="m" * 64, epoch=2**62, renewal=2**62, holder=node.pub, ttl_ms=60_000, tier=255)
    body = ls.pack(ls.seal_claim(made, node.sign))
    assert ls.open_claim(ls.unpack(body), verify) == made
    assert len(body) < 400


def test_a_claim_changed_by_one_bit_anywhere_changes_nothing_and_raises_nothing() -> None:
    body = note(2, 1)
    for at in range(len(body)):
        one = lease(1)
        one.heard(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], 0.0, B, 0.1)
        assert one.holder is None and sum(one.counters.values()) == 1, at


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", b"\x92\xc4\x00\xc4\x00", bytes(900)])
def test_what_is_no_claim_is_counted(body: bytes) -> None:
    one = lease(1)
    assert one.heard(body, 0.0, B, 0.1) is False
    assert one.counters == {"lease_malformed": 1}
    with pytest.raises(RemoteError):
        ls.open_claim(ls.unpack(body), check)


def test_a_claim_on_another_mesh_is_refused_and_counted() -> None:
    one = lease(1)
    assert not one.heard(note(2, 1, mesh="beta"), 0.0, B, 0.1)
    assert one.holder is None and one.counters == {"lease_foreign": 1}


def test_a_claim_in_anothers_name_is_refused_and_counted() -> None:
    one = lease(1)
    assert not one.heard(note(2, 1, by=3), 0.0, C, 0.1)
    assert one.holder is None and one.counters == {"lease_forged": 1}


def test_a_claim_that_leaps_ahead_is_refused_so_that_epochs_last() -> None:
    one = lease(1)
    assert not one.heard(note(2, 2**61), 0.0, B, 0.1)
    one.floor(2**61, 0.2)
    run(one, 5.0)
    assert one.epoch == 1 and one.counters == {"lease_leap": 2}


# who claims, and when


@pytest.mark.parametrize(("index", "after_s"), [(1, 0.0), (2, 0.5), (3, 1.0)])
def test_a_vacant_lease_is_claimed_by_rank_gateways_first(index: int, after_s: float) -> None:
    one = lease(index)
    run(one, after_s - 0.01)
    assert not one.mine
    run(one, after_s)
    assert one.mine and one.epoch == 1 and one.holder == one.id


def test_nobody_claims_before_it_has_listened() -> None:
    one = ls.Lease(
        mesh="alpha", pub=pub(3), candidate=True, sign=sign_as(3), verify=check, config=CONFIG, now=100.0
    )
    one.set_candidates({C: "console"}, 100.0)
    assert one.deadline() == 104.0
    one.wake(103.9)
    assert not one.mine
    one.wake(104.0)
    assert one.mine


def test_one_push_pull_is_listening_enough() -> None:
    one = lease(1)
    assert one.deadline() == 0.0


def test_a_node_that_is_no_candidate_claims_nothing_ever() -> None:
    one = lease(4, candidate=False)
    assert one.deadline() == inf
    one.heard(note(1, 1), 0.0, A, 1.0)
    one.set_candidates({}, 2.0)
    one.wake(500.0)
    assert not one.mine and one.deadline() == inf


def test_a_candidate_that_may_not_hold_claims_nothing() -> None:
    one = lease(1, ids={B: "gateway"})
    one.wake(60.0)
    assert not one.mine


def test_a_claim_is_above_every_epoch_known_and_durable_before_it_is_told() -> None:
    one = lease(1)
    one.floor(41, 0.0)
    one.wake(0.0)
    first, second, third, *rest = one.drain()
    assert first == ls.Persist(42)
    assert isinstance(second, ls.Tell) and opened(second.body).order == (42, 0)
    assert second.nodes == (B, C) and third == ls.Spread(second.body, 0.0)
    assert rest == [ls.Changed(A, pub(1), 42, "claimed", True), ls.Publish(42, 0)]


def test_the_first_renewals_are_told_to_everybody_for_those_whom_the_claim_missed() -> None:
    one = lease(1)
    run(one, 10.0)
    assert [opened(e.body).order for e in told(one, ls.Spread)] == [(1, 0), (1, 1), (1, 2)]


def test_a_later_renewal_goes_to_the_other_candidates_only_every_two_seconds() -> None:
    one = holding(1, renewals=2)
    run(one, 10.0)
    effects = one.drain()
    assert [type(effect) for effect in effects] == [ls.Tell, ls.Publish] * 3
    assert [opened(e.body).renewal for e in effects if isinstance(e, ls.Tell)] == [3, 4, 5]
    assert all(e.nodes == (B, C) for e in effects if isinstance(e, ls.Tell))


def test_a_live_claim_is_respected_by_a_lower_id() -> None:
    one = lease(1, ids={A: "gateway", B: "gateway"})
    for n in range(20):
        one.heard(note(2, 1, n), 0.0, B, 2.0 * n)
        run(one, 2.0 * n + 1.9)
    assert one.holder == B and not one.mine


# what is heard


def test_a_new_epoch_is_news_a_renewal_is_not_unless_it_is_to_be_passed_on() -> None:
    one = lease(3)
    assert one.heard(note(2, 1, 0), 0.0, B, 0.1)
    assert not one.heard(note(2, 1, 1), 0.0, B, 2.1)
    assert not one.heard(note(2, 1, 1), 0.0, A, 2.2)
    assert one.heard(note(2, 1, 2, aloud=True), 0.0, A, 4.2)
    assert one.renewal == 2


def test_a_replayed_claim_changes_nothing_not_even_its_expiry() -> None:
    one = lease(3)
    one.heard(note(1, 3, 9), 0.0, A, 0.1)
    one.heard(note(2, 4, 5), 0.0, B, 4.1)
    before = one.expires_in_s(5.0)
    one.drain()
    for body in (note(2, 4, 5), note(2, 4, 4), note(2, 3, 99), note(1, 3, 9)):
        assert not one.heard(body, 0.0, B, 5.0)
    assert (one.holder, one.epoch, one.renewal) == (B, 4, 5)
    assert one.expires_in_s(5.0) == before and one.drain() == []


def test_a_claim_ages_with_every_hop_and_a_dead_one_only_tells_the_epoch() -> None:
    one = lease(3)
    one.heard(note(2, 7, 5), 4.0, A, 0.1)
    body, age_s = one.held(1.1) or (b"", 0.0)
    assert opened(body).order == (7, 5) and age_s == pytest.approx(5.0)
    assert one.expires_in_s(1.1) == pytest.approx(1.0)
    other = lease(1)
    other.heard(body, 6.1, C, 0.1)
    assert other.holder is None
    run(other, 1.0)
    assert other.mine and other.epoch == 8


def test_a_lease_expires_one_ttl_after_it_was_made_and_goes_to_the_next() -> None:
    one = lease(2)
    one.heard(note(1, 1, 5), 0.0, A, 0.1)
    run(one, 6.0)
    assert one.holder == A
    run(one, 6.1)
    assert one.mine and one.epoch == 2
    assert [(e.holder, e.reason) for e in told(one, ls.Changed)] == [
        (A, "heard"),
        (None, "expired"),
        (B, "claimed"),
    ]


def test_a_holder_that_is_no_candidate_any_more_is_followed_at_once() -> None:
    """It said goodbye, is Dead, or is Updating: the caller tells by leaving it out."""
    one = lease(2)
    one.heard(note(1, 1, 5), 0.0, A, 0.1)
    one.set_candidates({B: "gateway", C: "console"}, 1.0)
    assert one.holder is None and one.deadline() == 1.0
    one.wake(1.0)
    assert one.mine and one.epoch == 2


def test_a_late_renewal_of_a_holder_that_has_gone_does_not_bring_it_back() -> None:
    one = lease(3)
    one.heard(note(1, 1, 5), 0.0, A, 0.1)
    one.set_candidates({B: "gateway", C: "console"}, 1.0)
    one.heard(note(1, 1, 6), 0.9, B, 1.1)
    assert one.holder is None
    one.set_candidates(ALL, 1.2)
    assert one.holder == A, "it is back in view, and its claim still lives"


def test_a_claim_of_somebody_not_met_yet_counts_until_it_expires() -> None:
    one = lease(1, ids={A: "gateway"})
    one.heard(note(4, 3, 2), 1.0, B, 0.0)
    assert one.holder == D and one.deadline() == 5.0


def test_a_release_hands_over_at_once() -> None:
    one = lease(2)
    one.heard(note(1, 1, 5), 0.0, A, 0.1)
    assert one.heard(note(1, 1, 6, released=True), 0.0, A, 0.2)
    assert one.holder is None and one.deadline() == 0.2
    run(one, 0.2)
    assert one.mine


def test_a_claim_against_a_holder_heard_lately_is_answered_with_the_live_one_and_shown_to_the_holder() -> (
    None
):
    one = lease(3)
    one.heard(note(1, 1, 5), 0.0, A, 1.0)
    one.drain()
    challenge = note(2, 2, 0)
    assert not one.heard(challenge, 0.0, D, 3.5)
    assert one.holder == A
    answers = {e.nodes: e for e in told(one, ls.Tell)}
    assert answers[(B, D)].body == note(1, 1, 5) and answers[(B, D)].age_s == pytest.approx(2.5)
    assert answers[(A,)].body == challenge


def test_a_claimant_that_is_shown_the_live_one_gives_way_and_shows_its_own() -> None:
    one = lease(2)
    run(one, 0.5)
    mine = told(one, ls.Spread)[0].body
    assert not one.heard(note(1, 0, 5), 2.0, C, 0.6) or one.holder == A
    assert one.holder == A and not one.mine
    assert [(e.nodes, e.body) for e in told(one, ls.Tell)] == [((A,), mine)]


def test_a_holder_at_work_outbids_a_claim_against_it_and_speaks_up() -> None:
    one = holding(1)
    assert not one.heard(note(2, 2, 0), 0.0, B, 3.0)
    assert one.mine and (one.epoch, one.renewal) == (3, 2)
    effects = one.drain()
    assert effects[0] == ls.Persist(3)
    assert [e.reason for e in effects if isinstance(e, ls.Changed)] == ["kept"]
    run(one, 5.0)
    renewals = [opened(e.body) for e in told(one, ls.Spread)]
    assert [(c.order, c.aloud) for c in renewals] == [((3, 3), True)]


def test_a_holder_that_learns_of_a_dead_claim_above_its_own_outbids_it() -> None:
    one = holding(1)
    one.heard(note(2, 8, 3), 50.0, C, 3.0)
    assert one.mine and one.epoch == 9


def test_of_two_that_stood_on_either_side_of_a_partition_the_lower_epoch_yields_at_once() -> None:
    lower, higher = holding(1, epoch=5, renewals=4), holding(2, epoch=6, renewals=4)
    lower.heard(note(2, 6, 40), 0.0, B, 9.0)
    assert not lower.mine and lower.holder == B
    effects = lower.drain()
    assert [(e.holder, e.reason) for e in effects if isinstance(e, ls.Changed)] == [(B, "yielded")]
    (last_word,) = [e for e in effects if isinstance(e, ls.Tell)]
    assert last_word.nodes == (B,) and opened(last_word.body).order == (5, 4)
    higher.heard(last_word.body, last_word.age_s, A, 9.0)
    assert higher.mine and higher.epoch == 6
    assert [e.nodes for e in told(higher, ls.Tell)] == [(A,)], "the other is told"
    run(higher, 10.0)
    assert [opened(e.body).aloud for e in told(higher, ls.Spread)] == [True], (
        "for those who followed the other"
    )


def test_of_two_at_one_epoch_the_higher_rank_yields() -> None:
    one = holding(3, epoch=5)
    one.heard(note(2, 5, 40), 0.0, B, 3.0)
    assert one.holder == B


def test_a_live_claim_below_a_dead_one_is_followed_and_its_holder_told_to_go_above() -> None:
    one = lease(3)
    one.heard(note(2, 6, 3), 5.5, B, 0.0)
    run(one, 0.6)
    assert one.holder is None
    one.drain()
    one.heard(note(1, 5, 9), 0.0, A, 0.7)
    assert one.holder == A
    assert [(e.nodes, opened(e.body).epoch) for e in told(one, ls.Tell)] == [((A,), 6)]


def test_a_claim_that_lost_counts_when_the_better_one_falls_vacant() -> None:
    """The successor's claim overtook its predecessor's release."""
    one = lease(3)
    one.heard(note(1, 1, 5), 0.0, A, 1.0)
    one.heard(note(2, 2, 0), 0.0, B, 2.0)
    assert one.holder == A
    one.heard(note(1, 1, 6, released=True), 0.0, A, 2.1)
    assert one.holder == B and one.epoch == 2


def test_a_live_claim_heard_is_listening_enough() -> None:
    one = ls.Lease(
        mesh="alpha", pub=pub(2), candidate=True, sign=sign_as(2), verify=check, config=CONFIG, now=0.0
    )
    one.set_candidates(ALL, 0.0)
    one.heard(note(1, 1, 5), 0.0, A, 0.1)
    one.set_candidates({B: "gateway", C: "console"}, 0.5)
    assert one.deadline() == 0.5


# pauses


def test_a_holder_that_slept_longer_than_its_claim_is_none_and_looks_before_it_claims() -> None:
    one = holding(1)
    one.wake(30.0)
    assert not one.mine and one.holder is None
    assert [e.reason for e in told(one, ls.Changed)] == ["paused"]
    assert one.deadline() > 30.0 + CONFIG.renew_s
    one.heard(note(2, 2, 9), 0.0, B, 30.1)
    assert one.holder == B
    run(one, 35.0)
    assert not one.mine


def test_a_holder_that_wakes_by_the_news_of_its_successor_yields_to_it() -> None:
    one = holding(1)
    one.heard(note(2, 2, 0), 15.0, B, 30.0)
    assert not one.mine and one.holder is None and one.epoch == 2
    one.heard(note(2, 2, 1), 0.0, B, 30.0)
    assert one.holder == B


def test_a_holder_that_slept_and_is_missed_by_nobody_claims_anew() -> None:
    one = holding(1)
    one.wake(30.0)
    run(one, 30.0 + CONFIG.look_s + 3 * CONFIG.rank_step_s)
    assert one.mine and one.epoch == 2


def test_a_holder_that_hiccuped_reads_before_it_renews() -> None:
    one = holding(1)
    one.wake(6.5)
    assert one.mine and one.renewal == 1 and one.deadline() == 6.8
    one.heard(note(2, 2, 0), 0.0, B, 6.5)
    assert one.holder == B


def test_a_candidate_that_slept_does_not_take_over_before_it_has_read() -> None:
    one = lease(2)
    one.heard(note(1, 1, 5), 0.0, A, 0.1)
    one.wake(60.0)
    assert not one.mine and one.holder is None
    one.heard(note(1, 1, 33), 0.5, A, 60.0)
    assert one.holder == A
    run(one, 64.0)
    assert not one.mine


def test_a_loop_that_is_always_late_still_claims() -> None:
    one = lease(3, ids={C: "console"})
    now = 0.0
    while not one.mine and now < 30:
        now = max(now, one.deadline()) + 1.0
        one.wake(now)
    assert one.mine


# giving up


def test_a_holder_that_resigns_says_so_and_claims_no_more() -> None:
    one = holding(1, renewals=3)
    one.resign(7.0)
    assert not one.mine and one.holder is None
    tell, changed = one.drain()
    assert isinstance(tell, ls.Tell) and opened(tell.body).released and tell.nodes == (B, C)
    assert isinstance(changed, ls.Changed) and changed.reason == "resigned"
    assert one.deadline() == inf
    one.wake(60.0)
    assert not one.mine


def test_who_resigned_may_hold_again_once_it_was_out_and_is_back() -> None:
    """An update that failed: the node was Updating, and is Alive again."""
    one = holding(1)
    one.resign(3.0)
    one.set_candidates(ALL, 3.1)
    assert one.deadline() == inf, "the caller's view was still behind"
    one.set_candidates({B: "gateway", C: "console"}, 3.2)
    one.set_candidates({A: "gateway"}, 4.0)
    run(one, 4.1)
    assert one.mine and one.epoch == 2


def test_a_holder_that_cannot_publish_for_a_ttl_gives_up_and_ranks_last() -> None:
    one = lease(1)
    while one.deadline() < 5.9:
        now = one.deadline()
        one.wake(now)
        one.published(False, now)
        assert one.mine
    one.drain()
    one.wake(one.deadline())
    one.published(False, 6.0)
    assert not one.mine
    assert [opened(e.body).released for e in told(one, ls.Tell)] == [False, True]
    assert one.deadline() == 6.0 + 5 * CONFIG.rank_step_s, "after both others, were they demoted as well"
    for n in range(16):
        one.heard(note(2, 2, n), 0.0, B, 6.1 + 2 * n)
    one.heard(note(2, 2, 16, released=True), 0.0, B, 40.0)
    assert one.deadline() == 40.0, "its time is over"


def test_one_success_is_enough_to_go_on() -> None:
    one = holding(1)
    one.published(False, 2.0)
    one.published(True, 4.0)
    run(one, 9.0)
    one.published(False, 9.0)
    assert one.mine


def test_a_lone_candidate_that_cannot_publish_has_nobody_to_give_up_for() -> None:
    one = lease(3, ids={C: "console"})
    for now in range(0, 60, 2):
        one.wake(float(now))
        one.published(False, float(now))
    assert one.mine and one.epoch == 1


def test_where_nobody_can_publish_the_lease_changes_hands_seldom() -> None:
    one = lease(1, ids={A: "gateway", B: "gateway"})
    claims = 0
    now = 0.0
    while now < 120:
        now = one.deadline()
        one.wake(now)
        one.published(False, now)
        claims += len([e for e in told(one, ls.Changed) if e.reason == "claimed"])
    assert claims <= 5


# those that get no renewals


def test_a_node_without_renewals_holds_a_claim_live_while_its_holder_is_a_candidate() -> None:
    one = lease(4, candidate=False)
    one.heard(note(1, 1, 0), 0.0, A, 0.1)
    one.wake(900.0)
    assert one.holder == A and one.expires_in_s(900.0) is None
    one.set_candidates({B: "gateway"}, 901.0)
    assert one.holder is None


def test_a_node_without_renewals_follows_the_higher_epoch_however_old() -> None:
    one = lease(4, candidate=False)
    one.heard(note(1, 1, 0), 0.0, A, 0.1)
    assert one.heard(note(2, 2, 5), 100.0, C, 200.0)
    assert one.holder == B
    assert not one.heard(note(1, 1, 90), 0.0, A, 200.1)
    assert one.holder == B
    assert not told(one, ls.Tell)


# a restart


def test_a_holder_that_restarts_finds_its_own_live_claim_and_goes_on_above_it() -> None:
    one = lease(3)
    one.heard(note(3, 6, 2), 1.0, A, 0.2)
    assert not one.mine and one.holder is None
    assert one.deadline() <= 0.2, "the others wait for it to expire: nobody is before it"
    one.wake(0.2)
    assert one.mine and one.epoch == 7
