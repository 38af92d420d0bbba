"""Getting a blob from whoever has it, in ranges, verified chunk by chunk, taken up again wherever it stopped.

Over a link it is a stream of the link's own, not SFTP beside it, for three reasons. A link may have been dialled from
either end, and SSH lets only the dialling end open a session: a holder that can't be dialled could never be pulled
from. The link doesn't know of an SFTP session: it would close as idle under it, and none of its limits would count.
And it is slower: 128 MiB over loopback took SFTP (asyncssh 2.24, same ciphers) 1.2 to 2 times as long as this stream.
What SFTP would give is here: reads by range that resume, read only, of published blobs by their hash, nothing else.

Memory is one chunk and one window of the link, whatever the size.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agent.data.chunks import HASH_BYTES, SIZE_MAX_BYTES, check_list, count_of, length_of
from agent.data.parts import BadChunk, Part
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.links import Link

LIST_TIMEOUT_S = 10.0
STALL_S = 15.0
"""A source that sends nothing for so long is passed over."""
BUSY_WAIT_S = 0.5
BUSY_WAITS = 40
"""How often a source that has too many readers is asked again."""
ROUNDS_WITHOUT_PROGRESS = 2
"""How often all sources may fail, one after the other, with no new chunk between."""


class Source(Protocol):
    """Somebody who may have a blob."""

    @property
    def name(self) -> str: ...

    async def chunk_list(self, hash: str, size: int) -> bytes:
        """The hashes of its chunks; nothing in it is proved."""

    def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
        """Those bytes, in pieces of any size; nothing in them is proved."""

    async def suspect(self, hash: str, index: int) -> None:
        """Tells it that this chunk of its copy was damaged when it came."""


class LinkSource:
    """A node at the other end of a link. `link()` gives the link, dialled if need be."""

    def __init__(self, name: str, link: Callable[[], Any], prefix: str = "blob") -> None:
        self._name = name
        self._link = link
        self._prefix = prefix

    @property
    def name(self) -> str:
        return self._name

    async def chunk_list(self, hash: str, size: int) -> bytes:
        link: Link = await self._link()
        hashes = bytearray()
        while len(hashes) < count_of(size) * HASH_BYTES:
            params = {"hash": hash, "from": len(hashes) // HASH_BYTES}
            answer = await link.call(f"{self._prefix}_list", params, LIST_TIMEOUT_S)
            part = answer.get("list") if isinstance(answer, dict) else None
            if not isinstance(part, bytes) or not part or len(part) % HASH_BYTES:
                raise RemoteError(f"{self._name}: its list of chunks is none")
            hashes += part
        return bytes(hashes)

    async def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
        link: Link = await self._link()
        items: Any = link.stream(self._prefix, {"hash": hash, "offset": offset, "length": length})
        async with contextlib.aclosing(items):
            async for item in items:
                if not isinstance(item, bytes):
                    raise RemoteError(f"{self._name}: sends something else than bytes")
                yield item

    async def suspect(self, hash: str, index: int) -> None:
        link: Link = await self._link()
        await link.call(f"{self._prefix}_suspect", {"hash": hash, "chunk": index}, LIST_TIMEOUT_S)


@dataclass(frozen=True)
class Want:
    """What is to be fetched. `list`: the digest of its list as signed; None: nobody signed one."""

    hash: str
    size: int
    list: str | None


class Stalled(Unreachable):
    """A source that stopped sending."""


class Ours(Refused):
    """What this node's own disk refuses: no other source would help."""


OnBad = Callable[[str, int], None]
"""`(name of the source, chunk)`: it sent a damaged chunk."""


async def fetch(
    want: Want,
    sources: Sequence[Source],
    open_part: Callable[[bytes], Part],
    *,
    progress: Callable[[int], None] = lambda done: None,
    on_bad: OnBad = lambda source, chunk: None,
    stall_s: float = STALL_S,
) -> Part:
    """Fetches a blob from these sources, the first first, until it is whole; the part is open and is the caller's.

    `open_part(list)` gives the part. `progress(bytes)` is told what is verified by now. On any error what was verified
    stays on disk. Refused `disk_full` and `disk`: ours; `corrupt`: nobody has a sound copy; else what the last source
    that failed said.
    """
    if not sources:
        raise Unreachable("nobody has it")
    if not 0 <= want.size <= SIZE_MAX_BYTES:
        raise RemoteError(f"{want.size} bytes are no size of an artifact")
    refused_lists: set[bytes] = set()
    while True:
        hashes = await _list_of(want, sources, refused_lists)
        part = await asyncio.to_thread(open_part, hashes)
        try:
            await asyncio.to_thread(part.open)
            progress(part.verified)
            await _fill(part, sources, progress, on_bad, stall_s)
            if want.list is None and not part.sound:
                refused_lists.add(hashes)
                part.close()
                continue
            return part
        except BaseException:
            part.close()
            raise


async def _list_of(want: Want, sources: Sequence[Source], refused: set[bytes]) -> bytes:
    """The list of chunks, from the first source whose list can be the right one."""
    if want.size == 0:
        return b""
    last: QuarterdeckError = Unreachable("nobody has it")
    for source in sources:
        try:
            hashes = await source.chunk_list(want.hash, want.size)
            check_list(hashes, want.size, want.list)
        except QuarterdeckError as why:
            last = why
            continue
        if hashes not in refused:
            return hashes
        last = Refused("corrupt", f"{source.name}: its list of chunks is not that of this artifact")
    raise last


async def _fill(
    part: Part, sources: Sequence[Source], progress: Callable[[int], None], on_bad: OnBad, stall_s: float
) -> None:
    """Brings in what is missing."""
    failures, turn, waits = 0, 0, 0
    bad_here: set[str] = set()
    """Who sent the next chunk damaged."""
    last: QuarterdeckError = Unreachable("nobody has it")
    while not part.whole:
        if part.seeded:
            before = part.verified
            await asyncio.to_thread(part.add_seeds)
            if part.verified > before:
                progress(part.verified)
                failures, bad_here = 0, set()
                continue
        if failures >= ROUNDS_WITHOUT_PROGRESS * len(sources):
            if len(bad_here) == len({source.name for source in sources}):
                who = ", ".join(sorted(bad_here))
                raise Refused("corrupt", f"chunk {part.chunk} is damaged at all who have it ({who})")
            raise last
        source = sources[turn % len(sources)]
        before = part.verified
        try:
            await _from(source, part, progress, stall_s)
        except BadChunk as why:
            bad_here = bad_here if part.verified == before else set()
            bad_here.add(source.name)
            on_bad(source.name, why.index)
            last = RemoteError(f"{source.name}: {why}")
            with contextlib.suppress(QuarterdeckError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await source.suspect(part.hash, why.index)
        except Ours:
            raise
        except Refused as why:
            last = why
            if why.code == "busy" and waits < BUSY_WAITS:
                waits += 1
                failures -= 1
                await asyncio.sleep(BUSY_WAIT_S)
        except QuarterdeckError as why:
            last = why
        if part.verified > before:
            failures = 0
        if not part.whole:
            turn += 1
            failures += 1


async def _from(source: Source, part: Part, progress: Callable[[int], None], stall_s: float) -> None:
    """As many chunks as this source gives: all that are missing, or only the next where a damaged copy may have the
    one after it. BadChunk and what the source raises."""
    length = length_of(part.size, part.chunk) if part.seeded else part.size - part.verified
    end = part.verified + length
    buffer = bytearray()
    pieces: Any = source.read(part.hash, part.verified, length)
    async with contextlib.aclosing(pieces):
        while part.verified < end:
            needed = length_of(part.size, part.chunk)
            while len(buffer) < needed:
                try:
                    async with asyncio.timeout(stall_s):
                        buffer += await anext(pieces)
                except StopAsyncIteration:
                    raise RemoteError(f"{source.name}: ended before all was sent") from None
                except TimeoutError:
                    raise Stalled(f"{source.name}: sent nothing for {stall_s:g} s") from None
            chunk, buffer = bytes(buffer[:needed]), buffer[needed:]
            try:
                await asyncio.to_thread(part.add, chunk)
            except Refused as why:
                raise Ours(why.code, why.sentence) from why
            progress(part.verified)
