"""The demo fleet as real processes: what it says when ready, the gate, and that nothing is left however it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.freshness import fingerprint
from discovery.errors import LocalError
from tests.fleet.harness import wait_for
from tui.demo import DEFAULT_FLEET, Fleet, StaleFleet, parse_plan

ROOT = Path(__file__).resolve().parents[2]
SMALL = "alpha=gateway:1,broker:1 beta=console:1"

pytestmark = pytest.mark.fleet


class Demo:
    """A running `demo_fleet.py --headless --json`."""

    def __init__(self, tmp_path: Path, *flags: str, fleet: str = SMALL, **env: str) -> None:
        self.folder = tmp_path / "tmp"
        self.folder.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("QD_")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "demo_fleet.py"), "--headless", "--json", "--fleet", fleet, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, "TMPDIR": str(self.folder), "QD_CPU_BUDGET": "100", "QD_MEM_BUDGET": "100", **env},
            cwd=tmp_path,
        )
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.communicate(timeout=15)

    def until_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.ready = json.loads(line)
        return self.ready

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return [node for mesh in self.ready["meshes"].values() for node in mesh["nodes"]]

    def is_clean(self) -> bool:
        """No process of the fleet runs, and no folder of it is there."""
        return not any(_runs(node["pid"]) for node in self.nodes) and not list(self.folder.iterdir())


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_ready_line_holds_every_node_in_order_fresh_and_named_by_default(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        ready = demo.until_ready()
        assert set(ready) >= {"home", "meshes", "build", "fresh", "ready_ms"}
        assert list(ready["meshes"]) == ["alpha", "beta"]
        assert [n["kind"] for n in demo.nodes] == ["gateway", "broker", "console"]
        for mesh, of in ready["meshes"].items():
            for node in of["nodes"]:
                assert set(node) >= {"name", "id", "kind", "pid", "addr", "build", "fresh"}
                assert node["name"] == f"{mesh}.{node['kind']}.{node['id'][:6]}"
                assert node["build"] == ready["build"] == fingerprint() and node["fresh"] is True
                assert _runs(node["pid"])
        assert ready["fresh"] is True and ready["ready_ms"] > 0
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(10) == 0
        assert demo.is_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_however_the_demo_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with Demo(tmp_path) as demo:
        demo.until_ready()
        demo.process.send_signal(number)
        demo.process.wait(10)
        wait_for(demo.is_clean, "processes and folder to be gone", 15)


def test_for_ends_it_by_itself_and_a_stopped_node_is_no_hindrance(tmp_path: Path) -> None:
    with Demo(tmp_path, "--for", "1") as demo:
        demo.until_ready()
        os.kill(demo.nodes[1]["pid"], signal.SIGSTOP)
        assert demo.process.wait(15) == 0
        assert demo.is_clean()


def test_node_that_is_killed_is_reaped_and_ends_nothing_else(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        demo.until_ready()
        victim, *others = demo.nodes
        os.kill(victim["pid"], signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(victim["pid"]), "the killed node to be reaped")
        assert all(_runs(node["pid"]) for node in others) and demo.process.poll() is None


def test_given_home_is_kept_and_gives_the_same_nodes_again(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with Demo(tmp_path, "--for", "0", "--home", str(tmp_path / "kept")) as demo:
            demo.until_ready()
            assert demo.process.wait(15) == 0
            ids.append([node["id"] for node in demo.nodes])
    assert ids[0] == ids[1] and (tmp_path / "kept" / "config").is_dir()


def test_signal_while_booting_leaves_nothing(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        wait_for(lambda: list(demo.folder.iterdir()), "its home to be made")
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(15) == 128 + signal.SIGTERM
        assert not list(demo.folder.iterdir())


def test_stale_node_ends_the_boot_with_status_six_and_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    import agent.freshness

    async def booted() -> None:
        fleet = Fleet.under(parse_plan("alpha=broker:1"), str(tmp_path / "home"), lambda line: None)
        try:
            await fleet.boot()
        finally:
            await fleet.stop()

    monkeypatch.setattr(agent.freshness, "fingerprint", lambda: "f" * 12)
    with pytest.raises(StaleFleet, match=r"alpha\.broker\.[0-9a-f]{6} runs .* disk holds f{12}"):
        asyncio.run(booted())


@pytest.mark.parametrize(
    "plan",
    [
        "",
        "alpha",
        "alpha=",
        "alpha=broker",
        "alpha=broker:0",
        "alpha=broker:x",
        "Al=broker:1",
        "a=b:1 a=b:1",
        "a=b:999",
    ],
)
def test_plan_that_makes_no_fleet_is_an_error(plan: str) -> None:
    with pytest.raises(LocalError):
        parse_plan(plan)


def test_default_plan_is_unbalanced_and_has_a_console() -> None:
    plan = dict(parse_plan(DEFAULT_FLEET))
    assert plan["gamma"] == [("console", 1)] and sum(n for k in plan.values() for _, n in k) == 10


def test_without_terminal_and_headless_it_is_usage(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo_fleet.py")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2 and "--headless" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.timeout(180)
def test_proof_holds_on_the_default_fleet(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QD_")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo_fleet.py"), "--check", "--json"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=170,
        env={**kept, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)
    assert [f["what"] for f in findings if f["verdict"] != "pass"] == []
    played = " ".join(f["what"] for f in findings)
    for promise in (
        "same meshes",
        "lease",
        "another mesh",
        "unknown operator",
        "trail",
        "SIGSTOP",
        "signal 9",
    ):
        assert promise in played
    assert not list(tmp_path.iterdir())
