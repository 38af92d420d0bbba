"""Nodes on a NATS backbone, with what they were told, for the tests of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from discovery.backbone.nats import NatsBackbone, mesh_key
from discovery.summary import SignedSummary
from tests.nats_server import NatsServer

KEY, FOREIGN_KEY = b"k" * 32, b"f" * 32
MESH_PUB = b"p" * 32


def key_of(mesh: str) -> str:
    """Under what a mesh of these tests keeps its values."""
    return mesh_key(mesh, MESH_PUB)


def summary(text: str) -> SignedSummary:
    return SignedSummary(text.encode(), b"s" * 64)


class Node:
    """A backbone with what it told: summaries as (text, age in s, when), statuses as (up, reason, when)."""

    def __init__(self, url: str, mesh: str, me: int = 1, **more: Any) -> None:
        self.heard: list[tuple[str, float, float]] = []
        self.statuses: list[tuple[bool, str, float]] = []
        self.backbone = NatsBackbone(
            **{
                "urls": [url],
                "key": KEY,
                "mesh": mesh,
                "mesh_pub": MESH_PUB,
                "me": me,
                "on_summary": lambda signed, age_s: self.heard.append(
                    (signed.blob.decode(), age_s, time.monotonic())
                ),
                "on_status": lambda up, reason: self.statuses.append((up, reason, time.monotonic())),
                **more,
            }
        )

    def has_heard(self, text: str) -> bool:
        return any(heard == text for heard, _, _ in self.heard)

    @property
    def told_up(self) -> bool | None:
        return self.statuses[-1][0] if self.statuses else None


@contextlib.asynccontextmanager
async def nodes(*created: Node) -> AsyncIterator[None]:
    """Starts them, waits until they are up, and closes them: quickly, and with no task left over."""
    alone = asyncio.all_tasks() == {asyncio.current_task()}
    for node in created:
        await node.backbone.start()
    try:
        await until(lambda: all(node.backbone.up for node in created))
        yield
    finally:
        for node in created:
            began = time.monotonic()
            await node.backbone.close()
            assert time.monotonic() - began < 1.0
    assert not alone or asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.002)


async def until_true(call: Callable[[], Awaitable[bool]], within_s: float, every_s: float = 0.02) -> None:
    deadline = time.monotonic() + within_s
    while not await call():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(every_s)


async def timed(call: Awaitable[bool]) -> tuple[bool, float]:
    began = time.monotonic()
    return await call, time.monotonic() - began


@contextlib.asynccontextmanager
async def raw(server: NatsServer) -> AsyncIterator[Any]:
    """Somebody else on the cluster, with no key of ours."""
    from nats.aio.client import Client

    client = Client()
    await client.connect(server.url, allow_reconnect=False)
    try:
        yield client
    finally:
        await client.close()
