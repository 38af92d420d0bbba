"""Reaching any node that is known, of this mesh or another: direct first, else through a relay.

A member of this node's own mesh is met as `member`, with this node's key; one of another mesh as `mesh`, with the key
of this node's mesh. Either way the target's own key is pinned, through a relay too: a relay that connects us to
somebody else is found out, and can't read what passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Literal

from agent.contacts import Contacts
from agent.openlinks import OpenLinks
from agent.racing import NoneWorked, dial_any, first_of, says_no, shared, telling
from agent.relay import RELAYING_KINDS
from discovery.errors import QuarterdeckError, Refused, Unreachable
from discovery.identity import Identity, id_text
from discovery.links import Handler, Link, SocketStream, Tunnel, dial, splice
from discovery.member import Addr, Member

Via = Literal["direct", "relay"]

DIRECT_TIMEOUT_S = 2.0
"""For all addresses of a node together."""
DIRECT_AGAIN_S = 30.0
"""After a direct try that took long, how long relays come first."""
TOOK_LONG_S = 0.5
"""What fails sooner than this costs nothing to try again each time."""
RELAY_HEAD_START_S = 0.4
RELAY_TIMEOUT_S = 6.0
HANDSHAKE_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 12.0
LOGIN_AGAIN_S = (0.3, 0.7, 1.5)
MAX_RELAYS = 4
"""Of the target's mesh, and of our own: more of them are not asked."""
MAX_RELAYED = 12
"""Links through relays at once; a relay lends 16 tunnels to one key. Idle ones make room, else the newcomer waits."""
ROOM_LOOK_S = 0.05
REASON_CHARS = 160
NUDGE_S = 45.0
"""A relay cuts off what is silent for 120 s; a link on which something is under way is called this often."""
NUDGE_TIMEOUT_S = 5.0


def relays_among(members: Iterable[Member], publisher: int | None = None) -> list[Member]:
    """Those of a mesh's members that relay, in the order in which they are asked: gateways by id, then consoles,
    in both cases the mesh's publisher first."""
    able = [m for m in members if m.present and m.record.kind in RELAYING_KINDS]
    return sorted(able, key=lambda m: (m.record.kind != "gateway", m.id != publisher, m.id))


class Reach:
    """Links to nodes of any mesh, and calls to them, with the route they took.

    `relays(mesh)`: who may relay to members of that mesh, best first (`relays_among`), without this node itself.
    `mesh_identity()`: the key of this node's mesh; None when it holds none, and then other meshes can't be entered.
    `methods`: what this node answers to members of its own mesh.
    """

    def __init__(
        self,
        *,
        me: int,
        mesh: str,
        identity: Identity,
        mesh_identity: Callable[[], Identity | None],
        contacts: Contacts,
        usable_addrs: Callable[[Member], list[Addr]],
        relays: Callable[[str], Sequence[Member]],
        methods: Mapping[str, Handler],
    ) -> None:
        self._me = me
        self._mesh = mesh
        self._identity = identity
        self._mesh_identity = mesh_identity
        self._contacts = contacts
        self._usable_addrs = usable_addrs
        self._relays = relays
        self._methods = methods
        self._direct = OpenLinks()
        """To nodes of other meshes; those of the own mesh are the contacts'."""
        self._relayed = OpenLinks()
        self._relaying = 0
        self._through: dict[Link, Member] = {}
        self._came: set[Link] = set()
        """Links that members opened to this node through a relay, as they say."""
        self._direct_again: dict[int, float] = {}
        self._dialling: dict[int, asyncio.Task[Link]] = {}
        self._reaching: dict[int, asyncio.Task[tuple[Link, Via]]] = {}
        self._nudged_at = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def counts(self) -> dict[str, int]:
        """Links open now to other meshes, and through relays."""
        return {"direct": len(self._direct), "relayed": len(self._relayed)}

    def relay_of(self, link: Link) -> Member | None:
        """The relay that this link goes through; None for a direct one."""
        return self._through.get(link)

    def came_by_relay(self, link: Link) -> None:
        """Whoever opened this link says that it goes through a relay: so do calls back over it. From here it looks
        like any connection from the relay's host."""
        if not link.dialled and link not in self._came:
            self._came.add(link)
            link.on_close(lambda: self._came.discard(link))

    async def link_to(self, target: Member) -> tuple[Link, Via]:
        """A link to a node, one that is there or a new one, and its route.

        Unreachable says what was tried. Refused: the target won't have us, or (`host_key`) a stranger was met in
        its place.
        """
        if link := self._open_direct(target):
            return link, "relay" if link in self._came else "direct"
        if link := self._relayed.to(target.id):
            if self._may_try_direct(target):
                self._direct_again[target.id] = time.monotonic() + DIRECT_AGAIN_S
                self._spawn(self._try_direct(target))
            return link, "relay"
        task = self._reaching.get(target.id)
        if task is None:
            task = shared(self._reaching, target.id, self._reach(target))
        return await asyncio.shield(task)

    async def call(self, target: Member, method: str, params: Any, timeout_s: float) -> tuple[Any, Via]:
        """The answer of a node, and the route that it took. Raises as `link_to` and `Link.call` do."""
        link, via = await self.link_to(target)
        own = target.record.mesh == self._mesh
        if own and link not in self._through:
            return await self._contacts.ask(target.id, link, method, params, timeout_s), via
        links = self._relayed if link in self._through else self._direct
        try:
            answer = await links.ask(link, method, params, timeout_s)
        except Refused:
            if own:
                self._contacts.answered(target.id)
            raise
        if own:
            self._contacts.answered(target.id)
        return answer, via

    def doubt(self, link: Link) -> None:
        """A stream over this link, to a node of another mesh, has fallen silent: the next call looks for another way."""
        for links in (self._direct, self._relayed):
            links.doubt(link)

    def close_idle(self) -> None:
        """Closes links that nobody used for a minute, and keeps relays from cutting off those in use. Call it every
        few seconds."""
        now = time.monotonic()
        for links in (self._direct, self._relayed):
            for _, link in links.idle(now):
                self._spawn(link.close())
        if now - self._nudged_at > NUDGE_S:
            self._nudged_at = now
            for link in self._relayed.all:
                if link.in_use:
                    self._spawn(self._nudge(link))
        self._direct_again = {node: at for node, at in self._direct_again.items() if at > now}

    async def close(self) -> None:
        """Closes every link and ends every task."""
        ways = [*self._reaching.values(), *self._dialling.values()]
        for task in ways:
            task.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                links = (*self._relayed.all, *self._direct.all)
                await asyncio.gather(*(link.close() for link in links), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- direct

    def _open_direct(self, target: Member) -> Link | None:
        if target.record.mesh == self._mesh:
            return self._contacts.open_to(target.id)
        return self._direct.to(target.id)

    def _may_try_direct(self, target: Member) -> bool:
        return self._direct_again.get(target.id, 0.0) <= time.monotonic()

    async def _to_direct(self, target: Member) -> Link:
        """A direct link, within DIRECT_TIMEOUT_S. What took long to fail is remembered."""
        if link := self._open_direct(target):
            return link
        began = time.monotonic()
        try:
            async with asyncio.timeout(DIRECT_TIMEOUT_S):
                if target.record.mesh == self._mesh:
                    return await self._contacts.link_to(target)
                return await self._dial(target)
        except (QuarterdeckError, TimeoutError) as why:
            if time.monotonic() - began > TOOK_LONG_S:
                self._direct_again[target.id] = time.monotonic() + DIRECT_AGAIN_S
            if isinstance(why, TimeoutError):
                raise Unreachable(f"{target.record.name}: no answer within {DIRECT_TIMEOUT_S:g} s") from why
            raise

    async def _dial(self, target: Member) -> Link:
        task = self._dialling.get(target.id)
        if task is None:
            task = shared(self._dialling, target.id, self._dial_anew(target))
        return await asyncio.shield(task)

    async def _dial_anew(self, target: Member) -> Link:
        link, _ = await dial_any(
            self._usable_addrs(target),
            who=target.record.name,
            identity=self._login_of(target)[0],
            username="mesh",
            expect_pub=target.record.pub,
            methods={},
            timeout_s=DIRECT_TIMEOUT_S,
        )
        self._direct.add(target.id, link)
        return link

    async def _try_direct(self, target: Member) -> None:
        """A direct link is used from now on, if there is one; the relayed one ends when it is idle."""
        with contextlib.suppress(QuarterdeckError):
            await self._to_direct(target)

    def _login_of(self, target: Member) -> tuple[Identity, str]:
        if target.record.mesh == self._mesh:
            return self._identity, "member"
        identity = self._mesh_identity()
        if identity is None:
            raise Refused(
                "login", f"this node holds no key of {self._mesh} with which to enter {target.record.mesh}"
            )
        return identity, "mesh"

    # --- through a relay

    async def _reach(self, target: Member) -> tuple[Link, Via]:
        """By any route. A member of our own mesh that doesn't take our key may not have heard of us yet."""
        for pause_s in LOGIN_AGAIN_S:
            try:
                return await self._reach_once(target)
            except Refused as why:
                if why.code != "login" or target.record.mesh != self._mesh:
                    raise
            await asyncio.sleep(pause_s)
        return await self._reach_once(target)

    async def _reach_once(self, target: Member) -> tuple[Link, Via]:
        name = target.record.name
        self._login_of(target)
        tried: list[str] = []
        errors: list[QuarterdeckError] = []
        directly = self._may_try_direct(target)
        try:
            async with asyncio.timeout(REACH_TIMEOUT_S):
                for route in ("direct", "relay") if directly else ("relay", "direct"):
                    try:
                        if route == "direct":
                            return await self._to_direct(target), "direct"
                        return await self._relayed_to(target, tried), "relay"
                    except _SaysNo as no:
                        raise no.why from no
                    except QuarterdeckError as why:
                        if route == "direct" and says_no(why):
                            raise
                        errors.append(why)
                        if route == "direct":
                            tried.append(f"direct: {str(why)[:REASON_CHARS]}")
        except TimeoutError:
            tried.append(f"given up after {REACH_TIMEOUT_S:g} s")
        stranger = telling(errors) if errors else None
        if isinstance(stranger, Refused):
            raise stranger
        raise Unreachable(f"{name}: no way to it from here ({'; '.join(tried)})")

    async def _relayed_to(self, target: Member, tried: list[str]) -> Link:
        """A link through the first relay that has a way. `tried` gets a line of each that hasn't."""
        meshes = list(dict.fromkeys((target.record.mesh, self._mesh)))
        relays = [
            relay
            for mesh in meshes
            for relay in [r for r in self._relays(mesh) if r.id not in (self._me, target.id)][:MAX_RELAYS]
        ]
        relays.sort(key=lambda r: not self._may_try_direct(r) and self._open_direct(r) is None)
        ways: list[Callable[[], Coroutine[Any, Any, Link]]] = [
            lambda relay=relay: self._through_one(relay, target, tried)  # type: ignore[misc]
            for relay in relays
        ]
        if not ways:
            tried.append("no gateway that could relay")
            raise Unreachable("no relay")
        await self._room()
        self._relaying += 1
        try:
            link = await first_of(
                ways,
                head_start_s=RELAY_HEAD_START_S,
                dispose=lambda made: made.abort(),
                final=lambda why: isinstance(why, _SaysNo),
            )
        except NoneWorked as why:
            raise telling(why.errors) from why
        finally:
            self._relaying -= 1
        self._relayed.add(target.id, link)
        return link

    async def _through_one(self, relay: Member, target: Member, tried: list[str]) -> Link:
        """A link to the target through this relay. One that dialled a wrong host is asked for the link that the
        target holds to it."""
        name = relay.record.name
        request: dict[str, Any] = {"target": id_text(target.id)}
        try:
            carrier = await self._to_direct(relay)
            tunnel = await carrier.tunnel("relay", request, RELAY_TIMEOUT_S)
            try:
                link = await self._handshake(tunnel, carrier, relay, target)
            except (Refused, Unreachable) as why:
                if not isinstance(tunnel.answer, dict) or tunnel.answer.get("way") != "dialled":
                    raise
                try:
                    tunnel = await carrier.tunnel("relay", {**request, "held": True}, RELAY_TIMEOUT_S)
                except QuarterdeckError:
                    raise why from None
                link = await self._handshake(tunnel, carrier, relay, target)
        except (_SaysNo, _Stranger) as why:
            tried.append(f"{name}: {why}")
            raise
        except QuarterdeckError as why:
            tried.append(f"{name}: {str(why)[:REASON_CHARS]}")
            raise Unreachable(f"{name}: {why}") from why
        self._through[link] = relay
        link.on_close(lambda: self._forget_relay(link))
        if target.record.mesh == self._mesh:
            self._spawn(self._tell_by_relay(link))
        return link

    async def _tell_by_relay(self, link: Link) -> None:
        """The target takes this link for one to us, and tells the route of what it sends back over it."""
        with contextlib.suppress(QuarterdeckError):
            await link.call("by_relay", {}, NUDGE_TIMEOUT_S)

    def _forget_relay(self, link: Link) -> None:
        self._through.pop(link, None)

    async def _handshake(self, tunnel: Tunnel, carrier: Link, relay: Member, target: Member) -> Link:
        """The whole login with the target, inside the tunnel. _SaysNo: the target itself refuses; _Stranger: it is
        somebody else."""
        identity, username = self._login_of(target)
        ours, theirs = socket.socketpair()
        self._spawn(splice(tunnel, SocketStream(theirs)))
        try:
            return await dial(
                target.record.addrs[0] if target.record.addrs else carrier.addr,
                identity=identity,
                username=username,
                expect_pub=target.record.pub,
                methods=self._methods if username == "member" else {},
                timeout_s=HANDSHAKE_TIMEOUT_S,
                sock=ours,
            )
        except Refused as why:
            if says_no(why):
                raise _SaysNo(why) from why
            raise _Stranger(
                "host_key", f"relay {relay.record.name} connects us to somebody else: {why.sentence}"
            ) from why

    async def _room(self) -> None:
        """Waits until one link more may go through a relay; the one idle for longest makes room."""
        while len(self._relayed) + self._relaying >= MAX_RELAYED:
            if (idlest := self._relayed.idlest()) is not None:
                await idlest.close()
            else:
                await asyncio.sleep(ROOM_LOOK_S)

    async def _nudge(self, link: Link) -> None:
        with contextlib.suppress(QuarterdeckError):
            await link.call("hello", {}, NUDGE_TIMEOUT_S)

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _SaysNo(QuarterdeckError):
    """The target itself refused us, at the end of a relay."""

    def __init__(self, why: Refused) -> None:
        super().__init__(why.sentence)
        self.why = why


class _Stranger(Refused):
    """At the end of a relay somebody else showed a key."""
