"""Rows of other meshes that come all at once: verified in slices, so that whoever asks meanwhile is answered."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import following
from agent.following import OPEN_AT_ONCE, Following
from discovery.directory import Entry, encode_entries
from discovery.identity import Identity
from discovery.lifecycle import State
from discovery.member import Record, SignedRecord, seal_record

NODE = Identity.from_seed(b"n" * 32)
RECORD = Record(
    pub=NODE.pub, mesh="beta", name="b", kind="compute", incarnation=1, version=1, state=State.ALIVE, addrs=[]
)
ENTRY = Entry(seal_record(RECORD, NODE.sign), State.ALIVE, 0, 0, 0)


class Meshes:
    """What rows are handed to. Each record that is verified is noted with the turn of the loop it was verified in."""

    def __init__(self) -> None:
        self.directory = self
        self.turn = 0
        self.opened: list[int] = []
        self.fed: list[int] = []

    def open(self, signed: SignedRecord) -> None:
        self.opened.append(self.turn)

    def feed(self, mesh: str, entries: list[Entry], gone: Any, now: float, *, full: bool) -> None:
        self.fed.append(len(entries))

    def refreshed(self, mesh: str, now: float) -> None: ...


def follower() -> tuple[Following, Meshes]:
    meshes = Meshes()
    return Following(cast(Any, SimpleNamespace(meshes=meshes))), meshes


@pytest.mark.parametrize("streams", [1, 50])
def test_rows_of_many_streams_at_once_leave_every_turn_short(streams: int) -> None:
    async def run() -> None:
        asked, meshes = follower()
        frame = {"mesh": "beta", "full": True, "more": False, "entries": encode_entries([ENTRY] * 200)}
        takes = [asyncio.create_task(asked._take(frame, [], mesh="beta")) for _ in range(streams)]
        while not all(take.done() for take in takes):
            meshes.turn += 1
            await asyncio.sleep(0)
        assert meshes.fed == [200] * streams
        assert max(meshes.opened.count(turn) for turn in set(meshes.opened)) <= OPEN_AT_ONCE

    asyncio.run(run())


def test_few_rows_wait_for_no_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        asked, meshes = follower()
        long = {"mesh": "beta", "full": True, "more": False, "entries": encode_entries([ENTRY] * 400)}
        short = {"mesh": "beta", "full": False, "more": False, "entries": encode_entries([ENTRY])}
        takes = [asyncio.create_task(asked._take(frame, [], mesh="beta")) for frame in (long, short)]
        await asyncio.gather(*takes)
        assert meshes.fed == [1, 400]

    monkeypatch.setattr(following, "OPEN_AT_ONCE", 8)
    asyncio.run(run())
