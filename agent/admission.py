"""Admission of a further host by a one-time token: what is in one, and the desk of the agent that gives them out.

A token is one word: `qd1_` and, in base32, mesh, addresses and host key of the agent, a 128-bit secret, expiry and a
checksum. The secret is never sent: the newcomer derives an ed25519 key from it and logs in with that as `join`, over
SSH with the host key pinned. The agent keeps the public half of that key alone, in its journal, so that an invitation
outlives a restart and what is kept there admits nobody.

An invitation is good once. It is marked as used, on disk, before anything is handed out; an answer that is lost after
that has to be asked for anew. Expiry goes by the agent's clock alone. What was used or has expired is remembered for a
day, to be told apart from what was never given (codes `invitation_used`, `invitation_expired`, `invitation_unknown`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from agent.events import wall_ms
from discovery.errors import LocalError, Refused, RemoteError
from discovery.identity import MESH_NAME, Identity
from discovery.member import Addr, addr_text
from discovery.sshkey import pub_fingerprint

if TYPE_CHECKING:
    from discovery.links import Link

PREFIX = "qd1_"
SECRET_BYTES = 16
CHECKSUM_BYTES = 4
TOKEN_MAX_CHARS = 1024
ADDRS_MAX = 4
OPEN_MAX = 64
SPENT_KEPT_MS = 24 * 3600 * 1000
SPENT_MAX = 256
TTL_MIN_MS = 1_000
TTL_MAX_MS = 24 * 3600 * 1000
DEFAULT_TTL_MS = 600_000
REFUSALS_TOLD_A_MINUTE = 10
INVITATIONS = "invitations"

Pub = Annotated[bytes, Meta(min_length=32, max_length=32)]
Host = Annotated[bytes, Meta(min_length=2, max_length=65)]
"""`4` or `6` and the bytes of an IP address, or `n` and a name."""


# --- tokens


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What a newcomer is given. Field order is that of the wire."""

    mesh: Annotated[str, Meta(max_length=64)]
    host_pub: Pub
    """The agent's node key, which is its SSH host key."""
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    expires_s: Annotated[int, Meta(ge=0, le=2**40)]
    """Unix seconds by the agent's clock."""
    hosts: Annotated[
        list[tuple[Host, Annotated[int, Meta(ge=1, le=65535)]]], Meta(min_length=1, max_length=ADDRS_MAX)
    ]

    @property
    def addrs(self) -> list[Addr]:
        """Where the agent may be met, best first."""
        return [(unpacked_host(host), port) for host, port in self.hosts]

    def key(self) -> Identity:
        """The key that proves this token: to be logged in with as `join`."""
        info = b"quarterdeck/join/1|" + self.mesh.encode()
        seed = HKDF(algorithm=SHA256(), length=32, salt=self.host_pub, info=info).derive(self.secret)
        return Identity.from_seed(seed)


_encode = msgspec.msgpack.Encoder().encode
_token = msgspec.msgpack.Decoder(Token)


def token_text(token: Token) -> str:
    """The one word."""
    blob = _encode(token)
    whole = blob + hashlib.sha256(blob).digest()[:CHECKSUM_BYTES]
    return PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()


def read_token(text: str) -> Token:
    """The token in a text, whatever its case, spaces or line breaks; LocalError when it was copied wrongly."""
    word = "".join(text.split()).lower()
    if not word.startswith(PREFIX):
        raise LocalError(f"token: does not begin with {PREFIX}; copy the whole word that `qd invite` printed")
    mistyped = LocalError(
        "token: mistyped or cut short, its checksum does not fit; copy the whole word that `qd invite` printed"
    )
    body = word[len(PREFIX) :]
    if len(body) > TOKEN_MAX_CHARS:
        raise mistyped
    try:
        whole = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except (binascii.Error, ValueError) as why:
        raise mistyped from why
    blob, checksum = whole[:-CHECKSUM_BYTES], whole[-CHECKSUM_BYTES:]
    if hashlib.sha256(blob).digest()[:CHECKSUM_BYTES] != checksum:
        raise mistyped
    try:
        token = _token.decode(blob)
        if not MESH_NAME.fullmatch(token.mesh) or not all(host for host, _ in token.addrs):
            raise ValueError("not a mesh name, or no host")
    except (msgspec.MsgspecError, ValueError) as why:
        raise LocalError(
            "token: of a version that this build does not read; update Quarterdeck here"
        ) from why
    return token


def packed_host(host: str) -> bytes:
    """An address as the token holds it."""
    try:
        address = ipaddress.ip_address(host)
        return str(address.version).encode() + address.packed
    except ValueError:
        return b"n" + host.encode()


def unpacked_host(host: bytes) -> str:
    """ValueError when it is none."""
    return host[1:].decode() if host[:1] == b"n" else str(ipaddress.ip_address(host[1:]))


def key_mark(raw: bytes) -> bytes:
    """8 bytes that tell two secret keys apart and nothing else."""
    return hashlib.sha256(b"quarterdeck/key-mark/1\0" + raw).digest()[:8]


# --- what is handed over


class Glance(msgspec.Struct, frozen=True, kw_only=True):
    """What a newcomer may know before it spends its token: enough to see whether it can join."""

    mesh: Annotated[str, Meta(max_length=64)]
    node: Annotated[str, Meta(max_length=128)]
    mesh_pub: Pub
    ring: tuple[int, bytes]
    """`Ring.order` of the mesh's keys."""
    backbone: bytes | None
    """`key_mark` of the backbone key."""
    wall_ms: int
    state: str
    """`open`, `used` or `expired`."""


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a home part of a mesh."""

    ring: bytes
    """`keyring.pack`: the mesh's keys, signed by its identity key."""
    identity: bytes
    """The mesh's own key, in OpenSSH form."""
    backbone: bytes | None
    operators: list[str]
    """Lines for `authorized_operators`."""
    seeds: list[tuple[str, int]]
    """Where members were last met."""
    genesis: str = ""
    """The roster with which the mesh began."""


# --- the agent's desk


class Facts(Protocol):
    """Where invitations are kept: the node's journal."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def set(self, key: str, value: Any, *, durable: bool = False) -> None: ...


class Invitation(msgspec.Struct, frozen=True):
    """One that was given out. Times are Unix milliseconds of this host."""

    pub: Pub
    made_ms: int
    expires_ms: int
    by: str
    used_ms: int | None = None
    used_from: str | None = None


class Admission:
    """Gives out invitations and takes them back. `addrs()`: where this agent may be met, best first; `glance()` and
    `bundle()`: what there is to know, and to hand over."""

    def __init__(
        self,
        *,
        mesh: str,
        host_pub: bytes,
        facts: Facts,
        addrs: Callable[[], Sequence[Addr]],
        glance: Callable[[], Mapping[str, Any]],
        bundle: Callable[[], Bundle],
        emit: Callable[..., Any],
        wall: Callable[[], int] = wall_ms,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Refused newcomers by code."""
        self._mesh = mesh
        self._host_pub = host_pub
        self._facts = facts
        self._addrs = addrs
        self._glance = glance
        self._bundle = bundle
        self._emit = emit
        self._wall = wall
        self._monotonic = monotonic
        self._random = random_bytes
        self._given: dict[bytes, Invitation] = {}
        self._ends: dict[bytes, float] = {}
        """When each open one expires, monotonic: a clock that is set while the agent runs moves nothing."""
        self._told: deque[float] = deque()
        now, now_ms = monotonic(), wall()
        for entry in facts.get(INVITATIONS, []):
            try:
                kept = msgspec.convert(entry, Invitation)
            except msgspec.ValidationError:
                continue
            self._given[kept.pub] = kept
            left_ms = min(kept.expires_ms - now_ms, kept.expires_ms - kept.made_ms)
            self._ends[kept.pub] = now + left_ms / 1000

    @property
    def open(self) -> int:
        """Invitations that still can be used."""
        return sum(self._state(given) == "open" for given in self._given.values())

    def invite(self, ttl_ms: int, by: str) -> dict[str, Any]:
        """A new token. Refused `bad_ttl`, `too_many_invitations`, `journal_full`."""
        if not TTL_MIN_MS <= ttl_ms <= TTL_MAX_MS:
            raise Refused("bad_ttl", "invite: an invitation is good for 1 s to 24 h; give it another --ttl")
        self._forget()
        if self.open >= OPEN_MAX:
            raise Refused(
                "too_many_invitations",
                f"invite: {OPEN_MAX} invitations of this node are open; wait until one is used or expires",
            )
        made_ms = self._wall()
        addrs = list(self._addrs())[:ADDRS_MAX]
        token = Token(
            self._mesh,
            self._host_pub,
            self._random(SECRET_BYTES),
            (made_ms + ttl_ms) // 1000,
            [(packed_host(host), port) for host, port in addrs],
        )
        given = Invitation(token.key().pub, made_ms, made_ms + ttl_ms, by)
        self._keep({**self._given, given.pub: given})
        self._ends[given.pub] = self._monotonic() + ttl_ms / 1000
        self._emit("admission.invited", by=by, expires_at_ms=given.expires_ms, key=pub_fingerprint(given.pub))
        return {
            "token": token_text(token),
            "mesh": self._mesh,
            "addrs": [addr_text(addr) for addr in addrs],
            "ttl_ms": ttl_ms,
            "expires_at_ms": given.expires_ms,
            "open": self.open,
        }

    def admits(self, pub: bytes, addr: Addr) -> bool:
        """Whether this key may log in as `join`: that of an invitation, used and expired ones too, to be told so."""
        if pub in self._given:
            return True
        self._refused("invitation_unknown", addr, pub)
        return False

    def glance(self, pub: bytes) -> Glance:
        """What may be seen with this invitation; it stays as good as it was."""
        given = self._given.get(pub)
        state = "expired" if given is None else self._state(given)
        return msgspec.convert({**self._glance(), "state": state, "wall_ms": self._wall()}, Glance)

    def redeem(self, pub: bytes, addr: Addr) -> Bundle:
        """Spends an invitation. Refused `invitation_used`, `invitation_expired`, `invitation_unknown`,
        `journal_full`; then it is as good as it was."""
        given = self._given.get(pub)
        state = "unknown" if given is None else self._state(given)
        if given is None or state != "open":
            self._refused(f"invitation_{state}", addr, pub)
            raise Refused(f"invitation_{state}", self._why(given, state))
        bundle = self._bundle()
        used = msgspec.structs.replace(given, used_ms=self._wall(), used_from=addr[0])
        self._keep({**self._given, pub: used})
        self._emit("admission.joined", by=given.by, addr=addr_text(addr), key=pub_fingerprint(pub))
        return bundle

    # --- served

    async def serve_invite(self, link: Link, params: Any) -> Any:
        """The method `invite`: `{ttl_ms}`, of the home's own clients and of admins."""
        login = link.login
        if login.kind == "op" and login.role != "admin":
            raise Refused("role", f"invite: needs role admin, this key has {login.role}")
        ttl_ms = params.get("ttl_ms", DEFAULT_TTL_MS) if isinstance(params, dict) else None
        if not isinstance(ttl_ms, int):
            raise RemoteError("ttl_ms: a number expected")
        return self.invite(ttl_ms, "this home" if login.kind == "home" else login.fingerprint)

    async def serve_glance(self, link: Link, params: Any) -> Any:
        """The method `admission`, of a `join` login."""
        return msgspec.structs.asdict(self.glance(_pub(link)))

    async def serve_join(self, link: Link, params: Any) -> Any:
        """The method `join`, of a `join` login."""
        return msgspec.structs.asdict(self.redeem(_pub(link), link.addr))

    # --- keeping

    def _state(self, given: Invitation) -> str:
        if given.used_ms is not None:
            return "used"
        return "open" if self._ends[given.pub] > self._monotonic() else "expired"

    def _why(self, given: Invitation | None, state: str) -> str:
        again = "ask for a new one with `qd invite`"
        if given is None:
            return f"invitation: not known here; {again}"
        if state == "expired":
            ago = self._monotonic() - self._ends[given.pub]
            return f"invitation: expired {_span(ago)} ago by that host's clock; {again}"
        ago = (self._wall() - (given.used_ms or 0)) / 1000
        return f"invitation: was used {_span(ago)} ago from {given.used_from}; {again}"

    def _forget(self) -> None:
        """Lets go of those that were used or have expired long ago."""
        since = self._wall() - SPENT_KEPT_MS
        spent = [g for g in self._given.values() if self._state(g) != "open"]
        spent.sort(key=lambda g: g.used_ms or g.expires_ms)
        old = [g for g in spent if (g.used_ms or g.expires_ms) < since]
        for given in {g.pub: g for g in (*old, *spent[: max(0, len(spent) - SPENT_MAX)])}.values():
            del self._given[given.pub], self._ends[given.pub]

    def _keep(self, given: dict[bytes, Invitation]) -> None:
        """Durable, or Refused and nothing changed."""
        self._facts.set(INVITATIONS, [msgspec.to_builtins(g) for g in given.values()], durable=True)
        self._given = given

    def _refused(self, code: str, addr: Addr, pub: bytes) -> None:
        self.counters[code] += 1
        now = self._monotonic()
        while self._told and self._told[0] < now - 60:
            self._told.popleft()
        if len(self._told) < REFUSALS_TOLD_A_MINUTE:
            self._told.append(now)
            self._emit("admission.refused", reason=code, addr=addr_text(addr), key=pub_fingerprint(pub))


def _pub(link: Link) -> bytes:
    if link.login.kind != "join" or link.login.pub is None:
        raise Refused("login", "not a newcomer")
    return link.login.pub


def _span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
