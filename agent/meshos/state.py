"""The engine's state and its fold, under one name: `actual` says what is kept, `fold` what each event does."""

from agent.meshos.actual import Counts, Emitted, FailureRecord, MeshOsState, Work
from agent.meshos.fold import fold
from agent.meshos.peers import AvoidEntry, PeerHealth, Rtt

__all__ = [
    "AvoidEntry",
    "Counts",
    "Emitted",
    "FailureRecord",
    "MeshOsState",
    "PeerHealth",
    "Rtt",
    "Work",
    "fold",
]
