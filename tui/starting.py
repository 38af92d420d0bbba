"""From the key to a node of this home that answers: asked for, started, followed, and shown until its mesh tells of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from discovery.errors import QuarterdeckError
from tui.model.ops import OpEntry
from tui.model.rows import Change
from tui.model.text import clean
from tui.widgets.spawn import SpawnDialog

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

BRIDGE_S = 60.0
"""So long a started node is shown without word from its mesh; from then on the fleet shows what the agent sees."""


class Starting:
    """The one place where the console starts nodes. `spawner`: see `tui.spawning.Spawner`."""

    def __init__(self, deck: QuarterdeckApp, spawner: Any) -> None:
        self._deck = deck
        self._spawner = spawner
        self._bridged: dict[str, tuple[dict[str, Any], Any, float]] = {}
        """Node id → its row, what was started, and since when: those that nobody else has told of."""
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self) -> None:
        """Opens the dialog, or says in one line why nothing can be started here."""
        deck = self._deck
        if deck.acting.read_only:
            deck.say("read-only: no node is started", "error")
            return
        if self._spawner is None:
            deck.say("no home here to start a node in", "error")
            return
        if deck.session.client is not None and self._spawner.foreign(deck.session.client):
            deck.say(
                f"{deck.session.agent} is of another home: a node started here would be none of its own; "
                "use qd spawn on its host",
                "error",
            )
            return
        meshes = self._spawner.meshes()
        if not meshes:
            deck.say("no mesh in this home: qd init makes one", "error")
            return
        deck.open_panel(SpawnDialog(meshes, self._default(meshes), self._begin))

    def _default(self, meshes: list[str]) -> str:
        """The mesh under the cursor, else the one that the view is narrowed to, else the agent's: of those with keys."""
        view = self._deck.view_shown()
        wishes = (view.mesh_name(), view.locator.mesh, self._deck.options.mesh, self._deck.fleet.mesh)
        return next((mesh for mesh in wishes if mesh in meshes), meshes[0])

    def _begin(self, mesh: str, kind: str) -> None:
        deck = self._deck
        entry = OpEntry("spawn", deck.key_of("spawn"), "", f"{mesh} {kind}", deck.now(), "starting")
        deck.acting.book.entries.append(entry)
        task = asyncio.create_task(self._follow(entry, mesh, kind))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, entry: OpEntry, mesh: str, kind: str) -> None:
        """One start to its end: the node answers, or its last words are told."""
        deck = self._deck
        started: Any = None
        try:
            if deck.acting.read_only:
                result = {
                    "result": "refused",
                    "reason": "read-only mode was switched on before it was started",
                }
            else:
                started = await self._spawner.start(mesh, kind)
                entry.stage = "started, waiting for it to answer"
                if started.id:
                    entry.target, entry.name = started.id, clean(started.name)
                    self._show(started)
                deck.changed()
                found = await self._spawner.answered(started)
                entry.target, entry.name = clean(found["id"]), clean(found["name"])
                result = {"result": "done", "state": "answers"}
        except QuarterdeckError as why:
            result = {"result": "failed", "reason": str(why).removeprefix("spawn: ")}
        except asyncio.CancelledError:
            entry.finish({"result": "unknown", "reason": "the console was left"}, deck.now())
            raise
        except Exception as why:
            # Whatever goes wrong below is told where the start is told; the screen goes on.
            result = {"result": "failed", "reason": clean(f"{type(why).__name__}: {why}".splitlines()[0])}
        entry.finish(result, deck.now())
        if started is not None and not started.running:
            self._bridged.pop(started.id, None)
            deck.folded(deck.fleet.ended(started.id))
        deck.changed()

    def _show(self, started: Any) -> None:
        deck = self._deck
        row = {"id": started.id, "name": started.name, "mesh": started.mesh, "kind": started.kind}
        self._bridged[started.id] = (row, started, deck.now())
        deck.folded(deck.fleet.started(row, deck.now()))

    def bridge(self) -> Change:
        """Keeps what was started in the fleet until a frame tells of it, it ends, or BRIDGE_S have passed."""
        change = Change()
        fleet, now = self._deck.fleet, self._deck.now()
        for node, (row, started, since) in list(self._bridged.items()):
            known = fleet.rows.get(node)
            if known is not None and known.data.get("source") != "spawned":
                del self._bridged[node]
            elif not started.running or now - since > BRIDGE_S:
                del self._bridged[node]
                change.merge(fleet.ended(node))
            else:
                with contextlib.suppress(KeyError):
                    change.merge(fleet.started({**row, "since_ms": (now - since) * 1000}, now))
        return change
