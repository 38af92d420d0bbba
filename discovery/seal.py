"""Gossip packets are sealed with the pool's key: no key, no membership.

Layout, big-endian::

    0   wire version (1)      the only byte whose place and meaning are fixed for ever
    1   key id (1)            first byte of SHA-256 of the key
    2   sender id (8)
    10  salt: start ms of the sender's process (8), random (8)
    26  counter (8)           counts the packets of this salt, from 0
    34  body, AES-256-GCM with a tag of 16 bytes; authenticated data: bytes 0 to 33; nonce: the counter

The AES key is HKDF-SHA256 of the pool's key with info `quarterdeck/1|pool|sender|salt`, so no two
processes, and no two pools, ever share a nonce under a key.

**What is dropped as old.** Of each sender the opener keeps the newest salt (by start time) and up to
three older ones, each with its window of 1,024 counters: no packet that is remembered opens twice. A
salt newer than the newest takes over with its first authentic packet, and the older ones stand down. A
salt that is older than the newest, or stands down, opens again only when the newest has been quiet for
`QUIET_S`; from then on it is admitted beside it. This is for a sender that restarts with its clock set
back: it is heard again after ten seconds rather than never. It is sound because it shuts nobody out: the
newest salt is always admitted, and an admitted older one stands down only for a salt never seen before.
What a replayer gains is to have packets of a process that ended opened once each, late, and every layer
above takes a replay without harm: records count by incarnation and version, leases by epoch and renewal,
proof of life by a nonce.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from discovery.errors import LocalError, RemoteError

WIRE_VERSION = 1
KEY_BYTES = 32
SALT_RANDOM_BYTES = 8
WINDOW = 1024
QUIET_S = 10.0
SALTS_A_SENDER = 4
MAX_SENDERS = 16_384
"""Senders whose windows are remembered; beyond it the one heard least recently is forgotten."""
MAX_ADDRS_BEHIND = 4096
"""Addresses that are answered under another key than the primary one; beyond it the oldest is forgotten."""

_HEADER = struct.Struct(">BBQ16sQ")
_TAG_BYTES = 16
_WINDOW_MASK = (1 << WINDOW) - 1
OVERHEAD = _HEADER.size + _TAG_BYTES
"""Bytes that sealing adds to a body."""


class SealError(RemoteError):
    """A packet that did not open. `code` is stable; nothing changed here."""

    code = "seal"


class ShortPacket(SealError):
    """Too short to hold a header and a tag."""

    code = "short"


class IncompatibleVersion(SealError):
    """A packet of another wire version: a peer to be shown as incompatible, never as absent."""

    code = "wire_version"

    def __init__(self, theirs: int, ours: int = WIRE_VERSION) -> None:
        super().__init__(f"speaks wire version {theirs}, this build speaks {ours}")
        self.theirs = theirs
        self.ours = ours


class UnknownKey(SealError):
    """Sealed with a key that isn't in the ring: another mesh, or a key rotated away."""

    code = "unknown_key"


class Forged(SealError):
    """The tag does not fit: altered, or made without the key."""

    code = "forged"


class Replayed(SealError):
    """Opened before, or too far behind what was opened to tell."""

    code = "replayed"


class OldSalt(SealError):
    """Of a process of this sender that a newer one replaced."""

    code = "old_salt"


class Keyring:
    """The pool's keys, 32 bytes each. The first seals; any opens, so a pool can rotate its key."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys:
            raise LocalError("a keyring needs a key")
        self._by_id: dict[int, tuple[_PoolKey, ...]] = {}
        for raw in dict.fromkeys(keys):
            key = _PoolKey(raw)
            self._by_id[key.id] = (*self._by_id.get(key.id, ()), key)
        self.primary_id = _PoolKey(keys[0]).id
        self._primary = next(k for k in self._by_id[self.primary_id] if k.raw == keys[0])

    def _find(self, raw: bytes) -> _PoolKey | None:
        return next((k for keys in self._by_id.values() for k in keys if k.raw == raw), None)

    def __contains__(self, key_id: int) -> bool:
        return key_id in self._by_id

    def _candidates(self, key_id: int) -> tuple[_PoolKey, ...]:
        """Keys of this id: one byte of a hash, so two keys can share it."""
        return self._by_id.get(key_id, ())


class _PoolKey:
    """One key with the extracted half of its HKDF, so that a sender's key costs one HMAC."""

    __slots__ = ("_extracted", "id", "raw")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise LocalError(f"a pool key is {KEY_BYTES} bytes, not {len(raw)}")
        self.raw = bytes(raw)
        self.id = hashlib.sha256(raw).digest()[0]
        self._extracted = hmac.digest(bytes(32), raw, "sha256")

    def aead(self, pool: bytes, sender: int, salt: bytes) -> AESGCM:
        info = b"quarterdeck/1|" + pool + b"|" + sender.to_bytes(8, "big") + b"|" + salt
        return AESGCM(hmac.digest(self._extracted, info + b"\x01", "sha256"))


def packet_key_id(packet: bytes) -> int | None:
    """The key id of a packet of our wire version, to tell apart two pools on one port; None otherwise."""
    return packet[1] if len(packet) > 1 and packet[0] == WIRE_VERSION else None


class Sealer:
    """Seals for one process of one sender. `now_ms`: Unix ms at its start; `salt8`: random bytes."""

    def __init__(self, keyring: Keyring, pool: str, sender: int, now_ms: int, salt8: bytes) -> None:
        if len(salt8) != SALT_RANDOM_BYTES:
            raise LocalError(f"a salt has {SALT_RANDOM_BYTES} random bytes, not {len(salt8)}")
        self._pool = pool.encode()
        self._sender = sender
        self._salt = now_ms.to_bytes(8, "big") + salt8
        self._counter = 0
        self.rotate(keyring)

    def rotate(self, keyring: Keyring) -> None:
        """Seals with this ring's primary key from now on. The counter goes on, so openers see no break."""
        self._keyring = keyring
        key = keyring._primary
        self._key_id = key.id
        self._aead = key.aead(self._pool, self._sender, self._salt)
        self._others: dict[bytes, tuple[int, AESGCM]] = {}

    def seal(self, body: bytes, key: bytes | None = None) -> bytes:
        """The packet: `OVERHEAD` bytes longer than the body. `key`: another key of the ring, for who has only that
        one yet (`Opener.key_for`); one that is not in the ring any more is passed over."""
        counter = self._counter
        self._counter = counter + 1
        key_id, aead = (self._key_id, self._aead) if key is None else self._with(key)
        header = _HEADER.pack(WIRE_VERSION, key_id, self._sender, self._salt, counter)
        return header + aead.encrypt(counter.to_bytes(12, "big"), body, header)

    def _with(self, raw: bytes) -> tuple[int, AESGCM]:
        if raw not in self._others:
            key = self._keyring._find(raw) or self._keyring._primary
            self._others[raw] = key.id, key.aead(self._pool, self._sender, self._salt)
        return self._others[raw]


class _Salt:
    """What is known of one process of a sender: its keys, its window, when it was last heard."""

    __slots__ = ("admitted", "aeads", "heard", "seen", "start_ms", "top")

    def __init__(self, start_ms: int) -> None:
        self.start_ms = start_ms
        self.aeads: dict[bytes, AESGCM] = {}
        """By pool key: a ring's worth at most."""
        self.top = -1
        """The highest counter opened."""
        self.seen = 0
        """Bit i: counter `top - i` was opened."""
        self.heard = 0.0
        self.admitted = True

    def fresh(self, counter: int) -> bool:
        behind = self.top - counter
        return behind < 0 or (behind < WINDOW and not self.seen >> behind & 1)

    def note(self, counter: int, now: float) -> None:
        ahead = counter - self.top
        if ahead > 0:
            self.seen = (self.seen << ahead | 1) & _WINDOW_MASK if ahead < WINDOW else 1
            self.top = counter
        else:
            self.seen |= 1 << -ahead
        self.heard = now


class _Sender:
    """The salts of one sender, `newest` among them."""

    __slots__ = ("newest", "salts")

    def __init__(self, salt: bytes, state: _Salt) -> None:
        self.salts = {salt: state}
        self.newest = state


class Opener:
    """Opens the packets of one pool. Only an authentic packet changes what it remembers."""

    def __init__(self, keyring: Keyring, pool: str) -> None:
        self._keyring = keyring
        self._pool = pool.encode()
        self._senders: OrderedDict[int, _Sender] = OrderedDict()
        self._behind: OrderedDict[Hashable, bytes] = OrderedDict()
        self.on_other_key: Callable[[int, bytes], None] | None = None
        """Told sender and raw key of every packet that another key than the primary one opened."""

    def rotate(self, keyring: Keyring) -> None:
        """Opens with this ring from now on. Windows are kept; keys that left the ring are forgotten."""
        self._keyring = keyring
        for sender in self._senders.values():
            for state in sender.salts.values():
                state.aeads.clear()
        kept = {addr: raw for addr, raw in self._behind.items() if keyring._find(raw) is not None}
        self._behind = OrderedDict((addr, raw) for addr, raw in kept.items() if raw != keyring._primary.raw)

    def key_for(self, addr: Hashable) -> bytes | None:
        """The key to answer `addr` with, where that isn't the primary one: it was last heard under this other key of
        the ring, so it may have no newer one yet."""
        return self._behind.get(addr) if self._behind else None

    def holds(self, key_id: int) -> bool:
        """Whether a packet with this key id may be of this pool."""
        return key_id in self._keyring

    def open(self, packet: bytes, now: float, addr: Hashable = None) -> tuple[int, bytes]:
        """The sender's id and the body; a SealError otherwise. `now`: monotonic seconds. `addr`: where it came
        from, for `key_for`."""
        if len(packet) < OVERHEAD:
            if packet and packet[0] != WIRE_VERSION:
                raise IncompatibleVersion(packet[0])
            raise ShortPacket(f"a packet of {len(packet)} bytes")
        version, key_id, sender_id, salt, counter = _HEADER.unpack_from(packet)
        if version != WIRE_VERSION:
            raise IncompatibleVersion(version)
        candidates = self._keyring._candidates(key_id)
        if not candidates:
            raise UnknownKey(f"sealed with a key ({key_id:02x}) that is not ours")

        sender = self._senders.get(sender_id)
        state = sender.salts.get(salt) if sender else None
        if state is not None and not state.fresh(counter):
            raise Replayed("a packet opened before")

        header, nonce, sealed = packet[: _HEADER.size], counter.to_bytes(12, "big"), packet[_HEADER.size :]
        for key in candidates:
            aead = state.aeads.get(key.raw) if state else None
            known = aead is not None
            if aead is None:
                aead = key.aead(self._pool, sender_id, salt)
            try:
                body = aead.decrypt(nonce, sealed, header)
            except InvalidTag:
                continue
            if state is None or not state.admitted:
                state = self._admit(sender_id, sender, salt, state, now)
            if not known:
                state.aeads[key.raw] = aead
            state.note(counter, now)
            self._senders.move_to_end(sender_id)
            if key.raw != self._keyring._primary.raw:
                self._heard_other(sender_id, key.raw, addr)
            elif self._behind:
                self._behind.pop(addr, None)
            return sender_id, body
        raise Forged("a packet whose tag does not fit")

    def _heard_other(self, sender: int, raw: bytes, addr: Hashable) -> None:
        if addr is not None:
            self._behind[addr] = raw
            self._behind.move_to_end(addr)
            if len(self._behind) > MAX_ADDRS_BEHIND:
                self._behind.popitem(last=False)
        if self.on_other_key is not None:
            self.on_other_key(sender, raw)

    def _admit(
        self, sender_id: int, sender: _Sender | None, salt: bytes, state: _Salt | None, now: float
    ) -> _Salt:
        """Lets a salt in whose packet just proved authentic, or raises OldSalt and changes nothing."""
        if sender is None:
            state = _Salt(int.from_bytes(salt[:8], "big"))
            self._senders[sender_id] = _Sender(salt, state)
            if len(self._senders) > MAX_SENDERS:
                self._senders.popitem(last=False)
            return state
        newer = False
        if state is None:
            state = _Salt(int.from_bytes(salt[:8], "big"))
            newer = state.start_ms > sender.newest.start_ms
        if newer:
            for other in sender.salts.values():
                other.admitted = False
            sender.newest = state
        elif now - sender.newest.heard < QUIET_S:
            raise OldSalt("a packet of a process that a newer one replaced")
        state.admitted = True
        sender.salts[salt] = state
        if len(sender.salts) > SALTS_A_SENDER:
            rest = [
                (s.heard, key) for key, s in sender.salts.items() if s is not sender.newest and s is not state
            ]
            del sender.salts[min(rest)[1]]
        return state
