"""The audit: what was done and what was refused, and files that stock ssh-keygen verifies."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from agent.chain import Gated
from agent.chain.adminfold import AdminFold
from agent.chain.adminop import OWN, RESULT, own_body, result_body
from agent.chain.audit import (
    ADMIN,
    KEYS,
    REFUSED,
    TAKEN,
    Index,
    export,
    operators,
    row_of_event,
    row_of_record,
    without_bytes,
)
from agent.chain.hlc import Stamp
from agent.chain.record import DISPATCHED, Disposition, Record
from agent.opmessage import NAMESPACE
from discovery import sshsig
from discovery.errors import LocalError
from discovery.identity import Identity, id_text
from tests.agent.chains import (
    ANNA,
    BERT,
    CARL,
    GENESIS,
    MESH,
    NODES,
    NONCE,
    NOW_MS,
    body_of,
    event,
    fingerprint,
    line,
    mesh_op,
    node_op,
    ulid,
)

A, B, C = NODES[:3]
LATER = NOW_MS + 10**7


def judged(*events: Any) -> list[Any]:
    fold = AdminFold(GENESIS)
    fold.add(events)
    fold.advance(LATER)
    return fold.judged()


def rows(judged: Any, journals: dict[str, list[Record]], *, with_bytes: bool = False) -> list[dict[str, Any]]:
    """The audit of these, oldest first."""
    index = Index()
    kept: dict[Any, Any] = {}
    for each, verdict in judged:
        if each.kind == RESULT:
            index.result(each.position.node, each.fields)
            continue
        index.event(each, verdict)
        kept[ADMIN, each.position.node, each.position.number] = each
    for text, records in journals.items():
        for record in records:
            index.record(text, int(text, 16), record)
            if record.kind in (TAKEN, REFUSED):
                kept[text, int(text, 16), record.id] = record
    found = [
        row_of_event(kept[entry[2:5]], entry.verdict, index.told)
        if entry.chain == ADMIN
        else row_of_record(entry.node, kept[entry[2:5]], index.told)
        for entry in index.listing()
    ]
    return found if with_bytes else [without_bytes(row) for row in found]


def op(
    number: int, signer: Identity = ANNA, by: str = "anna@laptop", verb: str = "drain", at_ms: int = 0
) -> Any:
    message = node_op(verb, number, C, NOW_MS + at_ms)
    return event(A, number, Stamp(NOW_MS + at_ms, number), body_of(message, signer, by))


def kept(number: int, kind: str, body: dict[str, Any], disposition: Disposition = DISPATCHED) -> Record:
    return Record(
        id=number,
        kind=kind,
        emitted_at_ms=NOW_MS + number,
        disposition=disposition,
        prev=bytes(32),
        body=body,
    )


def refusal(number: int, code: str, said: str) -> Record:
    body = {
        "op_id": ulid(number),
        "target": id_text(B.id),
        "op": "kill",
        "result": "refused",
        "state": "alive",
        "reason": said,
        "code": code,
        "by": "carl",
        "fingerprint": fingerprint(CARL),
        "carrier": "member",
    }
    return kept(number, "control.refused", body, Gated(said))


def keygen(place: Path, name: str, content: bytes | None = None, who: str = "operator") -> bool:
    signed = (place / name).read_bytes() if content is None else content
    words = ["ssh-keygen", "-Y", "verify", "-f", place / "allowed_signers", "-I", who, "-n", NAMESPACE]
    words += ["-s", place / f"{name}.sig"]
    return subprocess.run(words, input=signed, capture_output=True, timeout=20).returncode == 0


def test_row_of_each_op_tells_who_what_and_what_came_of_it() -> None:
    told = event(C, 1, Stamp(NOW_MS + 500, 0), result_body(ulid(1), "drain", "done", "nothing left"), RESULT)
    lie = event(B, 1, Stamp(NOW_MS + 700, 0), result_body(ulid(1), "drain", "refused", "so there"), RESULT)
    own = event(C, 2, Stamp(NOW_MS + 600, 0), own_body("maintenance", state="recovery", reason="back"), OWN)
    bare = op(3, CARL, "carl")
    forged = event(A, 4, Stamp(NOW_MS, 9), {**body_of(node_op("drain", 4, C), ANNA), "message": b"{}"})
    found = rows(judged(op(1), told, lie, own, op(2), bare, forged), {})
    assert all(tuple(row)[:8] == KEYS for row in found)
    by_id = {row["op_id"]: row for row in found}
    assert by_id[ulid(1)] | {"node": 0, "position": 0, "fingerprint": 0} == {
        "at_ms": NOW_MS,
        "op_id": ulid(1),
        "op": "drain",
        "target": id_text(C.id),
        "operator": "anna@laptop",
        "result": "done",
        "reason": "nothing left",
        "verified": True,
        "node": 0,
        "position": 0,
        "fingerprint": 0,
    }
    assert by_id[ulid(2)]["result"] == "accepted"
    assert (by_id[ulid(3)]["result"], by_id[ulid(3)]["verified"]) == ("void", True)
    assert by_id[ulid(3)]["reason"].startswith("unknown_key: ")
    assert (by_id[ulid(4)]["result"], by_id[ulid(4)]["verified"]) == ("void", False)
    assert (by_id[None]["op"], by_id[None]["result"], by_id[None]["verified"]) == (
        "maintenance",
        "recovery",
        None,
    )
    assert [row["at_ms"] for row in found] == sorted(row["at_ms"] for row in found)


def test_refusals_and_ops_of_journals_are_in_it_once() -> None:
    message = node_op("kill", 9, B)
    signed = {"message": message, "signature": sshsig.sign(message, BERT, NAMESPACE)}
    base = {"op": "kill", "target": id_text(B.id), "operator": "bert"}
    in_chain = node_op("drain", 1, C)
    journal = [
        kept(1, "control.op", {"op_id": ulid(9), **base, **signed}),
        kept(2, "control.result", {"op_id": ulid(9), "result": "done", "reason": None}),
        kept(3, "control.op", {"op_id": ulid(1), **base, "message": in_chain, "signature": b"x"}),
        kept(4, "control.op", {"op_id": ulid(8), **base, **signed, "message": message + b" "}),
        refusal(5, "role", "kill needs role operate, carl has observe"),
        kept(6, "action.start_daemon", {"daemon": "x"}),
    ]
    found = rows(judged(op(1)), {id_text(B.id): journal})
    assert [(row["op_id"], row["result"], row["verified"]) for row in found] == [
        (ulid(1), "accepted", True),
        (ulid(9), "done", True),
        (ulid(8), None, False),
        (ulid(5), "refused", None),
    ]
    assert found[-1]["reason"] == "role: kill needs role operate, carl has observe"
    assert found[-1]["operator"] == "carl" and found[-1]["node"] == id_text(B.id)


def test_export_of_a_thousand_ops_verifies_with_ssh_keygen_and_an_altered_byte_does_not(
    tmp_path: Path,
) -> None:
    events = [op(n, (ANNA, BERT)[n % 2], ("anna@laptop", "bert")[n % 2], at_ms=n) for n in range(1, 1001)]
    found = rows(judged(*events), {}, with_bytes=True)
    assert export(found, tmp_path) == 1000
    names = sorted(file.name for file in tmp_path.glob("*.json") if file.name != "audit.json")
    assert len(names) == 1000
    for name in names:
        assert sshsig.verify(
            (tmp_path / name).read_bytes(), (tmp_path / f"{name}.sig").read_text(), NAMESPACE
        )
    for name in names[::50]:
        assert keygen(tmp_path, name), name
    content = (tmp_path / names[0]).read_bytes()
    assert not keygen(tmp_path, names[0], content.replace(b"drain", b"drein"))
    altered = bytearray(content)
    altered[len(altered) // 2] ^= 1
    assert not keygen(tmp_path, names[0], bytes(altered))
    assert keygen(tmp_path, names[0], who="bert") and not keygen(tmp_path, names[0], who="anna@laptop")
    assert json.loads(content)["op_id"] == names[0].removesuffix(".json")
    assert len((tmp_path / "allowed_signers").read_text().splitlines()) == 2
    assert (tmp_path / "README").read_text().count("\n") == 1
    assert len(json.loads((tmp_path / "audit.json").read_text())) == 1000


def test_export_leaves_unknown_keys_out_and_keeps_refusals_in_the_list(tmp_path: Path) -> None:
    forged = event(A, 4, Stamp(NOW_MS, 9), {**body_of(node_op("drain", 4, C), ANNA), "signature": "x"})
    again = event(B, 1, Stamp(NOW_MS, 50), body_of(node_op("drain", 1, C), ANNA))
    other = event(B, 2, Stamp(NOW_MS, 51), body_of(node_op("kill", 1, C), ANNA))
    found = rows(
        judged(op(1), op(2, CARL), forged, again, other), {"b": [refusal(5, "role", "no")]}, with_bytes=True
    )
    assert export(found, tmp_path / "new" / "place") == 2
    place = tmp_path / "new" / "place"
    assert {file.name for file in place.iterdir()} == {
        f"{ulid(1)}.json",
        f"{ulid(1)}.json.sig",
        f"{ulid(1)}-2.json",
        f"{ulid(1)}-2.json.sig",
        "allowed_signers",
        "README",
        "audit.json",
    }
    assert keygen(place, f"{ulid(1)}.json") and keygen(place, f"{ulid(1)}-2.json")
    assert [row["reason"] for row in json.loads((place / "audit.json").read_text())][-1] == "role: no"
    with pytest.raises(LocalError, match="name a directory"):
        export(found, place / "README")


def test_op_signed_with_a_certificate_verifies_through_its_authority(tmp_path: Path) -> None:
    def keygen_(*words: str) -> None:
        subprocess.run(
            ["ssh-keygen", "-q", *words], cwd=tmp_path, check=True, capture_output=True, timeout=20
        )

    keygen_("-t", "ed25519", "-N", "", "-f", "ca")
    keygen_("-t", "ed25519", "-N", "", "-f", "key")
    keygen_("-s", "ca", "-I", "anna-cert", "-n", "op", "key.pub")
    message = node_op("drain", 1, C)
    (tmp_path / "m").write_bytes(message)
    keygen_("-Y", "sign", "-n", NAMESPACE, "-f", "key-cert.pub", "m")
    body = body_of(message, ANNA) | {"signature": (tmp_path / "m.sig").read_text()}
    signed = event(C, 1, Stamp(NOW_MS, 0), body)
    assert signed.wrong is None and len(signed.keys) == 2
    found = rows(judged(signed), {}, with_bytes=True)
    assert found[0]["result"] == "accepted"
    assert export(found, tmp_path / "out") == 1
    assert keygen(tmp_path / "out", f"{ulid(1)}.json", who="op")


def test_roster_is_listed_with_those_who_were_revoked() -> None:
    fold = AdminFold(GENESIS)
    granted = mesh_op("grant_operator", {"line": line(CARL, "carl", "operate")}, 1, A)
    cut = mesh_op("revoke_operator", {"fingerprint": fingerprint(BERT)}, 2, A)
    fold.add(
        [event(A, n, Stamp(NOW_MS, n), body_of(m, ANNA, "anna")) for n, m in enumerate((granted, cut), 1)]
    )
    state = fold.advance(LATER)
    listed = operators(state, {key: fold.last_of(key) for key in state.roster})
    assert [(row["comment"], row["role"], bool(row["revoked"])) for row in listed] == [
        ("anna", "admin", False),
        ("carl", "operate", False),
        (None, None, True),
    ]
    assert listed[0]["last"] == [NOW_MS, 2, id_text(A.id), 2]
    assert (listed[1]["by"], listed[1]["last"], listed[2]["revoked"]["by"]) == ("anna", None, "anna")


# -- the commands -----------------------------------------------------------


class Answering:
    """A client whose agent has this audit and this roster."""

    name, id, mesh = "alpha.gateway.1", id_text(A.id), MESH

    def __init__(self) -> None:
        self.found = rows(
            judged(*(op(n, at_ms=n) for n in range(1, 21))),
            {"b": [refusal(5, "role", "no")]},
            with_bytes=True,
        )
        self.fold = AdminFold(GENESIS)
        self.fold.advance(LATER)
        self.ops: list[bytes] = []

    async def __aenter__(self) -> Answering:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def ask(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        if method == "operators":
            state = self.fold.state
            return {"operators": operators(state, {key: self.fold.last_of(key) for key in state.roster})}
        assert method == "audit" and params is not None
        keep = params["bytes"]
        found = [
            {k: v for k, v in row.items() if keep or k not in ("message", "signature")} for row in self.found
        ]
        at, more = params["offset"], params["offset"] + 5 < len(found)
        return {"rows": found[at : at + 5], "next": at + 5 if more else None}

    async def challenge(self, target: str) -> dict[str, Any]:
        return {"nonce": NONCE, "wall_ms": NOW_MS, "mesh": MESH, "name": self.name, "route": "local"}

    async def op(self, target: str, message: bytes, signature: str, timeout_s: float) -> dict[str, Any]:
        self.ops.append(message)
        number = len(self.ops)
        made = event(
            A, number, Stamp(NOW_MS + number, 0), body_of(message, ANNA, "anna") | {"signature": signature}
        )
        why = self.fold.refusal(made, NOW_MS)
        if why is not None:
            return {"op_id": made.op_id, "result": "refused", "reason": why.sentence, "code": why.code}
        self.fold.add([made])
        self.fold.advance(LATER)
        return {"op_id": made.op_id, "result": "done", "reason": None, "code": None}


@pytest.fixture
def qd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    from tui.cli import auditing, common
    from tui.cli.program import run_command

    client = Answering()

    async def attach(self: Any) -> Answering:
        return client

    class Signer:
        async def sign(self, message: bytes, namespace: str) -> str:
            return sshsig.sign(message, ANNA, namespace)

    async def find_signer(*_: Any) -> Signer:
        return Signer()

    monkeypatch.setattr(common.Scope, "attach", attach)
    monkeypatch.setattr("tui.signers.find_signer", find_signer)

    def run(*words: str) -> tuple[int, str, str]:
        program = click.Group("qd", commands={"audit": auditing.audit, "operators": auditing.operators})
        status = run_command(program, [*words], "qd", words[0])
        said = capsys.readouterr()
        return status, said.out, said.err

    run.client = client  # type: ignore[attr-defined]
    return run


def test_qd_audit_shows_and_exports(qd: Any, tmp_path: Path) -> None:
    status, text, _ = qd("audit", "--home", str(tmp_path))
    assert status == 0 and text.count("anna@laptop") == 20 and "role: no" in text
    status, text, _ = qd("audit", "--home", str(tmp_path), "--json")
    shown = json.loads(text)
    assert status == 0 and len(shown) == 21 and all(tuple(row)[:8] == KEYS for row in shown)
    status, text, said = qd("audit", "--home", str(tmp_path), "--export", str(tmp_path / "out"))
    assert (status, text) == (0, "") and "20 ops of 21 rows" in said
    assert keygen(tmp_path / "out", f"{ulid(3, NOW_MS + 3)}.json")
    status, _, said = qd("audit", "--home", str(tmp_path), "--mesh", "beta")
    assert status == 2 and said.startswith("qd: audit: ")


def test_qd_operators_lists_grants_and_revokes(qd: Any, tmp_path: Path) -> None:
    home = ("--home", str(tmp_path))
    status, text, _ = qd("operators", *home)
    assert status == 0 and "anna" in text and "qd init" in text
    (tmp_path / "carl.pub").write_text(CARL.pub_openssh("carl") + "\n")
    status, text, _ = qd(
        "operators", "grant", str(tmp_path / "carl.pub"), "--role", "operate", "--yes", *home
    )
    assert status == 0 and "done" in text
    granted = json.loads(qd.client.ops[0])
    assert granted["op"] == "grant_operator" and "QD_ROLE=operate" in granted["args"]["line"]
    status, text, _ = qd("operators", "--json", *home)
    assert [row["comment"] for row in json.loads(text)] == ["anna", "bert", "carl"]
    status, text, _ = qd("operators", "revoke", "bert", "--yes", *home)
    assert status == 0
    assert json.loads(qd.client.ops[1])["args"]["last"] == [0, 0, "0" * 16, 0]
    assert fingerprint(BERT) in qd.client.fold.state.cuts
    status, _, said = qd("operators", "revoke", "bert", "--yes", *home)
    assert status == 2 and "not in the roster" in said
    status, text, _ = qd("operators", "revoke", "anna", "--from-now", "--json", *home)
    assert status == 1 and json.loads(text)[0]["code"] == "last_admin"
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    status, _, said = qd("operators", "grant", str(tmp_path / "id"), "--role", "admin", "--yes", *home)
    assert status == 2 and ".pub" in said
