"""A view followed as a console follows it, and kept with its times: what was shown when, and whether it ever went blank."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.home import Home
from tests.fleet.harness import Agent, Fleet, wait_for
from tui.client import attach_entry


class View:
    """Follows one agent's `watch` in a thread of its own. `rows` and `meshes` are the newest, `states` the story."""

    def __init__(self, fleet: Fleet, agent: Agent) -> None:
        self.agent = agent
        self.rows: dict[str, dict[str, Any]] = {}
        self.meshes: dict[str, dict[str, Any]] = {}
        self.publishers: list[tuple[float, str, str | None]] = []
        """(monotonic time, mesh, publisher's name) whenever it changed."""
        self.blanks: list[tuple[float, str]] = []
        """When a mesh that had been seen was no longer listed, or was shown expired."""
        self.gone_at: dict[str, float] = {}
        self.problem: str | None = None
        self._names: dict[str, str] = {}
        self._entry = fleet.entry(agent)
        self._home = Home.open(fleet.home)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> View:
        self._thread.start()
        wait_for(lambda: self.rows, f"a first frame of {self.agent.name}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._follow())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)

    async def _follow(self) -> None:
        try:
            async with await attach_entry(self._home, self._entry) as client:
                async for frame in client.watch(None, events=0):
                    self._fold(frame, time.monotonic())
        except Exception as why:
            self.problem = f"{type(why).__name__}: {why}"

    def _fold(self, frame: dict[str, Any], now: float) -> None:
        for row in frame["rows"]:
            self._names[row["id"]] = row["name"]
            self.rows[row["name"]] = row
            self.gone_at.pop(row["name"], None)
        for node in frame["gone"]:
            name = self._names.get(node, node)
            self.rows.pop(name, None)
            self.gone_at[name] = now
        if "meshes" in frame:
            found = {row["mesh"]: row for row in frame["meshes"]}
            for mesh in self.meshes.keys() - found.keys():
                self.blanks.append((now, mesh))
            for mesh, row in found.items():
                if row["expired"] and not self.meshes.get(mesh, {}).get("expired"):
                    self.blanks.append((now, mesh))
                publisher = row["publisher"]["name"]
                if self.publisher(mesh) != publisher:
                    self.publishers.append((now, mesh, publisher))
            self.meshes = found

    def publisher(self, mesh: str) -> str | None:
        """Who publishes the mesh, as shown last."""
        return (self.meshes.get(mesh) or {}).get("publisher", {}).get("name")

    def nodes(self) -> set[tuple[str, str]]:
        """(mesh, name) of everything shown as there."""
        return {(r["mesh"], n) for n, r in list(self.rows.items()) if r["state"] not in ("dead", "leaving")}

    def wait(self, condition: Callable[[View], Any], what: str, timeout_s: float = 20.0) -> float:
        """Waits until the condition holds here; the monotonic time at which it was seen to."""
        wait_for(
            lambda: condition(self), f"{self.agent.name}: {what}; {self.problem or ''}", timeout_s, 0.005
        )
        return time.monotonic()
