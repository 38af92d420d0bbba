"""When may a daemon that crashed be started again? Later each time, and much later once it crashes in a loop.

The delay doubles from 0.5 s to 60 s. Five crashes within a minute are a crash loop: it is closed for 300 s and
the doubling starts anew. A run of a minute forgets what was before it, when it ends. A gate is never moved
nearer: whatever happens while it is closed, it stays closed at least as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.meshos.config import MeshOsConfig


@dataclass(slots=True)
class Backoff:
    """Of one daemon. `until_ms` is the loop time from which it may start; None: at once."""

    until_ms: int | None = None
    looping: bool = False
    delay_ms: int = 0
    """The latest delay; 0 when the next crash is a first one."""
    crashes: deque[int] = field(default_factory=deque)
    """Loop times of the crashes within the window, oldest first."""

    def ended(self, run_ms: int | None, config: MeshOsConfig) -> None:
        """A run ended after `run_ms` (None: nobody saw its beginning), however it ended."""
        if run_ms is not None and run_ms >= config.stable_run_ms:
            self.crashes.clear()
            self.delay_ms = 0

    def crashed(self, now_ms: int, config: MeshOsConfig) -> None:
        """Counts a crash and closes the gate."""
        crashes = self.crashes
        crashes.append(now_ms)
        while crashes[0] < now_ms - config.crash_window_ms or len(crashes) > config.crash_loop_crashes:
            crashes.popleft()
        if len(crashes) >= config.crash_loop_crashes:
            self.looping, self.delay_ms = True, 0
            self._close(now_ms + config.crash_loop_ms)
            return
        doubled = 2 * self.delay_ms or config.backoff_initial_ms
        self.delay_ms = min(doubled, config.backoff_max_ms)
        self._close(now_ms + self.delay_ms)

    def restore(
        self,
        until_ms: int | None,
        looping: bool,
        delay_ms: int,
        crashes_ms: Iterable[int],
        now_ms: int,
        config: MeshOsConfig,
    ) -> None:
        """Takes up what another process of this node knew. A clock that was set back makes no gate longer than it is
        from now on, and no crash a later one."""
        crashes = sorted([*self.crashes, *(min(at_ms, now_ms) for at_ms in crashes_ms)])
        self.crashes = deque(crashes[-config.crash_loop_crashes :])
        self.delay_ms = min(max(self.delay_ms, delay_ms), config.backoff_max_ms)
        if until_ms is not None and until_ms > now_ms:
            longest_ms = config.crash_loop_ms if looping else config.backoff_max_ms
            self.looping = self.looping or looping
            self._close(min(until_ms, now_ms + longest_ms))

    def _close(self, until_ms: int) -> None:
        self.until_ms = until_ms if self.until_ms is None else max(self.until_ms, until_ms)

    def elapse(self, now_ms: int) -> bool:
        """Opens the gate when its time has come; True when it was opened. `until_ms` itself is late enough."""
        if self.until_ms is None or now_ms < self.until_ms:
            return False
        self.until_ms, self.looping = None, False
        return True

    def admissible(self, now_ms: int) -> bool:
        """Whether a start is let through now."""
        return self.until_ms is None or now_ms >= self.until_ms
