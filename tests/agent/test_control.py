"""The ops desk: what is refused and by which code, that nothing is applied twice, and what is told of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chain import Journal, OpEntry
from agent.control import (
    NONCES_MAX,
    NONCES_PER_HOLDER,
    REFUSALS_PER_MINUTE,
    REFUSALS_PER_MINUTE_ALL,
    Applied,
    Context,
    Control,
    Nonces,
    judge,
)
from agent.operators import Operators, parse
from agent.operators import judge as judge_key
from agent.opmessage import NAMESPACE, Op, build_op, decode_op, new_ulid
from discovery.errors import LocalError, Refused, RemoteError
from discovery.identity import Identity, id_text
from discovery.lifecycle import State
from discovery.sshkey import blob_of, fingerprint

NODE = Identity.from_seed(b"n" * 32)
TARGET = id_text(NODE.id)
NOW = 1_800_000_000_000
OPERATOR = Identity.from_seed(b"1" * 32).pub_openssh()
OBSERVER = Identity.from_seed(b"2" * 32).pub_openssh()
ADMIN = Identity.from_seed(b"3" * 32).pub_openssh()
EXPIRED = Identity.from_seed(b"4" * 32).pub_openssh()
NEAR = Identity.from_seed(b"5" * 32).pub_openssh()
STRANGER = Identity.from_seed(b"6" * 32).pub_openssh()
FILE = f"""\
environment="QD_ROLE=operate" {OPERATOR} anna
{OBSERVER} olaf
environment="QD_ROLE=admin" {ADMIN} ada
environment="QD_ROLE=admin",expiry-time="20200101" {EXPIRED} eve
environment="QD_ROLE=admin",from="10.0.0.0/8" {NEAR} nora
"""
RESULT_KEYS = {"recorded", "op_id", "target", "op", "result", "state", "reason", "code"}


@dataclass(frozen=True)
class Signer:
    line: str
    flags: int | None = None

    @property
    def blob(self) -> bytes:
        return blob_of(self.line)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.blob)


@dataclass(frozen=True)
class Carrier:
    kind: str = "home"
    fingerprint: str = "SHA256:carrier"


def sign(message: bytes, line: str = OPERATOR, namespace: str = NAMESPACE) -> str:
    """Stands for a signature: names the key, the namespace and the content."""
    return json.dumps([line, namespace, hashlib.sha256(message).hexdigest()])


def verify(message: bytes, armored: str, namespace: str) -> Signer:
    try:
        line, signed_namespace, digest = json.loads(armored)
    except (ValueError, TypeError) as why:
        raise RemoteError("no signature") from why
    if signed_namespace != namespace:
        raise Refused("wrong_namespace", f"signed for {signed_namespace}")
    if digest != hashlib.sha256(message).hexdigest():
        raise Refused("bad_signature", "the signature doesn't fit")
    return Signer(line)


class Node:
    """Stands for the node: records what it was told to do, and does as the test says."""

    def __init__(self) -> None:
        self.state = State.ALIVE
        self.applied: list[tuple[str, str]] = []
        self.act: Callable[[Op], Awaitable[Any]] | None = None
        self.began = asyncio.Event()

    def check(self, op: Op) -> None:
        """Nothing is refused beforehand."""

    async def apply(self, op: Op, by: str) -> Any:
        self.applied.append((op.verb, by))
        self.began.set()
        if self.act is not None:
            return await self.act(op)
        return Applied("done", self.state.word)


class Desk:
    """A control with everything around it that a test turns."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.wall = NOW
        self.mono = 1000.0
        self.events: list[dict[str, Any]] = []
        self.node = Node()
        self.ulids = 0
        file = place / "authorized_operators"
        file.write_text(FILE)
        file.chmod(0o600)
        self.operators = Operators(file, monotonic=lambda: self.mono)
        self.start()

    def start(self) -> None:
        self.journal = Journal(self.place / "journal.db", NODE, now_ms=lambda: self.wall)
        self.control = Control(
            me=NODE.id,
            mesh="alpha",
            journal=self.journal,
            operators=self.operators,
            applier=self.node,
            emit=lambda kind, **fields: self.events.append({"kind": kind, **fields}),
            verify_signature=verify,
            wall_ms=lambda: self.wall,
            monotonic=lambda: self.mono,
        )

    def restart(self) -> None:
        self.journal.close()
        self.start()

    def op(self, verb: str = "kill", **changes: Any) -> bytes:
        self.ulids += 1
        fields: dict[str, Any] = {
            "mesh": "alpha",
            "target": TARGET,
            "op_id": new_ulid(NOW, self.ulids.to_bytes(10, "big")),
            "now_ms": self.wall,
        }
        fields |= changes
        if "nonce" not in fields:
            fields["nonce"] = self.control.challenge(Carrier())["nonce"]
        return build_op(verb, **fields)

    async def submit(self, message: bytes, line: str = OPERATOR, **more: Any) -> dict[str, Any]:
        return await self.control.submit(message, sign(message, line), Carrier(), **more)

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [r.body or {} for r in self.journal.tail(10_000) if r.kind == kind]


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    desk = Desk(tmp_path)
    yield desk
    desk.journal.close()


# -- judgement -----------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "mesh": "alpha",
    "target": TARGET,
    "op_id": new_ulid(NOW, b"0123456789"),
    "nonce": "ab" * 16,
    "now_ms": NOW,
}


def context(**changes: Any) -> Context:
    class Authority:
        def judge(self, key: Any, peer_addr: Any, now_ms: int) -> Any:
            return judge_key(parse(FILE)[0], key, peer_addr, now_ms)

        def name_of(self, blob: bytes) -> None:
            return None

    fields: dict[str, Any] = {
        "mesh": "alpha",
        "target": TARGET,
        "authority": Authority(),
        "recorded": lambda op_id: None,
        "nonce_known": lambda nonce: nonce == GOOD["nonce"],
        "state": State.ALIVE,
    }
    return Context(**(fields | changes))


def outcome(
    verb: str = "kill",
    line: str = OPERATOR,
    *,
    message: bytes | None = None,
    peer_addr: str | None = "192.168.1.1",
    now_ms: int = NOW,
    ctx: Context | None = None,
    flags: int | None = None,
    **changes: Any,
) -> str:
    message = build_op(verb, **(GOOD | changes)) if message is None else message
    try:
        judged = judge(
            message, Signer(line, flags), peer_addr=peer_addr, now_ms=now_ms, context=ctx or context()
        )
    except Refused as why:
        assert why.sentence
        return why.code
    return "recorded" if judged.recorded else "passes"


def entry(content: bytes) -> OpEntry:
    return OpEntry(GOOD["op_id"], content, "kill", TARGET, "anna", NOW, None, None)


FITTING = hashlib.sha256(build_op("kill", **GOOD)).digest()


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ({}, "passes"),
        ({"verb": "drain"}, "passes"),
        ({"verb": "drop_replicas", "line": ADMIN, "chains": ["x"]}, "passes"),
        ({"line": STRANGER}, "unknown_key"),
        ({"line": EXPIRED}, "key_expired"),
        ({"line": NEAR}, "from_address"),
        ({"line": NEAR, "peer_addr": None}, "from_address"),
        ({"line": NEAR, "peer_addr": "10.4.4.4"}, "passes"),
        ({"line": OBSERVER}, "role"),
        ({"verb": "drop_replicas", "chains": ["x"]}, "role"),
        ({"message": b"{}"}, "malformed"),
        ({"message": b"{}", "line": STRANGER}, "unknown_key"),
        ({"message": build_op("kill", **GOOD).replace(b'"v":1', b'"v":7')}, "version"),
        ({"message": build_op("kill", **GOOD).replace(b"shutdown", b"explode_")}, "unknown_op"),
        ({"message": build_op("resume", **GOOD).replace(b'"alive"', b'"dead"')}, "bad_state"),
        ({"message": b"x" * 20_000}, "too_large"),
        ({"mesh": "beta"}, "wrong_mesh"),
        ({"target": "0" * 16}, "wrong_target"),
        ({"nonce": "cd" * 16}, "unknown_nonce"),
        ({"now_ms": NOW, "ctx_now": NOW + 60_000}, "expired"),
        ({"ctx_now": NOW + 59_999}, "passes"),
        ({"ctx_now": NOW - 5_000}, "passes"),
        ({"ctx_now": NOW - 5_001}, "not_yet"),
        ({"lifetime_ms": 120_000}, "passes"),
        (
            {
                "message": build_op("kill", **GOOD).replace(
                    str(NOW + 60_000).encode(), str(NOW + 120_001).encode()
                )
            },
            "too_long_lived",
        ),
        (
            {
                "message": build_op("kill", **GOOD).replace(
                    str(NOW + 60_000).encode(), str(NOW - 60_000).encode()
                )
            },
            "expired",
        ),
        ({"ctx": {"recorded": lambda _: entry(b"x" * 32)}}, "op_id_reused"),
        ({"ctx": {"recorded": lambda _: entry(FITTING)}}, "recorded"),
        ({"ctx": {"recorded": lambda _: entry(FITTING)}, "ctx_now": NOW + 10**9}, "recorded"),
        ({"ctx": {"recorded": lambda _: entry(FITTING), "nonce_known": lambda _: False}}, "recorded"),
        ({"ctx": {"recorded": lambda _: entry(FITTING)}, "line": OBSERVER}, "role"),
        ({"ctx": {"state": State.UPDATING}, "verb": "drain"}, "in_update"),
        ({"ctx": {"state": State.UPDATING}, "verb": "update"}, "in_update"),
        ({"ctx": {"state": State.UPDATING}}, "passes"),
        ({"ctx": {"state": State.LEAVING}, "verb": "drain"}, "leaving"),
        ({"ctx": {"state": State.LEAVING}}, "passes"),
    ],
)
def test_op_is_judged_by_its_first_fault(case: dict[str, Any], code: str) -> None:
    case = dict(case)
    ctx = context(**case.pop("ctx", {}))
    now_ms = case.pop("ctx_now", NOW)
    case.pop("now_ms", None)
    got = outcome(case.pop("verb", "kill"), case.pop("line", OPERATOR), ctx=ctx, now_ms=now_ms, **case)
    assert got == code


def test_hardware_key_without_a_touch_is_refused() -> None:
    sk = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIO"
    from tests.agent.test_operators import SK_KEY

    assert SK_KEY.startswith(sk[:40])

    class Authority:
        def judge(self, key: Any, peer_addr: Any, now_ms: int) -> Any:
            return judge_key(parse(f'environment="QD_ROLE=operate" {SK_KEY}')[0], key, peer_addr, now_ms)

        def name_of(self, blob: bytes) -> None:
            return None

    ctx = context(authority=Authority())
    assert outcome(line=SK_KEY, ctx=ctx, flags=1) == "passes"
    assert outcome(line=SK_KEY, ctx=ctx, flags=0) == "not_touched"
    assert outcome(line=SK_KEY, ctx=ctx) == "not_touched"


# -- answers ---------------------------------------------------------------------------------------------


def test_op_that_passes_is_applied_answered_recorded_and_told(desk: Desk) -> None:
    async def act(op: Op) -> Applied:
        desk.node.state = State.DRAINING
        return Applied("accepted", "draining", "2 daemons left")

    desk.node.act = act
    message = desk.op("drain", deadline_ms=5000)
    answer = asyncio.run(desk.submit(message))
    assert answer == {
        "op_id": decode_op(message).op_id,
        "target": TARGET,
        "op": "drain",
        "result": "accepted",
        "state": "draining",
        "reason": "2 daemons left",
        "code": None,
        "recorded": None,
    }
    assert desk.node.applied == [("drain", "anna")]
    (record,) = desk.records("control.op")
    assert (record["message"], record["signature"]) == (message, sign(message))
    assert (record["op"], record["operator"], record["carrier"]) == ("drain", "anna", "home")
    assert desk.records("control.result") == [answer]
    (event,) = desk.events
    assert event["kind"] == "control.received"
    assert (event["op_id"], event["by"], event["result"]) == (answer["op_id"], "anna", "accepted")


@pytest.mark.parametrize(
    ("line", "message_of", "signature_of", "code"),
    [
        (OBSERVER, None, None, "role"),
        (OPERATOR, None, lambda m: sign(m, namespace="file"), "wrong_namespace"),
        (OPERATOR, None, lambda m: sign(m + b" "), "bad_signature"),
        (OPERATOR, None, lambda m: "", "bad_signature"),
        (OPERATOR, None, lambda m: "\udcff", "bad_signature"),
        (OPERATOR, None, lambda m: b"\xff", "bad_signature"),
        (OPERATOR, None, lambda m: "x" * 20_000, "too_large"),
        (OPERATOR, None, lambda m: None, "malformed"),
        (OPERATOR, lambda m: m.decode(), None, "malformed"),
        (OPERATOR, lambda m: m + b" " * 20_000, None, "too_large"),
        (STRANGER, None, None, "unknown_key"),
    ],
)
def test_op_refused_is_answered_recorded_and_changes_nothing(
    desk: Desk, line: str, message_of: Any, signature_of: Any, code: str
) -> None:
    message = desk.op()
    sent = message_of(message) if message_of else message
    signature = signature_of(message) if signature_of else sign(message, line)
    answer = asyncio.run(desk.control.submit(sent, signature, Carrier()))
    assert set(answer) == RESULT_KEYS
    assert (answer["result"], answer["code"], answer["target"], answer["state"]) == (
        "refused",
        code,
        TARGET,
        "alive",
    )
    assert answer["reason"]
    assert desk.node.applied == []
    (record,) = desk.records("control.refused")
    assert record["code"] == code
    assert [e["source"] for e in desk.events] == [code]
    assert desk.control.counters[f"refused.{code}"] == 1


def test_refusal_names_the_op_only_when_the_signature_held(desk: Desk) -> None:
    message = desk.op("drain")
    by_stranger = asyncio.run(desk.submit(message, STRANGER))
    assert (by_stranger["op_id"], by_stranger["op"]) == (decode_op(message).op_id, "drain")
    forged = asyncio.run(desk.control.submit(message, sign(b"other"), Carrier()))
    assert (forged["op_id"], forged["op"]) == (None, None)


def test_refusal_of_a_known_key_names_its_operator(desk: Desk) -> None:
    asyncio.run(desk.submit(desk.op(), OBSERVER))
    assert desk.events[0]["by"] == "olaf"


def test_nonce_serves_once_and_not_after_its_time(desk: Desk) -> None:
    async def scenario() -> None:
        given_ = desk.control.challenge()
        assert given_["wall_ms"] == NOW
        first = await desk.submit(desk.op("drain", nonce=given_["nonce"]))
        second = await desk.submit(desk.op("drain", nonce=given_["nonce"]))
        assert (first["result"], second["code"]) == ("done", "unknown_nonce")
        late = desk.control.challenge()["nonce"]
        desk.mono += 120
        assert (await desk.submit(desk.op("drain", nonce=late)))["code"] == "unknown_nonce"

    asyncio.run(scenario())


def test_refused_op_leaves_its_nonce_and_op_id_usable(desk: Desk) -> None:
    async def scenario() -> None:
        message = desk.op()
        assert (await desk.submit(message, OBSERVER))["code"] == "role"
        assert (await desk.submit(message))["result"] == "done"

    asyncio.run(scenario())


def test_op_refused_during_an_update_succeeds_with_the_same_bytes_afterwards(desk: Desk) -> None:
    async def scenario() -> None:
        desk.node.state = State.UPDATING
        message = desk.op("drain")
        assert (await desk.submit(message))["code"] == "in_update"
        desk.node.state = State.ALIVE
        assert (await desk.submit(message))["result"] == "done"

    asyncio.run(scenario())


def test_repeated_op_gets_the_recorded_answer_and_is_not_applied_again(desk: Desk) -> None:
    async def scenario() -> None:
        message = desk.op("drain")
        first = await desk.submit(message)
        desk.node.state = State.DRAINING
        desk.wall += 10**8
        assert await desk.submit(message) == first
        assert await desk.submit(message, ADMIN) == first
        assert len(desk.node.applied) == 1
        assert len(desk.events) == 1

    asyncio.run(scenario())


def test_repeated_op_is_answered_from_the_record_after_a_restart(desk: Desk) -> None:
    message = desk.op("kill")
    first = asyncio.run(desk.submit(message))
    desk.restart()
    assert asyncio.run(desk.submit(message)) == first
    assert len(desk.node.applied) == 1


def test_op_id_with_other_content_is_refused_also_after_a_restart(desk: Desk) -> None:
    message = desk.op("drain")
    asyncio.run(desk.submit(message))
    op_id = decode_op(message).op_id
    assert asyncio.run(desk.submit(desk.op("kill", op_id=op_id)))["code"] == "op_id_reused"
    desk.restart()
    assert asyncio.run(desk.submit(desk.op("kill", op_id=op_id)))["code"] == "op_id_reused"
    assert desk.node.applied == [("drain", "anna")]


def test_copies_that_arrive_while_it_is_applied_wait_for_the_one_result(desk: Desk) -> None:
    async def scenario() -> None:
        go = asyncio.Event()

        async def act(op: Op) -> Applied:
            await go.wait()
            return Applied("done", "draining")

        desk.node.act = act
        message = desk.op("drain")
        other = desk.op("kill", op_id=decode_op(message).op_id)
        copies = [asyncio.create_task(desk.submit(message)) for _ in range(3)]
        await desk.node.began.wait()
        assert (await desk.submit(other))["code"] == "op_id_reused"
        go.set()
        answers = await asyncio.gather(*copies)
        assert answers[0]["result"] == "done"
        assert answers == [answers[0]] * 3
        assert len(desk.node.applied) == 1

    asyncio.run(scenario())


def test_caller_that_goes_away_does_not_stop_the_op(desk: Desk) -> None:
    async def scenario() -> None:
        go = asyncio.Event()

        async def act(op: Op) -> Applied:
            await go.wait()
            return Applied("done", "draining")

        desk.node.act = act
        message = desk.op("drain")
        caller = asyncio.create_task(desk.submit(message))
        await desk.node.began.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        go.set()
        assert (await desk.submit(message))["result"] == "done"
        assert len(desk.node.applied) == 1

    asyncio.run(scenario())


def test_op_cut_off_by_the_end_of_the_process_is_unknown_and_not_applied_again(desk: Desk) -> None:
    message = desk.op("drain")
    op = decode_op(message)
    desk.journal.reserve(
        op.op_id,
        hashlib.sha256(message).digest(),
        verb="drain",
        target=TARGET,
        operator="anna",
        at_ms=NOW,
    )
    desk.restart()
    answer = asyncio.run(desk.submit(message))
    assert (answer["result"], answer["code"]) == ("unknown", "interrupted")
    assert desk.node.applied == []


def test_result_of_a_kill_is_on_disk_before_the_node_ends(desk: Desk) -> None:
    async def scenario() -> None:
        ended = asyncio.get_running_loop().create_future()

        async def act(op: Op) -> Applied:
            return Applied("done", "leaving", then=lambda: ended.set_result(desk.journal.lookup(op.op_id)))

        desk.node.act = act
        answer = await desk.submit(desk.op("kill"))
        assert not ended.done()  # the answer comes first
        assert (await ended).result == answer

    asyncio.run(scenario())
    assert desk.journal._sync == "FULL"


def test_kill_takes_effect_even_when_its_caller_went_away(desk: Desk) -> None:
    async def scenario() -> None:
        go = asyncio.Event()
        ended = asyncio.Event()

        async def act(op: Op) -> Applied:
            await go.wait()
            return Applied("done", "leaving", then=ended.set)

        desk.node.act = act
        caller = asyncio.create_task(desk.submit(desk.op("kill")))
        await desk.node.began.wait()
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        assert not ended.is_set()
        go.set()
        await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(scenario())


def test_second_kill_of_a_leaving_node_is_done_without_another_act(desk: Desk) -> None:
    desk.node.state = State.LEAVING
    answer = asyncio.run(desk.submit(desk.op("kill")))
    assert (answer["result"], answer["state"]) == ("done", "leaving")
    assert desk.node.applied == []


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (Refused("unsupported", "cordon is not in this build"), "unsupported", "cordon is not in this build"),
        (LocalError("no such thing"), "failed", "no such thing"),
        (ZeroDivisionError("by zero\nsecond line"), "failed", "ZeroDivisionError: by zero"),
        (ValueError(), "failed", "ValueError: "),
    ],
)
def test_op_whose_act_raises_is_refused_and_the_answer_is_kept(
    desk: Desk, raised: Exception, code: str, said: str
) -> None:
    async def act(op: Op) -> Applied:
        raise raised

    desk.node.act = act
    message = desk.op("cordon")
    answer = asyncio.run(desk.submit(message))
    assert (answer["result"], answer["code"], answer["reason"]) == ("refused", code, said)
    assert asyncio.run(desk.submit(message)) == answer
    assert len(desk.node.applied) == 1


def test_op_is_refused_when_it_cannot_be_made_durable(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kw: Any) -> None:
        raise Refused("journal_full", "the journal can't be written")

    monkeypatch.setattr(desk.journal, "reserve", full)
    answer = asyncio.run(desk.submit(desk.op("kill")))
    assert (answer["result"], answer["code"]) == ("refused", "journal_full")
    assert desk.node.applied == []


def test_kill_is_answered_even_when_its_result_cannot_be_kept(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kw: Any) -> None:
        raise Refused("journal_full", "the journal can't be written")

    monkeypatch.setattr(desk.journal, "finish", full)
    answer = asyncio.run(desk.submit(desk.op("kill")))
    assert answer["result"] == "done"
    assert "can't be written" in answer["reason"]


def test_event_sink_that_raises_does_not_change_the_answer(desk: Desk) -> None:
    def emit(kind: str, **fields: Any) -> None:
        raise RuntimeError("no room")

    desk.control._emit = emit
    assert asyncio.run(desk.submit(desk.op("drain")))["result"] == "done"
    assert desk.control.counters["emit_failed"] == 1


# -- floods ----------------------------------------------------------------------------------------------


def test_refusals_of_an_unknown_key_are_recorded_ten_a_minute_and_the_rest_counted(desk: Desk) -> None:
    async def scenario() -> None:
        message = desk.op()
        for _ in range(25):
            assert (await desk.submit(message, STRANGER))["code"] == "unknown_key"
        assert len(desk.records("control.refused")) == len(desk.events) == REFUSALS_PER_MINUTE
        assert desk.control.counters["refused.unknown_key"] == 25
        assert desk.control.counters["refused.unrecorded"] == 25 - REFUSALS_PER_MINUTE
        for _ in range(25):
            await desk.submit(message, OBSERVER)
        assert len(desk.records("control.refused")) == REFUSALS_PER_MINUTE + 25
        desk.mono += 59
        await desk.submit(message, STRANGER)
        assert len(desk.records("control.refused")) == REFUSALS_PER_MINUTE + 25
        desk.mono += 1
        await desk.submit(message, STRANGER)
        assert len(desk.records("control.refused")) == REFUSALS_PER_MINUTE + 26

    asyncio.run(scenario())


def test_refusals_of_many_unknown_keys_are_bounded_together(desk: Desk) -> None:
    async def scenario() -> None:
        message = desk.op()
        for n in range(REFUSALS_PER_MINUTE_ALL + 30):
            key = Identity.from_seed(n.to_bytes(32, "big")).pub_openssh()
            await desk.submit(message, key)
        assert len(desk.records("control.refused")) == REFUSALS_PER_MINUTE_ALL
        assert desk.control.counters["refused.unrecorded"] == 30

    asyncio.run(scenario())


def test_nonces_are_bounded_and_a_flood_takes_only_its_own() -> None:
    now = [0.0]
    nonces = Nonces(lambda: now[0], lambda n: len(given_).to_bytes(n, "big"))
    given_: list[str] = []
    mine = nonces.give("me")
    given_.append(mine)
    for _ in range(NONCES_PER_HOLDER * 3):
        given_.append(nonces.give("flood"))
    assert len(nonces) == NONCES_PER_HOLDER + 1
    assert nonces.known(mine)
    assert not nonces.known(given_[1])
    assert nonces.known(given_[-1])
    for n in range(NONCES_MAX + 10):
        given_.append(nonces.give(f"holder {n}"))
        assert len(nonces) <= NONCES_MAX
    now[0] = 121.0
    given_.append(nonces.give("later"))
    assert len(nonces) == 1


@given(message=st.binary(max_size=200), signature=st.text(max_size=100) | st.binary(max_size=100))
@settings(max_examples=60, deadline=None)
def test_garbage_is_answered_with_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, message: bytes, signature: str | bytes
) -> None:
    desk = garbage_desk(tmp_path_factory)
    answer = asyncio.run(desk.control.submit(message, signature, None))
    assert (set(answer), answer["result"]) == (RESULT_KEYS, "refused")
    trusted = asyncio.run(desk.submit(message))
    assert trusted["result"] == "refused"
    assert desk.node.applied == []


_garbage: list[Desk] = []


def garbage_desk(factory: pytest.TempPathFactory) -> Desk:
    if not _garbage:
        _garbage.append(Desk(factory.mktemp("garbage")))
    return _garbage[0]


# -- the real thing ------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
@pytest.mark.parametrize(
    ("namespace", "certified", "alter", "outcome"),
    [
        (NAMESPACE, False, False, "done"),
        (NAMESPACE, True, False, "done"),
        ("file", False, False, "wrong_namespace"),
        (NAMESPACE, False, True, "bad_signature"),
        (NAMESPACE, True, True, "bad_signature"),
    ],
)
def test_op_signed_by_ssh_keygen_is_judged_as_it_should(
    tmp_path: Path, namespace: str, certified: bool, alter: bool, outcome: str
) -> None:
    def keygen(*args: object) -> None:
        subprocess.run(
            ["ssh-keygen", "-q", *map(str, args)], check=True, capture_output=True, stdin=subprocess.DEVNULL
        )

    key = tmp_path / "operator"
    keygen("-t", "ed25519", "-N", "", "-f", key)
    options, pub, signs = 'environment="QD_ROLE=operate"', key.with_suffix(".pub"), key
    if certified:
        keygen("-t", "ed25519", "-N", "", "-f", tmp_path / "ca")
        keygen("-s", tmp_path / "ca", "-I", "anna", "-n", "op", "-V", "-1h:+1h", pub)
        options, pub, signs = f"cert-authority,{options}", tmp_path / "ca.pub", tmp_path / "operator-cert.pub"
    desk = Desk(tmp_path)
    (tmp_path / "authorized_operators").write_text(f"{options} {pub.read_text()}")
    control = Control(
        me=NODE.id, mesh="alpha", journal=desk.journal, operators=desk.operators, applier=desk.node
    )
    given_ = control.challenge()
    message = desk.op("kill", nonce=given_["nonce"], now_ms=given_["wall_ms"])
    file = tmp_path / "op.json"
    file.write_bytes(message)
    keygen("-Y", "sign", "-f", signs, "-n", namespace, file)
    sent = message.replace(b"alpha", b"alphb") if alter else message
    answer = asyncio.run(control.submit(sent, Path(f"{file}.sig").read_text(), Carrier()))
    assert (answer["code"] or answer["result"]) == outcome
    desk.journal.close()
