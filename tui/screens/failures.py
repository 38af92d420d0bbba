"""Failures: the rings of all nodes merged, newest first; Enter opens the node's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.model import failures
from tui.model.spans import Line
from tui.screens.asked import AskedView
from tui.screens.base import View

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class FailuresView(AskedView):
    """The table of failures."""

    view = "failures"
    noun = ("failure", "failures")
    sort_columns = ("node", "source", "action", "target", "age")
    markable = False
    lead = staticmethod(failures.failure_lead)
    facts = staticmethod(failures.failure_facts)

    def nothing(self) -> list[Line]:
        key = self.deck.key_of
        return [
            [("   nothing has failed on any node that answers", "text")],
            [("   ", "text"), (key("view_daemons"), "key"), (" shows the daemons,  ", "soft"),
             (key("view_events"), "key"), (" what happened", "soft")],
        ]  # fmt: skip


def make(deck: QuarterdeckApp) -> View:
    """The view, for the registry."""
    return FailuresView(deck)
