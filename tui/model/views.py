"""The views that exist, by name: their columns, and each as a headless table with the very same model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tui.model import audit, chains, columns, daemon_columns, daemons, failures, logs, mesh_columns, meshes
from tui.model.events import Event
from tui.model.locator import Locator, LocatorError, check, parse
from tui.model.rows import Row, rows_of
from tui.model.spans import plain
from tui.model.table import Column, Scene, Table

Source = Literal["rows", "events", "meshes", "daemons", "chains", "failures", "audit", "logs"]
Docs = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class _Stuff:
    """What the items of a source are, and how a table holds them."""

    items: Callable[[Docs, float], list[Any]]
    search: Callable[[Any], str]
    tags: Callable[[Any], Mapping[str, str]]
    key: Callable[[Any], Any]
    height: Callable[[Any], int]
    facts: Callable[[list[Any], str], frozenset[str]]


_STUFF: dict[Source, _Stuff] = {
    "rows": _Stuff(
        rows_of, lambda row: row.search, lambda row: row.tags, columns.trouble_key, columns.row_height,
        columns.fleet_facts,
    ),
    "events": _Stuff(
        lambda docs, now: [Event(document, at) for at, document in enumerate(docs)],
        lambda e: e.search, lambda e: {}, lambda e: e.key, lambda e: 1, lambda found, me: frozenset({"meshes"}),
    ),
    "meshes": _Stuff(
        meshes.rows_of, lambda m: m.search, lambda m: {}, mesh_columns.mesh_key, mesh_columns.mesh_height,
        lambda found, me: mesh_columns.mesh_facts(found),
    ),
    "daemons": _Stuff(
        daemons.Daemons.read, lambda d: d.search, lambda d: {}, daemons.daemon_key, daemons.daemon_height,
        lambda found, me: daemon_columns.daemon_facts(found),
    ),
    "chains": _Stuff(
        chains.Chains.read, lambda c: c.search, lambda c: {}, chains.chain_key, chains.chain_height,
        lambda found, me: chains.chain_facts(found),
    ),
    "audit": _Stuff(
        audit.Audit.read, lambda e: e.search, lambda e: {}, lambda e: e.key, lambda e: 1,
        lambda found, me: audit.audit_facts(found),
    ),
    "failures": _Stuff(
        failures.Failures.read, lambda f: f.search, lambda f: {}, lambda f: f.key, lambda f: 1,
        lambda found, me: failures.failure_facts(found),
    ),
    "logs": _Stuff(
        logs.lines_of, lambda n: n.search, lambda n: {}, lambda n: n.key, lambda n: 1,
        lambda found, me: logs.log_facts(found),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ViewSpec:
    """A view: the key that opens it, what it is made of, and its columns."""

    name: str
    key: str
    title: str
    source: Source
    """What the headless twin asks an agent for: a call of the client of that name; `rows` are its nodes."""
    columns: tuple[Column[Any], ...]
    hidden: tuple[Column[Any], ...] = ()
    about: str = ""
    """What it shows, for help."""

    def new_table(self) -> Table[Any]:
        """An empty table of this view."""
        of = _STUFF[self.source]
        return Table((*self.columns, *self.hidden), of.search, of.tags, of.key, of.height)

    def select(self, documents: Docs, locator: Locator, now: float = 0.0) -> list[Any]:
        """The items that the locator leaves, in its order; LocatorError for one that doesn't fit this view."""
        table = self.new_table()
        check(locator, table.schema)
        table.items = {item.id: item for item in _STUFF[self.source].items(documents, now)}
        table.set_locator(locator, now)
        return [table.items[node] for node in table.order]

    def cells(
        self, items: Sequence[Any], now: float = 0.0, me: str = ""
    ) -> tuple[list[str], list[list[str]]]:
        """(titles, a list of texts an item), every column that has something to show, nothing elided."""
        facts = _STUFF[self.source].facts(list(items), me)
        scene = Scene(now, me, None, facts=facts)
        shown = [c for c in self.columns if not c.needs or c.needs in facts]
        rows = [[_cell(column, item, scene) for column in shown] for item in items]
        return [column.title or column.key.upper() for column in shown], rows

    def table(self, documents: Docs, locator: Locator, now: float = 0.0, me: str = "") -> list[list[str]]:
        """The headless table: titles first, then a list of texts a row."""
        titles, rows = self.cells(self.select(documents, locator, now), now, me)
        return [titles, *rows]

    def json(self, documents: Docs, locator: Locator, now: float = 0.0) -> list[Mapping[str, Any]]:
        """The documents themselves, narrowed and ordered."""
        return [item.data for item in self.select(documents, locator, now)]


def _cell(column: Column[Any], item: Any, scene: Scene) -> str:
    cells = column.widths[0] if column.key == "cpu" else 4096 if column.ideal else column.widths[-1]
    return " ".join(plain(column.cell(item, scene, cells)).split())


VIEWS: dict[str, ViewSpec] = {
    view.name: view
    for view in (
        ViewSpec(
            "fleet", "1", "Fleet", "rows", columns.FLEET, columns.FLEET_HIDDEN, "every node, trouble first",
        ),
        ViewSpec(
            "map", "2", "Map", "rows", columns.FLEET, columns.FLEET_HIDDEN,
            "meshes and nodes, with the paths measured between them",
        ),
        ViewSpec(
            "meshes", "3", "Meshes", "meshes", mesh_columns.MESHES, mesh_columns.MESHES_HIDDEN,
            "who publishes each mesh, and how it stands",
        ),
        ViewSpec(
            "daemons", "4", "Daemons", "daemons", daemon_columns.DAEMONS, daemon_columns.DAEMONS_HIDDEN,
            "what runs where, and how it is",
        ),
        ViewSpec(
            "chains", "5", "Chains", "chains", chains.CHAINS, chains.CHAINS_HIDDEN,
            "what the mesh keeps, and who holds it",
        ),
        ViewSpec(
            "failures", "6", "Failures", "failures", failures.FAILURES, failures.FAILURES_HIDDEN,
            "what failed, also on dead nodes",
        ),
        ViewSpec(
            "events", "7", "Events", "events", columns.EVENTS, columns.EVENTS_HIDDEN,
            "what happened, and the fleet as it was then",
        ),
        ViewSpec(
            "audit", "8", "Audit", "audit", audit.AUDIT, audit.AUDIT_HIDDEN,
            "every op on record, with its outcome and signature",
        ),
        ViewSpec(
            "logs", "9", "Logs", "logs", logs.LOGS, logs.LOGS_HIDDEN,
            "the lines of daemons and nodes, side by side",
        ),
    )
}  # fmt: skip
"""A new view is a line here, its model, and a file in tui/screens."""


def parse_locator(text: str, view: str = "fleet") -> Locator:
    """A whole line: its view (or `view`), with every column checked against it. LocatorError at its place."""
    locator = parse(text, VIEWS)
    spec = VIEWS[locator.view or view]
    check(locator, {column.key: column.schema for column in (*spec.columns, *spec.hidden)})
    return Locator(spec.name, locator.terms, locator.sort, locator.mesh, locator.sort_pos)


__all__ = ["VIEWS", "LocatorError", "Row", "ViewSpec", "parse_locator"]
