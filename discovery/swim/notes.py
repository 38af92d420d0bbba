"""Notes: soft state of others (a lease, a summary) that rides on the pool without the pool understanding it.

Whoever keeps a subject plugs in as `Keeper`: it judges what arrives, and what is news to it is passed on. A note
ages: its body never changes on the way, its age is told anew by each hop at the moment of sending.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from discovery import wire

AGE_MAX_MS = 2**32 - 1


class Keeper(Protocol):
    """Keeps the notes of one or more topics."""

    def heard(self, note: wire.Note, sender: int, now: float) -> bool:
        """Takes in a note that is `note.age_ms` old; True when it was news, to be passed on. Never raises."""

    def held(self, now: float) -> Iterable[wire.Note]:
        """What a push/pull should carry, with ages as of `now`."""


@dataclass(frozen=True, slots=True)
class Aging:
    """A note on its way out; `born` is when it was made, by this node's monotonic clock."""

    topic: int
    subject: str
    body: bytes
    born: float

    def __len__(self) -> int:
        """The most that it takes on the wire."""
        return len(self.body) + len(self.subject) + 16

    def at(self, now: float) -> bytes:
        age_ms = min(AGE_MAX_MS, max(0, round((now - self.born) * 1000)))
        return wire.encode(wire.Note(self.topic, self.subject, self.body, age_ms))
