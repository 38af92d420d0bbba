"""Who holds what: each node says it of itself, by version; everybody folds what was said into the engine's events.

**What an artifact is to the engine.** An artifact whose count is known (its put says one, a spec may say another) is a
*chain* of its name: PlacementIntent and ReplicaUpdate, so arms 2, 3 and 6 pull, place, evict and rebalance it, and a
draining holder stops counting and is replaced by the leader. It is never a Blob at the same time: arm 2's MigrateBlob
and arm 3's RequestPlacement would both answer the same drain, with two copies on two nodes. An artifact whose count
nobody knows (0) is a *Blob* and nothing else: no arm counts it, only MigrateBlob keeps its last copy from leaving with
a draining node. When a count becomes known the one turns into the other, all its holders with it.

**Versions of a name.** A later put of a name replaces the earlier: only who holds the latest is its holder. One that
holds an earlier is told as removed; it shall hold the name, so it pulls the new bytes and then lets go of the old.

**Leader**: the highest id among the live holders, and nobody where none is live. A holder that vanished still counts
until the engine gives it up; one that said goodbye keeps its place as long, it may be back after a restart.

Pure: plain values in, events out. What other nodes say is typed and bounded; what isn't is a RemoteError.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from agent.data.chunks import SIZE_MAX_BYTES
from agent.meshos.events import Blob, Event, PlacementIntent, ReplicaLeader, ReplicaUpdate
from discovery.errors import RemoteError

ITEMS_MAX = 20_000
"""A node holds no more than this; the rest of what it says is not believed."""
CHANGES_KEPT = 256
"""Changes that can be told as a delta; who is further behind is told everything."""
GONE_AFTER_MS = 60_000
"""How long after its goodbye a node's copies still count: the same as for one that vanished."""
VOID_MAX = 4_096
FORGET_AFTER_MS = 24 * 3600 * 1000
"""A node that nobody sees any more: what it held is remembered this long in case it returns."""

Kind: TypeAlias = Literal["chain", "artifact"]
Key: TypeAlias = tuple[Kind, str]
"""Kind and name."""
Version: TypeAlias = tuple[int, int]
"""The incarnation of the process, and a number that grows with each change."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One thing held, whole. `hash`: of an artifact's bytes; empty for a chain, whose head moves on. `count`: how many
    holders it shall have by its own record, 0: not known. `at_ms`, `op_id`: which version of its name it is."""

    kind: Kind
    name: Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]+\Z")]
    hash: Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*\Z")] = ""
    size: Annotated[int, Meta(ge=0, le=SIZE_MAX_BYTES)] = 0
    count: Annotated[int, Meta(ge=0, le=10_000)] = 0
    at_ms: Annotated[int, Meta(ge=0, le=2**53)] = 0
    op_id: Annotated[str, Meta(max_length=32, pattern=r"^[0-9A-Z]*\Z")] = ""

    @property
    def key(self) -> Key:
        return self.kind, self.name

    @property
    def stamp(self) -> tuple[int, str, str]:
        """Of two items of a name the one with the greater stamp is the later version."""
        return self.at_ms, self.op_id, self.hash


class Change(msgspec.Struct, frozen=True, array_like=True):
    """An item that came or changed, or (`gone`) went."""

    item: Item
    gone: bool = False


class Told(msgspec.Struct, frozen=True, array_like=True):
    """What a node says it holds: everything (`since` None), or what changed since a version of the same incarnation.
    `digest` is that of all it holds at `version`."""

    version: Annotated[tuple[int, int], Meta()]
    digest: Annotated[str, Meta(max_length=32)]
    since: int | None
    changes: Annotated[list[Change], Meta(max_length=ITEMS_MAX)]


class Note(msgspec.Struct, frozen=True, array_like=True):
    """What rides in a push/pull: which version, with which digest."""

    incarnation: Annotated[int, Meta(ge=0, le=2**53)]
    number: Annotated[int, Meta(ge=0, le=2**53)]
    digest: Annotated[str, Meta(max_length=32)]

    @property
    def version(self) -> Version:
        return self.incarnation, self.number


_encoder = msgspec.msgpack.Encoder()


def read_told(body: Any) -> Told:
    """An announcement from the network; RemoteError when it is none."""
    try:
        return msgspec.convert(body, Told, strict=True)
    except msgspec.ValidationError as why:
        raise RemoteError(f"no announcement of holdings: {why}") from why


def read_note(body: Any) -> Note | None:
    """A note from the network; None when it is none."""
    try:
        return msgspec.convert(body, Note)
    except msgspec.ValidationError:
        return None


class Held:
    """What one node holds, with a digest that doesn't depend on the order of what came and went."""

    def __init__(self) -> None:
        self.items: dict[Key, Item] = {}
        self._sum = 0

    @property
    def digest(self) -> str:
        return f"{self._sum:032x}"

    def put(self, item: Item) -> bool:
        """Adds an item, or another version of one; whether anything changed."""
        before = self.items.get(item.key)
        if before == item:
            return False
        if before is not None:
            self._sum ^= _number_of(before)
        self.items[item.key] = item
        self._sum ^= _number_of(item)
        return True

    def take(self, key: Key) -> Item | None:
        """Removes an item; what it was."""
        before = self.items.pop(key, None)
        if before is not None:
            self._sum ^= _number_of(before)
        return before


def _number_of(item: Item) -> int:
    return int.from_bytes(hashlib.sha256(_encoder.encode(item)).digest()[:16], "big")


class Own:
    """What this node holds, and how it tells it."""

    def __init__(self, incarnation: int) -> None:
        self.held = Held()
        self.incarnation = incarnation
        self.number = 0
        self._changes: deque[tuple[int, Change]] = deque(maxlen=CHANGES_KEPT)

    @property
    def version(self) -> Version:
        return self.incarnation, self.number

    def add(self, item: Item) -> bool:
        """This node holds it from now on; whether that is news."""
        if not self.held.put(item):
            return False
        self._changed(Change(item))
        return True

    def remove(self, kind: Kind, name: str) -> bool:
        """This node holds it no longer; whether that is news."""
        item = self.held.take((kind, name))
        if item is None:
            return False
        self._changed(Change(item, True))
        return True

    def _changed(self, change: Change) -> None:
        self.number += 1
        self._changes.append((self.number, change))

    def note(self) -> Note:
        return Note(self.incarnation, self.number, self.held.digest)

    def told(self, since: Version | None = None) -> Told:
        """What to tell one who has that version: the changes since, or everything."""
        number: int | None = None
        if since is not None and since[0] == self.incarnation and since[1] <= self.number:
            missing = self.number - since[1]
            if missing <= len(self._changes):
                number = since[1]
        if number is None:
            changes = [Change(item) for item in self.held.items.values()]
        else:
            changes = [change for at, change in self._changes if at > number]
        return Told(self.version, self.held.digest, number, changes)


class _Node:
    """One other node, as far as it told."""

    __slots__ = ("forget_at_ms", "held", "live", "version")

    def __init__(self) -> None:
        self.held = Held()
        self.version: Version = (-1, -1)
        self.live = True
        self.forget_at_ms: int | None = None
        """When what it held stops counting, unless it is back by then."""


class _Shown:
    """What the engine was told of a key."""

    __slots__ = ("as_blob", "count", "holders", "leader")

    def __init__(self) -> None:
        self.as_blob = False
        self.holders: set[int] = set()
        self.leader: int | None = None
        self.count: int | None = None


class Holdings:
    """The fold of what all nodes tell, this one too. `events(now_ms)` is what the engine has to hear since last time.

    `counts(kind, name)`: what a spec says about how many shall hold it, None where it says nothing."""

    def __init__(self, me: int) -> None:
        self.me = me
        self.counters: Counter[str] = Counter()
        """`stale`, `bad_digest`, `name_conflict`, `void`."""
        self._nodes: dict[int, _Node] = {me: _Node()}
        self._by_key: dict[Key, dict[int, Item]] = {}
        self._spec: dict[Key, int] = {}
        self._void: dict[tuple[Key, tuple[int, str, str]], None] = {}
        """Versions that nobody who may has put, as far as was found out."""
        self._shown: dict[str, _Shown] = {}
        self._dirty: set[str] = set()

    # --- what comes in

    def heard(self, node: int, told: Told) -> bool:
        """Takes in what a node tells of itself. False: it can't be made use of, ask that node for everything."""
        known = self._nodes.setdefault(node, _Node())
        version = tuple(told.version)
        if version < known.version or (version == known.version and told.digest == known.held.digest):
            self.counters["stale"] += version < known.version
            return True
        if told.since is None:
            fresh = {change.item.key: change.item for change in told.changes if not change.gone}
            for key in known.held.items.keys() - fresh.keys():
                self._take(node, known, key)
            for item in fresh.values():
                self._put(node, known, item)
        else:
            if (version[0], told.since) != known.version:
                return False
            for change in told.changes:
                if change.gone:
                    self._take(node, known, change.item.key)
                else:
                    self._put(node, known, change.item)
        if len(known.held.items) > ITEMS_MAX or known.held.digest != told.digest:
            self.counters["bad_digest"] += 1
            known.version = (-1, -1)
            return False
        known.version = (version[0], version[1])
        return True

    def own(self, own: Own) -> None:
        """Takes in what this node holds itself."""
        self.heard(self.me, own.told(self._nodes[self.me].version))

    def knows(self, node: int, note: Note) -> bool:
        """Whether what is known of a node is what its note says."""
        known = self._nodes.get(node)
        return known is not None and known.version == note.version and known.held.digest == note.digest

    def version(self, node: int) -> Version | None:
        """What is known of a node; None when nothing is."""
        known = self._nodes.get(node)
        return None if known is None or known.version[0] < 0 else known.version

    def live(self, nodes: Iterable[int], left: Iterable[int], now_ms: int) -> None:
        """Which nodes live as this one sees it, and which said goodbye; any other is missing, and still counts."""
        alive, parted = {*nodes, self.me}, set(left)
        for node, known in list(self._nodes.items()):
            live = node in alive
            if live is not known.live:
                known.live = live
                self._dirty.update(name for _, name in known.held.items)
            if live:
                known.forget_at_ms = None
                continue
            at_ms = now_ms + (GONE_AFTER_MS if node in parted else FORGET_AFTER_MS)
            if known.forget_at_ms is None or at_ms < known.forget_at_ms:
                known.forget_at_ms = at_ms
            if known.forget_at_ms <= now_ms:
                for key in list(known.held.items):
                    self._take(node, known, key)
                del self._nodes[node]

    def spec(self, counts: Mapping[Key, int]) -> None:
        """What the spec says now about counts; it goes before what a put said."""
        changed = {key for key in counts.keys() | self._spec.keys() if counts.get(key) != self._spec.get(key)}
        self._dirty.update(name for _, name in changed)
        self._spec = dict(counts)

    def disbelieve(self, key: Key, node: int) -> None:
        """The version that this node says it holds is none: it showed no put that may be. It counts for nothing from
        now on, whoever holds it."""
        item = self._by_key.get(key, {}).get(node)
        if item is None or (key, item.stamp) in self._void:
            return
        self.counters["void"] += 1
        self._void[key, item.stamp] = None
        if len(self._void) > VOID_MAX:
            del self._void[next(iter(self._void))]
        self._dirty.add(key[1])

    def _believed(self, key: Key) -> dict[int, Item]:
        found = self._by_key.get(key, {})
        if not self._void:
            return found
        return {node: item for node, item in found.items() if (key, item.stamp) not in self._void}

    def _put(self, node: int, known: _Node, item: Item) -> None:
        if known.held.put(item):
            self._by_key.setdefault(item.key, {})[node] = item
            self._dirty.add(item.name)

    def _take(self, node: int, known: _Node, key: Key) -> None:
        if known.held.take(key) is not None:
            holders = self._by_key[key]
            del holders[node]
            if not holders:
                del self._by_key[key]
            self._dirty.add(key[1])

    # --- what is

    def key_of(self, name: str) -> Key | None:
        """What a name stands for: a chain goes before an artifact. None when nobody holds it."""
        keys: tuple[Key, Key] = (("chain", name), ("artifact", name))
        for key in keys:
            if self._believed(key):
                return key
        return None

    def current(self, key: Key) -> Item | None:
        """The latest version that anybody holds, a live holder's before one of the dead."""
        found = self._believed(key)
        if not found:
            return None
        live = [item for node, item in found.items() if self._nodes[node].live]
        return max(live or found.values(), key=lambda item: item.stamp)

    def holders(self, key: Key) -> list[int]:
        """Who holds the latest version, by id; the missing too."""
        item = self.current(key)
        if item is None:
            return []
        return sorted(node for node, held in self._believed(key).items() if held.hash == item.hash)

    def live_holders(self, key: Key) -> list[int]:
        return [node for node in self.holders(key) if self._nodes[node].live]

    def outdated(self, key: Key) -> list[int]:
        """Live nodes that hold an earlier version, by id: each will pull the latest."""
        held = self._believed(key)
        return sorted(n for n in held.keys() - set(self.holders(key)) if self._nodes[n].live)

    def leader(self, key: Key) -> int | None:
        """The highest id of the live holders."""
        return max(self.live_holders(key), default=None)

    def count(self, key: Key) -> int | None:
        """How many shall hold it; None when nobody said."""
        if key in self._spec:
            return self._spec[key]
        item = self.current(key)
        return item.count or None if item is not None else None

    def all_keys(self) -> list[Key]:
        """All that anybody holds, by name."""
        found = (key for key in self._by_key if self._believed(key))
        return sorted(found, key=lambda key: (key[1], key[0]))

    def held_by(self, node: int) -> list[Item]:
        known = self._nodes.get(node)
        return [] if known is None else sorted(known.held.items.values(), key=lambda item: item.key)

    # --- what goes out

    def events(self) -> list[Event]:
        """What changed for the engine since it was asked last, in an order that is the same on every node."""
        found: list[Event] = []
        for name in sorted(self._dirty):
            found += self._events(name)
        self._dirty.clear()
        return found

    def _events(self, name: str) -> Iterator[Event]:
        key = self.key_of(name)
        if key is not None and key[0] == "chain" and ("artifact", name) in self._by_key:
            self.counters["name_conflict"] += 1
        shown = self._shown.setdefault(name, _Shown())
        count = self._wanted(key, name)
        as_blob = key is not None and key[0] == "artifact" and count is None
        holders = set() if key is None else set(self.holders(key))
        leader = None if key is None or as_blob else self.leader(key)
        if shown.as_blob and not as_blob:
            yield from (Blob(name, "removed", node) for node in sorted(shown.holders))
            shown.holders = set()
        elif as_blob and not shown.as_blob:
            yield from _chain_events(name, shown, set(), None)
            shown.holders, shown.leader = set(), None
        if count != shown.count:
            yield PlacementIntent(name, count)
        if as_blob:
            yield from (Blob(name, "added", node) for node in sorted(holders - shown.holders))
            yield from (Blob(name, "removed", node) for node in sorted(shown.holders - holders))
        else:
            yield from _chain_events(name, shown, holders, leader)
        shown.as_blob, shown.count, shown.holders, shown.leader = as_blob, count, holders, leader
        if not holders and count is None:
            del self._shown[name]

    def _wanted(self, key: Key | None, name: str) -> int | None:
        if key is not None:
            return self.count(key)
        return self._spec.get(("chain", name), self._spec.get(("artifact", name)))


def _chain_events(name: str, shown: _Shown, holders: set[int], leader: int | None) -> Iterator[Event]:
    """From what was told of a chain to what is; the last holder change carries the leader, so a step-down is one
    event."""
    added, removed = sorted(holders - shown.holders), sorted(shown.holders - holders)
    moves: list[tuple[Literal["added", "removed"], int]] = [("added", node) for node in added]
    moves += [("removed", node) for node in removed]
    for at, (change, node) in enumerate(moves):
        if at == len(moves) - 1 and leader != shown.leader:
            yield ReplicaUpdate(name, change, node, leader)
        else:
            yield ReplicaUpdate(name, change, node)
    if not moves and leader != shown.leader:
        yield ReplicaLeader(name, leader)
