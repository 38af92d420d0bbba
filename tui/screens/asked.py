"""What the views of the whole fleet's answers share: asked for while shown, aged, and honest about who is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult

from tui.model.asked import Asked
from tui.model.rows import Change, Row
from tui.model.spans import Line, fit, line_width, spread
from tui.model.table import Scene
from tui.model.text import wrap
from tui.model.views import VIEWS
from tui.polling import Poll
from tui.screens.tables import TableBased
from tui.widgets.lines import Lines
from tui.widgets.table import TableView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

WHOLE_LINES = 4
STANDING_CELLS = 22
"""For how old an answer is and how many are missing, where there is hardly any room."""


class AskedView(TableBased):
    """A table of the rows of `deck.<view>`, which `client.<view>(mesh)` fills; below it the row under the cursor in full."""

    noun = ("row", "rows")
    unknown = "does not know this question: update it"
    """Said of an agent that can't answer."""
    beats = 1
    """So many seconds from one question to the next."""
    book: Asked[Any]

    @staticmethod
    def lead(item: Any, scene: Scene, /) -> Line:
        """The sign before a row."""
        return []

    @staticmethod
    def detail(item: Any, scene: Scene, /) -> str:
        """The line below a row; empty where there is nothing to say."""
        return ""

    @staticmethod
    def facts(rows: list[Any], /) -> frozenset[str]:
        """Which of the optional columns have anything to show."""
        return frozenset()

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        book = self.book = getattr(deck, self.view)
        self.table = VIEWS[self.view].new_table()
        self._shown = -1
        """The version of the book that the table holds."""
        self.poll = Poll(deck, self, book, self.ask, self._fresh, self.beats, self.unknown)
        self.grid = TableView(
            self.table,
            lead=self.lead,
            detail=self.detail,
            facts=self.facts,
            old=lambda item, now: book.old(item, now) or deck.blind(),
            empty=self._empty,
        )
        self.grid.clock = deck.now
        self.grid.glyphs = deck.glyphs
        self.whole = Lines(self._whole, "panel")

    def compose(self) -> ComposeResult:
        yield self.grid
        yield self.whole

    def on_mount(self) -> None:
        self._fresh()

    def on_unmount(self) -> None:
        self.poll.stop()

    async def ask(self, client: Any) -> Any:
        """The question, to whom the console is attached to."""
        return await getattr(client, self.view)(self._mesh())

    async def client_of(self, client: Any, mesh: str) -> Any:
        """A client of a node of that mesh: the attached one, or one that is dialled for it."""
        reach = self.deck.options.elsewhere
        if mesh == client.mesh or reach is None:
            return client
        nodes = [row.data for row in self.deck.fleet.rows.values() if row.mesh == mesh and row.present]
        return await reach.client(mesh, nodes)

    def _mesh(self) -> str | None:
        """Whom to ask: the mesh that is shown, if it is only one."""
        return self.table.locator.mesh

    def _fresh(self) -> None:
        """An answer has come, or why there is none."""
        if self._shown != self.book.version:
            self._shown = self.book.version
            self.table.items = dict(self.book.rows)
            self.table.rebuild(self.deck.now())
            if self.grid.is_mounted:
                self.grid.relayout()
        if self.grid.is_mounted:
            self.grid.repaint()
            self.whole.remake()
            self.deck.changed()

    def set_locator(self, locator: Any) -> None:
        before = self._mesh()
        super().set_locator(locator)
        if self.whole.is_mounted:
            self.whole.remake()
        if before != self._mesh():
            self.other_mesh()
            self.poll.beat(now_please=True)

    def other_mesh(self) -> None:
        """Another mesh is shown from now on."""

    def folded(self, change: Change) -> None:
        self.poll.beat(now_please=change.full)
        self.grid.repaint()
        self.whole.remake()

    def tick(self) -> None:
        self.poll.beat()
        super().tick()
        self.whole.remake()

    def move(self, key: str) -> None:
        super().move(key)
        self.whole.remake()

    def row(self) -> Row | None:
        item = self.table.current
        return None if item is None else self.deck.fleet.rows.get(item.node_id)

    def summary(self) -> Line:
        """What the title says about all of it."""
        return []

    def title(self, cells: int) -> Line:
        table = self.table
        left: Line = [(f" {self.view}", "title")]
        if mesh := table.locator.mesh:
            left.append((f" @{mesh}", "accent"))
        if table.locator.terms:
            left.append((f" {table.locator.filter_text()}", "accent"))
        total, shown = len(table.items), len(table.order)
        noun = self.noun[total != 1]
        if self.book.at is not None:
            left.append((f"  {total} {noun}" if shown == total else f"  {shown} of {total} {noun}", "text"))
        if table.marks:
            left.append((f"  {len(table.marks)} marked", "accent"))
        if summary := self.summary():
            left += [("  ", "text"), *summary]
        # How old all of it is stands nowhere else: for it the order leaves, which the head of its column shows too, and
        # then the end of a long filter.
        now, order = self.deck.now(), self.sort_text()
        ordered: Line = [*left, (f"  {order}", "soft")] if order else left
        for said in (ordered, left):
            if right := self.book.standing(now, cells - line_width(said) - 3):
                return spread(said, [*right, (" ", "text")], cells)
        right = self.book.standing(now, STANDING_CELLS)
        return [*fit(left, max(0, cells - line_width(right) - 2)), (" ", "text"), *right, (" ", "text")]

    def _whole(self, cells: int) -> list[Line]:
        """Who is missing, by name; then the row under the cursor in full, where the table had to shorten it."""
        if self.deck.size.height < 14:
            return []
        missing = wrap(self.book.missing(), cells - 4)[:2] if self.book.silent else []
        lines: list[Line] = [
            [(" ! " if not at else "   ", "hot"), (part, "text")] for at, part in enumerate(missing)
        ]
        item = self.table.current
        if item is not None:
            parts = wrap(item.whole(self.deck.now()), cells - 2)[: WHOLE_LINES - len(lines)]
            lines += [[(f" {part}", "text")] for part in parts]
        return lines

    def nothing(self) -> list[Line]:
        """Why there is nothing to show though everybody asked has answered."""
        return []

    def _empty(self) -> list[Line]:
        deck = self.deck
        if self.book.at is None:
            said = self.book.error or (
                "asking every node…" if deck.session.client else "no agent has answered yet"
            )
            return [[(f"   {part}", "soft")] for part in wrap(said, deck.size.width - 8)]
        if self.table.items:
            wanted = self.table.locator.filter_text() or f"@{self.table.locator.mesh}"
            return [
                [(f"   no {self.noun[0]} passes ", "text"), (wanted, "name")],
                [("   Esc", "key"), (" clears the filter", "soft")],
            ]
        return self.nothing()
