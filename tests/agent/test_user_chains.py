"""Users' chains on several nodes: begun by one, merged when begun by two, moved, appended to, read; nothing is lost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.chain import holding, replicating
from agent.chain.feeds import Draft, FeedStore
from agent.chain.replicating import Replicating
from agent.data import userchains
from agent.data.scoring import Candidate
from agent.data.userchains import UserChains, is_user_chain
from agent.meshos.config import MeshOsConfig
from agent.opmessage import APPEND_MAX_BYTES, NAMESPACE, build_op, decode_op, new_ulid
from discovery import sshsig
from discovery.errors import Refused, Unreachable
from discovery.identity import Identity, id_text
from tests.agent.data_nodes import MESH, OPERATOR, Station, World, run, world
from tests.discovery.loopback import until

BEGIN_S = 0.15
_moments = itertools.count(1_700_000_000_000)


class Peer:
    def __init__(self, id: int, present: bool) -> None:
        self.id, self.present = id, present


class ChainStation(Station):
    """A node that holds users' chains too: real files; calls about chains go straight to the other node."""

    def __init__(self, world: World, name: str, place: Path, config: MeshOsConfig, **more: Any) -> None:
        super().__init__(world, name, place, config, **more)
        self.apart: set[int] = set()

    async def start(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.store = FeedStore(self.place / "chains.db", self.identity, MESH)
        self.replicas = Replicating(self.store, me=self.id, members=self.peers, call=self.call)
        self.users = UserChains(
            self.replicas,
            me=self.id,
            mesh=MESH,
            members=self.peers,
            signed=self.signed,
            name_of=lambda node: self.members()[node].name,
        )
        self.store.changed = self.users.changed
        self.more = {**self.more, "chains": self.users}
        await super().start()
        self.users.begin(self.room)
        self.running = [asyncio.create_task(self.users.run()), asyncio.create_task(self.replicas.run())]

    async def close(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.store.close()
        await super().close()

    def signed(self, signer: Any, op: Any) -> str:
        return self.roll.judge(signer.blob, None, 0).comment

    def members(self) -> dict[int, Candidate]:
        seen = super().members()
        for node in self.apart:
            seen[node] = Candidate(node, seen[node].name, live=False)
        return seen

    def peers(self) -> dict[int, Peer]:
        return {node: Peer(node, seen.live) for node, seen in self.members().items() if node != self.id}

    async def link_to(self, node: int) -> Any:
        if node in self.apart:
            raise Unreachable("cut off")
        return await super().link_to(node)

    async def call(self, member: Any, method: str, params: Any, timeout_s: float) -> Any:
        await asyncio.sleep(0)
        other = next(s for s in self.world.stations if s.id == member.id)
        if member.id in self.apart or not other.up:
            raise Unreachable("cut off")
        assert isinstance(other, ChainStation)
        return await other.replicas.serve(method, params)

    def wants(self, keep: tuple[int, int | None] | None = None, **counts: int) -> None:
        """A spec is in force here; `keep`: bytes and milliseconds of each chain."""
        self.users.spec(counts, dict.fromkeys(counts, keep) if keep else None)
        self.room.spec({("chain", name): count for name, count in counts.items()})

    async def append(self, chain: str, content: bytes, signer: Identity = OPERATOR, **changes: Any) -> Any:
        now_ms = next(_moments)
        message = build_op(
            "append",
            mesh=MESH,
            target=id_text(self.id),
            op_id=new_ulid(now_ms, os.urandom(10)),
            nonce="0" * 32,
            now_ms=now_ms,
            fields={"chain": chain, "sha256": hashlib.sha256(content).hexdigest()},
        )
        signature = sshsig.sign(message, signer, NAMESPACE)
        return await self.users.append(
            decode_op(message), message, signature, "olga", changes.get("sent", content)
        )

    async def tail(self, chain: str, limit: int = 100) -> list[dict[str, Any]]:
        return [row async for row in self.users.tail(chain, limit)]

    async def texts(self, chain: str) -> list[str]:
        return [row["text"] for row in await self.tail(chain)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userchains, "BEGIN_AFTER_S", BEGIN_S)
    monkeypatch.setattr(userchains, "LOOK_EVERY_S", 0.03)
    monkeypatch.setattr(userchains, "COMMIT_WAIT_S", 2.0)


@contextlib.asynccontextmanager
async def chained(tmp_path: Path, count: int, **wanted: int) -> AsyncIterator[list[ChainStation]]:
    async with world(tmp_path, count, kind=ChainStation) as stations:
        for station in stations:
            station.wants(**wanted)
        yield stations


def holding_it(stations: list[ChainStation], name: str = "log") -> list[ChainStation]:
    return [station for station in stations if station.up and station.users.holds(name)]


async def settled(
    stations: list[ChainStation], count: int, name: str = "log", without: ChainStation | None = None
) -> list[ChainStation]:
    """Who holds it, once they are so many and all know it."""

    def so() -> bool:
        held = [station.id for station in holding_it(stations, name)]
        known = all(
            s.room.holdings.live_holders(("chain", name)) == held and not s.room.placing.pulls()
            for s in stations
            if s.up
        )
        return known and len(held) == count and (without is None or without.id not in held)

    await until(so, 15.0)
    return holding_it(stations, name)


@pytest.mark.parametrize(
    ("name", "may"),
    [("log", True), ("0.a-b_c", True), ("admin", False), ("node/0011", False), ("", False), ("Log", False)],
)
def test_name_of_the_mesh_s_own_chains_is_no_user_s(name: str, may: bool) -> None:
    assert is_user_chain(name) is may


def test_chain_nobody_holds_is_begun_by_one_that_may_and_brought_to_its_count(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, 4, kind=ChainStation) as stations:
            first = holding.holders("log", [s.id for s in stations], 2)
            cordoned = next(s for s in stations if s.id == first[0])
            cordoned.cordoned = True
            for station in stations:
                station.wants(log=2)
            held = await settled(stations, 2)
            assert [s.id for s in stations if s.users.counters["begun"]] == [first[1]]
            assert cordoned not in held
            await held[0].append("log", b"one")
            await until(lambda: held[1].users.head("log") == held[0].users.head("log") != "")

    run(go)


def test_chain_begun_on_both_sides_of_a_cut_is_one_chain_after_it(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, 2, kind=ChainStation) as (one, two):
            one.apart, two.apart = {two.id}, {one.id}
            one.world.changed()
            one.wants(log=2)
            two.wants(log=2)
            await until(lambda: one.users.holds("log") and two.users.holds("log"))
            assert one.users.counters["begun"] == two.users.counters["begun"] == 1
            assert (await one.append("log", b"here")).recorded == "local"
            assert (await two.append("log", b"there")).recorded == "local"
            one.apart, two.apart = set(), set()
            one.world.changed()
            await settled([one, two], 2)
            await until(lambda: one.users.head("log") == two.users.head("log"))
            told = await one.tail("log")
            assert [row["text"] for row in told] == ["here", "there"] and told == await two.tail("log")
            assert (await one.append("log", b"after")).recorded == "replicated"

    run(go)


def test_drained_holder_s_chain_moves_whole_and_goes_on_where_it_was_when_it_is_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 3, log=2) as stations:
            held = await settled(stations, 2)
            drained = held[0]
            for number in range(5):
                assert (await drained.append("log", b"%d" % number)).link.id == number + 1
            await drained.admin("drain")
            held = await settled(stations, 2, without=drained)
            assert not drained.store.feeds("log"), "what was given up is gone"
            with pytest.raises(Refused, match=f"{held[0].name}.* hold it") as why:
                await drained.append("log", b"no")
            assert why.value.code == "not_held"
            for station in held:
                assert await station.texts("log") == list("01234")
            await drained.admin("resume")
            for station in stations:
                station.wants(log=3)
            await settled(stations, 3)
            assert (await drained.append("log", b"5")).link.id == 6, "no number twice"
            for station in stations:
                await until(lambda s=station: s.store.end_of("log", drained.store.pub).id == 6)
                assert await station.texts("log") == list("012345")
                assert all(feed.fork is None for feed in station.store.feeds("log"))

    run(go)


def test_node_that_gave_a_chain_up_writes_nothing_before_its_own_records_are_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 2, log=2) as (one, two):
            await settled([one, two], 2)
            assert (await one.append("log", b"1")).recorded == "replicated"
            one.apart, two.apart = {two.id}, {one.id}
            assert (await one.append("log", b"2")).recorded == "local"
            await one.users.drop("log")
            one.apart, two.apart = set(), set()
            one.world.changed()
            await one.users.hold("log", [two.id], lambda done, total: None)
            with pytest.raises(Refused) as why:
                await one.append("log", b"3")
            assert why.value.code == "unsettled" and await one.texts("log") == ["1"]

    run(go)


def test_node_that_begins_anew_what_it_gave_up_goes_on_after_its_last_record(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 2, log=1) as (one, two):
            (first,) = await settled([one, two], 1)
            other = two if first is one else one
            await first.append("log", b"1")
            await other.users.hold("log", [first.id], lambda done, total: None)
            await first.users.drop("log")
            await other.world.end(other)
            await until(lambda: first.users.holds("log"))
            assert (await first.append("log", b"2")).link.id == 2
            await other.start()
            other.wants(log=1)
            other.world.changed()
            await until(lambda: other.store.end_of("log", first.store.pub).id == 2)
            assert await other.texts("log") == ["1", "2"]
            assert all(feed.fork is None for s in (one, two) for feed in s.store.feeds("log"))

    run(go)


def test_copy_is_not_given_up_while_another_lacks_a_record_of_it(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 2, log=2) as (one, two):
            await settled([one, two], 2)
            await one.append("log", b"both")
            head = one.users.head("log")
            assert head is not None and two.users.covers("log", head) and two.users.covers("log", "")
            one.apart, two.apart = {two.id}, {one.id}
            await one.append("log", b"here alone")
            grown = one.users.head("log")
            assert grown is not None and one.users.covers("log", head) and not two.users.covers("log", grown)
            for nonsense in ("x", "a:b:c", f"{id_text(one.id)}:1:00", f"{id_text(one.id)}:1", ":::", "²:²:²"):
                assert not one.users.covers("log", nonsense)
            assert not one.users.covers("other", "") and one.users.head("other") is None

    run(go)


def test_operator_s_drop_waits_until_the_copy_is_not_needed(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 2, log=2) as stations:
            held = await settled(stations, 2)
            await held[0].append("log", b"one")
            await held[0].admin("drop_replicas", chains=("log",))
            await until(lambda: any("2 have to" in why for why in held[0].failed))
            assert len(holding_it(stations)) == 2
            for station in stations:
                station.wants(log=1)
            (left,) = await settled(stations, 1)
            assert await left.texts("log") == ["one"]

    run(go)


def test_append_that_may_not_be_writes_nothing(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 1, log=1) as (node,):
            await settled([node], 1)
            big = bytes(APPEND_MAX_BYTES + 1)
            for content, changes, code in (
                (b"x", {"sent": b"y"}, "malformed"),
                (b"x", {"sent": None}, "malformed"),
                (big, {}, "too_large"),
            ):
                with pytest.raises(Refused) as why:
                    await node.append("log", content, **changes)
                assert why.value.code == code
            with pytest.raises(Refused, match="name it in a") as why:
                await node.append("other", b"x")
            assert why.value.code == "not_held"
            assert not await node.tail("log")
            assert (await node.append("log", big[1:])).link.id == 1, "the largest there may be"

    run(go)


def test_record_is_verified_only_with_the_signature_of_one_who_may_over_these_bytes(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 1, log=1, other=1) as (node,):
            await settled([node], 1)
            await settled([node], 1, "other")
            await node.append("log", b"\xff\x00")
            stranger = Identity.from_seed(b"s" * 32)
            await node.append("log", b"stranger", stranger)
            await node.append("other", b"elsewhere")
            (stored,) = node.store.records("other")
            body = dict(stored.record.body or {})
            body["by"] = "boss"
            drafts = [
                body,
                {**body, "content": b"else"},
                {**body, "message": b"{}", "op_id": 7},
                {"content": "no bytes"},
                {},
            ]
            await node.store.append_all("log", [Draft("append", one, at_ms=2**50) for one in drafts])
            await node.store.append("log", "append", {**body, "hlc": ["x"]}, at_ms=2**50)
            told = await node.tail("log")
            assert [row["verified"] for row in told].count(True) == 1
            good = next(row for row in told if row["verified"])
            assert base64.b64decode(good["base64"]) == b"\xff\x00" and good["by"] == "olga"
            assert {"at_ms", "node", "op_id", "by", "verified"} <= set.intersection(*map(set, told))
            assert len(told) == 8 and await node.tail("log", 2) == told[-2:] and not await node.tail("log", 0)

    run(go)


def test_follower_is_told_each_record_once_and_the_end_of_holding(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 2, log=2) as (one, two):
            await settled([one, two], 2)
            await one.append("log", b"0")
            await until(lambda: one.users.head("log") == two.users.head("log"))
            seen: list[str] = []

            async def follow() -> None:
                async for row in two.users.tail("log", 10, follow=True):
                    seen.append(row["text"])

            task = asyncio.create_task(follow())
            await until(lambda: seen == ["0"])
            await one.append("log", b"1")
            await until(lambda: len(seen) == 2)
            await two.append("log", b"2")
            await until(lambda: len(seen) == 3)
            assert seen == ["0", "1", "2"]
            await two.users.drop("log")
            with pytest.raises(Refused, match="not held here"):
                await asyncio.wait_for(task, 5.0)

    run(go)


def test_chain_of_the_spec_that_nobody_holds_says_what_it_waits_for(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, 2, kind=ChainStation) as (one, two):
            one.cordoned = two.cordoned = True
            one.wants(log=2, admin=3)
            why = "no node may take it: 2 taking nothing new"
            assert one.users.unheld() == {"log": (2, why)}
            one.cordoned = False
            assert one.users.unheld()["log"][1].startswith(
                f"{one.name} begins it once its view has held still"
            )
            await until(lambda: one.users.holds("log"))
            assert one.users.unheld() == {}

    run(go)


def size_of(station: ChainStation) -> int:
    return station.users.size("log")


def test_chain_is_cut_at_its_size_and_a_fresh_holder_takes_what_is_left(tmp_path: Path) -> None:
    async def go() -> None:
        async with chained(tmp_path, 3) as stations:
            keep = (40_000, None)
            for station in stations:
                station.wants(keep, log=2)
            one, two = held = await settled(stations, 2)
            await one.append("log", b"of another writer")
            for number in range(40):
                await two.append("log", b"%03d" % number + bytes(2000).replace(b"\0", b"."))
            await until(lambda: one.users.head("log") == two.users.head("log"))
            await until(lambda: all(size_of(station) <= keep[0] for station in held))
            assert one.store.mark("log") == two.store.mark("log")
            kept = await one.tail("log")
            assert len(kept) < 41 and kept[0]["gone"] is True and "gone" not in kept[1]
            assert kept[-1]["text"].startswith("039") and all(row["verified"] for row in kept)
            assert "gone" not in (await one.tail("log", 3))[0], "nobody asked for older ones"
            for station in stations:
                station.wants(keep, log=3)
            await settled(stations, 3)
            [fresh] = [station for station in stations if station not in held]
            assert fresh.users.head("log") == one.users.head("log") and not fresh.store.missing("log")
            assert (await fresh.tail("log"))[-1] == kept[-1] and (await fresh.tail("log"))[0]["gone"]
            assert (await fresh.append("log", b"goes on")).recorded == "replicated"
            await until(lambda: len({station.users.head("log") for station in stations}) == 1)
            for station in stations:
                head = station.users.head("log") or ""
                assert all(other.users.covers("log", head) for other in stations)
                assert await station.store.scrub(10**6) == [] and station.store.problems == []
            await fresh.close()
            await fresh.start()
            assert fresh.users._keeps["log"] == keep, "also while no spec is known yet"

    run(go)


def test_records_too_old_for_the_chain_go_and_the_newest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userchains, "AGED_EVERY_S", 0.05)

    async def go() -> None:
        async with chained(tmp_path, 1, log=1) as (one,):
            await settled([one], 1)
            for number in range(5):
                await one.append("log", b"%d" % number)
            assert await one.texts("log") == list("01234")
            one.wants((1 << 20, 1), log=1)
            await until(lambda: one.users.counters["cut"] == 4)
            assert await one.texts("log") == ["4"]
            one.wants((1 << 20, None), log=1)
            await one.append("log", b"5")
            [newest], [first, last] = await one.tail("log", 1), await one.tail("log", 2)
            assert first["gone"] is True and "gone" not in {**newest, **last}

    run(go)


def test_holder_that_was_away_is_not_kept_waiting_for_what_all_others_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicating, "MEND_EVERY_S", 0.05)
    monkeypatch.setattr(replicating, "TICK_S", 0.05)

    async def go() -> None:
        async with chained(tmp_path, 3, log=3) as stations:
            one, two, away = await settled(stations, 3)
            for number in range(5):
                await one.append("log", b"%d" % number)
            await until(lambda: len({station.users.head("log") for station in stations}) == 1)
            away.apart, one.apart, two.apart = {one.id, two.id}, {away.id}, {away.id}
            one.world.changed()
            await until(lambda: not away.replicas._present)
            for number in range(5, 20):
                await one.append("log", b"%d" % number)
            await until(lambda: one.users.head("log") == two.users.head("log"))
            for station in (one, two):
                assert await station.store.retain("log", keep_bytes=4000, keep_ms=10**9) > 10
            away.apart = one.apart = two.apart = set()
            one.world.changed()
            await until(lambda: away.users.head("log") == one.users.head("log"))
            await until(lambda: not away.store.missing("log"))
            texts = await away.texts("log")
            assert texts[:5] == list("01234") and texts[-1] == "19" and len(texts) < 20, (
                "it keeps what it had"
            )
            head = one.users.head("log")
            assert head is not None and away.users.covers("log", head)
            assert [row["missing"] for row in away.replicas.rows()] == [0]

    run(go)


@pytest.mark.parametrize("note", ["kept", "damaged"])
def test_what_is_held_is_held_after_a_restart(tmp_path: Path, note: str) -> None:
    async def go() -> None:
        async with chained(tmp_path, 1, log=1) as (node,):
            await settled([node], 1)
            await node.append("log", b"one")
            if note == "damaged":
                await node.store.remember(userchains.HELD, b"\xc1")
            await node.close()
            await node.start()
            assert node.users.holds("log") and node.room.own.held.items[("chain", "log")]
            assert (await node.append("log", b"two")).link.id == 2
            assert await node.texts("log") == ["one", "two"]

    run(go)
