"""The console's table over 10,000 rows: what it takes until a change of all of them is on the screen, at 160×45."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.figures import Figure
from bench.fleet import Hangar

ROWS = 10_000
BAR_MS = 6.0
SIZE = (160, 45)
STATES = ("alive",) * 40 + ("degraded", "draining", "dead", "updating")


def rows(count: int) -> list[dict[str, Any]]:
    """Rows as an agent serves them, the same at every run."""
    dice = random.Random(7)
    kinds = ("gateway", "broker", "compute")
    return [
        {
            "id": f"{number:016x}",
            "name": f"alpha.{kinds[number % 3]}.{number:06x}",
            "mesh": "alpha",
            "kind": kinds[number % 3],
            "state": dice.choice(STATES),
            "since_ms": dice.randrange(10**8),
            "last_seen_ms": dice.randrange(5000),
            "cpu": dice.random(),
            "mem": dice.random(),
            "disk": dice.random(),
            "rtt_ms": dice.random() * 20,
            "addr": f"10.0.{number // 250}.{number % 250}:7946",
            "build": "3c9a1f20b7de",
            "fresh": True,
            "daemons": {"running": 0, "total": 0},
            "failures": 0,
            "history": [dice.randrange(1000) for _ in range(60)],
            "reason": "cpu over 95 % for 15 s",
        }
        for number in range(count)
    ]


def measure(hangar: Hangar) -> Iterator[Figure]:
    """Every figure counts to the end of the paint: the lines are rendered and handed to the terminal."""
    yield from asyncio.run(_measure(hangar.runs(15, 3), ROWS if hangar.runs(15, 3) == 15 else 1000))


async def _measure(runs: int, count: int) -> list[Figure]:
    from tui.app import QuarterdeckApp
    from tui.model.locator import parse
    from tui.screens.fleet import FleetView

    async def connect() -> Any:
        await asyncio.Event().wait()

    async def send(*_: Any) -> dict[str, Any]:
        return {}

    app = QuarterdeckApp(connect, send)
    figures = []
    async with app.run_test(size=SIZE) as pilot:
        documents = rows(count)
        fleet = {"full": True, "me": {}, "rows": documents, "events": [], "counters": {}}
        view = app.view_shown()
        assert isinstance(view, FleetView)

        def paint() -> None:
            compositor = app.screen._compositor
            compositor.update_widgets({view.grid})
            app._display(app.screen, compositor.render_update())

        async def timed(
            what: str,
            act: Callable[[int], None],
            bar: float | None = None,
            note: str = "",
            before: Callable[[int], None] = lambda run: None,
        ) -> None:
            samples = []
            for run in range(runs):
                before(run)
                await pilot.pause()
                began = time.perf_counter()
                act(run)
                paint()
                samples.append((time.perf_counter() - began) * 1000)
            figures.append(Figure(f"table of {count:,} rows, {what}", "ms", samples, bar, note=note))

        app.fleet.fold(fleet, app.now())
        # By name, so that the rows on screen are alive and have figures: trouble first would show the dead.
        view.set_locator(parse("sort:name"))
        await pilot.pause()

        def new_figures(run: int) -> None:
            for at, row in enumerate(app.fleet.rows.values()):
                row.data["cpu"] = (at * 31 + run * 97) % 1000 / 1000

        def one(run: int) -> None:
            row = documents[run] | {"cpu": run % 10 / 10}
            changed = app.fleet.fold({"full": False, "rows": [row]}, app.now())
            view.table.apply(changed.rows, changed.gone, app.now())
            view.grid.repaint()

        def fold(run: int) -> None:
            fresh = [row | {"cpu": (run * 97) % 1000 / 1000} for row in documents]
            changed = app.fleet.fold({"full": False, "rows": fresh}, app.now())
            view.table.apply(changed.rows, changed.gone, app.now())
            view.grid.repaint()

        orders = (parse("sort:-cpu"), parse("sort:name"))
        filters = (parse("broker cpu>50"), parse("state:alive"))
        await timed("full refresh", lambda run: view.grid.repaint(), BAR_MS, before=new_figures)
        await timed("one row changed", one)
        await timed("cursor down", lambda run: view.move("down"))
        await timed("page down", lambda run: view.move("page_down"))
        await timed("sorted anew", lambda run: view.set_locator(orders[run % 2]))
        await timed("filtered anew", lambda run: view.set_locator(filters[run % 2]))
        view.set_locator(parse(""))
        await timed("a frame with all rows folded", fold, note="an agent sends only what changed")
    return figures
