"""The key ring of one mesh: which key seals, which ones open, how it moves on, and the file that keeps it.

A rotation takes two steps, each a new generation of the ring. Odd: the next key is handed round and opens, while the
old one still seals. Even: everybody had it, so it seals, and the old one only opens until it retires. The second step
follows from the first alone, so whoever takes it makes the very same ring.

`config/meshes/<mesh>/mesh.key`, text, mode 0600. The first line alone is the whole file of a mesh whose key was never
rotated::

    BASE64                              the key that seals
    generation N
    next BASE64 RETIRE_MS               opens; how long the first key will open once this one seals
    old BASE64 RETIRE_MS UNTIL_MS       opens, until then (Unix ms of this host), RETIRE_MS at the longest

Nodes of one home share the file: it is changed under a lock on its folder, and its generation only grows.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from agent.home import read_private, write_private
from agent.opmessage import DEADLINE_MAX_MS
from discovery.errors import LocalError, Refused, RemoteError
from discovery.seal import KEY_BYTES, Keyring

RETIRE_MAX_MS = DEADLINE_MAX_MS
OLD_MAX = 6
"""Old keys that still open. A ring that holds as many is not rotated."""
RING_CONTEXT = b"quarterdeck/ring/1\0"
RING_MAX_BYTES = 1024

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
RetireMs = Annotated[int, Meta(ge=0, le=RETIRE_MAX_MS)]
Order = tuple[int, bytes]
"""What tells two rings apart, and which of them counts: generation, then mark."""


class OldKey(msgspec.Struct, frozen=True, array_like=True):
    """A key that no longer seals. It opens for `retire_ms` from the moment a node learned so."""

    raw: Key
    retire_ms: RetireMs


class Ring(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One generation of a mesh's keys. Field order is the wire order."""

    mesh: Annotated[str, Meta(max_length=64)]
    generation: Annotated[int, Meta(ge=0, le=2**53)]
    primary: Key
    next: Key | None = None
    retire_ms: RetireMs = 0
    """How long `primary` is to open once `next` seals."""
    old: Annotated[tuple[OldKey, ...], Meta(max_length=OLD_MAX + 1)] = ()

    @property
    def spreading(self) -> bool:
        """The next key is being handed round, and does not seal yet."""
        return self.next is not None

    @property
    def order(self) -> Order:
        """Of two rings the one with the greater order counts. Old keys play no part: each node drops them itself."""
        parts = (str(self.generation).encode(), self.primary, self.next or b"")
        return self.generation, hashlib.sha256(RING_CONTEXT + b"|".join(parts)).digest()[:8]

    def keyring(self) -> Keyring:
        """What seals and opens with these keys."""
        return Keyring([self.primary, *([self.next] if self.next else []), *(key.raw for key in self.old)])


def begin(ring: Ring, new: bytes, retire_ms: int) -> Ring:
    """The ring in which `new` is handed round. Refused `rotating`, `too_many_keys`."""
    if ring.spreading:
        raise Refused("rotating", f"the key of mesh {ring.mesh} is being rotated already")
    if len(ring.old) >= OLD_MAX:
        raise Refused(
            "too_many_keys", f"{OLD_MAX} old keys of mesh {ring.mesh} still open; wait until one retires"
        )
    return msgspec.structs.replace(ring, generation=ring.generation + 1, next=new, retire_ms=retire_ms)


def switch(ring: Ring) -> Ring:
    """The ring in which the next key seals; the same whoever makes it."""
    if ring.next is None:
        raise LocalError("this ring has no next key")
    old = (*ring.old, OldKey(ring.primary, ring.retire_ms))
    return Ring(mesh=ring.mesh, generation=ring.generation + 1, primary=ring.next, old=old)


@dataclass(frozen=True)
class Kept:
    """A ring as one home holds it: `until_ms` says, by this host's wall clock, when each old key retires."""

    ring: Ring
    until_ms: dict[bytes, int]

    def left_ms(self, now_ms: int) -> list[int]:
        """What is left to each old key, in the ring's order. A clock that was set back gives none more than its due."""
        return [min(key.retire_ms, max(0, self.until_ms[key.raw] - now_ms)) for key in self.ring.old]

    def retired(self, now_ms: int) -> Kept:
        """Without the keys whose time is over."""
        left = zip(self.ring.old, self.left_ms(now_ms), strict=True)
        old = tuple(key for key, ms in left if ms > 0)
        if len(old) == len(self.ring.old):
            return self
        return Kept(msgspec.structs.replace(self.ring, old=old), {k.raw: self.until_ms[k.raw] for k in old})


def learned(ring: Ring, left_ms: list[int], now_ms: int) -> Kept:
    """A ring that came with what is left to its old keys, on this host's clock."""
    until = {k.raw: now_ms + min(k.retire_ms, max(0, ms)) for k, ms in zip(ring.old, left_ms, strict=True)}
    return Kept(ring, until)


def moved(kept: Kept, ring: Ring, now_ms: int) -> Kept:
    """The next generation of a ring that is held here: its old keys go on, a new old one has its whole time."""
    until = {k.raw: kept.until_ms.get(k.raw, now_ms + k.retire_ms) for k in ring.old}
    return Kept(ring, until)


# --- between members


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """A ring on its way: its exact bytes, the mesh identity's signature, and what is left to each old key."""

    blob: Annotated[bytes, Meta(max_length=RING_MAX_BYTES)]
    sig: Annotated[bytes, Meta(min_length=64, max_length=64)]
    left_ms: Annotated[list[RetireMs], Meta(max_length=OLD_MAX + 1)]


_encode = msgspec.msgpack.Encoder().encode
_parcel = msgspec.msgpack.Decoder(Parcel)
_ring = msgspec.msgpack.Decoder(Ring)


def pack(kept: Kept, sign: Callable[[bytes], bytes], now_ms: int) -> bytes:
    """For a link, never for gossip: whoever reads it holds the keys."""
    blob = _encode(kept.ring)
    return _encode(Parcel(blob, sign(RING_CONTEXT + blob), kept.left_ms(now_ms)))


def unpack(
    data: bytes, mesh: str, mesh_pub: bytes, verify: Callable[[bytes, bytes, bytes], bool], now_ms: int
) -> Kept:
    """The ring in it, or RemoteError; Refused `wrong_mesh`, `other_identity`. `verify(pub, data, sig)`."""
    try:
        parcel = _parcel.decode(data)
        ring = _ring.decode(parcel.blob)
    except (msgspec.MsgspecError, ValueError) as why:
        raise RemoteError(f"key ring does not decode: {why}") from why
    if ring.mesh != mesh:
        raise Refused("wrong_mesh", f"a key ring of mesh {ascii(ring.mesh)[:66]}, and this is {mesh}")
    if not verify(mesh_pub, RING_CONTEXT + parcel.blob, parcel.sig):
        raise Refused("other_identity", f"a key ring that the identity key of mesh {mesh} did not sign")
    _check(ring)
    if len(parcel.left_ms) != len(ring.old):
        raise RemoteError("key ring: not one time left for each old key")
    return learned(ring, parcel.left_ms, now_ms)


def _check(ring: Ring) -> None:
    """RemoteError unless the generation fits what the ring holds."""
    if ring.spreading != bool(ring.generation % 2):
        raise RemoteError(f"key ring: generation {ring.generation} is no such step")
    keys = [ring.primary, ring.next, *(key.raw for key in ring.old)]
    if len(set(keys)) != len(keys):
        raise RemoteError("key ring: the same key twice")


# --- the file


class KeyFile:
    """`mesh.key` of one mesh in one home."""

    def __init__(self, path: Path, mesh: str) -> None:
        self.path = path
        self.mesh = mesh

    def read(self, now_ms: int) -> Kept:
        """What it holds, less what has retired; LocalError when it can't be used."""
        what = f"key of mesh {self.mesh}"
        data = read_private(self.path, what)
        try:
            return parse(data.decode("ascii"), self.mesh).retired(now_ms)
        except (ValueError, RemoteError) as why:
            raise LocalError(f"{what} {self.path}: {why}; restore it from a copy, or join again") from why

    def version(self) -> tuple[int, ...] | None:
        """Another one after every change; None while it is not there."""
        try:
            info = self.path.stat()
        except OSError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size

    def advance(self, kept: Kept, now_ms: int) -> Kept:
        """Writes `kept` unless the file holds as new a ring, and gives what it holds now. LocalError on failure."""
        with self._locked():
            there = self.read(now_ms) if self.path.exists() else None
            if there is not None and there.ring.order >= kept.ring.order:
                return there
            self._write(kept)
            return kept

    def retire(self, now_ms: int) -> None:
        """Takes out the keys whose time is over."""
        with self._locked():
            data = read_private(self.path, f"key of mesh {self.mesh}")
            there = self.read(now_ms)
            if text(there).encode() != data:
                self._write(there)

    def _write(self, kept: Kept) -> None:
        try:
            write_private(self.path, text(kept).encode())
        except OSError as why:
            raise LocalError(
                f"key of mesh {self.mesh} {self.path}: {why.strerror}; it needs a disk with room that you can write to"
            ) from why

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
        except OSError as why:
            raise LocalError(
                f"{self.path.parent}: {why.strerror}; make the mesh with `qd init` or `qd join`"
            ) from why
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def text(kept: Kept) -> str:
    """The file's text."""
    ring = kept.ring
    lines = [_b64(ring.primary)]
    if ring.generation:
        lines.append(f"generation {ring.generation}")
    if ring.next is not None:
        lines.append(f"next {_b64(ring.next)} {ring.retire_ms}")
    lines += [f"old {_b64(key.raw)} {key.retire_ms} {kept.until_ms[key.raw]}" for key in ring.old]
    return "\n".join(lines) + "\n"


def parse(source: str, mesh: str) -> Kept:
    """What such a text holds; ValueError or RemoteError when it is none."""
    first, *rest = source.strip().split("\n")
    primary = _raw(first.strip())
    generation, upcoming, retire_ms = 0, None, 0
    old: list[OldKey] = []
    until: dict[bytes, int] = {}
    for line in rest:
        match line.split():
            case []:
                continue
            case ["generation", number]:
                generation = _number(number)
            case ["next", key, ms]:
                upcoming, retire_ms = _raw(key), _number(ms)
            case ["old", key, ms, at]:
                old.append(OldKey(_raw(key), _number(ms)))
                until[old[-1].raw] = _number(at)
            case [word, *_]:
                raise ValueError(f"{ascii(word)[:40]} is no line of a key ring")
    fields = Ring(
        mesh=mesh,
        generation=generation,
        primary=primary,
        next=upcoming,
        retire_ms=retire_ms,
        old=tuple(old),
    )
    try:
        ring = _ring.decode(_encode(fields))
    except msgspec.ValidationError as why:
        raise ValueError(str(why)) from why
    _check(ring)
    return Kept(ring, until)


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(word: str) -> bytes:
    try:
        raw = base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError) as why:
        raise ValueError("not base64") from why
    if len(raw) != KEY_BYTES:
        raise ValueError(f"holds {len(raw)} bytes, not {KEY_BYTES}")
    return raw


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 18):
        raise ValueError(f"{ascii(word)[:24]} is no number")
    return int(word)
