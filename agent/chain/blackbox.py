"""The last of a node, read from its action chain: what a replica can tell of it when it is gone. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from agent.chain.record import FAILURE, Failed, Gated, Record
from agent.executor import failures_of

TRAIL_MAX = 64
FAILURES_MAX = 256
DAEMONS_MAX = 1024
TEXT_MAX = 256
STATE_CHANGED = "node.state_changed"
STOPPING = "node.stopping"
VITALS = "node.vitals"
"""Body `{cpu, mem, disk, running, total}`: shares of the host from 0 to 1; daemons that run, and that run or shall."""
DAEMON = "daemon.changed"
"""Body `{name, state, health, reason, restarts, pid}`: how a daemon is from now on; state `gone` takes it off."""


class BlackBox(msgspec.Struct, kw_only=True):
    """The fold of one node's action chain. Times are Unix milliseconds by that node's clock."""

    trail: list[dict[str, Any]] = []
    """Its last moves: `{at_ms, from, to, reason, by, op_id}`, oldest first; its stop as a move to `leaving`."""
    vitals: dict[str, Any] | None = None
    """`{at_ms, cpu, mem, disk}` where that was recorded."""
    daemons: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    """Its last failures in the shape of `qd failures`, oldest first."""
    last_at_ms: int | None = None
    """When its newest record was made."""
    records: int = 0
    newest: int | None = None
    """Number of its newest record."""


def unfold(records: Iterable[Record]) -> BlackBox:
    """Folds a node's records, oldest first. However many there are, it keeps little of them."""
    box = BlackBox()
    trail: deque[dict[str, Any]] = deque(maxlen=TRAIL_MAX)
    daemons: dict[str, dict[str, Any]] = {}
    failed: deque[Record] = deque(maxlen=FAILURES_MAX)
    for record in records:
        box.records += 1
        box.newest = record.id
        box.last_at_ms = max(box.last_at_ms or 0, record.emitted_at_ms)
        body = record.body or {}
        at = {"at_ms": record.emitted_at_ms}
        if isinstance(record.disposition, Failed | Gated) and record.kind.startswith(("action.", FAILURE)):
            failed.append(record)
        elif record.kind in (STATE_CHANGED, STOPPING):
            trail.append(at | {key: _short(body.get(key)) for key in ("from", "to", "reason", "by", "op_id")})
            if record.kind == STOPPING:
                trail[-1]["to"] = "leaving"
        elif record.kind == VITALS:
            box.vitals = at | {key: _share(body.get(key)) for key in ("cpu", "mem", "disk")}
        elif record.kind == DAEMON and isinstance(name := body.get("name"), str):
            keys = ("state", "health", "reason", "restarts", "pid")
            daemons.pop(name, None)
            if body.get("state") != "gone" and len(daemons) < DAEMONS_MAX:
                daemons[name] = at | {"name": name[:TEXT_MAX]} | {key: _short(body.get(key)) for key in keys}
    box.trail = list(trail)
    box.daemons = list(daemons.values())
    box.failures = [
        {
            "at_ms": failure.at_ms,
            "source": failure.source,
            "action": failure.action,
            "target": _short(failure.target),
            "reason": failure.reason,
            "retry_after_ms": failure.retry_after_ms,
            "until_ms": failure.until_ms,
        }
        for failure in failures_of(failed, FAILURES_MAX)
    ]
    return box


def _short(value: Any) -> Any:
    """A value from another node, of a size that can be shown."""
    if isinstance(value, str):
        return value[:TEXT_MAX]
    return value if isinstance(value, int | float | bool) else None


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None
