"""A member that lies: it holds the mesh key, so its packets open everywhere, under any sender it likes.

It may cost the others some looking. It must never make a live node Dead, a dead one live, or put words into another's mouth.
"""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from discovery import wire
from discovery.lifecycle import Evidence, State
from discovery.member import SignedRecord, seal_record
from discovery.swim import SwimConfig
from tests.sim.net import Net, SimNode
from tests.sim.scenario import Converged, CrashHost, Grow, Held, Kill, Leave, Run, play

LAN = SwimConfig.lan()


def _say(
    net: Net, liar: SimNode, victim: SimNode, *messages: wire.AnyMessage, sender: int | None = None
) -> None:
    """One packet of the liar's making, under its own or another's id."""
    net.carry(liar, victim.addr, wire.join([wire.encode(m) for m in messages]), sender)


def _accuse(
    liar: SimNode, target: SimNode, stamp: int, *, refused: bool, incarnation: int | None = None
) -> wire.Accuse:
    where = [target.addr] if refused else []
    incarnation = target.incarnation if incarnation is None else incarnation
    statement = wire.accuse_statement("sim", target.id, incarnation, liar.id, stamp, where)
    return wire.Accuse(target.id, incarnation, liar.id, stamp, where, liar.sign(statement))


def _live(net: Net, target: SimNode) -> None:
    dead = [told for _, told in net.deaths() if told.node == target.id]
    assert not dead, f"seed {net.seed}: {dead[:3]}"


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("liars", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_accusations_by_liars_never_kill_a_live_node(seed: int, liars: int, refused: bool) -> None:
    """Three liars are enough witnesses for `exited` and all confirmations for `silent`; what honest nodes see counts."""
    net = play(seed, [Grow(12), Converged(3), Run(10)])
    target = net.nodes[0]
    crew = net.nodes[1 : 1 + liars]
    for round_ in range(60):
        for liar in crew:
            for victim in net.nodes:
                if victim not in crew:
                    stamp = (1 << 50) + round_
                    _say(net, liar, victim, _accuse(liar, target, stamp, refused=refused))
        net.run(0.5)
    _live(net, target)
    net.run(30)
    _live(net, target)
    assert net.run_until(net.all_see_all, 5)


def test_accusations_kept_from_their_target_never_kill_it() -> None:
    """The target hears no accusation from the liars and its refutations are slow: its answers to probes suffice."""
    net = play(2, [Grow(8), Converged(3), Run(10)], SwimConfig.lan(refute_spacing_s=1e9))
    target, liars = net.nodes[0], net.nodes[1:4]
    for round_ in range(100):
        for liar in liars:
            for victim in net.nodes[4:]:
                _say(net, liar, victim, _accuse(liar, target, (1 << 50) + round_, refused=bool(round_ % 2)))
        net.run(0.3)
    _live(net, target)


def test_liars_that_only_one_node_hears_do_not_kill_for_it_either() -> None:
    net = play(4, [Grow(8), Converged(3), Run(10)])
    target, dupe = net.nodes[0], net.nodes[7]
    for round_ in range(60):
        for liar in net.nodes[1:4]:
            _say(net, liar, dupe, _accuse(liar, target, (1 << 50) + round_, refused=True))
        net.run(0.25)
    _live(net, target)


def test_an_accusation_under_anothers_name_is_refused_and_counted() -> None:
    net = play(4, [Grow(6), Converged(3), Run(5)])
    target, honest, liar, victim = net.nodes[0], net.nodes[1], net.nodes[2], net.nodes[3]
    forged = msgspec.structs.replace(_accuse(liar, target, 1 << 50, refused=True), accuser=honest.id)
    _say(net, liar, victim, forged, sender=honest.id)
    net.run(0.05)
    assert victim.swim.counters["forged_accusation"] == 1
    assert victim.swim.members[target.id].suspect_since is None


def test_a_refusal_at_an_address_of_another_hosts_loopback_is_no_witness() -> None:
    net = play(4, [Grow(6), Converged(3), Run(5)])
    target, liar, victim = net.nodes[0], net.nodes[2], net.nodes[3]
    where = [("127.0.0.1", 7000)]
    statement = wire.accuse_statement("sim", target.id, target.incarnation, liar.id, 1 << 50, where)
    lie = wire.Accuse(target.id, target.incarnation, liar.id, 1 << 50, where, liar.sign(statement))
    _say(net, liar, victim, lie)
    net.run(0.05)
    assert victim.swim.counters["no_witness"] == 1
    assert victim.swim.members[target.id].suspect_since is None


@pytest.mark.parametrize("seed", range(3))
def test_forged_answers_do_not_keep_a_dead_node_alive(seed: int) -> None:
    """The liar hears every packet to the dead node, nonces too, and answers each under its name."""
    net = play(seed, [Grow(10), Converged(3), Run(10)])
    target, liar = net.nodes[0], net.nodes[1]

    def answer(source: SimNode, addr: tuple[str, int], body: bytes) -> None:
        if addr != target.addr or source is liar:
            return
        for m in wire.decode(body)[0]:
            if isinstance(m, wire.Ping):
                sig = liar.sign(wire.ack_statement("sim", m.nonce, target.id, target.incarnation))
                ack = wire.Ack(m.nonce, target.id, target.incarnation, 1, sig)
                _say(net, liar, source, ack, sender=target.id)
            elif isinstance(m, wire.Hello):
                sig = liar.sign(wire.hello_statement("sim", m.nonce, source.id, target.id))
                record = target.swim.me.signed
                _say(net, liar, source, wire.HelloAck(m.nonce, record, sig), sender=target.id)

    net.tap = answer
    net.crash_host(target)
    assert net.run_until(lambda: net.all_hold(target, State.DEAD, Evidence.SILENT), 60), f"seed {seed}"
    assert any(node.swim.counters["forged_ack"] for node in net.running())
    net.run(120)
    assert net.all_hold(target, None)


def test_old_packets_of_a_dead_node_said_again_raise_nobody() -> None:
    net = Net(5)
    heard: list[tuple[SimNode, tuple[str, int], bytes]] = []
    net.tap = lambda source, addr, body: heard.append((source, addr, body)) if len(heard) < 20_000 else None
    net.grow(10)
    net.run(10)
    net.kill(net.nodes[2])
    net.leave(net.nodes[3])
    assert net.run_until(lambda: net.all_hold(net.nodes[2], State.DEAD), 2)
    net.tap = None
    gone = {net.nodes[2].id, net.nodes[3].id}
    liar = net.nodes[1]
    for node in net.nodes:
        node.told.clear()
    for source, addr, body in heard:
        if source.id in gone or b"n2" in body or b"n3" in body:
            net.carry(liar, addr, body, source.id)
            net.run(0.002)
    net.run(100)
    for node in net.running():
        assert not [t for t in node.told if t.node in gone and t.what != "evicted"]


def test_a_goodbye_for_another_is_refused() -> None:
    """Signed by the liar; signed by nobody; and the liar's own goodbye sent under the victim's name."""
    net = play(4, [Grow(6), Converged(3), Run(5)])
    target, liar, judge = net.nodes[0], net.nodes[1], net.nodes[2]
    leaving = msgspec.structs.replace(target.swim.me.record, state=State.LEAVING, version=99)
    forged = seal_record(leaving, liar.sign)
    own = seal_record(
        msgspec.structs.replace(liar.swim.me.record, state=State.LEAVING, version=99), liar.sign
    )
    _say(net, liar, judge, wire.Goodbye(1, forged), sender=target.id)
    _say(net, liar, judge, wire.Update(forged))
    _say(net, liar, judge, wire.Goodbye(1, SignedRecord(forged.blob, bytes(64))), sender=target.id)
    _say(net, liar, judge, wire.Goodbye(1, own), sender=target.id)
    net.run(0.1)
    assert judge.swim.counters["bad_record"] == 3 and judge.swim.counters["forged_goodbye"] == 1
    assert judge.view[target.id] is State.ALIVE and judge.view[liar.id] is State.ALIVE


def test_taking_back_anothers_refusal_is_refused() -> None:
    net = play(4, [Grow(10), Converged(3), Run(15)])
    target, liar = net.nodes[0], net.nodes[1]
    net.tap = None
    net.kill(target)
    for honest in net.nodes[2:]:
        for victim in net.nodes[2:]:
            statement = wire.seen_statement("sim", target.id, target.incarnation, honest.id, 1 << 60)
            lie = wire.Seen(target.id, target.incarnation, honest.id, 1 << 60, liar.sign(statement))
            _say(net, liar, victim, lie)
    assert net.run_until(lambda: net.all_hold(target, State.DEAD, Evidence.EXITED), 1)
    assert sum(node.swim.counters["forged_seen"] for node in net.running()) > 0


def test_a_liar_that_vouches_for_a_dead_node_by_its_own_word_only_withdraws_itself() -> None:
    net = play(4, [Grow(10), Converged(3), Run(15)])
    target, liar = net.nodes[0], net.nodes[1]
    net.kill(target)
    for victim in net.nodes[2:]:
        statement = wire.seen_statement("sim", target.id, target.incarnation, liar.id, 1 << 60)
        _say(
            net,
            liar,
            victim,
            wire.Seen(target.id, target.incarnation, liar.id, 1 << 60, liar.sign(statement)),
        )
    assert net.run_until(lambda: net.all_hold(target, State.DEAD, Evidence.EXITED), 1)


def test_tombstones_of_live_nodes_in_a_push_pull_only_make_others_look() -> None:
    net = play(4, [Grow(10), Converged(3), Run(15)])
    target, liar = net.nodes[0], net.nodes[1]
    crew = [_accuse(other, target, 1 << 50, refused=True) for other in net.nodes[1:4]]
    tomb = wire.Tomb(target.swim.me.signed, Evidence.EXITED, 0, crew)
    left = wire.Tomb(target.swim.me.signed, Evidence.LEFT, 0, [])
    body = wire.encode_sync(wire.SyncAnswer(liar.swim.me.signed, [], [tomb, left]))
    for _ in range(30):
        for victim in net.nodes[4:]:
            net.call(victim, "push_pull_merge", body, liar.id)
        net.run(0.5)
    _live(net, target)
    assert net.nodes[5].swim.counters["bad_tombstone"] == 30
    assert net.run_until(net.all_see_all, 3)


def test_a_digest_that_calls_everybody_dead_only_makes_others_look() -> None:
    net = play(4, [Grow(10), Converged(3), Run(15)])
    liar = net.nodes[1]
    for _ in range(30):
        tombs = [
            (node.id, node.incarnation, final) for node in net.nodes for final in (0, 1) if node is not liar
        ]
        body = wire.encode_sync(wire.SyncRequest(liar.swim.me.signed, [], tombs))
        for victim in net.nodes[2:]:
            net.call(victim, "push_pull_answer", body, liar.id)
        net.run(0.5)
    net.run(20)
    assert not net.deaths()


def test_claims_move_an_incarnation_by_small_steps_and_not_too_often() -> None:
    net = play(4, [Grow(4), Converged(3), Run(5)])
    target, liar = net.nodes[0], net.nodes[1]
    _say(net, liar, target, wire.Buried(target.id, 2**61))
    net.run(0.05)
    assert target.incarnation == 1 and target.swim.counters["wild_claim"] == 1
    began = net.now
    for _ in range(500):
        _say(net, liar, target, wire.Buried(target.id, target.incarnation))
        net.run(0.01)
    assert 1 < target.incarnation <= 2 + (net.now - began) / LAN.refute_spacing_s
    net.run(2)
    assert net.run_until(net.all_see_all, 3)


def test_a_second_key_for_a_known_id_is_refused_and_counted() -> None:
    """Ids are the first 8 bytes of a key: a key that shares them is somebody else."""
    net = play(4, [Grow(4), Converged(3), Run(5)])
    target, liar, victim = net.nodes[0], net.nodes[1], net.nodes[2]
    pub, sign = net.keys.make(random.Random(9))
    twin = target.pub[:8] + pub[8:]
    net.keys._secrets[twin] = net.keys._secrets[pub]
    record = msgspec.structs.replace(target.swim.me.record, pub=twin, incarnation=50, addrs=[liar.addr])
    signed = seal_record(record, sign)
    _say(net, liar, victim, wire.Update(signed))
    _say(net, liar, victim, wire.Hello(1, signed), sender=target.id)
    net.run(0.1)
    assert victim.swim.counters["second_key"] == 2
    assert victim.swim.members[target.id].record.pub == target.pub


def test_a_second_key_is_refused_for_the_dead_and_evicted_too() -> None:
    net = play(4, [Grow(4), Converged(3), Run(5), Kill(0), Held(0, State.DEAD, 2), Run(70), Held(0, None, 1)])
    target, liar, victim = net.nodes[0], net.nodes[1], net.nodes[2]
    pub, sign = net.keys.make(random.Random(9))
    twin = target.pub[:8] + pub[8:]
    net.keys._secrets[twin] = net.keys._secrets[pub]
    record = msgspec.structs.replace(target.swim.me.record, pub=twin, incarnation=50)
    _say(net, liar, victim, wire.Update(seal_record(record, sign)))
    net.run(0.1)
    assert victim.swim.counters["second_key"] == 1 and target.id not in victim.swim.members


def test_a_node_of_another_mesh_is_refused_and_counted() -> None:
    net = play(4, [Grow(3), Converged(3)])
    liar, victim = net.nodes[1], net.nodes[2]
    pub, sign = net.keys.make(random.Random(9))
    record = msgspec.structs.replace(liar.swim.me.record, pub=pub, mesh="other")
    signed = seal_record(record, sign)
    _say(net, liar, victim, wire.Hello(1, signed), sender=record.id)
    net.run(0.1)
    assert victim.swim.counters["wrong_mesh"] == 1 and record.id not in victim.swim.members


def test_forged_icmp_and_closed_links_kill_nobody() -> None:
    net = play(4, [Grow(8), Converged(3), Run(5)])
    target = net.nodes[0]
    for _ in range(200):
        for victim in net.nodes[1:]:
            net.call(victim, "datagram_refused", target.addr)
            net.call(victim, "link_closed", target.id)
        net.run(0.1)
    _live(net, target)
    assert not any(node.swim.members[target.id].suspect_since for node in net.nodes[1:])


def test_one_honest_refusal_alone_is_silent_not_exited() -> None:
    """Whoever alone finds a port closed may be looking at a firewall of its own."""
    net = play(4, [Grow(8), Converged(3), Run(15)])
    target, lonely = net.nodes[0], net.nodes[5]
    net.call(lonely, "link_closed", target.id)
    for addr in [target.addr]:
        net.call(lonely, "connect_result", target.id, target.incarnation, addr, "refused")
    net.run(20)
    _live(net, target)
    assert lonely.swim.members[target.id].suspect_since is None


def test_a_flood_of_strangers_fills_no_table() -> None:
    """Records of nodes that don't exist: each is a member until it fails to answer, and no more fit than the limit."""
    config = SwimConfig.lan(max_members=50, max_tombstones=60)
    net = play(4, [Grow(5), Converged(3)], config)
    liar, victim = net.nodes[1], net.nodes[2]
    rng = random.Random(1)
    for i in range(300):
        pub, sign = net.keys.make(rng)
        record = replace_pub(liar, pub, f"ghost{i}")
        _say(net, liar, victim, wire.Update(seal_record(record, sign)))
        net.run(0.01)
    assert len(victim.swim.members) <= 50 and victim.swim.counters["members_full"] > 0
    net.run(200)
    assert len(victim.swim.tombstones) <= 60
    for node in net.nodes:
        assert node.view[net.nodes[0].id if node is not net.nodes[0] else net.nodes[1].id] is State.ALIVE


def replace_pub(node: SimNode, pub: bytes, name: str) -> object:
    """Another node's record in the liar's hand."""
    return msgspec.structs.replace(node.swim.me.record, pub=pub, name=name, addrs=[("10.250.0.1", 7000)])


def test_a_crash_while_liars_shout_is_still_found() -> None:
    net = play(6, [Grow(12), Converged(3), Run(10), CrashHost(0)])
    target = net.nodes[0]
    for round_ in range(40):
        for victim in net.nodes[2:]:
            _say(
                net,
                net.nodes[1],
                victim,
                _accuse(net.nodes[1], net.nodes[3], (1 << 50) + round_, refused=True),
            )
        net.run(0.5)
    assert net.run_until(lambda: net.all_hold(target, State.DEAD, Evidence.SILENT), 20)
    _live(net, net.nodes[3])


def test_a_leaver_cannot_be_kept_by_its_old_record() -> None:
    net = play(6, [Grow(6), Converged(3), Run(3)])
    leaver, liar = net.nodes[2], net.nodes[1]
    old = leaver.swim.me.signed
    net.leave(leaver)
    net.run(1)
    for _ in range(20):
        for victim in net.running():
            if victim is not liar:
                _say(net, liar, victim, wire.Update(old), wire.Hello(7, old), sender=leaver.id)
        net.run(0.1)
    assert net.all_hold(leaver, None)


def test_words_about_leave_do_not_reach_the_leaver_back() -> None:
    """After its goodbye a node says nothing more, whatever it hears."""
    net = play(6, [Grow(6), Converged(3), Run(3), Leave(2), Run(0.1)])
    leaver, liar = net.nodes[2], net.nodes[1]
    packets = net.packets[2]
    leaver.swim.receive(
        wire.join([wire.encode(wire.Ping(5, leaver.id, 1, 1)), wire.encode(wire.Buried(leaver.id, 1))]),
        liar.id,
        liar.addr,
        net.now + leaver.offset,
    )
    net.after(replace(leaver))
    assert net.packets[2] == packets
