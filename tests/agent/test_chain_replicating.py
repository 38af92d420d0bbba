"""Chains on several nodes: what is committed is elsewhere too, what was cut off is caught up, the dead are read."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.chain import Failed, Journal, holding, replicating, serving
from agent.chain.adminchain import AdminChain
from agent.chain.blackbox import unfold
from agent.chain.feeds import Draft, FeedStore
from agent.chain.hlc import FUTURE_MAX_MS, Clock, Stamp, following, heard, stamp_of
from agent.chain.journalfeed import JournalFeed
from agent.chain.record import DISPATCHED, Record, encode, hash_of, sign
from agent.chain.replicating import ADMIN, Replicating
from agent.opmessage import NAMESPACE
from discovery import sshsig
from discovery.errors import Refused, RemoteError, Unreachable
from discovery.identity import Identity, id_text
from tests.agent.chains import ANNA, BERT, CARL, GENESIS, MESH, NODES, NOW_MS, fingerprint, mesh_op, node_op

LIMIT_S = 20.0


@dataclass
class Peer:
    id: int
    present: bool = True


class Node:
    """One node of a mesh in memory: its chains are real files, its links are calls."""

    def __init__(self, net: Net, identity: Identity, place: Path, clock_ms: int = 0) -> None:
        self.net, self.identity, self.place, self.skew_ms = net, identity, place, clock_ms
        self.store = FeedStore(place / "chains.db", identity, MESH, now_ms=self.now_ms)
        self.journal = Journal(place / "journal.db", identity, now_ms=self.now_ms)
        self.chain = holding.node_chain(identity.id)
        self.replicas = Replicating(
            self.store,
            me=identity.id,
            members=self.members,
            call=self.call,
            journal=JournalFeed(self.journal, identity.pub, self.chain),
            now_ms=self.now_ms,
        )
        self.admin = AdminChain(self.store, self.replicas, identity, MESH, GENESIS, now_ms=self.now_ms)

    def now_ms(self) -> int:
        return self.net.now_ms + self.skew_ms

    def members(self) -> dict[int, Peer]:
        return {n: Peer(n, self.net.connected(self.identity.id, n)) for n in self.net.nodes}

    async def call(self, member: Any, method: str, params: Any, timeout_s: float) -> Any:
        self.net.calls.append(method)
        if not self.net.connected(self.identity.id, member.id):
            raise Unreachable("cut off")
        frame = msgspec.msgpack.encode(params)
        self.net.largest = max(self.net.largest, len(frame))
        await asyncio.sleep(0)
        answer = await self.net.nodes[member.id].replicas.serve(method, msgspec.msgpack.decode(frame))
        frame = msgspec.msgpack.encode(answer)
        self.net.largest = max(self.net.largest, len(frame))
        if self.net.tear is not None and self.net.tear():
            raise Unreachable("the link broke")
        return msgspec.msgpack.decode(frame)

    async def commit(self, message: bytes, signer: Identity = ANNA, by: str = "anna") -> Any:
        return await self.admin.commit_op(message, sshsig.sign(message, signer, NAMESPACE), by)

    async def close(self) -> None:
        await self.replicas.stop()
        self.journal.close()
        await self.store.close()


def forged(identity: Identity, number: int) -> tuple[bytes, bytes]:
    blob = encode(
        Record(id=number, kind="event", emitted_at_ms=1, disposition=DISPATCHED, prev=bytes(32), body={})
    )
    return blob, sign(hash_of(blob), identity.sign)


class Net:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: dict[int, Node] = {}
        self.down: set[int] = set()
        self.sides: list[set[int]] = []
        self.calls: list[str] = []
        self.largest = 0
        self.tear: Callable[[], bool] | None = None
        self.now_ms = NOW_MS

    def connected(self, one: int, other: int) -> bool:
        split = any((one in side) != (other in side) for side in self.sides)
        return one not in self.down and other not in self.down and not split

    def add(self, identity: Identity, **options: Any) -> Node:
        node = Node(self, identity, self.root / id_text(identity.id), **options)
        self.nodes[identity.id] = node
        return node

    async def tick(self) -> None:
        for node in self.nodes.values():
            if node.identity.id not in self.down:
                await node.replicas.tick()

    def gossip(self) -> None:
        """A push/pull of everybody with everybody."""
        for node in self.nodes.values():
            for other in self.nodes.values():
                if node is not other and self.connected(node.identity.id, other.identity.id):
                    node.replicas.heard(other.identity.id, other.replicas.note(), act=True)


@contextlib.asynccontextmanager
async def mesh(root: Path, count: int = 3) -> AsyncIterator[tuple[Net, list[Node]]]:
    net = Net(root)
    try:
        yield net, [net.add(identity) for identity in NODES[:count]]
    finally:
        for node in net.nodes.values():
            await node.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def alike(nodes: list[Node], chain: str = ADMIN) -> bool:
    return len({node.store.mark(chain) for node in nodes}) == 1


# -- committing -----------------------------------------------------------


def test_commit_of_a_node_alone_is_local_and_of_one_among_others_replicated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 1) as (net, [one]):
            alone = await one.commit(node_op("cordon", 1, one.identity))
            assert (alone.recorded, alone.by, alone.link.id) == ("local", (), 1)
            two = net.add(NODES[1])
            both = await one.commit(node_op("uncordon", 2, one.identity))
            assert (both.recorded, both.by) == ("replicated", (two.identity.id,))
            assert alike([one, two]) and two.store.end_of(ADMIN, one.identity.pub).id == 2
            assert not two.admin.state().desired(id_text(one.identity.id)).cordoned

    run(scenario)


def test_commit_says_local_and_why_when_nobody_confirms_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 3) as (net, [one, *others]):
            await one.commit(node_op("cordon", 1, one.identity))
            await until(lambda: alike([one, *others]))
            net.tear = lambda: True
            said = await one.replicas.commit(ADMIN, "admin.own", {"verb": "x"}, timeout_s=0.05)
            assert said.recorded == "local" and "none of 2 other nodes" in said.reason
            net.tear = None
            await until(lambda: not one.replicas._pushing)
            await one.replicas.tick()
            await until(lambda: alike([one, *others]))
            again = await one.commit(node_op("uncordon", 2, one.identity))
            assert again.recorded == "replicated"
            await until(lambda: alike([one, *others]))

    run(scenario)


@pytest.mark.parametrize(
    ("message", "signer", "code"),
    [
        (lambda me: node_op("drain", 1, NODES[3], NOW_MS), CARL, "unknown_key"),
        (lambda me: node_op("drain", 1, me, NOW_MS + 365 * 86_400_000), ANNA, "not_yet"),
        (lambda me: node_op("drain", 1, me, NOW_MS - 600_000), ANNA, "expired"),
        (lambda me: mesh_op("apply", {"sha256": "0" * 64}, 1, me, NOW_MS), ANNA, "malformed"),
        (
            lambda me: mesh_op("revoke_operator", {"fingerprint": fingerprint(BERT)}, 1, NODES[2]),
            ANNA,
            "wrong_target",
        ),
        (lambda me: b'{"v":1}', ANNA, "malformed"),
    ],
)
def test_what_would_be_void_is_refused_at_commit_and_written_nowhere(
    tmp_path: Path, message, signer, code
) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 1) as (_, [one]):
            with pytest.raises(Refused) as refused:
                await one.commit(message(one.identity), signer)
            assert refused.value.code == code
            assert one.store.chains() == []

    run(scenario)


def test_op_committed_twice_is_refused_the_second_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (_, [one, two]):
            message = node_op("drain", 1, NODES[4])
            await one.commit(message)
            await until(lambda: alike([one, two]))
            for node in (one, two):
                with pytest.raises(Refused) as refused:
                    await node.commit(message)
                assert refused.value.code == "op_id_reused"

    run(scenario)


def test_result_and_own_word_of_a_node_reach_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (_, [one, two]):
            await one.admin.commit_own("maintenance", state="maintenance", reason=None)
            await one.admin.commit_result("0" * 26, "drain", "done", None)
            await until(lambda: alike([one, two]))
            state = two.admin.state().desired(id_text(one.identity.id))
            assert state.maintenance_state == "maintenance"

    run(scenario)


def test_spec_that_is_in_force_is_read_from_its_record_on_every_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            for n, content in enumerate((b"[[daemon]]\n", b"x" * 150_000), 1):
                net.now_ms += 5
                args = {"sha256": hashlib.sha256(content).hexdigest()}
                message = mesh_op("apply", args, n, one.identity, net.now_ms)
                signature = sshsig.sign(message, ANNA, NAMESPACE)
                await one.admin.commit_op(message, signature, "anna", content)
            await until(lambda: alike([one, two]))
            spec = two.admin.state().spec
            assert spec is not None and spec.by == "anna"
            assert two.admin.content(spec) == one.admin.content(spec) == b"x" * 150_000
            with pytest.raises(Refused) as refused:
                await one.admin.commit_op(message, signature, "anna", b"x" * 200_000)
            assert refused.value.code == "too_large"

    run(scenario)


def test_chains_are_listed_with_what_is_kept_and_what_is_missing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            two.replicas.held.add("notes")
            await one.replicas.commit("notes", "n", {"text": "x"})
            await one.commit(node_op("cordon", 1, NODES[3]))
            await until(lambda: alike([one, two]) and alike([one, two], "notes"))
            one.journal.append("event", durable=True)
            await net.tick()
            await until(lambda: two.store.end_of(one.chain, one.identity.pub).id == 1)
            rows = {row["chain"]: row for row in two.replicas.rows()}
            assert set(rows) == {"admin", "notes", one.chain, two.chain}
            assert rows["notes"]["feeds"] == [
                {"node": id_text(one.identity.id), "records": 1, "newest": 1, "missing": 0, "frozen_at": None}
            ]
            assert (rows["notes"]["kept"], rows["notes"]["records"], rows["notes"]["missing"]) == (True, 1, 0)
            assert rows["notes"]["bytes"] > 100 and rows[two.chain]["own"] and not rows["admin"]["own"]

    run(scenario)


# -- cut off, and together again -----------------------------------------------------------


def test_partition_with_ops_on_both_sides_heals_to_one_state(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 4) as (net, nodes):
            one, two, _three, _four = nodes
            await net.tick()
            await one.commit(
                mesh_op("grant_operator", {"line": GENESIS[1].replace("bert", "b2")}, 1, one.identity)
            )
            await until(lambda: alike(nodes))
            net.sides = [{one.identity.id, two.identity.id}]
            await net.tick()
            for n in range(2, 12):
                net.now_ms += 3
                left, right = nodes[n % 2], nodes[2 + n % 2]
                await left.commit(node_op("cordon", n, NODES[n % 5], net.now_ms))
                await right.commit(
                    node_op("uncordon" if n % 3 else "drain", 100 + n, NODES[n % 5], net.now_ms)
                )
            assert not alike(nodes)
            states = {msgspec.msgpack.encode(node.admin.state()) for node in nodes}
            assert len(states) > 1
            net.sides = []
            began = asyncio.get_running_loop().time()
            await net.tick()
            net.gossip()
            await until(lambda: alike(nodes))
            assert asyncio.get_running_loop().time() - began < 10
            states = {msgspec.msgpack.encode(node.admin.state()) for node in nodes}
            assert len(states) == 1

    run(scenario)


def test_operator_revoked_while_cut_off_keeps_signing_and_is_void_everywhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 3) as (net, nodes):
            one, _two, three = nodes
            seen = await one.commit(node_op("cordon", 1, NODES[3]), BERT, "bert")
            await until(lambda: alike(nodes))
            net.sides = [{three.identity.id}]
            last = one.admin.last_of(fingerprint(BERT))
            assert last is not None and last.stamp == seen.stamp
            net.now_ms += 50
            named = [last.wall_ms, last.counter, id_text(last.node), last.number]
            args = {"fingerprint": fingerprint(BERT), "last": named}
            for n in range(5):
                net.now_ms += 5
                kept_on = await three.commit(node_op("drain", 10 + n, NODES[n % 3], net.now_ms), BERT, "bert")
                assert kept_on.recorded == "local"
                if n == 3:
                    await one.commit(mesh_op("revoke_operator", args, 2, one.identity, net.now_ms))
            assert three.admin.state().nodes.keys() > one.admin.state().nodes.keys()
            net.sides = []
            net.gossip()
            await until(lambda: alike(nodes))
            for node in nodes:
                state = node.admin.state()
                assert list(state.nodes) == [id_text(NODES[3].id)]
                void = [verdict for _, verdict in await node.admin.judged() if verdict]
                assert len(void) == 5 and all(v.startswith("revoked: ") for v in void)
                with pytest.raises(Refused) as refused:
                    await node.commit(node_op("drain", 99, NODES[1], net.now_ms), BERT)
                assert refused.value.code == "revoked"

    run(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_cut_restarted_and_committed_meanwhile_all_nodes_end_alike(
    tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)

    async def scenario() -> None:
        async with mesh(tmp_path, 4) as (net, _nodes):
            for n in range(1, 51):
                net.now_ms += dice.randrange(40)
                who = dice.choice(NODES[:4])
                chance = dice.random()
                if chance < 0.1:
                    net.sides = [set(dice.sample([i.id for i in NODES[:4]], 2))] if not net.sides else []
                elif chance < 0.2:
                    await net.nodes[who.id].close()
                    net.add(who)
                elif chance < 0.3:
                    net.gossip()
                    await net.tick()
                else:
                    verb = dice.choice(("cordon", "uncordon", "drain", "resume", "kill"))
                    message = node_op(verb, n, dice.choice(NODES), net.now_ms)
                    await net.nodes[who.id].commit(message, dice.choice((ANNA, BERT)), "x")
            net.sides = []
            last = list(net.nodes.values())
            await net.tick()
            while not alike(last):
                net.gossip()
                await until(lambda: not any(node.replicas._syncing for node in last))
            states = {msgspec.msgpack.encode(node.admin.state(), order="deterministic") for node in last}
            assert len(states) == 1
            assert len(await last[0].admin.judged()) > 20
            for node in last:
                assert node.store.counters["forks"] == 0 and node.store.missing() == []
                assert node.store.problems == []

    run(scenario)


def test_only_members_are_answered(tmp_path: Path) -> None:
    class Outside:
        class login:
            node = None

    class Member:
        class login:
            node = 7

    async def scenario() -> None:
        async with mesh(tmp_path, 1) as (_, [one]):
            for method, handle in one.replicas.methods().items():
                with pytest.raises(Refused) as refused:
                    await handle(Outside(), {"chain": "admin"})
                assert refused.value.code == "login", method
            assert await one.replicas.methods()["chain_vectors"](Member(), {"chain": "admin"}) == {
                "heads": [],
                "more": False,
            }

    run(scenario)


def test_record_of_a_node_whose_clock_is_a_year_ahead_waits_and_moves_no_clock(tmp_path: Path) -> None:
    async def scenario() -> None:
        year_ms = 365 * 86_400_000
        async with mesh(tmp_path, 1) as (net, [one]):
            ahead = net.add(NODES[1], clock_ms=year_ms)
            await ahead.commit(node_op("cordon", 1, NODES[3], NOW_MS + year_ms))
            await until(lambda: alike([one, ahead]))
            assert one.admin.state().nodes == {}
            assert [verdict.partition(":")[0] for _, verdict in await one.admin.judged()] == ["ahead"]
            said = await one.commit(node_op("drain", 2, NODES[3]))
            assert said.stamp.wall_ms == NOW_MS
            assert one.admin.state().desired(id_text(NODES[3].id)).drain is not None
            net.now_ms += year_ms
            assert one.admin.state().desired(id_text(NODES[3].id)).cordoned

    run(scenario)


def test_late_joiner_catches_up_over_a_link_that_breaks_in_bounded_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PULL_BYTES", 20_000)
    monkeypatch.setattr(serving, "HEADS_A_FRAME", 2)

    async def scenario() -> None:
        async with mesh(tmp_path, 3) as (net, nodes):
            for node in nodes:
                await node.store.append_all(
                    ADMIN, [Draft("n", {"n": n, "pad": "x" * 100}) for n in range(400)]
                )
            for other in nodes[1:]:
                await nodes[0].replicas.sync(Peer(other.identity.id), ADMIN)
            late = net.add(NODES[3])
            net.largest = 0
            breaks = iter([False, False, False, False, True, False, False, True])
            net.tear = lambda: next(breaks, False)
            tries = 0
            while not alike([nodes[0], late]):
                tries += 1
                with contextlib.suppress(Unreachable):
                    await late.replicas.sync(Peer(NODES[0].id), ADMIN)
            assert tries == 3
            assert net.calls.count("chain_pull") < 2 * (1200 * 260 // 20_000) + 10
            assert net.largest < 22_000
            assert await late.store.scrub(10**6) == []
            assert len(list(late.store.records(ADMIN))) == 1200

    run(scenario)


def test_member_that_was_away_is_pulled_from_as_soon_as_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            net.down.add(two.identity.id)
            await one.replicas.tick()
            await one.commit(node_op("cordon", 1, NODES[3]))
            net.down.clear()
            await net.tick()
            await until(lambda: alike([one, two]))

    run(scenario)


def test_node_set_back_to_an_old_disk_takes_up_its_own_later_records(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            await one.commit(node_op("cordon", 1, NODES[3]))
            await one.store.flush()
            await one.close()
            saved = {file: file.read_bytes() for file in one.place.iterdir()}
            one = net.add(NODES[0])
            for n in range(2, 6):
                await one.commit(node_op("cordon", n, NODES[3]))
            await until(lambda: alike([one, two]))
            await one.close()
            for file in one.place.iterdir():
                file.unlink()
            for file, content in saved.items():
                file.write_bytes(content)
            one = net.add(NODES[0])
            assert one.store.end_of(ADMIN, one.identity.pub).id == 1
            said = await one.commit(node_op("cordon", 9, NODES[3]))
            assert said.link.id == 6
            await until(lambda: alike([one, two]))
            assert two.store.counters["forks"] == one.store.counters["forks"] == 0

    run(scenario)


def test_fork_is_traced_frozen_and_told_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRACE_RECORDS", 4)

    async def scenario() -> None:
        async with mesh(tmp_path, 3) as (net, nodes):
            one, two, _three = nodes
            clone = Net(tmp_path / "clone").add(NODES[4])
            forked = net.add(NODES[4])
            await forked.store.append_all(ADMIN, [Draft("n", {"hlc": [NOW_MS, n]}) for n in range(5)])
            await clone.store.append_all(
                ADMIN, [Draft("n", {"hlc": [NOW_MS, n]}, at_ms=NOW_MS) for n in range(5)]
            )
            same = clone.store.mark(ADMIN) == forked.store.mark(ADMIN)
            assert same, "the clone has the same beginning"
            await forked.store.append_all(ADMIN, [Draft("mine", {"hlc": [NOW_MS, n]}) for n in range(5, 20)])
            await clone.store.append_all(ADMIN, [Draft("its", {"hlc": [NOW_MS, n]}) for n in range(5, 22)])
            await one.replicas.sync(Peer(NODES[4].id), ADMIN)
            net.nodes[NODES[4].id] = clone
            await two.replicas.sync(Peer(NODES[4].id), ADMIN)
            net.down.add(NODES[4].id)
            for _ in range(3):
                net.gossip()
                await until(lambda: not any(n.replicas._syncing for n in nodes))
            for node in nodes:
                assert node.store.heads(ADMIN)[NODES[4].pub].fork == 6
                assert node.admin.state().forks == {NODES[4].id: 6}
                assert any("two records 6; frozen there" in p for p in node.store.problems)
            await clone.close()
            net.nodes[NODES[4].id] = forked

    run(scenario)


def test_damage_is_mended_from_whichever_member_has_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (_net, [one, two]):
            for n in range(1, 6):
                await one.commit(node_op("cordon", n, NODES[n % 5]))
            await until(lambda: alike([one, two]))
            state = one.admin.state()
            await one.store._do(
                lambda: one.store._set_aside(ADMIN, one.identity.pub, 3, "found altered"), False
            )
            assert one.store.missing(ADMIN)
            one.replicas._mended_at -= 10
            await one.replicas.tick()
            await until(lambda: not one.store.missing(ADMIN))
            assert one.admin.state() == state
            assert one.store.problems and alike([one, two])

    run(scenario)


def test_nonsense_from_a_member_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (_net, [one, two]):
            await one.commit(node_op("cordon", 1, NODES[3]))
            for method in ("chain_vectors", "chain_pull", "chain_push", "chain_trace", "chain_other"):
                for params in (
                    None,
                    7,
                    {},
                    {"chain": 1},
                    {"chain": "admin", "parcels": [[b"x"]], "wants": 3},
                ):
                    if (
                        method == "chain_vectors"
                        and isinstance(params, dict)
                        and params.get("chain") == "admin"
                    ):
                        continue
                    with pytest.raises(Refused) as refused:
                        await one.replicas.serve(method, params)
                    assert refused.value.code in ("malformed", "unknown_method")
            with pytest.raises(Refused) as refused:
                await one.replicas.serve("chain_push", {"chain": "not-mine", "parcels": []})
            assert refused.value.code == "not_held"
            one.replicas.heard(two.identity.id, [["admin"], 3, ["admin", "x"], [None, b""]], act=True)
            one.replicas.heard(12345, [["admin", b"12345678"]], act=True)
            one.replicas.heard(two.identity.id, {"admin": 1}, act=True)

            async def lies(*_: Any) -> Any:
                return {"heads": [[b"short", [1, b"x"]]]}

            two.replicas._call = lies
            with pytest.raises(RemoteError):
                await two.replicas.sync(Peer(one.identity.id), ADMIN)

    run(scenario)


def test_chain_is_read_again_after_a_restart_in_steps_and_without_checking_signatures_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            for n in range(1, 61):
                net.now_ms += 1
                await (one, two)[n % 2].commit(node_op("cordon", n, NODES[n % 5], net.now_ms))
            await until(lambda: alike([one, two]))
            state = one.admin.state()
            await one.admin.save()
            net.now_ms += 1
            await two.commit(node_op("drain", 61, NODES[1], net.now_ms))
            await until(lambda: alike([one, two]))
            await one.close()
            checks = []
            was = sshsig.verify
            monkeypatch.setattr(sshsig, "verify", lambda *args: checks.append(args) or was(*args))
            one = net.add(NODES[0])
            steps = 0

            async def tick() -> None:
                nonlocal steps
                while True:
                    steps += 1
                    await asyncio.sleep(0)

            ticking = asyncio.create_task(tick())
            again = await one.admin.load()
            ticking.cancel()
            assert len(checks) == 1 and steps >= 6
            assert again == two.admin.state() != state
            assert [verdict for _, verdict in await one.admin.judged()] == [None] * 61
            assert one.replicas.clock.last == Stamp(net.now_ms, 0)

    run(scenario)


# -- the black box -----------------------------------------------------------


def test_last_minutes_of_a_node_that_burnt_down_are_read_from_its_holders(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 5) as (net, nodes):
            lost = nodes[2]
            chain = lost.chain
            for n in range(10):
                lost.journal.append(
                    "action.start_daemon", {"daemon": f"d{n}"}, Failed("no such file"), at_ms=NOW_MS + n
                )
            lost.journal.append("node.vitals", {"cpu": 0.97, "mem": 0.5, "disk": 2.0}, at_ms=NOW_MS + 20)
            lost.journal.append(
                "daemon.changed", {"name": "web", "state": "running", "pid": 7}, at_ms=NOW_MS + 21
            )
            lost.journal.append("daemon.changed", {"name": "old", "state": "running"}, at_ms=NOW_MS + 21)
            lost.journal.append("daemon.changed", {"name": "old", "state": "gone"}, at_ms=NOW_MS + 22)
            moved = {"from": "alive", "to": "degraded", "reason": "cpu over 95 %", "by": None, "op_id": None}
            lost.journal.append("node.state_changed", moved, at_ms=NOW_MS + 23, durable=True)
            keepers = holding.holders(chain, [n.identity.id for n in nodes])
            assert len(keepers) == 3 and lost.identity.id not in keepers
            await net.tick()
            await until(
                lambda: all(
                    net.nodes[n].store.mark(chain) == lost.replicas._source(chain).mark(chain)
                    for n in keepers
                )
            )
            assert [n.identity.id for n in nodes if chain in n.store.chains()] == [
                n.identity.id for n in nodes if n.identity.id in keepers
            ]
            net.down.add(lost.identity.id)
            net.now_ms += 5000
            for node in nodes:
                if node is lost:
                    continue
                page = await node.replicas.latest(lost.identity.id)
                assert page["source"] in {id_text(n) for n in keepers}
                assert page["age_ms"] == 4977
                box = page["page"]
                assert box["trail"][-1] == {**moved, "at_ms": NOW_MS + 23}
                assert [f["target"] for f in box["failures"]] == [f"d{n}" for n in range(10)]
                assert box["failures"][0]["reason"] == "no such file"
                assert box["vitals"] == {"at_ms": NOW_MS + 20, "cpu": 0.97, "mem": 0.5, "disk": None}
                assert [(d["name"], d["state"], d["pid"]) for d in box["daemons"]] == [("web", "running", 7)]
            with pytest.raises(Refused) as refused:
                await nodes[0].replicas.latest(99)
            assert refused.value.code == "unknown"

    run(scenario)


def test_journal_with_damaged_and_cut_records_is_followed_all_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            for n in range(50):
                one.journal.append("event", {"n": n}, at_ms=n, durable=n == 49)
            await net.tick()
            await until(lambda: two.store.end_of(one.chain, one.identity.pub).id == 50)
            one.journal._db.execute("UPDATE records SET blob = x'01' WHERE id = 50")
            one.journal.verify(repair=True)
            one.journal.append("after", durable=True)
            await net.tick()
            await until(lambda: two.store.end_of(one.chain, one.identity.pub).id == 52)
            kept = [s.record for s in two.store.records(one.chain)]
            assert [r.id for r in kept] == list(range(1, 53))
            assert [r.kind for r in kept[-2:]] == ["chain.damage", "after"]
            assert two.store.counters["forks"] == 0 and two.store.missing() == []
            late = net.add(NODES[2])
            await late.replicas.sync(Peer(one.identity.id), one.chain)
            assert [s.record.id for s in late.store.records(one.chain)] == [*range(1, 50), 51, 52]
            assert late.store.missing() == []

    run(scenario)


def test_newest_of_the_journal_is_with_its_holders_before_the_next_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicating, "TICK_S", 3600.0)

    async def scenario() -> None:
        async with mesh(tmp_path, 3) as (net, [one, two, three]):
            running = asyncio.create_task(one.replicas.run())
            await asyncio.sleep(0)
            for n in range(20):
                one.journal.append("failure.daemon", {"n": n}, Failed("it burns"))
            ours = one.identity.pub
            await until(lambda: all(node.store.end_of(one.chain, ours).id == 20 for node in (two, three)))
            assert net.calls.count("chain_push") <= 4, "all of them together"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            one.journal.append("event", durable=True)
            assert one.replicas._journal_due is None, "who has stopped tells nobody"

    run(scenario)


def test_journal_that_was_deleted_goes_on_for_its_holders(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            for n in range(9):
                one.journal.append("event", {"n": n}, at_ms=n, durable=n == 8)
            await net.tick()
            await until(lambda: two.store.end_of(one.chain, one.identity.pub).id == 9)
            await until(lambda: not one.replicas._pushing)
            one.journal.close()
            for path in one.place.glob("journal.db*"):
                path.unlink()
            one.journal = Journal(
                one.place / "journal.db", one.identity, now_ms=one.now_ms, wrote_before=True
            )
            assert "no journal was there" in one.journal.problems[0] and one.journal.verify().ok
            one.replicas._journal = JournalFeed(one.journal, one.identity.pub, one.chain)
            one.journal.append("after", durable=True)
            async with asyncio.timeout(LIMIT_S):
                while two.store.end_of(one.chain, one.identity.pub) != one.journal.committed:
                    await net.tick()
                    await asyncio.sleep(0.01)
            kept = [s.record for s in two.store.records(one.chain)]
            assert [r.kind for r in kept] == ["event"] * 9 + ["chain.damage", "after"]
            assert two.store.counters["forks"] == 0 and two.store.missing() == []
            (row,) = [row for row in two.replicas.rows() if row["chain"] == one.chain]
            assert row["records"] == 11

    run(scenario)


def test_records_that_a_journal_lost_come_back_from_a_holder(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with mesh(tmp_path, 2) as (net, [one, two]):
            for n in range(80):
                one.journal.append("event", {"n": n}, at_ms=n, durable=n == 79)
            await net.tick()
            await until(lambda: two.store.end_of(one.chain, one.identity.pub).id == 80)
            one.journal._db.execute("UPDATE records SET blob = x'01' WHERE id IN (20, 21, 80)")
            one.journal._db.execute("DELETE FROM records WHERE id = 50")
            one.journal.verify(repair=True)
            one.journal.append("after", durable=True)
            assert one.journal.missing() == [(20, 21), (50, 50), (80, 80)]
            foreign = forged(two.identity, 50)
            assert one.journal.fill([foreign, (b"", b"")]) == 0
            one.replicas._mended_at -= 10
            await net.tick()
            await until(lambda: one.journal.missing() == [])
            assert one.replicas.counters["journal_mended"] == 4
            assert [r.body for r in one.journal.tail(200) if r.kind == "event"] == [
                {"n": n} for n in range(80)
            ]
            assert one.journal.verify().ok, one.journal.verify().damage
            one.journal.flush()
            await net.tick()
            await until(lambda: two.store.mark(one.chain) == one.replicas._source(one.chain).mark(one.chain))
            one.journal.close()
            one.journal = Journal(one.place / "journal.db", one.identity)
            assert one.journal.problems == []

    run(scenario)


def test_holders_are_agreed_upon_and_few_move_when_a_node_goes() -> None:
    nodes = list(range(1, 41))
    chains = [holding.node_chain(n) for n in nodes]
    before = {chain: holding.holders(chain, nodes) for chain in chains}
    assert before == {chain: holding.holders(chain, reversed(nodes)) for chain in chains}
    assert all(
        len(held) == 3 and chain not in map(holding.node_chain, held) for chain, held in before.items()
    )
    after = {chain: holding.holders(chain, [n for n in nodes if n != 7]) for chain in chains}
    for chain, held in before.items():
        assert set(held) - {7} <= set(after[chain])
    assert holding.holders("notes", [5], 3) == [5]


def test_fold_of_a_chain_keeps_little_however_long_it_is() -> None:
    def long() -> Any:
        for n in range(20_000):
            yield Record(
                id=n,
                kind="action.pull_replica",
                emitted_at_ms=n,
                disposition=Failed("x" * 50),
                prev=bytes(32),
            )

    box = unfold(long())
    assert box.records == 20_000 and len(box.failures) == 256 and box.failures[-1]["at_ms"] == 19_999
    assert len(msgspec.msgpack.encode(box)) < 64 * 1024


# -- the clock -----------------------------------------------------------


def test_stamps_follow_what_was_seen_and_no_clock_follows_the_far_future() -> None:
    clock = Clock()
    assert clock.issue(1000) == Stamp(1000, 0) < clock.issue(1000) == Stamp(1000, 1) < clock.issue(999)
    clock.hear(Stamp(5000, 7), 1000)
    assert clock.issue(1001) == Stamp(5000, 8)
    clock.hear(Stamp(1001 + FUTURE_MAX_MS + 1, 0), 1001)
    assert clock.issue(1002) == Stamp(5000, 9)
    assert heard(Stamp(9, 9), Stamp(1, 1), 0) == Stamp(9, 9)
    assert following(Stamp(10**9, 5), 1000) == Stamp(1000, 0)
    for odd in (None, [1], [1, "x"], [-1, 0], [1, 2**60], "ab"):
        with pytest.raises(RemoteError):
            stamp_of(odd)
