"""Events: what happened, the newest at the bottom, followed until somebody looks back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.containers import Container

from discovery.errors import QuarterdeckError
from tui.model import ages, past
from tui.model.events import KEPT, Event
from tui.model.loads import Loads
from tui.model.locator import Locator
from tui.model.rows import Change, Row
from tui.model.spans import Line, spread
from tui.model.table import Scene
from tui.model.text import wrap
from tui.model.views import VIEWS
from tui.rewinding import Rewinding
from tui.screens.base import View
from tui.screens.tables import WIDE, FollowingTable
from tui.widgets.lines import Lines
from tui.widgets.page import PageView
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


PAST_CELLS = 72
"""Of the pane with the fleet as it was, where it stands beside the events."""


def _lead(event: Event, scene: Scene) -> Line:
    role = event.role
    return [
        (
            scene.glyphs.bullet if role == "text" else "!" if role == "hot" else scene.glyphs.state(role),
            role,
        )
    ]


class EventsView(FollowingTable):
    """The table of events."""

    view = "events"
    sort_columns = ("kind", "node", "to")

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.table = VIEWS["events"].new_table()
        self._known = 0
        self.grid = TableView(
            self.table,
            lead=_lead,
            detail=lambda event, scene: "",
            facts=lambda found: frozenset({"meshes"} if len({event.mesh for event in found}) > 1 else ()),
            old=lambda event, now: False,
            empty=self._empty,
        )
        self.grid.clock = deck.now
        self.grid.glyphs = deck.glyphs

        self.whole = Lines(self._whole, "panel")
        self.then = PageView(self._past, ground="panel")
        self.then.display = False
        self._asked_of = ""
        """The agent that was asked for what it keeps from before."""
        self._asking: asyncio.Task[None] | None = None
        self.loads = Loads()
        self.rewinding = Rewinding(deck, self.loads, self._loads_came)

    def compose(self) -> ComposeResult:
        self.body = Container(self.grid, self.then)
        yield self.body
        yield self.whole

    def on_mount(self) -> None:
        self._fit()
        self._take()

    def on_unmount(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self.rewinding.stop()

    def on_resize(self) -> None:
        self._fit()

    # -- the past

    @property
    def scrubbing(self) -> bool:
        """Whether the fleet is shown as it was at the event under the cursor."""
        return self.then.display

    def _fit(self) -> None:
        """The past stands beside the events where there is room, else below them."""
        beside = self.deck.size.width >= WIDE
        self.body.styles.layout = "horizontal" if beside else "vertical"
        self.then.styles.width = PAST_CELLS if beside else "1fr"
        self.then.styles.height = "1fr"

    def scrub(self, step: int) -> None:
        """To the event before (-1) or after (1) this one at which the fleet changed; past the newest, live again."""
        if not self.scrubbing:
            if step > 0:
                self.deck.say("this is now: nothing comes after it yet")
                return
            self._fill()
        items, order = self.table.items, self.table.order
        at = (
            order.index(self.table.cursor)
            if self.table.cursor in items and self.table.cursor in order
            else -1
        )
        found = range(at - 1, -1, -1) if step < 0 else range(at + 1, len(order))
        to = next((place for place in found if past.is_moment(items[order[place]])), None)
        if to is None:
            if step > 0:
                self.move("last")
            else:
                self.deck.say("no change of the fleet before this one is kept")
            return
        self.follow = False
        self._show_past(True)
        self.table.move_to(to)
        self.move("")

    def _show_past(self, shown: bool) -> None:
        if self.then.display != shown:
            self.then.display = shown
            self.call_after_refresh(self._moved)

    def _moved(self) -> None:
        self.grid.relayout()
        self.grid.show_cursor()
        self.then.remake(force=True)

    def move(self, key: str) -> None:
        super().move(key)
        if key == "last":
            self._show_past(False)
        self.then.remake()
        self._rewind()

    def clear_marks(self) -> bool:
        """Back to now; False when that is what was shown."""
        was = self.scrubbing
        if was:
            self.move("last")
        return was

    def _past(self, cells: int) -> list[Line]:
        event = self.table.current
        log = self.deck.fleet.events
        if event is None:
            return []
        found, moment = past.fleet_then(list(log.items), event.key, self._now())
        if mesh := self.table.locator.mesh:
            found = [then for then in found if then.mesh == mesh]
        room = max(3, self.then.size.height)
        loads, standing = {}, ""
        if moment is not None:
            loads, standing = self.loads.at(moment, mesh), self.loads.standing(moment, mesh)
        agent, glyphs = self.deck.session.agent, self.deck.glyphs
        return past.past_lines(found, moment, agent, cells, room, glyphs, loads, standing)

    def _rewind(self) -> None:
        """Has the loads of the moment on the screen asked for, if they are not known."""
        event = self.table.current
        shown = self.scrubbing and event is not None and self.deck.view_shown() is self
        self.rewinding.look(event.at_ms if shown and event is not None else None, self.table.locator.mesh)

    def _loads_came(self) -> None:
        self.then.remake()
        self.deck.changed()

    def tick(self) -> None:
        super().tick()
        self._rewind()

    def _now(self) -> dict[str, past.Now]:
        """What is in view now, and since when, by the wall clock of who tells the events."""
        deck = self.deck
        now, wall_ms = deck.now(), deck.wall_ms()
        found = {}
        for row in deck.fleet.rows.values():
            since = row.since_ms(now)
            began = None if since is None or row.expired else wall_ms - since
            found[row.id] = past.Now(row.name, row.mesh, row.state, began)
        return found

    def _fill(self) -> None:
        """Asks the agent, once, for the events that it keeps from before those that came with the stream."""
        client, agent = self.deck.session.client, self.deck.session.agent
        if client is not None and self._asked_of != agent:
            self._asked_of = agent
            self._asking = asyncio.create_task(self._filling(client))

    async def _filling(self, client: Any) -> None:
        try:
            kept = await client.events(KEPT)
        except QuarterdeckError as why:
            self._asked_of = ""
            self.deck.say(f"what {self.deck.session.agent} keeps from before: {why}", "error")
            return
        if self.deck.fleet.events.backfill(kept):
            self._take()
            self._moved()
            self.deck.changed()

    def _empty(self) -> list[Line]:
        if self.deck.fleet.received is None:
            return [[("   no agent has answered yet; its events come with it", "soft")]]
        if self.table.items:
            return [
                [("   no event passes ", "text"), (self.table.locator.filter_text(), "name")],
                [("   Esc", "key"), (" clears the filter", "soft")],
            ]
        return [[("   nothing has happened since the agent started", "soft")]]

    def _whole(self, cells: int) -> list[Line]:
        """The event under the cursor in full, where the table had to shorten it."""
        event = self.table.current
        if event is None or self.deck.size.height < 14:
            return []
        old, new = event.move
        arrow = self.deck.glyphs.arrow
        parts = [event.kind, event.node, f"{old} {arrow} {new}" if old else new, event.story]
        op_id = event.text("op_id")
        text = "  ".join(part for part in [*parts, f"op {op_id}" if op_id else ""] if part)
        lines = wrap(text, cells - 2)[:4]
        return [[(f" {line}", "text")] for line in lines]

    def _take(self) -> None:
        log = self.deck.fleet.events
        fresh, self._known = log.next - self._known, log.next
        self.renew({event.id: event for event in log.items}, fresh)

    def set_locator(self, locator: Locator) -> None:
        self.table.items = {event.id: event for event in self.deck.fleet.events.items}
        super().set_locator(locator)
        if self.follow:
            self.table.move_to(len(self.table.order) - 1)

    def folded(self, change: Change) -> None:
        if change.full or change.events:
            self._take()
        else:
            self.grid.repaint()

    def row(self) -> Row | None:
        event = self.table.current
        return self.deck.fleet.rows.get(event.node_id) if event is not None else None

    def title(self, cells: int) -> Line:
        table = self.table
        total, shown = len(table.items), len(table.order)
        left: Line = [(" events", "title")]
        if self.scrubbing and table.current is not None:
            left.append((f" as of {ages.clock(table.current.at_ms)}", "hot"))
        mesh = table.locator.mesh
        if mesh:
            left.append((f" @{mesh}", "accent"))
        if table.locator.terms:
            left.append((f" {table.locator.filter_text()}", "accent"))
        left.append((f"  {total} held" if total == shown else f"  {shown} of {total} held", "text"))
        told = "from events kept by" if self.scrubbing else "as"
        order = self.sort_text() or f"{told} {self.deck.session.agent}" + (
            "" if self.scrubbing else " tells it"
        )
        right: Line = [(f"{order} {self.deck.glyphs.separator} ", "soft"), *self.following()]
        return spread(left, right, cells)


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return EventsView(deck)
