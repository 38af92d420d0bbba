"""Giving up a copy: only once enough others have promised to keep theirs.

A confirmation is a promise: who gave one keeps its own copy for `PIN_S`, and of two nodes that drop the same thing at
once the lower id goes first. So two holders can't each rely on the other and both be gone. A holder that is to be empty
itself confirms nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from agent.data.holdings import Holdings, Key, Kind, Own
from agent.data.scoring import Candidate
from agent.executor import DispatchError
from agent.meshos.events import Event, LocalReplicaIntent
from discovery.errors import QuarterdeckError, Refused, RemoteError
from discovery.links import Link

CONFIRM_TIMEOUT_S = 5.0
PIN_S = 30.0
PINS_MAX = 4096
RETRY_MS = 2_000


class ChainHolder(Protocol):
    """What holds the things of one kind on this node. Whatever it gains or loses, it tells (`Own.add`, `Own.remove`)."""

    def head(self, name: str) -> str | None:
        """What is held of it: the hash of an artifact, the head of a chain. None: nothing whole."""

    def covers(self, name: str, head: str) -> bool:
        """Whether what is held here is, or contains, what `head` stands for."""

    async def hold(self, name: str, sources: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Gets a whole copy from these holders, the first first; `progress(done, total)` in bytes. Raises when it
        can't; what was got is kept for the next try."""

    async def drop(self, name: str) -> None:
        """Gives up the copy."""


class Call(Protocol):
    """Calls a member: its answer; Refused, RemoteError, Unreachable."""

    def __call__(self, node: int, method: str, params: Any, timeout_s: float) -> Awaitable[Any]: ...


class Dropping:
    """One node's drops, and its answers to those of others. As `Placing`."""

    def __init__(
        self,
        *,
        me: int,
        own: Own,
        holdings: Holdings,
        holders: Mapping[Kind, ChainHolder],
        members: Callable[[], Mapping[int, Candidate]],
        call: Call,
        tell: Callable[[Event], None],
        draining: Callable[[], bool],
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._own = own
        self._holdings = holdings
        self._holders = holders
        self._members = members
        self._call = call
        self._tell = tell
        self._draining = draining
        self._counters = counters
        self._clock = clock
        self.evicted: set[str] = set()
        """Names that a leader asked this node to drop."""
        self.released: set[str] = set()
        """Names that it drops because it is to be empty."""
        self._dropping: dict[Key, bool] = {}
        """What is being dropped; True: decided, a confirmation can't hold it up any more."""
        self._pins: dict[Key, float] = {}

    def others(self, key: Key) -> list[int]:
        """Live holders of the latest version that count: not this one, none that is to be empty."""
        members = self._members()
        return [
            node
            for node in self._holdings.live_holders(key)
            if node != self._me and (seen := members.get(node)) is not None and not seen.draining
        ]

    async def drop(self, key: Key) -> None:
        """Gives up this node's copy, once enough others have promised to keep theirs."""
        kind, name = key
        holder = self._holders[kind]
        head = holder.head(name)
        if head is None:
            self._own.remove(kind, name)
            return
        if key in self._dropping:
            return
        self._dropping[key] = False
        try:
            wanted = self._holdings.count(key) or 1
            others = self.others(key)
            kept = 0
            if len(others) >= wanted and not self._pinned(key):
                answers = await asyncio.gather(*(self._confirmed(node, key, head) for node in others))
                kept = sum(answers)
            if kept < wanted or self._pinned(key):
                raise self._too_few(key, kept, len(others), wanted)
            if holder.head(name) != head:
                raise DispatchError(f"{name}: it has grown since others were asked", RETRY_MS)
            self._dropping[key] = True
            await holder.drop(name)
            self._counters["dropped"] += 1
            self.evicted.discard(name)
            self.released.discard(name)
            self._tell(LocalReplicaIntent(name, "none"))
        finally:
            del self._dropping[key]

    def _too_few(self, key: Key, kept: int, others: int, wanted: int) -> DispatchError:
        self._counters["drop_refused"] += 1
        name = key[1]
        if self._pinned(key):
            return DispatchError(f"{name}: another holder that drops it counts on this one", RETRY_MS)
        why = f"{name}: {kept} of {others} other holders confirm that they have it, {wanted} have to"
        if others < wanted:
            why = f"{name}: {others} other nodes hold it and count, {wanted} have to"
        if name in self.evicted:
            # A leader asked, who knew more holders than there are: the copy is needed, it may ask again.
            self.evicted.discard(name)
            self._tell(LocalReplicaIntent(name, "hold"))
            return DispatchError(why)
        return DispatchError(why, RETRY_MS)

    async def _confirmed(self, node: int, key: Key, head: str) -> bool:
        params = {"kind": key[0], "name": key[1], "head": head}
        try:
            answer = await self._call(node, "confirm", params, CONFIRM_TIMEOUT_S)
        except QuarterdeckError:
            return False
        return isinstance(answer, dict) and answer.get("holds") is True

    def _pinned(self, key: Key) -> bool:
        until = self._pins.get(key)
        if until is not None and until <= self._clock():
            del self._pins[key]
            until = None
        return until is not None

    async def serve_confirm(self, link: Link, params: Any) -> Any:
        """`{"kind", "name", "head"}` of a holder that is about to drop it → `{"holds", "why"}`: whether this node has
        it too, and keeps it for PIN_S."""
        caller, key = caller_of(link), key_of_params(params)
        head = params.get("head")
        holder = self._holders.get(key[0])
        if holder is None or not isinstance(head, str) or holder.head(key[1]) is None:
            return {"holds": False, "why": "not held here"}
        if not holder.covers(key[1], head):
            return {"holds": False, "why": "another version is held here"}
        if self._draining():
            return {"holds": False, "why": "this node is to be empty"}
        decided = self._dropping.get(key)
        if decided or (decided is False and caller > self._me):
            return {"holds": False, "why": "being dropped here"}
        if len(self._pins) >= PINS_MAX:
            now = self._clock()
            self._pins = {k: until for k, until in self._pins.items() if until > now}
        self._pins[key] = self._clock() + PIN_S
        return {"holds": True, "why": ""}


def key_of_params(params: Any) -> Key:
    kind = params.get("kind") if isinstance(params, dict) else None
    name = params.get("name") if isinstance(params, dict) else None
    if kind not in ("chain", "artifact") or not isinstance(name, str) or not 0 < len(name) <= 128:
        raise RemoteError("kind and name of a chain or an artifact expected")
    return ("chain" if kind == "chain" else "artifact"), name


def caller_of(link: Link) -> int:
    """The member at the other end; Refused `login` for anybody else."""
    if link.login.kind != "member" or link.login.node is None:
        raise Refused("login", "only members place replicas")
    return link.login.node
