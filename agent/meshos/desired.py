"""What shall be: the intents for daemons, for how many hold a chain, and for what this node holds."""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.meshos.events import DaemonIntent, Id, LocalReplicaIntent, PlacementIntent


class Intent(msgspec.Struct, frozen=True):
    """Of one daemon; `node` pins it, `held` is why it can't run all the same."""

    run: bool
    node: Id | None
    after: tuple[Id, ...] = ()
    version: str = ""
    held: str = ""


class Desired:
    """The latest intent of each daemon and chain. Each method says whether it changed anything."""

    __slots__ = ("counts", "daemons", "followers", "local")

    def __init__(self) -> None:
        self.daemons: dict[Id, Intent] = {}
        self.followers: dict[Id, set[Id]] = {}
        """Daemon → those that are started after it."""
        self.counts: dict[Id, int] = {}
        self.local: dict[Id, Literal["hold", "drop"]] = {}

    def daemon_intent(self, event: DaemonIntent) -> bool:
        before = self.daemons.get(event.daemon)
        if event.intent == "none":
            self.daemons.pop(event.daemon, None)
            self._follow(event.daemon, before.after if before else (), ())
            return before is not None
        intent = Intent(event.intent == "run", event.node, event.after, event.version, event.held)
        self.daemons[event.daemon] = intent
        self._follow(event.daemon, before.after if before else (), intent.after)
        return intent != before

    def _follow(self, key: Id, before: tuple[Id, ...], after: tuple[Id, ...]) -> None:
        for first in before:
            followers = self.followers.get(first, set())
            followers.discard(key)
            if not followers:
                self.followers.pop(first, None)
        for first in after:
            self.followers.setdefault(first, set()).add(key)

    def placement_intent(self, event: PlacementIntent) -> bool:
        before = self.counts.get(event.chain)
        if event.count is None:
            self.counts.pop(event.chain, None)
        else:
            self.counts[event.chain] = event.count
        return before != event.count

    def local_replica_intent(self, event: LocalReplicaIntent) -> bool:
        return self.local_intent(event.chain, None if event.intent == "none" else event.intent)

    def local_intent(self, chain: Id, intent: Literal["hold", "drop"] | None) -> bool:
        """Sets or forgets what this node shall do about a chain."""
        before = self.local.get(chain)
        if intent is None:
            self.local.pop(chain, None)
        else:
            self.local[chain] = intent
        return before != intent
