"""Real agents for measurements: started on loopback, watched through their JSON logs, always ended by pid.

One thread reads all logs and notes when each line arrived, so a time is that of the reader's wake-up: a few
tenths of a millisecond late on an idle machine, and the same for every agent.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agent.founding import found_mesh
from agent.home import Home

BIN = Path(sys.executable).parent
MESH = "bench"
PRESENT = frozenset({"alive", "degraded", "draining"})
STAGGER_S = 0.35
"""Between two starts: about the processor time that one start takes."""


class Line(msgspec.Struct):
    """The fields of an event that are measured by."""

    kind: str
    node: str | None = None
    to: str | None = None
    source: str | None = None
    steps: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Sighting:
    """What one node last said of another (or of itself), and when that was read."""

    what: str
    """A state's word, or `gone`."""
    source: str | None
    at: float


@dataclass
class Agent:
    """One agent process. `said` maps names to its last word on each; `steps` are its boot steps."""

    name: str
    process: subprocess.Popen[bytes]
    began: float
    said: dict[str, Sighting] = field(default_factory=dict)
    verdicts: list[tuple[str, Sighting]] = field(default_factory=list)
    """Every time it found another one Dead."""
    firsts: dict[str, float] = field(default_factory=dict)
    """When this node was first in each state, and `ready`."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)
    """The last lines of its log."""
    rest: bytes = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None


class Late(RuntimeError):
    """What was waited for did not come."""


class Fleet:
    """Agents of one temporary home. A context manager: at its end every process is gone, and the home too."""

    def __init__(self) -> None:
        self.home = Home.open(tempfile.mkdtemp(prefix="qd-bench-"))
        found_mesh(self.home, MESH)
        self.agents: dict[str, Agent] = {}
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._decode = msgspec.json.Decoder(Line).decode
        self._wake_r, self._wake_w = os.pipe()
        self._selector.register(self._wake_r, selectors.EVENT_READ, None)
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        end([agent.process for agent in self.agents.values()])
        self._closed = True
        os.write(self._wake_w, b"x")
        self._reader.join(2)
        self._selector.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
        for agent in self.agents.values():
            assert agent.process.stderr is not None
            agent.process.stderr.close()
        shutil.rmtree(str(self.home.root), ignore_errors=True)

    # starting

    def start(self, name: str, *flags: str, join: Agent | None = None) -> Agent:
        """Starts an agent (again, under the same name, if it ended) and returns at once."""
        argv = [str(BIN / "qd-agent"), "--home", str(self.home.root), "--mesh", MESH, "--kind", "compute"]
        argv += ["--name", name, "--bind", "127.0.0.1", "--port", "0", "--no-mdns", "--log", "json", *flags]
        if join is not None:
            argv += ["--join", self.entry(join)["addr"]]
        began = time.monotonic()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(self.home),
        )
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        agent = Agent(name, process, began)
        with self._changed:
            if old := self.agents.get(name):
                assert old.process.stderr is not None
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(old.process.stderr)
                old.process.stderr.close()
            self.agents[name] = agent
        self._selector.register(process.stderr, selectors.EVENT_READ, agent)
        os.write(self._wake_w, b"x")
        return agent

    def boot(self, count: int) -> list[Agent]:
        """That many agents that all see each other."""
        names = [f"n{k:02d}" for k in range(count)]
        for name in names:
            self.start(name)
            time.sleep(STAGGER_S)
        self.settled(60 + count)
        return [self.agents[name] for name in names]

    def entry(self, agent: Agent) -> dict[str, Any]:
        """What the agent says of itself in run/."""
        path = self.home.run_file(MESH, agent.name)
        self.wait(path.exists, f"{path.name}", 10)
        return dict(msgspec.json.decode(path.read_bytes()))

    # looking

    def running(self) -> list[Agent]:
        return [agent for agent in self.agents.values() if agent.running]

    def settled(self, timeout_s: float = 30.0) -> None:
        """Waits until every running agent sees every other one present."""

        def missing() -> list[str]:
            up = self.running()
            return [
                f"{a.name}→{b.name}"
                for a in up
                for b in up
                if (seen := a.said.get(b.name)) is None or seen.what not in PRESENT
            ]

        self.wait(lambda: not missing(), lambda: f"not settled: {missing()[:5]}", timeout_s)

    def seen_by_all(self, name: str, what: str, since: float, timeout_s: float) -> list[Sighting]:
        """What every other running agent says of `name`, once that is `what` for all of them."""
        others = [agent for agent in self.running() if agent.name != name]

        def there() -> bool:
            return all(
                (seen := agent.said.get(name)) is not None and seen.what == what and seen.at >= since
                for agent in others
            )

        def missing() -> str:
            who = [a.name for a in others if (s := a.said.get(name)) is None or s.what != what]
            return f"{name} {what} in every view; not in {who[:8]}"

        self.wait(there, missing, timeout_s)
        return [agent.said[name] for agent in others]

    def wait(
        self, condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = 20.0
    ) -> None:
        """Waits until the condition holds; looked at whenever a line was read, and every 20 ms."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left = until - time.monotonic()
                if left <= 0:
                    raise Late(what if isinstance(what, str) else what())
                self._changed.wait(min(left, 0.02))

    # reading

    def _read(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.data is None:
                    os.read(self._wake_r, 64)
                    continue
                agent: Agent = key.data
                at = time.monotonic()
                try:
                    chunk = os.read(key.fd, 1 << 16)
                except BlockingIOError:
                    continue
                except OSError:
                    chunk = b""
                if not chunk:
                    with contextlib.suppress(KeyError, ValueError):
                        self._selector.unregister(key.fileobj)
                    continue
                *lines, agent.rest = (agent.rest + chunk).split(b"\n")
                with self._changed:
                    for line in lines:
                        self._take(agent, line, at)
                    self._changed.notify_all()

    def _take(self, agent: Agent, line: bytes, at: float) -> None:
        agent.words = [*agent.words[-20:], line]
        try:
            event = self._decode(line)
        except msgspec.MsgspecError:
            return
        if event.node is None:
            return
        match event.kind:
            case "node.state_changed" if event.node == agent.name and event.to:
                agent.firsts.setdefault(event.to, at)
                agent.said[agent.name] = Sighting(event.to, "self", at)
            case "node.ready":
                agent.firsts.setdefault("ready", at)
                agent.steps = event.steps or []
            case "node.joined" | "node.changed" if event.to:
                seen = Sighting(event.to, event.source, at)
                agent.said[event.node] = seen
                if event.to == "dead":
                    agent.verdicts.append((event.node, seen))
            case "node.evicted":
                agent.said[event.node] = Sighting("gone", event.source, at)


class Hangar:
    """What the subjects share: whether to be quick, and a booted fleet that the next one may go on with."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self._fleet: Fleet | None = None

    def __enter__(self) -> Hangar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def runs(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def fleet(self, count: int) -> Fleet:
        """A settled fleet of that many agents: the one that is there, if it has that size, else a new one."""
        if self._fleet is not None and len(self._fleet.running()) == count:
            self._fleet.settled()
            return self._fleet
        fleet = self.empty()
        fleet.boot(count)
        return fleet

    def empty(self) -> Fleet:
        """A fleet without agents; the one that was there ends first."""
        self.clear()
        self._fleet = Fleet()
        return self._fleet

    def clear(self) -> None:
        if self._fleet is not None:
            self._fleet.__exit__()
            self._fleet = None


def environment(home: Home | None = None) -> dict[str, str]:
    """A child's environment: nothing of the person's own setup, compiled code kept, no node Degraded by the load."""
    strange = ("QD_", "PYTHON", "SSH_AUTH_SOCK")
    env = {k: v for k, v in os.environ.items() if not k.startswith(strange)}
    env |= {"QD_CPU_BUDGET": "100", "QD_MEM_BUDGET": "100"}
    if home is not None:
        env["HOME"] = str(home.root)
    return env


def end(processes: Iterable[subprocess.Popen[Any]], limit_s: float = 5.0) -> None:
    """Ends our own children: SIGTERM, and SIGKILL for those still there after `limit_s`."""
    left = [p for p in processes if p.poll() is None]
    for process in left:
        for number in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
    until = time.monotonic() + limit_s
    for process in left:
        try:
            process.wait(max(0.05, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
