"""Push/pull: two members compare what they hold, and each gets what it lacks. It repairs what gossip
missed."""

from __future__ import annotations

from math import inf

from discovery import wire
from discovery.errors import RemoteError
from discovery.lifecycle import Evidence, State
from discovery.swim import effects as fx
from discovery.swim.greeting import Greeter
from discovery.swim.judge import Judge
from discovery.swim.notes import Aging
from discovery.swim.rules import TombRuling, Tombstone, tomb_ruling
from discovery.swim.view import View

_TOMBS_RECENT_S = 600.0
_TOMBS_SAMPLE = 64
_REST_S = 0.5
_DIFFERS_SPACING_S = 1.0
_DOUBT_SPACING_S = 2.0
_PAGE_BYTES = 900_000
_EMPTY = b"\x90"


class Syncer:
    """Requests, answers and merges; and when to do one."""

    def __init__(self, view: View, judge: Judge, greeter: Greeter) -> None:
        self.view, self.judge, self.greeter = view, judge, greeter
        self._differed_at = -inf
        self._spacing = _DIFFERS_SPACING_S

    def due(self) -> None:
        """Time for one with a random member."""
        view = self.view
        view.timers.set(
            "push_pull", view.now + view.config.push_pull_interval_s * (0.9 + view.rng.random() / 5)
        )
        view.effects += [fx.PushPull(node) for node in view.some(1)]

    def differs(self, node: int) -> None:
        """A member's view is not mine though nothing has changed for a while: one of us missed something.

        While comparing changes nothing, it is done ever more seldom.
        """
        view = self.view
        if view.changed_at > self._differed_at:
            self._spacing = max(_DIFFERS_SPACING_S, view.n / 50)
        if view.now < max(view.changed_at + _REST_S, self._differed_at + self._spacing):
            return
        self._differed_at = view.now
        self._spacing = min(self._spacing * 2, view.config.push_pull_interval_s)
        view.effects.append(fx.PushPull(node))

    def request(self) -> bytes:
        """What I hold, as (id, incarnation, version); of old tombstones only a sample."""
        view = self.view
        members = []
        for node in view.ring:
            record = view.members[node].record
            members.append((node, record.incarnation, record.version))
        recent: list[tuple[int, int, int]] = []
        old: list[tuple[int, int, int]] = []
        for node, tomb in view.tombstones.items():
            entry = (node, tomb.incarnation, int(tomb.final))
            (recent if view.now - tomb.at < _TOMBS_RECENT_S else old).append(entry)
        sample = old if len(old) <= _TOMBS_SAMPLE else view.rng.sample(old, _TOMBS_SAMPLE)
        body = wire.SyncRequest(
            view.me.signed, members, recent + sample, len(sample) == len(old), self._notes()
        )
        return wire.encode_sync(body)

    def answer(self, body: bytes, sender: int) -> bytes:
        """What the asker lacks, and what I want of it; an empty array for nonsense."""
        view = self.view
        try:
            request = wire.decode_request(body)
        except RemoteError:
            view.count("malformed_sync", sender)
            return _EMPTY
        asker = view.admit(request.record, sender, None)
        if asker is None or asker.id != sender or sender == view.id:
            view.count("not_its_own", sender)
            return _EMPTY
        view.learn(request.record, sender, None)
        theirs = {node: (incarnation, version) for node, incarnation, version in request.members}
        gone = {node: (incarnation, bool(final)) for node, incarnation, final in request.tombs}
        room = _PAGE_BYTES
        tombs, more = self._tombs_for(theirs, gone, request.complete, sender)
        records = []
        for node in view.ring:
            record = view.members[node].record
            mine = (record.incarnation, record.version)
            held = theirs.get(node)
            if node == sender or (held is not None and held >= mine):
                continue
            if node in gone and gone[node][0] >= record.incarnation:
                if not gone[node][1]:
                    self._doubt(node)
                continue
            signed = view.members[node].signed
            room -= len(signed.blob) + 72
            if room < 0:
                more = True
                break
            records.append(signed)
        wants = self._wants(theirs, gone)
        if len(wants) > wire.WANT_MAX:
            view.effects.append(fx.PushPull(sender))
            wants = wants[: wire.WANT_MAX]
        self._hear(request.notes, sender)
        return wire.encode_sync(wire.SyncAnswer(view.me.signed, records, tombs, wants, more, self._notes()))

    def _tombs_for(
        self,
        theirs: dict[int, tuple[int, int]],
        gone: dict[int, tuple[int, bool]],
        complete: bool,
        sender: int,
    ) -> tuple[list[wire.Tomb], bool]:
        view = self.view
        room = _PAGE_BYTES // 2
        tombs: list[wire.Tomb] = []
        for node, tomb in view.tombstones.items():
            live, dead = theirs.get(node), gone.get(node)
            if dead is not None and (dead[0], dead[1]) >= (tomb.incarnation, tomb.final):
                continue
            if live is not None and live[0] > tomb.incarnation:
                continue
            age = view.now - tomb.at
            if live is None and dead is None and not (complete or age < _TOMBS_RECENT_S) and node != sender:
                continue
            entry = wire.Tomb(tomb.signed, tomb.evidence, max(0, int(age)), tomb.accusations[:3])
            room -= len(tomb.signed.blob) + 80 + 160 * len(entry.accusations)
            if room < 0:
                return tombs, True
            tombs.append(entry)
        return tombs, False

    def _wants(self, theirs: dict[int, tuple[int, int]], gone: dict[int, tuple[int, bool]]) -> list[int]:
        view = self.view
        wants = []
        for node, (incarnation, version) in theirs.items():
            if node == view.id:
                continue
            member, tomb = view.members.get(node), view.tombstones.get(node)
            if tomb is not None and incarnation <= tomb.incarnation:
                continue
            if member is None or (incarnation, version) > (member.record.incarnation, member.record.version):
                wants.append(node)
        for node, (incarnation, final) in gone.items():
            if node == view.id:
                self.judge.claimed(incarnation, None, None)
                continue
            member, tomb = view.members.get(node), view.tombstones.get(node)
            if final and not (tomb and tomb.incarnation >= incarnation and tomb.final):
                if member is None or member.record.incarnation <= incarnation:
                    wants.append(node)
            elif member is not None and member.present and member.record.incarnation == incarnation:
                self._doubt(node)
        return wants

    def _doubt(self, node: int) -> None:
        """Another holds dead whom I hold present: look, and let it know, so that it refutes."""
        view = self.view
        member = view.members[node]
        if view.timers.at(("doubt", node)) is not None:
            return
        view.timers.set(("doubt", node), view.now + _DOUBT_SPACING_S)
        where = view.addr_of(member)
        if where is not None:
            view.send(where, [wire.encode(wire.Buried(node, member.record.incarnation))])
        self.judge.look(node, view.now)

    def merge(self, body: bytes, sender: int) -> None:
        """Takes in an answer."""
        view = self.view
        try:
            answer = wire.decode_answer(body)
        except RemoteError:
            view.count("malformed_sync", sender)
            return
        teller = view.admit(answer.record, sender, None)
        if teller is None or teller.id != sender or sender == view.id:
            view.count("not_its_own", sender)
            return
        before = len(view.members) + len(view.tombstones)
        view.learn(answer.record, sender, None)
        for signed in answer.records:
            view.learn(signed, sender, None, tell=view.synced)
        for tomb in answer.tombs:
            self._take(tomb, sender)
        self._hear(answer.notes, sender)
        member = view.members.get(sender)
        where = view.addr_of(member) if member is not None else None
        if where is not None:
            view.send_all(where, self.records_of(answer.wants))
        if answer.more and len(view.members) + len(view.tombstones) > before:
            view.effects.append(fx.PushPull(sender))
        else:
            self.greeter.synced()

    def _notes(self) -> list[wire.Note]:
        keeper = self.view.keeper
        return [] if keeper is None else list(keeper.held(self.view.now))[: wire.NOTES_MAX]

    def _hear(self, notes: list[wire.Note], sender: int) -> None:
        """Takes in the notes of a push/pull: news is passed on as if it had come by gossip."""
        for note in notes:
            self.hear(note, sender)

    def hear(self, note: wire.Note, sender: int) -> None:
        """One note of a member: news to the keeper is passed on, at its age."""
        view = self.view
        if view.keeper is not None and view.keeper.heard(note, sender, view.now):
            born = view.now - note.age_ms / 1000
            view.spread(Aging(note.topic, note.subject, note.body, born))

    def records_of(self, ids: list[int]) -> list[bytes]:
        """The newest word I hold of each, a goodbye included."""
        view = self.view
        parts = []
        for node in ids:
            member, tomb = view.members.get(node), view.tombstones.get(node)
            if node == view.id:
                parts.append(wire.encode(wire.Update(view.me.signed)))
            elif member is not None and member.state is not State.DEAD:
                parts.append(wire.encode(wire.Update(member.signed)))
            elif tomb is not None and tomb.final:
                parts.append(wire.encode(wire.Update(tomb.signed)))
        return parts

    def _take(self, tomb: wire.Tomb, sender: int) -> None:
        view = self.view
        record = view.admit(tomb.record, sender, None)
        if record is None:
            return
        node = record.id
        if (tomb.evidence is Evidence.LEFT) != (record.state is State.LEAVING):
            view.count("bad_tombstone", sender)
        elif node == view.id:
            self.judge.refute(record.incarnation)
        elif tomb.evidence is Evidence.LEFT:
            view.learn(tomb.record, sender, None)
        else:
            self._take_dead(tomb, sender, node, record.incarnation)

    def _take_dead(self, tomb: wire.Tomb, sender: int, node: int, incarnation: int) -> None:
        view = self.view
        held = view.members.get(node)
        verdict = tomb_ruling(incarnation, held.record if held else None, view.tombstones.get(node))
        if verdict is TombRuling.KEEP:
            record = view.open(tomb.record)
            assert record is not None
            at = view.now - min(tomb.age_s, view.config.tombstone_s)
            by = tuple(a.accuser for a in tomb.accusations)
            view.keep_tombstone(Tombstone(record, tomb.record, tomb.evidence, at, by, tomb.accusations))
        elif verdict is TombRuling.CHECK:
            for accusation in tomb.accusations:
                self.judge.heard(accusation, sender, None)
            if node in view.members and view.members[node].present:
                self._doubt(node)
