"""Map: a lane a mesh, cards by measured distance. The same keys act on a card as on a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.segment import Segment
from textual import events
from textual.app import ComposeResult
from textual.strip import Strip

from tui.model import map as chart_model
from tui.model.locator import Locator
from tui.model.map import Chart
from tui.model.rows import Change, Row
from tui.model.spans import Line, spread
from tui.model.status import state_counts
from tui.model.text import elide
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.widgets.page import PageView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class ChartView(PageView):
    """The lines of the chart, with the card under the cursor on its own ground."""

    def __init__(self, owner: MapView) -> None:
        super().__init__(owner.lines)
        self._owner = owner

    def render_line(self, y: int) -> Strip:
        strip = super().render_line(y)
        card = self._owner.chart.card(self._owner.cursor)
        at = y + round(self.scroll_y)
        if card is None or not card.y <= at < card.y + card.height:
            return strip
        left, middle, right = strip.divide([card.x, card.x + card.width, strip.cell_length])
        ground = self.look.style("name", "cursor")
        lit = [Segment(s.text, (s.style + _ground(ground)) if s.style else ground) for s in middle]
        return Strip.join([left, Strip(lit, middle.cell_length), right])

    def on_click(self, event: events.Click) -> None:
        event.stop()
        card = self._owner.chart.at(event.x, event.y + round(self.scroll_y))
        if card is not None:
            self._owner.cursor = card.node
            self.refresh()
            if event.chain == 2:
                self._owner.deck.doing.open()


def _ground(style: Any) -> Any:
    from rich.style import Style

    return Style(bgcolor=style.bgcolor, reverse=style.reverse)


class MapView(View):
    """The chart of what the locator leaves."""

    view = "map"

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.table = VIEWS["map"].new_table()
        self.table.items = dict(deck.fleet.rows)
        self.table.rebuild(deck.now())
        self.chart = Chart([], [])
        self.cursor: str | None = None
        self.sheet = ChartView(self)

    def compose(self) -> ComposeResult:
        yield self.sheet

    @property
    def locator(self) -> Locator:
        return self.table.locator

    def set_locator(self, locator: Locator) -> None:
        self.table.set_locator(locator, self.deck.now())
        self._redraw()

    def lines(self, cells: int) -> list[Line]:
        """The chart for this width; empty says why."""
        deck = self.deck
        rows = [self.table.items[node] for node in self.table.order]
        directory = deck.fleet.directory.rows
        locator = self.table.locator
        bare = [m for m in directory if not locator.terms and locator.mesh in (None, m)]
        if not rows and not bare:
            if deck.fleet.received is None:
                return [[], [("   no agent has answered yet; the map comes with the first one", "soft")]]
            return [
                [],
                [("   no node passes the filter", "text")],
                [("   Esc", "key"), (" clears it", "soft")],
            ]
        self.chart = chart_model.chart(
            rows, deck.fleet.my_id, cells, deck.now(), self.table.marks, deck.glyphs, self._origin(), directory, bare,
        )  # fmt: skip
        if self.chart.card(self.cursor) is None:
            self.cursor = self.chart.cards[0].node if self.chart.cards else None
        if deck.blind():
            return [[(text, "dim") for text, _ in line] for line in self.chart.lines]
        return self.chart.lines

    def _redraw(self) -> None:
        if self.sheet.is_mounted:
            self.sheet.remake()

    def folded(self, change: Change) -> None:
        if change.full or change.moved:
            self.table.items = dict(self.deck.fleet.rows)
        if change.full:
            self.table.rebuild(self.deck.now())
        else:
            self.table.apply(change.rows, change.gone, self.deck.now())
        self._redraw()

    def tick(self) -> None:
        self._redraw()

    def restyle(self) -> None:
        self.sheet.remake(force=True)

    def row(self) -> Row | None:
        return self.deck.fleet.rows.get(self.cursor or "")

    def targets(self) -> list[Row]:
        if self.table.marks:
            return [row for row in self.table.targets() if row is not None]
        return super().targets()

    def log_names(self) -> list[str]:
        return [row.name for row in self.table.targets()] if self.table.marks else []

    def hidden_marks(self) -> int:
        return len(self.table.marks - set(self.table.order))

    def clear_marks(self) -> bool:
        had = bool(self.table.marks)
        self.table.marks.clear()
        self._redraw()
        return had

    def mark(self) -> None:
        if self.row() is not None and self.cursor is not None:
            self.table.toggle(self.cursor)
            self._redraw()

    def mark_all(self) -> None:
        self.table.mark_all()
        self._redraw()

    def place(self) -> tuple[str | None, float]:
        return self.cursor, self.sheet.scroll_y

    def restore(self, cursor: str | None, scroll: float) -> None:
        self.cursor = cursor or self.cursor
        self._redraw()
        self.sheet.reveal(scroll)

    def move(self, key: str) -> None:
        before = self.chart.card(self.cursor)
        self.cursor = self.chart.step(self.cursor, key)
        card = self.chart.card(self.cursor)
        if card is None:
            return
        top, room = round(self.sheet.scroll_y), self.sheet.size.height
        lead = card.y if card.y > 3 else 0
        if lead < top:
            self.sheet.reveal(lead)
        elif card.y + card.height + 1 > top + room:
            self.sheet.reveal(card.y + card.height + 1 - room)
        if card is not before:
            self.sheet.refresh()

    def copy_text(self) -> str:
        row = self.row()
        return f"{row.name}  {row.id}  {row.state}" if row else ""

    def export(self) -> tuple[list[str], list[list[str]], list[Any]] | None:
        rows = [self.table.items[node] for node in self.table.order]
        if not rows:
            return None
        titles, texts = VIEWS["map"].cells(rows, self.deck.now(), self.deck.fleet.my_id)
        return titles, texts, [row.data for row in rows]

    def title(self, cells: int) -> Line:
        deck = self.deck
        left: Line = [(" map", "title")]
        mesh = self.table.locator.mesh
        if mesh:
            left.append((f" @{mesh}", "accent"))
        if self.table.locator.terms:
            left.append((f" {self.table.locator.filter_text()}", "accent"))
        total, shown = len(self.table.items), len(self.table.order)
        noun = "node" if total == 1 else "nodes"
        left.append((f"  {total} {noun}  " if total == shown else f"  {shown} of {total} {noun}  ", "text"))
        left += state_counts(deck.fleet, mesh, deck.glyphs)
        if self.table.marks:
            left.append((f"  {len(self.table.marks)} marked", "accent"))
        return spread(left, [(f"round trips as {elide(self._origin(), 32)} measures them ", "soft")], cells)

    def _origin(self) -> str:
        me = self.deck.fleet.rows.get(self.deck.fleet.my_id)
        return me.name if me else self.deck.session.agent


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return MapView(deck)
