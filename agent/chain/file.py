"""The SQLite file below a chain: made private, in WAL mode, written in whole transactions, one fsync where asked.

Shared by a node's journal (`log`) and the feeds that it replicates (`feeds`). It belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from discovery.errors import LocalError

T = TypeVar("T")

CACHE = "PRAGMA cache_size=-512"
"""KiB of pages that a connection holds; what is read often is with the system anyway."""
CHECKPOINT_BYTES = 2 * 1024 * 1024


class ChainFile:
    """The file `path`; `what` names it to people. `db` is its connection once `connect` was called."""

    db: sqlite3.Connection

    def __init__(self, path: Path, what: str = "journal") -> None:
        self.path = path
        self.what = what
        self.sync = ""
        """How the last transaction was to reach the disk: FULL or NORMAL."""

    def create(self) -> None:
        """Makes the file, for its owner alone, unless it is there. LocalError when the place can't be used."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as why:
            raise LocalError(
                f"{self.what} {self.path}: {why.strerror}; check the disk and who owns it"
            ) from why

    def connect(self, *, any_thread: bool = False) -> sqlite3.Connection:
        """Opens it (again)."""
        self.db = sqlite3.connect(
            self.path, isolation_level=None, timeout=1.0, check_same_thread=not any_thread
        )
        with contextlib.suppress(sqlite3.Error):  # who reads first says what is wrong with it
            self.db.execute(CACHE)
        self.sync = ""
        return self.db

    def transact(self, work: Callable[[], T], *, durable: bool) -> T:
        """Does `work` in one transaction, on disk when this returns if `durable`. What it raises is raised again,
        and nothing has changed then."""
        mode = "FULL" if durable else "NORMAL"
        try:
            if mode != self.sync:
                self.db.execute(f"PRAGMA synchronous={mode}")
                self.sync = mode
            self.db.execute("BEGIN IMMEDIATE")
            result = work()
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise
        return result

    def checkpoint_due(self) -> bool:
        """Whether so much waits in the WAL that it should be moved into the file."""
        try:
            return Path(f"{self.path}-wal").stat().st_size >= CHECKPOINT_BYTES
        except OSError:
            return False

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self.db.close()
