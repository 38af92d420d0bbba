"""Checkpoints of the admin chain's fold on disk, so that a start reads what came since and not all there ever was.

A checkpoint says of which records it is the fold: the newest of each feed with its hash, and the numbers below that are
not in it. One that doesn't fit the feeds, was altered, or is of another fold or another roster's beginning is no checkpoint.
The newest are close together and older ones ever wider apart: in slot n is the last of every 2ⁿ-th.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from agent.chain.adminfold import Checkpoint
from agent.chain.adminop import ADMIN
from agent.chain.adminreading import Mark
from agent.chain.feeds import FeedStore
from agent.chain.weighing import Link
from discovery.errors import Refused

SLOTS = 8
NOTE = "admin fold"


class Kept(msgspec.Struct, frozen=True):
    """A checkpoint as it is kept: `of` is the fold it belongs to, `read` and `again` the records that it stands for."""

    of: bytes
    serial: int
    checkpoint: Checkpoint
    read: list[tuple[bytes, Link]]
    again: list[tuple[bytes, int, int]] = []

    def mark(self) -> Mark:
        """How far a reader is who goes on from it."""
        return Mark(self.read, self.again)


class AdminKept:
    """The checkpoints in a store of the fold that `of` names."""

    def __init__(self, store: FeedStore, of: bytes) -> None:
        self._store = store
        self._of = of
        self._serials: dict[int, int] = {}
        """Of what is in each slot."""
        for slot in range(SLOTS):
            if (kept := self._read(slot)) is not None:
                self._serials[slot] = kept.serial

    def newest_first(self) -> Iterator[Kept]:
        """Those that fit the feeds."""
        for slot in sorted(self._serials, key=lambda slot: -self._serials[slot]):
            kept = self._read(slot)
            if kept is not None and self._fits(kept):
                yield kept

    async def keep(self, checkpoint: Checkpoint, mark: Mark, again: list[tuple[bytes, int, int]]) -> bool:
        """Keeps a checkpoint, made when a reader was at `mark` and those of `again` were not in it. False when the disk
        refused."""
        serial = max(self._serials.values(), default=0) + 1
        slot = min((serial & -serial).bit_length(), SLOTS) - 1
        kept = Kept(self._of, serial, checkpoint, list(mark.read.items()), [*mark.spans(), *again])
        with contextlib.suppress(Refused):
            await self._store.remember(f"{NOTE} {slot}", msgspec.msgpack.encode(kept))
            self._serials[slot] = serial
            return True
        return False

    def _read(self, slot: int) -> Kept | None:
        with contextlib.suppress(msgspec.MsgspecError):
            kept = msgspec.msgpack.decode(self._store.recall(f"{NOTE} {slot}") or b"", type=Kept)
            return kept if kept.of == self._of else None
        return None

    def _fits(self, kept: Kept) -> bool:
        feeds = {feed.writer: feed for feed in self._store.feeds(ADMIN)}
        for writer, link in kept.read:
            feed = feeds.get(writer)
            if feed is None or feed.head.id < link.id:
                return False
            if feed.head != link and self._store.hashes(ADMIN, writer, link.id, link.id) != [link]:
                return False
        return True
