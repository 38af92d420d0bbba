"""One gossip pool: `swim` and `seal` on a port and a clock.

The room is thin: it hands opened datagrams to `swim`, and carries out what `swim` asks for. A refused datagram is
only a hint, which `swim` follows up with a fresh TCP connect that this room makes.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable

from discovery.member import Addr
from discovery.port import Port
from discovery.seal import Keyring, Opener, Sealer
from discovery.swim import Connect, PersistIncarnation, Send, Swim
from discovery.swim.effects import Effect

CONNECT_TIMEOUT_S = 1.0
FIRST_BYTE_TIMEOUT_S = 0.2
"""An SSH server speaks first, and at once."""
MAX_CONNECT_CHECKS = 64


class Pool:
    """Runs one `Swim` on a port that it may share. All calls and callbacks happen on the event loop's thread.

    `on_effect` receives what the pool doesn't do itself (joins, changes, evictions, push/pulls, sentinels …);
    `on_persist` must make the incarnation durable before it returns.
    """

    def __init__(
        self,
        swim: Swim,
        sealer: Sealer,
        opener: Opener,
        port: Port,
        *,
        on_effect: Callable[[Effect], None],
        on_persist: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.swim = swim
        self.counters: Counter[str] = Counter()
        self._sealer = sealer
        self.opener = opener
        self._port = port
        self._on_effect = on_effect
        self._on_persist = on_persist
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._checks: set[asyncio.Task[None]] = set()
        self._flushing = False
        self._closed = False

    def start(self) -> None:
        """Begins to listen on the port and to keep the deadlines."""
        self._port.attach(self)
        self.flush()

    def close(self) -> None:
        """Stops at once; nothing more is sent, and the port stays open. Say goodbye first."""
        if self._closed:
            return
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for task in self._checks:
            task.cancel()
        self._port.detach(self)

    def rotate(self, keyring: Keyring) -> None:
        """Seals with this ring's first key from now on, and opens with any of its keys."""
        self._sealer.rotate(keyring)
        self.opener.rotate(keyring)

    def take(self, body: bytes, sender: int, addr: Addr, now: float) -> None:
        """From the port: one opened datagram. `flush` follows."""
        if not self._closed:
            self.swim.receive(body, sender, addr, now)

    def refused(self, addr: Addr, now: float) -> None:
        """From the port: something sent to `addr` met a closed port. `flush` follows."""
        if not self._closed:
            self.swim.datagram_refused(addr, now)

    def flush(self) -> None:
        """Carries out what `swim` asks for and re-arms the timer. Call after every input given to `swim` directly."""
        if self._flushing or self._closed:
            return
        self._flushing = True
        try:
            while effects := self.swim.drain():
                for effect in effects:
                    self._carry_out(effect)
        finally:
            self._flushing = False
        self._arm()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(addr=addr, body=body):
                self._port.send(self._sealer.seal(body, self.opener.key_for(addr)), addr)
            case Connect(node=node, incarnation=incarnation, addrs=addrs):
                if len(self._checks) >= MAX_CONNECT_CHECKS:
                    self.counters["connect_check_dropped"] += 1
                    return
                task = self._loop.create_task(self._check(node, incarnation, addrs))
                self._checks.add(task)
                task.add_done_callback(self._checks.discard)
            case PersistIncarnation(incarnation=incarnation):
                self._on_persist(incarnation)
            case _:
                self._on_effect(effect)

    def _arm(self) -> None:
        at = self.swim.deadline()
        if self._closed or at == self._timer_at:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._wake)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self.swim.wake(self._clock())
        self.flush()

    async def _check(self, node: int, incarnation: int, addrs: tuple[Addr, ...]) -> None:
        """Makes a fresh TCP connect to every address at once and reports each outcome."""

        async def one(addr: Addr) -> None:
            outcome = await connect_outcome(addr)
            self.swim.connect_result(node, incarnation, addr, outcome, self._clock())

        await asyncio.gather(*(one(a) for a in addrs))
        self.flush()


async def connect_outcome(addr: Addr) -> str:
    """`open`, `refused` or `error` (no answer in 1 s, no route): what a fresh TCP connect to `addr` meets.

    Links of a dying process may close a moment before its listening socket does. What that still takes in is reset
    without a byte, perhaps while it is being made: such a connection proves nothing, and is made once more.
    """
    outcome, ended = await _connect_once(addr)
    if ended:
        outcome, _ = await _connect_once(addr)
    return outcome


async def _connect_once(addr: Addr) -> tuple[str, bool]:
    """The outcome, and whether the connection was ended by the other side before its first byte."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in addr[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await loop.sock_connect(sock, addr)
        except ConnectionRefusedError:
            return "refused", False
        except ConnectionError:
            return "error", True
        except (OSError, TimeoutError):
            return "error", False
        try:
            async with asyncio.timeout(FIRST_BYTE_TIMEOUT_S):
                return "open", not await loop.sock_recv(sock, 1)
        except TimeoutError:
            return "open", False
        except OSError:
            return "open", True
