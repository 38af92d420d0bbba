"""Probes: one member after the other, directly, and through others when that fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from discovery import wire
from discovery.lifecycle import State
from discovery.member import Addr, Member
from discovery.swim.judge import Judge
from discovery.swim.view import View

_SPENT_MAX = 256
_RELAYS_MAX = 1_024
_LATE_GRACE_S = 0.1
NONCE_BITS = 61
ATTEMPT_BITS = 2
"""Below the random ones: which of its pings an ack answers, so that a round trip is that of one ping."""
ATTEMPT = (1 << ATTEMPT_BITS) - 1


@dataclass(slots=True)
class Probe:
    """One question to one member, asked directly up to three times and through others once."""

    nonce: int
    """Of its first ping; the later ones count up from it."""
    target: int
    sent_at: float
    ends_at: float
    addrs: list[Addr]
    routine: bool
    """One of the regular round, not a look at a suspect."""
    stage: int = 0
    pinged_at: list[float] = field(default_factory=list)
    """When each ping was sent."""
    helpers: list[int] = field(default_factory=list)
    nacks: set[int] = field(default_factory=set)
    graced: bool = False
    """Its verdict came up late, so what waits in the socket is heard first."""


@dataclass(slots=True)
class Relay:
    """A probe made for another: where to bring the ack."""

    target: int
    origin: Addr
    nacked: bool = False


_MEET_WITHIN_S = 0.3
_MEET_PER_S = 100.0
"""How many of a large pool meet a newcomer in a second."""


class Prober:
    """Open probes, the order of the round, and probes made for others."""

    def __init__(self, view: View, judge: Judge) -> None:
        self.view, self.judge = view, judge
        self.probes: dict[int, Probe] = {}
        self.differs: Callable[[int], None] = lambda node: None
        """Told when a member's view differs from mine at rest; set by the engine."""
        self._spent: OrderedDict[int, Probe] = OrderedDict()
        self._relays: dict[int, Relay] = {}
        self._round: list[int] = []

    # asking

    def tick(self, due: float) -> None:
        """The next member of the round; a fresh shuffle when the round is over."""
        view = self.view
        view.timers.set("tick", max(due, view.now - 0.1) + view.scaled(view.config.probe_interval_s))
        for _ in range(8):
            if not self._round:
                self._round = list(view.ring)
                view.rng.shuffle(self._round)
                if not self._round:
                    return
            node = self._round.pop()
            member = view.members.get(node)
            if member is not None and member.present and view.contacts[node].probe is None:
                self.ask(node, member, routine=True)
                return

    def joined(self, node: int) -> None:
        """A new member takes a random place in the running round, and is met soon: only who has had an answer
        can witness an end. The larger the pool, the longer the meetings are spread out."""
        view = self.view
        self._round.insert(int(view.rng.random() * (len(self._round) + 1)), node)
        view.timers.set(
            ("meet", node), view.now + view.rng.random() * max(_MEET_WITHIN_S, view.n / _MEET_PER_S)
        )

    def meet(self, node: int) -> None:
        """Asks a member that has never answered here."""
        contact = self.view.contacts.get(node)
        if contact is not None and not contact.proven:
            self.look(node, self.view.now)

    def look(self, node: int, since: float) -> None:
        """Probes a member now, unless a probe sent at `since` or later is open."""
        view = self.view
        member = view.members.get(node)
        if member is None or not member.present:
            return
        open_nonce = view.contacts[node].probe
        if open_nonce is not None:
            if self.probes[open_nonce].sent_at >= since:
                return
            self._retire(self.probes[open_nonce])
        self.ask(node, member, routine=False)

    def ask(self, node: int, member: Member, *, routine: bool) -> None:
        """Sends the first ping of a new probe."""
        view, config = self.view, self.view.config
        addrs = [member.addr] if member.addr is not None else view.addrs_of(member)
        nonce = view.rng.getrandbits(NONCE_BITS) << ATTEMPT_BITS
        ends_at = view.now + view.scaled(config.probe_interval_s)
        probe = Probe(nonce, node, view.now, ends_at, addrs, routine)
        self.probes[nonce] = probe
        view.contacts[node].probe = nonce
        self._ping(probe, addrs)
        view.timers.set(("probe", nonce), view.now + view.scaled(config.probe_timeout_s) / 2)

    def _ping(self, probe: Probe, addrs: list[Addr]) -> None:
        probe.pinged_at.append(self.view.now)
        parts = [self.ping(probe.nonce + probe.stage, probe.target), *self.judge.reminder(probe.target)]
        for addr in addrs:
            self.view.send(addr, parts)

    def ping(self, nonce: int, target: int) -> bytes:
        me = self.view.me
        record = me.record
        return wire.encode(
            wire.Ping(nonce, target, record.incarnation, record.version, self.view.hash, me.vitals)
        )

    def due(self, nonce: int, at: float) -> None:
        """A stage of a probe is over: ask again at every address, then through others, then give up."""
        view = self.view
        probe = self.probes.get(nonce)
        if probe is None:
            return
        member = view.members[probe.target]
        if probe.stage == 2:
            if view.now - at > _LATE_GRACE_S and not probe.graced:
                probe.graced = True
                view.timers.set(("probe", nonce), view.now + _LATE_GRACE_S)
            else:
                self._failed(probe, member)
            return
        timeout = view.scaled(view.config.probe_timeout_s)
        probe.stage += 1
        probe.addrs += [addr for addr in view.addrs_of(member) if addr not in probe.addrs]
        self._ping(probe, probe.addrs)
        if probe.stage == 1:
            view.timers.set(("probe", nonce), max(view.now, probe.sent_at + timeout))
            return
        probe.helpers = view.some(view.config.indirect_probes, but=(probe.target,))
        request = wire.encode(wire.PingRequest(nonce, probe.target))
        for helper in probe.helpers:
            addr = view.addr_of(view.members[helper])
            if addr is not None:
                view.send(addr, [request])
        view.timers.set(("probe", nonce), max(probe.ends_at, view.now + timeout / 2))

    def _failed(self, probe: Probe, member: Member) -> None:
        self._retire(probe)
        if probe.routine:
            missing = len(probe.helpers) - len(probe.nacks)
            self.view.feel(missing if probe.helpers else 1)
        self.judge.missed(member, probe.sent_at)

    def _retire(self, probe: Probe) -> None:
        """No verdict hangs on it any more, but a late ack still proves life."""
        del self.probes[probe.nonce]
        self.view.timers.cancel(("probe", probe.nonce))
        contact = self.view.contacts.get(probe.target)
        if contact is not None and contact.probe == probe.nonce:
            contact.probe = None
        self._spent[probe.nonce] = probe
        if len(self._spent) > _SPENT_MAX:
            self._spent.popitem(last=False)

    def forget(self, node: int) -> None:
        """The member is gone: so is my question to it."""
        contact = self.view.contacts.get(node)
        if contact is not None and contact.probe is not None:
            self._retire(self.probes[contact.probe])

    def void(self) -> None:
        """I slept: no open probe proves anything about anybody."""
        for probe in list(self.probes.values()):
            self._retire(probe)

    # answering

    def on_ping(self, m: wire.Ping, sender: int, addr: Addr, reply: list[bytes]) -> None:
        """Answers who I am to a member that means me."""
        view = self.view
        if m.target != view.id:
            view.count("misdirected", sender, addr)
            return
        member = view.members.get(sender)
        if member is None:
            tomb = view.tombstones.get(sender)
            if tomb is not None and m.incarnation <= tomb.incarnation:
                reply.append(wire.encode(wire.Buried(sender, tomb.incarnation)))
            return
        view.contacts[sender].heard = addr
        me = view.me
        record = me.record
        sig = view.sign(wire.ack_statement(view.mesh, m.nonce, view.id, record.incarnation))
        reply.append(
            wire.encode(
                wire.Ack(m.nonce, view.id, record.incarnation, record.version, sig, view.hash, me.vitals)
            )
        )
        view.note_vitals(member, m.vitals)
        self._compare(sender, member, m.incarnation, m.version, m.view, reply)

    def on_ack(self, m: wire.Ack, sender: int, addr: Addr, reply: list[bytes]) -> None:
        """Takes an ack of my own probe as proof of life, and passes on the ack of another's."""
        view = self.view
        nonce, attempt = m.nonce & ~ATTEMPT, m.nonce & ATTEMPT
        probe = self.probes.get(nonce) or self._spent.get(nonce)
        if probe is None:
            relay = self._relays.get(m.nonce)
            if relay is not None and relay.target == m.node:
                del self._relays[m.nonce]
                view.timers.cancel(("relay", m.nonce))
                view.send(relay.origin, [wire.encode(m)])
            else:
                view.counters["unasked_ack"] += 1
            return
        member = view.members.get(probe.target)
        if member is None:
            return
        statement = wire.ack_statement(view.mesh, m.nonce, m.node, m.incarnation)
        if m.node != probe.target or not view.verify(member.record.pub, statement, m.sig):
            view.count("forged_ack", sender, addr)
            return
        asked = nonce in self.probes
        if asked:
            self._retire(probe)
            if probe.routine:
                view.feel(-1)
        direct = sender == m.node and (addr in probe.addrs or addr in member.record.addrs)
        current = m.incarnation == member.record.incarnation
        if asked and direct and attempt < len(probe.pinged_at):
            rtt = view.now - probe.pinged_at[attempt]
            member.rtt_s = rtt if member.rtt_s is None else member.rtt_s + (rtt - member.rtt_s) / 8
        view.note_vitals(member, m.vitals)
        self.judge.alive(probe.target, member, probe.sent_at, addr if direct and current else None)
        if sender == m.node:
            self._compare(sender, member, m.incarnation, m.version, m.view, reply)

    def _compare(
        self, node: int, member: Member, incarnation: int, version: int, seen: int, reply: list[bytes]
    ) -> None:
        """What the other's newest record and view are, against what I hold of it."""
        view, record = self.view, member.record
        if (incarnation, version) > (record.incarnation, record.version):
            reply.append(wire.encode(wire.Want([node])))
        elif incarnation < record.incarnation:
            reply.append(wire.encode(wire.Update(member.signed)))
        elif member.state is State.DEAD:
            reply.append(wire.encode(wire.Buried(node, incarnation)))
        elif seen != view.hash:
            self.differs(node)

    def on_request(self, m: wire.PingRequest, sender: int, addr: Addr, reply: list[bytes]) -> None:
        """Probes for another, and says so when it hears nothing."""
        view = self.view
        target = view.members.get(m.target)
        where = view.addr_of(target) if target is not None else None
        if sender not in view.members or m.target == view.id:
            view.count("misdirected", sender, addr)
            return
        if where is None or len(self._relays) >= _RELAYS_MAX or m.nonce in self.probes:
            reply.append(wire.encode(wire.Nack(m.nonce)))
            return
        self._relays[m.nonce] = Relay(m.target, addr)
        view.send(where, [self.ping(m.nonce, m.target), *self.judge.reminder(m.target)])
        view.timers.set(("relay", m.nonce), view.now + 0.8 * view.config.probe_timeout_s)

    def relay_due(self, nonce: int) -> None:
        relay = self._relays.get(nonce)
        if relay is None:
            return
        if relay.nacked:
            del self._relays[nonce]
            return
        relay.nacked = True
        self.view.send(relay.origin, [wire.encode(wire.Nack(nonce))])
        self.view.timers.set(("relay", nonce), self.view.now + 2 * self.view.config.probe_interval_s)

    def on_nack(self, m: wire.Nack, sender: int) -> None:
        probe = self.probes.get(m.nonce)
        if probe is not None and sender in probe.helpers:
            probe.nacks.add(sender)
