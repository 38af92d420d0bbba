"""A mesh of nodes in virtual time: the real engine, executor, fold and placing of each; links, disks and clocks played.

An hour passes as fast as the machine can think. Every copy that comes or goes, and every pull and migration that
admit lets out, is written down with its time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from agent.data.holdings import Holdings, Item, Own
from agent.data.placing import Placing
from agent.data.scoring import Candidate
from agent.executor import DispatchError
from agent.meshos.actions import Action
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Admin, AdminOp, Event, Health, NodeHealth, PeerState
from agent.runtime import MeshOsRuntime
from discovery.errors import Refused, Unreachable
from discovery.links import Login

HOP_S = 0.002
BYTES_PER_S = 100e6
HEALTH_EVERY_S = 5.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time jumps to the next timer as soon as there is nothing else to do."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class _Caller:
    """What a served method sees of the other end."""

    def __init__(self, node: int) -> None:
        self.login = Login("member", node, b"", f"of {node}", None, "")


class SimNode:
    """One node: `disk` is what it holds, whole."""

    def __init__(self, sim: Sim, node: int, config: MeshOsConfig) -> None:
        self.sim, self.id = sim, node
        self.up = True
        self.load = 0.5
        """Of its disk and its CPU."""
        self.disk: dict[str, Item] = {}
        self.failed: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        self.runtime = MeshOsRuntime.start(config, self, this_node=node, clock=loop.time)
        self.own, self.holdings = Own(1), Holdings(node)
        self.placing = Placing(
            me=node,
            own=self.own,
            holdings=self.holdings,
            holders={"artifact": self},
            members=self.members,
            call=self.call,
            learn=self.learn,
            tell=self.runtime.executor.tell,
            draining=lambda: self.runtime.loop.state.draining,
            clock=loop.time,
        )
        self.methods = self.placing.methods()

    def members(self) -> dict[int, Candidate]:
        return {
            other.id: Candidate(
                other.id,
                live=other.up,
                draining=other.runtime.loop.state.draining,
                disk=other.load,
                cpu=other.load,
            )
            for other in self.sim.nodes
        }

    async def call(self, node: int, method: str, params: Any, timeout_s: float) -> Any:
        await asyncio.sleep(HOP_S)
        other = self.sim.node(node)
        if not other.up:
            raise Unreachable("nobody there")
        handler: Any = other.methods[method]
        answer = await handler(_Caller(self.id), params)
        await asyncio.sleep(HOP_S)
        return answer

    async def learn(self, node: int) -> None:
        self.hear(self.sim.node(node))

    def hear(self, other: SimNode) -> None:
        """What another one tells of itself reaches this one."""
        assert self.holdings.heard(other.id, other.own.told(self.holdings.version(other.id)))
        self.look()

    def look(self) -> None:
        """The fold's news go to the engine."""
        live = [other.id for other in self.sim.nodes if other.up]
        self.holdings.live(live, (), self.sim.now_ms)
        self.holdings.own(self.own)
        for event in self.holdings.events():
            self.runtime.executor.tell(event)
        self.placing.settle()

    async def dispatch(self, action: Action) -> None:
        self.sim.went.append((self.sim.now_ms, self.id, action))
        try:
            assert await self.placing.dispatch(action)
        except DispatchError as why:
            self.failed[f"{action.KIND}: {why.reason.partition(': ')[2]}"] += 1
            raise

    # --- ChainHolder

    def head(self, name: str) -> str | None:
        found = self.disk.get(name)
        return None if found is None else found.hash

    def covers(self, name: str, head: str) -> bool:
        return self.head(name) == head

    async def hold(self, name: str, sources: Sequence[int], progress: Callable[[int, int], None]) -> None:
        for source in sources:
            item = self.sim.node(source).disk.get(name)
            if item is not None and self.sim.node(source).up:
                await asyncio.sleep(HOP_S + item.size / BYTES_PER_S)
                self.take(item)
                return
        raise Refused("unknown", "nobody has it")

    async def drop(self, name: str) -> None:
        del self.disk[name]
        self.own.remove("artifact", name)
        self.changed()

    def take(self, item: Item) -> None:
        self.disk[item.name] = item
        self.own.add(item)
        self.changed()

    def changed(self) -> None:
        self.sim.check()
        self.look()
        for other in self.sim.nodes:
            if other is not self:
                asyncio.get_running_loop().call_later(10 * HOP_S, self._reach, other)

    def _reach(self, other: SimNode) -> None:
        if self.up and other.up:
            other.hear(self)

    def tell(self, event: Event) -> None:
        self.runtime.executor.tell(event)


class Sim:
    """The mesh. `check` is called whenever a copy came or went; `went` is what admit let out: (ms, node, action)."""

    def __init__(self, count: int, config: MeshOsConfig | None = None) -> None:
        self.nodes: list[SimNode] = []
        self.went: list[tuple[int, int, Action]] = []
        self.check: Callable[[], None] = lambda: None
        for node in range(1, count + 1):
            self.nodes.append(SimNode(self, node, config or MeshOsConfig()))
        self._beat = asyncio.get_running_loop().create_task(self._health())

    @property
    def now_ms(self) -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def node(self, node: int) -> SimNode:
        return self.nodes[node - 1]

    def copies(self, name: str) -> list[SimNode]:
        return [node for node in self.nodes if node.up and name in node.disk]

    async def _health(self) -> None:
        while True:
            for node in self.nodes:
                for other in self.nodes:
                    if node is not other and node.up:
                        health = Health.HEALTHY if other.up else Health.UNREACHABLE
                        node.tell(NodeHealth(other.id, health))
                        node.tell(PeerState(other.id, draining=other.runtime.loop.state.draining))
                node.look()
            await asyncio.sleep(HEALTH_EVERY_S)

    async def admin(self, op: Any, node: int) -> None:
        for other in self.nodes:
            if other.up:
                await other.runtime.loop.publish(Admin(AdminOp(op, node)))
        for other in self.nodes:
            other.look()

    async def until(self, condition: Callable[[], bool], within_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while not condition():
            assert loop.time() < deadline, f"not within {within_s:g} s of virtual time"
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        self._beat.cancel()
        for node in self.nodes:
            await node.placing.close()
            await node.runtime.shutdown()


def in_virtual_time(work: Callable[[], Any]) -> Any:
    """Runs a coroutine function on a virtual loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())
