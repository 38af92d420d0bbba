"""Scenarios: lists of operations on a simulated network, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from discovery.lifecycle import Evidence, State
from discovery.swim import SwimConfig
from tests.sim.net import Net


@dataclass(frozen=True)
class Grow:
    """Start so many nodes, the first of which all others are told of."""

    count: int
    spread_s: float = 0.5


@dataclass(frozen=True)
class Run:
    seconds: float


@dataclass(frozen=True)
class Kill:
    node: int


@dataclass(frozen=True)
class CrashHost:
    node: int


@dataclass(frozen=True)
class Pause:
    node: int


@dataclass(frozen=True)
class Resume:
    node: int


@dataclass(frozen=True)
class Leave:
    node: int


@dataclass(frozen=True)
class Restart:
    """Start a process anew, told of these seeds."""

    node: int
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Split:
    """Cut these nodes off from the others."""

    side: tuple[int, ...]


@dataclass(frozen=True)
class Heal:
    pass


@dataclass(frozen=True)
class Weather:
    """What befalls datagrams from here on."""

    loss: float = 0.0
    duplicate: float = 0.0
    late: float = 0.0


@dataclass(frozen=True)
class Converged:
    """Everybody running sees everybody running, as what they are, within so many seconds."""

    within_s: float


@dataclass(frozen=True)
class Held:
    """Everybody running holds `node` to be in this state (None: out of view), within so many seconds."""

    node: int
    state: State | None
    within_s: float
    evidence: Evidence | None = None


@dataclass(frozen=True)
class NobodyDied:
    """No verdict of Dead was passed so far."""


Op = (
    Grow | Run | Kill | CrashHost | Pause | Resume | Leave | Restart | Split | Heal | Weather | Converged
    | Held | NobodyDied
)  # fmt: skip


def play(seed: int, ops: Iterable[Op], config: SwimConfig | None = None, **net_options: Any) -> Net:
    """Plays the operations on a new network; the seed is in every complaint."""
    net = Net(seed, config, **net_options)
    for step, op in enumerate(ops):
        where = f"seed {seed}, step {step} ({op}), at {net.now:.3f} s"
        _act(net, op, where)
    return net


def _act(net: Net, op: Op, where: str) -> None:
    match op:
        case Grow(count, spread_s):
            net.grow(count, spread_s=spread_s)
            net.run(spread_s + 0.001)
        case Run(seconds):
            net.run(seconds)
        case Kill(node):
            net.kill(net.nodes[node])
        case CrashHost(node):
            net.crash_host(net.nodes[node])
        case Pause(node):
            net.pause(net.nodes[node])
        case Resume(node):
            net.resume(net.nodes[node])
        case Leave(node):
            net.leave(net.nodes[node])
        case Restart(node, seeds):
            net.nodes[node].host_up = True
            net.start(net.nodes[node], seeds)
        case Split(side):
            net.split(side)
        case Heal():
            net.heal()
        case Weather(loss, duplicate, late):
            net.loss, net.duplicate, net.late = loss, duplicate, late
        case Converged(within_s):
            if not net.run_until(net.all_see_all, within_s):
                size = len(net.running()) - 1
                views = {node.index: len(node.view) for node in net.running() if len(node.view) != size}
                raise AssertionError(f"{where}: not converged, sizes of views {views}")
        case Held(node, state, within_s, evidence):
            target = net.nodes[node]
            if not net.run_until(lambda: net.all_hold(target, state, evidence), within_s):
                views = {n.index: n.view.get(target.id) for n in net.running() if n is not target}
                raise AssertionError(f"{where}: held as {views}")
        case NobodyDied():
            assert not net.deaths(), f"{where}: {net.deaths()[:3]}"
