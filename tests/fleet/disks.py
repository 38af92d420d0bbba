"""What nodes have on their disks, read behind their backs: journals, versions of records, artifacts held whole."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections import Counter
from pathlib import Path

from agent.chain.record import Dispatched, Record, decode
from tests.fleet.harness import Agent, Fleet

LATE_MS = 600
"""An action is recorded when its dispatch has ended, that long after it began at most."""


def place_of(fleet: Fleet, agent: Agent) -> Path:
    return fleet.home / "state" / agent.mesh / agent.name


def records(fleet: Fleet, agent: Agent) -> list[Record]:
    """The journal of a node, whether it runs or not, oldest first."""
    path = place_of(fleet, agent) / "journal.db"
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return [decode(blob) for (blob,) in db.execute("SELECT blob FROM records ORDER BY id")]


def acted(fleet: Fleet, agent: Agent, kind: str) -> list[int]:
    """When actions of that kind were done, by the node's own record (Unix milliseconds)."""
    return [
        r.emitted_at_ms
        for r in records(fleet, agent)
        if r.kind == f"action.{kind}" and isinstance(r.disposition, Dispatched)
    ]


def kept(times_ms: list[int], number: int, window_ms: int) -> bool:
    """Whether never more than `number` went out in a window, as far as that can be told from the records."""
    times = sorted(times_ms)
    return all(
        times[j] - times[i] >= (j - i) // number * window_ms - LATE_MS
        for i in range(len(times))
        for j in range(i + number, len(times))
    )


class Holdings:
    """Looks at the disks of nodes again and again (a thread of its own): which artifacts each holds whole.

    The disks are not looked at in one moment, so what moves meanwhile may be missed in a look: an artifact counts as held
    by whoever held it in this look or in the one before. A file is at its name only when all of it was verified."""

    def __init__(self, fleet: Fleet, agents: list[Agent]) -> None:
        self._places = {agent.name: place_of(fleet, agent) / "artifacts" for agent in agents}
        self._hashes: dict[Path, str] = {}
        self._last: set[tuple[str, str]] = set()
        self.fewest: dict[str, int] = {}
        self.looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def of(self, node: str) -> set[str]:
        """Names that a node holds now."""
        found = set()
        for path in list((self._places[node] / "names").glob("*.json")):
            with contextlib.suppress(OSError):
                if path not in self._hashes:
                    self._hashes[path] = json.loads(path.read_bytes())["hash"]
                if (self._places[node] / "blobs" / self._hashes[path]).exists():
                    found.add(path.stem)
        return found

    def _run(self) -> None:
        while not self._ended.wait(0.01):
            now = {(node, name) for node in self._places for name in self.of(node)}
            for name, count in Counter(name for _, name in now | self._last).items():
                self.fewest[name] = min(count, self.fewest.get(name, count))
            for name in self.fewest.keys() - {name for _, name in now | self._last}:
                self.fewest[name] = 0
            self._last = now
            self.looks += 1

    def end(self) -> dict[str, int]:
        """By how few each artifact was held at the worst look."""
        self._ended.set()
        self._thread.join()
        return self.fewest


def versions(fleet: Fleet, agent: Agent, name: str) -> list[int]:
    """The version bytes of the records in a file of a node, in order."""
    path = place_of(fleet, agent) / name
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return [blob[0] for (blob,) in db.execute("SELECT blob FROM records ORDER BY id")]
