"""One attachment to agents of several meshes of a home, for a screen that shows them all.

Each mesh is shown as one of its own agents sees it, and an op goes to the agent whose mesh its target is in. Nothing
is merged within a mesh, and nothing is shown of a mesh of which no agent answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from agent.home import Home, RunEntry
from discovery.errors import QuarterdeckError, Refused, Unreachable
from tui.client import Client, Row, attach_entry
from tui.session import AgentLost

FIRST_FRAMES_S = 2.0


class Several:
    """Behaves as a `Client`; the first of `clients` is the one whose `hello` counts."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = list(clients)
        self.hello = self.clients[0].hello
        self._of: dict[str, Client] = {}
        """Node id → the client that sees it."""

    @property
    def closed(self) -> bool:
        return any(client.closed for client in self.clients)

    async def nodes(self, mesh: str | None = None) -> list[Row]:
        rows = []
        for client in self._for(mesh):
            for row in await client.nodes(mesh):
                self._of[str(row.get("id"))] = client
                rows.append(row)
        return rows

    async def node(self, node: str) -> dict[str, Any]:
        return await (await self._seeing(node)).node(node)

    async def events(self, limit: int) -> list[Row]:
        found = [event for client in self.clients for event in await client.events(limit)]
        return sorted(found, key=lambda e: e.get("at_ms") or 0)[-limit:] if limit else []

    async def meshes(self) -> list[Row]:
        return [row for client in self.clients for row in await client.meshes()]

    async def resolve(self, text: str) -> dict[str, Any]:
        """As the first agent that knows the name says it; the first agent's refusal when none does."""
        refusal: Refused | None = None
        for client in self.clients:
            try:
                return await client.resolve(text)
            except Refused as why:
                if refusal is None or refusal.code == "unknown":
                    refusal = why
        assert refusal is not None
        raise refusal

    async def challenge(self, target: str) -> dict[str, Any]:
        return await (await self._seeing(target)).challenge(target)

    async def op(
        self, target: str, message: bytes, signature: str, timeout_s: float = 65.0
    ) -> dict[str, Any]:
        return await (await self._seeing(target)).op(target, message, signature, timeout_s)

    async def watch(self, mesh: str | None = None, events: int = 200) -> AsyncIterator[dict[str, Any]]:
        """One full frame of all meshes, then each agent's changes as they come; ends as soon as one agent goes."""
        queue: asyncio.Queue[tuple[Client, dict[str, Any] | Exception]] = asyncio.Queue(maxsize=64)
        clients = self._for(mesh)
        tasks = [asyncio.create_task(self._pump(client, mesh, events, queue)) for client in clients]
        try:
            first, early = await self._first(queue, len(clients))
            yield first
            while True:
                frame = early.popleft() if early else (await queue.get())[1]
                if isinstance(frame, Exception):
                    raise frame
                yield frame
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        for client in self.clients:
            with contextlib.suppress(Exception):
                await client.close()

    async def _pump(
        self,
        client: Client,
        mesh: str | None,
        events: int,
        queue: asyncio.Queue[tuple[Client, dict[str, Any] | Exception]],
    ) -> None:
        try:
            async with contextlib.aclosing(client.watch(mesh, events)) as frames:  # type: ignore[type-var]
                async for frame in frames:
                    for row in frame.get("rows") or []:
                        self._of[str(row.get("id"))] = client
                    await queue.put((client, frame))
            await queue.put((client, AgentLost(client.name, "the agent has gone")))
        except Unreachable as why:
            await queue.put((client, AgentLost(client.name, str(why))))
        except QuarterdeckError as why:
            await queue.put((client, why))

    async def _first(
        self, queue: asyncio.Queue[tuple[Client, dict[str, Any] | Exception]], wanted: int
    ) -> tuple[dict[str, Any], deque[dict[str, Any] | Exception]]:
        """The full frames of all agents as one, and what came meanwhile from those that were quicker."""
        parts: dict[int, dict[str, Any]] = {}
        early: deque[dict[str, Any] | Exception] = deque()
        try:
            async with asyncio.timeout(FIRST_FRAMES_S):
                while len(parts) < wanted:
                    client, frame = await queue.get()
                    if isinstance(frame, Exception) and id(client) not in parts:
                        raise frame
                    if isinstance(frame, Exception) or not frame.get("full"):
                        early.append(frame)
                    else:
                        parts[id(client)] = frame
        except TimeoutError:
            raise Unreachable(f"only {len(parts)} of {wanted} agents answer") from None
        frames = [parts[id(client)] for client in self.clients if id(client) in parts]
        counters: dict[str, int] = {}
        for frame in frames:
            for code, count in (frame.get("counters") or {}).items():
                counters[code] = counters.get(code, 0) + count
        whole = {
            **frames[0],
            "rows": [row for frame in frames for row in frame.get("rows") or []],
            "events": sorted(
                (event for frame in frames for event in frame.get("events") or []),
                key=lambda e: e.get("at_ms") or 0,
            ),
            "counters": counters,
        }
        return whole, early

    def _for(self, mesh: str | None) -> list[Client]:
        return [client for client in self.clients if mesh in (None, client.mesh)] or self.clients[:1]

    async def _seeing(self, node: str) -> Client:
        if node not in self._of:
            await self.nodes()
        if node not in self._of:
            raise Refused("unknown", f"{node}: no such node")
        return self._of[node]


async def attach_several(home: Home, first: RunEntry) -> Client | Several:
    """A client of `first`, and beside it one of an agent of each other mesh that runs in this home."""
    clients = [await attach_entry(home, first)]
    for entry in home.running():
        if entry.mesh not in {client.mesh for client in clients}:
            with contextlib.suppress(QuarterdeckError):
                clients.append(await attach_entry(home, entry))
    return clients[0] if len(clients) == 1 else Several(clients)
