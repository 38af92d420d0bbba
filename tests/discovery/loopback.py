"""A listener and those who dial it, on loopback, for the tests of links."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from discovery.identity import Identity, node_id, raw_ed25519
from discovery.links import Handler, Limits, Link, Listener, Login, dial
from discovery.member import Addr

SERVER = Identity.from_seed(b"s" * 32)
CLIENT = Identity.from_seed(b"c" * 32)
STRANGER = Identity.from_seed(b"x" * 32)


def admit_client(key_line: str, username: str, addr: Addr) -> Login | None:
    """Lets CLIENT in as a member, and nobody else."""
    if key_line != CLIENT.pub_openssh():
        return None
    pub = raw_ed25519(base64.b64decode(key_line.split()[1]))
    assert pub is not None
    return Login("member", node_id(pub), pub, f"as {username}", None, key_line)


async def echo(link: Link, params: Any) -> Any:
    return params


async def count(link: Link, params: Any) -> AsyncIterator[Any]:
    for i in range(params):
        yield i


METHODS: Mapping[str, Handler] = {"echo": echo, "count": count}


def bound() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


@contextlib.asynccontextmanager
async def listening(
    methods: Mapping[str, Handler] = METHODS,
    *,
    authorise: Callable[[str, str, Addr], Login | None] = admit_client,
    limits: Limits | None = None,
    on_link: Callable[[Link], None] | None = None,
    on_refused: Callable[[str, Addr, str | None], None] | None = None,
) -> AsyncIterator[tuple[Listener, Addr]]:
    sock = bound()
    addr = sock.getsockname()
    listener = await Listener.start(
        sock,
        host_key=SERVER,
        authorise=authorise,
        methods=methods,
        on_link=on_link,
        on_refused=on_refused,
        limits=limits,
    )
    try:
        yield listener, addr
    finally:
        await listener.close()


async def dial_as_client(addr: Addr, methods: Mapping[str, Handler] = METHODS, **more: Any) -> Link:
    return await dial(
        addr,
        **{
            "identity": CLIENT,
            "username": "member",
            "expect_pub": SERVER.pub,
            "methods": methods,
            **more,
        },
    )


@contextlib.asynccontextmanager
async def linked(
    methods: Mapping[str, Handler] = METHODS,
    ours: Mapping[str, Handler] = METHODS,
    limits: Limits | None = None,
    **more: Any,
) -> AsyncIterator[tuple[Link, Link, Listener]]:
    """Both ends of one link: the dialled one, the accepted one; and the listener."""
    async with listening(methods, limits=limits) as (listener, addr):
        link = await dial_as_client(addr, ours, **more)
        await until(lambda: bool(listener.links))
        try:
            yield link, next(iter(listener.links)), listener
        finally:
            await link.close()


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.002)
