"""The run directory: whatever lies in it, reading it neither fails nor waits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from agent.home import Home, RunEntry, make_identity
from discovery.errors import LocalError

GOOD = {
    "pid": os.getpid(),
    "start": psutil.Process().create_time(),
    "id": "00112233445566ff",
    "pub": "",
    "name": "a",
    "mesh": "alpha",
    "kind": "compute",
    "addr": "127.0.0.1:7420",
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.open(tmp_path)
    home.run.mkdir()
    return home


def test_run_file_of_this_process_is_found(home: Home) -> None:
    home.run_file("alpha", "a").write_text(json.dumps(GOOD))
    assert [e.name for e in home.running()] == ["a"]
    assert home.running()[0].host_port == ("127.0.0.1", 7420)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": -1},
        {"pid": 0},
        {"pid": 2**40},
        {"pid": 2**90},
        {"start": 1e308},
        {"addr": ""},
        {"addr": "nonsense"},
        {"addr": ":7420"},
        {"addr": "127.0.0.1:99999"},
        {"name": None},
    ],
)
def test_run_file_that_no_node_wrote_is_passed_over(home: Home, change: dict[str, object]) -> None:
    home.run_file("alpha", "a").write_text(json.dumps(GOOD | change))
    assert home.running() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_run_file_of_garbage_is_passed_over(home: Home, content: bytes) -> None:
    path = home.run_file("alpha", "a")
    path.write_bytes(content)
    assert RunEntry.read(path) is None
    assert home.running() == []


def test_run_file_that_is_no_file_is_passed_over_without_waiting(home: Home) -> None:
    os.mkfifo(home.run / "alpha.fifo.json")
    (home.run / "alpha.folder.json").mkdir()
    (home.run / "alpha.endless.json").symlink_to("/dev/zero")
    (home.run / "alpha.nowhere.json").symlink_to("/nowhere/at/all")
    assert home.running() == []


def test_key_that_cannot_be_written_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalError, match="file/key: "):
        make_identity(tmp_path / "file" / "key", "nobody")
