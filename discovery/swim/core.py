"""The engine's face: inputs with a clock reading go in, effects and the next deadline come out.

One input is one turn: `receive`, `wake` and the rest set the time, let the parts work on the view, and leave
effects behind for `drain`. The engine never reads a clock, opens a socket or draws randomness of its own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any

from discovery import wire
from discovery.errors import LocalError, RemoteError
from discovery.lifecycle import State
from discovery.member import Addr, Member, Record, Vitals
from discovery.swim import effects as fx
from discovery.swim.config import SwimConfig, vitals_spacing_s
from discovery.swim.greeting import Greeter
from discovery.swim.judge import Judge
from discovery.swim.notes import Aging, Keeper
from discovery.swim.probing import NONCE_BITS, Prober
from discovery.swim.rules import Tombstone
from discovery.swim.syncing import Syncer
from discovery.swim.view import Sign, Verify, View

_DIRECTLY_TOLD = 5


class Swim:
    """One member of one gossip pool, without I/O.

    `record` is the node's first own record: its incarnation is the persisted one + 1, already durable. Times
    are monotonic seconds that never go back. `rng` must be seeded from the operating system outside tests:
    nonces come from it.
    """

    def __init__(
        self,
        *,
        record: Record,
        sign: Sign,
        verify: Verify,
        config: SwimConfig,
        rng: random.Random,
        now: float,
    ) -> None:
        view = self.view = View(record, sign, verify, config, rng, now)
        self.config = config
        self._judge = Judge(view)
        self._prober = Prober(view, self._judge)
        self._greeter = Greeter(view, self._judge)
        self._syncer = Syncer(view, self._judge, self._greeter)
        self._judge.look = self._prober.look
        self._prober.differs = self._syncer.differs
        view.renewed = self._renewed
        view.gone = self._gone
        view.hears_of_itself = self._hears_of_itself
        self._told: Vitals | None = None
        self._told_at = -inf
        self._load_seq = 0
        self._goodbye: dict[int, int] = {}
        self._left = False
        self.left_acked = 0
        """How many members have acknowledged the goodbye."""
        view.timers.set("tick", now + config.probe_interval_s * rng.random())
        view.timers.set("push_pull", now + config.push_pull_interval_s * (0.5 + rng.random()))
        view.timers.set("redial", now + config.redial_interval_s * (0.5 + rng.random()))
        self._on: dict[type, Callable[[Any, int, Addr, list[bytes]], None]] = {
            wire.Ping: self._prober.on_ping,
            wire.Ack: self._prober.on_ack,
            wire.PingRequest: self._prober.on_request,
            wire.Nack: lambda m, sender, addr, reply: self._prober.on_nack(m, sender),
            wire.Hello: lambda m, sender, addr, reply: self._greeter.on_hello(m, sender, addr),
            wire.HelloAck: self._greeter.on_hello_ack,
            wire.Update: self._on_update,
            wire.Accuse: self._on_accuse,
            wire.Seen: lambda m, sender, addr, reply: self._judge.seen(m, sender, addr),
            wire.Buried: self._on_buried,
            wire.Goodbye: self._on_goodbye,
            wire.GoodbyeAck: self._on_goodbye_ack,
            wire.Want: self._on_want,
            wire.Load: self._on_load,
            wire.Note: lambda m, sender, addr, reply: self._syncer.hear(m, sender),
        }

    # what may be looked at

    @property
    def me(self) -> Member:
        """This node's own row."""
        return self.view.me

    @property
    def members(self) -> Mapping[int, Member]:
        """The others by id, the Dead not yet evicted included."""
        return self.view.members

    @property
    def tombstones(self) -> Mapping[int, Tombstone]:
        """Who is gone, by id; of the Dead still in view too."""
        return self.view.tombstones

    @property
    def counters(self) -> Counter[str]:
        """What was refused or dropped, by reason code."""
        return self.view.counters

    @property
    def awareness(self) -> int:
        """Lifeguard's doubt about this node's own health: 0 is well."""
        return self.view.awareness

    @property
    def synced(self) -> bool:
        """Whether this node has exchanged views with another since it started."""
        return self.view.synced

    # inputs

    def receive(self, body: bytes, sender: int, addr: Addr, now: float) -> None:
        """One opened datagram: `sender` is who sealed it, `addr` where it came from."""
        self._turn(now)
        view = self.view
        if sender == view.id:
            view.count("own_echo", sender, addr)
            self._greeter.is_me(addr)
            return
        try:
            messages, skipped = wire.decode(body)
        except RemoteError:
            view.count("malformed", sender, addr)
            return
        for code in skipped:
            view.count(code, sender, addr)
        if self._left or view.leaving:
            for m in messages:
                if type(m) is wire.GoodbyeAck:
                    self._on_goodbye_ack(m, sender, addr, [])
            return
        known = sender in view.members
        reply: list[bytes] = []
        for m in messages:
            if known or type(m) not in _MEMBERS_ONLY:
                self._on[type(m)](m, sender, addr, reply)
                known = known or sender in view.members
            elif type(m) is wire.Ping and sender in view.tombstones:
                self._prober.on_ping(m, sender, addr, reply)
        if reply:
            view.send(addr, list(dict.fromkeys(reply)))
        if not known and sender not in view.tombstones:
            self._greeter.stranger(addr)
        if not view.synced:
            self._greeter.introduced()

    def datagram_refused(self, addr: Addr, now: float) -> None:
        """ICMP says that nothing listens at `addr`: anybody may forge that, so it only makes us look."""
        self._turn(now)
        node = self.view.by_addr.get(addr)
        if node is not None and not self.view.leaving:
            self._judge.suspicious(node)

    def link_opened(self, node: int, addr: Addr, now: float) -> None:
        """A link to or from this member is up: its key is proven. `addr` counts where one of its ports is
        dialled."""
        self._turn(now)
        member = self.view.members.get(node)
        if member is not None:
            dialled = any(addr[1] == port for _, port in member.record.addrs)
            self._judge.alive(node, member, now, addr if dialled and member.present else None)
            self._tell_the_dead(member)

    def link_answered(self, node: int, now: float) -> None:
        """An answer came over a link."""
        self._turn(now)
        member = self.view.members.get(node)
        if member is not None:
            self._judge.alive(node, member, now, None)
            self._tell_the_dead(member)

    def link_closed(self, node: int, now: float) -> None:
        """A link closed that this node did not close itself."""
        self._turn(now)
        if not self.view.leaving:
            self._judge.suspicious(node)

    def connect_result(self, node: int, incarnation: int, addr: Addr, outcome: str, now: float) -> None:
        """The outcome ("refused", "open", anything else: no answer) of one address of a `Connect`."""
        self._turn(now)
        if not self.view.leaving:
            self._judge.connected(node, incarnation, addr, outcome)

    def join(self, addrs: list[Addr], now: float) -> None:
        """Seeds to greet, now and for ever until somebody answers."""
        self._turn(now)
        self._greeter.join(addrs)

    def greet(self, node: int, now: float) -> None:
        """Introduces this node to one member anew: it does not seem to know us."""
        self._turn(now)
        member = self.view.members.get(node)
        addr = self.view.addr_of(member) if member is not None else None
        if addr is not None and not self.view.leaving:
            self._greeter.greet(addr)

    def goodbye(self) -> bytes:
        """After `leave`: the goodbye as a body, to be handed over by other ways too."""
        return wire.join([wire.encode(wire.Goodbye(0, self.view.me.signed))])

    def update_self(self, now: float, **changes: object) -> Record:
        """A new version of my own record (fields of `Record`), signed, broadcast and told a few members
        directly."""
        self._turn(now)
        if (
            changes.get("state") in (State.DEAD, State.LEAVING)
            or {"pub", "mesh", "incarnation"} & changes.keys()
        ):
            raise LocalError(f"not for a node to say of itself this way: {', '.join(changes)}")
        view = self.view
        record = view.restate(**changes)
        for node in view.some(_DIRECTLY_TOLD):
            addr = view.addr_of(view.members[node])
            if addr is not None:
                view.send(addr, [])
        return record

    def set_vitals(self, vitals: Vitals, now: float) -> None:
        """My load: rides on every probe, and is gossiped when it has changed enough."""
        self._turn(now)
        self.view.me.vitals, self.view.me.vitals_at = vitals, now
        self._tell_load()

    def keep_notes(self, keeper: Keeper) -> None:
        """Who judges notes and gives those that a push/pull carries; without one they are dropped."""
        self.view.keeper = keeper

    def spread(self, topic: int, subject: str, body: bytes, now: float, age_s: float = 0.0) -> None:
        """Broadcasts a note of mine to everybody."""
        self._turn(now)
        self.view.spread(Aging(topic, subject, body, now - age_s))

    def send_note(
        self, nodes: Iterable[int], topic: int, subject: str, body: bytes, now: float, age_s: float = 0.0
    ) -> None:
        """A note to these members directly, once; those not in view are passed over."""
        self._turn(now)
        part = Aging(topic, subject, body, now - age_s).at(now)
        for node in nodes:
            member = self.view.members.get(node)
            addr = self.view.addr_of(member) if member is not None and member.present else None
            if addr is not None:
                self.view.send(addr, [part])

    def leave(self, now: float) -> None:
        """Says goodbye to every member; `LeaveDone` follows. This node is silent afterwards."""
        self._turn(now)
        view = self.view
        if view.leaving:
            return
        view.restate(state=State.LEAVING)
        view.leaving = view.ring_changed = True
        view.timers.clear()
        self._goodbye = {node: view.rng.getrandbits(NONCE_BITS) for node in view.ring}
        self._say_goodbye()
        view.timers.set("resend", now + self.config.leave_resend_s)
        view.timers.set("left", now + self.config.leave_wait_s)
        if not self._goodbye:
            self._leave_done()

    def push_pull_request(self, now: float) -> bytes:
        """The body to call another member's push/pull with."""
        self._turn(now)
        return self._syncer.request()

    def push_pull_answer(self, body: bytes, sender: int, now: float) -> bytes:
        """The answer to a member's request; `sender` is whom the link belongs to."""
        self._turn(now)
        return b"\x90" if self.view.leaving else self._syncer.answer(body, sender)

    def push_pull_merge(self, body: bytes, sender: int, now: float) -> None:
        """Takes in the answer of `sender`: also a proof that it lives."""
        self._turn(now)
        if self.view.leaving:
            return
        self._syncer.merge(body, sender)
        member = self.view.members.get(sender)
        if member is not None:
            self._judge.alive(sender, member, now, None)

    def wake(self, now: float) -> None:
        """Does what is due. May be called at any time."""
        self._turn(now)
        timers = self.view.timers
        for _ in range(10_000):
            due = timers.pop(now)
            if due is None:
                return
            self._due(*due)

    def deadline(self) -> float:
        """When to call `wake` next: infinity after the goodbye."""
        return self.view.timers.next()

    def drain(self) -> list[fx.Effect]:
        """Effects since the last drain, in the order in which they must be carried out."""
        view = self.view
        if view.ring_changed:
            view.sentinels()
            if not view.ring:
                self._greeter.alone()
        out, view.effects = view.effects, []
        return out

    # time

    def _turn(self, now: float) -> None:
        """Sets the time. Waking later than one probe interval means that this node slept, not that others
        died."""
        view = self.view
        gap = now - view.timers.next()
        view.now = max(now, view.now)
        if gap > self.config.probe_interval_s:
            view.counters["paused"] += 1
            view.timers.shift(gap)
            self._prober.void()
            self._judge.paused(gap)

    def _due(self, key: Any, at: float) -> None:
        what, node = key if type(key) is tuple else (key, 0)
        if what == "probe":
            self._prober.due(node, at)
        elif what == "gossip":
            self.view.gossip()
        elif what == "tick":
            self._prober.tick(at)
        elif what == "meet":
            self._prober.meet(node)
        elif what == "relay":
            self._prober.relay_due(node)
        elif what == "suspect":
            self._judge.due(node)
        elif what == "look":
            self._prober.look(node, at)
        elif what == "push_pull":
            self._syncer.due()
        elif what == "redial":
            self._greeter.redial_due()
        elif what == "join":
            self._greeter.join_due()
        elif what == "evict":
            self.view.evict(node)
        elif what == "excuse":
            self._judge.excuse_over(node)
        elif what == "refute":
            self._judge.refute_due()
        elif what == "load":
            self._tell_load()
        elif what == "synced":
            self._greeter.synced()
        elif what == "tombstones":
            self.view.expire_tombstones()
        elif what == "resend":
            self._say_goodbye()
        elif what == "left":
            self._leave_done()

    # what a change of the view means to the other parts

    def _renewed(self, member: Member, reborn: bool) -> None:
        if reborn:
            self._prober.joined(member.id)
        self._judge.renewed(member, reborn)

    def _gone(self, node: int) -> None:
        self._prober.forget(node)
        self._judge.forget(node)

    def _hears_of_itself(self, record: Record) -> None:
        """Somebody holds a record of mine that isn't my newest: from before a lost disk, or a twin's."""
        mine = self.view.me.record
        if (record.incarnation, record.version) >= (mine.incarnation, mine.version):
            self._judge.refute(record.incarnation)

    def _tell_the_dead(self, member: Member) -> None:
        """Whom I hold dead has answered: a higher incarnation of its own making brings it back."""
        addr = self.view.addr_of(member)
        if member.state is State.DEAD and addr is not None and not self.view.leaving:
            buried = wire.Buried(member.id, member.record.incarnation)
            self.view.send(addr, [wire.encode(buried)])

    # messages

    def _on_update(self, m: wire.Update, sender: int, addr: Addr, reply: list[bytes]) -> None:
        view = self.view
        was_gone = sender in view.tombstones
        record = view.learn(m.record, sender, addr)
        if record is not None and record.id == sender and was_gone and sender not in view.tombstones:
            view.effects.append(fx.PushPull(sender))

    def _on_accuse(self, m: wire.Accuse, sender: int, addr: Addr, reply: list[bytes]) -> None:
        self._judge.heard(m, sender, addr)
        if m.target == self.view.id and m.incarnation < self.view.me.record.incarnation:
            reply.append(wire.encode(wire.Update(self.view.me.signed)))

    def _on_buried(self, m: wire.Buried, sender: int, addr: Addr, reply: list[bytes]) -> None:
        if m.target != self.view.id:
            self.view.count("misdirected", sender, addr)
            return
        self._judge.claimed(m.incarnation, sender, addr)
        if m.incarnation < self.view.me.record.incarnation:
            reply.append(wire.encode(wire.Update(self.view.me.signed)))

    def _on_goodbye(self, m: wire.Goodbye, sender: int, addr: Addr, reply: list[bytes]) -> None:
        record = self.view.admit(m.record, sender, addr)
        if record is None:
            return
        if record.id != sender or record.state is not State.LEAVING:
            self.view.count("forged_goodbye", sender, addr)
            return
        self.view.learn(m.record, sender, addr)
        reply.append(wire.encode(wire.GoodbyeAck(m.nonce)))

    def _on_want(self, m: wire.Want, sender: int, addr: Addr, reply: list[bytes]) -> None:
        self.view.send_all(addr, self._syncer.records_of(m.ids))

    # vitals

    def _tell_load(self) -> None:
        view = self.view
        vitals = view.me.vitals
        if vitals is None or view.leaving or not self._material(vitals):
            return
        wait = self._told_at + vitals_spacing_s(view.n, self.config) - view.now
        if wait > 0:
            view.timers.sooner("load", view.now + wait)
            return
        self._told, self._told_at = vitals, view.now
        self._load_seq += 1
        view.say_load(view.id, wire.Load(view.id, view.me.record.incarnation, self._load_seq, vitals))

    def _material(self, vitals: Vitals) -> bool:
        told = self._told
        if told is None:
            return True
        if (vitals.daemons_running, vitals.daemons_total) != (told.daemons_running, told.daemons_total):
            return True
        step = self.config.vitals_step_permille
        pairs = ((vitals.cpu, told.cpu), (vitals.mem, told.mem), (vitals.disk, told.disk))
        return any(
            (new is None) != (old is None) or (new is not None and old is not None and abs(new - old) >= step)
            for new, old in pairs
        )

    def _on_load(self, m: wire.Load, sender: int, addr: Addr, reply: list[bytes]) -> None:
        view = self.view
        member = view.members.get(m.node)
        if member is None or not member.present or m.incarnation != member.record.incarnation:
            return
        contact = view.contacts[m.node]
        if (m.incarnation, m.seq) > contact.load:
            contact.load = (m.incarnation, m.seq)
            view.note_vitals(member, m.vitals)
            view.say_load(m.node, m)

    # goodbye

    def _say_goodbye(self) -> None:
        view = self.view
        for node, nonce in self._goodbye.items():
            addr = view.addr_of(view.members[node])
            if addr is not None:
                view.send_all(addr, [wire.encode(wire.Goodbye(nonce, view.me.signed))])

    def _on_goodbye_ack(self, m: wire.GoodbyeAck, sender: int, addr: Addr, reply: list[bytes]) -> None:
        if self._goodbye.get(sender) != m.nonce:
            return
        del self._goodbye[sender]
        self.left_acked += 1
        if self.left_acked >= self.config.leave_acks or not self._goodbye:
            self._leave_done()

    def _leave_done(self) -> None:
        if not self._left:
            self._left = True
            self.view.timers.clear()
            self.view.effects.append(fx.LeaveDone())


_MEMBERS_ONLY = frozenset(
    (wire.Ping, wire.Ack, wire.PingRequest, wire.Nack, wire.Want, wire.Load, wire.Note, wire.GoodbyeAck)
)
