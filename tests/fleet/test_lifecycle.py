"""Real agents on loopback: joining, leaving, dying and stopping, as the others see it."""

from __future__ import annotations

import os
import signal

import pytest

from tests.fleet.harness import Fleet, wait_for

pytestmark = pytest.mark.fleet


def test_agents_of_one_home_find_each_other(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "c")
    for one in (a, b, c):
        rows = fleet.rows(one)
        assert set(rows) == {"a", "b", "c"}
        assert rows[one.name]["source"] == "self"
        assert all(row["state"] == "alive" for row in rows.values())
        assert one.trail == ["joining", "alive"]


def test_agent_alone_is_alive_at_once_and_says_why(fleet: Fleet) -> None:
    only = fleet.agent("only").start()
    event = only.wait("node.state_changed", to="alive")
    assert event["reason"] == "nobody to look for"
    ready = only.wait("node.ready")
    assert ready["steps"][0]["step"] == "keys"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_is_a_goodbye_seen_as_left_everywhere(fleet: Fleet, number: int) -> None:
    a, b, c = fleet.boot("a", "b", "c", flags=("--suspicion-ms", "120000"))
    c.signal(number)
    assert c.wait_exit() == 0
    for one in (a, b):
        gone = one.wait("node.evicted", node="c")
        assert gone["source"] == "left"
        assert not one.of("node.changed", node="c", to="dead")
    assert c.trail == ["joining", "alive", "leaving"]
    assert c.of("node.stopping")[0]["reason"] == "signal"
    assert "c" not in fleet.rows(a)


def test_sigkill_is_dead_as_exited_with_its_witnesses(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "c", flags=("--suspicion-ms", "120000"))
    c.signal(signal.SIGKILL)
    for one in (a, b):
        assert one.wait("node.changed", node="c", to="dead")["source"] == "exited"
    row = fleet.rows(a)["c"]
    assert row["state"] == "dead"
    assert row["evidence"]["kind"] == "exited"
    assert set(row["evidence"]["by"]) == {"a", "b"}
    assert "a" in row["evidence"]["text"] and row["cpu"] is None


def test_sigkill_among_two_needs_only_the_other_one(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b", flags=("--suspicion-ms", "120000"))
    b.signal(signal.SIGKILL)
    assert a.wait("node.changed", node="b", to="dead")["source"] == "exited"


def test_sigstop_is_dead_as_silent_and_alive_again_after_sigcont(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "c", flags=("--suspicion-ms", "1500"))
    c.signal(signal.SIGSTOP)
    for one in (a, b):
        assert one.wait("node.changed", node="c", to="dead")["source"] == "silent"
    row = fleet.rows(a)["c"]
    assert row["evidence"]["kind"] == "silent" and "no answer for" in row["evidence"]["text"]
    c.signal(signal.SIGCONT)
    for one in (a, b):
        one.wait("node.changed", node="c", frm="dead", to="alive")
    assert not [e for e in c.events if e["kind"] == "node.changed" and e["to"] == "dead"], (
        "a pause accuses nobody"
    )
    assert not a.of("node.changed", to="dead", source="exited")


def test_restarted_node_comes_back_under_the_same_id_with_a_higher_incarnation(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b")
    before = fleet.rows(a)["b"]
    b.signal(signal.SIGKILL)
    a.wait("node.changed", node="b", to="dead")
    b.start()
    a.wait("node.changed", node="b", frm="dead")
    after = wait_for(lambda: (r := fleet.rows(a)["b"])["state"] == "alive" and r, "b alive again")
    assert after["id"] == before["id"]
    assert after["incarnation"] > before["incarnation"]


def test_node_that_comes_late_hears_of_everybody_from_one_seed(fleet: Fleet) -> None:
    a, *_ = fleet.boot("a", "b", "c", "d")
    late = fleet.agent("late", join=a).start()
    for name in ("a", "b", "c", "d"):
        late.wait("node.joined", node=name)


def test_stdin_of_a_console_node_that_ends_is_a_goodbye(fleet: Fleet) -> None:
    import subprocess

    a = fleet.agent("a").start()
    a.wait("node.ready")
    console = fleet.agent("desk", "--stdin-goodbye", kind="console")
    read, write = os.pipe()
    console.process = subprocess.Popen(console.argv, stdin=read, stderr=subprocess.PIPE, env=console.env)
    os.close(read)
    a.wait("node.joined", node="desk")
    os.close(write)
    assert a.wait("node.evicted", node="desk")["source"] == "left"
    _, log = console.process.communicate(timeout=10)
    assert b'"console_exit"' in log
