"""How long an op takes: over an open connection, and with a new one; beside this disk's own fsync."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from bench.figures import Figure
from bench.fleet import BIN, Agent, Fleet, Hangar, environment
from tui.client import Client, attach_entry
from tui.ops import OpSender
from tui.signers import find_signer

BAR_OPEN_MS = 10.0
BAR_NEW_MS = 60.0


def measure(hangar: Hangar) -> Iterator[Figure]:
    fleet = hangar.empty()
    near, far = fleet.boot(2)
    disk = fsyncs(fleet.home.state, hangar.runs(100, 20))
    fsync = Figure("one fsync of 4 KiB on the same disk", "ms", disk)
    yield fsync
    local, direct, new = asyncio.run(_ops(fleet, near, far, hangar.runs(100, 20), hangar.runs(30, 5)))
    bar = BAR_OPEN_MS + fsync.median
    note = "challenge, signature, op and its durable record; resume and drain in turn"
    yield Figure("op answered, connection open, by the agent itself", "ms", local, bar, note=note)
    yield Figure("op answered, connection open, through another agent", "ms", direct, bar, note=note)
    yield Figure("op answered, new connection", "ms", new, BAR_NEW_MS, note="login and hello too")
    took = []
    for run in range(hangar.runs(7, 2)):
        began = time.monotonic()
        verb = ("drain", "resume")[run % 2]
        words = [str(BIN / "qd"), verb, far.name, "--home", str(fleet.home.root), "--json"]
        subprocess.run(words, env=environment(fleet.home), check=True, capture_output=True, timeout=30)
        took.append(1000 * (time.monotonic() - began))
    yield Figure("`qd drain NODE`, `qd resume NODE`: the whole command", "ms", took)


def fsyncs(place: Path, runs: int) -> list[float]:
    """Milliseconds of appending 4 KiB and making it durable, each."""
    took = []
    path = place / "fsync.tmp"
    with path.open("wb", buffering=0) as file:
        for _ in range(runs):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    path.unlink()
    return took


@contextlib.asynccontextmanager
async def attached(fleet: Fleet, agent: Agent) -> AsyncIterator[tuple[Client, OpSender]]:
    """A client of that agent, and what signs and sends through it."""
    entry = next(e for e in fleet.home.running() if e.name == agent.name)
    client = await attach_entry(fleet.home, entry)
    try:
        yield client, OpSender(client, await find_signer(fleet.home, None))
    finally:
        await client.close()


async def _ops(
    fleet: Fleet, near: Agent, far: Agent, runs: int, new_runs: int
) -> tuple[list[float], list[float], list[float]]:
    async with attached(fleet, near) as (client, sender):
        ids = {row["name"]: row["id"] for row in await client.nodes()}
        await _act(sender, 0, ids[far.name])
        local = [await _act(sender, run, ids[near.name]) for run in range(runs)]
        direct = [await _act(sender, run, ids[far.name]) for run in range(runs)]
    new = []
    for run in range(new_runs):
        began = time.perf_counter()
        async with attached(fleet, near) as (_, sender):
            await _act(sender, run, ids[near.name])
            new.append(1000 * (time.perf_counter() - began))
    return local, direct, new


async def _act(sender: OpSender, run: int, target: str) -> float:
    """One op of a pair that undo each other; milliseconds until it was answered."""
    began = time.perf_counter()
    result = await sender.act(("drain", "resume")[run % 2], target)
    took = 1000 * (time.perf_counter() - began)
    if result["result"] not in ("done", "accepted"):
        raise RuntimeError(f"op: {result}")
    return took
