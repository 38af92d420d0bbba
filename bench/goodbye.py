"""How long after a goodbye (by signal, by op) a node is gone from the views of all 24 others."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterator

from bench.figures import Figure
from bench.fleet import Agent, Fleet, Hangar

NODES = 25
BAR_MS = 250.0
SETTLE_S = 2.5


def measure(hangar: Hangar) -> Iterator[Figure]:
    nodes = NODES if not hangar.quick else 8
    fleet = hangar.fleet(nodes)
    runs = hangar.runs(9, 3)
    yield from _figures(f"goodbye by SIGTERM → gone from every view, n = {nodes}", fleet, runs, _terminate)
    yield from _figures(f"goodbye by kill op → gone from every view, n = {nodes}", fleet, runs, _kill_op)


def _figures(what: str, fleet: Fleet, runs: int, act: Callable[[Fleet, Agent], float]) -> Iterator[Figure]:
    last, all_views, wrong = [], [], 0
    rng = random.Random(7)
    for _ in range(runs):
        victim = rng.choice(fleet.running()[1:])
        began = act(fleet, victim)
        seen = fleet.seen_by_all(victim.name, "gone", began, 10)
        last.append(1000 * (max(s.at for s in seen) - began))
        all_views += [1000 * (s.at - began) for s in seen]
        wrong += sum(s.source != "left" for s in seen)
        victim.process.wait(5)
        bring_back(fleet, victim)
    note = "evidence `left` everywhere" if not wrong else f"{wrong} views with other evidence than `left`"
    yield Figure(f"{what} (last view)", "ms", last, BAR_MS, note=note)
    yield Figure(f"{what} (each view)", "ms", all_views, runs=runs)


def bring_back(fleet: Fleet, agent: Agent) -> None:
    """Starts it again under its name, waits until all see it, and lets the fleet come to rest."""
    fleet.start(agent.name)
    fleet.settled()
    time.sleep(SETTLE_S)


def _terminate(fleet: Fleet, victim: Agent) -> float:
    began = time.monotonic()
    victim.process.send_signal(signal.SIGTERM)
    return began


def _kill_op(fleet: Fleet, victim: Agent) -> float:
    """Kills by signed message through the fleet's first agent; the time when the message went."""
    from bench.op import attached

    async def kill() -> float:
        async with attached(fleet, fleet.running()[0]) as (client, sender):
            target = await client.resolve(victim.name)
            began = time.monotonic()
            result = await sender.act("kill", target["id"])
            if result["result"] not in ("done", "accepted"):
                raise RuntimeError(f"kill {victim.name}: {result}")
            return began

    return asyncio.run(kill())
