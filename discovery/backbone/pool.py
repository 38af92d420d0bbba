"""The embedded backbone: a second gossip pool with WAN timing and its own key, on a port that it shares.

A summary travels in two ways. *Published*, it goes to a few members directly and to all by gossip, each passing on what
is news to it. *Renewed*, it goes to the members named and no further: a renewal says nothing but that its mesh is
still there, and most of those who care are told of that over SSH.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from discovery import wire
from discovery.errors import RemoteError
from discovery.identity import Identity, verify
from discovery.lifecycle import State
from discovery.member import Addr, Member, Record
from discovery.pool import Pool
from discovery.port import Port
from discovery.seal import Keyring, Opener, Sealer
from discovery.summary import SUMMARY_TOPIC, SignedSummary, Summary, open_summary, pack, unpack
from discovery.swim import Changed, Evicted, Joined, LeaveDone, Swim, SwimConfig
from discovery.swim.effects import Effect
from discovery.swim.notes import AGE_MAX_MS

BACKBONE = "backbone"
"""The name of the pool, and the mesh that its member records name; the mesh behind a member is its tag `mesh`."""
RENEWAL_TOPIC = 3
"""Of notes: a summary that is told directly and not passed on, news or not."""
TOLD_DIRECTLY = 32
"""How many members hear a published summary from its publisher itself; the rest is left to gossip."""
HELD_MAX_BYTES = 90_000
"""Of summaries in one push/pull, beside the 900 kB of records that it may hold; of more, a random part."""
_NOTE_OVERHEAD = 32


class PoolBackbone:
    """One member of the backbone. All calls and callbacks happen on the event loop's thread.

    `heard(signed, age_s, now, addr)` takes in a summary, unverified, from the member at `addr`, and tells whether it
    was news; `held(now)` gives the live summaries with their ages for push/pull: neither raises. `on_effect` receives
    what is not done here: joins, changes, evictions, and `PushPull`, which asks for one with that member over SSH
    (`push_pull_request` → its `push_pull_answer` → `push_pull_merge`). `on_persist` must make the incarnation durable
    before it returns.

    `incarnation` and `start_ms` are higher than at any earlier start of this identity on the backbone, also one
    within this process. `addrs` are those of the shared port; `host` is the mark of this host in member records.
    """

    def __init__(
        self,
        *,
        port: Port,
        key: bytes,
        identity: Identity,
        mesh: str,
        name: str,
        kind: str,
        host: bytes,
        addrs: Sequence[Addr],
        build: str,
        start_ms: int,
        incarnation: int,
        heard: Callable[[SignedSummary, float, float, Addr | None], bool],
        held: Callable[[float], Iterable[tuple[SignedSummary, float]]],
        on_effect: Callable[[Effect], None],
        on_persist: Callable[[int], None] = lambda incarnation: None,
        config: SwimConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mesh = mesh
        self.left = asyncio.Event()
        """Set when the goodbye is acknowledged by enough members, or has had its time."""
        self._heard, self._held = heard, held
        self._on_effect = on_effect
        self._clock = clock
        self._leaving = False
        self._rng = random.Random(int.from_bytes(os.urandom(16), "big"))
        self._own: tuple[SignedSummary, float, float] | None = None
        """My mesh's newest summary, when it was made, and when it ends; to tell newcomers."""
        self._told: dict[int, int] = {}
        """The incarnations of members that came since I began; each is told my mesh's summary once."""
        record = Record(
            pub=identity.pub,
            mesh=BACKBONE,
            name=name,
            kind=kind,
            incarnation=incarnation,
            version=1,
            state=State.ALIVE,
            addrs=list(addrs),
            build=build,
            host=host,
            tags={"mesh": mesh},
        )
        self.swim = Swim(
            record=record,
            sign=identity.sign,
            verify=verify,
            config=config or SwimConfig.wan(sentinels=0),
            rng=self._rng,
            now=clock(),
        )
        self.swim.keep_notes(_Summaries(self))
        ring = Keyring([key])
        self.pool = Pool(
            self.swim,
            Sealer(ring, BACKBONE, identity.id, start_ms, os.urandom(8)),
            Opener(ring, BACKBONE),
            port,
            on_effect=self._effect,
            on_persist=on_persist,
            clock=clock,
        )

    # life

    def start(self) -> None:
        """Begins to listen on the port."""
        self.pool.start()

    def close(self) -> None:
        """Stops at once and for good; the port goes on. `leave` first, or the others will look for a dead member."""
        self.pool.close()

    def leave(self) -> None:
        """Says goodbye to every member now. `left` is set once it is known, within 0.3 s."""
        self._leaving = True
        self.withdraw()
        self.swim.leave(self._clock())
        self.pool.flush()

    def goodbye(self) -> bytes:
        """After `leave`: the goodbye, to be handed over by other ways to whoever calls `receive` with it."""
        return self.swim.goodbye()

    def rotate(self, keys: Sequence[bytes]) -> None:
        """Seals with the first of these keys from now on, and opens with any."""
        self.pool.rotate(Keyring(keys))

    # what may be looked at

    @property
    def members(self) -> Mapping[int, Member]:
        """The others by id, the Dead not yet evicted included."""
        return self.swim.members

    @property
    def counters(self) -> Counter[str]:
        """What was refused or dropped, by reason code: a copy, of the pool's and the engine's together."""
        return self.pool.counters + self.swim.counters

    @staticmethod
    def mesh_of(member: Member) -> str | None:
        """The mesh that a member says it is of."""
        return member.record.tags.get("mesh")

    # summaries

    def publish(self, signed: SignedSummary, age_s: float = 0.0) -> None:
        """Tells everybody my mesh's summary: it is news. RemoteError, and nothing done, when it is no summary.

        Once this node has left, nothing is told.
        """
        body = self._keep(signed, age_s)
        now = self._clock()
        present = [node for node, member in self.members.items() if member.present]
        some = present if len(present) <= TOLD_DIRECTLY else self._rng.sample(present, TOLD_DIRECTLY)
        if self._leaving:
            return
        self.swim.send_note(some, SUMMARY_TOPIC, self.mesh, body, now, age_s)
        self.swim.spread(SUMMARY_TOPIC, self.mesh, body, now, age_s)
        self.pool.flush()

    def renew(self, signed: SignedSummary, nodes: Iterable[int], age_s: float = 0.0) -> None:
        """Tells these members, and only them, that my mesh is still there. RemoteError as for `publish`."""
        body = self._keep(signed, age_s)
        if self._leaving:
            return
        self.swim.send_note(nodes, RENEWAL_TOPIC, self.mesh, body, self._clock(), age_s)
        self.pool.flush()

    def tell(self, node: int, signed: SignedSummary, age_s: float = 0.0) -> None:
        """Sends one member a summary of its own mesh that is newer than what it seems to know of."""
        if not self._leaving:
            mesh = _read(signed).mesh
            self.swim.send_note([node], RENEWAL_TOPIC, mesh, pack(signed), self._clock(), age_s)
            self.pool.flush()

    def withdraw(self) -> None:
        """Another publishes from now on: newcomers hear nothing from here."""
        self._own = None

    def _keep(self, signed: SignedSummary, age_s: float) -> bytes:
        summary = _read(signed)
        made = self._clock() - age_s
        self._own = signed, made, made + summary.ttl_ms / 1000
        return pack(signed)

    # members

    def greet(self, addrs: Iterable[Addr]) -> None:
        """Introduces this node wherever a member of the backbone may be, again and again until one answers."""
        self.swim.join(list(addrs), self._clock())
        self.pool.flush()

    def introduce(self, node: int) -> None:
        """Greets a member anew that does not seem to know this one."""
        self.swim.greet(node, self._clock())
        self.pool.flush()

    def receive(self, body: bytes, sender: int, addr: Addr) -> None:
        """What a member handed over on a link instead of in a datagram."""
        self.swim.receive(body, sender, addr, self._clock())
        self.pool.flush()

    def link_opened(self, node: int, addr: Addr) -> None:
        """A link that this node dialled at `addr` is up: that member lives."""
        self.swim.link_opened(node, addr, self._clock())
        self.pool.flush()

    def link_answered(self, node: int) -> None:
        """A member answered on a link: it lives."""
        self.swim.link_answered(node, self._clock())
        self.pool.flush()

    def link_closed(self, node: int) -> None:
        """A link to a member was closed by the other end, or broke: it is looked at now."""
        self.swim.link_closed(node, self._clock())
        self.pool.flush()

    def update_self(self, **changes: Any) -> None:
        """Says something else of this node (fields of `Record`), for instance that it is Updating."""
        self.swim.update_self(self._clock(), **changes)
        self.pool.flush()

    def push_pull_request(self) -> bytes:
        """The body to call another member's push/pull with."""
        return self.swim.push_pull_request(self._clock())

    def push_pull_answer(self, body: bytes, sender: int) -> bytes:
        """The answer to a member's request; `sender` is whom the link belongs to."""
        answer = self.swim.push_pull_answer(body, sender, self._clock())
        self.pool.flush()
        return answer

    def push_pull_merge(self, body: bytes, sender: int) -> None:
        """Takes in the answer of `sender`: also a proof that it lives."""
        self.swim.push_pull_merge(body, sender, self._clock())
        self.pool.flush()

    # what the pool tells

    def _effect(self, effect: Effect) -> None:
        match effect:
            case LeaveDone():
                self.left.set()
            case Joined(member=member) | Changed(member=member):
                self._tell_newcomer(member)
            case Evicted(id=node):
                self._told.pop(node, None)
        self._on_effect(effect)

    def _tell_newcomer(self, member: Member) -> None:
        """My mesh's summary goes to whoever comes or was started anew, ahead of the first push/pull."""
        incarnation = member.record.incarnation
        if not member.present or self._told.get(member.id) == incarnation:
            return
        self._told[member.id] = incarnation
        if self._own is not None:
            signed, made, ends = self._own
            now = self._clock()
            if now < ends:
                body = pack(signed)
                self.swim.send_note([member.id], RENEWAL_TOPIC, self.mesh, body, now, now - made)

    def _take(self, note: wire.Note, sender: int, now: float) -> bool:
        """Hands a summary up; whether it is to be passed on. A newcomer passes on nothing: the others know it all."""
        if note.topic not in (SUMMARY_TOPIC, RENEWAL_TOPIC):
            return False
        try:
            signed = unpack(note.body)
            if _read(signed).mesh != note.subject:
                raise RemoteError("summary told as another mesh's")
        except RemoteError:
            self.pool.counters["bad_summary"] += 1
            return False
        member = self.members.get(sender)
        addr = next(iter(_addrs(member)), None) if member is not None else None
        news = self._heard(signed, note.age_ms / 1000, now, addr)
        return news and note.topic == SUMMARY_TOPIC and self.swim.synced

    def _carry(self, now: float) -> list[wire.Note]:
        """The live summaries as notes, as many as one push/pull has room for."""
        notes, room = [], HELD_MAX_BYTES
        live = list(self._held(now))
        self._rng.shuffle(live)
        for signed, age_s in live[: wire.NOTES_MAX]:
            body = pack(signed)
            room -= len(body) + _NOTE_OVERHEAD
            if room < 0:
                break
            age_ms = min(AGE_MAX_MS, max(0, round(age_s * 1000)))
            notes.append(wire.Note(SUMMARY_TOPIC, _read(signed).mesh, body, age_ms))
        return notes


class _Summaries:
    """The keeper of notes on this pool."""

    def __init__(self, backbone: PoolBackbone) -> None:
        self._backbone = backbone

    def heard(self, note: wire.Note, sender: int, now: float) -> bool:
        return self._backbone._take(note, sender, now)

    def held(self, now: float) -> Iterable[wire.Note]:
        return self._backbone._carry(now)


def _read(signed: SignedSummary) -> Summary:
    """What a summary says, its signature unseen."""
    return open_summary(signed, lambda pub, data, sig: True)


def _addrs(member: Member) -> list[Addr]:
    """Where a member is, the address that last answered first."""
    told = [(host, port) for host, port in member.record.addrs]
    return told if member.addr is None else [member.addr, *told]
