"""What the node's engine does to daemons, peers and replicas by itself and by an operator's word, with real agents."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.namespaces import Host, lan
from tests.fleet.test_chains import applied
from tests.fleet.test_chains import op as handed
from tests.fleet.test_daemons import apply, daemons, settled
from tests.fleet.test_daemons import fleet as fleet
from tests.fleet.test_user_chains import NO_TIMER

pytestmark = [pytest.mark.fleet, pytest.mark.soak]

SDK_SCRIPT = """
import asyncio, sys
from agent.daemons.sdk import MeshDaemon, daemon_main

class Listener(MeshDaemon):
    name = "sdk"

    async def process(self):
        await asyncio.sleep(3600)

    def on_control(self, control):
        print(control, flush=True)

sys.exit(daemon_main(Listener()))
"""
LISTENERS = """
[[daemon]]
name = "sdk"
command = ["PYTHON", "SCRIPT"]
readiness = "sd_notify"
on = "node=one"
grace_s = 4

[[daemon]]
name = "hooked"
command = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
on = "node=one"
grace_s = 4

[daemon.control]
drain_start = ["sh", "-c", "echo start $QD_GRACE_MS $QD_PID >> HEARD"]
drain_finish = ["sh", "-c", "echo finish $QD_PID >> HEARD"]
backpressure_on = ["sh", "-c", "echo on $QD_LEVEL $QD_PID >> HEARD"]
backpressure_off = ["sh", "-c", "echo off $QD_PID >> HEARD"]
"""
GHOSTS = 990
"""Daemons that no package brings: starts that take their time. Twice as many turn backpressure on."""
SPEAKERS = """
[[daemon]]
name = "beacon"
command = ["sh", "BEACON"]
on = "node=one"
readiness = "sd_notify"
watchdog_s = 15

[daemon.control]
drain_start = "SIGUSR1"
drain_finish = "SIGUSR2"

[[daemon]]
name = "stuck"
command = ["sh", "-c", "systemd-notify --ready; systemd-notify WATCHDOG=1; exec sleep 3600"]
on = "node=one"
readiness = "sd_notify"
watchdog_s = 1
"""
BEACON = Path(__file__).parents[2] / "examples" / "beacon.sh"


def filled(spec: str, **words: str | Path) -> str:
    for word, value in words.items():
        spec = spec.replace(word, str(value))
    return spec


def page(fleet: Fleet, at: Agent) -> dict[str, Any]:
    return dict(fleet.ask(at, lambda client: client.node(client.id)))


def test_controls_are_heard_by_a_program_of_the_sdk_and_by_the_hooks_of_any_other(
    fleet: Fleet, tmp_path: Path
) -> None:
    (one,) = fleet.boot("one")
    script, heard = tmp_path / "sdk.py", tmp_path / "heard"
    script.write_text(SDK_SCRIPT)
    spec = filled(LISTENERS, PYTHON=sys.executable, SCRIPT=script, HEARD=heard)
    apply(fleet, tmp_path, spec)
    pids = {
        name: r["pid"]
        for (_, name), r in settled(fleet, "one", one_sdk="running", one_hooked="running").items()
    }

    def told() -> list[str]:
        done = fleet.qd("logs", "one/sdk", "--json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["line"] for line in done.stdout.splitlines()]

    def hooks() -> list[str]:
        return heard.read_text().splitlines() if heard.exists() else []

    def each(lines: Callable[[], list[str]], *begins: str) -> None:
        def look() -> bool:
            found = lines()
            return len(found) >= len(begins) and all(
                line.startswith(begin) for line, begin in zip(found, begins, strict=False)
            )

        wait_for(look, f"{begins} in {lines()}", step_s=0.2)

    handed(fleet, one, "drain", deadline_ms=60_000)
    each(told, "DrainStart(grace_period_ms=", "Shutdown(grace_period_ms=")
    each(hooks, "start ")
    started, grace_ms, pid = hooks()[0].split()
    assert (started, pid) == ("start", str(pids["hooked"])) and 50_000 < int(grace_ms) <= 60_000
    handed(fleet, one, "resume")
    each(told, "DrainStart(", "Shutdown(", "DrainFinish()")
    each(hooks, "start ", f"finish {pids['hooked']}")
    again = settled(fleet, "one", one_sdk="running", one_hooked="running")
    assert all(again["one", name]["pid"] != pid for name, pid in pids.items()), (
        "the stop under way was carried out"
    )

    def ghosts(mark: str) -> str:
        entry = 'entry_point = "no.such.thing"\non = "node=one"\n'
        return "".join(f'[[daemon]]\nname = "{mark}{n}"\n{entry}' for n in range(GHOSTS))

    for mark in "ghi":
        text = (spec + ghosts(mark)).encode()
        assert applied(fleet, one, text)["result"] == "done"
    hooked = again["one", "hooked"]["pid"]
    wait_for(lambda: f"on 1 {hooked}" in hooks(), f"backpressure on in {hooks()}", 40, 0.1)
    assert applied(fleet, one, spec.encode())["result"] == "done"
    wait_for(lambda: f"off {hooked}" in hooks(), f"backpressure off in {hooks()}", 40, 0.1)
    found = wait_for(lambda: (lines := told()) and "BackpressureOff()" in lines and lines, "the SDK hears it")
    assert found.index("BackpressureOn(level=1.0)") < found.index("BackpressureOff()")
    assert page(fleet, one)["stats"]["backpressure_edges"] >= 2


def test_shell_script_speaks_for_itself_and_one_that_goes_silent_is_killed_and_started_again(
    fleet: Fleet, tmp_path: Path
) -> None:
    if shutil.which("systemd-notify") is None:
        pytest.skip("systemd-notify is not installed")
    (one,) = fleet.boot("one")
    apply(fleet, tmp_path, filled(SPEAKERS, BEACON=BEACON))

    def is_as(name: str, **fields: Any) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = daemons(fleet).get(("one", name), {})
            return found if all(found.get(key) == value for key, value in fields.items()) else None

        return dict(
            wait_for(look, f"{name}: {fields}; it is {daemons(fleet).get(('one', name))}", step_s=0.1)
        )

    beacon = is_as("beacon", state="running", status="shining")
    first = is_as("stuck", state="running")["pid"]
    crashed = one.wait("daemon.crashed", daemon="stuck")
    assert "watchdog" in crashed["reason"].lower(), crashed
    second = is_as("stuck", state="running", restarts=1)["pid"]
    assert second not in (None, first)
    handed(fleet, one, "drain", deadline_ms=60_000)
    is_as("beacon", state="stopped")
    log = fleet.qd("logs", "one/beacon").stdout
    assert "beacon lit" in log and "beacon out" in log
    handed(fleet, one, "resume")
    assert is_as("beacon", state="running", status="shining")["pid"] != beacon["pid"]
    assert not one.of("daemon.crashed", daemon="beacon")


def seen(host: Host, node: str) -> dict[str, Any]:
    done = host.qd("node", node, "--via", node, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def avoided(host: Host, node: str) -> list[dict[str, Any]]:
    return list(seen(host, node)["avoid_list"])


def test_slow_peer_is_avoided_and_judged_afresh_when_an_operator_clears_the_list(tmp_path: Path) -> None:
    with lan(tmp_path) as net:
        one, two, three = net.host(), net.host(), net.host()
        a = one.agent("a", *NO_TIMER).start()
        a.wait("node.ready")
        two.agent("b", *NO_TIMER, join=one).start()
        three.agent("c", *NO_TIMER, join=one).start()
        a.wait("node.joined", node="b")
        a.wait("node.joined", node="c")
        assert avoided(one, "a") == []

        def cleared() -> None:
            (answer,) = json.loads(one.qd("clear-avoid", "a", "--via", "a", "--json").stdout)
            assert (answer["result"], answer["reason"]) == ("done", "1 entry cleared")

        def rtt_ms() -> float | None:
            (found,) = [peer for peer in seen(one, "a")["peers"] if peer["peer"] == "b"]
            return None if found["rtt_ms"] is None else float(found["rtt_ms"])

        with two.slow(150):
            (entry,) = wait_for(lambda: avoided(one, "a"), "a avoids b", 40)
            assert entry["peer"] == "b" and "over 250 ms" in entry["reason"]
            assert 0 < entry["expires_in_ms"] <= 300_000
            cleared()
            (again,) = wait_for(lambda: avoided(one, "a"), "it is still slow, and avoided again", 40)
            assert again["peer"] == "b" and again["age_ms"] < entry["age_ms"] + 40_000
        wait_for(lambda: (rtt := rtt_ms()) is not None and rtt < 250, "b answers fast again", 60)
        assert [found["peer"] for found in avoided(one, "a")] == ["b"], "an entry stands for its time"
        cleared()
        wait_for(lambda: rtt_ms() is not None, "b is judged afresh")
        assert avoided(one, "a") == []


def test_replica_dropped_by_an_operator_goes_once_others_keep_it_and_comes_back_by_a_later_hold(
    fleet: Fleet, tmp_path: Path
) -> None:
    nodes = fleet.boot("a", "b", "c", flags=NO_TIMER)
    a = nodes[0]
    file = tmp_path / "model"
    file.write_bytes(b"weights" * 100_000)
    assert fleet.qd("put", str(file), "--replicas", "1", "--via", "a").returncode == 0

    def held(count: int) -> None:
        apply(fleet, tmp_path, f'[[artifact]]\nname = "model"\nreplicas = {count}\n', "a")

    def holders(at: Agent) -> set[str]:
        rows = fleet.ask(at, lambda client: client.ask("chains"))["rows"]
        return {holder for row in rows if row["name"] == "model" for holder in row["holders"]}

    def everywhere(wanted: Callable[[set[str]], bool], what: str, timeout_s: float = 30) -> set[str]:
        wait_for(
            lambda: all(wanted(holders(node)) for node in nodes),
            f"{what}; it is {[holders(node) for node in nodes]}",
            timeout_s,
            0.2,
        )
        return holders(a)

    everywhere(lambda found: found == {"a"}, "only a holds it")
    assert fleet.qd_json("drop-replicas", "a", "model", "--via", "b")[0]["result"] == "done"
    wait_for(
        lambda: any(
            f["action"] == "drop_replica" and f["target"] == "model"
            for f in page(fleet, a)["recent_failures"]
        ),
        "the last copy is not dropped, and why is told",
    )
    assert holders(nodes[1]) == {"a"}
    held(2)
    (other,) = everywhere(lambda found: len(found) == 2 and "a" in found, "a second copy") - {"a"}
    held(1)
    everywhere(lambda found: found == {other}, "a has dropped it")
    assert page(fleet, fleet.agents[other])["replicas"], "the one that holds it leads it"
    out = tmp_path / "got"
    assert fleet.qd("get", "model", "--output", str(out), "--via", "a").returncode == 0
    assert out.read_bytes() == file.read_bytes()
    answer = fleet.qd_json("invalidate-placement", other, "--via", "a")[0]
    assert answer["result"] == "done" and answer["reason"].endswith("led here")
    (row,) = [r for r in page(fleet, fleet.agents[other])["replicas"] if r["chain"] == "model"]
    assert row["last_rebalance_age_ms"] is None and not row["eviction_pending"]
    held(3)
    everywhere(lambda found: found == {"a", "b", "c"}, "a is asked to hold it again", 110)
