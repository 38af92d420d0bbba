"""What a daemon is told while it runs. Times are relative: past deadlines are 0, and no clock has to agree."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Control(msgspec.Struct, frozen=True, tag_field="control"):
    """What every control has."""


class Shutdown(Control, frozen=True, tag="shutdown"):
    """End within the grace period; after it the process is killed."""

    grace_period_ms: int


class DrainStart(Control, frozen=True, tag="drain_start"):
    """This node is being drained: finish or hand over what you have."""

    grace_period_ms: int


class DrainFinish(Control, frozen=True, tag="drain_finish"):
    """The drain is over, whether it came to its end or was lifted."""


class BackpressureOn(Control, frozen=True, tag="backpressure_on"):
    """More waits to be done than can be; `level` is 0 to 1."""

    level: float


class BackpressureOff(Control, frozen=True, tag="backpressure_off"):
    """What waited has gone out."""


DaemonControl: TypeAlias = Shutdown | DrainStart | DrainFinish | BackpressureOn | BackpressureOff


def shutdown_by(deadline_ms: int, now_ms: int) -> Shutdown:
    """The control for a stop that is due at a loop time."""
    return Shutdown(max(0, deadline_ms - now_ms))
