"""An artifact as bytes that can be checked piece by piece: its hash, and the list of the hashes of its chunks.

A chunk is 1 MiB, the last one what is left. The list is the chunks' SHA-256, one behind the other; a put signs the
list's own hash, so a list from anybody is proved before the first byte is fetched, and a bad chunk is named at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from discovery.errors import RemoteError

CHUNK_BYTES = 2**20
HASH_BYTES = 32
SIZE_MAX_BYTES = 2**44
"""16 TiB: more is no artifact, it is a mistake."""

_HASH = re.compile(r"[0-9a-f]{64}")


def is_hash(text: object) -> bool:
    """Whether this is a SHA-256 as it is written: 64 lower-case hex digits, and so no path of any kind."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def count_of(size: int) -> int:
    """How many chunks so many bytes make."""
    return -(-size // CHUNK_BYTES)


def length_of(size: int, index: int) -> int:
    """How long that chunk of an artifact of this size is."""
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


def list_digest(hashes: bytes) -> str:
    """What a put signs of a list."""
    return hashlib.sha256(hashes).hexdigest()


def check_list(hashes: bytes, size: int, digest: str | None) -> None:
    """RemoteError unless this can be the list of an artifact of that size, and is the one signed, if that is known."""
    if len(hashes) != HASH_BYTES * count_of(size):
        raise RemoteError(f"a list of {len(hashes)} bytes for {count_of(size)} chunks")
    if digest is not None and list_digest(hashes) != digest:
        raise RemoteError("not the list of chunks that was signed")


def fits(hashes: bytes, index: int, data: bytes | bytearray | memoryview) -> bool:
    """Whether these bytes are that chunk."""
    at = index * HASH_BYTES
    return hashlib.sha256(data).digest() == hashes[at : at + HASH_BYTES]


class Sums:
    """Hash and list of bytes that come in chunks."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._list = bytearray()
        self.size = 0

    def add(self, chunk: bytes | memoryview) -> None:
        """The next chunk; all but the last are whole."""
        self._whole.update(chunk)
        self._list += hashlib.sha256(chunk).digest()
        self.size += len(chunk)

    @property
    def hash(self) -> str:
        return self._whole.hexdigest()

    @property
    def list(self) -> bytes:
        return bytes(self._list)


def sums_of(chunks: Iterable[bytes]) -> Sums:
    """Hash and list of an artifact."""
    sums = Sums()
    for chunk in chunks:
        sums.add(chunk)
    return sums
