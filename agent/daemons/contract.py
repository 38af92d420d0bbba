"""The daemon contract: what a class has to have to be one, inside an agent or as a program of its own."""

from __future__ import annotations

from typing import Any, TypeAlias

from agent.meshos.controls import DaemonControl
from agent.meshos.events import DaemonHealth

Health: TypeAlias = DaemonHealth | tuple[DaemonHealth, str]
HEALTHY = DaemonHealth.HEALTHY
SNAPSHOT_MAX_BYTES = 16 << 20


def degraded(reason: str) -> Health:
    """It works, but not as it should."""
    return DaemonHealth.DEGRADED, reason


def unhealthy(reason: str = "") -> Health:
    """It does not work."""
    return DaemonHealth.UNHEALTHY, reason


class MeshDaemon:
    """A daemon in Python. `process` is its life; the rest says how it is and keeps what it knows between lives.

    This is all there is: a daemon places nothing, sees no admin event and commands no mesh."""

    name: str = ""

    def requirements(self) -> dict[str, Any]:
        """What it needs of a node, as `resources` in a spec: `{"cpu": 0.5, "memory": "512M"}`, each optional. A class
        inside the agent is asked before it begins, if its spec says nothing; of a program only the spec counts."""
        return {}

    async def process(self) -> None:
        """Runs until it is done or told to end. Returning is a clean exit, raising is a crash."""
        raise NotImplementedError

    def snapshot(self) -> bytes:
        """What shall be known when it runs again; at most 16 MiB. Asked for every 30 s and at a clean end, not after
        a crash: what led to it may be in there."""
        return b""

    def restore(self, state: bytes) -> None:
        """Takes what `snapshot` gave last in an earlier life, before `process` begins."""

    def health(self) -> Health:
        """How it is now; asked about twice a second, so it answers at once."""
        return HEALTHY

    def saturation(self) -> float | None:
        """How full it is, 0 to 1; None: it can't tell."""
        return None

    def on_control(self, control: DaemonControl) -> None:
        """Hears what the node is up to. Whoever overrides this sees to it that `process` returns after a
        Shutdown; without that, it is cancelled at once."""


def condition_of(said: Any) -> tuple[DaemonHealth, str]:
    """What `health()` returned, as a pair. ValueError when it is no health."""
    if isinstance(said, tuple):
        return DaemonHealth(said[0]), str(said[1]) if len(said) > 1 else ""
    return DaemonHealth(said), ""


def listens(daemon: object) -> bool:
    """Whether it does something of its own about controls."""
    own = getattr(type(daemon), "on_control", None)
    return own is not None and own is not MeshDaemon.on_control
