"""Relaying: bytes between a caller and a member that it can't dial, which this node reaches.

Who asks names a member by its id and nothing else: no host, no port. The bytes go to an address that this very member
advertises, and only where an SSH server answers there; or over a link that the member holds to this node. What flows
is an SSH connection in which caller and member prove their keys to each other: this node can cut it, not read it.

Refusals, each counted as `relay_CODE`: `not_a_gateway` · `login` this login may not · `unknown` no current member ·
`full` too many tunnels · `share` too many of this login · `no_route` the member can't be reached from here. Also
counted: `relay_idle`, cut off without a byte for `idle_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agent.racing import NoneWorked, first_of
from discovery.errors import QuarterdeckError, Refused, Unreachable
from discovery.links import Handler, Idle, Link, SocketStream, Tunnel, TunnelMethod, splice
from discovery.links.ssh import tune
from discovery.links.tunnel import Stream
from discovery.member import Addr, Member, addr_text

CONNECT_TIMEOUT_S = 1.5
"""For all addresses of a member together, up to the first word of its SSH server."""
HEAD_START_S = 0.1
ARRIVE_TIMEOUT_S = 3.0
GREETING = b"SSH-2.0-"
RELAYING_KINDS = ("gateway", "console")
PERMITTED = ("member", "mesh", "home", "op")

_NODE_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class RelayLimits:
    """What a relay lends to others."""

    max_tunnels: int = 256
    max_tunnels_per_login: int = 16
    """Told apart by the key that logged in."""
    bytes_per_s: float = 20e6
    """For each direction of a tunnel."""
    idle_s: float = 120.0


class Relay:
    """Serves `relay` and `arrive` of one node.

    `find(id)`: a member of any mesh that this node sees. `may_relay()`: whether this node is of a kind that relays.
    `held(id)`: an open link with that member of this node's own mesh. `take(sock, addr)`: hands a connection to this
    node's own listener (`Listener.take`).
    """

    def __init__(
        self,
        *,
        name: str,
        mesh: str,
        find: Callable[[int], Member | None],
        usable_addrs: Callable[[Member], list[Addr]],
        may_relay: Callable[[], bool],
        held: Callable[[int], Link | None],
        take: Callable[[socket.socket, Addr], str | None],
        limits: RelayLimits | None = None,
    ) -> None:
        self._name = name
        self._mesh = mesh
        self._find = find
        self._usable_addrs = usable_addrs
        self._may_relay = may_relay
        self._held = held
        self._take = take
        self._limits = limits or RelayLimits()
        self.counters: Counter[str] = Counter()
        """What was refused or cut off, by code."""
        self._done: Counter[str] = Counter()
        self._shares: Counter[str] = Counter()
        self._serving: set[asyncio.Task[Any]] = set()
        self._closing = False

    def methods(self) -> Mapping[str, Handler]:
        return {"relay": TunnelMethod(self._relay), "arrive": TunnelMethod(self._arrive)}

    @property
    def counts(self) -> dict[str, int]:
        """Tunnels open now; `relayed`, `arrived` and `bytes` since the start."""
        return {"tunnels": len(self._serving), **{k: self._done[k] for k in ("relayed", "arrived", "bytes")}}

    async def close(self) -> None:
        """Cuts off whatever is being relayed."""
        self._closing = True
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    # --- for callers

    async def _relay(self, link: Link, params: Any, tunnel: Tunnel) -> None:
        """`{"target": id}`, and `"held": true` to go only over a link that the target holds. Accepted with
        `{"way": "dialled" | "held"}`."""
        target = self._admit(link, params)
        with self._counted(link.login.fingerprint):
            stream, way = await self._way_to(target, only_held=bool(params.get("held")))
            self._done["relayed"] += 1
            tunnel.accept({"way": way})
            await self._carry(tunnel, stream)

    def _admit(self, link: Link, params: Any) -> Member:
        """The member that is asked for, if this login may have it."""
        login, name = link.login, self._name
        if not self._may_relay():
            raise self._refused("not_a_gateway", f"{name} is no gateway: it relays nothing")
        if login.kind not in PERMITTED or (login.kind in ("mesh", "op") and login.role is None):
            raise self._refused("login", f"a {login.kind} login may not use a relay")
        text = params.get("target") if isinstance(params, dict) else None
        if not isinstance(text, str) or not _NODE_ID.fullmatch(text):
            raise self._refused("unknown", "no node id: a relay goes to members and nowhere else")
        member = self._find(int(text, 16))
        if member is None or not member.present:
            raise self._refused("unknown", f"{text}: no current member of a mesh that {name} sees")
        if login.kind == "mesh" and member.record.mesh != self._mesh:
            raise self._refused("unknown", f"{member.record.name}: no member of {self._mesh}")
        return member

    async def _way_to(self, target: Member, *, only_held: bool) -> tuple[Stream, str]:
        """A way to the target, and how it goes."""
        why = "was not dialled"
        if not only_held:
            try:
                return await self._connect(target), "dialled"
            except QuarterdeckError as error:
                why = str(error)
        held = self._held(target.id)
        if held is None:
            why += ", and holds no link here"
        else:
            try:
                return await held.tunnel("arrive", {}, ARRIVE_TIMEOUT_S), "held"
            except QuarterdeckError as error:
                why += f", and over its own link: {error}"
        raise self._refused("no_route", f"{self._name} does not reach {target.record.name}: {why}")

    async def _connect(self, target: Member) -> SocketStream:
        addrs = self._usable_addrs(target)
        if not addrs:
            raise Unreachable("has no address that can be dialled from there")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await first_of(
                    [lambda addr=addr: _greeted(addr) for addr in addrs],  # type: ignore[misc]
                    head_start_s=HEAD_START_S,
                    dispose=lambda stream: stream.close(),
                )
        except NoneWorked as why:
            raise why.errors[-1] from why
        except TimeoutError as why:
            raise Unreachable(f"no answer within {CONNECT_TIMEOUT_S:g} s") from why

    # --- for gateways

    async def _arrive(self, link: Link, params: Any, tunnel: Tunnel) -> None:
        """A caller that a gateway brings: for the listener it is a connection from the gateway's address."""
        login = link.login
        member = self._find(login.node) if login.kind == "member" and login.node is not None else None
        if member is None or member.record.mesh != self._mesh or member.record.pub != login.pub:
            raise self._refused("login", f"only a member of {self._mesh} may bring callers to {self._name}")
        with self._counted(None):
            ours, theirs = socket.socketpair()
            code = self._take(theirs, link.addr)
            if code is not None:
                ours.close()
                raise self._refused("full", f"{self._name} takes no connection now ({code})")
            self._done["arrived"] += 1
            tunnel.accept()
            await self._carry(tunnel, SocketStream(ours))

    # --- both

    @contextlib.contextmanager
    def _counted(self, login: str | None) -> Iterator[None]:
        """One tunnel, as long as it lasts, of this login's share."""
        task = asyncio.current_task()
        assert task is not None
        if self._closing or len(self._serving) >= self._limits.max_tunnels:
            raise self._refused("full", f"{self._name} relays {len(self._serving)} connections already")
        if login is not None and self._shares[login] >= self._limits.max_tunnels_per_login:
            raise self._refused(
                "share", f"{self._name} relays {self._shares[login]} connections for you already"
            )
        self._serving.add(task)
        if login is not None:
            self._shares[login] += 1
        try:
            yield
        finally:
            self._serving.discard(task)
            if login is not None:
                self._shares[login] -= 1
                if not self._shares[login]:
                    del self._shares[login]

    async def _carry(self, tunnel: Tunnel, stream: Stream) -> None:
        def carried(size: int) -> None:
            self._done["bytes"] += size

        limits = self._limits
        try:
            await splice(
                tunnel, stream, idle_s=limits.idle_s, bytes_per_s=limits.bytes_per_s, carried=carried
            )
        except Idle:
            self.counters["relay_idle"] += 1

    def _refused(self, code: str, sentence: str) -> Refused:
        self.counters[f"relay_{code}"] += 1
        return Refused(code, sentence)


async def _greeted(addr: Addr) -> SocketStream:
    """A connection to this address on which an SSH server has said who it is. Unreachable: nobody, or anything else."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in addr[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, addr)
        tune(sock)
        said = b""
        while len(said) < len(GREETING):
            more = await loop.sock_recv(sock, 4096)
            if not more:
                raise Unreachable(f"{addr_text(addr)} closed the connection")
            said += more
        if not said.startswith(GREETING):
            raise Unreachable(f"{addr_text(addr)} is no node")
        return SocketStream(sock, first=said)
    except OSError as why:
        sock.close()
        raise Unreachable(f"{addr_text(addr)}: {why.strerror or why}") from why
    except BaseException:
        sock.close()
        raise


__all__ = ["PERMITTED", "RELAYING_KINDS", "Relay", "RelayLimits"]
