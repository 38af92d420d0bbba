"""Records of the admin chain: an operator's signed bytes with the committing node's stamp, or a node's own word.

A record is signed by the node that commits it, in its own feed, and carries the operator's message and signature
verbatim: so it holds two signatures, and each is checked by whoever takes it. What the body says beside the signed
bytes is for those who only list; where they differ the record is void. Verbs are those of `opmessage`, which
name a node, and the mesh's own below, which name the node that commits them. Pure.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from agent.chain.hlc import Position, Stamp, stamp_of
from agent.chain.record import Record
from agent.opmessage import NAMESPACE, ApplySpec, Op, decode_op
from discovery import sshsig
from discovery.errors import QuarterdeckError, Refused, RemoteError
from discovery.identity import id_text, node_id
from discovery.sshkey import Certificate, PublicKey, Reader

ADMIN = "admin"
OP = "admin.op"
OWN = "admin.own"
RESULT = "admin.result"
CONTENT_MAX_BYTES = 192 * 1024

Fingerprint = Annotated[str, Meta(pattern=r"^SHA256:[A-Za-z0-9+/]{43}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
NodeText = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
Whole = Annotated[int, Meta(ge=0, le=2**53)]


COMMANDS = frozenset(
    {
        "kill",
        "update",
        "restart_daemons",
        "clear_avoid",
        "drop_replicas",
        "invalidate_placement",
        "rotate_key",
    }
)
"""Verbs that are done once, at their target, and that the fold only lists. All others are desired state."""


def op_body(op: Op, message: bytes, signature: str, by: str, content: bytes | None = None) -> dict[str, Any]:
    """The body of an OP record, without its stamp. `by`: whom the committing node found the signer to be."""
    body: dict[str, Any] = {
        "op_id": op.message.op_id,
        "verb": op.verb,
        "targets": [op.message.target],
        "by": by,
        "message": message,
        "signature": signature,
    }
    if content is not None:
        if len(content) > CONTENT_MAX_BYTES:
            raise Refused("too_large", f"a spec of {len(content)} bytes; at most {CONTENT_MAX_BYTES}")
        body["content"] = content
    return body


def own_body(verb: str, **fields: Any) -> dict[str, Any]:
    """The body of an OWN record, without its stamp: a node's word on itself."""
    return {"verb": verb, **fields}


def result_body(op_id: str, verb: str | None, result: str, reason: str | None) -> dict[str, Any]:
    """The body of a RESULT record, without its stamp: what became of an op at its target."""
    return {"op_id": op_id, "verb": verb, "result": result, "reason": reason}


class AdminEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the admin chain as the fold takes it."""

    position: Position
    digest: bytes
    """Hash of the record: what makes two of them the same."""
    kind: str
    verb: str | None = None
    targets: tuple[str, ...] = ()
    op_id: str | None = None
    by: str | None = None
    fingerprint: str | None = None
    keys: tuple[str, ...] = ()
    """Fingerprints that vouch for it: of the signing key and, for a certificate, of its CA."""
    signer: bytes | None = None
    """Key or certificate, as the signature carries it."""
    flags: int | None = None
    """What a hardware key said of its user."""
    op: Op | None = None
    message: bytes | None = None
    signature: str | None = None
    fields: dict[str, Any] = {}
    wrong: str | None = None
    """Why it can't count whoever signed it; None when its bytes and signatures hold."""


def read_event(
    record: Record, digest: bytes, writer: bytes, mesh: str, *, checked: bool = False
) -> AdminEvent | None:
    """A record of the feed of `writer` (32-byte key) as an event, its operator's signature checked (unless it was
    `checked` when it came). Never raises: `wrong` says what is. None for a record that has no place in the order."""
    body = record.body or {}
    node = node_id(writer)
    try:
        stamp = stamp_of(body.get("hlc"))
    except RemoteError:
        if record.kind not in (OP, OWN, RESULT):
            return None
        stamp = Stamp(record.emitted_at_ms, 0)
        position = Position(*stamp, node, record.id)
        return AdminEvent(position=position, digest=digest, kind=record.kind, wrong="malformed: no stamp")
    facts: dict[str, Any] = {
        "position": Position(*stamp, node, record.id),
        "digest": digest,
        "kind": record.kind,
        "verb": _text(body.get("verb"), 64),
        "op_id": _text(body.get("op_id"), 64),
        "by": _text(body.get("by"), 256),
    }
    if record.kind != OP:
        own = record.kind in (OWN, RESULT)
        wrong = None if own else f"unsupported: kind {ascii(record.kind)[1:40]}"
        return AdminEvent(**facts, targets=(id_text(node),), fields=body, wrong=wrong)
    try:
        return _read_op(facts, body, node, mesh, checked)
    except QuarterdeckError as why:
        code = why.code if isinstance(why, Refused) else "malformed"
        message, signature = body.get("message"), body.get("signature")
        return AdminEvent(
            **facts,
            message=message if isinstance(message, bytes) else None,
            signature=signature if isinstance(signature, str) else None,
            wrong=f"{code}: {why}",
        )


def _read_op(facts: dict[str, Any], body: dict[str, Any], node: int, mesh: str, checked: bool) -> AdminEvent:
    message, signature, content = body.get("message"), body.get("signature"), body.get("content")
    if not isinstance(message, bytes) or not isinstance(signature, str):
        raise Refused("malformed", "no signed message in it")
    signer = _signer(signature) if checked else None
    signer = signer or sshsig.verify(message, signature, NAMESPACE)
    op = decode_op(message)
    asked = op.message
    if asked.mesh != mesh:
        raise Refused("wrong_mesh", f"signed for mesh {asked.mesh}")
    if op.of_mesh and asked.target != id_text(node):
        raise Refused("wrong_target", f"signed to be committed by node {asked.target}")
    if facts["verb"] != op.verb or facts["op_id"] != asked.op_id or body.get("targets") != [asked.target]:
        raise Refused("malformed", "its body says other things than its signed bytes")
    if isinstance(op.args, ApplySpec) and (
        not isinstance(content, bytes) or hashlib.sha256(content).hexdigest() != op.args.sha256
    ):
        raise Refused("malformed", "its spec is not the one that was signed")
    keys: tuple[str, ...] = (signer.fingerprint,)
    if signer.certificate is not None:
        keys += (Certificate.parse(signer.certificate).ca.fingerprint,)
    return AdminEvent(
        **facts,
        targets=(asked.target,),
        fingerprint=signer.fingerprint,
        keys=keys,
        signer=signer.blob,
        flags=signer.flags,
        op=op,
        message=message,
        signature=signature,
    )


def _signer(armored: str) -> sshsig.SignerKey | None:
    """Whose signature it is by its own word, which was checked before; None where more than that is needed."""
    try:
        reader = Reader(base64.b64decode("".join(armored.split("\n")[1:-2]), validate=True))
        reader.take(len(sshsig.MAGIC) + 4)
        blob = reader.string()
        key = PublicKey.parse(blob)
    except (RemoteError, ValueError):
        return None  # a certificate, for one
    if key.hardware:
        return None
    line = f"{Reader(blob).text()} {base64.b64encode(blob).decode()}"
    return sshsig.SignerKey(line, blob, blob, key.fingerprint, None)


def _text(value: Any, most: int) -> str | None:
    return value[:most] if isinstance(value, str) else None
