"""The console in a test: an app on a screen in memory, with a fake agent behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from textual.pilot import Pilot

from tests.tui.fakes import FakeClient, first_frame, send_done
from tui.app import QuarterdeckApp
from tui.options import ConsoleOptions

WIDE, NORMAL, TINY = (160, 45), (80, 24), (20, 5)
LIMIT_S = 20.0


def screen_text(app: QuarterdeckApp) -> str:
    """What stands on the screen."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


class Console:
    """An app with its client and its pilot; `until` waits for a condition on the screen."""

    def __init__(self, app: QuarterdeckApp, client: FakeClient, pilot: Pilot[Any]) -> None:
        self.app, self.client, self.pilot = app, client, pilot

    @property
    def text(self) -> str:
        return screen_text(self.app)

    def line(self, part: str) -> str:
        """The line of the screen with this in it."""
        return next((line for line in self.text.splitlines() if part in line), "")

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        """Waits until it holds; fails with the screen when it doesn't come."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LIMIT_S
        while not condition():
            assert loop.time() < end, f"never came: {what}\n{self.text}"
            await asyncio.sleep(0.02)

    async def shows(self, *parts: str) -> None:
        """Waits until all of these are on the screen."""
        for part in parts:
            await self.until(lambda part=part: part in self.text, part)

    async def hides(self, part: str) -> None:
        await self.until(lambda: part not in self.text, f"{part} to go")

    async def press(self, *keys: str) -> None:
        """Presses keys by their names; a word of several characters after `=` is typed."""
        for key in keys:
            if key.startswith("="):
                for character in key[1:]:
                    self.app.press("space" if character == " " else character, character)
            else:
                self.app.press(key, key if len(key) == 1 else " " if key == "space" else None)
        await asyncio.sleep(0)


@asynccontextmanager
async def console(
    *frames: dict[str, Any],
    size: tuple[int, int] = NORMAL,
    send: Any = send_done,
    clients: list[Any] | None = None,
    settle: bool = True,
    **options: Any,
) -> AsyncIterator[Console]:
    """A console attached to a fake agent that begins with `frames` (the plausible fleet by default).

    `clients`: what one attempt to connect after the other gives; an exception is raised.
    """
    client = FakeClient(*(frames or (first_frame(),)))
    answers = [client] if clients is None else list(clients)

    async def connect() -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    app = QuarterdeckApp(connect, send, ConsoleOptions(**options))
    async with app.run_test(size=size) as pilot:
        here = Console(app, client, pilot)
        if settle:
            await here.until(
                lambda: app.fleet.received is not None and app._paint_timer is None, "the first frame"
            )
        yield here
