"""Ops that meet each other at one node: the real engine judges, and no answer claims what did not happen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

import agent.acts
from agent.acts import Acts
from agent.loop import MeshLoop
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Admin, AdminOp, Alone, Started
from agent.node import Node
from agent.opmessage import Op
from discovery.errors import Refused
from discovery.lifecycle import State


def op(verb: str, op_id: str) -> Op:
    return cast(Op, SimpleNamespace(verb=verb, op_id=op_id, deadline_ms=None, chains=()))


class Bench:
    """A node with nothing but its engine, its journal's handover and its way to stop."""

    def __init__(self) -> None:
        self.node = Node(cast(Any, SimpleNamespace(update_command=())), cast(Any, None))
        self.node._stop = asyncio.get_running_loop().create_future()
        self.handovers: list[Any] = []
        self.node.build = "build"
        self.node.identity = cast(Any, SimpleNamespace(id=7))
        self.node.journal = cast(Any, SimpleNamespace(set_handover=self.handovers.append))
        self.loop = MeshLoop(7, MeshOsConfig(), on_transition=lambda _: None, on_action=lambda _: True)

        async def admin(op: AdminOp) -> None:
            await self.loop.publish_folded(Admin(admin=op))

        self.node.engine = cast(Any, SimpleNamespace(loop=self.loop, admin=admin))
        cast(Any, self.node).tell = self.loop.publish_folded
        self.acts = Acts(self.node)


def run(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench()
        running = asyncio.create_task(bench.loop.run())
        try:
            await bench.loop.publish_folded(Started())
            await bench.loop.publish_folded(Alone(""))
            assert bench.node.state is State.ALIVE
            await test(bench)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


@pytest.fixture(autouse=True)
def self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def passes(*_: object) -> None:
        await asyncio.sleep(0.01)

    monkeypatch.setattr(agent.acts, "_run", passes)
    monkeypatch.setattr(agent.acts.freshness, "fingerprint", lambda: "build")


def test_drain_that_meets_an_update_is_refused_and_never_answered_done() -> None:
    async def meet(bench: Bench) -> None:
        updated, drained = await asyncio.gather(
            bench.acts.apply(op("update", "1"), "by"),
            bench.acts.apply(op("drain", "2"), "by"),
            return_exceptions=True,
        )
        assert updated.result == "accepted"
        assert isinstance(drained, Refused) and drained.code == "in_update"
        assert bench.loop.life.drain is None

    run(meet)


def test_drain_before_an_update_is_done_and_stands_after_it() -> None:
    async def meet(bench: Bench) -> None:
        drained, updated = await asyncio.gather(
            bench.acts.apply(op("drain", "1"), "by"), bench.acts.apply(op("update", "2"), "by")
        )
        assert (drained.result, drained.state) == ("done", "draining")
        assert updated.result == "accepted"
        assert bench.loop.life.drain is not None
        assert [h.earlier for h in bench.handovers] == ["draining"]

    run(meet)


def test_second_update_at_the_same_moment_is_refused() -> None:
    async def meet(bench: Bench) -> None:
        first, second = await asyncio.gather(
            bench.acts.apply(op("update", "1"), "by"),
            bench.acts.apply(op("update", "2"), "by"),
            return_exceptions=True,
        )
        assert first.result == "accepted"
        assert isinstance(second, Refused) and second.code == "in_update"
        assert [h.op_id for h in bench.handovers] == ["1"]

    run(meet)


def test_kill_between_an_updates_answer_and_its_restart_is_not_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent.acts, "ANSWER_FIRST_S", 0.01)

    async def meet(bench: Bench) -> None:
        updated = await bench.acts.apply(op("update", "1"), "by")
        killed = await bench.acts.apply(op("kill", "2"), "by")
        assert updated.then is not None and killed.then is not None
        updated.then()
        killed.then()
        await asyncio.sleep(0.05)
        assert bench.node._stop is not None and bench.node._stop.result()[0] == "control_op"
        assert not bench.node.replacing

    run(meet)


def test_kill_during_the_self_check_leaves_nothing_to_take_up() -> None:
    async def meet(bench: Bench) -> None:
        update = asyncio.create_task(bench.acts.apply(op("update", "1"), "by"))
        await asyncio.sleep(0.005)
        killed = await bench.acts.apply(op("kill", "2"), "by")
        assert killed.then is not None
        killed.then()
        with pytest.raises(Refused, match="leaving"):
            await update
        assert bench.handovers == []
        assert not bench.node.replacing

    run(meet)


def test_update_alone_replaces_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.acts, "ANSWER_FIRST_S", 0.0)

    async def alone(bench: Bench) -> None:
        updated = await bench.acts.apply(op("update", "1"), "by")
        assert updated.then is not None
        updated.then()
        assert bench.node._stop is not None and (await bench.node._stop)[0] == "update"
        assert bench.node.replacing

    run(alone)
