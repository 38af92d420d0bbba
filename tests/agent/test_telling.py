"""A mesh told to its followers: everybody hears of every change, whoever else begins to follow meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import SimpleNamespace
from typing import Any, cast

from agent.telling import Telling
from discovery.directory import Entry, decode_entries
from discovery.identity import Identity
from discovery.lifecycle import State
from discovery.member import Member, Record, seal_record
from tests.discovery.loopback import until


def member(name: str, incarnation: int = 1, state: State = State.ALIVE) -> Member:
    key = Identity.from_seed(name.encode().ljust(32, b"-"))
    record = Record(
        pub=key.pub,
        mesh="alpha",
        name=name,
        kind="compute",
        incarnation=incarnation,
        version=1,
        state=State.ALIVE,
        addrs=[],
    )
    now = time.monotonic()
    return Member(record, seal_record(record, key.sign), state, since=now, last_seen=now, received=now)


class Mesh:
    """What a telling node knows: itself, and `members`, which a test changes."""

    def __init__(self) -> None:
        self.me = member("me")
        self.members: dict[int, Member] = {}
        self.tombstones: dict[int, Any] = {}
        node = SimpleNamespace(
            swim=self,
            settings=SimpleNamespace(mesh="alpha"),
            identity=SimpleNamespace(id=self.me.id),
            meshes=SimpleNamespace(publishing=SimpleNamespace(document=dict)),
            name_of=str,
        )
        self.telling = Telling(cast(Any, node))

    def has(self, one: Member) -> None:
        self.members[one.id] = one
        self.telling.look()


async def follow(mesh: Mesh, told: dict[str, Entry]) -> None:
    async for frame in mesh.telling._own_frames():
        for entry in decode_entries(frame.get("entries", b"\x90")):
            told[next(n for n in ("me", "b") if member(n).record.pub in entry.record.blob)] = entry


def test_change_just_before_another_begins_to_follow_is_told_to_both() -> None:
    async def run() -> None:
        mesh = Mesh()
        mesh.has(member("b", state=State.DEAD))
        first: dict[str, Entry] = {}
        second: dict[str, Entry] = {}
        tasks = [asyncio.create_task(follow(mesh, first))]
        try:
            await until(lambda: "b" in first)
            mesh.has(back := member("b", incarnation=2))  # told with what else changes within some 30 ms
            tasks.append(asyncio.create_task(follow(mesh, second)))
            await until(lambda: "b" in second)
            await until(lambda: first["b"].record == second["b"].record == back.signed)
            assert first["b"].state is State.ALIVE
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            mesh.telling.close()

    asyncio.run(run())
