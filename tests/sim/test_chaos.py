"""Anything may happen in any order; once it stops, everybody sees what is. And no verdict was ever a lie."""

from __future__ import annotations

import pytest

from discovery.lifecycle import Evidence, State
from discovery.swim import SwimConfig
from tests.sim.net import Net, SimNode


class Chaos:
    """Random operations from one seed."""

    def __init__(self, seed: int, size: int) -> None:
        self.net = Net(seed, SwimConfig.lan())
        self.net.grow(size)
        self.net.run(3)
        self.rng = self.net.rng

    def _start(self, node: SimNode) -> None:
        node.host_up = True
        others = [other.index for other in self.net.nodes if other is not node]
        self.net.start(node, others)

    def step(self) -> None:
        net, rng = self.net, self.rng
        node = rng.choice(net.nodes)
        if not node.up:
            self._start(node)
        elif node.paused:
            net.resume(node)
        else:
            act = rng.choice(
                ("kill", "leave", "crash", "pause", "state", "split", "heal", "weather", "wait", "wait")
            )
            if act in ("kill", "crash") and len(net.running()) > 2:
                (net.kill if act == "kill" else net.crash_host)(node)
            elif act == "leave" and len(net.running()) > 2:
                net.leave(node)
            elif act == "pause":
                net.pause(node)
            elif act == "state":
                net.call(node, "update_self", state=rng.choice((State.ALIVE, State.DEGRADED, State.DRAINING)))
            elif act == "split":
                net.split(rng.sample(range(len(net.nodes)), rng.randrange(1, len(net.nodes))))
            elif act == "heal":
                net.heal()
            elif act == "weather":
                net.loss, net.duplicate, net.late = rng.random() * 0.3, rng.random() * 0.2, rng.random() * 0.1
        net.run(rng.choice((0.0, 0.05, 1.0, 5.0, 20.0, 90.0)) * rng.random())

    def calm(self) -> None:
        net = self.net
        net.heal()
        net.loss = net.duplicate = net.late = 0.0
        for node in net.nodes:
            if node.up and node.paused:
                net.resume(node)


@pytest.mark.parametrize("seed", range(12))
def test_after_any_chaos_everybody_sees_what_is_and_nobody_was_called_exited_who_ran(seed: int) -> None:
    chaos = Chaos(seed, 9)
    for _ in range(60):
        chaos.step()
    chaos.calm()
    net = chaos.net
    whole = net.run_until(net.all_see_all, 150, every_s=0.2)
    assert whole, (
        f"seed {seed}: {[(n.index, {net.by_id[i].index: s.name for i, s in n.view.items()}) for n in net.running()]}"
    )
    for observer, told in net.deaths():
        if told.evidence is Evidence.EXITED:
            assert not told.ran, f"seed {seed}, observer {observer}: {told}"
    for node in net.nodes:
        for code in (
            "malformed",
            "malformed_message",
            "forged_ack",
            "forged_accusation",
            "bad_record",
            "second_key",
        ):
            assert not node.swim.counters[code], f"seed {seed}: {code}"
