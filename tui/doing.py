"""What each action of the registry does, but for ops and moves: a method an action, named by its id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.model.locator import Locator
from tui.model.logs import choosing
from tui.model.rows import Change
from tui.model.views import VIEWS
from tui.screens.registry import MAKERS
from tui.widgets.dialogs import Choice, Help, OpList, Palette

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class Doing:
    """Does it to the app that it belongs to."""

    def __init__(self, deck: QuarterdeckApp) -> None:
        self._deck = deck

    def open(self) -> None:
        deck = self._deck
        view = deck.view_shown()
        row = view.row()
        if (place := view.opens()) is not None:
            deck.visit(place.view or deck.view_name, place)
        elif row is None:
            deck.say("nothing here to open")
        elif "node" in MAKERS:
            deck.visit(deck.view_name, node=row.id)

    def page(self) -> None:
        deck = self._deck
        row = deck.view_shown().row()
        if row is None:
            deck.say("its node is not in the view")
        else:
            deck.visit(deck.view_name, node=row.id)

    def open_logs(self) -> None:
        """Logs of what is marked here; without marks, Logs as it was left."""
        deck = self._deck
        names = deck.view_shown().log_names()
        deck.visit("logs", choosing(names) if names else None)

    def search(self) -> None:
        deck = self._deck
        deck.prompt = deck.finding.search_prompt()

    def search_next(self) -> None:
        self._search(1)

    def search_back(self) -> None:
        self._search(-1)

    def _search(self, step: int) -> None:
        view = self._deck.view_shown()
        if not view.find:  # type: ignore[attr-defined]
            self.search()
        elif not view.find_next(step):  # type: ignore[attr-defined]
            self._deck.say(f"no line shown has {view.find!r}")  # type: ignore[attr-defined]

    def level(self) -> None:
        self._deck.view_shown().next_level()  # type: ignore[attr-defined]

    def back(self) -> None:
        deck = self._deck
        if not deck.go_back():
            deck.say("this is where you started")

    def escape(self) -> None:
        deck = self._deck
        view = deck.view_shown()
        if deck.node_id:
            deck.go_back()
        elif view.locator.terms or view.locator.mesh:
            deck.visit(deck.view_name, Locator(deck.view_name, (), view.locator.sort), remember=False)
        elif not view.clear_marks():
            deck.message = None

    def mark(self) -> None:
        self._deck.view_shown().mark()

    def mark_all(self) -> None:
        self._deck.view_shown().mark_all()

    def spawn(self) -> None:
        self._deck.starting.ask()

    def ops(self) -> None:
        deck = self._deck
        deck.open_panel(OpList(deck.acting.book, deck.now))

    def read_only(self) -> None:
        self._deck.acting.toggle_read_only()

    def filter(self) -> None:
        deck = self._deck
        deck.prompt = deck.finding.filter_prompt()

    def command(self) -> None:
        deck = self._deck
        deck.prompt = deck.finding.command_prompt()

    def sort(self) -> None:
        self._deck.view_shown().next_sort()  # type: ignore[attr-defined]

    def sort_turn(self) -> None:
        self._deck.view_shown().turn_sort()  # type: ignore[attr-defined]

    def palette(self) -> None:
        deck = self._deck
        here = deck.view_for_keys()
        found = [action for action in deck.keymap.of(here) if action.id != "palette"]
        deck.open_panel(Palette(found, deck.run_deck_action, deck.glyphs.name == "ascii"))

    def bookmark(self) -> None:
        self._deck.finding.bookmark()

    def follow(self) -> None:
        self._deck.view_shown().toggle_follow()  # type: ignore[attr-defined]

    def scrub_back(self) -> None:
        self._deck.view_shown().scrub(-1)  # type: ignore[attr-defined]

    def scrub_on(self) -> None:
        self._deck.view_shown().scrub(1)  # type: ignore[attr-defined]

    def copy(self) -> None:
        deck = self._deck
        text = deck.view_shown().copy_text()
        if text:
            deck.copy_to_clipboard(text)
            deck.say("copied, if your terminal takes OSC 52")

    def export(self) -> None:
        self._deck.finding.export()

    def retry(self) -> None:
        deck = self._deck
        deck.session.hurry()
        deck.view_shown().folded(Change(full=True))

    def help(self) -> None:
        deck = self._deck
        spec = VIEWS.get(deck.view_name)
        columns = (
            [(c.key, c.about) for c in (*spec.columns, *spec.hidden)] if spec and not deck.node_id else []
        )
        deck.open_panel(Help(deck.keymap, deck.view_for_keys(), columns, deck.glyphs.name == "ascii"))

    def quit(self) -> None:
        deck = self._deck
        unsent = deck.acting.book.open_count()
        if not unsent:
            deck.exit(return_code=0)
            return
        text = f"{unsent} op{'s have' if unsent > 1 else ' has'} no answer yet. What was sent goes on without this console."
        deck.open_panel(Choice("Leave?", text, [("enter", "leaves", lambda: deck.exit(return_code=0))]))
