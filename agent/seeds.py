"""How a node finds its mesh: run files of its home, members it remembers, `--join`, and mDNS.

Whoever is found is greeted once and answers for itself: no source is trusted for more than an address.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from agent import addresses
from agent.chain.store import REMEMBERED
from agent.founding import read_seeds
from agent.home import RunEntry
from discovery.member import Addr

if TYPE_CHECKING:
    from agent.node import Node

ALONE_S = 2.0
"""A node that nobody answered for this long is alive on its own."""
REMEMBERED_MAX = 32


class Seeds:
    """Looks for members on behalf of a node, and notes where they were for its next start."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._greeted: set[Addr] = set()

    def start(self) -> None:
        """Greets everybody this node may know; Alive at once when there is nobody to look for."""
        seeds = [tuple(a) for a in self._node.journal.get(REMEMBERED, [])]
        near = self._home_nodes()
        self._greet([*near, *seeds])
        named = list(dict.fromkeys([*self._node.settings.join, *self._invited_by()]))
        if named:
            self._node.spawn(self._resolve(named))
        if not self._node.settings.no_mdns:
            self._node.spawn(self._mdns())
        if not (seeds or near or named) and self._node.settings.no_mdns:
            self._node.alone()
        else:
            asyncio.get_running_loop().call_later(
                ALONE_S, self._node.alone, f"nobody answered for {ALONE_S:g} s"
            )

    def look(self, *, again: bool) -> None:
        """Greets nodes that this home has started since; with `again` those too that were greeted before."""
        if again:
            self._greeted.clear()
        self._greet(self._home_nodes())

    def _greet(self, addrs: list[Addr]) -> None:
        mine = set(self._node.swim.me.record.addrs) | {self._node.local_addr}
        new = [a for a in dict.fromkeys(addrs) if a not in mine and a not in self._greeted]
        self._greeted.update(new)
        if new:
            self._node.swim.join(new, time.monotonic())
            self._node.pool.flush()

    def _home_nodes(self) -> list[Addr]:
        """Addresses of this home's other nodes of the mesh, as their run files say."""
        mine = self._node.home.run_file(self._node.settings.mesh, self._node.name).name
        found: list[Addr] = []
        for path in self._node.home.run.glob(f"{self._node.settings.mesh}.*.json"):
            if path.name == mine:
                continue
            entry = RunEntry.read(path)
            if entry is None or entry.mesh != self._node.settings.mesh or entry.host_port in self._greeted:
                continue
            if entry.alive():
                found.append(entry.host_port)
        return found

    def _invited_by(self) -> list[Addr]:
        """Where members were when this home joined, this node's own addresses left out."""
        mine = set(self._node.swim.me.record.addrs) | {self._node.local_addr}
        return [a for a in read_seeds(self._node.home, self._node.settings.mesh) if a not in mine]

    async def _resolve(self, waiting: list[Addr]) -> None:
        """Looks up every --join and what joining noted; a name that has no address yet is tried again until it has one."""
        loop = asyncio.get_running_loop()
        while waiting:
            for addr in list(waiting):
                if found := await loop.run_in_executor(None, addresses.resolve, addr):
                    self._greet(found)
                    waiting.remove(addr)
            if waiting:
                await asyncio.sleep(5.0)

    async def _mdns(self) -> None:
        from discovery.mdns import Mdns

        mdns = Mdns(
            mesh=self._node.settings.mesh,
            node=self._node.identity.id,
            addrs=self._node.swim.me.record.addrs,
            on_found=self._found,
            on_problem=self._on_mdns_problem,
        )
        try:
            await mdns.start()
            await asyncio.Future()
        finally:
            await mdns.close()

    def _found(self, mesh: str, node: int, addrs: list[Addr]) -> None:
        """Somebody on the LAN: of this mesh, or of one that the backbone may know."""
        if mesh == self._node.settings.mesh:
            self._greet(addrs)
        self._node.meshes.backbone.found(addrs)

    def _on_mdns_problem(self, text: str) -> None:
        self._node.events.emit("mdns.problem", reason=text)

    def remember(self) -> None:
        """Notes where members were reached, for the next start."""
        known = [
            m.addr or m.record.addrs[0]
            for m in self._node.swim.members.values()
            if m.present and m.record.addrs
        ]
        if known:
            self._node.journal.set(REMEMBERED, sorted([list(a) for a in known])[:REMEMBERED_MAX])
