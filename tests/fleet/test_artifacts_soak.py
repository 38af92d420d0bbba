"""Artifacts between real agents at length: a gigabyte whose ends are killed, a drain, a death, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.fleet.disks import Holdings, acted, kept
from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.test_chains import artifact, op
from tui.client import Client

pytestmark = [pytest.mark.fleet, pytest.mark.soak, pytest.mark.timeout(1500)]

GIB = 2**30
FLAT_BYTES = 32 * 2**20
"""What a gigabyte may add to an agent that was idle before."""


def gigabyte(path: Path) -> str:
    """A file of a gigabyte in which no two chunks are alike; its hash."""
    block, digest = random.Random(5).randbytes(2**20 - 8), hashlib.sha256()
    with path.open("wb") as file:
        for number in range(GIB // 2**20):
            digest.update(piece := number.to_bytes(8, "big") + block)
            file.write(piece)
    return digest.hexdigest()


class Watch:
    """Follows one pull of an agent, and how much memory the agents take meanwhile at most (a thread of its own)."""

    def __init__(self, fleet: Fleet, *agents: Agent) -> None:
        self._fleet = fleet
        self._pids = {agent.name: agent.pid for agent in agents}
        self.idle = {name: self._rss(name) for name in self._pids}
        self.peak = dict(self.idle)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _rss(self, name: str) -> int:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self._pids[name]).memory_info().rss)
        return 0

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            for name in self._pids:
                self.peak[name] = max(self.peak[name], self._rss(name))

    def grown(self) -> dict[str, int]:
        """By how much each took more at its peak than before; ends the watch."""
        self._ended.set()
        self._thread.join()
        return {name: peak - self.idle[name] for name, peak in self.peak.items()}


def pulling(fleet: Fleet, agent: Agent, until_bytes: int, timeout_s: float = 120.0) -> list[int]:
    """What the agent says it has of the one thing that it pulls, until that is so much or the pull has ended."""

    async def go(client: Client) -> list[int]:
        seen: list[int] = []
        async with asyncio.timeout(timeout_s):
            while True:
                pulls = (await client.ask("pulls"))["pulls"]
                seen += [pull["done"] for pull in pulls if pull["total"]]
                if seen and (not pulls or seen[-1] >= until_bytes):
                    return seen
                await asyncio.sleep(0.02)

    return list(fleet.ask(agent, go))


def written(agent: Agent) -> int:
    """Bytes that this process wrote into files so far."""
    io = dict(line.split(": ") for line in Path(f"/proc/{agent.pid}/io").read_text().splitlines())
    return int(io["wchar"])


def puller_of(fleet: Fleet, agents: list[Agent]) -> Agent:
    def found() -> Agent | None:
        return next(
            (a for a in agents if fleet.ask(a, lambda client: client.ask("pulls"))["pulls"]),
            None,
        )

    return wait_for(found, "one of them pulls")


def test_gigabyte_is_taken_up_again_by_a_killed_puller_with_memory_flat(fleet: Fleet, tmp_path: Path) -> None:
    nodes = fleet.boot("a", "b", "c")
    a = nodes[0]
    hash = gigabyte(tmp_path / "big")
    watch = Watch(fleet, *nodes)
    assert (
        fleet.qd("put", str(tmp_path / "big"), "--replicas", "2", "--via", "a", timeout_s=300).returncode == 0
    )
    puller = puller_of(fleet, nodes[1:])
    half = pulling(fleet, puller, GIB // 2)[-1]
    fetched = written(puller)
    assert GIB // 2 <= half < GIB, "killed half-way"
    grown = watch.grown()
    assert max(grown.values()) < FLAT_BYTES, grown
    puller.signal(signal.SIGKILL)
    puller.wait_exit()
    puller.start()
    fleet.converged(nodes)
    watch = Watch(fleet, *nodes)
    seen = pulling(fleet, puller, GIB)
    assert seen[0] >= half - 2**20, "it goes on where it was"
    row = wait_for(lambda: (r := artifact(fleet, a, "big")).get("held") == 2 and r, "two copies", 60.0)
    assert set(row["holders"]) == {"a", puller.name}
    grown = watch.grown()
    assert max(grown.values()) < FLAT_BYTES, grown
    fetched += written(puller)
    assert fetched < 1.2 * GIB, "what was there was not fetched again"
    a.stop()
    done = fleet.qd("get", "big", "--via", puller.name, "-o", str(tmp_path / "got"), timeout_s=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "got").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hash


def test_gigabyte_is_whole_though_its_holder_is_killed_half_way(fleet: Fleet, tmp_path: Path) -> None:
    nodes = fleet.boot("a", "b", "c")
    a = nodes[0]
    hash = gigabyte(tmp_path / "big")
    assert (
        fleet.qd("put", str(tmp_path / "big"), "--replicas", "2", "--via", "a", timeout_s=300).returncode == 0
    )
    puller = puller_of(fleet, nodes[1:])
    began = written(puller)
    watch = Watch(fleet, puller)
    half = pulling(fleet, puller, GIB // 2)[-1]
    a.signal(signal.SIGKILL)
    a.wait_exit()
    assert GIB // 2 <= half < GIB
    puller.wait("node.changed", node="a", to="dead")
    a.start()
    fleet.converged(nodes[:1])
    wait_for(
        lambda: artifact(fleet, puller, "big").get("held") == 2,
        "the rest came from the same holder, started again",
        180.0,
        0.5,
    )
    grown = watch.grown()
    assert max(grown.values()) < FLAT_BYTES, grown
    assert written(puller) - began < 1.2 * GIB, "what was there was not fetched again"
    done = fleet.qd("get", "big", "--via", puller.name, "-o", str(tmp_path / "got"), timeout_s=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "got").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hash


def put_all(fleet: Fleet, folder: Path, via: Agent, names: dict[str, int]) -> None:
    """Puts a small artifact under each name, with its count; two commands at a time."""

    def put(name: str) -> str:
        (folder / name).write_bytes(name.encode() * 20_000)
        words = ("put", str(folder / name), "--replicas", str(names[name]), "--via", via.name)
        done = fleet.qd(*words)
        return "" if done.returncode == 0 else f"{name}: {done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        failed = [why for why in pool.map(put, names) if why]
    assert not failed, failed[:3]


def test_drain_moves_fifty_artifacts_with_none_under_held_and_the_rates_kept(
    fleet: Fleet, tmp_path: Path
) -> None:
    nodes = fleet.boot("a", "b", "c", "d")
    a = nodes[0]
    counted = {f"counted-{number}": 2 for number in range(50)}
    lone = {f"lone-{number}": 0 for number in range(25)}
    put_all(fleet, tmp_path, a, counted | lone)
    disks = Holdings(fleet, nodes)
    wait_for(
        lambda: (
            Counter(name for node in "abcd" for name in disks.of(node) if name in counted)
            == Counter(dict.fromkeys(counted, 2))
        ),
        "two copies of each",
        90.0,
        0.2,
    )
    disks.end()
    disks = Holdings(fleet, nodes)
    assert op(fleet, a, "drain")["result"] in ("done", "accepted")
    wait_for(lambda: not disks.of("a"), "the drained node holds nothing", 150.0, 0.2)
    wait_for(
        lambda: all(
            row["held"] == 2 and "a" not in row["holders"]
            for row in fleet.ask(nodes[1], lambda client: client.chains())["rows"]
            if row["name"] in counted
        ),
        "two of the others hold each",
        30.0,
        0.5,
    )
    fewest = disks.end()
    assert disks.looks > 50
    assert {name: fewest.get(name, 0) for name in counted} == counted, "none below its count at any moment"
    assert {fewest.get(name, 0) for name in lone} == {1}
    assert Counter(name for node in "bcd" for name in disks.of(node)) == Counter(
        counted | dict.fromkeys(lone, 1)
    )
    for node in nodes:
        assert kept(acted(fleet, node, "pull_replica"), 1, 250), node.name
    moved = acted(fleet, a, "migrate_blob")
    assert len(moved) >= 25 and kept(moved, 10, 1_000)
    assert sum(len(acted(fleet, node, "pull_replica")) for node in nodes) >= 100
    wait_for(
        lambda: (
            "still" not in str(fleet.node(a)["node"].get("reason"))
            and fleet.node(a)["node"]["state"] == "draining"
        ),
        "it is drained, and says so",
    )
    failed = [row for row in fleet.ask(a, lambda client: client.failures())["rows"] if row["node"] == "a"]
    assert not failed, failed


def test_count_is_restored_a_minute_after_a_holder_died_and_what_comes_back_is_surplus(
    fleet: Fleet, tmp_path: Path
) -> None:
    nodes = fleet.boot("a", "b", "c")
    put_all(fleet, tmp_path, nodes[0], {"blob": 2})
    row = wait_for(lambda: (r := artifact(fleet, nodes[0])).get("held") == 2 and r, "two copies")
    dies = fleet.agents[row["leader"]]
    left = [agent for agent in nodes if agent is not dies]
    at = dies.signal(signal.SIGKILL)
    dies.wait_exit()
    disks = Holdings(fleet, nodes)
    spare = next(agent for agent in left if agent.name not in row["holders"])
    wait_for(lambda: "blob" in disks.of(spare.name), "a copy at the third", 150.0)
    assert time.monotonic() - at >= 60.0, "a holder counts for a minute after it was last reached"
    wait_for(lambda: set(artifact(fleet, spare)["holders"]) == {agent.name for agent in left}, "it tells")
    dies.start()
    fleet.converged([dies])
    ids = {agent.name: int(fleet.entry(agent).id, 16) for agent in nodes}
    leader = max(ids, key=lambda name: ids[name])
    wait_for(
        lambda: sum("blob" in disks.of(agent.name) for agent in nodes) == 2,
        "the surplus is evicted",
        200.0,
        0.1,
    )
    for agent in nodes:
        row = wait_for(lambda agent=agent: (r := artifact(fleet, agent)).get("held") == 2 and r, "all know")
        assert row["leader"] == leader and leader in row["holders"]
    assert not acted(fleet, fleet.agents[leader], "drop_replica")
    assert disks.end()["blob"] == 2, "who was asked to give it up did so once two others had it"
