"""What a node refuses at its door and at its start: each says why, in one line, and nothing else suffers."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from agent.events import wall_ms
from agent.home import Home, read_secret
from discovery.identity import Identity, verify
from discovery.lifecycle import State
from discovery.member import Record
from discovery.pool import Pool
from discovery.port import Port, bind_pair
from discovery.seal import Keyring, Opener, Sealer
from discovery.swim import Swim, SwimConfig
from tests.fleet.harness import BIN, Fleet, wait_for

pytestmark = pytest.mark.fleet


def start(fleet: Fleet, *flags: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    argv = [
        str(BIN / "qd-agent"),
        "--home",
        str(home or fleet.home),
        "--bind",
        "127.0.0.1",
        "--no-mdns",
        *flags,
    ]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=20, env=fleet.env, stdin=subprocess.DEVNULL
    )


def one_line(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("qd: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_mesh_that_was_not_made_is_told_with_the_cure(fleet: Fleet) -> None:
    one_line(start(fleet, "--mesh", "nowhere"), 2, "nowhere", "qd init")


def test_tags_too_long_for_the_member_record_are_told_with_the_cure(fleet: Fleet) -> None:
    flags = [f"--tag=key{i}={'v' * 60}" for i in range(16)]
    one_line(start(fleet, "--mesh", "alpha", *flags), 2, "tag", "member record", "fewer or shorter")


def test_busy_port_is_told_with_the_cure(fleet: Fleet) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        one_line(
            start(fleet, "--mesh", "alpha", "--port", str(sock.getsockname()[1])),
            2,
            "already in use",
            "--port",
        )


def test_key_that_others_can_read_is_refused(fleet: Fleet) -> None:
    key = fleet.home / "config" / "meshes" / "alpha" / "mesh.key"
    key.chmod(0o644)
    one_line(start(fleet, "--mesh", "alpha"), 2, "others can read it", "chmod 600")


def test_unreadable_key_is_refused(fleet: Fleet) -> None:
    key = fleet.home / "config" / "meshes" / "alpha" / "mesh.key"
    key.unlink()
    key.mkdir(mode=0o700)  # what even root can't read as a file
    one_line(start(fleet, "--mesh", "alpha"), 2, "mesh.key", "directory")


def test_run_directory_that_cannot_be_written_is_told_with_its_path(fleet: Fleet) -> None:
    run = fleet.home / "run"
    if run.exists():
        run.rmdir()
    run.touch()  # what even root can't write below
    one_line(start(fleet, "--mesh", "alpha", "--port", "0"), 2, "run", "write to")


def test_malformed_config_names_file_and_line(fleet: Fleet) -> None:
    (fleet.home / "config" / "config.toml").write_text("mesh = \n")
    one_line(start(fleet), 2, "config.toml", "line 1")


def test_unknown_key_in_config_names_the_nearest(fleet: Fleet) -> None:
    (fleet.home / "config" / "config.toml").write_text('mesh = "alpha"\nsuspicion_msec = 5\n')
    one_line(start(fleet), 2, "suspicion_msec", "suspicion_ms")


def test_second_start_of_a_running_node_is_refused(fleet: Fleet) -> None:
    only = fleet.agent("only").start()
    only.wait("node.ready")
    one_line(start(fleet, "--mesh", "alpha", "--name", "only", "--port", "0"), 2, "already runs", "--name")
    assert only.running


def test_garbage_datagrams_are_counted_and_cost_nothing(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b")
    host, _, port = fleet.addr(a).rpartition(":")
    rng = random.Random(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for size in (0, 1, 33, 34, 50, 600, 1200, 1400):
            for _ in range(25):
                sock.sendto(bytes([1]) + rng.randbytes(size), (host, int(port)))
        sock.sendto(bytes([9]) + rng.randbytes(200), (host, int(port)))
    event = a.wait("wire.incompatible")
    assert event["theirs"] == 9 and event["ours"] == 1

    def counted() -> bool:
        counters = fleet.qd_json("node", "a", "--via", "a")["counters"]
        return counters.get("unknown_key", 0) + counters.get("short", 0) + counters.get("forged", 0) >= 190

    wait_for(counted, "200 datagrams counted")
    assert fleet.rows(a)["b"]["state"] == "alive"
    assert not b.of("node.changed", to="dead")


def test_node_with_another_mesh_key_stays_outside(fleet: Fleet, tmp_path: Path) -> None:
    a, b = fleet.boot("a", "b")
    with Fleet(tmp_path / "other") as other:
        other.init()
        stranger = other.agent("stranger", join=None)
        stranger.argv += ["--join", fleet.addr(a)]
        stranger.start()
        assert stranger.wait("node.state_changed", to="alive")["reason"] != "synced with a first peer"
        wait_for(
            lambda: fleet.qd_json("node", "a", "--via", "a")["counters"].get("unknown_key"), "counted at a"
        )
        assert set(fleet.rows(a)) == {"a", "b"}
        assert set(other.rows(stranger)) == {"stranger"}
    assert b.running


def test_flood_of_connections_leaves_the_node_serving(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b")
    host, _, port = fleet.addr(a).rpartition(":")
    socks = []
    try:
        for _ in range(200):
            sock = socket.create_connection((host, int(port)), 5)
            sock.send(b"GET / HTTP/1.1\r\n\r\n")
            socks.append(sock)
        assert {row["name"] for row in fleet.qd_json("nodes", "--via", "a")} == {"a", "b"}
    finally:
        for sock in socks:
            sock.close()
    counters = fleet.qd_json("node", "a", "--via", "a")["counters"]
    assert counters.get("not_ssh", 0) + counters.get("flood", 0) + counters.get("closed_early", 0) >= 150
    assert not b.of("node.changed", to="dead")


def test_hostile_words_of_a_member_reach_the_terminal_harmless(fleet: Fleet) -> None:
    (a,) = fleet.boot("a")
    evil = "\x1b]0;owned\x07\x1b[2J[/bold][red]"

    async def hostile_member() -> None:
        key = Identity.generate()
        sealing = Keyring([read_secret(Home.open(fleet.home).mesh_key_file("alpha"), "key")])
        udp, tcp = bind_pair("127.0.0.1", 0)
        record = Record(
            pub=key.pub, mesh="alpha", name="mallory", kind="compute", incarnation=1, version=1, state=State.DEGRADED,
            addrs=[("127.0.0.1", tcp.getsockname()[1])], build="\x1b[5m", tags={evil: evil}, reason=evil,
        )  # fmt: skip
        swim = Swim(
            record=record, sign=key.sign, verify=verify, config=SwimConfig.lan(), rng=random.Random(3), now=time.monotonic()
        )  # fmt: skip
        here = Port(udp, on_incompatible=lambda *words: None)
        pool = Pool(
            swim, Sealer(sealing, "mesh/alpha", key.id, wall_ms(), bytes(8)), Opener(sealing, "mesh/alpha"), here,
            on_effect=lambda effect: None, on_persist=lambda n: None,
        )  # fmt: skip
        host, _, port = fleet.addr(a).rpartition(":")
        swim.join([(host, int(port))], time.monotonic())
        pool.start()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, a.wait, "node.joined", 10.0)
        for words in (("nodes",), ("node", "mallory"), ("events",), ("view", "fleet"), ("view", "events")):
            done = await loop.run_in_executor(None, lambda words=words: fleet.qd(*words, "--via", "a"))
            assert done.returncode == 0, done.stderr
            assert "mallory" in done.stdout
            assert "\x1b" not in done.stdout and "\x07" not in done.stdout
        pool.close()
        here.close()
        tcp.close()

    asyncio.run(hostile_member())
    assert a.running


def test_lost_journal_makes_a_new_one_and_the_node_lives(fleet: Fleet) -> None:
    only = fleet.agent("only").start()
    only.wait("node.ready")
    only.stop()
    journal = fleet.home / "state" / "alpha" / "only" / "journal.db"
    journal.write_bytes(b"this is no database" * 100)
    for extra in ("-wal", "-shm"):
        journal.with_name(journal.name + extra).unlink(missing_ok=True)
    only.start()
    only.wait("node.state_changed", to="alive")
    assert only.wait("journal.damaged")["reason"]


def test_home_without_room_refuses_ops_and_gossip_lives_on(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        with Fleet(tmp_path / "home") as fleet:
            fleet.init()
            (fleet.home / "state" / "alpha").mkdir(parents=True, exist_ok=True)
            (fleet.home / "state" / "alpha" / "full").symlink_to(disk)
            full = fleet.agent("full").start()
            other = fleet.agent("other").start()
            fleet.converged([full, other])
            with (disk / "filler").open("wb") as filler:
                try:
                    while True:
                        filler.write(b"\0" * 65536)
                        filler.flush()
                except OSError:
                    pass
            answer = fleet.qd_json("drain", "full", "--via", "other")[0]
            assert answer["result"] == "refused" and "journal" in answer["reason"]
            assert fleet.rows(other)["full"]["state"] == "alive"
            (disk / "filler").unlink()
            assert fleet.qd_json("drain", "full", "--via", "other")[0]["result"] in ("done", "accepted")
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)
