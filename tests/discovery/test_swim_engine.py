"""The engine by hand: one or two of them, each input and each effect looked at."""

from __future__ import annotations

import itertools
import random
from math import inf
from typing import Any

import pytest

from discovery import wire
from discovery.errors import LocalError
from discovery.identity import Identity, verify
from discovery.lifecycle import Evidence, State
from discovery.member import Record, Vitals, seal_record
from discovery.swim import (
    Changed,
    Connect,
    Counted,
    Effect,
    Evicted,
    Joined,
    LeaveDone,
    PersistIncarnation,
    PushPull,
    Send,
    Sentinels,
    Swim,
    SwimConfig,
    Synced,
)

IDS = [Identity.from_seed(bytes([i]) * 32) for i in range(1, 8)]
START = 1000.0


def record(i: int, **changes: Any) -> Record:
    fields = {
        "pub": IDS[i].pub,
        "mesh": "alpha",
        "name": f"n{i}",
        "kind": "compute",
        "incarnation": 1,
        "version": 1,
        "state": State.ALIVE,
        "addrs": [(f"10.0.0.{i}", 7000)],
        "host": bytes([i]) * 8,
        **changes,
    }
    return Record(**fields)


def engine(i: int, config: SwimConfig | None = None, **changes: Any) -> Swim:
    return Swim(
        record=record(i, **changes),
        sign=IDS[i].sign,
        verify=verify,
        config=config or SwimConfig.lan(),
        rng=random.Random(i),
        now=START,
    )


def addr(i: int) -> tuple[str, int]:
    return (f"10.0.0.{i}", 7000)


def sent(effects: list[Effect]) -> list[tuple[tuple[str, int], wire.AnyMessage]]:
    return [(e.addr, m) for e in effects if isinstance(e, Send) for m in wire.decode(e.body)[0]]


def of(kind: type, effects: list[Effect]) -> list[Any]:
    return [e for e in effects if isinstance(e, kind)]


def tell(swim: Swim, i: int, *messages: wire.AnyMessage, now: float = START) -> list[Effect]:
    """What a packet of node `i` makes the engine do."""
    swim.receive(wire.join([wire.encode(m) for m in messages]), IDS[i].id, addr(i), now)
    return swim.drain()


def update(i: int, **changes: Any) -> wire.Update:
    return wire.Update(seal_record(record(i, **changes), IDS[i].sign))


def with_members(*others: int, config: SwimConfig | None = None) -> Swim:
    swim = engine(0, config)
    for i in others:
        tell(swim, i, update(i))
    return swim


def run(swim: Swim, until: float) -> list[Effect]:
    """Wakes it at each deadline up to then."""
    effects = []
    while swim.deadline() <= until:
        swim.wake(swim.deadline())
        effects += swim.drain()
    return effects


def test_a_greeting_ends_with_both_in_each_others_view_and_a_push_pull() -> None:
    a, b = engine(0), engine(1)
    a.join([addr(1)], START)
    a.wake(START)
    ((where, hello),) = sent(a.drain())
    assert where == addr(1) and isinstance(hello, wire.Hello)
    answer = tell(b, 0, hello)
    assert [m.id for e in of(Joined, answer) for m in [e.member]] == [IDS[0].id]
    (_, ack), *_ = sent(answer)
    done = tell(a, 1, ack, now=START + 0.01)
    assert [type(e) for e in done if not isinstance(e, Send)] == [Joined, PushPull, Synced, Sentinels]
    member = a.members[IDS[1].id]
    assert (member.addr, member.state, member.last_seen) == (addr(1), State.ALIVE, START + 0.01)
    assert a.synced and of(Sentinels, done)[0].nodes == (IDS[1].id,)


def test_the_answer_to_a_hello_introduces_other_members() -> None:
    swim = with_members(2, 3)
    got = sent(tell(swim, 1, wire.Hello(9, seal_record(record(1), IDS[1].sign))))
    told = {m.record.blob for _, m in got if isinstance(m, wire.Update)}
    assert {swim.members[IDS[i].id].signed.blob for i in (2, 3)} <= told
    assert [m.members for _, m in got if isinstance(m, wire.HelloAck)] == [2]


def test_seeds_are_greeted_again_after_one_second_doubling_to_thirty() -> None:
    swim = engine(0)
    swim.join([addr(1)], START)
    times = []
    while swim.deadline() < START + 400:
        now = swim.deadline()
        swim.wake(now)
        if any(isinstance(m, wire.Hello) for _, m in sent(swim.drain())):
            times.append(now)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == START and 0.7 <= gaps[0] <= 1.3
    assert max(gaps) <= 30 * 1.25 and sum(gaps[-3:]) > 30
    assert gaps[2] > gaps[0]


def test_names_and_own_addresses_are_no_seeds() -> None:
    swim = engine(0)
    swim.join([("example.com", 7000), addr(0), ("224.0.0.1", 7000)], START)
    swim.wake(START)
    assert not sent(swim.drain())


def test_a_seed_that_turns_out_to_be_oneself_is_dropped() -> None:
    swim = engine(0)
    swim.join([("127.0.0.1", 7000)], START)
    swim.receive(b"\x90", IDS[0].id, ("127.0.0.1", 7000), START)
    assert swim.counters["own_echo"] == 1
    swim.wake(START + 1)
    assert not sent(swim.drain())


def test_a_ping_is_answered_with_a_signed_ack_of_its_nonce() -> None:
    swim = with_members(1)
    ((where, ack),) = [
        (w, m) for w, m in sent(tell(swim, 1, wire.Ping(77, IDS[0].id, 1, 1))) if isinstance(m, wire.Ack)
    ]
    assert where == addr(1) and ack.nonce == 77
    assert verify(IDS[0].pub, wire.ack_statement("alpha", 77, IDS[0].id, 1), ack.sig)


def test_a_ping_meant_for_an_earlier_tenant_is_not_answered() -> None:
    swim = with_members(1)
    got = sent(tell(swim, 1, wire.Ping(77, IDS[5].id, 1, 1)))
    assert not any(isinstance(m, wire.Ack) for _, m in got)
    assert swim.counters["misdirected"] == 1


def test_a_stranger_gets_a_hello_once_and_nothing_else() -> None:
    swim = with_members(1)
    first = sent(tell(swim, 4, wire.Ping(7, IDS[0].id, 1, 1), wire.PingRequest(8, IDS[1].id)))
    assert [(w, type(m)) for w, m in first] == [(addr(4), wire.Hello)]
    assert not sent(tell(swim, 4, wire.Ping(9, IDS[0].id, 1, 1), now=START + 1))
    again = sent(tell(swim, 4, wire.Ping(9, IDS[0].id, 1, 1), now=START + 6))
    assert [type(m) for _, m in again] == [wire.Hello]


def test_strangers_from_many_addresses_are_answered_at_a_bounded_rate() -> None:
    swim = engine(0)
    count = 0
    for i in range(2000):
        swim.receive(b"\x90", 5, (f"10.1.{i >> 8}.{i & 255}", 7000), START + i / 10_000)
        count += len(sent(swim.drain()))
    assert count <= 330


def test_probe_of_a_member_is_repeated_then_asked_of_others_then_an_accusation() -> None:
    swim = with_members(1, 2, 3)
    now, asked = START, []
    while not swim.view.members[IDS[1].id].suspect_since and now < START + 20:
        now = max(now, swim.deadline())
        swim.wake(now)
        for where, m in sent(swim.drain()):
            if isinstance(m, wire.Ping) and m.target == IDS[1].id and where == addr(1):
                asked.append(("ping", now))
            if isinstance(m, wire.PingRequest) and m.target == IDS[1].id:
                asked.append(("request", now))
            for i in (2, 3):
                if isinstance(m, wire.Ping) and where == addr(i):
                    sig = IDS[i].sign(wire.ack_statement("alpha", m.nonce, IDS[i].id, 1))
                    swim.receive(
                        wire.join([wire.encode(wire.Ack(m.nonce, IDS[i].id, 1, 1, sig))]),
                        IDS[i].id,
                        addr(i),
                        now,
                    )
    began = asked[0][1]
    assert [(kind, round(at - began, 2)) for kind, at in asked[:5]] == [
        ("ping", 0.0), ("ping", 0.2), ("ping", 0.4), ("request", 0.4), ("request", 0.4),
    ]  # fmt: skip
    assert round(now - began, 2) == 1.0


def test_an_ack_from_the_member_gives_address_rtt_and_last_seen() -> None:
    swim = with_members(1)
    now = swim.deadline()
    nonce = 0
    while not nonce:
        now = swim.deadline()
        swim.wake(now)
        nonce = next((m.nonce for _, m in sent(swim.drain()) if isinstance(m, wire.Ping)), 0)
    sig = IDS[1].sign(wire.ack_statement("alpha", nonce, IDS[1].id, 1))
    tell(swim, 1, wire.Ack(nonce, IDS[1].id, 1, 1, sig, 0, Vitals(cpu=7)), now=now + 0.02)
    member = swim.members[IDS[1].id]
    assert (member.addr, member.last_seen, member.vitals) == (addr(1), now + 0.02, Vitals(cpu=7))
    assert member.rtt_s == pytest.approx(0.02)


@pytest.mark.parametrize(("answered", "late_s", "rtt_s"), [(0, 0.3, 0.3), (1, 0.5, 0.3), (0, 1.3, None)])
def test_round_trip_is_that_of_the_ping_that_was_answered_and_slower_than_it_was_asked_again(
    answered: int, late_s: float, rtt_s: float | None
) -> None:
    swim = with_members(1)
    pings: list[tuple[float, int]] = []
    while not pings or swim.deadline() < pings[0][0] + late_s:
        now = swim.deadline()
        swim.wake(now)
        pings += [(now, m.nonce) for _, m in sent(swim.drain()) if isinstance(m, wire.Ping)]
    nonce = pings[answered][1]
    sig = IDS[1].sign(wire.ack_statement("alpha", nonce, IDS[1].id, 1))
    tell(swim, 1, wire.Ack(nonce, IDS[1].id, 1, 1, sig), now=pings[0][0] + late_s)
    found = swim.members[IDS[1].id].rtt_s
    assert found == (None if rtt_s is None else pytest.approx(rtt_s, abs=0.01))


def test_an_ack_with_a_nonce_never_asked_proves_nothing() -> None:
    swim = with_members(1)
    seen = swim.members[IDS[1].id].last_seen
    sig = IDS[1].sign(wire.ack_statement("alpha", 5, IDS[1].id, 1))
    tell(swim, 1, wire.Ack(5, IDS[1].id, 1, 1, sig), now=START + 3)
    assert swim.members[IDS[1].id].last_seen == seen and swim.counters["unasked_ack"] == 1


def test_a_probe_for_another_is_made_and_its_ack_brought_back() -> None:
    swim = with_members(1, 2)
    asked = sent(tell(swim, 1, wire.PingRequest(55, IDS[2].id)))
    assert [(w, m.nonce) for w, m in asked if isinstance(m, wire.Ping)] == [(addr(2), 55)]
    sig = IDS[2].sign(wire.ack_statement("alpha", 55, IDS[2].id, 1))
    back = sent(tell(swim, 2, wire.Ack(55, IDS[2].id, 1, 1, sig), now=START + 0.1))
    assert [(w, m.sig) for w, m in back if isinstance(m, wire.Ack)] == [(addr(1), sig)]


def test_a_probe_for_another_that_stays_unanswered_is_a_nack() -> None:
    swim = with_members(1, 2)
    tell(swim, 1, wire.PingRequest(55, IDS[2].id))
    swim.wake(START + 0.33)
    assert (addr(1), wire.Nack(55)) in sent(swim.drain())


def test_who_hears_it_is_accused_takes_the_next_incarnation_durably_first() -> None:
    swim = with_members(1, 2)
    statement = wire.accuse_statement("alpha", IDS[0].id, 1, IDS[1].id, 5, [])
    effects = tell(swim, 1, wire.Accuse(IDS[0].id, 1, IDS[1].id, 5, [], IDS[1].sign(statement)))
    kinds = [type(e) for e in effects]
    assert of(PersistIncarnation, effects) == [PersistIncarnation(2)]
    assert kinds.index(PersistIncarnation) < kinds.index(Send)
    assert swim.me.record.incarnation == 2
    updates = [m for _, m in sent(effects) if isinstance(m, wire.Update)]
    assert swim.me.signed in [m.record for m in updates]


def test_a_record_of_oneself_from_a_lost_past_is_outbid() -> None:
    """The disk was restored from a backup: others hold a higher incarnation, signed by this very key."""
    swim = with_members(1)
    effects = tell(swim, 1, update(0, incarnation=40, version=3))
    assert of(PersistIncarnation, effects) == [PersistIncarnation(41)]


def test_ones_own_current_record_is_no_news() -> None:
    swim = with_members(1)
    assert not of(PersistIncarnation, tell(swim, 1, wire.Update(swim.me.signed)))


def test_a_change_of_oneself_is_versioned_signed_and_told_at_once() -> None:
    swim = with_members(1, 2)
    swim.update_self(START, state=State.DRAINING, cordoned=True)
    effects = swim.drain()
    assert {w for w, m in sent(effects) if isinstance(m, wire.Update)} == {addr(1), addr(2)}
    assert (swim.me.state, swim.me.record.version, swim.me.record.cordoned) == (State.DRAINING, 2, True)
    assert not of(Changed, effects)


@pytest.mark.parametrize(
    "changes",
    [{"state": State.DEAD}, {"state": State.LEAVING}, {"incarnation": 9}, {"pub": b""}, {"mesh": "x"}],
)
def test_a_node_cannot_say_of_itself_what_is_not_its_to_say(changes: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        engine(0).update_self(START, **changes)


def test_vitals_ride_on_probes_and_are_gossiped_on_material_change_only() -> None:
    swim = with_members(1)
    for at, cpu in ((0.0, 100), (3.0, 120), (6.0, 140), (9.0, 149)):
        run(swim, START + at)
        swim.set_vitals(Vitals(cpu=cpu), START + at)
    assert swim._load_seq == 1
    run(swim, START + 12)
    swim.set_vitals(Vitals(cpu=150), START + 12)
    assert swim._load_seq == 2
    swim.set_vitals(Vitals(cpu=900), START + 12.5)
    assert swim._load_seq == 2, "spaced"
    run(swim, START + 14.01)
    assert swim._load_seq == 3
    swim.set_vitals(Vitals(cpu=900, daemons_running=1), START + 20)
    assert swim._load_seq == 4


def test_gossiped_vitals_are_shown_and_older_ones_are_not() -> None:
    swim = with_members(1, 2)
    tell(swim, 1, wire.Load(IDS[2].id, 1, 5, Vitals(cpu=500)))
    tell(swim, 1, wire.Load(IDS[2].id, 1, 4, Vitals(cpu=100)))
    tell(swim, 1, wire.Load(IDS[2].id, 9, 9, Vitals(cpu=100)))
    assert swim.members[IDS[2].id].vitals == Vitals(cpu=500)


def test_a_goodbye_evicts_at_once_and_is_acknowledged() -> None:
    swim = with_members(1, 2)
    signed = seal_record(record(1, state=State.LEAVING, version=2), IDS[1].sign)
    effects = tell(swim, 1, wire.Goodbye(88, signed))
    (gone,) = of(Evicted, effects)
    assert (gone.id, gone.evidence, gone.name) == (IDS[1].id, Evidence.LEFT, "n1")
    assert (addr(1), wire.GoodbyeAck(88)) in sent(effects)
    assert IDS[1].id not in swim.members and swim.tombstones[IDS[1].id].final
    assert wire.GoodbyeAck(89) in [m for _, m in sent(tell(swim, 1, wire.Goodbye(89, signed)))], "asked twice"


def test_leaving_is_done_after_three_acks_and_no_sooner() -> None:
    swim = with_members(1, 2, 3, 4)
    swim.leave(START)
    nonces = {w: m.nonce for w, m in sent(swim.drain()) if isinstance(m, wire.Goodbye)}
    assert set(nonces) == {addr(i) for i in (1, 2, 3, 4)}
    for i in (1, 2):
        assert not of(LeaveDone, tell(swim, i, wire.GoodbyeAck(nonces[addr(i)])))
    assert not of(LeaveDone, tell(swim, 2, wire.GoodbyeAck(nonces[addr(2)]))), "the same one again"
    assert not of(LeaveDone, tell(swim, 3, wire.GoodbyeAck(1))), "a wrong nonce"
    assert of(LeaveDone, tell(swim, 3, wire.GoodbyeAck(nonces[addr(3)])))
    assert swim.left_acked == 3 and swim.deadline() == inf


def test_leaving_is_done_after_300_ms_without_any_ack() -> None:
    swim = with_members(1)
    swim.leave(START)
    swim.drain()
    while not of(LeaveDone, swim.drain()):
        now = swim.deadline()
        swim.wake(now)
    assert now == pytest.approx(START + 0.3)


def test_leaving_twice_says_goodbye_once() -> None:
    swim = engine(0)
    swim.leave(START)
    swim.leave(START)
    assert len(of(LeaveDone, swim.drain())) == 1


def test_a_pause_moves_every_deadline_and_voids_what_is_open() -> None:
    swim = with_members(1, 2)
    while not swim._prober.probes:
        swim.wake(swim.deadline())
    due = swim.deadline()
    swim.wake(due + 500)
    assert swim.counters["paused"] == 1
    assert not any(m.suspect_since for m in swim.members.values())
    assert all(probe.sent_at >= due + 500 for probe in swim._prober.probes.values())


def test_a_verdict_that_comes_up_late_hears_what_waits_in_the_socket_first() -> None:
    swim = with_members(1, 2, 3)
    while not any(probe.stage == 2 for probe in swim._prober.probes.values()):
        swim.wake(swim.deadline())
    probe = next(iter(swim._prober.probes.values()))
    member = swim.members[probe.target]
    late = probe.ends_at + 0.3
    swim.wake(late)
    assert member.suspect_since is None
    swim.wake(late + 0.11)
    assert member.suspect_since == late + 0.11


def test_a_closed_link_asks_for_a_fresh_connect_where_the_member_answered() -> None:
    swim = with_members(1)
    swim.link_opened(IDS[1].id, addr(1), START)
    swim.drain()
    swim.link_closed(IDS[1].id, START + 1)
    assert of(Connect, swim.drain()) == [Connect(IDS[1].id, 1, (addr(1),))]


def test_with_one_other_member_its_own_refused_connect_is_enough_for_exited() -> None:
    swim = with_members(1)
    swim.link_opened(IDS[1].id, addr(1), START)
    swim.link_closed(IDS[1].id, START + 1)
    swim.connect_result(IDS[1].id, 1, addr(1), "refused", START + 1.01)
    (changed,) = [e for e in of(Changed, swim.drain()) if e.new is State.DEAD]
    assert (changed.evidence, changed.by) == (Evidence.EXITED, (IDS[0].id,))


def test_a_refused_connect_at_an_address_that_never_answered_is_no_evidence() -> None:
    swim = with_members(1)
    swim.link_closed(IDS[1].id, START + 1)
    swim.connect_result(IDS[1].id, 1, addr(1), "refused", START + 1.01)
    assert swim.members[IDS[1].id].state is State.ALIVE


def test_one_open_address_of_two_is_no_exit() -> None:
    swim = engine(0)
    second = ("10.0.1.1", 7000)
    tell(swim, 1, update(1, addrs=[addr(1), second]))
    swim.link_opened(IDS[1].id, addr(1), START)
    swim.link_opened(IDS[1].id, second, START)
    swim.link_closed(IDS[1].id, START + 1)
    swim.connect_result(IDS[1].id, 1, addr(1), "refused", START + 1.01)
    swim.connect_result(IDS[1].id, 1, second, "open", START + 1.02)
    assert swim.members[IDS[1].id].state is State.ALIVE


def test_an_accuser_that_gets_an_answer_takes_its_refusal_back_for_all() -> None:
    accuser, other = with_members(1, 2, 3), engine(2)
    for i in (0, 1, 3):
        tell(other, i, update(i))
    accuser.link_opened(IDS[1].id, addr(1), START)
    accuser.link_closed(IDS[1].id, START + 0.1)
    accuser.connect_result(IDS[1].id, 1, addr(1), "refused", START + 0.2)
    accuser.wake(START + 0.2)
    (accusation, *_) = [m for _, m in sent(accuser.drain()) if isinstance(m, wire.Accuse)]
    tell(other, 0, accusation, now=START + 0.2)
    assert other.members[IDS[1].id].suspect_since is not None
    accuser.link_answered(IDS[1].id, START + 0.3)
    accuser.wake(START + 0.3)
    (seen, *_) = [m for _, m in sent(accuser.drain()) if isinstance(m, wire.Seen)]
    assert accuser.members[IDS[1].id].suspect_since is None
    tell(other, 3, seen, now=START + 0.3)
    assert other.members[IDS[1].id].suspect_since is None
    tell(other, 3, accusation, now=START + 0.4)
    assert other.members[IDS[1].id].suspect_since is None, "the voided one, late"


def test_a_refusal_taken_back_before_it_is_heard_of_is_void_from_the_start() -> None:
    other = with_members(1, 2, 3)
    refused = [addr(1)]
    said = IDS[2].sign(wire.accuse_statement("alpha", IDS[1].id, 1, IDS[2].id, 5, refused))
    back = IDS[2].sign(wire.seen_statement("alpha", IDS[1].id, 1, IDS[2].id, 5))
    tell(other, 3, wire.Seen(IDS[1].id, 1, IDS[2].id, 5, back))
    tell(other, 3, wire.Accuse(IDS[1].id, 1, IDS[2].id, 5, refused, said))
    assert other.members[IDS[1].id].suspect_since is None


def test_an_answer_to_a_question_asked_before_the_refusal_voids_nothing() -> None:
    """The ack was under way when the process died."""
    swim = with_members(1, 2, 3)
    swim.link_opened(IDS[1].id, addr(1), START)
    nonce, now = 0, START
    while not nonce:
        now = swim.deadline()
        swim.wake(now)
        pings = [m for _, m in sent(swim.drain()) if isinstance(m, wire.Ping) and m.target == IDS[1].id]
        nonce = pings[0].nonce if pings else 0
    swim.link_closed(IDS[1].id, now + 0.01)
    swim.connect_result(IDS[1].id, 1, addr(1), "refused", now + 0.02)
    sig = IDS[1].sign(wire.ack_statement("alpha", nonce, IDS[1].id, 1))
    tell(swim, 1, wire.Ack(nonce, IDS[1].id, 1, 1, sig), now=now + 0.03)
    assert swim.members[IDS[1].id].suspect_since is not None


def test_results_of_an_earlier_incarnations_connect_are_void() -> None:
    swim = with_members(1)
    swim.link_opened(IDS[1].id, addr(1), START)
    swim.link_closed(IDS[1].id, START + 1)
    tell(swim, 1, update(1, incarnation=2), now=START + 1)
    swim.connect_result(IDS[1].id, 1, addr(1), "refused", START + 1.01)
    assert swim.members[IDS[1].id].state is State.ALIVE


def test_sentinels_are_told_only_when_they_change() -> None:
    swim = with_members(1, 2, 3, 4, 5)
    swim._greeter.synced()
    ring = sorted(IDS[i].id for i in range(1, 6))
    nexts = [i for i in ring if i > IDS[0].id] + [i for i in ring if i < IDS[0].id]
    assert of(Sentinels, swim.drain()) == [Sentinels(tuple(nexts[:3]))]
    tell(swim, 1, update(1, version=2))
    far = next(i for i in range(1, 6) if IDS[i].id == nexts[4])
    leaving = seal_record(record(far, state=State.LEAVING, version=9), IDS[far].sign)
    assert not of(Sentinels, tell(swim, far, wire.Goodbye(1, leaving)))


def test_a_body_with_nonsense_is_counted_by_a_stable_code() -> None:
    swim = with_members(1)
    swim.receive(b"nonsense", IDS[1].id, addr(1), START)
    swim.receive(wire.join([b"\x92\xcc\xc8\x01", b"\x91\x01"]), IDS[1].id, addr(1), START)
    codes = [e.code for e in of(Counted, swim.drain())]
    assert codes == ["malformed", "unknown_message", "malformed_message"]


def test_a_datagram_never_exceeds_the_limit_though_records_are_as_long_as_allowed() -> None:
    swim = engine(0)
    fat = {f"{i:02}" + "k" * 20: "v" * 14 for i in range(16)}
    for i in range(1, 7):
        tell(swim, i, update(i, tags=fat))
    swim.update_self(START, tags=fat)
    now = START
    limit = swim.config.max_body_bytes
    for _ in range(200):
        now = max(now, swim.deadline())
        swim.wake(now)
        assert all(len(e.body) <= limit for e in of(Send, swim.drain()))
    hello = wire.Hello(1, seal_record(record(1, tags=fat), IDS[1].sign))
    assert all(len(e.body) <= limit for e in of(Send, tell(swim, 1, hello, now=now)))


def test_a_push_pull_is_paged_and_asked_again_until_all_is_there() -> None:
    """More records than one body may hold."""
    from discovery.swim import syncing

    a, b = engine(0), engine(1)
    tell(a, 1, update(1))
    tell(b, 0, update(0))
    for i in range(2, 7):
        tell(b, i, update(i))
    page = syncing._PAGE_BYTES
    syncing._PAGE_BYTES = 350
    try:
        rounds = 0
        while True:
            rounds += 1
            a.push_pull_merge(
                b.push_pull_answer(a.push_pull_request(START), IDS[0].id, START), IDS[1].id, START
            )
            if not of(PushPull, a.drain()):
                break
    finally:
        syncing._PAGE_BYTES = page
    assert len(a.members) == 6 and rounds > 2 and a.synced


def test_a_push_pull_between_equals_carries_next_to_nothing() -> None:
    a, b = with_members(1, 2, 3), engine(1)
    for i in (0, 2, 3):
        tell(b, i, update(i))
    answer = wire.decode_answer(b.push_pull_answer(a.push_pull_request(START), IDS[0].id, START))
    assert (answer.records, answer.tombs, answer.wants, answer.more) == ([], [], [], False)


def test_a_push_pull_brings_the_goodbye_that_somebody_missed() -> None:
    a, b = with_members(1, 2), engine(1)
    tell(b, 0, update(0))
    tell(b, 2, wire.Goodbye(1, seal_record(record(2, state=State.LEAVING, version=2), IDS[2].sign)))
    a.push_pull_merge(b.push_pull_answer(a.push_pull_request(START), IDS[0].id, START), IDS[1].id, START)
    assert [e.evidence for e in of(Evicted, a.drain())] == [Evidence.LEFT]


def test_a_member_that_changes_for_ever_costs_no_more_memory() -> None:
    swim = with_members(2, 3)
    for version in range(2, 1_500):
        tell(swim, 2, update(2, version=version))
    assert swim.members[IDS[2].id].record.version == 1_499
    view = swim.view
    assert len(view._cache) + len(view._cache_old) <= 1_024
