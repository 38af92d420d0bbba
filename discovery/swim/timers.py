"""Deadlines by key: values in a heap, a stale one is skipped, all of them can be moved."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from math import inf


class Timers:
    """At most one deadline a key. `next` is what the caller sleeps until."""

    __slots__ = ("_at", "_heap", "_seq")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable]] = []
        self._at: dict[Hashable, tuple[float, int]] = {}
        self._seq = 0

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: Hashable, at: float) -> None:
        """(Re)arms `key`; an earlier deadline of it is forgotten."""
        self._seq += 1
        self._at[key] = (at, self._seq)
        heappush(self._heap, (at, self._seq, key))
        if len(self._heap) > 64 + 4 * len(self._at):
            self._rebuild(0.0)

    def sooner(self, key: Hashable, at: float) -> None:
        """Arms `key` unless it is due by then anyway."""
        held = self._at.get(key)
        if held is None or held[0] > at:
            self.set(key, at)

    def cancel(self, key: Hashable) -> None:
        self._at.pop(key, None)

    def at(self, key: Hashable) -> float | None:
        """When `key` is due, or None."""
        held = self._at.get(key)
        return None if held is None else held[0]

    def next(self) -> float:
        """The earliest deadline; infinity when there is none."""
        heap = self._heap
        while heap:
            at, seq, key = heap[0]
            held = self._at.get(key)
            if held is not None and held[1] == seq:
                return at
            heappop(heap)
        return inf

    def pop(self, now: float) -> tuple[Hashable, float] | None:
        """Takes out the earliest key that is due, with its deadline; None when none is."""
        at = self.next()
        if at > now:
            return None
        key = heappop(self._heap)[2]
        del self._at[key]
        return key, at

    def shift(self, by: float) -> None:
        """Moves every deadline by `by` seconds."""
        self._rebuild(by)

    def clear(self) -> None:
        self._at.clear()
        self._heap.clear()

    def _rebuild(self, by: float) -> None:
        self._at = {key: (at + by, seq) for key, (at, seq) in self._at.items()}
        self._heap = [(at, seq, key) for key, (at, seq) in self._at.items()]
        heapify(self._heap)
