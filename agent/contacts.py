"""The SSH links of one node to the members of its mesh: sentinels, push/pull, and calls to any member.

A link is opened by whoever needs it first and used by both ends. Sentinel links are kept open so that the death of a
process is noticed when its connections close; other links are closed after a minute without use.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from discovery.errors import QuarterdeckError, Refused, Unreachable
from discovery.identity import Identity
from discovery.links import Handler, Link, dial
from discovery.member import Addr, Member
from discovery.pool import Pool

DIAL_TIMEOUT_S = 3.0
PUSH_PULL_TIMEOUT_S = 10.0
IDLE_CLOSE_S = 60.0
SENTINEL_JITTER_S = 0.5
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 30.0
GOODBYE_TIMEOUT_S = 0.25


class Contacts:
    """Keeps links by node id. `usable_addrs(member)` lists where this node may dial a member, best first."""

    def __init__(
        self,
        pool: Pool,
        identity: Identity,
        methods: Mapping[str, Handler],
        usable_addrs: Callable[[Member], list[Addr]],
    ) -> None:
        self._pool = pool
        self._identity = identity
        self._methods = methods
        self._usable_addrs = usable_addrs
        self._links: dict[int, list[Link]] = {}
        self._used: dict[Link, float] = {}
        self._dialling: dict[int, asyncio.Task[Link]] = {}
        self._wanted: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def counts(self) -> dict[str, int]:
        """How many links are open and how many of them are wanted as sentinels."""
        return {"links": sum(len(links) for links in self._links.values()), "sentinels": len(self._wanted)}

    def adopt(self, link: Link) -> None:
        """Takes in a link whose other end is a member: proof that it lives, and a way to call it."""
        node = link.login.node
        if node is None:
            return
        self._links.setdefault(node, []).append(link)
        self._used[link] = time.monotonic()
        link.on_close(lambda: self._closed(node, link))
        self._pool.swim.link_answered(node, time.monotonic())
        self._pool.flush()

    def open_to(self, node: int) -> Link | None:
        """An open link to that member, whoever dialled it, or None."""
        for link in self._links.get(node, ()):
            if not link.closed:
                self._used[link] = time.monotonic()
                return link
        return None

    async def link_to(self, member: Member) -> Link:
        """An open link to a member: one that is there, or a new one. Unreachable says what was tried."""
        if link := self.open_to(member.id):
            return link
        task = self._dialling.get(member.id)
        if task is None:
            task = asyncio.create_task(self._dial(member))
            self._dialling[member.id] = task
            task.add_done_callback(lambda _: self._dialling.pop(member.id, None))
        return await asyncio.shield(task)

    async def call(self, member: Member, method: str, params: Any, timeout_s: float) -> Any:
        """Calls a member; a proof of life when it answers, with a result or a refusal."""
        link = await self.link_to(member)
        try:
            answer = await link.call(method, params, timeout_s)
        except Refused:
            self._answered(member.id)
            raise
        except Unreachable:
            link.abort()  # what gives no answer now is dialled anew next time, not waited for again
            raise
        self._answered(member.id)
        return answer

    def keep(self, nodes: tuple[int, ...]) -> None:
        """Makes exactly these the sentinels: opens what is missing with jitter, lets go of the others."""
        for node in self._wanted.keys() - set(nodes):
            self._wanted.pop(node).cancel()
        for node in nodes:
            if node not in self._wanted and not self._closing:
                self._wanted[node] = asyncio.create_task(self._keep_one(node))

    def push_pull(self, node: int) -> None:
        """Exchanges what both ends know with one member, in the background."""
        member = self._pool.swim.members.get(node)
        if member is not None and not self._closing:
            self._spawn(self._push_pull(member))

    async def goodbye(self, body: bytes) -> None:
        """Hands the goodbye over every open link; waits at most 250 ms for the answers."""
        links = [link for links in self._links.values() for link in links if not link.closed]
        calls = [
            asyncio.create_task(link.call("gossip", {"body": body}, GOODBYE_TIMEOUT_S)) for link in links
        ]
        if calls:
            await asyncio.wait(calls, timeout=GOODBYE_TIMEOUT_S)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def close_idle(self) -> None:
        """Closes links that nobody used for a minute and that are no sentinels. Only the dialling end closes."""
        now = time.monotonic()
        for node, links in list(self._links.items()):
            if node in self._wanted:
                continue
            for link in links:
                if link.dialled and now - max(self._used.get(link, now), link.last_answer) > IDLE_CLOSE_S:
                    self._spawn(link.close())

    async def close(self) -> None:
        """Closes every link and ends every task."""
        self._closing = True
        for task in (*self._wanted.values(), *self._dialling.values(), *self._tasks):
            task.cancel()
        links = [link for links in self._links.values() for link in links]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(link.close() for link in links), return_exceptions=True)

    async def _dial(self, member: Member) -> Link:
        why: QuarterdeckError = Unreachable(
            f"{member.record.name}: has no address that can be dialled from here"
        )
        for addr in self._usable_addrs(member):
            try:
                link = await dial(
                    addr,
                    identity=self._identity,
                    username="member",
                    expect_pub=member.record.pub,
                    methods=self._methods,
                    timeout_s=DIAL_TIMEOUT_S,
                )
            except QuarterdeckError as error:
                why = error
                continue
            self._pool.swim.link_opened(member.id, addr, time.monotonic())
            self.adopt(link)
            return link
        if isinstance(why, Refused) and why.code == "login":
            self._pool.swim.greet(
                member.id, time.monotonic()
            )  # it does not know us yet: introduce ourselves first
            self._pool.flush()
        raise why

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

    async def _push_pull(self, member: Member) -> None:
        swim = self._pool.swim
        try:
            request = swim.push_pull_request(time.monotonic())
            answer = await self.call(member, "push_pull", {"body": request}, PUSH_PULL_TIMEOUT_S)
            swim.push_pull_merge(answer["body"], member.id, time.monotonic())
        except (QuarterdeckError, KeyError, TypeError):
            self._pool.counters["push_pull_failed"] += 1
        self._pool.flush()

    def _answered(self, node: int) -> None:
        self._pool.swim.link_answered(node, time.monotonic())
        self._pool.flush()

    def _closed(self, node: int, link: Link) -> None:
        links = self._links.get(node, [])
        with contextlib.suppress(ValueError):
            links.remove(link)
        self._used.pop(link, None)
        if not links:
            self._links.pop(node, None)
            if not self._closing:
                self._pool.swim.link_closed(node, time.monotonic())
                self._pool.flush()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
