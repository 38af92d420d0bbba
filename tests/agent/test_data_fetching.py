"""Blobs over links: fetched by range, resumed, verified, from another holder where one fails; served to whom, and how."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.data import fetching
from agent.data.chunks import CHUNK_BYTES, list_digest, sums_of
from agent.data.fetching import LinkSource, Source, Want, fetch
from agent.data.parts import Part
from agent.data.scrub import Scrub
from agent.data.serving import Serving, ServingLimits
from discovery.errors import Refused, RemoteError, Unreachable
from discovery.links import Link, Login
from tests.agent.data_nodes import chunks_of, held_by, noise, world
from tests.agent.test_data_blobs import filled, opened
from tests.discovery.loopback import CLIENT, dial_as_client, linked, listening, until

DATA = noise(3 * CHUNK_BYTES + 77)
SUMS = sums_of(chunks_of(DATA))
WANT = Want(SUMS.hash, len(DATA), list_digest(SUMS.list))


class Giver:
    """A source in this process. `spoil(index, chunk)` is what it sends instead; it goes away after `breaks_after` bytes."""

    def __init__(
        self,
        name: str = "giver",
        data: bytes = DATA,
        spoil: Callable[[int, bytes], bytes] = lambda index, chunk: chunk,
        breaks_after: int | None = None,
        hashes: bytes | None = None,
    ) -> None:
        self.name, self.data, self.spoil, self.breaks_after = name, data, spoil, breaks_after
        self.hashes = sums_of(chunks_of(data)).list if hashes is None else hashes
        self.asked: list[tuple[int, int]] = []
        self.suspected: list[int] = []

    async def chunk_list(self, hash: str, size: int) -> bytes:
        return self.hashes

    async def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
        self.asked.append((offset, length))
        sent = 0
        for at in range(offset, offset + length, CHUNK_BYTES):
            chunk = self.spoil(at // CHUNK_BYTES, self.data[at : min(at + CHUNK_BYTES, offset + length)])
            for piece in (chunk[:1000], chunk[1000:]):
                if self.breaks_after is not None and sent + len(piece) > self.breaks_after:
                    raise Unreachable("gone")
                sent += len(piece)
                yield piece

    async def suspect(self, hash: str, index: int) -> None:
        self.suspected.append(index)


def flip(index: int) -> Callable[[int, bytes], bytes]:
    def spoil(at: int, chunk: bytes) -> bytes:
        return chunk if at != index else bytes([chunk[0] ^ 1]) + chunk[1:]

    return spoil


async def got(place: Path, *sources: Source, want: Want = WANT, **more: Any) -> bytes:
    """What fetching from these gives, adopted by a store there."""
    store = opened(place)
    part = await fetch(want, sources, lambda hashes: store.part(want.hash, want.size, hashes), **more)
    store.adopt(part)
    return store.read(want.hash, 0, want.size)


def test_blob_broken_off_goes_on_at_the_next_source_where_it_stopped(tmp_path: Path) -> None:
    first, second = Giver("first", breaks_after=2 * CHUNK_BYTES + 5), Giver("second")
    seen: list[int] = []
    assert asyncio.run(got(tmp_path, first, second, progress=seen.append)) == DATA
    assert second.asked == [(2 * CHUNK_BYTES, len(DATA) - 2 * CHUNK_BYTES)]
    assert seen == sorted(seen) and seen[-1] == len(DATA)


def test_bad_chunk_is_named_told_to_its_sender_and_fetched_from_another_holder(tmp_path: Path) -> None:
    bad, good = Giver("bad", spoil=flip(1)), Giver("good")
    told: list[tuple[str, int]] = []
    on_bad = lambda source, chunk: told.append((source, chunk))  # noqa: E731
    assert asyncio.run(got(tmp_path, bad, good, on_bad=on_bad)) == DATA
    assert told == [("bad", 1)] and bad.suspected == [1]
    assert good.asked == [(CHUNK_BYTES, len(DATA) - CHUNK_BYTES)]


def test_chunk_damaged_everywhere_is_refused_by_its_name_and_what_is_good_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Refused) as told:
        asyncio.run(got(tmp_path, Giver("a", spoil=flip(2)), Giver("b", spoil=flip(2))))
    assert (
        told.value.code == "corrupt" and "chunk 2 is damaged at all who have it (a, b)" in told.value.sentence
    )
    giver = Giver("c")
    assert asyncio.run(got(tmp_path, giver)) == DATA
    assert giver.asked == [(2 * CHUNK_BYTES, len(DATA) - 2 * CHUNK_BYTES)]


def test_list_that_was_not_signed_is_refused_before_a_byte_is_fetched(tmp_path: Path) -> None:
    liar = Giver("liar", hashes=bytes(len(SUMS.list)))
    with pytest.raises(RemoteError, match="not the list of chunks that was signed"):
        asyncio.run(got(tmp_path, liar))
    assert liar.asked == []
    assert asyncio.run(got(tmp_path, liar, Giver())) == DATA


def test_wrong_list_without_a_signed_one_is_found_out_by_the_whole(tmp_path: Path) -> None:
    forged = noise(len(DATA), 5)
    liar = Giver("liar", forged)
    want = Want(WANT.hash, WANT.size, None)
    assert asyncio.run(got(tmp_path, liar, Giver("honest"), want=want)) == DATA
    with pytest.raises(Refused) as told:
        asyncio.run(got(tmp_path / "other", liar, want=want))
    assert told.value.code == "corrupt"


def test_source_that_stalls_is_passed_over(tmp_path: Path) -> None:
    class Stalling(Giver):
        async def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
            yield b""
            await asyncio.Event().wait()

    assert asyncio.run(got(tmp_path, Stalling("slow"), Giver(), stall_s=0.05)) == DATA


def test_source_that_sends_too_little_or_nothing_ends_in_an_error_not_in_a_loop(tmp_path: Path) -> None:
    class Short(Giver):
        async def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
            return
            yield b""

    with pytest.raises(RemoteError, match="ended before all was sent"):
        asyncio.run(got(tmp_path, Short()))
    with pytest.raises(Unreachable):
        asyncio.run(got(tmp_path))


def test_source_that_has_too_many_readers_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "BUSY_WAIT_S", 0.001)

    class Busy(Giver):
        left = 10

        async def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
            if self.left:
                self.left -= 1
                raise Refused("busy", "try again")
            async for piece in super().read(hash, offset, length):
                yield piece

    assert asyncio.run(got(tmp_path, Busy())) == DATA
    hopeless = Busy()
    hopeless.left = 10**6
    with pytest.raises(Refused) as told:
        asyncio.run(got(tmp_path / "other", hopeless))
    assert told.value.code == "busy"


def test_cancelled_fetch_keeps_its_part_and_closes_it(tmp_path: Path) -> None:
    async def run() -> None:
        store = opened(tmp_path)
        parts: list[Part] = []

        def part(hashes: bytes) -> Part:
            parts.append(store.part(WANT.hash, WANT.size, hashes))
            return parts[-1]

        class Waiting(Giver):
            async def read(self, hash: str, offset: int, length: int) -> AsyncIterator[bytes]:
                yield self.data[:CHUNK_BYTES]
                await asyncio.Event().wait()

        task = asyncio.create_task(fetch(WANT, [Waiting()], part))
        await until(lambda: bool(parts) and parts[0].verified == CHUNK_BYTES)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert parts[0]._handle is None
        assert await got(tmp_path, Giver()) == DATA

    asyncio.run(run())


# --- over a link


def source(link: Link) -> LinkSource:
    async def there() -> Link:
        return link

    return LinkSource("server", there)


async def refusal(work: Any) -> str:
    with pytest.raises(Refused) as told:
        await work
    return told.value.code


def test_blob_of_32_mib_comes_over_a_link_with_memory_flat(tmp_path: Path) -> None:
    """Neither end holds more than a few chunks of it: what Python has allocated is measured, both ends in one process."""
    import tracemalloc

    size = 32 * 2**20
    block = noise(CHUNK_BYTES, 7)
    store = opened(tmp_path / "from")
    sums = sums_of(block for _ in range(size // CHUNK_BYTES))
    part = store.part(sums.hash, size, sums.list)
    part.open()
    for _ in range(size // CHUNK_BYTES):
        part.add(block)
    store.adopt(part)
    store._entries["x"] = filled(opened(tmp_path / "x"), "x", b"")
    store.published = store.has  # type: ignore[method-assign]
    to = opened(tmp_path / "to")

    async def run() -> int:
        async with linked(Serving(store).methods(), {}) as (link, _, _):
            tracemalloc.start()
            try:
                want = Want(sums.hash, size, list_digest(sums.list))
                done = await fetch(want, [source(link)], lambda hashes: to.part(sums.hash, size, hashes))
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            to.adopt(done)
            return peak

    peak = asyncio.run(run())
    assert to.size(sums.hash) == size
    assert peak < 12 * 2**20, f"{peak / 2**20:.1f} MiB for {size / 2**20:.0f}"


NO_HASHES: list[Any] = [
    None,
    {},
    {"hash": "../names/model.json"},
    {"hash": "..%2f..%2fetc%2fpasswd"},
    {"hash": "/etc/passwd"},
    {"hash": ["a"]},
    {"hash": "a" * 64},
    {"hash": SUMS.hash.upper()},
    {"hash": SUMS.hash + "\x00"},
    {"hash": SUMS.hash + "\n"},
]


def test_nothing_but_a_published_hash_opens_anything(tmp_path: Path) -> None:
    async def run() -> None:
        store = opened(tmp_path)
        filled(store, data=DATA)
        serving = Serving(store)
        async with linked(serving.methods(), {}) as (link, _, _):
            for params in NO_HASHES:
                assert await refusal(link.call("blob_list", params)) == "unknown"
                assert await refusal(anext(aiter(link.stream("blob", params)))) == "unknown"
                assert await refusal(link.call("blob_suspect", params)) == "unknown"
        assert serving.counters == {"blob_unknown": 3 * len(NO_HASHES)}

    asyncio.run(run())


def test_ranges_that_are_none_are_refused_and_counted(tmp_path: Path) -> None:
    async def run() -> None:
        store = opened(tmp_path)
        entry = filled(store, data=DATA)
        serving = Serving(store)
        async with linked(serving.methods(), {}) as (link, _, _):
            for value in (-1, 2**60, "0", 1.5, True, None):
                with pytest.raises(RemoteError):
                    await anext(aiter(link.stream("blob", {"hash": entry.hash, "offset": value})))
            beyond = {"hash": entry.hash, "offset": len(DATA) + 5, "length": 10}
            assert [piece async for piece in link.stream("blob", beyond)] == []
        assert serving.counters["blob_malformed"] == 6

    asyncio.run(run())


def test_logins_that_are_no_members_or_people_read_nothing(tmp_path: Path) -> None:
    def mesh(key_line: str, username: str, addr: Any) -> Login:
        return Login("mesh", None, CLIENT.pub, "of beta", "observe", key_line)

    async def run() -> None:
        store = opened(tmp_path)
        entry = filled(store, data=DATA)
        async with listening(Serving(store).methods(), authorise=mesh) as (_, addr):
            link = await dial_as_client(addr, {})
            assert await refusal(anext(aiter(link.stream("blob", {"hash": entry.hash})))) == "login"
            assert await refusal(link.call("blob_list", {"hash": entry.hash})) == "login"
            await link.close()

    asyncio.run(run())


def test_reader_that_takes_nothing_costs_a_chunk_and_its_share_only(tmp_path: Path) -> None:
    async def run() -> None:
        store = opened(tmp_path)
        entry = filled(store, data=DATA)
        serving = Serving(store, limits=ServingLimits(max_streams=8, max_streams_per_login=2))
        async with linked(serving.methods(), {}) as (link, _, _):
            slow = [aiter(link.stream("blob", {"hash": entry.hash})) for _ in range(2)]
            for reader in slow:
                await anext(reader)
            assert await refusal(anext(aiter(link.stream("blob", {"hash": entry.hash})))) == "busy"
            sent = serving.counters["blob_bytes"]
            assert sent < CHUNK_BYTES, "it reads on only as fast as it is taken"
            await link.call("blob_list", {"hash": entry.hash})
            for reader in slow:
                await reader.aclose()  # type: ignore[attr-defined]
            await until(lambda: serving._shares.total() == 0)
            assert [piece async for piece in link.stream("blob", {"hash": entry.hash})]

    asyncio.run(run())


# --- damage


def test_flipped_byte_is_found_by_the_scrub_and_only_that_chunk_is_fetched_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2, scrub_bytes_per_s=1e12) as stations:
            entry = await stations[0].take("model", DATA, replicas=2)
            await held_by(stations, "model", 2)
            hurt, other = stations
            before = other.room.serving.counters["blob_bytes"]
            with hurt.room.store.blob_file(entry.hash).open("r+b") as file:
                file.seek(CHUNK_BYTES + 500)
                byte = file.read(1)
                file.seek(CHUNK_BYTES + 500)
                file.write(bytes([byte[0] ^ 4]))
            assert not await hurt.room.scrub.look(entry)
            assert hurt.emitted[-1] == (
                "artifact.damaged",
                {"reason": "model: chunk 1 is damaged; fetched again"},
            )
            await held_by(stations, "model", 2)
            assert hurt.room.store.blob_file(entry.hash).read_bytes() == DATA
            assert other.room.serving.counters["blob_bytes"] - before == CHUNK_BYTES
            assert await hurt.room.scrub.look(entry)

    asyncio.run(run())


def test_holder_whose_copy_comes_damaged_looks_at_it_and_mends_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            entry = await stations[0].take("model", DATA, replicas=2)
            holding = await held_by(stations, "model", 2)
            hurt = min(holding, key=lambda s: s.id)
            path = hurt.room.store.blob_file(entry.hash)
            path.write_bytes(b"\x00" + DATA[1:] if DATA[0] else b"\x01" + DATA[1:])
            for station in stations:
                station.room.spec({("artifact", "model"): 3})
            await until(lambda: ("artifact.damaged") in [kind for kind, _ in hurt.emitted])
            await held_by(stations, "model", 3)
            assert path.read_bytes() == DATA

    asyncio.run(run())


def test_scrub_keeps_to_its_pace_and_goes_round(tmp_path: Path) -> None:
    async def run() -> None:
        store = opened(tmp_path)
        filled(store, "one", DATA)
        filled(store, "two", b"abc")
        scrub = Scrub(store, lambda entry, chunk: None, bytes_per_s=40 * CHUNK_BYTES, rest_s=0.01)
        began = time.monotonic()
        task = asyncio.create_task(scrub.run())
        await until(lambda: scrub.rounds == 1)
        assert time.monotonic() - began > 5 / 40 * 0.9
        await until(lambda: scrub.rounds == 2)
        task.cancel()
        assert scrub.damaged == 0

    asyncio.run(run())


# --- kill -9


PULLER = """
    import asyncio, sys
    from pathlib import Path
    from agent.data.blobs import BlobStore
    from agent.data.fetching import LinkSource, Want, fetch
    from tests.discovery.loopback import dial_as_client
    place, port, hash, size, digest = Path(sys.argv[1]), *sys.argv[2:]

    async def run():
        store = BlobStore(place, 0)
        async def link():
            return await dial_as_client(("127.0.0.1", int(port)), {})
        await fetch(Want(hash, int(size), digest), [LinkSource("server", link)],
                    lambda hashes: store.part(hash, int(size), hashes),
                    progress=lambda done: print(done, flush=True))

    asyncio.run(run())
"""


def test_puller_killed_half_way_resumes_and_verifies(tmp_path: Path) -> None:
    """A process of its own pulls over a real link and is killed with SIGKILL once it is half-way."""
    data = noise(12 * CHUNK_BYTES + 1, 4)
    store = opened(tmp_path / "from")
    entry = filled(store, "big", data)
    serving = Serving(store)

    async def slowed(link: Link, params: Any) -> AsyncIterator[bytes]:
        async for piece in serving.blob(link, params):
            if serving.counters["blob_bytes"] > len(data) // 2:
                await asyncio.Event().wait()
            yield piece

    async def run() -> None:
        async with listening({**serving.methods(), "blob": slowed}) as (_, addr):
            argv = [sys.executable, "-c", textwrap.dedent(PULLER), str(tmp_path / "to"), str(addr[1])]
            argv += [entry.hash, str(entry.size), entry.list]
            puller = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
            assert puller.stdout is not None
            try:
                async with asyncio.timeout(20):
                    while int(await puller.stdout.readline()) < 5 * CHUNK_BYTES:
                        pass
            finally:
                os.kill(puller.pid, signal.SIGKILL)
                await puller.wait()
        before = serving.counters["blob_bytes"]
        to = opened(tmp_path / "to")
        async with linked(serving.methods(), {}) as (link, _, _):
            want = Want(entry.hash, entry.size, entry.list)
            part = await fetch(want, [source(link)], lambda hashes: to.part(want.hash, want.size, hashes))
        to.adopt(part)
        assert to.blob_file(entry.hash).read_bytes() == data
        assert serving.counters["blob_bytes"] - before <= len(data) - 5 * CHUNK_BYTES

    asyncio.run(run())


def test_list_that_makes_no_sense_is_an_error_of_the_source(tmp_path: Path) -> None:
    answers: list[Any] = [None, [], {"list": "text"}, {"list": b""}, {"list": b"odd"}, {"list": bytes(10**5)}]

    async def odd(link: Link, params: Any) -> Any:
        return answers[0]

    async def run() -> None:
        async with linked({"blob_list": odd}, {}) as (link, _, _):
            while answers:
                with pytest.raises(RemoteError):
                    await got(tmp_path, source(link))
                answers.pop(0)

    asyncio.run(run())
