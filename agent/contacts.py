"""The SSH links of one node to the members of its mesh: sentinels, push/pull, and calls to any member.

A link is opened by whoever needs it first and used by both ends. Sentinel links are kept open so that the death of a
process is noticed when its connections close, and one link to a gateway so that this node can be reached back where
nobody can dial it; other links are closed after a minute without use.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agent.openlinks import IDLE_CLOSE_S, OpenLinks
from agent.racing import dial_any, shared
from discovery.errors import QuarterdeckError, Refused
from discovery.identity import Identity
from discovery.links import Handler, Link
from discovery.member import Addr, Member
from discovery.pool import Pool

DIAL_TIMEOUT_S = 3.0
PUSH_PULL_TIMEOUT_S = 10.0
SENTINEL_JITTER_S = 0.5
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 30.0
GOODBYE_TIMEOUT_S = 0.25

__all__ = ["DIAL_TIMEOUT_S", "IDLE_CLOSE_S", "Contacts"]


class Notes(Protocol):
    """Something that members compare whenever they push and pull: each says in a note what it has."""

    def note(self) -> Any: ...
    def heard(self, node: int, note: Any, *, act: bool = False) -> None: ...


class Contacts:
    """Keeps links by node id. `usable_addrs(member)` lists where this node may dial a member, best first."""

    def __init__(
        self,
        pool: Pool,
        identity: Identity,
        methods: Mapping[str, Handler],
        usable_addrs: Callable[[Member], list[Addr]],
        *,
        username: str = "member",
    ) -> None:
        self._pool = pool
        self._identity = identity
        self._methods = methods
        self._usable_addrs = usable_addrs
        self._username = username
        self.notes: Mapping[str, Notes] = {}
        """What is compared beside membership, by the name under which its note travels."""
        self.exchanged: Callable[[], None] = lambda: None
        """Called when a push/pull that this node asked for is done."""
        self._links = OpenLinks()
        self._dialling: dict[int, asyncio.Task[Link]] = {}
        self._wanted: dict[int, asyncio.Task[None]] = {}
        self._gateways: tuple[int, ...] = ()
        self._gateways_changed = asyncio.Event()
        self._gateway: int | None = None
        self._keeping_gateway: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def counts(self) -> dict[str, int]:
        """How many links are open and how many of them are wanted as sentinels."""
        return {"links": len(self._links), "sentinels": len(self._wanted)}

    @property
    def gateway(self) -> int | None:
        """The gateway to which a link is kept so that this node can be reached back, if there is one."""
        return self._gateway

    def adopt(self, link: Link) -> None:
        """Takes in a link whose other end is a member: proof that it lives, and a way to call it."""
        node = link.login.node
        if node is None:
            return
        self._links.add(node, link)
        link.on_close(lambda: self._closed(node))
        self.answered(node)

    def open_to(self, node: int) -> Link | None:
        """An open link to that member, whoever dialled it, or None."""
        return self._links.to(node)

    def waiting_ms(self, node: int) -> int | None:
        """For how long the links to that member have owed an answer, in ms; None while they owe none."""
        waiting_s = self._links.waiting_s(node, time.monotonic())
        return None if waiting_s is None else round(waiting_s * 1000)

    async def link_to(self, member: Member) -> Link:
        """An open link to a member: one that is there, or a new one. Unreachable says what was tried."""
        if link := self.open_to(member.id):
            return link
        task = self._dialling.get(member.id)
        if task is None:
            task = shared(self._dialling, member.id, self._dial(member))
        return await asyncio.shield(task)

    async def call(self, member: Member, method: str, params: Any, timeout_s: float) -> Any:
        """Calls a member; a proof of life when it answers, with a result or a refusal."""
        return await self.ask(member.id, await self.link_to(member), method, params, timeout_s)

    async def ask(self, node: int, link: Link, method: str, params: Any, timeout_s: float) -> Any:
        """The same over a link that is there. A link that gives no answer is not used for anything new; what else
        is under way on it goes on."""
        try:
            answer = await self._links.ask(link, method, params, timeout_s)
        except Refused:
            self.answered(node)
            raise
        self.answered(node)
        return answer

    def answered(self, node: int) -> None:
        """That member has answered over a link that proved its key: it lives."""
        self._pool.swim.link_answered(node, time.monotonic())
        self._pool.flush()

    def keep(self, nodes: tuple[int, ...]) -> None:
        """Makes exactly these the sentinels: opens what is missing with jitter, lets go of the others."""
        for node in self._wanted.keys() - set(nodes):
            self._wanted.pop(node).cancel()
        for node in nodes:
            if node not in self._wanted and not self._closing:
                self._wanted[node] = asyncio.create_task(self._keep_one(node))

    def keep_gateway(self, nodes: tuple[int, ...]) -> None:
        """Keeps a link open to one of these gateways: the first that can be dialled, the next when it goes. With
        none, lets go of the one there was. Call it with the present gateways whenever they change."""
        if nodes == self._gateways or self._closing:
            return
        self._gateways = nodes
        self._gateways_changed.set()
        if self._keeping_gateway is None:
            self._keeping_gateway = asyncio.create_task(self._keep_a_gateway())

    def push_pull(self, node: int) -> None:
        """Exchanges what both ends know with one member, in the background."""
        member = self._pool.swim.members.get(node)
        if member is not None and not self._closing:
            self._spawn(self._push_pull(member))

    async def goodbye(self, body: bytes) -> None:
        """Hands the goodbye over every open link; waits at most 250 ms for the answers."""
        calls = [
            asyncio.create_task(link.call("gossip", {"body": body}, GOODBYE_TIMEOUT_S))
            for link in self._links.all
            if not link.closed
        ]
        if calls:
            await asyncio.wait(calls, timeout=GOODBYE_TIMEOUT_S)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def close_idle(self) -> None:
        """Closes links that nobody used for a minute and that are not kept, which only the dialling end does; and
        any that gave no answer and has nothing under way."""
        for node, link in self._links.idle(time.monotonic()):
            kept = node in self._wanted or node == self._gateway
            if self._links.doubted(link) or (link.dialled and not kept):
                self._spawn(link.close())

    async def close(self) -> None:
        """Closes every link and ends every task."""
        self._closing = True
        keeping = [self._keeping_gateway] if self._keeping_gateway is not None else []
        for task in (*self._wanted.values(), *self._dialling.values(), *keeping, *self._tasks):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(link.close() for link in self._links.all), return_exceptions=True)

    async def _dial(self, member: Member) -> Link:
        try:
            link, addr = await dial_any(
                self._usable_addrs(member),
                who=member.record.name,
                identity=self._identity,
                username=self._username,
                expect_pub=member.record.pub,
                methods=self._methods,
                timeout_s=DIAL_TIMEOUT_S,
            )
        except Refused as why:
            if why.code == "login":
                # it does not know us yet: introduce ourselves first
                self._pool.swim.greet(member.id, time.monotonic())
                self._pool.flush()
            raise
        self._pool.swim.link_opened(member.id, addr, time.monotonic())
        self.adopt(link)
        return link

    async def _keep_one(self, node: int) -> None:
        await asyncio.sleep(random.uniform(0, SENTINEL_JITTER_S))
        retry_s = RETRY_FIRST_S
        while True:
            member = self._pool.swim.members.get(node)
            if member is None:
                return
            try:
                link = await self.link_to(member)
            except QuarterdeckError:
                await asyncio.sleep(retry_s * random.uniform(0.75, 1.25))
                retry_s = min(RETRY_MAX_S, retry_s * 2)
                continue
            retry_s = RETRY_FIRST_S
            await link.wait_closed()
            await asyncio.sleep(random.uniform(0.2, 1.0))

    async def _keep_a_gateway(self) -> None:
        """One link at a time: the new one is there before the old one may be closed as idle."""
        retry_s = RETRY_FIRST_S
        while True:
            await asyncio.sleep(random.uniform(0, SENTINEL_JITTER_S))
            self._gateways_changed.clear()
            link = await self._first_gateway()
            if link is None:
                self._gateway = None
                wait_s = retry_s * random.uniform(0.75, 1.25) if self._gateways else None
                retry_s = min(RETRY_MAX_S, retry_s * 2)
            else:
                retry_s, wait_s = RETRY_FIRST_S, None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._gateway_news(link)

    async def _first_gateway(self) -> Link | None:
        for node in self._gateways:
            member = self._pool.swim.members.get(node)
            if member is None or not member.present:
                continue
            try:
                link = await self.link_to(member)
            except QuarterdeckError:
                continue
            self._gateway = node
            return link
        return None

    async def _gateway_news(self, link: Link | None) -> None:
        """Returns when the gateways have changed, or this link has closed."""
        news = asyncio.Event()
        if link is not None:
            link.on_close(news.set)
        waits = [asyncio.create_task(event.wait()) for event in (news, self._gateways_changed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _push_pull(self, member: Member) -> None:
        swim = self._pool.swim
        try:
            request = swim.push_pull_request(time.monotonic())
            params = {"body": request, **{name: notes.note() for name, notes in self.notes.items()}}
            answer = await self.call(member, "push_pull", params, PUSH_PULL_TIMEOUT_S)
            swim.push_pull_merge(answer["body"], member.id, time.monotonic())
            self.exchanged()
            for name, notes in self.notes.items():
                notes.heard(member.id, answer.get(name), act=True)
        except (QuarterdeckError, KeyError, TypeError):
            self._pool.counters["push_pull_failed"] += 1
        self._pool.flush()

    def _closed(self, node: int) -> None:
        if not self._links.any_to(node) and not self._closing:
            self._pool.swim.link_closed(node, time.monotonic())
            self._pool.flush()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
