"""What a daemon writes: straight into a file, so that nothing is lost while no agent runs, and read from there.

The last 2,048 lines (1 MiB at most) are kept as they are seen; the file is rotated at 10 MiB and three older ones
are kept. Rotation cuts the copied head off the file in place (ext4, XFS), which loses nothing. Where the file
system can't, the file is emptied after it was copied to its end: what is written between the last read and that,
some microseconds, is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import time
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

RING_LINES = 2048
RING_BYTES = 1 << 20
LINE_MAX_BYTES = 16 * 1024
READ_MAX_BYTES = 1 << 20
"""How much is read at once; what a daemon wrote beyond it since then is in the file and not among its lines."""
REFILL_BYTES = 256 * 1024
"""How much of an earlier run's file is read back."""
ROTATE_BYTES = 10 << 20
KEPT = 3
KEPT_MAX_BYTES = 64 << 20
"""A kept file is no longer than this: of a flood between two looks only the end is kept."""
BACKLOG_LINES = 4096
BLOCK = 4096
_COLLAPSE = 8
"""FALLOC_FL_COLLAPSE_RANGE"""


class LogLine(NamedTuple):
    """One line, safe to show: what steers a terminal is escaped. `at_ms`: Unix milliseconds when it was seen, up
    to a second after it was written (of lines from before this agent: the file's last change)."""

    at_ms: int
    line: str


def escaped(text: str) -> str:
    """`text` with control and format characters, line separators and lone surrogates as `\\xNN` or `\\uNNNN`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(c) for c in text.replace("\t", "    "))


def _shown(c: str) -> str:
    if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return c
    number = ord(c)
    return (
        f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
    )


class DaemonLog:
    """The lines of one daemon. `rouse` is called when somebody begins to follow, so that it is polled sooner."""

    def __init__(
        self,
        path: Path,
        *,
        rouse: Callable[[], None] = lambda: None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        rotate_bytes: int = ROTATE_BYTES,
    ) -> None:
        self.path = path
        self.rotations = 0
        self.trouble = ""
        """Why the last rotation failed."""
        self._rouse = rouse
        self._wall_ms = wall_ms
        self._rotate_bytes = rotate_bytes
        self._ring: deque[LogLine] = deque()
        self._ring_bytes = 0
        self._partial = b""
        self._skip_line = False
        self._offset = 0
        self._followers: list[_Follower] = []
        self._rotating: asyncio.Future[None] | None = None
        self._refill()

    def open(self) -> int:
        """A descriptor to write to, appending. OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def followed(self) -> bool:
        return bool(self._followers)

    def poll(self) -> bool:
        """Takes what is new, and rotates when it is due; True when there was something."""
        if self._rotating is not None:
            return True
        size = self._size()
        if size == self._offset:
            return False
        if size < self._offset:
            self._offset, self._partial = 0, b""
        self._read(size)
        if size >= self._rotate_bytes:
            self._rotate()
        return True

    def tail(self, limit: int) -> list[LogLine]:
        """The last `limit` lines, oldest first, up to this moment. A line that has no end yet comes last."""
        self.poll()
        lines = list(self._ring)
        if self._partial:
            lines.append(LogLine(self._wall_ms(), escaped(self._partial.decode("utf-8", "replace"))))
        return lines[max(0, len(lines) - limit) :] if limit > 0 else []

    async def follow(self, limit: int = 0) -> AsyncIterator[LogLine]:
        """The last `limit` whole lines, then every later one as it is seen. Who reads too slowly is told how many
        lines it missed."""
        self.poll()
        follower = _Follower()
        lines = list(self._ring)
        for line in lines[max(0, len(lines) - limit) :] if limit > 0 else []:
            follower.offer(line)
        self._followers.append(follower)
        self._rouse()
        try:
            while True:
                for line in await follower.take(self._wall_ms):
                    yield line
        finally:
            self._followers.remove(follower)

    def last_words(self, limit: int = 120) -> str:
        """The last line that says something, cut to `limit` characters."""
        for line in reversed(self.tail(8)):
            if text := line.line.strip():
                return text if len(text) <= limit else text[: limit - 1] + "…"
        return ""

    async def settle(self) -> None:
        """Waits for a rotation under way."""
        if self._rotating is not None:
            await asyncio.wait([self._rotating])

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size  # noqa: PTH116
        except OSError:
            return 0

    def _refill(self) -> None:
        """The end of what an earlier run wrote, so that it can be read on."""
        try:
            stat = self.path.stat()
        except OSError:
            return
        self._offset = max(0, stat.st_size - REFILL_BYTES)
        self._skip_line = self._offset > 0
        self._read(stat.st_size, at_ms=stat.st_mtime_ns // 1_000_000)

    def _read(self, size: int, at_ms: int | None = None) -> None:
        at_ms = self._wall_ms() if at_ms is None else at_ms
        if size - self._offset > READ_MAX_BYTES:
            missed = size - READ_MAX_BYTES - self._offset
            self._offset += missed
            self._partial, self._skip_line = b"", True
            self._add(LogLine(at_ms, f"… {missed:,} bytes not shown; they are in the file"))
        try:
            with self.path.open("rb") as f:
                f.seek(self._offset)
                data = f.read(size - self._offset)
        except OSError:
            return
        self._offset += len(data)
        *whole, rest = data.split(b"\n")
        for part in whole:
            line, self._partial = self._partial + part, b""
            if self._skip_line:
                self._skip_line = False
            else:
                self._add(LogLine(at_ms, _cut(line)))
        if self._skip_line:
            return
        self._partial += rest
        if len(self._partial) > LINE_MAX_BYTES:
            self._add(LogLine(at_ms, _cut(self._partial)))
            self._partial, self._skip_line = b"", True

    def _add(self, line: LogLine) -> None:
        self._ring.append(line)
        self._ring_bytes += len(line.line)
        while len(self._ring) > RING_LINES or (self._ring_bytes > RING_BYTES and len(self._ring) > 1):
            self._ring_bytes -= len(self._ring.popleft().line)
        for follower in self._followers:
            follower.offer(line)

    def _rotate(self) -> None:
        """Moves the file's contents to `log.1`, in a thread."""
        job = asyncio.get_running_loop().run_in_executor(None, rotate, self.path, KEPT)
        self._rotating = asyncio.ensure_future(self._rotated(job))

    async def _rotated(self, job: asyncio.Future[int | None]) -> None:
        try:
            cut = await job
            self._offset = 0 if cut is None else max(0, self._offset - cut)
            self.rotations += 1
            self.trouble = ""
        except OSError as why:
            self.trouble = f"log not rotated: {why.strerror}"
        finally:
            self._rotating = None


class _Follower:
    def __init__(self) -> None:
        self._lines: deque[LogLine] = deque()
        self._missed = 0
        self._wake: asyncio.Future[None] | None = None

    def offer(self, line: LogLine) -> None:
        if len(self._lines) >= BACKLOG_LINES:
            self._lines.popleft()
            self._missed += 1
        self._lines.append(line)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def take(self, wall_ms: Callable[[], int]) -> list[LogLine]:
        while not self._lines:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        lines, missed = list(self._lines), self._missed
        self._lines.clear()
        self._missed = 0
        if missed:
            lines.insert(0, LogLine(wall_ms(), f"… {missed:,} lines not shown: this reader was too slow"))
        return lines


def _cut(line: bytes) -> str:
    text = line[:LINE_MAX_BYTES].removesuffix(b"\r").decode("utf-8", "replace")
    return escaped(text) + ("…" if len(line) > LINE_MAX_BYTES else "")


def rotate(path: Path, kept: int, kept_max_bytes: int = KEPT_MAX_BYTES) -> int | None:
    """Moves what is in `path` to `path.1`, and the older ones on. How many bytes were cut off its head, or None
    when the file was emptied. Whoever has it open to append goes on at its new end. OSError changes nothing."""
    first, tmp = _numbered(path, 1), path.with_name(f".{path.name}.copy")
    try:
        with path.open("r+b") as source, tmp.open("wb", buffering=0) as target:
            tmp.chmod(0o600)
            size = os.fstat(source.fileno()).st_size
            head = size - size % BLOCK
            begin = max(0, head - kept_max_bytes)
            if begin:
                target.write(f"… {begin:,} bytes before this were too much to keep\n".encode())
            collapsed = _copy(source.fileno(), target.fileno(), begin, head - begin) and _collapse(
                source.fileno(), head
            )
            if not collapsed:
                while _copy(source.fileno(), target.fileno(), head, size - head):
                    head, size = size, os.fstat(source.fileno()).st_size
                    if head == size:
                        break
                os.ftruncate(source.fileno(), 0)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise
    for number in range(kept, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            _numbered(path, number - 1).replace(_numbered(path, number))
    tmp.replace(first)
    return head if collapsed else None


def _copy(source: int, target: int, offset: int, count: int) -> bool:
    """True once all of it is copied."""
    while count > 0:
        sent = os.sendfile(target, source, offset, count)
        if sent == 0:
            return False
        offset, count = offset + sent, count - sent
    return True


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _collapse(fd: int, length: int) -> bool:
    """Cuts `length` bytes, whole blocks, off the head of an open file; False where that can't be done."""
    if length <= 0:
        return False
    return bool(_libc().fallocate(fd, _COLLAPSE, ctypes.c_longlong(0), ctypes.c_longlong(length)) == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
