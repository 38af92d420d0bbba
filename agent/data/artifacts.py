"""The artifacts of one node: its copies, told to the others as they come and go, and how it gets one.

A copy comes with the put that it belongs to, signature and all; a holder that can't show one is passed over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from agent.data.blobs import BlobStore, Entry
from agent.data.fetching import LinkSource, Source, Want, fetch
from agent.data.holdings import Item, Own
from agent.data.puts import Put, decode_put
from agent.opmessage import NAMESPACE
from discovery import sshsig
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.links import Link

CALL_TIMEOUT_S = 10.0

Vouch = Callable[[Any, Put], None]
"""`(who signed, put)`: Refused unless that key may put, or might when it did."""

Verify = Callable[[bytes, str, str], Any]
"""`(message, signature, namespace)` → who signed (`fingerprint`); Refused or RemoteError when it doesn't hold."""


class Artifacts:
    """Holds artifacts in a store: the `ChainHolder` of their kind. `link_to(node)`: a link to a member. `name_of(node)`:
    its name, for people. `changed()`: this node holds more or less now. `damaged(source, name, chunk)`: a holder sent a
    damaged chunk. `vouch`: whose puts count here. `disbelieve(name, node)`: that node shows no put that may be."""

    def __init__(
        self,
        store: BlobStore,
        own: Own,
        *,
        mesh: str,
        link_to: Callable[[int], Awaitable[Link]],
        name_of: Callable[[int], str],
        changed: Callable[[], None],
        damaged: Callable[[str, str, int], None] = lambda source, name, chunk: None,
        vouch: Vouch = lambda signer, put: None,
        disbelieve: Callable[[str, int], None] = lambda name, node: None,
        verify: Verify = sshsig.verify,
    ) -> None:
        self.store = store
        self._own = own
        self._mesh = mesh
        self._link_to = link_to
        self._name_of = name_of
        self._changed = changed
        self._damaged = damaged
        self._vouch = vouch
        self._disbelieve = disbelieve
        self._verify = verify
        self._coming: dict[str, asyncio.Lock] = {}
        self.counters: Counter[str] = Counter()
        """`bad_put`: a holder showed none that holds; `bad_chunk`: it sent a damaged one; `taken_in`."""
        for entry in store.held():
            own.add(item_of(entry))

    # --- ChainHolder

    def head(self, name: str) -> str | None:
        entry = self.store.entry(name)
        return entry.hash if entry is not None and self.store.has(entry.hash) else None

    def covers(self, name: str, head: str) -> bool:
        return self.head(name) == head

    async def hold(self, name: str, sources: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Gets the artifact from these holders. Refused `disk_full`, `corrupt`; Unreachable when nobody has it.

        A name that is counted and was not here is kept from now on: a process that ends before the bytes are whole is
        followed by one that knows what it was to hold, and goes on."""
        entry, nodes = await self._put_of(name, sources)
        if entry.replicas and self.store.entry(name) is None:
            await asyncio.to_thread(self.store.keep, entry)
        found = [self._source(node) for node in nodes]
        await self.take_in(entry, found, lambda done: progress(done, entry.size))

    async def drop(self, name: str) -> None:
        """Gives it up at once: it is told as gone before its bytes go."""
        if self._own.remove("artifact", name):
            self._changed()
        await asyncio.to_thread(self.store.drop, name)

    # --- taking in

    async def take_in(
        self, entry: Entry, sources: Sequence[Source], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Gets the bytes of an entry and holds it from then on; one at a time for each hash."""
        lock = self._coming.setdefault(entry.hash, asyncio.Lock())
        store = self.store
        try:
            async with lock:
                if not store.has(entry.hash):
                    part = await fetch(
                        Want(entry.hash, entry.size, entry.list),
                        sources,
                        lambda hashes: store.part(entry.hash, entry.size, hashes),
                        progress=progress,
                        on_bad=lambda source, chunk: self._bad(source, entry.name, chunk),
                    )
                    try:
                        await asyncio.to_thread(store.adopt, part)
                    except RemoteError as why:
                        part.discard()
                        raise Refused("corrupt", f"{entry.name}: {why}") from why
                    finally:
                        part.close()
                await asyncio.to_thread(store.keep, entry)
        finally:
            if not lock.locked():
                self._coming.pop(entry.hash, None)
        progress(entry.size)
        self.counters["taken_in"] += 1
        self.refresh(entry.name)

    def refresh(self, name: str) -> None:
        """Tells the others what is so of a name here now."""
        entry = self.store.entry(name)
        if entry is not None and self.store.has(entry.hash):
            news = self._own.add(item_of(entry))
        else:
            news = self._own.remove("artifact", name)
        if news:
            self._changed()

    def lost(self, hash: str) -> None:
        """The bytes of that hash are damaged and out of use: whatever they were held for is held no longer."""
        for entry in self.store.entries():
            if entry.hash == hash:
                self.refresh(entry.name)

    async def _put_of(self, name: str, sources: Iterable[int]) -> tuple[Entry, list[int]]:
        """The latest put of a name that these holders show, and who of them showed it."""
        shown: list[tuple[Entry, int]] = []
        last: QuarterdeckError = Unreachable(f"{name}: nobody holds it")
        for node in sources:
            try:
                link = await self._link_to(node)
                answer = await link.call("artifact", {"name": name}, CALL_TIMEOUT_S)
            except QuarterdeckError as why:
                last = why
                continue
            try:
                shown.append((self.entry_from(name, answer), node))
            except QuarterdeckError as why:
                last = why
                self._disbelieve(name, node)
        if not shown:
            raise last
        best = max((entry for entry, _ in shown), key=lambda entry: entry.stamp)
        known = self.store.entry(name)
        if known is not None and known.stamp > best.stamp:
            best = known
        return best, [node for entry, node in shown if entry.hash == best.hash]

    async def check(self, name: str, sources: Iterable[int]) -> None:
        """Has these holders show their puts of a name; what they can't show is disbelieved from now on."""
        with contextlib.suppress(QuarterdeckError):
            await self._put_of(name, sources)

    def entry_from(self, name: str, answer: Any) -> Entry:
        """The entry that a holder shows, its signature checked; RemoteError or Refused when it doesn't hold."""
        try:
            if not isinstance(answer, dict):
                raise RemoteError(f"{name}: no put is shown")
            message, signature = answer.get("message"), answer.get("signature")
            if not isinstance(message, bytes) or not isinstance(signature, str):
                raise RemoteError(f"{name}: no signed put is shown")
            signer = self._verify(message, signature, NAMESPACE)
            put = decode_put(message)
            if put.args.name != name or put.message.mesh != self._mesh:
                raise RemoteError(f"{name}: the put that is shown is of something else")
            self._vouch(signer, put)
            return Entry.of(put, signer.fingerprint, message, signature)
        except QuarterdeckError:
            self.counters["bad_put"] += 1
            raise

    def _source(self, node: int) -> Source:
        return LinkSource(self._name_of(node), lambda: self._link_to(node))

    def _bad(self, source: str, name: str, chunk: int) -> None:
        self.counters["bad_chunk"] += 1
        with contextlib.suppress(Exception):
            self._damaged(source, name, chunk)


def item_of(entry: Entry) -> Item:
    """What is told of an entry that is held."""
    return Item("artifact", entry.name, entry.hash, entry.size, entry.replicas, entry.at_ms, entry.op_id)


def entry_of(put: Put, fingerprint: str, message: bytes, signature: str) -> Entry:
    """The entry of a put that was judged."""
    return Entry.of(put, fingerprint, message, signature)
