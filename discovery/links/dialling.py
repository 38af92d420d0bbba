"""Dialling: a TCP connection, an SSH handshake with a pinned host key, a login, a channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import asyncssh

from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.identity import Identity, node_id, raw_ed25519
from discovery.links.frames import one_line
from discovery.links.limits import Limits, Login
from discovery.links.link import Handler, Link
from discovery.links.ssh import (
    ALGORITHMS,
    CHANNEL,
    SUBSYSTEM,
    Channel,
    ClientSession,
    Key,
    key_line,
    key_of,
    reason_of,
    tune,
)
from discovery.member import Addr, addr_text
from discovery.sshkey import fingerprint

DIAL_TIMEOUT_S = 5.0


class _Pin(asyncssh.SSHClient):
    """Accepts one host key, the expected one, or any when none is expected; remembers what was shown."""

    def __init__(self, expect: bytes | None) -> None:
        self.expect = expect
        self.shown = b""
        self.lost: Exception | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = exc

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.shown = key.public_data
        pub = raw_ed25519(self.shown)
        return pub is not None and self.expect in (None, pub)


async def dial(
    addr: Addr,
    *,
    identity: Identity | Sequence[Key],
    username: str,
    expect_pub: bytes | None,
    methods: Mapping[str, Handler] | None = None,
    timeout_s: float = DIAL_TIMEOUT_S,
    sock: socket.socket | None = None,
    limits: Limits | None = None,
    counters: Counter[str] | None = None,
) -> Link:
    """A link to the node at `addr`, logged in as `username` with our key, or the first key it takes.

    `expect_pub`: the node's 32-byte key; None takes any (and `link.login` says which). `sock`: a connected
    socket to use instead of dialling. Unreachable: nobody there, or no answer in time. Refused `host_key`:
    somebody else is there; `login`: it doesn't take our key; `busy`: it has no room. RemoteError: no node.
    """
    pin = _Pin(expect_pub)
    where = addr_text(addr)
    keys: list[Key] = [key_of(identity)] if isinstance(identity, Identity) else list(identity)
    if not keys:
        raise LocalError("no key to log in with; make one with `qd init` or add one to the ssh-agent")
    try:
        async with asyncio.timeout(timeout_s):
            conn = await _connect(addr, sock, _options(pin, keys, username, addr))
            try:
                return await _open(conn, pin, addr, methods or {}, limits or Limits(), counters)
            except BaseException:
                conn.abort()
                raise
    except TimeoutError as why:
        raise Unreachable(f"{where}: no answer within {timeout_s:g} s") from why
    except asyncssh.ChannelOpenError as why:
        raise _explain(pin.lost or why, where, pin) from why
    except (OSError, asyncssh.Error) as why:
        raise _explain(why, where, pin) from why


def _options(pin: _Pin, keys: list[Key], username: str, addr: Addr) -> asyncssh.SSHClientConnectionOptions:
    def make() -> asyncssh.SSHClientConnectionOptions:
        return asyncssh.SSHClientConnectionOptions(
            config=None,
            host=addr[0],
            port=addr[1],
            client_factory=lambda: pin,
            known_hosts=([], [], []),
            server_host_key_algs=["ssh-ed25519"],
            client_keys=keys,
            username=username,
            client_username=username,
            preferred_auth=["publickey"],
            disable_trivial_auth=True,
            agent_path=None,
            pkcs11_provider=None,
            gss_host=None,
            x509_trusted_certs=None,
            x509_trusted_cert_paths=[],
            login_timeout=0,
            **ALGORITHMS,
        )

    try:
        return make()
    except (ValueError, OSError):
        # asyncssh asks for the local user's name although ours is given; in a container there may be none.
        os.environ.setdefault("LOGNAME", "nobody")
        return make()


async def _connect(
    addr: Addr, sock: socket.socket | None, options: asyncssh.SSHClientConnectionOptions
) -> asyncssh.SSHClientConnection:
    """What `asyncssh.connect` does, without the thread it uses to read configuration files we don't have."""
    loop = asyncio.get_running_loop()
    if sock is None:
        sock = await _tcp(loop, addr)
    else:
        sock.setblocking(False)
    tune(sock)
    authenticated: asyncio.Future[None] = loop.create_future()
    options.waiter = authenticated
    conn: asyncssh.SSHClientConnection | None = None
    try:
        _, conn = await loop.create_connection(
            lambda: asyncssh.SSHClientConnection(loop, options, wait="auth"), sock=sock
        )
        await authenticated
        return conn
    except BaseException:
        authenticated.cancel()
        if conn is not None:
            conn.abort()
        else:
            sock.close()
        raise


async def _tcp(loop: asyncio.AbstractEventLoop, addr: Addr) -> socket.socket:
    """A TCP connection to an address, or to the first address of a name that accepts one."""
    host, port = addr[0], addr[1]
    family = _literal(host)
    if family is not None:
        targets: list[tuple[socket.AddressFamily, Any]] = [(family, (host, port))]
    else:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        targets = [(info[0], info[4]) for info in infos]
    failure: OSError = OSError(f"{host}: a name without an address")
    for family, target in targets:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, target)
            return sock
        except OSError as why:
            sock.close()
            failure = why
        except BaseException:
            sock.close()
            raise
    raise failure


def _literal(host: str) -> socket.AddressFamily | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return family
    return None


async def _open(
    conn: asyncssh.SSHClientConnection,
    pin: _Pin,
    addr: Addr,
    methods: Mapping[str, Handler],
    limits: Limits,
    counters: Counter[str] | None,
) -> Link:
    pub = raw_ed25519(pin.shown)
    assert pub is not None
    login = Login("member", node_id(pub), pub, fingerprint(pin.shown), None, key_line(pin.shown))
    session = ClientSession()
    chan: Any
    chan, _ = await conn.create_session(lambda: session, subsystem=SUBSYSTEM, env={}, send_env=[], **CHANNEL)
    link = Link(
        Channel(conn, chan),
        login,
        addr,
        methods,
        limits,
        Counter() if counters is None else counters,
        dialled=True,
    )
    session.link = link
    if conn.is_closed():
        raise asyncssh.ConnectionLost("closed")
    return link


def _explain(why: Exception, where: str, pin: _Pin) -> QuarterdeckError:
    match why:
        case asyncssh.HostKeyNotVerifiable() if pin.shown:
            return Refused(
                "host_key", f"{where} shows another key ({fingerprint(pin.shown)}) than the node we look for"
            )
        case asyncssh.PermissionDenied():
            return Refused("login", f"{where} does not accept our key")
        case asyncssh.DisconnectError(code=asyncssh.DISC_TOO_MANY_CONNECTIONS):
            return Refused("busy", f"{where} has no room for another link")
        case asyncssh.ConnectionLost() | ConnectionResetError() | BrokenPipeError():
            return Unreachable(f"{where}: closed the connection before the login was done")
        case ConnectionRefusedError():
            return Unreachable(f"{where}: connection refused")
        case asyncssh.ChannelOpenError():
            return Refused("login", f"{where} lets us in but opens no link: {one_line(why.reason)}")
        case asyncssh.Error():
            return RemoteError(f"{where} is no node of ours: {one_line(reason_of(why))}")
        case _:
            return Unreachable(
                f"{where}: {why.strerror if isinstance(why, OSError) and why.strerror else why}"
            )
