"""What strangers and broken members do to a listener: refused, counted, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncssh
import pytest

from discovery.errors import Refused, Unreachable
from discovery.identity import Identity
from discovery.links import Limits, Link
from discovery.links.frames import Kind, encode
from discovery.links.limits import Buckets, address_key
from discovery.links.ssh import key_of
from discovery.member import Addr
from tests.discovery.loopback import (
    CLIENT,
    METHODS,
    dial_as_client,
    linked,
    listening,
    until,
)


async def connect(addr: Addr) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*addr)


async def closed_by_other_side(reader: asyncio.StreamReader, within_s: float = 3.0) -> bytes:
    """What was sent before the connection was closed."""
    got = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(within_s):
            while data := await reader.read(65536):
                got += data
    return got


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no_newline": b"\x00" * 20_000,
    "bad_version": b"SSH-2.0-\xff\xfe\r\n",
    "huge_packet": b"SSH-2.0-x\r\n\xff\xff\xff\xff" + b"\0" * 64,
    "unfinished_packet": b"SSH-2.0-x\r\n" + bytes(range(256)) * 8,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_closed_and_counted_and_writes_no_traceback(
    kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        async with listening(limits=Limits(login_timeout_s=1)) as (listener, addr):
            reader, writer = await connect(addr)
            with contextlib.suppress(ConnectionError):
                writer.write(GARBAGE[kind])
                await writer.drain()
            await closed_by_other_side(reader)
            writer.close()
            await until(lambda: listener.waiting == 0)
            assert listener.counters["login_timeout" if kind == "unfinished_packet" else "not_ssh"] == 1
            link = await dial_as_client(addr)
            assert await link.call("echo", 1) == 1
            await link.close()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(run())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info]
    assert capfd.readouterr().err == ""


def test_connection_that_says_nothing_is_closed_at_the_login_timeout() -> None:
    async def run() -> None:
        async with listening(limits=Limits(login_timeout_s=0.2)) as (listener, addr):
            reader, writer = await connect(addr)
            began = time.monotonic()
            await closed_by_other_side(reader)
            assert 0.1 < time.monotonic() - began < 2
            assert listener.counters["login_timeout"] == 1 and listener.waiting == 0
            writer.close()

    asyncio.run(run())


def test_login_without_a_link_is_closed_at_the_login_timeout() -> None:
    async def run() -> None:
        async with listening(limits=Limits(login_timeout_s=0.3)) as (listener, addr):
            conn = await raw_login(addr)
            await asyncio.wait_for(conn.wait_closed(), 3)
            assert listener.counters["login_timeout"] == 1 and listener.waiting == 0

    asyncio.run(run())


def test_flood_of_half_open_connections_is_bounded_and_members_still_get_in() -> None:
    async def run() -> None:
        limits = Limits(max_unauthenticated=5, login_timeout_s=30)
        async with listening(limits=limits) as (listener, addr):
            silent = [await connect(addr) for _ in range(12)]
            await until(lambda: listener.counters["accepted"] == 12)
            assert listener.waiting == 5 and listener.counters["flood"] == 7
            with pytest.raises(Unreachable):
                await dial_as_client(addr)
            await asyncio.sleep(1.1)
            link = await dial_as_client(addr)  # the one that waited longest gave way
            assert await link.call("echo", 1) == 1
            assert listener.counters["flood"] == 9
            for _, writer in silent:
                writer.close()
            await until(lambda: listener.waiting == 0)
            await link.close()

    asyncio.run(run())


def test_links_beyond_the_limit_are_refused_as_busy() -> None:
    async def run() -> None:
        async with listening(limits=Limits(max_links=2)) as (listener, addr):
            links = [await dial_as_client(addr) for _ in range(2)]
            with pytest.raises(Refused) as why:
                await dial_as_client(addr)
            assert why.value.code == "busy" and listener.counters["links_full"] == 1
            await links[0].close()
            await until(lambda: len(listener.links) == 1)
            links.append(await dial_as_client(addr))
            assert await links[2].call("echo", 1) == 1
            for link in links:
                await link.close()

    asyncio.run(run())


def test_handshakes_beyond_the_rate_are_closed_at_accept() -> None:
    async def run() -> None:
        limits = Limits(loopback_handshakes_per_s=0.001, loopback_handshake_burst=3)
        async with listening(limits=limits) as (listener, addr):
            for _ in range(3):
                await (await dial_as_client(addr)).close()
            with pytest.raises(Unreachable):
                await dial_as_client(addr)
            assert listener.counters["rate"] == 1

    asyncio.run(run())


def test_bucket_of_one_address_leaves_others_alone_and_refills() -> None:
    buckets = Buckets(Limits(handshakes_per_s=10, handshake_burst=2))
    assert [buckets.take("a", False, 0.0) for _ in range(3)] == [True, True, False]
    assert buckets.take("b", False, 0.0)
    assert [buckets.take("a", False, 0.1), buckets.take("a", False, 0.1)] == [True, False]
    for i in range(Buckets.MAX_ADDRESSES + 10):
        buckets.take(str(i), False, 0.2)
    assert len(buckets._buckets) == Buckets.MAX_ADDRESSES


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("127.0.0.1", ("127.0.0.1", True)),
        ("::1", ("::1", True)),
        ("10.1.2.3", ("10.1.2.3", False)),
        ("::ffff:10.1.2.3", ("10.1.2.3", False)),
        ("2001:db8:1:2:3:4:5:6", ("2001:db8:1:2::/64", False)),
        ("fe80::1%eth0", ("fe80::/64", False)),
        ("nonsense", ("nonsense", False)),
    ],
)
def test_address_key_of_an_address_is_what_limits_go_by(host: str, key: tuple[str, bool]) -> None:
    assert address_key(host) == key


def test_client_that_offers_key_after_key_is_sent_away() -> None:
    async def run() -> None:
        async with listening(limits=Limits(max_offers=3)) as (listener, addr):
            keys = [key_of(Identity.from_seed(bytes([i]) * 32)) for i in range(6)]
            with pytest.raises((Refused, Unreachable)):
                await dial_as_client(addr, identity=[*keys, key_of(CLIENT)])
            assert listener.counters["too_many_keys"] == 1

    asyncio.run(run())


# --- members that break the rules of a link


async def raw_login(addr: Addr) -> asyncssh.SSHClientConnection:
    return await asyncssh.connect(
        addr[0],
        addr[1],
        config=None,
        known_hosts=None,
        client_keys=[key_of(CLIENT)],
        username="member",
        agent_path=None,
        kex_algs=["curve25519-sha256"],
        encryption_algs=["aes256-gcm@openssh.com"],
    )


async def raw_channel(addr: Addr) -> tuple[asyncssh.SSHClientConnection, Any, Any]:
    conn = await raw_login(addr)
    writer, reader, _ = await conn.open_session(subsystem="quarterdeck", encoding=None)
    return conn, writer, reader


def length(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


BROKEN = {
    "too_large": (b"\x7f\xff\xff\xff", "frame_too_large"),
    "not_msgpack": (length(b"\xc1\xc1\xc1"), "bad_frame"),
    "not_a_frame": (length(b"\x81\xa1a\x01"), "bad_frame"),
    "wrong_types": (length(b"\x92\xa1a\xa1b"), "bad_frame"),
    "nested": (length(b"\x94\x00\x01\xa4echo" + b"\x91" * 100_000 + b"\x01"), "bad_frame"),
    "credit_of_nonsense": (
        bytes(encode(Kind.STREAM, 1, "endless")) + bytes(encode(Kind.CREDIT, 1, body="x")),
        "bad_frame",
    ),
    "id_in_use": (bytes(encode(Kind.CALL, 1, "hang")) * 2, "bad_frame"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_link_that_breaks_the_rules_is_cut_off_and_others_live(kind: str) -> None:
    data, code = BROKEN[kind]

    async def run() -> None:
        async with listening({**METHODS, "hang": hang, "endless": endless}) as (listener, addr):
            good = await dial_as_client(addr)
            conn, writer, _ = await raw_channel(addr)
            writer.write(data)
            await asyncio.wait_for(conn.wait_closed(), 3)
            await until(lambda: len(listener.links) == 1)
            assert listener.counters[code] == 1
            assert await good.call("echo", 1) == 1
            await good.close()

    asyncio.run(run())


async def hang(link: Link, params: Any) -> Any:
    await asyncio.sleep(60)


async def endless(link: Link, params: Any) -> AsyncIterator[Any]:
    while True:
        yield b"x" * 1000


async def large(link: Link, params: Any) -> Any:
    return b"x" * 1_000_000


def test_answers_to_nobody_are_ignored() -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            conn, writer, reader = await raw_channel(addr)
            for kind in (Kind.RESULT, Kind.ERROR, Kind.ITEM, Kind.END, Kind.CREDIT, Kind.CANCEL):
                writer.write(bytes(encode(kind, 99, body="x")))
            writer.write(length(b"\x94\x63\x01\xa0\xc0"))  # a kind of frame from a later version
            writer.write(bytes(encode(Kind.CALL, 1, "echo", 5)))
            assert await asyncio.wait_for(reader.readexactly(4), 3)
            assert len(listener.links) == 1
            conn.close()

    asyncio.run(run())


def test_calls_beyond_the_limit_are_refused_as_busy() -> None:
    async def run() -> None:
        methods = {**METHODS, "hang": hang}
        async with linked(methods, limits=Limits(max_calls=3)) as (link, _, listener):
            hanging = [asyncio.create_task(link.call("hang")) for _ in range(3)]
            await asyncio.sleep(0.02)
            with pytest.raises(Refused) as why:
                await link.call("echo", 1)
            assert why.value.code == "busy" and listener.counters["calls_full"] == 1
            for call in hanging:
                call.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    asyncio.run(run())


def test_side_that_asks_and_does_not_read_is_cut_off() -> None:
    async def run() -> None:
        limits = Limits(max_unsent_bytes=300_000)
        async with listening({**METHODS, "large": large}, limits=limits) as (listener, addr):
            conn, writer, _ = await raw_channel(addr)
            writer.channel.pause_reading()
            call = 0
            with contextlib.suppress(OSError, asyncssh.Error):
                while not listener.counters["overrun"]:
                    call += 1
                    writer.write(
                        bytes(encode(Kind.CALL, call, "large" if call < 20 else "no_such_method" * 4))
                    )
                    await asyncio.sleep(0.001)
                    assert call < 20_000
            assert listener.counters["overrun"] == 1
            await until(lambda: not listener.links)
            conn.abort()

    asyncio.run(run())


def test_stream_that_sends_beyond_its_window_is_cut_off() -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            conn, writer, reader = await raw_channel(addr)
            await until(lambda: bool(listener.links))
            link = next(iter(listener.links))
            items = link.stream("flood")
            first = asyncio.create_task(anext(items))
            await reader.readexactly(4)
            for i in range(6):
                assert listener.counters["overrun"] == 0
                writer.write(bytes(encode(Kind.ITEM, 1, body=b"x" * 100_000)))
                if i == 0:
                    await first
            await until(lambda: listener.counters["overrun"] == 1)
            await until(lambda: link.closed)
            assert "window" in link.close_reason
            await asyncio.wait_for(conn.wait_closed(), 3)

    asyncio.run(run())
