"""The command line of daemons, failures, logs and the admin ops, against an agent that gives canned answers."""

# ruff: noqa: F811
from __future__ import annotations

import json
from typing import Any

from tests.tui.canned import CannedAgent
from tests.tui.fakes import daemon, failure
from tests.tui.test_cli import (  # noqa: F401 (fixtures)
    RESULT_KEYS,
    Qd,
    agent,
    home,
    no_settings_of_ours,
    one_line,
    qd,
)

DAEMON_KEYS = {
    *("name", "node", "mesh", "state", "health", "reason", "saturation", "restarts", "until_ms", "pid"),
    "age_ms",
}
FAILURE_KEYS = {
    *("at_ms", "age_ms", "node", "mesh", "source", "action", "target", "reason", "retry_after_ms"),
    "from_replica",
}


def test_daemons_json_has_every_promised_key_and_the_silent_are_told_aside(
    agent: CannedAgent, qd: Qd
) -> None:
    agent.daemons = [{"name": "web", "node": "alpha.broker.b1", "status": "up"}]
    agent.silent = ["alpha.compute.c1"]
    [found] = qd.json("daemons")
    assert set(found) >= DAEMON_KEYS and found["status"] == "up" and found["pid"] is None
    assert "no answer from 1 node: alpha.compute.c1" in qd.err


def test_daemons_table_is_trouble_first_and_safe_to_print(agent: CannedAgent, qd: Qd) -> None:
    bad = daemon("bad", "alpha.b.1", 1, state="backing_off", until_ms=20_000, reason="exit \x1b[31m1")
    agent.daemons = [daemon("web", "alpha.b.1", 1), bad]
    assert qd("daemons") == 0
    lines = qd.out.splitlines()
    assert lines[1].startswith("↻ bad") and "started again in 0:20" in lines[2] and "\x1b" not in qd.out
    assert qd("daemons", "--mesh", "nosuch") == 2
    agent.daemons = []
    assert qd("daemons") == 0 and qd.out == "no daemons\n"


def test_failures_come_in_parts_and_view_is_their_twin(agent: CannedAgent, qd: Qd) -> None:
    agent.failures = [failure(9, "start_daemon", "web"), failure(3, "pull_replica", "orders")]
    assert [set(f) >= FAILURE_KEYS for f in qd.json("failures")] == [True, True]
    assert qd("failures") == 0
    assert qd.out.index("pull_replica") < qd.out.index("start_daemon")
    assert [f["target"] for f in qd.json("view", "failures action:start")] == ["web"]
    agent.daemons = [daemon("web", "alpha.b.1", 1)]
    assert [d["name"] for d in qd.json("view", "daemons", "sort:-restarts")] == ["web"]


def test_logs_of_a_daemon_are_an_object_a_line(agent: CannedAgent, qd: Qd) -> None:
    agent.daemons = [daemon("web", "alpha.broker.b1", 1)]
    agent.lines = [{"at_ms": n, "line": f"line {n}\x1b[2J"} for n in range(5)]
    assert qd("logs", "alpha.broker.b1/web", "--json", "--limit", "2") == 0
    told = [json.loads(line) for line in qd.out.splitlines()]
    assert told[0] == {"at_ms": 3, "node": "alpha.broker.b1", "daemon": "web", "line": "line 3\x1b[2J"}
    assert len(told) == 2 and agent.asked_logs[-1]["follow"] is False
    assert qd("logs", "alpha.broker.b1/web") == 0
    assert len(qd.out.splitlines()) == 5 and "\x1b" not in qd.out
    assert qd("logs", "alpha.broker.b1/web", "--follow") == 3, "who told them has gone"
    assert agent.asked_logs[-1] == {"node": "b1" * 8, "daemon": "web", "limit": 2_048, "follow": True}
    assert qd("logs", "alpha.broker.b1/nosuch") == 2 and "no such daemon" in one_line(qd.err)
    assert qd("logs", "alpha.broker.b1/") == 2
    lines = qd.json("view", "logs from:alpha.broker.b1/web line:4")
    assert [line["line"] for line in lines] == ["line 4"]
    assert qd("view", "logs") == 2 and "from:NODE/DAEMON" in one_line(qd.err)


ADMIN = (
    (["cordon"], "cordon", "cordon"),
    (["uncordon"], "uncordon", "uncordon"),
    (["maintenance", "exit"], "maintenance_exit", "exit_maintenance"),
    (["restart-daemons"], "restart_daemons", "restart_all_daemons"),
    (["clear-avoid"], "clear_avoid", "clear_avoid_list"),
    (["invalidate-placement"], "invalidate_placement", "invalidate_placement"),
)


def test_admin_command_sends_its_op_and_a_dry_run_none(agent: CannedAgent, qd: Qd) -> None:
    for words, verb, wire in ADMIN:
        assert main_of(qd, words, "alpha.compute.c1", "--json") == 0
        [result] = json.loads(qd.out)
        assert set(result) >= RESULT_KEYS and (result["op"], result["result"]) == (verb, "done")
        assert (agent.ops[-1]["op"], agent.ops[-1]["args"]) == (wire, {})
        assert main_of(qd, words, "alpha.compute.c1", "--dry-run") == 0
        assert "nothing was sent" in qd.out
    assert len(agent.ops) == len(ADMIN)


def main_of(qd: Qd, words: list[str], *more: str) -> int:
    """Runs a command of one or two words: `--home` comes after both."""
    from tui.cli.program import main

    qd._capfd.readouterr()
    status = main([*words, "--home", str(qd._home.root), *more])
    qd.out, qd.err = qd._capfd.readouterr()
    return status


def test_maintenance_enter_carries_its_deadline_and_names_what_stops(agent: CannedAgent, qd: Qd) -> None:
    enter = ["maintenance", "enter"]
    assert main_of(qd, enter, "alpha.compute.c1", "--deadline", "30m") == 0
    assert agent.ops[0]["args"] == {"deadline_ms": 1_800_000}
    agent.rows[-1]["daemons"] = {"running": 2, "total": 2}
    assert main_of(qd, enter, "alpha.compute.c1", "--dry-run") == 0
    assert "Put 1 node into maintenance" in qd.out and "2 daemons stop" in qd.out
    assert main_of(qd, ["maintenance"], "alpha.compute.c1") == 2


def test_drop_replicas_takes_one_node_and_its_chains(agent: CannedAgent, qd: Qd) -> None:
    [result] = qd.json("drop-replicas", "alpha.compute.c1", "orders", "users", "orders")
    assert result["op"] == "drop_replicas" and agent.ops[0]["args"] == {"chains": ["orders", "users"]}
    assert qd("drop-replicas", "alpha.compute.c1") == 2
    assert qd("drop-replicas", "alpha.compute.c1", "a\nb") == 2 and len(agent.ops) == 1


def test_wait_sees_maintenance_states_and_ends_when_it_has_failed(agent: CannedAgent, qd: Qd) -> None:
    def stands(state: str, reason: str | None = None) -> Any:
        def took(op: dict[str, Any]) -> dict[str, Any]:
            agent.rows[-1] |= {"maintenance": state, "reason": reason}
            return {"op_id": op["op_id"], "result": "accepted", "state": "draining"}

        return took

    agent.on_op = stands("maintenance")
    enter = ["maintenance", "enter"]
    assert main_of(qd, enter, "alpha.compute.c1", "--wait", "maintenance") == 0
    agent.rows[-1]["maintenance"] = "active"
    agent.on_op = stands("drain_failed", "slow still runs")
    assert main_of(qd, enter, "alpha.compute.c1", "--wait", "maintenance", "--timeout", "60s") == 1
    assert "drain_failed: slow still runs" in one_line(qd.err)
