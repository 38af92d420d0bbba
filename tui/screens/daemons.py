"""Daemons: every daemon of the fleet as its node tells it, trouble first; Enter follows its log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.model import daemon_columns
from tui.model.daemons import Daemon
from tui.model.locator import Locator
from tui.model.logs import choosing
from tui.model.spans import Line
from tui.model.table import Scene
from tui.screens.asked import AskedView
from tui.screens.base import View

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class DaemonsView(AskedView):
    """The table of daemons."""

    view = "daemons"
    noun = ("daemon", "daemons")
    sort_columns = ("state", "name", "health", "restarts", "saturation", "node", "age")
    facts = staticmethod(daemon_columns.daemon_facts)

    @staticmethod
    def lead(item: Daemon, scene: Scene) -> Line:
        return daemon_columns.lead(item, scene.glyphs)

    @staticmethod
    def detail(item: Daemon, scene: Scene) -> str:
        return item.detail(scene.now)

    def summary(self) -> Line:
        return daemon_columns.counts(self.deck.daemons.counts(self._mesh()), self.deck.glyphs)

    def opens(self) -> Locator | None:
        daemon: Daemon | None = self.table.current
        return choosing([self._log(daemon)]) if daemon is not None else None

    def log_names(self) -> list[str]:
        return [self._log(daemon) for daemon in self.table.targets()] if self.table.marks else []

    @staticmethod
    def _log(daemon: Daemon) -> str:
        return f"{daemon.node}/{daemon.name}"

    def nothing(self) -> list[Line]:
        key = self.deck.key_of
        return [
            [("   no daemon runs anywhere, and none is wanted", "text")],
            [("   qd apply SPEC.toml", "name"), (" says what is to run where;  ", "soft"),
             (key("view_fleet"), "key"), (" shows the nodes", "soft")],
        ]  # fmt: skip


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return DaemonsView(deck)
