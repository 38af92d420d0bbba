"""Serving blobs over links: ranges of what is published here, by hash, to members; and to people what others hold too.

A hash is 64 hex digits and names a whole blob that some name stands for; everything else is `unknown`, so there is no
path to leave and nothing to list. Nothing is written. One reader costs one chunk of memory and its link's window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agent.data.blobs import BlobStore
from agent.data.chunks import CHUNK_BYTES, HASH_BYTES, SIZE_MAX_BYTES, is_hash
from discovery.errors import Refused, RemoteError
from discovery.links import Handler, Link, Login

PIECE_BYTES = 32 * 2**10
"""What goes into one frame: a call on the same link waits for no more than this."""
LIST_PAGE_BYTES = 8192 * HASH_BYTES


@dataclass(frozen=True)
class ServingLimits:
    """What reading by others may take of this node."""

    max_streams: int = 32
    max_streams_per_login: int = 4


class Serving:
    """Serves `blob`, `blob_list` and `blob_suspect` of one node's store. `suspect(hash, chunk)` looks at its copy."""

    def __init__(
        self,
        store: BlobStore,
        *,
        suspect: Callable[[str, int], None] = lambda hash, chunk: None,
        limits: ServingLimits | None = None,
    ) -> None:
        self._store = store
        self._suspect = suspect
        self._limits = limits or ServingLimits()
        self._shares: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        """Refusals by code as `blob_CODE` (`login`, `unknown`, `malformed`, `busy`), and `blob_bytes` that went out."""

    def methods(self) -> Mapping[str, Handler]:
        return {"blob": self.blob, "blob_list": self.blob_list, "blob_suspect": self.blob_suspect}

    async def blob_list(self, link: Link, params: Any) -> Any:
        """`{"hash", "from": chunk}` → `{"size", "list": bytes}`: the hashes of its chunks from there on, as many as fit."""
        hash = self._published(link, params)
        first = self._number(params, "from", 0)
        hashes = await asyncio.to_thread(self._store.chunk_list, hash)
        at = first * HASH_BYTES
        return {"size": self._store.size(hash), "list": hashes[at : at + LIST_PAGE_BYTES]}

    async def blob(self, link: Link, params: Any) -> AsyncIterator[bytes]:
        """`{"hash", "offset", "length"}` → those bytes, in pieces."""
        hash = self._published(link, params)
        offset = self._number(params, "offset", 0)
        end = offset + self._number(params, "length", SIZE_MAX_BYTES)
        with self._counted(link.login):
            while offset < end:
                data = await asyncio.to_thread(self._store.read, hash, offset, min(CHUNK_BYTES, end - offset))
                if not data:
                    return
                for at in range(0, len(data), PIECE_BYTES):
                    piece = data[at : at + PIECE_BYTES]
                    yield piece
                    self.counters["blob_bytes"] += len(piece)
                offset += len(data)

    async def blob_suspect(self, link: Link, params: Any) -> Any:
        """`{"hash", "chunk"}`: what came of it elsewhere was damaged; this node looks at its copy."""
        hash = self._published(link, params)
        self._suspect(hash, self._number(params, "chunk", 0))
        return {}

    def _published(self, link: Link, params: Any) -> str:
        login = link.login
        if not may_read(login):
            raise self._refused("login", f"a {login.kind} login may not read artifacts")
        hash = params.get("hash") if isinstance(params, dict) else None
        if not isinstance(hash, str) or not is_hash(hash) or not self._store.published(hash):
            raise self._refused("unknown", "no such blob is held here")
        return hash

    def _number(self, params: Any, key: str, default: int) -> int:
        value = params.get(key, default)
        if type(value) is not int or not 0 <= value <= SIZE_MAX_BYTES:
            self.counters["blob_malformed"] += 1
            raise RemoteError(f"{key}: a number of at most {SIZE_MAX_BYTES} expected")
        return value

    @contextlib.contextmanager
    def _counted(self, login: Login) -> Iterator[None]:
        """One reader, as long as it reads, of this login's share."""
        who, limits = login.fingerprint, self._limits
        if self._shares.total() >= limits.max_streams or self._shares[who] >= limits.max_streams_per_login:
            raise self._refused(
                "busy", f"{self._shares.total()} blobs are being read here already; try again"
            )
        self._shares[who] += 1
        try:
            yield
        finally:
            self._shares[who] -= 1
            if not self._shares[who]:
                del self._shares[who]

    def _refused(self, code: str, sentence: str) -> Refused:
        self.counters[f"blob_{code}"] += 1
        return Refused(code, sentence)


def may_read(login: Login) -> bool:
    """Whether this login may read artifacts: members, the home, and operators of any role."""
    return login.kind in ("member", "home") or (login.kind == "op" and login.role is not None)
