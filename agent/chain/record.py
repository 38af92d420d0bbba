"""One record of a chain: what happened, what it follows, and who vouches for it.

The bytes are a version byte and a msgpack array. A record names the hash of the one before it, and its own
hash is signed by the writer; so a reader needs no trust in the file, only the writer's public key. Moving a
record to another writer's chain breaks the first link, which is made from the writer's key (`genesis`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from discovery.errors import RemoteError

VERSION = 1
SUPPORTED = (VERSION,)
CONTEXT = b"quarterdeck/chain/1\0"
FAILURE = "failure."
"""Begins the kind of a record about something of the node's own that went wrong; its source follows."""
RECORD_MAX_BYTES = 256 * 1024

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Number = Annotated[int, Meta(ge=0, le=2**62)]
Reason = Annotated[str, Meta(max_length=4096)]


class EmptyRecord(RemoteError):
    """A record of no bytes at all."""

    code = "empty_record"

    def __init__(self) -> None:
        super().__init__("chain record of zero bytes")


class UnsupportedVersion(RemoteError):
    """A record in a format that this build doesn't read: `seen` is its version byte."""

    code = "unsupported_version"

    def __init__(self, seen: int, supported: tuple[int, ...] = SUPPORTED) -> None:
        whose = "this" if seen > max(supported) else "that"
        super().__init__(
            f"chain record of version {seen}, this build reads {', '.join(map(str, supported))}; update {whose} node"
        )
        self.seen = seen
        self.supported = supported


class Dispatched(msgspec.Struct, frozen=True, tag="dispatched", array_like=True):
    """It was done."""


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """It was tried and failed; `retry_after_ms` (a duration) when trying again makes sense."""

    reason: Reason
    retry_after_ms: Number | None = None


class Gated(msgspec.Struct, frozen=True, tag="gated", array_like=True):
    """A rule held it back, `until_ms` (Unix milliseconds) when that is known."""

    reason: Reason
    until_ms: Number | None = None


Disposition = Dispatched | Failed | Gated
DISPATCHED = Dispatched()


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Field order is the format: only ever append, with a truthful default."""

    id: Number
    """Its number in the chain, counted from 1. Numbers only grow; a gap is explained by a later record."""
    kind: Annotated[str, Meta(min_length=1, max_length=64)]
    emitted_at_ms: Number
    disposition: Disposition
    prev: Hash
    """Hash of the record before it, or `genesis` of its writer."""
    body: dict[str, Any] | None = None


_encode = msgspec.msgpack.Encoder()
_decode = msgspec.msgpack.Decoder(Record)


def genesis(pub: bytes) -> bytes:
    """What the first record of the writer with this public key follows."""
    return hashlib.sha256(CONTEXT + b"genesis\0" + pub).digest()


def encode(record: Record) -> bytes:
    """Version byte and body; ValueError when the record is too large to be read back."""
    blob = bytes((VERSION,)) + _encode.encode(record)
    if len(blob) > RECORD_MAX_BYTES:
        raise ValueError(f"chain record of {len(blob)} bytes exceeds {RECORD_MAX_BYTES}")
    return blob


def decode(blob: bytes) -> Record:
    """The record in these bytes; EmptyRecord, UnsupportedVersion or another RemoteError if none."""
    if not blob:
        raise EmptyRecord
    if blob[0] not in SUPPORTED:
        raise UnsupportedVersion(blob[0])
    if len(blob) > RECORD_MAX_BYTES:
        raise RemoteError(f"chain record of {len(blob)} bytes exceeds {RECORD_MAX_BYTES}")
    try:
        return _decode.decode(memoryview(blob)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as why:
        raise RemoteError(f"chain record does not decode: {why}") from why


def readable(blob: bytes) -> bool:
    """Whether these bytes are in a format that this build reads: what isn't is neither handed on nor taken for damage."""
    return bool(blob) and blob[0] in SUPPORTED


def hash_of(blob: bytes) -> bytes:
    """The 32 bytes by which the next record names this one: of its exact bytes, version byte included."""
    return hashlib.sha256(CONTEXT + blob).digest()


def sign(digest: bytes, signer: Callable[[bytes], bytes]) -> bytes:
    """The writer's signature over a record's hash."""
    return signer(CONTEXT + digest)


def check(
    blob: bytes, sig: bytes, *, pub: bytes, verify: Callable[[bytes, bytes, bytes], bool]
) -> tuple[Record, bytes]:
    """The record and its hash, once it decodes and its signature by `pub` holds; RemoteError otherwise."""
    digest = hash_of(blob)
    if not blob:
        raise EmptyRecord
    if not verify(pub, CONTEXT + digest, sig):
        raise RemoteError("its bytes don't fit the writer's signature")
    return decode(blob), digest
