"""Who holds which chain and which artifact, who leads, and how good each holder is, as far as this node was told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import UnsetType

from agent.meshos.events import (
    Blob,
    Id,
    LocalReplicaIntent,
    PlacementIntent,
    ReplicaLeader,
    ReplicaUpdate,
    Scores,
)

if TYPE_CHECKING:
    from agent.meshos.actual import MeshOsState


class Chain:
    """One chain. `pending`: an eviction was asked for and no holder has gone since."""

    __slots__ = ("holders", "last_rebalance_ms", "leader", "pending")

    def __init__(self) -> None:
        self.holders: set[Id] = set()
        self.leader: Id | None = None
        self.last_rebalance_ms: int | None = None
        self.pending = False

    @property
    def empty(self) -> bool:
        return not (self.holders or self.pending) and self.leader is None and self.last_rebalance_ms is None


def update(state: MeshOsState, event: ReplicaUpdate) -> None:
    """A holder more or less. Any holder change ends what was requested for the chain; this node's own, its pull
    or drop."""
    key, holder = event.chain, event.holder
    chain = state.chain(key)
    moved = (holder in chain.holders) is (event.change == "removed")
    if moved:
        if event.change == "added":
            chain.holders.add(holder)
            state.held_by.setdefault(holder, set()).add(key)
        else:
            chain.holders.discard(holder)
            chain.pending = False
            held = state.held_by[holder]
            held.discard(key)
            if not held:
                del state.held_by[holder]
        state.free(("request_placement", key))
        state.free(("request_eviction", key))
        if holder == state.this_node:
            state.free(("pull_replica", key))
            state.free(("drop_replica", key))
    if not isinstance(event.leader, UnsetType):
        _lead(state, key, chain, event.leader)
    _changed(state, key, chain)


def leader(state: MeshOsState, event: ReplicaLeader) -> None:
    """Who leads a chain now."""
    chain = state.chain(event.chain)
    _lead(state, event.chain, chain, event.leader)
    _changed(state, event.chain, chain)


def _lead(state: MeshOsState, key: Id, chain: Chain, node: Id | None) -> None:
    chain.leader = node
    if node is not None and node == state.this_node:
        state.led.add(key)
    else:
        state.led.discard(key)


def _changed(state: MeshOsState, key: Id, chain: Chain) -> None:
    state.work.chains.add(key)
    state.changed.add("replicas")
    state.changed_chains.add(key)
    if chain.empty:
        del state.chains[key]


def placement(state: MeshOsState, event: PlacementIntent) -> None:
    """How many holders a chain shall have; a change frees what was requested."""
    if state.desired.placement_intent(event):
        state.free(("request_placement", event.chain))
        state.free(("request_eviction", event.chain))
        touched(state, event.chain)


def local(state: MeshOsState, event: LocalReplicaIntent) -> None:
    """Whether this node shall hold a chain; a change frees what was asked for."""
    if state.desired.local_replica_intent(event):
        intent_changed(state, event.chain)


def intent_changed(state: MeshOsState, key: Id) -> None:
    """The local intent for a chain is another now."""
    state.free(("pull_replica", key))
    state.free(("drop_replica", key))
    touched(state, key)


def touched(state: MeshOsState, key: Id) -> None:
    """Something that decides about a chain changed."""
    state.work.chains.add(key)
    state.changed.add("replicas")
    state.changed_chains.add(key)


def blob(state: MeshOsState, event: Blob) -> None:
    """A holder of an artifact more or less; either ends its migration."""
    key, holder = event.blob, event.holder
    holders = state.blobs.get(key, frozenset())
    if (holder in holders) is (event.change == "added"):
        return
    holders = holders | {holder} if event.change == "added" else holders - {holder}
    if holders:
        state.blobs[key] = holders
    else:
        state.blobs.pop(key, None)
    if state.this_node in holders:
        state.blobs_here.add(key)
    else:
        state.blobs_here.discard(key)
    state.free(("migrate_blob", key))
    if state.draining:
        state.changed.update(("local", "local_maintenance"))


def scores(state: MeshOsState, event: Scores) -> None:
    """How good each node is for a chain, in place of what was known."""
    set_scores(state, str(event.chain), event.scores)


def set_scores(state: MeshOsState, text: str, found: Mapping[str, float | None]) -> None:
    """Scores of the chain whose id reads so, of nodes whose ids read so; what is no number is unknown."""
    known = {node: value for node, value in found.items() if value is not None and not math.isnan(value)}
    if known == state.scores.get(text, {}):
        return
    if known:
        state.scores[text] = known
    else:
        state.scores.pop(text, None)
    state.work.chains.update(ids_of(text))


def ids_of(text: str) -> list[Id]:
    """The ids that read so: the text itself, and the number if it is how that number is written."""
    found: list[Id] = [text]
    if text.removeprefix("-").isdigit() and text.isascii() and len(text) < 40 and str(int(text)) == text:
        found.append(int(text))
    return found


def invalidate(state: MeshOsState) -> None:
    """Forgets for every chain led here when it was rebalanced, what is pending, and its scores."""
    for key in state.led:
        chain = state.chains[key]
        chain.last_rebalance_ms, chain.pending = None, False
        state.scores.pop(str(key), None)
        touched(state, key)
