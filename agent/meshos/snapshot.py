"""What the engine shows: an immutable picture of its state, made of sections that are shared while they hold.

A snapshot may be read from any thread, at any later time: it holds loop times, and ages are computed when it
is turned into a document. A section that did not change is the very same object as before, and when none did,
so is the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from agent.meshos.events import Health, Id, by_id
from agent.meshos.own import Drain
from agent.meshos.state import AvoidEntry, Emitted, FailureRecord, MeshOsState
from discovery.lifecycle import State


class DrainView(msgspec.Struct, frozen=True):
    """A drain in force. `left`: what is still to be stopped or moved, in words."""

    since_ms: int
    deadline_at_ms: int
    by: str | None
    op_id: str | None
    left: tuple[str, ...] = ()


class LocalView(msgspec.Struct, frozen=True):
    """This node's own life."""

    state: State
    since_ms: int
    reason: str
    by: str | None
    op_id: str | None
    cordoned: bool
    drain: DrainView | None
    update_deadline_at_ms: int | None


class MaintenanceView(msgspec.Struct, frozen=True):
    """This node's maintenance."""

    state: str = "active"


class PeerView(msgspec.Struct, frozen=True):
    """A peer's latest samples; None where there is none, or none recent enough."""

    rtt_ms: float | None
    rtt_at_ms: int | None
    health: Health | None
    health_reason: str
    health_at_ms: int | None


class Snapshot(msgspec.Struct, frozen=True):
    """The sections. Times in them are loop times in milliseconds; `at_ms` is when this snapshot was made."""

    at_ms: int
    this_node: Id
    local: LocalView
    local_maintenance: MaintenanceView
    peers: Mapping[Id, PeerView]
    avoid_list: Mapping[Id, AvoidEntry]
    recently_emitted: tuple[Emitted, ...]
    recent_failures: tuple[FailureRecord, ...]
    stats: Mapping[str, int]


class SnapshotBuilder:
    """Makes snapshots of one state, each from the one before."""

    def __init__(self, state: MeshOsState) -> None:
        self._state = state
        state.changed.clear()
        state.changed_peers.clear()
        self.last = Snapshot(
            state.now_ms,
            state.this_node,
            _local(state),
            MaintenanceView(),
            _peers(state),
            MappingProxyType(dict(state.avoid)),
            tuple(state.emitted.values()),
            tuple(state.failures),
            MappingProxyType(state.counts.as_dict()),
        )

    def build(self) -> Snapshot:
        """The snapshot of the state now; the last one itself when nothing changed since."""
        state, last = self._state, self.last
        changed = state.changed
        if not changed:
            return last
        self.last = Snapshot(
            state.now_ms,
            state.this_node,
            _local(state) if "local" in changed else last.local,
            last.local_maintenance,
            _peers(state, last.peers) if "peers" in changed else last.peers,
            MappingProxyType(dict(state.avoid)) if "avoid_list" in changed else last.avoid_list,
            tuple(state.emitted.values()) if "recently_emitted" in changed else last.recently_emitted,
            tuple(state.failures) if "recent_failures" in changed else last.recent_failures,
            MappingProxyType(state.counts.as_dict()) if "stats" in changed else last.stats,
        )
        changed.clear()
        state.changed_peers.clear()
        return self.last


def document(snapshot: Snapshot, now_ms: int, show: Callable[[Id], Any] = lambda key: key) -> dict[str, Any]:
    """The snapshot as plain values with ages and remaining times at `now_ms`, in the keys of `qd node`.

    `show` turns an id into what people see; rows are sorted by id."""

    def shown(key: Id | None) -> Any:
        return None if key is None else show(key)

    return {
        "peers": [
            {
                "peer": show(peer),
                "rtt_ms": view.rtt_ms,
                "rtt_age_ms": None if view.rtt_at_ms is None else now_ms - view.rtt_at_ms,
                "health": view.health and view.health.value,
                "reason": view.health_reason or None,
                "health_age_ms": None if view.health_at_ms is None else now_ms - view.health_at_ms,
            }
            for peer, view in sorted(snapshot.peers.items(), key=lambda item: by_id(item[0]))
        ],
        "avoid_list": [
            {
                "peer": show(peer),
                "reason": entry.reason,
                "age_ms": now_ms - entry.since_ms,
                "expires_in_ms": max(0, entry.until_ms - now_ms),
            }
            for peer, entry in sorted(snapshot.avoid_list.items(), key=lambda item: by_id(item[0]))
        ],
        "local": _local_document(snapshot.local, now_ms),
        "local_maintenance": {"state": snapshot.local_maintenance.state},
        "recently_emitted": [
            {
                "kind": emitted.action.KIND,
                "target": shown(emitted.action.target),
                "age_ms": now_ms - emitted.at_ms,
            }
            for emitted in snapshot.recently_emitted
        ],
        "recent_failures": [
            {
                "age_ms": now_ms - failure.at_ms,
                "source": failure.source,
                "action": failure.action,
                "target": shown(failure.target) if failure.action else failure.target,
                "reason": failure.reason,
                "retry_after_ms": failure.retry_after_ms,
            }
            for failure in snapshot.recent_failures
        ],
        "stats": dict(snapshot.stats),
    }


def _local(state: MeshOsState) -> LocalView:
    life = state.life
    return LocalView(
        life.state,
        life.since_ms,
        life.reason,
        life.by,
        life.op_id,
        life.cordoned,
        _drain(life.drain),
        life.update.deadline_at_ms if life.update else None,
    )


def _drain(drain: Drain | None) -> DrainView | None:
    if drain is None:
        return None
    return DrainView(drain.since_ms, drain.deadline_at_ms, drain.by, drain.op_id)


def _peers(state: MeshOsState, before: Mapping[Id, PeerView] | None = None) -> Mapping[Id, PeerView]:
    """All peers, or those of `before` with the changed ones brought up to date."""
    peers = dict(before or {})
    for peer in state.changed_peers if before is not None else state.rtt.keys() | state.health.keys():
        rtt, health = state.rtt.get(peer), state.health.get(peer)
        if rtt is None and health is None:
            peers.pop(peer, None)
            continue
        peers[peer] = PeerView(
            rtt.rtt_ms if rtt else None,
            rtt.at_ms if rtt else None,
            health.health if health else None,
            health.reason if health else "",
            health.at_ms if health else None,
        )
    return MappingProxyType(peers)


def _local_document(local: LocalView, now_ms: int) -> dict[str, Any]:
    drain = local.drain
    return {
        "state": local.state.word,
        "since_ms": now_ms - local.since_ms,
        "reason": local.reason,
        "by": local.by,
        "op_id": local.op_id,
        "cordoned": local.cordoned,
        "drain": drain
        and {
            "age_ms": now_ms - drain.since_ms,
            "deadline_in_ms": drain.deadline_at_ms - now_ms,
            "past_deadline": now_ms >= drain.deadline_at_ms,
            "left": list(drain.left),
            "by": drain.by,
            "op_id": drain.op_id,
        },
        "update_deadline_in_ms": local.update_deadline_at_ms and local.update_deadline_at_ms - now_ms,
    }
