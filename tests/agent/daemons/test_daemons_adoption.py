"""Agents that end in the middle of things: daemons run on, are found again, none doubled and none lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.daemons.process import ProcessId, boot_id, identify
from agent.daemons.runs import Run, read_run
from agent.meshos.events import DaemonHealth
from agent.spec.model import DaemonSpec
from discovery.errors import LocalError
from tests.agent.daemons.rig import NODE, Rig, alive, environ, rig, running, say, sh, spec, until

ROOT = Path(__file__).parents[3]
ROUNDS = 20


class Child:
    """The process of `child.py`."""

    def __init__(self, place: Path, *specs: DaemonSpec, forks: bool = False) -> None:
        table = msgspec.json.encode({one.name: one for one in specs}).decode()
        argv = [sys.executable, "-m", "tests.agent.daemons.child", str(place), table]
        self.process = subprocess.Popen(
            argv + ["--forks"] * forks, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0
        )

    def line(self, key: str) -> dict[str, Any]:
        """The next line that has this key; with "", the next line."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            said: dict[str, Any] = msgspec.json.decode(line)
            if not key or key in said:
                return said
        raise AssertionError(f"it ended without {key}")

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def child(place: Path, *specs: DaemonSpec, forks: bool = False) -> Iterator[Child]:
    made = Child(place, *specs, forks=forks)
    try:
        yield made
    finally:
        made.kill()


def test_daemons_of_an_agent_that_was_killed_run_on_and_are_adopted(tmp_path: Path) -> None:
    starting = spec("sleep", "100", name="starting", readiness="sd_notify")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    talking = sh('while read x; do echo "$x"; done < $FIFO; exec sleep 100', env={"FIFO": str(fifo)})
    gone = spec("sleep", "100", name="gone")
    place = tmp_path / "place"
    with child(place, talking, starting, gone) as agent:
        for name in ("d", "starting", "gone"):
            agent.tell(f"start {name}")
        pids = {name: agent.line("started")["pid"] for name in ("d", "starting", "gone")}
        say(pids["d"], "X_QD_HEALTH=degraded:slow disk")
        assert agent.line("health")["reason"] == "slow disk"
    fifo.write_text("said to nobody\n")

    async def play() -> None:
        async with rig(place, talking, starting) as r:
            assert r.supervisor.names() == ["d", "gone", "starting"]
            assert {name: r.pid(name) for name in pids} == pids
            assert [r.signals(name)[0] for name in ("d", "gone", "starting")] == [
                "started",
                "started",
                "starting",
            ]
            assert (r.events[1].health, r.events[1].reason) == (DaemonHealth.DEGRADED, "slow disk")
            facts = r.supervisor.facts("d")
            assert (facts.adopted, facts.ready) == (True, True)
            assert r.supervisor.fingerprint("gone") is not None
            await r.wrote("said to nobody")
            say(pids["starting"], "READY=1")
            await r.told("started", "starting")
            os.kill(pids["d"], signal.SIGKILL)
            assert (await r.told("crashed")).reason == "exited, status unknown (adopted)"
            await r.supervisor.stop("gone", 5_000)
            await r.told("exited_cleanly", "gone")
            await r.supervisor.start("d")
            assert r.pid() != pids["d"]

    asyncio.run(play())
    assert not any(alive(pid) for pid in pids.values())


def test_agent_that_executes_itself_anew_keeps_its_daemons_as_its_children(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ending = sh("read x < $FIFO; exit 5", env={"FIFO": str(fifo)})
    quick = sh("sleep 0.05; exit 6", name="quick")
    with child(tmp_path / "place", ending, quick) as agent:
        assert agent.line("adopted")["adopted"] == []
        agent.tell("start d")
        pid = agent.line("started")["pid"]
        agent.tell("start quick")
        quick_pid = agent.line("started")["pid"]
        agent.tell("exec")
        told = []
        while "adopted" not in (line := agent.line("")):
            told.append(line)
        assert line["pid"] == agent.process.pid
        assert "d" in line["adopted"]
        fifo.write_text("go\n")
        while not {"d", "quick"} <= {one["daemon"] for one in told if one.get("signal") == "crashed"}:
            told.append(agent.line("signal"))
        reasons = {one["daemon"]: one["reason"] for one in told if one.get("signal") == "crashed"}
        assert reasons == {"d": "exit status 5", "quick": "exit status 6"}
        for number in (pid, quick_pid):
            assert not Path(f"/proc/{number}").exists()


def test_agent_killed_at_any_moment_around_a_start_leaves_no_daemon_doubled_and_none_lost(
    tmp_path: Path,
) -> None:
    word = f"1000.{os.getpid()}"
    one = spec("sleep", word)
    rng = random.Random(5)
    adopted = 0

    async def take_over(place: Path) -> None:
        nonlocal adopted
        async with rig(place, one) as r:
            adopted += "d" in r.supervisor.names()
            await r.supervisor.start("d")
            assert running(word) == [r.pid()]
            assert r.troubles == []
        assert running(word) == []

    with child(tmp_path / "unused", one, forks=True) as zygote:
        for n in range(ROUNDS):
            place = tmp_path / str(n)
            zygote.tell(str(place))
            pid = zygote.line("forked")["forked"]
            zygote.line("at")
            time.sleep(rng.uniform(0, 0.005))
            os.kill(pid, signal.SIGKILL)
            asyncio.run(take_over(place))
    assert adopted > 0, "no round was killed after its start"


def test_process_that_its_agent_had_no_time_to_note_is_found_by_its_run(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100")) as first:
            await first.supervisor.start("d")
            pid = first.pid()
            path = tmp_path / "d" / "run.json"
            run = read_run(path)
            assert run is not None
            await first.supervisor.close()
            run.leader = None
            run.write(path)
            async with rig(tmp_path, spec("sleep", "100")) as second:
                assert second.supervisor.names() == ["d"]
                assert second.pid() == pid
        assert not alive(pid)

    asyncio.run(play())


@pytest.mark.parametrize("wrong", ["start", "boot"])
def test_pid_that_somebody_else_has_now_is_not_adopted_and_not_touched(tmp_path: Path, wrong: str) -> None:
    async def play() -> None:
        with subprocess.Popen(["sleep", "100"]) as other:  # noqa: ASYNC220
            who = identify(other.pid)
            assert who is not None
            false = (
                ProcessId(who.pid, who.start - 1, who.boot)
                if wrong == "start"
                else ProcessId(who.pid, who.start, "x")
            )
            run = Run(
                daemon="d",
                id="r",
                token="t",
                boot=boot_id(),
                spec=spec("sleep", "100"),
                started_ms=0,
                leader=false,
            )
            (tmp_path / "d").mkdir()
            run.write(tmp_path / "d" / "run.json")
            async with rig(tmp_path, spec("sleep", "100")) as r:
                assert r.supervisor.names() == []
                assert [event.signal for event in r.events] == ["crashed"], "nobody saw it end"
            assert other.poll() is None
            other.kill()

    asyncio.run(play())


def test_rest_of_a_daemon_that_ended_while_no_agent_ran_is_ended(tmp_path: Path) -> None:
    word = f"100.{os.getpid()}3"

    async def play() -> None:
        async with rig(tmp_path, sh(f"sleep {word} & wait")) as first:
            await first.supervisor.start("d")
            await until(lambda: running(word), "the other process runs")
            pid = first.pid()
            await first.supervisor.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # noqa: ASYNC222
            assert running(word)
            async with rig(tmp_path) as second:
                (told,) = second.events
                assert (told.signal, told.reason) == ("crashed", "ended while no agent watched it")
                await until(lambda: not running(word), "the rest is gone")

    asyncio.run(play())


def test_adopted_daemon_that_was_being_stopped_ends_cleanly(tmp_path: Path) -> None:
    async def play() -> None:
        script = "trap '' TERM; echo up; while :; do sleep 0.02; done"
        async with rig(tmp_path, sh(script)) as first:
            await first.supervisor.start("d")
            await first.wrote("up")
            await first.supervisor.stop("d", 30_000)
            await first.supervisor.close()
            async with rig(tmp_path, sh(script)) as second:
                await second.supervisor.stop("d", 50)
                assert (await second.told("exited_cleanly")).reason.startswith("killed")

    asyncio.run(play())


def test_second_agent_in_the_same_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.daemons.runs.LOCK_WAIT_S", 0.05)

    async def play() -> None:
        async with rig(tmp_path):
            with pytest.raises(LocalError, match="another agent supervises"):
                await Rig(tmp_path).supervisor.begin({})

    asyncio.run(play())


def test_unreadable_note_of_what_runs_is_no_reason_not_to_begin(tmp_path: Path) -> None:
    async def play() -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "run.json").write_bytes(b"\x00\x01")
        async with rig(tmp_path, spec("sleep", "100")) as r:
            await r.supervisor.start("d")
            assert environ(r.pid())["QD_NODE"] == NODE

    asyncio.run(play())
