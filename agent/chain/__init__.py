"""Append-only, hash-linked, signed logs: what a node did, kept so that it can be believed later."""

from agent.chain.record import (
    Dispatched,
    Disposition,
    EmptyRecord,
    Failed,
    Gated,
    Record,
    UnsupportedVersion,
)
from agent.chain.store import Handover, Journal, OpEntry
from agent.chain.tables import Damage, Report

__all__ = [
    "Damage",
    "Dispatched",
    "Disposition",
    "EmptyRecord",
    "Failed",
    "Gated",
    "Handover",
    "Journal",
    "OpEntry",
    "Record",
    "Report",
    "UnsupportedVersion",
]
