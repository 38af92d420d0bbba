"""How long one agent takes from the start of its process until it has joined a running peer."""

from __future__ import annotations

import time
import timeit
from collections.abc import Iterator

from agent.freshness import fingerprint
from bench.figures import Figure
from bench.fleet import Agent, Fleet, Hangar, end

BAR_S = 1.0


def measure(hangar: Hangar) -> Iterator[Figure]:
    yield Figure(
        "fingerprint of the code on disk",
        "ms",
        [s * 1000 for s in timeit.repeat(fingerprint, number=1, repeat=15)],
    )
    fleet = hangar.empty()
    peer = fleet.start("peer")
    fleet.wait(lambda: "alive" in peer.firsts, "the peer to be alive")
    fresh: list[Agent] = []
    again: list[Agent] = []
    for run in range(hangar.runs(11, 3)):
        fresh.append(_one(fleet, peer, f"fresh{run}"))
        again.append(_one(fleet, peer, "again"))
    again = again[1:]
    yield Figure("agent: process start → joined, first start", "s", _took(fresh, "alive"), BAR_S)
    yield Figure("agent: process start → joined, later start", "s", _took(again, "alive"), BAR_S)
    yield Figure("agent: process start → ready (node.ready)", "s", _took(fresh, "ready"), note=_steps(fresh))


def _one(fleet: Fleet, peer: Agent, name: str) -> Agent:
    agent = fleet.start(name, join=peer)
    fleet.wait(lambda: "alive" in agent.firsts and "ready" in agent.firsts, f"{name} to join")
    end([agent.process])
    fleet.seen_by_all(name, "gone", agent.began, 10)
    time.sleep(0.3)
    return agent


def _took(agents: list[Agent], what: str) -> list[float]:
    return [agent.firsts[what] - agent.began for agent in agents]


def _steps(agents: list[Agent]) -> str:
    """The steps of the median run, each with the time since the node began (imports come before)."""
    middle = sorted(agents, key=lambda a: a.firsts["ready"] - a.began)[len(agents) // 2]
    return "of which " + ", ".join(f"{step['step']} {step['ms']:.0f} ms" for step in middle.steps)
