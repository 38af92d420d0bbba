"""How controls reach a program: by the hooks of its spec, and as datagrams to the socket that the SDK binds.

The socket is the daemon's: it binds the abstract name that it finds in QD_CONTROL_SOCKET, and the agent sends
there, one JSON object a datagram. No connection is held, so an agent that took another's place goes on at once,
and a daemon that binds again is reached again. A program that binds nothing is told nothing this way. The daemon
sends nothing on it: there is nothing that it could ask for.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from agent.daemons.launching import run_command, signal_by
from agent.daemons.notify import abstract
from agent.executor import DispatchError
from agent.meshos.controls import BackpressureOff, BackpressureOn, DaemonControl, DrainFinish, DrainStart
from agent.spec.model import ControlHooks, DaemonSpec, Hook

HOOK_TIMEOUT_S = 30.0
WAITING_MAX = 16
"""Controls that wait for a hook to end, or for room in the daemon's socket; beyond it the oldest are given up."""
AGAIN_S = 0.1
AGAIN_MAX = 50


def hook_for(hooks: ControlHooks, control: DaemonControl) -> Hook | None:
    match control:
        case DrainStart():
            return hooks.drain_start
        case DrainFinish():
            return hooks.drain_finish
        case BackpressureOn():
            return hooks.backpressure_on
        case BackpressureOff():
            return hooks.backpressure_off
    return None


class Courier:
    """Brings controls to one program, in order. `send_signal` reaches its main process."""

    def __init__(
        self,
        spec: DaemonSpec,
        env: Mapping[str, str],
        address: str,
        *,
        pid: Callable[[], int],
        send_signal: Callable[[signal.Signals], bool],
        trouble: Callable[[str], None],
    ) -> None:
        self.lost = 0
        self._spec = spec
        self._env = env
        self._address = abstract(address)
        self._pid = pid
        self._send_signal = send_signal
        self._trouble = trouble
        self._hooks: deque[DaemonControl] = deque()
        self._letters: deque[bytes] = deque()
        self._running: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._tries = 0

    def bring(self, control: DaemonControl) -> None:
        """Sends it on its way; never waits."""
        self._letters.append(msgspec.json.encode(control))
        self.lost += _bounded(self._letters)
        if self._again is None:
            self._post()
        if hook_for(self._spec.control, control) is not None:
            self._hooks.append(control)
            self.lost += _bounded(self._hooks)
            if self._running is None:
                self._running = asyncio.get_running_loop().create_task(self._run_hooks())

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._running is not None:
            self._running.cancel()

    def _post(self) -> None:
        """Sends what waits. A full socket is tried again for 5 s; one that nobody bound takes nothing."""
        self._again = None
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            while self._letters:
                try:
                    sock.sendto(self._letters[0], socket.MSG_DONTWAIT, self._address)
                except BlockingIOError:
                    self._tries += 1
                    if self._tries <= AGAIN_MAX:
                        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._post)
                        return
                    self.lost += len(self._letters)
                    self._letters.clear()
                    self._trouble("controls not taken: the daemon doesn't read its control socket")
                except OSError:
                    self._letters.clear()
                else:
                    self._letters.popleft()
                self._tries = 0

    async def _run_hooks(self) -> None:
        try:
            while self._hooks:
                control = self._hooks.popleft()
                hook = hook_for(self._spec.control, control)
                try:
                    await self._run_hook(control, hook)
                except (DispatchError, OSError) as why:
                    self._trouble(f"{type(control).__name__} hook: {why}")
        finally:
            self._running = None

    async def _run_hook(self, control: DaemonControl, hook: Hook | None) -> None:
        if hook is None:
            return
        if isinstance(hook, str):
            self._send_signal(signal_by(hook))
            return
        env = commands_env(self._env, self._pid())
        if isinstance(control, DrainStart):
            env["QD_GRACE_MS"] = str(control.grace_period_ms)
        elif isinstance(control, BackpressureOn):
            env["QD_LEVEL"] = f"{control.level:g}"
        end, said = await run_command(hook, env, self._spec, HOOK_TIMEOUT_S)
        if end is None:
            self._trouble(f"{type(control).__name__} hook: not done within {HOOK_TIMEOUT_S:g} s, killed")
        elif end.status != 0:
            self._trouble(f"{type(control).__name__} hook: {end.words()}" + (f": {said}" if said else ""))


def _bounded(waiting: deque[DaemonControl] | deque[bytes]) -> int:
    """Drops the oldest beyond the limit; how many."""
    dropped = max(0, len(waiting) - WAITING_MAX)
    for _ in range(dropped):
        waiting.popleft()
    return dropped


def commands_env(env: Mapping[str, str], pid: int) -> dict[str, str]:
    """The environment of a command about a daemon: the daemon's own without what would make it pass for it."""
    kept = {k: v for k, v in env.items() if k not in ("QD_DAEMON_RUN", "QD_CONTROL_SOCKET", "WATCHDOG_USEC")}
    return {**kept, "QD_PID": str(pid)}
