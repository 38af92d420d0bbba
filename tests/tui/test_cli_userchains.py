"""`qd append` and `qd tail` against a canned agent: what is signed, whom it is handed to, what people and scripts see."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.home import Home
from agent.opmessage import APPEND_MAX_BYTES, Append, decode_op
from discovery import sshsig
from discovery.errors import Refused
from tests.tui.canned import CannedAgent, founded, row
from tests.tui.test_cli import RESULT_KEYS, Qd, one_line

B1 = "b1" * 8
RECORD = {
    "at_ms": 1_750_000_000_000,
    "node": "alpha.broker.b1",
    "op_id": "0" * 26,
    "by": "anna",
    "verified": True,
}


class Holder(CannedAgent):
    """An agent that holds the chain `log`."""

    def __init__(self, home: Home) -> None:
        super().__init__(home, "alpha.gateway.aaaaaa")
        self.rows.append(row("alpha.broker.b1", B1))
        self.appended: list[tuple[str, bytes]] = []
        self.answers: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.more_methods = {"holders": self._holders, "tail": self._tail, "op": self._append}

    async def _holders(self, link: Any, params: Any) -> Any:
        if params["chain"] != "log":
            raise Refused(
                "not_held", f"chain {params['chain']}: no live node holds it; name it in a [[chain]]"
            )
        return {"holders": [{"id": self.id, "name": self.name}, {"id": B1, "name": "alpha.broker.b1"}]}

    async def _append(self, link: Any, params: Any) -> Any:
        sshsig.verify(params["message"], params["signature"], "quarterdeck-op")
        op = decode_op(params["message"])
        assert isinstance(op.args, Append) and op.message.target == params["target"]
        assert op.args.sha256 == hashlib.sha256(params["content"]).hexdigest()
        self.appended.append((params["target"], params["content"]))
        told = self.answers.pop(0) if self.answers else {"result": "done", "recorded": "replicated"}
        return {"op_id": op.op_id, "route": "local", "state": "alive", **told}

    async def _tail(self, link: Any, params: Any) -> AsyncIterator[Any]:
        self.asked.append(params)
        if params["chain"] != "log":
            raise Refused(
                "not_held", f"chain {params['chain']}: no live node holds it; name it in a [[chain]]"
            )
        for record in self.records[-params["limit"] :] if params["limit"] else []:
            yield record


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("QD_") or n == "SSH_AUTH_SOCK"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "person"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return founded(tmp_path / "home")


@pytest.fixture
def holder(home: Home) -> Iterator[Holder]:
    with Holder(home) as running:
        yield running


@pytest.fixture
def qd(home: Home, capfd: pytest.CaptureFixture[str]) -> Qd:
    return Qd(home, capfd)


def test_append_signs_the_content_of_a_file_and_hands_it_to_the_first_holder(
    holder: Holder, qd: Qd, tmp_path: Path
) -> None:
    (tmp_path / "record").write_bytes(b"\x00whatever\n")
    assert qd("append", "log", str(tmp_path / "record")) == 0
    assert holder.appended == [(holder.id, b"\x00whatever\n")]
    assert qd.out.startswith("append log: done at alpha.gateway.aaaaaa, replicated, ") and qd.err == ""
    [told] = qd.json("append", "log", str(tmp_path / "record"))
    assert told.keys() >= {*RESULT_KEYS, "chain", "recorded", "code"}
    assert (told["op"], told["chain"], told["result"]) == ("append", "log", "done")


def test_append_reads_standard_input_and_says_when_only_one_has_it(
    holder: Holder, qd: Qd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"piped")))
    holder.answers = [{"result": "done", "recorded": "local"}]
    assert qd("append", "log") == 0
    assert holder.appended == [(holder.id, b"piped")]
    assert "recorded at alpha.gateway.aaaaaa alone so far" in qd.err


def test_append_goes_on_to_the_next_holder_only_where_nothing_was_written(
    holder: Holder, qd: Qd, tmp_path: Path
) -> None:
    (tmp_path / "record").write_bytes(b"x")
    holder.answers = [{"result": "refused", "code": "not_held", "reason": "given up meanwhile"}]
    assert qd("append", "log", str(tmp_path / "record")) == 0
    assert [target for target, _ in holder.appended] == [holder.id, B1] and "alpha.broker.b1" in qd.out
    holder.answers = [{"result": "refused", "code": "role", "reason": "append needs role operate"}]
    assert qd("append", "log", str(tmp_path / "record")) == 4
    assert "append log: append needs role operate (role)" in one_line(qd.err)
    holder.answers = [{"result": "what"}]
    assert qd("append", "log", str(tmp_path / "record")) == 3
    assert "outcome unknown" in one_line(qd.err)
    assert len(holder.appended) == 4


def test_append_that_can_not_be_is_one_line_and_hands_nothing_over(
    holder: Holder, qd: Qd, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(APPEND_MAX_BYTES + 1))
    for words, said in (
        (["log", str(large)], f"larger than {APPEND_MAX_BYTES} bytes"),
        (["log", str(tmp_path / "none")], "name a file that you can read"),
        (["admin", str(large)], "no name of a chain that a spec can name"),
    ):
        assert qd("append", *words) == 2
        assert said in one_line(qd.err)
    (tmp_path / "record").write_bytes(b"x")
    assert qd("append", "other", str(tmp_path / "record")) != 0
    assert "name it in a [[chain]]" in one_line(qd.err)
    assert holder.appended == []


def test_tail_shows_who_wrote_what_and_nothing_that_could_harm_a_terminal(holder: Holder, qd: Qd) -> None:
    holder.records = [
        RECORD | {"text": "one\n\ttwo\x1b[31m\n"},
        RECORD | {"by": None, "verified": False, "base64": "AAE="},
    ]
    assert qd("tail", "log") == 0
    first, second, third = qd.out.splitlines()
    assert first.endswith("  alpha.broker.b1  anna  one") and second.strip() == "two[31m"
    assert third.endswith("(not verified)  base64 AAE=")
    assert qd.err == "" and "\x1b" not in qd.out
    assert holder.asked[-1] == {"chain": "log", "limit": 2048, "follow": False}
    assert qd("tail", "log", "--limit", "1", "--json") == 0
    assert [json.loads(line) for line in qd.out.splitlines()] == holder.records[1:]


def test_tail_says_on_stderr_that_older_records_are_gone(holder: Holder, qd: Qd) -> None:
    holder.records = [RECORD | {"text": "41", "gone": True}, RECORD | {"text": "42"}]
    for words in ([], ["--json"]):
        assert qd("tail", "log", *words) == 0
        assert len(qd.out.splitlines()) == 2
        assert qd.err.startswith("tail log: older records are gone") and qd.err.count("\n") == 1


def test_tail_of_a_chain_nobody_holds_and_one_that_ends_are_told(holder: Holder, qd: Qd) -> None:
    assert qd("tail", "other") != 0
    assert "no live node holds it" in one_line(qd.err)
    assert qd("tail", "log", "--follow") == 3
    assert "it has gone" in one_line(qd.err)
    assert qd("tail", "node/x") == 2
