"""What `qd` asks of a person at a terminal, through a real one."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.home import Home
from tests.tui.canned import CannedAgent, founded, row

LIMIT_S = 30.0


class Terminal:
    """`qd` with a terminal on all three streams: `until` waits for what it prints, `type` answers."""

    def __init__(self, home: Path, *words: str) -> None:
        self._master, slave = pty.openpty()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("QD_") and k != "SSH_AUTH_SOCK"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tui.cli", *words, "--home", str(home)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**kept, "HOME": str(home), "TERM": "xterm", "NO_COLOR": "1"},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self._master)

    def until(self, wanted: str, times: int = 1) -> None:
        end = time.monotonic() + LIMIT_S
        while self.text.count(wanted) < times:
            assert time.monotonic() < end, f"{wanted!r} did not come: {self.text}"
            self._read()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def status(self) -> int:
        end = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.text}"
            self._read()
        self._read()
        return self.process.returncode

    def _read(self) -> None:
        ready, _, _ = select.select([self._master], [], [], 0.1)
        if ready:
            try:
                self.text += os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError:
                time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return founded(tmp_path / "home")


def test_acting_shows_the_blast_radius_and_sends_only_on_yes(home: Home) -> None:
    with CannedAgent(home, "alpha.gateway.aaaaaa") as agent:
        agent.rows += [row("web", "b1" * 8), row("db", "b2" * 8)]
        with Terminal(Path(str(home.root)), "kill", "web") as qd:
            qd.until("send it?")
            assert "web" in qd.text and "SHA256:" in qd.text
            qd.type("n\n")
            assert qd.status() == 1 and agent.ops == []
            assert "nothing was sent" in qd.text
        with Terminal(Path(str(home.root)), "kill", "web") as qd:
            qd.until("send it?")
            qd.type("y\n")
            assert qd.status() == 0 and len(agent.ops) == 1


def test_acting_on_several_wants_their_number_typed_and_yes_skips_it(home: Home) -> None:
    with CannedAgent(home, "alpha.gateway.aaaaaa") as agent:
        agent.rows += [row("web", "b1" * 8), row("db", "b2" * 8)]
        with Terminal(Path(str(home.root)), "drain", "web", "db") as qd:
            qd.until("type 2")
            qd.type("3\n")
            assert qd.status() == 1 and agent.ops == []
        with Terminal(Path(str(home.root)), "drain", "web", "db") as qd:
            qd.until("type 2")
            qd.type("2\n")
            assert qd.status() == 0 and len(agent.ops) == 2
        with Terminal(Path(str(home.root)), "drain", "web", "db", "--yes") as qd:
            assert qd.status() == 0 and len(agent.ops) == 4


def test_locked_key_asks_for_its_passphrase(home: Home, tmp_path: Path) -> None:
    key = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    with CannedAgent(home, "alpha.gateway.aaaaaa") as agent:
        with Terminal(Path(str(home.root)), "kill", "alpha", "--yes", "--operator-key", str(key)) as qd:
            qd.until("passphrase of")
            qd.type("wrong\n")
            qd.until("not its passphrase")
            qd.until("passphrase of", times=2)
            qd.type("secret\n")
            assert qd.status() == 0
        assert len(agent.ops) == 1 and "secret" not in qd.text


def test_first_start_without_a_mesh_says_what_can_be_done(tmp_path: Path) -> None:
    with Terminal(tmp_path / "empty") as qd:
        qd.until("what will it be?")
        assert "no mesh" in qd.text
        qd.type("q\n")
        assert qd.status() == 0


def test_console_in_a_home_of_several_meshes_asks_for_one(home: Home) -> None:
    founded(home.root, "beta")
    with Terminal(Path(str(home.root))) as qd:
        assert qd.status() == 2
        assert "--mesh" in qd.text and "alpha, beta" in qd.text
