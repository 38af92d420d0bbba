"""Admin records as operators and nodes make them, for the tests of the chain rooms. Keys are the same at every run."""

from __future__ import annotations

from functools import cache
from typing import Any

from agent.chain import adminop
from agent.chain.adminop import AdminEvent
from agent.chain.hlc import Stamp
from agent.chain.record import DISPATCHED, Record, encode, hash_of
from agent.opmessage import NAMESPACE, build_op, decode_op, new_ulid
from discovery import sshsig
from discovery.identity import Identity, id_text

MESH = "alpha"
NOW_MS = 1_750_000_000_000
NODES = [Identity.from_seed(bytes([n]) * 32) for n in range(1, 6)]
ANNA, BERT, CARL = (Identity.from_seed(name.ljust(32).encode()) for name in ("anna", "bert", "carl"))
NONCE = "0" * 32


def line(key: Identity, name: str, role: str = "admin") -> str:
    """A line of the roster."""
    return f'environment="QD_ROLE={role}" {key.pub_openssh(name)}'


GENESIS = [line(ANNA, "anna"), line(BERT, "bert")]


@cache
def fingerprint(key: Identity) -> str:
    return sshsig.verify(b"x", sshsig.sign(b"x", key, NAMESPACE), NAMESPACE).fingerprint


def ulid(number: int, at_ms: int = NOW_MS) -> str:
    return new_ulid(at_ms, number.to_bytes(10, "big"))


def node_op(verb: str, number: int, target: Identity, at_ms: int = NOW_MS, **more: Any) -> bytes:
    """The bytes of an op on a node."""
    op_id = ulid(number, at_ms)
    return build_op(
        verb, mesh=MESH, target=id_text(target.id), op_id=op_id, nonce=NONCE, now_ms=at_ms, **more
    )


def mesh_op(
    verb: str, args: dict[str, Any], number: int, commits: Identity, at_ms: int = NOW_MS, mesh: str = MESH
) -> bytes:
    """The bytes of an op on the mesh."""
    op_id = ulid(number, at_ms)
    return build_op(
        verb, mesh=mesh, target=id_text(commits.id), op_id=op_id, nonce=NONCE, now_ms=at_ms, fields=args
    )


def body_of(message: bytes, signer: Identity, by: str = "", content: bytes | None = None) -> dict[str, Any]:
    """The body of a record of that op, without its stamp."""
    signature = sshsig.sign(message, signer, NAMESPACE)
    return adminop.op_body(decode_op(message), message, signature, by or fingerprint(signer), content)


def event(
    node: Identity, number: int, stamp: Stamp, body: dict[str, Any], kind: str = adminop.OP
) -> AdminEvent:
    """The event of the record with that number in the feed of `node`."""
    record = Record(
        id=number,
        kind=kind,
        emitted_at_ms=stamp.wall_ms,
        disposition=DISPATCHED,
        prev=bytes(32),
        body={**body, "hlc": list(stamp)},
    )
    found = adminop.read_event(record, hash_of(encode(record)), node.pub, MESH)
    assert found is not None
    return found
