"""Nodes that this home starts: `qd spawn`, its registry, and the console's own node."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.home import Home
from agent.spawn import SpawnRegistry, free_seat, numbered_seat, seated
from tests.fleet.harness import Fleet, wait_for
from tui.launch import ConsoleNode

pytestmark = pytest.mark.fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "home", QD_NO_MDNS="1", QD_BIND="127.0.0.1") as running:
        running.init()
        try:
            yield running
        finally:
            for entry in Home.open(running.home).running():
                os.kill(entry.pid, signal.SIGTERM)
            wait_for(lambda: not Home.open(running.home).running(), "spawned nodes to end")


def test_spawned_node_answers_is_noted_and_outlives_the_command(fleet: Fleet) -> None:
    found = fleet.qd_json("spawn", "--mesh", "alpha", "--kind", "broker")
    assert set(found) >= {"name", "id", "pid", "addr"}
    assert found["name"] == f"alpha.broker.{found['id'][:6]}"
    assert os.getsid(found["pid"]) == found["pid"], "it has a session of its own"
    [noted] = SpawnRegistry(Home.open(fleet.home)).entries()
    assert (noted.name, noted.id, noted.addr, noted.pid) == tuple(
        found[k] for k in ("name", "id", "addr", "pid")
    )
    assert found["name"] in fleet.rows(found["name"])


def test_second_node_of_a_kind_gets_a_seat_of_its_own_and_they_meet(fleet: Fleet) -> None:
    first = fleet.qd_json("spawn", "--kind", "broker")
    second = fleet.qd_json("spawn", "--kind", "broker")
    assert first["id"] != second["id"]
    wait_for(lambda: len(fleet.rows(second["name"])) == 2, "them to meet")


def test_spawn_of_a_name_that_runs_and_of_an_unknown_mesh_is_usage(fleet: Fleet) -> None:
    assert fleet.qd("spawn", "--name", "x").returncode == 0
    again = fleet.qd("spawn", "--name", "x")
    assert again.returncode == 2 and "--name" in again.stderr and again.stderr.count("\n") == 1
    assert fleet.qd("spawn", "--mesh", "nosuch").returncode == 2


def test_killed_spawn_leaves_the_registry_by_itself(fleet: Fleet) -> None:
    found = fleet.qd_json("spawn", "--kind", "broker")
    os.kill(found["pid"], signal.SIGKILL)
    wait_for(lambda: not SpawnRegistry(Home.open(fleet.home)).entries(), "it to be forgotten")


def test_console_node_lives_as_long_as_its_pipe(fleet: Fleet) -> None:
    async def lived() -> tuple[int, str]:
        node = ConsoleNode(Home.open(fleet.home), "alpha")
        node.start()
        client = await node.connect()
        assert node.process is not None
        pid, name = node.process.pid, client.name
        await client.close()
        assert node.process.stdin is not None
        node.process.stdin.close()
        assert node.process.wait(10) == 0
        await node.stop()
        return pid, name

    pid, name = asyncio.run(lived())
    assert name.startswith("alpha.console.") and not psutil.pid_exists(pid)


def test_console_node_that_died_is_started_again_on_the_next_connect(fleet: Fleet) -> None:
    async def lived() -> None:
        node = ConsoleNode(Home.open(fleet.home), "alpha")
        try:
            first = await node.connect()
            assert node.process is not None
            os.kill(node.process.pid, signal.SIGKILL)
            node.process.wait(10)
            await first.close()
            second = await node.connect()
            assert second.id == first.id, "the same node again"
            await second.close()
        finally:
            await node.stop()

    asyncio.run(lived())


def test_seats_of_a_kind_have_their_own_identity_and_are_found_again(tmp_path: Path) -> None:
    home = Home.open(tmp_path)
    seats = [numbered_seat(home, "alpha", "broker") for _ in range(3)]
    assert len({seat.node for seat in seats}) == 3
    assert sorted(s.node for s in seats) == [s.node for s in seated(home, "alpha", "broker")]
    assert free_seat(home, "alpha", "broker").name is None, "nobody sits in the kind's own directory"
