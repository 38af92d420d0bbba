"""One UDP port and the pools on it, with real sockets on the loopback."""

from __future__ import annotations

import asyncio
import hashlib
import time
from itertools import count

import pytest

from discovery.errors import LocalError
from discovery.member import Addr
from discovery.seal import Keyring, Opener, Sealer
from tests.discovery.ports import Place, join, mesh_pool, send_raw, until


class Listed:
    """A pool that only notes what the port gives it."""

    def __init__(self, *keys: bytes, pool: str = "p") -> None:
        self.opener = Opener(Keyring(keys), pool)
        self.taken: list[bytes] = []
        self.met: list[Addr] = []
        self.flushes = 0

    def take(self, body: bytes, sender: int, addr: Addr, now: float) -> None:
        self.taken.append(body)

    def refused(self, addr: Addr, now: float) -> None:
        self.met.append(addr)

    def flush(self) -> None:
        self.flushes += 1


def sealer(key: bytes, pool: str = "p", sender: int = 7) -> Sealer:
    return Sealer(Keyring([key]), pool, sender, 1, bytes(8))


def keys_of_one_id() -> tuple[bytes, bytes]:
    """Two keys whose key id is the same byte."""
    first = bytes(32)
    wanted = hashlib.sha256(first).digest()[0]
    for n in count(1):
        key = n.to_bytes(32, "big")
        if hashlib.sha256(key).digest()[0] == wanted:
            return first, key
    raise AssertionError


def test_port_two_pools_packets_go_to_their_own() -> None:
    async def scenario() -> None:
        place = Place()
        one, two = Listed(b"1" * 32), Listed(b"2" * 32, pool="q")
        place.port.attach(one)
        place.port.attach(two)
        place.port.attach(two)
        for _ in range(3):
            send_raw(sealer(b"1" * 32).seal(b"to one"), place.addr)
        send_raw(sealer(b"2" * 32, "q").seal(b"to two"), place.addr)
        await until(lambda: bool(one.taken and two.taken and place.port.counters.total() == 2))
        assert one.taken == [b"to one"] and two.taken == [b"to two"]
        assert place.port.counters == {"replayed": 2}
        place.close()

    asyncio.run(scenario())


def test_port_keys_of_one_id_each_opens_its_own() -> None:
    first, second = keys_of_one_id()

    async def scenario() -> None:
        place = Place()
        one, two = Listed(first), Listed(second)
        place.port.attach(one)
        place.port.attach(two)
        theirs = sealer(second)
        packet = theirs.seal(b"to two")
        send_raw(packet, place.addr)
        send_raw(sealer(first).seal(b"to one"), place.addr)
        await until(lambda: bool(one.taken and two.taken))
        assert not place.port.counters
        send_raw(packet, place.addr)
        send_raw(packet[:-1] + bytes([packet[-1] ^ 1]), place.addr)
        forged = sealer(second, sender=8).seal(b"of nobody")
        send_raw(forged[:-4] + bytes(4), place.addr)
        await until(lambda: place.port.counters.total() == 3)
        assert place.port.counters == {"replayed": 2, "forged": 1}
        assert one.taken == [b"to one"] and two.taken == [b"to two"]
        place.close()

    asyncio.run(scenario())


def test_port_two_mesh_pools_with_keys_of_one_id_live_apart() -> None:
    first, second = keys_of_one_id()

    async def scenario() -> None:
        here, there = Place(), Place()
        pools = [
            mesh_pool(place, name, key)
            for place in (here, there)
            for name, key in (("a", first), ("b", second))
        ]
        join(pools[2], here.addr)
        join(pools[3], here.addr)
        await until(lambda: all(pool.swim.synced and pool.swim.members for pool in pools))
        for mine, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
            assert set(pools[mine].swim.members) == {pools[other].swim.me.id}
        for place in (here, there):
            assert not place.port.counters
        assert not any(pool.swim.counters["wrong_mesh"] for pool in pools)
        for pool in pools:
            pool.close()
        here.close()
        there.close()

    asyncio.run(scenario())


def test_port_garbage_is_counted_and_told_once() -> None:
    async def scenario() -> None:
        place = Place()
        pools = [Listed(key * 32, pool=key.decode()) for key in (b"1", b"2", b"3")]
        for pool in pools:
            place.port.attach(pool)
        for packet in (
            b"",
            b"\x01\x02\x03",
            sealer(b"4" * 32).seal(b"of a stranger"),
            b"\x09 of the future, as long as a packet must be at least to count",
        ):
            send_raw(packet, place.addr)
        await until(lambda: place.port.counters.total() >= 4)
        assert place.port.counters == {"short": 2, "unknown_key": 1, "wire_version": 1}
        assert [(theirs, ours) for _, theirs, ours in place.incompatible] == [(9, 1)]
        assert not any(pool.taken for pool in pools)
        place.close()

    asyncio.run(scenario())


def test_port_detached_pool_hears_nothing_and_others_go_on() -> None:
    async def scenario() -> None:
        place = Place()
        stays, goes = Listed(b"1" * 32), Listed(b"2" * 32)
        place.port.attach(stays)
        place.port.attach(goes)
        place.port.detach(goes)
        place.port.detach(goes)
        theirs = sealer(b"2" * 32)
        send_raw(theirs.seal(b"too late"), place.addr)
        send_raw(sealer(b"1" * 32).seal(b"still"), place.addr)
        await until(lambda: bool(stays.taken))
        assert not goes.taken and place.port.counters == {"unknown_key": 1}
        place.port.attach(goes)
        send_raw(theirs.seal(b"again"), place.addr)
        await until(lambda: goes.taken == [b"again"])
        place.port.detach(stays)
        place.port.detach(goes)
        send_raw(theirs.seal(b"waits in the socket"), place.addr)
        place.port.attach(goes)
        await until(lambda: len(goes.taken) == 2)
        place.close()
        with pytest.raises(LocalError):
            place.port.attach(goes)

    asyncio.run(scenario())


def test_port_detaching_in_mid_batch_drops_the_rest() -> None:
    async def scenario() -> None:
        place = Place()

        class Leaves(Listed):
            def take(self, body: bytes, sender: int, addr: Addr, now: float) -> None:
                super().take(body, sender, addr, now)
                place.port.detach(self)

        pool = Leaves(b"1" * 32)
        place.port.attach(pool)
        theirs = sealer(b"1" * 32)
        for _ in range(3):
            send_raw(theirs.seal(b"x"), place.addr)
        await until(lambda: pool.flushes == 1)
        assert len(pool.taken) == 1
        place.close()

    asyncio.run(scenario())


def test_port_key_rotated_while_running_is_asked_at_dispatch() -> None:
    async def scenario() -> None:
        place = Place()
        one, two = Listed(b"1" * 32), Listed(b"2" * 32)
        place.port.attach(one)
        place.port.attach(two)
        new = sealer(b"3" * 32)
        send_raw(new.seal(b"early"), place.addr)
        await until(lambda: place.port.counters["unknown_key"] == 1)
        two.opener.rotate(Keyring([b"2" * 32, b"3" * 32]))
        send_raw(new.seal(b"in time"), place.addr)
        await until(lambda: two.taken == [b"in time"])
        assert not one.taken
        place.close()

    asyncio.run(scenario())


def test_pool_rotated_on_both_sides_goes_on_without_a_break() -> None:
    async def scenario() -> None:
        here, there = Place(), Place()
        a, b = mesh_pool(here, "alpha", b"1" * 32), mesh_pool(there, "alpha", b"1" * 32)
        join(b, here.addr)
        await until(lambda: bool(a.swim.members and b.swim.members))
        old, new = b"1" * 32, b"2" * 32
        for keys in ([old, new], [new, old]):
            for pool in (a, b):
                pool.rotate(Keyring(keys))
                seen = b.swim.me.record.version
                b.swim.update_self(time.monotonic(), reason=f"{len(keys)} keys")
                b.flush()
                await until(lambda: a.swim.members[b.swim.me.id].record.version > seen)  # noqa: B023
        assert not here.port.counters and not there.port.counters
        b.rotate(Keyring([old]))
        a.rotate(Keyring([new]))
        b.swim.update_self(time.monotonic(), reason="of yesterday")
        b.flush()
        await until(lambda: here.port.counters["unknown_key"] > 0)
        for room in (a, b, here, there):
            room.close()

    asyncio.run(scenario())


def test_port_refused_datagram_every_pool_is_told_of_it() -> None:
    async def scenario() -> None:
        place, gone = Place(), Place()
        nobody = gone.addr
        gone.close()
        one, two = Listed(b"1" * 32), Listed(b"2" * 32)
        place.port.attach(one)
        place.port.attach(two)
        place.port.send(b"is anybody there", nobody)
        await until(lambda: bool(one.met and two.met))
        assert one.met == two.met == [nobody]
        assert one.flushes and two.flushes
        place.close()

    asyncio.run(scenario())


def test_port_sending_after_a_refusal_still_sends() -> None:
    async def scenario() -> None:
        place, gone, there = Place(), Place(), Place()
        nobody = gone.addr
        gone.close()
        pool, other = Listed(b"1" * 32), Listed(b"1" * 32)
        place.port.attach(pool)
        there.port.attach(other)
        packets = sealer(b"1" * 32)
        for _ in range(5):
            place.port.send(b"?", nobody)
            place.port.send(packets.seal(b"hello"), there.addr)
        await until(lambda: len(other.taken) == 5 and bool(pool.met))
        place.close()
        place.port.send(b"?", there.addr)
        there.close()

    asyncio.run(scenario())
