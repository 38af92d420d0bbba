"""`qd apply` against an agent that judges and keeps records as a node does: files, differences, statuses, JSON."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.chain.store import Journal
from agent.control import Applied, Control
from agent.home import Home, make_identity
from agent.operators import Operators
from agent.opmessage import NAMESPACE, Op, decode_op
from agent.spec.reading import read_spec
from discovery import sshsig
from discovery.errors import Refused, Unreachable
from discovery.lifecycle import State
from tests.tui.canned import CannedAgent, founded, row
from tui.cli.program import main
from tui.ops import RESULT_KEYS

SPEC = """\
[[daemon]]
name = "web"
command = ["web"]
all = true
on = "kind=compute"
"""
OTHER = SPEC.replace('["web"]', '["web", "-v"]') + '[[daemon]]\nname = "db"\ncommand = ["db"]\ncount = 9\n'


class Ledger:
    """The admin chain as far as a spec goes: the last one committed is in force."""

    def __init__(self) -> None:
        self.specs: list[tuple[Op, str, bytes]] = []

    async def commit(self, op: Op, message: bytes, signature: str, by: str, content: Any = None) -> Any:
        held = self.specs[-1][0].op_id if self.specs else ""
        if op.args.base != held:
            raise Refused("superseded", "another spec is in force now")
        assert hashlib.sha256(content).hexdigest() == op.args.sha256
        self.specs.append((op, by, content))
        return SimpleNamespace(recorded="replicated")

    async def result(self, *_: Any, **__: Any) -> None:
        return None


class Does:
    """A node that takes every op."""

    state = State.ALIVE

    def check(self, op: Op) -> None:
        return None

    async def apply(self, op: Op, by: str) -> Applied:
        return Applied("done", self.state.word)


class Keeper(CannedAgent):
    """A canned agent that judges ops as a node does. `on_put` stands in for the outcome of an apply where it is set."""

    def __init__(self, home: Home, name: str, *, mesh: str = "alpha") -> None:
        super().__init__(home, name, mesh=mesh)
        self.asked: list[dict[str, Any]] = []
        self.on_put: Callable[[], Any] | None = None
        self.nodes_of_spec: dict[str, Any] = {"reached": [name], "missed": []}
        self.meshes_seen: list[dict[str, Any]] = []
        self.keeps: dict[str, list[str]] = {}
        self.withheld = mesh != "alpha"
        """As from a node of another mesh, which may not read the spec."""
        self.target = self.id
        self.ledger = Ledger()
        self.more_methods = {"spec": self._spec}

    def judges_for(self, node: str) -> None:
        """Ops are judged as the node of mesh alpha with this id would."""
        self.target = node
        self._control = self._desk()

    async def _start(self) -> None:
        self._journal = Journal(self.home.root / f"journal-{self.id}.db", self.identity)
        self._control = self._desk()
        await super()._start()

    async def _end(self) -> None:
        self._journal.close()

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        super().__exit__()

    def _desk(self) -> Control:
        return Control(
            me=int(self.target, 16),
            mesh="alpha",
            journal=self._journal,
            operators=Operators(self.home.operators_file),
            applier=Does(),
            ledger=self.ledger,
            wall_ms=lambda: int(time.time() * 1000) + self.skew_ms,
        )

    async def _challenge(self, link: Any, params: Any) -> Any:
        return {**await super()._challenge(link, params), **self._control.challenge()}

    async def _spec(self, link: Any, params: Any) -> Any:
        op, by, content = self.ledger.specs[-1] if self.ledger.specs else (None, None, None)
        return {
            "op_id": op and op.op_id,
            "by": by,
            "at_ms": op and op.message.issued_at_ms,
            "sha256": op and op.args.sha256,
            "content": None if self.withheld else content,
            "withheld": self.withheld,
            "nodes": self.nodes_of_spec,
            "keeps": self.keeps,
            "wall_ms": int(time.time() * 1000) + self.skew_ms,
            "mesh": "alpha",
            "name": self.name,
        }

    async def _op(self, link: Any, params: Any) -> Any:
        self.asked.append(params)
        if self.on_put is not None:
            return self.on_put()
        answer = await self._control.submit(
            params["message"], params["signature"], None, "127.0.0.1", params["content"]
        )
        return {**answer, "route": "local" if self.mesh == "alpha" else "direct"}

    async def _nodes(self, link: Any, params: Any) -> Any:
        rows = [r for r in self.rows if params.get("mesh") in (None, r["mesh"])]
        if not rows:
            raise Refused("unknown_mesh", f"mesh {params['mesh']}: not known to {self.name}")
        yield {"rows": rows, "answered_by": self.name, "meshes": [self.mesh]}

    async def _meshes(self, link: Any, params: Any) -> Any:
        return {"meshes": self.meshes_seen}


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("QD_") or n == "SSH_AUTH_SOCK"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "person"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return founded(tmp_path / "home")


@pytest.fixture
def agent(home: Home) -> Iterator[Keeper]:
    with Keeper(home, "alpha.gateway.aaaaaa") as running:
        running.rows += [
            row("alpha.compute.c1", "c1" * 8, kind="compute"),
            row("alpha.compute.c2", "c2" * 8, kind="compute", state="draining"),
            row("alpha.console.d1", "d1" * 8, kind="console"),
            row("beta.compute.e1", "e1" * 8, kind="compute", mesh="beta"),
        ]
        yield running


class Qd:
    """Runs `qd apply` on a file with this text."""

    def __init__(self, home: Home, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._home, self._path, self._capfd = home, path, capfd
        self.status, self.out, self.err = 0, "", ""

    def __call__(self, text: str | None, *words: str) -> int:
        file = []
        if text is not None:
            self._path.write_text(text)
            file = [str(self._path)]
        self._capfd.readouterr()
        self.status = main(["apply", *file, "--home", str(self._home.root), *words])
        self.out, self.err = self._capfd.readouterr()
        return self.status

    def json(self, text: str | None, *words: str) -> Any:
        self(text, *words, "--json")
        return json.loads(self.out)


@pytest.fixture
def qd(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Qd:
    return Qd(home, tmp_path / "spec.toml", capfd)


def stranger(tmp_path: Path) -> str:
    path = tmp_path / "stranger"
    if not path.exists():
        make_identity(path, "stranger")
    return str(path)


def test_spec_is_signed_and_handed_over_with_what_it_changes(qd: Qd, agent: Keeper) -> None:
    assert qd(SPEC) == 0, qd.err
    assert "spec of mesh alpha, in force: none" in qd.err
    assert "+ daemon web on alpha.compute.c1\n" in qd.err and "@ alpha.compute.c1: starts web" in qd.err
    assert qd.out.startswith("apply alpha: done, 1 node, ")
    (asked,) = agent.asked
    assert asked["target"] == agent.id and sshsig.verify(asked["message"], asked["signature"], NAMESPACE)
    assert [d.name for d in read_spec(agent.ledger.specs[-1][2].decode()).daemon] == ["web"]


def test_json_is_one_row_with_every_promised_key(qd: Qd, agent: Keeper) -> None:
    (first,) = qd.json(SPEC)
    assert qd.status == 0 and qd.err == "" and set(RESULT_KEYS) <= set(first)
    assert first["result"] == "done" and first["op"] == "apply" and first["target"] == "alpha"
    assert first["recorded"] == "replicated" and first["state"] is None and first["route"] == "local"
    assert first["nodes"]["reached"] == [agent.name] and first["nodes"]["missed"] == []
    (second,) = qd.json(OTHER)
    assert second["op_id"] != first["op_id"] == decode_op(agent.asked[1]["message"]).args.base
    assert [e["name"] for e in second["diff"]["added"]] == ["db"]
    assert second["diff"]["changed"][0]["keys"] == [{"key": "command", "old": ["web"], "new": ["web", "-v"]}]
    assert {"daemon": "db", "wanted": 9, "placed": 2, "reason": None} in second["diff"]["shortfalls"]


def test_dry_run_sends_nothing_and_shows_the_same(qd: Qd, agent: Keeper) -> None:
    qd(SPEC)
    assert qd(OTHER, "--dry-run") == 0
    assert '    command: ["web"] → ["web","-v"]' in qd.out and "nothing was sent" in qd.out
    (found,) = qd.json(OTHER, "--dry-run")
    assert found["dry_run"] and found["result"] is None and found["diff"]["added"]
    assert len(agent.asked) == 1 and len(agent.ledger.specs) == 1


def test_cordoned_node_keeps_what_it_says_it_runs(qd: Qd, agent: Keeper) -> None:
    agent.rows[1]["cordoned"] = True
    agent.keeps = {"c1" * 8: ["db"]}
    (found,) = qd.json('[[daemon]]\nname = "db"\ncommand = ["x"]\non = "kind=compute"', "--dry-run")
    assert found["diff"]["placed"] == {"db": ["alpha.compute.c1"]}


def test_daemon_that_fits_nowhere_is_told_before_anything_is_sent(qd: Qd, agent: Keeper) -> None:
    agent.rows[1]["capacity"] = {"cpu": 2.0, "memory": 1 << 30}
    text = '[[daemon]]\nname = "db"\ncommand = ["x"]\non = "node=alpha.compute.c1"\nresources = { memory = "4G" }'
    assert qd(text, "--dry-run") == 0
    assert "+ daemon db on no node, needs 4.0G memory" in qd.out
    assert (
        "! db: 1 wanted, no node can run it; alpha.compute.c1 needs 4.0G memory, 1.0G free of 1.0G" in qd.out
    )
    agent.rows[1]["capacity"] = None
    (found,) = qd.json(text, "--dry-run")
    assert found["diff"]["placed"] == {"db": ["alpha.compute.c1"]}, (
        "what it has is not known: it is taken to be able"
    )


def test_spec_in_force_that_an_earlier_build_took_is_shown_all_the_same(qd: Qd, agent: Keeper) -> None:
    old = '[[daemon]]\nname = "web"\ncommand = ["web"]\ncwd = "srv"\n'
    assert qd(old) == 2 and "`cwd`: 'srv' is relative; write it from / on" in qd.err
    qd(old.replace("srv", "/srv"))
    op, by, _ = agent.ledger.specs[-1]
    agent.ledger.specs[-1] = (op, by, old.encode())
    assert qd(old.replace("srv", "/srv"), "--dry-run") == 0
    assert "cwd: srv → /srv" in qd.out


def test_same_spec_again_is_told_to_change_nothing(qd: Qd, agent: Keeper) -> None:
    qd(SPEC)
    assert qd(SPEC) == 0 and "in force: by " in qd.err and "ago, nothing changes" in qd.err
    assert len(agent.ledger.specs) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[daemon]]\nname='web'\ncmd=['x']", "spec.toml: daemon web: no key `cmd`; did you mean `command`?"),
        ("[[daemon]", "spec.toml: line 1: "),
        ("x" * 300_000, "spec.toml: larger than 262144 bytes"),
    ],
)
def test_file_that_is_wrong_is_usage_naming_it(qd: Qd, agent: Keeper, text: str, said: str) -> None:
    assert qd(text) == 2
    assert said in qd.err and qd.err.count("\n") == 1 and agent.asked == []


def test_file_that_is_not_there_is_usage(qd: Qd, agent: Keeper) -> None:
    assert qd(None, "/nowhere/spec.toml") == 2 and "/nowhere/spec.toml: No such file" in qd.err
    assert qd(None) == 2 and "qd apply SPEC.toml" in qd.err


def test_key_that_may_not_is_not_authorised(qd: Qd, agent: Keeper, tmp_path: Path) -> None:
    assert qd(SPEC, "--operator-key", stranger(tmp_path)) == 4
    assert "unknown_key" in qd.err and agent.ledger.specs == []
    (found,) = qd.json(SPEC, "--operator-key", stranger(tmp_path))
    assert found["result"] == "refused" and found["code"] == "unknown_key" and qd.status == 4


def test_operator_who_is_no_admin_is_not_authorised(qd: Qd, agent: Keeper, home: Home) -> None:
    text = home.operators_file.read_text().replace("QD_ROLE=admin", "QD_ROLE=operate")
    home.operators_file.write_text(text)
    assert qd(SPEC) == 4 and "(role)" in qd.err and agent.ledger.specs == []


@pytest.mark.parametrize(
    ("outcome", "status", "result"),
    [
        (Refused("superseded", "another spec is in force now"), 1, "refused"),
        (Refused("journal_full", "disk full"), 1, "refused"),
        (Refused("gone", "said goodbye"), 3, "unreachable"),
        (Unreachable("cut off"), 3, "unreachable"),
        ({"nonsense": True}, 3, "unknown"),
    ],
)
def test_outcome_is_told_by_status_and_row(
    qd: Qd, agent: Keeper, outcome: Any, status: int, result: str
) -> None:
    def put() -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    agent.on_put = put
    (found,) = qd.json(SPEC)
    assert (
        qd.status == status and found["result"] == result and found["nodes"] == {"reached": [], "missed": []}
    )
    assert qd.err.startswith("qd: apply alpha: ") and qd.err.count("\n") == 1


def test_nodes_that_were_missed_are_named(qd: Qd, agent: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.cli.applying.REACH_WAIT_S", 0.1)
    agent.nodes_of_spec = {"reached": ["a"], "missed": ["b\x1b[31m"]}
    assert qd(SPEC) == 0
    assert "not yet at b[31m: no answer; it will ask for it" in qd.err and "\x1b" not in qd.err


def test_spec_that_was_put_in_force_meanwhile_is_not_overwritten(
    qd: Qd, agent: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    qd(SPEC)
    (mine,) = agent.ledger.specs
    monkeypatch.setattr("tui.cli.applying.on_terminal", lambda: True)

    def another(*_: Any, **__: Any) -> bool:
        agent.ledger.specs.append((SimpleNamespace(op_id="0" * 26), "ben", b""))
        return True

    monkeypatch.setattr("click.confirm", another)
    assert qd(OTHER) == 1 and "another spec is in force now (superseded)" in qd.err
    assert agent.ledger.specs[0] is mine and len(agent.ledger.specs) == 2


def test_nobody_there_is_unreachable(qd: Qd, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(*_: Any) -> None:
        return None

    monkeypatch.setattr("tui.nearby.attach_nearby", nobody)
    assert qd(SPEC) == 3 and qd.out == ""


def test_op_is_dated_by_the_clock_of_the_node(qd: Qd, agent: Keeper) -> None:
    agent.skew_ms = -3_600_000
    assert qd(SPEC) == 0 and "3600 s behind" in qd.err
    issued_at_ms = decode_op(agent.asked[0]["message"]).message.issued_at_ms
    assert abs(issued_at_ms - (time.time() * 1000 - 3_600_000)) < 5_000


def test_unknown_mesh_is_usage_and_a_mesh_without_a_live_node_is_unreachable(qd: Qd, agent: Keeper) -> None:
    assert qd(SPEC, "--mesh", "delta") == 2
    agent.rows[-1]["state"] = "dead"
    assert qd(SPEC, "--mesh", "beta") == 3 and agent.asked == []


def test_other_mesh_is_reached_by_way_of_a_node_of_it(qd: Qd, home: Home) -> None:
    with Keeper(home, "gamma.gateway.ffffff", mesh="gamma") as agent:
        agent.rows += [
            row("alpha.gateway.b1", "b1" * 8, kind="gateway"),
            row("alpha.compute.c1", "c1" * 8, kind="compute"),
            row("alpha.compute.a0", "a0" * 8, kind="compute", state="dead"),
        ]
        agent.judges_for("b1" * 8)
        (found,) = qd.json(SPEC, "--mesh", "alpha")
        assert qd.status == 0 and found["result"] == "done" and found["route"] == "direct"
        assert agent.asked[-1]["target"] == "b1" * 8
        assert decode_op(agent.asked[-1]["message"]).message.mesh == "alpha"
        agent.meshes_seen = [{"mesh": "alpha", "publisher": {"id": "c1" * 8}}]
        agent.judges_for("c1" * 8)
        assert qd(OTHER, "--mesh", "alpha") == 0
        assert agent.asked[-1]["target"] == "c1" * 8
        assert "the one in force may not be read by way of mesh gamma: what changes is not shown" in qd.err
        assert len(agent.ledger.specs) == 2
        assert qd(None, "--show", "--mesh", "alpha") == 1 and "may not be read" in qd.err


def test_show_prints_the_spec_in_force_as_it_was_written(qd: Qd, agent: Keeper) -> None:
    assert qd(None, "--show") == 0 and qd.out == "" and "no spec is in force" in qd.err
    assert qd.json(None, "--show")["spec"] is None
    qd("# ours\n" + SPEC)
    assert qd(None, "--show") == 0 and qd.out == "# ours\n" + SPEC
    shown = qd.json(None, "--show")
    assert (
        shown["op_id"] == agent.ledger.specs[0][0].op_id
        and shown["spec"]["daemon"][0]["name"] == "web"
        and shown["text"].startswith("#")
    )
    assert qd(SPEC, "--show") == 2


def test_person_who_says_no_sends_nothing(qd: Qd, agent: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.cli.applying.on_terminal", lambda: True)
    asked = []
    monkeypatch.setattr("click.confirm", lambda text, **_: bool(asked.append(text)))
    assert qd(SPEC) == 1 and asked == ["apply it?"] and agent.asked == [] and "signed as SHA256:" in qd.err
    assert qd(SPEC, "--yes") == 0 and len(asked) == 1
