"""The console's attachment to an agent: join, follow, lose, try again. It never ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from discovery.errors import QuarterdeckError, Unreachable
from tui.model.text import clean

RETRY_FIRST_S = 1.0
RETRY_MAX_S = 10.0
SILENT_AFTER_S = 3.0
"""An agent sends at least one frame a second; from here on its silence is told."""
GIVE_UP_AFTER_S = 10.0
"""From here on the line is taken for dead and made anew."""

Phase = Literal["joining", "waiting", "live", "lost"]

Connect = Callable[[], Awaitable[Any]]
SendOp = Callable[[Any, str, str, dict[str, Any], Callable[[str], None]], Awaitable[dict[str, Any]]]
"""(client, verb, target id, args, on_stage) → the result of INTERFACE's control ops."""


class Session:
    """Keeps one client attached. `on_frame` gets every frame, `on_phase` every change of `phase`."""

    def __init__(
        self,
        connect: Connect,
        mesh: str | None,
        clock: Callable[[], float],
        on_frame: Callable[[Mapping[str, Any]], None],
        on_phase: Callable[[], None],
    ) -> None:
        self._connect = connect
        self._mesh = mesh
        self._clock = clock
        self._on_frame = on_frame
        self._on_phase = on_phase
        self._hurry = asyncio.Event()
        self.phase: Phase = "joining"
        self.client: Any = None
        self.hello: dict[str, Any] = {}
        """Of the last agent, also while it is lost."""
        self.reason = ""
        self.tries = 0
        self.started = clock()
        self.next_try: float | None = None

    @property
    def agent(self) -> str:
        """The name of the agent that is, or was, attached."""
        return clean(self.hello.get("name")) or "the agent"

    def hurry(self) -> None:
        """Tries again now."""
        self._hurry.set()

    async def run(self) -> None:
        """Attaches for ever."""
        delay = RETRY_FIRST_S
        while True:
            self._enter("lost" if self.tries else "joining", None)
            self.tries += 1
            was_live = await self._once()
            if was_live:
                delay = RETRY_FIRST_S
                self.tries = 1
            self._enter("lost", self._clock() + delay)
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), delay)
            delay = min(RETRY_MAX_S, delay * 2)

    async def close(self) -> None:
        """Lets go of the agent."""
        client, self.client = self.client, None
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), 1.0)

    def _enter(self, phase: Phase, next_try: float | None) -> None:
        self.phase, self.next_try = phase, next_try
        self._on_phase()

    async def _once(self) -> bool:
        """One attachment from dialling to its end; whether it ever told anything. `reason` says how it ended."""
        live = False
        try:
            self.client = await self._connect()
            self.hello = dict(getattr(self.client, "hello", None) or {})
            self._enter("waiting", None)
            frames = self.client.watch(self._mesh).__aiter__()
            try:
                while True:
                    async with asyncio.timeout(GIVE_UP_AFTER_S):
                        frame = await anext(frames)
                    if not live:
                        live = True
                        self._enter("live", None)
                    self._on_frame(frame)
                    # A stream that always has the next frame ready would keep the screen from ever being drawn.
                    await asyncio.sleep(0)
            finally:
                if hasattr(frames, "aclose"):
                    with contextlib.suppress(Exception):
                        await frames.aclose()
        except StopAsyncIteration:
            self.reason = f"{self.agent} ended the stream"
        except TimeoutError:
            self.reason = f"no word from {self.agent} for {GIVE_UP_AFTER_S:.0f} s"
        except (Unreachable, ConnectionError) as why:
            self.reason = clean(str(why)) or "connection lost"
        except QuarterdeckError as why:
            self.reason = clean(str(why))
        except Exception as why:
            # The screen outlives whatever goes wrong below it; the banner says what it was.
            self.reason = clean(f"{type(why).__name__}: {why}".splitlines()[0])
        await self.close()
        return live
