"""The fleet as it was at a moment: states, and for how long, as far as the kept events tell; loads where the chains do.

Events stand in the order in which one node learnt of them, and that order counts, not their clocks. Before the first event
of a node its state is the one that its next event says it came from. A state that it is in now, and that began before the
moment and after what the events tell, was there. Else nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tui.model import ages
from tui.model.events import Event
from tui.model.glyphs import RANK, STATES, UNICODE, Glyphs
from tui.model.loads import Load
from tui.model.spans import Line, line_width
from tui.model.text import elide, pad, width, wrap

MOMENTS = frozenset({"node.joined", "node.changed", "node.state_changed", "node.evicted", "mesh.expired"})
"""Kinds that change what the fleet looks like."""
GONE = frozenset({"dead", "leaving"})
"""States in which a node has no load: what it recorded before is of another time."""
SLACK_MS = 1_000
"""By so much at least a state must have begun before a moment to have been there: ages come rounded and late."""


@dataclass(frozen=True)
class Then:
    """A node at a moment. `state` is empty where no kept event tells it; `for_ms` None where its beginning isn't kept."""

    id: str
    name: str
    mesh: str
    state: str
    for_ms: float | None


@dataclass(frozen=True)
class Now:
    """A node as it is in view now; `began_ms`: when it came into its state, by the clock of who tells the events."""

    name: str
    mesh: str
    state: str
    began_ms: float | None


def is_moment(event: Event) -> bool:
    """Whether the fleet looks different after it."""
    return event.kind in MOMENTS and (bool(event.to_state) or event.kind in ("node.evicted", "mesh.expired"))


def fleet_then(
    events: Sequence[Event], key: int, live: Mapping[str, Now] = {}
) -> tuple[list[Then], float | None]:
    """The nodes that were in view right after the event numbered `key`, trouble first, and its time.

    `live`: those in view now, by id; one that no event tells of was there.
    """
    names = {node: (now.name, now.mesh) for node, now in live.items()}
    at: dict[str, tuple[str, float | None]] = {}
    gone: set[str] = set()
    moment: float | None = None
    later: list[Event] = []
    for event in events:
        if event.node_id:
            names[event.node_id] = (event.node or event.node_id, event.mesh)
        if event.key > key:
            later.append(event)
            continue
        moment = event.at_ms
        if event.kind == "mesh.expired":
            at |= {node: ("", None) for node in at if names[node][1] == event.mesh}
        elif event.kind == "node.evicted" and event.node_id:
            at.pop(event.node_id, None)
            gone.add(event.node_id)
        elif event.node_id and event.to_state:
            at[event.node_id] = (event.to_state, event.at_ms)
            gone.discard(event.node_id)
    for event in later:
        node = event.node_id
        if node and node not in at and node not in gone:
            if event.kind == "node.joined" or event.kind == "node.ready":
                gone.add(node)
            elif event.to_state or event.kind == "node.evicted":
                came = event.text("from")
                at[node] = (came if came in RANK else "", None)
    for node, now in live.items():
        if node in gone:
            continue
        state, since = at.setdefault(node, ("", None))
        if now.began_ms is None or moment is None or now.began_ms + SLACK_MS > moment:
            continue
        if not state or (since is not None and since + SLACK_MS <= now.began_ms):
            at[node] = (
                now.state,
                now.began_ms,
            )  # that it came into it was not told: who tells began anew meanwhile
    found = [
        Then(node, *names[node], state, None if since is None or moment is None else max(0.0, moment - since))
        for node, (state, since) in at.items()
    ]
    return sorted(found, key=lambda then: (RANK.get(then.state, len(RANK)), then.name, then.id)), moment


def counts_then(found: Iterable[Then], glyphs: Glyphs = UNICODE) -> Line:
    """`●5 ◐1 –2`, what is well first; the unknown last."""
    held = [then.state for then in found]
    out: Line = []
    for state in (*reversed(STATES), ""):
        if count := held.count(state):
            out += [
                (f"{glyphs.state(state) if state else ages.UNKNOWN}{count}", state or "soft"),
                (" ", "text"),
            ]
    return out[:-1]


def past_lines(
    found: Sequence[Then], moment: float | None, teller: str, cells: int, room: int, glyphs: Glyphs = UNICODE,
    loads: Mapping[str, Load] = {}, standing: str = "",
) -> list[Line]:  # fmt: skip
    """The fleet at that moment in at most `room` lines: whose memory it is, the counts, and a line a node. `loads`: what was
    recorded near it, by node id, and `standing` says about them; a node that was dead or gone has none."""
    said = f" as of {ages.clock(moment)}, from events kept by {teller}"
    lines: list[Line] = [[(elide(said, cells - 1, glyphs.ellipsis), "title")]]
    counts = counts_then(found, glyphs)
    left: Line = [(" ", "text"), *counts]
    lines.append(
        [*left, (f"  {elide(standing, max(0, cells - line_width(left) - 3), glyphs.ellipsis)}", "soft")]
    )
    widest = max((width(then.name) for then in found), default=0)
    columns = _columns(cells, widest)
    name_cells = min(widest, max(12, cells - FIXED_CELLS - sum(2 + wide for _, wide in columns)))
    if room > 5:
        head = f"   {pad('NODE', name_cells)}  {pad('STATE', 9)}  {'FOR':>4}"
        lines.append([(head + "".join(f"  {title:>{wide}}" for title, wide in columns), "head")])
    most = max(0, room - len(lines) - (len(found) > room - len(lines)))
    for then in found[:most]:
        sign = glyphs.state(then.state) if then.state else ages.UNKNOWN
        load = loads.get(then.id) if then.state not in GONE else None
        figures = _figures(load)
        lines.append(
            [
                (f" {sign} ", then.state or "soft"),
                (pad(elide(then.name, name_cells, glyphs.ellipsis), name_cells), "name"),
                (f"  {pad(then.state or ages.UNKNOWN, 9)}", then.state or "soft"),
                (f"  {ages.age(then.for_ms):>4}", "text"),
                *((f"  {figures[title]:>{wide}}", "text" if load else "soft") for title, wide in columns),
            ]
        )
    if len(found) > most:
        lines.append([(f"   and {len(found) - most} more", "soft")])
    elif copied := copies(found, loads):
        lines += [[(f" {part}", "soft")] for part in wrap(copied, cells - 2)][: room - len(lines)]
    return lines


def copies(found: Iterable[Then], loads: Mapping[str, Load]) -> str:
    """Whose loads come from a copy of their chain, and who holds it; empty when all are the nodes' own word."""
    told = [
        (then.name, load.holder)
        for then in found
        if then.state not in GONE and (load := loads.get(then.id)) and load.holder
    ]
    if not told:
        return ""
    holders = ", ".join(sorted({holder for _, holder in told}))
    chain = "its chain" if len(told) == 1 else "their chains"
    return f"from a copy of {chain} on {holders}: {', '.join(sorted(name for name, _ in told))}"


COLUMNS = (("CPU", 4), ("MEM", 4), ("DISK", 4), ("DMN", 5), ("AGE", 4))
"""Of a load: daemons as running/total, and how long before the moment it was recorded."""
LEAVE = ("DISK", "DMN")
"""Columns that leave where names would be cut, the first first."""
FIXED_CELLS = 20
"""Of a line besides name and load."""


def _columns(cells: int, name_cells: int) -> list[tuple[str, int]]:
    left = list(COLUMNS)
    for title in LEAVE:
        if FIXED_CELLS + name_cells + sum(2 + wide for _, wide in left) > cells:
            left = [column for column in left if column[0] != title]
    return left


def _figures(load: Load | None) -> dict[str, str]:
    if load is None:
        return {title: ages.UNKNOWN for title, _ in COLUMNS}
    shares = {"CPU": load.cpu, "MEM": load.mem, "DISK": load.disk}
    running = ages.UNKNOWN if load.running is None else load.running
    daemons = ages.UNKNOWN if load.total is None else f"{running}/{load.total}"
    told = {title: ages.share(value) for title, value in shares.items()}
    return {**told, "DMN": daemons, "AGE": ages.age(load.age_ms)}
