"""Meshes that don't belong together: impostors, strangers with the backbone key, strangers without; on the pool and on
a NATS server that all of them use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.chain.store import Journal
from agent.home import read_identity
from agent.meshes import EPOCH
from tests.fleet.harness import Agent, Fleet, wait_for
from tests.nats_server import NatsServer

pytestmark = pytest.mark.fleet


@pytest.fixture(params=["pool", "nats"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NatsServer | None]:
    """The NATS server that carries the backbone; None: the embedded pool does."""
    if request.param == "pool":
        yield None
    else:
        with NatsServer(tmp_path) as server:
            yield server


@pytest.fixture
def ours(tmp_path: Path, server: NatsServer | None) -> Iterator[Fleet]:
    """A home of the meshes alpha and beta, a gateway each."""
    with Fleet(tmp_path / "ours", **({"QD_BACKBONE": server.url} if server else {})) as fleet:
        fleet.init("alpha")
        fleet.init("beta")
        fleet.boot("gate", kind="gateway")
        fleet.boot("bee", mesh="beta", kind="gateway")
        wait_for(lambda: mesh(fleet, "gate", "beta").get("listed"), "alpha follows beta")
        yield fleet


@pytest.fixture
def theirs(tmp_path: Path, ours: Fleet) -> Iterator[Fleet]:
    """Another home that holds the backbone's key, and nothing else of ours."""
    with Fleet(tmp_path / "theirs") as fleet:
        (fleet.home / "config").mkdir(parents=True, mode=0o700)
        shutil.copy2(ours.home / "config" / "backbone.key", fleet.home / "config")
        yield fleet


def mesh(fleet: Fleet, via: str, name: str) -> dict[str, Any]:
    return fleet.meshes(fleet.agents[via]).get(name, {})


def gateway(fleet: Fleet, name: str, of: str, seed: Fleet) -> Agent:
    """A gateway of another home whose backbone leads to ours."""
    backbone = seed.env.get("QD_BACKBONE") or seed.addr(seed.agents["gate"])
    return fleet.agent(name, "--backbone", backbone, mesh=of, kind="gateway")


def counted(fleet: Fleet, name: str, code: str) -> int:
    """How often one of our nodes has counted that, so far."""
    return int(fleet.node(fleet.agents[name])["counters"].get(code, 0))


def test_impostor_of_a_mesh_is_told_and_changes_nothing(ours: Fleet, theirs: Fleet) -> None:
    theirs.init("beta")
    before = mesh(ours, "gate", "beta")
    impostor = gateway(theirs, "fake", "beta", ours).start()
    impostor.wait("lease.changed", to="fake")
    impostor.stop()
    place = theirs.home / "state" / "beta" / "fake"
    journal = Journal(place / "journal.db", read_identity(place / "identity_ed25519", "node key"))
    journal.set(EPOCH, 4_000_000, durable=True)
    journal.close()
    impostor = gateway(theirs, "fake", "beta", ours).start()
    assert impostor.wait("lease.changed", to="fake")["epoch"] > 4_000_000

    told = ours.agents["gate"].wait("mesh.impostor", mesh="beta")
    assert "another key" in told["reason"]
    found = wait_for(lambda: (m := mesh(ours, "gate", "beta"))["impostors"] and m, "the impostor is shown")
    assert found["impostors"][0]["publisher"] == "fake"
    assert (found["publisher"], found["epoch"], found["pub"]) == (
        before["publisher"],
        before["epoch"],
        before["pub"],
    )
    assert not found["expired"] and "fake" not in ours.rows("gate")
    assert ours.qd("kill", impostor.wait("node.ready")["id"], "--via", "gate", "--yes").returncode == 2
    assert impostor.running
    ours.agents["bee"].wait("mesh.impostor", mesh="beta")


def test_mesh_that_lists_nobody_shows_counts_until_it_lists_us(ours: Fleet, theirs: Fleet) -> None:
    theirs.init("delta")
    first = gateway(theirs, "dee", "delta", ours).start()
    first.wait("node.ready")
    theirs.agent("dum", mesh="delta", join=first).start().wait("node.ready")
    found = wait_for(
        lambda: (
            (m := mesh(ours, "gate", "delta")) and m["nodes"]["total"] == 2 and m["listed"] is False and m
        ),
        "delta's counts",
    )
    assert found["publisher"]["name"] == "dee" and not found["home"]
    assert {"dee", "dum"}.isdisjoint(ours.rows("gate"))
    assert first.wait("login.refused")["reason"] == "login"

    key = (ours.home / "config" / "meshes" / "alpha" / "identity_ed25519.pub").read_text()
    (theirs.home / "config" / "authorized_meshes").write_text(f'environment="QD_ROLE=observe" {key}')
    wait_for(lambda: "dum" in ours.rows("gate"), "delta's rows", 45.0)
    assert mesh(ours, "gate", "delta")["listed"] is True
    done = ours.qd("kill", "dum", "--via", "gate", "--yes")
    assert done.returncode == 4, done.stderr


def test_stranger_without_the_backbone_key_is_never_seen(
    ours: Fleet, tmp_path: Path, server: NatsServer | None
) -> None:
    with Fleet(tmp_path / "strangers") as strangers:
        strangers.init("omega")
        one = gateway(strangers, "oh", "omega", ours).start()
        one.wait("lease.changed", to="oh")
        code = "backbone_forged" if server else "unknown_key"
        wait_for(lambda: counted(ours, "gate", code), f"{code} is counted")
        assert {r["mesh"] for r in ours.qd_json("meshes", "--via", "gate")} == {"alpha", "beta"}
        assert {r["mesh"] for r in strangers.qd_json("meshes", "--via", "oh")} == {"omega"}
