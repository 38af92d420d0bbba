"""The directory of a node: one process at a time may have it. It holds what makes a node the same after a restart: its key
and its journal, and what an update hands to the process that takes its place."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import IO, Any

import msgspec

from agent.chain.store import Journal
from agent.config import Settings
from agent.home import Home, make_identity, read_identity, write_private
from discovery.errors import LocalError
from discovery.identity import default_name

SEATS = 100
"""Consoles without a name that one home may run in a mesh at once."""


class Place:
    """Opened and locked when it is made; LocalError when the node runs already or the directory can't be used."""

    def __init__(self, settings: Settings, home: Home) -> None:
        self._lock: IO[str]
        ran_before = self._take(settings, home)
        self._kept_events = self.path / "events.json"
        identity_file = self.path / "identity_ed25519"
        fresh = not identity_file.exists()
        self.identity = (
            make_identity(identity_file, f"node of {settings.mesh}")
            if fresh
            else read_identity(identity_file, "node key")
        )
        self.name = settings.name or default_name(settings.mesh, settings.kind, self.identity.id)
        for entry in home.running():
            if entry.mesh == settings.mesh and entry.name == self.name and entry.pid != os.getpid():
                raise LocalError(f"node {self.name}: already runs as process {entry.pid}; give it a --name")
        self.journal = Journal(self.path / "journal.db", self.identity, wrote_before=ran_before and not fresh)

    def _take(self, settings: Settings, home: Home) -> bool:
        """Locks the directory for this process; a console without a name takes the first free one. Whether a node
        ran here before."""
        base = settings.name or settings.kind
        seats = [base]
        if settings.kind == "console" and settings.name is None:
            seats += [f"{base}-{k}" for k in range(2, SEATS)]
        for seat in seats:
            path = home.node_dir(settings.mesh, seat)
            try:
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                ran_before = (path / "lock").exists()
                lock = (path / "lock").open("a")
            except OSError as why:
                raise LocalError(
                    f"state {path}: {why.strerror}; make it a directory that you can write to"
                ) from why
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                continue
            self.path, self._lock = path, lock
            return ran_before
        raise LocalError(f"node {base} of mesh {settings.mesh}: already runs; give it a --name")

    def keep_events(self, events: list[dict[str, Any]]) -> None:
        """Keeps the event stream over an update, as far as the disk has room."""
        with contextlib.suppress(OSError):
            write_private(self._kept_events, msgspec.json.encode(events, enc_hook=str))

    def kept_events(self) -> list[dict[str, Any]]:
        """What the process before this one kept, oldest first, once; nothing when this start is no update."""
        events: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            if self.journal.handover() is not None:
                events = msgspec.json.decode(self._kept_events.read_bytes(), type=list[dict[str, Any]])
            self._kept_events.unlink()
        return events
