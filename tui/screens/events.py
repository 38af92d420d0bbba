"""Events: what happened, the newest at the bottom, followed until somebody looks back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.app import ComposeResult

from tui.model.events import Event
from tui.model.locator import Locator
from tui.model.rows import Change, Row
from tui.model.spans import Line, spread
from tui.model.table import Scene
from tui.model.text import wrap
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.screens.fleet import TableBased
from tui.widgets.lines import Lines
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


def _lead(event: Event, scene: Scene) -> Line:
    role = event.role
    return [
        (
            scene.glyphs.bullet
            if role == "text"
            else "!"
            if role == "hot"
            else scene.glyphs.state(event.text("to") or role),
            role,
        )
    ]


class EventsView(TableBased):
    """The table of events."""

    view = "events"
    sort_columns = ("kind", "node", "to")

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.table = VIEWS["events"].new_table()
        self.follow = True
        self.unseen = 0
        """Events that came while it was not following."""
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

    def compose(self) -> ComposeResult:
        yield self.grid
        yield self.whole

    def on_mount(self) -> None:
        self._take()

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
        fresh = log.next - self._known
        self._known = log.next
        self.table.items = {event.id: event for event in log.items}
        self.table.touched = True
        self.table.rebuild(self.deck.now())
        if self.follow:
            self.unseen = 0
            self.table.move_to(len(self.table.order) - 1)
        else:
            self.unseen += fresh
        if self.grid.is_mounted:
            self.grid.repaint()
            if self.follow:
                self.grid.show_cursor()
            self.whole.remake()

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

    def move(self, key: str) -> None:
        super().move(key)
        self.whole.remake()
        at_end = self.table.cursor == (self.table.order[-1] if self.table.order else None)
        if key == "last":
            self.follow, self.unseen = True, 0
        elif not at_end:
            self.follow = False

    def toggle_follow(self) -> None:
        """Follows new events, or stops where it is."""
        if self.follow:
            self.follow = False
        else:
            self.move("last")

    def row(self) -> Row | None:
        event = self.table.current
        return self.deck.fleet.rows.get(event.node_id) if event is not None else None

    def mark(self) -> None:
        """Events aren't marked: ops act on nodes."""

    mark_all = mark

    def title(self, cells: int) -> Line:
        table = self.table
        total, shown = len(table.items), len(table.order)
        left: Line = [(" events", "title")]
        mesh = table.locator.mesh or self.deck.options.mesh
        if mesh:
            left.append((f" @{mesh}", "accent"))
        if table.locator.terms:
            left.append((f" {table.locator.filter_text()}", "accent"))
        left.append((f"  {total} held" if total == shown else f"  {shown} of {total} held", "text"))
        agent = self.deck.session.agent
        if self.follow:
            right: Line = [("following ", "text")]
        else:
            new = f"{self.unseen} new below, " if self.unseen else ""
            right = [(f"{new}", "hot"), ("f", "key"), (" follows ", "text")]
        order = self.sort_text() or f"as {agent} tells it"
        return spread(left, [(f"{order} {self.deck.glyphs.separator} ", "soft"), *right], cells)


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return EventsView(deck)
