"""Real agents for tests: processes of their own home, watched through their JSON logs and through `qd`.

Every process is ended by its pid when the fleet closes, whatever the test did with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent.founding import found_mesh
from agent.home import Home, RunEntry
from tui.client import Client, attach_entry

BIN = Path(sys.executable).parent
DEFAULT_WAIT_S = 20.0


def wait_for(
    condition: Callable[[], Any], what: str, timeout_s: float = DEFAULT_WAIT_S, step_s: float = 0.02
) -> Any:
    """The first true value of `condition`, asked again and again; fails saying `what` was waited for."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout_s} s in vain: {what}")
        time.sleep(step_s)


class Agent:
    """One running agent. `events` fills with the event objects of its JSON log, each with `seen_at` (monotonic)."""

    def __init__(
        self, fleet: Fleet, name: str, mesh: str, kind: str, argv: list[str], env: dict[str, str]
    ) -> None:
        self.fleet, self.name, self.mesh, self.kind, self.argv, self.env = fleet, name, mesh, kind, argv, env
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Agent:
        self.events, self.lines = [], []
        self.process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self.env,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        return self

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for raw in process.stderr:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            self.lines.append(line)
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self.events.append({**event, "seen_at": time.monotonic()})

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> float:
        """Sends a signal; returns the monotonic time just before."""
        at = time.monotonic()
        os.kill(self.pid, number)
        return at

    def wait_exit(self, timeout_s: float = 10.0) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def of(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Events of a kind with these values, so far; `frm` stands for the key `from`."""
        fields = {("from" if k == "frm" else k): v for k, v in fields.items()}
        return [
            e
            for e in list(self.events)
            if e.get("kind") == kind and all(e.get(k) == v for k, v in fields.items())
        ]

    def wait(self, kind: str, timeout_s: float = DEFAULT_WAIT_S, **fields: Any) -> dict[str, Any]:
        """The first such event, waited for."""
        found: list[dict[str, Any]] = wait_for(
            lambda: self.of(kind, **fields),
            f"{kind} {fields} in the log of {self.name}; last lines: {self.lines[-5:]}",
            timeout_s,
        )
        return found[0]

    @property
    def trail(self) -> list[str]:
        """The states this node says it went through."""
        return [e["to"] for e in self.of("node.state_changed", node=self.name)]

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGTERM)
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)


class Fleet:
    """Agents of one home on loopback. Use as a context manager."""

    def __init__(self, home: Path, **env: str) -> None:
        self.home = home
        self.agents: dict[str, Agent] = {}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("QD_") and k != "SSH_AUTH_SOCK"}
        self.env |= {
            "QD_CPU_BUDGET": "100",
            "QD_MEM_BUDGET": "100",
            "HOME": str(home),
            "NO_COLOR": "1",
            **env,
        }

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents.values():
            if agent.running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(agent.pid, signal.SIGCONT)
                    os.kill(agent.pid, signal.SIGTERM)
        for agent in self.agents.values():
            agent.stop()

    def qd(
        self, *words: str, home: Path | None = None, timeout_s: float = 60.0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs `qd`, without a terminal."""
        argv = [str(BIN / "qd"), words[0], "--home", str(home or self.home), *words[1:]]
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
        )

    def qd_json(self, *words: str, **more: Any) -> Any:
        """The JSON document that a command prints, whatever its exit status."""
        done = self.qd(*words, "--json", **more)
        assert done.stdout.strip(), f"{words}: exit {done.returncode}, {done.stderr}"
        return json.loads(done.stdout)

    def init(self, mesh: str = "alpha") -> None:
        """As `qd init`, without a process for it."""
        found_mesh(Home.open(self.home), mesh)

    def agent(
        self, name: str, *flags: str, mesh: str = "alpha", kind: str = "compute", join: Agent | None = None
    ) -> Agent:
        """Describes an agent; `.start()` runs it."""
        argv = [
            str(BIN / "qd-agent"),
            "--home",
            str(self.home),
            "--mesh",
            mesh,
            "--kind",
            kind,
            "--name",
            name,
        ]
        argv += ["--bind", "127.0.0.1", "--port", "0", "--no-mdns", "--log", "json", *flags]
        if join is not None:
            argv += ["--join", self.addr(join)]
        self.agents[name] = Agent(self, name, mesh, kind, argv, dict(self.env))
        return self.agents[name]

    def boot(
        self, *names: str, flags: tuple[str, ...] = (), mesh: str = "alpha", kind: str = "compute"
    ) -> list[Agent]:
        """Starts agents and waits until each has had an answer from every other: only then can it witness its end."""
        agents = [self.agent(name, *flags, mesh=mesh, kind=kind).start() for name in names]
        self.converged(agents)
        for agent in agents:
            wait_for(
                lambda agent=agent: all(
                    r["rtt_ms"] is not None for r in self.rows(agent).values() if r["source"] == "gossip"
                ),
                f"{agent.name} has an answer from everybody",
            )
        return agents

    def converged(self, agents: list[Agent], timeout_s: float = 30.0) -> None:
        """Waits until each of these agents is up and has met every other."""
        for one in agents:
            one.wait("node.ready", timeout_s)
        for one in agents:
            for other in agents:
                if one is not other:
                    one.wait("node.joined", timeout_s, node=other.name)

    def addr(self, agent: Agent) -> str:
        path = self.home / "run" / f"{agent.mesh}.{agent.name}.json"
        wait_for(path.exists, f"{path.name}")
        return str(json.loads(path.read_text())["addr"])

    def entry(self, agent: Agent) -> RunEntry:
        """Its entry in `run/`, waited for."""
        path = self.home / "run" / f"{agent.mesh}.{agent.name}.json"
        found: RunEntry = wait_for(lambda: RunEntry.read(path), f"run file of {agent.name}")
        return found

    def ask(self, agent: Agent, what: Callable[[Client], Awaitable[Any]]) -> Any:
        """One question to one agent over a link of its own: what a command asks, without a process for it."""

        async def go() -> Any:
            async with await attach_entry(Home.open(self.home), self.entry(agent)) as client:
                return await what(client)

        return asyncio.run(go())

    def rows(self, via: Agent | str) -> dict[str, dict[str, Any]]:
        """One node's view by name; with a process for it where the node was not started here."""
        agent = self.agents.get(via) if isinstance(via, str) else via
        if agent is None:
            return {row["name"]: row for row in self.qd_json("nodes", "--via", via)}
        return {row["name"]: row for row in self.ask(agent, lambda client: client.nodes())}

    def meshes(self, via: Agent) -> dict[str, dict[str, Any]]:
        """The meshes in one node's view, by name."""
        return {row["mesh"]: row for row in self.ask(via, lambda client: client.meshes())}

    def node(self, agent: Agent) -> dict[str, Any]:
        """What a node tells about itself."""
        return dict(self.ask(agent, lambda client: client.node(client.id)))
