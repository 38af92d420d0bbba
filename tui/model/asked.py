"""What the whole fleet was asked: the rows of the last answer, how old they are, and who didn't answer.

A question goes to every live node; a node that is silent this time is not a node without rows. What it told last is
kept for a while and ages, and it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from tui.model import ages
from tui.model.spans import Line, line_width
from tui.model.text import clean, elide

MOST = 20_000
"""Rows that are taken from one answer."""
MOST_SILENT = 1_000
PERIOD_S = 2.0
"""An answer is asked for once a second and may take another: nodes get one second to answer."""
STALE_S = 3 * PERIOD_S
KEPT_S = 60.0
"""So long the rows of a silent node stay, as observers keep a dead one."""


class ToldRow:
    """A row as its node tells it. `data` is the row as received; every duration counts on by the viewer's own clock."""

    __slots__ = ("_search", "data", "id", "mesh", "node", "node_id", "reason", "received")

    def __init__(self, data: Mapping[str, Any], now: float) -> None:
        self.data = data
        self.received = now
        self.node_id = clean(data.get("node_id"))
        self.node = clean(data.get("node")) or self.node_id
        self.mesh = clean(data.get("mesh"))
        self.reason = clean(data.get("reason"))
        self.id = ""
        self._search: str | None = None

    def figure(self, key: str) -> float | None:
        """A number of the row, None where it is unknown or nonsense."""
        return ages.number(self.data.get(key))

    def age_ms(self, now: float) -> float | None:
        """Since what it tells of began or happened."""
        age = self.figure("age_ms")
        return None if age is None else age + (now - self.received) * 1000

    def words(self) -> list[str]:
        """What bare words and regular expressions look at, besides where it is and why."""
        return []

    @property
    def search(self) -> str:
        """All of its words."""
        if self._search is None:
            found = [*self.words(), self.node, self.node_id, self.mesh, self.reason]
            self._search = " ".join(word for word in found if word).lower()
        return self._search


class Told(Protocol):
    """A row of an answer."""

    id: str
    node: str
    received: float


T = TypeVar("T", bound=Told)


class Asked(Generic[T]):
    """The rows by id, folded from one answer after the other. `make` reads a row; None for nonsense."""

    how = "gathers"
    """What the answering node does with it, in the title."""

    def __init__(self, make: Callable[[Mapping[str, Any], float], T | None]) -> None:
        self._make = make
        self.rows: dict[str, T] = {}
        self.version = 0
        """Counts the answers that told anything new."""
        self.silent: tuple[str, ...] = ()
        """Names of the nodes that didn't answer, as of the last answer."""
        self.by = ""
        """Who gathered it."""
        self.at: float | None = None
        """When the last answer came; None before the first."""
        self.error = ""
        """Why there was none since; empty while all is well."""

    def fold(self, answer: object, now: float) -> None:
        """Takes `{"rows","silent","answered_by"}`. Nonsense in it is left out, never raised."""
        given: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
        found: dict[str, T] = {}
        for data in _list(given, "rows")[:MOST]:
            made = self._make(data, now) if isinstance(data, Mapping) else None
            if made is None:
                continue
            name, again = made.id, 1
            while made.id in found:
                again += 1
                made.id = f"{name}~{again}"
            found[made.id] = made
        self.silent = tuple(sorted({clean(name) for name in _list(given, "silent")[:MOST_SILENT]} - {""}))
        quiet = set(self.silent) - {row.node for row in found.values()}
        for old in self.rows.values():
            if old.node in quiet and old.id not in found and now - old.received <= KEPT_S:
                found[old.id] = old
        self.rows = found
        self.version += 1
        self.by = clean(given.get("answered_by"))
        self.at, self.error = now, ""

    @classmethod
    def read(cls, documents: Iterable[object], now: float = 0.0) -> list[T]:
        """The rows of documents that were read once, as commands print them."""
        book: Any = cls
        made: Asked[T] = book()
        made.fold({"rows": list(documents)}, now)
        return list(made.rows.values())

    def failed(self, why: str) -> None:
        """No answer came: the rows stay, and age."""
        self.error = clean(why) or "no answer"

    def old(self, row: T, now: float) -> bool:
        """Whether a row is older than three of its periods."""
        return now - row.received > STALE_S

    def standing(self, now: float, cells: int) -> Line:
        """How old it is and who is missing, in at most `cells`: names leave before their number does."""
        if self.error and self.at is None:
            return _first([[("no answer", "hot")]], cells)
        age = "asking…" if self.at is None else f"{ages.age((now - self.at) * 1000)} old"
        if self.error:
            return _first([[(f"no answer: {self.error}", "hot"), (f", {age}", "soft")],
                           [("no answer", "hot"), (f", {age}", "soft")], [("no answer", "hot")]], cells)  # fmt: skip
        if not self.silent:
            by = f"as {self.by} {self.how} it, " if self.by else ""
            return _first([[(f"{by}{age}", "soft")], [(age, "soft")]], cells)
        count = len(self.silent)
        wordings = []
        for named in range(min(4, count), 0, -1):
            more = f" +{count - named}" if count > named else ""
            names = ", ".join(elide(name, 32) for name in self.silent[:named])
            wordings.append(f"{count} silent: {names}{more}")
        wordings.append(f"{count} silent")
        return _first([[(text, "hot"), (f", {age}", "soft")] for text in wordings], cells)

    def missing(self) -> str:
        """Who didn't answer, as a sentence; empty when everybody did."""
        if not self.silent:
            return ""
        said = "does not answer" if len(self.silent) == 1 else "do not answer"
        return f"{', '.join(self.silent)} {said}: what is shown of them is from before, or missing"


def _first(lines: list[Line], cells: int) -> Line:
    """The first that fits; nothing when none does."""
    return next((line for line in lines if line_width(line) <= cells), [])


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    found = given.get(key)
    return found if isinstance(found, list) else []
