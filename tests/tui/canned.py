"""A stand-in for an agent: a real listener that gives canned answers, in a thread with a loop of its own.

It looks like a node of a home: its run entry carries the pid of a process that lives (this one).
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import psutil

from agent.founding import found_mesh
from agent.home import Home, RunEntry, read_identity
from agent.opmessage import decode_op
from discovery import sshsig
from discovery.errors import Refused
from discovery.identity import Identity, id_text
from discovery.links import Link, Listener, Login
from discovery.member import Addr

BUILD = "0123456789ab"


def row(name: str, node: str, *, mesh: str = "alpha", state: str = "alive", **more: Any) -> dict[str, Any]:
    """A row with every key of `qd nodes`."""
    return {
        "id": node,
        "name": name,
        "mesh": mesh,
        "kind": more.pop("kind", "broker"),
        "state": state,
        "since_ms": 61_000,
        "source": "gossip",
        "cpu": 0.5,
        "mem": None,
        "disk": 0.25,
        "rtt_ms": 0.4,
        "addr": "127.0.0.1:1",
        "build": BUILD,
        "fresh": True,
        "wire": 1,
        "maintenance": "active",
        "maintenance_until_ms": None,
        "cordoned": False,
        "daemons": {"running": 0, "total": 0},
        "failures": 0,
        "last_seen_ms": 200,
        "tags": {},
        "evidence": None,
        "incarnation": 1,
        **more,
    }


class CannedAgent:
    """Answers like the agent `name` of a home. `rows`, `on_op` and `skew_ms` may be changed while it runs."""

    def __init__(
        self, home: Home, name: str, *, mesh: str = "alpha", kind: str = "gateway", listed: bool = True
    ) -> None:
        self.home = home
        self.identity = Identity.generate()
        self.id = id_text(self.identity.id)
        self.name = name
        self.mesh = mesh
        self.kind = kind
        self.listed = listed
        self.rows: list[dict[str, Any]] = [row(name, self.id, mesh=mesh, kind=kind, source="self")]
        self.events: list[dict[str, Any]] = []
        self.ops: list[dict[str, Any]] = []
        self.logins: list[tuple[str, str]] = []
        self.refuse_login = False
        self.stall_hello_s = 0.0
        self.skew_ms = 0
        self.on_op: Callable[[dict[str, Any]], dict[str, Any]] = lambda op: {
            "op_id": op["op_id"],
            "result": "done",
            "state": "leaving",
        }
        self.frames: list[dict[str, Any]] = []
        self.more_methods: dict[str, Any] = {}
        self.daemons: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.silent: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.asked_logs: list[dict[str, Any]] = []
        self.port = 0

    @property
    def addr(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> CannedAgent:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        if self.listed:
            self.home.run.mkdir(parents=True, exist_ok=True)
            self._run_file.write_bytes(msgspec.json.encode(self.entry))
        return self

    def __exit__(self, *_: object) -> None:
        self._run_file.unlink(missing_ok=True)
        asyncio.run_coroutine_threadsafe(self._listener.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def entry(self) -> RunEntry:
        return RunEntry(
            pid=os.getpid(),
            start=psutil.Process().create_time(),
            id=self.id,
            pub=base64.b64encode(self.identity.pub).decode(),
            name=self.name,
            mesh=self.mesh,
            kind=self.kind,
            addr=f"127.0.0.1:{self.port or 1}",
            build=BUILD,
        )

    @property
    def _run_file(self) -> Any:
        return self.home.run_file(self.mesh, self.name)

    async def _start(self) -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        self._listener = await Listener.start(
            sock,
            host_key=self.identity,
            authorise=self._authorise,
            methods={
                "hello": self._hello,
                "nodes": self._nodes,
                "node": self._node,
                "events": self._events,
                "meshes": self._meshes,
                "resolve": self._resolve,
                "challenge": self._challenge,
                "op": self._op,
                "watch": self._watch,
                "follow": self._follow,
                "doctor": self._doctor,
                **self.more_methods,
                "daemons": self._daemons,
                "failures": self._failures,
                "daemon_log": self._daemon_log,
            },
        )

    def _authorise(self, line: str, username: str, peer: Addr) -> Login | None:
        self.logins.append((username, line))
        if self.refuse_login:
            return None
        return Login("home" if username == "home" else "op", None, None, "SHA256:x", "admin", line)

    async def _hello(self, link: Link, params: Any) -> Any:
        await asyncio.sleep(self.stall_hello_s)
        return {
            "id": self.id,
            "name": self.name,
            "mesh": self.mesh,
            "kind": self.kind,
            "build": BUILD,
            "wire": 1,
            "state": "alive",
            "role": "admin",
            "wall_ms": int(time.time() * 1000) + self.skew_ms,
            "nonce": "0" * 32,
        }

    async def _nodes(self, link: Link, params: Any) -> Any:
        if params.get("mesh") not in (None, self.mesh):
            raise Refused("unknown_mesh", f"mesh {params['mesh']}: not known to {self.name}")
        yield {"rows": self.rows, "answered_by": self.name, "meshes": [self.mesh]}

    async def _node(self, link: Link, params: Any) -> Any:
        found = next(r for r in self.rows if r["id"] == params["id"])
        return {"node": found, "answered_by": self.name, "age_ms": 200, "why": self.events}

    async def _events(self, link: Link, params: Any) -> Any:
        yield {"events": self.events[-params["limit"] :] if params["limit"] else []}

    async def _meshes(self, link: Link, params: Any) -> Any:
        publisher = {"id": None, "name": None, "addr": None}
        return {"meshes": [{"mesh": self.mesh, "publisher": publisher, "nodes": {"total": len(self.rows)}}]}

    async def _resolve(self, link: Link, params: Any) -> Any:
        text = params["name"]
        if text == "ghost":
            raise Refused("gone", "ghost: said goodbye 12 s ago")
        exact = [r for r in self.rows if text in (r["name"], r["id"])]
        fits = exact or [r for r in self.rows if r["name"].startswith(text) or r["id"].startswith(text)]
        if len(fits) > 1:
            raise Refused(
                "ambiguous", f"{text}: could be {', '.join(r['name'] for r in fits)}; write more of it"
            )
        if not fits:
            raise Refused("unknown", f"{text}: no such node")
        return {key: fits[0][key] for key in ("id", "name", "mesh", "state")}

    async def _challenge(self, link: Link, params: Any) -> Any:
        found = next(r for r in self.rows if r["id"] == params["target"])
        return {
            "nonce": "ab" * 16,
            "wall_ms": int(time.time() * 1000) + self.skew_ms,
            "mesh": self.mesh,
            "name": found["name"],
            "route": "local" if params["target"] == self.id else "direct",
        }

    async def _op(self, link: Link, params: Any) -> Any:
        signer = sshsig.verify(params["message"], params["signature"], "quarterdeck-op")
        op = decode_op(params["message"])
        seen = {**msgspec.to_builtins(op.message), "verb": op.verb, "signer": signer.fingerprint}
        self.ops.append(seen)
        return {**self.on_op(seen), "target": params["target"]}

    async def _watch(self, link: Link, params: Any) -> AsyncIterator[Any]:
        for frame in self.frames:
            yield frame

    async def _follow(self, link: Link, params: Any) -> AsyncIterator[Any]:
        for event in self.events:
            yield event

    async def _daemons(self, link: Link, params: Any) -> Any:
        return {"rows": self.daemons, "silent": self.silent, "answered_by": self.name}

    async def _failures(self, link: Link, params: Any) -> Any:
        for failure in self.failures:
            yield {"rows": [failure], "silent": self.silent, "answered_by": self.name}

    async def _daemon_log(self, link: Link, params: Any) -> AsyncIterator[Any]:
        if params["daemon"] not in {daemon["name"] for daemon in self.daemons}:
            raise Refused("unknown", f"{params['daemon']}: no such daemon on this node")
        self.asked_logs.append(params)
        for line in self.lines[-params["limit"] :] if params["limit"] else []:
            yield line

    async def _doctor(self, link: Link, params: Any) -> Any:
        return {"checks": [{"what": "journal", "ok": True, "text": "journal intact"}]}


def founded(path: Any, *meshes: str) -> Home:
    """A home with these meshes' keys."""
    home = Home.open(path)
    for mesh in meshes or ("alpha",):
        found_mesh(home, mesh)
    return home


def client_line(home: Home) -> str:
    """The home's client key as a login shows it."""
    return read_identity(home.client_key_file, "client key").pub_openssh()
