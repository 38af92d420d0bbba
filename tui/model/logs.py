"""Lines of any number of logs, interleaved by time: bounded, cleaned, with their level where a line tells it.

A line is whatever a program wrote. Nothing in it is markup, nothing in it moves a cursor, and it is cut where it is
longer than anybody reads.
"""

from __future__ import annotations

import re
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.events import Event
from tui.model.locator import Locator, Term, split_values
from tui.model.spans import Line
from tui.model.table import Column, Scene, hidden
from tui.model.text import clean, elide, shorten, width

KEPT = 5_000
"""Lines that are held, of all sources together; the oldest leave."""
BACKLOG = 500
"""Lines of each source that are asked for at first."""
LINE_LIMIT = 4_000
"""Characters of a line that are kept."""
MOST_SOURCES = 64
LOOKED_AT = 160
"""Characters of a line that may tell its level."""

LEVELS = ("debug", "info", "warn", "error")
"""From quiet to loud."""
_WORDS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "notice": "info",
    "warn": "warn",
    "warning": "warn",
    "err": "error",
    "error": "error",
    "critical": "error",
    "crit": "error",
    "alert": "error",
    "emerg": "error",
    "fatal": "error",
    "panic": "error",
    "traceback": "error",
}
_ANY = "|".join(sorted(_WORDS, key=len, reverse=True))
_LOUD = re.compile(rf"(?<![A-Za-z_])(?:{_ANY.upper()})(?![A-Za-z_])")
"""In capitals a level is told wherever it stands; in small letters only where a level stands."""
_NAMED = re.compile(rf"""\b(?:level|lvl|severity)["']?\s*[=:]\s*["']?({_ANY})\b""", re.IGNORECASE)
_FIRST = re.compile(rf"^[\W\d_TZ]*({_ANY})\b\s*(?:[:\]\)|(]|most recent|error:)", re.IGNORECASE)
_PRIORITY = re.compile(r"^<([0-7])>")
_SYSLOG = ("error", "error", "error", "error", "warn", "info", "info", "debug")
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def level_of(text: str) -> str:
    """`debug`, `info`, `warn`, `error`, or empty where the line doesn't tell."""
    start = text[:LOOKED_AT]
    if found := _PRIORITY.match(start):
        return _SYSLOG[int(found[1])]
    if found := _NAMED.search(start) or _FIRST.match(start):
        return _WORDS[found[1].lower()]
    if found := _LOUD.search(start):
        return _WORDS[found[0].lower()]
    return ""


@dataclass(frozen=True)
class Source:
    """A daemon's log, or without `daemon` what a node tells of itself."""

    node_id: str
    node: str
    mesh: str = ""
    daemon: str = ""

    @property
    def key(self) -> str:
        return f"{self.node_id}/{self.daemon}"

    @property
    def name(self) -> str:
        """As it is written: NODE or NODE/DAEMON."""
        return f"{self.node}/{self.daemon}" if self.daemon else self.node


class LogLine:
    """One line. `key` orders it: by its time, then by arrival."""

    __slots__ = ("_search", "at_ms", "data", "id", "key", "level", "role", "source", "text")

    def __init__(self, source: Source, at_ms: float | None, order: float, text: str, seq: int) -> None:
        self.source = source
        self.at_ms = at_ms
        self.text = text
        self.level = level_of(text)
        self.key = (order, seq)
        self.id = str(seq)
        self.role = {"error": "dead", "warn": "degraded", "debug": "soft"}.get(self.level, "text")
        self.data = {"at_ms": at_ms, "node": source.node, "daemon": source.daemon or None, "line": text}
        self._search: str | None = None

    @property
    def search(self) -> str:
        """What bare words and regular expressions look at."""
        if self._search is None:
            self._search = f"{self.text} {self.source.name}".lower()
        return self._search


def text_of(source: Source, item: Mapping[str, Any]) -> str:
    """The text of one item of a source's stream: a daemon's line, or a node's event in one line."""
    if source.daemon:
        line = item.get("line")
        raw = line if isinstance(line, str) else ""
        return clean(_COLOURS.sub("", raw[:LINE_LIMIT])).rstrip()
    event = Event({key: value for key, value in item.items() if key not in ("node_id", "daemon")}, 0)
    before, after = event.move
    moved = f"{before or ages.UNKNOWN} to {after or ages.UNKNOWN}" if before or after else ""
    about = event.node if event.node != source.node else ""
    return "  ".join(part for part in (event.kind, about, moved, event.story) if part)[:LINE_LIMIT]


class LogBook:
    """The lines of all sources in order of time, at most `kept`."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self.lines: list[LogLine] = []
        self.came = 0
        """Lines taken so far; those that were held already are not counted."""
        self._again: dict[str, Counter[tuple[float | None, str]]] = {}

    def begin(self, source: Source) -> None:
        """A new stream of a source begins with lines that an earlier one told: those are not taken twice."""
        held = Counter((line.at_ms, line.text) for line in self.lines if line.source.key == source.key)
        self._again[source.key] = held

    def add(self, source: Source, item: Mapping[str, Any]) -> bool:
        """Takes one item of a source's stream; whether it was new."""
        text, at_ms = text_of(source, item), number(item.get("at_ms"))
        again = self._again.get(source.key)
        if again and again[(at_ms, text)] > 0:
            again[(at_ms, text)] -= 1
            return False
        last = self.lines[-1].key[0] if self.lines else 0.0
        made = LogLine(source, at_ms, last if at_ms is None else at_ms, text, self.came)
        self.came += 1
        if not self.lines or made.key >= self.lines[-1].key:
            self.lines.append(made)
        else:
            insort(self.lines, made, key=lambda line: line.key)
        if len(self.lines) > self.kept + self.kept // 8:
            del self.lines[: len(self.lines) - self.kept]
        return True

    def shown(self) -> list[LogLine]:
        """The last `kept` lines."""
        return self.lines[-self.kept :]

    def only(self, keys: Iterable[str]) -> None:
        """Lets go of the lines of every other source."""
        wanted = set(keys)
        self.lines = [line for line in self.lines if line.source.key in wanted]
        self._again = {key: held for key, held in self._again.items() if key in wanted}


def lines_of(documents: Iterable[object], now: float = 0.0) -> list[LogLine]:
    """Lines from documents `{"at_ms","node","node_id","mesh","daemon","line"}` that were read once."""
    book = LogBook()
    for data in documents:
        if isinstance(data, Mapping):
            names = [clean(data.get(key)) for key in ("node_id", "node", "mesh", "daemon")]
            book.add(Source(*names), data)
    return book.shown()


def chosen(locator: Locator) -> list[str]:
    """What `from:` names, NODE or NODE/DAEMON each, in their order."""
    found = [
        value
        for term in locator.terms
        if term.kind == "match" and term.column == "from" and not term.negated
        for value in split_values(term.value)
    ]
    return list(dict.fromkeys(found))[:MOST_SOURCES]


def choosing(sources: Iterable[str]) -> Locator:
    """The locator that opens these logs."""
    return Locator("logs", (Term("match", "\0".join(sources), "from"),))


def without_choice(locator: Locator) -> Locator:
    """The locator as the table takes it: `from:` says what is followed, not what is shown of it."""
    terms = tuple(t for t in locator.terms if t.kind != "match" or t.column != "from" or t.negated)
    return Locator(locator.view, terms, locator.sort, locator.mesh, locator.sort_pos)


def at_least(locator: Locator, level: str) -> Locator:
    """The locator narrowed to lines of this level and louder; with an empty level to all again."""
    terms = [t for t in locator.terms if t.kind != "match" or t.column != "level"]
    if level:
        terms.append(Term("match", "\0".join(LEVELS[LEVELS.index(level) :]), "level"))
    return Locator(locator.view, tuple(terms), locator.sort, locator.mesh)


def least(locator: Locator) -> str:
    """The level that `at_least` has set; empty for none."""
    term = next((t for t in locator.terms if t.kind == "match" and t.column == "level"), None)
    return min(split_values(term.value), key=_loudness) if term else ""


def _loudness(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else -1


def _time(line: LogLine, scene: Scene, cells: int) -> Line:
    return [(ages.clock(line.at_ms), "soft")]


def _source(line: LogLine, scene: Scene, cells: int) -> Line:
    source = line.source
    if source.daemon and width(source.name) > cells:
        node = elide(source.node.removeprefix(f"{source.mesh}."), max(4, cells - width(source.daemon) - 1))
        return [(elide(f"{node}/{source.daemon}", cells, scene.glyphs.ellipsis), "name")]
    return [(elide(source.name, cells, scene.glyphs.ellipsis), "name")]


def _level(line: LogLine, scene: Scene, cells: int) -> Line:
    return [(line.level, line.role)] if line.level else []


def _line(line: LogLine, scene: Scene, cells: int) -> Line:
    return marked(shorten(line.text, cells, scene.glyphs.ellipsis), scene.find, line.role)


def marked(text: str, find: str, role: str) -> Line:
    """`text` with every place of `find` in it told apart, whatever its letters' size."""
    low = text.lower()
    needle = find.lower()
    if not needle or len(low) != len(text):
        return [(text, role)]
    out: Line = []
    at = 0
    while (hit := low.find(needle, at)) >= 0:
        out += [(text[at:hit], role), (text[hit : hit + len(needle)], "caret")]
        at = hit + len(needle)
    return [piece for piece in [*out, (text[at:], role)] if piece[0]]


LOGS: tuple[Column[LogLine], ...] = (
    Column("time", "TIME", "number", (8,), 1, _time, lambda n, now: n.at_ms, "when, by the clock of its node"),
    Column(
        "source", "FROM", "text", (14, 40), 1, _source, lambda n, now: n.source.name, "whose line it is",
        needs="sources", ideal=lambda n, s: width(n.source.name), grows=(4,),
    ),
    Column("level", "LEVEL", "word", (5,), 3, _level, lambda n, now: n.level or None,
        "error, warn, info, debug, where the line tells it", needs="levels",
    ),
    Column("line", "LINE", "text", (20, 4096), 0, _line, lambda n, now: n.text or None, "what was written",
        ideal=lambda n, s: width(n.text), grows=(2,),
    ),
)  # fmt: skip


LOGS_HIDDEN: tuple[Column[LogLine], ...] = (
    hidden("from", "text", "the logs to follow: NODE/DAEMON, or NODE", lambda n, now: n.source.name),
    hidden("node", "text", "the node", lambda n, now: n.source.node),
    hidden("daemon", "text", "the daemon", lambda n, now: n.source.daemon or None),
    hidden("mesh", "word", "the node's mesh", lambda n, now: n.source.mesh or None),
)


def log_facts(lines: list[LogLine]) -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    facts = {"sources"} if len({line.source.key for line in lines}) > 1 else set()
    return frozenset(facts | ({"levels"} if any(line.level for line in lines) else set()))


def log_lead(line: LogLine, scene: Scene) -> Line:
    """The sign before a line: how loud it is, without colour too."""
    return [({"error": scene.glyphs.state("dead"), "warn": "!"}.get(line.level, " "), line.role)]
