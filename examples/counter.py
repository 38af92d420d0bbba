"""A daemon in Python: counts seconds over all of its lives, slower under backpressure, and ends when it is told."""

from __future__ import annotations

import asyncio
import sys

from agent.daemons.sdk import (
    HEALTHY,
    BackpressureOff,
    BackpressureOn,
    DaemonControl,
    Health,
    MeshDaemon,
    Shutdown,
    daemon_main,
    degraded,
)


class Counter(MeshDaemon):
    name = "counter"

    def __init__(self) -> None:
        self.seconds = 0
        self.slowed = 0.0
        self.ended = asyncio.Event()

    async def process(self) -> None:
        print(f"counting on from {self.seconds}", flush=True)
        while not self.ended.is_set():
            self.seconds += 1
            try:
                await asyncio.wait_for(self.ended.wait(), 1 + 4 * self.slowed)
            except TimeoutError:
                pass
        print(f"stopped at {self.seconds}", flush=True)

    def snapshot(self) -> bytes:
        return str(self.seconds).encode()

    def restore(self, state: bytes) -> None:
        self.seconds = int(state)

    def health(self) -> Health:
        return degraded("slowed by backpressure") if self.slowed else HEALTHY

    def saturation(self) -> float:
        return self.slowed

    def on_control(self, control: DaemonControl) -> None:
        match control:
            case Shutdown():
                self.ended.set()
            case BackpressureOn(level):
                self.slowed = level
            case BackpressureOff():
                self.slowed = 0.0


if __name__ == "__main__":
    sys.exit(daemon_main(Counter()))
