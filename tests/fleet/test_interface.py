"""The command line contract, sentence by sentence, with real processes: what a stranger with a copy of it would check.

Most tests look at one fleet that is booted once; those that end or change a node start one of their own in it.
"""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.harness import BIN, Agent, Fleet, wait_for

pytestmark = pytest.mark.fleet

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"qd: [^:]+: .+; .+\n")
HEX12, HEX16 = re.compile(r"[0-9a-f]{12}"), re.compile(r"[0-9a-f]{16}")
STATES = ("joining", "alive", "degraded", "updating", "draining", "leaving", "dead")


def keys(names: str, kind: Any) -> dict[str, Any]:
    """These keys, each with a value of that kind."""
    return dict.fromkeys(names.split(), kind)


ROW = (
    keys("id name mesh kind state source addr build maintenance", str)
    | keys("since_ms last_seen_ms wire", int)
    | keys("cpu mem disk", float | None)
    | keys("rtt_ms", int | float | None)
    | keys("maintenance_until_ms failures", int | None)
    | keys("fresh cordoned", bool)
    | keys("daemons tags", dict)
    | keys("evidence", dict | None)
)
EVENT = keys("at_ms", int) | keys("kind", str) | keys("by", object)
EVENT |= keys("node id mesh from to source reason op_id", str | None)
RESULT = keys("op_id target op result state route", str | None) | keys("took_ms", int | float | None)
RESULT |= keys("reason", str | None) | keys("skew_ms", int | None)
PAGE = keys("node local_maintenance stats", dict) | keys("answered_by", str) | keys("age_ms", int)
PAGE |= keys("daemons replicas peers avoid_list recently_emitted recent_failures", list)
MESH = keys("mesh", str) | keys("publisher nodes", dict) | keys("expired home", bool) | keys("age_ms", int)
MESH |= keys("epoch version expires_in_ms", int | None) | keys("cpu mem", float | None)


def holds(document: dict[str, Any], shape: dict[str, Any]) -> None:
    """Every promised key is there, with a value of its type."""
    assert not shape.keys() - document.keys(), document
    for key, kind in shape.items():
        assert isinstance(document[key], kind), (key, document[key])


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line of an error: `qd: <what>: <why>; <what to do>`, and nothing on stdout."""
    assert (done.returncode, done.stdout) == (status, ""), (done.returncode, done.stdout, done.stderr)
    assert LINE.fullmatch(done.stderr), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """alpha: gate (gateway), bee-1, bee-2 (compute); gamma: dee (broker). mDNS is off."""
    with Fleet(tmp_path_factory.mktemp("interface") / "home", QD_NO_MDNS="1", QD_BIND="127.0.0.1") as fleet:
        fleet.init("alpha")
        fleet.init("gamma")
        started = [
            fleet.agent("gate", "--suspicion-ms", "2000", kind="gateway").start(),
            fleet.agent("bee-1", "--suspicion-ms", "2000").start(),
            fleet.agent("bee-2", "--suspicion-ms", "2000").start(),
        ]
        dee = fleet.agent("dee", mesh="gamma", kind="broker").start()
        fleet.converged(started)
        dee.wait("node.ready")
        yield fleet


def extra(fleet: Fleet, name: str, *flags: str, **env: str) -> Agent:
    """One more node of alpha that a test may do anything with; everybody has met it."""
    agent = fleet.agent(name, *flags)
    agent.env |= env
    agent.start()
    for other in ("gate", "bee-1", "bee-2"):
        fleet.agents[other].wait("node.joined", node=name)
    agent.wait("node.state_changed", to="alive")
    return agent


def act(fleet: Fleet, *words: str, status: int = 0, **more: Any) -> dict[str, Any]:
    """The one result of an op."""
    done = fleet.qd(*words, "--json", **more)
    assert done.returncode == status, (done.stdout, done.stderr)
    (result,) = json.loads(done.stdout)
    holds(result, RESULT)
    assert list(result)[: len(RESULT)] == list(RESULT)
    return result


class Terminal:
    """`qd` on a terminal of its own."""

    def __init__(self, fleet: Fleet, *words: str, **env: str) -> None:
        self.text = ""
        self.pid, self._fd = pty.fork()
        if not self.pid:
            words = (words[0], "--home", str(fleet.home), *words[1:])
            os.execve(BIN / "qd", ["qd", *words], {**fleet.env, "TERM": "xterm-256color", **env})

    def until(self, text: str) -> None:
        wait_for(lambda: self._read() or text in self.text, f"{text!r} in {self.text!r}")

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def status(self) -> int:
        ended = wait_for(lambda: self._read() or self._ended(), f"the end of it: {self.text!r}")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(ended[1])

    def _ended(self) -> tuple[int, int] | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return (pid, status) if pid else None

    def _read(self) -> None:
        while select.select([self._fd], [], [], 0)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                return
            if not data:
                return
            self.text += data.decode("utf-8", "replace")


# --- names


@pytest.mark.parametrize("command", ["qd", "quarterdeck"])
def test_version_prints_quarterdeck_number_and_build(command: str) -> None:
    done = subprocess.run([BIN / command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(
        r"quarterdeck \d+\.\d+\.\d+ \(build [0-9a-f]{12}\)\n", done.stdout
    )


def test_agent_never_imports_textual(fleet: Fleet) -> None:
    for command in ([BIN / "qd-agent"], [BIN / "qd", "agent"]):
        done = subprocess.run(
            [
                sys.executable,
                "-X",
                "importtime",
                *command,
                "--home",
                fleet.home,
                "--mesh",
                "alpha",
                "--self-check",
            ],
            capture_output=True,
            text=True,
            env=fleet.env,
        )
        assert done.returncode == 0 and "agent.node" in done.stderr, done.stderr[-300:]
        assert not re.search(r"\| +(textual|rich)\b", done.stderr)


def test_node_id_is_the_little_endian_integer_of_the_first_eight_key_bytes(fleet: Fleet) -> None:
    for path in (fleet.home / "run").glob("*.json"):
        entry = json.loads(path.read_text())
        assert {"pid", "start", "id", "kind", "addr"} <= entry.keys()
        assert path.name == f"{entry['mesh']}.{entry['name']}.json"
        line = (fleet.home / "state" / entry["mesh"] / entry["name"] / "identity_ed25519.pub").read_text()
        pub = base64.b64decode(line.split()[1])[-32:]
        assert entry["id"] == format(int.from_bytes(pub[:8], "little"), "016x")
        assert Path(f"/proc/{entry['pid']}").exists()


def test_node_without_a_name_is_called_mesh_kind_and_six_of_its_id(fleet: Fleet) -> None:
    found = fleet.qd_json("spawn", "--mesh", "gamma", "--kind", "my-kind-1")
    assert found["name"] == f"gamma.my-kind-1.{found['id'][:6]}"
    assert (fleet.home / "state" / "gamma" / "my-kind-1").is_dir()
    again = fleet.qd("agent", "--mesh", "gamma", "--kind", "my-kind-1")
    assert "give it a --name" in one_line(again, 2)
    assert act(fleet, "kill", found["name"], "--mesh", "gamma")["result"] == "done"
    assert fleet.qd("agent", "--mesh", "alpha", "--name", "gate").returncode == 2


def test_node_is_meant_by_name_id_or_unique_prefix_of_either(fleet: Fleet) -> None:
    gate = fleet.rows("gate")["gate"]["id"]
    for text in ("gate", "ga", gate, gate[:9]):
        assert fleet.qd_json("node", text, "--via", "bee-1")["node"]["name"] == "gate"
        assert fleet.qd_json("node", "bee-1", "--via", text)["answered_by"] == "gate"


# --- errors


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["frobnicate"], 2, "`qd "),
        (["evnts"], 2, "`qd events`"),
        (["kill"], 2, "NODE"),
        (["kill", "bee", "--via", "gate"], 2, "bee-1, bee-2"),
        (["kill", "nobody", "--json"], 2, "nobody"),
        (["kill", "bee-1", "--wait", "asleep"], 2, "gone"),
        (["kill", "bee-1", "--timeout", "soon"], 2, "30s"),
        (["kill", "bee-1", "--operator-key", "/nowhere"], 2, "/nowhere"),
        (["node", "nobody"], 2, "nobody"),
        (["node", "bee"], 2, "bee-1"),
        (["nodes", "--mesh", "nosuch", "--json"], 2, "nosuch"),
        (["nodes", "--mesh", "UPPER"], 2, "UPPER"),
        (["nodes", "--via", "nosuch"], 2, "nosuch"),
        (["nodes", "--via", "bee"], 2, "bee-1, bee-2"),
        (["nodes", "--bogus"], 2, "--bogus"),
        (["nodes", "extra"], 2, "extra"),
        (["events", "--mesh", "nosuch"], 2, "nosuch"),
        (["events", "--mesh", "nosuch", "--follow"], 2, "nosuch"),
        (["meshes", "--mesh", "nosuch"], 2, "nosuch"),
        (["doctor", "--mesh", "nosuch"], 2, "nosuch"),
        (["spawn", "--mesh", "nosuch"], 2, "nosuch"),
        (["view", "events @nosuch"], 2, "nosuch"),
        (["view", "fleet cpu>"], 2, "character"),
        (["init"], 2, "--mesh"),
        (["init", "--mesh", "-bad"], 2, "mesh"),
        (["agent"], 2, "--mesh"),
        (["agent", "--mesh", "nosuch"], 2, "qd init"),
        (["agent", "--mesh", "alpha", "--kind", "K!"], 2, "K!"),
        (["agent", "--mesh", "alpha", "--name", "Ünder"], 2, "Ünder"),
        (["agent", "--mesh", "alpha", "--port", "70000"], 2, "65535"),
        (["agent", "--mesh", "alpha", "--join", "nowhere"], 2, "HOST:PORT"),
        (["agent", "--mesh", "alpha", "--bogus"], 2, "--bogus"),
        (["console"], 2, "terminal"),
        (["fleet"], 2, "terminal"),
        (["state:dead"], 2, "terminal"),
        (["demo"], 2, "--headless"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_error_is_one_line_with_its_status_and_nothing_on_stdout(
    fleet: Fleet, words: list[str], status: int, said: str
) -> None:
    flags = {} if words[0] in ("frobnicate", "evnts", "fleet", "state:dead", "demo") else {"home": fleet.home}
    if flags:
        done = fleet.qd(*words)
    else:
        argv = [BIN / "qd", *words]
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**fleet.env, "QD_HOME": str(fleet.home)},
        )
    assert said in one_line(done, status)


def test_home_in_which_nothing_runs_is_status_three(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.qd("init", "--mesh", "alpha", home=tmp_path).returncode == 0
    for words in (["nodes", "--json"], ["events"], ["kill", "gate"], ["nodes", "--via", "alpha"]):
        one_line(fleet.qd(*words, home=tmp_path), 3)


def test_run_file_of_a_process_that_is_gone_or_of_no_process_is_ignored(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.qd("init", "--mesh", "alpha", home=tmp_path).returncode == 0
    entry = json.loads((fleet.home / "run" / "alpha.gate.json").read_text())
    (tmp_path / "run" / "alpha.old.json").write_text(
        json.dumps({**entry, "name": "old", "start": entry["start"] - 60})
    )
    (tmp_path / "run" / "alpha.gone.json").write_text(json.dumps({**entry, "name": "gone", "pid": 2**22 - 1}))
    (tmp_path / "run" / "alpha.torn.json").write_text('{"pid": 1')
    assert "no agent of this home runs" in one_line(fleet.qd("nodes", home=tmp_path), 3)


def test_output_that_nobody_reads_on_ends_without_a_word(fleet: Fleet) -> None:
    command = f"{BIN}/qd events --home {fleet.home} --follow | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=fleet.env, timeout=30)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_interrupt_ends_a_watch_without_a_traceback(fleet: Fleet) -> None:
    argv = [BIN / "qd", "nodes", "--home", fleet.home, "--watch", "--json"]
    watching = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=fleet.env
    )
    assert watching.stdout is not None
    holds(json.loads(watching.stdout.readline()), ROW)
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=10)
    assert watching.returncode == 130 and "Traceback" not in err


# --- looking


def test_nodes_are_rows_of_the_promised_keys_and_types(fleet: Fleet) -> None:
    rows = wait_for(
        lambda: (r := fleet.rows("gate")) and all(x["cpu"] is not None for x in r.values()) and r,
        "figures of everybody",
    )
    assert {"gate", "bee-1", "bee-2"} <= rows.keys() and "dee" not in rows
    for name, row in rows.items():
        holds(row, ROW)
        assert HEX16.fullmatch(row["id"]) and HEX12.fullmatch(row["build"]) and row["state"] in STATES
        assert row["mesh"] == "alpha" and row["kind"] == ("gateway" if name == "gate" else "compute")
        assert row["source"] == ("self" if name == "gate" else "gossip")
        assert all(0 <= row[key] <= 1 for key in ("cpu", "mem", "disk"))
        assert re.fullmatch(r"127\.0\.0\.1:\d+", row["addr"]) and row["maintenance"] == "active"
        assert row["daemons"] == {"running": 0, "total": 0} and row["evidence"] is None
    assert rows["gate"]["rtt_ms"] is None and rows["gate"]["last_seen_ms"] == 0


def test_node_page_meshes_events_and_view_hold_the_promised_keys(fleet: Fleet) -> None:
    for name in ("gate", "bee-1"):
        page = fleet.qd_json("node", name, "--via", "gate")
        holds(page, PAGE)
        holds(page["node"], ROW)
        assert page["answered_by"] == "gate"
    (mesh,) = fleet.qd_json("meshes", "--via", "gate")
    holds(mesh, MESH)
    assert (
        mesh["publisher"].keys() == {"id", "name", "addr"}
        and mesh["mesh"] == "alpha"
        and mesh["home"] is True
    )
    assert mesh["nodes"].keys() == {"total", *STATES} and mesh["nodes"]["total"] >= 3
    events = fleet.qd_json("events", "--via", "gate")
    assert [e["at_ms"] for e in events] == sorted(e["at_ms"] for e in events)
    for event in events:
        holds(event, EVENT)
    kinds = [e["kind"] for e in events if e["node"] == "gate"]
    assert "node.ready" in kinds and kinds.count("node.state_changed") == 2
    alive = fleet.qd_json("view", "fleet state:alive kind:gateway", "--via", "gate")
    assert [row["name"] for row in alive] == ["gate"]
    holds(alive[0], ROW)


def test_json_log_lines_are_the_objects_of_events(fleet: Fleet) -> None:
    agent = fleet.agents["dee"]
    told = fleet.qd_json("events", "--via", "dee")
    logged = wait_for(
        lambda: (
            len(agent.events) >= len(told)
            and [{k: v for k, v in e.items() if k != "seen_at"} for e in agent.events]
        ),
        "as many lines as events",
    )
    assert logged[: len(told)] == told
    assert abs(told[0]["at_ms"] - time.time() * 1000) < 600_000
    assert len(agent.lines) == len(agent.events), "nothing but event objects on stderr"


def test_followed_events_are_an_object_a_line(fleet: Fleet) -> None:
    argv = [BIN / "qd", "events", "--home", fleet.home, "--follow", "--json", "--via", "dee"]
    following = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=fleet.env)
    assert following.stdout is not None
    holds(json.loads(following.stdout.readline()), EVENT)
    following.terminate()
    following.communicate(timeout=10)


def test_mesh_shows_only_that_mesh_and_via_says_whose_view(fleet: Fleet) -> None:
    def names(*flags: str) -> set[str]:
        return {row["name"] for row in fleet.qd_json("nodes", *flags)}

    gate = json.loads((fleet.home / "run" / "alpha.gate.json").read_text())
    assert names("--mesh", "gamma") == names("--via", "gamma") == names("--via", "dee") == {"dee"}
    assert names("--via", "alpha") == names("--via", gate["id"][:8]) >= {"gate", "bee-1", "bee-2"}
    assert fleet.qd_json("node", "bee-1", "--via", "alpha")["answered_by"] == "gate", "gateways first"
    assert fleet.qd_json("node", "dee")["answered_by"] == "dee", "another mesh of this home, without --via"


def test_environment_and_file_say_what_flags_may_say(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.qd("init", "--mesh", "alpha", home=tmp_path).returncode == 0
    config = tmp_path / "config" / "config.toml"
    config.write_text('via = "nobody"\nmesh = "alpha"\nkind = "registry"\ntag = ["zone=file"]\n')
    env = {"QD_KIND": "broker", "QD_TAG": "zone=a rack=7", "QD_JOIN": "127.0.0.1:9 127.0.0.1:10"}
    env |= {"QD_SUSPICION_MS": "1234", "QD_LOG": "json", "QD_PORT": "0", "QD_HOME": str(tmp_path)}
    agent = Agent(
        fleet, "x", "alpha", "broker", [str(BIN / "qd"), "agent", "--name", "x"], {**fleet.env, **env}
    ).start()
    try:
        agent.wait("node.ready")
        assert fleet.qd("nodes", home=tmp_path).returncode == 2, "via of the file"
        (row,) = fleet.qd_json("nodes", home=tmp_path, QD_VIA="x")
        assert (row["kind"], row["tags"]) == ("broker", {"zone": "a", "rack": "7"})
        (row,) = fleet.qd_json("nodes", "--via", "x", home=tmp_path, QD_VIA="nobody")
        assert row["name"] == "x", "the flag beats both"
    finally:
        agent.stop()
    assert "KIND" in one_line(fleet.qd("agent", "--mesh", "alpha", QD_KIND="No Kind"), 2)
    config.write_text("suspicion_mss = 1\n")
    assert "suspicion_ms" in one_line(fleet.qd("nodes", home=tmp_path), 2)


def test_without_a_home_things_live_in_the_xdg_directories(fleet: Fleet, tmp_path: Path) -> None:
    folders = {"XDG_CONFIG_HOME": "c", "XDG_STATE_HOME": "s", "XDG_RUNTIME_DIR": "r"}
    env = {k: v for k, v in fleet.env.items() if k != "QD_HOME"} | {
        k: str(tmp_path / v) for k, v in folders.items()
    }
    (tmp_path / "r").mkdir(mode=0o700)
    argv = [BIN / "qd", "init", "--mesh", "alpha"]
    assert subprocess.run(argv, env=env, capture_output=True).returncode == 0
    keys = [p for p in (tmp_path / "c" / "quarterdeck").rglob("*") if p.is_file() and p.suffix != ".pub"]
    assert {"mesh.key", "backbone.key", "authorized_operators"} <= {p.name for p in keys}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in keys)
    agent = Agent(
        fleet, "x", "alpha", "compute", [str(BIN / "qd-agent"), "--mesh", "alpha", "--log", "json"], env
    ).start()
    try:
        agent.wait("node.ready")
        assert (tmp_path / "s" / "quarterdeck" / "alpha" / "compute" / "identity_ed25519").exists()
        assert len(list((tmp_path / "r" / "quarterdeck").glob("alpha.*.json"))) == 1
        done = subprocess.run([BIN / "qd", "nodes", "--json"], env=env, capture_output=True, text=True)
        assert len(json.loads(done.stdout)) == 1
    finally:
        agent.stop()


def test_consoles_take_the_first_free_place(fleet: Fleet) -> None:
    argv = fleet.agent("unused", mesh="gamma", kind="console").argv
    del fleet.agents["unused"]
    at = argv.index("--name")
    consoles = [
        Agent(fleet, str(n), "gamma", "console", argv[:at] + argv[at + 2 :], fleet.env) for n in range(2)
    ]
    try:
        for console in consoles:
            console.start().wait("node.ready")
        state = fleet.home / "state" / "gamma"
        assert {p.name for p in state.glob("console*")} == {"console", "console-2"}
    finally:
        for console in consoles:
            console.stop()


def test_doctor_is_content_and_tells_what_is_wrong(fleet: Fleet, tmp_path: Path) -> None:
    found = fleet.qd_json("doctor")
    whats = {check["what"] for check in found["checks"]}
    assert {"ports", "mDNS", "config", "clock", "code"} <= whats
    assert fleet.qd("doctor", home=tmp_path).returncode == 1, "no mesh"
    assert fleet.qd("init", "--mesh", "alpha", home=tmp_path).returncode == 0
    assert fleet.qd("doctor", home=tmp_path).returncode == 0
    (tmp_path / "config" / "backbone.key").chmod(0o644)
    done = fleet.qd("doctor", home=tmp_path)
    assert done.returncode == 1 and "chmod 600" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_every_shell_is_a_script(shell: str) -> None:
    done = subprocess.run([BIN / "qd", "completion", shell], capture_output=True, text=True)
    assert done.returncode == 0 and "_QD_COMPLETE" in done.stdout


def test_colour_goes_to_terminals_that_want_it(fleet: Fleet) -> None:
    for env, coloured in (({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)):
        terminal = Terminal(fleet, "nodes", **env)
        assert terminal.status() == 0 and "gate" in terminal.text
        assert ("\x1b[" in terminal.text) is coloured


def test_home_without_a_running_node_asks_an_agent_that_it_met_before(fleet: Fleet, tmp_path: Path) -> None:
    shutil.copytree(fleet.home / "config", tmp_path / "config")
    addr = json.loads((fleet.home / "run" / "gamma.dee.json").read_text())["addr"]
    one_line(fleet.qd("nodes", home=tmp_path), 3)
    met = fleet.qd("nodes", "--via", addr, home=tmp_path)
    assert met.returncode == 0 and "pinned" in met.stderr
    assert fleet.qd_json("nodes", home=tmp_path)[0]["name"] == "dee"
    one_line(fleet.qd("nodes", "--mesh", "alpha", home=tmp_path), 3)


def test_home_without_a_running_node_finds_one_on_the_lan(tmp_path: Path) -> None:
    with Fleet(tmp_path / "one") as one:
        one.init("lan")
        agent = one.agent("outside", mesh="lan")
        agent.argv = [w for w in agent.argv if w not in ("--bind", "127.0.0.1", "--no-mdns")]
        agent.start().wait("node.ready")
        listed = one.qd_json("nodes")[0]["addr"]
        if listed.startswith("127.") or agent.of("mdns.problem"):
            pytest.skip("needs a network interface with multicast")
        shutil.copytree(one.home / "config", tmp_path / "two" / "config")

        def found() -> bool:
            done = one.qd("nodes", "--json", home=tmp_path / "two")
            return done.returncode == 0 and json.loads(done.stdout)[0]["name"] == "outside"

        wait_for(found, "the announcement of it", 15.0)


# --- acting


def test_drain_resume_and_dry_run_do_what_they_say(fleet: Fleet) -> None:
    node = extra(fleet, "worked-on")
    shown = fleet.qd_json("drain", "worked-on", "--via", "gate", "--dry-run")[0]
    holds(shown, RESULT)
    assert shown["op_id"] is None and shown["result"] is None and not node.of("control.received")
    result = act(fleet, "drain", "worked-on", "--via", "gate", "--deadline", "90s", "--wait", "draining")
    assert (result["op"], result["route"], result["state"]) == ("drain", "direct", "draining")
    assert result["result"] in ("done", "accepted") and abs(result["skew_ms"]) < 2000
    row = fleet.rows("gate")["worked-on"]
    assert (row["state"], row["cordoned"]) == ("draining", True)
    assert act(fleet, "resume", "worked-on", "--via", "gate", "--wait", "alive")["state"] == "alive"
    assert act(fleet, "resume", "worked-on", "--via", "worked-on")["route"] == "local"
    assert node.trail == ["joining", "alive", "draining", "alive"]
    sent = fleet.agents["gate"].of("control.sent", op_id=result["op_id"])
    received = node.of("control.received", op_id=result["op_id"])
    assert len(sent) == len(received) == 1 and received[0]["by"]
    changed = [
        e["to"]
        for e in fleet.qd_json("events", "--via", "bee-1")
        if e["node"] == "worked-on" and e["kind"] == "node.changed"
    ]
    assert changed[-2:] == ["draining", "alive"]
    node.stop()


def test_update_keeps_id_process_and_the_trail_that_events_tell(fleet: Fleet) -> None:
    node = extra(fleet, "updated")
    before, pid = fleet.rows("gate")["updated"], node.pid
    result = act(fleet, "update", "updated", "--via", "gate", "--wait", "alive")
    assert (result["result"], result["state"]) == ("accepted", "updating") and result["reason"]
    after = fleet.rows("gate")["updated"]
    assert (after["id"], after["addr"], after["state"]) == (before["id"], before["addr"], "alive")
    assert node.running and node.pid == pid
    events = fleet.qd_json("events", "--via", "updated")
    trail = [e["to"] for e in events if e["kind"] == "node.state_changed" and e["node"] == "updated"]
    assert trail == ["joining", "alive", "updating", "joining", "alive"] == node.trail
    assert [e["reason"] for e in events if e["kind"] == "node.stopping"] == ["update"]
    assert [e["at_ms"] for e in events] == sorted(e["at_ms"] for e in events)
    node.stop()


def test_killed_node_is_gone_as_left_and_a_second_kill_says_since_when(fleet: Fleet) -> None:
    node = extra(fleet, "doomed")
    result = act(fleet, "kill", "doomed", "--via", "gate", "--wait", "gone")
    assert (result["op"], result["result"], result["state"]) == ("kill", "done", "leaving")
    assert node.wait_exit() == 0 and "doomed" not in fleet.rows("bee-1")
    assert node.of("node.stopping")[0]["reason"] == "control_op"
    for other in ("gate", "bee-1", "bee-2"):
        assert fleet.agents[other].wait("node.evicted", node="doomed")["source"] == "left"
    for words in (("kill", "doomed"), ("node", "doomed"), ("nodes", "--via", "doomed")):
        done = fleet.qd(*words, *(() if "--via" in words else ("--via", "gate")))
        assert done.returncode == 3 and re.search(r"said goodbye \d+ s ago", done.stderr), done.stderr
    again = act(fleet, "kill", "doo", "--via", "gate", status=3)
    assert again["result"] == "unreachable" and again["target"] == "doo"
    assert not (fleet.home / "run" / "alpha.doomed.json").exists()


def test_several_targets_end_with_the_highest_status_and_the_whole_array(fleet: Fleet) -> None:
    first, second = extra(fleet, "first"), extra(fleet, "second")
    done = fleet.qd("kill", "first", "nobody", "second", "--via", "gate", "--json")
    assert done.returncode == 2, done.stderr
    results = json.loads(done.stdout)
    for result in results:
        holds(result, RESULT)
    assert {r["target"]: r["result"] for r in results} == {
        "first": "done",
        "second": "done",
        "nobody": "refused",
    }
    assert LINE.fullmatch(done.stderr) and "nobody" in done.stderr
    assert first.wait_exit() == second.wait_exit() == 0


def test_wait_for_what_does_not_come_is_status_five(fleet: Fleet) -> None:
    node = extra(fleet, "patient")
    done = fleet.qd("drain", "patient", "--via", "gate", "--wait", "dead", "--timeout", "500ms", "--json")
    assert done.returncode == 5 and json.loads(done.stdout)[0]["result"] in ("done", "accepted")
    assert LINE.fullmatch(done.stderr)
    node.stop()


def test_unauthorised_operator_is_status_four_and_the_node_lives(fleet: Fleet, tmp_path: Path) -> None:
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    result = act(fleet, "kill", "bee-2", "--via", "gate", "--operator-key", str(key), status=4)
    assert result["result"] == "refused" and result["reason"]
    assert fleet.agents["bee-2"].running
    assert fleet.agents["bee-2"].wait("control.received", op_id=result["op_id"])["reason"] == result["reason"]


def test_acting_on_a_terminal_asks_and_yes_does_not(fleet: Fleet) -> None:
    node = extra(fleet, "asked-for")
    terminal = Terminal(fleet, "drain", "asked-for", "--via", "gate")
    terminal.until("send it?")
    terminal.type("n\n")
    assert terminal.status() == 1 and not node.of("control.received")
    assert Terminal(fleet, "drain", "asked-for", "--via", "gate", "--yes").status() == 0
    assert node.wait("node.state_changed", to="draining")
    assert Terminal(fleet, "resume", "asked-for", "--via", "gate", "--json").status() == 0
    node.stop()


def test_stopped_node_is_passed_over_named_unreachable_dead_as_silent_and_back(fleet: Fleet) -> None:
    node = extra(fleet, "asleep")
    node.signal(signal.SIGSTOP)
    began = time.monotonic()
    one_line(fleet.qd("nodes", "--via", "asleep"), 3)
    assert time.monotonic() - began < 2.5
    result = act(fleet, "kill", "asleep", "--via", "gate", "--timeout", "700ms", status=3)
    assert result["result"] in ("unreachable", "unknown")
    row = wait_for(lambda: (r := fleet.rows("gate")["asleep"])["state"] == "dead" and r, "it to be dead")
    assert row["evidence"].keys() == {"kind", "by", "text"} and row["evidence"]["kind"] == "silent"
    assert isinstance(row["evidence"]["by"], list) and row["cpu"] is None
    event = fleet.agents["gate"].wait("node.changed", node="asleep", to="dead")
    assert event["source"] == "silent"
    node.signal(signal.SIGCONT)
    fleet.agents["gate"].wait("node.changed", node="asleep", frm="dead")
    node.stop()


def test_crashed_node_is_dead_as_exited(fleet: Fleet) -> None:
    node = extra(fleet, "crashed", "--suspicion-ms", "120000")
    wait_for(
        lambda: all(fleet.rows(o)["crashed"]["rtt_ms"] for o in ("gate", "bee-1", "bee-2")), "answers from it"
    )
    node.signal(signal.SIGKILL)
    for other in ("gate", "bee-1", "bee-2"):
        assert fleet.agents[other].wait("node.changed", node="crashed", to="dead")["source"] == "exited"
    row = fleet.rows("gate")["crashed"]
    assert row["state"] == "dead" and row["evidence"]["kind"] == "exited" and len(row["evidence"]["by"]) >= 2
    done = fleet.qd("kill", "crashed", "--via", "gate", "--timeout", "3", "--json")
    assert done.returncode == 3 and json.loads(done.stdout)[0]["result"] == "unreachable"


def test_login_with_an_unknown_key_is_an_event(fleet: Fleet, tmp_path: Path) -> None:
    addr = json.loads((fleet.home / "run" / "gamma.dee.json").read_text())["addr"]
    assert fleet.qd("init", "--mesh", "other", home=tmp_path).returncode == 0
    one_line(fleet.qd("nodes", "--via", addr, home=tmp_path), 4)
    assert fleet.agents["dee"].wait("login.refused")["reason"]


def test_changed_source_makes_a_node_stale_in_events_rows_and_doctor(tmp_path: Path) -> None:
    code = tmp_path / "code"
    for package in ("discovery", "agent", "tui"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    with Fleet(tmp_path / "home", PYTHONPATH=str(code)) as fleet:
        fleet.init()
        agent = fleet.agent("old")
        agent.argv = [sys.executable, "-P", "-m", "agent.cli", *agent.argv[1:]]
        agent.start().wait("node.ready")
        (code / "agent" / "addresses.py").open("a").write("\n# changed\n")
        event = agent.wait("build.stale", node="old")
        assert (
            fleet.rows("old")["old"]["fresh"] is False
            and fleet.rows("old")["old"]["build"] in event["reason"]
        )
        done = fleet.qd("doctor")
        assert done.returncode == 1 and "stale" in done.stdout
        assert act(fleet, "update", "old", "--wait", "alive")["result"] == "accepted"
        assert fleet.rows("old")["old"]["fresh"] is True


@pytest.mark.soak
def test_dead_node_is_shown_for_a_minute_and_then_evicted(tmp_path: Path) -> None:
    with Fleet(tmp_path / "home") as fleet:
        fleet.init()
        a, b = fleet.boot("a", "b")
        b.signal(signal.SIGKILL)
        dead = a.wait("node.changed", node="b", to="dead")
        gone = a.wait("node.evicted", 90.0, node="b")
        assert gone["source"] == "exited" and 55_000 < gone["at_ms"] - dead["at_ms"] < 75_000
        assert re.search("exited|gone|dead", one_line(fleet.qd("node", "b", "--via", "a"), 3))


# --- the demo


def bare_python(tmp_path: Path) -> Path:
    """A Python that has nothing but its standard library."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(tmp_path / "bare")
    return tmp_path / "bare" / "bin" / "python"


def test_demo_under_a_python_without_its_packages_goes_on_in_the_checkouts_venv(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "tui", checkout / "tui", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("discovery", "agent"):
        (checkout / package).symlink_to(ROOT / package)
    shutil.copy(ROOT / "demo_fleet.py", checkout)
    (checkout / "Makefile").write_text(f"setup:\n\t@echo busy; ln -s {sys.prefix} .venv\n")
    argv = [bare_python(tmp_path), checkout / "demo_fleet.py"]
    for setting_up in (True, False):
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path)
        assert done.returncode == 2 and "use --headless" in done.stderr, done.stderr
        assert ("`make setup`" in done.stderr) is setting_up and done.stdout == ""


def test_demo_whose_setup_fails_says_so_in_one_line(tmp_path: Path) -> None:
    for package in ("discovery", "agent", "tui"):
        (tmp_path / package).symlink_to(ROOT / package)
    shutil.copy(ROOT / "demo_fleet.py", tmp_path)
    (tmp_path / "Makefile").write_text("setup:\n\t@false\n")
    argv = [bare_python(tmp_path), tmp_path / "demo_fleet.py", "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and LINE.fullmatch(done.stderr.splitlines(True)[-1]), done.stderr


def test_demo_of_several_meshes_says_its_line_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    plan = "alpha=gateway:1,broker:1 beta=broker:2"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QD_")}
    demo = subprocess.Popen(
        [sys.executable, ROOT / "demo_fleet.py", "--headless", "--json", "--fleet", plan],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "TMPDIR": str(tmp_path / "tmp"), "QD_TAG": "zone=a"},
    )
    assert demo.stdout is not None
    try:
        ready = json.loads(demo.stdout.readline())
        assert list(ready) == ["home", "meshes", "build", "fresh", "ready_ms"]
        assert list(ready["meshes"]) == ["alpha", "beta"] and isinstance(ready["ready_ms"], int)
        nodes = [node for mesh in ready["meshes"].values() for node in mesh["nodes"]]
        assert [n["kind"] for n in nodes] == ["gateway", "broker", "broker", "broker"]
        for node in nodes:
            assert (
                list(node) == ["name", "id", "kind", "pid", "addr", "build", "fresh"]
                and node["fresh"] is True
            )
        argv = [BIN / "qd", "nodes", "--home", ready["home"], "--via", nodes[2]["name"], "--json"]
        rows = json.loads(subprocess.run(argv, capture_output=True, text=True, env=kept).stdout)
        assert {r["id"] for r in rows} == {n["id"] for n in nodes[2:]}
        assert all(r["tags"] == {"zone": "a"} for r in rows), "the environment is handed to every node"
        argv = [BIN / "qd", "kill", "--home", ready["home"], nodes[1]["name"], "--json"]
        killed = subprocess.run(argv, capture_output=True, text=True, env=kept)
        assert json.loads(killed.stdout)[0]["result"] == "done", "one operator key, admin in every mesh"
    finally:
        began = time.monotonic()
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=15)
    assert demo.returncode == 0 and time.monotonic() - began < 5 and out == "", err
    assert not list((tmp_path / "tmp").iterdir())
    assert not any(Path(f"/proc/{node['pid']}").exists() for node in nodes)
