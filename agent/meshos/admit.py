"""Admit: the one gate that every outbound act passes, whoever asked for it.

What is limited by a rate gets a slot: the next free one, first come first served, reserved at once; who has to
wait comes back at its slot. A pull and its chain's window are reserved together. An act whose dispatch failed
gives back what it reserved, and nothing else: the gate then answers as if it had never come.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from agent.meshos.actions import (
    Action,
    DropReplica,
    Key,
    MigrateBlob,
    PullReplica,
    RequestEviction,
    StartDaemon,
    key_of,
)
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Id

DAEMON_BACKOFF = "daemon-backoff"
PULL_COOLDOWN = "pull-cooldown"
STABILISING = "chain-stabilising"
MIGRATION_RATE = "migration-rate"
BACKPRESSURE = "backpressure"


class Admit(msgspec.Struct, frozen=True, tag_field="verdict", tag="admit"):
    """It may go out now."""


class Defer(msgspec.Struct, frozen=True, tag_field="verdict", tag="defer"):
    """Come back after a duration. `slot`: a place is reserved, so coming back is no strike."""

    retry_after_ms: int
    reason: str
    slot: bool = False


class Gate(msgspec.Struct, frozen=True, tag_field="verdict", tag="gate"):
    """Not before a loop time; don't come back by itself."""

    until_ms: int
    reason: str


Verdict: TypeAlias = Admit | Defer | Gate
ADMIT = Admit()


class Slots:
    """Times at which something may happen: at most `number` in any `window_ms`."""

    __slots__ = ("_gaps", "_late_ms", "_number", "_out", "_times", "_window_ms")

    def __init__(self, number: int, window_ms: int) -> None:
        self._number = number
        self._window_ms = window_ms
        self._times: list[int] = []
        """Reserved, and out so lately that they still count; in order."""
        self._out: list[int] = []
        """Those that went out."""
        self._gaps = False
        """A slot before the last one may have been given back."""
        self._late_ms: int | None = None
        """The slot that was given last to one that came when it couldn't go."""

    def reserve(self, now_ms: int) -> int:
        """Takes the next free slot: `now_ms` itself, or later."""
        self._forget(now_ms)
        slot_ms = self._first_free(now_ms)
        insort(self._times, slot_ms)
        return slot_ms

    def go(self, slot_ms: int, now_ms: int) -> int | None:
        """Goes out at `now_ms`, at its slot or after it: None. Or, if others went out too lately (a pause of the
        process made slots run into each other), the slot it holds instead."""
        self._forget(now_ms)
        out = self._out
        if len(out) >= self._number and (free_ms := out[-self._number] + self._window_ms) > now_ms:
            if self._late_ms is not None and self._late_ms >= now_ms:
                free_ms = max(free_ms, self._late_ms + self._window_ms // self._number)
            self._late_ms = free_ms
            self._move(slot_ms, free_ms)
            return free_ms
        self._move(slot_ms, now_ms)
        insort(out, now_ms)
        return None

    def give_back(self, slot_ms: int, *, out: bool) -> None:
        """Frees a slot that was reserved, and used if `out`."""
        if out and slot_ms in self._out:
            self._out.remove(slot_ms)
        if slot_ms in self._times:
            self._gaps = self._gaps or self._times[-1] != slot_ms
            self._times.remove(slot_ms)

    def _move(self, old_ms: int, new_ms: int) -> None:
        if old_ms == new_ms:
            return
        if old_ms in self._times:
            self._gaps = self._gaps or self._times[-1] != old_ms
            self._times.remove(old_ms)
        insort(self._times, new_ms)

    def _first_free(self, now_ms: int) -> int:
        times, number, window_ms = self._times, self._number, self._window_ms
        if not self._gaps:
            earliest_ms = times[-number] + window_ms if len(times) >= number else now_ms
            return max(now_ms, earliest_ms)
        slot_ms = now_ms
        while (later_ms := self._collision(slot_ms)) is not None:
            slot_ms = later_ms
        if not times or slot_ms >= times[-1]:
            self._gaps = False
        return slot_ms

    def _collision(self, slot_ms: int) -> int | None:
        """The next time to try, if `slot_ms` makes too many of a window; None when it is free."""
        times, number = self._times, self._number
        at = bisect_right(times, slot_ms)
        before, after = times[max(0, at - number) : at], times[at : at + number]
        around = [*before, slot_ms, *after]
        for first in range(len(around) - number):
            if around[first + number] - around[first] < self._window_ms:
                if first < len(before):
                    return max(slot_ms + 1, around[first] + self._window_ms)
                return after[0]
        return None

    def _forget(self, now_ms: int) -> None:
        """Lets go of what was out so long ago that it counts no more."""
        old_ms = now_ms - self._window_ms
        while self._out and self._out[0] <= old_ms:
            gone_ms = self._out.pop(0)
            if gone_ms in self._times:
                self._times.remove(gone_ms)


class Reservation:
    """What one act holds: a slot, and the window of a chain."""

    __slots__ = ("chain", "out", "slot_ms", "slots", "window_ms")

    def __init__(self) -> None:
        self.slots: Slots | None = None
        self.slot_ms = 0
        self.out = False
        """It was admitted; its dispatch is still to tell."""
        self.chain: Id | None = None
        self.window_ms: int | None = None
        """Until when the chain is stabilising by this act."""


class Admission:
    """The gate. `gate_of` tells until when a daemon may not be started, `zone_of` which zone a node is in."""

    def __init__(
        self,
        config: MeshOsConfig,
        gate_of: Callable[[Id], int | None] = lambda daemon: None,
        zone_of: Callable[[Id], str] = lambda node: "",
    ) -> None:
        self._config = config
        self._gate_of = gate_of
        self._zone_of = zone_of
        self._pulls = Slots(1, config.pull_cooldown_ms)
        self._zones: dict[str, Slots] = {}
        self._stabilising: dict[Id, int] = {}
        self._held: dict[Key, Reservation] = {}
        self.backpressure = False

    def admit(self, action: Action, now_ms: int) -> Verdict:
        """Whether an act may go out now. Asked again for one that holds a reservation, it honours that."""
        key = key_of(action)
        held = self._held.get(key)
        match action:
            case StartDaemon():
                until_ms = self._gate_of(action.daemon)
                if until_ms is not None and now_ms < until_ms:
                    return Gate(until_ms, DAEMON_BACKOFF)
            case PullReplica():
                if held is not None:
                    return self._return(held, now_ms, PULL_COOLDOWN)
                if rest_ms := self.rest_ms(action.chain, now_ms):
                    return Defer(rest_ms, STABILISING)
                return self._queue(key, self._pulls, now_ms, PULL_COOLDOWN, action.chain)
            case DropReplica():
                if held is None:
                    if rest_ms := self.rest_ms(action.chain, now_ms):
                        return Defer(rest_ms, STABILISING)
                    held = self._held[key] = Reservation()
                    held.out = True
                    self._stabilise(held, action.chain, now_ms)
            case MigrateBlob():
                if self.backpressure:
                    return Defer(self._config.backpressure_retry_ms, BACKPRESSURE)
                if held is not None:
                    return self._return(held, now_ms, MIGRATION_RATE)
                zone = self._zone_of(action.receiver)
                slots = self._zones.get(zone)
                if slots is None:
                    config = self._config
                    slots = Slots(config.migrations_per_window, config.migration_window_ms)
                    self._zones[zone] = slots
                return self._queue(key, slots, now_ms, MIGRATION_RATE, None)
            case RequestEviction(by_score=True):
                if self.backpressure:
                    return Defer(self._config.backpressure_retry_ms, BACKPRESSURE)
        return ADMIT

    def dispatched(self, action: Action) -> None:
        """It went out: what it reserved is spent."""
        self._held.pop(key_of(action), None)

    def release(self, action: Action) -> None:
        """It did not go out, or its dispatch failed: what it reserved is free again."""
        held = self._held.pop(key_of(action), None)
        if held is None:
            return
        if held.slots is not None:
            held.slots.give_back(held.slot_ms, out=held.out)
        if held.chain is not None and self._stabilising.get(held.chain) == held.window_ms:
            del self._stabilising[held.chain]

    def depth(self, waiting: int) -> bool | None:
        """Takes the number of actions that wait or are deferred: True when backpressure begins by it, False when
        it ends."""
        if not self.backpressure and waiting >= self._config.backpressure_high:
            self.backpressure = True
            return True
        if self.backpressure and waiting <= self._config.backpressure_low:
            self.backpressure = False
            return False
        return None

    def forget(self, now_ms: int) -> None:
        """Lets go of windows that are over."""
        for chain in [chain for chain, until_ms in self._stabilising.items() if until_ms <= now_ms]:
            del self._stabilising[chain]

    def _queue(self, key: Key, slots: Slots, now_ms: int, reason: str, chain: Id | None) -> Verdict:
        held = self._held[key] = Reservation()
        held.slots, held.slot_ms = slots, slots.reserve(now_ms)
        if chain is not None:
            self._stabilise(held, chain, held.slot_ms)
        return self._return(held, now_ms, reason)

    def _return(self, held: Reservation, now_ms: int, reason: str) -> Verdict:
        """The verdict on one that holds a slot."""
        assert held.slots is not None
        if held.out:
            return ADMIT
        if now_ms >= held.slot_ms:
            later_ms = held.slots.go(held.slot_ms, now_ms)
            held.slot_ms = now_ms if later_ms is None else later_ms
            if held.chain is not None:
                self._stabilise(held, held.chain, held.slot_ms)
            if later_ms is None:
                held.out = True
                return ADMIT
        return Defer(held.slot_ms - now_ms, reason, True)

    def _stabilise(self, held: Reservation, chain: Id, from_ms: int) -> None:
        held.chain, held.window_ms = chain, from_ms + self._config.stabilise_ms
        self._stabilising[chain] = held.window_ms

    def rest_ms(self, chain: Id, now_ms: int) -> int:
        """How long the chain still stabilises; 0 when it doesn't."""
        return max(0, self._stabilising.get(chain, now_ms) - now_ms)
