"""Hosts that share no network: ops go through a gateway that has a leg in both, or back over a link that is held."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.fleet.harness import BIN, wait_for
from tests.fleet.namespaces import Host, lan

pytestmark = pytest.mark.fleet


def rows(host: Host, via: str) -> dict[str, dict]:
    done = host.qd("nodes", "--json", "--via", via)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


ECHO = """
[[daemon]]
name = "echo"
command = ["sh", "-c", "echo heard on $QD_NODE; exec sleep 3600"]
on = "node=c"
"""


def test_op_and_logs_of_a_host_without_a_route_go_through_the_gateway(tmp_path: Path) -> None:
    with lan(tmp_path) as net:
        here, there = net.segments[0], net.segment()
        one, middle, far = net.host(here), net.host(here, there), net.host(there)
        b = middle.agent("b", "--suspicion-ms", "120000", kind="gateway").start()
        b.wait("node.ready")
        a = one.agent("a", "--suspicion-ms", "120000", join=middle).start()
        c = far.agent("c", "--suspicion-ms", "120000", join=middle).start()
        a.wait("node.joined", node="c")
        assert not one.reaches(far.address, far.port) and middle.reaches(far.address, far.port)
        spec = tmp_path / "fleet.toml"
        spec.write_text(ECHO)
        assert one.qd("apply", str(spec), "--via", "a").returncode == 0
        wait_for(
            lambda: "heard on" in one.qd("logs", "c/echo", "--via", "a").stdout,
            "what its daemon wrote",
            step_s=0.1,
        )
        done = one.qd("kill", "c", "--via", "a", "--json")
        (answer,) = json.loads(done.stdout)
        assert (answer["result"], answer["route"]) == ("done", "relay"), answer
        assert c.wait_exit() == 0
        assert a.wait("node.evicted", node="c")["source"] == "left"


def test_op_to_a_host_behind_nat_goes_back_over_the_link_that_it_holds(tmp_path: Path) -> None:
    with lan(tmp_path) as net:
        outside, here, inside = net.segments[0], net.segment(), net.segment()
        net.nat(inside, outside)
        one, middle, far = net.host(here), net.host(outside, here), net.host(inside)
        b = middle.agent("b", "--suspicion-ms", "120000", kind="gateway").start()
        b.wait("node.ready")
        a = one.agent("a", "--suspicion-ms", "120000", join=middle).start()
        c = far.agent("c", "--suspicion-ms", "120000", join=middle).start()
        a.wait("node.joined", node="c")
        assert not one.reaches(far.address, far.port) and far.reaches(middle.address, middle.port)
        done = one.qd("drain", "c", "--via", "a", "--json")
        assert json.loads(done.stdout)[0]["route"] == "relay", done.stdout
        wait_for(lambda: rows(one, "a")["c"]["state"] == "draining", "c draining in the view of a")
        argv = [
            *one.inside,
            str(BIN / "qd"),
            "logs",
            "--home",
            str(one.fleet.home),
            "c",
            "--via",
            "a",
            "--follow",
        ]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=one.fleet.env
        ) as following:
            try:
                assert following.stdout is not None
                for word in ("draining", "alive"):
                    while f"→ {word}" not in (line := following.stdout.readline()):
                        assert line, "the stream has ended"
                    if word == "draining":
                        assert one.qd("resume", "c", "--via", "a", "--json").returncode == 0
            finally:
                following.terminate()
        done = one.qd("kill", "c", "--via", "a", "--json")
        (answer,) = json.loads(done.stdout)
        assert (answer["result"], answer["route"]) == ("done", "relay"), answer
        assert c.wait_exit() == 0
