"""`qd put`, `qd get` and `qd chains` as a person meets them, against real nodes in a thread of their own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from agent.home import Home, RunEntry, read_identity
from discovery.identity import id_text
from tests.agent.data_nodes import Station, held_by, noise, world
from tests.tui.canned import BUILD, founded
from tui.cli import artifacts, fleetwide
from tui.cli.program import run_command

DATA = noise(3 * 2**20 // 2)


class Mesh:
    """Two stations in a thread; the second is the one that the home's commands attach to."""

    def __init__(self, tmp_path: Path, home: Home) -> None:
        self.home = home
        self._tmp_path = tmp_path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.stations: list[Station] = []

    def __enter__(self) -> Mesh:
        self._thread.start()
        self.do(self._start())
        pub = read_identity(self.home.operator_key_file, "operator key").pub
        self.home.run.mkdir(parents=True, exist_ok=True)
        station = self.stations[0]
        for one in self.stations:
            one.roll.pubs.append(pub)
        entry = RunEntry(
            pid=os.getpid(),
            start=psutil.Process().create_time(),
            id=id_text(station.id),
            pub=base64.b64encode(station.identity.pub).decode(),
            name=station.name,
            mesh="alpha",
            kind="broker",
            addr=f"127.0.0.1:{station.addr[1]}",
            build=BUILD,
        )
        self.home.run_file("alpha", station.name).write_bytes(msgspec.json.encode(entry))
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._world.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> None:
        self._world = world(self._tmp_path, 2)
        self.stations = await self._world.__aenter__()


@pytest.fixture
def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [n for n in os.environ if n.startswith("QD_") or n == "SSH_AUTH_SOCK"]:
        monkeypatch.delenv(name)
    home = founded(tmp_path / "home")
    monkeypatch.setenv("QD_HOME", str(home.root))
    monkeypatch.chdir(tmp_path)
    with Mesh(tmp_path / "nodes", home) as made:
        yield made


def qd(command: str, *args: str) -> int:
    return run_command(
        getattr(fleetwide if command == "chains" else artifacts, command), list(args), "qd", command
    )


def test_file_put_is_listed_and_got_again_byte_for_byte(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Model.BIN").write_bytes(DATA)
    assert qd("put", "Model.BIN", "--replicas", "2", "--json") == 0
    put = json.loads(capsys.readouterr().out)
    assert put["result"] == "done" and put["name"] == "model.bin" and put["size"] == len(DATA)
    assert put["took_ms"] > 0 and put["node"] == mesh.stations[0].name
    mesh.do(held_by(mesh.stations, "model.bin", 2))
    assert qd("chains", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["held"], row["desired"], row["hash"]) == (2, 2, put["hash"])
    assert qd("get", "model.bin", "-o", "out", "--json") == 0
    got = json.loads(capsys.readouterr().out)
    assert (tmp_path / "out").read_bytes() == DATA and got["hash"] == put["hash"]
    assert got["put_by"].startswith("SHA256:")
    assert not list(tmp_path.glob(".out*"))


def test_people_are_told_in_words_and_a_table(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qd("chains") == 0
    assert capsys.readouterr().out == "no chains or artifacts\n"
    (tmp_path / "notes.txt").write_bytes(b"hello")
    assert qd("put", "notes.txt", "--name", "notes", "--replicas", "0") == 0
    said = capsys.readouterr().out
    assert said.startswith("notes: 5 B put at node-") and "uncounted" in said
    assert qd("chains") == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "KIND", "HELD", "SIZE", "LEADER", "HOLDERS"]
    assert line.split()[:5] == ["●", "notes", "artifact", "1/–", "5"]
    assert qd("get", "notes") == 0
    assert "5 B, verified; put by SHA256:" in capsys.readouterr().out
    assert (tmp_path / "notes").read_bytes() == b"hello"


def test_get_that_was_broken_off_goes_on_from_its_part(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").write_bytes(DATA)
    assert qd("put", "model", "--replicas", "1", "--json") == 0
    hash = json.loads(capsys.readouterr().out)["hash"]
    (tmp_path / f".out.{hash[:12]}.part").write_bytes(DATA[: 2**20] + b"torn")
    served = [s.room.serving.counters for s in mesh.stations]
    before = sum(c["blob_bytes"] for c in served)
    assert qd("get", "model", "-o", "out") == 0
    assert (tmp_path / "out").read_bytes() == DATA
    assert sum(c["blob_bytes"] for c in served) - before == len(DATA) - 2**20


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("get", "nothing"), 2, "nothing: no such artifact; see `qd chains`"),
        (("get", "../x"), 2, "../x: no name for an artifact; a name is made of"),
        (("put", "missing"), 2, "missing: No such file or directory; name a file that you can read"),
        (("put", "Odd Name"), 2, "Odd Name: no name for an artifact; give it one with --name"),
        (("put", "file", "--replicas", "65"), 2, "65 is not in the range 0<=x<=64"),
        (("put", "file", "--name", "admin"), 1, "admin is a chain; give the artifact another --name"),
        (("chains", "--mesh", "beta"), 2, "can't answer for beta"),
        (
            ("get", "notes", "-o", "nowhere/x"),
            2,
            "nowhere: no such directory; name a place that you can write",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_with_its_status(
    mesh: Mesh,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "Odd Name").write_bytes(b"x")
    assert qd(*args) == status
    err = capsys.readouterr().err
    assert err.startswith("qd: ") and said in err and err.count("\n") == 1


def test_put_by_a_key_that_may_not_is_exit_4(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for station in mesh.stations:
        station.roll.role = "observe"
    assert qd("put", "file") == 4
    assert "put needs role operate, olga has observe" in capsys.readouterr().err
