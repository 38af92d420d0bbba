"""One gossip pool: `swim` and `seal` on a UDP socket and a clock.

The room is thin: it opens datagrams, hands the bodies to `swim`, and carries out what `swim` asks for. Refused
datagrams come back from the socket's error queue with the address that refused (Linux, IP_RECVERR); they are only
a hint, which `swim` follows up with a fresh TCP connect that this room makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable

from discovery.errors import LocalError, RemoteError
from discovery.member import Addr
from discovery.seal import IncompatibleVersion, Opener, Sealer
from discovery.swim import Connect, PersistIncarnation, Send, Swim
from discovery.swim.effects import Effect

CONNECT_TIMEOUT_S = 1.0
FIRST_BYTE_TIMEOUT_S = 0.2
"""An SSH server speaks first, and at once."""
RECEIVE_BATCH = 64
MAX_CONNECT_CHECKS = 64
SOCKET_BUFFER_BYTES = 1 << 20

_IP_RECVERR = 11
_IPV6_RECVERR = 25
_ORIGIN_ICMP = (2, 3)
_EXTENDED_ERR = struct.Struct("=IBBBBII")


def bind_pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A UDP and a listening-ready TCP socket on one and the same port number; port 0 picks a free one.

    Returns (udp, tcp), both non-blocking and bound. LocalError when the address or port can't be had.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as why:
        raise LocalError(f"bind {host}: {why.strerror or why}; use an address of this host") from why
    family, target = info[0], info[4]
    for _ in range(32):
        tcp = socket.socket(family, socket.SOCK_STREAM)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind(target)
            udp.bind((target[0], tcp.getsockname()[1], *target[2:]))
        except OSError as why:
            tcp.close()
            udp.close()
            if why.errno == errno.EADDRINUSE and port == 0:
                continue
            if why.errno == errno.EADDRINUSE:
                raise LocalError(
                    f"port {port}: already in use; stop what holds it or choose another with --port"
                ) from why
            raise LocalError(
                f"bind {host} port {port}: {why.strerror}; use an address and port that this user may bind"
            ) from why
        for sock in (tcp, udp):
            sock.setblocking(False)
        with contextlib.suppress(OSError):
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        with contextlib.suppress(OSError):
            if family == socket.AF_INET6:
                udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            else:
                udp.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        return udp, tcp
    raise LocalError("no port is free for both UDP and TCP; choose one with --port")


class Pool:
    """Runs one `Swim` on one UDP socket. All calls and callbacks happen on the event loop's thread.

    `on_effect` receives what the pool doesn't do itself (joins, changes, evictions, push/pulls, sentinels …);
    `on_persist` must make the incarnation durable before it returns; `on_incompatible(addr, theirs, ours)` tells of a
    peer with another wire version.
    """

    def __init__(
        self,
        swim: Swim,
        sealer: Sealer,
        opener: Opener,
        sock: socket.socket,
        *,
        on_effect: Callable[[Effect], None],
        on_persist: Callable[[int], None],
        on_incompatible: Callable[[Addr, int, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.swim = swim
        self.counters: Counter[str] = Counter()
        self._sealer = sealer
        self._opener = opener
        self._sock = sock
        self._on_effect = on_effect
        self._on_persist = on_persist
        self._on_incompatible = on_incompatible
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._checks: set[asyncio.Task[None]] = set()
        self._flushing = False
        self._closed = False

    def start(self) -> None:
        """Begins to read the socket and to keep the deadlines."""
        self._loop.add_reader(self._sock.fileno(), self._readable)
        self.flush()

    def close(self) -> None:
        """Stops at once; nothing more is sent. Say goodbye first."""
        if self._closed:
            return
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for task in self._checks:
            task.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

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
                self._send(addr, body)
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

    def _send(self, addr: Addr, body: bytes) -> None:
        packet = self._sealer.seal(body)
        for _ in range(2):
            try:
                self._sock.sendto(packet, addr)
                return
            except BlockingIOError:
                self.counters["send_full"] += 1
                return
            except ConnectionRefusedError:
                self._read_errors()  # an earlier datagram's refusal was waiting on the socket; this one is still unsent
            except OSError as why:
                self.counters[f"send_{errno.errorcode.get(why.errno or 0, 'error').lower()}"] += 1
                self._read_errors()
                return

    def _readable(self) -> None:
        now = self._clock()
        for _ in range(RECEIVE_BATCH):
            try:
                packet, source = self._sock.recvfrom(2048)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                if not self._read_errors():
                    break
                continue
            addr = (source[0], source[1])
            try:
                sender, body = self._opener.open(packet, now)
            except IncompatibleVersion as why:
                self.counters[why.code] += 1
                self._on_incompatible(addr, why.theirs, why.ours)
            except RemoteError as why:
                self.counters[getattr(why, "code", "refused")] += 1
            else:
                self.swim.receive(body, sender, addr, now)
        self.flush()

    def _read_errors(self) -> bool:
        """Empties the socket's error queue into `swim`; whether there was anything in it."""
        found = False
        for _ in range(RECEIVE_BATCH):
            try:
                _, ancillary, _, addr = self._sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)
            except OSError:
                break
            found = True
            for _level, _kind, data in ancillary:
                if len(data) < _EXTENDED_ERR.size:
                    continue
                number, origin, *_ = _EXTENDED_ERR.unpack_from(data)
                if number == errno.ECONNREFUSED and origin in _ORIGIN_ICMP and addr:
                    self.swim.datagram_refused((addr[0], addr[1]), self._clock())
        return found

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
