"""Who is suspected, on whose word, and when suspicion becomes Dead.

Nobody is dead here because another says so. An accusation, signed by its accuser, makes this node look for
itself; it concludes `exited` from enough signed refusals that its own look doesn't contradict, and `silent`
when the suspicion timeout runs out while its own probe goes unanswered. So a liar can make nodes look, and
cannot make them see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from discovery import wire
from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Member
from discovery.swim import effects as fx
from discovery.swim.config import refusals_needed, suspicion_timeout_s
from discovery.swim.rules import bears_witness
from discovery.swim.view import Contact, View

_MEMORY_MAX = 8_192
_ACCUSATIONS_MAX = 16
_CONNECT_PATIENCE_S = 5.0
_CONNECT_SPACING_S = 0.5
_REFUSAL_FRESH_S = 1.0
_FEEL_SPACING_S = 5.0
"""Being accused is a sign of my own bad health, but liars must not make a node doubt itself for long."""
_WITNESSES_TOLD = 3
_AFTER_S = 0.01
"""A verdict waits this much longer than the probe that it waits for."""
_JUMP_MAX = 65_536
"""Another's claim moves my incarnation by no more than this; a record signed by myself by any step."""


@dataclass(slots=True)
class Suspicion:
    """One member under suspicion at one incarnation. Times are monotonic seconds of this node."""

    target: int
    incarnation: int
    started: float
    accusations: dict[int, wire.Accuse] = field(default_factory=dict)
    """By accuser, oneself included."""
    refusal_at: float = -inf
    """When the newest refusal was heard of: only a question asked later contradicts it."""
    failed_asked_at: float = -inf
    """When my newest probe that failed was sent."""
    refused_me: bool = False
    opened_to_me: bool = False
    last_word_at: float = inf
    """When the probe that decides was sent."""
    expires: float = inf


class Judge:
    """Suspicions, and the memory of what was said in them."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.suspicions: dict[int, Suspicion] = {}
        self.look: Callable[[int, float], None] = lambda node, since: None
        """Starts a probe of a member unless one sent since then is open; set by the engine."""
        self._heard: dict[tuple[int, int, int], int] = {}
        self._voids: dict[tuple[int, int, int], int] = {}
        self._stamp = min(view.me.record.incarnation, 2**40) << 20
        self._refuted_at = -inf
        self._refute_to = -1
        self._felt_at = -inf

    # accusing

    def excused(self, member: Member) -> bool:
        """Whether it announced that it would be away: Updating, inside its own signed deadline."""
        record, config = member.record, self.view.config
        if member.state is not State.UPDATING or record.deadline_ms is None:
            return False
        return self.view.now < member.received + min(record.deadline_ms / 1000, config.update_deadline_max_s)

    def missed(self, member: Member, asked_at: float) -> None:
        """My own probe, sent at `asked_at`, timed out on time."""
        if not member.present or self.excused(member):
            return
        case = self.suspicions.get(member.id) or self._open(member)
        case.failed_asked_at = asked_at
        if self.view.id not in case.accusations and len(case.accusations) <= self.view.config.confirmations:
            self._accuse(member, case, [])
        if self._exited(member, case):
            return
        if self.view.now >= case.expires - 1e-6 and asked_at >= case.last_word_at:
            self._silent(member, case)

    def _accuse(self, member: Member, case: Suspicion, refused: list[Addr]) -> None:
        view = self.view
        self._stamp += 1
        statement = wire.accuse_statement(
            view.mesh, member.id, case.incarnation, view.id, self._stamp, refused
        )
        accusation = wire.Accuse(
            target=member.id,
            incarnation=case.incarnation,
            accuser=view.id,
            stamp=self._stamp,
            refused=refused,
            sig=view.sign(statement),
        )
        case.accusations[view.id] = accusation
        others = sum(1 for a in case.accusations.values() if a.refused) - bool(refused)
        if not refused or others < 2:
            view.say(("accuse", member.id, view.id), accusation)
        self._retime(member, case)

    def _open(self, member: Member) -> Suspicion:
        view = self.view
        case = Suspicion(member.id, member.record.incarnation, view.now)
        self.suspicions[member.id] = case
        member.suspect_since = view.now
        view.effects.append(self._same(member))
        self._retime(member, case)
        return case

    def _retime(self, member: Member, case: Suspicion) -> None:
        """The timeout with as many confirmations as there are now; the deciding probe is sent one probe
        ahead of it."""
        view = self.view
        confirmed = min(max(0, len(case.accusations) - 1), view.config.confirmations)
        case.expires = case.started + suspicion_timeout_s(view.n, confirmed, view.config)
        if case.last_word_at == inf:
            at = max(view.now, case.expires - view.scaled(view.config.probe_interval_s))
            view.timers.set(("suspect", member.id), at)
        else:
            view.timers.sooner(("suspect", member.id), max(view.now, case.expires + _AFTER_S))

    def due(self, node: int) -> None:
        """Time for the last word: a probe sent now decides when it has timed out."""
        member, case = self.view.members.get(node), self.suspicions.get(node)
        if member is None or case is None:
            return
        now = self.view.now
        case.last_word_at = min(case.last_word_at, now)
        self.look(node, case.last_word_at)
        wait = max(case.expires - now, self.view.scaled(self.view.config.probe_interval_s))
        self.view.timers.set(("suspect", node), now + wait + _AFTER_S)
        if case.failed_asked_at >= case.last_word_at and now >= case.expires:
            self._silent(member, case)

    # verdicts

    def _silent(self, member: Member, case: Suspicion) -> None:
        by = tuple(sorted({*case.accusations, self.view.id}))
        self.view.bury(member, Evidence.SILENT, by, list(case.accusations.values()))

    def _exited(self, member: Member, case: Suspicion) -> bool:
        refusals = [a for a in case.accusations.values() if a.refused]
        if len(refusals) < refusals_needed(len(self.view.ring)) or case.opened_to_me:
            return False
        if not case.refused_me and case.failed_asked_at < case.refusal_at:
            return False
        for accusation in refusals[:_WITNESSES_TOLD]:
            self.view.say(("accuse", member.id, accusation.accuser), accusation)
        self.view.bury(member, Evidence.EXITED, tuple(sorted(a.accuser for a in refusals)), refusals)
        return True

    def forget(self, node: int) -> None:
        """The member is gone, one way or another; with one fewer in the pool, other cases may be ripe."""
        self._close(node)
        if len(self.view.ring) == 1:
            for case in list(self.suspicions.values()):
                member = self.view.members.get(case.target)
                if member is not None and member.present:
                    self._exited(member, case)

    def _close(self, node: int) -> Suspicion | None:
        case = self.suspicions.pop(node, None)
        if case is not None:
            self.view.timers.cancel(("suspect", node))
        return case

    def _clear(self, node: int) -> Suspicion | None:
        """It lives: the accusations need not be passed on."""
        case = self._close(node)
        for accuser in case.accusations if case else ():
            self.view.news.drop(("accuse", node, accuser))
        return case

    @staticmethod
    def _same(member: Member) -> fx.Changed:
        """Whether it is suspected has changed, its state has not."""
        return fx.Changed(member, member.state, member.state, incarnation=member.record.incarnation)

    # others' words

    def heard(self, a: wire.Accuse, sender: int | None, addr: Addr | None) -> None:
        """An accusation, from whoever passed it on."""
        view = self.view
        if a.target == view.id:
            self.claimed(a.incarnation, sender, addr)
            return
        member, accuser = view.members.get(a.target), view.members.get(a.accuser)
        if a.accuser == view.id or a.accuser == a.target or member is None or not member.present:
            return
        key = (a.target, a.incarnation, a.accuser)
        if a.incarnation != member.record.incarnation or self._heard.get(key, -1) >= a.stamp:
            return
        if accuser is None or not accuser.present:
            view.count("unknown_accuser", sender, addr)
            return
        statement = wire.accuse_statement(view.mesh, a.target, a.incarnation, a.accuser, a.stamp, a.refused)
        if not view.verify(accuser.record.pub, statement, a.sig):
            view.count("forged_accusation", sender, addr)
            return
        if self.excused(member):
            return
        self._remember(self._heard, key, a.stamp)
        if not all(bears_witness(at, accuser.record, member.record) for at in a.refused):
            view.count("no_witness", sender, addr)
            return
        view.say(("accuse", a.target, a.accuser), a)
        if self._voids.get(key, -1) >= a.stamp:
            return
        self._weigh(member, a)

    def _weigh(self, member: Member, a: wire.Accuse) -> None:
        view, now = self.view, self.view.now
        case = self.suspicions.get(member.id) or self._open(member)
        old = case.accusations.get(a.accuser)
        if old is None and len(case.accusations) >= _ACCUSATIONS_MAX and not a.refused:
            return
        if old is None or a.refused or not old.refused:
            case.accusations[a.accuser] = a
        self._retime(member, case)
        if not a.refused:
            wait = view.rng.random() * min(view.config.probe_interval_s, 0.002 * view.n)
            view.timers.sooner(("look", member.id), now + wait)
            return
        case.refusal_at = now
        self.look(member.id, now)
        contact = view.contacts[member.id]
        if now < contact.refused_at + _REFUSAL_FRESH_S:
            case.refused_me = True
        elif not case.refused_me:
            self.connect(member)
        self._exited(member, case)

    def seen(self, s: wire.Seen, sender: int | None, addr: Addr | None) -> None:
        """An accuser takes its refusals back."""
        view = self.view
        member, accuser = view.members.get(s.target), view.members.get(s.accuser)
        key = (s.target, s.incarnation, s.accuser)
        if s.accuser == view.id or member is None or accuser is None:
            return
        if s.incarnation != member.record.incarnation or self._voids.get(key, -1) >= s.stamp:
            return
        statement = wire.seen_statement(view.mesh, s.target, s.incarnation, s.accuser, s.stamp)
        if not view.verify(accuser.record.pub, statement, s.sig):
            view.count("forged_seen", sender, addr)
            return
        self._remember(self._voids, key, s.stamp)
        view.news.drop(("accuse", s.target, s.accuser))
        view.say(("seen", s.target, s.accuser), s)
        case = self.suspicions.get(s.target)
        held = case.accusations.get(s.accuser) if case else None
        if case is not None and held is not None and held.stamp <= s.stamp:
            del case.accusations[s.accuser]
            if case.accusations:
                self._retime(member, case)
            else:
                self._drop(member)

    @staticmethod
    def _remember(memory: dict[tuple[int, int, int], int], key: tuple[int, int, int], stamp: int) -> None:
        memory[key] = stamp
        if len(memory) > _MEMORY_MAX:
            for old in list(memory)[: _MEMORY_MAX // 4]:
                del memory[old]

    # signs of life

    def alive(self, node: int, member: Member, asked_at: float, addr: Addr | None) -> None:
        """An authenticated answer to a question asked at `asked_at`; `addr` is where it was asked and
        answered."""
        view = self.view
        member.last_seen = view.now
        contact = view.contacts[node]
        if addr is not None:
            if addr not in contact.proven and len(contact.proven) >= 8:
                del contact.proven[next(iter(contact.proven))]
            contact.proven[addr] = view.now
            if member.addr != addr:
                member.addr = addr
                view.by_addr[addr] = node
        if contact.stamp and asked_at >= contact.stamp_at:
            self._take_back(member, contact)
        case = self.suspicions.get(node)
        if case is None or asked_at < case.refusal_at or not member.present:
            return
        others = [a for accuser, a in case.accusations.items() if accuser != view.id]
        self._drop(member)
        where = view.addr_of(member)
        if others and where is not None:
            view.send(where, [wire.encode(a) for a in others[:2]])

    def reminder(self, node: int) -> list[bytes]:
        """What a suspected member is told with a probe: who accuses it, so that it can refute."""
        case = self.suspicions.get(node)
        return [wire.encode(a) for a in list(case.accusations.values())[:1]] if case else []

    def _take_back(self, member: Member, contact: Contact) -> None:
        view = self.view
        incarnation = member.record.incarnation
        statement = wire.seen_statement(view.mesh, member.id, incarnation, view.id, contact.stamp)
        message = wire.Seen(member.id, incarnation, view.id, contact.stamp, view.sign(statement))
        contact.stamp = 0
        view.news.drop(("accuse", member.id, view.id))
        view.say(("seen", member.id, view.id), message)

    def _drop(self, member: Member) -> None:
        self._clear(member.id)
        member.suspect_since = None
        self.view.effects.append(self._same(member))

    def renewed(self, member: Member, reborn: bool) -> None:
        """A newer record: a higher incarnation ends any suspicion, an announced update excuses."""
        view = self.view
        if (reborn or self.excused(member)) and self._clear(member.id) is not None:
            member.suspect_since = None
        if self.excused(member):
            assert member.record.deadline_ms is not None
            wait = min(member.record.deadline_ms / 1000, view.config.update_deadline_max_s)
            view.timers.set(("excuse", member.id), view.now + wait)
        else:
            view.timers.cancel(("excuse", member.id))

    def excuse_over(self, node: int) -> None:
        """The announced absence is over: look afresh."""
        member = self.view.members.get(node)
        if member is not None and member.present:
            self.connect(member)
            self.look(node, self.view.now)

    # fresh connects

    def suspicious(self, node: int) -> None:
        """A closed link, an ICMP refusal: proves nothing, and is reason enough to look at once."""
        member, case = self.view.members.get(node), self.suspicions.get(node)
        if case is not None and case.refused_me:
            return
        if member is not None and member.present and not self.excused(member):
            self.connect(member)

    def connect(self, member: Member) -> None:
        """Asks for fresh connects to every address at which this incarnation answered me (else to all I
        know)."""
        view = self.view
        contact = view.contacts[member.id]
        patience = _CONNECT_PATIENCE_S if contact.connecting else _CONNECT_SPACING_S
        if view.now < contact.connect_at + patience:
            return
        addrs = tuple(contact.proven) or tuple(view.addrs_of(member))
        if not addrs:
            return
        contact.connect_at = view.now
        contact.connecting, contact.connected = set(addrs), set(addrs)
        contact.refused, contact.connect_open = set(), False
        view.effects.append(fx.Connect(member.id, member.record.incarnation, addrs))

    def connected(self, node: int, incarnation: int, addr: Addr, outcome: str) -> None:
        """The result at one address; the last one concludes."""
        view = self.view
        member = view.members.get(node)
        if member is None or not member.present or member.record.incarnation != incarnation:
            return
        contact = view.contacts[node]
        if addr not in contact.connecting:
            return
        contact.connecting.discard(addr)
        if outcome == "refused":
            contact.refused.add(addr)
        contact.connect_open = contact.connect_open or outcome == "open"
        if contact.connecting or self.excused(member):
            return
        case = self.suspicions.get(node)
        if contact.connect_open:
            if case is not None:
                case.opened_to_me, case.refused_me = True, False
            self.look(node, view.now)
            return
        proven = [at for at in contact.proven if at in contact.refused]
        witness = bool(proven) and len(proven) == len(contact.proven)
        witness = witness and all(bears_witness(at, view.me.record, member.record) for at in proven)
        all_refused = contact.refused == contact.connected
        if witness:
            case = case or self._open(member)
            case.refusal_at = view.now
            case.refused_me, case.opened_to_me = True, False
            self._accuse(member, case, proven)
            contact.stamp, contact.stamp_at = self._stamp, view.now
            self._exited(member, case)
        elif all_refused:
            contact.refused_at = view.now
            if case is not None:
                case.refused_me, case.opened_to_me = True, False
                self._exited(member, case)
        self.look(node, view.now if witness else -inf)

    # accused oneself

    def claimed(self, incarnation: int, sender: int | None, addr: Addr | None) -> None:
        """Somebody claims me dead or suspect at this incarnation."""
        mine = self.view.me.record.incarnation
        if incarnation > mine + _JUMP_MAX:
            self.view.count("wild_claim", sender, addr)
        elif incarnation >= mine:
            self.refute(incarnation)

    def refute(self, incarnation: int) -> None:
        """Takes the next incarnation, durably before anybody hears of it, and announces it."""
        view = self.view
        if view.leaving or incarnation < view.me.record.incarnation or incarnation >= 2**62:
            return
        self._refute_to = max(self._refute_to, incarnation + 1)
        wait = self._refuted_at + view.config.refute_spacing_s - view.now
        if wait > 0:
            view.timers.sooner("refute", view.now + wait)
            return
        if view.now >= self._felt_at + _FEEL_SPACING_S:
            self._felt_at = view.now
            view.feel(+1)
        self._refuted_at = view.now
        view.effects.append(fx.PersistIncarnation(self._refute_to))
        view.restate(incarnation=self._refute_to, version=0)

    def refute_due(self) -> None:
        """What had to wait for its turn."""
        if self._refute_to > self.view.me.record.incarnation:
            self.refute(self._refute_to - 1)

    def paused(self, gap: float) -> None:
        """I slept: what I hold against others waits as long, and my own failed probes count for nothing."""
        for case in self.suspicions.values():
            case.started += gap
            case.expires += gap
            case.failed_asked_at = -inf
            case.last_word_at = inf
            member = self.view.members.get(case.target)
            if member is not None:
                self._retime(member, case)
