"""What every view can be asked. The app knows views only by this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual.containers import Container

from tui.model.locator import Locator
from tui.model.rows import Change, Row
from tui.model.spans import Line

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


@dataclass(frozen=True)
class Place:
    """A place to come back to: view, node page, locator, cursor, scroll."""

    view: str
    node: str
    locator: str
    cursor: str | None
    scroll: float


class View(Container, can_focus=False, inherit_bindings=False):
    """A part of the screen that shows the fleet in one way."""

    DEFAULT_CSS = "View { height: 1fr; width: 1fr; }"
    view = ""
    """Its name, as in the registry of views."""

    def __init__(self, deck: QuarterdeckApp) -> None:
        super().__init__(id=f"view-{self.view}")
        self.deck = deck

    def on_mount(self) -> None:
        self.call_after_refresh(self.deck.arrive)

    @property
    def locator(self) -> Locator:
        return Locator(self.view)

    def set_locator(self, locator: Locator) -> None:
        """Narrows and orders; LocatorError leaves the view as it was."""

    def left(self) -> None:
        """Another view is shown from now on."""

    def log_names(self) -> list[str]:
        """NODE or NODE/DAEMON of every log that is marked here."""
        return []

    def folded(self, change: Change) -> None:
        """The model has changed."""

    def tick(self) -> None:
        """A second has passed: ages move on."""

    def restyle(self) -> None:
        """The look has changed."""
        self.refresh()

    def row(self) -> Row | None:
        """The node under the cursor."""
        return None

    def mesh_name(self) -> str:
        """The mesh under the cursor; empty where there is none."""
        row = self.row()
        return row.mesh if row else ""

    def opens(self) -> Locator | None:
        """The place that Enter leads to, where it is no node's page."""
        return None

    def targets(self) -> list[Row]:
        """The nodes that an op acts on."""
        row = self.row()
        return [row] if row else []

    def hidden_marks(self) -> int:
        """How many of the targets the filter hides."""
        return 0

    def clear_marks(self) -> bool:
        """Takes all marks away; False when there were none."""
        return False

    def cursor_id(self) -> str | None:
        return None

    def place(self) -> tuple[str | None, float]:
        """Cursor and scroll, to come back to."""
        return self.cursor_id(), 0.0

    def restore(self, cursor: str | None, scroll: float) -> None:
        """Goes back to a place."""

    def move(self, key: str) -> None:
        """up, down, left, right, page_up, page_down, first, last."""

    def mark(self) -> None:
        """Marks the row under the cursor."""

    def mark_all(self) -> None:
        """Marks what the filter shows."""

    def title(self, cells: int) -> Line:
        """The line over the view."""
        return []

    def copy_text(self) -> str:
        """What `y` copies."""
        return ""

    def export(self) -> tuple[list[str], list[list[str]], list[Any]] | None:
        """(titles, rows of text, documents) of what is shown; None when there is nothing to write."""
        return None


Maker = Callable[["QuarterdeckApp"], View]
