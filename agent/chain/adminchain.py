"""The admin chain of a mesh on one node: what was committed here and elsewhere, folded; and what is committed here.

Commits are judged by the fold before they are written, so what would be void is refused with that reason. Records
that come later than their place (or after damage) are read when they come and folded in their place.

The fold holds the newest records only, and checkpoints of it are kept on disk. What belongs before those that it holds
has it folded again from the newest checkpoint that stands before it, or from the beginning, by reading the records in
their order; until that is done the state is the one without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from agent.chain import adminop
from agent.chain.adminfold import AdminFold, Judge, ahead_of_time, mark_of_genesis
from agent.chain.adminkept import AdminKept, Kept
from agent.chain.adminop import ADMIN, OP, OWN, RESULT, AdminEvent
from agent.chain.adminreading import STEP, AdminReader, Checked, Mark, Place, place_at, place_of, position_at
from agent.chain.adminstate import AdminState, Cut, Spec
from agent.chain.feedreading import Stored
from agent.chain.feeds import FeedStore
from agent.chain.hlc import Clock, Position, ahead, following, stamp_of
from agent.chain.record import DISPATCHED, Record, hash_of
from agent.opmessage import decode_op
from discovery.errors import Refused, RemoteError
from discovery.identity import Identity

HOLD = 64
"""Events that the fold holds at least, so that one that comes a little late costs next to nothing. So many are worth a
checkpoint on disk when the process ends."""
MANY = 4
"""So many times that between two checkpoints while it runs. More new records than that are read in their order, not as
they lie."""
QUIET_S = 0.1
"""How long nothing has to come before what takes longer than that is folded again."""
CHECKED = "admin checked"


class Commits(Protocol):
    """`Replicating`, as far as this goes."""

    clock: Clock

    async def commit(
        self, chain: str, kind: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 2.0
    ) -> Any: ...


class AdminChain:
    """`genesis`: the mesh's first roster, lines of `authorized_keys`."""

    def __init__(
        self,
        store: FeedStore,
        commits: Commits,
        identity: Identity,
        mesh: str,
        genesis: str | list[str],
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        hold: int = HOLD,
    ) -> None:
        self._genesis = genesis
        self._hold, self._many = hold, MANY * hold
        self.reader = AdminReader(store, mesh)
        self._kept = AdminKept(store, mark_of_genesis(mesh, genesis))
        self.fold = self._fold_from(None, {}, {})
        self._mark = Mark()
        """How far it was read into the fold."""
        self._later: list[Place] = []
        """A heap of records whose time has not come; they are read again when it has."""
        self._store = store
        self._commits = commits
        self._pub = identity.pub
        self._mesh = mesh
        self._now_ms = now_ms
        self._catching_up = asyncio.Lock()
        self._kept_at = 0
        """Records in the last checkpoint that was kept."""
        self._checked_kept = b""
        self._took_s = 0.0
        """How long it took to fold again, the last time."""

    async def load(self) -> AdminState:
        """What `catch_up` does, when a process starts: what this node checked in an earlier life is not checked again,
        and what was folded up to a checkpoint is not read."""
        self._checked_kept = self._store.recall(CHECKED) or b""
        self.reader.checked = Checked(self._checked_kept)
        async with self._catching_up:
            await self._refold()
        for feed in self._store.feeds(
            ADMIN
        ):  # what was folded up to a checkpoint is not read, and moves the clock too
            for stored in self._store.tail(ADMIN, feed.writer, 1):
                with contextlib.suppress(RemoteError):
                    stamp = stamp_of((stored.record.body or {}).get("hlc"))
                    self._commits.clock.hear(stamp, self._now_ms())
        state = await self.catch_up()
        await self.save()
        return state

    async def catch_up(self) -> AdminState:
        """Reads and folds what is new in short steps, so that the loop is not held up however much it is."""
        async with self._catching_up:
            while True:
                if self.fold.behind or self.reader.beyond(self._mark) > self._many:
                    await self._refold()
                taken = 0
                while taken < self._many and (found := self._take(STEP)):
                    taken += found
                    await asyncio.sleep(0)
                self._advance()
                if not taken and not self.fold.behind:
                    break
            if self.fold.count - self._kept_at >= self._many:
                await self._keep()
        return self.fold.state

    async def save(self) -> None:
        """Keeps how far the signatures of each feed were checked, and a checkpoint where it is worth one; call it once
        in a while, and at the end."""
        async with self._catching_up:
            packed = self.reader.checked.packed()
            if packed != self._checked_kept:
                with contextlib.suppress(Refused):
                    await self._store.remember(CHECKED, packed)
                    self._checked_kept = packed
            if self.fold.count - self._kept_at >= self._hold:
                await self._keep()

    def state(self) -> AdminState:
        """The state as of now: reads what is new, at once (0.3 ms a record), and folds it. What is too much for that, or
        belongs further back, is left to `catch_up`."""
        if self.reader.beyond(self._mark) <= self._many:
            while self._take(self._many):
                pass
        return self._advance()

    def _take(self, most: int) -> int:
        """Reads up to `most` new records into the fold; how many there were."""
        found = self.reader.filled(self._mark) or self.reader.take(self._mark, most)
        for stored in found:
            event = self.reader.event(stored)
            if event is not None:
                self._hand_in(stored, event)
        return len(found)

    def _hand_in(self, stored: Stored, event: AdminEvent) -> None:
        now_ms = self._now_ms()
        self._commits.clock.hear(event.position.stamp, now_ms)
        place = place_of(stored)
        if place is not None and ahead(event.position.wall_ms, now_ms):
            heapq.heappush(self._later, place)
        elif place is not None and event.wrong is None:
            self.fold.add([_light(event)])

    def _advance(self) -> AdminState:
        now_ms = self._now_ms()
        while self._later and not ahead(position_at(self._later[0]).wall_ms, now_ms):
            position = position_at(heapq.heappop(self._later))
            writer = self.reader.writer_of(position.node)
            stored = self.reader.at(writer, position.number) if writer is not None else None
            if stored is not None and (event := self.reader.event(stored)) is not None:
                self._hand_in(stored, event)
            elif writer is not None:
                self._mark.miss(writer, position.number, position.number)
        for node, number in self.reader.forks().items():
            self.fold.fork(node, number)
        state = self.fold.advance(now_ms)
        self.fold.trim(self._hold)
        return state

    # --- further back

    async def _refold(self) -> None:
        """Folds again from the newest checkpoint of which all records that it isn't of stand behind it. Records that
        come meanwhile are read afterwards."""
        await self._quiet()
        began = time.monotonic()
        ends = self.reader.ends()
        forks = self.reader.forks()
        cuts: dict[str, Cut] = {}
        while True:
            kept, mark, places = await self._begin(ends, cuts, forks)
            fold = self._fold_from(kept, cuts, forks)
            later: list[Place] = []
            count = 0
            async for _, event in self.reader.in_order(places, mark):
                now_ms = self._now_ms()
                self._commits.clock.hear(event.position.stamp, now_ms)
                if ahead(event.position.wall_ms, now_ms):
                    heapq.heappush(later, place_at(event.position))
                elif event.wrong is None:
                    fold.add([_light(event)])
                count += 1
                if count % STEP == 0:
                    fold.advance(now_ms)
                    fold.trim(self._hold)
            state = fold.advance(self._now_ms())
            if not fold.behind:
                break
            cuts = state.cuts
        if kept is not None:
            self._commits.clock.hear(kept.checkpoint.end.stamp, self._now_ms())
        self.fold, self._mark, self._later = fold, mark, later
        self._took_s = time.monotonic() - began
        self._kept_at = 0 if kept is None else kept.checkpoint.count

    async def _quiet(self) -> None:
        """Waits while more is coming, at most as long as it took the last time: so a long chain that comes feed by feed is
        not folded again with each piece of it."""
        if self._took_s <= QUIET_S:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._took_s):
                seen, now = None, self.reader.ends()
                while seen != now:
                    await asyncio.sleep(QUIET_S)
                    seen, now = now, self.reader.ends()

    def _fold_from(self, kept: Kept | None, cuts: Mapping[str, Cut], forks: Mapping[int, int]) -> AdminFold:
        base = None if kept is None else kept.checkpoint
        every = max(1, self._hold // 2)
        return AdminFold(self._genesis, base=base, cuts=cuts, forks=forks, checkpoint_every=every)

    async def _begin(
        self, ends: Mapping[bytes, Any], cuts: Mapping[str, Cut], forks: Mapping[int, int]
    ) -> tuple[Kept | None, Mark, list[Place]]:
        """The checkpoint to fold on from (None: the beginning), how far a reader is then, and what to fold."""
        for kept in self._kept.newest_first():
            if kept.checkpoint.fits(cuts, forks):
                mark = kept.mark()
                places = await self.reader.places(mark, ends)
                if not places or position_at(places[0]) > kept.checkpoint.end:
                    return kept, mark, places
        mark = Mark()
        return None, mark, await self.reader.places(mark, ends)

    async def _keep(self) -> None:
        """Keeps a checkpoint on disk."""
        checkpoint = self.fold.checkpoint()
        if checkpoint is None or checkpoint.count == self._kept_at:
            return
        held = [event.position for event in self.fold.held()] + [position_at(p) for p in self._later]
        writers = {position.node: self.reader.writer_of(position.node) for position in held}
        again = [(w, p.number, p.number) for p in held if (w := writers[p.node]) is not None]
        if await self._kept.keep(checkpoint, self._mark, again):
            self._kept_at = checkpoint.count

    # --- looking

    async def judged(self) -> list[tuple[AdminEvent, str | None]]:
        """Every record that may count, in order, with why it is void."""
        await self.catch_up()
        judge = self.fold.judge()
        places = await self.reader.places(Mark(), self.reader.ends())
        return [(event, self.verdict(judge, event)) async for _, event in self.reader.in_order(places)]

    def verdict(self, judge: Judge, event: AdminEvent) -> str | None:
        """Why the next record that `judge` is told of is void; None where it counts."""
        if ahead(event.position.wall_ms, self._now_ms()):
            return ahead_of_time(event)
        return judge.fold(event)

    def content(self, spec: Spec) -> bytes | None:
        """The bytes of a spec, from its record; None while that is missing here."""
        for feed in self._store.feeds(ADMIN):
            if feed.node != spec.position.node:
                continue
            for stored in self._store.records(ADMIN, feed.writer, spec.position.number - 1):
                found = (stored.record.body or {}).get("content")
                whole = isinstance(found, bytes) and hashlib.sha256(found).hexdigest() == spec.sha256
                return found if whole and stored.record.id == spec.position.number else None
        return None

    def last_of(self, fingerprint: str) -> Position | None:
        """Position of the newest record of a key that counts: what a revocation now should name."""
        self.state()
        return self.fold.last_of(fingerprint)

    async def commit_op(
        self, message: bytes, signature: str, by: str, content: bytes | None = None, *, timeout_s: float = 2.0
    ) -> Any:
        """Commits an operator's op, whose signature this node has judged; `by` is whom it found the signer to be.

        What `Replicating.commit` answers. Refused with the reason for which the fold would call it void, as
        `opmessage.decode_op` does, or as the store refuses."""
        await self.catch_up()
        op = decode_op(message)
        body = adminop.op_body(op, message, signature, by, content)
        refusal = self._refusal(body)
        if refusal is not None:
            raise refusal
        return await self._commits.commit(ADMIN, OP, body, timeout_s=timeout_s)

    async def commit_own(self, verb: str, **fields: Any) -> Any:
        """Commits this node's word on itself: `maintenance` with `state` and `reason`."""
        return await self._commits.commit(ADMIN, OWN, adminop.own_body(verb, **fields))

    async def commit_result(self, op_id: str, verb: str | None, result: str, reason: str | None) -> Any:
        """Commits what became of an op at this node."""
        return await self._commits.commit(ADMIN, RESULT, adminop.result_body(op_id, verb, result, reason))

    def _refusal(self, body: dict[str, Any]) -> Refused | None:
        """Why the fold would not count a record with this body, committed now."""
        self.state()
        now_ms = self._now_ms()
        stamp = following(self._commits.clock.last, now_ms)
        record = Record(
            id=self._store.end_of(ADMIN, self._pub).id + 1,
            kind=OP,
            emitted_at_ms=stamp.wall_ms,
            disposition=DISPATCHED,
            prev=bytes(32),
            body={**body, "hlc": list(stamp)},
        )
        event = adminop.read_event(record, hash_of(b""), self._pub, self._mesh)
        assert event is not None
        return self.fold.refusal(event, now_ms)


def _light(event: AdminEvent) -> AdminEvent:
    """The event without what only an audit needs."""
    return msgspec.structs.replace(event, message=None, signature=None)
