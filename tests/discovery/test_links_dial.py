"""Dialling: who is met, who is let in, and what it is called when neither works."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from discovery.errors import LocalError, Refused, RemoteError, Unreachable
from discovery.links import Login, dial
from tests.discovery.loopback import (
    CLIENT,
    SERVER,
    STRANGER,
    bound,
    dial_as_client,
    listening,
    until,
)


def test_dial_where_another_key_answers_is_refused_by_name() -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            with pytest.raises(Refused) as why:
                await dial_as_client(addr, expect_pub=STRANGER.pub)
            assert why.value.code == "host_key"
            assert not listener.links and listener.counters["links"] == 0

    asyncio.run(run())


def test_dial_without_a_pin_says_whose_key_it_met() -> None:
    async def run() -> None:
        async with listening() as (_, addr):
            link = await dial_as_client(addr, expect_pub=None)
            assert link.login.pub == SERVER.pub
            await link.close()

    asyncio.run(run())


def test_dial_with_a_key_that_may_not_enter_is_refused_and_told() -> None:
    refused: list[tuple[str, str | None]] = []

    async def run() -> None:
        async with listening(on_refused=lambda code, addr, shown: refused.append((code, shown))) as (
            listener,
            addr,
        ):
            with pytest.raises(Refused) as why:
                await dial_as_client(addr, identity=STRANGER)
            assert why.value.code == "login"
            await until(lambda: bool(refused))
            assert listener.counters["login"] == 1

    asyncio.run(run())
    code, shown = refused[0]
    assert code == "login" and shown is not None and shown.startswith("SHA256:")


def test_dial_where_the_authoriser_fails_is_refused() -> None:
    def broken(key_line: str, username: str, addr: Any) -> Login | None:
        raise RuntimeError("no such file")

    async def run() -> None:
        async with listening(authorise=broken) as (listener, addr):
            with pytest.raises(Refused):
                await dial_as_client(addr)
            assert listener.counters["handler_error"] >= 1

    asyncio.run(run())


def test_dial_of_a_closed_port_is_unreachable_at_once() -> None:
    async def run() -> None:
        sock = bound()
        addr = sock.getsockname()
        sock.close()
        began = time.monotonic()
        with pytest.raises(Unreachable, match="refused"):
            await dial_as_client(addr)
        assert time.monotonic() - began < 1

    asyncio.run(run())


def test_dial_of_one_who_says_nothing_gives_up_in_time() -> None:
    async def run() -> None:
        silent = bound()
        silent.listen()
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer within"):
            await dial_as_client(silent.getsockname(), timeout_s=0.2)
        assert 0.15 < time.monotonic() - began < 2
        silent.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "greeting",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 600, b"SSH-1.5-old\r\n", b"SSH-2.0-x\r\n" + b"\xff" * 99],
)
def test_dial_of_something_else_is_an_error_of_theirs(greeting: bytes) -> None:
    async def run() -> None:
        done = asyncio.Event()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(greeting)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
                await reader.read()
                writer.close()
                await writer.wait_closed()
            done.set()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        with pytest.raises((RemoteError, Unreachable)):
            await dial_as_client(server.sockets[0].getsockname(), timeout_s=3)
        server.close()
        await asyncio.wait_for(done.wait(), 3)

    asyncio.run(run())


def test_dial_with_no_key_at_all_is_a_local_error() -> None:
    with pytest.raises(LocalError):
        asyncio.run(dial(("127.0.0.1", 1), identity=[], username="op", expect_pub=None))


def test_dial_tries_every_key_it_was_given() -> None:
    from discovery.links.ssh import key_of

    async def run() -> None:
        async with listening() as (listener, addr):
            link = await dial_as_client(addr, identity=[key_of(STRANGER), key_of(CLIENT)])
            assert await link.call("echo", 1) == 1
            assert next(iter(listener.links)).login.pub == CLIENT.pub
            await link.close()

    asyncio.run(run())


def test_dial_of_a_name_tries_its_addresses_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    async def run() -> None:
        async with listening() as (_, addr):
            nobody = bound()  # bound and not listening: refuses
            answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", a) for a in (nobody.getsockname(), addr)]

            async def resolve(*args: Any, **kwargs: Any) -> Any:
                return answers

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
            link = await dial_as_client(("a-name", addr[1]))
            assert await link.call("echo", 1) == 1
            await link.close()
            answers.clear()
            with pytest.raises(Unreachable):
                await dial_as_client(("a-name", addr[1]))
            nobody.close()

    asyncio.run(run())


def test_dial_uses_a_socket_that_is_connected_already() -> None:
    import socket

    async def run() -> None:
        async with listening() as (_, addr):
            link = await dial_as_client(addr, sock=socket.create_connection(addr))
            assert await link.call("echo", 1) == 1
            await link.close()

    asyncio.run(run())
