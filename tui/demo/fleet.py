"""A fleet of real agents on loopback: booted together, watched until everybody sees everybody, ended without a rest.

Every node has a pipe to this process whose end is its goodbye, so no node outlives it, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from agent.daemons.leftovers import end_leftovers
from agent.founding import found_mesh
from agent.home import Home, RunEntry
from agent.spawn import Seat, last_words, numbered_seat, seated, start_node
from discovery.errors import LocalError, QuarterdeckError
from discovery.identity import check_kind, check_mesh

if TYPE_CHECKING:
    from tui.client import Client

DEFAULT_FLEET = "alpha=gateway:1,broker:2,compute:2 beta=gateway:1,broker:3 gamma=console:1"
MAX_NODES = 200
LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 32_000)
"""Below the range from which the system takes ports by itself."""
MAX_JOINS = 8
BOOT_LIMIT_S = 30.0
BOOT_LIMIT_PER_NODE_S = 1.0
LOOK_EVERY_S = 0.05
REAP_EVERY_S = 0.2
GOODBYE_LIMIT_S = 3.0
SETTLED = frozenset({"alive", "degraded"})

Plan = list[tuple[str, list[tuple[str, int]]]]
"""Meshes in order, each with its (kind, count) in order."""
Tell = Callable[[str], None]

JANITOR = """trap '' INT TERM HUP
while read -r pid; do pids="$pids $pid"; done
for p in $pids; do kill -CONT "$p"; done 2>/dev/null
sleep 3
for p in $pids; do kill -KILL "$p"; done 2>/dev/null
for f in "$1"/state/*/*/daemons/*/run.json; do
  run=$(sed -n 's/.*"id":"\\([^"]*\\)".*/\\1/p' "$f")
  for e in /proc/[0-9]*/environ; do
    p=${e#/proc/}
    tr '\\0' '\\n' <"$e" | grep -qxF "QD_DAEMON_RUN=$run" && kill -KILL "${p%/environ}"
  done
done 2>/dev/null
rm -rf -- "$1"
"""
"""Waits for the end of its stdin, which comes early only when the demo was killed outright, and cleans up then."""


class StaleFleet(QuarterdeckError):
    """Nodes that don't run the code on disk: nothing may be concluded from them."""


def parse_plan(text: str) -> Plan:
    """The plan of `alpha=gateway:1,broker:2 beta=…`. LocalError says what is wrong with it."""
    plan: Plan = []
    for part in text.split():
        mesh, equals, kinds = part.partition("=")
        if not equals or not kinds:
            raise LocalError(f"fleet {part!r}: not a mesh of a fleet; write it as alpha=gateway:1,broker:2")
        check_mesh(mesh)
        if mesh in (name for name, _ in plan):
            raise LocalError(f"fleet: mesh {mesh} is there twice; write it once")
        counted = []
        for item in kinds.split(","):
            found = re.fullmatch(r"([^:]+):([0-9]{1,3})", item, re.ASCII)
            if found is None or not int(found[2]):
                raise LocalError(f"fleet {item!r}: not a kind and its count; write it as broker:2")
            counted.append((check_kind(found[1]), int(found[2])))
        plan.append((mesh, counted))
    total = sum(count for _, kinds in plan for _, count in kinds)
    if not 1 <= total <= MAX_NODES:
        raise LocalError(f"fleet of {total} nodes; 1 to {MAX_NODES} can be booted")
    return plan


@dataclass(eq=False)
class FleetNode:
    """One node of the fleet: its seat and port, then its process, then what it says of itself."""

    seat: Seat
    port: int
    process: subprocess.Popen[bytes] | None = None
    entry: RunEntry | None = None
    client: Client | None = None
    fresh: bool | None = None
    ended: bool = False

    @property
    def mesh(self) -> str:
        return self.seat.mesh

    @property
    def kind(self) -> str:
        return self.seat.kind

    @property
    def name(self) -> str:
        return self.entry.name if self.entry else self.seat.node

    @property
    def id(self) -> str:
        return self.entry.id if self.entry else ""

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def build(self) -> str:
        """The build that the node itself said it runs, when it was asked."""
        return str(self.client.hello.get("build") or "") if self.client else ""

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Fleet:
    """`boot`, then whatever is to be done with `nodes`, then `stop`, which may be called at any time."""

    plan: Plan
    home: Home
    made_home: bool
    tell: Tell
    nodes: list[FleetNode] = field(default_factory=list)
    ready_ms: int | None = None
    build: str = ""
    _janitor: subprocess.Popen[bytes] | None = None
    _reaper: asyncio.Task[None] | None = None

    @classmethod
    def under(cls, plan: Plan, home: str | None, tell: Tell) -> Fleet:
        """A fleet under `home`, or under a temporary one that it makes and removes."""
        root = home or tempfile.mkdtemp(prefix="qd-demo-")
        return cls(plan, Home.open(root), home is None, tell)

    async def boot(self) -> None:
        """Starts every node and returns when in each mesh each one sees all others; StaleFleet by the gate.

        LocalError when a mesh or a node can't be made, QuarterdeckError naming the node that failed or is late.
        """
        began = time.monotonic()
        self._watch_over()
        for mesh, _ in self.plan:
            found_mesh(self.home, mesh)
        self._seat()
        meshes = len(self.plan)
        self.tell(
            f"booting {_count(len(self.nodes))} in {meshes} mesh{'es' * (meshes != 1)} under {self.home.root}"
        )
        for node in self.nodes:
            self._start(node)
        await asyncio.sleep(0)
        limit_s = BOOT_LIMIT_S + BOOT_LIMIT_PER_NODE_S * len(self.nodes)
        try:
            async with asyncio.timeout(limit_s):
                await self._until_seen()
        except TimeoutError:
            raise QuarterdeckError(
                f"demo: {await self._who_is_missing()} after {limit_s:g} s; {self._logs()}"
            ) from None
        self.ready_ms = round((time.monotonic() - began) * 1000)
        self._reaper = asyncio.create_task(self._reap())
        self.gate()
        self.tell(
            f"{_count(len(self.nodes))} see each other after {self.ready_ms / 1000:.1f} s, build {self.build} fresh"
        )

    async def add(self, mesh: str, kind: str) -> FleetNode:
        """Starts one more node of that mesh and returns when every node of the mesh, itself too, shows it as settled.

        QuarterdeckError naming it when it ends before that, or takes too long.
        """
        node = FleetNode(numbered_seat(self.home, mesh, kind), next(free_ports(1)))
        first = next((k for k, n in enumerate(self.nodes) if n.mesh == mesh), len(self.nodes))
        self.nodes.insert(first, node)
        self._start(node)
        try:
            async with asyncio.timeout(BOOT_LIMIT_S):
                while node.entry is None:
                    if not node.running():
                        why = last_words(node.seat.log_file(self.home)) or "no word of it"
                        raise QuarterdeckError(
                            f"demo: {node.name} ended while booting: {why}; {self._logs()}"
                        )
                    node.entry = next((e for e in self.home.running() if e.pid == node.pid), None)
                    await asyncio.sleep(LOOK_EVERY_S)
                for other in self.nodes:
                    if other.mesh == mesh and other.running():
                        await self._shows(other, node)
        except TimeoutError:
            raise QuarterdeckError(f"demo: {node.name} is not seen after {BOOT_LIMIT_S:g} s") from None
        node.fresh = node.build == self.build
        return node

    async def _shows(self, viewer: FleetNode, node: FleetNode) -> None:
        while True:
            if not await self._missing_from(viewer, [node]):
                return
            await asyncio.sleep(LOOK_EVERY_S)

    def gate(self) -> None:
        """Freshness before conclusions: every running node's build must be the code on disk, else StaleFleet."""
        from agent.freshness import fingerprint

        self.build = fingerprint()
        for node in self.nodes:
            node.fresh = node.build == self.build
        stale = [
            f"{n.name} runs {n.build or 'an unknown build'}"
            for n in self.nodes
            if n.running() and not n.fresh
        ]
        if stale:
            raise StaleFleet(
                f"demo: stale code: {', '.join(stale)}, the disk holds {self.build}; start it again"
            )

    def document(self) -> dict[str, Any]:
        """The one line of `--headless --json`."""
        meshes: dict[str, Any] = {mesh: {"nodes": []} for mesh, _ in self.plan}
        for node in self.nodes:
            meshes[node.mesh]["nodes"].append(
                {
                    "name": node.name,
                    "id": node.id,
                    "kind": node.kind,
                    "pid": node.pid,
                    "addr": node.entry.addr if node.entry else None,
                    "build": node.build,
                    "fresh": node.fresh,
                }
            )
        return {
            "home": str(self.home.root),
            "meshes": meshes,
            "build": self.build,
            "fresh": all(node.fresh for node in self.nodes),
            "ready_ms": self.ready_ms,
        }

    async def stop(self) -> None:
        """Ends every process of this home (goodbye first, SIGKILL after GOODBYE_LIMIT_S) and removes a home it made."""
        if self._reaper is not None:
            self._reaper.cancel()
        try:
            await asyncio.gather(*(_close(n.client) for n in self.nodes if n.client), return_exceptions=True)
            await end_all([n.process for n in self.nodes if n.process is not None], self._strangers())
        finally:
            self.sweep()

    def sweep(self) -> None:
        """Removes what may be left, without waiting: for the end of a process that has no loop any more."""
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.kill()
                node.process.wait()
        if not self.home.running():
            end_leftovers(self.home.state)
        if self.made_home and self.home.root is not None:
            shutil.rmtree(self.home.root, ignore_errors=True)
        if self._janitor is not None:
            self._janitor.kill()
            self._janitor.wait()
            if self._janitor.stdin is not None:
                with contextlib.suppress(OSError):
                    self._janitor.stdin.close()
            self._janitor = None

    def _watch_over(self) -> None:
        """Starts the janitor of a home that this fleet made."""
        if self.made_home:
            self._janitor = subprocess.Popen(
                ["/bin/sh", "-c", JANITOR, "qd-demo-janitor", str(self.home.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )

    def _seat(self) -> None:
        """Gives every node its seat and its port, in the order of the plan."""
        ports = free_ports(sum(count for _, kinds in self.plan for _, count in kinds))
        busy = {entry.name for entry in self.home.running()}
        for mesh, kinds in self.plan:
            for kind, count in kinds:
                old = [seat for seat in seated(self.home, mesh, kind) if seat.node not in busy]
                for _ in range(count):
                    seat = old.pop(0) if old else numbered_seat(self.home, mesh, kind)
                    busy.add(seat.node)
                    self.nodes.append(FleetNode(seat, next(ports)))

    def _start(self, node: FleetNode) -> None:
        """Starts one node; it greets the others of its mesh, so whichever comes last finds those before it."""
        joins = [f"{LOOPBACK}:{n.port}" for n in self.nodes if n.mesh == node.mesh and n is not node][
            :MAX_JOINS
        ]
        args = [*node.seat.argv(), "--bind", LOOPBACK, "--port", str(node.port), "--no-mdns"]
        for join in joins:
            args += ["--join", join]
        node.process = start_node(self.home, args, node.seat.log_file(self.home), goodbye_pipe=True)
        if self._janitor is not None and self._janitor.stdin is not None:
            with contextlib.suppress(OSError):
                self._janitor.stdin.write(f"{node.process.pid}\n".encode())
                self._janitor.stdin.flush()

    async def _until_seen(self) -> None:
        """Waits for every node to be up, and for its view to hold all of its mesh."""
        told = 0
        waiting = set(self.nodes)
        watching: dict[FleetNode, asyncio.Task[None]] = {}
        try:
            while waiting or not all(task.done() for task in watching.values()):
                entries = {entry.pid: entry for entry in self.home.running()} if waiting else {}
                for node in list(waiting):
                    node.entry = entries.get(node.pid)
                    if node.entry is not None:
                        waiting.discard(node)
                        watching[node] = asyncio.create_task(self._sees_all(node, waiting))
                for node in self.nodes:
                    if not node.running():
                        code = node.process.returncode if node.process else None
                        why = last_words(node.seat.log_file(self.home)) or f"exit {code}"
                        raise QuarterdeckError(
                            f"demo: {node.name} ended while booting: {why}; {self._logs()}"
                        )
                up = len(self.nodes) - len(waiting)
                if up != told:
                    told = up
                    self.tell(f"{up} of {len(self.nodes)} up")
                await asyncio.sleep(LOOK_EVERY_S)
            for task in watching.values():
                await task
        finally:
            for task in watching.values():
                task.cancel()

    async def _sees_all(self, node: FleetNode, waiting: set[FleetNode]) -> None:
        """Returns when `node` shows every node of its mesh, itself too, as settled."""
        others = [n for n in self.nodes if n.mesh == node.mesh]
        while True:
            if not any(n in waiting for n in others) and not await self._missing_from(node, others):
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def _missing_from(self, node: FleetNode, others: list[FleetNode]) -> list[FleetNode]:
        """Those of `others` that `node` does not show as settled; all of them while it doesn't answer."""
        from tui.client import attach_entry

        try:
            if node.client is None or node.client.closed:
                assert node.entry is not None
                node.client = await attach_entry(self.home, node.entry)
            rows = {row.get("id"): row for row in await node.client.nodes(node.mesh)}
        except QuarterdeckError:
            return others
        return [n for n in others if rows.get(n.id, {}).get("state") not in SETTLED]

    async def _who_is_missing(self) -> str:
        """Which node is not seen by whom, in words."""
        for node in self.nodes:
            if node.entry is None:
                return f"{node.name} is not up"
        for node in self.nodes:
            others = [n for n in self.nodes if n.mesh == node.mesh]
            if missing := await self._missing_from(node, others):
                return f"{node.name} does not see {missing[0].name}"
        return "the fleet is not ready"

    def _logs(self) -> str:
        """Where a person finds the nodes' logs: a home that this fleet made goes with it."""
        return "give it a --home to keep the logs" if self.made_home else f"see {self.home.state}"

    async def _reap(self) -> None:
        """Reaps nodes that end, and tells; a node that ends is never restarted and ends nothing else."""
        while True:
            for node in self.nodes:
                if not node.ended and not node.running():
                    node.ended = True
                    code = node.process.returncode if node.process else None
                    self.tell(f"{node.name} ended ({_ending(code)})")
            await asyncio.sleep(REAP_EVERY_S)

    def _strangers(self) -> list[psutil.Process]:
        """Other nodes of a home that this fleet made: whoever started them, their home is about to go."""
        if not self.made_home:
            return []
        ours = {node.pid for node in self.nodes}
        found = []
        for entry in self.home.running():
            if entry.pid not in ours:
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(entry.pid))
        return found


async def end_all(
    processes: list[subprocess.Popen[bytes]],
    strangers: list[psutil.Process],
    limit_s: float = GOODBYE_LIMIT_S,
) -> None:
    """Ends our children and `strangers` side by side."""
    from tui.launch import end_processes

    for stranger in strangers:
        for number in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(psutil.Error):
                stranger.send_signal(number)
    await end_processes(processes, limit_s)
    for stranger in strangers:
        with contextlib.suppress(psutil.Error):
            stranger.wait(0.5)
        with contextlib.suppress(psutil.Error):
            stranger.kill()


async def _close(client: Client) -> None:
    with contextlib.suppress(Exception):
        await client.close()


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit {code}"


def free_ports(count: int) -> Any:
    """`count` ports, each free for UDP and TCP on loopback when it was looked at, as an iterator."""
    taken: set[int] = set()
    for _ in range(count * 50):
        if len(taken) == count:
            break
        port = random.choice(PORTS)
        with (
            contextlib.suppress(OSError),
            socket.socket() as tcp,
            socket.socket(type=socket.SOCK_DGRAM) as udp,
        ):
            tcp.bind((LOOPBACK, port))
            udp.bind((LOOPBACK, port))
            taken.add(port)
    if len(taken) < count:
        raise LocalError(
            f"demo: no {count} free ports between {PORTS.start} and {PORTS.stop}; end what holds them"
        )
    return iter(sorted(taken))
