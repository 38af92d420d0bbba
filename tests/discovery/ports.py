"""Pools on shared ports of the loopback, for the tests of the port and of the backbone."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable
from typing import Any

from discovery.backbone import PoolBackbone
from discovery.errors import RemoteError
from discovery.identity import Identity, verify
from discovery.lifecycle import State
from discovery.member import Addr, Record
from discovery.pool import Pool
from discovery.port import Port, bind_pair
from discovery.seal import Keyring, Opener, Sealer
from discovery.summary import SignedSummary, Summary, open_summary, seal_summary
from discovery.swim import PushPull, Swim, SwimConfig
from discovery.swim.effects import Effect

HOST = b"one host"
KEY_OF_ALL = b"k" * 32
MESH_KEYS = {name: Identity.from_seed(name.encode().ljust(32, b"!")) for name in ("alpha", "beta", "gamma")}


def summary(mesh: str, epoch: int = 1, renewal: int = 1, **changes: Any) -> SignedSummary:
    """A summary of `mesh`, signed with its key."""
    key = MESH_KEYS[mesh]
    fields = {"publisher": b"p" * 32, "publisher_name": "one", "addrs": [("127.0.0.1", 1)], **changes}
    return seal_summary(
        Summary(mesh=mesh, mesh_pub=key.pub, epoch=epoch, renewal=renewal, **fields), key.sign
    )


class Place:
    """One process: a port with what it needs to take pools."""

    def __init__(self) -> None:
        self.udp, self.tcp = bind_pair("127.0.0.1", 0)
        self.tcp.listen()
        self.addr: Addr = self.udp.getsockname()
        self.incompatible: list[tuple[Addr, int, int]] = []
        self.port = Port(self.udp, on_incompatible=lambda *words: self.incompatible.append(words))

    def close(self) -> None:
        self.port.close()
        self.tcp.close()


def mesh_pool(place: Place, name: str, key: bytes = KEY_OF_ALL, identity: Identity | None = None) -> Pool:
    """A member of the pool of mesh `name` on that port; started."""
    identity = identity or Identity.generate()
    record = Record(
        pub=identity.pub, mesh=name, name="one", kind="gateway", incarnation=1, version=1, state=State.ALIVE,
        addrs=[place.addr], host=HOST,
    )  # fmt: skip
    swim = Swim(
        record=record, sign=identity.sign, verify=verify, config=SwimConfig.lan(sentinels=0),
        rng=random.Random(time.monotonic_ns()), now=time.monotonic(),
    )  # fmt: skip
    ring = Keyring([key])
    sealer = Sealer(ring, f"mesh/{name}", identity.id, time.time_ns() // 1_000_000, random.randbytes(8))
    pool = Pool(
        swim, sealer, Opener(ring, f"mesh/{name}"), place.port,
        on_effect=lambda effect: None, on_persist=lambda incarnation: None,
    )  # fmt: skip
    pool.start()
    return pool


def join(pool: Pool, addr: Addr) -> None:
    pool.swim.join([addr], time.monotonic())
    pool.flush()


class Site:
    """A candidate of a mesh on the backbone, with the simplest of directories: the newest summary of each mesh."""

    def __init__(
        self,
        mesh: str,
        sites: dict[int, Site] | None = None,
        *,
        place: Place | None = None,
        identity: Identity | None = None,
        incarnation: int = 1,
        key: bytes = KEY_OF_ALL,
    ) -> None:
        self.place = place or Place()
        self.identity = identity or Identity.generate()
        self.sites = {} if sites is None else sites
        """Of all that can be called by SSH."""
        self.held: dict[str, tuple[SignedSummary, float]] = {}
        self.heard: list[tuple[str, int, int, float, Addr | None]] = []
        """Mesh, epoch, renewal, age and told by whom, of each summary, news or not."""
        self.effects: list[Effect] = []
        self.persisted: list[int] = []
        self.backbone = PoolBackbone(
            port=self.place.port, key=key, identity=self.identity, mesh=mesh, name="one", kind="gateway",
            host=HOST, addrs=[self.place.addr], build="", start_ms=time.time_ns() // 1_000_000,
            incarnation=incarnation, heard=self.take, held=self.give, on_effect=self.effect,
            on_persist=self.persisted.append,
        )  # fmt: skip
        self.sites[self.id] = self
        self.backbone.start()

    @property
    def id(self) -> int:
        return self.identity.id

    @property
    def addr(self) -> Addr:
        return self.place.addr

    def take(self, signed: SignedSummary, age_s: float, now: float, addr: Addr | None) -> bool:
        try:
            told = open_summary(signed, verify)
        except RemoteError:
            return False
        self.heard.append((told.mesh, told.epoch, told.renewal, age_s, addr))
        known = self.held.get(told.mesh)
        if known is not None and open_summary(known[0], verify).order >= told.order:
            return False
        self.held[told.mesh] = signed, now - age_s
        return True

    def give(self, now: float) -> list[tuple[SignedSummary, float]]:
        return [(signed, now - made) for signed, made in self.held.values()]

    def effect(self, effect: Effect) -> None:
        self.effects.append(effect)
        if isinstance(effect, PushPull):
            self.push_pull(effect.node)

    def push_pull(self, node: int) -> None:
        """As over SSH: a little later, and only where the other knows who calls."""

        def call() -> None:
            other = self.sites.get(node)
            if other is not None and self.id in other.backbone.members:
                answer = other.backbone.push_pull_answer(self.backbone.push_pull_request(), self.id)
                self.backbone.push_pull_merge(answer, node)

        asyncio.get_running_loop().call_later(0.02, call)

    def knows(self, mesh: str, *order: int) -> bool:
        held = self.held.get(mesh)
        return held is not None and (not order or open_summary(held[0], verify).order == order)

    def sees(self, *others: Site) -> bool:
        members = self.backbone.members
        return {n for n, m in members.items() if m.present} == {other.id for other in others}

    def close(self) -> None:
        self.backbone.close()
        self.place.close()


def send_raw(packet: bytes, addr: Addr) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(packet, addr)


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> float:
    """Seconds until it came true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, "what was waited for did not come"
        await asyncio.sleep(0.001)
    return time.monotonic() - began
