"""Who did what, and what was refused: rows for people, and files that stock `ssh-keygen -Y verify` checks.

Rows come from the admin chain, with what the fold says of each record, and from journals: ops that were taken by a
node alone, and every refusal with its reason. Export writes the exact bytes that were signed; of our code nobody
has to believe anything but that these are the files.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from agent.chain.adminop import ADMIN, OP, OWN, AdminEvent
from agent.chain.adminstate import AdminState
from agent.chain.hlc import Position
from agent.chain.record import Record
from agent.opmessage import NAMESPACE, is_op_id
from discovery import sshsig
from discovery.errors import LocalError, QuarterdeckError, RemoteError
from discovery.identity import id_text
from discovery.sshkey import Certificate, PublicKey

KEYS = ("at_ms", "op_id", "op", "target", "operator", "result", "reason", "verified")
PRINCIPAL = "operator"
ALLOWED_SIGNERS = "allowed_signers"
README = (
    "Each op as it was signed: ssh-keygen -Y verify -f allowed_signers -I operator -n quarterdeck-op"
    " -s OP_ID.json.sig < OP_ID.json (for a certificate: -I one of its principals); all, and what was refused:"
    " audit.json\n"
)

Row = dict[str, Any]
Outcome = tuple[str | None, str | None]
"""Result and reason of an op."""
Told = Callable[[int, str], Outcome]
"""What a node said of an op: only its target's word on it counts."""
PUT = "put"
"""What the audit calls an artifact that was put."""
TAKEN = "control.op"
REFUSED = "control.refused"
CHECKED_MAX = 8192
_checked: dict[bytes, bool] = {}
_COMMON: dict[Outcome, Outcome] = {(said, None): (said, None) for said in ("done", "accepted", "refused")}


class Entry(NamedTuple):
    """One row of an audit, as it is listed: when, of which op, and where it is kept."""

    at_ms: int
    op_id: str
    chain: str
    """The admin chain, or a node's own."""
    node: int
    number: int
    verdict: str | None = None


class Index:
    """What an audit lists, without any of its bytes. Events of the admin chain and records of journals are told to it
    once each."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, str], Outcome] = {}
        self._told_alone: dict[tuple[int, str], Outcome] = {}
        """By journals."""
        self._chained: list[Entry] = []
        self._taken: list[Entry] = []
        self._refused: list[Entry] = []
        self._ids: set[str] = set()
        """Ops on the admin chain."""

    def event(self, event: AdminEvent, verdict: str | None) -> None:
        """A record of the admin chain that is no RESULT, with why it is void."""
        position, op_id = event.position, event.op_id or ""
        where = (ADMIN, position.node, position.number)
        self._chained.append(Entry(position.wall_ms, op_id, *where, verdict))
        self._ids.add(op_id)

    def result(self, node: int, body: Mapping[str, Any]) -> None:
        """The body of a RESULT record of that node which counts."""
        self._told[node, _text(body.get("op_id")) or ""] = _outcome(body.get("result"), body.get("reason"))

    def record(self, chain: str, node: int, record: Record) -> None:
        """A record of that node's own chain."""
        body = record.body or {}
        op_id = _text(body.get("op_id")) or ""
        if record.kind == "control.result":
            self._told_alone[node, op_id] = _outcome(body.get("result"), body.get("reason"))
        elif record.kind in (TAKEN, REFUSED):
            entry = Entry(record.emitted_at_ms, op_id, chain, node, record.id)
            (self._taken if record.kind == TAKEN else self._refused).append(entry)

    def told(self, node: int, op_id: str) -> Outcome:
        """What that node said of an op; nothing where it didn't."""
        key = (node, op_id)
        return self._told.get(key) or self._told_alone.get(key) or (None, None)

    def listing(self) -> list[Entry]:
        """All of it, oldest first; an op that is on the admin chain is not listed again as taken."""
        taken = (entry for entry in self._taken if entry.op_id not in self._ids)
        return sorted([*self._chained, *taken, *self._refused], key=lambda entry: entry[:2])


def without_bytes(row: Row) -> Row:
    """The row without what was signed."""
    return {key: value for key, value in row.items() if key not in ("message", "signature")}


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


def row_of_event(event: AdminEvent, verdict: str | None, told: Told) -> Row:
    """The row of a record of the admin chain."""
    target = event.targets[0] if event.targets else None
    by = int(target, 16) if target is not None else -1
    result, reason = told(by, event.op_id or "")
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


def row_of_record(node: int, record: Record, told: Told) -> Row:
    """The row of a record of a node's own chain: an op that it took, or one that it refused."""
    body = record.body or {}
    row: Row = {
        "at_ms": record.emitted_at_ms,
        "op_id": _text(body.get("op_id")),
        "op": _text(body.get("op")),
        "target": _text(body.get("target")),
        "operator": _text(body.get("operator") or body.get("by") or body.get("fingerprint")),
        "result": None,
        "reason": None,
        "verified": None,
        "node": id_text(node),
        "fingerprint": _text(body.get("fingerprint")),
        "position": None,
    }
    if record.kind == REFUSED:
        row["result"] = "refused"
        row["reason"] = ": ".join(filter(None, (_text(body.get("code")), _text(body.get("reason")))))
        return row
    row["message"], row["signature"] = _signed(body)
    row["result"], row["reason"] = told(node, row["op_id"] or "")
    row["verified"] = _holds(row["message"], row["signature"])
    return row


def _signed(body: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    message, signature = body.get("message"), body.get("signature")
    if isinstance(signature, bytes):
        signature = signature.decode("ascii", "replace")
    return message if isinstance(message, bytes) else None, signature if isinstance(signature, str) else None


def _verified(message: Any, signature: Any) -> sshsig.SignerKey | None:
    if not isinstance(message, bytes) or not isinstance(signature, str):
        return None
    try:
        return sshsig.verify(message, signature, NAMESPACE)
    except QuarterdeckError:
        return None


def _holds(message: bytes | None, signature: str | None) -> bool:
    """Whether that is a signature of these bytes. Audits are made again and again; each is checked once."""
    if message is None or signature is None:
        return False
    key = hashlib.sha256(b"%d " % len(message) + message + signature.encode()).digest()
    if key not in _checked:
        if len(_checked) >= CHECKED_MAX:
            _checked.clear()
        _checked[key] = _verified(message, signature) is not None
    return _checked[key]


def _outcome(result: Any, reason: Any) -> Outcome:
    said = (_text(result), _text(reason))
    return _COMMON.get(said, said)


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
