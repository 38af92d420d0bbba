"""The nouns of the backbone on NATS: where a server is, what a bucket is, what one holds. Needs no NATS library."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from discovery.errors import LocalError, QuarterdeckError
from discovery.member import Addr

DEFAULT_PORT = 4222
SCHEMES = ("nats", "tls")
VALUE_MAX_BYTES = 4096
"""No value of ours is longer; what is, isn't looked at."""


class Away(QuarterdeckError):
    """The server, or its JetStream, did not do what was asked, or nobody knows whether it did."""


class BucketGone(Away):
    """Nobody keeps this bucket: it was never made, was removed, or has no leader now."""


@dataclass(frozen=True)
class Server:
    """Where one server is, and who we are to it. Its text, for people, holds no secret."""

    addr: Addr
    tls: bool = False
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls_name: str | None = None
    """The name its certificate must bear, where that is not its host."""

    def __str__(self) -> str:
        host, port = self.addr
        return f"{'tls' if self.tls else 'nats'}://{f'[{host}]' if ':' in host else host}:{port}"


def servers_of(url: str) -> list[Server]:
    """The servers of one address, in the order written: `nats://` or `tls://`, then `host[:port]`, more of them
    after commas. `user:password@` or `token@` before a host counts for it and those after it; what they hold of
    `@`, `:`, `,` or `/` is written as %40, %3A, %2C, %2F. LocalError for anything else, which never shows them."""
    scheme, sep, rest = url.partition("://")
    if not sep or scheme not in SCHEMES:
        raise LocalError("backbone: not a NATS address; write it as nats://HOST:PORT")
    login: dict[str, str | None] = {}
    found = []
    for part in rest.rstrip("/").split(","):
        own, sep, part = part.strip().rpartition("://")
        if sep and own != scheme:
            raise LocalError(f"backbone {scheme}://…: two schemes in one address; write it as two addresses")
        who, at, place = part.rpartition("@")
        if at:
            first, colon, second = who.partition(":")
            if colon:
                login = {"user": unquote(first), "password": unquote(second)}
            else:
                login = {"token": unquote(first)}
        try:
            split = urlsplit(f"//{place}")
            host, port = split.hostname, split.port
            if not host or port == 0 or split.path or split.query or split.fragment or place.endswith(":"):
                raise ValueError
        except ValueError:
            shown = place if len(place) <= 80 else place[:79] + "…"
            raise LocalError(
                f"backbone {scheme}://{shown}: not HOST:PORT; write it as nats://HOST:PORT"
            ) from None
        found.append(Server((host, port or DEFAULT_PORT), scheme == "tls", **login))
    return found


@dataclass(frozen=True)
class Bucket:
    """A key-value bucket: the last value of each key, for `ttl_s` after it was put."""

    name: str
    ttl_s: int

    @property
    def stream(self) -> str:
        return f"KV_{self.name}"

    def subject(self, key: str) -> str:
        return f"$KV.{self.name}.{key}"


@dataclass(frozen=True)
class Stored:
    """A value as the bucket has it; `value` is empty where the key was deleted. `stored_s`: Unix seconds by
    the server's clock."""

    key: str
    value: bytes
    revision: int
    stored_s: float
