"""How far a stream may run ahead of who takes its items, counted at both ends."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from discovery.errors import QuarterdeckError
from discovery.links.frames import BadFrame


class Ended(QuarterdeckError):
    """A stream's regular end."""


class Inbound:
    """A stream of the other side, as far as it arrived and was not taken yet."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._items: deque[tuple[Any, int]] = deque()
        self._ahead = 0
        self._taken = 0
        self._end: QuarterdeckError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def put(self, item: Any, cost: int) -> None:
        if self._ahead >= self._window:
            raise BadFrame("overrun", "a stream sent beyond its window")
        self._ahead += cost
        self._items.append((item, cost))
        self._news.set()

    def end(self, why: QuarterdeckError) -> None:
        self._end = self._end or why
        self._news.set()

    async def next(self) -> tuple[Any, int]:
        """The next item, and the credit to give back now (0: not worth a frame yet)."""
        while not self._items:
            if self._end is not None:
                raise self._end
            self._news.clear()
            await self._news.wait()
        item, cost = self._items.popleft()
        self._taken += cost
        if self._taken < self._window // 2:
            return item, 0
        credit, self._taken = self._taken, 0
        self._ahead -= credit
        return item, credit


class Outbound:
    """A stream served here: its task, and how far it may run ahead."""

    task: asyncio.Task[None]

    def __init__(self, window: int) -> None:
        self._credit = window
        self._granted = asyncio.Event()

    def grant(self, credit: int) -> None:
        self._credit += credit
        self._granted.set()

    async def spend(self, cost: int) -> None:
        while self._credit <= 0:
            self._granted.clear()
            await self._granted.wait()
        self._credit -= cost
