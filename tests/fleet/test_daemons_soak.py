"""Ten minutes of a fleet with a crashing, a slow-to-stop, a hanging and a healthy daemon, looked at from every node."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.fleet.harness import Fleet, wait_for
from tests.fleet.test_chains import op as handed
from tests.fleet.test_daemons import (
    alive,
    apply,
    daemons,
    in_maintenance,
    journal_of,
    op,
    replayed,
    row,
    settled,
)
from tests.fleet.test_daemons import fleet as fleet

pytestmark = [pytest.mark.fleet, pytest.mark.soak, pytest.mark.timeout(1500)]

SPEC = """
[[daemon]]
name = "healthy"
command = ["sh", "-c", "exec sleep 3600"]
on = "kind=compute"
all = true
health = { exec = ["true"], interval_s = 5 }

[[daemon]]
name = "crashing"
command = ["sh", "-c", "sleep 0.2; exit 7"]
on = "node=one"

[[daemon]]
name = "slow"
command = ["sh", "-c", "trap 'sleep 8; exit 0' TERM; while :; do sleep 0.1; done"]
on = "node=two"
grace_s = 20

[[daemon]]
name = "hanging"
command = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
on = "node=three"
grace_s = 2
readiness = "sd_notify"
start_timeout_s = 86400
"""
NAMES = ("one", "two", "three")
WELL = {
    "one_healthy": "running",
    "two_healthy": "running",
    "three_healthy": "running",
    "two_slow": "running",
    "three_hanging": "starting",
}
MINUTES = 10
LOOP_S = 300
"""Of a crash loop: after it, the crasher is tried again."""
CRASHER = frozenset({"crash_looping", "backing_off", "starting", "running"})


Pids = dict[tuple[str, str], int]


def pids_of(fleet: Fleet, via: str) -> Pids:
    """The processes of all but the crashing one, as that node shows them."""
    return {key: r["pid"] for key, r in daemons(fleet, via).items() if key != ("one", "crashing")}


def look(fleet: Fleet, ends: float, pids: Pids) -> list[str]:
    """Looks from every node in turn until then: everything that was shown otherwise than it should be."""
    wrong: list[str] = []
    looks = 0
    while time.monotonic() < ends:
        for via in NAMES:
            found = daemons(fleet, via)
            shown = {f"{node}_{name}": r["state"] for (node, name), r in found.items()}
            crasher = shown.pop("one_crashing", "missing")
            if shown != WELL or crasher not in CRASHER:
                wrong.append(f"{via}: {shown} {crasher}")
                continue
            others = {key: r["pid"] for key, r in found.items() if key != ("one", "crashing")}
            if others != pids:
                wrong.append(f"{via}: {others} instead of {pids}")
            if crasher == "crash_looping":
                state = row(fleet, "one", via)["state"]
                if state != "degraded" and daemons(fleet, via)["one", "crashing"]["state"] == "crash_looping":
                    wrong.append(f"{via}: one is {state} while its daemon loops")
            if (health := found["two", "healthy"]["health"]) != "healthy":
                wrong.append(f"{via}: healthy is {health}")
            for other in ("two", "three"):
                if (state := row(fleet, other, via)["state"]) != "alive":
                    wrong.append(f"{via}: {other} is {state}")
            looks += 1
        time.sleep(1)
    assert looks > 30
    return wrong


def through_maintenance(fleet: Fleet, ended: str) -> None:
    """What every node shows of two once its maintenance came to this end."""
    for via in NAMES:
        in_maintenance(fleet, "two", via, ended, 30)
        wait_for(
            lambda via=via: (
                {r["state"] for (node, _), r in daemons(fleet, via).items() if node == "two"} == {"stopped"}
            ),
            f"{via} shows that two is empty",
        )
        shown = row(fleet, "two", via)
        assert shown["state"] == "draining" and not shown["cordoned"]


def test_ten_minutes_of_good_and_bad_daemons_with_the_right_states_throughout(
    fleet: Fleet, tmp_path: Path
) -> None:
    records = {name: tmp_path / f"{name}.jsonl" for name in NAMES}
    agents = [fleet.agent(name, "--record", str(records[name])).start() for name in NAMES]
    fleet.converged(agents)
    one, two, _ = agents
    apply(fleet, tmp_path, SPEC)
    loops = {**WELL, "one_crashing": "crash_looping"}
    first = settled(fleet, "two", 60, **loops)
    ends = time.monotonic() + MINUTES * 60
    wrong = look(fleet, time.monotonic() + 120, pids_of(fleet, "two"))

    # maintenance of the slow one's node: inside its deadline, and outside it
    slow = first["two", "slow"]["pid"]
    op(fleet, "one", "maintenance", "enter", "two", "--deadline", "60s")
    through_maintenance(fleet, "maintenance")
    assert not alive(slow)
    op(fleet, "three", "maintenance", "exit", "two")
    for via in NAMES:
        in_maintenance(fleet, "two", via, "recovery", 30)
    settled(fleet, "three", 30, **loops)
    slow = daemons(fleet, "three")["two", "slow"]["pid"]
    op(fleet, "one", "maintenance", "enter", "two", "--deadline", "2s")
    for via in NAMES:
        in_maintenance(fleet, "two", via, "drain_failed", 30)
        assert "not empty after 2 s: 1 daemon running (slow)" in row(fleet, "two", via)["reason"]
    through_maintenance(fleet, "drain_failed")
    assert not alive(slow), "what a failed drain asked to end ends all the same"
    op(fleet, "one", "maintenance", "exit", "two")
    recovered = time.monotonic()
    for via in NAMES:
        in_maintenance(fleet, "two", via, "recovery", 60)
    settled(fleet, "one", 60, **loops)
    trail = [(e["from"], e["to"]) for e in two.of("node.maintenance")]
    walk = ("entering_maintenance", "maintenance", "exiting_maintenance", "recovery")
    assert trail == [
        (walk[0], walk[1]), (walk[2], walk[3]), (walk[0], "drain_failed"), (walk[2], walk[3]),
    ]  # fmt: skip

    # all agents are killed: their daemons run on, and are their successors'; a crash loop stays closed
    before = pids_of(fleet, "one")
    for agent in agents:
        assert handed(fleet, agent, "uncordon")["result"] == "done", (
            "what waits in its journal is in the file"
        )
    looked_at = time.monotonic()
    left_s = daemons(fleet, "two")["one", "crashing"]["until_ms"] / 1000
    assert left_s > 30, "or it would not be closed while its agent is away"
    for agent in agents:
        agent.signal(signal.SIGKILL)
        agent.wait_exit()
    assert all(alive(pid) for pid in before.values())
    for agent in agents:
        agent.start()
    fleet.converged(agents)
    settled(fleet, "one", 60, **loops)
    for via in NAMES:
        assert pids_of(fleet, via) == before, "none was doubled or started again"
    wait_for(
        lambda: all(row(fleet, n, v)["state"] == "alive" for n in ("two", "three") for v in NAMES),
        "all alive",
    )
    for agent in agents:
        started = [e["daemon"] for e in agent.of("daemon.started") if e["daemon"] != "crashing"]
        assert sorted(started) == sorted(
            name for node, name in before if node == agent.name and name != "hanging"
        )
    wait_for(
        lambda: all(daemons(fleet, via)["two", "healthy"]["health"] == "healthy" for via in NAMES),
        "it was checked again: nobody knows before that",
    )
    wrong += look(fleet, min(ends, recovered + 290), before)
    for via in NAMES:
        in_maintenance(fleet, "two", via, "active", recovered + 330 - time.monotonic())
    wrong += look(fleet, ends, before)
    assert not wrong, "\n".join(wrong[:20])
    tried = one.of("daemon.started", daemon="crashing")
    assert tried and tried[0]["seen_at"] >= looked_at + left_s, "the killed agent's successor kept its gate"
    for agent in agents:
        assert agent.running and not agent.of("node.defect")
        agent.stop()
        files = (records[agent.name].with_name(f"{agent.name}.jsonl.1"), records[agent.name])
        assert journal_of(fleet, agent.name) == replayed(fleet, *files), agent.name
