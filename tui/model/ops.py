"""Ops from the key press to their end, as the tray and the list of ops tell them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.spans import Line
from tui.model.text import clean, elide, width, wrap

RESULTS = ("done", "accepted", "failed", "refused", "unreachable", "unknown")
"""Every end. What an agent answers is never `failed`: so ends only what this console did itself."""
SHOWN_MS = 15_000
"""How long a good end stays in the tray. A bad one stays until the list of ops was opened."""


@dataclass
class OpEntry:
    """One op on one target."""

    verb: str
    key: str
    target: str
    name: str
    started: float
    stage: str = "not sent yet"
    result: str = ""
    state: str = ""
    reason: str = ""
    route: str = ""
    op_id: str = ""
    took_ms: float | None = None
    ended: float | None = None
    seen: bool = False

    @property
    def open(self) -> bool:
        return not self.result

    @property
    def good(self) -> bool:
        return self.result in ("done", "accepted")

    def finish(self, result: Mapping[str, Any], now: float) -> None:
        """Takes the result; anything that isn't one of the known ends is `unknown`, never a success."""
        word = clean(result.get("result"))
        self.result = word if word in RESULTS else "unknown"
        self.state = clean(result.get("state"))
        self.reason = clean(result.get("reason"))
        self.route = clean(result.get("route"))
        self.op_id = clean(result.get("op_id"))
        took = number(result.get("took_ms"))
        self.took_ms = (now - self.started) * 1000 if took is None else took
        self.ended = now

    def outcome(self, now: float) -> tuple[str, str]:
        """(text, role) of where it is."""
        if self.open:
            return f"{self.stage}, {ages.took((now - self.started) * 1000)}", "text"
        if self.good:
            parts = [self.result, self.state, ages.took(self.took_ms)]
            return ", ".join(part for part in parts if part) + (
                f": {self.reason}" if self.reason else ""
            ), "ok"
        said = self.reason or {"unreachable": "it did not get it", "refused": "no reason given"}.get(
            self.result, ""
        )
        if self.result == "unknown":
            said = "it may have arrived, no answer came back" + (f" ({self.reason})" if self.reason else "")
        return f"{self.result}: {said}", "error"


@dataclass
class OpBook:
    """All ops of a session, oldest first."""

    entries: list[OpEntry] = field(default_factory=list)

    def open_count(self) -> int:
        return sum(entry.open for entry in self.entries)

    def mark_seen(self) -> None:
        for entry in self.entries:
            entry.seen = entry.seen or not entry.open

    def current(self, now: float) -> list[OpEntry]:
        """What the tray shows: under way, just ended well, or ended badly and not looked at yet."""
        found = []
        for entry in self.entries:
            fresh = entry.ended is not None and (now - entry.ended) * 1000 < SHOWN_MS
            if entry.open or fresh or (not entry.good and not entry.seen):
                found.append(entry)
        return found

    def tray(self, now: float, cells: int, most: int) -> list[Line]:
        """The tray, at most `most` lines; reasons in full as far as the lines go, then how to read the rest."""
        entries = self.current(now)
        if not entries or most < 1:
            return []
        blocks = [self.describe(entry, now, cells) for entry in entries]
        if len(entries) > 3 or sum(map(len, blocks)) > most:
            ended = Counter(entry.result for entry in entries if entry.result)
            said = ", ".join(f"{ended[word]} {word}" for word in RESULTS if ended[word])
            head = f" ops  {sum(ended.values())} of {len(entries)} ended" + (f": {said}" if said else "")
            lines: list[Line] = [[(head, "text"), ("   o ", "key"), ("shows all", "soft")]]
            order = sorted(
                zip(entries, blocks, strict=True),
                key=lambda pair: 2 if pair[0].good else 1 if pair[0].open else 0,
            )
            for _, block in order:
                if len(lines) + len(block) <= most:
                    lines += block
            return lines
        return [line for block in blocks for line in block]

    def describe(self, entry: OpEntry, now: float, cells: int) -> list[Line]:
        """One op, wrapped: `X kill alpha.broker.52c9  done, left, 7 ms`."""
        text, role = entry.outcome(now)
        name = elide(entry.name, max(10, min(36, cells // 3)))
        lead = f"{entry.verb.replace('_', ' ')} {name}  "
        indent = 3 + width(lead)
        first: Line = [(f" {entry.key} ", "key"), (lead, "text")]
        rest = wrap(text, max(20, cells - indent - 1))
        lines: list[Line] = [[*first, (rest[0], role)]]
        lines += [[(" " * indent, "text"), (part, role)] for part in rest[1:]]
        return lines
