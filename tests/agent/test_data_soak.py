"""1 GiB over a real link between two processes: the puller is killed half-way, resumes, verifies; memory stays flat."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.data.chunks import CHUNK_BYTES, count_of, list_digest, sums_of
from agent.data.serving import Serving
from tests.agent.data_nodes import noise
from tests.agent.test_data_blobs import opened
from tests.agent.test_data_fetching import PULLER
from tests.discovery.loopback import listening

SIZE = 2**30
FLAT_BYTES = 24 * 2**20
"""What a gigabyte may add to a process, buffers of the connection included."""


@pytest.mark.soak
def test_gigabyte_pulled_by_a_process_that_is_killed_half_way_resumes_with_memory_flat(
    tmp_path: Path,
) -> None:
    block = noise(CHUNK_BYTES, 7)
    store = opened(tmp_path / "from")
    sums = sums_of(block for _ in range(count_of(SIZE)))
    part = store.part(sums.hash, SIZE, sums.list)
    part.open()
    for _ in range(count_of(SIZE)):
        part.add(block)
    store.adopt(part)
    store.published = store.has  # type: ignore[method-assign]
    serving = Serving(store)
    here = psutil.Process()

    async def pull(port: int, until_bytes: int) -> tuple[int, int, int, int]:
        """Pulls until so many bytes are there, then kills; the bytes first and last told, and how far memory rose."""
        argv = [sys.executable, "-c", textwrap.dedent(PULLER), str(tmp_path / "to"), str(port)]
        argv += [sums.hash, str(SIZE), list_digest(sums.list)]
        puller = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        assert puller.stdout is not None
        there = psutil.Process(puller.pid)
        first = last = 0
        base = peak = served = 0
        try:
            while line := await puller.stdout.readline():
                last = int(line)
                first = first or last
                if last >= until_bytes:
                    break
                if (last // CHUNK_BYTES) % 16 == 0:
                    rss = there.memory_info().rss
                    base = base or rss
                    peak, served = max(peak, rss), max(served, here.memory_info().rss)
        finally:
            if puller.returncode is None and last < SIZE:
                puller.kill()
            await puller.wait()
        return first, last, peak - base, served

    async def run() -> None:
        async with listening(serving.methods()) as (_, addr):
            before = here.memory_info().rss
            _, half, grew, _ = await pull(addr[1], SIZE // 2)
            assert SIZE // 2 <= half < SIZE and grew < FLAT_BYTES
            first, last, grew, served = await pull(addr[1], SIZE + 1)
            assert first >= half and last == SIZE
            assert grew < FLAT_BYTES and served - before < FLAT_BYTES, (grew, served - before)
        assert serving.counters["blob_bytes"] < SIZE + 64 * CHUNK_BYTES, "what was there was not sent again"

    asyncio.run(run())
    to: Any = opened(tmp_path / "to").part(sums.hash, SIZE, sums.list)
    to.open()
    assert to.sound
    to.close()
