"""A put as it is signed: which bytes a name stands for from now on, and how many nodes shall hold them.

It is an op message like any other (`agent.opmessage`: the envelope, the namespace, the lifetime), with the wire op
`put` and the target that takes the bytes in. The signed bytes stay with the artifact wherever it goes: who holds a
copy can prove who put it. Pure: time and randomness are arguments.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from agent.data.chunks import SIZE_MAX_BYTES
from agent.opmessage import LIFETIME_MAX_MS, MESSAGE_MAX_BYTES, VERSION, OpMessage, plain, strict_object
from discovery.errors import LocalError, Refused

WIRE_OP = "put"
ROLE = "operate"
FUTURE_ALLOWANCE_MS = 5_000

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
"""As in a spec file."""
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Replicas = Annotated[int, Meta(ge=0, le=64)]
"""0: nobody counts. The node that takes it in keeps it, and hands it on when it drains."""
Size = Annotated[int, Meta(ge=0, le=SIZE_MAX_BYTES)]


class PutArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a put says. `hash`: of the whole; `list`: of the list of its chunks' hashes (`chunks.list_digest`)."""

    name: Name
    hash: Hash
    list: Hash
    size: Size
    replicas: Replicas


class Put(msgspec.Struct, frozen=True):
    """A decoded put. Which of two puts of a name stands is told by `stamp`: the later one."""

    message: OpMessage
    args: PutArgs

    @property
    def stamp(self) -> tuple[int, str]:
        return self.message.issued_at_ms, self.message.op_id


def build_put(
    *,
    name: str,
    hash: str,
    list: str,
    size: int,
    replicas: int,
    mesh: str,
    target: str,
    op_id: str,
    nonce: str,
    now_ms: int,
    lifetime_ms: int = 60_000,
) -> bytes:
    """The exact bytes to sign. `now_ms` is the target's clock (from its challenge); LocalError on misuse."""
    if not 0 < lifetime_ms <= LIFETIME_MAX_MS:
        raise LocalError(f"an op lives at most {LIFETIME_MAX_MS // 1000} s")
    fields = {
        "v": VERSION,
        "mesh": mesh,
        "target": target,
        "op": WIRE_OP,
        "args": {"name": name, "hash": hash, "list": list, "size": size, "replicas": replicas},
        "op_id": op_id,
        "issued_at_ms": now_ms,
        "expires_at_ms": now_ms + lifetime_ms,
        "nonce": nonce,
    }
    message = msgspec.json.encode(fields)
    try:
        decode_put(message)
    except Refused as why:
        raise LocalError(f"put {name}: {why}") from why
    return message


def decode_put(message: bytes) -> Put:
    """The put in these bytes, or Refused: `too_large`, `malformed`, `version`, `unknown_op`. As strict as any op."""
    if len(message) > MESSAGE_MAX_BYTES:
        raise Refused("too_large", f"a put of {len(message)} bytes; at most {MESSAGE_MAX_BYTES} are read")
    fields = strict_object(message)
    if type(fields.get("v")) is int and fields["v"] != VERSION:
        raise Refused("version", f"a put of version {fields['v']}; this build reads {VERSION}")
    try:
        op = msgspec.convert(fields, OpMessage)
        if op.op != WIRE_OP:
            raise Refused("unknown_op", f"{op.op!r} is no put")
        return Put(op, msgspec.convert(op.args, PutArgs))
    except msgspec.ValidationError as why:
        raise Refused("malformed", f"not a put: {plain(why)}") from why


def judge_times(put: Put, now_ms: int) -> None:
    """Refused `too_long_lived`, `not_yet` or `expired` by this node's clock, as for any op."""
    issued_ms, expires_ms = put.message.issued_at_ms, put.message.expires_at_ms
    if expires_ms - issued_ms > LIFETIME_MAX_MS:
        raise Refused("too_long_lived", "the put would be good for too long; 120 s at most")
    if issued_ms > now_ms + FUTURE_ALLOWANCE_MS:
        raise Refused(
            "not_yet", f"the put is dated {(issued_ms - now_ms) / 1000:.0f} s ahead of this node's clock"
        )
    if expires_ms <= now_ms:
        raise Refused(
            "expired", f"the put expired {(now_ms - expires_ms) / 1000:.0f} s ago by this node's clock"
        )
