"""A network in memory, in virtual time: hundreds of nodes, links that drop, delay, duplicate, reorder and cut.

The engine is the real one, bytes and all; only sockets, clocks and signatures are played. Every node's clock
starts elsewhere and, with `skew`, goes at its own pace, so nothing can lean on a common time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heappop, heappush
from math import inf
from typing import Any

from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Record
from discovery.swim import (
    Changed,
    Connect,
    Counted,
    Evicted,
    Joined,
    LeaveDone,
    PersistIncarnation,
    PushPull,
    Send,
    Sentinels,
    Swim,
    SwimConfig,
    Synced,
)

MESH = "sim"
PORT = 7000
CONNECT_TIMEOUT_S = 1.0
BUFFER_PACKETS = 300


class Keys:
    """Signatures that cost a microsecond: a keyed hash whose key only the owner (and this book) has."""

    def __init__(self) -> None:
        self._secrets: dict[bytes, bytes] = {}

    def make(self, rng: random.Random) -> tuple[bytes, Callable[[bytes], bytes]]:
        pub, secret = rng.randbytes(32), rng.randbytes(32)
        self._secrets[pub] = secret
        return pub, lambda data: blake2b(data, key=secret).digest()

    def verify(self, pub: bytes, data: bytes, sig: bytes) -> bool:
        secret = self._secrets.get(pub)
        return secret is not None and blake2b(data, key=secret).digest() == sig


@dataclass(frozen=True)
class Told:
    """Something a node told its surroundings, with the values of the moment."""

    at: float
    what: str
    node: int
    old: State | None = None
    new: State | None = None
    evidence: Evidence | None = None
    by: tuple[int, ...] = ()
    ran: bool = False
    """Whether the process of that very incarnation was running at the time, as only the simulator can know."""


@dataclass
class SimNode:
    """One process on one host."""

    index: int
    pub: bytes
    sign: Callable[[bytes], bytes]
    addr: Addr
    host: bytes
    id: int
    offset: float
    incarnation: int = 0
    swim: Swim = None  # type: ignore[assignment]
    up: bool = False
    paused: bool = False
    host_up: bool = True
    wake_at: float = inf
    wanted: tuple[int, ...] = ()
    told: list[Told] = field(default_factory=list)
    buffer: list[tuple[bytes, int, Addr]] = field(default_factory=list)
    left_at: float | None = None
    life: int = 0
    rate: float = 1.0
    """Seconds of its clock to one of the world's."""

    def clock(self, now: float) -> float:
        """What its monotonic clock shows at this time of the world."""
        return self.offset + self.rate * now

    @property
    def view(self) -> dict[int, State]:
        return {node: member.state for node, member in self.swim.members.items()}


class Net:
    """The world: nodes by index, a heap of what happens next, and the state of every link."""

    def __init__(
        self, seed: int, config: SwimConfig | None = None, *, one_host: bool = False, skew: float = 0.0
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.config = config or SwimConfig.lan()
        self.one_host = one_host
        self.skew = skew
        self.keys = Keys()
        self.now = 0.0
        self.nodes: list[SimNode] = []
        self.by_id: dict[int, SimNode] = {}
        self.by_addr: dict[Addr, SimNode] = {}
        self.loss = 0.0
        self.delay = (0.0002, 0.001)
        self.duplicate = 0.0
        self.late = 0.0
        """Share of datagrams that are delayed by up to `late_s`: reordered, or worse."""
        self.late_s = 2.0
        self.icmp = True
        self.cut: Callable[[SimNode, SimNode], bool] | None = None
        self.links: set[tuple[int, int]] = set()
        self.packets: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()
        self.tap: Callable[[SimNode, Addr, bytes], None] | None = None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._seq = 0

    # building

    def add(self, *, start: bool = True, seeds: Iterable[int] = (), **record: Any) -> SimNode:
        """A new node; started and told its seeds (indexes) unless `start` is False."""
        index = len(self.nodes)
        pub, sign = self.keys.make(self.rng)
        if self.one_host:
            addr, host = ("127.0.0.1", PORT + index), b"the host"
        else:
            addr, host = (
                (f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", PORT),
                index.to_bytes(8, "big"),
            )
        node = SimNode(
            index, pub, sign, addr, host, int.from_bytes(pub[:8], "little"), self.rng.uniform(0, 1e5)
        )
        if self.skew:
            node.rate += self.rng.uniform(-self.skew, self.skew)
        self.nodes.append(node)
        self.by_id[node.id] = node
        self.by_addr[addr] = node
        if start:
            self.start(node, seeds, **record)
        return node

    def grow(self, count: int, *, spread_s: float = 0.5) -> None:
        """`count` nodes that all know the first one, started within `spread_s`."""
        first = len(self.nodes)
        for i in range(count):
            node = self.add(start=False)
            at = self.now + self.rng.uniform(0, spread_s) * (first + i > 0)
            self.at(at, self.start, node, (0,) if first + i else ())

    def start(self, node: SimNode, seeds: Iterable[int] = (), **record: Any) -> None:
        """A new process of this node: the next incarnation, nothing remembered."""
        node.incarnation += 1
        node.life += 1
        node.up, node.paused, node.left_at, node.wanted = True, False, None, ()
        node.buffer.clear()
        fields = {"state": State.ALIVE, "name": f"n{node.index}", "kind": "compute", **record}
        node.swim = Swim(
            record=Record(
                pub=node.pub,
                mesh=MESH,
                incarnation=node.incarnation,
                version=1,
                addrs=[node.addr],
                host=node.host,
                **fields,
            ),
            sign=node.sign,
            verify=self.keys.verify,
            config=self.config,
            rng=random.Random(self.rng.getrandbits(64)),
            now=node.clock(self.now),
        )
        addrs = [self.nodes[i].addr for i in seeds]
        if addrs:
            node.swim.join(addrs, node.clock(self.now))
        self.after(node)

    # what may happen

    def kill(self, node: SimNode) -> None:
        """SIGKILL: the process is gone, its host answers for it."""
        node.up = False
        node.wake_at = inf
        self._close_links(node, told=True)

    def crash_host(self, node: SimNode) -> None:
        """The host is gone: nothing answers, nothing is closed."""
        node.up = node.host_up = False
        node.wake_at = inf

    def pause(self, node: SimNode) -> None:
        """SIGSTOP: the kernel goes on accepting."""
        node.paused = True

    def resume(self, node: SimNode) -> None:
        """SIGCONT: timers first, then what waits in the socket."""
        node.paused = False
        if not node.up:
            return
        node.swim.wake(node.clock(self.now))
        self.after(node)
        waiting, node.buffer = node.buffer, []
        for body, sender, addr in waiting:
            node.swim.receive(body, sender, addr, node.clock(self.now))
        self.after(node)

    def leave(self, node: SimNode) -> None:
        node.swim.leave(node.clock(self.now))
        self.after(node)

    def split(self, side: Iterable[int]) -> None:
        """Cuts these nodes off from all the others, both ways."""
        inside = set(side)
        self.cut = lambda a, b: (a.index in inside) != (b.index in inside)

    def heal(self) -> None:
        self.cut = None

    def call(self, node: SimNode, method: str, *args: Any, **kwargs: Any) -> Any:
        """An input of the engine, at this node's own time."""
        if method in ("update_self",):
            result = node.swim.update_self(node.clock(self.now), **kwargs)
        else:
            result = getattr(node.swim, method)(*args, node.clock(self.now))
        self.after(node)
        return result

    # time

    def at(self, when: float, fn: Callable[..., None], *args: Any) -> None:
        self._seq += 1
        heappush(self._heap, (when, self._seq, fn, args))

    def run(self, seconds: float) -> None:
        """Lets virtual time pass."""
        self._run_to(self.now + seconds)

    def run_until(self, done: Callable[[], bool], seconds: float, *, every_s: float = 0.02) -> bool:
        """Until `done`, looked at every `every_s`, or for `seconds`; whether it came true."""
        end = self.now + seconds
        while self.now < end:
            if done():
                return True
            self._run_to(min(end, self.now + every_s))
        return done()

    def _run_to(self, end: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end:
            self.now, _, fn, args = heappop(heap)
            fn(*args)
        self.now = end

    def _wake(self, node: SimNode, due: float) -> None:
        if node.wake_at != due:
            return
        node.wake_at = inf
        if not node.up:
            return
        if node.paused:
            return
        node.swim.wake(node.clock(self.now))
        self.after(node)

    def after(self, node: SimNode) -> None:
        """Carries out effects and notes when to wake the node."""
        for effect in node.swim.drain():
            self._DO[type(effect)](self, node, effect)
        if not node.up:
            return
        due = (node.swim.deadline() - node.offset) / node.rate + 1e-9
        if due < self.now:
            due = self.now
        if due < node.wake_at:
            node.wake_at = due
            self._seq += 1
            heappush(self._heap, (due, self._seq, self._wake, (node, due)))

    # effects

    def _send(self, node: SimNode, effect: Send) -> None:
        self.packets[node.index] += 1
        self.bytes[node.index] += len(effect.body)
        assert len(effect.body) <= self.config.max_body_bytes
        if self.tap is not None:
            self.tap(node, effect.addr, effect.body)
        self.carry(node, effect.addr, effect.body)

    def carry(self, node: SimNode, addr: Addr, body: bytes, sender: int | None = None) -> None:
        """One datagram on its way, with all that can befall it."""
        target = self.by_addr.get(addr)
        if target is None or (self.cut is not None and self.cut(node, target)):
            return
        rng = self.rng
        sender = node.id if sender is None else sender
        while True:
            if not self.loss or rng.random() >= self.loss:
                low, high = self.delay
                delay = low + (high - low) * rng.random()
                if self.late and rng.random() < self.late:
                    delay += rng.random() * self.late_s
                self._seq += 1
                heappush(
                    self._heap, (self.now + delay, self._seq, self._deliver, (node, target, body, sender))
                )
            if not self.duplicate or rng.random() >= self.duplicate:
                return

    def _deliver(self, source: SimNode, target: SimNode, body: bytes, sender: int) -> None:
        if target.paused:
            if len(target.buffer) < BUFFER_PACKETS:
                target.buffer.append((body, sender, source.addr))
        elif target.up:
            target.swim.receive(body, sender, source.addr, target.clock(self.now))
            self.after(target)
        elif target.host_up and self.icmp:
            self.at(self.now + self._hop(), self._refused, source, target)

    def _refused(self, source: SimNode, target: SimNode) -> None:
        if self._listens(source) and not (self.cut and self.cut(target, source)):
            self.call(source, "datagram_refused", target.addr)

    def _hop(self) -> float:
        return self.rng.uniform(*self.delay)

    def _listens(self, node: SimNode) -> bool:
        return node.up and not node.paused

    def reachable(self, a: SimNode, b: SimNode) -> bool:
        """Whether a TCP connection between the two can stand."""
        return self.cut is None or not (self.cut(a, b) or self.cut(b, a))

    def _connect(self, node: SimNode, effect: Connect) -> None:
        for addr in effect.addrs:
            target = self.by_addr.get(addr)
            outcome, wait = "error", CONNECT_TIMEOUT_S
            if target is not None and target.host_up and self.reachable(node, target):
                outcome, wait = ("open" if target.up else "refused"), 2 * self._hop()
            self.at(self.now + wait, self._connected, node, node.life, effect, addr, outcome)

    def _connected(self, node: SimNode, life: int, effect: Connect, addr: Addr, outcome: str) -> None:
        if self._listens(node) and node.life == life:
            self.call(node, "connect_result", effect.node, effect.incarnation, addr, outcome)

    def _sentinels(self, node: SimNode, effect: Sentinels) -> None:
        dropped = set(node.wanted) - set(effect.nodes)
        node.wanted = effect.nodes
        for other in dropped:
            if (node.id, other) in self.links:
                self.links.discard((node.id, other))
                self.at(self.now + self._hop(), self._closed, self.by_id[other], node)
        for other in effect.nodes:
            self.at(self.now + self.rng.uniform(0, 0.2), self._dial, node, node.life, other)

    def _dial(self, node: SimNode, life: int, other: int) -> None:
        if not node.up or node.life != life or other not in node.wanted or (node.id, other) in self.links:
            return
        target = self.by_id.get(other)
        if target is None:
            return
        if not (self._listens(node) and self._listens(target) and self.reachable(node, target)):
            self.at(self.now + 5.0, self._dial, node, life, other)
            return
        self.links.add((node.id, other))
        self.call(node, "link_opened", other, target.addr)
        self.call(target, "link_opened", node.id, (node.addr[0], 50_000 + node.index))

    def _close_links(self, node: SimNode, *, told: bool) -> None:
        for a, b in list(self.links):
            if node.id in (a, b):
                self.links.discard((a, b))
                if told:
                    other = self.by_id[b if a == node.id else a]
                    if self.reachable(node, other):
                        self.at(self.now + self._hop() + 0.003, self._closed, other, node)

    def _closed(self, node: SimNode, by: SimNode) -> None:
        if self._listens(node):
            self.call(node, "link_closed", by.id)
            if by.id in node.wanted:
                self.at(self.now + 1.0, self._dial, node, node.life, by.id)

    def _push_pull(self, node: SimNode, effect: PushPull) -> None:
        self.at(self.now + 2 * self._hop(), self._push_pull_asked, node, node.life, effect.node)

    def _push_pull_asked(self, node: SimNode, life: int, other: int) -> None:
        target = self.by_id.get(other)
        if not (self._listens(node) and node.life == life) or target is None or node.left_at is not None:
            return
        if not (self._listens(target) and self.reachable(node, target)):
            return
        request = self.call(node, "push_pull_request")
        answer = self.call(target, "push_pull_answer", request, node.id)
        self.bytes[node.index] += len(request)
        self.bytes[target.index] += len(answer)
        self.at(self.now + 2 * self._hop(), self._push_pull_answered, node, life, answer, other)

    def _push_pull_answered(self, node: SimNode, life: int, answer: bytes, other: int) -> None:
        if self._listens(node) and node.life == life:
            self.call(node, "push_pull_merge", answer, other)

    def _persist(self, node: SimNode, effect: PersistIncarnation) -> None:
        assert effect.incarnation > node.incarnation, "an incarnation was persisted twice, or went back"
        node.incarnation = effect.incarnation

    def _leave_done(self, node: SimNode, effect: LeaveDone) -> None:
        node.left_at = self.now
        node.up = False
        node.wake_at = inf
        self._close_links(node, told=True)

    def _joined(self, node: SimNode, effect: Joined) -> None:
        node.told.append(Told(self.now, "joined", effect.member.id, new=effect.member.state))

    def _changed(self, node: SimNode, effect: Changed) -> None:
        subject = self.by_id.get(effect.member.id)
        ran = subject is not None and subject.up and subject.swim.me.record.incarnation == effect.incarnation
        what = "changed" if effect.old is not effect.new else "renewed"
        node.told.append(
            Told(
                self.now, what, effect.member.id, effect.old, effect.new, effect.evidence, effect.by, ran=ran
            )
        )

    def _evicted(self, node: SimNode, effect: Evicted) -> None:
        node.told.append(Told(self.now, "evicted", effect.id, evidence=effect.evidence, by=tuple(effect.by)))

    def _synced(self, node: SimNode, effect: Synced) -> None:
        node.told.append(Told(self.now, "synced", node.id))

    def _counted(self, node: SimNode, effect: Counted) -> None:
        pass

    _DO: dict[type, Callable[..., None]] = {  # noqa: RUF012
        Send: _send,
        Connect: _connect,
        Sentinels: _sentinels,
        PushPull: _push_pull,
        PersistIncarnation: _persist,
        LeaveDone: _leave_done,
        Joined: _joined,
        Changed: _changed,
        Evicted: _evicted,
        Synced: _synced,
        Counted: _counted,
    }

    # what is seen

    def running(self) -> list[SimNode]:
        """Nodes whose process runs, not paused."""
        return [node for node in self.nodes if node.up and not node.paused and node.left_at is None]

    def all_see_all(self) -> bool:
        """Whether every running node sees exactly the running ones, and as what they are."""
        running = self.running()
        want = {node.id: node.swim.me.state for node in running}
        for node in running:
            if len(node.swim.members) != len(want) - 1:
                return False
            for other, member in node.swim.members.items():
                if want.get(other) is not member.state:
                    return False
        return True

    def all_hold(self, target: SimNode, state: State | None, evidence: Evidence | None = None) -> bool:
        """Whether every other running node sees `target` in this state (None: not at all)."""
        for node in self.running():
            if node is target:
                continue
            member = node.swim.members.get(target.id)
            if (member.state if member else None) is not state:
                return False
            if evidence is not None and member is not None and member.evidence is not evidence:
                return False
        return True

    def deaths(self) -> list[tuple[int, Told]]:
        """Every verdict of Dead, with who passed it."""
        return [(node.index, told) for node in self.nodes for told in node.told if told.new is State.DEAD]
