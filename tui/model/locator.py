"""The view locator: one line that names a view, narrows it and orders it.

    fleet state:degraded cpu>80 sort:-cpu @beta

Bare words, `/regex/`, `column:value` (a comma means or), `column>n` and `tag.key=value` must all hold; `!` turns the
next one round; `sort:` orders, `-` descending; `@mesh` narrows to a mesh. What doesn't parse is an error at its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from tui.model.ages import duration_ms

Kind = Literal["text", "word", "number", "share", "duration", "flag"]
"""What a column holds. `word` matches from its start (states, kinds, ids), `text` anywhere; shares are typed in
percent, durations as `30s` or `5m` and held in milliseconds."""
Value = str | float | bool | None
Op = Literal[">", ">=", "<", "<=", "="]
T = TypeVar("T")


class LocatorError(ValueError):
    """What is wrong, and the character at which it is."""

    def __init__(self, pos: int, text: str) -> None:
        super().__init__(text)
        self.pos = pos
        self.text = text


@dataclass(frozen=True)
class Term:
    """One condition. `kind` says which of the fields count; `pos` is where it stood and no part of its meaning."""

    kind: Literal["word", "regex", "match", "compare", "tag"]
    value: str
    column: str = ""
    op: Op = "="
    negated: bool = False
    pos: int = field(default=0, compare=False)
    value_pos: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Locator:
    """A parsed line. `view` is None where the line names none."""

    view: str | None = None
    terms: tuple[Term, ...] = ()
    sort: tuple[tuple[str, bool], ...] = ()
    """(column, descending), the first counts most."""
    mesh: str | None = None
    sort_pos: int = field(default=0, compare=False)

    def with_sort(self, *sort: tuple[str, bool]) -> Locator:
        return replace(self, sort=sort)

    def filter_text(self) -> str:
        """The terms alone, as `/` edits them."""
        return " ".join(map(_term_text, self.terms))

    def text(self) -> str:
        """The line that parses to this locator again."""
        parts = [self.view] if self.view else []
        for term in self.terms:
            # A word at the very beginning could be taken for a view.
            bare = not parts and term.kind == "word" and not term.negated
            parts.append(_quoted(term.value, always=True) if bare else _term_text(term))
        if self.sort:
            parts.append("sort:" + ",".join(("-" if down else "") + column for column, down in self.sort))
        if self.mesh:
            parts.append(f"@{self.mesh}")
        return " ".join(parts)


@dataclass(frozen=True)
class Field:
    """How a column is filtered and ordered: its kind, and its value in an item at `now`."""

    kind: Kind
    value: Callable[[Any, float], Value]


Schema = Mapping[str, Field]

_IDENT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_OPERATOR = re.compile(r":|>=|<=|>|<|=")
_MESH = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_BARE = re.compile(r"[^\s\"!@/:<>=,\\-][^\s\":<>=,\\]*")


def _quoted(text: str, always: bool = False) -> str:
    if not always and _BARE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _term_text(term: Term) -> str:
    sign = "!" if term.negated else ""
    if term.kind == "word":
        return sign + _quoted(term.value)
    if term.kind == "regex":
        return f"{sign}/{term.value}/"
    if term.kind == "match":
        return f"{sign}{term.column}:" + ",".join(_quoted(v) if v else '""' for v in split_values(term.value))
    if term.kind == "compare":
        return f"{sign}{term.column}{term.op}{_quoted(term.value)}"
    return f"{sign}tag.{term.column}={_quoted(term.value)}"


def split_values(value: str) -> list[str]:
    """The alternatives of a `match` value; they are held joined by NUL, which no line can contain."""
    return value.split("\0")


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip_blanks(self) -> bool:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at < len(self.text)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if not found:
            return ""
        self.at = found.end()
        return found[0]

    def run(self, stop: str = "") -> str:
        """Everything up to a blank, or a character of `stop`."""
        start = self.at
        while (
            self.at < len(self.text) and not self.text[self.at].isspace() and self.text[self.at] not in stop
        ):
            self.at += 1
        return self.text[start : self.at]

    def quoted(self) -> str:
        start = self.at
        self.at += 1
        out: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return "".join(out)
            if char == "\\" and self.at + 1 < len(self.text):
                self.at += 1
                char = self.text[self.at]
            out.append(char)
            self.at += 1
        raise LocatorError(start, 'the " is not closed')

    def value(self, stop: str = "") -> str:
        return self.quoted() if self.peek() == '"' else self.run(stop)


def parse(text: str, views: Collection[str] = ()) -> Locator:
    """The locator of a line, or LocatorError. Columns are checked by `check`, once the view is known."""
    scan = _Scanner(text.replace("\0", " "))
    view: str | None = None
    mesh: str | None = None
    terms: list[Term] = []
    sort: list[tuple[str, bool]] = []
    sort_pos = 0
    first = True
    while scan.skip_blanks():
        start = scan.at
        negated = scan.peek() == "!"
        if negated:
            scan.at += 1
            if not scan.peek().strip():
                raise LocatorError(start, "nothing after !")
            if scan.peek() in "!@":
                raise LocatorError(scan.at, f"! can't turn {scan.peek()} round")
        if scan.peek() == "@":
            scan.at += 1
            name = scan.run()
            if not _MESH.fullmatch(name):
                raise LocatorError(start, "a mesh is @ and its name: a-z, 0-9 and -")
            if mesh not in (None, name):
                raise LocatorError(start, "one mesh at a time")
            mesh = name
        elif scan.peek() == "/":
            terms.append(_regex(scan, start, negated))
        elif scan.peek() == '"':
            pos = scan.at
            value = scan.quoted()
            if not value:
                raise LocatorError(pos, "nothing between the quotes")
            terms.append(Term("word", value, negated=negated, pos=start, value_pos=pos))
        else:
            term = _term(scan, start, negated)
            if isinstance(term, Term):
                bare = term.kind == "word" and not negated
                if first and bare and term.value in views:
                    view = term.value
                else:
                    terms.append(term)
            elif negated:
                raise LocatorError(start, "! can't turn an order round; use sort:-column")
            else:
                sort.extend(term)
                sort_pos = start
        first = False
    return Locator(view, tuple(terms), tuple(sort), mesh, sort_pos)


def _regex(scan: _Scanner, start: int, negated: bool) -> Term:
    pos = scan.at
    scan.at += 1
    begin = scan.at
    while scan.at < len(scan.text) and scan.text[scan.at] != "/":
        scan.at += 2 if scan.text[scan.at] == "\\" else 1
    if scan.at >= len(scan.text):
        raise LocatorError(pos, "the / is not closed")
    source = scan.text[begin : scan.at]
    scan.at += 1
    if not source:
        raise LocatorError(pos, "nothing between the slashes")
    try:
        re.compile(source)
    except (re.error, OverflowError, RecursionError) as why:
        at = getattr(why, "pos", None)
        raise LocatorError(
            begin + (at or 0), f"not a regular expression: {getattr(why, 'msg', why)}"
        ) from why
    return Term("regex", source, negated=negated, pos=start, value_pos=begin)


def _term(scan: _Scanner, start: int, negated: bool) -> Term | list[tuple[str, bool]]:
    """A bare word, a condition on a column or tag, or the columns of `sort:`."""
    begin = scan.at
    column = scan.take(_IDENT)
    op = scan.take(_OPERATOR) if column else ""
    if not op:
        scan.at = begin
        word = scan.run()
        return Term("word", word, negated=negated, pos=start, value_pos=begin)
    pos = scan.at
    if column == "sort" and op == ":":
        return _sort(scan)
    values = [scan.value(",") if op == ":" else scan.value()]
    while op == ":" and scan.peek() == ",":
        scan.at += 1
        values.append(scan.value(","))
    if scan.at < len(scan.text) and not scan.peek().isspace():
        raise LocatorError(scan.at, "a blank is missing here")
    if len(values) == 1 and scan.at == pos:
        raise LocatorError(pos, f"nothing after {column}{op}")
    if column.startswith("tag.") and len(column) > 4:
        if op not in (":", "="):
            raise LocatorError(pos - len(op), "a tag takes = only")
        return Term("tag", ",".join(values), column[4:], negated=negated, pos=start, value_pos=pos)
    column = column.lower()
    if op == ":":
        return Term("match", "\0".join(values), column, negated=negated, pos=start, value_pos=pos)
    kept: Op = op  # type: ignore[assignment]
    return Term("compare", values[0], column, kept, negated, start, pos)


def _sort(scan: _Scanner) -> list[tuple[str, bool]]:
    keys = []
    at = scan.at
    for part in scan.run().split(","):
        down = part.startswith("-")
        name = part[1:] if down else part
        if not _IDENT.fullmatch(name):
            raise LocatorError(at, "sort: takes columns, with - before one for descending")
        keys.append((name.lower(), down))
        at += len(part) + 1
    return keys


def check(locator: Locator, schema: Schema) -> None:
    """LocatorError where the locator names a column that the view doesn't have, or a value the column can't hold."""
    compile_filter(locator, schema, lambda item: "", lambda item: {})
    for column, _ in locator.sort:
        if column not in schema:
            raise LocatorError(locator.sort_pos, _no_column(column, schema))


def _no_column(column: str, schema: Schema) -> str:
    near = get_close_matches(column, schema, 1)
    return f'no column "{column}"' + (
        f"; did you mean {near[0]}?" if near else "; quote it to search for the text"
    )


Predicate = Callable[[T, float], bool]


def compile_filter(
    locator: Locator,
    schema: Schema,
    search: Callable[[T], str],
    tags: Callable[[T], Mapping[str, str]],
) -> Predicate[T] | None:
    """One test for an item at `now`, or None when every item passes. `search(item)` is its lower-case text."""
    tests = [_compile(term, schema, search, tags) for term in locator.terms]
    if locator.mesh is not None and "mesh" in schema:
        wanted, mesh = locator.mesh, schema["mesh"].value
        tests.append(lambda item, now: mesh(item, now) == wanted)
    if not tests:
        return None
    if len(tests) == 1:
        return tests[0]
    return lambda item, now: all(test(item, now) for test in tests)


def _compile(
    term: Term, schema: Schema, search: Callable[[T], str], tags: Callable[[T], Mapping[str, str]]
) -> Predicate[T]:
    test = _positive(term, schema, search, tags)
    return (lambda item, now: not test(item, now)) if term.negated else test


def _positive(
    term: Term, schema: Schema, search: Callable[[T], str], tags: Callable[[T], Mapping[str, str]]
) -> Predicate[T]:
    if term.kind == "word":
        needle = term.value.lower()
        return lambda item, now: needle in search(item)
    if term.kind == "regex":
        pattern = re.compile(term.value, re.IGNORECASE)
        return lambda item, now: pattern.search(search(item)) is not None
    if term.kind == "tag":
        key, wanted = term.column, term.value
        if wanted == "*":
            return lambda item, now: key in tags(item)
        return lambda item, now: tags(item).get(key) == wanted
    found = schema.get(term.column)
    if found is None:
        raise LocatorError(term.pos + term.negated, _no_column(term.column, schema))
    if term.kind == "match":
        return _match(term, found)
    return _compare(term, found)


def _match(term: Term, column: Field) -> Predicate[Any]:
    wanted = [value.lower() for value in split_values(term.value)]
    get, kind = column.value, column.kind
    if kind == "flag":
        if any(value not in _FLAGS for value in wanted):
            raise LocatorError(term.value_pos, f"{term.column} is yes or no")
        flags = {_FLAGS[value] for value in wanted}
        return lambda item, now: get(item, now) in flags
    if kind in ("number", "share", "duration"):
        wishes = [None if value in _NOTHING else _figure(value, kind, term) for value in wanted]
        return lambda item, now: any(_same(get(item, now), wish, kind) for wish in wishes)

    def test(item: Any, now: float) -> bool:
        value = get(item, now)
        if value is None or value == "":
            return any(wish in _NOTHING for wish in wanted)
        text = str(value).lower()
        return any(text.startswith(wish) if kind == "word" else wish in text for wish in wanted)

    return test


_NOTHING = ("-", "–", "none", "unknown")
_FLAGS: dict[str, bool | None] = {"yes": True, "true": True, "no": False, "false": False}
_FLAGS |= dict.fromkeys(_NOTHING)


def _figure(text: str, kind: Kind, term: Term) -> float:
    figure: float | None = None
    if kind == "duration":
        figure = duration_ms(text)
    else:
        try:
            figure = float(text.rstrip("%") if kind == "share" else text)
        except ValueError:
            figure = None
    if figure is None or figure != figure:
        example = {"duration": "30s or 5m", "share": "80 (percent)"}.get(kind, "4")
        raise LocatorError(term.value_pos, f"{term.column} takes a figure such as {example}")
    return figure / 100 if kind == "share" else figure


def _same(value: Value, wish: float | None, kind: Kind) -> bool:
    """Equal as far as the screen shows it: percent and seconds are whole there."""
    if value is None or wish is None or isinstance(value, str):
        return value is None and wish is None
    if kind == "share":
        return round(value * 100) == round(wish * 100)
    return round(value / 1000) == round(wish / 1000) if kind == "duration" else value == wish


def _compare(term: Term, column: Field) -> Predicate[Any]:
    get, kind, op = column.value, column.kind, term.op
    if kind in ("text", "word", "flag"):
        if op != "=":
            raise LocatorError(
                term.pos + term.negated, f"{term.column} holds no figure; use {term.column}:value"
            )
        if kind == "flag":
            return _match(term, column)
        wanted = term.value.lower()
        return lambda item, now: str(get(item, now) or "").lower() == wanted
    figure = _figure(term.value, kind, term)
    if op == "=":
        return lambda item, now: _same(get(item, now), figure, kind)
    test = _ORDER[op]

    def compare(item: Any, now: float) -> bool:
        value = get(item, now)
        return isinstance(value, (int, float)) and test(value, figure)

    return compare


_ORDER: dict[str, Callable[[float, float], bool]] = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


def sort_key(locator: Locator, schema: Schema, now: float) -> list[tuple[Callable[[Any], Any], bool]]:
    """(key, descending) a sort column, to be applied from the last to the first; unknown values always come last."""
    keys: list[tuple[Callable[[Any], Any], bool]] = []
    for column, down in reversed(locator.sort):
        keys.append((_key(schema[column], now, down), down))
    return keys


_LAST_TEXT = chr(0x10FFFF)


def _key(column: Field, now: float, down: bool) -> Callable[[Any], Any]:
    """Plain floats or plain strings, because Python sorts lists of one such type several times faster than tuples."""
    get = column.value
    if column.kind in ("text", "word"):
        last = "" if down else _LAST_TEXT
        return lambda item: get(item, now) or last
    unknown = -math.inf if down else math.inf

    def figure(item: Any) -> float:
        value = get(item, now)
        return float(value) if isinstance(value, (int, float)) else unknown

    return figure
