"""Follows any number of logs side by side while Logs is on the screen; a broken one is taken up again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from discovery.errors import QuarterdeckError
from tui.model.logs import BACKLOG, LogBook, Source
from tui.model.text import clean

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

AGAIN_S = 2.0
"""After so long a stream that ended is asked for again."""


class Tails:
    """One stream a source into one book. `fresh` is called when lines came, or a stream began or ended."""

    def __init__(self, deck: QuarterdeckApp, book: LogBook, fresh: Callable[[], None]) -> None:
        self._deck, self._book, self._fresh = deck, book, fresh
        self.sources: list[Source] = []
        self.trouble: dict[str, str] = {}
        """Key of a source → why it is not followed now."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: dict[str, float] = {}

    def want(self, sources: list[Source]) -> None:
        """Follows these and no others; lines of the others are let go."""
        keys = {source.key for source in sources}
        for key in set(self._tasks) - keys:
            self._tasks.pop(key).cancel()
        if keys != {source.key for source in self.sources}:
            self._book.only(keys)
        self.sources = list(sources)
        self.trouble = {key: why for key, why in self.trouble.items() if key in keys}

    def beat(self) -> None:
        """Begins what is not followed yet, where an agent is attached."""
        client, now = self._deck.session.client, self._deck.now()
        for source in self.sources:
            task = self._tasks.get(source.key)
            if task is not None and not task.done():
                continue
            if client is None or now - self._ended.get(source.key, float("-inf")) < AGAIN_S:
                continue
            self._book.begin(source)
            self._tasks[source.key] = asyncio.create_task(self._follow(client, source))

    def stop(self) -> None:
        """Follows nothing until the next beat; what was told stays."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks, self._ended = {}, {}

    async def _follow(self, client: Any, source: Source) -> None:
        """One stream to its end; whatever ends it is told, and never raised."""
        why = "it has ended"
        try:
            stream = (
                client.daemon_log(source.node_id, source.daemon, BACKLOG, True)
                if source.daemon
                else client.follow(BACKLOG, source.node_id)
            )
            async with contextlib.aclosing(stream):
                async for item in stream:
                    self.trouble.pop(source.key, None)
                    if self._book.add(source, item):
                        self._fresh()
                    # A stream that always has the next line ready would keep the screen from ever being drawn.
                    await asyncio.sleep(0)
        except QuarterdeckError as error:
            why = clean(str(error))
        except Exception as error:
            why = clean(f"{type(error).__name__}: {error}")
        self.trouble[source.key] = why
        self._ended[source.key] = self._deck.now()
        self._fresh()
