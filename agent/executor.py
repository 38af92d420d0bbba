"""From an action to its effect: admit → dispatch → retry through admit → record. Nothing ends it but its owner.

What to do in which order is `meshos.desk`'s to think out; here are the clock, the task and the calls. Dispatches
run side by side, a few at once, so that one that hangs holds up no other; it is given up after a minute. What a
dispatcher or the record raises is told and counted, and the next action goes on. Every outcome goes to the loop
as an event, and to the record.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from agent.chain.record import DISPATCHED, FAILURE, Disposition, Failed, Gated, Record
from agent.meshos.actions import Action, document
from agent.meshos.actual import FailureRecord
from agent.meshos.admit import Admission
from agent.meshos.config import MeshOsConfig
from agent.meshos.desk import Desk, Dropped, Go, Held
from agent.meshos.events import ActionOutcome, Backpressure, Event, Id
from discovery.errors import LocalError

TOLD_AGAIN_S = 0.05
"""How soon the loop is told again of what it had no room for."""
UNTOLD_MAX = 4096


class DispatchError(LocalError):
    """An action could not be carried out. With `retry_after_ms`, a duration, trying again makes sense."""

    def __init__(self, reason: str, retry_after_ms: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_ms = retry_after_ms


class ActionDispatcher(Protocol):
    """Carries actions out. Returning means: it is on its way; what becomes of it comes back as events."""

    async def dispatch(self, action: Action) -> None:
        """DispatchError when it can't be done (now)."""


class LoggingDispatcher:
    """Does nothing and remembers what it was asked; it can be told to fail."""

    def __init__(self) -> None:
        self.dispatched: list[Action] = []
        self._failures: deque[Exception] = deque()

    def fail_next(self, why: Exception, times: int = 1) -> None:
        """Has the next dispatches raise."""
        self._failures.extend([why] * times)

    async def dispatch(self, action: Action) -> None:
        if self._failures:
            raise self._failures.popleft()
        self.dispatched.append(action)


Keep = Callable[[Action, Disposition], None]
"""Keeps how an action ended, in the action chain. May raise: that is counted."""


def keep_in(journal: Any, wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> Keep:
    """A `Keep` that appends to a journal (`agent.chain.store.Journal`): kind `action.KIND`, its fields as body."""

    def keep(action: Action, disposition: Disposition) -> None:
        fields = document(action)
        journal.append(f"action.{fields.pop('kind')}", fields, disposition, at_ms=wall_ms())

    return keep


def failures_of(records: Iterable[Record], capacity: int = 256) -> deque[FailureRecord]:
    """The last failures that a chain of actions tells of, oldest first: its Failed and Gated records. Times are
    those of the chain, Unix milliseconds. What was dispatched leaves no trace here."""
    found: deque[FailureRecord] = deque(maxlen=capacity)
    for record in records:
        disposition = record.disposition
        if not isinstance(disposition, Failed | Gated):
            continue
        body = record.body or {}
        own = record.kind.startswith(FAILURE)
        source = record.kind.removeprefix(FAILURE) if own else "action"
        kind = None if own else record.kind.removeprefix("action.")
        target = next(
            (body[name] for name in ("daemon", "chain", "blob", "peer", "target") if name in body), None
        )
        retry_ms = disposition.retry_after_ms if isinstance(disposition, Failed) else None
        until_ms = disposition.until_ms if isinstance(disposition, Gated) else None
        found.append(
            FailureRecord(record.emitted_at_ms, source, kind, target, disposition.reason, retry_ms, until_ms)
        )
    return found


class Executor:
    """Takes actions (`submit`) and carries them out while `run` runs. `tell` takes an event for the loop and says
    False when it has no room now; what was not taken is told again."""

    def __init__(
        self,
        dispatcher: ActionDispatcher,
        config: MeshOsConfig,
        *,
        tell: Callable[[Event], bool],
        gate_of: Callable[[Id], int | None] = lambda daemon: None,
        zone_of: Callable[[Id], str] = lambda node: "",
        keep: Keep | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dispatcher = dispatcher
        self._config = config
        self._tell = tell
        self._keep = keep
        self._clock = clock
        self.desk = Desk(config, Admission(config, gate_of, zone_of))
        self._running: set[asyncio.Task[None]] = set()
        self._untold: deque[Event] = deque(maxlen=UNTOLD_MAX)
        self._wake: asyncio.Future[None] | None = None
        self._closed = False
        self._forgotten_ms = 0
        self._dispatched = self._failed = self._append_failures = self._untold_lost = 0

    def submit(self, action: Action) -> bool:
        """Takes an action; False when there is no room for it, or the executor has ended."""
        if self._closed or not self.desk.submit(action):
            return False
        self._rouse()
        return True

    def tell(self, event: Event) -> None:
        """Tells the loop of an event in the order of the outcomes, as soon as it has room."""
        self._untold_lost += len(self._untold) == UNTOLD_MAX
        self._untold.append(event)
        self._rouse()

    def stats(self) -> dict[str, int]:
        """What was counted since the start, and how many wait now."""
        desk = self.desk
        return {
            "dispatched": self._dispatched,
            "failed": self._failed,
            "deferred": desk.deferred,
            "gated": desk.gated,
            "retries": desk.retries,
            "dropped": desk.dropped,
            "merged": desk.merged,
            "backpressure_edges": desk.edges_seen,
            "append_failures": self._append_failures,
            "untold_lost": self._untold_lost,
            "actions_waiting": len(desk),
        }

    async def run(self) -> None:
        """Runs until it is cancelled. What still waits then is not carried out; what is being dispatched is
        cancelled."""
        try:
            while True:
                self.turn()
                await self._rest()
        finally:
            self._closed = True
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def turn(self) -> None:
        """Judges what is ready and begins its dispatch, as far as there is room for more at once."""
        now_ms = self._now_ms()
        desk, config = self.desk, self._config
        while len(self._running) < config.dispatches_at_once and desk.ready(now_ms):
            match desk.step(now_ms):
                case Go(action):
                    task = asyncio.get_running_loop().create_task(self._dispatch(action))
                    self._running.add(task)
                    task.add_done_callback(self._done)
                case Held(action, gate):
                    self._outcome(action, "gated", gate.reason, until_ms=gate.until_ms)
                case Dropped(action, reason):
                    self._outcome(action, "dropped", reason)
        if now_ms - self._forgotten_ms >= config.stabilise_ms:
            self._forgotten_ms = now_ms
            desk.admission.forget(now_ms)
        self._tell_all()

    async def _dispatch(self, action: Action) -> None:
        try:
            async with asyncio.timeout(self._config.dispatch_timeout_ms / 1000):
                await self._dispatcher.dispatch(action)
        except DispatchError as why:
            self._not_done(action, why.reason, why.retry_after_ms)
        except TimeoutError:
            self._not_done(action, f"not dispatched within {self._config.dispatch_timeout_ms} ms", None)
        except Exception as why:
            self._not_done(action, f"{type(why).__name__}: {why}", None)
        else:
            self.desk.went(action)
            self._outcome(action, "dispatched", "")

    def _not_done(self, action: Action, reason: str, retry_after_ms: int | None) -> None:
        dropped = self.desk.failed(action, retry_after_ms, self._now_ms())
        self._outcome(action, "failed", reason, retry_after_ms=retry_after_ms)
        if dropped is not None:
            self._outcome(action, "dropped", f"{dropped.reason}: {reason}")

    def _outcome(
        self,
        action: Action,
        outcome: Any,
        reason: str,
        retry_after_ms: int | None = None,
        until_ms: int | None = None,
    ) -> None:
        """Tells how an action ended, to the loop and to the record."""
        event = ActionOutcome(action.KIND, action.target, outcome, reason, retry_after_ms, until_ms)
        self.tell(event)
        disposition: Disposition
        if outcome == "dispatched":
            self._dispatched += 1
            disposition = DISPATCHED
        elif outcome == "gated" and until_ms is not None:
            disposition = Gated(reason, int(time.time() * 1000) + max(0, until_ms - self._now_ms()))
        else:
            self._failed += outcome == "failed"
            disposition = Failed(reason, retry_after_ms)
        if self._keep is None:
            return
        try:
            self._keep(action, disposition)
        except Exception:
            self._append_failures += 1

    def _tell_all(self) -> None:
        untold, edges = self._untold, self.desk.edges()
        while untold and self._tell(untold[0]):
            untold.popleft()
        while edges and self._tell(Backpressure(*edges[0])):
            edges.popleft()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._rouse()

    async def _rest(self) -> None:
        """Sleeps until there is something to do: an action, a dispatch that ended, a deferred one that is due."""
        loop = asyncio.get_running_loop()
        full = len(self._running) >= self._config.dispatches_at_once
        if not full and self.desk.ready(self._now_ms()):
            await asyncio.sleep(0)
            return
        wake = self._wake = loop.create_future()
        due_ms = None if full else self.desk.due_ms()
        wait_s = None if due_ms is None else max(0.0, due_ms / 1000 - self._clock())
        if self._untold or self.desk.edges():
            wait_s = min(TOLD_AGAIN_S, TOLD_AGAIN_S if wait_s is None else wait_s)
        timer = None if wait_s is None else loop.call_later(wait_s, self._rouse)
        try:
            await wake
        finally:
            if timer is not None:
                timer.cancel()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def settling_ms(self, chain: Id) -> int:
        """For how long changes of a chain or artifact still wait here; 0 when they don't."""
        return self.desk.admission.rest_ms(chain, self._now_ms())

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
