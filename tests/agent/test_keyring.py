"""The key ring of a mesh: its steps, its file, and nodes that move it on together, without a network."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

import agent.rotation
from agent.home import Home, make_secret, read_secret
from agent.keyring import (
    OLD_MAX,
    Kept,
    KeyFile,
    Ring,
    begin,
    learned,
    moved,
    pack,
    parse,
    switch,
    text,
    unpack,
)
from agent.rotation import Rotation
from discovery.errors import LocalError, Refused, RemoteError, Unreachable
from discovery.identity import Identity, verify
from discovery.lifecycle import State
from discovery.seal import Keyring, Opener, Sealer, UnknownKey

A, B, C = (bytes([n]) * 32 for n in (1, 2, 3))
MESH = Identity.from_seed(bytes(32))
NOW_MS = 1_800_000_000_000
SETTLED = Kept(Ring(mesh="alpha", generation=0, primary=A), {})


def spreading(retire_ms: int = 5000) -> Kept:
    return moved(SETTLED, begin(SETTLED.ring, B, retire_ms), NOW_MS)


def switched(retire_ms: int = 5000) -> Kept:
    return moved(spreading(retire_ms), switch(spreading(retire_ms).ring), NOW_MS)


# --- the ring


def test_ring_seals_with_the_old_key_until_it_switches() -> None:
    assert spreading().ring.primary == A and spreading().ring.next == B
    ring = switched().ring
    assert (ring.generation, ring.primary, ring.next, [k.raw for k in ring.old]) == (2, B, None, [A])


def test_ring_that_is_rotated_already_is_refused() -> None:
    with pytest.raises(Refused, match="already") as caught:
        begin(spreading().ring, C, 1000)
    assert caught.value.code == "rotating"


def test_ring_with_too_many_old_keys_is_refused() -> None:
    ring = SETTLED.ring
    for n in range(OLD_MAX):
        ring = switch(begin(ring, bytes([10 + n]) * 32, 1000))
    with pytest.raises(Refused) as caught:
        begin(ring, C, 1000)
    assert caught.value.code == "too_many_keys"


def test_switch_is_the_same_ring_wherever_it_is_made_and_whatever_retired_meanwhile() -> None:
    first = switched().ring
    here = begin(first, C, 1000)
    there = msgspec.structs.replace(here, old=())
    assert here.order == there.order
    assert switch(here).order == switch(there).order > here.order


def test_two_rings_of_one_generation_are_told_apart() -> None:
    one, other = begin(SETTLED.ring, B, 1000), begin(SETTLED.ring, C, 1000)
    assert one.order != other.order and (one.order < other.order) != (other.order < one.order)


def test_old_key_keeps_its_own_time_over_a_further_rotation() -> None:
    first = switched(60_000)
    later = NOW_MS + 20_000
    second = moved(first, begin(first.ring, C, 5000), later)
    third = moved(second, switch(second.ring), later)
    assert third.left_ms(later) == [40_000, 5000]
    assert [k.raw for k in third.retired(later + 5000).ring.old] == [A]


def test_clock_set_back_gives_an_old_key_no_more_than_its_time() -> None:
    assert switched(5000).left_ms(NOW_MS - 3_600_000) == [5000]
    assert learned(switched().ring, [3_600_000], NOW_MS).left_ms(NOW_MS) == [5000]


# --- between members


def test_ring_travels_with_what_is_left_to_its_keys() -> None:
    data = pack(switched(), MESH.sign, NOW_MS + 2000)
    kept = unpack(data, "alpha", MESH.pub, verify, NOW_MS + 999_000)
    assert kept.ring == switched().ring
    assert kept.left_ms(NOW_MS + 999_000) == [3000]


@pytest.mark.parametrize(
    ("signer", "mesh", "code"),
    [(Identity.from_seed(bytes([9]) * 32), "alpha", "other_identity"), (MESH, "beta", "wrong_mesh")],
)
def test_ring_of_somebody_else_is_refused(signer: Identity, mesh: str, code: str) -> None:
    with pytest.raises(Refused) as caught:
        unpack(pack(switched(), signer.sign, NOW_MS), mesh, MESH.pub, verify, NOW_MS)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 2},
        {"next": None},
        {"next": A},
        {"primary": b"short"},
        {"retire_ms": -1},
        {"retire_ms": 10**12},
    ],
)
def test_ring_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    ring = msgspec.structs.replace(spreading().ring, **change)
    with pytest.raises(RemoteError):
        unpack(pack(Kept(ring, {}), MESH.sign, NOW_MS), "alpha", MESH.pub, verify, NOW_MS)


@pytest.mark.parametrize("data", [b"", b"\x90", b"\xc1", bytes(range(64))])
def test_garbage_for_a_ring_raises_remote_error(data: bytes) -> None:
    with pytest.raises(RemoteError):
        unpack(data, "alpha", MESH.pub, verify, NOW_MS)


# --- the file


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    home = Home.open(tmp_path)
    make_secret(home.mesh_key_file("alpha"))
    return KeyFile(home.mesh_key_file("alpha"), "alpha")


def test_file_of_a_key_that_was_never_rotated_is_read_as_it_always_was(file: KeyFile) -> None:
    kept = file.read(NOW_MS)
    assert kept.ring == Ring(mesh="alpha", generation=0, primary=read_secret(file.path, "key"))
    assert text(kept) == file.path.read_text()


@pytest.mark.parametrize("kept", [SETTLED, spreading(), switched()])
def test_file_says_the_whole_ring(kept: Kept) -> None:
    assert parse(text(kept), "alpha") == kept
    assert base64.b64decode(text(kept).splitlines()[0]) == kept.ring.primary


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "x",
        "AAAA",
        text(spreading()) + "more\n",
        text(spreading()).replace("generation 1", "generation 2"),
    ],
)
def test_damaged_file_is_told_with_its_path(file: KeyFile, damaged: str) -> None:
    file.path.write_text(damaged)
    with pytest.raises(LocalError, match=r"mesh\.key.*restore"):
        file.read(NOW_MS)


def test_file_that_others_can_read_is_refused(file: KeyFile) -> None:
    file.path.chmod(0o644)
    with pytest.raises(LocalError, match="chmod 600"):
        file.read(NOW_MS)


def test_file_only_grows(file: KeyFile) -> None:
    base = file.read(NOW_MS)
    one = moved(base, begin(base.ring, B, 5000), NOW_MS)
    two = moved(one, switch(one.ring), NOW_MS)
    assert file.advance(two, NOW_MS) == two
    assert file.advance(one, NOW_MS) == two, "an older ring leaves what is there"
    assert file.read(NOW_MS) == two
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_retired_key_leaves_the_file(file: KeyFile) -> None:
    base = file.read(NOW_MS)
    one = moved(base, begin(base.ring, B, 5000), NOW_MS)
    file.advance(moved(one, switch(one.ring), NOW_MS), NOW_MS)
    file.retire(NOW_MS + 4999)
    assert len(file.path.read_text().splitlines()) == 3
    file.retire(NOW_MS + 5000)
    assert file.path.read_text().splitlines()[1:] == ["generation 2"]


# --- sealing under it


def test_sender_that_has_only_the_old_key_is_answered_under_it() -> None:
    now = switched().ring.keyring()
    opener, sealer = Opener(now, "p"), Sealer(now, "p", 1, 0, bytes(8))
    late = Sealer(Keyring([A]), "p", 2, 0, bytes(8))
    heard: list[tuple[int, bytes]] = []
    opener.on_other_key = lambda sender, raw: heard.append((sender, raw))
    opener.open(late.seal(b"hello"), 0.0, "there")
    assert heard == [(2, A)]
    answer = sealer.seal(b"welcome", opener.key_for("there"))
    assert Opener(Keyring([A]), "p").open(answer, 0.0) == (1, b"welcome")
    assert opener.key_for("elsewhere") is None
    late.rotate(now)
    opener.open(late.seal(b"caught up"), 0.0, "there")
    assert opener.key_for("there") is None
    with pytest.raises(UnknownKey):
        Opener(Keyring([A]), "p").open(sealer.seal(b"for all"), 0.0)


def test_key_that_left_the_ring_is_not_answered_under() -> None:
    both, only = switched().ring.keyring(), Keyring([B])
    opener, sealer = Opener(both, "p"), Sealer(both, "p", 1, 0, bytes(8))
    opener.open(Sealer(Keyring([A]), "p", 2, 0, bytes(8)).seal(b""), 0.0, "there")
    opener.rotate(only)
    sealer.rotate(only)
    assert opener.key_for("there") is None
    assert Opener(only, "p").open(sealer.seal(b"x", A), 0.0) == (1, b"x")


# --- nodes that rotate


class Mesh:
    """Nodes of as many homes that hold the same key; `cut` holds those that nobody reaches."""

    def __init__(self, place: Path, count: int = 3) -> None:
        self.cut: set[int] = set()
        self.members: dict[int, Any] = {}
        self.nodes: dict[int, Rotation] = {}
        self.files: dict[int, KeyFile] = {}
        self.told: dict[int, list[tuple[str, int]]] = {}
        self.tasks: list[asyncio.Task[None]] = []
        for node in range(1, count + 1):
            record = SimpleNamespace(name=f"n{node}")
            self.members[node] = SimpleNamespace(id=node, present=True, record=record, state=State.ALIVE)
        for node in self.members:
            path = place / str(node) / "mesh.key"
            path.parent.mkdir()
            path.touch(0o600)
            path.write_text(text(SETTLED))
            self.files[node] = KeyFile(path, "alpha")
            self.told[node] = []
            self.nodes[node] = self.make(node)

    def make(self, node: int, identity: Identity = MESH) -> Rotation:
        async def call(member: Any, method: str, params: Any, timeout_s: float) -> Any:
            await asyncio.sleep(0)
            if member.id in self.cut or node in self.cut:
                raise Unreachable(f"n{member.id}: no answer")
            assert method == "keyring"
            return self.nodes[member.id].answer(node, params)

        def emit(kind: str, **fields: Any) -> None:
            if kind == "keys.rotated":
                self.told[node].append((fields["stage"], fields["generation"]))

        return Rotation(
            self.files[node],
            self.files[node].read(0),
            me=node,
            identity=lambda: identity,
            members=lambda: {n: m for n, m in self.members.items() if n != node},
            call=call,
            emit=emit,
        )

    def run(self, *nodes: int) -> None:
        self.tasks += [asyncio.create_task(self.nodes[n].run()) for n in nodes or self.nodes]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"waited in vain: {what}; {self.told}")

    def generations(self) -> list[int]:
        return [node.ring.generation for node in self.nodes.values()]

    def settled(self, generation: int) -> bool:
        orders = {node.ring.order for node in self.nodes.values()}
        return len(orders) == 1 and set(self.generations()) == {generation}


def rotating(place: Path, test: Callable[[Mesh], Awaitable[None]], count: int = 3) -> None:
    async def main() -> None:
        mesh = Mesh(place, count)
        try:
            await test(mesh)
        finally:
            for task in mesh.tasks:
                task.cancel()
            ended = await asyncio.gather(*mesh.tasks, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) for e in ended), ended

    asyncio.run(main())


def test_rotation_reaches_everybody_and_then_switches(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.run()
        mesh.nodes[1].rotate(60_000)
        await mesh.until(lambda: mesh.settled(2), "all have switched")
        await mesh.until(lambda: not mesh.nodes[1].status()["waiting_for"], "the driver knows")
        assert all(told == [("spreading", 1), ("switched", 2)] for told in mesh.told.values())
        assert {f.path.read_text().splitlines()[0] for f in mesh.files.values()} == {
            mesh.files[1].path.read_text().splitlines()[0]
        }

    rotating(tmp_path, test)


def test_rotation_in_a_mesh_of_one_switches_at_once(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.run()
        mesh.nodes[1].rotate()
        await mesh.until(lambda: mesh.settled(2), "it has switched")

    rotating(tmp_path, test, 1)


def test_member_that_does_not_answer_holds_the_switch_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.rotation, "RETRY_S", 0.02)

    async def test(mesh: Mesh) -> None:
        mesh.run()
        mesh.cut = {3}
        mesh.nodes[1].rotate()
        await mesh.until(lambda: mesh.generations() == [1, 1, 0], "two have the next key")
        await asyncio.sleep(0.1)
        assert mesh.generations() == [1, 1, 0]
        status = mesh.nodes[1].status()
        assert status["waiting_for"] == ["n3"] and status["stage"] == "spreading"
        assert [m["reason"] for m in status["members"]] == [None, "n3: no answer"]
        mesh.members[3].present = False
        await mesh.until(lambda: mesh.generations() == [2, 2, 0], "the others have switched")
        mesh.cut, mesh.members[3].present = set(), True
        mesh.nodes[2].heard(3, mesh.nodes[3].note(), act=True)
        await mesh.until(lambda: mesh.settled(2), "the one that was away has it too")

    rotating(tmp_path, test)


def test_rotation_whose_driver_died_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.rotation, "RETRY_S", 0.02)
    monkeypatch.setattr(agent.rotation, "TAKE_OVER_S", 0.1)

    async def test(mesh: Mesh) -> None:
        mesh.run(1, 2)
        mesh.nodes[3].rotate()
        mesh.nodes[2].answer(3, {"note": mesh.nodes[3].note(), "ring": mesh.nodes[3].parcel()})
        mesh.members[3].present = False
        mesh.cut = {3}
        mesh.nodes[1].heard(2, mesh.nodes[2].note(), act=True)
        await mesh.until(lambda: mesh.generations() == [2, 2, 1], "the others go on")

    rotating(tmp_path, test)


def test_driver_that_restarts_in_the_middle_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.rotation, "RETRY_S", 0.02)
    monkeypatch.setattr(agent.rotation, "TAKE_OVER_S", 0.1)

    async def test(mesh: Mesh) -> None:
        mesh.run(2, 3)
        mesh.nodes[1].rotate()
        mesh.nodes[1] = mesh.make(1)
        assert mesh.nodes[1].ring.spreading
        mesh.run(1)
        await mesh.until(lambda: mesh.settled(2), "all have switched")

    rotating(tmp_path, test)


def test_two_rotations_at_once_settle_on_one_key(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.nodes[1].rotate()
        mesh.nodes[2].rotate()
        assert mesh.nodes[1].ring.order != mesh.nodes[2].ring.order
        mesh.run()
        await mesh.until(lambda: mesh.settled(2), "all have switched to the same")
        with pytest.raises(Refused):
            mesh.nodes[1].rotate(10)
        mesh.nodes[1].rotate()
        await mesh.until(lambda: mesh.settled(4), "and it can be rotated again")

    rotating(tmp_path, test)


def test_rotation_while_one_is_under_way_is_refused(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.nodes[1].rotate()
        with pytest.raises(Refused) as caught:
            mesh.nodes[1].rotate()
        assert caught.value.code == "rotating"

    rotating(tmp_path, test)


def test_packet_under_the_next_key_makes_a_node_switch(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.nodes[1].rotate()
        mesh.nodes[2].answer(1, {"note": mesh.nodes[1].note(), "ring": mesh.nodes[1].parcel()})
        opener = Opener(mesh.nodes[2].keyring(), "p")
        pool = SimpleNamespace(opener=opener, rotate=opener.rotate)
        mesh.nodes[2].bind(cast(Any, pool))
        switched = switch(mesh.nodes[1].ring)
        packet = Sealer(switched.keyring(), "p", 3, 0, bytes(8)).seal(b"news")
        assert opener.open(packet, 0.0, "there") == (3, b"news")
        await mesh.until(lambda: mesh.nodes[2].ring.order == switched.order, "it has switched")
        assert opener.key_for("there") is None

    rotating(tmp_path, test)


def test_old_key_retires_from_ring_and_file(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.run()
        mesh.nodes[1].rotate(1000)
        await mesh.until(lambda: mesh.settled(2), "all have switched")
        assert all(node.ring.old for node in mesh.nodes.values())
        await mesh.until(lambda: not any(n.ring.old for n in mesh.nodes.values()), "it retired")
        assert all(told[-1] == ("retired", 2) for told in mesh.told.values())
        assert all(len(f.path.read_text().splitlines()) == 2 for f in mesh.files.values())
        assert mesh.nodes[1].status()["stage"] == "settled"

    rotating(tmp_path, test)


def test_next_key_that_cannot_be_written_is_not_acknowledged(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        mesh.nodes[1].rotate()
        (mesh.files[2].path.parent / f".mesh.key.{os.getpid()}").mkdir()
        with pytest.raises(Refused) as caught:
            mesh.nodes[2].answer(1, {"note": mesh.nodes[1].note(), "ring": mesh.nodes[1].parcel()})
        assert caught.value.code == "not_kept"
        assert mesh.nodes[2].ring.generation == 0

    rotating(tmp_path, test)


def test_ring_that_another_identity_signed_changes_nothing(tmp_path: Path) -> None:
    async def test(mesh: Mesh) -> None:
        liar = mesh.make(3, Identity.generate())
        liar.rotate()
        with pytest.raises(Refused) as caught:
            mesh.nodes[1].answer(3, {"note": liar.note(), "ring": liar.parcel()})
        assert caught.value.code == "other_identity"
        assert mesh.nodes[1].ring.generation == 0

    rotating(tmp_path, test)


def test_ring_in_the_file_that_another_node_of_the_home_wrote_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.rotation, "LOOK_S", 0.05)

    async def test(mesh: Mesh) -> None:
        mesh.run(1)
        kept = mesh.files[1].read(0)
        step = moved(kept, begin(kept.ring, B, 60_000), NOW_MS)
        mesh.files[1].advance(step, NOW_MS)
        await mesh.until(lambda: mesh.nodes[1].ring.generation == 1, "it has the ring of the file")

    rotating(tmp_path, test)


@pytest.mark.parametrize("params", [{}, {"note": 1}, {"note": ["x", b""]}, {"note": [1, 2], "ring": 5}])
def test_nonsense_of_a_member_gets_our_ring_and_changes_nothing(tmp_path: Path, params: Any) -> None:
    async def test(mesh: Mesh) -> None:
        answer = mesh.nodes[1].answer(2, params)
        assert answer["note"] == mesh.nodes[1].note() and isinstance(answer["ring"], bytes)

    rotating(tmp_path, test)
