"""The directory at scale: one real agent follows 50 meshes of 200 nodes, published by a simulation over real sockets.

The publishers are played: their records, summaries and SSH frames are real and signed, their nodes don't exist. They
run in one process beside the agent that is measured.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil

from agent.addresses import host_mark
from agent.founding import found_mesh
from agent.home import Home, read_identity, read_secret
from bench.figures import Figure
from bench.fleet import Hangar, end, environment
from discovery.backbone import PoolBackbone
from discovery.directory import Entry, encode_entries
from discovery.identity import Identity, openssh_pub
from discovery.lifecycle import State
from discovery.links import Link, Listener, Login
from discovery.member import Record, SignedRecord, Vitals, seal_record
from discovery.port import Port, bind_pair
from discovery.sshkey import pub_fingerprint
from discovery.summary import SignedSummary, Summary, pack, seal_summary
from tui.client import attach_entry

RENEW_S = 2.0
CHURN_SHARE_A_S = 0.02
LIMIT_S = 90.0
REST_S = 20.0


class Publisher:
    """One mesh of `size` nodes that don't exist, told as an agent tells its own."""

    def __init__(self, home: Home, mesh: str, size: int, dice: random.Random) -> None:
        self.mesh, self._dice = mesh, dice
        self._identity = read_identity(home.mesh_identity_file(mesh), "identity")
        self._key = read_secret(home.backbone_key_file, "backbone key")
        self._node = Identity.generate()
        udp, self._tcp = bind_pair("127.0.0.1", 0)
        self._addr = ("127.0.0.1", self._tcp.getsockname()[1])
        self._port = Port(udp, on_incompatible=lambda addr, theirs, ours: None)
        self._signed = [self._record(k) for k in range(size)]
        self._renewal = 0
        self._size = size

    def _record(self, number: int) -> SignedRecord:
        node = self._node if number == 0 else Identity.generate()
        kind = "gateway" if number == 0 else "compute"
        record = Record(
            pub=node.pub,
            mesh=self.mesh,
            name=f"{self.mesh}.{kind}.{number:04d}",
            kind=kind,
            incarnation=1,
            version=1,
            state=State.ALIVE,
            addrs=[self._addr],
            build="3c9a1f20b7de",
            host=b"elsewhen",
        )
        return seal_record(record, node.sign)

    def _entry(self, number: int) -> Entry:
        vitals = Vitals(cpu=self._dice.randrange(1000), mem=300, disk=400)
        return Entry(self._signed[number], State.ALIVE, 60_000, 500, 60_000, vitals=vitals, vitals_age_ms=100)

    def _summary(self) -> SignedSummary:
        self._renewal += 1
        summary = Summary(
            mesh=self.mesh,
            mesh_pub=self._identity.pub,
            epoch=1,
            renewal=self._renewal,
            publisher=self._node.pub,
            publisher_name=f"{self.mesh}.gateway.0000",
            addrs=[self._addr],
            host=host_mark(),
            counts={State.ALIVE: self._size},
            ttl_ms=8_000,
        )
        return seal_summary(summary, self._identity.sign)

    async def start(self, seed: tuple[str, int]) -> None:
        self._listener = await Listener.start(
            self._tcp,
            host_key=self._node,
            authorise=self._authorise,
            methods={"hello": self._hello, "directory": self._directory},
        )
        self._backbone = PoolBackbone(
            port=self._port,
            key=self._key,
            identity=self._node,
            mesh=self.mesh,
            name=f"{self.mesh}.gateway.0000",
            kind="gateway",
            host=host_mark(),
            addrs=[self._addr],
            build="",
            start_ms=int(time.time() * 1000),
            incarnation=1,
            heard=lambda signed, age_s, now, addr: False,
            held=lambda now: [],
            on_effect=lambda effect: None,
        )
        self._backbone.start()
        self._backbone.greet([seed])
        self._backbone.publish(self._summary())

    def _authorise(self, key_line: str, username: str, peer: Any) -> Login | None:
        pub = openssh_pub(key_line)
        if username != "mesh" or pub is None:
            return None
        return Login("mesh", None, pub, pub_fingerprint(pub), "observe", key_line)

    async def _hello(self, link: Link, params: Any) -> Any:
        return {}

    async def _directory(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Everything, then each second the share of rows that changed; the summary is renewed every RENEW_S."""
        yield self._frame([self._entry(k) for k in range(self._size)], full=True)
        turn = 0
        while True:
            await asyncio.sleep(1.0)
            turn += 1
            some = self._dice.sample(range(self._size), max(1, round(self._size * CHURN_SHARE_A_S)))
            frame = self._frame([self._entry(k) for k in some], full=False)
            if turn % 2:
                frame |= {"summary": pack(self._summary()), "age_ms": 0}
            yield frame

    def _frame(self, entries: list[Entry], *, full: bool) -> dict[str, Any]:
        return {
            "mesh": self.mesh,
            "full": full,
            "more": False,
            "entries": encode_entries(entries),
            "gone": [],
        }


def measure(hangar: Hangar) -> Iterator[Figure]:
    meshes, size = hangar.runs(50, 5), hangar.runs(200, 50)
    with tempfile.TemporaryDirectory(prefix="qd-bench-") as folder:
        home = Home.open(folder)
        names = [f"far{k:02d}" for k in range(meshes)]
        for name in ("here", *names):
            found_mesh(home, name)
        argv = [
            sys.executable,
            "-P",
            "-m",
            "agent.cli",
            "--home",
            folder,
            "--mesh",
            "here",
            "--kind",
            "gateway",
        ]
        argv += ["--bind", "127.0.0.1", "--port", "0", "--no-mdns"]
        agent = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        try:
            yield from asyncio.run(_measure(home, agent.pid, names, size))
        finally:
            end([agent], 10)


async def _measure(home: Home, pid: int, names: list[str], size: int) -> list[Figure]:
    async with asyncio.timeout(20):
        while True:
            if entries := home.running():
                break
            await asyncio.sleep(0.05)
    process = psutil.Process(pid)
    await asyncio.sleep(2.0)
    alone_mb = process.memory_info().rss / 1e6
    dice = random.Random(7)
    publishers = [Publisher(home, name, size, dice) for name in names]
    client = await attach_entry(home, entries[0])
    began = time.monotonic()
    for publisher in publishers:
        await publisher.start(entries[0].host_port)
    wanted = dict.fromkeys(names, size)
    async with asyncio.timeout(LIMIT_S):
        while True:
            found = {m["mesh"]: m["nodes"]["alive"] for m in await client.meshes() if m["listed"]}
            if found == wanted:
                break
            await asyncio.sleep(0.2)
    whole_s = time.monotonic() - began
    await asyncio.sleep(3.0)
    used, at = _cpu_s(process), time.monotonic()
    await asyncio.sleep(REST_S)
    share = (_cpu_s(process) - used) / (time.monotonic() - at) * 100
    rss_mb = process.memory_info().rss / 1e6
    live = sum(not m["expired"] for m in await client.meshes()) - 1
    await client.close()
    of = f"{len(names)} meshes × {size} nodes"
    note = f"{live} of {len(names)} live at the end; 2 % of the rows change each second"
    return [
        Figure(f"directory of {of}: until whole", "s", [whole_s], note="publishers played beside it"),
        Figure(f"directory of {of}: memory of a follower", "MB", [rss_mb], note=f"{alone_mb:.0f} MB alone"),
        Figure(f"directory of {of}: CPU of a follower", "% of a core", [share], note=note),
    ]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
