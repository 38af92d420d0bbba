"""Membership without I/O: SWIM with suspicion, Lifeguard and anti-entropy. Packets and deadlines in, effects
out."""

from discovery.swim.config import SwimConfig
from discovery.swim.core import Swim
from discovery.swim.effects import (
    Changed,
    Connect,
    Counted,
    Effect,
    Evicted,
    Joined,
    LeaveDone,
    PersistIncarnation,
    PushPull,
    Send,
    Sentinels,
    Synced,
)
from discovery.swim.notes import Keeper
from discovery.swim.rules import Tombstone

__all__ = [
    "Changed",
    "Connect",
    "Counted",
    "Effect",
    "Evicted",
    "Joined",
    "Keeper",
    "LeaveDone",
    "PersistIncarnation",
    "PushPull",
    "Send",
    "Sentinels",
    "Swim",
    "SwimConfig",
    "Synced",
    "Tombstone",
]
