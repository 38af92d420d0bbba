"""Asks for the loads of an earlier moment once somebody has come to rest there: never while a key is held, one question at
a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from discovery.errors import QuarterdeckError, Refused
from tui.model.loads import Loads, Question
from tui.model.text import clean

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

REST_S = 0.2
"""So long a moment has to be looked at before its loads are asked for."""


class Rewinding:
    """Keeps `book` filled for the moment that is looked at; `fresh` is called when an answer has come."""

    def __init__(self, deck: QuarterdeckApp, book: Loads, fresh: Callable[[], None]) -> None:
        self._deck, self._book, self._fresh = deck, book, fresh
        self._looked: tuple[float, str | None] | None = None
        self._task: asyncio.Task[None] | None = None

    def look(self, moment_ms: float | None, mesh: str | None) -> None:
        """That moment is on the screen."""
        self._looked = None if moment_ms is None else (moment_ms, mesh)
        if self._question() is not None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Asks no more."""
        if self._task is not None:
            self._task.cancel()

    def _question(self) -> Question | None:
        if self._looked is None or self._deck.session.client is None:
            return None
        return self._book.question(*self._looked, self._deck.wall_ms())

    async def _run(self) -> None:
        while self._question() is not None:
            looked = self._looked
            await asyncio.sleep(REST_S)
            client = self._deck.session.client
            if looked != self._looked or client is None or (question := self._question()) is None:
                continue
            await self._ask(client, question)
            self._fresh()

    async def _ask(self, client: Any, question: Question) -> None:
        now_ms = self._deck.wall_ms()
        self._book.asking(question, now_ms)
        try:
            self._book.fold(
                question, await client.past(question.from_ms, question.to_ms, round(now_ms), question.mesh)
            )
        except Refused as why:
            self._book.failed(question, why.sentence)
        except QuarterdeckError as why:
            self._book.failed(question, str(why))
        except Exception as why:
            self._book.failed(question, f"a broken answer: {clean(type(why).__name__)}")
