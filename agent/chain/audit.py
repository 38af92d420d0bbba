"""Who did what, and what was refused: rows for people, and files that stock `ssh-keygen -Y verify` checks.

Rows come from the admin chain, with what the fold says of each record, and from journals: ops that were taken by a
node alone, and every refusal with its reason. Export writes the exact bytes that were signed; of our code nobody
has to believe anything but that these are the files.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from agent.chain.adminop import OP, OWN, RESULT, AdminEvent
from agent.chain.adminstate import AdminState
from agent.chain.hlc import Position
from agent.chain.record import Record
from agent.opmessage import NAMESPACE, is_op_id
from discovery import sshsig
from discovery.errors import LocalError, QuarterdeckError, RemoteError
from discovery.identity import id_text
from discovery.sshkey import Certificate, PublicKey

KEYS = ("at_ms", "op_id", "op", "target", "operator", "result", "reason", "verified")
PAGE_BYTES = 700_000
PRINCIPAL = "operator"
ALLOWED_SIGNERS = "allowed_signers"
README = (
    "Each op as it was signed: ssh-keygen -Y verify -f allowed_signers -I operator -n quarterdeck-op"
    " -s OP_ID.json.sig < OP_ID.json (for a certificate: -I one of its principals); all, and what was refused:"
    " audit.json\n"
)

Row = dict[str, Any]
Told = dict[tuple[str, str], tuple[str | None, str | None]]
"""Result and reason of an op, by who tells and its id: only its target's word on it counts."""


def rows(
    judged: Iterable[tuple[AdminEvent, str | None]],
    journals: Mapping[str, Iterable[Record]],
    *,
    with_bytes: bool = False,
) -> list[Row]:
    """The audit, oldest first: the promised KEYS, and `node` (who recorded it, id text), `fingerprint`, `position`.

    `journals`: what is here of each node's action chain, by id text. `result` is `done`, `accepted` or `refused` as
    the target told, `void` for what counts nowhere, `ahead` for what is yet to count. `verified`: the operator's
    signature was checked and holds; None where nothing signed is kept. `with_bytes` adds `message` and `signature`."""
    events = list(judged)
    told: Told = {}
    taken: list[Row] = []
    refused: list[Row] = []
    for node, records in journals.items():
        for record in records:
            _read_journal(node, record, told, taken, refused)
    for event, verdict in events:
        if event.kind == RESULT and verdict is None and event.op_id is not None:
            fields = event.fields
            said = (_text(fields.get("result")), _text(fields.get("reason")))
            told[id_text(event.position.node), event.op_id] = said
    found = [_of_event(event, verdict, told) for event, verdict in events if event.kind != RESULT]
    chained = {row["op_id"] for row in found}
    for row in taken:
        if row["op_id"] not in chained:
            row["result"], row["reason"] = told.get((row["node"], row["op_id"]), (None, None))
            row["verified"] = _verified(row["message"], row["signature"]) is not None
            found.append(row)
    found += refused
    found.sort(key=lambda row: (row["at_ms"], row["op_id"] or ""))
    if not with_bytes:
        for row in found:
            row.pop("message", None)
            row.pop("signature", None)
    return found


def page(found: Sequence[Row], offset: int, most_bytes: int = PAGE_BYTES) -> dict[str, Any]:
    """As many rows from `offset` on as go into one frame: `{rows, next}`, `next` None at the end."""
    size, at = 0, max(0, offset)
    while at < len(found):
        size += len(msgspec.msgpack.encode(found[at]))
        if size > most_bytes and at > offset:
            return {"rows": list(found[offset:at]), "next": at}
        at += 1
    return {"rows": list(found[max(0, offset) : at]), "next": None}


def operators(state: AdminState, last_of: Mapping[str, Position | None]) -> list[Row]:
    """The roster for `qd operators`: who may what by whose grant, then the keys that were revoked. `last`: position of a
    key's newest record that counts, as a revocation names it."""
    listed = [
        {
            "fingerprint": grant.fingerprint,
            "role": grant.role,
            "comment": grant.comment,
            "line": grant.line,
            "by": grant.by,
            "at_ms": grant.at_ms,
            "last": named(last_of.get(grant.fingerprint)),
            "revoked": None,
        }
        for grant in sorted(state.roster.values(), key=lambda g: (g.comment, g.fingerprint))
    ]
    for cut in sorted(state.cuts.values(), key=lambda c: c.at):
        gone = {"by": cut.by, "at_ms": cut.at.wall_ms, "op_id": cut.op_id, "upto": named(cut.upto)}
        listed.append(
            dict.fromkeys(("role", "comment", "line", "by", "at_ms", "last"))
            | {"fingerprint": cut.fingerprint, "revoked": gone}
        )
    return listed


def named(position: Position | None) -> list[Any] | None:
    """A position as signed bytes name it."""
    if position is None:
        return None
    return [position.wall_ms, position.counter, id_text(position.node), position.number]


# --- from the chains


def _of_event(event: AdminEvent, verdict: str | None, told: Told) -> Row:
    target = event.targets[0] if event.targets else None
    result, reason = told.get((target or "", event.op_id or ""), (None, None))
    if verdict is not None:
        result, reason = "ahead" if verdict.startswith("ahead: ") else "void", verdict
    elif event.kind == OWN:
        result, reason = _text(event.fields.get("state")), _text(event.fields.get("reason"))
    elif result is None:
        result = "accepted"
    return {
        "at_ms": event.position.wall_ms,
        "op_id": event.op_id,
        "op": event.verb,
        "target": target,
        "operator": event.by or event.fingerprint,
        "result": result,
        "reason": reason,
        "verified": event.fingerprint is not None if event.kind == OP else None,
        "node": id_text(event.position.node),
        "fingerprint": event.fingerprint,
        "position": named(event.position),
        "message": event.message,
        "signature": event.signature,
    }


def _read_journal(
    node: str,
    record: Record,
    told: Told,
    taken: list[Row],
    refused: list[Row],
) -> None:
    body = record.body or {}
    op_id = _text(body.get("op_id"))
    if record.kind == "control.result" and op_id is not None:
        told[node, op_id] = (_text(body.get("result")), _text(body.get("reason")))
    elif record.kind in ("control.op", "control.refused"):
        row: Row = {
            "at_ms": record.emitted_at_ms,
            "op_id": op_id,
            "op": _text(body.get("op")),
            "target": _text(body.get("target")),
            "operator": _text(body.get("operator") or body.get("by") or body.get("fingerprint")),
            "result": None,
            "reason": None,
            "verified": None,
            "node": node,
            "fingerprint": _text(body.get("fingerprint")),
            "position": None,
        }
        if record.kind == "control.refused":
            row["result"] = "refused"
            row["reason"] = ": ".join(filter(None, (_text(body.get("code")), _text(body.get("reason")))))
            refused.append(row)
            return
        row["message"], row["signature"] = _signed(body)
        taken.append(row)


def _signed(body: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    message, signature = body.get("message"), body.get("signature")
    if isinstance(signature, bytes):
        signature = signature.decode("ascii", "replace")
    return message if isinstance(message, bytes) else None, signature if isinstance(signature, str) else None


def _verified(message: Any, signature: Any) -> sshsig.SignerKey | None:
    if not isinstance(message, bytes) or not isinstance(signature, str):
        return None
    return _checked(message, signature)


@lru_cache(maxsize=8192)
def _checked(message: bytes, signature: str) -> sshsig.SignerKey | None:
    """Pages of one audit are made one after another; each signature is checked once."""
    try:
        return sshsig.verify(message, signature, NAMESPACE)
    except QuarterdeckError:
        return None


def _text(value: Any) -> str | None:
    return value[:4096] if isinstance(value, str) else None


# --- the export


def export(found: Iterable[Row], place: Path) -> int:
    """Writes rows that were made `with_bytes` to a directory: `<op_id>.json`, `<op_id>.json.sig`, `allowed_signers`, a
    README and `audit.json`; how many ops that were. A signature that doesn't hold, or by a key that no roster and no
    host knew, is in `audit.json` alone. LocalError when the place can't be written."""
    listed: list[Row] = []
    signers: dict[str, set[str]] = {}
    files: dict[str, bytes] = {}
    for row in found:
        message, signature = row.get("message"), row.get("signature")
        listed.append({key: value for key, value in row.items() if key not in ("message", "signature")})
        op_id, key = row.get("op_id"), _verified(message, signature)
        if key is None or not isinstance(message, bytes) or not is_op_id(op_id) or _unknown_key(row):
            continue
        name = next(_free(str(op_id), files, message))
        if name in files:
            continue
        files[name] = message
        files[f"{name}.sig"] = str(signature).encode()
        signers.setdefault(_allowed(key), set()).update(_principals(row.get("operator")))
    files[ALLOWED_SIGNERS] = "".join(
        f"{','.join(sorted(names))} {line}\n" if "cert-authority" not in line else f"* {line}\n"
        for line, names in sorted(signers.items())
    ).encode()
    files["README"] = README.encode()
    files["audit.json"] = msgspec.json.format(msgspec.json.encode(listed), indent=1)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / name).write_bytes(content)
    except OSError as why:
        raise LocalError(f"export {place}: {why.strerror}; name a directory that can be written") from why
    return sum(1 for name in files if name.endswith(".sig"))


def _free(op_id: str, files: Mapping[str, bytes], message: bytes) -> Iterator[str]:
    """The file name of a message: the same for the same, another for other bytes of one op id."""
    number = 1
    while True:
        name = f"{op_id}.json" if number == 1 else f"{op_id}-{number}.json"
        if files.get(name, message) == message:
            yield name
        number += 1


def _unknown_key(row: Row) -> bool:
    return row.get("result") == "void" and str(row.get("reason")).startswith("unknown_key")


def _allowed(key: sshsig.SignerKey) -> str:
    """The part of an `allowed_signers` line that names a key, or the authority of a certificate."""
    options = f'namespaces="{NAMESPACE}"'
    if key.certificate is None:
        return f"{options} {key.line}"
    authority: PublicKey = Certificate.parse(key.certificate).ca
    return f"cert-authority,{options} {_line(authority.blob)}"


def _line(blob: bytes) -> str:
    size = int.from_bytes(blob[:4], "big")
    if size > len(blob) - 4:
        raise RemoteError("not a key")
    return f"{blob[4 : 4 + size].decode('ascii')} {base64.b64encode(blob).decode()}"


def _principals(operator: Any) -> set[str]:
    """Names under which `ssh-keygen -Y verify -I` finds a key: one for all, and its own."""
    own = re.sub(r"[^A-Za-z0-9@._+-]", "_", operator) if isinstance(operator, str) else ""
    return {PRINCIPAL, own} - {""}
