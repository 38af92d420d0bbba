"""mDNS on loopback: two nodes see each other, strangers' announcements do no harm, problems are told."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import Any

import pytest

from discovery import mdns
from discovery.mdns import Mdns, plan, usable
from discovery.member import Addr
from tests.discovery.loopback import until

GROUP, PORT = "224.0.0.251", 5353
LOOPBACK = "127.0.0.1"
A, B = 0x0A00_0000_0000_0001, 0x0B00_0000_0000_0002


def multicast_on_loopback() -> bool:
    """Whether a datagram to the mDNS group comes back on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            member = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(LOOPBACK))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
            sock.bind(("", 0))
            sock.settimeout(1)
            sock.sendto(b"there?", (GROUP, sock.getsockname()[1]))
            return sock.recv(16) == b"there?"
        except OSError:
            return False


needs_multicast = pytest.mark.skipif(not multicast_on_loopback(), reason="no multicast on loopback here")


def node(node_id: int, mesh: str, port: int, found: list[Any], problems: list[str]) -> Mdns:
    return Mdns(
        mesh=mesh,
        node=node_id,
        addrs=[(LOOPBACK, port)],
        on_found=lambda *seen: found.append(seen),
        on_problem=problems.append,
    )


@needs_multicast
def test_two_nodes_on_loopback_find_each_other_and_follow_their_addresses() -> None:
    async def run() -> None:
        a_found: list[Any] = []
        b_found: list[Any] = []
        problems: list[str] = []
        a, b = node(A, "alpha", 4001, a_found, problems), node(B, "beta", 4002, b_found, problems)
        starting = asyncio.gather(a.start(), b.start())
        await until(lambda: bool(a_found and b_found))
        await starting
        await b.update([(LOOPBACK, 4003)])
        await until(lambda: len(a_found) == 2)
        began = time.monotonic()
        await asyncio.gather(a.close(), b.close())
        assert time.monotonic() - began < 1
        assert a_found == [("beta", B, [(LOOPBACK, 4002)]), ("beta", B, [(LOOPBACK, 4003)])]
        assert b_found == [("alpha", A, [(LOOPBACK, 4001)])]
        assert problems == []

    asyncio.run(run())


def test_start_where_it_cannot_work_tells_a_problem_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_sockets(*args: Any, **kwargs: Any) -> Any:
        raise OSError(19, "No such device")

    async def run() -> list[str]:
        problems: list[str] = []
        import zeroconf.asyncio

        monkeypatch.setattr(zeroconf.asyncio, "AsyncZeroconf", no_sockets)
        quiet = node(A, "alpha", 4001, [], problems)
        await quiet.start()
        await quiet.update([(LOOPBACK, 4002)])
        await quiet.close()
        return problems

    problems = asyncio.run(run())
    assert len(problems) == 1 and "No such device" in problems[0]


def test_close_before_start_is_nothing() -> None:
    asyncio.run(node(A, "alpha", 4001, [], []).close())


class Announcement:
    """Stands for what a stranger announced."""

    properties: dict[bytes, bytes | None]
    hosts: list[str]
    port: int | None

    def __init__(self, service: str, name: str) -> None:
        self.name = name

    async def async_request(self, zeroconf: Any, timeout_ms: int) -> bool:
        return True

    def parsed_addresses(self) -> list[str]:
        return self.hosts


class Change:
    name = "Added"


def announce(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    properties: dict[bytes, bytes | None],
    hosts: list[str],
    port: int | None = 4000,
    times: int = 1,
) -> tuple[list[Any], list[str]]:
    import zeroconf.asyncio

    kind = type("Kind", (Announcement,), {"properties": properties, "hosts": hosts, "port": port})
    monkeypatch.setattr(zeroconf.asyncio, "AsyncServiceInfo", kind)
    found: list[Any] = []
    problems: list[str] = []

    async def run() -> None:
        me = node(A, "alpha", 4001, found, problems)
        for _ in range(times):
            me._seen(None, mdns.SERVICE, f"{name}.{mdns.SERVICE}", Change)
            await asyncio.gather(*me._asking.values())
            await asyncio.sleep(0)

    asyncio.run(run())
    return found, problems


def test_announcement_is_told_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, problems = announce(monkeypatch, f"{B:016x}", {b"mesh": b"beta"}, ["10.0.0.2"], times=3)
    assert found == [("beta", B, [("10.0.0.2", 4000)])] and problems == []


@pytest.mark.parametrize(
    ("name", "properties", "hosts", "port"),
    [
        (f"{A:016x}", {b"mesh": b"alpha"}, ["10.0.0.2"], 4000),
        ("printer", {b"mesh": b"beta"}, ["10.0.0.2"], 4000),
        (f"{B:016X}", {b"mesh": b"beta"}, ["10.0.0.2"], 4000),
        (f"{B:016x}", {}, ["10.0.0.2"], 4000),
        (f"{B:016x}", {b"mesh": None}, ["10.0.0.2"], 4000),
        (f"{B:016x}", {b"mesh": b"\x1b[31m\xff"}, ["10.0.0.2"], 4000),
        (f"{B:016x}", {b"mesh": b"beta"}, [], 4000),
        (f"{B:016x}", {b"mesh": b"beta"}, ["10.0.0.2"], None),
        (f"{B:016x}", {b"mesh": b"beta"}, ["224.0.0.1", "0.0.0.0", "169.254.1.1", "nonsense"], 4000),
    ],
)
def test_announcement_that_makes_no_sense_is_ignored(
    name: str,
    properties: dict[bytes, bytes | None],
    hosts: list[str],
    port: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert announce(monkeypatch, name, properties, hosts, port) == ([], [])


def test_flood_of_announcements_is_bounded() -> None:
    async def run() -> None:
        me = node(A, "alpha", 4001, [], [])
        for i in range(1, 1000):
            me._seen(None, mdns.SERVICE, f"{i:016x}.{mdns.SERVICE}", Change)
        assert len(me._asking) == mdns.MAX_REQUESTS
        await me.close()
        await asyncio.gather(*me._asking.values(), return_exceptions=True)

    asyncio.run(run())


def test_usable_keeps_eight_addresses_that_can_be_sent_to() -> None:
    hosts = [f"10.0.0.{i}" for i in range(20)]
    assert len(usable(hosts, 4000)) == 8
    assert usable(["fe80::1", "::", "ff02::1", "nonsense"], 4000) == []
    assert usable(["10.0.0.1"], 0) == []
    assert usable(["fd00::1", "10.0.0.1"], 4000) == [("10.0.0.1", 4000), ("fd00::1", 4000)]


@pytest.mark.parametrize(
    ("addrs", "told"),
    [
        ([(LOOPBACK, 1)], [(LOOPBACK, 1)]),
        ([(LOOPBACK, 1), ("10.0.0.1", 1)], [("10.0.0.1", 1)]),
        ([("10.0.0.1", 1), ("10.0.0.2", 2)], [("10.0.0.1", 1)]),
    ],
)
def test_plan_never_tells_loopback_beside_a_real_address(addrs: list[Addr], told: list[Addr]) -> None:
    assert plan(addrs)[0] == told


def test_plan_for_loopback_stays_on_loopback() -> None:
    assert plan([(LOOPBACK, 1)]) == ([(LOOPBACK, 1)], [LOOPBACK])
    assert plan([])[0] == []
