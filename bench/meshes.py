"""Many meshes: how soon a change in one is in a console of another, and what following costs at rest.

Real agents on loopback, booted as the demo does. Times run from before an op is sent until the frame that tells of the
change has arrived at a client of the console's agent: the op itself is part of them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil

from bench.figures import Figure
from bench.fleet import Hangar
from tui.client import Client, attach_entry
from tui.demo.fleet import Fleet, FleetNode, parse_plan
from tui.ops import OpSender
from tui.signers import find_signer

BAR_MS = 250.0
SEEN_LIMIT_S = 30.0
REST_S = 15.0


def measure(hangar: Hangar) -> Iterator[Figure]:
    meshes, runs = hangar.runs(10, 3), hangar.runs(20, 3)
    yield from asyncio.run(_changes(meshes, runs))
    for count in (2, 5, 10) if meshes == 10 else (2,):
        yield asyncio.run(_backbone(count, hangar.runs(5, 2)))


@asynccontextmanager
async def booted(plan: str) -> AsyncIterator[Fleet]:
    fleet = Fleet.under(parse_plan(plan), None, lambda line: None)
    try:
        await fleet.boot()
        yield fleet
    finally:
        await fleet.stop()


class Seen:
    """What one `watch` stream shows, and when each row last came."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rows: dict[str, dict[str, Any]] = {}
        self.publishers: dict[str, Any] = {}
        self.news = asyncio.Event()

    async def follow(self) -> None:
        async for frame in self.client.watch(None, events=0):
            self.rows.update({row["id"]: row for row in frame["rows"]})
            for node in frame["gone"]:
                self.rows.pop(node, None)
            for mesh in frame.get("meshes", ()):
                self.publishers[mesh["mesh"]] = mesh["publisher"]["id"]
            self.news.set()

    async def until(self, held: Callable[[], bool]) -> float:
        """When it held: the time at which the frame was taken in."""
        async with asyncio.timeout(SEEN_LIMIT_S):
            while not held():
                self.news.clear()
                await self.news.wait()
        return time.perf_counter()


async def _changes(meshes: int, runs: int) -> list[Figure]:
    plan = "m0=console:1,gateway:1,compute:3 " + " ".join(
        f"m{k}=gateway:2,compute:3" for k in range(1, meshes)
    )
    async with booted(plan) as fleet:
        console = next(n for n in fleet.nodes if n.kind == "console")
        assert console.entry is not None
        client = await attach_entry(fleet.home, console.entry)
        seen = Seen(client)
        following = asyncio.create_task(seen.follow())
        try:
            sender = OpSender(client, await find_signer(fleet.home, None))
            everybody = {n.id for n in fleet.nodes}
            await seen.until(lambda: everybody <= seen.rows.keys())
            of = f"{meshes} meshes of 5 nodes"
            figures = [await _ops(fleet, seen, sender, runs, of)]
            figures += await _takeovers(fleet, seen, sender, of)
            return figures
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await client.close()


async def _ops(fleet: Fleet, seen: Seen, sender: OpSender, runs: int, of: str) -> Figure:
    targets = [n for n in fleet.nodes if n.kind == "compute" and n.mesh != "m0"]
    samples = []
    for run in range(runs):
        target = targets[run % len(targets)]
        for verb, state in (("drain", "draining"), ("resume", "alive")):
            await asyncio.sleep(0.3)
            began = time.perf_counter()
            answer = asyncio.create_task(sender.act(verb, target.id))
            at = await seen.until(lambda t=target, s=state: seen.rows[t.id]["state"] == s)  # type: ignore[misc]
            assert (await answer)["result"] in ("done", "accepted")
            samples.append((at - began) * 1000)
    return Figure(f"change in one mesh → console of another, {of}", "ms", samples, BAR_MS, note="op included")


async def _takeovers(fleet: Fleet, seen: Seen, sender: OpSender, of: str) -> list[Figure]:
    """In a mesh each: its publisher ends in one of the ways, and the console shows another one."""
    figures = []
    for number, (how, bar) in enumerate(
        (("goodbye", 500.0), ("update", 500.0), ("SIGKILL", 7000.0), ("SIGSTOP", 7000.0))
    ):
        samples = []
        for mesh in [m for m, _ in fleet.plan[1:]][number::4][:3]:
            holder = next(n for n in fleet.nodes if n.id == seen.publishers[mesh])
            began = time.perf_counter()
            ending = asyncio.create_task(_end(holder, how, sender))
            at = await seen.until(lambda m=mesh, h=holder: seen.publishers[m] not in (None, h.id))  # type: ignore[misc]
            await ending
            samples.append((at - began) * 1000)
            if how == "SIGSTOP":
                os.kill(holder.pid, signal.SIGCONT)
        if samples:
            figures.append(Figure(f"{how} of the publisher → another is shown, {of}", "ms", samples, bar))
    return figures


async def _end(node: FleetNode, how: str, sender: OpSender) -> None:
    if how == "goodbye":
        await sender.act("kill", node.id)
    elif how == "update":
        await sender.act("update", node.id)
    else:
        os.kill(node.pid, signal.SIGKILL if how == "SIGKILL" else signal.SIGSTOP)


async def _knows(client: Client, meshes: int) -> None:
    while True:
        if len(await client.meshes()) == meshes:
            return
        await asyncio.sleep(0.2)


async def _backbone(meshes: int, runs: int) -> Figure:
    """All that passes on loopback while meshes of one gateway each are at rest: the backbone, and following over SSH."""
    async with booted(" ".join(f"m{k}=gateway:1" for k in range(meshes))) as fleet:
        clients = [await attach_entry(fleet.home, n.entry) for n in fleet.nodes if n.entry is not None]
        async with asyncio.timeout(SEEN_LIMIT_S):
            for client in clients:
                await _knows(client, meshes)
        for client in clients:
            await client.close()
        await asyncio.sleep(5.0)
        samples = []
        for _ in range(runs):
            before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
            await asyncio.sleep(REST_S / runs)
            sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
            samples.append(sent / (REST_S / runs) / meshes)
    return Figure(
        f"backbone at rest, {meshes} meshes of one gateway",
        "B/s a mesh",
        samples,
        None,
        note="UDP, SSH, headers",
    )
