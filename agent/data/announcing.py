"""Telling the other nodes what this one holds, and hearing it from them, over links.

A change is pushed at once to live members; a note in each push/pull says which version stands, and who has another one
asks for the difference. A node is believed about itself alone: what it says comes over a link that its key proved.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Any

import msgspec

from agent.data.holdings import ITEMS_MAX, Holdings, Own, Told, Version, read_note, read_told
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.links import Handler, Link

PUSH_AFTER_S = 0.02
"""Changes that come together go out together."""
PUSHED_TO_MAX = 64
"""A change goes at once to so many members, those next in id order; any others learn of it by push/pull."""
AT_ONCE = 8
CALL_TIMEOUT_S = 5.0
CHANGES_A_FRAME = 2_000
ASK_AGAIN_S = 2.0
"""After a member couldn't be asked."""

LinkTo = Callable[[int], Awaitable[Link]]
"""An open link to a member, dialled if need be; Unreachable when there is none."""


class Announcer:
    """Keeps `holdings` and `own` in step with the other members. `live()`: the ids of members that live, without this
    one. `changed()` is called when the fold may have news for the engine. Runs while `run` runs."""

    def __init__(
        self,
        own: Own,
        holdings: Holdings,
        *,
        link_to: LinkTo,
        live: Callable[[], Collection[int]],
        changed: Callable[[], None],
    ) -> None:
        self._own = own
        self._holdings = holdings
        self._link_to = link_to
        self._live = live
        self._changed = changed
        self._asking: set[int] = set()
        self._told: dict[int, Version] = {}
        """What each member took from us."""
        self._push_due = False
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.counters: Counter[str] = Counter()
        """`pushes`, `push_failed`, `asked`, `ask_failed`, `bad_told`, `bad_note`."""

    def methods(self) -> Mapping[str, Handler]:
        return {"holdings": self._serve_holdings, "holdings_changed": self._serve_changed}

    async def close(self) -> None:
        self._closing = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- notes, for push/pull

    def note(self) -> Any:
        """What to put into a push/pull."""
        return msgspec.to_builtins(self._own.note())

    def heard(self, node: int, note: Any) -> None:
        """What a member put into one; None where it says nothing (an older build)."""
        if note is None:
            return
        known = read_note(note)
        if known is None:
            self.counters["bad_note"] += 1
        elif not self._holdings.knows(node, known):
            self.ask(node)

    def met(self, node: int) -> None:
        """A member lives that did not live before: each tells the other."""
        if node == self._holdings.me:
            return
        self._told.pop(node, None)
        self.ask(node)
        self.push()

    # --- telling

    def push(self) -> None:
        """Tells the members what changed, soon."""
        if self._push_due or self._closing:
            return
        self._push_due = True
        self._spawn(self._push())

    async def _push(self) -> None:
        await asyncio.sleep(PUSH_AFTER_S)
        self._push_due = False
        behind = [node for node in self._live() if self._told.get(node) != self._own.version]
        me = self._holdings.me
        for node in sorted(behind, key=lambda node: (node < me, node))[:PUSHED_TO_MAX]:
            self._spawn(self._push_to(node))

    async def _push_to(self, node: int) -> None:
        with contextlib.suppress(QuarterdeckError):
            await self.tell(node)

    async def tell(self, node: int) -> None:
        """Tells one member now; returns when it knows. Raises as a call does."""
        async with self._room:
            told = self._own.told(self._told.get(node))
            if told.version == self._told.get(node):
                return
            self.counters["pushes"] += 1
            try:
                link = await self._link_to(node)
                params = {"version": list(told.version)}
                if told.since is not None or len(told.changes) <= CHANGES_A_FRAME:
                    params["told"] = msgspec.to_builtins(told)
                answer = await link.call("holdings_changed", params, CALL_TIMEOUT_S)
            except QuarterdeckError:
                self.counters["push_failed"] += 1
                raise
            if isinstance(answer, dict) and answer.get("known"):
                self._told[node] = told.version
            else:
                self._told.pop(node, None)

    async def _serve_changed(self, link: Link, params: Any) -> Any:
        """`{"version", "told"}` → `{"known"}`: whether what the caller holds is known now. Without `told`, or when it
        doesn't fit what is known here, this node asks back over the same link, before it answers."""
        node = _member(link)
        body = params.get("told") if isinstance(params, dict) else None
        if body is not None and self._take(node, body):
            return {"known": True}
        await self._ask(node, link)
        version = params.get("version") if isinstance(params, dict) else None
        return {"known": list(self._holdings.version(node) or ()) == version}

    def _take(self, node: int, body: Any) -> bool:
        try:
            fits = self._holdings.heard(node, read_told(body))
        except RemoteError:
            self.counters["bad_told"] += 1
            raise
        if fits:
            self._changed()
        return fits

    # --- asking

    def ask(self, node: int) -> None:
        """Asks a member for what it holds, soon."""
        if node in self._asking or self._closing:
            return
        self._asking.add(node)
        self._spawn(self._ask_soon(node))

    async def _ask_soon(self, node: int) -> None:
        try:
            async with self._room:
                await self.learn(node)
        except QuarterdeckError:
            self.counters["ask_failed"] += 1
            await asyncio.sleep(ASK_AGAIN_S)
            if node in self._live():
                asyncio.get_running_loop().call_soon(self.ask, node)
        finally:
            self._asking.discard(node)

    async def learn(self, node: int) -> None:
        """Asks a member now. Raises as a call does; RemoteError when it tells nonsense."""
        await self._ask(node, await self._link_to(node))

    async def _ask(self, node: int, link: Link) -> None:
        self.counters["asked"] += 1
        for since in (self._holdings.version(node), None):
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    told = await _whole(link, since)
            except TimeoutError as why:
                raise Unreachable(f"no whole answer about holdings within {CALL_TIMEOUT_S:g} s") from why
            if self._holdings.heard(node, told):
                self._changed()
                return
        self.counters["bad_told"] += 1
        raise RemoteError("a member contradicts itself about what it holds")

    async def _serve_holdings(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """`{"since": [incarnation, number] or null}` → what this node holds, or what changed: `[version, digest, since]`,
        then lists of changes."""
        node = _member(link)
        since = params.get("since") if isinstance(params, dict) else None
        version = (
            (since[0], since[1])
            if isinstance(since, list) and len(since) == 2 and all(isinstance(n, int) for n in since)
            else None
        )
        told = self._own.told(version)
        yield [list(told.version), told.digest, told.since]
        for at in range(0, len(told.changes), CHANGES_A_FRAME):
            yield msgspec.to_builtins(told.changes[at : at + CHANGES_A_FRAME])
        self._told[node] = told.version

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _whole(link: Link, since: Version | None) -> Told:
    items: Any = link.stream("holdings", {"since": None if since is None else list(since)})
    head: Any = None
    changes: list[Any] = []
    async with contextlib.aclosing(items):
        async for item in items:
            if not isinstance(item, list):
                raise RemoteError("no announcement of holdings: not a list")
            if head is None:
                head = item
            else:
                changes += item
            if len(changes) > ITEMS_MAX:
                raise RemoteError(f"an announcement of more than {ITEMS_MAX} holdings")
    if head is None or len(head) != 3:
        raise RemoteError("no announcement of holdings: without a beginning")
    return read_told([*head, changes])


def _member(link: Link) -> int:
    if link.login.kind != "member" or link.login.node is None:
        raise Refused("login", "only members tell each other what they hold")
    return link.login.node


__all__ = ["Announcer", "LinkTo"]
