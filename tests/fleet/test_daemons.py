"""Real agents that run real daemons of a spec: crashing, slow to stop, hanging and well ones, drained and taken up again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.chain.record import Dispatched
from agent.chain.store import Journal
from agent.daemons.leftovers import end_leftovers
from agent.daemons.process import stat_of
from agent.home import make_identity, read_identity
from tests.fleet.harness import Agent, Fleet, wait_for
from tui.client import Client

pytestmark = pytest.mark.fleet

STEADY = """
[[daemon]]
name = "steady"
command = ["sh", "-c", "echo steady on $QD_NODE; exec sleep 3600"]
on = "kind=compute"
all = true
"""
STUBBORN = """
[[daemon]]
name = "stubborn"
command = ["sh", "-c", "trap '' TERM; trap 'echo told to drain' USR1; while :; do sleep 0.1; done"]
on = "node=two"
grace_s = GRACE
control = { drain_start = "SIGUSR1" }
"""
BROKEN = """
[[daemon]]
name = "crasher"
command = ["sh", "-c", "echo about to fail; exit 3"]
on = "node=one"

[[daemon]]
name = "hanging"
command = ["sleep", "3600"]
readiness = "sd_notify"
start_timeout_s = 600
on = "node=one"
"""

Found = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture
def fleet(fleet: Fleet) -> Iterator[Fleet]:
    """A home whose daemons are ended after the test, whatever became of their agents."""
    try:
        yield fleet
    finally:
        fleet.__exit__()
        end_leftovers(fleet.home / "state")


def apply(fleet: Fleet, tmp_path: Path, spec: str, via: str = "one") -> dict[str, Any]:
    path = tmp_path / "fleet.toml"
    path.write_text(spec)
    done = fleet.qd_json("apply", str(path), "--via", via)
    assert done[0]["result"] == "done", done
    return dict(done[0])


def daemons(fleet: Fleet, via: str = "one") -> Found:
    rows = fleet.ask(fleet.agents[via], lambda client: client.daemons())["rows"]
    return {(row["node"], row["name"]): row for row in rows}


def settled(fleet: Fleet, via: str, timeout_s: float = 30, **states: str) -> Found:
    """All daemons, once exactly these (NODE_NAME=state) are not stopped."""
    wanted = {tuple(key.split("_", 1)): state for key, state in states.items()}

    def look() -> Any:
        found = daemons(fleet, via)
        return (
            found if {k: r["state"] for k, r in found.items() if r["state"] != "stopped"} == wanted else None
        )

    return dict(wait_for(look, f"{wanted}; there is {daemons(fleet, via)}", timeout_s, 0.1))


def row(fleet: Fleet, node: str, via: str) -> dict[str, Any]:
    rows = fleet.ask(fleet.agents[via], lambda client: client.nodes())
    return next(r for r in rows if r["name"] == node)


def op(fleet: Fleet, via: str, *words: str) -> dict[str, Any]:
    return dict(fleet.qd_json(*words, "--via", via)[0])


def in_maintenance(fleet: Fleet, node: str, via: str, state: str, timeout_s: float = 15) -> None:
    wait_for(lambda: row(fleet, node, via)["maintenance"] == state, f"{node}: {state}", timeout_s, 0.1)


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has reaped yet does not."""
    found = stat_of(pid)
    return found is not None and found.state != "Z"


def journal_of(fleet: Fleet, node: str) -> Counter[str]:
    """The actions that were dispatched, by the journal of a node that has ended."""
    place = fleet.home / "state" / "alpha" / node
    with Journal(place / "journal.db", read_identity(place / "identity_ed25519", "node key")) as journal:
        return Counter(
            json.dumps({"kind": record.kind.removeprefix("action."), **record.body}, sort_keys=True)
            for record in journal.tail(10_000)
            if record.kind.startswith("action.") and isinstance(record.disposition, Dispatched)
        )


def replayed(fleet: Fleet, *files: Path) -> Counter[str]:
    """The actions of recorded runs, as `qd replay` tells them."""
    found: Counter[str] = Counter()
    for path in files:
        done = fleet.qd("replay", str(path))
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            found.update(json.dumps(action, sort_keys=True) for action in json.loads(line).get("actions", []))
    return found


def test_spec_runs_is_drained_and_comes_back(fleet: Fleet, tmp_path: Path) -> None:
    _, two = fleet.boot("one", "two")
    told = apply(fleet, tmp_path, STEADY + STUBBORN.replace("GRACE", "1"))
    assert sorted(told["nodes"]["reached"]) == ["one", "two"] and told["recorded"] == "replicated"
    states = {"one_steady": "running", "two_steady": "running", "two_stubborn": "running"}
    pid = settled(fleet, "one", **states)["two", "stubborn"]["pid"]
    answer = op(fleet, "one", "maintenance", "enter", "two", "--deadline", "30s")
    assert (answer["result"], answer["state"], answer["op"]) == ("accepted", "draining", "maintenance_enter")

    async def told_to_drain(client: Client) -> bool:
        async with (
            asyncio.timeout(10),
            contextlib.aclosing(client.daemon_log(two_id, "stubborn", 100, follow=True)) as lines,
        ):
            async for line in lines:
                if line["line"] == "told to drain":
                    return True
        return False

    two_id = row(fleet, "two", "one")["id"]
    assert fleet.ask(fleet.agents["one"], told_to_drain)
    in_maintenance(fleet, "two", "one", "maintenance")
    assert not alive(pid), "killed at the end of its grace"
    assert settled(fleet, "one", one_steady="running")["two", "stubborn"]["state"] == "stopped"
    refused = op(fleet, "one", "resume", "two")
    assert (refused["result"], refused["code"]) == ("refused", "in_maintenance")
    assert op(fleet, "one", "maintenance", "exit", "two")["result"] == "accepted"
    in_maintenance(fleet, "two", "one", "recovery")
    assert settled(fleet, "one", **states)["two", "stubborn"]["pid"] != pid
    assert two.trail == ["joining", "alive", "draining", "alive"]


def test_incident_of_a_crashing_daemon_is_shown_and_replays_as_it_was(fleet: Fleet, tmp_path: Path) -> None:
    record = tmp_path / "run.jsonl"
    one, two = fleet.agent("one", "--record", str(record)), fleet.agent("two")
    one.start(), two.start()
    fleet.converged([one, two])
    apply(fleet, tmp_path, BROKEN)
    found = settled(fleet, "two", one_crasher="crash_looping", one_hanging="starting")
    crasher = found["one", "crasher"]
    assert crasher["until_ms"] > 250_000 and crasher["pid"] is None
    assert "exit status 3: about to fail" in crasher["reason"]
    seen = row(fleet, "one", "two")
    assert seen["state"] == "degraded" and "crasher" in seen["reason"], "a crash loop degrades its node"
    assert fleet.qd("logs", "one/crasher", "--via", "two").stdout.count("about to fail") == 5
    failures = fleet.ask(two, lambda client: client.failures())["rows"]
    assert sum(f["node"] == "one" and f["target"] == "crasher" for f in failures) >= 5
    assert op(fleet, "two", "restart-daemons", "one")["result"] == "done"
    again = settled(fleet, "two", one_crasher="crash_looping", one_hanging="starting")["one", "crasher"]
    assert again["restarts"] == crasher["restarts"] and again["until_ms"] < crasher["until_ms"]
    answer = op(fleet, "two", "update", "one", "--wait", "alive")
    assert answer["result"] == "accepted", answer
    wait_for(
        lambda: daemons(fleet, "two").get(("one", "crasher"), {}).get("restarts"),
        "it crashes in the new process, too",
    )
    op(fleet, "two", "maintenance", "enter", "one")
    in_maintenance(fleet, "one", "two", "maintenance")
    one.stop()
    dispatched = journal_of(fleet, "one")
    assert dispatched == replayed(fleet, record.with_name("run.jsonl.1"), record)
    starts = [n for action, n in dispatched.items() if "start_daemon" in action and "crasher" in action]
    assert sum(starts) > 5, "those of the updated process too"


def test_drain_that_is_not_met_in_time_fails_with_its_reason(fleet: Fleet, tmp_path: Path) -> None:
    _, two = fleet.boot("one", "two")
    apply(fleet, tmp_path, STUBBORN.replace("GRACE", "25"))
    pid = settled(fleet, "one", two_stubborn="running")["two", "stubborn"]["pid"]
    op(fleet, "one", "maintenance", "enter", "two", "--deadline", "60s")
    two.signal(signal.SIGKILL)
    two.wait_exit()
    two.start()
    two.wait("node.state_changed", to="draining")
    seen = wait_for(lambda: (r := fleet.rows(two)["two"])["maintenance_until_ms"] and r, "its deadline")
    assert seen["maintenance"] == "entering_maintenance" and seen["maintenance_until_ms"] > 30_000
    assert op(fleet, "one", "maintenance", "enter", "two", "--deadline", "1s")["result"] == "accepted"
    in_maintenance(fleet, "two", "one", "drain_failed")
    seen = row(fleet, "two", "one")
    assert seen["state"] == "draining" and "stubborn" in seen["reason"]
    page = wait_for(
        lambda: (
            (p := fleet.ask(two, lambda client: client.node(client.id)))["local_maintenance"]["reason"] and p
        ),
        "its page says why",
    )
    assert page["local_maintenance"]["reason"].endswith(" s: 1 daemon running (stubborn)")
    two.signal(signal.SIGKILL)
    two.wait_exit()
    two.start()
    two.wait("node.state_changed", to="draining")
    assert row(fleet, "two", "two")["maintenance"] == "drain_failed", "it outlives the agent"
    assert op(fleet, "one", "maintenance", "exit", "two")["result"] == "accepted"
    op(fleet, "one", "drain", "two", "--deadline", "1s")
    two.signal(signal.SIGKILL)
    two.wait_exit()
    two.start()
    two.wait("node.state_changed", to="draining")
    page = fleet.ask(two, lambda client: client.node(client.id))
    assert page["node"]["cordoned"] and "stubborn" in str(page["local"]["drain"]["left"])
    assert alive(pid), "it has 25 s"
    two.signal(signal.SIGKILL)
    two.wait_exit()


def test_killed_agents_leave_their_daemons_and_take_them_up_again(fleet: Fleet, tmp_path: Path) -> None:
    one, two = fleet.boot("one", "two")
    spec = STEADY + STUBBORN.replace("GRACE", "1")
    apply(fleet, tmp_path, spec)
    states = {"one_steady": "running", "two_steady": "running", "two_stubborn": "running"}
    found = settled(fleet, "one", **states)
    two.signal(signal.SIGKILL)
    two.wait_exit()
    pids = {key: r["pid"] for key, r in found.items()}
    assert all(alive(pid) for pid in pids.values())
    counted = "".join(f'[[daemon]]\nname = "c{n}"\ncommand = ["sleep", "3600"]\n' for n in range(6))
    late = counted + '[[daemon]]\nname = "late"\ncommand = ["sleep", "3600"]\non = "node=two"\n'
    assert apply(fleet, tmp_path, spec + late)["recorded"] == "local"
    two.start()
    two.wait("node.ready")

    def all_run() -> Found:
        found = {key: r for key, r in daemons(fleet).items() if r["state"] == "running"}
        return found if len(found) == len({name for _, name in found}) + 1 == 10 else {}

    again = wait_for(all_run, "what is pinned and each counted one once", step_s=0.1)
    assert {key: again[key]["pid"] for key in pids} == pids
    pids = {key: r["pid"] for key, r in again.items()}
    assert again["two", "steady"]["restarts"] == 0, "and it got the spec of the time when it was away"

    for agent in (one, two):
        agent.signal(signal.SIGKILL)
        agent.wait_exit()
    for agent in (one, two):
        agent.start()
    fleet.converged([one, two])
    again = wait_for(all_run, "all taken up again", step_s=0.1)
    assert {key: r["pid"] for key, r in again.items()} == pids, "the spec survives the end of all agents"
    started = [e["daemon"] for agent in (one, two) for e in agent.of("daemon.started")]
    assert sorted(started) == sorted(name for _, name in pids), "none was doubled, not for a moment"

    mine = {key for key in pids if key[0] == "two"}
    assert op(fleet, "one", "restart-daemons", "two")["reason"] == f"{len(mine)} daemons restart"
    wait_for(
        lambda: (found := all_run()) and all(found[key]["restarts"] == 1 for key in mine),
        "all of two started again",
        step_s=0.1,
    )
    pids = {key: r["pid"] for key, r in all_run().items()}
    assert all(pids[key] != again[key]["pid"] for key in mine)
    op(fleet, "one", "kill", "two")
    two.wait_exit(15)
    assert not any(alive(pid) for (node, _), pid in pids.items() if node == "two"), "a goodbye ends them"
    assert two.trail[-2:] == ["draining", "leaving"]
    assert two.of("node.state_changed", to="draining")[0]["reason"] == "stopping"


def test_update_of_a_cordoned_node_keeps_its_daemons_and_those_that_opt_out_running(
    fleet: Fleet, tmp_path: Path
) -> None:
    _, two = fleet.boot("one", "two")
    pinned = '[[daemon]]\nname = "NAME"\ncommand = ["sleep", "3600"]\non = "node=two"\n'
    counted = "".join(f'[[daemon]]\nname = "c{n}"\ncommand = ["sleep", "3600"]\n' for n in range(8))
    stays = pinned.replace("NAME", "stays") + "restart_on_update = false\n"
    apply(fleet, tmp_path, stays + pinned.replace("NAME", "goes") + counted)

    def running() -> Found:
        rows = {key: r for key, r in daemons(fleet).items() if r["state"] == "running"}
        return rows if len(rows) == 10 else {}

    before = wait_for(running, "all run", step_s=0.1)
    assert op(fleet, "one", "cordon", "two")["result"] == "done"
    answer = op(fleet, "one", "update", "two", "--wait", "alive")
    assert answer["result"] == "accepted", answer
    after = wait_for(running, "all run again", step_s=0.1)
    assert after.keys() == before.keys(), "none has moved"
    assert after["two", "stays"]["pid"] == before["two", "stays"]["pid"]
    assert after["two", "goes"]["pid"] != before["two", "goes"]["pid"]
    two.stop()
    assert not alive(after["two", "stays"]["pid"]), "reaped by the process that took its parent's place"


def test_counted_daemon_moves_from_a_dead_node_and_stays_on_a_cordoned_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.boot("one", "two", "three")
    apply(fleet, tmp_path, '[[daemon]]\nname = "single"\ncommand = ["sleep", "3600"]\ncount = 1\n')

    def where(via: str) -> list[str]:
        return [node for (node, _), r in daemons(fleet, via).items() if r["state"] == "running"]

    home = wait_for(lambda: where("one"), "it runs somewhere", step_s=0.1)
    assert len(home) == 1
    other = next(name for name in ("one", "two", "three") if name != home[0])
    assert op(fleet, other, "cordon", home[0])["result"] == "done"
    wait_for(lambda: row(fleet, home[0], other)["cordoned"], "the cordon is seen", step_s=0.1)
    assert where(other) == home
    agent: Agent = fleet.agents[home[0]]
    agent.signal(signal.SIGKILL)
    wait_for(lambda: where(other) not in ([], home), "another node runs it", 15, 0.1)


def test_operator_without_admin_may_not_apply(fleet: Fleet, tmp_path: Path) -> None:
    fleet.agent("one").start().wait("node.ready")
    spec = tmp_path / "fleet.toml"
    spec.write_text('[[daemon]]\nname = "x"\ncommand = ["true"]\n')
    key = tmp_path / "operator"
    line = make_identity(key, "someone").pub_openssh("someone")
    operators = fleet.home / "config" / "authorized_operators"
    operators.write_text(f'{operators.read_text()}environment="QD_ROLE=operate" {line}\n')
    done = fleet.qd("apply", str(spec), "--via", "one", "--json", "--operator-key", str(key))
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout)[0]["result"] == "refused"
    assert daemons(fleet) == {}
