"""Tunnels: byte streams in both directions inside a link, beside its calls and streams.

Each side may send what the other granted it and not a byte more: a side that doesn't read costs the other one window
of memory, and nobody else anything. Closing either end ends both: what was sent before the close is still read.
`splice` joins two such streams, or one and a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from discovery.errors import LocalError, QuarterdeckError, Unreachable
from discovery.links.frames import BadFrame, Kind, error_of

if TYPE_CHECKING:
    from discovery.links.link import Link

PIECE_BYTES = 32 * 2**10
"""What goes into one frame: a call on the same link waits for no more than this."""
GRANT_MAX_BYTES = 2**32
PACE_SLACK_S = 0.05
"""What a paced direction may run ahead before it waits: sleeps shorter than this cost more than they smooth."""

Send = Callable[[Kind, int, Any], None]
"""`(kind, id, body)`: writes one frame of the link."""


@dataclass(frozen=True)
class TunnelMethod:
    """A method that serves tunnels. `serve(link, params, tunnel)` refuses by raising, or calls `tunnel.accept()` and
    carries bytes; the tunnel ends when it returns. It is cancelled when the link is lost, or when the asker gives up
    before it accepts."""

    serve: Callable[[Link, Any, Tunnel], Awaitable[None]]


class Stream(Protocol):
    """Bytes both ways. `read` returns b"" at the end; both raise QuarterdeckError or OSError when it broke."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class Tunnel:
    """One end of a tunnel. At most one task reads, and at most one writes, at a time."""

    def __init__(
        self, call: int, send: Send, ready: Callable[[], Awaitable[None]], *, served: bool, window: int
    ) -> None:
        self.served = served
        """Whether the other side asked for it."""
        self.accepted = False
        self.answer: Any = None
        """What the other side said to it when it accepted."""
        self._id = call
        self._send = send
        self._ready = ready
        self._window = window
        self._data, self._grant, self._shut = (
            (Kind.DATA_BACK, Kind.GRANT_BACK, Kind.SHUT_BACK)
            if served
            else (Kind.DATA, Kind.GRANT, Kind.SHUT)
        )
        self._unread = bytearray()
        self._ahead = 0
        """Bytes that arrived and were not granted anew: at most the window."""
        self._credit = 0
        self._over = self._said = self._discard = False
        self._heard = False
        self._end: QuarterdeckError | None = None
        self._news = asyncio.Event()
        self._granted = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Tunnel {self._id}{' served' if self.served else ''}{' closed' if self.closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more. What has arrived may still be read, unless it was closed here."""
        return self._over

    @property
    def unread(self) -> int:
        """Bytes that arrived and were not read yet: at most one window."""
        return len(self._unread)

    def accept(self, answer: Any = None) -> None:
        """Says yes to who asked; `answer` is any plain value. Only for the end that serves."""
        if not self.served:
            raise LocalError("a tunnel that was asked for here is accepted by the other side")
        if not self.accepted and not self._over:
            self.accepted = True
            self._send(Kind.RESULT, self._id, answer)
            self.offer()

    async def read(self) -> bytes:
        """What has arrived, a byte at least; b"" at the end. Unreachable when the link was lost, or what the other
        side says went wrong there."""
        while not self._unread:
            if self._discard or (self._over and self._end is None):
                return b""
            if self._end is not None:
                raise self._end
            self._news.clear()
            await self._news.wait()
        data = bytes(self._unread)
        self._unread.clear()
        if not self._over and self._ahead >= self._window // 2:
            granted, self._ahead = self._ahead, 0
            self._send(self._grant, self._id, granted)
        return data

    async def write(self, data: bytes) -> None:
        """Sends it all, as fast as the other side takes it. Unreachable once either side has closed."""
        rest = memoryview(data)
        while rest:
            while self._credit <= 0 and not self._over:
                self._granted.clear()
                await self._granted.wait()
            await self._ready()
            if self._over:
                raise self._end or Unreachable("the tunnel is closed", maybe_arrived=True)
            size = min(self._credit, PIECE_BYTES)
            piece, rest = rest[:size], rest[size:]
            self._credit -= len(piece)
            self._send(self._data, self._id, piece)

    def close(self) -> None:
        """Ends it for both sides. What was written is still delivered; what was not read is thrown away."""
        self._discard = True
        self._unread.clear()
        self.shut(None)

    # --- for the link

    def offer(self) -> None:
        """Grants the first window."""
        self._send(self._grant, self._id, self._window)

    def shut(self, error: dict[str, Any] | None) -> None:
        """Says, once, that this side has ended it, and why."""
        self._over = True
        if not self._said:
            self._said = True
            self._send(self._shut, self._id, error)
        self._news.set()
        self._granted.set()

    def arrived(self, data: Any) -> None:
        """Data of the other side. BadFrame: no bytes, not open, or beyond the window."""
        if not isinstance(data, bytes) or not data:
            raise BadFrame("bad_frame", "data of a tunnel that are no bytes")
        if not (self.accepted or self._said):
            raise BadFrame("bad_frame", "data for a tunnel that is not open yet")
        self._ahead += len(data)
        if self._ahead > self._window:
            raise BadFrame("overrun", "a tunnel sent beyond its window")
        if not self._discard:
            self._unread += data
            self._news.set()

    def granted(self, credit: Any) -> None:
        """The other side takes so many bytes more."""
        if not isinstance(credit, int) or not 0 < credit <= GRANT_MAX_BYTES - self._credit:
            raise BadFrame("bad_frame", "a grant that is no number of bytes")
        self._credit += credit
        self._granted.set()

    def ended(self, error: Any) -> None:
        """The other side has ended it, and will say no more. So does this side: the id is free."""
        if not self._over:
            self._end = error_of(error) if error is not None else None
        self.shut(None)

    def lost(self, why: Unreachable) -> None:
        """The link is gone."""
        if not self._over:
            self._end = why
            self._said = True
            self.shut(None)


class SocketStream:
    """A connected stream socket as a Stream. The socket is this object's, and closed with it."""

    def __init__(self, sock: socket.socket, first: bytes = b"") -> None:
        sock.setblocking(False)
        self._sock = sock
        self._first = first
        self._loop = asyncio.get_running_loop()

    async def read(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._loop.sock_recv(self._sock, 2 * PIECE_BYTES)

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    def close(self) -> None:
        self._sock.close()


class Idle(QuarterdeckError):
    """A splice that carried nothing for too long."""


async def splice(
    one: Stream,
    other: Stream,
    *,
    idle_s: float | None = None,
    bytes_per_s: float | None = None,
    carried: Callable[[int], None] = lambda size: None,
) -> None:
    """Carries bytes between two streams until one of them ends, then closes both.

    `bytes_per_s` paces each direction. `carried(n)` is told of every piece. Idle: no byte either way for `idle_s`.
    """
    loop = asyncio.get_running_loop()
    patience = asyncio.timeout(idle_s)

    async def carry(source: Stream, sink: Stream) -> None:
        due = time.monotonic()
        with contextlib.suppress(QuarterdeckError, OSError):
            while data := await source.read():
                if idle_s is not None:
                    patience.reschedule(loop.time() + idle_s)
                await sink.write(data)
                carried(len(data))
                if bytes_per_s is not None:
                    due = max(due, time.monotonic()) + len(data) / bytes_per_s
                    if (ahead_s := due - time.monotonic()) > PACE_SLACK_S:
                        await asyncio.sleep(ahead_s)

    ways = [loop.create_task(carry(one, other)), loop.create_task(carry(other, one))]
    try:
        async with patience:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError as why:
        raise Idle(f"nothing was sent for {idle_s:g} s") from why
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        one.close()
        other.close()
