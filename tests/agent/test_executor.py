"""The executor and the runtime around it: what is asked for happens once, whatever a dispatcher does."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.chain.record import Dispatched, Failed, Gated, Record
from agent.chain.store import Journal
from agent.executor import DispatchError, Executor, LoggingDispatcher, failures_of, keep_in
from agent.loop import QueueFull
from agent.meshos.actions import (
    Action,
    MarkAvoid,
    MigrateBlob,
    PullReplica,
    RequestPlacement,
    StartDaemon,
    StopDaemon,
)
from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import BackpressureOff, BackpressureOn, DaemonControl, DrainFinish, DrainStart
from agent.meshos.events import (
    ActionOutcome,
    Admin,
    AdminOp,
    Backpressure,
    DaemonHealth,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    LocalReplicaIntent,
    ReplicaUpdate,
    RttSample,
)
from agent.runtime import MeshOsRuntime
from discovery.identity import Identity

ME = 100
QUICK = MeshOsConfig(tick_interval_ms=10, pull_cooldown_ms=1)


async def until(condition: Callable[[], Any], limit_s: float = 10.0) -> None:
    """Polls a condition; fails when it doesn't come true in time."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Bench:
    """An executor with what it told."""

    def __init__(self, config: MeshOsConfig = QUICK, dispatcher: Any = None, **options: Any) -> None:
        self.dispatcher = dispatcher or LoggingDispatcher()
        self.told: list[Event] = []
        self.room = True
        self.executor = Executor(self.dispatcher, config, tell=self._tell, **options)

    def _tell(self, event: Event) -> bool:
        if self.room:
            self.told.append(event)
        return self.room

    def outcomes(self) -> list[tuple[str, Any, str]]:
        return [(e.kind, e.target, e.outcome) for e in self.told if isinstance(e, ActionOutcome)]

    def run(self, body: Callable[[], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            task = asyncio.create_task(self.executor.run())
            try:
                return await asyncio.wait_for(body(), 20)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        return asyncio.run(main())


def test_actions_are_dispatched_in_order_and_told() -> None:
    bench = Bench()

    async def body() -> None:
        for n in range(20):
            assert bench.executor.submit(StopDaemon(n, 0))
        await until(lambda: len(bench.told) == 20)

    bench.run(body)
    assert bench.dispatcher.dispatched == [StopDaemon(n, 0) for n in range(20)]
    assert bench.outcomes() == [("stop_daemon", n, "dispatched") for n in range(20)]
    assert bench.executor.stats()["dispatched"] == 20


def test_dispatcher_that_raises_is_a_failure_and_the_next_goes_on() -> None:
    bench = Bench()
    bench.dispatcher.fail_next(RuntimeError("boom"))

    async def body() -> None:
        bench.executor.submit(StopDaemon("a", 0))
        bench.executor.submit(StopDaemon("b", 0))
        await until(lambda: len(bench.told) == 2)

    bench.run(body)
    assert bench.outcomes() == [("stop_daemon", "a", "failed"), ("stop_daemon", "b", "dispatched")]
    failed = bench.told[0]
    assert isinstance(failed, ActionOutcome) and failed.reason == "RuntimeError: boom"


def test_failure_with_retry_goes_out_again_and_frees_the_cooldown_meanwhile() -> None:
    bench = Bench(MeshOsConfig(pull_cooldown_ms=60_000))
    bench.dispatcher.fail_next(DispatchError("link down", 20))

    async def body() -> None:
        bench.executor.submit(PullReplica(1, 2))
        await until(lambda: bench.dispatcher.dispatched)

    bench.run(body)
    assert bench.outcomes() == [("pull_replica", 1, "failed"), ("pull_replica", 1, "dispatched")]
    assert bench.executor.stats() | {"retries": 1, "failed": 1, "dispatched": 1} == bench.executor.stats()


def test_action_that_always_fails_is_dropped_after_16_retries() -> None:
    bench = Bench()
    bench.dispatcher.fail_next(DispatchError("no", 1), 100)

    async def body() -> None:
        bench.executor.submit(RequestPlacement(1, ()))
        await until(lambda: bench.executor.stats()["dropped"])
        await until(lambda: bench.outcomes()[-1][2] == "dropped")

    bench.run(body)
    assert [outcome for _, _, outcome in bench.outcomes()] == ["failed"] * 17 + ["dropped"]


def test_dispatch_that_hangs_holds_up_no_other_and_is_given_up() -> None:
    class Hanging(LoggingDispatcher):
        async def dispatch(self, action: Action) -> None:
            if action.target == "hangs":
                await asyncio.sleep(60)
            await super().dispatch(action)

    bench = Bench(MeshOsConfig(dispatch_timeout_ms=100), Hanging())

    async def body() -> None:
        bench.executor.submit(StopDaemon("hangs", 0))
        bench.executor.submit(StopDaemon("next", 0))
        await until(lambda: len(bench.told) == 2)

    bench.run(body)
    assert bench.outcomes() == [("stop_daemon", "next", "dispatched"), ("stop_daemon", "hangs", "failed")]


def test_gated_start_is_told_with_its_time_and_not_dispatched() -> None:
    bench = Bench(gate_of={"web": 10**15}.get)

    async def body() -> None:
        bench.executor.submit(StartDaemon("web"))
        await until(lambda: bench.told)

    bench.run(body)
    assert bench.told == [ActionOutcome("start_daemon", "web", "gated", "daemon-backoff", None, 10**15)]
    assert bench.dispatcher.dispatched == []


def test_hundred_queued_pulls_all_go_out() -> None:
    bench = Bench(MeshOsConfig(pull_cooldown_ms=5))

    async def body() -> None:
        for chain in range(100):
            bench.executor.submit(PullReplica(chain, 2))
        await until(lambda: len(bench.dispatcher.dispatched) == 100)

    bench.run(body)
    assert sorted(action.chain for action in bench.dispatcher.dispatched) == list(range(100))
    assert bench.executor.stats()["dropped"] == 0


def test_backpressure_edges_are_told_once_each() -> None:
    bench = Bench(MeshOsConfig(backpressure_high=5, backpressure_low=2))

    async def body() -> None:
        for n in range(6):
            bench.executor.submit(StopDaemon(n, 0))
        await until(lambda: len(bench.told) == 8)

    bench.run(body)
    assert [e for e in bench.told if isinstance(e, Backpressure)] == [
        Backpressure(True, 6),
        Backpressure(False, 2),
    ]
    assert bench.executor.stats()["backpressure_edges"] == 2


def test_what_the_loop_had_no_room_for_is_told_again() -> None:
    bench = Bench()
    bench.room = False

    async def body() -> None:
        bench.executor.submit(StopDaemon("a", 0))
        await until(lambda: bench.dispatcher.dispatched)
        assert bench.told == []
        bench.room = True
        await until(lambda: bench.told)

    bench.run(body)
    assert bench.outcomes() == [("stop_daemon", "a", "dispatched")]


def test_journal_that_fails_is_counted_and_never_fatal() -> None:
    def broken(action: Action, disposition: Any) -> None:
        raise OSError("disk full")

    bench = Bench(keep=broken)

    async def body() -> None:
        bench.executor.submit(StopDaemon("a", 0))
        bench.executor.submit(StopDaemon("b", 0))
        await until(lambda: len(bench.told) == 2)

    bench.run(body)
    assert bench.executor.stats()["append_failures"] == 2


def test_executor_that_ended_takes_nothing() -> None:
    bench = Bench()

    async def body() -> None: ...

    bench.run(body)
    assert bench.executor.submit(StopDaemon("a", 0)) is False


def test_outcomes_are_kept_in_the_journal_and_folded_into_the_last_failures(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", Identity.generate())
    bench = Bench(keep=keep_in(journal, lambda: 777), gate_of={"web": 10**15}.get)
    bench.dispatcher.fail_next(DispatchError("no route"))

    async def body() -> None:
        for action in (MigrateBlob("x", 7), StartDaemon("web"), MarkAvoid(9, "slow", 5)):
            bench.executor.submit(action)
        await until(lambda: len(bench.told) == 3)

    bench.run(body)
    records = journal.tail(10)
    assert {(r.kind, type(r.disposition)) for r in records} == {
        ("action.migrate_blob", Failed),
        ("action.start_daemon", Gated),
        ("action.mark_avoid", Dispatched),
    }
    found = failures_of(records)
    assert {(f.action, f.target, f.reason, f.at_ms) for f in found} == {
        ("migrate_blob", "x", "no route", 777),
        ("start_daemon", "web", "daemon-backoff", 777),
    }


def test_failures_of_a_chain_are_the_last_ones() -> None:
    records = [
        Record(id=n + 1, kind="action.pull_replica", emitted_at_ms=n, disposition=Failed("x"), prev=bytes(32))
        for n in range(300)
    ]
    found = failures_of(records)
    assert (len(found), found[0].at_ms) == (256, 44)


# --- the runtime


def test_runtime_carries_an_intent_to_the_dispatcher_and_back_into_the_snapshot() -> None:
    async def main() -> dict[str, int]:
        dispatcher = LoggingDispatcher()
        runtime = MeshOsRuntime.start(QUICK, dispatcher, this_node=ME)
        await runtime.loop.publish(DaemonIntent("web", "run"))
        await until(lambda: dispatcher.dispatched == [StartDaemon("web")])
        await runtime.loop.publish(DaemonLifecycle("web", "started"))
        await until(lambda: runtime.snapshot.daemons and runtime.snapshot.daemons["web"].state == "running")
        runtime.install_rtt_probe("rtt", lambda: [(7, 900.0)])
        await until(lambda: 7 in runtime.snapshot.avoid_list)
        stats = await runtime.shutdown()
        assert await runtime.shutdown() == stats
        return stats

    stats = asyncio.run(main())
    assert stats["dispatched"] >= 1 and stats["actions_emitted"] >= 2


def test_runtime_scorer_installed_after_the_start_is_asked() -> None:
    async def main() -> Any:
        dispatcher = LoggingDispatcher()
        runtime = MeshOsRuntime.start(QUICK, dispatcher, this_node=ME)
        await runtime.loop.publish(ReplicaUpdate(1, "added", ME, leader=ME))
        runtime.install_scorer(lambda chain: {ME: 0.1, 7: 0.9})
        await until(lambda: dispatcher.dispatched)
        await runtime.shutdown()
        return [(a.KIND, a.target) for a in dispatcher.dispatched]

    assert asyncio.run(main()) == [("request_eviction", 1)]


def test_runtime_failed_dispatch_is_asked_for_again_by_the_next_tick() -> None:
    async def main() -> None:
        dispatcher = LoggingDispatcher()
        dispatcher.fail_next(RuntimeError("boom"))
        runtime = MeshOsRuntime.start(QUICK, dispatcher, this_node=ME)
        await runtime.loop.publish(ReplicaUpdate(1, "added", 7))
        await runtime.loop.publish(LocalReplicaIntent(1, "hold"))
        await until(lambda: dispatcher.dispatched == [PullReplica(1, 7)])
        assert [f.reason for f in runtime.snapshot.recent_failures] == ["RuntimeError: boom"]
        await runtime.shutdown()

    asyncio.run(main())


def test_runtime_action_queue_full_is_dropped_counted_and_told() -> None:
    async def main() -> None:
        config = MeshOsConfig(tick_interval_ms=50, action_queue_capacity=4)
        runtime = MeshOsRuntime.start(config, LoggingDispatcher(), this_node=ME)
        for n in range(10):
            await runtime.loop.publish(DaemonIntent(n, "run"))
        await until(lambda: runtime.stats()["actions_dropped"] >= 6)
        reasons = {f.reason for f in runtime.snapshot.recent_failures}
        assert reasons == {"action queue full"}
        await until(lambda: runtime.stats()["dispatched"] >= 10)
        await runtime.shutdown()

    asyncio.run(main())


class Program:
    """A daemon of this process."""

    name = "prog"

    def __init__(self) -> None:
        self.heard: list[DaemonControl] = []
        self.said: Any = DaemonHealth.HEALTHY
        self.load = 0.0

    def health(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def saturation(self) -> float:
        return self.load

    def on_control(self, control: DaemonControl) -> None:
        self.heard.append(control)


def test_registered_daemon_tells_its_health_and_hears_its_controls() -> None:
    async def main() -> None:
        runtime = MeshOsRuntime.start(QUICK, LoggingDispatcher(), this_node=ME)
        program = Program()
        handle = runtime.register_daemon(program)
        with pytest.raises(ValueError, match="registered already"):
            runtime.register_daemon(Program())

        def row() -> Any:
            return runtime.snapshot.daemons.get("prog")

        await until(lambda: row() and row().state == "running")
        program.said, program.load = (DaemonHealth.DEGRADED, "cold cache"), 0.5
        await until(lambda: row().health is DaemonHealth.DEGRADED and row().saturation == 0.5)
        assert row().reason == "cold cache"
        program.said = KeyError("x")
        await until(lambda: row().health is DaemonHealth.UNHEALTHY)

        await runtime.loop.publish(Admin(AdminOp("drain", ME, 5000)))
        await until(lambda: len(program.heard) == 2)
        assert program.heard[0] == DrainStart(5000)
        await runtime.loop.publish(Backpressure(True, 1000))
        await runtime.loop.publish(Backpressure(False, 100))
        await runtime.loop.publish(Admin(AdminOp("resume", ME)))
        await until(lambda: len(program.heard) == 5)
        assert program.heard[2:] == [BackpressureOn(1.0), BackpressureOff(), DrainFinish()]
        handle.close()
        await until(lambda: row().state == "stopped")
        await runtime.shutdown()

    asyncio.run(main())


def test_registered_daemon_gets_the_grace_of_its_stop() -> None:
    async def main() -> Any:
        runtime = MeshOsRuntime.start(QUICK, LoggingDispatcher(), this_node=ME)
        program = Program()
        runtime.register_daemon(program)
        await runtime.loop.publish(DaemonIntent("prog", "stop"))
        await until(lambda: program.heard)
        await runtime.shutdown()
        return program.heard[0]

    control = asyncio.run(main())
    assert 29_000 < control.grace_period_ms <= 30_000


def test_runtime_dropped_without_shutdown_cancels_its_tasks_and_warns() -> None:
    async def main() -> None:
        runtime = MeshOsRuntime.start(QUICK, LoggingDispatcher(), this_node=ME)
        tasks, loop = runtime._tasks, runtime.loop
        await asyncio.sleep(0.02)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del runtime
            gc.collect()
        assert [str(w.message) for w in caught] == ["MeshOsRuntime dropped without shutdown()"]
        await until(lambda: all(task.done() for task in tasks))
        assert loop.closed

    asyncio.run(main())


def test_loop_whose_queue_is_full_still_hears_every_outcome() -> None:
    async def main() -> None:
        config = MeshOsConfig(tick_interval_ms=20, event_queue_capacity=1, events_per_tick=1)
        dispatcher = LoggingDispatcher()
        runtime = MeshOsRuntime.start(config, dispatcher, this_node=ME)
        for n in range(30):
            while True:
                try:
                    await runtime.loop.publish_timeout(DaemonIntent(n, "run"), 1)
                    break
                except QueueFull:
                    continue
        runtime.loop.try_publish(RttSample(1, 1.0))
        await until(lambda: runtime.stats()["actions_dispatched"] == 30)
        await runtime.shutdown()

    asyncio.run(main())


def test_registered_daemon_is_heard_in_order_though_the_queue_is_full() -> None:
    async def main() -> None:
        config = MeshOsConfig(tick_interval_ms=10, event_queue_capacity=1, events_per_tick=1)
        runtime = MeshOsRuntime.start(config, LoggingDispatcher(), this_node=ME)
        handle = runtime.register_daemon(Program())
        for _ in range(5):
            handle.crashed("boom")
            handle.started()
        await until(
            lambda: "prog" in runtime.snapshot.daemons and runtime.snapshot.daemons["prog"].restarts == 5
        )
        assert runtime.snapshot.daemons["prog"].state == "running"
        assert runtime.stats()["events_dropped"] == 0
        await runtime.shutdown()

    asyncio.run(main())
