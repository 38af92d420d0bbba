"""What supervised daemons cost while nothing happens, and how soon one that crashed runs again.

One process with the engine and a supervisor, as in an agent, and 200 programs that sleep.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent.daemons.leftovers import end_leftovers
from agent.daemons.runs import read_run
from agent.daemons.supervisor import Supervisor
from agent.meshos.actions import Action, StartDaemon, StopDaemon
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import DaemonIntent, Synced
from agent.runtime import MeshOsRuntime
from agent.spec.model import DaemonSpec
from bench.figures import Figure
from bench.fleet import BIN, MESH, Hangar, end, environment
from bench.idle import run_time_s

DAEMONS = 200
WINDOW_S = 20.0
REST_S = 8.0
CRASHES = 10
BAR_CPU = 2.0
BAR_RESTART_S = 1.0
"""The first backoff and one tick."""


def measure(hangar: Hangar) -> Iterator[Figure]:
    window_s, crashes = (3.0, 3) if hangar.quick else (WINDOW_S, CRASHES)
    with tempfile.TemporaryDirectory(prefix="qd-bench-") as place:
        argv = [sys.executable, "-m", "bench.daemons", place, str(DAEMONS), str(window_s), str(crashes)]
        said = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=180).stdout
    found = json.loads(said)
    size = f"{DAEMONS} daemons, engine and supervisor"
    note = f"{size}, over {window_s:g} s, all threads"
    yield Figure("daemons: idle", "% of a core", [found["cpu"]], BAR_CPU, note=note)
    yield Figure(
        "daemons: idle, engine without any", "% of a core", [found["bare"]], note="the share of its ticks"
    )
    yield Figure("daemons: start of all", "s", [found["boot_s"]], note=size)
    restarts = "killed → its successor runs; backoff of 0.5 s and tick included"
    yield Figure("daemons: crash → restarted", "s", found["restarts_s"], BAR_RESTART_S, note=restarts)
    yield Figure("daemons: adopting all", "s", [found["adopt_s"]], note="by the next agent process")
    yield from real_agent(hangar, window_s, crashes)


def real_agent(hangar: Hangar, window_s: float, crashes: int) -> Iterator[Figure]:
    """The same of a whole agent, alone in its mesh, that was given a spec with `qd apply`."""
    fleet = hangar.empty()
    agent = fleet.start("one")
    fleet.wait(lambda: "ready" in agent.firsts, "the agent is ready")
    place = fleet.home.state / MESH / "one" / "daemons"
    spec = Path(str(fleet.home.root)) / "fleet.toml"
    entry = '[[daemon]]\nname = "d{}"\ncommand = ["sleep", "infinity"]\n'
    spec.write_text("".join(entry.format(n) for n in range(DAEMONS)))
    time.sleep(REST_S if not hangar.quick else 1)
    bare = share(agent.pid, window_s / 2)
    try:
        began = time.monotonic()
        words = [str(BIN / "qd"), "apply", str(spec), "--home", str(fleet.home.root), "--yes"]
        subprocess.run(words, env=environment(fleet.home), check=True, capture_output=True, timeout=60)
        fleet.wait(lambda: all(pid_in(place / f"d{n}") for n in range(DAEMONS)), "all run", 60)
        boot_s = time.monotonic() - began
        time.sleep(REST_S if not hangar.quick else 1)
        cpu = share(agent.pid, window_s)
        restarts_s = []
        for n in range(crashes):
            time.sleep(0.137)
            before = pid_in(place / f"d{n}")
            assert before is not None
            began = time.monotonic()
            os.kill(before, signal.SIGKILL)
            while pid_in(place / f"d{n}") in (None, before):
                time.sleep(0.002)
            restarts_s.append(time.monotonic() - began)
    finally:
        end([agent.process], 45)
        end_leftovers(fleet.home.state)
    note = f"a real agent with {DAEMONS} daemons"
    over = f"{note}, over {window_s:g} s, all threads; {bare:.2f} % before it had any"
    yield Figure("agent with daemons: idle", "% of a core", [cpu], BAR_CPU, note=over)
    yield Figure("agent with daemons: `qd apply` → all run", "s", [boot_s], note=note)
    yield Figure("agent with daemons: crash → restarted", "s", restarts_s, BAR_RESTART_S, note=note)


def pid_in(folder: Path) -> int | None:
    """The process of a daemon, as the agent has noted it."""
    run = read_run(folder / "run.json")
    return None if run is None or run.leader is None else run.leader.pid


def share(pid: int, window_s: float) -> float:
    """Percent of a core that all threads of a process take meanwhile."""
    before, began = run_time_s(pid), time.monotonic()
    time.sleep(window_s)
    return 100 * (run_time_s(pid) - before) / (time.monotonic() - began)


class Dispatcher:
    """Carries out starts and stops, as a node does."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self.now_ms: Callable[[], int] = lambda: 0

    async def dispatch(self, action: Action) -> None:
        assert self.supervisor is not None
        if isinstance(action, StartDaemon):
            await self.supervisor.start(str(action.daemon))
        elif isinstance(action, StopDaemon):
            await self.supervisor.stop(str(action.daemon), max(0, action.deadline_ms - self.now_ms()))


async def play(place: Path, count: int, window_s: float, crashes: int) -> dict[str, Any]:
    """The figures, measured in this process."""
    specs = {f"d{n}": DaemonSpec(name=f"d{n}", command=["sleep", "infinity"]) for n in range(count)}
    dispatcher = Dispatcher()
    runtime = MeshOsRuntime.start(MeshOsConfig(), dispatcher, this_node="bench")
    dispatcher.now_ms = runtime.loop.now_ms

    def office() -> Supervisor:
        return Supervisor(
            place,
            node="f" * 16,
            tell=runtime.executor.tell,
            trouble=lambda *what: print(what, file=sys.stderr),
        )

    supervisor = dispatcher.supervisor = office()
    await supervisor.begin(specs)
    try:
        await runtime.loop.publish(Synced())
        bare = await cost(window_s / 4)
        began = time.monotonic()
        for name in specs:
            await runtime.loop.publish(DaemonIntent(name, "run"))
        await until(lambda: len(supervisor.names()) == count)
        boot_s = time.monotonic() - began
        await asyncio.sleep(2)
        cpu = await cost(window_s)
        restarts_s = []
        for n in range(crashes):
            await asyncio.sleep(0.137)
            name = f"d{n}"
            before = supervisor.facts(name).pid
            assert before is not None
            began = time.monotonic()
            os.kill(before, signal.SIGKILL)
            await until(lambda name=name, before=before: supervisor.facts(name).pid not in (None, before))
            restarts_s.append(time.monotonic() - began)
        await supervisor.close()
        supervisor = dispatcher.supervisor = office()
        began = time.monotonic()
        adopted = await supervisor.begin(specs)
        adopt_s = time.monotonic() - began
        assert len(adopted) == count
        return {"cpu": cpu, "bare": bare, "boot_s": boot_s, "restarts_s": restarts_s, "adopt_s": adopt_s}
    finally:
        await runtime.shutdown()
        await supervisor.stop_all(0)
        await supervisor.close()


async def cost(window_s: float) -> float:
    """Percent of a core that all threads of this process take meanwhile."""
    before, began = run_time_s(os.getpid()), time.monotonic()
    await asyncio.sleep(window_s)
    return 100 * (run_time_s(os.getpid()) - before) / (time.monotonic() - began)


async def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(0.002)


if __name__ == "__main__":
    print(
        json.dumps(
            asyncio.run(play(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
        )
    )
