"""The one event loop of a node: everything that moves its state comes through here, in one order.

One bounded queue, one timer. At a tick: fold Tick, poll the probes and the scorer, reconcile and write back,
hand out the actions, publish the snapshot, then at most 32 queued events; between ticks events are folded as
they arrive. A late tick delays the next one: none is skipped, none comes twice. Whatever a probe, a callback or
the recording raises becomes a failure record; nothing but `Shutdown` ends the loop.

The engine (agent.meshos) reads no clock: each event is stamped here, once, when it is taken.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from agent.meshos.actions import Action
from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import DaemonControl
from agent.meshos.events import (
    ActionOutcome,
    Event,
    Health,
    Id,
    LocalFailure,
    NodeHealth,
    RttSample,
    Scores,
    Shutdown,
    Tick,
    by_id,
)
from agent.meshos.own import OwnLife, Transition
from agent.meshos.reconcile import ARMS, Arm, run_pass
from agent.meshos.snapshot import Snapshot, SnapshotBuilder, document
from agent.meshos.state import MeshOsState, fold
from agent.recorder import Recorder
from discovery.errors import LocalError

RttProbe = Callable[[], Iterable[tuple[Id, float]]]
"""(peer, round trip in ms), at best only what is new since the last poll."""
HealthProbe = Callable[[], Iterable[tuple[Id, Health, str]]]
"""(peer, health, reason or "")."""
EventProbe = Callable[[], Iterable[Event]]
"""Events of any kind, to be folded within the tick that polls it."""
Scorer = Callable[[Id], Mapping[Id, float | None]]
"""Chain → how good a holder of it each node would be, 0 to 1; nodes that may not take it are left out."""
REPEATED_FAILURE_MS = 30_000
"""What keeps failing for the same reason is recorded anew only after this long; each time is counted."""


class QueueFull(LocalError):
    """The event did not fit in time; it was not taken."""


class LoopClosed(LocalError):
    """The loop has ended; the event was not taken."""


Answer = asyncio.Future[Transition | None]
Item = tuple[Event, Answer | None]


class MeshLoop:
    """Owns a `MeshOsState`. `on_transition` hears of each own move once, at once; `on_action` takes each
    action and says False when it has no room for it; `on_control` hears what daemons are to be told."""

    def __init__(
        self,
        this_node: Id,
        config: MeshOsConfig | None = None,
        *,
        on_transition: Callable[[Transition], None],
        on_action: Callable[[Action], bool | None],
        on_snapshot: Callable[[Snapshot], None] | None = None,
        on_control: Callable[[DaemonControl], None] | None = None,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        arms: tuple[Arm, ...] = ARMS,
    ) -> None:
        self.state = MeshOsState(this_node, config)
        self.config = self.state.config
        self._on_transition = on_transition
        self._on_action = on_action
        self._on_snapshot = on_snapshot
        self._on_control = on_control
        self._recorder = recorder
        self._clock = clock
        self._arms = arms
        self._builder = SnapshotBuilder(self.state)
        self.snapshot: Snapshot = self._builder.last
        """The latest; replaced whole, so any thread may read it."""
        self._queue: deque[Item] = deque()
        self._waiting: deque[tuple[Item, asyncio.Future[None]]] = deque()
        self._rtt_probes: dict[str, RttProbe] = {}
        self._health_probes: dict[str, HealthProbe] = {}
        self._event_probes: dict[str, EventProbe] = {}
        self._scorer: Scorer | None = None
        self._scored: dict[Id, int] = {}
        """Chain → when its scores were asked for last; the oldest first."""
        self._polled: list[Event] = []
        """What is folded within the tick under way, to be recorded behind it."""
        self._polling = False
        self._more_stats: list[Callable[[], Mapping[str, int]]] = []
        self._failing: dict[tuple[str, str], tuple[str, int]] = {}
        self._last_ms = 0
        self._next_tick = clock() + self.config.tick_interval_ms / 1000
        self._timer: asyncio.TimerHandle | None = None
        self._wake: asyncio.Future[None] | None = None
        self._ending = False
        self.closed = False
        self._counts = dict.fromkeys(
            ("ticks", "late_ticks", "events", "events_dropped", "probe_failures", "callback_failures"), 0
        )
        self._dropped_told = 0

    @property
    def life(self) -> OwnLife:
        """This node's own lifecycle as of the last event folded; look, don't touch."""
        return self.state.life

    def now_ms(self) -> int:
        """The loop's time now: what ages of snapshot times are measured with."""
        return int(self._clock() * 1000)

    def stats(self) -> dict[str, int]:
        """What was counted since the start."""
        stats = self.state.counts.as_dict() | self._counts | {"queued": len(self._queue)}
        for more in self._more_stats:
            stats |= more()
        return stats

    def add_stats(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Shows these counts among the loop's own."""
        self._more_stats.append(counts)

    def document(self, show: Callable[[Id], Any] = lambda key: key) -> dict[str, Any]:
        """The snapshot with ages as of now and the loop's own counts, in the keys of `qd node`."""
        found = document(self.snapshot, self.now_ms(), show)
        found["stats"] = self.stats()
        return found

    # -- publishing ------------------------------------------------------------------------------------------

    async def publish(self, event: Event) -> None:
        """Queues an event, waiting for room as long as it takes. LoopClosed when the loop has ended."""
        await self._offer((event, None), None)

    async def publish_timeout(self, event: Event, timeout_s: float) -> None:
        """Queues an event, waiting for room at most `timeout_s`: QueueFull when there was none, and then the
        event is certainly not queued. LoopClosed when the loop has ended."""
        await self._offer((event, None), timeout_s)

    def try_publish(self, event: Event) -> bool:
        """Queues an event if there is room now; False when it was dropped, which is counted and told."""
        if self.closed or not (self.has_room() or isinstance(event, Shutdown)):
            self._counts["events_dropped"] += 1
            return False
        self._put((event, None))
        return True

    async def publish_folded(self, event: Event, timeout_s: float | None = None) -> Transition | None:
        """Queues an event and waits until it is folded; the move that this node made by it, if any."""
        answer: Answer = asyncio.get_running_loop().create_future()
        try:
            await self._offer((event, answer), timeout_s)
            return await answer
        finally:
            answer.cancel()

    def has_room(self) -> bool:
        """Whether an event would be taken now."""
        return not self._waiting and len(self._queue) < self.config.event_queue_capacity

    def _put(self, item: Item) -> None:
        self._queue.append(item)
        self._rouse()

    async def _offer(self, item: Item, timeout_s: float | None) -> None:
        if self.closed:
            raise LoopClosed("the node's loop has ended")
        if self.has_room() or isinstance(item[0], Shutdown):
            self._put(item)
            return
        loop = asyncio.get_running_loop()
        admitted: asyncio.Future[None] = loop.create_future()
        self._waiting.append((item, admitted))
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._give_up, admitted, timeout_s)
        try:
            await admitted
        finally:
            if timer is not None:
                timer.cancel()

    @staticmethod
    def _give_up(admitted: asyncio.Future[None], timeout_s: float) -> None:
        if not admitted.done():
            admitted.set_exception(QueueFull(f"the node's event queue was full for {timeout_s:g} s"))

    def hurry(self) -> None:
        """Has the next tick come now: what an op changed shall be done at once."""
        self._next_tick = min(self._next_tick, self._clock())
        self._rouse()

    # -- probes ----------------------------------------------------------------------------------------------

    def install_rtt_probe(self, name: str, probe: RttProbe) -> None:
        """Polls `probe` from the next tick on, in place of an earlier one of that name."""
        self._rtt_probes[name] = probe

    def install_health_probe(self, name: str, probe: HealthProbe) -> None:
        """Polls `probe` from the next tick on, in place of an earlier one of that name."""
        self._health_probes[name] = probe

    def install_event_probe(self, name: str, probe: EventProbe) -> None:
        """Polls `probe` from the next tick on, in place of an earlier one of that name."""
        self._event_probes[name] = probe

    def install_scorer(self, scorer: Scorer) -> None:
        """Asks `scorer` about the chains led here from the next tick on: a few a tick, all of them in turn."""
        self._scorer = scorer
        self._scored.clear()

    def remove_probe(self, name: str) -> None:
        """Polls the probes of that name no more."""
        self._rtt_probes.pop(name, None)
        self._health_probes.pop(name, None)
        self._event_probes.pop(name, None)

    # -- running ---------------------------------------------------------------------------------------------

    async def run(self) -> dict[str, int]:
        """Runs until `Shutdown` is taken or the task is cancelled; returns the stats. Publishers that still
        wait get LoopClosed."""
        self._next_tick = self._clock() + self.config.tick_interval_ms / 1000
        try:
            while not self._ending:
                if self._clock() >= self._next_tick:
                    self.tick()
                else:
                    self._fold_queued()
                if self._queue:
                    await asyncio.sleep(0)
                elif not self._ending:
                    await self._rest()
        finally:
            self._close()
        return self.stats()

    def tick(self) -> None:
        """One pass of the loop. `run` calls it; so does who drives the loop by hand."""
        now = self._clock()
        late_ms = max(0, int((now - self._next_tick) * 1000))
        self._next_tick = now + self.config.tick_interval_ms / 1000
        at_ms = self._stamp(now)
        self._counts["ticks"] += 1
        if late_ms >= self.config.late_tick_ms:
            self._counts["late_ticks"] += 1
        self._polled.clear()
        self._polling = True
        self._fold(Tick(late_ms, at_ms=at_ms))
        self._poll(at_ms)
        self._tell_drops(at_ms)
        self._polling = False
        self._record(Tick(late_ms, len(self._polled), at_ms=at_ms))
        for event in self._polled:
            self._record(event)
        for action in self._reconcile(at_ms):
            self._hand_out(action, at_ms)
        self._show()
        self._fold_queued()

    def _fold_queued(self) -> None:
        for _ in range(min(len(self._queue), self.config.events_per_tick)):
            event, answer = self._queue.popleft()
            move = None
            self._counts["events"] += 1
            if not isinstance(event, Tick):  # time passes by the loop's own ticks alone
                stamped = msgspec.structs.replace(event, at_ms=self._stamp(self._clock()))
                self._record(stamped)
                move = self._fold(stamped)
            if answer is not None and not answer.done():
                answer.set_result(move)
            if isinstance(event, Shutdown):
                self._ending = True
                break
            self._admit_waiting()
        if self._recorder is not None:
            self._recorder.flush()

    def _admit_waiting(self) -> None:
        while self._waiting and len(self._queue) < self.config.event_queue_capacity:
            item, admitted = self._waiting.popleft()
            if not admitted.done():
                self._queue.append(item)
                admitted.set_result(None)

    def _fold(self, event: Event) -> Transition | None:
        try:
            move = fold(self.state, event)
        except Exception as why:
            self._fail(
                "loop", f"fold of {type(event).__name__}", f"{type(why).__name__}: {why}", self._last_ms
            )
            return None
        if move is not None:
            self._show()
            self._call("on_transition", self._on_transition, move)
        controls = self.state.controls
        while controls:
            control = controls.popleft()
            if self._on_control is not None:
                self._call("on_control", self._on_control, control)
        return move

    def _poll(self, at_ms: int) -> None:
        """Folds what the probes say, but for what repeats a recent sample: an idle mesh costs little."""
        state, fresh_ms = self.state, at_ms - self.config.probe_refresh_ms
        for name, rtt_probe in tuple(self._rtt_probes.items()):
            try:
                rtts = state.rtt
                for peer, rtt_ms in rtt_probe():
                    known = rtts.get(peer)
                    if known is None or known.rtt_ms != rtt_ms or known.at_ms <= fresh_ms:
                        self._take_sample(RttSample(peer, float(rtt_ms), at_ms=at_ms))
            except Exception as why:
                self._probe_failed(name, why, at_ms)
        for name, health_probe in tuple(self._health_probes.items()):
            try:
                healths = state.health
                for peer, health, reason in health_probe():
                    held = healths.get(peer)
                    if (
                        held is None
                        or held.health != health
                        or held.reason != reason
                        or held.at_ms <= fresh_ms
                    ):
                        self._take_sample(NodeHealth(peer, Health(health), reason, at_ms=at_ms))
            except Exception as why:
                self._probe_failed(name, why, at_ms)
        for name, event_probe in tuple(self._event_probes.items()):
            try:
                for event in event_probe():
                    self._take_sample(msgspec.structs.replace(event, at_ms=at_ms))
            except Exception as why:
                self._probe_failed(name, why, at_ms)
        if self._scorer is not None:
            self._score(self._scorer, at_ms)

    def _score(self, scorer: Scorer, at_ms: int) -> None:
        """Asks about chains led here: those never asked about, then those asked about longest ago."""
        led, scored = self.state.led, self._scored
        budget, old_ms = self.config.scored_chains_per_tick, at_ms - self.config.score_refresh_ms
        chains: list[Id] = []
        if len(scored) < len(led) or not scored.keys() <= led:
            for gone in scored.keys() - led:
                del scored[gone]
            chains = sorted(led - scored.keys(), key=by_id)[:budget]
        for chain, asked_ms in scored.items():
            if len(chains) >= budget or asked_ms > old_ms:
                break
            chains.append(chain)
        for chain in chains:
            scored.pop(chain, None)
            scored[chain] = at_ms
            try:
                scores = {str(node): value for node, value in scorer(chain).items()}
                if scores != self.state.scores.get(str(chain), {}):
                    self._take_sample(Scores(chain, scores, at_ms=at_ms))
            except Exception as why:
                self._probe_failed("scorer", why, at_ms)
                return

    def _take_sample(self, event: Event) -> None:
        self._polled.append(event)
        self._fold(event)

    def _probe_failed(self, name: str, why: Exception, at_ms: int) -> None:
        self._counts["probe_failures"] += 1
        self._fail("probe", name, f"{type(why).__name__}: {why}", at_ms)

    def _fail(self, source: str, target: str, reason: str, at_ms: int) -> None:
        """Records a failure of our own, unless it was recorded a moment ago."""
        before = self._failing.get((source, target))
        if before and before[0] == reason and at_ms - before[1] < REPEATED_FAILURE_MS:
            return
        self._failing[source, target] = (reason, at_ms)
        event = LocalFailure(source, target, reason, at_ms=at_ms)
        if self._polling:
            self._polled.append(event)
        else:
            self._record(event)
        fold(self.state, event)

    def _tell_drops(self, at_ms: int) -> None:
        dropped = self._counts["events_dropped"]
        if dropped > self._dropped_told:
            reason = f"event queue full: {dropped - self._dropped_told} events dropped"
            self._dropped_told = dropped
            self._fail("loop", "event_queue", reason, at_ms)
        if self._recorder is not None and self._recorder.failed:
            self._fail("loop", "record", self._recorder.failed, at_ms)

    def _reconcile(self, at_ms: int) -> list[Action]:
        try:
            return run_pass(self.state, self._arms)
        except Exception as why:
            self._fail("loop", "reconcile", f"{type(why).__name__}: {why}", at_ms)
            return []

    def _hand_out(self, action: Action, at_ms: int) -> None:
        try:
            taken = self._on_action(action)
        except Exception as why:
            self._counts["callback_failures"] += 1
            reason = f"{type(why).__name__}: {why}"
            outcome = ActionOutcome(action.KIND, action.target, "failed", reason, at_ms=at_ms)
        else:
            if taken is not False:
                return
            outcome = ActionOutcome(action.KIND, action.target, "dropped", "action queue full", at_ms=at_ms)
        self._record(outcome)
        self._fold(outcome)

    def _show(self) -> None:
        snapshot = self._builder.build()
        if snapshot is not self.snapshot:
            self.snapshot = snapshot
            if self._on_snapshot is not None:
                self._call("on_snapshot", self._on_snapshot, snapshot)

    def _call(self, name: str, callback: Callable[[Any], None], value: Any) -> None:
        try:
            callback(value)
        except Exception as why:
            self._counts["callback_failures"] += 1
            self._fail("loop", name, f"{type(why).__name__}: {why}", self._last_ms)

    def _stamp(self, now: float) -> int:
        self._last_ms = max(self._last_ms, int(now * 1000))
        return self._last_ms

    def _record(self, event: Event) -> None:
        if self._recorder is not None:
            self._recorder.write(event)

    async def _rest(self) -> None:
        """Sleeps until an event comes or the tick is due."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(max(0.0, self._next_tick - self._clock()), self._alarm)
        self._wake = loop.create_future()
        await self._wake

    def _alarm(self) -> None:
        self._timer = None
        self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _close(self) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gone = LoopClosed("the node's loop has ended")
        for _, admitted in self._waiting:
            if not admitted.done():
                admitted.set_exception(gone)
        for _, answer in self._queue:
            if answer is not None and not answer.done():
                answer.set_exception(gone)
        self._counts["events_dropped"] += len(self._queue)
        self._queue.clear()
        self._waiting.clear()
        self._show()
        if self._recorder is not None:
            self._recorder.close()
