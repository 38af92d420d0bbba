"""From a key to a signed op and its answer: choose targets, forecast, confirm, send, follow to the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from discovery.errors import QuarterdeckError, Refused, Unreachable
from tui.actions import OP_VERBS
from tui.model.blast import STOPPING, Forecast, forecast
from tui.model.chains import Chain, Chains
from tui.model.ops import OpBook, OpEntry
from tui.model.replicas import chains_held, told
from tui.model.rows import Row
from tui.model.text import clean
from tui.widgets.dialogs import Confirm, Pick

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

SIDE_BY_SIDE = 8
"""Ops under way at once; the rest waits, and is shown as not sent yet."""
DEADLINES = {"drain": "5m", "maintenance_enter": "10m"}
"""Ops that have one, and what is asked with."""
LEARNT = 8
"""Targets whose daemons are asked for by name; those of more are counted."""


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
        self._held: dict[str, Chains] = {}
        """Mesh → what it keeps, as asked for a forecast."""

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
        if verb == "drop_replicas":
            self._pick_chains(targets)
        else:
            self._learn(verb, targets)
            self._confirm(verb, targets, {})

    def _confirm(
        self, verb: str, targets: list[Row], given: dict[str, Any], chains: Sequence[str] = ()
    ) -> None:
        """The panel: a forecast from the live view, and the op when it is confirmed. `chains`: as they are told."""
        deck = self._deck
        ids = [row.id for row in targets]
        names = {row.id: row.name for row in targets}

        def look() -> Forecast:
            fleet = deck.fleet
            meshes = fleet.directory.rows.values()
            return forecast(
                fleet.rows.values(), ids, verb, attached=fleet.my_id, now=deck.now(), meshes=meshes,
                daemons=deck.daemons.names(deck.now()), chains=chains, holdings=self._holdings(),
            )  # fmt: skip

        def send(limit_ms: float | None) -> None:
            args = given if limit_ms is None else {**given, "deadline_ms": int(limit_ms)}
            mine = deck.fleet.my_id  # the others' answers come by way of it: it goes last
            others = [self._start(verb, node, names[node], args) for node in ids if node != mine]
            if mine in names:
                self._start(verb, mine, names[mine], args, after=others)
            deck.view_shown().clear_marks()

        hidden = deck.view_shown().hidden_marks()
        deck.open_panel(Confirm(look, send, self._signer, hidden, DEADLINES.get(verb)))

    def _learn(self, verb: str, targets: list[Row]) -> None:
        """Asks a few targets which daemons they run, for the panel to name them once they have said."""
        known = self._deck.daemons.names(self._deck.now())
        unnamed = [row for row in targets if row.id not in known and row.daemons and row.daemons[0]]
        if verb in STOPPING and len(unnamed) <= LEARNT:
            for row in unnamed:
                self._spawn(self._learn_one(row))
        if verb == "kill":
            for mesh in {row.mesh for row in targets}:
                self._spawn(self._learn_chains(mesh))

    async def _learn_chains(self, mesh: str) -> None:
        """Asks a mesh who holds what, for the panel to tell what goes under-held once that is known."""
        deck = self._deck
        client, reach = deck.session.client, deck.options.elsewhere
        with contextlib.suppress(Exception):  # the panel says nothing of chains, then
            if mesh != client.mesh and reach is not None:
                rows = [row.data for row in deck.fleet.rows.values() if row.mesh == mesh and row.present]
                client = await reach.client(mesh, rows)
            self._held.setdefault(mesh, Chains()).fold(await client.chains(mesh), deck.now())
            deck.changed()

    def _holdings(self) -> list[Chain]:
        """Who holds what, as far as it was told lately."""
        now = self._deck.now()
        return [chain for book in self._held.values() for chain in book.known(now)]

    async def _learn_one(self, row: Row) -> None:
        deck = self._deck
        with contextlib.suppress(Exception):  # the panel counts them, then
            doc = await deck.session.client.node(row.id)
            if clean(doc.get("answered_by")) == row.name:
                deck.daemons.learn(row.id, doc.get("daemons"), deck.now())
                deck.changed()

    def _pick_chains(self, targets: list[Row]) -> None:
        deck = self._deck
        if len(targets) > 1:
            deck.say(
                f"drop replicas: of one node at a time, and {len(targets)} are marked; Esc unmarks", "error"
            )
            return
        deck.say(f"asking {targets[0].name} what it holds…")
        self._spawn(self._ask_chains(targets[0]))

    async def _ask_chains(self, row: Row) -> None:
        """Opens the list of what a node holds, as its own page tells it; says why when there is none."""
        deck = self._deck
        try:
            doc = await deck.session.client.node(row.id)
            held = chains_held(doc, row)
        except Exception as why:
            deck.say(f"drop replicas: {row.name}: {clean(str(why)) or 'no answer'}", "error")
            return
        if not held:
            by = clean(doc.get("answered_by")) or deck.session.agent
            deck.say(f"drop replicas: {row.name} holds none that {by} knows of")
        elif deck.panel.dialog is None:
            deck.message = None
            deck.open_panel(
                Pick(
                    f"Drop which replicas of {row.name}?",
                    held,
                    lambda picked: self._confirm(
                        "drop_replicas",
                        [row],
                        {"chains": picked},
                        [told(chain, dict(held)) for chain in picked],
                    ),
                )
            )
            deck.changed()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _start(
        self, verb: str, node: str, name: str, args: dict[str, Any], after: Sequence[asyncio.Task[None]] = ()
    ) -> asyncio.Task[None]:
        entry = OpEntry(verb, OP_VERBS[verb].keys[0], node, name, self._deck.now())
        self.book.entries.append(entry)
        return self._spawn(self._follow(entry, args, after))

    async def _follow(
        self, entry: OpEntry, args: dict[str, Any], after: Sequence[asyncio.Task[None]]
    ) -> None:
        """One op to its end, begun when those before it have ended; whatever happens to it is told in its entry."""
        deck = self._deck
        if after:
            await asyncio.wait(after)

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
