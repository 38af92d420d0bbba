"""How we use asyncssh: algorithms, keys, and the channel below a link. Nothing is read from `~/.ssh`."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import asyncssh
import asyncssh.agent

from discovery.errors import Refused
from discovery.identity import Identity
from discovery.links.frames import one_line
from discovery.links.link import Link
from discovery.sshsig import armor, to_sign

SUBSYSTEM = "quarterdeck"
TCP_USER_TIMEOUT_MS = 20_000
"""A host that acknowledges nothing for this long is gone: the kernel closes the link."""

ALGORITHMS: dict[str, Any] = {
    "kex_algs": ["curve25519-sha256", "curve25519-sha256@libssh.org"],
    "encryption_algs": ["aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"],
    "mac_algs": ["hmac-sha2-256-etm@openssh.com"],
    "compression_algs": ["none"],
    "rekey_bytes": 2**32,
    "rekey_seconds": 24 * 3600,
    "keepalive_interval": 0,
    "tcp_keepalive": True,
}
"""Fast, modern, and none that would have to be explained. Rekeying is rare since a link is mostly idle; SSH's
own keepalive is off since idle must cost nothing: gossip tells who lives, the kernel closes what is gone."""

CHANNEL: dict[str, Any] = {"encoding": None, "window": 2**20, "max_pktsize": 2**16}

Key = asyncssh.SSHKey | asyncssh.SSHKeyPair
_AnyChannel = asyncssh.SSHClientChannel[bytes] | asyncssh.SSHServerChannel[bytes]

asyncssh.set_log_level(logging.CRITICAL)
logging.getLogger("asyncssh").propagate = False


def key_of(identity: Identity) -> asyncssh.SSHKey:
    return asyncssh.import_private_key(identity.to_openssh())


def key_line(blob: bytes) -> str:
    """A key or certificate blob in OpenSSH form, without a comment. ValueError when it names no algorithm."""
    size = int.from_bytes(blob[:4], "big")
    algorithm = blob[4 : 4 + size].decode("ascii")
    if not algorithm or len(blob) < 4 + size or not algorithm.isprintable() or " " in algorithm:
        raise ValueError("no key blob")
    return f"{algorithm} {base64.b64encode(blob).decode()}"


def tune(sock: socket.socket) -> None:
    """No waiting for more to send, and no waiting for ever for a host that is gone. A socket that is no TCP's has
    neither fault."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)


class _Agent(asyncssh.SSHAgentClient):
    """Connects for each question anew, so that a key can be kept without keeping a connection."""

    async def _make_request(self, msgtype: int, *args: bytes) -> Any:
        try:
            return await super()._make_request(msgtype, *args)
        finally:
            await self._cleanup()


async def agent_keys() -> Sequence[asyncssh.SSHKeyPair]:
    """The keys of the ssh-agent at SSH_AUTH_SOCK, certificates and hardware keys too; empty without an agent.

    No connection is kept: a key connects to the agent again when it signs.
    """
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        return []
    try:
        return await _Agent(path).get_keys()
    except (OSError, ValueError):
        return []


async def sign_with(key: asyncssh.SSHKeyPair, message: bytes, namespace: str) -> str:
    """The armored SSHSIG signature of a message by a key pair: a file's, an ssh-agent's, a hardware key's.

    Refused `signing` when the agent or the hardware says no. A pair with a certificate signs with it.
    """
    if b"rsa" in key.sig_algorithm:
        key.set_sig_algorithm(b"rsa-sha2-512")
    data = to_sign(message, namespace)
    try:
        if isinstance(key, asyncssh.agent.SSHAgentKeyPair):
            signature = await key.sign_async(data)
        else:
            signature = await asyncio.get_running_loop().run_in_executor(None, key.sign, data)
    except (ValueError, OSError, asyncssh.Error) as why:
        raise Refused("signing", f"the key would not sign: {why}") from why
    return armor(key.public_data, namespace, signature)


class Channel:
    """The wire of a link: one SSH channel, with the connection that exists for it alone."""

    def __init__(
        self, conn: asyncssh.SSHClientConnection | asyncssh.SSHServerConnection, chan: _AnyChannel
    ) -> None:
        self._conn = conn
        self._chan = chan

    def write(self, data: bytes | bytearray) -> None:
        try:
            self._chan.write(data)
        except (OSError, BrokenPipeError):
            pass

    def unsent(self) -> int:
        return self._chan.get_write_buffer_size()

    def close(self, code: str) -> None:
        self._conn.disconnect(asyncssh.DISC_BY_APPLICATION, code)

    def abort(self) -> None:
        self._conn.abort()


class _Session:
    """Hands what the channel tells to the link."""

    link: Link | None = None

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if self.link is not None and datatype is None:
            self.link.received(data)

    def pause_writing(self) -> None:
        if self.link is not None:
            self.link.pause()

    def resume_writing(self) -> None:
        if self.link is not None:
            self.link.resume()

    def eof_received(self) -> bool:
        if self.link is not None:
            self.link.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.link is not None:
            self.link.lost(reason_of(exc))


class ClientSession(_Session, asyncssh.SSHClientSession[bytes]):
    """The dialling end of a channel."""


class ServerSession(_Session, asyncssh.SSHServerSession[bytes]):
    """The accepting end of a channel. Subclassed where the listener knows what to do with requests."""


def reason_of(exc: BaseException | None) -> str:
    """Why a connection ended, in a few words."""
    match exc:
        case None:
            return "closed by the other side"
        case asyncssh.ConnectionLost() | ConnectionError():
            return "connection lost"
        case asyncssh.DisconnectError():
            return one_line(exc.reason, 80) or "closed by the other side"
        case _:
            return type(exc).__name__


__all__ = [
    "ALGORITHMS",
    "CHANNEL",
    "SUBSYSTEM",
    "Channel",
    "ClientSession",
    "Key",
    "ServerSession",
    "agent_keys",
    "key_line",
    "key_of",
    "reason_of",
    "sign_with",
    "tune",
]
