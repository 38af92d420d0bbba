"""Rows as aligned text. What comes from other machines is cleaned here, once, before it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from tui.model.ages import UNKNOWN, age, clock, countdown, number, rtt, share
from tui.model.glyphs import RANK, UNICODE
from tui.model.text import clean, pad, width

Row = Mapping[str, Any]

PAGE_CELLS = 100
"""Of the page of a node, on a terminal or not."""
STATE_COLOURS = {
    "joining": "cyan",
    "alive": "green",
    "degraded": "yellow",
    "updating": "cyan",
    "draining": "magenta",
    "leaving": "magenta",
    "dead": "red",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], colours: Sequence[str | None] = ()) -> str:
    """Aligned columns. A heading that ends in `>` aligns right; `colours` gives each row's second cell its colour."""
    rights = [text.endswith(">") for text in head]
    names = [text.rstrip(">") for text in head]
    body = [[clean(cell) for cell in row] for row in rows]
    widths = [max(width(line[i]) for line in [names, *body]) for i in range(len(names))]
    lines = [_line(names, widths, rights, None)]
    for at, row in enumerate(body):
        lines.append(_line(row, widths, rights, colours[at] if at < len(colours) else None))
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int], rights: Sequence[bool], colour: str | None) -> str:
    padded = [pad(cell, widths[i], rights[i]) for i, cell in enumerate(cells)]
    if colour:
        padded[1] = click.style(padded[1], fg=colour)
    return "  ".join(padded).rstrip()


def nodes_table(rows: Sequence[Row], me: str | None = None) -> str:
    """`qd nodes` for people: trouble first in each mesh, a dead node's evidence in the line below it."""
    ordered = sorted(rows, key=lambda r: (_text(r, "mesh"), RANK.get(_text(r, "state"), 0), _text(r, "name")))
    if not ordered:
        return "no nodes"
    text = table(
        ["NODE", "STATE", "FOR>", "KIND", "CPU>", "MEM>", "DISK>", "RTT>", "ADDR", "BUILD", "SEEN>"],
        [
            [
                _text(row, "name"),
                state_words(_text(row, "state")),
                age(number(row.get("since_ms"))),
                _text(row, "kind"),
                share(number(row.get("cpu"))),
                share(number(row.get("mem"))),
                share(number(row.get("disk"))),
                rtt(number(row.get("rtt_ms"))),
                _text(row, "addr") or UNKNOWN,
                build_words(row),
                age(number(row.get("last_seen_ms"))),
            ]
            for row in ordered
        ],
        [STATE_COLOURS.get(_text(row, "state")) for row in ordered],
    )
    head, *body = text.split("\n")
    lines = [head]
    for row, line in zip(ordered, body, strict=True):
        lines.append(line + ("  you" if me and row.get("id") == me else ""))
        if note := row_note(row):
            lines.append(f"    {note}")
    return "\n".join(lines)


def row_note(row: Row) -> str:
    """What a row's figures don't say: how a death is known, a reason, a deadline, a suspicion."""
    evidence = row.get("evidence")
    notes = []
    if isinstance(evidence, Mapping):
        notes.append(clean(evidence.get("text")) or clean(evidence.get("kind")))
    elif row.get("suspect"):
        notes.append("does not answer; being asked by others")
    if row.get("source") == "spawned":
        notes.append("started here; no word from it yet")
    if reason := clean(row.get("reason")):
        notes.append(reason)
    if row.get("cordoned") and row.get("state") != "draining":
        notes.append("cordoned")
    notes += _maintenance_notes(row)
    if row.get("incompatible"):
        notes.append("speaks another wire version: update the older side")
    return "; ".join(notes)


def _maintenance_notes(row: Row) -> list[str]:
    """Where its maintenance stands and what is left of its deadline; of a drain only the latter."""
    from tui.model.rows import Row as Whole

    stands = Whole(row, 0.0)
    notes = [stands.maintenance.replace("_", " ")] if stands.maintenance else []
    left = stands.left_ms(0.0)
    if left is not None and (notes or stands.state == "draining"):
        notes.append(f"{countdown(left)} left" if left > 0 else f"past its deadline by {age(-left)}")
    return notes


def view_table(lines: Sequence[Sequence[str]]) -> str:
    """A headless view: its titles, then its rows."""
    titles, *rows = lines
    return table(titles, rows) if rows else "nothing to show"


def state_words(state: str) -> str:
    """Glyph and word of a state."""
    return f"{UNICODE.state(state)} {state}" if state else UNKNOWN


def build_words(row: Row) -> str:
    """The build, short, and STALE where the answering node knows newer code on its disk."""
    build = _text(row, "build")[:12]
    if not build:
        return UNKNOWN
    return f"{build} STALE" if row.get("fresh") is False else build


def events_lines(events: Iterable[Row]) -> str:
    """`qd events` for people, a line an event, oldest first."""
    return "\n".join(map(event_line, events)) or "no events"


def event_line(event: Row) -> str:
    """One event: when, what, about whom, from where to where, and what is known about it."""
    from tui.model.events import Event

    kept = Event(event, 0)
    before, after = kept.move
    moved = f"{before or UNKNOWN} → {after or UNKNOWN}" if before or after else ""
    parts = [
        clock(kept.at_ms),
        pad(kept.kind, 19) if width(kept.kind) <= 19 else kept.kind,
        kept.node,
        moved,
        kept.story,
    ]
    return "  ".join(part for part in parts if part).rstrip()


def meshes_table(rows: Sequence[Row]) -> str:
    """`qd meshes` for people: the columns of the console's view, trouble first, what is wrong in the line below."""
    found, lines = _view("meshes", rows)
    if not found:
        return "no meshes"
    out = [lines[0]]
    for mesh, line in zip(found, lines[1:], strict=True):
        out.append(line)
        out += [f"    {note.advice}" for note in mesh.marks(0.0)]
        if reason := mesh.text("reason"):
            out.append(f"    {reason}")
    return "\n".join(out)


def daemons_table(rows: Sequence[Row]) -> str:
    """`qd daemons` for people: the columns of the console's view, trouble first, why in the line below."""
    return _explained("daemons", rows, lambda daemon: UNICODE.daemon(daemon.state)) or "no daemons"


def chains_table(rows: Sequence[Row]) -> str:
    """`qd chains` for people: the columns of the console's view, under-held first, what is on its way in the line below."""
    from tui.model.chains import chain_lead
    from tui.model.spans import plain
    from tui.model.table import Scene

    return (
        _explained("chains", rows, lambda chain: plain(chain_lead(chain, Scene())))
        or "no chains or artifacts"
    )


def _explained(name: str, rows: Sequence[Row], lead: Callable[[Any], str]) -> str:
    """The table of a view with a sign before each row, and below it what there is to say about it."""
    found, lines = _view(name, rows)
    out = [f"  {line}" for line in lines[:1]]
    for item, line in zip(found, lines[1:], strict=True):
        out.append(f"{lead(item)} {line}")
        if why := item.detail(0.0):
            out.append(f"      {why}")
    return "\n".join(out)


def failures_table(rows: Sequence[Row]) -> str:
    """`qd failures` for people: the columns of the console's view, newest first."""
    found, lines = _view("failures", rows)
    return "\n".join(lines) if found else "no failures"


def _view(name: str, rows: Sequence[Row]) -> tuple[list[Any], list[str]]:
    """The items of a view in its own order, and its table: a line of titles, then a line an item."""
    from tui.model.locator import Locator
    from tui.model.views import VIEWS

    spec = VIEWS[name]
    found = spec.select(rows, Locator(name))
    titles, cells = spec.cells(found)
    right = {column.title for column in spec.columns if column.right}
    heads = [f"{title}>" if title in right else title for title in titles]
    return found, table(heads, cells).split("\n") if found else []


def node_page(page: Row) -> str:
    """`qd node` for people: the page that the console shows, from the answer as it came."""
    from tui.model import page as model
    from tui.model.rows import Fleet
    from tui.model.spans import plain

    fleet = Fleet()
    fleet.fold({"full": True, "rows": [page.get("node")]}, 0.0)
    row = next(iter(fleet.rows.values()), None)
    if row is None:
        return "no node"
    lines = model.node_page(row, page, 0.0, "", fleet, 0.0, PAGE_CELLS)
    return "\n".join(plain(line).removeprefix(" ").rstrip() for line in lines)


def result_line(row: Row) -> str:
    """One op's end as a sentence: what was asked of whom, what came of it, why, and how long it took."""
    from tui.model.ages import took

    said = [_text(row, "result") or UNKNOWN]
    if state := _text(row, "state"):
        said.append(state)
    if (ms := number(row.get("took_ms"))) is not None:
        said.append(took(ms))
    if route := _text(row, "route"):
        said.append(route)
    line = f"{_text(row, 'op')} {_text(row, 'target')}: {', '.join(said)}"
    return f"{line}: {_text(row, 'reason')}" if _text(row, "reason") else line


def _text(row: Row, key: str) -> str:
    return clean(row.get(key))
