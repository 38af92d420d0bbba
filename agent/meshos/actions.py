"""What reconcile asks for: one frozen struct an action, told apart by its `kind`.

An action is named by its kind and target; while one is in flight, the same is not asked for again.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import msgspec

from agent.meshos.events import Id

Key: TypeAlias = tuple[str, Id | None]


class MarkAvoid(msgspec.Struct, frozen=True, tag_field="kind", tag="mark_avoid"):
    """Keep away from a peer for `ttl_ms`. It stands once it is written back, so it is never in flight."""

    KIND: ClassVar[str] = "mark_avoid"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = True

    peer: Id
    reason: str
    ttl_ms: int

    @property
    def target(self) -> Id:
        return self.peer


Action: TypeAlias = MarkAvoid


def key_of(action: Action) -> Key:
    """What names an action: its kind and target."""
    return action.KIND, action.target
