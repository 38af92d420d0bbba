"""Chains: what a commit costs here and on another node, appending, catching up, and the folds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import socket
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec

from agent.chain import Dispatched, Failed, adminop
from agent.chain.adminchain import AdminChain
from agent.chain.adminfold import AdminFold
from agent.chain.blackbox import unfold
from agent.chain.feeds import Draft, FeedStore
from agent.chain.record import Record, decode, encode, hash_of
from agent.chain.replicating import Replicating
from agent.opmessage import NAMESPACE, build_op, decode_op, new_ulid
from bench.figures import Figure
from bench.fleet import Hangar
from bench.op import fsyncs
from discovery import sshsig
from discovery.identity import Identity, id_text
from discovery.links import Link, Listener, Login, dial

MESH = "alpha"
OPERATOR = Identity.from_seed(b"o" * 32)
ROSTER = f'environment="QD_ROLE=admin" {OPERATOR.pub_openssh("bench")}'
BAR_COMMIT_MS = 10.0
BAR_REPLICATED_MS = 30.0
BAR_APPENDED = 5000.0
BAR_CATCH_UP_S = 20.0
BAR_START_MS = 100.0
BAR_HELD_MB = 3.0
BATCH = 100


def measure(hangar: Hangar) -> Iterator[Figure]:
    place = Path(tempfile.mkdtemp(prefix="qd-bench-chains-"))
    try:
        disk = fsyncs(place, hangar.runs(100, 20))
        fsync = Figure("one fsync of 4 KiB where the chains are", "ms", disk)
        yield fsync
        yield from asyncio.run(_all(_commits(place, hangar.runs(200, 20), fsync.median)))
        yield from asyncio.run(_all(_bulk(place, hangar.runs(100_000, 2000))))
        yield _black_box(hangar.runs(1_000_000, 10_000))
        yield from _admin_fold(hangar.runs(10_000, 500))
        yield from asyncio.run(_all(_admin_held(place, hangar.runs(10_000, 1000))))
    finally:
        shutil.rmtree(place, ignore_errors=True)


async def _all(figures: AsyncIterator[Figure]) -> list[Figure]:
    return [figure async for figure in figures]


class _Node:
    """A node's chains, and its links to the others: SSH over loopback, in one process."""

    def __init__(self, place: Path, number: int) -> None:
        self.identity = Identity.from_seed(bytes([number]) * 32)
        self.store = FeedStore(place / f"{number}-{time.monotonic_ns()}" / "chains.db", self.identity, MESH)
        self.links: dict[int, Link] = {}
        self.members: dict[int, _Member] = {}
        self.replicas = Replicating(
            self.store, me=self.identity.id, members=lambda: self.members, call=self.call
        )
        self.admin = AdminChain(self.store, self.replicas, self.identity, MESH, ROSTER)
        self._listener: Listener | None = None

    async def call(self, member: Any, method: str, params: Any, timeout_s: float) -> Any:
        return await self.links[member.id].call(method, params, timeout_s)

    async def reach(self, other: _Node) -> None:
        """Opens a link to another node."""
        sock = socket.create_server(("127.0.0.1", 0))
        addr = sock.getsockname()
        methods = self.replicas.methods()

        def authorise(line: str, username: str, where: Any) -> Login:
            return Login("member", self.identity.id, self.identity.pub, "", None, line)

        other._listener = await Listener.start(
            sock, host_key=other.identity, authorise=authorise, methods=other.replicas.methods()
        )
        self.links[other.identity.id] = await dial(
            addr, identity=self.identity, username="member", expect_pub=other.identity.pub, methods=methods
        )
        self.members[other.identity.id] = _Member(other.identity.id)

    async def close(self) -> None:
        await self.replicas.stop()
        for link in self.links.values():
            await link.close()
        if self._listener is not None:
            await self._listener.close()
        await self.store.close()


class _Member(msgspec.Struct):
    id: int
    present: bool = True


@contextlib.asynccontextmanager
async def _nodes(place: Path, count: int) -> AsyncIterator[list[_Node]]:
    nodes = [_Node(place, number) for number in range(1, count + 1)]
    try:
        for node in nodes[1:]:
            await nodes[0].reach(node)
        yield nodes
    finally:
        for node in nodes:
            await node.close()


def _op(number: int, target: Identity) -> tuple[bytes, str]:
    now_ms = time.time_ns() // 1_000_000
    op_id = new_ulid(now_ms, number.to_bytes(10, "big"))
    verb = ("cordon", "uncordon")[number % 2]
    message = build_op(verb, mesh=MESH, target=id_text(target.id), op_id=op_id, nonce="0" * 32, now_ms=now_ms)
    return message, sshsig.sign(message, OPERATOR, NAMESPACE)


async def _commits(place: Path, runs: int, fsync_ms: float) -> AsyncIterator[Figure]:
    note = "judged by the fold, written, on disk"
    for count, what in ((1, "recorded: local"), (2, "recorded: replicated")):
        async with _nodes(place, count) as nodes:
            took = []
            for run in range(runs):
                message, signature = _op(run, nodes[0].identity)
                began = time.perf_counter()
                done = await nodes[0].admin.commit_op(message, signature, "bench")
                took.append(1000 * (time.perf_counter() - began))
                if done.recorded != what.removeprefix("recorded: "):
                    raise RuntimeError(f"commit: {done}")
        bar = BAR_COMMIT_MS + fsync_ms if count == 1 else BAR_REPLICATED_MS
        yield Figure(f"admin op committed, {what}", "ms", took, bar, note=note + ", both" * (count > 1))


async def _bulk(place: Path, records: int) -> AsyncIterator[Figure]:
    async with _nodes(place, 2) as [near, far]:
        chain = "admin"
        rates = []
        body = {"hlc": [1, 1], "pad": "x" * 120}
        for first in range(0, records, 5000):
            count = min(5000, records - first)
            began = time.perf_counter()
            for at in range(0, count, BATCH):
                drafts = [Draft("bench", body, at_ms=1)] * min(BATCH, count - at)
                await far.store.append_all(chain, drafts, durable=True)
            rates.append(count / (time.perf_counter() - began))
        note = f"signed, in batches of {BATCH}, an fsync each"
        yield Figure("records appended", "/s", rates, BAR_APPENDED, at_least=True, note=note)
        latest = asyncio.create_task(_latest_tick())
        await asyncio.sleep(0)
        began = time.perf_counter()
        added = await near.replicas.sync(near.members[far.identity.id], chain)
        took = time.perf_counter() - began
        latest.cancel()
        if added != records or near.store.mark(chain) != far.store.mark(chain):
            raise RuntimeError(f"{added} of {records} records")
        yield Figure(
            f"catch-up of {records:,} records over a link", "s", [took], BAR_CATCH_UP_S, note="both ends here"
        )
        yield Figure("latest tick of the loop meanwhile", "ms", [await latest])
        began = time.perf_counter()
        wrong = await near.store.scrub(records)
        if wrong:
            raise RuntimeError(wrong[0])
        yield Figure("full check of a record", "µs", [1e6 * (time.perf_counter() - began) / records])


async def _latest_tick() -> float:
    """By how much the loop was late at most, in milliseconds, until it is cancelled."""
    worst = 0.0
    while True:
        began = time.perf_counter()
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            return worst
        worst = max(worst, 1000 * (time.perf_counter() - began) - 10)


def _black_box(records: int) -> Figure:
    """Peak memory of folding so many failures, read one after another."""

    def failures() -> Iterator[Record]:
        body = {"chain": "x" * 40, "source": "0" * 16}
        why = Failed("no route to the holder", 5000)
        for number in range(records):
            record = Record(
                id=number + 1,
                kind="action.pull_replica",
                emitted_at_ms=number,
                disposition=why,
                prev=bytes(32),
                body=body,
            )
            yield decode(encode(record))

    tracemalloc.start()
    began = time.perf_counter()
    box = unfold(failures())
    took = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if box.records != records:
        raise RuntimeError(f"{box.records} of {records} records")
    note = f"{took:.0f} s, memory being traced; bar: bounded"
    return Figure(f"peak memory of folding {records:,} failures", "MB", [peak / 1e6], 10.0, note=note)


def _admin_fold(records: int) -> Iterator[Figure]:
    node = Identity.from_seed(b"n" * 32)
    read = []
    took_read = 0.0
    for number in range(1, records + 1):
        message, signature = _op(number, node)
        body = adminop.op_body(decode_op(message), message, signature, "bench")
        now_ms = time.time_ns() // 1_000_000
        record = Record(
            id=number,
            kind=adminop.OP,
            emitted_at_ms=now_ms,
            disposition=Dispatched(),
            prev=bytes(32),
            body={**body, "hlc": [now_ms, number]},
        )
        began = time.perf_counter()
        event = adminop.read_event(record, hash_of(encode(record)), node.pub, MESH)
        took_read += time.perf_counter() - began
        if event is None or event.wrong:
            raise RuntimeError(event and event.wrong)
        read.append(event)
    yield Figure("admin record read, its op's signature checked", "µs", [1e6 * took_read / records])
    fold = AdminFold(ROSTER)
    late = read.pop(records // 2)
    began = time.perf_counter()
    fold.add(read)
    fold.advance(time.time_ns() // 1_000_000)
    yield Figure(f"fold of {records:,} admin records", "ms", [1000 * (time.perf_counter() - began)])
    fold.add([late])
    began = time.perf_counter()
    fold.advance(time.time_ns() // 1_000_000)
    yield Figure("one that belongs in the middle of them", "ms", [1000 * (time.perf_counter() - began)])


async def _admin_held(place: Path, records: int) -> AsyncIterator[Figure]:
    """What a node holds of a long admin chain, and how long it takes to have its state when it starts."""
    async with _nodes(place, 1) as [node]:
        drafts = []
        for number in range(1, records + 1):
            message, signature = _op(number, node.identity)
            body = adminop.op_body(decode_op(message), message, signature, "bench")
            at_ms = time.time_ns() // 1_000_000
            drafts.append(Draft(adminop.OP, {**body, "hlc": [at_ms, number]}, at_ms=at_ms))
        for first in range(0, records, BATCH):
            await node.store.append_all(adminop.ADMIN, drafts[first : first + BATCH], durable=False)
        drafts.clear()
        starts = []
        for what in ("the first time: each read, its op's signature checked", "from a checkpoint"):
            gc.collect()
            tracemalloc.start()
            admin = AdminChain(node.store, node.replicas, node.identity, MESH, ROSTER)
            await admin.load()
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            yield Figure(f"held of {records:,} admin records, {what}", "MB", [held / 1e6], BAR_HELD_MB)
            yield Figure("the same a record", "bytes", [held / records])
            took = []
            for _ in range(5 if starts else 1):
                began = time.perf_counter()
                await AdminChain(node.store, node.replicas, node.identity, MESH, ROSTER).load()
                took.append(1000 * (time.perf_counter() - began))
            starts.append(took)
        yield Figure(f"admin state of {records:,} records at a start", "ms", starts[1], BAR_START_MS)
