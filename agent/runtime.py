"""The engine, running: one call that wires loop, executor and snapshot, and one that ends them.

`MeshOsRuntime.start(config, dispatcher, this_node=…)` begins both as tasks of the running event loop. Whoever
drops a runtime without `await runtime.shutdown()` gets its tasks cancelled and a ResourceWarning.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from agent.executor import ActionDispatcher, Executor, Keep
from agent.loop import HealthProbe, LoopClosed, MeshLoop, RttProbe, Scorer
from agent.meshos.actions import Action, StartDaemon, StopDaemon
from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import DaemonControl, shutdown_by
from agent.meshos.events import DaemonHealth, DaemonLifecycle, Event, Id, Shutdown
from agent.meshos.own import Transition
from agent.meshos.snapshot import Snapshot
from agent.recorder import Recorder

SHUTDOWN_S = 5.0
"""How long a shutdown waits for the loop to take it before the tasks are cancelled."""


class InProcessDaemon(Protocol):
    """What a daemon in this process has to have; `health`, `saturation` and `on_control` may be missing."""

    name: str


class MeshOsRuntime:
    """A running engine. Made by `start`."""

    def __init__(
        self,
        loop: MeshLoop,
        executor: Executor,
        daemons: dict[Id, DaemonHandle],
        tasks: list[asyncio.Task[Any]],
    ) -> None:
        self.loop = loop
        """The handle: publish*, probes, document."""
        self.executor = executor
        self._daemons = daemons
        self._tasks = tasks
        self._ended = False

    @classmethod
    def start(
        cls,
        config: MeshOsConfig,
        dispatcher: ActionDispatcher,
        *,
        this_node: Id,
        on_transition: Callable[[Transition], None] = lambda move: None,
        on_control: Callable[[DaemonControl], None] | None = None,
        on_snapshot: Callable[[Snapshot], None] | None = None,
        keep: Keep | None = None,
        recorder: Recorder | None = None,
        zone_of: Callable[[Id], str] = lambda node: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> MeshOsRuntime:
        """Begins loop and executor. `on_control` hears what all daemons are to be told (those registered here
        hear it themselves); `keep` records how each action ended."""
        daemons: dict[Id, DaemonHandle] = {}

        def tell_daemons(control: DaemonControl) -> None:
            for handle in tuple(daemons.values()):
                handle.tell(control)
            if on_control is not None:
                on_control(control)

        def submit(action: Action) -> bool:
            return executor.submit(action)

        loop = MeshLoop(
            this_node,
            config,
            on_transition=on_transition,
            on_action=submit,
            on_snapshot=on_snapshot,
            on_control=tell_daemons,
            recorder=recorder,
            clock=clock,
        )
        executor = Executor(
            _Routed(dispatcher, daemons, loop),
            config,
            tell=_teller(loop),
            gate_of=loop.state.gate_of,
            zone_of=zone_of,
            keep=keep,
            clock=clock,
        )
        loop.add_stats(executor.stats)
        loop.install_event_probe("daemons", lambda: _asked(daemons))
        running = asyncio.get_running_loop()
        tasks: list[asyncio.Task[Any]] = [
            running.create_task(loop.run(), name="meshos loop"),
            running.create_task(executor.run(), name="meshos executor"),
        ]
        return cls(loop, executor, daemons, tasks)

    @property
    def tasks(self) -> tuple[asyncio.Task[Any], ...]:
        """Loop and executor. One that ends before `shutdown` ended by a fault of ours."""
        return tuple(self._tasks)

    @property
    def snapshot(self) -> Snapshot:
        """The latest; from any thread."""
        return self.loop.snapshot

    def stats(self) -> dict[str, int]:
        """What was counted since the start, of the loop and of the executor."""
        return self.loop.stats()

    def install_rtt_probe(self, name: str, probe: RttProbe) -> None:
        self.loop.install_rtt_probe(name, probe)

    def install_health_probe(self, name: str, probe: HealthProbe) -> None:
        self.loop.install_health_probe(name, probe)

    def install_scorer(self, scorer: Scorer) -> None:
        self.loop.install_scorer(scorer)

    def register_daemon(self, daemon: InProcessDaemon) -> DaemonHandle:
        """Takes a daemon of this process under supervision: started as of now, its health and saturation asked
        at each tick, controls handed to it. ValueError when one of that name is registered."""
        if daemon.name in self._daemons:
            raise ValueError(f"daemon {daemon.name} is registered already")
        handle = DaemonHandle(daemon, self.executor.tell, self._daemons)
        self._daemons[daemon.name] = handle
        handle.started()
        return handle

    async def shutdown(self) -> dict[str, int]:
        """Ends loop and executor, and returns the stats. What was queued before it is folded; actions that still
        wait are not carried out. May be called twice."""
        if not self._ended:
            self._ended = True
            loop_task, executor_task = self._tasks
            try:
                await self.loop.publish(Shutdown())
            except LoopClosed:
                pass
            await asyncio.wait([loop_task], timeout=SHUTDOWN_S)
            for task in (loop_task, executor_task):
                task.cancel()
            await asyncio.gather(loop_task, executor_task, return_exceptions=True)
        return self.stats()

    def __del__(self) -> None:
        if getattr(self, "_ended", True):
            return
        warnings.warn("MeshOsRuntime dropped without shutdown()", ResourceWarning, stacklevel=2)
        for task in self._tasks:
            if not task.get_loop().is_closed():
                task.get_loop().call_soon_threadsafe(task.cancel)


class DaemonHandle:
    """One registered daemon: whoever runs it says here, in the event loop's thread, what becomes of it. It is
    said in this order, as soon as the loop has room for it."""

    def __init__(
        self, daemon: InProcessDaemon, tell: Callable[[Event], None], daemons: dict[Id, DaemonHandle]
    ) -> None:
        self.daemon = daemon
        self._tell = tell
        self._daemons = daemons
        self._health: tuple[DaemonHealth, str] = (DaemonHealth.HEALTHY, "")
        self._saturation = 0.0
        self.running = False
        self.failure = ""
        """What its last control raised."""

    @property
    def name(self) -> str:
        return self.daemon.name

    def started(self) -> None:
        """It runs."""
        self.running = True
        self._health, self._saturation = (DaemonHealth.HEALTHY, ""), 0.0
        self._tell(DaemonLifecycle(self.name, "started"))

    def exited(self) -> None:
        """It ended of itself, or as it was told."""
        self.running = False
        self._tell(DaemonLifecycle(self.name, "exited_cleanly"))

    def crashed(self, reason: str) -> None:
        """It ended in an error."""
        self.running = False
        self._tell(DaemonLifecycle(self.name, "crashed", reason=reason))

    def close(self) -> None:
        """Takes it out of supervision; one that runs is told as exited."""
        if self.running:
            self.exited()
        self._daemons.pop(self.name, None)

    def tell(self, control: DaemonControl) -> None:
        """Hands it a control, if it listens. What it raises is its own affair, kept in `failure`."""
        listen = getattr(self.daemon, "on_control", None)
        if listen is None or not self.running:
            return
        try:
            listen(control)
        except Exception as why:
            self.failure = f"{type(why).__name__}: {why}"

    def news(self) -> Iterator[DaemonLifecycle]:
        """What it says of itself that it did not say last time."""
        if not self.running:
            return
        ask = getattr(self.daemon, "health", None)
        if ask is not None:
            said = ask()
            health = said if isinstance(said, tuple) else (said, "")
            if health != self._health:
                self._health = (DaemonHealth(health[0]), str(health[1]))
                yield DaemonLifecycle(self.name, "health", self._health[0], self._health[1])
        ask = getattr(self.daemon, "saturation", None)
        if ask is not None and (value := float(ask())) != self._saturation:
            self._saturation = value
            yield DaemonLifecycle(self.name, "saturation", saturation=value)


def _asked(daemons: dict[Id, DaemonHandle]) -> Iterator[Event]:
    """What the registered daemons have to say; one that raises says that it is unhealthy."""
    for handle in tuple(daemons.values()):
        try:
            yield from handle.news()
        except Exception as why:
            reason = f"{type(why).__name__}: {why}"
            if handle._health != (DaemonHealth.UNHEALTHY, reason):
                handle._health = (DaemonHealth.UNHEALTHY, reason)
                yield DaemonLifecycle(handle.name, "health", DaemonHealth.UNHEALTHY, reason)


class _Routed:
    """Tells a registered daemon to end before the dispatcher hears of it; everything goes to the dispatcher."""

    def __init__(self, dispatcher: ActionDispatcher, daemons: dict[Id, DaemonHandle], loop: MeshLoop) -> None:
        self._dispatcher = dispatcher
        self._daemons = daemons
        self._loop = loop

    async def dispatch(self, action: Action) -> None:
        if isinstance(action, StopDaemon) and (handle := self._daemons.get(action.daemon)):
            handle.tell(shutdown_by(action.deadline_ms, self._loop.now_ms()))
        elif isinstance(action, StartDaemon) and (handle := self._daemons.get(action.daemon)):
            start = getattr(handle.daemon, "start", None)
            if start is not None:
                start()
        await self._dispatcher.dispatch(action)


def _teller(loop: MeshLoop) -> Callable[[Event], bool]:
    """Publishes to the loop; False while its queue is full, and then nothing counts as dropped."""

    def tell(event: Event) -> bool:
        return loop.closed or (loop.has_room() and loop.try_publish(event))

    return tell
