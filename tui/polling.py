"""Asks the whole fleet for something while a view shows it: one question at a time, a second apart, never unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from discovery.errors import QuarterdeckError, Refused
from tui.model.asked import Asked
from tui.model.text import clean

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp
    from tui.screens.base import View

EVERY_S = 1.0
_EARLY_S = 0.1
"""A tick that comes this much early still asks."""


class Poll:
    """Keeps `book` up to date for `view`. `ask(client)` is the question, `fresh` is called after every answer.

    It is asked every `beats` times EVERY_S; `unknown` is said of an agent that does not know the question."""

    def __init__(
        self, deck: QuarterdeckApp, view: View, book: Asked[Any], ask: Callable[[Any], Awaitable[Any]],
        fresh: Callable[[], None], beats: int = 1, unknown: str = "",
    ) -> None:  # fmt: skip
        self._deck, self._view, self._book = deck, view, book
        self._ask, self._fresh = ask, fresh
        self._beats, self._unknown = beats, unknown
        self._asked_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._ignorant: Any = None
        """The client of an agent that doesn't know the question: asked again only when somebody wants it so."""

    def beat(self, now_please: bool = False) -> None:
        """Asks if it is time to, and the view is what is on the screen."""
        deck = self._deck
        client, now = deck.session.client, deck.now()
        if client is None or deck.view_shown() is not self._view:
            return
        if self._task is not None and not self._task.done():
            return
        if client is self._ignorant and not now_please:
            return
        if not now_please and now - self._asked_at < EVERY_S * self._beats - _EARLY_S:
            return
        self._asked_at = now
        self._task = asyncio.create_task(self._once(client))

    def stop(self) -> None:
        """Asks no more."""
        if self._task is not None:
            self._task.cancel()

    async def _once(self, client: Any) -> None:
        deck, book = self._deck, self._book
        self._ignorant = None
        try:
            book.fold(await self._ask(client), deck.now())
        except Refused as why:
            old = why.code == "unknown_method"
            self._ignorant = client if old else None
            book.failed(f"{deck.session.agent} {self._unknown}" if old else why.sentence)
        except QuarterdeckError as why:
            book.failed(str(why))
        except Exception as why:
            # A broken answer is told over the rows; they stay.
            book.failed(clean(f"{type(why).__name__}: {why}"))
        self._fresh()
