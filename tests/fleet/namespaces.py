"""Hosts of a test: network namespaces on a switch that is a namespace too. Made and removed by the test; needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.harness import Agent, Fleet


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=20)


def need_namespaces() -> None:
    """Skips the test where network namespaces can't be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("needs ip (Debian's iproute2)")
    probe = f"qdprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, timeout=20)
    if made.returncode != 0:
        pytest.skip(f"network namespaces can't be made here: {made.stderr.decode().strip()}")
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=20)


class Host:
    """One host: a namespace with an address, and a home of its own that holds the same mesh's keys."""

    def __init__(self, lan: Lan, number: int, fleet: Fleet) -> None:
        self.lan, self.number, self.fleet = lan, number, fleet
        self.namespace = f"{lan.prefix}h{number}"
        self.address = f"10.77.0.{number}"
        self.port = 7420

    @property
    def seed(self) -> str:
        return f"{self.address}:{self.port}"

    def agent(self, name: str, *flags: str, join: Host | None = None, kind: str = "compute") -> Agent:
        """Describes an agent on this host; `.start()` runs it."""
        agent = self.fleet.agent(name, *flags, kind=kind)
        words = agent.argv
        words[words.index("--bind") + 1] = "0.0.0.0"
        words[words.index("--port") + 1] = str(self.port)
        if join is not None:
            words += ["--join", join.seed]
        agent.argv = ["ip", "netns", "exec", self.namespace, *words]
        return agent

    def qd(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        from tests.fleet.harness import BIN

        argv = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            str(BIN / "qd"),
            words[0],
            "--home",
            str(self.fleet.home),
            *words[1:],
        ]
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.fleet.env,
            stdin=subprocess.DEVNULL,
        )

    def cut(self) -> None:
        """Pulls this host's cable."""
        _run("ip", "-n", self.lan.switch, "link", "set", f"p{self.number}", "down")

    def mend(self) -> None:
        """Puts it back."""
        _run("ip", "-n", self.lan.switch, "link", "set", f"p{self.number}", "up")


class Lan:
    """A switch and the hosts on it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.prefix = f"qd{os.getpid() % 100_000}"
        self.switch = f"{self.prefix}sw"
        self.hosts: list[Host] = []
        self._made: list[str] = []

    def __enter__(self) -> Lan:
        self._add(self.switch)
        _run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "br0", "up")
        return self

    def _add(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def host(self, **env: str) -> Host:
        """A further host; the first one's home founds mesh alpha, the others get a copy of its config."""
        number = len(self.hosts) + 1
        fleet = Fleet(self.base / f"host{number}", **env)
        if self.hosts:
            shutil.copytree(self.hosts[0].fleet.home / "config", fleet.home / "config")
        else:
            fleet.init()
        host = Host(self, number, fleet)
        self._add(host.namespace)
        port, eth = f"p{number}", "eth0"
        _run(
            "ip",
            "-n",
            self.switch,
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            eth,
            "netns",
            host.namespace,
        )
        _run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", eth)
        _run("ip", "-n", host.namespace, "link", "set", eth, "up")
        self.hosts.append(host)
        return host

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.fleet.__exit__()
        for name in reversed(self._made):
            with contextlib.suppress(subprocess.SubprocessError):
                _run("ip", "netns", "del", name)


@contextlib.contextmanager
def lan(base: Path) -> Iterator[Lan]:
    need_namespaces()
    with Lan(base) as made:
        yield made
