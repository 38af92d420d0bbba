"""What a link and a listener allow, who is at the other end, and the token bucket that meters handshakes."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

Role = Literal["observe", "operate", "admin"]
LoginKind = Literal["member", "home", "op", "mesh", "backbone", "join"]


@dataclass(frozen=True)
class Login:
    """Who is at the other end of a link, as proved by its key."""

    kind: LoginKind
    node: int | None
    """The node id of a member, else None."""
    pub: bytes | None
    """The 32 bytes of an ed25519 key, else None."""
    fingerprint: str
    """`SHA256:…`, as `ssh-keygen -l` prints it."""
    role: Role | None
    key_line: str
    """The key or certificate as presented, in OpenSSH form: `ssh-ed25519 AAAA…`."""
    need_verified: bool = False
    """The login's signature must say that a hardware key knew its user, by PIN or finger."""
    need_touch: bool = True
    """If it is a hardware key's, the login's signature must say that somebody touched it."""


@dataclass(frozen=True)
class Limits:
    """Limits of a listener and of the links it accepts; a dialled link uses the last four."""

    max_unauthenticated: int = 32
    """Connections that have not opened a link yet. Beyond it the one waiting longest makes room if it has
    waited a second, else the newcomer is closed at accept."""
    max_unauthenticated_per_addr: int = 8
    """Of these from one address (or IPv6 /64) that is not loopback."""
    login_timeout_s: float = 5.0
    """From accept to an open link."""
    handshakes_per_s: float = 20.0
    """Refill of one address's bucket of handshakes."""
    handshake_burst: int = 40
    loopback_handshakes_per_s: float = 500.0
    loopback_handshake_burst: int = 1000
    max_links: int = 1024
    max_offers: int = 20
    """Keys a client may offer before it is sent away."""
    max_frame_bytes: int = 2**20
    max_calls: int = 256
    """Calls and streams of the other side that are being served at once, a link."""
    stream_window_bytes: int = 2**18
    """What a stream may send ahead of its consumer."""
    max_unsent_bytes: int = 16 * 2**20
    """Waiting to be sent to a side that does not read: beyond it the link is closed."""


def address_key(host: str) -> tuple[str, bool]:
    """What limits by address go by, and whether it is loopback. An IPv6 host owns its /64."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host, False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped), ip.ipv4_mapped.is_loopback
        if not ip.is_loopback:
            return str(ipaddress.ip_network((ip, 64), strict=False)), False
    return str(ip), ip.is_loopback


class Buckets:
    """A token bucket an address, for the addresses heard of last. Time is the caller's, in seconds."""

    MAX_ADDRESSES = 4096

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, loopback: bool, now: float) -> bool:
        """Takes one handshake from the address's bucket; False when it is empty."""
        limits = self._limits
        rate = limits.loopback_handshakes_per_s if loopback else limits.handshakes_per_s
        burst = float(limits.loopback_handshake_burst if loopback else limits.handshake_burst)
        tokens, at = self._buckets.pop(key, (burst, now))
        tokens = min(burst, tokens + (now - at) * rate)
        granted = tokens >= 1
        self._buckets[key] = (tokens - 1 if granted else tokens, now)
        if len(self._buckets) > self.MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return granted
