"""A file on a client's disk, offered to one node while it is put there: read by range, exactly as a blob is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.data.chunks import CHUNK_BYTES, HASH_BYTES, SIZE_MAX_BYTES, Sums, list_digest
from agent.data.serving import LIST_PAGE_BYTES, PIECE_BYTES
from discovery.errors import LocalError, Refused, RemoteError
from discovery.links import Handler, Link


class Offer:
    """`Offer(path)` opens the file; `measure` reads it once, for its hash. Close it when the put has ended.

    A file that changes meanwhile is found out by whoever takes it: its chunks no longer fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
            self.size = os.fstat(self._handle).st_size
        except OSError as why:
            raise LocalError(f"{path}: {why.strerror}; name a file that you can read") from why
        self._sums = Sums()

    @property
    def hash(self) -> str:
        return self._sums.hash

    @property
    def list_digest(self) -> str:
        return list_digest(self._sums.list)

    def measure(self, read: Callable[[int], None] = lambda done: None) -> None:
        """Reads it all; `read(bytes)` is told how far it is. Blocks. LocalError when it can't be read."""
        self._sums = Sums()
        try:
            for chunk in self._chunks():
                self._sums.add(chunk)
                read(self._sums.size)
        except OSError as why:
            raise LocalError(f"{self.path}: {why.strerror}; look at the disk") from why
        self.size = self._sums.size

    def methods(self) -> Mapping[str, Handler]:
        """What the client serves on the link to the node that takes it."""
        return {"offer": self._offer, "offer_list": self._offer_list, "offer_suspect": self._offer_suspect}

    def close(self) -> None:
        os.close(self._handle)

    def _chunks(self) -> Iterator[bytes]:
        at = 0
        while chunk := os.pread(self._handle, CHUNK_BYTES, at):
            while len(chunk) < CHUNK_BYTES and (
                more := self._more(at + len(chunk), CHUNK_BYTES - len(chunk))
            ):
                chunk += more
            yield chunk
            at += len(chunk)

    def _more(self, at: int, size: int) -> bytes:
        return os.pread(self._handle, size, at)

    async def _offer_list(self, link: Link, params: Any) -> Any:
        self._check(params)
        at = _number(params, "from") * HASH_BYTES
        return {"size": self.size, "list": self._sums.list[at : at + LIST_PAGE_BYTES]}

    async def _offer(self, link: Link, params: Any) -> AsyncIterator[bytes]:
        self._check(params)
        offset, length = _number(params, "offset"), _number(params, "length")
        end = min(self.size, offset + length)
        while offset < end:
            try:
                data = await asyncio.to_thread(os.pread, self._handle, min(CHUNK_BYTES, end - offset), offset)
            except OSError as why:
                raise Refused("disk", f"{self.path.name}: {why.strerror}") from why
            if not data:
                return
            for at in range(0, len(data), PIECE_BYTES):
                yield data[at : at + PIECE_BYTES]
            offset += len(data)

    async def _offer_suspect(self, link: Link, params: Any) -> Any:
        return {}

    def _check(self, params: Any) -> None:
        if not isinstance(params, dict) or params.get("hash") != self.hash:
            raise Refused("unknown", "another file is offered")


def _number(params: Any, key: str) -> int:
    value = params.get(key, 0)
    if type(value) is not int or not 0 <= value <= SIZE_MAX_BYTES:
        raise RemoteError(f"{key}: a number expected")
    return value
