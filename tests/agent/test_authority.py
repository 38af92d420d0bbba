"""Who may command a node: its host's file, the mesh's roster, and what each of them can't give."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.authority import Authority
from agent.chain.adminstate import AdminState, Cut, Grant, grant_of
from agent.chain.hlc import BEGINNING
from agent.founding import found_mesh, genesis_of
from agent.home import Home
from agent.operators import Operators
from discovery.errors import LocalError, Refused
from discovery.identity import Identity
from discovery.sshkey import blob_of, fingerprint

NOW_MS = 1_700_000_000_000


class World:
    """A host's file, a roster, and a key that they may know."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "authorized_operators"
        self.path.touch()
        self.key = Identity.generate().pub_openssh()
        self.state = AdminState()
        self.authority = Authority(Operators(self.path), lambda: self.state)

    def file(self, options: str) -> None:
        self.path.write_text(f"{options} {self.key} filed\n")

    def roster(self, options: str) -> None:
        grant: Grant = grant_of(f"{options} {self.key} rostered")[0]
        self.state = AdminState(roster={grant.fingerprint: grant})

    def revoke(self) -> None:
        key = fingerprint(blob_of(self.key))
        self.state = AdminState(cuts={key: Cut(key, BEGINNING, "ann", None, BEGINNING)})

    def role(self, addr: str | None = "10.0.0.1") -> str:
        """What the key may do, or the code with which it is refused."""
        try:
            return self.authority.judge(blob_of(self.key), addr, NOW_MS).role
        except Refused as why:
            return why.code


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


OBSERVE, OPERATE, ADMIN = (f'environment="QD_ROLE={role}"' for role in ("observe", "operate", "admin"))


@pytest.mark.parametrize(
    ("file", "roster", "role"),
    [
        (None, None, "unknown_key"),
        (OPERATE, None, "operate"),
        (None, ADMIN, "admin"),
        (OBSERVE, ADMIN, "admin"),
        (ADMIN, OBSERVE, "admin"),
        (f'{ADMIN},from="10.9.*"', ADMIN, "from_address"),
        (f'{ADMIN},expiry-time="20200101Z"', ADMIN, "key_expired"),
        (None, f'{ADMIN},from="10.9.*"', "from_address"),
    ],
)
def test_key_may_the_greater_of_what_file_and_roster_say(
    world: World, file: str | None, roster: str | None, role: str
) -> None:
    if file is not None:
        world.file(file)
    if roster is not None:
        world.roster(roster)
    assert world.role() == role


def test_revoked_key_may_nothing_whatever_the_file_says(world: World) -> None:
    world.file(ADMIN)
    assert world.role() == "admin"
    world.revoke()
    assert world.role() == "revoked"
    with pytest.raises(Refused, match="revoked by ann"):
        world.authority.vouch(blob_of(world.key), NOW_MS)


def test_address_of_what_another_node_took_is_not_asked_for_again(world: World) -> None:
    world.roster(f'{ADMIN},from="10.9.*"')
    assert world.authority.vouch(blob_of(world.key), NOW_MS).role == "admin"
    assert world.role("10.9.0.1") == "admin" and world.role("10.8.0.1") == "from_address"


def test_key_of_the_roster_has_its_name_there(world: World) -> None:
    assert world.authority.name_of(blob_of(world.key)) is None
    world.roster(OBSERVE)
    assert world.authority.name_of(blob_of(world.key)) == "rostered"
    world.file(OBSERVE)
    assert world.authority.name_of(blob_of(world.key)) in ("filed", "rostered")


def test_bytes_that_are_no_key_are_unknown(world: World) -> None:
    with pytest.raises(Refused) as caught:
        world.authority.judge(b"\xff" * 40, None, NOW_MS)
    assert caught.value.code == "unknown_key"


def test_home_of_an_earlier_build_takes_its_operators_as_the_first_roster(tmp_path: Path) -> None:
    home = Home.open(tmp_path)
    found_mesh(home, "alpha")
    first = genesis_of(home, "alpha")
    home.mesh_genesis_file("alpha").unlink()
    assert genesis_of(home, "alpha") == first and home.mesh_genesis_file("alpha").read_text() == first


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"no line with a key\n"])
def test_first_roster_that_makes_no_sense_is_named(tmp_path: Path, content: bytes) -> None:
    home = Home.open(tmp_path)
    found_mesh(home, "alpha")
    home.mesh_genesis_file("alpha").write_bytes(content)
    with pytest.raises(LocalError, match=r"genesis_operators: .*; take the file from another host"):
        genesis_of(home, "alpha")
