"""A node's durable journal: its chain of records, the ops it accepted, and the few facts it must not forget.

How writes, crashes and damage are dealt with is in `log`; here is what a node keeps. Ops are kept for a day,
so that a repeated one is answered and never applied twice, over restarts too.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from agent.chain import tables
from agent.chain.log import Log
from agent.chain.record import DISPATCHED
from discovery.errors import Refused

OPS_KEPT_MS = 24 * 3600 * 1000
OPS_MAX = 20_000
OPS_NEVER_YOUNGER_MS = 600_000
"""An op younger than this is never forgotten: five times the longest lifetime of a signed op."""

INCARNATION = "incarnation"
OVERRIDE = "override"
STANDING = "standing"
CRASHES = "crashes"
TAKEN_ON = "taken_on"
LAST_PORT = "last_port"
START_MS = "start_ms"
HANDOVER = "handover"
REMEMBERED = "remembered"


class OpEntry(msgspec.Struct, frozen=True):
    """An op accepted here. `result` is None while it is applied, or when the node ended meanwhile."""

    op_id: str
    content: bytes
    verb: str
    target: str
    operator: str
    received_ms: int
    finished_ms: int | None
    result: dict[str, Any] | None


class Handover(msgspec.Struct, frozen=True):
    """What an updating process leaves to the one that replaces it."""

    op_id: str
    earlier: str
    """The state before Updating, as its word."""
    by: str
    started_ms: int
    build: str


class Journal(Log):
    """The journal of one node: `Journal(path, identity)`. LocalError when the place can't be used."""

    # -- facts: small values that outlive the process ------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        """The JSON value kept under this key."""
        text = self._facts.get(key)
        return default if text is None else msgspec.json.decode(text)

    def set(self, key: str, value: Any, *, durable: bool = False) -> None:
        """Keeps a JSON value; None forgets it. An unchanged one costs nothing. Durable or Refused."""
        text = None if value is None else msgspec.json.encode(value).decode()
        if self._facts.get(key) == text and not (durable and key in self._pending_facts):
            return
        if self._closed:
            self.counters["set_after_close"] += 1
            return
        had = self._facts.get(key)
        waited = dict(self._pending_facts)
        self._remember(key, text)
        self._pending_facts[key] = text
        if not durable:
            self._flush_soon()
            return
        try:
            self._write([], durable=True)
        except Refused:
            self._remember(key, had)
            self._pending_facts = waited
            raise

    def next_incarnation(self) -> int:
        """The incarnation of a process that starts now: the last one + 1, on disk when this returns."""
        incarnation = int(self.get(INCARNATION, 0)) + 1
        self.set(INCARNATION, incarnation, durable=True)
        return incarnation

    def next_start_ms(self, wall_ms: int) -> int:
        """When this process started, by the wall clock, but later than the one before it started even where the
        clock was set back: others drop the packets of a process that began before the newest they know. On disk
        with the next durable write."""
        start_ms = max(wall_ms, int(self.get(START_MS, 0)) + 1)
        self.set(START_MS, start_ms)
        return start_ms

    def set_incarnation(self, incarnation: int) -> None:
        """Durable; never lowers it."""
        if incarnation > int(self.get(INCARNATION, 0)):
            self.set(INCARNATION, incarnation, durable=True)

    def handover(self) -> Handover | None:
        """What an update in progress left, if one was in progress when the last process ended."""
        try:
            return msgspec.convert(self.get(HANDOVER), Handover)
        except msgspec.ValidationError:
            return None

    def set_handover(self, handover: Handover | None) -> None:
        """Durable."""
        self.set(HANDOVER, None if handover is None else msgspec.to_builtins(handover), durable=True)

    # -- ops -----------------------------------------------------------------------------

    def reserve(
        self,
        op_id: str,
        content: bytes,
        *,
        verb: str,
        target: str,
        operator: str,
        at_ms: int,
        body: dict[str, Any] | None = None,
    ) -> OpEntry | None:
        """Makes an op durable before it is applied: one fsync, then None; or the entry of an earlier one.

        `content` is the hash of its exact bytes; `body` goes into its `control.op` record."""
        known = self.lookup(op_id)
        if known is not None:
            return known
        before = len(self._pending)
        facts = {"op_id": op_id, "op": verb, "target": target, "operator": operator}
        self._seal("control.op", facts | (body or {}), DISPATCHED, at_ms)
        row = (op_id, content, verb, target, operator, at_ms)
        statements: list[tuple[str, Sequence[Any]]] = [(tables.INSERT_OP, row)]
        if self._head.id % 128 == 0:
            statements += tables.forget_ops(at_ms, OPS_KEPT_MS, OPS_MAX, OPS_NEVER_YOUNGER_MS)
        self._write(statements, durable=True, undo_to=before)
        return None

    def finish(self, op_id: str, result: dict[str, Any], *, at_ms: int, durable: bool = False) -> None:
        """Keeps an op's result. Not `durable`: it outlives the process, not a power cut, and never fails."""
        before = len(self._pending)
        self._seal("control.result", result, DISPATCHED, at_ms)
        text = msgspec.json.encode(result).decode()
        try:
            self._write([(tables.FINISH_OP, (at_ms, text, op_id))], durable=durable, undo_to=before)
        except Refused:
            if durable:
                raise

    def lookup(self, op_id: str) -> OpEntry | None:
        """The op accepted under this id, if any. Refused("journal_full") when the journal can't be read."""
        try:
            row = self._db.execute(tables.SELECT_OP, (op_id,)).fetchone()
        except sqlite3.Error as why:
            raise Refused("journal_full", f"the journal can't be read: {why}") from why
        return None if row is None else _entry(row)

    def unfinished(self) -> list[OpEntry]:
        """Ops that were accepted and have no result, oldest first."""
        with contextlib.suppress(sqlite3.Error):
            return [_entry(row) for row in self._db.execute(tables.UNFINISHED_OPS).fetchall()]
        return []


def _entry(row: Sequence[Any]) -> OpEntry:
    result = None
    if isinstance(row[7], str):
        with contextlib.suppress(msgspec.DecodeError):
            result = msgspec.json.decode(row[7], type=dict[str, Any])
    op_id, content, verb, target, operator, received_ms, finished_ms = row[:7]
    return OpEntry(op_id, content, verb, target, operator, received_ms, finished_ms, result)
