"""Agents on hosts that really differ: evidence across a network, a pulled cable, a clock that is an hour off."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.fleet.harness import wait_for
from tests.fleet.namespaces import Host, lan

pytestmark = pytest.mark.fleet


def rows(host: Host, via: str) -> dict[str, dict]:
    done = host.qd("nodes", "--json", "--via", via)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


def answered(host: Host, via: str, *names: str) -> None:
    wait_for(
        lambda: all((r := rows(host, via).get(n)) and r["rtt_ms"] is not None for n in names),
        f"{via} has answers of {names}",
    )


def test_exit_on_another_host_is_told_from_a_pulled_cable(tmp_path: Path) -> None:
    with lan(tmp_path) as net:
        one, two, three = net.host(), net.host(), net.host()
        a = one.agent("a", "--suspicion-ms", "3000").start()
        a.wait("node.ready")
        b = two.agent("b", "--suspicion-ms", "3000", join=one).start()
        c = three.agent("c", "--suspicion-ms", "3000", join=one).start()
        for agent, others in ((a, "bc"), (b, "ac"), (c, "ab")):
            for other in others:
                agent.wait("node.joined", node=other)
        answered(one, "a", "b", "c")
        answered(two, "b", "a", "c")

        three.cut()
        assert a.wait("node.changed", node="c", to="dead")["source"] == "silent"
        assert b.wait("node.changed", node="c", to="dead")["source"] == "silent"
        three.mend()
        a.wait("node.changed", 60.0, node="c", frm="dead", to="alive")
        b.wait("node.changed", 60.0, node="c", frm="dead", to="alive")
        answered(one, "a", "c")
        answered(two, "b", "c")

        before = len(a.events)
        c.signal(signal.SIGKILL)
        found = wait_for(
            lambda: [
                e
                for e in a.events[before:]
                if e["kind"] == "node.changed" and e["node"] == "c" and e["to"] == "dead"
            ],
            "c dead in the view of a",
        )
        assert found[0]["source"] == "exited"
        assert set(rows(one, "a")["c"]["evidence"]["by"]) == {"a", "b"}


def test_op_crosses_hosts_and_is_left_in_every_view(tmp_path: Path) -> None:
    with lan(tmp_path) as net:
        one, two = net.host(), net.host()
        a = one.agent("a", "--suspicion-ms", "120000").start()
        a.wait("node.ready")
        b = two.agent("b", "--suspicion-ms", "120000", join=one).start()
        a.wait("node.joined", node="b")
        done = one.qd("kill", "b", "--via", "a", "--json")
        (answer,) = json.loads(done.stdout)
        assert (answer["result"], answer["route"]) == ("done", "direct")
        assert b.wait_exit() == 0
        assert a.wait("node.evicted", node="b")["source"] == "left"


def test_clock_an_hour_off_changes_nothing_and_is_told(tmp_path: Path) -> None:
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None:
        pytest.skip("needs libfaketime (Debian's package faketime)")
    with lan(tmp_path) as net:
        ahead = {"LD_PRELOAD": str(library), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        one, two = net.host(), net.host(**ahead)
        a = one.agent("a").start()
        a.wait("node.ready")
        two.agent("b", join=one).start()
        a.wait("node.joined", node="b")
        assert rows(one, "a")["b"]["since_ms"] < 60_000
        done = one.qd("drain", "b", "--via", "a", "--json")
        (answer,) = json.loads(done.stdout)
        assert answer["result"] in ("done", "accepted"), answer
        assert 3_590_000 < answer["skew_ms"] < 3_610_000
        wait_for(lambda: rows(one, "a")["b"]["state"] == "draining", "b draining in the view of a")
