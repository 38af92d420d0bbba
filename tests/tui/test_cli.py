"""The command line as a person or a script meets it: words, statuses, JSON, one-line errors."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.home import Home, read_identity
from discovery.sshkey import pub_fingerprint
from tests.tui.canned import BUILD, CannedAgent, founded, row
from tui.cli.program import COMMANDS, command_first, is_locator, main

ROW_KEYS = {
    *(
        "id",
        "name",
        "mesh",
        "kind",
        "state",
        "since_ms",
        "source",
        "cpu",
        "mem",
        "disk",
        "rtt_ms",
        "addr",
        "build",
    ),
    *(
        "fresh",
        "wire",
        "maintenance",
        "maintenance_until_ms",
        "cordoned",
        "daemons",
        "failures",
        "last_seen_ms",
    ),
    *("tags", "evidence"),
}
RESULT_KEYS = {"op_id", "target", "op", "result", "state", "route", "took_ms", "reason", "skew_ms"}
NODE_KEYS = {
    *("node", "daemons", "replicas", "peers", "avoid_list", "local_maintenance", "recently_emitted"),
    *("recent_failures", "stats", "answered_by", "age_ms"),
}


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("QD_") or n == "SSH_AUTH_SOCK"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "person"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return founded(tmp_path / "home")


@pytest.fixture
def agent(home: Home) -> Iterator[CannedAgent]:
    with CannedAgent(home, "alpha.gateway.aaaaaa") as running:
        running.rows += [
            row("alpha.broker.b1", "b1" * 8),
            row("alpha.broker.b1.copy", "b2" * 8),
            row("alpha.compute.c1", "c1" * 8, kind="compute"),
        ]
        yield running


class Qd:
    """Runs `qd` in this process and keeps what it printed."""

    def __init__(self, home: Home, capfd: pytest.CaptureFixture[str]) -> None:
        self._home = home
        self._capfd = capfd
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        self._capfd.readouterr()
        status = main([words[0], "--home", str(self._home.root), *words[1:]] if words else [])
        self.out, self.err = self._capfd.readouterr()
        return status

    def json(self, *words: str) -> Any:
        self(*words, "--json")
        return json.loads(self.out)


@pytest.fixture
def qd(home: Home, capfd: pytest.CaptureFixture[str]) -> Qd:
    return Qd(home, capfd)


def one_line(text: str) -> str:
    assert text.startswith("qd: ") and text.count("\n") == 1 and "; " in text, text
    return text


# --- words


@pytest.mark.parametrize("word", ["fleet", "map", "@beta", "state:dead", "cpu>80", "tag.zone=a", "x<3"])
def test_first_word_that_can_only_be_a_view_opens_the_console(word: str) -> None:
    assert is_locator(word)


@pytest.mark.parametrize("word", ["foo", "nodez", "alpha.gateway.aa", "b1b1"])
def test_first_word_that_is_neither_command_nor_view_is_usage_naming_the_nearest(
    word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert "did you mean `qd " in one_line(capfd.readouterr().err)


def test_misspelt_command_is_told_the_right_one(capfd: pytest.CaptureFixture[str]) -> None:
    main(["evnts"])
    assert "`qd events`" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([], ["console"]),
        (["--mesh", "a"], ["console", "--mesh", "a"]),
        (["--mesh=a", "fleet"], ["console", "--mesh=a", "fleet"]),
        (["--home", "h", "nodes", "--json"], ["nodes", "--home", "h", "--json"]),
        (["nodes", "--home", "h"], ["nodes", "--home", "h"]),
        (["--version"], ["--version"]),
        (["-h"], ["-h"]),
        (["--attach", "h:1", "--read-only"], ["console", "--attach", "h:1", "--read-only"]),
    ],
)
def test_options_before_the_command_move_behind_it(typed: list[str], meant: list[str]) -> None:
    assert command_first(typed) == meant


def test_console_without_terminal_is_usage(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["fleet"], ["console"], ["--home", str(home.root)]):
        assert main(words) == 2
        assert "terminal" in one_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    "words", [["nodes", "--nope"], ["kill"], ["events", "--limit", "x"], ["kill", "a", "--wait", "nirvana"]]
)
def test_bad_usage_is_one_line_and_status_two(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    one_line(capfd.readouterr().err)


def test_version_names_number_and_build(capfd: pytest.CaptureFixture[str]) -> None:
    from agent.freshness import fingerprint as build

    assert main(["--version"]) == 0
    words = capfd.readouterr().out.split()
    assert words[0] == "quarterdeck" and words[2:] == ["(build", f"{build()})"]


def test_help_of_every_command_is_there(capfd: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0, name
        assert "Usage:" in capfd.readouterr().out


def test_commands_but_the_console_never_import_textual(home: Home) -> None:
    code = (
        "import sys; from tui.cli.program import main, program, COMMANDS; import click;"
        "[program.get_command(click.Context(program), n) for n in COMMANDS];"
        f"main(['nodes', '--home', {str(home.root)!r}]); main(['doctor', '--home', {str(home.root)!r}]);"
        "sys.exit('textual' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- init


def test_init_makes_keys_that_nobody_else_can_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--mesh", "alpha", "--home", str(tmp_path / "h")]) == 0
    config = tmp_path / "h" / "config"
    for name in (
        "backbone.key",
        "client_ed25519",
        "operator_ed25519",
        "authorized_operators",
        "meshes/alpha/mesh.key",
    ):
        assert stat.S_IMODE((config / name).stat().st_mode) == 0o600, name
    line = (config / "authorized_operators").read_text()
    assert 'environment="QD_ROLE=admin" ssh-ed25519 ' in line
    assert "qd invite" in capfd.readouterr().out


def test_init_again_changes_nothing_and_says_so(home: Home, qd: Qd) -> None:
    before = {p: p.read_bytes() for p in home.config.rglob("*") if p.is_file()}
    assert qd("init", "--mesh", "alpha") == 0
    assert "exists" in qd.out
    assert {p: p.read_bytes() for p in home.config.rglob("*") if p.is_file()} == before
    told = qd.json("init", "--mesh", "alpha")
    operator = read_identity(home.operator_key_file, "operator key")
    assert (
        told["created"] is False and told["made"] == [] and told["operator"] == pub_fingerprint(operator.pub)
    )


def test_init_of_a_second_mesh_keeps_the_operator(home: Home, qd: Qd) -> None:
    operators = home.operators_file.read_text()
    assert qd.json("init", "--mesh", "beta")["created"] is True
    assert home.meshes() == ["alpha", "beta"] and home.operators_file.read_text() == operators


def test_init_without_or_with_a_bad_mesh_is_usage(qd: Qd) -> None:
    assert qd("init") == 2
    assert qd("init", "--mesh", "No_Mesh") == 2
    one_line(qd.err)


# --- looking


def test_nodes_json_has_every_promised_key(agent: CannedAgent, qd: Qd) -> None:
    rows = qd.json("nodes")
    assert len(rows) == 4 and all(set(r) >= ROW_KEYS for r in rows)
    assert qd.err == ""


def test_nodes_table_shows_state_as_glyph_and_word_without_colour(agent: CannedAgent, qd: Qd) -> None:
    agent.rows.append(
        row(
            "alpha.broker.d1",
            "d1" * 8,
            state="dead",
            evidence={"kind": "exited", "by": ["x"], "text": "process gone"},
        )
    )
    assert qd("nodes") == 0
    assert "✕ dead" in qd.out and "● alive" in qd.out and "process gone" in qd.out and "\x1b" not in qd.out
    lines = qd.out.splitlines()
    assert "dead" in lines[1], "trouble first"


def test_nodes_strip_control_characters_of_others(agent: CannedAgent, qd: Qd) -> None:
    agent.rows[1]["tags"] = {}
    agent.rows[1]["addr"] = "\x1b[31mred\r\nnew"
    assert qd("nodes") == 0
    assert "\x1b" not in qd.out and len(qd.out.splitlines()) == 5


def test_nodes_of_unknown_mesh_is_usage(agent: CannedAgent, qd: Qd) -> None:
    assert qd("nodes", "--mesh", "nosuch") == 2
    assert "nosuch" in one_line(qd.err)


def test_nodes_without_an_agent_is_unreachable(qd: Qd) -> None:
    assert qd("nodes", "--json") == 3
    assert qd.out == "" and "no agent" in one_line(qd.err)


def test_nodes_watch_prints_a_row_a_line_and_marks_the_gone(agent: CannedAgent, qd: Qd) -> None:
    agent.frames = [
        {"full": True, "rows": agent.rows, "gone": [], "events": []},
        {"full": False, "rows": [], "gone": ["b1" * 8], "events": []},
    ]
    assert qd("nodes", "--watch", "--json") == 3, "the stream ended"
    lines = [json.loads(line) for line in qd.out.splitlines()]
    assert [line["gone"] for line in lines] == [False] * 4 + [True]
    assert lines[-1]["name"] == "alpha.broker.b1" and set(lines[-1]) >= ROW_KEYS


def test_node_json_has_every_promised_key(agent: CannedAgent, qd: Qd) -> None:
    page = qd.json("node", "alpha.compute")
    assert set(page) >= NODE_KEYS and page["node"]["id"] == "c1" * 8 and page["peers"] == []


def test_node_for_people_is_the_page_of_the_console(agent: CannedAgent, qd: Qd) -> None:
    assert qd("node", "alpha.compute") == 0
    lines = qd.out.splitlines()
    assert lines[0] == "alpha.compute.c1" and "compute of alpha" in lines[1]
    assert any(line.startswith("facts ──") for line in lines) and '{"' not in qd.out


def test_node_of_unknown_name_is_usage_and_of_tombstone_unreachable(agent: CannedAgent, qd: Qd) -> None:
    assert qd("node", "nobody") == 2
    assert qd("node", "ghost") == 3
    assert "said goodbye 12 s ago" in one_line(qd.err)


def test_exact_name_wins_over_prefix_and_ambiguous_prefix_is_usage(agent: CannedAgent, qd: Qd) -> None:
    assert qd.json("node", "alpha.broker.b1")["node"]["id"] == "b1" * 8
    assert qd.json("node", "b2")["node"]["name"] == "alpha.broker.b1.copy"
    assert qd("node", "alpha.broker") == 2
    assert "alpha.broker.b1, alpha.broker.b1.copy" in one_line(qd.err)


def test_meshes_json_and_unknown_mesh(agent: CannedAgent, qd: Qd) -> None:
    assert [m["mesh"] for m in qd.json("meshes")] == ["alpha"]
    assert qd("meshes", "--mesh", "nosuch") == 2


def test_events_are_an_array_oldest_first_and_limit_takes_the_last(agent: CannedAgent, qd: Qd) -> None:
    agent.events = [{"at_ms": n, "kind": "node.joined", "node": f"n{n}", "mesh": "alpha"} for n in range(5)]
    assert [e["at_ms"] for e in qd.json("events")] == [0, 1, 2, 3, 4]
    assert [e["at_ms"] for e in qd.json("events", "--limit", "2")] == [3, 4]
    assert qd("events") == 0 and "node.joined" in qd.out


def test_events_follow_json_is_an_object_a_line(agent: CannedAgent, qd: Qd) -> None:
    agent.events = [{"at_ms": n, "kind": "node.joined", "node": "n", "mesh": "alpha"} for n in range(3)]
    qd("events", "--follow", "--json")
    assert [json.loads(line)["at_ms"] for line in qd.out.splitlines()] == [0, 1, 2]


# --- acting


def test_kill_is_signed_by_the_homes_operator_for_the_targets_clock(
    agent: CannedAgent, home: Home, qd: Qd
) -> None:
    agent.skew_ms = 3_600_000
    results = qd.json("kill", "alpha.compute.c1")
    assert (
        set(results[0]) >= RESULT_KEYS and results[0]["result"] == "done" and results[0]["route"] == "direct"
    )
    assert abs(results[0]["skew_ms"] - 3_600_000) < 5_000
    [op] = agent.ops
    assert op["verb"] == "kill" and op["target"] == "c1" * 8 and op["op_id"] == results[0]["op_id"]
    assert op["signer"] == pub_fingerprint(read_identity(home.operator_key_file, "operator key").pub)
    assert "3600 s ahead" in qd.err


def test_drain_carries_its_deadline(agent: CannedAgent, qd: Qd) -> None:
    assert qd("drain", "alpha.compute.c1", "--deadline", "5m") == 0
    assert agent.ops[0]["args"] == {"state": "draining", "deadline_ms": 300_000}


def test_refusal_by_authority_is_four_and_any_other_one(agent: CannedAgent, qd: Qd) -> None:
    agent.on_op = lambda op: {
        "op_id": op["op_id"],
        "result": "refused",
        "reason": "nobody knows you",
        "code": "unknown_key",
    }
    assert qd("kill", "alpha.compute.c1") == 4
    assert "nobody knows you" in one_line(qd.err)
    agent.on_op = lambda op: {"op_id": op["op_id"], "result": "refused", "reason": "no", "code": "bad_state"}
    assert qd("resume", "alpha.compute.c1") == 1


def test_several_targets_give_the_highest_status_and_the_whole_array(agent: CannedAgent, qd: Qd) -> None:
    agent.on_op = lambda op: {
        "op_id": op["op_id"],
        "result": "refused" if op["target"].startswith("b1") else "done",
        "code": "role" if op["target"].startswith("b1") else None,
        "reason": "observers only look" if op["target"].startswith("b1") else None,
    }
    assert qd("drain", "alpha.compute.c1", "alpha.broker.b1", "ghost", "--json") == 4
    assert [r["result"] for r in json.loads(qd.out)] == ["done", "refused", "unreachable"]


def test_wrong_name_among_several_is_usage_and_the_others_get_their_op(agent: CannedAgent, qd: Qd) -> None:
    assert qd("kill", "alpha.compute.c1", "nobody", "--json") == 2
    assert [(r["target"], r["result"]) for r in json.loads(qd.out)] == [
        ("alpha.compute.c1", "done"),
        ("nobody", "refused"),
    ]
    assert "nobody" in one_line(qd.err) and len(agent.ops) == 1


def test_wrong_name_alone_sends_nothing_and_prints_nothing(agent: CannedAgent, qd: Qd) -> None:
    assert qd("kill", "nobody", "--json") == 2
    assert agent.ops == [] and qd.out == ""


def test_the_same_node_named_twice_gets_one_op(agent: CannedAgent, qd: Qd) -> None:
    assert len(qd.json("drain", "alpha.compute.c1", "c1c1")) == 1


def test_dry_run_shows_the_blast_radius_and_sends_nothing(agent: CannedAgent, qd: Qd) -> None:
    assert qd("kill", "alpha.gateway", "--dry-run") == 0
    assert "gateway" in qd.out and agent.ops == []
    [planned] = qd.json("kill", "alpha.gateway", "--dry-run")
    assert set(planned) >= RESULT_KEYS and planned["result"] is None and planned["dry_run"] is True


def test_named_operator_key_signs_and_a_readable_one_is_refused(
    agent: CannedAgent, qd: Qd, tmp_path: Path
) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    assert qd("kill", "alpha.compute.c1", "--operator-key", str(key)) == 0
    shown = subprocess.run(["ssh-keygen", "-lf", str(key)], capture_output=True, text=True, check=True).stdout
    assert agent.ops[0]["signer"] == shown.split()[1]
    key.chmod(0o644)
    assert qd("kill", "alpha.compute.c1", "--operator-key", str(key)) == 1
    assert "chmod 600" in one_line(qd.err)


def test_key_with_passphrase_and_no_terminal_is_an_error_line(
    agent: CannedAgent, qd: Qd, tmp_path: Path
) -> None:
    key = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    assert qd("kill", "alpha.compute.c1", "--operator-key", str(key)) in (1, 2)
    assert "no terminal to ask" in one_line(qd.err)


def test_wait_returns_when_others_see_it_and_five_when_they_do_not(agent: CannedAgent, qd: Qd) -> None:
    def leave(op: dict[str, Any]) -> dict[str, Any]:
        agent.rows = [r for r in agent.rows if r["id"] != op["target"]]
        return {"op_id": op["op_id"], "result": "done", "state": "leaving"}

    agent.on_op = leave
    [result] = qd.json("kill", "alpha.compute.c1", "--wait", "gone")
    assert result["wait"]["reached"] is True
    assert qd("drain", "alpha.broker.b1.copy", "--wait", "draining", "--timeout", "300ms") == 5


# --- streams that break


def test_output_nobody_reads_ends_without_a_traceback(agent: CannedAgent, home: Home) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m tui.cli nodes --home {home.root} | true; exit ${{PIPESTATUS[0]}}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_full_disk_is_one_line(agent: CannedAgent, home: Home) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m tui.cli nodes --home {home.root} > /dev/full"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    one_line(done.stderr)


# --- doctor, completion


def test_doctor_is_content_with_a_whole_home_and_names_what_is_wrong(
    agent: CannedAgent, home: Home, qd: Qd
) -> None:
    told = qd.json("doctor")
    wrong = [c for c in told["checks"] if c["ok"] is False]
    assert [c["what"] for c in wrong] == ["code"] and BUILD in wrong[0]["text"], "the canned build is stale"
    home.client_key_file.chmod(0o644)
    assert qd("doctor") == 1
    assert "chmod 600" in qd.out


def test_doctor_names_an_operator_line_that_is_void(home: Home, qd: Qd) -> None:
    text = home.operators_file.read_text()
    home.operators_file.write_text(text + "no-such-option ssh-ed25519 AAAA nobody\n")
    assert qd("doctor") == 1
    assert "authorized_operators" in qd.out


def test_doctor_finds_a_clock_that_is_off(agent: CannedAgent, qd: Qd) -> None:
    agent.skew_ms = -90_000
    assert any(c["what"] == "clock" and c["ok"] is False for c in qd.json("doctor")["checks"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_serves_both_names(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    printed = capfd.readouterr().out
    assert "_QD_COMPLETE" in printed and "_QUARTERDECK_COMPLETE" in printed


def test_completion_offers_commands_and_names(agent: CannedAgent, home: Home) -> None:
    def complete(words: str, at: int) -> list[str]:
        env = {**os.environ, "_QD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        code = "import sys; sys.argv=['qd']; from tui.cli.program import main; sys.exit(main([]))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
        )
        return [line.split(",", 1)[1] for line in done.stdout.splitlines()]

    assert "nodes" in complete("qd no", 1) and "node" in complete("qd no", 1)
    assert complete(f"qd kill --home {home.root} alpha", 4) == ["alpha.gateway.aaaaaa"]


# --- whose view


def test_silent_agent_is_passed_over_within_a_second(agent: CannedAgent, home: Home, qd: Qd) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        ghost = agent.entry
        entry = {**{f: getattr(ghost, f) for f in ghost.__struct_fields__}, "name": "alpha.gateway.000000"}
        entry["addr"] = f"127.0.0.1:{mute.getsockname()[1]}"
        (home.run / "alpha.alpha.gateway.000000.json").write_text(json.dumps(entry))
        assert qd("nodes") == 0
        assert qd("nodes", "--via", "alpha.gateway.000000") == 3


def test_via_means_a_node_before_a_mesh_and_a_mesh_before_a_prefix(
    agent: CannedAgent, home: Home, qd: Qd
) -> None:
    with CannedAgent(home, "alpha", kind="broker") as namesake:
        namesake.rows[0]["name"] = "alpha"
        assert [r["name"] for r in qd.json("nodes", "--via", "alpha")] == ["alpha"]
    assert len(qd.json("nodes", "--via", "alpha")) == 4
    assert qd("nodes", "--via", "nobody") == 2


def test_agent_of_another_mesh_of_the_home_is_found_without_via(
    agent: CannedAgent, home: Home, qd: Qd
) -> None:
    founded(home.root, "beta")
    with CannedAgent(home, "beta.gateway.cccccc", mesh="beta") as other:
        other.rows.append(row("beta.broker.d1", "d1" * 8, mesh="beta"))
        assert qd("drain", "beta.broker.d1") == 0
        assert len(other.ops) == 1 and agent.ops == []
        assert qd("drain", "beta.broker.d1", "--via", "alpha") == 2
