"""Open links by node id: which to use, which not to trust any more, which to let go of.

A link that gave no answer is not used for anything new, until it answers after all: the node may be stopped, or the
network between gone without a word. What else is under way on it is left to end by itself.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from discovery.errors import Unreachable
from discovery.links import Link

IDLE_CLOSE_S = 60.0
QUICK_CALL_S = 10.0
"""Calls that may take longer than this say nothing about a link while they wait."""


class OpenLinks:
    """Links that are open. One that closes is forgotten."""

    def __init__(self) -> None:
        self._links: dict[int, list[Link]] = {}
        self._used: dict[Link, float] = {}
        self._doubted: dict[Link, float] = {}
        self._asked: dict[Link, list[float]] = {}
        """Since when quick calls wait for their answer; the oldest first."""

    def __len__(self) -> int:
        return len(self._used)

    @property
    def all(self) -> list[Link]:
        return list(self._used)

    def add(self, node: int, link: Link) -> None:
        """Takes in a link to that node, as used just now."""
        self._links.setdefault(node, []).append(link)
        self._used[link] = time.monotonic()
        link.on_close(lambda: self._closed(node, link))

    def any_to(self, node: int) -> bool:
        """Whether a link to that node is open, be it one in doubt."""
        return node in self._links

    def to(self, node: int) -> Link | None:
        """A link to that node that can be used, or None."""
        for link in self._links.get(node, ()):
            if not link.closed and not self.doubted(link):
                self._used[link] = time.monotonic()
                return link
        return None

    def doubted(self, link: Link) -> bool:
        """Whether it gave no answer, and none since."""
        since = self._doubted.get(link)
        if since is not None and link.last_answer > since:
            del self._doubted[link]
            return False
        return since is not None

    def doubt(self, link: Link) -> None:
        """Something that should have come over this link did not: nothing new goes over it until it answers."""
        if link in self._used:
            self._doubted[link] = time.monotonic()

    async def ask(self, link: Link, method: str, params: Any, timeout_s: float) -> Any:
        """Calls over a link, and doubts it when nothing comes back."""
        asked = time.monotonic()
        quick = timeout_s <= QUICK_CALL_S
        if quick and link in self._used:
            self._asked.setdefault(link, []).append(asked)
        try:
            return await link.call(method, params, timeout_s)
        except Unreachable:
            if link.last_answer < asked and link in self._used:
                self._doubted[link] = time.monotonic()
            raise
        finally:
            if quick and (waiting := self._asked.get(link)) is not None:
                waiting.remove(asked)
                if not waiting:
                    del self._asked[link]
            if link in self._used:
                self._used[link] = time.monotonic()
                if self.doubted(link) and not link.in_use:
                    link.abort()

    def waiting_s(self, node: int, now: float) -> float | None:
        """For how long the links to that node have owed an answer; None while they owe none."""
        since = [
            max(self._asked[link][0], link.last_answer)
            for link in self._links.get(node, ())
            if self._asked.get(link)
        ]
        return now - min(since) if since else None

    def idle(self, now: float) -> list[tuple[int, Link]]:
        """Links that nobody used for IDLE_CLOSE_S, and those in doubt on which nothing is under way any more."""
        return [
            (node, link)
            for node, links in self._links.items()
            for link in links
            if not link.in_use
            and (self.doubted(link) or now - max(self._used[link], link.last_answer) > IDLE_CLOSE_S)
        ]

    def idlest(self) -> Link | None:
        """Of the links on which nothing is under way the one that was used longest ago."""
        return min((link for link in self._used if not link.in_use), key=self._used.__getitem__, default=None)

    def _closed(self, node: int, link: Link) -> None:
        links = self._links.get(node, [])
        with contextlib.suppress(ValueError):
            links.remove(link)
        if not links:
            self._links.pop(node, None)
        self._used.pop(link, None)
        self._doubted.pop(link, None)
