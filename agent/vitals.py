"""Load of this host, sampled every 5 seconds: CPU, memory and the disk under the home; no process table.

The first sample comes within half a second, so that a node has figures before anybody looks; what can't be
measured is None, never a guess.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from discovery.member import Vitals

SAMPLE_INTERVAL_S = 5.0
FIRST_SAMPLE_S = 0.4
DISK_INTERVAL_S = 30.0
DISK_TIMEOUT_S = 0.1
CPU_FIRST_MIN_S = 0.05
"""A CPU reading over less time than this says nothing."""


def permille(percent: float) -> int:
    """0 to 1000 of a percentage, clamped."""
    return min(1000, max(0, round(percent * 10)))


class VitalsSampler:
    """Gives each sample to `deliver`, from `start()` to `close()`. `latest` is all None before the first."""

    def __init__(
        self, deliver: Callable[[Vitals], None], disk_of: Path, interval_s: float = SAMPLE_INTERVAL_S
    ) -> None:
        self._deliver = deliver
        self._disk_of = disk_of
        self._interval_s = interval_s
        self._disk: int | None = None
        self._disk_at = -DISK_INTERVAL_S
        self._disk_reading: asyncio.Future[int | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.latest = Vitals()
        self.failed = 0
        """Samples that could not be delivered: `deliver` raised."""

    def start(self) -> None:
        """Begins to sample in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="vitals")

    async def close(self) -> None:
        """Ends sampling; a disk that does not answer is not waited for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        _cpu_permille()
        self._begin_disk()
        await asyncio.sleep(max(CPU_FIRST_MIN_S, min(FIRST_SAMPLE_S, self._interval_s)))
        while True:
            await self._look_at_disk()
            self.latest = Vitals(cpu=_cpu_permille(), mem=_memory_permille(), disk=self._disk)
            try:
                self._deliver(self.latest)
            except Exception:
                self.failed += 1
            await asyncio.sleep(self._interval_s)

    def _begin_disk(self) -> None:
        """In a daemon thread, because a dead network mount never answers, not even at exit; one at a time."""
        now = time.monotonic()
        if self._disk_reading is None and now - self._disk_at >= DISK_INTERVAL_S:
            self._disk_at = now
            loop = asyncio.get_running_loop()
            self._disk_reading = loop.create_future()
            reading = (loop, self._disk_reading, self._disk_of)
            threading.Thread(target=_read_disk, args=reading, name="disk", daemon=True).start()

    async def _look_at_disk(self) -> None:
        self._begin_disk()
        if self._disk_reading is None:
            return
        done, _ = await asyncio.wait({self._disk_reading}, timeout=DISK_TIMEOUT_S)
        self._disk = self._disk_reading.result() if done else None
        if done:
            self._disk_reading = None


def _read_disk(loop: asyncio.AbstractEventLoop, reading: asyncio.Future[int | None], path: Path) -> None:
    found = _disk_permille(path)

    def tell() -> None:
        if not reading.done():
            reading.set_result(found)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(tell)


def _cpu_permille() -> int | None:
    try:
        return permille(psutil.cpu_percent(None))
    except (psutil.Error, OSError, RuntimeError):
        return None


def _memory_permille() -> int | None:
    try:
        return permille(psutil.virtual_memory().percent)
    except (psutil.Error, OSError, RuntimeError):
        return None


def _disk_permille(path: Path) -> int | None:
    """Used share of the file system that holds `path`, or its nearest parent that exists."""
    while True:
        try:
            disk = os.statvfs(path)
        except FileNotFoundError:
            if path == path.parent:
                return None
            path = path.parent
        except OSError:
            return None
        else:
            used = disk.f_blocks - disk.f_bfree
            return round(1000 * used / (used + disk.f_bavail)) if used + disk.f_bavail else None
