"""Gossip on the wire: the messages inside a sealed datagram, and the bodies of a push/pull.

A datagram's body is a msgpack array of messages, each an array that begins with its number. Decoding is typed
and bounded; a message of a number unknown here is skipped and told, so that a newer node may say more, while
a body that is no list of messages is a `RemoteError`. What a liar could profit from is signed: a record by
its subject, an ack by whoever acks, an accusation by its accuser. The rest (vitals, wants, nacks) changes
nothing that matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct as Pack
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from discovery.errors import RemoteError
from discovery.lifecycle import Evidence
from discovery.member import U64, Addr, Port, Short, SignedRecord, Vitals

BODY_MAX_BYTES: Final = 1_400
"""No body of ours is longer (1,200 less the seal); a longer one isn't looked at."""
MESSAGES_MAX: Final = 64
SYNC_MAX_BYTES: Final = 1_000_000
"""The longest push/pull body taken; a frame of a link holds 1 MiB."""
SYNC_ENTRIES_MAX: Final = 20_100
"""As many members and tombstones as a node keeps at most, and a few."""
WANT_MAX: Final = 32
NOTE_MAX_BYTES: Final = 1_000
NOTES_MAX: Final = 512

NodeId = Annotated[int, Meta(ge=0)]
Nonce = Annotated[int, Meta(ge=0)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Common shape of all that travels. Field order is the wire order: only ever append, with a truthful
    default."""


class Ping(Message, frozen=True, tag=1):
    """Are you there? `target` is who is meant (an address may have a new tenant); the rest tells what the
    asker's newest record and view are, so that who missed something notices at the next probe."""

    nonce: Nonce
    target: NodeId
    incarnation: U64
    version: U64
    view: Annotated[int, Meta(ge=0)] = 0
    vitals: Vitals | None = None


class Ack(Message, frozen=True, tag=2):
    """I am: signed over the nonce, so that it proves life to whoever made the nonce, by whatever way it
    comes."""

    nonce: Nonce
    node: NodeId
    incarnation: U64
    version: U64
    sig: Signature
    view: Annotated[int, Meta(ge=0)] = 0
    vitals: Vitals | None = None


class PingRequest(Message, frozen=True, tag=3):
    """Ping `target` with my nonce for me, and pass its ack on."""

    nonce: Nonce
    target: NodeId


class Nack(Message, frozen=True, tag=4):
    """I asked for you and heard nothing so far: it is not your own network that is bad."""

    nonce: Nonce


class Hello(Message, frozen=True, tag=5):
    """First contact: my record; answer with yours, bound to this nonce."""

    nonce: Nonce
    record: SignedRecord


class HelloAck(Message, frozen=True, tag=6):
    """The answer to a hello. `members` is how many other members I could tell of; some follow as updates."""

    nonce: Nonce
    record: SignedRecord
    sig: Signature
    members: U64 = 0


class Update(Message, frozen=True, tag=7):
    """A member's record, passed on verbatim by anyone."""

    record: SignedRecord


class Accuse(Message, frozen=True, tag=8):
    """`accuser` got no answer from `target` (no `refused`), or a refused connect at each of `refused`.

    `stamp` grows with each accusation of one accuser.
    """

    target: NodeId
    incarnation: U64
    accuser: NodeId
    stamp: U64
    refused: Annotated[list[tuple[Short, Port]], Meta(max_length=8)]
    sig: Signature


class Seen(Message, frozen=True, tag=9):
    """The accuser has had an answer since: all its accusations of `target` up to `stamp` are void."""

    target: NodeId
    incarnation: U64
    accuser: NodeId
    stamp: U64
    sig: Signature


class Buried(Message, frozen=True, tag=10):
    """To the target alone: I hold you dead at this incarnation. Nobody else heeds it."""

    target: NodeId
    incarnation: U64


class Goodbye(Message, frozen=True, tag=11):
    """My own signed record that says Leaving; answer with `GoodbyeAck`."""

    nonce: Nonce
    record: SignedRecord


class GoodbyeAck(Message, frozen=True, tag=12):
    """I have your goodbye."""

    nonce: Nonce


class Want(Message, frozen=True, tag=13):
    """Send me what you hold of these."""

    ids: Annotated[list[NodeId], Meta(max_length=WANT_MAX)]


class Load(Message, frozen=True, tag=14):
    """A member's vitals, passed on by anyone, unsigned: display only. `seq` grows within an incarnation."""

    node: NodeId
    incarnation: U64
    seq: U64
    vitals: Vitals


class Note(Message, frozen=True, tag=15):
    """Soft state that rides on the pool: a lease claim, a mesh's summary. `body` proves itself, and whoever keeps
    the subject judges it; `age_ms` is how long it has been under way, each hop adding the time that it held it."""

    topic: Annotated[int, Meta(ge=0, le=255)]
    subject: Short
    body: Annotated[bytes, Meta(max_length=NOTE_MAX_BYTES)]
    age_ms: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0


AnyMessage = (
    Ping
    | Ack
    | PingRequest
    | Nack
    | Hello
    | HelloAck
    | Update
    | Accuse
    | Seen
    | Buried
    | Goodbye
    | GoodbyeAck
    | Want
    | Load
    | Note
)
KNOWN_TAGS: Final = frozenset(range(1, 16))


class Tomb(msgspec.Struct, frozen=True, array_like=True):
    """A tombstone in a push/pull: the last record held (a goodbye's is the goodbye itself), and who
    accused."""

    record: SignedRecord
    evidence: Evidence
    age_s: U64 = 0
    accusations: Annotated[list[Accuse], Meta(max_length=8)] = []


Digest = Annotated[list[tuple[NodeId, U64, U64]], Meta(max_length=SYNC_ENTRIES_MAX)]


class SyncRequest(msgspec.Struct, frozen=True, array_like=True):
    """What I hold: (id, incarnation, version) of members and of tombstones. `complete` is False when some
    were left out, so that absence from the list means nothing."""

    record: SignedRecord
    members: Digest
    tombs: Digest
    complete: bool = True
    notes: Annotated[list[Note], Meta(max_length=NOTES_MAX)] = []


class SyncAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What the asker lacks, and which of its records I lack. `more`: ask again, there is more than fits."""

    record: SignedRecord
    records: Annotated[list[SignedRecord], Meta(max_length=SYNC_ENTRIES_MAX)]
    tombs: Annotated[list[Tomb], Meta(max_length=SYNC_ENTRIES_MAX)]
    wants: Annotated[list[NodeId], Meta(max_length=WANT_MAX)] = []
    more: bool = False
    notes: Annotated[list[Note], Meta(max_length=NOTES_MAX)] = []


_encode = msgspec.msgpack.Encoder().encode
_body = msgspec.msgpack.Decoder(Annotated[list[AnyMessage], Meta(max_length=MESSAGES_MAX)])
_parts = msgspec.msgpack.Decoder(Annotated[list[msgspec.Raw], Meta(max_length=MESSAGES_MAX)])
_one = msgspec.msgpack.Decoder(AnyMessage)
_loose = msgspec.msgpack.Decoder()
_request = msgspec.msgpack.Decoder(SyncRequest)
_answer = msgspec.msgpack.Decoder(SyncAnswer)
_BAD = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
HEADER_MAX_BYTES: Final = 3


def encode(message: AnyMessage) -> bytes:
    """One message, to be put into bodies with `join`."""
    return _encode(message)


def join(parts: Iterable[bytes]) -> bytes:
    """A body of encoded messages: at most HEADER_MAX_BYTES longer than their sum."""
    parts = list(parts)
    count = len(parts)
    head = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return head + b"".join(parts)


def decode(body: bytes) -> tuple[list[AnyMessage], dict[str, int]]:
    """The messages of a body, and what had to be skipped as {reason code: how many}; RemoteError when it is
    no body."""
    if len(body) > BODY_MAX_BYTES:
        raise RemoteError(f"gossip body of {len(body)} bytes exceeds {BODY_MAX_BYTES}")
    try:
        return _body.decode(body), {}
    except _BAD:
        return _decode_singly(body)


def _decode_singly(body: bytes) -> tuple[list[AnyMessage], dict[str, int]]:
    try:
        parts = _parts.decode(body)
    except _BAD as why:
        raise RemoteError(f"gossip body does not decode: {why}") from None
    messages: list[AnyMessage] = []
    skipped: dict[str, int] = {}
    for part in parts:
        try:
            messages.append(_one.decode(part))
        except _BAD:
            code = "unknown_message" if _is_unknown(part) else "malformed_message"
            skipped[code] = skipped.get(code, 0) + 1
    return messages, skipped


def _is_unknown(part: msgspec.Raw) -> bool:
    try:
        loose = _loose.decode(part)
    except _BAD:
        return False
    return isinstance(loose, list) and bool(loose) and type(loose[0]) is int and loose[0] not in KNOWN_TAGS


def encode_sync(body: SyncRequest | SyncAnswer | Tomb | SignedRecord) -> bytes:
    """A push/pull body, or a piece of one to see its length."""
    return _encode(body)


def decode_request(body: bytes) -> SyncRequest:
    """A push/pull request; RemoteError when it is none."""
    try:
        _refuse_long(body)
        return _request.decode(body)
    except _BAD as why:
        raise RemoteError(f"push/pull request does not decode: {why}") from None


def decode_answer(body: bytes) -> SyncAnswer:
    """A push/pull answer; RemoteError when it is none."""
    try:
        _refuse_long(body)
        return _answer.decode(body)
    except _BAD as why:
        raise RemoteError(f"push/pull answer does not decode: {why}") from None


def _refuse_long(body: bytes) -> None:
    if len(body) > SYNC_MAX_BYTES:
        raise ValueError(f"{len(body)} bytes exceed {SYNC_MAX_BYTES}")


_QQQ = Pack(">QQQ")
_QQQQ = Pack(">QQQQ")


def ack_statement(mesh: str, nonce: int, node: int, incarnation: int) -> bytes:
    """What an ack signs."""
    return b"quarterdeck/ack/1\0" + mesh.encode() + b"\0" + _QQQ.pack(nonce, node, incarnation)


def hello_statement(mesh: str, nonce: int, asker: int, node: int) -> bytes:
    """What the answer to a hello signs; its record is signed by itself."""
    return b"quarterdeck/hello/1\0" + mesh.encode() + b"\0" + _QQQ.pack(nonce, asker, node)


def accuse_statement(
    mesh: str, target: int, incarnation: int, accuser: int, stamp: int, refused: list[Addr]
) -> bytes:
    """What an accuser signs."""
    head = b"quarterdeck/accuse/1\0" + mesh.encode() + b"\0" + _QQQQ.pack(target, incarnation, accuser, stamp)
    return head + _encode(refused)


def seen_statement(mesh: str, target: int, incarnation: int, accuser: int, stamp: int) -> bytes:
    """What an accuser signs to take its accusations back."""
    return b"quarterdeck/seen/1\0" + mesh.encode() + b"\0" + _QQQQ.pack(target, incarnation, accuser, stamp)
