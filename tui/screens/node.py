"""The page of one node: its row, live, and its own document, asked for while the page is open."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult

from discovery.errors import QuarterdeckError
from tui.model import page
from tui.model.rows import Change, Row
from tui.model.spans import Line, plain, spread
from tui.model.text import clean
from tui.screens.base import View
from tui.widgets.page import PageView

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

ASK_EVERY_S = 2.0
MOST_CELLS = 180


class NodeView(View):
    """Sections of lines that scroll."""

    view = "node"

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(deck)
        self.sheet = PageView(self._lines)
        self._doc: dict[str, Any] | None = None
        self._doc_at = 0.0
        self._error = ""
        self._asked_at = float("-inf")
        self._node = ""
        self._asking: asyncio.Task[None] | None = None

    def compose(self) -> ComposeResult:
        yield self.sheet

    def on_unmount(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    def restore(self, cursor: str | None, scroll: float) -> None:
        """Opens on another node, from its beginning."""
        node = self.deck.node_id
        if node != self._node:
            self._node, self._doc, self._error, self._asked_at = node, None, "", float("-inf")
            if self.sheet.is_mounted:
                self.sheet.scroll_to(y=0, animate=False, immediate=True)

    def row(self) -> Row | None:
        return self.deck.fleet.rows.get(self.deck.node_id)

    def log_names(self) -> list[str]:
        row = self.row()
        return [row.name] if row else []

    def folded(self, change: Change) -> None:
        if change.full:
            self._asked_at = float("-inf")
        self.restore(None, 0)
        self._ask()
        self.sheet.remake()

    def tick(self) -> None:
        self._ask()
        self.sheet.remake()

    def restyle(self) -> None:
        self.sheet.remake(force=True)

    def _ask(self) -> None:
        """Asks for the document, one question at a time, every two seconds while the page is open."""
        client, now = self.deck.session.client, self.deck.now()
        if client is None or now - self._asked_at < ASK_EVERY_S or not self._node:
            return
        if self._asking is not None and not self._asking.done():
            return
        self._asked_at = now
        self._asking = asyncio.create_task(self._fetch(client, self._node))

    async def _fetch(self, client: Any, node: str) -> None:
        try:
            doc = await client.node(node)
            error = ""
        except QuarterdeckError as why:
            doc, error = None, clean(str(why))
        except Exception as why:
            # A broken answer is told on the page; the page stays.
            doc, error = None, clean(f"{type(why).__name__}: {why}")
        if node != self._node:
            return
        if isinstance(doc, dict):
            self._doc, self._doc_at, self._error = doc, self.deck.now(), ""
        else:
            self._error = error or "the agent's answer is no document"
        self.sheet.remake()

    def _lines(self, cells: int) -> list[Line]:
        deck = self.deck
        now = deck.now()
        age = None if self._doc is None else (now - self._doc_at) * 1000
        return page.node_page(
            self.row(), self._doc, age, self._error, deck.fleet, now, min(cells, MOST_CELLS), deck.glyphs
        )

    def move(self, key: str) -> None:
        room = max(1, self.sheet.size.height - 1)
        step = {
            "up": -1,
            "down": 1,
            "page_up": -room,
            "page_down": room,
            "first": -(10**6),
            "last": 10**6,
        }.get(key, 0)
        self.sheet.scroll_by(step)

    def copy_text(self) -> str:
        return "\n".join(plain(line).rstrip() for line in self.sheet.lines)

    def title(self, cells: int) -> Line:
        row = self.row()
        name = row.name if row else self.deck.node_id
        return spread(
            [(" node", "title"), (f" {name}", "accent")], [("Esc", "key"), (" goes back ", "soft")], cells
        )


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return NodeView(deck)
