"""Whatever arrives, `receive` neither raises nor lets a live member die of it."""

from __future__ import annotations

import random
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discovery import wire
from discovery.lifecycle import Evidence, State
from discovery.member import SignedRecord, Vitals, seal_record
from tests.sim.net import Net, SimNode

SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
NODES = 4


def pool() -> Net:
    """Four nodes that know each other, one of which will be at the receiving end; one killed, one that left."""
    net = Net(1)
    net.grow(NODES + 2)
    net.run(6)
    net.kill(net.nodes[NODES])
    net.leave(net.nodes[NODES + 1])
    net.run(3)
    return net


REAL: list[bytes] = []


def real_bodies() -> list[bytes]:
    """Bodies as nodes really send them, of every kind."""
    if not REAL:
        net = Net(2)
        net.tap = lambda source, addr, body: REAL.append(body)
        net.loss = 0.2
        net.grow(8)
        net.run(10)
        net.kill(net.nodes[3])
        net.leave(net.nodes[4])
        net.run(10)
        for node in net.running():
            net.call(node, "set_vitals", Vitals(cpu=net.rng.randrange(1000)))
        net.run(3)
        kinds = {type(m) for body in REAL for m in wire.decode(body)[0]}
        assert len(kinds) >= 11, kinds
    return REAL


def survive(net: Net, victim: SimNode, before: set[int]) -> None:
    """Nobody died, and the pool is whole again in a moment."""
    net.run(8)
    assert not [told for _, told in net.deaths() if told.node in before]
    assert before <= {node for node, member in victim.swim.members.items() if member.present}
    gone = {net.nodes[NODES].id, net.nodes[NODES + 1].id}
    assert not any(member.present for node, member in victim.swim.members.items() if node in gone)


def live_others(net: Net, victim: SimNode) -> set[int]:
    return {node.id for node in net.running() if node is not victim}


@SLOW
@given(st.lists(st.binary(max_size=1_500), min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_random_bytes_change_nothing(bodies: list[bytes], sender: int) -> None:
    net = pool()
    victim = net.nodes[0]
    before = live_others(net, victim)
    for body in bodies:
        for who in (sender, net.nodes[1].id, victim.id, net.nodes[NODES].id):
            net.call(victim, "receive", body, who, net.nodes[1].addr)
        net.call(victim, "push_pull_merge", body, net.nodes[1].id)
        assert net.call(victim, "push_pull_answer", body, net.nodes[1].id) == b"\x90"
    survive(net, victim, before)


@SLOW
@given(st.data())
def test_real_bodies_damaged_anywhere_kill_nobody(data: st.DataObject) -> None:
    bodies = real_bodies()
    net = pool()
    victim = net.nodes[0]
    before = live_others(net, victim)
    for _ in range(30):
        body = bytearray(data.draw(st.sampled_from(bodies)))
        for at, bit in data.draw(
            st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(1, 255)), max_size=4)
        ):
            body[at] ^= bit
        end = data.draw(st.integers(0, len(body)))
        sender = data.draw(st.sampled_from([node.id for node in net.nodes] + [5]))
        net.call(victim, "receive", bytes(body[:end] if end % 3 == 0 else body), sender, net.nodes[2].addr)
    survive(net, victim, before)


class Hostile:
    """Well-formed messages about the pool's own nodes, signed by a member that lies, or by nobody."""

    def __init__(self, net: Net, rng: random.Random) -> None:
        self.net, self.rng, self.liar = net, rng, net.nodes[1]

    def message(self) -> wire.AnyMessage:
        rng, net, liar = self.rng, self.net, self.liar
        node = rng.choice(net.nodes)
        other = rng.choice(net.nodes)
        sig = rng.choice([bytes(64), liar.sign(b"something"), rng.randbytes(64)])
        number = rng.choice([0, 1, 2, 3, 1 << 20, 2**61, 2**62])
        nonce = rng.choice([0, 1, 2**64 - 1, *list(net.nodes[0].swim._prober.probes)[:3]])
        where = rng.choice([[], [node.addr], [("127.0.0.1", 1)], [("", 1), ("a.b", 2)], [other.addr] * 8])
        vitals = rng.choice([None, Vitals(cpu=1000, failures=2**31)])
        statement = wire.accuse_statement("sim", node.id, number, liar.id, number, where)
        seen = wire.seen_statement("sim", node.id, number, liar.id, number)
        ack = wire.ack_statement("sim", nonce, node.id, number)
        return rng.choice(
            [
                wire.Ping(nonce, rng.choice([net.nodes[0].id, other.id]), number, number, number, vitals),
                wire.Ack(nonce, node.id, number, number, liar.sign(ack), number, vitals),
                wire.PingRequest(nonce, node.id),
                wire.Nack(nonce),
                wire.Hello(nonce, self.record(node)),
                wire.HelloAck(nonce, self.record(node), sig, number),
                wire.Update(self.record(node)),
                wire.Accuse(node.id, number, liar.id, number, where, liar.sign(statement)),
                wire.Accuse(node.id, number, other.id, number, where, sig),
                wire.Seen(node.id, number, liar.id, number, liar.sign(seen)),
                wire.Seen(node.id, number, other.id, number, sig),
                wire.Buried(node.id, number),
                wire.Goodbye(nonce, self.record(node)),
                wire.GoodbyeAck(nonce),
                wire.Want([n.id for n in net.nodes] * 4),
                wire.Load(node.id, number, number, Vitals(mem=5)),
            ]
        )

    def record(self, node: SimNode) -> SignedRecord:
        rng = self.rng
        real = node.swim.me.signed
        changes: dict[str, Any] = rng.choice(
            [
                {"incarnation": 2**62, "state": State.LEAVING},
                {"version": 99, "state": State.LEAVING},
                {"state": State.DEAD},
                {"addrs": [("not an address", 1)]},
                {"mesh": "other"},
                {"addrs": [], "incarnation": 7},
            ]
        )
        forged = msgspec.structs.replace(node.swim.me.record, **changes)
        return rng.choice([real, real, seal_record(forged, self.liar.sign), SignedRecord(b"", bytes(64))])

    def tomb(self) -> wire.Tomb:
        rng = self.rng
        node = rng.choice(self.net.nodes)
        accusations = [m for m in (self.message() for _ in range(9)) if isinstance(m, wire.Accuse)]
        return wire.Tomb(self.record(node), rng.choice(list(Evidence)), rng.choice([0, 2**62]), accusations)


@SLOW
@given(st.integers(0, 2**32))
def test_hostile_messages_of_good_form_kill_nobody(seed: int) -> None:
    net = pool()
    victim = net.nodes[0]
    # The liar itself may say anything true about itself, so it is not among those that must live on.
    before = live_others(net, victim) - {net.nodes[1].id}
    hostile = Hostile(net, random.Random(seed))
    rng = hostile.rng
    for _ in range(60):
        parts = [wire.encode(hostile.message()) for _ in range(rng.randrange(1, 4))]
        sender = rng.choice([*(node.id for node in net.nodes), 77])
        addr = rng.choice([*(node.addr for node in net.nodes), ("10.9.9.9", 1)])
        net.call(victim, "receive", wire.join(parts), sender, addr)
        if rng.random() < 0.1:
            ids = [(node.id, rng.choice([0, 1, 2**62]), rng.choice([0, 1])) for node in net.nodes]
            request = wire.SyncRequest(hostile.liar.swim.me.signed, ids, ids, rng.random() < 0.5)
            net.call(victim, "push_pull_answer", wire.encode_sync(request), hostile.liar.id)
            answer = wire.SyncAnswer(
                hostile.liar.swim.me.signed,
                [hostile.record(rng.choice(net.nodes)) for _ in range(3)],
                [hostile.tomb() for _ in range(3)],
                [node.id for node in net.nodes],
                rng.random() < 0.5,
            )
            net.call(victim, "push_pull_merge", wire.encode_sync(answer), hostile.liar.id)
        net.run(rng.random() * 0.2)
    survive(net, victim, before)


@SLOW
@given(st.integers(0, 2**32))
def test_inputs_about_nobody_and_at_odd_times_raise_nothing(seed: int) -> None:
    net = pool()
    rng = random.Random(seed)
    victim = net.nodes[0]
    ids = [node.id for node in net.nodes] + [0, 2**64 - 1]
    for _ in range(80):
        node, addr = rng.choice(ids), rng.choice([*(n.addr for n in net.nodes), ("", 0), ("::1", 5)])
        method, args = rng.choice(
            [
                ("datagram_refused", (addr,)),
                ("link_opened", (node, addr)),
                ("link_answered", (node,)),
                ("link_closed", (node,)),
                ("connect_result", (node, rng.randrange(3), addr, rng.choice(["open", "error", "?"]))),
                ("join", ([addr],)),
                ("wake", ()),
                ("set_vitals", (Vitals(cpu=rng.randrange(1000)),)),
            ]
        )
        net.call(victim, method, *args)
        net.run(rng.choice([0.0, 0.01, 0.3]))
    survive(net, victim, live_others(net, victim))
