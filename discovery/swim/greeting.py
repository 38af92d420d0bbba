"""First contact: greeting seeds until one answers, and greeting the dead now and then, so that every split
heals."""

from __future__ import annotations

from collections import OrderedDict
from math import inf

from discovery import wire
from discovery.member import Addr, Record
from discovery.swim import effects as fx
from discovery.swim.judge import Judge
from discovery.swim.probing import NONCE_BITS
from discovery.swim.rules import dialable, same_host
from discovery.swim.view import View

_SEEDS_MAX = 64
_SEEDS_AT_ONCE = 16
_OPEN_MAX = 256
_STRANGERS_MAX = 1_024
_STRANGER_SPACING_S = 5.0
_ANSWERS_PER_S = 100.0
_ANSWERS_BURST = 300.0
_INTRODUCTIONS = 3
"""Datagrams of members' records that follow the answer to a hello; the rest comes by push/pull."""
_SYNC_PATIENCE_S = 2.0


class Greeter:
    """Seeds, hellos under way, and the rate of answers."""

    def __init__(self, view: View, judge: Judge) -> None:
        self.view, self.judge = view, judge
        self.seeds: dict[Addr, int | None] = {}
        """Seed addresses, and who answered there."""
        self._open: OrderedDict[int, tuple[Addr, float]] = OrderedDict()
        self._strangers: OrderedDict[Addr, float] = OrderedDict()
        self._wait = view.config.join_retry_min_s
        self._tokens, self._tokens_at = _ANSWERS_BURST, view.now
        self._expected = inf

    def join(self, addrs: list[Addr]) -> None:
        """Adds seeds and greets them now."""
        view = self.view
        own = {(host, port) for host, port in view.me.record.addrs}
        new = not (view.synced and view.ring)
        for addr in addrs:
            if addr in own or not dialable(addr, True):
                continue
            if len(self.seeds) >= _SEEDS_MAX and addr not in self.seeds:
                del self.seeds[next(iter(self.seeds))]
            new = new or addr not in self.seeds
            self.seeds.setdefault(addr, None)
        if new:
            self._wait = view.config.join_retry_min_s
        if self.seeds:
            view.timers.set("join", view.now)

    def is_me(self, addr: Addr) -> None:
        """My own words came back from there: that seed is myself."""
        self.seeds.pop(addr, None)

    def join_due(self) -> None:
        """Greets the seeds, and again later, until this node knows somebody; then for a while those alone where nobody
        answers, as a seed may be of another part of the mesh."""
        view = self.view
        known = view.synced and bool(view.ring)
        seeds = [addr for addr in self.seeds if not (known and self._met(addr))]
        if not seeds or view.leaving:
            return
        for addr in view.rng.sample(seeds, min(len(seeds), _SEEDS_AT_ONCE)):
            self.greet(addr)
        if known and self._wait >= view.config.join_retry_max_s:
            return
        view.timers.set("join", view.now + self._wait * (0.75 + view.rng.random() / 2))
        self._wait = min(self._wait * 2, view.config.join_retry_max_s)

    def alone(self) -> None:
        """The last member is gone: back to the seeds."""
        if self.seeds and not self.view.leaving:
            self._wait = self.view.config.join_retry_min_s
            self.view.timers.sooner("join", self.view.now + self._wait)

    def redial_due(self) -> None:
        """Greets one who is held dead, or a seed where no present member answered: it may be a split that is over."""
        view = self.view
        view.timers.set("redial", view.now + view.config.redial_interval_s * (0.9 + view.rng.random() / 5))
        dead: list[int | Addr] = [node for node, tomb in view.tombstones.items() if not tomb.final]
        dead += [addr for addr, answered in self.seeds.items() if not self._present(answered)]
        if not dead:
            return
        chosen = view.rng.choice(dead)
        if not isinstance(chosen, int):
            self.greet(chosen)
            return
        record = view.tombstones[chosen].record
        for addr in self._addrs(record)[:_INTRODUCTIONS]:
            self.greet(addr)

    def _met(self, addr: Addr) -> bool:
        """Whether a present member has answered at this seed."""
        node = self.view.by_addr.get(addr)
        member = self.view.members.get(node) if node is not None else None
        return self._present(self.seeds[addr]) or (
            member is not None and member.present and member.addr == addr
        )

    def _present(self, node: int | None) -> bool:
        member = self.view.members.get(node) if node is not None else None
        return member is not None and member.present

    def _addrs(self, record: Record) -> list[Addr]:
        near = same_host(record, self.view.me.record)
        return [addr for addr in record.addrs if dialable(addr, near)]

    def greet(self, addr: Addr) -> None:
        """Sends a hello; its nonce is good for the answer from there."""
        view = self.view
        nonce = view.rng.getrandbits(NONCE_BITS)
        self._open[nonce] = (addr, view.now)
        if len(self._open) > _OPEN_MAX:
            self._open.popitem(last=False)
        view.send_all(addr, [wire.encode(wire.Hello(nonce, view.me.signed))])

    def stranger(self, addr: Addr) -> None:
        """Somebody whom I don't know talks to me: nothing but a hello, and seldom."""
        view = self.view
        last = self._strangers.get(addr, -inf)
        if view.now < last + _STRANGER_SPACING_S or not self._may_answer():
            return
        self._strangers.pop(addr, None)
        self._strangers[addr] = view.now
        if len(self._strangers) > _STRANGERS_MAX:
            self._strangers.popitem(last=False)
        self.greet(addr)

    def _may_answer(self) -> bool:
        now = self.view.now
        self._tokens = min(_ANSWERS_BURST, self._tokens + (now - self._tokens_at) * _ANSWERS_PER_S)
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def on_hello(self, m: wire.Hello, sender: int, addr: Addr) -> None:
        """Answers with my record, and some of the others' for a start."""
        view = self.view
        if not self._may_answer():
            view.count("hello_flood", sender, addr)
            return
        record = view.admit(m.record, sender, addr)
        if record is None:
            return
        if record.id != sender or sender == view.id:
            view.count("not_its_own", sender, addr)
            return
        view.learn(m.record, sender, addr)
        if not view.synced and sender in view.members:
            self._found(sender)
        statement = wire.hello_statement(view.mesh, m.nonce, sender, view.id)
        others = [node for node in view.ring if node != sender]
        answer = wire.encode(wire.HelloAck(m.nonce, view.me.signed, view.sign(statement), len(others)))
        view.send_all(addr, [answer, *self.claim(record)])
        if not others:
            return
        room = _INTRODUCTIONS * (view.config.max_body_bytes - wire.HEADER_MAX_BYTES)
        parts = []
        for node in view.some(min(len(others), 32), but=(sender,)):
            part = wire.encode(wire.Update(view.members[node].signed))
            room -= len(part)
            if room < 0:
                break
            parts.append(part)
        view.send_all(addr, parts)

    def claim(self, record: Record) -> list[bytes]:
        """What to tell somebody whose record a tombstone of mine bars: take a higher incarnation."""
        tomb = self.view.tombstones.get(record.id)
        if tomb is None or record.incarnation > tomb.incarnation:
            return []
        return [wire.encode(wire.Buried(record.id, tomb.incarnation))]

    def on_hello_ack(self, m: wire.HelloAck, sender: int, addr: Addr, reply: list[bytes]) -> None:
        """My hello is answered: a member, alive at that address."""
        view = self.view
        asked = self._open.pop(m.nonce, None)
        if asked is None:
            view.counters["unasked_ack"] += 1
            return
        where, asked_at = asked
        record = view.admit(m.record, sender, addr)
        if record is None or record.id == view.id:
            return
        statement = wire.hello_statement(view.mesh, m.nonce, view.id, record.id)
        if record.id != sender or not view.verify(record.pub, statement, m.sig):
            view.count("forged_ack", sender, addr)
            return
        view.learn(m.record, sender, addr)
        if where in self.seeds:
            self.seeds[where] = record.id
        reply += self.claim(record)
        member = view.members.get(record.id)
        if member is None or not member.present:
            return
        current = member.record.incarnation == record.incarnation
        self.judge.alive(record.id, member, asked_at, addr if current and addr == where else None)
        if not view.synced:
            self._expected = min(self._expected, m.members)
            self._found(record.id)
            self.introduced()

    def _found(self, node: int) -> None:
        """The first contact of all: compare views, and don't wait for that for ever."""
        view = self.view
        view.effects.append(fx.PushPull(node))
        if self.seeds:
            view.timers.sooner("synced", view.now + _SYNC_PATIENCE_S)
        else:
            self.synced()

    def introduced(self) -> None:
        """Whether all those that the first to answer knows of are known by now."""
        if not self.view.synced and len(self.view.ring) > self._expected:
            self.synced()

    def synced(self) -> None:
        """This node knows its mesh."""
        if not self.view.synced:
            self.view.synced = True
            self.view.ring_changed = True
            self.view.timers.cancel("synced")
            self.view.effects.append(fx.Synced())
