"""What is to be done: (what is, now) → actions. Arms in a fixed order, each sorted by id, all pure.

An arm sees a `Look` and yields actions; adding one is a function more in `ARMS`. Reconcile asks twice for the
same while nothing changed; `write_back` is what makes the second pass after it empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import msgspec

from agent.meshos.actions import Action, MarkAvoid, key_of
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Id, by_id
from agent.meshos.state import AvoidEntry, Emitted, MeshOsState


class Look(msgspec.Struct, frozen=True):
    """What an arm may see. `now_ms` is the time of the last tick."""

    actual: MeshOsState
    this_node: Id
    config: MeshOsConfig
    now_ms: int


Arm: TypeAlias = Callable[[Look], Iterable[Action]]


def locality(look: Look) -> Iterator[Action]:
    """Keep away from a peer whose round trip is strictly above the limit and that is not on the list yet."""
    limit_ms, avoid = look.config.degraded_rtt_ms, look.actual.avoid
    slow = [peer for peer, rtt in look.actual.rtt.items() if rtt.rtt_ms > limit_ms and peer not in avoid]
    for peer in sorted(slow, key=by_id):
        measured = look.actual.rtt[peer].rtt_ms
        yield MarkAvoid(peer, f"rtt {measured:.0f} ms, over {limit_ms:g} ms", look.config.avoid_ttl_ms)


ARMS: tuple[Arm, ...] = (locality,)


def reconcile(state: MeshOsState, arms: tuple[Arm, ...] = ARMS) -> list[Action]:
    """The actions that follow from the state at its last tick, in the order of the arms. Changes nothing."""
    look = Look(state, state.this_node, state.config, state.last_tick_ms)
    emitted = state.emitted
    return [
        action
        for arm in arms
        for action in arm(look)
        if not ((before := emitted.get(key_of(action))) and before.in_flight)
    ]


def write_back(state: MeshOsState, actions: Iterable[Action]) -> None:
    """Notes what reconcile asked for: its effect where it is local, that it is under way where it isn't."""
    for action in actions:
        if isinstance(action, MarkAvoid):
            now_ms = state.last_tick_ms
            state.avoid[action.peer] = AvoidEntry(action.reason, now_ms, now_ms + action.ttl_ms)
            state.changed.add("avoid_list")
        key = key_of(action)
        state.emitted.pop(key, None)
        if len(state.emitted) >= state.config.action_queue_capacity:
            del state.emitted[next(iter(state.emitted))]
        state.emitted[key] = Emitted(action, state.last_tick_ms, not action.ENDS_AT_WRITE_BACK)
        state.counts.actions_emitted += 1
        state.changed.update(("recently_emitted", "stats"))


def run_pass(state: MeshOsState, arms: tuple[Arm, ...] = ARMS) -> list[Action]:
    """One pass: reconcile, write back, and the actions to dispatch."""
    actions = reconcile(state, arms)
    if actions:
        write_back(state, actions)
    return actions
