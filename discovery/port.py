"""One UDP socket that serves several pools, beside the TCP port of the same number that serves SSH.

A datagram goes to the pools whose keyring has its key id, which is one byte of a hash: where two pools share it, each
tries. Pools come and go while the port stays. Refused datagrams come back from the socket's error queue with the
address that refused (Linux, IP_RECVERR) and not with whose datagram it was, so every pool hears of them; they are only
a hint, which `swim` follows up.
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
from typing import Protocol

from discovery.errors import LocalError
from discovery.member import Addr
from discovery.seal import OVERHEAD, Forged, IncompatibleVersion, Opener, SealError, UnknownKey, packet_key_id

RECEIVE_BATCH = 64
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


class Tenant(Protocol):
    """A pool as its port sees it."""

    opener: Opener

    def take(self, body: bytes, sender: int, addr: Addr, now: float) -> None:
        """One datagram of this pool, opened. `flush` follows after the batch."""

    def refused(self, addr: Addr, now: float) -> None:
        """Something that was sent to `addr` met a closed port. `flush` follows."""

    def flush(self) -> None:
        """Carry out what came of it."""


class Port:
    """Reads the socket while a pool is attached. All calls and callbacks happen on the event loop's thread.

    `on_incompatible(addr, theirs, ours)` tells of a datagram of another wire version, once whatever the number of
    pools. `counters` holds what no pool could open, by reason code, and what the socket would not send.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_incompatible: Callable[[Addr, int, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._sock = sock
        self._on_incompatible = on_incompatible
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._pools: tuple[Tenant, ...] = ()
        self._closed = False

    def attach(self, pool: Tenant) -> None:
        """Gives this pool its datagrams from now on."""
        if self._closed:
            raise LocalError("this port is closed")
        if pool in self._pools:
            return
        if not self._pools:
            self._loop.add_reader(self._sock.fileno(), self._readable)
        self._pools = (*self._pools, pool)

    def detach(self, pool: Tenant) -> None:
        """No more datagrams for this pool; what is sealed with its key alone is counted as of an unknown key."""
        if pool not in self._pools:
            return
        self._pools = tuple(p for p in self._pools if p is not pool)
        if not self._pools:
            self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        """Closes the socket under whoever still uses it."""
        if not self._closed:
            self._closed = True
            if self._pools:
                self._loop.remove_reader(self._sock.fileno())
            self._pools = ()
            self._sock.close()

    def send(self, packet: bytes, addr: Addr) -> None:
        """One datagram; one that can't be sent is counted and lost, as any datagram may be."""
        if self._closed:
            return
        for _ in range(2):
            try:
                self._sock.sendto(packet, addr)
                return
            except BlockingIOError:
                self.counters["send_full"] += 1
                return
            except ConnectionRefusedError:
                self._errors_later()  # an earlier datagram's refusal waited on the socket; this one is still unsent
            except OSError as why:
                self.counters[f"send_{errno.errorcode.get(why.errno or 0, 'error').lower()}"] += 1
                self._errors_later()
                return

    def _readable(self) -> None:
        now = self._clock()
        heard: list[Tenant] = []
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
            pools = self._pools
            try:
                if len(pools) > 1:
                    pool, (sender, body) = self._open(pools, packet, now, addr)
                else:
                    pool = pools[0]
                    sender, body = pool.opener.open(packet, now, addr)
            except IncompatibleVersion as why:
                self.counters[why.code] += 1
                self._on_incompatible(addr, why.theirs, why.ours)
            except SealError as why:
                self.counters[why.code] += 1
            else:
                pool.take(body, sender, addr, now)
                if pool not in heard:
                    heard.append(pool)
            if not self._pools:
                break
        for pool in heard:
            pool.flush()

    @staticmethod
    def _open(
        pools: tuple[Tenant, ...], packet: bytes, now: float, addr: Addr
    ) -> tuple[Tenant, tuple[int, bytes]]:
        """The pool that this packet is of, and what it says; else the refusal that tells most."""
        key_id = packet_key_id(packet)
        if key_id is None or len(packet) < OVERHEAD:
            return pools[0], pools[0].opener.open(
                packet, now
            )  # another version, or too short: any pool says so
        refusal: SealError | None = None
        for pool in pools:
            if not pool.opener.holds(key_id):
                continue
            try:
                return pool, pool.opener.open(packet, now, addr)
            except SealError as why:
                if refusal is None or isinstance(refusal, Forged):
                    refusal = why
        raise refusal or UnknownKey("sealed with a key of none of the pools here")

    def _read_errors(self) -> bool:
        """Empties the socket's error queue into the pools; whether there was anything in it."""
        if self._closed:
            return False
        refused: dict[Addr, None] = {}
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
                    refused[addr[0], addr[1]] = None
        if refused:
            for pool in self._pools:
                for where in refused:
                    pool.refused(where, self._clock())
                pool.flush()
        return found

    def _errors_later(self) -> None:
        """After the present turn: a pool may be sending in the middle of another's."""
        self._loop.call_soon(self._read_errors)
