"""Artifacts as people ask for them: puts judged and taken in, gets passed on, the table."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.data.chunks import CHUNK_BYTES
from agent.data.fetching import LinkSource, Want, fetch
from agent.data.holdings import Item
from agent.data.offering import Offer
from agent.data.parts import Part
from agent.data.puts import build_put, decode_put
from agent.opmessage import NAMESPACE, new_ulid
from discovery import sshsig
from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError
from discovery.identity import Identity, id_text
from discovery.links import Link, dial
from tests.agent.data_nodes import MESH, OPERATOR, Station, held_by, noise, world
from tests.discovery.loopback import until

DATA = noise(2 * CHUNK_BYTES + 9)
KEY: Any = ("artifact", "model")


@contextlib.asynccontextmanager
async def person(station: Station, offer: Offer | None = None, username: str = "home") -> AsyncIterator[Link]:
    methods = {} if offer is None else offer.methods()
    link = await dial(
        station.addr, identity=OPERATOR, username=username, expect_pub=station.identity.pub, methods=methods
    )
    try:
        yield link
    finally:
        await link.close()


def offered(path: Path, data: bytes = DATA) -> Offer:
    path.write_bytes(data)
    offer = Offer(path)
    offer.measure()
    return offer


async def signed(
    station: Station, link: Link, offer: Offer, signer: Identity = OPERATOR, **changes: Any
) -> dict[str, Any]:
    challenge = await link.call("challenge", {})
    fields: dict[str, Any] = {
        "name": "model",
        "hash": offer.hash,
        "list": offer.list_digest,
        "size": offer.size,
        "replicas": 2,
        "mesh": MESH,
        "target": id_text(station.id),
        "op_id": new_ulid(challenge["wall_ms"], os.urandom(10)),
        "nonce": challenge["nonce"],
        "now_ms": challenge["wall_ms"],
    }
    message = build_put(**{**fields, **changes})
    return {"message": message, "signature": sshsig.sign(message, signer, NAMESPACE)}


async def put(link: Link, params: Any) -> list[Any]:
    return [item async for item in link.stream("artifact_put", params)]


async def refusal(work: Any) -> str:
    with pytest.raises(Refused) as told:
        await work
    return told.value.code


def test_put_file_is_taken_in_by_the_node_asked_and_then_by_so_many(tmp_path: Path) -> None:
    async def run() -> None:
        offer = offered(tmp_path / "file")
        async with world(tmp_path, 3) as stations, person(stations[0], offer) as link:
            items = await put(link, await signed(stations[0], link, offer))
            last = items.pop()
            assert (
                last["result"] == "done" and last["hash"] == offer.hash and last["node"] == stations[0].name
            )
            assert all(item["total"] == len(DATA) and 0 <= item["done"] <= len(DATA) for item in items)
            for station in await held_by(stations, "model", 2):
                entry = station.room.store.entry("model")
                assert (
                    entry is not None
                    and entry.put_by == sshsig.verify(entry.message, entry.signature, NAMESPACE).fingerprint
                )
                assert station.room.store.blob_file(entry.hash).read_bytes() == DATA
        offer.close()

    asyncio.run(run())


def test_put_of_a_key_that_may_not_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    async def run() -> None:
        offer = offered(tmp_path / "file")
        asked: list[Any] = []

        async def watched(link: Link, params: Any) -> Any:
            asked.append(params)
            return {}

        async with world(tmp_path, 1) as (station,), person(station, offer) as link:
            link.methods = {"offer": watched, "offer_list": watched}
            stranger = Identity.from_seed(b"z" * 32)
            assert await refusal(put(link, await signed(station, link, offer, stranger))) == "unknown_key"
            station.roll.role = "observe"
            assert await refusal(put(link, await signed(station, link, offer))) == "role"
            station.roll.role = "operate"
            other = await signed(station, link, offer, target="0" * 16)
            assert await refusal(put(link, other)) == "wrong_target"
            assert await refusal(put(link, await signed(station, link, offer, mesh="beta"))) == "wrong_mesh"
            late = await signed(station, link, offer, now_ms=station.wall_ms - 200_000)
            assert await refusal(put(link, late)) == "expired"
            early = await signed(station, link, offer, now_ms=station.wall_ms + 20_000)
            assert await refusal(put(link, early)) == "not_yet"
            assert (
                await refusal(put(link, await signed(station, link, offer, nonce="0" * 32)))
                == "unknown_nonce"
            )
            forged = await signed(station, link, offer)
            forged["message"] = forged["message"].replace(b'"replicas":2', b'"replicas":9')
            assert await refusal(put(link, forged)) == "bad_signature"
            assert station.room.desk.counters["put_refused"] == 8
            for nonsense in (
                None,
                {},
                {"message": "text", "signature": ""},
                {"message": b"", "signature": b""},
            ):
                with pytest.raises(RemoteError):
                    await put(link, nonsense)
        async with world(tmp_path / "b", 1) as (station,), person(station, offer, "mesh") as link:
            assert await refusal(put(link, await signed(station, link, offer))) == "login"
        assert not asked and not station.room.store.entries()
        offer.close()

    asyncio.run(run())


def test_put_that_can_have_no_effect_is_refused_with_its_reason(tmp_path: Path) -> None:
    async def run() -> None:
        offer = offered(tmp_path / "file")
        async with world(tmp_path, 1) as (station,), person(station, offer) as link:
            station.room.holds(Item("chain", "log", count=1))
            await asyncio.sleep(0)
            for name in ("log", "admin"):
                assert await refusal(put(link, await signed(station, link, offer, name=name))) == "name_taken"
            await station.take("model", b"later", at_ms=station.wall_ms + 1)
            await asyncio.sleep(0)
            assert await refusal(put(link, await signed(station, link, offer))) == "older"
            station.room.store.reserve_bytes = 2**60
            full = await signed(station, link, offer, name="other")
            assert await refusal(put(link, full)) == "disk_full"
            station.room.store.reserve_bytes = 0
            await station.runtime.loop.publish(_drain(station))
            assert await refusal(put(link, await signed(station, link, offer, name="other"))) == "draining"
        offer.close()

    asyncio.run(run())


def _drain(station: Station) -> Any:
    from agent.meshos.events import Admin, AdminOp

    return Admin(AdminOp("drain", station.id))


def test_put_broken_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def run() -> None:
        offer = offered(tmp_path / "file")
        async with world(tmp_path, 1) as (station,):
            asked: list[int] = []

            async def stops(link: Link, params: Any) -> AsyncIterator[bytes]:
                asked.append(params["offset"])
                if params["offset"] == 0:
                    yield DATA[:CHUNK_BYTES]
                    part = station.place / "parts" / f"{offer.hash}.part"
                    await until(lambda: part.exists() and part.stat().st_size == CHUNK_BYTES)
                    link.abort()
                else:
                    yield DATA[params["offset"] :]

            for last in (False, True):
                async with person(station, offer) as link:
                    link.methods = {**link.methods, "offer": _small(stops)}
                    params = await signed(station, link, offer, replicas=1)
                    if last:
                        assert (await put(link, params))[-1]["result"] == "done"
                    else:
                        with pytest.raises(QuarterdeckError):
                            await put(link, params)
                        await until(lambda: not station.room.desk._putting)
            assert asked[0] == 0 and asked[-1] == CHUNK_BYTES
        offer.close()

    asyncio.run(run())


def _small(method: Any) -> Any:
    """The same in pieces that fit a frame."""

    async def cut(link: Link, params: Any) -> AsyncIterator[bytes]:
        async for data in method(link, params):
            for at in range(0, len(data), 2**18):
                yield data[at : at + 2**18]

    return cut


def test_file_that_changes_while_it_is_put_is_not_taken_in(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "file"
        offer = offered(path)
        path.write_bytes(DATA[:100] + b"!" + DATA[101:])
        async with world(tmp_path, 1) as (station,), person(station, offer) as link:
            assert await refusal(put(link, await signed(station, link, offer))) == "corrupt"
            assert not station.room.store.entries()
        offer.close()

    asyncio.run(run())


def test_get_from_a_node_that_does_not_hold_it_is_passed_on_from_one_that_does(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            await high.take("model", DATA, replicas=1)
            await held_by([low, high], "model", 1)
            async with person(low) as link:
                found = await link.call("artifact", {"name": "model"})
                assert found["holders"] == [high.name]
                entry = low.room.artifacts.entry_from("model", found)

                async def there() -> Link:
                    return link

                part = await fetch(
                    Want(entry.hash, entry.size, entry.list),
                    [LinkSource("low", there, "fetch")],
                    lambda hashes: Part(tmp_path / "out", entry.hash, entry.size, hashes),
                )
                part.finish()
                assert (tmp_path / "out").read_bytes() == DATA
                assert not low.holds("model") and low.room.desk.counters["passed_on"] >= 1
                assert await refusal(link.call("artifact", {"name": "nothing"})) == "unknown"
                assert await refusal(link.call("fetch_list", {"hash": "0" * 64})) == "unknown"

    asyncio.run(run())


def test_nodes_pass_nothing_on_for_other_nodes(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as (one, two, three):
            entry = await three.take("model", DATA, replicas=1)
            await held_by([one, two, three], "model", 1)
            link = await one.link_to(two.id)
            assert await refusal(link.call("fetch_list", {"hash": entry.hash})) == "login"
            assert await refusal(anext(aiter(link.stream("fetch", {"hash": entry.hash})))) == "login"
            assert await refusal(link.call("artifact", {"name": "model"})) == "unknown"

    asyncio.run(run())


def test_holder_without_a_sound_put_to_show_is_passed_over(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            honest, forger, puller = stations
            await honest.take("model", DATA, replicas=3)
            entry = honest.room.store.entry("model")
            assert entry is not None
            await held_by(stations, "model", 3)
            await puller.room.artifacts.drop("model")

            async def forged(link: Link, params: Any) -> Any:
                message = entry.message.replace(b'"replicas":3', b'"replicas":9')
                assert decode_put(message).args.replicas == 9
                return {"message": message, "signature": entry.signature}

            forger.listener.methods = {**forger.room.methods(), "artifact": forged}
            for link in [*forger.links.values(), *forger.listener.links]:
                link.methods = forger.listener.methods
            await puller.room.artifacts.hold("model", [forger.id, honest.id], lambda done, total: None)
            assert puller.room.store.entry("model") == entry
            assert puller.room.artifacts.counters["bad_put"] >= 1

    asyncio.run(run())


def test_table_tells_counts_holders_leader_and_pulls_of_other_nodes(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            await high.take("model", DATA, replicas=2)
            low.room.holds(Item("chain", "log", size=5, count=3))
            await held_by([low, high], "model", 2)
            high.room.placing.pulls = lambda: [_Pull()]  # type: ignore[assignment,list-item,return-value]
            high.room.desk._stabilising_ms = lambda name: 7 if name == "model" else 0
            await until(lambda: low.room.holdings.key_of("log") is not None)
            async with person(low) as link:
                log, model = (await link.call("chains", {}))["rows"]
            entry = high.room.store.entry("model")
            assert entry is not None
            assert model == {
                "name": "model",
                "kind": "artifact",
                "mesh": MESH,
                "held": 2,
                "desired": 2,
                "leader": high.name,
                "holders": [low.name, high.name],
                "size": len(DATA),
                "hash": entry.hash,
                "held_back": None,
                "stabilising_ms": 7,
                "pulls": [{"node": high.name, "done": 3, "total": 9}],
            }
            assert (log["kind"], log["held"], log["desired"], log["hash"]) == ("chain", 1, 3, None)
            assert list(log) == list(model)

    asyncio.run(run())


class _Pull:
    kind, name, done, total = "artifact", "model", 3, 9


def test_offer_of_what_is_no_file_is_refused_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(LocalError, match="name a file that you can read"):
            Offer(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"name": "X"},
        {"name": ""},
        {"hash": "AA"},
        {"hash": "g" * 64},
        {"size": -1},
        {"replicas": 65},
        {"replicas": -1},
        {"lifetime_ms": 200_000},
    ],
)
def test_put_that_would_be_malformed_is_never_built(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "name": "model",
        "hash": "0" * 64,
        "list": "0" * 64,
        "size": 0,
        "replicas": 1,
        "mesh": MESH,
        "target": "0" * 16,
        "op_id": new_ulid(1, bytes(10)),
        "nonce": "0" * 32,
        "now_ms": 1,
    }
    assert decode_put(build_put(**fields)).args.name == "model"
    with pytest.raises(LocalError):
        build_put(**{**fields, **changes})


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "malformed"),
        (b"[]", "malformed"),
        (b"\xff", "malformed"),
        (b"{" * 10_000, "malformed"),
        (b" " * 20_000, "too_large"),
        (b'{"v": 2}', "version"),
        (b'{"v": 1, "v": 1}', "malformed"),
    ],
)
def test_put_that_is_none_is_refused_by_its_code(message: bytes, code: str) -> None:
    with pytest.raises(Refused) as told:
        decode_put(message)
    assert told.value.code == code
