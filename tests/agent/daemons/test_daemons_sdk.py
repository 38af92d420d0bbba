"""Daemons in Python: as programs by `daemon_main`, and inside the agent by entry point; the same contract."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent.daemons.contract import Health, MeshDaemon, degraded
from agent.executor import DispatchError
from agent.meshos.controls import BackpressureOn, DaemonControl, DrainStart, Shutdown
from agent.meshos.events import DaemonHealth
from agent.spec.model import DaemonSpec, Resources
from tests.agent.daemons.rig import Rig, environ, rig, spec, until

ROOT = Path(__file__).parents[3]
PROGRAM = """
import asyncio, sys
from agent.daemons.sdk import MeshDaemon, Shutdown, daemon_main, degraded, HEALTHY

class Counter(MeshDaemon):
    name = "counter"
    def __init__(self):
        self.lives = 0
        self.full = 0.25
        self.ended = asyncio.Event()
    async def process(self):
        print("life", self.lives, flush=True)
        await self.ended.wait()
        if self.full == 1.0:
            raise RuntimeError("overflow")
        print("done", flush=True)
    def snapshot(self):
        return str(self.lives + 1).encode()
    def restore(self, state):
        self.lives = int(state)
    def health(self):
        return degraded("half full") if self.full >= 0.5 else HEALTHY
    def saturation(self):
        return self.full
    def on_control(self, control):
        print(control, flush=True)
        if isinstance(control, Shutdown):
            self.ended.set()
        elif type(control).__name__ == "BackpressureOn":
            self.full = control.level
            if self.full == 1.0:
                self.ended.set()

sys.exit(daemon_main(Counter()))
"""


def counter(**fields: Any) -> DaemonSpec:
    return spec(sys.executable, "-c", PROGRAM, env={"PYTHONPATH": str(ROOT)}, readiness="sd_notify", **fields)


def test_sdk_loads_nothing_of_the_node_or_the_screen() -> None:
    names = [
        "asyncssh",
        "psutil",
        "cryptography",
        "textual",
        "zeroconf",
        "sqlite3",
        "agent.node",
        "agent.loop",
    ]
    code = f"import sys, agent.daemons.sdk; print([n for n in {names} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_program_of_the_sdk_is_a_full_member_and_knows_its_earlier_life(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, counter(watchdog_s=5.0)) as r:
            await r.supervisor.start("d")
            await r.told("started")
            await r.wrote("life 0")
            await until(lambda: (e := r.last("saturation")) and e.saturation == 0.25, "its saturation")
            pid = r.pid()
            strange(pid, b'{"control":"admin","op":"kill"}', b"\xff", b'{"control":"shutdown"}')
            r.supervisor.tell_daemons(DrainStart(1234))
            r.supervisor.tell_daemons(BackpressureOn(0.75), "d")
            await r.wrote("BackpressureOn(level=0.75)")
            assert "DrainStart(grace_period_ms=1234)" in r.lines()
            assert (await r.told("health")).reason == "half full"
            await r.supervisor.stop("d", 7_000)
            assert (await r.told("exited_cleanly")).reason == ""
            assert r.lines()[-2:] == ["Shutdown(grace_period_ms=7000)", "done"]
            assert (tmp_path / "d" / "snapshot").read_bytes() == b"1"
            assert r.troubles == []
            await r.supervisor.start("d")
            await r.wrote("life 1")
            r.supervisor.tell_daemons(BackpressureOn(1.0))
            assert (await r.told("crashed")).reason == "exit status 1: RuntimeError: overflow"

    asyncio.run(play())


def strange(pid: int, *letters: bytes) -> None:
    """What a daemon is told on its control socket that is no control: passed over."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for letter in letters:
            sock.sendto(letter, "\0" + environ(pid)["QD_CONTROL_SOCKET"][1:])


def test_controls_reach_a_program_of_the_sdk_after_its_agent_was_replaced(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, counter()) as first:
            await first.supervisor.start("d")
            await first.told("started")
            await first.supervisor.close()
            async with rig(tmp_path, counter()) as second:
                second.supervisor.tell_daemons(BackpressureOn(0.6))
                assert (await second.told("health")).reason == "half full"

    asyncio.run(play())


class Inner(MeshDaemon):
    """One inside the agent, told by the test what to do."""

    name = "inner"
    made: ClassVar[list[Inner]] = []
    stubborn = False

    def __init__(self) -> None:
        self.state = b""
        self.heard: list[DaemonControl] = []
        self.ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.now: Health = DaemonHealth.HEALTHY
        type(self).made.append(self)

    async def process(self) -> None:
        await self.ending

    def snapshot(self) -> bytes:
        return self.state + b"x"

    def restore(self, state: bytes) -> None:
        self.state = state

    def health(self) -> Health:
        return self.now

    def on_control(self, control: DaemonControl) -> None:
        self.heard.append(control)
        if isinstance(control, Shutdown) and not self.stubborn:
            self.ending.set_result(None)


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> type[Inner]:
    class Mine(Inner):
        made: ClassVar[list[Inner]] = []

    class Point:
        def load(self) -> Any:
            return Mine

    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group, name: [Point()] if name == "inner" else []
    )
    return Mine


async def started(r: Rig) -> None:
    await r.supervisor.start("d")
    assert r.signals()[-1] == "started"
    assert r.pid() == os.getpid()


def test_class_inside_the_agent_is_told_and_keeps_what_it_knows(tmp_path: Path, inner: type[Inner]) -> None:
    async def play() -> None:
        async with rig(tmp_path, DaemonSpec(name="d", entry_point="inner")) as r:
            await started(r)
            r.supervisor.tell_daemons(DrainStart(5))
            inner.made[0].now = degraded("so so")
            assert (await r.told("health")).reason == "so so"
            await r.supervisor.stop("d", 9_000)
            await r.told("exited_cleanly")
            assert inner.made[0].heard == [DrainStart(5), Shutdown(9000)]
            await started(r)
            assert inner.made[1].state == b"x"

    asyncio.run(play())


def test_class_inside_the_agent_that_raises_crashed_and_one_that_returns_ended(
    tmp_path: Path, inner: type[Inner]
) -> None:
    async def play() -> None:
        async with rig(tmp_path, DaemonSpec(name="d", entry_point="inner")) as r:
            await started(r)
            inner.made[0].ending.set_exception(RuntimeError("bro\x1bken"))
            assert (await r.told("crashed")).reason == "RuntimeError: bro\\x1bken"
            await started(r)
            inner.made[1].ending.set_result(None)
            await r.told("exited_cleanly")
            assert r.supervisor.names() == []

    asyncio.run(play())


def test_class_inside_the_agent_that_does_not_end_is_cancelled_after_its_grace(
    tmp_path: Path, inner: type[Inner]
) -> None:
    inner.stubborn = True

    async def play() -> None:
        async with rig(tmp_path, DaemonSpec(name="d", entry_point="inner")) as r:
            await started(r)
            await r.supervisor.stop("d", 50)
            assert r.signals() == ["started"]
            await r.told("exited_cleanly")
            assert inner.made[0].ending.cancelled()

    asyncio.run(play())


def test_class_inside_the_agent_begins_only_where_there_is_room_for_what_it_requires(
    tmp_path: Path, inner: type[Inner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner, "requirements", lambda self: {"cpu": 2, "memory": "512M"})

    async def play() -> None:
        async with rig(tmp_path, DaemonSpec(name="d", entry_point="inner")) as r:
            r.room = False
            await r.supervisor.start("d")
            assert r.signals() == [] and r.supervisor.names() == []
            r.room = True
            await started(r)
            assert r.asked == [("d", Resources(cpu=2, memory=512 << 20))] * 2
            await r.supervisor.stop("d", 9_000)
            await r.told("exited_cleanly")
            r.supervisor.define({"d": DaemonSpec(name="d", entry_point="inner", resources=Resources(cpu=1))})
            await started(r)
            assert len(r.asked) == 2, "what its spec says counts, and was looked at already"

    asyncio.run(play())


@pytest.mark.parametrize(
    ("requires", "said"),
    [
        ({"mem": 1}, "requirements: no key `mem`; did you mean `memory`?"),
        ({"memory": "lots"}, "requirements: `memory`: 'lots' is no size; write it as 512K, 64M"),
        ({"cpu": -1}, "requirements: `cpu`: expected a number >= 0.001"),
        (["cpu"], "requirements: no dictionary; return {"),
    ],
)
def test_class_that_requires_what_makes_no_sense_is_a_crash_that_says_so(
    tmp_path: Path, inner: type[Inner], monkeypatch: pytest.MonkeyPatch, requires: Any, said: str
) -> None:
    monkeypatch.setattr(inner, "requirements", lambda self: requires)

    async def play() -> None:
        async with rig(tmp_path, DaemonSpec(name="d", entry_point="inner")) as r:
            with pytest.raises(DispatchError, match=re.escape(f"entry point inner: {said}")):
                await r.supervisor.start("d")
            assert r.signals() == ["crashed"] and r.asked == []

    asyncio.run(play())


def test_class_that_cannot_be_made_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> Any:
            raise ImportError("no module named moon")

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name: [Point()])

    async def play() -> None:
        async with rig(tmp_path, DaemonSpec(name="d", entry_point="inner")) as r:
            with pytest.raises(Exception, match="no module named moon"):
                await r.supervisor.start("d")
            assert r.signals() == ["crashed"]

    asyncio.run(play())
