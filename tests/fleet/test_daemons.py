"""Real agents that run real daemons of a spec: crashing, slow to stop, hanging and well ones, drained and taken up again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
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
from tests.fleet.test_chains import op as handed
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
command = ["sh", "-c", "trap '' TERM; trap 'echo told to drain' USR1; echo deaf; while :; do sleep 0.1; done"]
on = "node=two"
grace_s = GRACE
control = { drain_start = "SIGUSR1" }
"""
SLOW = """
[[daemon]]
name = "slow"
command = ["PYTHON", "-S", "SCRIPT", "READY"]
readiness = "sd_notify"
on = "node=two"
"""
SLOW_SCRIPT = """
import os, socket, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1))
time.sleep(3600)
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

SLEEPS = """
[[daemon]]
name = "NAME"
command = ["sleep", "3600"]
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


def settled(fleet: Fleet, via: str, timeout_s: float = 30, *, crashing: bool = False, **states: str) -> Found:
    """All daemons, once exactly these (NODE_NAME=state) are not stopped; one that is `crashing` may be in any state."""
    wanted = {tuple(key.split("_", 1)): state for key, state in states.items()}

    def look() -> Any:
        found = daemons(fleet, via)
        shown = {k: r["state"] for k, r in found.items() if r["state"] != "stopped"}
        if crashing:
            shown.pop(("one", "crasher"), None)
        return found if shown == wanted else None

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


def slow(tmp_path: Path) -> str:
    """The spec of a daemon that is ready once the file `ready` is there."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_SCRIPT)
    words = {"PYTHON": sys.executable, "SCRIPT": str(script), "READY": str(tmp_path / "ready")}
    spec = SLOW
    for word, path in words.items():
        spec = spec.replace(word, path)
    return spec


def deaf(fleet: Fleet) -> None:
    """Waits until the stubborn one heeds no SIGTERM any more."""
    log = fleet.home / "state" / "alpha" / "two" / "daemons" / "stubborn" / "log"
    wait_for(lambda: "deaf" in log.read_text(), "it is deaf")


def told_to_drain(fleet: Fleet, via: str, node: str, daemon: str) -> bool:
    """Whether the log of a daemon, followed from another node, comes to say so."""
    followed = row(fleet, node, via)["id"]

    async def read(client: Client) -> bool:
        async with (
            asyncio.timeout(10),
            contextlib.aclosing(client.daemon_log(followed, daemon, 100, follow=True)) as lines,
        ):
            async for line in lines:
                if line["line"] == "told to drain":
                    return True
        return False

    return bool(fleet.ask(fleet.agents[via], read))


def still_looping(fleet: Fleet, one: Agent, before: dict[str, Any]) -> dict[str, Any]:
    """The crash loop as the process that has just taken the place of another shows it from its start."""
    one.wait("node.ready")
    crasher = wait_for(lambda: daemons(fleet, "one").get(("one", "crasher")), "one knows the crash loop")
    assert crasher["state"] == "crash_looping" and "exit status 3: about to fail" in crasher["reason"]
    assert 0 < crasher["until_ms"] < before["until_ms"] and crasher["age_ms"] > before["age_ms"]
    return dict(crasher)


def test_incident_on_two_nodes_is_shown_survived_and_replays_as_it_was(fleet: Fleet, tmp_path: Path) -> None:
    record, ready = tmp_path / "run.jsonl", tmp_path / "ready"
    ready.touch()
    one, two = fleet.agent("one", "--record", str(record)).start(), fleet.agent("two").start()
    fleet.converged([one, two])
    spec = STEADY + STUBBORN.replace("GRACE", "0.5") + slow(tmp_path) + BROKEN
    told = apply(fleet, tmp_path, spec)
    assert sorted(told["nodes"]["reached"]) == ["one", "two"] and told["recorded"] == "replicated"
    states = {
        "one_steady": "running",
        "two_steady": "running",
        "two_stubborn": "running",
        "two_slow": "running",
    }
    states["one_hanging"] = "starting"
    pid = settled(fleet, "one", crashing=True, **states)["two", "stubborn"]["pid"]
    deaf(fleet)

    # the maintenance of one node, while a daemon of the other comes to loop
    answer = op(fleet, "one", "maintenance", "enter", "two", "--deadline", "30s")
    assert (answer["result"], answer["state"], answer["op"]) == ("accepted", "draining", "maintenance_enter")
    assert told_to_drain(fleet, "one", "two", "stubborn")
    in_maintenance(fleet, "two", "one", "maintenance")
    assert not alive(pid), "killed at the end of its grace"
    assert all(r["state"] == "stopped" for (node, _), r in daemons(fleet).items() if node == "two")
    refused = handed(fleet, two, "resume")
    assert (refused["result"], refused["code"]) == ("refused", "in_maintenance")
    ready.unlink()
    assert handed(fleet, two, "maintenance_exit")["result"] == "accepted"
    states["two_slow"] = "starting"
    assert settled(fleet, "one", crashing=True, **states)["two", "stubborn"]["pid"] != pid
    assert two.trail == ["joining", "alive", "draining", "alive"]
    two.signal(signal.SIGKILL)
    two.wait_exit()
    late = '[[daemon]]\nname = "late"\ncommand = ["sleep", "3600"]\non = "node=two"\n'
    assert apply(fleet, tmp_path, spec + late)["recorded"] == "local"
    one.signal(signal.SIGSTOP)  # nobody answers it, so for 2 s it doesn't know what it shall run
    two.start().wait("node.ready")
    mine = {"steady": "running", "stubborn": "running", "slow": "starting"}
    wait_for(
        lambda: {r["name"]: r["state"] for r in daemons(fleet, "two").values() if r["node"] == "two"} == mine,
        "it runs again what it ran",
        step_s=0.1,
    )
    one.signal(signal.SIGCONT)
    ready.touch()
    in_maintenance(fleet, "two", "one", "recovery")
    order = [(e["kind"], e.get("daemon")) for e in two.events]
    assert order.index(("daemon.started", "slow")) < order.index(("node.maintenance", None)), (
        "a killed agent comes back to an exit that waits for what shall run"
    )
    states |= {"two_slow": "running", "two_late": "running"}  # of the spec of the time when it was away

    # the crash loop
    found = settled(fleet, "two", one_crasher="crash_looping", **states)
    crasher = found["one", "crasher"]
    assert crasher["until_ms"] > 250_000 and crasher["pid"] is None
    assert "exit status 3: about to fail" in crasher["reason"]
    seen = row(fleet, "one", "two")
    assert seen["state"] == "degraded" and "crasher" in seen["reason"], "a crash loop degrades its node"
    assert fleet.qd("logs", "one/crasher", "--via", "two").stdout.count("about to fail") == 5
    failures = fleet.ask(two, lambda client: client.failures())["rows"]
    assert sum(f["node"] == "one" and f["target"] == "crasher" for f in failures) >= 5
    assert handed(fleet, one, "restart_daemons")["result"] == "done"
    again = settled(fleet, "two", one_crasher="crash_looping", **states)["one", "crasher"]
    assert again["restarts"] == crasher["restarts"] and again["until_ms"] < crasher["until_ms"]
    assert handed(fleet, one, "uncordon")["result"] == "done", "what waits in its journal is in the file"
    one.signal(signal.SIGKILL)
    one.wait_exit()
    one.start()
    again = still_looping(fleet, one, again)
    fleet.converged([one])
    answer = op(fleet, "two", "update", "one", "--wait", "degraded")
    assert answer["result"] == "accepted", answer
    still_looping(fleet, one, again)
    assert row(fleet, "one", "two")["reason"] == "daemon crasher crash-looping"
    handed(fleet, one, "maintenance_enter")
    in_maintenance(fleet, "one", "two", "maintenance")
    one.stop()
    dispatched = journal_of(fleet, "one")
    assert dispatched == replayed(
        fleet, record.with_name("run.jsonl.1"), record.with_name("run.jsonl.2"), record
    )
    starts = [n for action, n in dispatched.items() if "start_daemon" in action and "crasher" in action]
    assert sum(starts) == 5, "neither a restart nor an operator opens its gate"
    handed(fleet, two, "kill")
    two.wait_exit(15)
    assert two.trail[-2:] == ["draining", "leaving"], "a goodbye ends its daemons first"
    assert two.of("node.state_changed", to="draining")[-1]["reason"] == "stopping"


def test_drain_that_is_not_met_in_time_fails_with_its_reason(fleet: Fleet, tmp_path: Path) -> None:
    _, two = fleet.boot("one", "two")
    apply(fleet, tmp_path, STUBBORN.replace("GRACE", "25"))
    pid = settled(fleet, "one", two_stubborn="running")["two", "stubborn"]["pid"]
    deaf(fleet)
    handed(fleet, two, "maintenance_enter", deadline_ms=60_000)
    two.signal(signal.SIGKILL)
    two.wait_exit()
    two.start()
    two.wait("node.state_changed", to="draining")
    seen = wait_for(lambda: (r := fleet.rows(two)["two"])["maintenance_until_ms"] and r, "its deadline")
    assert seen["maintenance"] == "entering_maintenance" and seen["maintenance_until_ms"] > 30_000
    assert handed(fleet, two, "maintenance_enter", deadline_ms=1000)["result"] == "accepted"
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
    assert handed(fleet, two, "maintenance_exit")["result"] == "accepted"
    handed(fleet, two, "drain", deadline_ms=1000)
    two.signal(signal.SIGKILL)
    two.wait_exit()
    two.start()
    two.wait("node.state_changed", to="draining")
    page = fleet.ask(two, lambda client: client.node(client.id))
    assert page["node"]["cordoned"] and "stubborn" in str(page["local"]["drain"]["left"])
    assert alive(pid), "it has 25 s"
    two.signal(signal.SIGKILL)
    two.wait_exit()


def test_daemons_outlive_killed_updated_and_dead_agents_and_none_is_doubled(
    fleet: Fleet, tmp_path: Path
) -> None:
    one, two = fleet.boot("one", "two")
    needs = ("", "resources = { cpu = 0.01 }\n")
    counted = "".join(SLEEPS.replace("NAME", f"c{n}") + needs[n % 2] for n in range(6))
    stays = '[[daemon]]\nname = "stays"\ncommand = ["sleep", "3600"]\non = "node=two"\nrestart_on_update = false\n'
    apply(fleet, tmp_path, STEADY + STUBBORN.replace("GRACE", "0.5") + counted + stays)

    def all_run() -> Found:
        found = {key: r for key, r in daemons(fleet).items() if r["state"] == "running"}
        return found if len(found) == len({name for _, name in found}) + 1 == 10 else {}

    found = wait_for(all_run, "what is pinned and each counted one once", step_s=0.1)
    pids = {key: r["pid"] for key, r in found.items()}
    for agent in (one, two):
        agent.signal(signal.SIGKILL)
        agent.wait_exit()
    assert all(alive(pid) for pid in pids.values())
    for agent in (one, two):
        agent.start()
    fleet.converged([one, two])
    again = wait_for(all_run, "all taken up again", step_s=0.1)
    assert {key: r["pid"] for key, r in again.items()} == pids, "the spec survives the end of all agents"
    assert again["two", "steady"]["restarts"] == 0
    started = [e["daemon"] for agent in (one, two) for e in agent.of("daemon.started")]
    assert sorted(started) == sorted(name for _, name in pids), "none was doubled, not for a moment"

    mine = {key for key in pids if key[0] == "two"}
    assert op(fleet, "one", "restart-daemons", "two")["reason"] == f"{len(mine)} daemons restart"
    wait_for(
        lambda: (found := all_run()) and all(found[key]["restarts"] == 1 for key in mine),
        "all of two started again",
        step_s=0.1,
    )
    before = all_run()
    assert all(before[key]["pid"] != pids[key] for key in mine)

    # a cordon keeps them where they are, an update too, and one that opts out runs through it
    assert handed(fleet, two, "cordon")["result"] == "done"
    answer = op(fleet, "one", "update", "two", "--wait", "alive")
    assert answer["result"] == "accepted", answer
    after = wait_for(all_run, "all run again", step_s=0.1)
    assert after.keys() == before.keys(), "none has moved"
    assert after["two", "stays"]["pid"] == before["two", "stays"]["pid"]
    assert after["two", "steady"]["pid"] != before["two", "steady"]["pid"]


def test_counted_daemon_moves_from_a_dead_node_and_stays_on_a_cordoned_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    """And one with resources goes where it fits, takes nobody's place, and is held back with its reason elsewhere."""
    fleet.boot("one", "two", "three")
    single = SLEEPS.replace("NAME", "single")
    memory = int(row(fleet, "one", "one")["capacity"]["memory"] * 0.6)
    sized = f"{SLEEPS}count = 2\nresources = {{ cpu = 0.001, memory = {memory} }}\n"
    apply(fleet, tmp_path, single + sized.replace("NAME", "large"))

    def of(name: str, via: str = "one", state: str = "running") -> dict[str, dict[str, Any]]:
        return {node: r for (node, n), r in daemons(fleet, via).items() if (n, r["state"]) == (name, state)}

    def where(via: str) -> list[str]:
        return list(of("single", via))

    home = wait_for(lambda: where("one"), "it runs somewhere", step_s=0.1)
    assert len(home) == 1
    large = wait_for(lambda: len(found := of("large")) == 2 and found, "both of it run", step_s=0.1)
    diff = apply(fleet, tmp_path, single + sized.replace("NAME", "aaa") + sized.replace("NAME", "large"))[
        "diff"
    ]
    (third,) = {"one", "two", "three"} - large.keys()
    assert diff["placed"]["aaa"] == [third] and diff["placed"]["large"] == sorted(large)
    wait_for(lambda: list(of("aaa")) == [third], "it fits on the third alone", step_s=0.1)
    held = wait_for(lambda: of("aaa", state="stopped"), "another holds it back", step_s=0.1)
    ((at, held_row),) = held.items()
    assert re.fullmatch(r"needs \S+ memory, \S+ free of \S+", held_row["held_back"]) and at in large
    assert held_row["resources"] == {"cpu": 0.001, "memory": memory}
    assert {node: r["pid"] for node, r in of("large").items()} == {
        node: r["pid"] for node, r in large.items()
    }
    other = next(name for name in ("one", "two", "three") if name != home[0])
    assert op(fleet, other, "cordon", home[0])["result"] == "done"
    wait_for(lambda: row(fleet, home[0], other)["cordoned"], "the cordon is seen", step_s=0.1)
    assert where(other) == home
    agent: Agent = fleet.agents[home[0]]
    agent.signal(signal.SIGKILL)
    wait_for(lambda: where(other) not in ([], home), "another node runs it", 15, 0.1)
    sized_on = Counter(
        node for (node, name), r in daemons(fleet, other).items() if r["pid"] and name != "single"
    )
    assert set(sized_on.values()) == {1}, "no two of them fit on a node"


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
