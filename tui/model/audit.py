"""Every op that the mesh has on record, with what became of it and whether its signature holds; the refused ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.asked import MOST, STALE_S, Asked
from tui.model.spans import Line
from tui.model.table import Column, Scene, hidden, text_cell
from tui.model.text import clean, elide, shorten, width

BAD = frozenset({"refused", "void", "failed"})
"""Outcomes that did not take."""
AGAIN = 200
"""Rows at the end that are asked for again each time: what became of a young op is told after it."""
Cell = Callable[["Entry", Scene, int], Line]


class Entry:
    """One op on record. `target` and `by_node` are names where the view knows them, else ids."""

    __slots__ = (
        *("at_ms", "by_node", "data", "id", "key", "node", "op", "operator", "reason", "received"),
        *("result", "search", "target", "verified"),
    )

    def __init__(self, data: Mapping[str, Any], now: float) -> None:
        self.data = data
        self.received = now
        self.at_ms = number(data.get("at_ms"))
        self.op = clean(data.get("op")).replace("_", " ")
        self.target = clean(data.get("target_name")) or clean(data.get("target"))
        self.operator = clean(data.get("operator"))
        self.result = clean(data.get("result"))
        self.reason = clean(data.get("reason"))
        self.node = clean(data.get("node"))
        self.by_node = clean(data.get("node_name")) or self.node
        verified = data.get("verified")
        self.verified = verified if isinstance(verified, bool) else None
        self.id = identity(data)
        self.key = (-(self.at_ms or 0.0), self.id)
        words = [self.op, self.text("op"), self.target, self.text("target"), self.operator, self.result]
        words += [self.reason, self.signature, self.text("op_id"), self.text("fingerprint"), self.by_node]
        self.search = " ".join(word for word in words if word).lower()

    def text(self, key: str) -> str:
        """A text of the row, cleaned; empty where it is unknown."""
        return clean(self.data.get(key))

    @property
    def signature(self) -> str:
        """The verdict on its signature; `–` where nothing signed is kept."""
        return ages.UNKNOWN if self.verified is None else "verified" if self.verified else "NOT VERIFIED"

    @property
    def bad(self) -> bool:
        """Whether it is one to look at: it did not take, or its signature doesn't hold."""
        return self.result in BAD or self.verified is False

    @property
    def role(self) -> str:
        """The colour of its outcome."""
        if self.result in BAD:
            return "dead" if self.result == "void" else "hot"
        return "degraded" if self.result == "ahead" else "text"

    def whole(self, now: float) -> str:
        """Everything about it in one paragraph."""
        key = self.text("fingerprint")
        by = f"{self.operator} ({key})" if key and key != self.operator else self.operator or key
        outcome = self.result or "no outcome on record"
        parts = [
            f"{self.op or 'an op'} on {self.target}" if self.target else self.op or "an op",
            f"by {by}" if by else "by nobody known",
            f"{outcome}: {self.reason}" if self.reason else outcome,
            "nothing signed is kept" if self.verified is None else f"signature {self.signature}",
            ages.date(self.at_ms),
            f"op {self.text('op_id')}" if self.text("op_id") else "",
            f"recorded by {self.by_node}" if self.by_node else "",
        ]
        return "; ".join(part for part in parts if part)


def identity(data: Mapping[str, Any]) -> str:
    """What tells an op on record from every other, as far as its row can."""
    return "/".join(str(data.get(key)) for key in ("at_ms", "op_id", "op", "target", "node"))


def named(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows with `target_name` and `node_name` beside the ids: by `names` (id → name), else what the row has, else None."""
    return [
        {
            **row,
            "target_name": names.get(str(row.get("target"))),
            "node_name": names.get(str(row.get("node"))),
        }
        for row in rows
    ]


class Audit(Asked[Entry]):
    """The audit of the attached node's mesh, oldest first. After the first answer only its end is asked for."""

    how = "has"

    def __init__(self) -> None:
        super().__init__(Entry)
        self._order: list[Mapping[str, Any]] = []
        self._dropped = 0
        """Rows before those in `_order` that are held no more."""
        self._names: Mapping[str, str] = {}

    def forget(self) -> None:
        """Holds nothing any more, as before the first answer."""
        self._order, self._dropped, self.rows, self.by, self.at, self.error = [], 0, {}, "", None, ""
        self.version += 1

    def ask_from(self) -> int:
        """The place in the record from which on to ask."""
        return self._dropped + max(0, len(self._order) - AGAIN)

    def joined(self, offset: int, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
        """What is held and then `rows`, which are those from `offset` on; None when they don't fit: ask for all.

        A record that comes late stands where its time puts it, and moves the rest.
        """
        at = offset - self._dropped
        if not 0 <= at < len(self._order) or not rows or identity(self._order[at]) != identity(rows[0]):
            return None
        return [*self._order[:at], *rows]

    def fold(self, answer: object, now: float) -> None:
        """Takes `{"rows", "names", "answered_by", "first"}`: the record, or what is held joined to its end, oldest first;
        names by id; the place of the first row. The newest are kept where they are too many."""
        told: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
        given, names = told.get("rows"), told.get("names")
        rows = [row for row in given if isinstance(row, Mapping)] if isinstance(given, list) else []
        names = dict(names) if isinstance(names, Mapping) else {}
        dropped = max(0, len(rows) - MOST)
        rows = rows[dropped:]
        if self.at is not None and rows == self._order and names == self._names:
            self.at, self.error = now, ""
            return
        self._order, self._names = rows, names
        self._dropped = int(number(told.get("first")) or 0) + dropped
        super().fold({**told, "rows": named(reversed(rows), names)}, now)

    @property
    def first(self) -> int:
        """The place in the record of the first row that is held."""
        return self._dropped

    def old(self, row: Entry, now: float) -> bool:
        """A record does not age; only an answer that didn't come makes all of it old."""
        return self.at is not None and now - self.at > 2 * STALE_S

    def summary(self) -> Line:
        """How many did not take, and how many signatures don't hold."""
        entries = self.rows.values()
        words = [(sum(e.result == word for e in entries), word) for word in ("refused", "void", "ahead")]
        words.append((sum(e.verified is False for e in entries), "NOT VERIFIED"))
        text = "  ".join(f"{count} {word}" for count, word in words if count)
        return [(text, "hot")] if text else []


def entry_lead(entry: Entry, scene: Scene) -> Line:
    """The sign before an op: it did not take or isn't signed right, or it did."""
    return (
        [("!", "dead" if entry.verified is False else "hot")]
        if entry.bad
        else [(scene.glyphs.bullet, "text")]
    )


def _when(entry: Entry, scene: Scene, cells: int) -> Line:
    return [(ages.date(entry.at_ms, cells >= 19), "text")]


def _result(entry: Entry, scene: Scene, cells: int) -> Line:
    word = entry.result
    return [(elide(word, cells, scene.glyphs.ellipsis), entry.role)] if word else [(ages.UNKNOWN, "soft")]


def _signature(entry: Entry, scene: Scene, cells: int) -> Line:
    role = {None: "soft", True: "text", False: "dead"}[entry.verified]
    return [(entry.signature, role)]


AUDIT: tuple[Column[Entry], ...] = (
    Column(
        "time", "WHEN", "number", (14, 19), 0, _when, lambda e, now: e.at_ms, "when, by the clock of who recorded it",
        grows=(7,),
    ),
    Column(
        "op", "OP", "text", (8, 20), 0, text_cell(lambda e: e.op), lambda e, now: e.text("op") or None, "what was asked for",
        ideal=lambda e, s: width(e.op), grows=(0,),
    ),
    Column(
        "target", "TARGET", "text", (14, 40), 1, text_cell(lambda e: e.target, "name"), lambda e, now: e.target or None,
        "of which node", ideal=lambda e, s: width(e.target), grows=(1,),
    ),
    Column(
        "result", "RESULT", "word", (8, 20), 0, _result, lambda e, now: e.result or None,
        "done, accepted, refused; void where it counts nowhere, ahead where it is yet to count",
        ideal=lambda e, s: width(e.result), grows=(2,),
    ),
    Column(
        "operator", "OPERATOR", "text", (10, 32), 2, text_cell(lambda e: e.operator), lambda e, now: e.operator or None,
        "who signed it", ideal=lambda e, s: width(e.operator), grows=(4,),
    ),
    Column(
        "signature", "SIGNATURE", "word", (12,), 3, _signature, lambda e, now: e.signature.lower(),
        "verified, NOT VERIFIED, or – where nothing signed is kept",
    ),
    Column(
        "reason", "REASON", "text", (16, 400), 3, text_cell(lambda e: e.reason, cut=shorten),
        lambda e, now: e.reason or None, "why", ideal=lambda e, s: width(e.reason), needs="reason", grows=(4,),
    ),
)  # fmt: skip


AUDIT_HIDDEN: tuple[Column[Entry], ...] = (
    hidden("op_id", "word", "the id of the op", lambda e, now: e.text("op_id") or None),
    hidden("id", "word", "the id of its target", lambda e, now: e.text("target") or None),
    hidden("by", "text", "the node that recorded it", lambda e, now: e.by_node or None),
    hidden("fingerprint", "word", "the key that signed it", lambda e, now: e.text("fingerprint") or None),
    hidden("verified", "flag", "whether its signature holds", lambda e, now: e.verified),
    hidden("trouble", "flag", "whether it did not take, or its signature doesn't hold", lambda e, now: e.bad),
)


def audit_facts(rows: list[Entry]) -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    return frozenset({"reason"} if any(entry.reason for entry in rows) else ())
