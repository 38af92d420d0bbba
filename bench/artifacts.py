"""What artifacts cost: a gigabyte over a link and in memory, taking it up again, the scrub, the fold of who holds what."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from agent.data.blobs import BlobStore
from agent.data.chunks import CHUNK_BYTES, count_of, list_digest, sums_of
from agent.data.holdings import Holdings, Item, Own
from agent.data.serving import Serving
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Tick
from agent.meshos.reconcile import run_pass
from agent.meshos.state import MeshOsState, fold
from bench.figures import Figure
from bench.fleet import Hangar
from tests.agent.data_sim import Sim, in_virtual_time
from tests.discovery.loopback import listening

MIB = 2**20

PULLER = """
    import asyncio, sys, time
    from pathlib import Path
    from agent.data.blobs import BlobStore
    from agent.data.fetching import LinkSource, Want, fetch
    from tests.discovery.loopback import dial_as_client
    place, port, hash, size, digest = Path(sys.argv[1]), *sys.argv[2:]

    async def run():
        store = BlobStore(place, 0)
        connection = await dial_as_client(("127.0.0.1", int(port)), {})
        async def link():
            return connection
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        part = await fetch(Want(hash, int(size), digest), [LinkSource("server", link)],
                           lambda hashes: store.part(hash, int(size), hashes))
        print(time.perf_counter() - began, flush=True)
        sys.stdin.readline()
        part.close()

    asyncio.run(run())
"""


def measure(hangar: Hangar) -> Iterator[Figure]:
    size = 64 * MIB if hangar.quick else 1024 * MIB
    with tempfile.TemporaryDirectory() as folder:
        yield from asyncio.run(_transfer(Path(folder), size))
        yield from _scrub(Path(folder))
    yield from _fold(1_000 if hangar.quick else 10_000)
    yield from _drain()


def _filled(place: Path, size: int) -> tuple[BlobStore, str, str]:
    """A store with one blob of that size; its hash and the digest of its list."""
    block = bytes(range(256)) * (CHUNK_BYTES // 256)
    chunks = count_of(size)
    store = BlobStore(place, 0)
    sums = sums_of(block for _ in range(chunks))
    part = store.part(sums.hash, size, sums.list)
    part.open()
    for _ in range(chunks):
        part.add(block)
    store.adopt(part)
    store.published = store.has  # type: ignore[method-assign]
    return store, sums.hash, list_digest(sums.list)


async def _transfer(folder: Path, size: int) -> list[Figure]:
    store, hash, digest = await asyncio.to_thread(_filled, folder / "from", size)
    name = f"artifact of {size // MIB} MiB"
    note = "two processes, one link over loopback, hashed and written at the other end"
    async with listening(Serving(store).methods()) as (_, addr):
        here = psutil.Process()
        before = here.memory_info().rss
        took_s, grew = await _pull(folder / "to", addr[1], hash, size, digest)
        served = max(0, here.memory_info().rss - before)
        again_s, _ = await _pull(folder / "to", addr[1], hash, size, digest)
    return [
        Figure(f"{name}: pulled", "MiB/s", [size / MIB / took_s], note=note),
        Figure(f"{name}: memory of the puller grew by", "MiB", [grew / MIB], bar=24.0),
        Figure(f"{name}: memory of the holder grew by", "MiB", [served / MIB], bar=24.0),
        Figure(
            f"{name}: taken up again after a crash at its end", "s", [again_s], note="every chunk checked"
        ),
    ]


async def _pull(place: Path, port: int, hash: str, size: int, digest: str) -> tuple[float, int]:
    """Seconds that a pull in a process of its own took, and how much its memory grew at most."""
    argv = [sys.executable, "-c", textwrap.dedent(PULLER), str(place), str(port), hash, str(size), digest]
    puller = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert puller.stdin is not None and puller.stdout is not None
    try:
        await puller.stdout.readline()
        process = psutil.Process(puller.pid)
        base = peak = process.memory_info().rss
        puller.stdin.write(b"\n")
        answer = asyncio.ensure_future(puller.stdout.readline())
        while not answer.done():
            peak = max(peak, process.memory_info().rss)
            await asyncio.wait([answer], timeout=0.05)
        puller.stdin.write(b"\n")
        return float(answer.result()), peak - base
    finally:
        puller.stdin.close()
        await puller.wait()


def _scrub(folder: Path) -> Iterator[Figure]:
    size = 64 * MIB
    store, hash, _ = _filled(folder / "scrub", size)
    hashes = store.chunk_list(hash)
    rates = []
    for _ in range(3):
        began = time.process_time()
        assert all(store.check_chunk(hash, index, hashes) for index in range(count_of(size)))
        rates.append(1000 * (time.process_time() - began) / (size / MIB))
    yield Figure(
        "scrub: a MiB checked", "ms CPU", rates, note="at its pace of 8 MB/s, that much eight times a second"
    )


def _fold(items: int) -> Iterator[Figure]:
    """A node learns what ten others hold, and then of one change."""
    nodes = 10
    owns = [Own(1) for _ in range(nodes)]
    for node, own in enumerate(owns):
        for at in range(items):
            if at % nodes in (node, (node + 1) % nodes, (node + 2) % nodes):
                own.add(Item("artifact", f"a{at:06}", f"{at:064x}", 1_000, 3, 1, ""))
    holdings, engine = Holdings(99), MeshOsState(99, MeshOsConfig())
    began = time.perf_counter()
    holdings.live(range(nodes), (), 0)
    for node, own in enumerate(owns):
        holdings.heard(node, own.told())
    for event in holdings.events():
        fold(engine, event)
    yield Figure(f"{items:,} artifacts on 3 of 10 nodes learned", "s", [time.perf_counter() - began])
    fold(engine, Tick(at_ms=500))
    run_pass(engine)
    samples = []
    for at in range(200):
        owns[0].add(Item("artifact", f"new{at}", "aa", 1_000, 3, 1, ""))
        told = owns[0].told(holdings.version(0))
        began = time.perf_counter()
        holdings.heard(0, told)
        for event in holdings.events():
            fold(engine, event)
        samples.append(1000 * (time.perf_counter() - began))
    yield Figure("one artifact more, heard and folded", "ms", samples, bar=1.0)


def _drain() -> Iterator[Figure]:
    async def run() -> float:
        sim = Sim(5)
        for at in range(50):
            sim.nodes[4].take(Item("artifact", f"a{at}", "aa", 20_000_000, 1, 1, ""))
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        await sim.admin("drain", 5)
        await sim.until(lambda: not sim.nodes[4].runtime.loop.state.left(), 300.0)
        took = asyncio.get_running_loop().time() - began
        await sim.close()
        return took

    note = "virtual time: 5 nodes, 20 MB each at 100 MB/s, pulls 250 ms apart"
    yield Figure("drain of a node with 50 artifacts", "s", [in_virtual_time(run)], note=note)
