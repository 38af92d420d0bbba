"""Ops from the verb to their result, against clients that answer, stall, break off and update."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from agent.home import Home
from agent.opmessage import decode_op
from discovery import sshsig
from discovery.errors import Refused, Unreachable
from tests.tui.canned import founded
from tui.ops import RESULT_KEYS, OpSender
from tui.signers import find_signer

TARGET = "c1" * 8


class FakeClient:
    """A client whose answers are a script: one entry an op, a dict or an error to raise."""

    def __init__(self, *answers: Any, skew_ms: int = 0) -> None:
        self.answers = list(answers)
        self.messages: list[tuple[bytes, str]] = []
        self.skew_ms = skew_ms
        self.challenge_error: Exception | None = None

    async def challenge(self, target: str) -> dict[str, Any]:
        if self.challenge_error is not None:
            raise self.challenge_error
        wall_ms = int(time.time() * 1000) + self.skew_ms
        nonce = f"{len(self.messages):032x}"
        return {"nonce": nonce, "wall_ms": wall_ms, "mesh": "alpha", "name": "n", "route": "direct"}

    async def op(self, target: str, message: bytes, signature: str, timeout_s: float = 1) -> dict[str, Any]:
        self.messages.append((message, signature))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer == "stall":
            await asyncio.sleep(60)
        return dict(answer)


class PlainSigner:
    fingerprint = "SHA256:x"
    label = "x"

    async def sign(self, message: bytes, namespace: str) -> str:
        return f"{namespace}:{len(message)}"


def act(
    client: FakeClient, verb: str = "kill", timeout_s: float = 5.0, **args: Any
) -> tuple[dict[str, Any], list[str]]:
    stages: list[str] = []
    result = asyncio.run(OpSender(client, PlainSigner()).act(verb, TARGET, args, timeout_s, stages.append))
    assert set(result) >= set(RESULT_KEYS)
    return result, stages


def test_op_that_is_answered_is_that_answer_with_route_and_time() -> None:
    result, stages = act(FakeClient({"result": "done", "state": "leaving"}))
    assert result["result"] == "done" and result["route"] == "direct" and result["took_ms"] >= 0
    assert stages == ["asking", "signing", "sent", "done"]


def test_op_is_issued_by_the_targets_clock_and_short_lived() -> None:
    client = FakeClient({"result": "done"}, skew_ms=-7_200_000)
    result, _ = act(client)
    op = decode_op(client.messages[0][0]).message
    assert abs(op.issued_at_ms - (time.time() * 1000 - 7_200_000)) < 5_000
    assert 0 < op.expires_at_ms - op.issued_at_ms <= 120_000
    assert abs(result["skew_ms"] + 7_200_000) < 5_000


def test_op_on_an_updating_node_is_tried_again_signed_anew() -> None:
    client = FakeClient({"result": "refused", "code": "in_update", "reason": "updating"}, {"result": "done"})
    result, stages = act(client)
    assert result["result"] == "done" and len(client.messages) == 2
    first, second = (json.loads(message) for message, _ in client.messages)
    assert first["op_id"] != second["op_id"] and first["nonce"] != second["nonce"]
    assert any("update" in stage for stage in stages)


def test_op_on_a_node_that_stays_in_update_ends_refused_at_the_timeout() -> None:
    client = FakeClient(*[{"result": "refused", "code": "in_update", "reason": "updating"}] * 50)
    result, _ = act(client, timeout_s=0.6)
    assert result["result"] == "refused" and result["code"] == "in_update" and len(client.messages) >= 2


def test_lost_answer_is_unknown_and_never_sent_is_unreachable() -> None:
    result, _ = act(FakeClient(Unreachable("gone", maybe_arrived=True)))
    assert result["result"] == "unknown" and result["op_id"]
    result, _ = act(FakeClient(Unreachable("gone", maybe_arrived=False)))
    assert result["result"] == "unreachable"
    client = FakeClient()
    client.challenge_error = Unreachable("no route", maybe_arrived=True)
    result, _ = act(client)
    assert result["result"] == "unreachable" and result["op_id"] is None, (
        "nothing was sent, so nothing arrived"
    )


def test_stalled_answer_is_unknown_when_the_time_is_up() -> None:
    began = time.monotonic()
    result, _ = act(FakeClient("stall"), timeout_s=0.3)
    assert result["result"] == "unknown" and time.monotonic() - began < 3


def test_refusals_keep_their_code_and_a_tombstone_is_unreachable() -> None:
    result, _ = act(FakeClient(Refused("role", "observers only look")))
    assert (result["result"], result["code"], result["reason"]) == ("refused", "role", "observers only look")
    client = FakeClient()
    client.challenge_error = Refused("gone", "said goodbye 12 s ago")
    result, _ = act(client)
    assert result["result"] == "unreachable" and result["reason"] == "said goodbye 12 s ago"


def test_drain_carries_its_deadline_in_the_signed_bytes() -> None:
    client = FakeClient({"result": "done"})
    act(client, "drain", deadline_ms=5_000)
    assert decode_op(client.messages[0][0]).deadline_ms == 5_000


# --- who signs


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return founded(tmp_path / "home")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_key_file_of_any_type_signs_what_ssh_keygen_verifies(home: Home, tmp_path: Path, kind: str) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(key)], check=True)
    signer = asyncio.run(find_signer(home, key))
    armored = asyncio.run(signer.sign(b"an op", "quarterdeck-op"))
    assert sshsig.verify(b"an op", armored, "quarterdeck-op").fingerprint == signer.fingerprint
    (tmp_path / "op.sig").write_text(armored)
    (tmp_path / "allowed").write_text(f"me {key.with_suffix('.pub').read_text()}")
    verifying = ["ssh-keygen", "-Y", "verify", "-f", tmp_path / "allowed", "-I", "me", "-n", "quarterdeck-op"]
    checked = subprocess.run([*verifying, "-s", tmp_path / "op.sig"], input=b"an op", capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_agent_key_signs_where_the_home_has_no_operator_key(
    home: Home, tmp_path: Path, monkeypatch: Any
) -> None:
    home.operator_key_file.unlink()
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    socket = tmp_path / "agent.sock"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        until = time.monotonic() + 10
        while subprocess.run(["ssh-add", "-q", str(key)], capture_output=True).returncode:
            assert time.monotonic() < until
            time.sleep(0.05)
        key.unlink()

        async def signed() -> tuple[str, str]:
            signer = await find_signer(home, None)
            return signer.fingerprint, await signer.sign(b"an op", "quarterdeck-op")

        fingerprint, armored = asyncio.run(signed())
        assert sshsig.verify(b"an op", armored, "quarterdeck-op").fingerprint == fingerprint
    finally:
        agent.terminate()
        agent.wait(10)


def test_no_key_at_all_is_told(home: Home) -> None:
    home.operator_key_file.unlink()
    with pytest.raises(Refused) as told:
        asyncio.run(find_signer(home, None))
    assert told.value.code == "no_key"
