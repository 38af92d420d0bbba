"""Chains kept alike on several nodes: pushed at once when something is committed, pulled when marks differ.

Two nodes compare a chain by eight bytes (`note`, in every push/pull), then by its version vector, and the one that is
behind pulls what it lacks, feed by feed, in frames of bounded size; what was taken stays, so an interrupted pull
goes on where it ended. Nothing is believed for coming from a member: `feeds` weighs each record.

A commit is answered when it is on disk here and, where there are others, on one of them. Before the first commit of a
process others are asked how far this node's feed goes: a node set back to an old disk takes up its own later records
instead of writing others of the same numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from agent.chain import holding, serving
from agent.chain.blackbox import BlackBox
from agent.chain.feedreading import Want
from agent.chain.feeds import FeedStore, Taken
from agent.chain.hlc import Clock, Stamp, stamp_of
from agent.chain.journalfeed import JournalFeed
from agent.chain.record import DISPATCHED, Disposition
from agent.chain.serving import ADMIN, WANTS_A_FRAME, Peer, Serving
from agent.chain.weighing import NODE_CHAIN, Head, Link, Parcel
from discovery.errors import QuarterdeckError, Refused, RemoteError
from discovery.identity import id_text

NOTE_CHAINS = 512
CALL_TIMEOUT_S = 10.0
SETTLE_TIMEOUT_S = 1.0
SETTLE_MORE_S = 0.2
"""How long others are still heard once one has answered."""
SETTLE_ASKED = 3
SETTLE_AGAIN_S = 5.0
REPLICATED_TIMEOUT_S = 2.0
"""How long a commit waits for another node before it is answered as local."""
SIDE_BY_SIDE = 16
TICK_S = 1.0
JOURNAL_PUSH_S = 0.2
"""How long records of the journal wait for others that come with them, before all go out together. With the 0.2 s that
the journal itself gathers, what a node did more than half a second before it burned is with its holders."""
MEND_EVERY_S = 5.0
SCRUB_RECORDS = 20
SCRUB_EVERY_S = 10.0
"""So many are checked in full so often: 100,000 records in 14 hours, for 0.2 ms a second. Each row's sum is checked
whenever it is read."""
RETAIN_EVERY_S = 3600.0
KEEP_BYTES = 16 * 1024 * 1024
KEEP_MS = 90 * 24 * 3600 * 1000
"""How much, and for how long, is kept of another node's action chain."""
COME_MAX = 8
"""Members with whom chains are compared when many come at once; push/pull does the rest."""


class Committed(msgspec.Struct, frozen=True):
    """A record that was committed: where, when, and who else had it when that was answered."""

    link: Link
    stamp: Stamp
    recorded: str
    """`local` or `replicated`."""
    by: tuple[int, ...] = ()
    """Nodes that have confirmed it."""
    reason: str | None = None
    """Why it is local, where others were there."""


class Replicating(Serving):
    """The chains of one node among those of its mesh. `call(member, method, params, timeout_s)` asks a member."""

    def __init__(
        self,
        store: FeedStore,
        *,
        me: int,
        members: Callable[[], Mapping[int, Peer]],
        call: Callable[[Any, str, Any, float], Awaitable[Any]],
        journal: JournalFeed | None = None,
        clock: Clock | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(store, me=me, members=members, journal=journal)
        self.clock = clock or Clock()
        self._call = call
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._acked: dict[tuple[int, str], Link] = {}
        """What each member is known to have of this node's feed of a chain."""
        self._owed: set[tuple[int, str]] = set()
        """Pushes that did not get through: made again at the next tick."""
        self._waiting: list[tuple[str, int, asyncio.Future[int]]] = []
        self._asked: set[str] = set()
        self._settled_at: dict[str, float] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._pushing: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._syncing: dict[tuple[int, str], asyncio.Task[Any]] = {}
        self._present: set[int] = set()
        self._retained_at = monotonic()
        self._journal_told: Link | None = None
        self._journal_due: asyncio.TimerHandle | None = None
        self._mended_at = self._scrubbed_at = monotonic()
        self._mend_turn = 0
        self._given_up: dict[tuple[str, bytes], dict[int, int]] = {}
        """Up to which number members have cut feeds of which something is missing here."""
        self._slots = asyncio.Semaphore(SIDE_BY_SIDE)

    # -- committing ----------------------------------------------------------------------

    async def commit(
        self,
        chain: str,
        kind: str,
        body: Mapping[str, Any] | None = None,
        disposition: Disposition = DISPATCHED,
        *,
        timeout_s: float = REPLICATED_TIMEOUT_S,
    ) -> Committed:
        """Appends to this node's feed of a merged chain, stamped by the hybrid clock (`hlc` in its body). Answers
        once it is on disk here and, with others there, on one of them, or `timeout_s` later. Refused as `append`."""
        await self._settle(chain)
        stamp = self.clock.issue(self._now_ms())
        stamped = {**(body or {}), "hlc": list(stamp)}
        link = await self.store.append(chain, kind, stamped, disposition, at_ms=stamp.wall_ms)
        others = self._keepers(chain)
        if not others:
            return Committed(link, stamp, "local")
        confirmed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((chain, link.id, confirmed))
        self.push(chain)
        for node in self.having(chain, link.id):
            self._confirm(chain, node, link.id)
        try:
            async with asyncio.timeout(timeout_s):
                await confirmed
        except TimeoutError:
            said = f"none of {len(others)} other node{'s' * (len(others) != 1)} confirmed it within {timeout_s:g} s"
            return Committed(link, stamp, "local", (), said)
        finally:
            self._waiting = [each for each in self._waiting if each[2] is not confirmed]
        return Committed(link, stamp, "replicated", tuple(sorted(self.having(chain, link.id))))

    def having(self, chain: str, number: int) -> list[int]:
        """Who has confirmed so much of this node's feed."""
        return [node for (node, name), known in self._acked.items() if name == chain and known.id >= number]

    def push(self, chain: str) -> None:
        """Brings this node's feed of a chain to those who keep it, in the background."""
        for member in self._keepers(chain):
            self._push_soon(member, chain)

    def _push_soon(self, member: Peer, chain: str) -> None:
        key = (member.id, chain)
        if not _running(self._pushing, key):
            self._owed.discard(key)
            self._spawn(self._pushing, key, self._push(member, chain))

    async def _push(self, member: Peer, chain: str) -> None:
        source, pub = self._source(chain), self.store.pub
        key = (member.id, chain)
        try:
            while (head := source.heads(chain).get(pub)) is not None:
                known = self._acked.get(key)
                if known is not None and known.id >= head.link.id:
                    return
                if known is None:  # most likely it lacks only what is new; it looks at the link itself
                    known = Link(head.link.id - 1, bytes(32))
                given = source.since(chain, [Want(pub, known)], serving.PULL_BYTES)
                if not given.parcels:
                    return
                async with self._slots:
                    answer = await self._call(
                        member, "chain_push", {"chain": chain, "parcels": given.parcels}, CALL_TIMEOUT_S
                    )
                theirs = next((h for h in _heads(answer) if h.writer == pub), None)
                if theirs is None:
                    return
                stuck = key in self._acked and theirs.link.id <= self._acked[key].id
                self._acked[key] = theirs.link
                self._confirm(chain, member.id, theirs.link.id)
                if stuck or theirs.fork is not None:
                    return
        except QuarterdeckError as why:
            self.counters["push_failed"] += 1
            self._acked.pop(key, None)
            if not isinstance(why, Refused):
                self._owed.add(key)

    def _confirm(self, chain: str, node: int, number: int) -> None:
        for name, wanted, future in self._waiting:
            if name == chain and wanted <= number and not future.done():
                future.set_result(node)

    async def _settle(self, chain: str) -> None:
        """Asks others how far this node's feed goes, once in the life of a process."""
        now = self._monotonic()
        if chain in self._asked or now - self._settled_at.get(chain, -SETTLE_AGAIN_S) < SETTLE_AGAIN_S:
            return
        if not _running(self._settling, chain):
            self._spawn(self._settling, chain, self._ask_for_own(chain))
        await asyncio.shield(self._settling[chain])

    async def _ask_for_own(self, chain: str) -> None:
        others = self._keepers(chain)[:SETTLE_ASKED]
        if others and self.store.settled(chain):
            self._settled_at[chain] = self._monotonic()

        async def ask(member: Peer) -> bool:
            try:
                async with asyncio.timeout(SETTLE_TIMEOUT_S):
                    params = {"chain": chain, "writers": [self.store.pub]}
                    heads = _heads(await self._call(member, "chain_vectors", params, SETTLE_TIMEOUT_S))
                    await self._pull(member, chain, [h for h in heads if h.writer == self.store.pub])
            except (QuarterdeckError, TimeoutError):
                self.counters["settle_failed"] += 1
                return False
            return True

        asking = [asyncio.ensure_future(ask(member)) for member in others]
        answered: list[bool] = []
        try:
            for first in asyncio.as_completed(asking, timeout=SETTLE_TIMEOUT_S):
                answered.append(await first)
                if answered[-1]:
                    break
            if asking:  # who is as quick is heard too; who is stopped holds nobody up
                await asyncio.wait(asking, timeout=SETTLE_MORE_S)
        except TimeoutError:
            self.counters["settle_failed"] += 1
        finally:
            for task in asking:
                task.cancel()
        if any(answered) or not others:
            await self.store.settle(chain)
        if any(answered):
            self._asked.add(chain)
        for stored in self.store.tail(chain, self.store.pub, 1):
            self._hear(stored.record.body)

    # -- between members -----------------------------------------------------------------

    def note(self) -> list[Any]:
        """Mark of each chain that this node keeps, for the parameters and the answer of a push/pull."""
        return [[chain, self._source(chain).mark(chain)] for chain in self._known()[:NOTE_CHAINS]]

    def heard(self, node: int, note: Any, *, act: bool = False) -> None:
        """What a member says of its chains; with `act` this node pulls those that differ and that it keeps."""
        member = self._members().get(node)
        if member is None or not isinstance(note, list | tuple):
            return
        for entry in note[:NOTE_CHAINS]:
            match entry:
                case [str(chain), bytes(mark)] if act and not self._is_own(chain) and self.keeps(chain):
                    if self.store.mark(chain) != mark:
                        self.sync_soon(member, chain)

    def sync_soon(self, member: Peer, chain: str) -> None:
        """Pulls a chain from a member in the background."""
        key = (member.id, chain)
        if not _running(self._syncing, key):
            self._spawn(self._syncing, key, self._sync_quietly(member, chain))

    async def _sync_quietly(self, member: Peer, chain: str) -> None:
        try:
            async with self._slots:
                await self.sync(member, chain)
        except QuarterdeckError:
            self.counters["pull_failed"] += 1

    async def sync(self, member: Peer, chain: str) -> int:
        """Pulls all that a member has of a chain beyond ours; how many records that were. Errors of the call, and
        Refused `journal_full`, are raised; what was taken until then stays."""
        added = await self._pull(member, chain, await self._vector(member, chain))
        return added + await self._mend_from(member, chain)

    async def behind(self, member: Peer, chain: str) -> bool:
        """Whether a member has anything of a chain that is not here. Errors of the call are raised."""
        return any(self._lacks(chain, head) for head in await self._vector(member, chain))

    async def forget(self, chain: str) -> None:
        """Ends what is under way about a chain that is given up; before its next record others are asked again."""
        running = [
            task
            for tasks in (self._pushing, self._syncing)
            for (_, name), task in tasks.items()
            if name == chain
        ]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._acked = {key: link for key, link in self._acked.items() if key[1] != chain}
        self._owed = {key for key in self._owed if key[1] != chain}
        self._given_up = {key: told for key, told in self._given_up.items() if key[0] != chain}
        self._asked.discard(chain)
        self._settled_at.pop(chain, None)

    async def _vector(self, member: Peer, chain: str) -> list[Head]:
        heads: list[Head] = []
        after = b""
        while True:
            answer = await self._call(
                member, "chain_vectors", {"chain": chain, "after": after}, CALL_TIMEOUT_S
            )
            page = _heads(answer)
            heads += page
            if not (page and isinstance(answer, dict) and answer.get("more") is True):
                return heads
            after = page[-1].writer

    async def _pull(self, member: Peer, chain: str, heads: Sequence[Head]) -> int:
        added = 0
        theirs = {head.writer: head for head in heads}
        lacking = [head.writer for head in heads if self._lacks(chain, head)]
        while lacking:
            batch, lacking = lacking[:WANTS_A_FRAME], lacking[WANTS_A_FRAME:]
            while batch:
                before = [(writer, self.store.end_of(chain, writer)) for writer in batch]
                answer = await self._call(
                    member, "chain_pull", {"chain": chain, "wants": before}, CALL_TIMEOUT_S
                )
                taken = await self._take(chain, answer)
                added += taken.added
                for writer in {*taken.diverged, *_diverged(answer)} & set(batch):
                    await self._trace(member, chain, writer)
                moved = any(self.store.end_of(chain, writer) != link for writer, link in before)
                batch = [w for w in batch if moved and self._lacks(chain, theirs[w])]
        return added

    def _lacks(self, chain: str, theirs: Head) -> bool:
        mine = self.store.heads(chain).get(theirs.writer)
        if mine is None:
            return True
        if theirs.fork is not None and (mine.fork is None or theirs.fork < mine.fork):
            return True
        if mine.fork is not None:
            return False
        return theirs.link.id > mine.link.id or (
            theirs.link.id == mine.link.id and theirs.link.hash != mine.link.hash
        )

    async def _take(self, chain: str, answer: Any) -> Taken:
        parcels = _parcels(chain, answer)
        taken = await self.store.take(chain, parcels, durable=False)
        self._listen(chain, parcels)
        return taken

    async def _trace(self, member: Peer, chain: str, writer: bytes) -> None:
        """Finds the first record of a feed that two nodes have differently, and takes the other: the proof of a fork."""
        last = min(self.store.end_of(chain, writer).id, 2**40)
        while last > 0:
            first = max(1, last - serving.TRACE_RECORDS + 1)
            params = {"chain": chain, "writer": writer, "first": first, "last": last}
            answer = await self._call(member, "chain_trace", params, CALL_TIMEOUT_S)
            try:
                theirs = dict(msgspec.convert(answer.get("hashes"), list[Link]))
            except (msgspec.ValidationError, AttributeError) as why:
                raise RemoteError(f"chain {chain}: its answer makes no sense") from why
            mine = dict(self.store.hashes(chain, writer, first, last))
            differ = sorted(n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n])
            if differ and (differ[0] > first or first == 1):
                spans = [(writer, [(differ[0], differ[0])])]
                answer = await self._call(
                    member, "chain_pull", {"chain": chain, "spans": spans}, CALL_TIMEOUT_S
                )
                await self._take(chain, answer)
                return
            if not theirs or (mine.keys() & theirs.keys() and not differ):
                return
            last = first - 1

    async def _mend_from(self, member: Peer, chain: str) -> int:
        """Asks a member for what is missing here."""
        added = 0
        for missing in self.store.missing(chain):
            spans = list(missing.spans[:WANTS_A_FRAME])
            while spans:
                params = {"chain": chain, "spans": [(missing.writer, spans)]}
                answer = await self._call(member, "chain_pull", params, CALL_TIMEOUT_S)
                taken = await self._take(chain, answer)
                added += taken.added
                self._give_up(member, chain, missing.writer, answer)
                left = [m.spans for m in self.store.missing(chain) if m.writer == missing.writer]
                spans = list(left[0][:WANTS_A_FRAME]) if left and taken.added else []
        return added

    def _give_up(self, member: Peer, chain: str, writer: bytes, answer: Any) -> None:
        """Where all who hold a user's chain have cut what is missing here, it is not asked for any more."""
        cut = [
            parcel.start.id for parcel in _parcels(chain, answer) if parcel.cut and parcel.writer == writer
        ]
        if not cut or chain == ADMIN or chain.startswith(NODE_CHAIN):
            return
        told = self._given_up.setdefault((chain, writer), {})
        told[member.id] = max(cut)
        keepers = [keeper.id for keeper in self._keepers(chain)]
        if all(keeper in told for keeper in keepers):
            self.store.forgo(chain, writer, min(told[keeper] for keeper in [*keepers, member.id]))

    def _listen(self, chain: str, parcels: Sequence[Parcel]) -> None:
        """Moves the clock on by the newest record of each parcel that was taken."""
        if not chain.startswith(NODE_CHAIN):
            for parcel in parcels:
                for stored in self.store.tail(chain, parcel.writer, 1) if parcel.rows else ():
                    self._hear(stored.record.body)

    def _hear(self, body: Mapping[str, Any] | None) -> None:
        with contextlib.suppress(RemoteError):
            self.clock.hear(stamp_of((body or {}).get("hlc")), self._now_ms())

    # -- the last of a node --------------------------------------------------------------

    async def latest(self, node: int) -> dict[str, Any]:
        """The fold of a node's action chain, from here or from whoever holds it: `{page, source, age_ms}`.
        `source`: id text of the node that has it; `age_ms`: since its newest record, by this node's clock (None: none).
        Refused `unknown` when nobody that can be asked has anything of it."""
        best: tuple[int, BlackBox, int] | None = None
        if (here := self.latest_here(node)) is not None:
            best = (here.newest or 0, here, self._me)

        async def ask(member: Peer) -> tuple[int, BlackBox, int] | None:
            try:
                answer = await self._call(member, "chain_latest", {"node": node}, SETTLE_TIMEOUT_S)
                page = msgspec.convert(answer["page"], BlackBox | None)
            except (QuarterdeckError, msgspec.ValidationError, KeyError, TypeError):
                return None
            return None if page is None else (page.newest or 0, page, member.id)

        keepers = self._keepers(holding.node_chain(node))
        others = [m for m in self._keepers(ADMIN) if m not in keepers]
        for asked in (
            keepers,
            others,
        ):  # those who held it before somebody came or went, only when nobody else does
            if asked is others and best is not None:
                break
            for found in await asyncio.gather(*(ask(m) for m in asked)):
                if found is not None and (best is None or found[0] > best[0]):
                    best = found
        if best is None:
            raise Refused("unknown", f"node {id_text(node)}: nobody here holds its action chain")
        _, page, source = best
        age_ms = None if page.last_at_ms is None else max(0, self._now_ms() - page.last_at_ms)
        return {"page": msgspec.to_builtins(page), "source": id_text(source), "age_ms": age_ms}

    # -- over time -----------------------------------------------------------------------

    async def run(self) -> None:
        """Follows members as they come, the journal as it grows, and mends what is missing. Never ends."""
        if self._journal is not None:
            self._journal.on_growth(self._journal_grew)
        try:
            while True:
                with contextlib.suppress(Refused):
                    await self.tick()
                await asyncio.sleep(TICK_S)
        finally:
            await self.stop()

    async def tick(self) -> None:
        """What falls due now."""
        present = {m.id for m in self._members().values() if m.present and m.id != self._me}
        come = list(present - self._present)
        for node in come if len(come) <= COME_MAX else random.sample(come, COME_MAX):
            self._come(node)
        for key in [key for key in self._acked if key[0] not in present]:
            del self._acked[key]
        self._present = present
        if present and ADMIN not in self._asked and ADMIN not in self._settling:
            # before the first commit needs it, and waits for it
            last = self._settled_at.get(ADMIN, -SETTLE_AGAIN_S)
            if self._monotonic() - last >= SETTLE_AGAIN_S:
                self._spawn(self._settling, ADMIN, self._ask_for_own(ADMIN))
        for node, chain in list(self._owed):
            member = self._members().get(node)
            if member is not None and member.present:
                self._push_soon(member, chain)
            else:
                self._owed.discard((node, chain))
        self._push_journal()
        now = self._monotonic()
        if now - self._mended_at >= MEND_EVERY_S:
            self._mended_at = now
            self._mend()
        if now - self._retained_at >= RETAIN_EVERY_S:
            self._retained_at = now
            for chain in self.store.chains():
                if chain.startswith(NODE_CHAIN):
                    await self.store.retain(chain, keep_bytes=KEEP_BYTES, keep_ms=KEEP_MS)
        if now - self._scrubbed_at >= SCRUB_EVERY_S:
            self._scrubbed_at = now
            await self.store.scrub(SCRUB_RECORDS)

    def _journal_grew(self) -> None:
        if self._journal_due is None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has this node's part in the mesh
                loop = asyncio.get_running_loop()
                self._journal_due = loop.call_later(JOURNAL_PUSH_S, self._push_journal)

    def _push_journal(self) -> None:
        """Brings what is new in the journal to its holders."""
        if self._journal_due is not None:
            self._journal_due.cancel()
            self._journal_due = None
        if self._journal is not None and self._live():
            head = self._journal.end_of("", self.store.pub)
            if head != self._journal_told:
                self._journal_told = head
                self.push(self._journal.chain)

    def _come(self, node: int) -> None:
        """A member is here (again): each side pulls what the other did meanwhile."""
        member = self._members().get(node)
        if member is None:
            return
        self._acked = {key: link for key, link in self._acked.items() if key[0] != node}
        for chain in {ADMIN, *self._known()} | {holding.node_chain(n) for n in [node, *self._live()]}:
            if not self._is_own(chain) and self.keeps(chain):
                self.sync_soon(member, chain)

    def _mend(self) -> None:
        """Asks one member after another for what is missing."""
        live = sorted(self._live())
        if not live:
            return
        self._mend_turn += 1
        member = self._members().get(live[self._mend_turn % len(live)])
        for chain in {missing.chain for missing in self.store.missing()}:
            if chain != ADMIN and not chain.startswith(NODE_CHAIN):
                if keepers := sorted(self._keepers(chain), key=lambda keeper: keeper.id):
                    self.sync_soon(keepers[self._mend_turn % len(keepers)], chain)
            elif member is not None:
                self.sync_soon(member, chain)
        if member is not None and self._journal is not None and self._journal.missing():
            key = (member.id, self._journal.chain)
            if not _running(self._syncing, key):
                self._spawn(self._syncing, key, self._mend_journal(member, self._journal))

    async def _mend_journal(self, member: Peer, journal: JournalFeed) -> None:
        """Asks a member for what the journal lost."""
        spans = [(self.store.pub, journal.missing()[:WANTS_A_FRAME])]
        params = {"chain": journal.chain, "spans": spans}
        try:
            parcels = _parcels(journal.chain, await self._call(member, "chain_pull", params, CALL_TIMEOUT_S))
        except QuarterdeckError:
            self.counters["pull_failed"] += 1
            return
        self.counters["journal_mended"] += journal.fill(parcels)

    async def stop(self) -> None:
        """Ends what is under way."""
        if self._journal is not None:
            self._journal.on_growth(lambda: None)
        if self._journal_due is not None:
            self._journal_due.cancel()
            self._journal_due = None
        tasks = [*self._pushing.values(), *self._syncing.values(), *self._settling.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, among: dict[Any, Any], key: Any, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        among[key] = task

        def done(ended: asyncio.Task[Any]) -> None:
            if among.get(key) is ended:
                del among[key]
            if not ended.cancelled() and ended.exception() is not None:
                self.counters["task_failed"] += 1

        task.add_done_callback(done)
        return task


def _running(among: Mapping[Any, asyncio.Task[Any]], key: Any) -> bool:
    """Whether that is under way: a task that has ended is known by its key until its callbacks ran."""
    task = among.get(key)
    return task is not None and not task.done()


def _heads(answer: Any) -> list[Head]:
    try:
        return msgspec.convert(answer.get("heads"), list[Head])
    except (msgspec.ValidationError, AttributeError) as why:
        raise RemoteError("its answer about a chain makes no sense") from why


def _parcels(chain: str, answer: Any) -> list[Parcel]:
    try:
        return msgspec.convert(answer.get("parcels"), list[Parcel])
    except (msgspec.ValidationError, AttributeError) as why:
        raise RemoteError(f"chain {chain}: its answer makes no sense") from why


def _diverged(answer: Any) -> list[bytes]:
    found = answer.get("diverged") if isinstance(answer, dict) else None
    return [writer for writer in found if isinstance(writer, bytes)] if isinstance(found, list) else []
