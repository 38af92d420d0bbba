"""The executor's thinking: what waits to go out, in which order it is judged, and when it is given up.

Due deferred actions come first, in the order of their times, then what waits, first in first out. Retries and
deferrals are strikes, those for a slot apart: who queues for a slot is not failing. Of what has the same kind
and target only one is kept, the latest said; it keeps the place and the reservations of the first.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TypeAlias

import msgspec

from agent.meshos.actions import Action, Key, key_of
from agent.meshos.admit import Admission, Admit, Defer, Gate
from agent.meshos.config import MeshOsConfig


class Go(msgspec.Struct, frozen=True):
    """Dispatch it, then say `went` or `failed`."""

    action: Action


class Put(msgspec.Struct, frozen=True):
    """It is deferred, and kept."""

    action: Action
    verdict: Defer


class Held(msgspec.Struct, frozen=True):
    """It is gated, and no longer kept."""

    action: Action
    verdict: Gate


class Dropped(msgspec.Struct, frozen=True):
    """It was put off too often, and is no longer kept."""

    action: Action
    reason: str


Step: TypeAlias = Go | Put | Held | Dropped


class Item:
    """One action on its way out. `due_ms` is when a deferred one comes back."""

    __slots__ = ("action", "deferred", "due_ms", "strikes")

    def __init__(self, action: Action) -> None:
        self.action = action
        self.strikes = 0
        self.deferred = False
        self.due_ms = 0


class Desk:
    """What waits, in front of one gate."""

    def __init__(self, config: MeshOsConfig, admission: Admission) -> None:
        self._config = config
        self.admission = admission
        self._items: dict[Key, Item] = {}
        """What waits or is deferred."""
        self._out: dict[Key, Item] = {}
        """What is being dispatched."""
        self._waiting: deque[Key] = deque()
        self._later: list[tuple[int, int, Key]] = []
        self._put = 0
        self._edges: deque[tuple[bool, int]] = deque()
        self.deferred = self.gated = self.retries = self.dropped = self.merged = self.edges_seen = 0

    def __len__(self) -> int:
        """How many wait or are deferred: the depth that backpressure goes by."""
        return len(self._items)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, action: Action) -> bool:
        """Takes an action that is to go out; False when there is no room for it."""
        key = key_of(action)
        if (known := self._items.get(key) or self._out.get(key)) is not None:
            known.action = action
            self.merged += 1
            return True
        if len(self._waiting) >= self._config.action_queue_capacity:
            return False
        self._items[key] = Item(action)
        self._waiting.append(key)
        return True

    def due_ms(self) -> int | None:
        """When the next deferred action comes back; None when there is none."""
        return self._later[0][0] if self._later else None

    def ready(self, now_ms: int) -> bool:
        """Whether there is something to judge now."""
        return bool(self._waiting) or bool(self._later and self._later[0][0] <= now_ms)

    def edges(self) -> deque[tuple[bool, int]]:
        """Backpressure edges still to be told, (on, depth) each; who tells one takes it out."""
        return self._edges

    def step(self, now_ms: int) -> Step | None:
        """Judges the next action; None when there is none to judge now."""
        self._measure()
        if self._later and self._later[0][0] <= now_ms:
            _, _, key = heapq.heappop(self._later)
        elif self._waiting:
            key = self._waiting.popleft()
        else:
            return None
        item = self._items[key]
        verdict = self.admission.admit(item.action, now_ms)
        match verdict:
            case Admit():
                del self._items[key]
                self._out[key] = item
                self._measure()
                return Go(item.action)
            case Gate():
                del self._items[key]
                self.admission.release(item.action)
                self.gated += 1
                self._measure()
                return Held(item.action, verdict)
        self.deferred += 1
        item.strikes += not verdict.slot
        if item.strikes > self._config.strikes_max:
            return self._drop(
                key, item, f"put off more than {self._config.strikes_max} times: {verdict.reason}"
            )
        self._defer(key, item, now_ms + verdict.retry_after_ms)
        return Put(item.action, verdict)

    def went(self, action: Action) -> None:
        """The dispatch of an action succeeded."""
        self._out.pop(key_of(action), None)
        self.admission.dispatched(action)

    def failed(self, action: Action, retry_after_ms: int | None, now_ms: int) -> Dropped | None:
        """The dispatch of an action failed. With `retry_after_ms` it is kept to be judged again, unless that
        was once too often."""
        key = key_of(action)
        item = self._out.pop(key, None)
        self.admission.release(action)
        if item is None or retry_after_ms is None:
            return None
        item.strikes += 1
        self.retries += 1
        self._items[key] = item
        if item.strikes > self._config.strikes_max:
            return self._drop(key, item, f"failed more than {self._config.strikes_max} times")
        self._defer(key, item, now_ms + max(1, retry_after_ms))
        return None

    def _defer(self, key: Key, item: Item, due_ms: int) -> None:
        self._put += 1
        item.deferred, item.due_ms = True, due_ms
        heapq.heappush(self._later, (due_ms, self._put, key))

    def _drop(self, key: Key, item: Item, reason: str) -> Dropped:
        del self._items[key]
        self.admission.release(item.action)
        self.dropped += 1
        self._measure()
        return Dropped(item.action, reason)

    def _measure(self) -> None:
        depth = len(self._items)
        edge = self.admission.depth(depth)
        if edge is not None:
            self.edges_seen += 1
            self._edges.append((edge, depth))
