"""A file on its way here, chunk by chunk: what is in it is verified, and is taken up again after any interruption.

Nothing is remembered of how far it got: a resumed part is read and checked anew against the list, which costs less
than it took to fetch and believes no note that a power cut may have outrun.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from agent.data import disk
from agent.data.chunks import CHUNK_BYTES, count_of, fits, length_of
from discovery.errors import LocalError, RemoteError


class BadChunk(RemoteError):
    """A chunk that isn't what it should be."""

    def __init__(self, index: int) -> None:
        super().__init__(f"chunk {index} is damaged")
        self.index = index


class Part:
    """Chunks from the first on. `hashes` is the list they must fit; `room_for(n)` refuses bytes there is no room for.

    Blocks. Closing it, from another thread too, waits for the chunk that is being written."""

    def __init__(
        self,
        path: Path,
        hash: str,
        size: int,
        hashes: bytes,
        *,
        room_for: Callable[[int], None] = lambda more: None,
        seed: Path | None = None,
    ) -> None:
        self.path = path
        self.hash = hash
        self.size = size
        self.hashes = hashes
        self.verified = 0
        """Bytes from the start that are here and fit."""
        self._room_for = room_for
        self._seed = seed
        self._seed_handle: int | None = None
        self._handle: int | None = None
        self._sum = hashlib.sha256()
        self._lock = threading.Lock()
        self._closing = False

    @property
    def chunk(self) -> int:
        """The next one that is missing."""
        return self.verified // CHUNK_BYTES

    @property
    def whole(self) -> bool:
        return self.verified == self.size

    @property
    def sound(self) -> bool:
        """Whether it is whole, and the whole is what it should be."""
        return self.whole and self._sum.hexdigest() == self.hash

    @property
    def seeded(self) -> bool:
        """Whether there is a damaged copy whose good chunks may serve."""
        return self._seed_handle is not None

    def open(self) -> None:
        """Takes up what is there, as far as it fits. Refused when the disk won't, or has no room for the rest."""
        with self._lock:
            self._open()
        self._room_for(self.size - self.verified)

    def _open(self) -> None:
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._sum, self.verified = hashlib.sha256(), 0
            for index in range(count_of(self.size)):
                data = os.pread(self._handle, length_of(self.size, index), index * CHUNK_BYTES)
                if self._closing or not fits(self.hashes, index, data):
                    break
                self._sum.update(data)
                self.verified += len(data)
            os.ftruncate(self._handle, self.verified)
            if self._seed is not None:
                with contextlib.suppress(OSError):
                    self._seed_handle = os.open(self._seed, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as why:
            raise disk.refused(why, "artifact on its way here") from why

    def add(self, data: bytes | bytearray) -> None:
        """The next chunk. BadChunk: it doesn't fit and changes nothing; Refused: the disk won't."""
        with self._lock:
            self._add(data)

    def _add(self, data: bytes | bytearray) -> None:
        if self._handle is None:
            raise LocalError("the part is closed")
        index = self.chunk
        if len(data) != length_of(self.size, index) or not fits(self.hashes, index, data):
            raise BadChunk(index)
        self._room_for(len(data))
        view = memoryview(data)
        at = self.verified
        try:
            while view:
                wrote = os.pwrite(self._handle, view, at)
                view, at = view[wrote:], at + wrote
        except OSError as why:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self.verified)
            raise disk.refused(why, "artifact on its way here") from why
        self._sum.update(data)
        self.verified = at

    def add_seeds(self) -> None:
        """Takes the chunks that the damaged copy still has right, up to the first that it hasn't."""
        with self._lock:
            self._add_seeds()

    def _add_seeds(self) -> None:
        while self._seed_handle is not None and not self.whole:
            index = self.chunk
            try:
                data = os.pread(self._seed_handle, length_of(self.size, index), index * CHUNK_BYTES)
                self._add(data)
            except (OSError, BadChunk):
                return

    def finish(self) -> None:
        """Makes it durable, once the whole is what it should be; RemoteError when it isn't."""
        if self._handle is None or not self.sound:
            raise RemoteError("the whole is not what was put, although every chunk fits its list")
        try:
            os.fsync(self._handle)
        except OSError as why:
            raise disk.refused(why, "artifact on its way here") from why
        self.close()

    def close(self) -> None:
        """Lets go of the file and keeps it."""
        self._closing = True
        with self._lock:
            for handle in (self._handle, self._seed_handle):
                if handle is not None:
                    os.close(handle)
            self._handle = self._seed_handle = None

    def discard(self) -> None:
        """Lets go of the file and removes it."""
        self.close()
        self.path.unlink(missing_ok=True)
