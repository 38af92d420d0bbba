"""How well a daemon is, of two mouths: what it says itself, and what its health check finds. The worse one counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.meshos.events import DaemonHealth, DaemonLifecycle

Condition = tuple[DaemonHealth, str]
"""Health, and the reason or ""."""
WELL: Condition = (DaemonHealth.HEALTHY, "")
TOLD_EVERY_S = 0.2
"""Changes that come faster are told together."""
SATURATION_STEP = 0.01
"""A smaller change of the saturation is not told."""
_RANK = {DaemonHealth.HEALTHY: 0, DaemonHealth.DEGRADED: 1, DaemonHealth.UNHEALTHY: 2}


def worse(one: Condition, other: Condition) -> Condition:
    """The worse of two; when both are as bad, both reasons."""
    if _RANK[one[0]] != _RANK[other[0]]:
        return max(one, other, key=lambda c: _RANK[c[0]])
    reasons = dict.fromkeys(filter(None, (one[1], other[1])))
    return one[0], "; ".join(reasons)


class Voice:
    """Tells changes of one daemon's health and saturation, at most every 0.2 s."""

    def __init__(self, name: str, tell: Callable[[DaemonLifecycle], None], said: Condition = WELL) -> None:
        self.said = said
        self.checked = WELL
        self.saturation: float | None = None
        self._name = name
        self._tell = tell
        self._told: Condition = WELL
        self._told_saturation: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._muted = True

    @property
    def condition(self) -> Condition:
        return worse(self.said, self.checked)

    def unmute(self) -> None:
        """It runs: from now on changes are told, those that it brought along at once."""
        self._muted = False
        self.changed()

    def changed(self) -> None:
        """Something may be new; it is told now, or within 0.2 s."""
        if self._muted or self._timer is not None or not self._news():
            return
        self._say()
        self._timer = asyncio.get_running_loop().call_later(TOLD_EVERY_S, self._again)

    def close(self) -> None:
        """It ended: nothing more is told."""
        self._muted = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = None
        self.changed()

    def _news(self) -> bool:
        return self.condition != self._told or self._saturation_moved()

    def _saturation_moved(self) -> bool:
        if self.saturation is None or self._told_saturation is None:
            return self.saturation is not self._told_saturation
        moved = abs(self.saturation - self._told_saturation)
        return moved >= SATURATION_STEP or (moved > 0 and self.saturation in (0.0, 1.0))

    def _say(self) -> None:
        if (condition := self.condition) != self._told:
            self._told = condition
            self._tell(DaemonLifecycle(self._name, "health", *condition))
        if self._saturation_moved():
            self._told_saturation = self.saturation
            self._tell(DaemonLifecycle(self._name, "saturation", saturation=self.saturation))
