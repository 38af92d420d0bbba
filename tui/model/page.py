"""Everything about one node as lines: the pane beside the fleet, and its page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tui.model import ages, node_sections
from tui.model.ages import number
from tui.model.columns import detail, load_role
from tui.model.daemons import amounts
from tui.model.events import Event
from tui.model.glyphs import UNICODE, Glyphs, bar, spark
from tui.model.rows import Fleet, Row, marks
from tui.model.spans import Line
from tui.model.text import clean, elide, pad, shorten, width, wrap

LABEL = 12
_ELSEWHERE = ("lease.", "mesh.")
"""Kinds of events that say nothing about why a node is in its state."""


def fact(label: str, value: str, cells: int, role: str = "text") -> list[Line]:
    """A labelled value, wrapped; `–` where it is empty."""
    parts = wrap(value or ages.UNKNOWN, max(8, cells - LABEL - 2))
    lines: list[Line] = [[(" " + pad(label, LABEL), "soft"), (parts[0], role)]]
    lines += [[(" " * (LABEL + 1), "text"), (part, role)] for part in parts[1:]]
    return lines


def section(title: str, cells: int, glyphs: Glyphs) -> Line:
    """The line over a section."""
    said = f" {title} "
    return [(said, "title"), (glyphs.rule * max(0, cells - width(said) - 1), "frame")]


def head(row: Row, fleet: Fleet, now: float, cells: int, glyphs: Glyphs) -> list[Line]:
    """Name, state with its age, and the line that explains it."""
    state = f"{row.state or 'unknown'} {ages.age(row.since_ms(now))}"
    lines: list[Line] = [
        [(" ", "text"), (elide(row.name, cells - 2, glyphs.ellipsis), "title")],
        [(f" {glyphs.state(row.state)} {state}", row.state), (f"   {row.kind} of {row.mesh}", "text")],
    ]
    why = detail(row, now, fleet.mesh_of(row))
    lines += [[(f"   {part}", "text")] for part in wrap(why, cells - 4)] if why else []
    for word, role, advice in marks(row, fleet.my_id, fleet.directory.holders, glyphs.lease):
        rest = wrap(advice, cells - len(word) - 4)
        lines.append([(f" {word}", role), (f"  {rest[0]}", "text")])
        lines += [[(" " * (len(word) + 3), "text"), (part, "text")] for part in rest[1:]]
    return lines


def gauge(label: str, value: float | None, room: int, glyphs: Glyphs) -> Line:
    """A load as a bar of `room` cells and a figure."""
    filled, rest = bar(value, room, glyphs)
    role = "track" if value is None else "spark"
    figure = (f" {ages.share(value):>4}", load_role(value))
    return [(" " + pad(label, LABEL), "soft"), (filled, role), (rest, "track"), figure]


def vitals(row: Row, now: float, cells: int, glyphs: Glyphs) -> list[Line]:
    """Loads as bars, and the history of the processor; dimmed when old."""
    gone = row.state == "dead"
    lines: list[Line] = []
    room = max(6, min(30, cells - LABEL - 9))
    for key, label in (("cpu", "cpu"), ("mem", "memory"), ("disk", "disk")):
        lines.append(gauge(label, None if gone else row.figure(key), room, glyphs))
    count = len(row.history)
    per_cell = max(1, -(-count // max(1, cells - 2)))
    trend = spark(row.history, -(-count // per_cell), glyphs)
    if trend.strip():
        lines += [
            [(f" {trend}", "spark")],
            [(f" cpu, {count} sample{'s' * (count != 1)}, newest right", "soft")],
        ]
    return [[(text, "dim") for text, _ in line] for line in lines] if row.late(now) else lines


def facts(row: Row, fleet: Fleet, now: float, cells: int) -> list[Line]:
    """What the row says, a line each; of a node of another mesh also who tells of it, and how it is reached."""
    lines: list[Line] = []
    age = row.age_ms(now)
    late = f", older than 3 periods of {ages.age(row.period_ms)}" if row.late(now) else ""
    lines += fact(
        "news", f"{ages.age(age)} old{late}" if age is not None else "", cells, "hot" if late else "text"
    )
    if row.remote:
        lines += fact("round trip", f"{ages.UNKNOWN}, not measured: it is in another mesh", cells)
        mesh = fleet.mesh_of(row)
        by = mesh.publisher if mesh else ""
        lines += fact("reached", f"{mesh.path()} to its publisher" if mesh and mesh.path() else "", cells)
        lines += fact("known by", f"the directory of {row.mesh}, published by {by or 'nobody now'}", cells)
    else:
        lines += fact("round trip", ages.rtt(None if row.state == "dead" else row.figure("rtt_ms")), cells)
        lines += fact("known by", row.text("source"), cells)
    lines += fact("address", row.text("addr"), cells)
    lines += fact("id", row.id, cells)
    judged = row.data.get("fresh")
    fresh = "fresh" if judged is True else "stale" if judged is False else "freshness not known"
    lines += fact(
        "build", f"{row.text('build') or ages.UNKNOWN}, {fresh}", cells, "hot" if row.stale else "text"
    )
    numbers = [(word, row.figure(word)) for word in ("incarnation", "wire")]
    version = ", ".join(f"{word} {figure:.0f}" for word, figure in numbers if figure is not None)
    lines += fact("version", version, cells)
    if row.daemons is not None:
        running, total = row.daemons
        lines += fact("daemons", f"{running} of {total} running" if total else "none", cells)
    lines += fact("capacity", amounts(row.data.get("capacity")), cells)
    failures = row.figure("failures")
    lines += fact("failures", ages.UNKNOWN if failures is None else f"{failures:.0f}", cells)
    if row.text("maintenance") not in ("", "active"):
        lines += fact("maintenance", row.text("maintenance").replace("_", " "), cells)
    if row.tags:
        lines += fact("tags", " ".join(f"{k}={v}" for k, v in sorted(row.tags.items())), cells)
    return lines


def history(events: Iterable[Event], cells: int, glyphs: Glyphs, wall_ms: float | None = None) -> list[Line]:
    """Events as lines, the newest last."""
    lines: list[Line] = []
    for event in events:
        old, new = event.move
        line: Line = [(f" {ages.clock(event.at_ms)} ", "soft")]
        if new:
            line += [(f"{glyphs.state(new)} {new}", new)]
            line += [(f" from {old}", "text")] if old else []
        else:
            line += [(event.kind, event.role if event.role == "hot" else "text")]
        room = cells - sum(width(text) for text, _ in line) - 3
        if event.story and room > 10:
            line.append((f"  {shorten(event.story, room, glyphs.ellipsis)}", "text"))
        lines.append(line)
    return lines


def pane(row: Row, fleet: Fleet, now: float, cells: int, glyphs: Glyphs = UNICODE) -> list[Line]:
    """The pane beside the fleet: what the view holds about one node, nothing asked for."""
    lines = head(row, fleet, now, cells, glyphs)
    lines += [[], *vitals(row, now, cells, glyphs), [], *facts(row, fleet, now, cells)]
    about = [e for e in fleet.events.about(row.id, 12) if not e.kind.startswith(_ELSEWHERE)][-8:]
    lines += [[], section("what led here", cells, glyphs)]
    return lines + (history(about, cells, glyphs) or [[(" no event about it is held here", "soft")]])


def node_page(
    row: Row | None, doc: Mapping[str, Any] | None, doc_age_ms: float | None, error: str, fleet: Fleet, now: float,
    cells: int, glyphs: Glyphs = UNICODE,
) -> list[Line]:  # fmt: skip
    """The page of a node: its row, live, and the document that was asked for, with its age. What is under way and what
    waits comes first; where there is room, what the node is stands beside what happens to it."""
    if row is None:
        return [
            [],
            [(" This node is no longer in the view: it said goodbye, or its row has expired.", "text")],
            [(" Esc", "key"), (" goes back; Events tells what became of it", "soft")],
        ]
    told = doc or {}
    top = head(row, fleet, now, cells, glyphs) + node_sections.backpressure(told, cells)
    if error:
        top += [[], [(f" {shorten(error, cells - 2)}", "error")], [(" F5", "key"), (" asks again", "soft")]]
    elif doc is None:
        top += [[], [(" asking for the rest…", "soft")]]
    beside = cells >= BESIDE
    left_cells = BESIDE_LEFT if beside else cells
    right_cells = cells - left_cells - 2 if beside else cells
    passed_ms = doc_age_ms or 0.0
    here, rest = _told_sections(row, told, passed_ms, right_cells, glyphs, doc is not None)
    why = [Event(event, at) for at, event in enumerate(_maps(told.get("why")))]
    about = [e for e in why or fleet.events.about(row.id, 12) if not e.kind.startswith(_ELSEWHERE)]
    led = history(about, right_cells, glyphs) or [[(" no event about it is held", "soft")]]
    here += [[], section("why it is in this state", right_cells, glyphs), *led]
    what = [[], section("vitals", left_cells, glyphs), *vitals(row, now, left_cells, glyphs)]
    what += [[], section("facts", left_cells, glyphs), *facts(row, fleet, now, left_cells)]
    if doc is not None:
        what += _standing(row, told, passed_ms, left_cells)
    if beside:
        return top + side_by_side(what, here + rest, left_cells)
    return top + here + what + rest


BESIDE, BESIDE_LEFT = 130, 58
"""From this width on a page has two columns, the left one this wide."""


def side_by_side(left: list[Line], right: list[Line], left_cells: int) -> list[Line]:
    """Two columns of lines as one."""
    lines: list[Line] = []
    for at in range(max(len(left), len(right))):
        line = list(left[at]) if at < len(left) else []
        blank = left_cells + 2 - sum(width(text) for text, _ in line)
        lines.append([*line, (" " * blank, "text"), *right[at]] if at < len(right) and right[at] else line)
    return lines


def _standing(row: Row, told: Mapping[str, Any], passed_ms: float, cells: int) -> list[Line]:
    """Who told the document, how old it is, and what of it is as it should be, in a line each."""
    by = clean(told.get("told_by")) or clean(told.get("answered_by")) or ages.UNKNOWN
    age = ages.age((number(told.get("age_ms")) or 0.0) + passed_ms)
    itself = by == row.name
    last = told.get("last_vitals")
    if last is not None:
        lines = fact("told by", f"the replica of its chain on {by}, {age} old", cells)
        loads = [
            f"{label} {ages.share(number(last.get(key)))}"
            for key, label in (("cpu", "cpu"), ("mem", "memory"), ("disk", "disk"))
            if isinstance(last, Mapping) and number(last.get(key)) is not None
        ]
        at = ages.clock(number(last.get("at_ms"))) if isinstance(last, Mapping) else ages.UNKNOWN
        return lines + fact("last loads", f"{', '.join(loads)}, recorded at {at}" if loads else "", cells)
    lines = fact(
        "told by",
        f"the node itself, {age} old" if itself else f"{by}, {age} old: the node itself was not heard",
        cells,
    )
    if not itself:
        return lines
    wanted = (
        "nothing more than is held back" if told.get("held_back") else "nothing: what is, is what should be"
    )
    quiet = (
        ("maintenance", node_sections.maintenance(told, passed_ms, cells), "active: neither drained nor in maintenance"),
        ("wants", told.get("wants"), wanted),
        ("held back", told.get("held_back"), "nothing"),
        ("replicas", told.get("replicas"), "none"),
        ("avoids", told.get("avoid_list"), "nobody"),
        ("failed", told.get("recent_failures"), "nothing lately"),
    )  # fmt: skip
    for label, content, none in quiet:
        lines += [] if content else fact(label, none, cells)
    return lines


def _told_sections(
    row: Row, told: Mapping[str, Any], passed_ms: float, cells: int, glyphs: Glyphs, known: bool
) -> tuple[list[Line], list[Line]]:
    """What the document tells, in sections of what there is: what is under way, and then the rest."""
    if not known:
        return [], []
    first = (
        ("maintenance", node_sections.maintenance(told, passed_ms, cells)),
        ("what it wants next", node_sections.wants(told, passed_ms, cells)),
        ("held back by", node_sections.held_back(told, passed_ms, cells)),
        ("daemons", node_sections.daemons(told, passed_ms, cells, glyphs)),
    )
    emitted = told.get("recently_emitted")
    then = (
        ("recent failures", node_sections.failures(told, passed_ms, cells, glyphs)),
        ("replicas", node_sections.replicas(told, cells, glyphs)),
        ("avoid list", _items(told.get("avoid_list"), cells)),
        ("recently emitted", _items(emitted, cells) if emitted != told.get("wants") else []),
        ("peers", node_sections.peers(told, cells, glyphs)),
        ("stats", node_sections.stats(told, cells)),
        ("refused or dropped", _items(told.get("counters"), cells)),
    )
    old = number(told.get("age_ms")) if "last_vitals" in told else None
    ago = "" if old is None else f", as of {ages.age(old + passed_ms)} ago"
    here, rest = (
        [
            line
            for title, content in made
            if content
            for line in ([], section(title + ago, cells, glyphs), *content)
        ]
        for made in (first, then)
    )
    return here, rest


def _maps(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _items(value: object, cells: int) -> list[Line]:
    """A section's content: a line an item, or a line a figure."""
    lines: list[Line] = []
    if isinstance(value, Mapping):
        wide = min(28, max((width(clean(key)) for key in value), default=0))
        for key, given in value.items():
            lines.append(
                [
                    (" " + pad(clean(key), wide) + "  ", "soft"),
                    (shorten(_scalar(key, given), cells - wide - 4), "text"),
                ]
            )
        return lines
    if not isinstance(value, list):
        return []
    for item in value[-50:]:
        if isinstance(item, Mapping):
            text = "  ".join(
                f"{clean(key)} {_scalar(key, given)}"
                for key, given in item.items()
                if given not in (None, "", [], {})
            )
        else:
            text = clean(item)
        lines += [
            [(" " if not at else "   ", "text"), (part, "text")]
            for at, part in enumerate(wrap(text, cells - 4))
        ]
    return lines


def _scalar(key: object, value: object) -> str:
    """A value of a document as people read it: milliseconds as ages, the rest as it is."""
    figure = number(value)
    if figure is not None and str(key) in ("at_ms", "emitted_at_ms"):
        return ages.clock(figure)
    if figure is not None and str(key).endswith("rtt_ms"):
        return ages.rtt(figure)
    if figure is not None and str(key).endswith("_ms"):
        return ages.took(figure) if figure < 10_000 else ages.age(figure)
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k)} {_scalar(k, v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_scalar("", part) for part in value)
    return ages.UNKNOWN if value is None else clean(value)
