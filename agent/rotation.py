"""Moves the mesh's key ring on: hands a new key round over SSH, switches to it once every present member has it, and
lets go of the old one in time.

One node drives: the one that took the operator's op. Should it go, others take over by rank, one after another. That
several drive does no harm, as the switch makes the same ring wherever it is made; and who hears a packet under the next
key switches at once, since somebody knew that all have it.

A member that missed both steps is answered under the key it uses (`Opener.key_for`) and handed the ring as soon as
there is a link, until the old key retires. After that it needs a new invitation.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from agent.events import wall_ms
from agent.keyring import (
    RETIRE_MAX_MS,
    Kept,
    KeyFile,
    Order,
    Ring,
    begin,
    moved,
    pack,
    switch,
    unpack,
)
from agent.opmessage import RETIRE_MIN_MS
from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError
from discovery.identity import Identity, id_text, verify
from discovery.lifecycle import State
from discovery.member import Member
from discovery.seal import KEY_BYTES, Keyring, Opener

if TYPE_CHECKING:
    from discovery.links import Link

TAKE_OVER_S = 5.0
"""A rotation that stands still this long is driven on by the member with the lowest id; by the next after as long again."""
RETRY_S = 1.0
TELL_FOR_S = 30.0
"""For how long the driver goes on to bring the switched ring to those who did not answer. They hear of it anyway."""
LOOK_S = 5.0
"""How often the key file is looked at: another node of this home, or `qd join`, may have changed it."""
SPACING_S = 1.0
CALL_TIMEOUT_S = 5.0
SIDE_BY_SIDE = 16
DEFAULT_RETIRE_MS = 3_600_000
FILE_SLACK_MS = 5_000
"""Nodes of one home let go of a key at slightly different moments; the first takes it out of their file."""


class Sealed(Protocol):
    """The pool, as far as its keys go."""

    opener: Opener

    def rotate(self, keyring: Keyring) -> None: ...


class Rotation:
    """The key ring of one node. `call(member, method, params, timeout_s)` asks a member over its link; `identity()` is
    the mesh's own key, which signs what is handed on."""

    def __init__(
        self,
        file: KeyFile,
        kept: Kept,
        *,
        me: int,
        identity: Callable[[], Identity],
        members: Callable[[], Mapping[int, Member]],
        call: Callable[[Member, str, Any, float], Awaitable[Any]],
        emit: Callable[..., Any],
        wall: Callable[[], int] = wall_ms,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._file = file
        self._me = me
        self._identity = identity
        self._members = members
        self._call = call
        self._emit = emit
        self._wall = wall
        self._monotonic = monotonic
        self._random = random_bytes
        self._pool: Sealed | None = None
        self._known: dict[int, Order] = {}
        """The ring that each member is known to have."""
        self._trouble: dict[int, str] = {}
        """Why a member could not be given the ring."""
        self._asked_at: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        """The ring is another one: deadlines are too."""
        self._news = asyncio.Event()
        """For the driver: the ring is another one, or a member has it."""
        self._drives_until = 0.0
        self._version = file.version()
        self._looked_at = monotonic()
        self._take(kept)

    # --- what it holds

    @property
    def ring(self) -> Ring:
        return self._ring

    def keyring(self) -> Keyring:
        return self._ring.keyring()

    def bind(self, pool: Sealed) -> None:
        """The pool that is to seal and open with this ring from now on."""
        self._pool = pool
        pool.opener.on_other_key = self._other_key
        pool.rotate(self.keyring())

    def parcel(self) -> bytes:
        """The ring, to be handed to who may have it. Refused `no_identity` without the mesh's identity key."""
        return pack(self._kept(), self._signer().sign, self._wall())

    def _signer(self) -> Identity:
        try:
            return self._identity()
        except LocalError as why:
            raise Refused("no_identity", str(why)) from why

    def _kept(self) -> Kept:
        now = self._monotonic()
        until = {raw: self._wall() + round((at - now) * 1000) for raw, at in self._retires_at.items()}
        return Kept(self._ring, until)

    def _take(self, kept: Kept) -> None:
        """Makes it this node's ring."""
        now = self._monotonic()
        left = zip(kept.ring.old, kept.left_ms(self._wall()), strict=True)
        self._ring = kept.ring
        self._since = now
        self._retires_at = {key.raw: now + ms / 1000 for key, ms in left}
        if not kept.ring.spreading:
            self._drives_until = min(self._drives_until, now + TELL_FOR_S)
        if self._pool is not None:
            self._pool.rotate(self.keyring())
        self._changed.set()
        self._news.set()

    # --- rotating

    def rotate(self, retire_ms: int | None = None, by: str | None = None, op_id: str | None = None) -> str:
        """Begins a rotation that this node drives, and says so in a sentence. Refused when one is under way, or the key
        can't be kept."""
        retire_ms = DEFAULT_RETIRE_MS if retire_ms is None else retire_ms
        if not RETIRE_MIN_MS <= retire_ms <= RETIRE_MAX_MS:
            raise Refused("bad_retire", "an old key opens for 1 s to 7 days")
        self._signer()
        self._look(at_once=True)
        ring = begin(self._ring, self._random(KEY_BYTES), retire_ms)
        self._advance(moved(self._kept(), ring, self._wall()), durable=True)
        if self._ring.order != ring.order:
            raise Refused("rotating", f"the key of mesh {ring.mesh} is being rotated already")
        self._drives_until = float("inf")
        self._tell("spreading", by=by, op_id=op_id)
        count = len(self._present())
        return f"generation {ring.generation}: the new key goes to {count} other member{'s' * (count != 1)}"

    async def run(self) -> None:
        """Drives, retires and looks at the file, as each falls due. Never ends."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._keep_times())
            both.create_task(self._keep_driving())

    async def _keep_times(self) -> None:
        while True:
            self._changed.clear()
            self._retire()
            self._look()
            now = self._monotonic()
            await _first(self._changed, min([LOOK_S, *(at - now for at in self._retires_at.values())]))

    async def _keep_driving(self) -> None:
        while True:
            self._news.clear()
            if self._drives():
                await self._drive()
            await _first(self._news, RETRY_S if self._ring.spreading or self._drives() else None)

    def _drives(self) -> bool:
        now = self._monotonic()
        if not self._ring.spreading:
            return now < self._drives_until and bool(self._lacking())
        ranked = sorted([self._me, *(m.id for m in self._present())])
        return now < self._drives_until or now - self._since >= TAKE_OVER_S * (1 + ranked.index(self._me))

    async def _drive(self) -> None:
        """Gives the ring to whoever present lacks it; switches once nobody does."""
        slots = asyncio.Semaphore(SIDE_BY_SIDE)

        async def give(member: Member) -> None:
            async with slots:
                await self._exchange(member)

        await asyncio.gather(*(give(m) for m in self._lacking()))
        if self._ring.spreading and not self._lacking():
            self._switch("every present member has it")
            self._drives_until = self._monotonic() + TELL_FOR_S

    def _present(self) -> list[Member]:
        return [m for m in self._members().values() if m.present]

    def _lacking(self) -> list[Member]:
        return [m for m in self._present() if self._known.get(m.id, (-1, b"")) < self._ring.order]

    def _switch(self, why: str) -> None:
        self._advance(moved(self._kept(), switch(self._ring), self._wall()), durable=False)
        self._tell("switched", reason=why)

    def _retire(self) -> None:
        now = self._monotonic()
        if all(at > now for at in self._retires_at.values()):
            return
        self._take(self._kept().retired(self._wall()))
        try:
            self._file.retire(self._wall() + FILE_SLACK_MS)
        except LocalError as why:
            self._tell("retired", reason=f"but not in the file: {why}")
        else:
            self._tell("retired")
        self._version = self._file.version()

    def _look(self, *, at_once: bool = False) -> None:
        """Takes up a newer ring that somebody put into the file."""
        now = self._monotonic()
        if now - self._looked_at < LOOK_S and not at_once:
            return
        self._looked_at = now
        version = self._file.version()
        if version in (None, self._version):
            return
        self._version = version
        try:
            kept = self._file.read(self._wall())
        except LocalError as why:
            self._emit("keys.problem", reason=str(why))
            return
        if kept.ring.order > self._ring.order:
            self._take(kept)
            self._tell(_stage(kept.ring), source="file")

    def _advance(self, kept: Kept, *, durable: bool) -> None:
        """Writes a ring down and takes it up, or a newer one that the file holds already. A switch that can't be
        written counts all the same: the file then holds the step before, which opens as much."""
        try:
            kept = self._file.advance(kept, self._wall())
        except LocalError as why:
            if durable:
                raise Refused("not_kept", str(why)) from why
            self._emit("keys.problem", reason=str(why))
        self._version = self._file.version()
        self._take(kept)

    def _tell(self, stage: str, **fields: Any) -> None:
        self._emit("keys.rotated", generation=self._ring.generation, stage=stage, **fields)

    # --- between members

    def note(self) -> list[Any]:
        """Which ring this node has, for the parameters and the answer of a push/pull."""
        return list(self._ring.order)

    def heard(self, node: int, note: Any, *, act: bool = False) -> None:
        """What a member says of its ring; with `act` they are exchanged when they differ."""
        order = _order(note)
        if order is None:
            return
        self._learn(node, order)
        if act and order != self._ring.order:
            self._exchange_soon(node)

    async def serve(self, link: Link, params: Any) -> Any:
        """The method `keyring`: `{note, ring}` of a member; the answer is ours, with our ring where it is newer."""
        node = link.login.node
        if node is None or not isinstance(params, dict):
            raise Refused("login", "not a member")
        return self.answer(node, params)

    def answer(self, node: int, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a member gets for its `{note, ring}`. Refused when its ring can't be taken."""
        if isinstance(ring := params.get("ring"), bytes):
            self._receive(ring)
        theirs = _order(params.get("note"))
        if theirs is not None:
            self._learn(node, theirs)
        newer = theirs is None or theirs < self._ring.order
        return {"note": self.note(), "ring": self.parcel() if newer else None}

    async def _exchange(self, member: Member) -> None:
        """Brings the older of two rings up to the newer."""
        self._asked_at[member.id] = self._monotonic()
        known = self._known.get(member.id)
        try:
            newer = known is None or known < self._ring.order
            letter = {"note": self.note(), "ring": self.parcel() if newer else None}
            answer = await self._call(member, "keyring", letter, CALL_TIMEOUT_S)
            if not isinstance(answer, dict) or (order := _order(answer.get("note"))) is None:
                raise RemoteError("its answer about the key ring makes no sense")
            if isinstance(ring := answer.get("ring"), bytes):
                self._receive(ring)
        except QuarterdeckError as why:
            self._trouble[member.id] = str(why)
            return
        self._trouble.pop(member.id, None)
        self._learn(member.id, order)

    def _exchange_soon(self, node: int) -> None:
        """In the background, and not again within a second."""
        member = self._members().get(node)
        now = self._monotonic()
        if member is None or now - self._asked_at.get(node, -SPACING_S) < SPACING_S:
            return
        self._asked_at[node] = now
        task = asyncio.create_task(self._exchange(member))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _receive(self, data: bytes) -> None:
        """Takes a member's ring where it is newer than ours; durable, for a next key, before that is told."""
        kept = unpack(data, self._ring.mesh, self._signer().pub, verify, self._wall())
        if kept.ring.order > self._ring.order:
            self._advance(kept, durable=kept.ring.spreading)
            self._tell(_stage(kept.ring), source="member")

    def _learn(self, node: int, order: Order) -> None:
        if self._known.get(node) != order:
            self._known[node] = order
            self._news.set()
        if len(self._known) > 2 * len(self._members()) + 64:
            gone = self._known.keys() - self._members().keys()
            for each in (self._known, self._trouble, self._asked_at):
                for member in gone:
                    each.pop(member, None)

    def _other_key(self, sender: int, raw: bytes) -> None:
        """A packet came under another key than the one that seals here."""
        asyncio.get_running_loop().call_soon(self._follow, sender, raw)

    def _follow(self, sender: int, raw: bytes) -> None:
        if raw == self._ring.next:
            self._switch("others seal with it")
        elif raw != self._ring.primary:
            self._exchange_soon(sender)

    # --- looking

    def status(self) -> dict[str, Any]:
        """How far the rotation is, as this node knows it."""
        waiting = {m.id for m in self._lacking()} if self._ring.spreading or self._retires_at else set()
        members = [
            {
                "id": id_text(m.id),
                "name": m.record.name,
                "state": m.state.word,
                "generation": self._known[m.id][0] if m.id in self._known else None,
                "reason": self._trouble.get(m.id) if m.id in waiting else None,
            }
            for m in sorted(self._members().values(), key=lambda m: m.record.name)
        ]
        now = self._monotonic()
        return {
            "mesh": self._ring.mesh,
            "generation": self._ring.generation,
            "stage": _stage(self._ring),
            "retires_in_ms": max(
                (round((at - now) * 1000) for at in self._retires_at.values()), default=None
            ),
            "members": members,
            "waiting_for": [m.record.name for m in self._present() if m.id in waiting],
            "away": [m.record.name for m in self._members().values() if m.state is State.DEAD],
        }

    async def serve_status(self, link: Link, params: Any) -> Any:
        """The method `keys`."""
        return self.status()


async def _first(event: asyncio.Event, timeout_s: float | None) -> None:
    """Waits for the event, at most so long."""
    try:
        async with asyncio.timeout(None if timeout_s is None else max(0.02, timeout_s)):
            await event.wait()
    except TimeoutError:
        pass


def _stage(ring: Ring) -> str:
    if ring.spreading:
        return "spreading"
    return "switched" if ring.old else "settled"


def _order(note: Any) -> Order | None:
    match note:
        case [int(generation), bytes(mark)]:
            return generation, mark
    return None
