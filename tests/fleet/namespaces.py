"""Hosts of a test: network namespaces on switches that are namespaces too. Made and removed by the test; needs root.

Hosts of different segments share no network: there is no route between them unless a host has a leg in both, and
none forwards but a `nat` router.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.harness import BIN, Agent, Fleet

SLOW_WIRE = Path(__file__).with_name("slow_wire.py")


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


def need_nat() -> None:
    """Skips the test where addresses can't be translated."""
    if shutil.which("nft") is None:
        pytest.skip("needs nft (Debian's nftables)")


class Segment:
    """One switch, and the network on it: 10.77.NUMBER.0/24."""

    def __init__(self, lan: Lan, number: int) -> None:
        self.lan, self.number = lan, number
        self.namespace = f"{lan.prefix}sw{number or ''}"
        self.router: str | None = None
        """The address of the way out, where a `nat` router offers one."""

    def address(self, number: int) -> str:
        return f"10.77.{self.number}.{number}"

    def plug(self, namespace: str, number: int, interface: str) -> None:
        """Gives a namespace a leg here, with address `number` of this network."""
        port = f"p{number}"
        _run(
            *("ip", "-n", self.namespace, "link", "add", port, "type", "veth"),
            *("peer", "name", interface, "netns", namespace),
        )
        _run("ip", "-n", self.namespace, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self.address(number)}/24", "dev", interface)
        _run("ip", "-n", namespace, "link", "set", interface, "up")
        if self.router is not None:
            _run("ip", "-n", namespace, "route", "add", "default", "via", self.router)


class Host:
    """One host: a namespace with a leg in each of its segments, and a home of its own that holds the same meshes' keys."""

    def __init__(self, lan: Lan, number: int, fleet: Fleet, segments: tuple[Segment, ...]) -> None:
        self.lan, self.number, self.fleet, self.segments = lan, number, fleet, segments
        self.namespace = f"{lan.prefix}h{number}"
        self.port = 7420

    @property
    def address(self) -> str:
        return self.segments[0].address(self.number)

    @property
    def seed(self) -> str:
        return self.seed_on(self.segments[0])

    def seed_on(self, segment: Segment) -> str:
        """Where its agent is joined from that segment."""
        return f"{segment.address(self.number)}:{self.port}"

    def _shared_with(self, other: Host) -> Segment:
        """A segment in which both have a leg, else the other's first one."""
        return next((s for s in other.segments if s in self.segments), other.segments[0])

    def agent(
        self, name: str, *flags: str, join: Host | None = None, kind: str = "compute", mesh: str = "alpha"
    ) -> Agent:
        """Describes an agent on this host; `.start()` runs it."""
        agent = self.fleet.agent(name, *flags, kind=kind, mesh=mesh)
        words = agent.argv
        words[words.index("--bind") + 1] = "0.0.0.0"
        words[words.index("--port") + 1] = str(self.port)
        if join is not None:
            words += ["--join", join.seed_on(self._shared_with(join))]
        agent.argv = [*self.inside, *words]
        return agent

    @property
    def inside(self) -> list[str]:
        """What a command line begins with to run on this host."""
        return ["ip", "netns", "exec", self.namespace]

    def qd(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.inside, str(BIN / "qd"), words[0], "--home", str(self.fleet.home), *words[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.fleet.env,
            stdin=subprocess.DEVNULL,
        )

    def reaches(self, address: str, port: int) -> bool:
        """Whether a TCP connection from this host to there can be made within a second."""
        words = f"exec 3<>/dev/tcp/{address}/{port}"
        done = subprocess.run(
            [*self.inside, "timeout", "1", "bash", "-c", words], capture_output=True, timeout=20
        )
        return done.returncode == 0

    def cut(self) -> None:
        """Pulls this host's cables."""
        for segment in self.segments:
            _run("ip", "-n", segment.namespace, "link", "set", f"p{self.number}", "down")

    def mend(self) -> None:
        """Puts them back."""
        for segment in self.segments:
            _run("ip", "-n", segment.namespace, "link", "set", f"p{self.number}", "up")

    @contextlib.contextmanager
    def slow(self, ms: int) -> Iterator[None]:
        """Within it, what goes to and from this host over its first leg takes so much longer each way."""
        namespace, port = self.segments[0].namespace, f"p{self.number}"
        far, near = f"far{self.number}", f"near{self.number}"
        _run("ip", "-n", namespace, "link", "add", far, "type", "veth", "peer", "name", near)
        _run("ip", "-n", namespace, "link", "set", far, "master", "br0", "up")
        _run("ip", "-n", namespace, "link", "set", near, "up")
        _run("ip", "-n", namespace, "link", "set", port, "nomaster")
        words = ["ip", "netns", "exec", namespace, sys.executable, str(SLOW_WIRE), port, near, str(ms)]
        with subprocess.Popen(words) as carrying:
            try:
                yield
            finally:
                carrying.kill()
                _run("ip", "-n", namespace, "link", "del", far)
                _run("ip", "-n", namespace, "link", "set", port, "master", "br0")

    def swallow(self, *addresses: str) -> None:
        """From now on TCP from here to those addresses gets lost without a word, while all else passes."""
        rule = f"meta l4proto tcp ip daddr {{ {', '.join(addresses)} }} drop"
        chain = f"chain out {{\ntype filter hook output priority 0;\n{rule}\n}}"
        _run(*self.inside, "nft", f"table ip swallows {{\n{chain}\n}}")


class Lan:
    """Switches and the hosts on them; there is one switch from the start."""

    ROUTER = 254
    """The number of a router's address in each of its networks."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.prefix = f"qd{os.getpid() % 100_000}"
        self.hosts: list[Host] = []
        self.segments: list[Segment] = []
        self._made: list[str] = []

    def __enter__(self) -> Lan:
        try:
            self.segment()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, name: str, *, forwards: bool = False) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        forward = f"echo {int(forwards)} > /proc/sys/net/ipv4/ip_forward"
        _run("ip", "netns", "exec", name, "sh", "-c", forward)

    def segment(self) -> Segment:
        """A further switch, with no way from or to any other."""
        segment = Segment(self, len(self.segments))
        self._add(segment.namespace)
        _run("ip", "-n", segment.namespace, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", segment.namespace, "link", "set", "br0", "up")
        self.segments.append(segment)
        return segment

    def nat(self, inside: Segment, outside: Segment) -> None:
        """A router as in a home: hosts inside, plugged in after it, dial out; nobody outside dials in."""
        need_nat()
        name = f"{self.prefix}nat{inside.number}"
        self._add(name, forwards=True)
        inside.plug(name, self.ROUTER, "inside")
        outside.plug(name, self.ROUTER, "outside")
        inside.router = inside.address(self.ROUTER)
        rules = """
            table ip home {
                chain out { type nat hook postrouting priority 100; oifname "outside" masquerade; }
                chain through {
                    type filter hook forward priority 0; policy drop;
                    ct state established,related accept
                    iifname "inside" accept
                }
            }
        """
        _run("ip", "netns", "exec", name, "nft", rules)

    def host(self, *segments: Segment, **env: str) -> Host:
        """A further host, with a leg in each of these segments (else in the first there is). The first host's home
        founds mesh alpha, the others get a copy of its config."""
        number = len(self.hosts) + 1
        fleet = Fleet(self.base / f"host{number}", **env)
        if self.hosts:
            shutil.copytree(self.hosts[0].fleet.home / "config", fleet.home / "config")
        else:
            fleet.init()
        host = Host(self, number, fleet, segments or (self.segments[0],))
        self._add(host.namespace)
        for i, segment in enumerate(host.segments):
            segment.plug(host.namespace, number, f"eth{i}")
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
