"""What the gossip engine alone costs, in virtual time: datagrams a second, and an idle second of one node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from bench.figures import Figure
from bench.fleet import Hangar
from discovery.seal import OVERHEAD, Keyring, Opener, Sealer
from discovery.swim import PushPull, Sentinels
from tests.sim.net import Net, SimNode

IP_UDP_BYTES = 28
WATCHED = 5
MET_MAX = 100
WINDOW_S = 60.0
REST_S = 40.0
PLAYED = "without signatures, which take 30 µs to make and 90 µs to check"


def measure(hangar: Hangar) -> Iterator[Figure]:
    for nodes in (25, 100) if hangar.quick else (25, 100, 1000):
        yield from _idle(nodes, WINDOW_S)
    yield from _seal(hangar.runs(20_000, 5_000))


def _idle(nodes: int, window_s: float) -> Iterator[Figure]:
    net, watched = meet(nodes) if nodes <= MET_MAX else stage(nodes)
    net.run(REST_S)
    watches = [Watch(node) for node in watched]
    packets, sent = net.packets.copy(), net.bytes.copy()
    net.run(window_s)
    each = [node.index for node in watched]
    cost = [1e6 * w.spent_s / window_s for w in watches]
    yield Figure(f"engine, n = {nodes}: an idle second of one node", "µs", cost, note=PLAYED)
    received = [w.received / w.receive_s for w in watches if w.received]
    yield Figure(f"engine, n = {nodes}: datagrams taken in", "1/s", received, note=PLAYED)
    if net.deaths():
        raise RuntimeError(f"{len(net.deaths())} false verdicts in an idle pool")
    if nodes > MET_MAX:
        return
    out = [
        (net.bytes[i] - sent[i] + (OVERHEAD + IP_UDP_BYTES) * (net.packets[i] - packets[i])) / window_s
        for i in each
    ]
    rate = sum(net.packets[i] - packets[i] for i in each) / window_s / len(each)
    note = f"{rate:.1f} datagrams/s; with push/pull, header, seal, UDP and IP"
    yield Figure(f"engine, n = {nodes}: sent by an idle node", "B/s", out, note=note)


def meet(nodes: int) -> tuple[Net, list[SimNode]]:
    """A pool where everybody has met everybody, and some nodes of it."""
    net = Net(seed=nodes)
    net.grow(nodes, spread_s=5.0)
    if not net.run_until(net.all_see_all, 120.0, every_s=1.0):
        raise RuntimeError(f"{nodes} nodes did not meet")
    return net, net.nodes[:: nodes // WATCHED][:WATCHED]


def stage(nodes: int) -> tuple[Net, list[SimNode]]:
    """The same as seen by a few nodes: they know everybody, and the others only answer them.

    A whole pool of that size would hold a million rows. As in a whole one, a node asks one member a second and is
    asked about once a second.
    """
    net = Staged(seed=nodes)
    net.cut = lambda a, b: True
    for _ in range(nodes):
        net.add()
    watched, others = net.nodes[:WATCHED], net.nodes[WATCHED:]
    for node in watched:
        for other in net.nodes:
            if other is not node:
                request = net.call(node, "push_pull_request")
                answer = net.call(other, "push_pull_answer", request, node.id)
                net.call(node, "push_pull_merge", answer, other.id)
    for node in net.nodes:
        node.swim.view.news.clear()
    for node in others[WATCHED:]:
        node.swim.view.timers.cancel("tick")
    net.cut = None
    if any(len(node.swim.members) != nodes - 1 for node in watched):
        raise RuntimeError("the staged pool is not complete")
    return net, watched


class Staged(Net):
    """A network without links, where what was told on stage stays there."""

    def _nothing(self, node: SimNode, effect: Any) -> None:
        pass

    _DO: ClassVar[dict[type, Callable[..., None]]] = {**Net._DO, PushPull: _nothing, Sentinels: _nothing}


class Watch:
    """Adds up the time that one node's engine takes: datagrams, wake-ups, effects handed over, deadlines."""

    def __init__(self, node: SimNode) -> None:
        self.node = node
        self.spent_s = self.receive_s = 0.0
        self.received = 0
        swim: Any = node.swim
        swim.receive = self._timed(swim.receive, receives=True)
        swim.wake = self._timed(swim.wake)
        swim.drain = self._timed(swim.drain)
        swim.deadline = self._timed(swim.deadline)

    def _timed(self, door: Callable[..., Any], *, receives: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = door(*args, **kwargs)
            took = time.perf_counter() - began
            self.spent_s += took
            if receives:
                self.receive_s += took
                self.received += 1
            return result

        return timed


def _seal(packets: int) -> Iterator[Figure]:
    """Sealing and opening as the socket's room does it."""
    keyring = Keyring([bytes(range(32))])
    sealed, opened = [], []
    for run in range(5):
        sealer = Sealer(keyring, "mesh/bench", 1, 1_000 + run, bytes(8))
        opener = Opener(keyring, "mesh/bench")
        body = bytes(300)
        began = time.perf_counter()
        made = [sealer.seal(body) for _ in range(packets // 5)]
        middle = time.perf_counter()
        for packet in made:
            opener.open(packet, 0.0)
        ended = time.perf_counter()
        sealed.append(1e6 * (middle - began) / len(made))
        opened.append(1e6 * (ended - middle) / len(made))
    yield Figure("seal a datagram of 300 bytes", "µs", sealed)
    yield Figure("open a datagram of 300 bytes", "µs", opened)
