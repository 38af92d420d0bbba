"""Listening: who may log in is asked of one callback, and nothing is offered but our own subsystem.

No shell, no command, no terminal, no forwarding of any kind, no SFTP. Every connection that doesn't become a
link is closed within `login_timeout_s`, and counted under a stable code:

`rate` too many handshakes from one address · `flood` too many connections that don't log in ·
`login_timeout` · `login` no key of its was taken · `too_many_keys` · `no_link` logged in, asked for no link ·
`links_full` · `not_ssh` it speaks something else, or broken SSH · `closed_early` it went before it logged in.

Also counted: `accepted`, `links`, `accept_error`, `refused_request` (a shell, a forwarding …),
`unknown_method`, `calls_full`, `handler_error`; of links cut off `frame_too_large`, `bad_frame`, `overrun`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import asyncssh

from discovery import sshkey
from discovery.identity import Identity
from discovery.links.limits import Buckets, Limits, Login, address_key
from discovery.links.link import Handler, Link, settled
from discovery.links.ssh import (
    ALGORITHMS,
    CHANNEL,
    SUBSYSTEM,
    Channel,
    ServerSession,
    key_line,
    key_of,
    tune,
)
from discovery.member import Addr

Authorise = Callable[[str, str, Addr], Login | None]
"""`(key_line, username, peer address) -> Login`, or None for who may not enter. `key_line` is a key or a
certificate in OpenSSH form; of a certificate the CA's signature is verified already, and nothing else is."""

OnRefused = Callable[[str, Addr, str | None], None]
"""`(code, peer address, fingerprint of the last key offered)`: a connection that did not become a link."""

BACKLOG = 256
PATIENCE_S = 1.0
"""A connection is not made to give way to a newer one before it has waited this long."""

_ACCEPT_PAUSE_S = 0.5
_BROKEN_SSH = (
    asyncssh.ProtocolError,
    asyncssh.ProtocolNotSupported,
    asyncssh.KeyExchangeFailed,
    asyncssh.MACError,
    UnicodeDecodeError,
)
_log = logging.getLogger(__name__)


class Listener:
    """An SSH server for links on one TCP socket."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        host_key: Identity,
        authorise: Authorise,
        methods: Mapping[str, Handler],
        on_link: Callable[[Link], None] | None = None,
        on_refused: OnRefused | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.methods = methods
        self.counters: Counter[str] = Counter()
        """What was accepted (`accepted`, `links`) and what was refused, by code."""
        self.links: set[Link] = set()
        self.authorise = authorise
        self.on_link = on_link
        self._on_refused = on_refused
        self._sock = sock
        self._buckets = Buckets(self.limits)
        self._doors: dict[_Door, None] = {}
        """Connections without a link yet, the longest waiting first."""
        self._options = asyncssh.SSHServerConnectionOptions(
            config=None,
            server_host_keys=[key_of(host_key)],
            public_key_auth=True,
            password_auth=False,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            x509_trusted_certs=None,
            allow_pty=False,
            agent_forwarding=False,
            x11_forwarding=False,
            line_editor=False,
            login_timeout=0,
            **ALGORITHMS,
        )
        self._accepting: asyncio.Task[None] | None = None
        self._admitting: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        sock: socket.socket,
        *,
        host_key: Identity,
        authorise: Authorise,
        methods: Mapping[str, Handler],
        on_link: Callable[[Link], None] | None = None,
        on_refused: OnRefused | None = None,
        limits: Limits | None = None,
    ) -> Listener:
        """Listens on a bound TCP socket from now on. The socket is the listener's, and closed with it."""
        listener = cls(
            sock,
            host_key=host_key,
            authorise=authorise,
            methods=methods,
            on_link=on_link,
            on_refused=on_refused,
            limits=limits,
        )
        sock.setblocking(False)
        sock.listen(BACKLOG)
        listener._accepting = asyncio.create_task(listener._accept())
        return listener

    @property
    def waiting(self) -> int:
        """Connections that are not links yet."""
        return len(self._doors)

    async def close(self) -> None:
        """Stops listening, closes every link, cancels what is being served."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, *self._admitting, return_exceptions=True)
        self._sock.close()
        for door in list(self._doors):
            door.turn_away("closing")
        links = list(self.links)
        await asyncio.gather(*(link.close() for link in links), return_exceptions=True)
        for link in links:
            link.cancel_served()
        await settled()

    # --- at the door

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._sock)
            except OSError:
                self.counters["accept_error"] += 1
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self.take(sock, peer[:2])

    def take(self, sock: socket.socket, addr: Addr) -> str | None:
        """Treats a connected stream socket as accepted from `addr`, by the same limits; it is the listener's now.

        None, or the code of the rule that turned it away (`closing` when this listener ends); it is closed then.
        """
        if self._sock.fileno() < 0:
            sock.close()
            return "closing"
        self.counters["accepted"] += 1
        if (code := self._judge(addr)) is not None:
            sock.close()
            self.refused(code, addr, None)
            return code
        loop = asyncio.get_running_loop()
        door = _Door(loop, self._options, self, addr)
        self._doors[door] = None
        task = loop.create_task(self._admit(loop, door, sock))
        self._admitting.add(task)
        task.add_done_callback(self._admitting.discard)
        return None

    async def _admit(self, loop: asyncio.AbstractEventLoop, door: _Door, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            tune(sock)
            await loop.connect_accepted_socket(lambda: door, sock)
        except OSError:
            sock.close()
            self.leave(door)

    def _judge(self, addr: Addr) -> str | None:
        """The code of the rule that keeps a newcomer out, or None."""
        key, loopback = address_key(addr[0])
        now = time.monotonic()
        limits = self.limits
        if not self._buckets.take(key, loopback, now):
            return "rate"
        if not loopback and sum(d.address == key for d in self._doors) >= limits.max_unauthenticated_per_addr:
            return "flood"
        if len(self._doors) >= limits.max_unauthenticated:
            longest = next(iter(self._doors))
            if now - longest.since < PATIENCE_S:
                return "flood"
            longest.turn_away("flood")
        return None

    def refused(self, code: str, addr: Addr, shown: str | None) -> None:
        self.counters[code] += 1
        if self._on_refused is not None:
            try:
                self._on_refused(code, addr, shown)
            except Exception:
                _log.debug("on_refused failed", exc_info=True)

    def leave(self, door: _Door) -> None:
        self._doors.pop(door, None)

    def opened(self, link: Link) -> None:
        self.counters["links"] += 1
        self.links.add(link)
        link.on_close(lambda: self.links.discard(link))
        if self.on_link is not None:
            try:
                self.on_link(link)
            except Exception:
                self.counters["handler_error"] += 1
                _log.debug("on_link failed", exc_info=True)


class _Door(asyncssh.SSHServerConnection):
    """One accepted connection. Key checks are ours: asyncssh's want a user's name in every certificate."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        options: asyncssh.SSHServerConnectionOptions,
        listener: Listener,
        addr: Addr,
    ) -> None:
        super().__init__(loop, options)
        self._protocol_factory = lambda: _Guard(self)
        self.listener = listener
        self.addr = addr
        self.address, _ = address_key(addr[0])
        self.since = time.monotonic()
        self.login: Login | None = None
        self.link: Link | None = None
        self.offers = 0
        self.shown: str | None = None
        self._verdicts: dict[tuple[str, bytes], tuple[asyncssh.SSHKey, Login] | None] = {}
        self._code = ""
        self._timer = loop.call_later(listener.limits.login_timeout_s, self._too_late)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._code:
            self.abort()

    async def reload_config(self) -> None:
        """There is no configuration that could depend on the user."""

    async def validate_public_key(self, username: str, key_data: bytes, msg: bytes, signature: bytes) -> bool:
        """Whether this key may log in, and, when there is a signature already, whether it holds."""
        self.offers += 1
        if self.offers > self.listener.limits.max_offers:
            self.turn_away("too_many_keys")
            return False
        if (username, key_data) not in self._verdicts:
            self._verdicts[username, key_data] = self._ask(username, key_data)
        verdict = self._verdicts[username, key_data]
        if verdict is None:
            return False
        key, login = verdict
        if not msg:
            return True
        signed = len(self._session_id).to_bytes(4, "big") + self._session_id + msg
        if not key.verify(signed, signature):
            return False
        if not _user_present(login, key_data, signature):
            return False
        self.login = login
        return True

    def _ask(self, username: str, blob: bytes) -> tuple[asyncssh.SSHKey, Login] | None:
        try:
            self.shown = sshkey.fingerprint(blob)
            line = key_line(blob)
            key: Any
            if "-cert-v01@" in line.partition(" ")[0]:
                key = asyncssh.import_certificate(line).key
            else:
                key = asyncssh.import_public_key(line)
            login = self.listener.authorise(line, username, self.addr)
        except (ValueError, UnicodeDecodeError, asyncssh.KeyImportError):
            return None
        except Exception:
            self.listener.counters["handler_error"] += 1
            _log.debug("authorise failed", exc_info=True)
            return None
        return None if login is None else (key, login)

    def turn_away(self, code: str) -> None:
        """Closes the connection, to be counted under this code."""
        self._code = self._code or code
        self._finish()
        self.abort()

    def _too_late(self) -> None:
        self.turn_away("login_timeout")

    def _finish(self) -> None:
        """Leaves the list of those who wait; counted, unless a link was opened."""
        self._timer.cancel()
        if self in self.listener._doors:
            self.listener.leave(self)
            if self.link is None and self._code != "closing":
                self.listener.refused(self._code or "closed_early", self.addr, self.shown)

    def ended(self, exc: Exception | None) -> None:
        if not self._code:
            if self.login is not None:
                self._code = "no_link"
            elif self.offers:
                self._code = "login"
            elif isinstance(exc, _BROKEN_SSH):
                self._code = "not_ssh"
            else:
                self._code = "closed_early"
        self._finish()

    def session(self) -> tuple[asyncssh.SSHServerChannel[bytes], ServerSession] | bool:
        """The one session of this connection, when a link may come of it."""
        if self.link is not None or self.login is None:
            return False
        if len(self.listener.links) >= self.listener.limits.max_links:
            self._code = "links_full"
            self._finish()
            self.disconnect(asyncssh.DISC_TOO_MANY_CONNECTIONS, "no room for another link")
            return False
        chan = self.create_server_channel(**CHANNEL)
        return chan, _Served(self, chan)

    def open(self, chan: asyncssh.SSHServerChannel[bytes]) -> Link:
        assert self.login is not None
        listener = self.listener
        self.link = Link(
            Channel(self, chan),
            self.login,
            self.addr,
            listener.methods,
            listener.limits,
            listener.counters,
            dialled=False,
        )
        self._finish()
        return self.link


class _Guard(asyncssh.SSHServer):
    """Says no to all but public keys and the one session. What it doesn't mention, asyncssh refuses."""

    def __init__(self, door: _Door) -> None:
        self._door = door

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.ended(exc)

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def session_requested(self) -> Any:
        return self._door.session()

    def _no(self, *args: Any, **kwargs: Any) -> bool:
        self._door.listener.counters["refused_request"] += 1
        return False

    connection_requested = _no
    server_requested = _no
    unix_connection_requested = _no
    unix_server_requested = _no
    tun_requested = _no
    tap_requested = _no


class _Served(ServerSession):
    """The session of an accepted connection: becomes a link when it asks for our subsystem."""

    def __init__(self, door: _Door, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._door = door
        self._chan = chan

    def _no(self, *args: Any, **kwargs: Any) -> bool:
        self._door.listener.counters["refused_request"] += 1
        return False

    shell_requested = _no
    exec_requested = _no
    pty_requested = _no

    def subsystem_requested(self, subsystem: str) -> bool:
        return (subsystem == SUBSYSTEM and self._door.link is None) or self._no()

    def session_started(self) -> None:
        self.link = self._door.open(self._chan)
        self._door.listener.opened(self.link)


def _user_present(login: Login, blob: bytes, signature: bytes) -> bool:
    """Whether a hardware key was touched, and knew by whom, as far as the login needs it."""
    if not key_line(blob).startswith("sk-"):
        return not login.need_verified
    flags = _hardware_flags(signature)
    touched = bool(flags & sshkey.TOUCHED) or not login.need_touch
    return touched and (bool(flags & sshkey.VERIFIED) or not login.need_verified)


def _hardware_flags(signature: bytes) -> int:
    """The byte after algorithm and signature proper; 0 when there is none."""
    at = 0
    for _ in range(2):
        at += 4 + int.from_bytes(signature[at : at + 4], "big")
    return signature[at] if at < len(signature) else 0
