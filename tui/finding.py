"""Filter, command line, bookmarks and export: how things are found, and taken along."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tui.actions import Action
from tui.model.locator import Locator, LocatorError
from tui.model.text import pad, width
from tui.model.views import VIEWS, parse_locator
from tui.options import ConsoleOptions
from tui.prompt import Prompt
from tui.widgets.dialogs import Choice

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp


class Finding:
    """Works on the view that is shown, through the app."""

    def __init__(self, deck: QuarterdeckApp, options: ConsoleOptions) -> None:
        self._deck = deck
        self._options = options
        self._filters: list[str] = []
        self._commands: list[str] = []
        self._finds: list[str] = []
        self.bookmarks: list[str] = self._read_bookmarks()

    def parse(self, text: str) -> Locator:
        """A whole locator, read against the view on screen where it names none."""
        return parse_locator(text, self._deck.view_name)

    def open_first(self, text: str) -> None:
        """The locator that the console was started with; a bad one is told, not ignored."""
        try:
            locator = self.parse(text)
            if locator.mesh is None and self._options.mesh:
                locator = replace(locator, mesh=self._options.mesh)
            self._deck.visit(locator.view or "fleet", locator, remember=False)
        except LocatorError as why:
            self._deck.say(f"{text!r}: {why.text} (at character {why.pos + 1})", "error")

    def filter_prompt(self) -> Prompt:
        """`/`: narrows while it is typed; mesh and order stay."""
        view = self._deck.view_shown()
        before = view.locator
        name = self._deck.view_name

        def live(text: str) -> None:
            given = (
                parse_locator(text, name)
                if text.split()[:1] != [name]
                else parse_locator(f"{name} {text}", name)
            )
            view.set_locator(Locator(name, given.terms, given.sort or before.sort, given.mesh or before.mesh))

        if (text := before.filter_text()) and text not in self._filters:
            self._filters.append(text)
        undo = partial(view.set_locator, before)
        return Prompt("/", live, live, undo, self._complete_filter, self._filters)

    def search_prompt(self) -> Prompt:
        """`F`: marks what is found while it is typed, and goes to the next of it at Enter."""
        view: Any = self._deck.view_shown()
        before: str = view.find

        def done(text: str) -> None:
            view.set_find(text)
            if text and not view.find_next(1):
                self._deck.say(f"no line shown has {text!r}")

        return Prompt(
            "find ", view.set_find, done, partial(view.set_find, before), lambda text: (), self._finds
        )

    def command_prompt(self) -> Prompt:
        """`:`: a view locator, a bookmark, or an action by its name."""
        return Prompt(":", None, self._command, lambda: None, self._complete_command, self._commands)

    def _command(self, text: str) -> None:
        deck = self._deck
        text = text.strip()
        if not text:
            return
        said = {text, text.replace(" ", "_").replace("-", "_")}
        action = next((a for a in deck.keymap.actions if said & {a.id, a.verb, a.label}), None)
        if action is not None and text not in VIEWS:
            deck.run_deck_action(action)
            return
        first = text.split()[0]
        if first not in VIEWS and first in {a.verb for a in deck.keymap.actions if a.verb}:
            raise LocatorError(len(first), f"{first} acts on the marks or the cursor: no name here")
        locator = self.parse(text)
        if (
            not self._names_view(text)
            and not locator.sort
            and not locator.mesh
            and all(t.kind == "word" for t in locator.terms)
        ):
            row = next((r for r in deck.fleet.rows.values() if text in (r.name, r.id)), None)
            if row is None:
                raise LocatorError(0, "no view, action or node of this name; / filters")
            deck.visit(deck.view_name, node=row.id)
            return
        deck.visit(locator.view or deck.view_name, locator)

    @staticmethod
    def _names_view(text: str) -> bool:
        return text.split()[0] in VIEWS

    def _words(self) -> list[tuple[str, str]]:
        spec = VIEWS[self._deck.view_name]
        found = [(f"{c.key}:", c.about) for c in (*spec.columns, *spec.hidden)]
        found += [(f"sort:{c.key}", f"order by {c.about}") for c in spec.columns]
        found += [(f"@{mesh}", "this mesh only") for mesh in self._deck.fleet.meshes()]
        return found

    def _complete_filter(self, text: str) -> list[tuple[str, str]]:
        stem, last = _last_word(text)
        return [(stem + word, about) for word, about in self._words() if last and word.startswith(last)]

    def _complete_command(self, text: str) -> list[tuple[str, str]]:
        deck = self._deck
        stem, last = _last_word(text)
        if stem.strip():
            return self._complete_filter(text)
        found = [(name, f"the {spec.title} view") for name, spec in VIEWS.items()]
        found += [(mark, "bookmark") for mark in self.bookmarks]
        actions: list[Action] = deck.keymap.of(deck.view_for_keys())
        found += [(a.id, a.about) for a in actions if not a.id.startswith("view_") and a.group != "Move"]
        found += [(row.name, f"{row.state} {row.kind}") for row in deck.fleet.rows.values()] if last else []
        found += self._words() if last else []
        return [(word, about) for word, about in found if word.startswith(last)]

    # -- bookmarks

    def _read_bookmarks(self) -> list[str]:
        path = self._options.bookmarks
        if path is None:
            return []
        try:
            return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            return []

    def bookmark(self) -> None:
        """Keeps the view with its filter and order; a second time, lets go of it."""
        text = self._deck.view_shown().locator.text()
        known = text in self.bookmarks
        self.bookmarks = [mark for mark in self.bookmarks if mark != text] + ([] if known else [text])
        kept = "" if self._options.bookmarks else " for this session"
        if self._options.bookmarks is not None:
            try:
                self._options.bookmarks.parent.mkdir(parents=True, exist_ok=True)
                self._options.bookmarks.write_text("".join(f"{mark}\n" for mark in self.bookmarks), "utf-8")
            except OSError as why:
                kept = f" for this session only: {why.strerror} ({self._options.bookmarks})"
        done = "no bookmark any more" if known else "bookmarked"
        self._deck.say(f"{done}{kept}: {text}   (: and Tab lists them)")

    # -- export

    def export(self) -> None:
        """Asks for the format, writes what is shown, says where."""
        if self._deck.view_shown().export() is None:
            self._deck.say("nothing is shown that could be written")
            return
        answers: list[tuple[str, str, Callable[[], None]]] = [
            ("c", "CSV", lambda: self._write("csv")),
            ("j", "JSON", lambda: self._write("json")),
            ("t", "text", lambda: self._write("txt")),
        ]
        where = self._options.export_dir or Path.cwd()
        self._deck.open_panel(Choice("Export what is shown", f"A file in {where}, as", answers))

    def _write(self, kind: str) -> None:
        deck = self._deck
        given = deck.view_shown().export()
        if given is None:
            return
        titles, rows, documents = given
        folder = self._options.export_dir or Path.cwd()
        path = _free(folder, f"quarterdeck-{deck.view_name}", kind)
        try:
            with path.open("x", encoding="utf-8", newline="") as file:
                if kind == "csv":
                    writer = csv.writer(file)
                    writer.writerow(titles)
                    writer.writerows([_inert(cell) for cell in row] for row in rows)
                elif kind == "json":
                    json.dump(documents, file, indent=1, ensure_ascii=False, default=str)
                else:
                    file.write(text_table(titles, rows))
        except OSError as why:
            deck.say(f"not written: {why.strerror} ({path})", "error")
            return
        deck.say(f"{len(rows)} rows written to {path}")


def _inert(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: names come from other machines."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") and len(cell) > 1 else cell


def _free(folder: Path, stem: str, kind: str) -> Path:
    """The first file name of this stem that isn't taken."""
    number = 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.{kind}").exists():
        number += 1
    return path


def text_table(titles: list[str], rows: list[list[str]]) -> str:
    """A table as aligned text."""
    wide: list[int] = [max(width(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    lines = [
        "  ".join(pad(cell, cells) for cell, cells in zip(row, wide, strict=True)).rstrip()
        for row in (titles, *rows)
    ]
    return "\n".join(lines) + "\n"


def _last_word(text: str) -> tuple[str, str]:
    at = text.rfind(" ") + 1
    return text[:at], text[at:]


__all__ = ["Any", "Finding", "text_table"]
