"""Logs: of any number of daemons and nodes, interleaved by time, followed until somebody looks back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.timer import Timer

from tui.model import logs
from tui.model.locator import Locator
from tui.model.logs import LogBook, LogLine, Source
from tui.model.rows import Change, Row
from tui.model.spans import Line, line_width, spread
from tui.model.text import elide, wrap
from tui.model.views import VIEWS
from tui.screens.base import View
from tui.screens.tables import FollowingTable
from tui.tailing import Tails
from tui.widgets.lines import Lines
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

GATHER_S = 0.1
"""So long lines wait for each other before they are drawn."""
NEXT_LEVEL = {"": "warn", "warn": "error"}


class LogsView(FollowingTable):
    """The table of lines. Its locator says with `from:` what is followed, and with the rest what is shown of it."""

    view = "logs"
    sort_columns = ("source", "level")

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.table = VIEWS["logs"].new_table()
        self.book = LogBook()
        self.tails = Tails(deck, self.book, self._soon)
        self.find = ""
        self._names: list[str] = []
        """What is to be followed, as it was named."""
        self._locator = Locator("logs")
        self._came = 0
        self._timer: Timer | None = None
        self.grid = TableView(
            self.table,
            lead=logs.log_lead,
            detail=lambda line, scene: "",
            facts=self._facts,
            old=lambda line, now: deck.blind(),
            empty=self._empty,
        )
        self.grid.clock = deck.now
        self.grid.glyphs = deck.glyphs
        self.grid.find = lambda: self.find
        self.whole = Lines(self._whole, "panel")

    def compose(self) -> ComposeResult:
        yield self.grid
        yield self.whole

    def on_mount(self) -> None:
        self._take()

    def on_unmount(self) -> None:
        self.tails.stop()

    # -- what is followed

    @property
    def locator(self) -> Locator:
        return self._locator

    def set_locator(self, locator: Locator) -> None:
        self.table.set_locator(logs.without_choice(locator), self.deck.now())
        self._locator = locator
        if names := logs.chosen(locator):
            self._names = names
        self._aim()
        self.folded(Change())
        if self.follow:
            self.table.move_to(len(self.table.order) - 1)
            if self.grid.is_mounted:
                self.grid.show_cursor()

    def _aim(self) -> None:
        """Follows what was named, as far as the nodes are known."""
        sources: dict[str, Source] = {}
        for name in self._names:
            if (source := self._source(name)) is not None:
                sources.setdefault(source.key, source)
        if [*sources] != [source.key for source in self.tails.sources]:
            self.tails.want([*sources.values()])
            self._soon()
        if self.deck.view_shown() is self:
            self.tails.beat()

    def _source(self, name: str) -> Source | None:
        """What NODE or NODE/DAEMON means; None while no such node is in the view."""
        node, _, daemon = name.partition("/")
        row = next((r for r in self.deck.fleet.rows.values() if node in (r.name, r.id)), None)
        return None if row is None else Source(row.id, row.name, row.mesh, daemon)

    def left(self) -> None:
        self.tails.stop()

    # -- following

    def _soon(self) -> None:
        """Lines came: they are taken together with whatever else comes shortly."""
        if self._timer is None and self.is_mounted:
            self._timer = self.set_timer(GATHER_S, self._take)

    def _take(self) -> None:
        self._timer = None
        fresh, self._came = self.book.came - self._came, self.book.came
        self.renew({line.id: line for line in self.book.shown()}, fresh)
        self.deck.changed()

    def folded(self, change: Change) -> None:
        if change.full or change.moved or change.gone:
            self._aim()
        if self.grid.is_mounted:
            self.grid.repaint()
            self.whole.remake()

    def tick(self) -> None:
        self._aim()
        self.grid.repaint()

    # -- finding

    def next_level(self) -> None:
        """Warnings and errors, only errors, everything again."""
        level = NEXT_LEVEL.get(logs.least(self._locator), "")
        self.set_locator(logs.at_least(self._locator, level))
        self.deck.say(
            f"only {level} and louder, where a line tells its level" if level else "lines of every level"
        )

    def set_find(self, text: str) -> None:
        """What n and N look for, marked wherever it is shown."""
        self.find = text
        self.grid.relayout()

    def find_next(self, step: int) -> bool:
        """Puts the cursor on the next line that has it, going round; False when none has."""
        table, needle = self.table, self.find.lower()
        count = len(table.order)
        at = table.index.get(table.cursor or "", 0)
        for turn in range(1, count + 1):
            to = (at + step * turn) % count
            line: LogLine = table.items[table.order[to]]
            if needle in line.text.lower():
                if (to - at) * step <= 0:
                    self.deck.say("round once: this is from the other end")
                self.follow = False
                table.move_to(to)
                self.grid.show_cursor()
                self.grid.repaint()
                self.whole.remake()
                return True
        return False

    # -- the screen

    def _facts(self, lines: list[LogLine]) -> frozenset[str]:
        return logs.log_facts(lines) | ({"sources"} if len(self._names) > 1 else frozenset())

    def row(self) -> Row | None:
        line: LogLine | None = self.table.current
        return None if line is None else self.deck.fleet.rows.get(line.source.node_id)

    def _whole(self, cells: int) -> list[Line]:
        """What is not followed and why; then the line under the cursor in full."""
        if self.deck.size.height < 14:
            return []
        lines: list[Line] = [[(" ! ", "hot"), (text, "text")] for text in self._trouble(cells - 4)[:2]]
        line: LogLine | None = self.table.current
        if line is not None:
            said = f"{line.source.name}  {line.text}"
            parts = wrap(said, cells - 2)[: 4 - len(lines)]
            lines += [[(f" {part}", "text")] for part in parts]
        return lines

    def _trouble(self, cells: int) -> list[str]:
        """A sentence for each log that is not followed now."""
        found = []
        for name in self._names:
            source = self._source(name)
            if source is None:
                found.append(f"{name}: no such node in the view; name it as Fleet does")
            elif why := self.tails.trouble.get(source.key):
                found.append(f"{source.name}: {why.removeprefix(f'{source.name}: ')}; trying again")
        return [elide(text, cells) for text in found]

    def _empty(self) -> list[Line]:
        key = self.deck.key_of
        if not self._names:
            return [
                [("   no log is chosen", "text")],
                [("   ", "text"), (key("view_daemons"), "key"), (" Daemons: ", "soft"), (key("open"), "key"),
                 (" opens the log of one;  ", "soft"), (key("mark"), "key"), (" marks several", "soft")],
                [("   ", "text"), (key("view_fleet"), "key"), (" Fleet: ", "soft"), (key("mark"), "key"),
                 (" marks nodes, for their own events", "soft")],
                [("   ", "text"), (key("view_logs"), "key"), (" then opens the logs of what is marked", "soft")],
            ]  # fmt: skip
        if self.table.items:
            return [
                [("   no line passes ", "text"), (self.table.locator.filter_text(), "name")],
                [("   Esc", "key"), (" clears the filter", "soft")],
            ]
        cells = self.deck.size.width - 8
        if trouble := self._trouble(cells):
            return [[(f"   {text}", "text")] for text in trouble[:8]]
        return [[(f"   {elide(self._said(), cells)}: nothing was written yet", "soft")]]

    def _said(self) -> str:
        """What is followed, in words: `web on alpha.broker.1`, `4 logs`."""
        if len(self._names) != 1:
            return f"{len(self._names)} logs"
        node, _, daemon = self._names[0].partition("/")
        return f"{daemon} on {node}" if daemon else f"events of {node}"

    def title(self, cells: int) -> Line:
        table = self.table
        right = self.following()
        left: Line = [(" logs", "title")]
        if self._names:
            left.append((f"  {self._said()}", "accent"))
        told: Line = []
        if table.locator.mesh:
            told.append((f"  @{table.locator.mesh}", "accent"))
        if table.locator.terms:
            told.append((f"  {table.locator.filter_text()}", "accent"))
        if self.find:
            told.append((f"  find {self.find}", "accent"))
        total, shown = len(table.items), len(table.order)
        full = f", the last {self.book.kept}" if total == self.book.kept else ""
        told.append((f"  {total} lines{full}" if total == shown else f"  {shown} of {total} lines", "text"))
        room = cells - line_width(told) - line_width(right) - 9
        if line_width(left) - 7 > room > 8 and self._names:
            left[-1] = (f"  {elide(self._said(), room)}", "accent")
        return spread([*left, *told], right, cells)


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return LogsView(deck)
