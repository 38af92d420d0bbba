"""The states of a maintenance, apart from the events: whoever only names them loads nothing else of the engine."""

from __future__ import annotations

from enum import StrEnum


class MaintenanceState(StrEnum):
    """Where a node stands in its maintenance; the arcs between are in `maintenance`."""

    ACTIVE = "active"
    ENTERING = "entering_maintenance"
    MAINTENANCE = "maintenance"
    EXITING = "exiting_maintenance"
    RECOVERY = "recovery"
    DRAIN_FAILED = "drain_failed"
