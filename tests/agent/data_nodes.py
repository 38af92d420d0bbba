"""Nodes as far as artifacts go: real listeners and links on loopback, a data room and an engine each."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from agent.data.blobs import Entry
from agent.data.chunks import CHUNK_BYTES, list_digest, sums_of
from agent.data.judging import PutJudge
from agent.data.puts import build_put, decode_put
from agent.data.room import DataRoom
from agent.data.scoring import Candidate
from agent.executor import DispatchError
from agent.meshos.actions import Action
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Admin, AdminOp, Event, Health, NodeHealth, PeerState
from agent.operators import Operator
from agent.opmessage import NAMESPACE, new_ulid
from agent.runtime import MeshOsRuntime
from discovery import sshsig
from discovery.errors import Refused, Unreachable
from discovery.identity import Identity, id_text, node_id, raw_ed25519
from discovery.links import Link, Listener, Login, dial
from discovery.member import Addr
from tests.discovery.loopback import bound, until

MESH = "alpha"
OPERATOR = Identity.from_seed(b"o" * 32)
SOON = MeshOsConfig(tick_interval_ms=20, stabilise_ms=40, pull_cooldown_ms=5, dead_after_ms=200)
"""The engine in a hurry: what takes a minute takes a moment."""


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def chunks_of(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


def entry_for(
    name: str,
    data: bytes,
    *,
    replicas: int = 1,
    at_ms: int = 1_000,
    mesh: str = MESH,
    signer: Identity = OPERATOR,
) -> Entry:
    """The entry of a put that was signed at that time."""
    sums = sums_of(chunks_of(data))
    message = build_put(
        name=name,
        hash=sums.hash,
        list=list_digest(sums.list),
        size=len(data),
        replicas=replicas,
        mesh=mesh,
        target="0" * 16,
        op_id=new_ulid(at_ms, os.urandom(10)),
        nonce="0" * 32,
        now_ms=at_ms,
    )
    signature = sshsig.sign(message, signer, NAMESPACE)
    fingerprint = sshsig.verify(message, signature, NAMESPACE).fingerprint
    return Entry.of(decode_put(message), fingerprint, message, signature)


class Roll:
    """Who may put: OPERATOR operates, and whoever else is in `pubs`."""

    def __init__(self) -> None:
        self.role = "operate"
        self.pubs = [OPERATOR.pub]

    def judge(self, key: str | bytes, peer_addr: str | None, now_ms: int) -> Operator:
        if not isinstance(key, bytes) or key[-32:] not in self.pubs:
            raise Refused("unknown_key", "not an operator here")
        return Operator(self.role, "olga", "SHA256:olga", 1)

    def name_of(self, blob: bytes) -> str | None:
        return "olga"


class Station:
    """One node. `apart`: stations that it can't dial now."""

    def __init__(self, world: World, name: str, place: Path, config: MeshOsConfig, **more: Any) -> None:
        self.world, self.name, self.place, self.config = world, name, place, config
        self.identity = Identity.from_seed(name.encode().ljust(32, b"-"))
        self.id = self.identity.id
        self.more = more
        self.nonces: set[str] = set()
        self.emitted: list[tuple[str, dict[str, Any]]] = []
        self.links: dict[int, Link] = {}
        self.dialling: dict[int, asyncio.Lock] = {}
        self.cordoned = False
        self.up = False
        self.wall_ms = 1_000_000
        self.roll = Roll()
        self.failed: list[str] = []

    async def start(self) -> None:
        self.up = True
        self.runtime = MeshOsRuntime.start(self.config, self, this_node=self.id)
        self.room = DataRoom(
            self.place,
            me=self.id,
            incarnation=time.monotonic_ns(),
            mesh=MESH,
            link_to=self.link_to,
            members=self.members,
            offer=self.offer,
            draining=lambda: self.runtime.loop.state.draining,
            judge=PutJudge(
                mesh=MESH,
                target=id_text(self.id),
                authority=self.roll,
                take_nonce=self.take_nonce,
                wall_ms=lambda: self.wall_ms,
            ),
            emit=lambda kind, **fields: self.emitted.append((kind, fields)),
            **{"reserve_bytes": 0, **self.more},
        )
        sock = bound()
        self.addr: Addr = sock.getsockname()
        self.listener = await Listener.start(
            sock,
            host_key=self.identity,
            authorise=self.world.authorise,
            methods={**self.room.methods(), "hello": self.hello, "challenge": self.challenge},
            on_link=self.adopt,
        )
        self.room.start()

    async def close(self) -> None:
        self.up = False
        await self.room.close()
        await self.runtime.shutdown()
        for link in list(self.links.values()):
            await link.close()
        await self.listener.close()

    def adopt(self, link: Link) -> None:
        if link.login.node is not None:
            self.links[link.login.node] = link

    async def hello(self, link: Link, params: Any) -> Any:
        return {"id": id_text(self.id), "name": self.name, "mesh": MESH, "kind": "broker", "state": "alive"}

    async def challenge(self, link: Link, params: Any) -> Any:
        nonce = os.urandom(16).hex()
        self.nonces.add(nonce)
        return {"nonce": nonce, "wall_ms": self.wall_ms, "mesh": MESH, "name": self.name, "route": "local"}

    def take_nonce(self, nonce: str) -> bool:
        known = nonce in self.nonces
        self.nonces.discard(nonce)
        return known

    def members(self) -> dict[int, Candidate]:
        return {
            station.id: Candidate(
                station.id,
                station.name,
                live=station.up,
                cordoned=station.cordoned,
                draining=station.up and station.runtime.loop.state.draining,
                disk=0.5,
                rtt_ms=1.0,
            )
            for station in self.world.stations
        }

    async def link_to(self, node: int) -> Link:
        async with self.dialling.setdefault(node, asyncio.Lock()):
            if (link := self.links.get(node)) is not None and not link.closed:
                return link
            other = next((s for s in self.world.stations if s.id == node and s.up), None)
            if other is None:
                raise Unreachable("nobody there")
            link = self.links[node] = await dial(
                other.addr,
                identity=self.identity,
                username="member",
                expect_pub=other.identity.pub,
                methods=self.room.methods(),
            )
            return link

    def offer(self, event: Event) -> bool:
        loop = self.runtime.loop
        return loop.closed or (loop.has_room() and loop.try_publish(event))

    def tell(self, event: Event) -> None:
        self.room._tell(event)

    async def dispatch(self, action: Action) -> None:
        try:
            assert await self.room.dispatch(action)
        except DispatchError as why:
            self.failed.append(f"{action.KIND}: {why}")
            raise

    # --- by hand

    async def take(self, name: str, data: bytes, *, replicas: int = 1, at_ms: int = 1_000) -> Entry:
        """Has this node hold an artifact, as if it had been put here."""
        entry = entry_for(name, data, replicas=replicas, at_ms=at_ms)
        store = self.room.store
        part = store.part(entry.hash, entry.size, sums_of(chunks_of(data)).list)
        part.open()
        for chunk in chunks_of(data):
            part.add(chunk)
        store.adopt(part)
        store.keep(entry)
        self.room.artifacts.refresh(name)
        return entry

    def holds(self, name: str) -> bool:
        return self.room.artifacts.head(name) is not None

    async def admin(self, op: Any, **fields: Any) -> None:
        await self.runtime.loop.publish(Admin(AdminOp(op, self.id, **fields)))
        for other in self.world.stations:
            if other is not self and other.up:
                draining = self.runtime.loop.state.draining or op == "drain"
                await other.runtime.loop.publish(PeerState(self.id, draining=draining and op != "resume"))


class World:
    """Stations that know each other."""

    def __init__(self) -> None:
        self.stations: list[Station] = []

    def authorise(self, key_line: str, username: str, addr: Addr) -> Login | None:
        pub = raw_ed25519(base64.b64decode(key_line.split()[1]))
        assert pub is not None
        if username == "member" and any(s.identity.pub == pub for s in self.stations):
            return Login("member", node_id(pub), pub, f"of {node_id(pub)}", None, key_line)
        if username in ("home", "op", "mesh"):
            return Login(username, None, pub, f"as {username}", "operate", key_line)  # type: ignore[arg-type]
        return None

    def changed(self) -> None:
        """All see who lives now."""
        for station in self.stations:
            if station.up:
                station.room.members_changed()
                for other in self.stations:
                    if other is not station:
                        health = Health.HEALTHY if other.up else Health.UNREACHABLE
                        station.tell(NodeHealth(other.id, health))

    async def end(self, station: Station) -> None:
        """A node vanishes."""
        await station.close()
        self.changed()


@contextlib.asynccontextmanager
async def world(
    tmp_path: Path, count: int, config: MeshOsConfig = SOON, kind: type[Station] = Station, **more: Any
) -> AsyncIterator[list[Any]]:
    """So many stations, in ascending order of their ids, that all know each other."""
    made = World()
    names = [f"node-{at}" for at in range(count)]
    stations = [kind(made, name, tmp_path / name, config, **more) for name in names]
    stations.sort(key=lambda station: station.id)
    made.stations = stations
    for station in stations:
        await station.start()
    made.changed()
    await until(lambda: all(met(one, other) for one in stations for other in stations))
    try:
        yield stations
    finally:
        for station in stations:
            if station.up:
                await station.close()


def met(station: Station, other: Station) -> bool:
    """Whether a station knows what another holds, and has nothing to tell or to ask any more."""
    return not station.room.announcer._tasks and station.room.holdings.knows(other.id, other.room.own.note())


async def held_by(stations: list[Station], name: str, count: int, within_s: float = 8.0) -> list[Station]:
    """The stations that hold an artifact, once they are so many and each of them knows it."""
    up = [s for s in stations if s.up]

    def settled() -> bool:
        holding = sorted(s.id for s in up if s.holds(name))
        key: Any = ("artifact", name)
        return len(holding) == count and all(s.room.holdings.live_holders(key) == holding for s in up)

    await until(settled, within_s)
    return [s for s in up if s.holds(name)]


def run(work: Callable[[], Any]) -> None:
    asyncio.run(work())
