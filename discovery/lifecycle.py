"""A node is a state: the seven states, the legal moves, and what each evidence of absence means.

`MOVES` is the only table of legal moves; the diagram in docs/architecture.md is made from it.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class State(IntEnum):
    """What a node is in. The number is what travels; `.word` is what people and JSON see."""

    JOINING = 0
    ALIVE = 1
    DEGRADED = 2
    UPDATING = 3
    DRAINING = 4
    LEAVING = 5
    DEAD = 6

    @property
    def word(self) -> str:
        return self.name.lower()


class By(StrEnum):
    """Who makes a move: the node itself, an operator's op, or observers (Dead, and only Dead)."""

    NODE = "node"
    OPERATOR = "operator"
    OBSERVER = "observer"


class Evidence(StrEnum):
    """How an absence is known."""

    LEFT = "left"
    EXITED = "exited"
    SILENT = "silent"


EVIDENCE_TEXT = {
    Evidence.LEFT: "said goodbye",
    Evidence.EXITED: "process gone (or a firewall closed its port)",
    Evidence.SILENT: "no answer: host down, stopped or cut off",
}

_J, _A, _D, _U, _R, _L, _X = State
MOVES: dict[tuple[State, State], By] = {
    (_J, _A): By.NODE,
    (_J, _D): By.NODE,
    (_J, _R): By.NODE,
    (_A, _D): By.NODE,
    (_D, _A): By.NODE,
    (_A, _R): By.OPERATOR,
    (_D, _R): By.OPERATOR,
    (_A, _U): By.OPERATOR,
    (_D, _U): By.OPERATOR,
    (_R, _U): By.OPERATOR,
    (_R, _A): By.OPERATOR,
    (_R, _D): By.OPERATOR,
    (_U, _J): By.NODE,
    (_U, _A): By.NODE,
    (_U, _D): By.NODE,
    (_U, _R): By.NODE,
    **{(s, _L): By.NODE for s in (_J, _A, _D, _U, _R)},
    **{(s, _X): By.OBSERVER for s in (_J, _A, _D, _U, _R, _L)},
    **{(_X, s): By.NODE for s in (_J, _A, _D, _U, _R, _L)},
}
"""Legal moves and who makes them. Updating → Alive, Degraded, Draining is an update that failed; Dead → any
needs a higher incarnation, which `swim` checks."""

PRESENT = frozenset({_J, _A, _D, _U, _R})
"""States in which a node is there: probed, counted as alive by gossip, reachable for ops."""


def may_move(old: State, new: State) -> bool:
    """Whether a node seen in `old` may be seen in `new` next. Staying is no move."""
    return (old, new) in MOVES


def settable(state: State) -> bool:
    """Whether an operator may set this state: Joining, Leaving and Dead are nobody's to set."""
    return state in (_A, _U, _R)


def diagram() -> str:
    """The table as a Mermaid state diagram, for the docs."""
    lines = ["stateDiagram-v2", "    [*] --> Joining"]
    lines += [
        f"    {a.name.title()} --> {b.name.title()}: {by}" for (a, b), by in MOVES.items() if a is not _X
    ]
    lines += ["    Dead --> Joining: higher incarnation", "    Leaving --> [*]"]
    return "\n".join(lines)
