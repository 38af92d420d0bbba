"""Carrying out what the engine decides about replicas: pull, drop, place, evict, migrate; for artifacts and for chains.

    PullReplica       this node gets a copy from the source, or from any other holder; it goes on in the background
    DropReplica       only after `count` other holders, asked live, have confirmed that they have the same
    RequestPlacement  the leader asks the best node to hold it, which does if that leader is the one it sees itself
    RequestEviction   the leader asks the victim to drop it, likewise
    MigrateBlob       the receiver is asked to pull from here; done when it tells that it holds it

How a copy is given up safely is `dropping`'s to say. A node that is to be empty drops each thing as soon as enough
others hold it (`settle`), by the same DropReplica. Where a count is just held, moving the worst holder (arm 6) begins
with the better one: a drop first would be refused, or leave too few; the surplus is arm 3's to evict.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.data.dropping import Call, ChainHolder, Dropping, key_of_params
from agent.data.holdings import Holdings, Item, Key, Kind, Own
from agent.data.scoring import Candidate, fit, ranked, scores
from agent.executor import DispatchError
from agent.meshos.actions import (
    Action,
    DropReplica,
    MigrateBlob,
    PullReplica,
    RequestEviction,
    RequestPlacement,
)
from agent.meshos.events import ActionOutcome, Event, Id, LocalReplicaIntent
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.links import Handler, Link

CALL_TIMEOUT_S = 5.0
PULL_START_S = 0.5
"""A pull that fails sooner failed to be dispatched; one that goes on is told of by its end."""
PULLS_AT_ONCE = 4
PULLS_MAX = 1024
ASKED_MAX = 3
"""Nodes asked, one after the other, before a placement is put off."""
PLACED_S = 45.0
"""How long a node that said yes is waited for before another is asked: less than the engine waits to ask again."""
PLACED_MAX = 1024
RETRY_SOON_MS = 2_000
RETRY_LATER_MS = 10_000
NOBODY_FIT_RETRY_MS = 30_000
"""A mesh that is too small for a count says so twice a minute, not all the time."""


@dataclass
class Pull:
    """A copy on its way here, in bytes."""

    kind: Kind
    name: str
    task: asyncio.Task[None]
    done: int = 0
    total: int = 0
    background: bool = False
    """Its dispatch has ended: what becomes of it is told as an outcome."""


class Placing:
    """One node's hands for replicas. `members()`: every node of the mesh as this one sees it, itself too, by id.
    `learn(node)`: asks that member now what it holds. `tell(event)`: to the engine's loop. `exempt`: names that never
    leave a draining node (the admin chain, its own action chain). `check(key, holders)`: has holders prove what they say
    they hold; asked when an order comes from another leader than the one seen here. `room_for(bytes)`: Refused when there
    is none."""

    def __init__(
        self,
        *,
        me: int,
        own: Own,
        holdings: Holdings,
        holders: Mapping[Kind, ChainHolder],
        members: Callable[[], Mapping[int, Candidate]],
        call: Call,
        learn: Callable[[int], Awaitable[None]],
        tell: Callable[[Event], None],
        draining: Callable[[], bool],
        exempt: Collection[str] = (),
        check: Callable[[Key, list[int]], Awaitable[None]] | None = None,
        room_for: Callable[[int], None] = lambda more: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._own = own
        self._holdings = holdings
        self._holders = holders
        self._members = members
        self._call = call
        self._learn = learn
        self._tell = tell
        self._draining = draining
        self._exempt = frozenset(exempt)
        self._check = check
        self._room_for = room_for
        self._clock = clock
        self.counters: Counter[str] = Counter()
        """Of actions and of calls served, by outcome: `pulled`, `pull_failed`, `dropped`, `drop_refused`, `placed`,
        `evicted`, `migrated`, `refused_CODE`."""
        self._pulls: dict[Key, Pull] = {}
        self._pulling = asyncio.Semaphore(PULLS_AT_ONCE)
        self._placed: dict[Key, tuple[int, float]] = {}
        """Who said yes, and until when it is waited for."""
        self._wanted: set[str] = set()
        """Names this node was asked to hold and doesn't yet."""
        self._dropping = Dropping(
            me=me,
            own=own,
            holdings=holdings,
            holders=holders,
            members=members,
            call=call,
            tell=tell,
            draining=draining,
            counters=self.counters,
            clock=clock,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    def methods(self) -> Mapping[str, Handler]:
        return {
            "place": self._serve_place,
            "evict": self._serve_evict,
            "confirm": self._dropping.serve_confirm,
            "migrate": self._serve_migrate,
        }

    async def close(self) -> None:
        """Ends what is under way; parts of pulls stay on disk."""
        self._closing = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def pulls(self) -> list[Pull]:
        """Copies on their way here."""
        return list(self._pulls.values())

    def scorer(self, chain: Id) -> dict[Id, float | None]:
        """The default scorer, as the engine asks it (`install_scorer`)."""
        key = self._holdings.key_of(str(chain))
        if key is None:
            return {}
        found: dict[Id, float | None] = {}
        for node, value in scores(self._members().values(), self._holdings.holders(key), self._me).items():
            found[node] = value
        return found

    # --- actions

    async def dispatch(self, action: Action) -> bool:
        """Carries an action out; False when it is none of these. DispatchError when it can't be done (now)."""
        try:
            match action:
                case PullReplica():
                    await self._pull(str(action.chain), action.source)
                case DropReplica():
                    await self._dropping.drop(self._key(str(action.chain)))
                case RequestPlacement():
                    await self._place(action)
                case RequestEviction():
                    await self._evict(action)
                case MigrateBlob():
                    await self._migrate(action)
                case _:
                    return False
        except Unreachable as why:
            raise DispatchError(str(why), RETRY_SOON_MS) from why
        except QuarterdeckError as why:
            if isinstance(why, DispatchError):
                raise
            raise DispatchError(str(why), RETRY_LATER_MS) from why
        return True

    def _key(self, name: str) -> Key:
        key = self._holdings.key_of(name)
        if key is None:
            raise DispatchError(f"{name}: nobody holds it")
        return key

    async def _pull(self, name: str, source: Id) -> None:
        key = self._key(name)
        pull = self._begin(key, [source] if isinstance(source, int) else [])
        await asyncio.wait([pull.task], timeout=PULL_START_S)
        pull.background = True
        if pull.task.done() and not pull.task.cancelled() and (why := pull.task.exception()) is not None:
            full = isinstance(why, Refused) and why.code == "disk_full"
            raise DispatchError(str(why), RETRY_LATER_MS if full else RETRY_SOON_MS)

    def _begin(self, key: Key, first: list[int]) -> Pull:
        """The pull of a thing: the one under way, or a new one."""
        pull = self._pulls.get(key)
        if pull is None:
            if len(self._pulls) >= PULLS_MAX:
                raise DispatchError(
                    f"{len(self._pulls)} copies are on their way here already", RETRY_LATER_MS
                )
            task = self._spawn(self._hold(key, first))
            pull = self._pulls[key] = Pull(key[0], key[1], task)
            task.add_done_callback(lambda ended: self._pulled(key, ended))
        return pull

    async def _hold(self, key: Key, first: list[int]) -> None:
        kind, name = key
        async with self._pulling:
            others = [n for n in self._holdings.live_holders(key) if n != self._me and n not in first]
            sources = [n for n in (*first, *others) if n != self._me]
            await self._holders[kind].hold(
                name, sources, lambda done, total: self._progress(key, done, total)
            )

    def _progress(self, key: Key, done: int, total: int) -> None:
        if (pull := self._pulls.get(key)) is not None:
            pull.done, pull.total = done, total

    def _pulled(self, key: Key, task: asyncio.Task[None]) -> None:
        pull = self._pulls.pop(key, None)
        if task.cancelled():
            return
        why = task.exception()
        if why is None:
            self.counters["pulled"] += 1
            self._wanted.discard(key[1])
            return
        self.counters["pull_failed"] += 1
        if pull is not None and pull.background and not self._closing:
            self._tell(ActionOutcome("pull_replica", key[1], "failed", str(why) or type(why).__name__))

    async def _place(self, action: RequestPlacement) -> None:
        name = str(action.chain)
        key = self._key(name)
        holders = self._holdings.holders(key)
        if self._holdings.leader(key) != self._me:
            return
        now = self._clock()
        waiting = self._placed.get(key)
        late = None
        if waiting is not None and waiting[0] not in holders:
            late = waiting[0]
            if waiting[1] > now:
                return
        if len(self._placed) > PLACED_MAX:
            self._placed = {k: placed for k, placed in self._placed.items() if placed[1] > now}
        members = self._members()
        pending = Counter(n for n, until in self._placed.values() if until > now)
        seen = [_with_pending(candidate, pending[candidate.id]) for candidate in members.values()]
        exclude = {node for node in action.exclude if isinstance(node, int)}
        order = ranked(seen, holders, exclude | {self._me}, self._me)
        order.sort(key=lambda node: node == late)
        soon = [node for node in self._holdings.outdated(key) if node in order]
        last: QuarterdeckError | None = None
        for node in [*soon, *(n for n in order if n not in soon)][:ASKED_MAX]:
            try:
                await self._call(node, "place", self._order(key), CALL_TIMEOUT_S)
            except QuarterdeckError as why:
                last = why
                continue
            self._placed[key] = (node, self._clock() + PLACED_S)
            self.counters["placed"] += 1
            return
        reason = "no node is fit to hold it" if last is None else str(last)
        raise DispatchError(f"{name}: {reason}", NOBODY_FIT_RETRY_MS if last is None else RETRY_LATER_MS)

    async def _evict(self, action: RequestEviction) -> None:
        key = self._key(str(action.chain))
        if self._holdings.leader(key) != self._me or not isinstance(action.victim, int):
            return
        counting = len(self._dropping.others(key)) + (not self._draining())
        if action.by_score and counting <= (self._holdings.count(key) or 1):
            shunned = tuple(n for n, seen in self._members().items() if not fit(seen))
            await self._place(RequestPlacement(action.chain, (action.victim, *shunned)))
            return
        if action.victim == self._me:
            self._to_drop(key[1], self._dropping.evicted)
        else:
            await self._call(action.victim, "evict", self._order(key), CALL_TIMEOUT_S)
        self.counters["evicted"] += 1

    async def _migrate(self, action: MigrateBlob) -> None:
        key: Key = ("artifact", str(action.blob))
        if self._holders["artifact"].head(key[1]) is None or not isinstance(action.receiver, int):
            return
        await self._call(action.receiver, "migrate", self._order(key), CALL_TIMEOUT_S)
        self.counters["migrated"] += 1

    def _order(self, key: Key) -> dict[str, Any]:
        """What a leader says with an order: about what, and which of its announcements it rests on."""
        return {"kind": key[0], "name": key[1], "version": list(self._own.version)}

    # --- what other nodes ask

    async def _serve_place(self, link: Link, params: Any) -> Any:
        """A leader's `{"kind", "name", "version"}`: this node shall hold it. → `{"held": bool}`: it does already."""
        leader, key = await self._ordered(link, params)
        await self._led_by(leader, key)
        me = self._members().get(self._me)
        if self._draining() or (me is not None and me.cordoned):
            raise self._refused("not_eligible", "this node takes nothing new")
        kind, name = key
        item = self._holdings.current(key)
        if item is not None and self._holders[kind].head(name) is not None and self._holds(item):
            return {"held": True}
        self._has_room(item)
        self._dropping.evicted.discard(name)
        self._wanted.add(name)
        self._tell(LocalReplicaIntent(name, "hold"))
        return {"held": False}

    async def _serve_evict(self, link: Link, params: Any) -> Any:
        """A leader's `{"kind", "name", "version"}`: this node shall drop it. → `{"held": bool}`: it holds it now."""
        leader, key = await self._ordered(link, params)
        await self._led_by(leader, key)
        held = self._holders[key[0]].head(key[1]) is not None
        if key[1] in self._exempt:
            raise self._refused("exempt", f"{key[1]} stays on every node")
        if held:
            self._to_drop(key[1], self._dropping.evicted)
        return {"held": held}

    async def _serve_migrate(self, link: Link, params: Any) -> Any:
        """A holder's `{"kind", "name", "version"}` of an artifact that nobody counts: this node pulls it from there."""
        giver, key = await self._ordered(link, params)
        if giver not in self._holdings.holders(key):
            raise self._refused("not_a_holder", "the caller doesn't hold it, as far as is known here")
        me = self._members().get(self._me)
        if self._draining() or (me is not None and me.cordoned):
            raise self._refused("not_eligible", "this node takes nothing new")
        if self._holders[key[0]].head(key[1]) is None:
            self._has_room(self._holdings.current(key))
            try:
                self._begin(key, [giver])
            except DispatchError as why:
                raise self._refused("busy", why.reason) from why
        return {}

    async def _ordered(self, link: Link, params: Any) -> tuple[int, Key]:
        """Who gives an order about what, once this node knows what the caller's order rests on."""
        caller, key = self._caller(link), key_of_params(params)
        if key[0] not in self._holders:
            raise self._refused("unsupported", f"this node holds no {key[0]}s")
        version = params.get("version")
        known = self._holdings.version(caller)
        if known is None or list(known) != version:
            with contextlib.suppress(Unreachable, RemoteError):
                await self._learn(caller)
        return caller, key

    async def _led_by(self, caller: int, key: Key) -> None:
        """Refused unless the caller leads it as this node sees it. If another seems to, that one has to prove it."""
        leader = self._holdings.leader(key)
        if leader not in (None, caller) and self._check is not None:
            await self._check(key, [n for n in self._holdings.live_holders(key) if n != self._me][:ASKED_MAX])
            leader = self._holdings.leader(key)
        if leader != caller:
            raise self._refused("not_leader", f"{key[1]} is led by another node, as far as is known here")

    def _has_room(self, item: Item | None) -> None:
        try:
            self._room_for(0 if item is None else item.size)
        except Refused as why:
            self.counters[f"refused_{why.code}"] += 1
            raise

    def _caller(self, link: Link) -> int:
        if link.login.kind != "member" or link.login.node is None:
            raise self._refused("login", "only members place replicas")
        return link.login.node

    def _refused(self, code: str, sentence: str) -> Refused:
        self.counters[f"refused_{code}"] += 1
        return Refused(code, sentence)

    # --- what this node does of itself

    def settle(self) -> None:
        """Has a node that is to be empty let go of what enough others hold; takes that back when it is not to be any
        more. Call it when holdings or members changed, and once in a while."""
        if not self._draining():
            for name in self._dropping.released:
                self._tell(LocalReplicaIntent(name, "hold"))
            self._dropping.released.clear()
            return
        for name in tuple(self._wanted):
            self._wanted.discard(name)
            self._tell(LocalReplicaIntent(name, "none"))
            if (key := self._holdings.key_of(name)) is not None:
                self._spawn(self._forget(key))
        released = self._dropping.released
        for item in self._holdings.held_by(self._me):
            count = self._holdings.count(item.key)
            if item.name in self._exempt or len(self._dropping.others(item.key)) < (count or 1):
                continue
            if count is None and item.kind == "artifact":
                self._spawn(self._drop_quietly(item.key))
            elif item.name not in released:
                self._to_drop(item.name, released)

    async def _forget(self, key: Key) -> None:
        """Calls off a pull, and has the next process of this node not go on with it."""
        if (pull := self._pulls.get(key)) is not None:
            pull.task.cancel()
            await asyncio.wait([pull.task])
        if key[0] == "artifact" and self._holders["artifact"].head(key[1]) is None:
            with contextlib.suppress(QuarterdeckError):
                await self._holders["artifact"].drop(key[1])

    async def _drop_quietly(self, key: Key) -> None:
        """Drops what no arm of the engine counts."""
        with contextlib.suppress(QuarterdeckError):
            await self._dropping.drop(key)

    def _to_drop(self, name: str, why: set[str]) -> None:
        self._wanted.discard(name)
        why.add(name)
        self._tell(LocalReplicaIntent(name, "drop"))

    def _holds(self, item: Item) -> bool:
        mine = self._own.held.items.get(item.key)
        return mine is not None and mine.hash == item.hash

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _with_pending(candidate: Candidate, pending: int) -> Candidate:
    return replace(candidate, pending=candidate.pending + pending) if pending else candidate


__all__ = ["Placing", "Pull"]
