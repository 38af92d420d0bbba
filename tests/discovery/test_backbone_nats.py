"""The backbone on a real NATS server: summaries and leases, and values of strangers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from discovery.backbone.buckets import Stored
from discovery.backbone.nats import CLOCK, LEASE_TTL_S, Held, _age_s, _Box
from discovery.summary import SignedSummary
from tests.discovery.nats_nodes import (
    FOREIGN_KEY,
    KEY,
    Node,
    key_of,
    nodes,
    raw,
    summary,
    timed,
    until,
    until_true,
)
from tests.nats_server import NatsServer, needs_nats_server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for the tests that do it no harm; each uses meshes of its own."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


# Summaries


@needs_nats_server
@pytest.mark.parametrize("urgent", [False, True])
def test_summary_published_is_seen_by_the_other_mesh_within_100_ms(shared: NatsServer, urgent: bool) -> None:
    async def run() -> None:
        alpha, beta = Node(shared.url, "alpha"), Node(shared.url, "beta", 2)
        async with nodes(alpha, beta):
            for sender, receiver in ((alpha, beta), (beta, alpha)):
                took_s = []
                for attempt in range(3):  # the best of three: the machine may be busy
                    text = f"{sender.backbone.mesh} {urgent} {attempt}"
                    began = time.monotonic()
                    assert await sender.backbone.publish(summary(text), urgent)
                    await until(lambda: receiver.has_heard(text))  # noqa: B023
                    ((age_s, at),) = [(age, at) for heard, age, at in receiver.heard if heard == text]
                    assert age_s == 0.0 and not sender.has_heard(text)
                    took_s.append(at - began)
                assert min(took_s) < 0.1

    asyncio.run(run())


@needs_nats_server
def test_summary_found_on_connecting_has_its_age_by_the_servers_clock(
    shared: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        early, late = Node(shared.url, "gamma"), Node(shared.url, "delta", 2)
        async with nodes(early):
            assert await early.backbone.publish(summary("aged"))
            stored_at = time.monotonic()
            await asyncio.sleep(0.5)
            wall = time.time
            monkeypatch.setattr(time, "time", lambda: wall() + 3600)
            async with nodes(late):
                await until(lambda: late.has_heard("aged"))
                _, age_s, at = next(item for item in late.heard if item[0] == "aged")
                assert abs(age_s - (at - stored_at)) < 0.2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("stored", "clock", "age_s"),
    [
        (Stored("m", b"v", 3, 90.0), Stored(CLOCK, b"", 5, 100.0), 10.0),
        (Stored("m", b"v", 3, 100.0), Stored(CLOCK, b"", 5, 100.0), 0.0),
        (Stored("m", b"v", 6, 90.0), Stored(CLOCK, b"", 5, 100.0), 0.0),
        (Stored("m", b"v", 3, 3700.0), Stored(CLOCK, b"", 5, 100.0), None),
        (Stored("m", b"v", 3, 90.0), None, None),
    ],
    ids=["older", "same moment", "stored after the clock", "from the future", "no clock"],
)
def test_age_of_what_was_found(stored: Stored, clock: Stored | None, age_s: float | None) -> None:
    assert _age_s(stored, clock) == age_s


@needs_nats_server
def test_values_that_do_not_open_are_dropped_and_counted(shared: NatsServer) -> None:
    async def run() -> None:
        epsilon = key_of("epsilon")
        node, foreign = Node(shared.url, "epsilon"), Node(shared.url, "zeta", 2, key=FOREIGN_KEY)
        async with nodes(node, foreign), raw(shared) as stranger:
            before = node.backbone.counters["forged"]
            assert await foreign.backbone.publish(summary("foreign"), urgent=True)
            await stranger.publish(f"$KV.qd-summaries.{epsilon}", b"garbage")
            await stranger.publish(f"qd.summary.{epsilon}", b"\x01" + os.urandom(200))
            await stranger.publish("qd.summary.NOT-a-mesh", b"\x01" + os.urandom(200))
            elsewhere = _Box(KEY).seal(b"summary", key_of("eta"), b"for another mesh")
            await stranger.publish(f"qd.summary.{epsilon}", elsewhere)
            nonsense = _Box(KEY).seal(b"summary", epsilon, b"sealed nonsense")
            await stranger.publish(f"qd.summary.{epsilon}", nonsense)
            await until(lambda: node.backbone.counters["malformed"] == 1)
            await until(lambda: node.backbone.counters["forged"] == before + 6)  # a foreign one by both ways
            assert not node.heard or not node.has_heard("foreign")
            assert node.backbone.up

    asyncio.run(run())


@needs_nats_server
def test_callback_that_raises_is_reported_and_ends_nothing(shared: NatsServer) -> None:
    def broken(signed: SignedSummary, age_s: float) -> None:
        raise ZeroDivisionError(signed.blob.decode())

    async def run() -> None:
        reported: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: reported.append(str(context["exception"]))
        )
        sender, receiver = Node(shared.url, "theta"), Node(shared.url, "iota", 2, on_summary=broken)
        async with nodes(sender, receiver):
            for text in ("first", "second"):
                assert await sender.backbone.publish(summary(text))
                await until(lambda: text in reported)  # noqa: B023

    asyncio.run(run())


# Leases


@needs_nats_server
def test_lease_held_excludes_another_and_is_renewed_by_its_holder(shared: NatsServer) -> None:
    async def run() -> None:
        first, second = Node(shared.url, "lease-a", 2**64 - 1), Node(shared.url, "lease-a", 2)
        async with nodes(first, second):
            assert await first.backbone.hold(7)
            assert not await second.backbone.hold(7)
            assert not await second.backbone.hold(8)
            assert await first.backbone.hold(7)
            assert second.backbone.held == Held(2**64 - 1, 7)

    asyncio.run(run())


@needs_nats_server
def test_lease_not_renewed_is_free_after_its_ttl_and_not_before(shared: NatsServer) -> None:
    async def run() -> None:
        first, second = Node(shared.url, "lease-b", 1), Node(shared.url, "lease-b", 2)
        async with nodes(second):
            async with nodes(first):
                assert await first.backbone.hold(1)
                held_at = time.monotonic()
            await until_true(lambda: second.backbone.hold(2), LEASE_TTL_S + 1)
            assert time.monotonic() - held_at > LEASE_TTL_S - 0.1

    asyncio.run(run())


@needs_nats_server
def test_lease_of_a_holder_known_to_be_gone_is_taken_at_once_by_a_higher_epoch(shared: NatsServer) -> None:
    async def run() -> None:
        asked: list[tuple[int, int]] = []

        def gone(holder: int, epoch: int) -> bool:
            asked.append((holder, epoch))
            return True

        first, second = Node(shared.url, "lease-c", 1), Node(shared.url, "lease-c", 2, may_take=gone)
        async with nodes(first, second):
            assert await first.backbone.hold(5)
            assert not await second.backbone.hold(5) and asked == []
            won, took_s = await timed(second.backbone.hold(6))
            assert won and took_s < 1.0 and asked == [(1, 5)]
            assert not await first.backbone.hold(5)
            assert first.backbone.held == Held(2, 6)

    asyncio.run(run())


@needs_nats_server
@pytest.mark.parametrize("vacant", [True, False])
def test_lease_raced_for_is_won_by_exactly_one(shared: NatsServer, vacant: bool) -> None:
    async def run() -> None:
        racers = [Node(shared.url, "lease-d", me, may_take=lambda *_: True) for me in (1, 2, 3)]
        async with nodes(*racers):
            for epoch in range(100 + 100 * vacant, 120 + 100 * vacant):
                won = await asyncio.gather(*(node.backbone.hold(epoch) for node in racers))
                assert sum(won) == 1
                if vacant:
                    assert await racers[won.index(True)].backbone.release()

    asyncio.run(run())


@needs_nats_server
def test_lease_released_is_free_at_once_and_only_by_its_holder(shared: NatsServer) -> None:
    async def run() -> None:
        first, second = Node(shared.url, "lease-e", 1), Node(shared.url, "lease-e", 2)
        async with nodes(first, second):
            assert await first.backbone.hold(1)
            assert not await second.backbone.release()
            assert await first.backbone.release()
            won, took_s = await timed(second.backbone.hold(2))
            assert won and took_s < 1.0
            assert not await first.backbone.release()
            assert await second.backbone.hold(2)

    asyncio.run(run())


@needs_nats_server
def test_lease_that_does_not_open_keeps_nobody_out(shared: NatsServer) -> None:
    async def run() -> None:
        node = Node(shared.url, "lease-f")
        async with nodes(node), raw(shared) as stranger:
            await stranger.publish(f"$KV.qd-leases.{key_of('lease-f')}", b"garbage")
            await stranger.flush()
            assert await node.backbone.hold(1)
            assert node.backbone.counters["forged"] >= 1

    asyncio.run(run())


@needs_nats_server
def test_meshes_of_one_name_and_two_keys_do_not_keep_each_other_from_publishing(shared: NatsServer) -> None:
    async def run() -> None:
        ours, theirs = Node(shared.url, "lease-h", 1), Node(shared.url, "lease-h", 2, mesh_pub=b"q" * 32)
        follower = Node(shared.url, "lease-i", 3)
        async with nodes(ours, theirs):
            assert await theirs.backbone.hold(4_000_000)
            assert await ours.backbone.hold(1)
            assert await ours.backbone.publish(summary("true"))
            assert await theirs.backbone.publish(summary("false"))
            async with nodes(follower):  # finds both, whoever was the last to publish
                await until(lambda: follower.has_heard("true") and follower.has_heard("false"))

    asyncio.run(run())


@needs_nats_server
def test_node_that_starts_again_holds_the_lease_it_had(shared: NatsServer) -> None:
    async def run() -> None:
        for epoch in (1, 2):
            node = Node(shared.url, "lease-g", 9)
            async with nodes(node):
                assert await node.backbone.hold(epoch)

    asyncio.run(run())
