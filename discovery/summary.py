"""A mesh in one message: who publishes it, how many nodes in which states, how busy; signed with the mesh's own key.

A summary is soft state. It counts for `ttl_ms` from when it was made, whichever way it came, and a newer one (by
epoch, then renewal) replaces it. Its signature proves the mesh, so nobody has to be believed who passes it on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from discovery.errors import RemoteError
from discovery.identity import MESH_NAME, NODE_NAME, node_id
from discovery.lifecycle import State
from discovery.member import MAX_ADDRS, U64, Port, Short

SUMMARY_MAX_BYTES = 800
SUMMARY_CONTEXT = b"quarterdeck/summary/1\0"
LEASE_TOPIC = 1
SUMMARY_TOPIC = 2
"""Topics of notes: claims on a mesh's own pool, summaries on the backbone."""

Permille = Annotated[int, Meta(ge=0, le=1000)]


class Summary(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a mesh says of itself. Field order is the wire order: only ever append, with a truthful default."""

    mesh: Annotated[str, Meta(max_length=64)]
    mesh_pub: Annotated[bytes, Meta(min_length=32, max_length=32)]
    epoch: U64
    renewal: U64
    publisher: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """The node key of who publishes, which is also its SSH host key."""
    publisher_name: Annotated[str, Meta(max_length=128)]
    addrs: Annotated[list[tuple[Short, Port]], Meta(max_length=MAX_ADDRS)]
    host: Annotated[bytes, Meta(max_length=8)] = b""
    """As in a member record: equal on processes that share their loopback."""
    counts: Annotated[dict[State, Annotated[int, Meta(ge=0, le=1_000_000)]], Meta(max_length=8)] = {}
    cpu: Permille | None = None
    mem: Permille | None = None
    version: U64 = 0
    """Of the publisher's directory: grows with every change in it, within an epoch."""
    ttl_ms: Annotated[int, Meta(ge=1, le=600_000)] = 6_000

    @property
    def publisher_id(self) -> int:
        return node_id(self.publisher)

    @property
    def order(self) -> tuple[int, int]:
        """What makes one summary newer than another of the same mesh."""
        return self.epoch, self.renewal


class SignedSummary(msgspec.Struct, frozen=True, array_like=True):
    """The exact bytes of a summary and the 64-byte signature of its mesh's identity key."""

    blob: Annotated[bytes, Meta(max_length=SUMMARY_MAX_BYTES)]
    sig: Annotated[bytes, Meta(min_length=64, max_length=64)]


_encode = msgspec.msgpack.Encoder().encode
_summary = msgspec.msgpack.Decoder(Summary)
_signed = msgspec.msgpack.Decoder(SignedSummary)


def seal_summary(summary: Summary, sign: Callable[[bytes], bytes]) -> SignedSummary:
    """Encodes and signs with the mesh's identity key. ValueError when it exceeds SUMMARY_MAX_BYTES."""
    blob = _encode(summary)
    if len(blob) > SUMMARY_MAX_BYTES:
        raise ValueError(f"summary of {len(blob)} bytes exceeds {SUMMARY_MAX_BYTES}")
    return SignedSummary(blob, sign(SUMMARY_CONTEXT + blob))


def open_summary(signed: SignedSummary, verify: Callable[[bytes, bytes, bytes], bool]) -> Summary:
    """The summary, once shape, names and signature hold; RemoteError otherwise. `verify(pub, data, sig)`."""
    try:
        summary = _summary.decode(signed.blob)
    except (msgspec.MsgspecError, ValueError) as why:
        raise RemoteError(f"summary does not decode: {why}") from why
    if not (MESH_NAME.fullmatch(summary.mesh) and NODE_NAME.fullmatch(summary.publisher_name)):
        raise RemoteError("summary with an illegal name")
    if not verify(summary.mesh_pub, SUMMARY_CONTEXT + signed.blob, signed.sig):
        raise RemoteError("summary signed by another key")
    return summary


def pack(signed: SignedSummary) -> bytes:
    """For the body of a note, or a value kept elsewhere."""
    return _encode(signed)


def unpack(body: bytes) -> SignedSummary:
    """RemoteError when it is none."""
    try:
        return _signed.decode(body)
    except (msgspec.MsgspecError, ValueError) as why:
        raise RemoteError(f"signed summary does not decode: {why}") from why
