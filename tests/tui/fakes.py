"""A fleet that never was: plausible rows, events and a client that plays them, for tests and screenshots."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from discovery.errors import Refused, Unreachable

WALL_MS = 1_767_089_000_000

KEYS = {
    "id": None,
    "name": None,
    "mesh": "alpha",
    "kind": "compute",
    "state": "alive",
    "since_ms": 7_200_000,
    "source": "gossip",
    "cpu": 0.1,
    "mem": 0.4,
    "disk": 0.5,
    "rtt_ms": 0.4,
    "addr": "127.0.0.1:7946",
    "build": "3c9a1f20b7de",
    "fresh": True,
    "wire": 1,
    "maintenance": "active",
    "maintenance_until_ms": None,
    "cordoned": False,
    "daemons": {"running": 0, "total": 0},
    "failures": 0,
    "last_seen_ms": 400,
    "tags": {},
    "evidence": None,
    "period_ms": 5000,
    "incarnation": 3,
    "suspect": False,
}


def row(name: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row as an agent serves it. The id follows from `number`, kind and mesh from the name where it tells them."""
    parts = name.split(".")
    given: dict[str, Any] = dict(KEYS, name=name, id=f"{number or abs(hash(name)) % 2**60:016x}")
    if len(parts) == 3:
        given |= {"mesh": parts[0], "kind": parts[1]}
    given |= {"history": wave(given["id"], changes.get("cpu", 0.1))}
    return given | changes


def wave(seed: str, level: float | None, count: int = 60) -> list[int | None]:
    """A history of permille that ends near `level`."""
    if level is None:
        return []
    phase = int(seed[-3:], 16) / 650
    return [
        max(
            0,
            min(
                1000,
                round(
                    1000 * level * (0.72 + 0.28 * math.sin(at / 4.1 + phase) * math.cos(at / 9.7 + phase * 2))
                ),
            ),
        )
        for at in range(count)
    ]


def fleet() -> list[dict[str, Any]]:
    """Fourteen nodes of three meshes, with every state and most kinds of trouble."""
    return [
        row(
            "alpha.console.31aa90",
            0x31AA90,
            source="self",
            rtt_ms=None,
            last_seen_ms=0,
            cpu=0.02,
            mem=0.2,
            since_ms=240_000,
            addr="127.0.0.1:7941",
        ),
        row(
            "alpha.gateway.4f1a77",
            0x4F1A77,
            cpu=0.09,
            mem=0.33,
            rtt_ms=0.3,
            since_ms=180_000_000,
            tags={"zone": "a"},
        ),
        row(
            "alpha.broker.11c3a0",
            0x11C3A0,
            cpu=0.06,
            mem=0.35,
            rtt_ms=0.4,
            since_ms=180_000_000,
            tags={"zone": "a"},
        ),
        row(
            "alpha.broker.77b1e9",
            0x77B1E9,
            state="degraded",
            reason="cpu over 95 % for 15 s",
            cpu=0.98,
            mem=0.71,
            rtt_ms=1.9,
            since_ms=190_000,
            failures=2,
            tags={"zone": "b"},
        ),
        row(
            "alpha.broker.0ad412",
            0x0AD412,
            state="draining",
            cpu=0.04,
            mem=0.38,
            rtt_ms=0.6,
            since_ms=40_000,
            deadline_ms=260_000,
            cordoned=True,
            reason="drained by op@laptop",
        ),
        row(
            "alpha.compute.5d20bb",
            0x5D20BB,
            state="updating",
            cpu=None,
            mem=None,
            rtt_ms=0.5,
            since_ms=6_000,
            last_seen_ms=2_000,
        ),
        row(
            "alpha.compute.c80d15",
            0xC80D15,
            cpu=0.41,
            mem=0.52,
            rtt_ms=12.4,
            since_ms=18_000_000,
            fresh=False,
            build="9b07c2aa4410",
            tags={"zone": "b"},
        ),
        row(
            "alpha.compute.e91b04",
            0xE91B04,
            cpu=0.38,
            mem=0.5,
            rtt_ms=0.7,
            since_ms=18_000_000,
            tags={"zone": "a"},
        ),
        row(
            "alpha.compute.9e02f1",
            0x9E02F1,
            state="dead",
            cpu=0.5,
            mem=0.5,
            since_ms=12_000,
            last_seen_ms=12_400,
            evidence={
                "kind": "exited",
                "by": ["alpha.broker.11c3a0", "alpha.gateway.4f1a77"],
                "text": "process gone (or a firewall closed its port)",
            },
        ),
        row("beta.gateway.b03c21", 0xB03C21, cpu=0.12, mem=0.44, rtt_ms=18.2, since_ms=400_000),
        row("beta.broker.77aa01", 0x77AA01, cpu=0.31, mem=0.61, rtt_ms=18.9, since_ms=400_000, suspect=True),
        row(
            "beta.broker.d2c9f0",
            0xD2C9F0,
            cpu=0.22,
            mem=0.57,
            rtt_ms=None,
            since_ms=400_000,
            last_seen_ms=19_000,
        ),
        row("beta.broker.e4410c", 0xE4410C, cpu=0.17, mem=0.48, rtt_ms=22.0, since_ms=400_000),
        row(
            "gamma.console.6b2f00", 0x6B2F00, cpu=0.01, mem=0.19, rtt_ms=0.9, state="joining", since_ms=1_000
        ),
    ]


def event(kind: str, name: str, at_s: float, **changes: Any) -> dict[str, Any]:
    """An event with all its keys."""
    given: dict[str, Any] = dict.fromkeys(
        ("at_ms", "kind", "node", "id", "mesh", "from", "to", "source", "reason", "op_id", "by")
    )
    found = next((r for r in fleet() if r["name"] == name), None)
    given |= {"at_ms": WALL_MS + int(at_s * 1000), "kind": kind, "node": name, "mesh": name.split(".")[0]}
    given["id"] = found["id"] if found else None
    return given | changes


def events() -> list[dict[str, Any]]:
    """What led to the fleet above."""
    return [
        event("node.ready", "alpha.console.31aa90", -240, reason="bound 12 ms, joined 310 ms"),
        event("node.joined", "alpha.gateway.4f1a77", -239.8, to="alive", source="gossip"),
        event("node.joined", "alpha.broker.11c3a0", -239.7, to="alive", source="gossip"),
        event("node.joined", "alpha.broker.77b1e9", -239.7, to="alive", source="gossip"),
        event("build.stale", "alpha.compute.c80d15", -200, reason="runs 9b07c2, the disk holds 3c9a1f"),
        event(
            "node.changed",
            "alpha.broker.77b1e9",
            -190,
            **{"from": "alive", "to": "degraded"},
            reason="cpu over 95 % for 15 s",
        ),
        event(
            "login.refused",
            "alpha.console.31aa90",
            -120,
            source="10.0.4.17:51022",
            reason="unknown key SHA256:t9Qb…",
        ),
        event(
            "control.received",
            "alpha.broker.0ad412",
            -40,
            reason="drain",
            by="op@laptop",
            op_id="01KDQ3W9M2V0",
        ),
        event(
            "node.changed",
            "alpha.broker.0ad412",
            -40,
            **{"from": "alive", "to": "draining"},
            op_id="01KDQ3W9M2V0",
            by="op@laptop",
        ),
        event(
            "node.changed",
            "alpha.compute.9e02f1",
            -12,
            **{"from": "alive", "to": "dead"},
            source="exited",
            by=["alpha.broker.11c3a0", "alpha.gateway.4f1a77"],
        ),
        event("node.evicted", "alpha.compute.a1b2c3", -9, source="left", reason="control_op", by="op@laptop"),
        event(
            "node.changed", "alpha.compute.5d20bb", -6, **{"from": "alive", "to": "updating"}, by="op@laptop"
        ),
    ]


HELLO = {
    "id": f"{0x31AA90:016x}",
    "name": "alpha.console.31aa90",
    "mesh": "alpha",
    "kind": "console",
    "build": "3c9a1f20b7de",
    "wire": 1,
    "wall_ms": WALL_MS,
    "nonce": "n",
    "state": "alive",
    "role": "operate",
}


def first_frame(rows: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """The first frame of a watch stream."""
    return {
        "full": True,
        "me": HELLO,
        "rows": fleet() if rows is None else rows,
        "events": events(),
        "counters": {"forged": 9, "login": 3},
        "at_ms": WALL_MS,
    } | changes


def delta(
    rows: list[dict[str, Any]] | None = None, gone: list[str] | None = None, **changes: Any
) -> dict[str, Any]:
    """A later frame: rows carry no history."""
    bare = [{k: v for k, v in r.items() if k != "history"} for r in rows or []]
    return {
        "full": False,
        "rows": bare,
        "gone": gone or [],
        "events": [],
        "counters": {},
        "at_ms": WALL_MS,
    } | changes


def daemon(name: str, node: str, number: int, **changes: Any) -> dict[str, Any]:
    """A daemon's row as an agent serves it."""
    return {
        "name": name,
        "node": node,
        "node_id": f"{number:016x}",
        "mesh": node.split(".")[0],
        "state": "running",
        "health": "healthy",
        "reason": None,
        "saturation": 0.2,
        "restarts": 0,
        "until_ms": None,
        "pid": 4000 + number % 977,
        "age_ms": 7_200_000,
        "status": None,
        "intent": "run",
        "held_back": None,
    } | changes


def daemons() -> list[dict[str, Any]]:
    """Daemons of five nodes, with every state and most kinds of trouble."""
    gone = {"pid": None, "health": None, "saturation": None}
    return [
        daemon("web", "alpha.gateway.4f1a77", 0x4F1A77, status="serving 41 clients"),
        daemon("web", "alpha.broker.11c3a0", 0x11C3A0, saturation=0.93, restarts=2),
        daemon("cache", "alpha.broker.11c3a0", 0x11C3A0),
        daemon("ingest", "alpha.broker.77b1e9", 0x77B1E9, health="degraded", reason="queue 4,210 behind"),
        daemon("crasher", "alpha.broker.77b1e9", 0x77B1E9, state="crash_looping", restarts=5,
               reason="exit status 1", until_ms=272_000, age_ms=28_000, **gone),
        daemon("slow", "alpha.broker.0ad412", 0x0AD412, state="stopping", age_ms=12_000, intent="stop"),
        daemon("hang", "alpha.compute.e91b04", 0xE91B04, health="unhealthy", reason="no watchdog for 30 s"),
        daemon("flaky", "alpha.compute.e91b04", 0xE91B04, state="backing_off", restarts=3,
               reason="killed by signal 11", until_ms=3_400, age_ms=600, **gone),
        daemon("batch", "alpha.compute.c80d15", 0xC80D15, state="stopped", held_back="cordoned", **gone),
        daemon("old", "alpha.compute.c80d15", 0xC80D15, state="stopped", intent="stop", **gone),
        daemon("indexer", "beta.broker.77aa01", 0x77AA01, state="starting", age_ms=900, health=None),
    ]  # fmt: skip


def failure(at_s: float, action: str, target: str, **changes: Any) -> dict[str, Any]:
    """A record of a failure ring as an agent serves it, `at_s` seconds ago."""
    return {
        "at_ms": WALL_MS - int(at_s * 1000),
        "age_ms": int(at_s * 1000),
        "node": "alpha.broker.77b1e9",
        "node_id": f"{0x77B1E9:016x}",
        "mesh": "alpha",
        "source": "admit",
        "action": action,
        "target": target,
        "reason": "daemon-backoff",
        "retry_after_ms": None,
        "until_ms": None,
        "from_replica": None,
    } | changes


def failures() -> list[dict[str, Any]]:
    """Failures of three nodes, one of them dead."""
    dead = {"node": "alpha.compute.9e02f1", "node_id": f"{0x9E02F1:016x}", "source": "dispatch",
            "from_replica": "alpha.broker.11c3a0"}  # fmt: skip
    return [
        failure(28, "start_daemon", "crasher", until_ms=272_000),
        failure(30, "start_daemon", "crasher", source="daemon", reason="exit status 1"),
        failure(4, "pull_replica", "orders", source="dispatch", reason="no answer from alpha.broker.11c3a0",
                retry_after_ms=7_500),
        failure(13, "stop_daemon", "indexer", reason="did not stop within 30 s: killed", **dead),
        failure(95, "probe", "vitals", node="beta.broker.77aa01", node_id=f"{0x77AA01:016x}", mesh="beta",
                source="probe", reason="OSError: no such device"),
    ]  # fmt: skip


def past_load(node: str, number: int, *samples: tuple[float, int, int], **changes: Any) -> dict[str, Any]:
    """Loads that a node recorded, each `(seconds, cpu, mem)` in permille, as an agent serves them."""
    return {
        "node": node,
        "node_id": f"{number:016x}",
        "mesh": node.split(".")[0],
        "from_replica": None,
        "samples": [[WALL_MS + int(at * 1000), cpu, mem, 510, 2, 3] for at, cpu, mem in samples],
    } | changes


def past_loads() -> list[dict[str, Any]]:
    """What three nodes recorded around the events above; one of them is gone and told by a copy, one was long silent."""
    return [
        past_load("alpha.broker.77b1e9", 0x77B1E9, (-245, 310, 640), (-191, 970, 700), (-60, 980, 710)),
        past_load("alpha.compute.9e02f1", 0x9E02F1, (-70, 440, 520), from_replica="alpha.broker.11c3a0"),
        past_load("alpha.gateway.4f1a77", 0x4F1A77, (-900, 120, 330)),
    ]


def log_of(daemon: str) -> list[str]:
    """What a daemon has written."""
    return [
        f"INFO {daemon} is up",
        f"listening on 127.0.0.1:80{len(daemon):02}",
        f"WARN {daemon}: slow answer, 812 ms",
        "\x1b[31mERROR\x1b[0m connection reset by peer",
        "Traceback (most recent call last):",
        '  File "app.py", line 12, in serve',
    ]


def chain(name: str, held: int, desired: int | None = 3, **changes: Any) -> dict[str, Any]:
    """A row of `qd chains` as an agent serves it."""
    names = ["alpha.gateway.4f1a77", "alpha.broker.11c3a0", "alpha.broker.77b1e9"][:held]
    return {
        "name": name,
        "kind": "artifact",
        "mesh": "alpha",
        "held": held,
        "desired": desired,
        "leader": names[0] if names else None,
        "holders": names,
        "size": 125_829_120,
        "hash": "9f86d081884c7d65",
        "stabilising_ms": 0,
        "pulls": [],
    } | changes


def chains() -> list[dict[str, Any]]:
    """What a mesh keeps: well held, moving, under-held, lost, and one too many."""
    pull = {"node": "alpha.compute.e91b04", "done": 54_106_521, "total": 125_829_120}
    return [
        chain("orders", 3, kind="chain", size=None, hash=None),
        chain("model-v7.bin", 2, pulls=[pull]),
        chain("site.tar", 1, stabilising_ms=42_000),
        chain("gone.iso", 0),
        chain("spare.img", 3, 2),
    ]


def op(seconds: float, verb: str, number: int, result: str | None = "done", **changes: Any) -> dict[str, Any]:
    """A row of `qd audit` as an agent serves it."""
    return {
        "at_ms": WALL_MS + int(seconds * 1000),
        "op_id": f"01KDQ3W9M2V0{abs(int(seconds)):04}",
        "op": verb,
        "target": f"{number:016x}",
        "operator": "op@laptop",
        "result": result,
        "reason": None,
        "verified": True,
        "node": f"{number:016x}",
        "fingerprint": "SHA256:t9QbL0",
        "position": None,
    } | changes


def audit() -> list[dict[str, Any]]:
    """Ops on record, oldest first: done, refused, void, and one that nobody signed rightly."""
    return [
        op(-90_000, "cordon", 0x11C3A0),
        op(-4_000, "maintenance_enter", 0x77B1E9, "accepted", operator="anna"),
        op(
            -300,
            "kill",
            0x4F1A77,
            "refused",
            reason="replay: op_id seen before",
            operator="mallory",
            verified=None,
        ),
        op(-120, "drain", 0x0AD412, "void", reason="revoked: by anna", operator="bob"),
        op(-60, "resume", 0xD00D, "done", verified=False),
    ]


class FakeClient:
    """Plays frames that a test puts into it. `lose()` ends the stream as a lost agent does."""

    def __init__(self, *frames: dict[str, Any]) -> None:
        self.hello = dict(HELLO)
        self.frames: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self.closed = False
        self.asked: list[str] = []
        self.ops: list[tuple[str, str, dict[str, Any]]] = []
        self.polled: list[str] = []
        self.silent: list[str] = []
        self.daemon_rows: list[dict[str, Any]] | Exception | None = None
        self.failure_rows: list[dict[str, Any]] | Exception | None = None
        self.past_rows: list[dict[str, Any]] | Exception | None = None
        self.chain_rows: list[dict[str, Any]] | Exception | None = None
        self.audit_rows: list[dict[str, Any]] | Exception | None = None
        self.logs: dict[str, asyncio.Queue[dict[str, Any] | Exception]] = {}
        """NODE_ID/DAEMON → lines to come."""
        self.followed: dict[str, int] = {}
        """NODE_ID/DAEMON → streams that are open."""
        self.doc: dict[str, Any] | Exception = {
            "node": {},
            "daemons": [],
            "replicas": [],
            "peers": [{"name": "alpha.gateway.4f1a77", "rtt_ms": 0.31, "health": "alive"}],
            "avoid_list": [],
            "local_maintenance": {},
            "recently_emitted": [],
            "recent_failures": [],
            "stats": {"ticks": 4210, "events": 9031},
            "answered_by": "alpha.console.31aa90",
            "age_ms": 120,
            "why": [],
            "wants": [],
            "held_back": [],
        }
        for frame in frames:
            self.frames.put_nowait(frame)

    def put(self, frame: dict[str, Any]) -> None:
        self.frames.put_nowait(frame)

    def lose(self, why: str = "connection lost") -> None:
        self.frames.put_nowait(Unreachable(why))

    async def watch(self, mesh: str | None = None) -> AsyncIterator[dict[str, Any]]:
        while True:
            try:
                frame = await asyncio.wait_for(self.frames.get(), 0.5)
            except TimeoutError:
                frame = delta()
            if isinstance(frame, Exception):
                raise frame
            yield frame

    async def node(self, node_id: str) -> dict[str, Any]:
        self.asked.append(node_id)
        if isinstance(self.doc, Exception):
            raise self.doc
        return self.doc

    async def daemons(self, mesh: str | None = None) -> dict[str, Any]:
        self.polled.append("daemons")
        return self._told(daemons() if self.daemon_rows is None else self.daemon_rows, mesh)

    async def failures(self, mesh: str | None = None) -> dict[str, Any]:
        self.polled.append("failures")
        return self._told(failures() if self.failure_rows is None else self.failure_rows, mesh)

    async def events(self, limit: int, node: str | None = None) -> list[dict[str, Any]]:
        self.polled.append(f"events {limit}")
        return events()

    async def past(self, from_ms: int, to_ms: int, now_ms: int, mesh: str | None = None) -> dict[str, Any]:
        self.polled.append(f"past {from_ms} {to_ms}")
        rows = past_loads() if self.past_rows is None else self.past_rows
        return self._told(rows, mesh)

    async def chains(self, mesh: str | None = None) -> dict[str, Any]:
        self.polled.append("chains")
        return self._told(chains() if self.chain_rows is None else self.chain_rows, mesh)

    async def audit(self, mesh: str | None = None, offset: int = 0) -> dict[str, Any]:
        self.polled.append(f"audit {offset}")
        rows = audit() if self.audit_rows is None else self.audit_rows
        return self._told(rows if isinstance(rows, Exception) else rows[offset:], None)

    @property
    def name(self) -> str:
        return str(self.hello["name"])

    @property
    def mesh(self) -> str:
        return str(self.hello["mesh"])

    def _told(self, rows: list[dict[str, Any]] | Exception, mesh: str | None) -> dict[str, Any]:
        if isinstance(rows, Exception):
            raise rows
        of = [row for row in rows if mesh in (None, row.get("mesh"))]
        return {"rows": of, "silent": self.silent, "answered_by": self.name}

    async def daemon_log(
        self, node: str, daemon: str, limit: int, follow: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        key = f"{node}/{daemon}"
        self.followed[key] = self.followed.get(key, 0) + 1
        queue = self.logs.setdefault(key, asyncio.Queue())
        for at, line in enumerate(log_of(daemon)):
            yield {"at_ms": WALL_MS - 60_000 + at * 7_000, "line": line}
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.followed[key] -= 1

    async def follow(self, limit: int, node: str | None = None) -> AsyncIterator[dict[str, Any]]:
        for told in events():
            if told["id"] == node:
                yield told
        await asyncio.Event().wait()

    async def resolve(self, text: str) -> dict[str, Any]:
        for found in fleet():
            if text in (found["name"], found["id"]):
                return {key: found[key] for key in ("id", "name", "mesh", "state")}
        raise Refused("unknown", f"no node {text!r}")

    async def close(self) -> None:
        self.closed = True


async def send_done(
    client: FakeClient, verb: str, target: str, args: dict[str, Any], on_stage: Callable[[str], None]
) -> dict[str, Any]:
    """An op that is done at once."""
    client.ops.append((verb, target, args))
    on_stage("sent")
    on_stage("received")
    return {
        "op_id": "01KDQ3W9M2V0A7",
        "target": target,
        "op": verb,
        "result": "done",
        "state": "leaving",
        "route": "direct",
        "took_ms": 7.2,
        "reason": None,
        "skew_ms": 0,
    }


async def send_refused(
    client: FakeClient, verb: str, target: str, args: dict[str, Any], on_stage: Callable[[str], None]
) -> dict[str, Any]:
    """An op that its target refuses."""
    client.ops.append((verb, target, args))
    on_stage("sent")
    return {
        "op_id": "01KDQ3W9M2V0A8",
        "target": target,
        "op": verb,
        "result": "refused",
        "state": None,
        "route": "direct",
        "took_ms": 4.0,
        "reason": "the key SHA256:t9QbL0 is not in authorized_operators of this host",
        "skew_ms": 0,
    }


def mesh(name: str, total: int = 4, holder: int = 0, **changes: Any) -> dict[str, Any]:
    """A mesh's row as an agent serves it; `holder` numbers the gateway that publishes it, 0 is nobody."""
    by: dict[str, Any] = {"id": None, "name": None, "addr": None}
    if holder:
        by = {
            "id": f"{holder:016x}",
            "name": f"{name}.gateway.{holder:06x}",
            "addr": f"10.0.0.{holder % 250}:7946",
        }
    nodes = {"total": total} | dict.fromkeys(
        ("joining", "degraded", "updating", "draining", "leaving", "dead"), 0
    )
    return {
        "mesh": name,
        "publisher": by,
        "epoch": 3 if holder else None,
        "version": 118 if holder else None,
        "expires_in_ms": 4_600 if holder else None,
        "expired": False,
        "nodes": {**nodes, "alive": total},
        "cpu": 0.2,
        "mem": 0.5,
        "age_ms": 900,
        "home": False,
        "pub": f"SHA256:{name}key",
        "impostors": [],
        "backbone": "pool",
        "route": "direct",
        "rtt_ms": 18.2,
        "listed": True,
        "reason": None,
    } | changes


def meshes() -> list[dict[str, Any]]:
    """Five meshes: one's own, one that goes well, one behind a relay, one expired, one that tells only counts."""
    own = dict.fromkeys(("route", "rtt_ms", "listed"))
    states = {
        "total": 9,
        "alive": 5,
        "degraded": 1,
        "draining": 1,
        "updating": 1,
        "dead": 1,
        "joining": 0,
        "leaving": 0,
    }
    return [
        mesh("alpha", 9, 0x4F1A77, age_ms=0, home=True, nodes=states, cpu=0.28, **own),
        mesh("beta", 4, 0xB03C21, home=True, epoch=12),
        mesh("gamma", 1, 0x6B2F00, route="relay", rtt_ms=42.0, publisher={
            "id": f"{0x6B2F00:016x}", "name": "gamma.console.6b2f00", "addr": "10.9.0.4:7946"}),
        mesh("delta", 3, 0xDE17A0, expired=True, expires_in_ms=-36_000, age_ms=42_000, cpu=None, mem=None, rtt_ms=None),
        mesh("omega", 200, 0x0E6A01, listed=False, rtt_ms=7.5),
    ]  # fmt: skip


def remote(name: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row of another mesh, as its publisher tells it: nothing is measured from here."""
    return row(name, number, **{"source": "directory", "rtt_ms": None, "history": None, **changes})


def everywhere() -> list[dict[str, Any]]:
    """The nodes of `meshes`: alpha's own, the others by the directory, delta's as those of an expired mesh."""
    gone = {"kind": "silent", "by": [], "text": "mesh delta expired: nothing heard from it for 42 s"}
    lost = {"state": "dead", "expired": True, "evidence": gone, "cpu": None, "mem": None, "since_ms": 36_000}
    return [
        *(r for r in fleet() if r["mesh"] == "alpha"),
        remote("beta.gateway.b03c21", 0xB03C21, cpu=0.12, mem=0.44),
        remote(
            "beta.broker.77aa01", 0x77AA01, cpu=0.31, mem=0.61, state="degraded", reason="memory over 95 %"
        ),
        remote("beta.broker.d2c9f0", 0xD2C9F0, cpu=0.22, mem=0.57),
        remote("beta.broker.e4410c", 0xE4410C, cpu=0.17, mem=0.48),
        remote("gamma.console.6b2f00", 0x6B2F00, cpu=0.01, mem=0.19),
        remote("delta.gateway.de17a0", 0xDE17A0, **lost, last_seen_ms=43_000),
        remote("delta.broker.de17b1", 0xDE17B1, **lost, last_seen_ms=44_000),
        remote("delta.broker.de17c2", 0xDE17C2, **lost, last_seen_ms=44_000),
    ]


def wide_frame(**changes: Any) -> dict[str, Any]:
    """The first frame of an agent that sees every mesh."""
    return first_frame(everywhere(), meshes=meshes()) | changes
