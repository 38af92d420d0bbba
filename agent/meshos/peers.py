"""The other nodes as this one sees them: how far, how well, and whether they take work.

A peer's health sample is forgotten when it is old. That it was unreachable is not: a holder that vanished
still counts as gone after a minute, when gossip has long stopped speaking of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Health, Id, NodeHealth, PeerState, RttSample
from agent.meshos.maintenance import DRAINING
from agent.meshos.states import MaintenanceState

if TYPE_CHECKING:
    from agent.meshos.actual import MeshOsState


class Rtt(msgspec.Struct, frozen=True):
    """The latest round trip to a peer, and when it was folded."""

    rtt_ms: float
    at_ms: int


class PeerHealth(msgspec.Struct, frozen=True):
    """The latest health of a peer, and when it was folded."""

    health: Health
    reason: str
    at_ms: int


class AvoidEntry(msgspec.Struct, frozen=True):
    """A peer to keep away from until a loop time."""

    reason: str
    since_ms: int
    until_ms: int


class Mirror(msgspec.Struct, frozen=True):
    """What operators asked of a peer, and where its maintenance stands."""

    cordoned: bool = False
    drained: bool = False
    maintenance: MaintenanceState = MaintenanceState.ACTIVE

    @property
    def draining(self) -> bool:
        return self.drained or self.maintenance in DRAINING


UNTOUCHED = Mirror()


def rtt_sample(state: MeshOsState, event: RttSample) -> None:
    """The latest round trip counts."""
    peer, rtt_ms = event.peer, event.rtt_ms
    if peer == state.this_node or rtt_ms is None or not 0 <= rtt_ms < math.inf:
        return
    state.rtt.pop(peer, None)
    state.rtt[peer] = Rtt(float(rtt_ms), state.now_ms)
    state.work.peers.add(peer)
    state.changed.add("peers")
    state.changed_peers.add(peer)


def node_health(state: MeshOsState, event: NodeHealth) -> None:
    """The latest health counts; unreachable from the first sample that says so, until one says otherwise."""
    peer = event.peer
    if peer == state.this_node:
        return
    state.health.pop(peer, None)
    state.health[peer] = PeerHealth(event.health, event.reason, state.now_ms)
    state.changed.add("peers")
    state.changed_peers.add(peer)
    if event.health is Health.UNREACHABLE:
        state.unreachable.add(peer)
        if peer not in state.unreachable_since:
            state.unreachable_since[peer] = state.now_ms
            state.wake(state.now_ms + state.config.dead_after_ms, "dead", peer)
    elif state.unreachable_since.pop(peer, None) is not None:
        state.unreachable.discard(peer)
        state.dead.discard(peer)
        state.recount(peer)


def expire(state: MeshOsState) -> None:
    """Forgets samples that are too old. Samples stand in the order of their times: the old ones are in front."""
    oldest_ms = state.now_ms - state.config.sample_ttl_ms
    for table in (state.rtt, state.health):
        while table and table[first := next(iter(table))].at_ms < oldest_ms:
            del table[first]
            state.changed.add("peers")
            state.changed_peers.add(first)
            if table is state.health:
                state.unreachable.discard(first)
                if first not in state.held_by and state.unreachable_since.pop(first, None) is not None:
                    state.dead.discard(first)
                    state.recount(first)


def died(state: MeshOsState, peer: Id) -> None:
    """A peer may have been unreachable for as long as it takes to count as gone."""
    since_ms = state.unreachable_since.get(peer)
    if since_ms is not None and state.now_ms - since_ms >= state.config.dead_after_ms:
        state.dead.add(peer)
        state.recount(peer)


def mirror(state: MeshOsState, peer: Id, **fields: bool | MaintenanceState) -> None:
    """Sets some of what a peer is known to be in."""
    before = state.mirrors.get(peer, UNTOUCHED)
    after = msgspec.structs.replace(before, **fields)
    if after == before:
        return
    if after == UNTOUCHED:
        del state.mirrors[peer]
    else:
        state.mirrors[peer] = after
    state.changed.add("peers")
    state.changed_peers.add(peer)
    state.recount(peer)


def peer_state(state: MeshOsState, event: PeerState) -> None:
    """What a peer says of itself replaces what was mirrored."""
    if event.peer != state.this_node:
        mirror(
            state,
            event.peer,
            cordoned=event.cordoned,
            drained=event.draining,
            maintenance=event.maintenance,
        )


def clear_avoided(state: MeshOsState) -> None:
    """Empties the avoid list and forgets what put those peers there, so that they are judged afresh."""
    for peer in state.avoid:
        if state.rtt.pop(peer, None) is not None:
            state.changed.add("peers")
            state.changed_peers.add(peer)
    if state.avoid:
        state.avoid.clear()
        state.changed.add("avoid_list")


def link_health(age_ms: int, config: MeshOsConfig) -> Health:
    """How a peer is by the age of what was last heard on its link."""
    if age_ms > config.link_unreachable_ms:
        return Health.UNREACHABLE
    return Health.DEGRADED if age_ms > config.link_degraded_ms else Health.HEALTHY


def pool_health(state_word: str, suspected: bool, link_age_ms: int | None, config: MeshOsConfig) -> Health:
    """How a peer is as the pool and its link see it, the worse of both: dead → unreachable, suspected →
    degraded. Without a link its age says nothing."""
    if state_word == "dead":
        return Health.UNREACHABLE
    link = Health.HEALTHY if link_age_ms is None else link_health(link_age_ms, config)
    if link is Health.HEALTHY and suspected:
        return Health.DEGRADED
    return link
