"""Looking for damage: every chunk of every blob read again, slowly, all the time.

A damaged blob is taken out of use at once and told; who shall hold it fetches what is bad in it from another holder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from agent.data.blobs import BlobStore, Entry
from agent.data.chunks import CHUNK_BYTES, count_of
from discovery.errors import QuarterdeckError, Refused

BYTES_PER_S = 8e6
"""A disk of 1 TB of artifacts is read in a day and a half; a core is not felt."""
REST_S = 3600.0
"""Between two rounds."""
SUSPECTS_MAX = 64

OnDamage = Callable[[Entry, int | None], None]
"""`(what is damaged, which chunk)`; None: the list of chunks."""


class Scrub:
    """Runs until it is cancelled (`run`). `on_damage` is told after the blob was quarantined."""

    def __init__(
        self,
        store: BlobStore,
        on_damage: OnDamage,
        *,
        bytes_per_s: float = BYTES_PER_S,
        rest_s: float = REST_S,
    ) -> None:
        self._store = store
        self._on_damage = on_damage
        self._bytes_per_s = bytes_per_s
        self._rest_s = rest_s
        self._suspects: dict[str, int] = {}
        self._wake = asyncio.Event()
        self.rounds = 0
        self.checked_bytes = 0
        self.damaged = 0

    def suspect(self, hash: str, chunk: int) -> None:
        """Has a blob looked at next, at that chunk first: somebody got it damaged from here."""
        if len(self._suspects) < SUSPECTS_MAX:
            self._suspects[hash] = chunk
            self._wake.set()

    async def run(self) -> None:
        while True:
            for entry in sorted(self._store.held(), key=lambda entry: entry.name):
                await self._look_at_suspects()
                await self.look(entry)
            self.rounds += 1
            until = time.monotonic() + self._rest_s
            while (left := until - time.monotonic()) > 0:
                self._wake.clear()
                await self._look_at_suspects()
                try:
                    async with asyncio.timeout(left):
                        await self._wake.wait()
                except TimeoutError:
                    break

    async def look(self, entry: Entry) -> bool:
        """Checks one artifact from end to end, at the pace that is set; whether it is sound."""
        store, due = self._store, time.monotonic()
        try:
            hashes = await asyncio.to_thread(store.proved_list, entry)
        except Refused as why:
            return why.code == "unknown" or self._damaged(entry, None)
        for index in range(count_of(entry.size)):
            if not store.has(entry.hash):
                return True
            if not await asyncio.to_thread(store.check_chunk, entry.hash, index, hashes):
                return self._damaged(entry, index)
            self.checked_bytes += CHUNK_BYTES
            due = max(due, time.monotonic()) + CHUNK_BYTES / self._bytes_per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return True

    async def _look_at_suspects(self) -> None:
        while self._suspects:
            hash, chunk = self._suspects.popitem()
            entry = next((entry for entry in self._store.held() if entry.hash == hash), None)
            if entry is None or chunk >= count_of(entry.size):
                continue
            try:
                hashes = await asyncio.to_thread(self._store.proved_list, entry)
                sound = await asyncio.to_thread(self._store.check_chunk, hash, chunk, hashes)
            except QuarterdeckError:
                continue
            if not sound:
                self._damaged(entry, chunk)

    def _damaged(self, entry: Entry, chunk: int | None) -> bool:
        if self._store.has(entry.hash):
            self.damaged += 1
            self._store.counters["bad_chunk"] += 1
            self._store.quarantine(entry.hash)
            self._on_damage(entry, chunk)
        return False
