"""Hosts that join by invitation, operators by certificate, and a mesh that changes its key while it is watched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.admission import read_token, token_text
from agent.home import Home
from agent.keyring import KeyFile
from discovery.identity import Identity
from discovery.seal import Keyring, Sealer
from tests.fleet.harness import BIN, Agent, Fleet, wait_for

pytestmark = pytest.mark.fleet

NO_TIMER = ("--suspicion-ms", "120000")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Fleet]:
    """A second, empty home: another host's."""
    with Fleet(tmp_path / "other") as other:
        yield other


def invited(fleet: Fleet, *flags: str) -> str:
    return str(fleet.qd_json("invite", "--via", "a", *flags)["token"])


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("qd: ") and not done.stdout
    for word in words:
        assert word in lines[-1], lines[-1]


def ring(home: Path) -> KeyFile:
    return KeyFile(Home.open(home).mesh_key_file("alpha"), "alpha")


def generation(home: Path) -> int:
    return ring(home).read(0).ring.generation


def test_invited_host_joins_and_its_node_finds_the_mesh(fleet: Fleet, other: Fleet) -> None:
    a, b = fleet.boot("a", "b", flags=NO_TIMER)
    given = fleet.qd_json("invite", "--via", "a")
    assert given["mesh"] == "alpha" and given["node"] == "a" and given["ttl_ms"] == 600_000
    assert given["addrs"] == [fleet.addr(a)] and len(given["token"].split()) == 1
    joined = other.qd_json("join", given["token"])
    assert joined["created"] is True and joined["operators"] == {"added": 1, "had": 0}
    assert joined["by"] == "a" and fleet.addr(a) in joined["seeds"]
    c = other.agent("c", *NO_TIMER).start()
    fleet.converged([a, b, c])
    assert set(other.rows(c)) == {"a", "b", "c"}
    assert a.wait("admission.invited")["by"] == "this home"
    assert a.wait("admission.joined")["key"] == a.of("admission.invited")[0]["key"]
    again = other.qd("join", given["token"])
    assert again.returncode == 0 and "nothing changed" in again.stdout
    third = fleet.qd("join", given["token"], home=other.home.with_name("third"))
    refused(third, 1, "invitation_used", "127.0.0.1", "qd invite")
    assert a.wait("admission.refused")["reason"] == "invitation_used"
    killed = other.qd_json("kill", "a", "--via", "c")
    assert killed[0]["result"] == "refused", "the newcomer's operator commands its own host alone"
    killed = fleet.qd_json("kill", "c", "--via", "a")
    assert killed[0]["result"] == "done", "the inviter's operator came along"
    assert c.wait_exit() == 0


def test_two_that_race_with_one_token_are_told_apart(fleet: Fleet, tmp_path: Path) -> None:
    fleet.boot("a")
    token = invited(fleet)
    homes = [tmp_path / "left", tmp_path / "right"]
    racing = [
        subprocess.Popen(
            [str(BIN / "qd"), "join", "-", "--home", str(home)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=fleet.env, text=True,
        )
        for home in homes
    ]  # fmt: skip
    told = [process.communicate(token + "\n", timeout=30)[1] for process in racing]
    assert sorted(process.returncode for process in racing) == [0, 1], told
    assert "invitation_used" in told[0] + told[1]
    assert sorted(Home.open(home).meshes() for home in homes) == [[], ["alpha"]]


def test_invitation_outlives_an_update_of_its_agent(fleet: Fleet, other: Fleet) -> None:
    (a,) = fleet.boot("a")
    token = invited(fleet)
    assert fleet.qd("update", "a").returncode == 0
    wait_for(lambda: a.trail[-2:] == ["joining", "alive"], f"a is back: {a.trail}")
    assert other.qd("join", token).returncode == 0


def test_invitation_that_is_over_unknown_or_mistyped_is_refused_in_one_line(
    fleet: Fleet, other: Fleet
) -> None:
    (a,) = fleet.boot("a")
    given = fleet.qd_json("invite", "--via", "a", "--ttl", "1s")
    token = str(given["token"])
    unknown = token_text(msgspec.structs.replace(read_token(token), secret=bytes(16)))
    stranger = msgspec.structs.replace(read_token(token), host_pub=Identity.generate().pub)
    refused(other.qd("join", token[:-3]), 2, "mistyped")
    refused(other.qd("join", unknown), 1, "invitation_unknown", "qd invite")
    assert a.wait("admission.refused")["reason"] == "invitation_unknown"
    refused(other.qd("join", token_text(stranger)), 1, "another key", "nothing was sent")
    wait_for(lambda: time.time() * 1000 > given["expires_at_ms"] + 100, "the invitation is over")
    refused(other.qd("join", token), 1, "invitation_expired", "expired")
    assert a.wait("admission.refused", reason="invitation_expired")
    assert not list(other.home.rglob("mesh.key"))
    a.stop()
    refused(other.qd("join", token), 3, "invitation")


def test_home_that_has_another_mesh_of_that_name_is_refused_and_the_token_stays_good(
    fleet: Fleet, other: Fleet, tmp_path: Path
) -> None:
    fleet.boot("a")
    token = invited(fleet)
    other.init()
    before = ring(other.home).path.read_bytes()
    refused(other.qd("join", token), 1, "another mesh of that name", "--home")
    assert ring(other.home).path.read_bytes() == before
    assert other.qd("join", token, home=tmp_path / "third").returncode == 0


def test_operator_below_admin_may_neither_invite_nor_rotate(fleet: Fleet, tmp_path: Path) -> None:
    (a,) = fleet.boot("a")
    key = tmp_path / "olga"
    keygen("-q", "-t", "ed25519", "-N", "", "-f", str(key))
    list_operator(fleet, f'environment="QD_ROLE=operate" {key.with_suffix(".pub").read_text()}')
    outside = ("--via", fleet.addr(a), "--operator-key", str(key))
    refused(fleet.qd("invite", *outside, home=tmp_path / "elsewhere"), 4, "admin")
    refused(fleet.qd("rotate-key", "--operator-key", str(key)), 4, "admin")
    assert generation(fleet.home) == 0
    list_operator(fleet, f'environment="QD_ROLE=admin" {key.with_suffix(".pub").read_text()}', alone=True)
    given = wait_for(
        lambda: (d := fleet.qd("invite", *outside, home=tmp_path / "elsewhere")).returncode == 0 and d,
        "the admin is known",
    )
    assert read_token(given.stdout).mesh == "alpha"


# --- operators by certificate


def keygen(*words: str) -> None:
    subprocess.run(["ssh-keygen", *words], check=True, capture_output=True)


def list_operator(fleet: Fleet, line: str, *, alone: bool = False) -> None:
    path = fleet.home / "config" / "authorized_operators"
    path.write_text(line if alone else path.read_text() + line)


def test_operator_by_certificate_acts_until_it_expires(fleet: Fleet, tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("needs ssh-keygen (openssh-client)")

    def authority(name: str, options: str) -> Path:
        ca = tmp_path / name
        keygen("-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(ca))
        public = ca.with_suffix(".pub").read_text()
        list_operator(fleet, f'cert-authority,{options}environment="QD_ROLE=operate" {public}')
        return ca

    def certified(ca: Path, name: str, validity: str) -> Path:
        key = tmp_path / name
        keygen("-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key))
        keygen("-q", "-s", str(ca), "-I", f"{name}-cert", "-n", "op", "-V", validity, f"{key}.pub")
        return key

    good, over = authority("ca", ""), authority("old-ca", 'expiry-time="20210101",')
    late = certified(good, "bert", "20200101:20210101")
    orphan = certified(over, "carl", "always:forever")
    anna = certified(good, "anna", "always:forever")
    _, b = fleet.boot("a", "b", flags=NO_TIMER)
    for key in (late, orphan):
        done = fleet.qd("kill", "b", "--via", "a", "--operator-key", str(key), "--json")
        (answer,) = json.loads(done.stdout)
        assert (answer["result"], answer["code"], done.returncode) == ("refused", "key_expired", 4)
    assert b.running
    (answer,) = fleet.qd_json("kill", "b", "--via", "a", "--operator-key", str(anna))
    assert answer["result"] == "done" and b.wait_exit() == 0
    assert b.wait("control.received", result="done")["by"] == "anna-cert"


# --- rotation


class Watched:
    """What one node's view showed of its members, from when it is made."""

    def __init__(self, fleet: Fleet, agent: Agent, path: Path) -> None:
        self.path = path
        argv = [str(BIN / "qd"), "nodes", "--watch", "--json", "--home", str(fleet.home), "--via", agent.name]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=path.open("wb"), stderr=subprocess.DEVNULL, env=fleet.env
        )
        wait_for(lambda: path.stat().st_size, "the first rows")

    def rows(self) -> list[dict[str, Any]]:
        whole = self.path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(5)


def sealed_by(home_key: bytes, name: str) -> bytes:
    """A packet as a member that knows this key alone would send it."""
    stranger = Identity.generate()
    return Sealer(
        Keyring([home_key]), "mesh/alpha", stranger.id, time.time_ns() // 10**6, os.urandom(8)
    ).seal(name.encode())


def count(fleet: Fleet, agent: Agent, code: str) -> int:
    return int(fleet.qd_json("node", agent.name, "--via", agent.name)["counters"].get(code, 0))


def test_key_is_rotated_twice_and_no_view_ever_doubts_anybody(fleet: Fleet, tmp_path: Path) -> None:
    a, b = fleet.boot("a", "b")
    with Fleet(tmp_path / "second") as second, Fleet(tmp_path / "third") as third:
        for host in (second, third):
            assert host.qd("join", invited(fleet)).returncode == 0
        c, d = second.agent("c").start(), third.agent("d").start()
        fleet.converged([a, b, c, d])
        d.stop()
        for one in (a, b, c):
            one.wait("node.evicted", node="d")
        first = ring(fleet.home).read(0).ring.primary
        views = [
            Watched(f, one, tmp_path / f"{one.name}.rows") for f, one in ((fleet, a), (fleet, b), (second, c))
        ]
        try:
            told = fleet.qd("rotate-key", "--mesh", "alpha", "--via", "a", "--retire", "60s")
            assert told.returncode == 0 and "generation 2; 3 nodes seal with it" in told.stdout, told
            for one in (a, b, c):
                stages = [e["stage"] for e in one.of("keys.rotated")]
                assert stages == ["spreading", "switched"], one.name
            assert a.of("keys.rotated")[0]["op_id"] == a.of("control.received")[0]["op_id"]
            assert generation(fleet.home) == generation(second.home) == 2
            assert generation(third.home) == 0

            d.start()
            fleet.converged([d])
            d.wait("keys.rotated", stage="switched", source="member")
            assert generation(third.home) == 2
            fleet.converged([a, b, c, d])
            wait_for(lambda: len(third.rows(d)) == 4, "d sees everybody")
            second_key = ring(fleet.home).read(0).ring.primary
            assert second_key not in (first, b"")

            (answer,) = fleet.qd_json("rotate-key", "--via", "b", "--retire", "2s")
            assert answer["result"] == "accepted" and answer["keys"]["generation"] == 4
            assert answer["keys"]["waiting_for"] == answer["keys"]["away"] == []
            for one in (a, b, c, d):
                one.wait("keys.rotated", stage="retired", generation=4)
            host, _, port = fleet.addr(a).rpartition(":")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                before = count(fleet, a, "unknown_key"), count(fleet, a, "forged")
                for _ in range(5):
                    sock.sendto(sealed_by(second_key, "late"), (host, int(port)))
                wait_for(
                    lambda: count(fleet, a, "unknown_key") + count(fleet, a, "forged") >= sum(before) + 5,
                    "refused",
                )
                malformed = fleet.qd_json("node", "a", "--via", "a")["counters"].get("malformed", 0)
                sock.sendto(sealed_by(first, "in time"), (host, int(port)))
                wait_for(
                    lambda: (
                        fleet.qd_json("node", "a", "--via", "a")["counters"].get("malformed", 0) > malformed
                    ),
                    "the first key opens for a minute",
                )
        finally:
            for view in views:
                view.stop()
        for view in views:
            rows = view.rows()
            assert {r["name"] for r in rows} == {"a", "b", "c", "d"}
            doubted = [
                (r["name"], r["state"]) for r in rows if r["suspect"] or r["state"] in ("dead", "leaving")
            ]
            assert not doubted
        for one in (a, b, c, d):
            assert not one.of("node.changed", to="dead")
            assert {e["node"] for e in one.of("node.evicted")} <= {"d"}


def test_rotation_goes_on_when_its_driver_is_killed(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "c")
    c.signal(19)  # SIGSTOP: present for some seconds more, and silent, so nobody can switch
    done = fleet.qd("rotate-key", "--via", "a", "--timeout", "1s")
    assert done.returncode == 5 and "c" in done.stderr
    assert generation(fleet.home) == 1
    a.signal(9)
    c.signal(18)
    for one in (b, c):
        one.wait("keys.rotated", 40.0, stage="switched")
    assert generation(fleet.home) == 2
    assert {r for r, row in fleet.rows(b).items() if row["state"] == "alive"} == {"b", "c"}
