"""`qd logs`: the word of the node itself, of any mesh."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.fleet.harness import BIN, Fleet, wait_for
from tests.fleet.test_chains import applied

pytestmark = pytest.mark.fleet


def told(fleet: Fleet, node: str, via: str) -> list[tuple[str, str]]:
    done = fleet.qd("logs", node, "--via", via, "--json")
    assert done.returncode == 0, done.stderr
    return [(e["kind"], e["node"]) for e in map(json.loads, done.stdout.splitlines())]


def test_logs_are_those_of_the_node_itself_and_its_daemons_in_any_mesh(fleet: Fleet) -> None:
    fleet.init("beta")
    (gate,) = fleet.boot("gate", kind="gateway")
    (bee,) = fleet.boot("bee", mesh="beta", kind="gateway")
    (dee,) = fleet.boot("dee", mesh="beta")
    fleet.converged([bee, dee])
    wait_for(lambda: "dee" in fleet.rows(gate), "gate sees beta's nodes")
    for node, via in (("gate", "gate"), ("dee", "bee"), ("dee", "gate")):
        found = told(fleet, node, via)
        assert ("node.ready", node) in found
        assert found[0] == ("node.state_changed", node)
    argv = [
        str(BIN / "qd"),
        "logs",
        "--home",
        str(fleet.home),
        "dee",
        "--via",
        "gate",
        "--follow",
        "--limit",
        "0",
    ]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=fleet.env
    ) as following:
        try:
            (answer,) = fleet.qd_json("drain", "dee", "--via", "gate")
            assert (answer["result"], answer["route"]) == ("done", "direct")
            (again,) = fleet.qd_json("resume", "dee", "--via", "gate")
            assert again["result"] == "done"
            assert following.stdout is not None
            while "alive" not in (line := following.stdout.readline()):
                assert line, "the stream has ended"
        finally:
            following.terminate()
    assert fleet.qd("logs", "nobody", "--via", "gate").returncode == 2
    done = fleet.qd("logs", "dee/web", "--via", "gate")
    assert done.returncode == 2 and "web: no daemon of dee; it has none" in done.stderr
    spec = b'[[daemon]]\nname = "web"\ncommand = ["sh", "-c", "echo here on $QD_NODE"]\non = "node=dee"\n'
    assert applied(fleet, bee, spec)["result"] == "done"
    wait_for(
        lambda: "here on" in fleet.qd("logs", "dee/web", "--via", "gate").stdout,
        "what a daemon of another mesh wrote",
        step_s=0.1,
    )
