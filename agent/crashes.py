"""Which daemons of a node had crashed, kept over the end of its process: a new one starts none of them earlier.

Times are those of the loop, which every process of a host shares until it is booted anew. After a boot they are carried
over by the wall clock, and the fold lets no gate be longer than it would be from now on.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from agent.chain.store import CRASHES, Journal
from agent.daemons.process import boot_id
from agent.events import wall_ms
from agent.meshos.daemons import crashed
from agent.meshos.events import BackoffRestored
from agent.meshos.state import MeshOsState

REASON_CHARS = 256


class _Kept(msgspec.Struct, frozen=True):
    """`offset_ms`: Unix time less loop time, when it was written."""

    boot: str
    offset_ms: int
    daemons: list[BackoffRestored]


class Crashes:
    """Keeps in the journal what the engine knows of crashes. `now_ms`: the loop's time."""

    def __init__(self, journal: Journal, now_ms: Callable[[], int], boot: str | None = None) -> None:
        self._journal = journal
        self._now_ms = now_ms
        self._boot = boot or boot_id()
        self._last: list[BackoffRestored] | None = None

    def kept(self) -> list[BackoffRestored]:
        """What the last process left, in loop times of this one."""
        try:
            kept = msgspec.convert(self._journal.get(CRASHES), _Kept)
        except msgspec.ValidationError:
            return []
        shift_ms = 0
        if kept.boot != self._boot:
            shift_ms = self._now_ms() - wall_ms() + kept.offset_ms
        return [_shifted(daemon, shift_ms) for daemon in kept.daemons]

    def keep(self, state: MeshOsState) -> None:
        """Writes it where it changed. In the file when this returns, so that it survives a kill, but not flushed to the
        disk: what a power failure could lose it ends as well."""
        daemons = [
            msgspec.structs.replace(daemon, reason=daemon.reason[:REASON_CHARS]) for daemon in crashed(state)
        ]
        if daemons == self._last:
            return
        self._last = daemons
        kept = _Kept(self._boot, wall_ms() - self._now_ms(), daemons)
        self._journal.set(CRASHES, msgspec.to_builtins(kept) if daemons else None)
        self._journal.flush()


def _shifted(daemon: BackoffRestored, by_ms: int) -> BackoffRestored:
    return msgspec.structs.replace(
        daemon,
        until_ms=None if daemon.until_ms is None else daemon.until_ms + by_ms,
        crashes_ms=tuple(at_ms + by_ms for at_ms in daemon.crashes_ms),
        since_ms=daemon.since_ms + by_ms,
    )
