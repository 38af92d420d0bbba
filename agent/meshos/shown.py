"""The snapshot for people and JSON: plain values in the keys of `qd node`, with ages as of the moment asked.

`until_ms` and `deadline_ms` are loop times, as in actions; what ends in `_in_ms` is what is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from agent.meshos.events import Id, by_id
from agent.meshos.states import MaintenanceState

if TYPE_CHECKING:
    from agent.meshos.snapshot import DaemonView, LocalView, MaintenanceView, ReplicaView, Snapshot

V = TypeVar("V")
Show = Callable[[Id], Any]


def document(snapshot: Snapshot, now_ms: int, show: Show = lambda key: key) -> dict[str, Any]:
    """The snapshot as plain values with ages and remaining times at `now_ms`.

    `show` turns the id of a node into what people see; rows are sorted by id."""

    def shown(key: Id | None) -> Any:
        return None if key is None else show(key)

    away = _away(snapshot)
    return {
        "daemons": [_daemon(key, view, now_ms, shown, away) for key, view in _sorted(snapshot.daemons)],
        "replicas": [_replica(key, view, now_ms, shown) for key, view in _sorted(snapshot.replicas)],
        "peers": [
            {
                "peer": show(peer),
                "rtt_ms": view.rtt_ms,
                "rtt_age_ms": _age(now_ms, view.rtt_at_ms),
                "health": view.health and view.health.value,
                "reason": view.health_reason or None,
                "health_age_ms": _age(now_ms, view.health_at_ms),
                "maintenance": view.maintenance.value,
                "cordoned": view.cordoned,
                "draining": view.draining,
            }
            for peer, view in _sorted(snapshot.peers)
        ],
        "avoid_list": [
            {
                "peer": show(peer),
                "reason": entry.reason,
                "age_ms": now_ms - entry.since_ms,
                "expires_in_ms": max(0, entry.until_ms - now_ms),
            }
            for peer, entry in _sorted(snapshot.avoid_list)
        ],
        "local": _local(snapshot.local, now_ms),
        "local_maintenance": _maintenance(snapshot.local_maintenance, now_ms),
        "held_back": _held_back(snapshot, now_ms),
        "recently_emitted": [
            {
                "kind": emitted.action.KIND,
                "target": shown(emitted.action.target)
                if emitted.action.KIND == "mark_avoid"
                else emitted.action.target,
                "age_ms": now_ms - emitted.at_ms,
            }
            for emitted in snapshot.recently_emitted
        ],
        "recent_failures": [
            {
                "age_ms": now_ms - failure.at_ms,
                "source": failure.source,
                "action": failure.action,
                "target": shown(failure.target) if failure.action == "mark_avoid" else failure.target,
                "reason": failure.reason,
                "retry_after_ms": failure.retry_after_ms,
                "until_in_ms": _left(now_ms, failure.until_ms),
            }
            for failure in snapshot.recent_failures
        ],
        "stats": dict(snapshot.stats),
    }


def _sorted(section: Mapping[Id, V]) -> Iterable[tuple[Id, V]]:
    return sorted(section.items(), key=lambda item: by_id(item[0]))


def _age(now_ms: int, at_ms: int | None) -> int | None:
    return None if at_ms is None else now_ms - at_ms


def _left(now_ms: int, until_ms: int | None) -> int | None:
    return None if until_ms is None else max(0, until_ms - now_ms)


def _away(snapshot: Snapshot) -> str | None:
    """Why this node runs no daemon whatever is wanted of it; None when it may."""
    stands = snapshot.local_maintenance.state
    if stands in (MaintenanceState.ENTERING, MaintenanceState.MAINTENANCE, MaintenanceState.DRAIN_FAILED):
        return "in maintenance" if stands is MaintenanceState.MAINTENANCE else stands.value.replace("_", " ")
    return "drained" if snapshot.local.drain is not None else None


def _daemon(
    key: Id, view: DaemonView, now_ms: int, shown: Callable[[Id | None], Any], away: str | None
) -> dict[str, Any]:
    if view.intent != "run" or view.state in ("running", "stopping"):
        away = None
    return {
        "daemon": key,
        "name": str(key),
        "intent": view.intent,
        "node": shown(view.pinned),
        "state": view.state,
        "health": view.health and view.health.value,
        "reason": view.reason or None,
        "saturation": view.saturation,
        "restarts": view.restarts,
        "until_ms": view.until_ms,
        "until_in_ms": _left(now_ms, view.until_ms),
        "age_ms": _age(now_ms, view.since_ms),
        "held_back": away or _kept_from(view),
    }


def _kept_from(view: DaemonView) -> str | None:
    """What keeps a daemon from running, the most lasting first."""
    if view.held:
        return view.held
    if view.held_by_cordon:
        return "cordoned"
    return None if view.waits_for is None else f"waits for {view.waits_for}"


def _replica(key: Id, view: ReplicaView, now_ms: int, shown: Callable[[Id | None], Any]) -> dict[str, Any]:
    return {
        "chain": key,
        "holders": [shown(node) for node in view.holders],
        "desired": view.desired,
        "leader": shown(view.leader),
        "intent": view.intent,
        "eviction_pending": view.eviction_pending,
        "last_rebalance_age_ms": _age(now_ms, view.last_rebalance_ms),
    }


def _maintenance(view: MaintenanceView, now_ms: int) -> dict[str, Any]:
    deadline_ms = view.deadline_at_ms
    return {
        "state": view.state.value,
        "since_ms": _age(now_ms, view.since_ms),
        "reason": view.reason or None,
        "deadline_ms": deadline_ms,
        "deadline_in_ms": None if deadline_ms is None else deadline_ms - now_ms,
        "left": list(view.left),
        "by": view.by,
        "op_id": view.op_id,
    }


def _held_back(snapshot: Snapshot, now_ms: int) -> list[dict[str, Any]]:
    """What this node wants and doesn't do yet: what, why, and for how long still (None: until that changes)."""
    found: list[dict[str, Any]] = []
    for key, view in _sorted(snapshot.daemons):
        if view.intent != "run":
            continue
        if view.held or view.held_by_cordon:
            found.append({"what": f"start daemon {key}", "reason": _kept_from(view), "in_ms": None})
        elif view.waits_for is not None and view.state == "stopped":
            why = f"{view.waits_for} is not running well yet"
            found.append({"what": f"start daemon {key}", "reason": why, "in_ms": None})
        elif view.state in ("backing_off", "crash_looping"):
            why = "backs off after a crash" if view.state == "backing_off" else "crash-looping"
            found.append(
                {"what": f"start daemon {key}", "reason": why, "in_ms": _left(now_ms, view.until_ms)}
            )
    maintenance = snapshot.local_maintenance
    for what in maintenance.left:
        left_ms = _left(now_ms, maintenance.deadline_at_ms)
        found.append({"what": "enter maintenance", "reason": what, "in_ms": left_ms})
    return found


def _local(local: LocalView, now_ms: int) -> dict[str, Any]:
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
        "backpressure": local.backpressure,
    }
