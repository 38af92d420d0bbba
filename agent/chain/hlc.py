"""The hybrid logical clock that orders what many nodes commit: wall milliseconds, then a counter.

A stamp follows everything that its node knew when it was made, and stays within 30 s of that node's own wall
clock: a stamp further ahead, from whoever, moves no clock. Pure: the wall clock is an argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from discovery.errors import RemoteError

FUTURE_MAX_MS = 30_000
NUMBER_MAX = 2**53


class Stamp(NamedTuple):
    """A moment as one node names it."""

    wall_ms: int
    counter: int


class Position(NamedTuple):
    """A record's place in the one order that all nodes share. `number` is the record's in its writer's feed: it
    decides only where a clock was set back and a node made the same stamp twice."""

    wall_ms: int
    counter: int
    node: int
    number: int

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.wall_ms, self.counter)


ORIGIN = Stamp(0, 0)
BEGINNING = Position(0, 0, 0, 0)
"""Before every record."""


def ahead(wall_ms: int, now_ms: int) -> bool:
    """Whether that is further in the future than clocks of one mesh may be apart."""
    return wall_ms > now_ms + FUTURE_MAX_MS


def following(last: Stamp, now_ms: int) -> Stamp:
    """The stamp of what is committed now. `last` counts only as far as it is not too far ahead: a clock that was
    set back by more than that begins anew."""
    if now_ms > last.wall_ms or ahead(last.wall_ms, now_ms):
        return Stamp(now_ms, 0)
    return Stamp(last.wall_ms, last.counter + 1)


def heard(last: Stamp, seen: Stamp, now_ms: int) -> Stamp:
    """The newest stamp known after another node's was seen."""
    return last if ahead(seen.wall_ms, now_ms) else max(last, seen)


def stamp_of(value: Any) -> Stamp:
    """The stamp in a record's body, `[wall_ms, counter]`; RemoteError when that is none."""
    match value:
        case [int(wall_ms), int(counter)] if 0 <= wall_ms < NUMBER_MAX and 0 <= counter < NUMBER_MAX:
            return Stamp(wall_ms, counter)
    raise RemoteError("no stamp of the hybrid clock")


class Clock:
    """The clock of one node. It forgets nothing while the process runs; a new one `hears` its node's own chain."""

    def __init__(self, last: Stamp = ORIGIN) -> None:
        self.last = last

    def issue(self, now_ms: int) -> Stamp:
        """A stamp later than every one issued or heard."""
        self.last = following(self.last, now_ms)
        return self.last

    def hear(self, seen: Stamp, now_ms: int) -> None:
        self.last = heard(self.last, seen, now_ms)
