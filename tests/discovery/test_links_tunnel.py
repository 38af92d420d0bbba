"""Tunnels inside links: bytes arrive whole and in order, nobody runs ahead of who reads, every end is noticed."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.errors import Refused, RemoteError, Unreachable
from discovery.links import Idle, Limits, Link, SocketStream, Tunnel, TunnelMethod, splice
from discovery.links.frames import BadFrame, Kind, encode
from tests.discovery.loopback import METHODS, SERVER, dial_as_client, linked, listening, until
from tests.discovery.test_links_abuse import raw_channel


async def echoing(link: Link, params: Any, tunnel: Tunnel) -> None:
    tunnel.accept(params)
    while data := await tunnel.read():
        await tunnel.write(data)


async def silent(link: Link, params: Any, tunnel: Tunnel) -> None:
    tunnel.accept()
    await asyncio.sleep(60)


TUNNELS = {**METHODS, "echoing": TunnelMethod(echoing), "silent": TunnelMethod(silent)}


async def read_all(tunnel: Tunnel) -> bytes:
    got = b""
    while data := await tunnel.read():
        got += data
    return got


# --- the two ends, on a wire that the test holds


class HeldWire:
    """Frames between two tunnel ends, delivered when the test says so."""

    def __init__(self, window: int) -> None:
        self.queues: tuple[deque[Any], deque[Any]] = (deque(), deque())
        self.ends = (
            Tunnel(1, lambda *f: self.queues[0].append(f), self.ready, served=False, window=window),
            Tunnel(1, lambda *f: self.queues[1].append(f), self.ready, served=True, window=window),
        )

    async def ready(self) -> None: ...

    def deliver(self, side: int) -> bool:
        """Hands the next frame that this side sent to the other one."""
        if not self.queues[side]:
            return False
        kind, _, body = self.queues[side].popleft()
        end = self.ends[1 - side]
        match kind:
            case Kind.RESULT:
                end.accepted = True
            case Kind.DATA | Kind.DATA_BACK:
                end.arrived(bytes(body))
            case Kind.GRANT | Kind.GRANT_BACK:
                end.granted(body)
            case Kind.SHUT | Kind.SHUT_BACK:
                end.ended(body)
        return True


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([1, 7, 4096, 2**18]),
    chunks=st.tuples(*[st.lists(st.integers(0, 100_000), max_size=6)] * 2),
    seed=st.integers(0, 2**32),
)
def test_tunnel_with_any_chunks_and_delays_carries_both_ways_within_the_window(
    window: int, chunks: tuple[list[int], list[int]], seed: int
) -> None:
    rng = random.Random(seed)
    if window < 4096:
        chunks = ([n % 60 for n in chunks[0]], [n % 60 for n in chunks[1]])
    words = [[rng.randbytes(n) for n in sizes] for sizes in chunks]
    got = [b"", b""]

    async def run() -> None:
        wire = HeldWire(window)
        wire.ends[0].offer()
        wire.ends[1].accept()

        async def write(side: int) -> None:
            for word in words[side]:
                await wire.ends[side].write(word)

        async def read(side: int) -> None:
            while data := await wire.ends[side].read():
                got[side] += data
                if rng.random() < 0.3:
                    await asyncio.sleep(0)

        writers = [asyncio.create_task(write(side)) for side in (0, 1)]
        readers = [asyncio.create_task(read(side)) for side in (0, 1)]
        while not all(w.done() for w in writers) or any(wire.queues) or any(e.unread for e in wire.ends):
            wire.deliver(rng.randrange(2))
            in_flight = [
                sum(len(f[2]) for f in q if f[0] in (Kind.DATA, Kind.DATA_BACK)) for q in wire.queues
            ]
            for side in (0, 1):
                assert in_flight[1 - side] + wire.ends[side].unread <= window
            await asyncio.sleep(0)
        wire.ends[rng.randrange(2)].close()
        while wire.deliver(0) or wire.deliver(1):
            pass
        await asyncio.gather(*writers, *readers)

    asyncio.run(run())
    assert got == [b"".join(words[1]), b"".join(words[0])]


def test_tunnel_closed_by_both_at_once_is_ended_by_one_word_of_each() -> None:
    async def run() -> None:
        wire = HeldWire(100)
        wire.ends[0].offer()
        wire.ends[1].accept()
        for end in wire.ends:
            end.close()
            end.close()
        assert [sum(f[0] in (Kind.SHUT, Kind.SHUT_BACK) for f in q) for q in wire.queues] == [1, 1]
        while wire.deliver(0) or wire.deliver(1):
            pass
        assert not any(wire.queues)
        assert await wire.ends[0].read() == b"" and await wire.ends[1].read() == b""

    asyncio.run(run())


def test_data_beyond_the_window_is_a_bad_frame_though_it_was_discarded() -> None:
    async def run() -> None:
        end = Tunnel(1, lambda *f: None, HeldWire(1).ready, served=True, window=10)
        end.accept()
        end.close()
        end.arrived(b"x" * 10)
        assert end.unread == 0
        with pytest.raises(BadFrame):
            end.arrived(b"x")

    asyncio.run(run())


# --- over real links


def test_tunnel_carries_much_both_ways_while_calls_are_answered() -> None:
    async def run() -> None:
        async with linked(TUNNELS) as (link, _, _):
            tunnel = await link.tunnel("echoing", {"k": 1})
            assert tunnel.answer == {"k": 1} and link.in_use
            sent = random.Random(1).randbytes(3_000_000)

            async def write() -> None:
                await tunnel.write(sent)

            writing = asyncio.create_task(write())
            got = b""
            while len(got) < len(sent):
                got += await tunnel.read()
                if len(got) < 1_000_000:
                    assert await link.call("echo", 5, 1.0) == 5
            await writing
            assert got == sent
            tunnel.close()
            assert not link.in_use
            await until(lambda: not link._asked)

    asyncio.run(run())


def test_several_tunnels_of_one_link_do_not_mix() -> None:
    async def run() -> None:
        async with linked(TUNNELS, TUNNELS) as (link, accepted, _):
            ends = [await side.tunnel("echoing") for side in (link, accepted) for _ in range(5)]
            for i, tunnel in enumerate(ends):
                await tunnel.write(b"%d" % i)
            assert [await tunnel.read() for tunnel in ends] == [b"%d" % i for i in range(10)]

    asyncio.run(run())


def test_close_by_the_asker_is_read_as_the_end_after_what_was_sent() -> None:
    heard: list[bytes] = []

    async def listen(link: Link, params: Any, tunnel: Tunnel) -> None:
        tunnel.accept()
        await asyncio.sleep(0.05)
        heard.append(await read_all(tunnel))
        with pytest.raises(Unreachable):
            await tunnel.write(b"too late")
        heard.append(b"end")

    async def run() -> None:
        async with linked({"listen": TunnelMethod(listen)}) as (link, accepted, _):
            tunnel = await link.tunnel("listen")
            await tunnel.write(b"x" * 70_000)
            tunnel.close()
            assert await tunnel.read() == b""
            with pytest.raises(Unreachable):
                await tunnel.write(b"more")
            await until(lambda: heard == [b"x" * 70_000, b"end"])
            await until(lambda: not accepted.in_use and not accepted._granted)

    asyncio.run(run())


def test_close_by_the_server_is_read_as_the_end_after_what_was_sent() -> None:
    async def say(link: Link, params: Any, tunnel: Tunnel) -> None:
        tunnel.accept()
        await tunnel.write(b"all")
        if params:
            raise Refused("no_more", "that was all")

    async def run() -> None:
        async with linked({"say": TunnelMethod(say)}) as (link, accepted, _):
            tunnel = await link.tunnel("say")
            assert await read_all(tunnel) == b"all" and tunnel.closed
            tunnel = await link.tunnel("say", True)
            assert await tunnel.read() == b"all"
            with pytest.raises(Refused) as why:
                await tunnel.read()
            assert why.value.code == "no_more"
            await until(lambda: not link._asked and not accepted._granted)

    asyncio.run(run())


def test_data_on_its_way_when_the_tunnel_closes_here_is_no_fault() -> None:
    async def pour(link: Link, params: Any, tunnel: Tunnel) -> None:
        tunnel.accept()
        while True:
            await tunnel.write(b"x" * 10_000)

    async def run() -> None:
        async with linked({**METHODS, "pour": TunnelMethod(pour)}) as (link, accepted, listener):
            for _ in range(5):
                tunnel = await link.tunnel("pour")
                await tunnel.read()
                tunnel.close()
            await until(lambda: not link._asked and not accepted.in_use)
            assert await link.call("echo", 1) == 1
            assert not link.counters and listener.counters["bad_frame"] == 0

    asyncio.run(run())


def test_tunnel_that_nobody_reads_holds_one_window_and_holds_up_nobody() -> None:
    async def run() -> None:
        async with linked(TUNNELS) as (link, accepted, _):
            tunnel = await link.tunnel("silent")
            sent = 0

            async def pour() -> None:
                nonlocal sent
                while True:
                    await tunnel.write(b"x" * 1000)
                    sent += 1000

            pouring = asyncio.create_task(pour())
            window = Limits().stream_window_bytes
            await until(lambda: sent >= window - 1000)
            assert await link.call("echo", 1) == 1
            other = await link.tunnel("echoing")
            await other.write(b"y")
            assert await other.read() == b"y"
            (silent_end, _) = accepted._granted.values()
            assert sent <= window and silent_end.unread == window
            pouring.cancel()
            await asyncio.gather(pouring, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("lost_at", ["dialled", "accepted"])
def test_link_lost_ends_its_tunnels_as_unreachable_and_cancels_who_serves(lost_at: str) -> None:
    ended: list[str] = []

    async def serve(link: Link, params: Any, tunnel: Tunnel) -> None:
        tunnel.accept()
        try:
            await tunnel.read()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def run() -> None:
        async with linked({"serve": TunnelMethod(serve)}) as (link, accepted, _):
            tunnel = await link.tunnel("serve")
            reading = asyncio.create_task(tunnel.read())
            await asyncio.sleep(0)
            (link if lost_at == "dialled" else accepted).abort()
            with pytest.raises(Unreachable):
                await asyncio.wait_for(reading, 3)
            with pytest.raises(Unreachable):
                await tunnel.write(b"x")
            await until(lambda: ended == ["cancelled"])
            with pytest.raises(Unreachable):
                await link.tunnel("serve")

    asyncio.run(run())


def test_tunnel_that_is_refused_says_why() -> None:
    async def no(link: Link, params: Any, tunnel: Tunnel) -> None:
        raise Refused("not_you", "somebody else perhaps")

    async def defect(link: Link, params: Any, tunnel: Tunnel) -> None:
        raise ZeroDivisionError

    async def goes(link: Link, params: Any, tunnel: Tunnel) -> None: ...

    methods = {**TUNNELS, "no": TunnelMethod(no), "defect": TunnelMethod(defect), "goes": TunnelMethod(goes)}

    async def run() -> None:
        async with linked(methods) as (link, accepted, listener):
            for method, code in (("no", "not_you"), ("nothing", "unknown_method"), ("echo", "wrong_kind")):
                with pytest.raises(Refused) as why:
                    await link.tunnel(method)
                assert why.value.code == code
            with pytest.raises(Refused) as why:
                await link.call("echoing")
            assert why.value.code == "wrong_kind"
            for method in ("defect", "goes"):
                with pytest.raises(RemoteError):
                    await link.tunnel(method)
            assert listener.counters["handler_error"] == 1
            await until(lambda: not link._asked and not accepted._granted and not link.in_use)

    asyncio.run(run())


def test_tunnel_that_is_not_accepted_in_time_is_given_up_at_both_ends() -> None:
    ended: list[str] = []

    async def ponder(link: Link, params: Any, tunnel: Tunnel) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def run() -> None:
        async with linked({"ponder": TunnelMethod(ponder)}) as (link, accepted, _):
            with pytest.raises(Unreachable, match="ponder"):
                await link.tunnel("ponder", timeout_s=0.05)
            await until(lambda: ended == ["cancelled"])
            await until(lambda: not link._asked and not accepted._granted and not accepted.in_use)

    asyncio.run(run())


# --- members that break the rules

OPEN = bytes(encode(Kind.TUNNEL, 1, "echoing"))
BROKEN = {
    "data_for_no_tunnel": (bytes(encode(Kind.DATA, 9, body=b"x")), "bad_frame"),
    "data_back_for_no_tunnel": (bytes(encode(Kind.DATA_BACK, 9, body=b"x")), "bad_frame"),
    "data_of_text": (OPEN + bytes(encode(Kind.DATA, 1, body="text")), "bad_frame"),
    "data_of_nothing": (OPEN + bytes(encode(Kind.DATA, 1, body=b"")), "bad_frame"),
    "data_before_it_is_open": (OPEN + bytes(encode(Kind.DATA, 1, body=b"x")), "bad_frame"),
    "data_after_the_end": (
        OPEN + bytes(encode(Kind.SHUT, 1)) + bytes(encode(Kind.DATA, 1, body=b"x")),
        "bad_frame",
    ),
    "grant_of_text": (OPEN + bytes(encode(Kind.GRANT, 1, body="x")), "bad_frame"),
    "grant_of_less": (OPEN + bytes(encode(Kind.GRANT, 1, body=-1)), "bad_frame"),
    "grant_of_too_much": (OPEN + bytes(encode(Kind.GRANT, 1, body=2**32)) * 2, "bad_frame"),
    "id_in_use": (OPEN + OPEN, "bad_frame"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_link_that_breaks_the_rules_of_tunnels_is_cut_off_and_others_live(kind: str) -> None:
    data, code = BROKEN[kind]

    async def run() -> None:
        async with listening(TUNNELS) as (listener, addr):
            good = await dial_as_client(addr)
            conn, writer, _ = await raw_channel(addr)
            writer.write(data)
            await asyncio.wait_for(conn.wait_closed(), 3)
            await until(lambda: len(listener.links) == 1)
            assert listener.counters[code] == 1
            tunnel = await good.tunnel("echoing")
            await tunnel.write(b"x")
            assert await tunnel.read() == b"x"
            await good.close()

    asyncio.run(run())


def test_side_that_sends_beyond_its_window_is_cut_off() -> None:
    async def run() -> None:
        async with listening(TUNNELS, limits=Limits(stream_window_bytes=50_000)) as (listener, addr):
            conn, writer, reader = await raw_channel(addr)
            writer.write(bytes(encode(Kind.TUNNEL, 1, "silent")))
            assert await reader.readexactly(4)
            (link,) = listener.links
            await until(lambda: link._granted[1].accepted)
            writer.write(bytes(encode(Kind.DATA, 1, body=b"x" * 50_000)))
            await until(lambda: link._granted[1].unread == 50_000)
            writer.write(bytes(encode(Kind.DATA, 1, body=b"x")))
            await until(lambda: listener.counters["overrun"] == 1 and link.closed)
            await asyncio.wait_for(conn.wait_closed(), 3)

    asyncio.run(run())


def test_asker_that_never_ends_what_was_refused_is_refused_as_busy() -> None:
    async def no(link: Link, params: Any, tunnel: Tunnel) -> None:
        raise Refused("no", "no")

    async def run() -> None:
        limits = Limits(max_calls=4)
        async with listening({**METHODS, "no": TunnelMethod(no)}, limits=limits) as (listener, addr):
            conn, writer, _ = await raw_channel(addr)
            for call in range(1, 30):
                writer.write(bytes(encode(Kind.TUNNEL, call, "no")))
                await asyncio.sleep(0)
            await until(lambda: listener.counters["calls_full"] == 25)
            (link,) = listener.links
            assert len(link._granted) == 4
            conn.abort()

    asyncio.run(run())


def test_words_about_no_tunnel_that_cost_nothing_are_ignored() -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            conn, writer, reader = await raw_channel(addr)
            for kind in (Kind.GRANT, Kind.GRANT_BACK, Kind.SHUT, Kind.SHUT_BACK):
                writer.write(bytes(encode(kind, 99, body=7)))
            writer.write(bytes(encode(Kind.CALL, 1, "echo", 5)))
            assert await asyncio.wait_for(reader.readexactly(4), 3)
            assert len(listener.links) == 1
            conn.abort()

    asyncio.run(run())


# --- splicing


def test_splice_carries_between_sockets_until_one_ends_and_closes_the_other() -> None:
    async def run() -> None:
        (a, here), (there, b) = socket.socketpair(), socket.socketpair()
        a.setblocking(False)
        b.setblocking(False)
        loop = asyncio.get_running_loop()
        carried: list[int] = []
        splicing = asyncio.create_task(
            splice(SocketStream(here), SocketStream(there, first=b"hello "), carried=carried.append)
        )
        await loop.sock_sendall(b, b"world")
        assert await loop.sock_recv(a, 6) + await loop.sock_recv(a, 100) == b"hello world"
        await loop.sock_sendall(a, b"and back")
        a.close()
        assert await loop.sock_recv(b, 100) == b"and back"
        assert await loop.sock_recv(b, 100) == b""
        await asyncio.wait_for(splicing, 3)
        assert sum(carried) == 19
        b.close()

    asyncio.run(run())


def test_splice_without_a_byte_for_too_long_is_idle_and_closed() -> None:
    async def run() -> None:
        (a, here), (there, b) = socket.socketpair(), socket.socketpair()
        a.setblocking(False)
        loop = asyncio.get_running_loop()
        splicing = asyncio.create_task(splice(SocketStream(here), SocketStream(there), idle_s=0.15))
        for _ in range(3):
            await asyncio.sleep(0.08)
            await loop.sock_sendall(a, b"x")
            assert not splicing.done()
        with pytest.raises(Idle):
            await asyncio.wait_for(splicing, 3)
        assert await loop.sock_recv(a, 10) == b""
        b.setblocking(False)
        assert b.recv(10) == b"xxx" and b.recv(10) == b""
        a.close()
        b.close()

    asyncio.run(run())


def test_splice_with_a_rate_takes_the_time_that_it_asks_for() -> None:
    async def run() -> None:
        (a, here), (there, b) = socket.socketpair(), socket.socketpair()
        a.setblocking(False)
        b.setblocking(False)
        loop = asyncio.get_running_loop()
        splicing = asyncio.create_task(splice(SocketStream(here), SocketStream(there), bytes_per_s=1_000_000))
        began = time.monotonic()
        sending = asyncio.create_task(loop.sock_sendall(a, bytes(400_000)))
        got = 0
        while got < 400_000:
            got += len(await loop.sock_recv(b, 65536))
        assert 0.25 < time.monotonic() - began < 5
        await sending
        a.close()
        await splicing
        b.close()

    asyncio.run(run())


# --- connections that come by other ways


def test_connection_handed_to_a_listener_is_a_link_like_any_other() -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            ours, theirs = socket.socketpair()
            assert listener.take(theirs, ("192.0.2.7", 1234)) is None
            link = await dial_as_client(addr, sock=ours)
            assert link.login.pub == SERVER.pub
            assert await link.call("echo", 1) == 1
            (accepted,) = listener.links
            assert accepted.addr == ("192.0.2.7", 1234)
            await link.close()
            await until(lambda: not listener.links)

    asyncio.run(run())


def test_connection_handed_to_a_listener_falls_under_its_limits() -> None:
    async def run() -> None:
        limits = Limits(max_unauthenticated_per_addr=2, login_timeout_s=0.2)
        async with listening(limits=limits) as (listener, _):
            pairs = [socket.socketpair() for _ in range(3)]
            assert [listener.take(theirs, ("192.0.2.7", 1)) for _, theirs in pairs] == [None, None, "flood"]
            await until(lambda: listener.counters["login_timeout"] == 2)
            for ours, _ in pairs:
                ours.close()
        late, other = socket.socketpair()
        assert listener.take(late, ("192.0.2.7", 1)) == "closing"
        assert other.recv(1) == b""
        other.close()

    asyncio.run(run())
