"""From a key to a signed op and its answer: choose targets, forecast, confirm, send, follow to the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from discovery.errors import QuarterdeckError, Refused, Unreachable
from tui.actions import OP_VERBS
from tui.model.blast import Forecast, forecast
from tui.model.ops import OpBook, OpEntry
from tui.model.text import clean
from tui.widgets.dialogs import Confirm

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

SIDE_BY_SIDE = 8
"""Ops under way at once; the rest waits, and is shown as not sent yet."""
DEFAULT_DEADLINE = "5m"


class Acting:
    """The one place where the console makes ops, and so the place that read-only mode holds."""

    def __init__(self, deck: QuarterdeckApp, send_op: Any, signer: str, locked: bool) -> None:
        self._deck = deck
        self._send_op = send_op
        self._signer = signer
        self.locked = locked
        """Started read-only: stays so."""
        self.read_only = locked
        self.book = OpBook()
        self._slots = asyncio.Semaphore(SIDE_BY_SIDE)
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, verb: str) -> None:
        """Opens the confirm panel for an op on the marks, or on the row under the cursor."""
        deck = self._deck
        if self.read_only:
            how = "start again without --read-only" if self.locked else f"{deck.key_of('read_only')} ends it"
            deck.say(f"read-only: no op is made; {how}", "error")
            return
        targets = deck.view_shown().targets()
        if not targets:
            deck.say("nothing to act on: put the cursor on a node", "text")
            return
        if deck.session.client is None:
            deck.say("no agent attached: an op can't be sent now", "error")
            return
        ids = [row.id for row in targets]
        names = {row.id: row.name for row in targets}

        def look() -> Forecast:
            fleet = deck.fleet
            meshes = fleet.directory.rows.values()
            return forecast(
                fleet.rows.values(), ids, verb, attached=fleet.my_id, now=deck.now(), meshes=meshes
            )

        def send(limit_ms: float | None) -> None:
            args = {} if limit_ms is None else {"deadline_ms": int(limit_ms)}
            for node in ids:
                self._start(verb, node, names[node], args)
            deck.view_shown().clear_marks()

        deadline = DEFAULT_DEADLINE if verb == "drain" else None
        deck.open_panel(Confirm(look, send, self._signer, deck.view_shown().hidden_marks(), deadline))

    def _start(self, verb: str, node: str, name: str, args: dict[str, Any]) -> None:
        entry = OpEntry(verb, OP_VERBS[verb].keys[0], node, name, self._deck.now())
        self.book.entries.append(entry)
        task = asyncio.create_task(self._follow(entry, args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, entry: OpEntry, args: dict[str, Any]) -> None:
        """One op to its end; whatever happens to it is told in its entry."""
        deck = self._deck

        def on_stage(stage: str) -> None:
            if entry.open:
                entry.stage = clean(stage)
                deck.changed()

        async with self._slots:
            entry.started = deck.now()
            if self.read_only:
                result: dict[str, Any] = {
                    "result": "refused",
                    "reason": "read-only mode was switched on before it was sent",
                }
            elif deck.session.client is None:
                result = {"result": "unreachable", "reason": "the agent was lost before it was sent"}
            else:
                result = await self._send(entry, args, on_stage)
            entry.finish(result, deck.now())
            deck.changed()

    async def _send(self, entry: OpEntry, args: dict[str, Any], on_stage: Any) -> dict[str, Any]:
        try:
            return (
                await self._send_op(self._deck.session.client, entry.verb, entry.target, args, on_stage) or {}
            )
        except Refused as why:
            return {"result": "refused", "reason": why.sentence}
        except Unreachable as why:
            return {"result": "unknown" if why.maybe_arrived else "unreachable", "reason": str(why)}
        except QuarterdeckError as why:
            return {"result": "refused", "reason": str(why)}
        except asyncio.CancelledError:
            entry.finish({"result": "unknown", "reason": "the console was left"}, self._deck.now())
            raise
        except Exception as why:
            # Nobody knows how far it came: that is what `unknown` means.
            return {"result": "unknown", "reason": f"{type(why).__name__}: {why}"}

    def toggle_read_only(self) -> None:
        """Read-only on or off, unless the console was started so."""
        if self.locked:
            self._deck.say("started with --read-only: it stays on", "text")
            return
        self.read_only = not self.read_only
        self._deck.say("read-only: no op is made" if self.read_only else "ops can be made again", "text")
