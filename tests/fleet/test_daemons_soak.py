"""Ten minutes of a fleet with a crashing, a slow-to-stop, a hanging and a healthy daemon, looked at from every node."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.fleet.harness import Fleet, wait_for
from tests.fleet.test_daemons import alive, apply, daemons, in_maintenance, op, row, settled
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


def look(fleet: Fleet, ends: float) -> list[str]:
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


def test_ten_minutes_of_good_and_bad_daemons_with_the_right_states_throughout(
    fleet: Fleet, tmp_path: Path
) -> None:
    one, two, three = fleet.boot(*NAMES)
    apply(fleet, tmp_path, SPEC)
    loops = {**WELL, "one_crashing": "crash_looping"}
    first = settled(fleet, "two", 60, **loops)
    ends = time.monotonic() + MINUTES * 60
    wrong = look(fleet, time.monotonic() + 120)

    # maintenance of the slow one's node: inside its deadline, and outside it
    slow = first["two", "slow"]["pid"]
    op(fleet, "one", "maintenance", "enter", "two", "--deadline", "60s")
    for via in NAMES:
        in_maintenance(fleet, "two", via, "maintenance", 30)
    assert not alive(slow) and row(fleet, "two", "three")["state"] == "draining"
    op(fleet, "three", "maintenance", "exit", "two")
    for via in NAMES:
        in_maintenance(fleet, "two", via, "recovery", 30)
    settled(fleet, "three", 30, **loops)
    op(fleet, "one", "maintenance", "enter", "two", "--deadline", "2s")
    for via in NAMES:
        in_maintenance(fleet, "two", via, "drain_failed", 30)
    assert "slow" in row(fleet, "two", "one")["reason"]
    op(fleet, "one", "maintenance", "exit", "two")
    recovered = time.monotonic()
    for via in NAMES:
        in_maintenance(fleet, "two", via, "recovery", 60)
    settled(fleet, "one", 60, **loops)

    # an agent is killed: its daemons run on, and are its successor's
    before = daemons(fleet, "one")
    for agent in (two, three):
        agent.signal(signal.SIGKILL)
        agent.wait_exit()
    assert all(alive(r["pid"]) for (node, _), r in before.items() if node in ("two", "three"))
    for agent in (two, three):
        agent.start()
    fleet.converged([two, three])
    again = settled(fleet, "one", 60, **loops)
    for key in (("two", "slow"), ("two", "healthy"), ("three", "healthy"), ("three", "hanging")):
        assert again[key]["pid"] == before[key]["pid"], f"{key} was doubled or started again"
    wait_for(
        lambda: all(row(fleet, n, v)["state"] == "alive" for n in ("two", "three") for v in NAMES),
        "all alive",
    )
    for via in NAMES:
        in_maintenance(fleet, "two", via, "active", recovered + 330 - time.monotonic())
    wrong += look(fleet, ends)
    assert not wrong, "\n".join(wrong[:20])
    assert one.running and not one.of("node.defect")
