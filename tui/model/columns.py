"""The columns of the fleet and of the events: what each shows, filters by, sorts by, and when it leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tui.model import ages
from tui.model.events import Event
from tui.model.glyphs import bar, spark
from tui.model.locator import Kind, Value
from tui.model.meshes import MeshRow
from tui.model.rows import Row, marks
from tui.model.spans import Line
from tui.model.table import Column, Scene, hidden
from tui.model.text import elide, pad, shorten, width

RowCell = Callable[[Row, Scene, int], Line]
RowValue = Callable[[Row, float], Value]

HOT = 0.9
"""From this share on a load is drawn in the warning colour."""


def load_role(value: float | None) -> str:
    """The role of a load figure."""
    return "soft" if value is None else "hot" if value >= HOT else "text"


def _name(row: Row, scene: Scene, cells: int) -> Line:
    return [(elide(row.name, cells, scene.glyphs.ellipsis), "name")]


def _state(row: Row, scene: Scene, cells: int) -> Line:
    age = ages.age(row.since_ms(scene.now))
    word = row.state or "unknown"
    if cells < 14:
        return [(elide(word, cells), row.state)]
    return [(pad(word, 9), row.state), (age.rjust(5), "text")]


def _cpu(row: Row, scene: Scene, cells: int) -> Line:
    cpu = row.figure("cpu") if row.state != "dead" else None
    figure: Line = [(ages.share(cpu).rjust(4), load_role(cpu))]
    if cells < 13:
        return figure
    trend_cells = cells - 5
    out: Line = []
    if cells >= 24:
        filled, rest = bar(cpu, 9, scene.glyphs)
        out = [(filled, row.state if cpu is not None else "track"), (rest, "track"), (" ", "text")]
        trend_cells -= 10
    if cpu is None and row.state == "dead":
        return [(" " * (cells - 4), "text"), *figure]
    return [*out, (spark(row.history, trend_cells, scene.glyphs), "spark"), (" ", "text"), *figure]


def _share(key: str) -> tuple[RowCell, RowValue]:
    def cell(row: Row, scene: Scene, cells: int) -> Line:
        value = row.figure(key) if row.state != "dead" else None
        return [(ages.share(value), load_role(value))]

    return cell, lambda row, now: row.figure(key)


def _rtt(row: Row, scene: Scene, cells: int) -> Line:
    value = row.figure("rtt_ms") if row.state != "dead" else None
    return [(ages.rtt(value), "soft" if value is None else "text")]


def _daemons(row: Row, scene: Scene, cells: int) -> Line:
    if row.daemons is None:
        return [(ages.UNKNOWN, "soft")]
    running, total = row.daemons
    return [(f"{running}/{total}", "text" if running == total else "hot")]


def _failures(row: Row, scene: Scene, cells: int) -> Line:
    value = row.figure("failures")
    return [(ages.UNKNOWN if value is None else f"{value:.0f}", "hot" if value else "text")]


def _age(row: Row, scene: Scene, cells: int) -> Line:
    return [(ages.age(row.age_ms(scene.now)), "text")]


def _notes(row: Row, scene: Scene, cells: int) -> Line:
    out: Line = []
    room = cells
    for word, role, _ in marks(row, scene.me, scene.holders, scene.glyphs.lease):
        if len(word) + (1 if out else 0) > room and word.startswith(scene.glyphs.lease):
            word = scene.glyphs.lease
        size = len(word) + (1 if out else 0)
        if size > room:
            continue
        if out:
            out.append((" ", "text"))
        out.append((word, role))
        room -= size
    return out


def _notes_ideal(row: Row, scene: Scene) -> int:
    return sum(len(word) + 1 for word, _, _ in marks(row, scene.me, scene.holders)) - 1


_SHORT = {"entering_maintenance": "entering", "exiting_maintenance": "exiting", "drain_failed": "failed"}


def _maintenance(row: Row, scene: Scene, cells: int) -> Line:
    word = row.maintenance.replace("_", " ")
    left = row.left_ms(scene.now)
    count = f" {ages.countdown(left)}" if left is not None and left > 0 else ""
    if width(word) > cells - len(count):
        word = _SHORT.get(row.maintenance, word)
    role = "dead" if row.maintenance == "drain_failed" else "draining"
    return [(elide(word, cells - len(count), scene.glyphs.ellipsis) + count, role)] if word else []


def _text(key: str, role: str = "text") -> tuple[RowCell, RowValue]:
    def cell(row: Row, scene: Scene, cells: int) -> Line:
        value = row.text(key)
        return [(elide(value, cells, scene.glyphs.ellipsis) if value else ages.UNKNOWN, role)]

    return cell, lambda row, now: row.text(key) or None


def _plain(
    key: str,
    title: str,
    kind: Kind,
    widths: tuple[int, ...],
    priority: int,
    about: str,
    needs: str = "",
    fit: bool = False,
) -> Column[Row]:
    cell, value = _text(key)
    ideal: Callable[[Row, Scene], int] | None = (lambda row, scene: width(row.text(key))) if fit else None
    return Column(key, title, kind, widths, priority, cell, value, about, needs=needs, ideal=ideal)


def _load(key: str, title: str, priority: int, about: str) -> Column[Row]:
    cell, value = _share(key)
    return Column(key, title, "share", (4,), priority, cell, value, about, right=True)


FLEET: tuple[Column[Row], ...] = (
    Column(
        "name", "NODE", "text", (14, 40), 0, _name, lambda r, now: r.name, "the node's name",
        ideal=lambda r, s: width(r.name), grows=(3,),
    ),
    _plain("kind", "KIND", "word", (8,), 6, "gateway, broker, compute, registry, console, …"),
    _plain("mesh", "MESH", "word", (5, 16), 6, "the mesh it is in", "meshes", True),
    Column("state", "STATE", "word", (14,), 0, _state, lambda r, now: r.state, "its state, and for how long"),
    Column(
        "cpu", "CPU", "share", (4, 13, 24, 36), 1, _cpu, lambda r, now: r.figure("cpu"),
        "processor load of its host, with the last 60 samples", right=True, grows=(3, 7, 8),
    ),
    _load("mem", "MEM", 3, "memory in use on its host"),
    _load("disk", "DISK", 7, "disk in use on its host"),
    Column(
        "rtt", "RTT", "number", (5,), 5, _rtt, lambda r, now: r.figure("rtt_ms"),
        "round-trip time from the node you are attached to, milliseconds", right=True,
    ),
    Column(
        "daemons", "DMN", "number", (5,), 4, _daemons, lambda r, now: None if r.daemons is None else r.daemons[0],
        "daemons running / total", right=True, needs="daemons",
    ),
    Column(
        "failures", "FAIL", "number", (4,), 4, _failures, lambda r, now: r.figure("failures"),
        "failures in its ring", right=True, needs="failures",
    ),
    Column(
        "maintenance", "MAINTENANCE", "word", (13, 26), 5, _maintenance, lambda r, now: r.text("maintenance"),
        "maintenance state with its countdown", needs="maintenance",
    ),
    _plain("build", "BUILD", "word", (12,), 8, "the code it runs"),
    _plain("addr", "ADDRESS", "text", (15, 24), 9, "where it answers", fit=True),
    Column(
        "age", "AGE", "duration", (4,), 1, _age, lambda r, now: r.age_ms(now),
        "since there was news of it", right=True,
    ),
    Column(
        "notes", "", "text", (5, 30), 2, _notes, lambda r, now: " ".join(w for w, _, _ in marks(r)) or None,
        "STALE, suspect, cordoned, INCOMPATIBLE, CLOCK, who holds a lease, you", ideal=_notes_ideal, needs="notes",
    ),
)  # fmt: skip


FLEET_HIDDEN: tuple[Column[Row], ...] = (
    hidden("id", "word", "its id", lambda r, now: r.id),
    hidden("node", "text", "the node's name", lambda r, now: r.name),
    hidden("since", "duration", "how long it has been in its state", lambda r, now: r.since_ms(now)),
    hidden("fresh", "flag", "whether it runs the code on its disk", lambda r, now: r.data.get("fresh")),
    hidden("stale", "flag", "whether it runs older code than is on its disk", lambda r, now: r.stale),
    hidden("suspect", "flag", "whether it is being checked", lambda r, now: r.flag("suspect")),
    hidden("cordoned", "flag", "whether it takes no new work", lambda r, now: r.flag("cordoned")),
    hidden("source", "word", "how it is known", lambda r, now: r.text("source") or None),
    hidden("expired", "flag", "whether its mesh has expired", lambda r, now: r.expired),
    hidden("evidence", "word", "how a death is known: exited, silent", lambda r, now: r.evidence[0] or None),
    hidden("reason", "text", "why it is in its state", lambda r, now: r.reason or None),
    hidden("wire", "number", "its wire version", lambda r, now: r.figure("wire")),
    hidden("incarnation", "number", "its incarnation", lambda r, now: r.figure("incarnation")),
)


def fleet_facts(rows: list[Row], me: str = "", holders: Collection[str] = ()) -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    facts = {"meshes"} if len({row.mesh for row in rows}) > 1 else set()
    tests: dict[str, Callable[[Row], object]] = {
        "daemons": lambda row: row.daemons and row.daemons[1],
        "failures": lambda row: row.figure("failures"),
        "maintenance": lambda row: row.data.get("maintenance") not in (None, "", "active"),
        "notes": lambda row: marks(row, me, holders),
    }
    facts |= {fact for fact, test in tests.items() if any(map(test, rows))}
    return frozenset(facts)


def detail(row: Row, now: float, mesh: MeshRow | None = None) -> str:
    """The second line of a row that needs explaining; empty for one that doesn't. `mesh`: the one it is in, if known."""
    if row.expired and mesh is not None and mesh.expired:
        return mesh.expiry(now)
    if row.state == "dead":
        return row.reason or "no longer there; how is not known"
    stands = row.maintenance.replace("_", " ")
    if row.state == "degraded":
        cordoned = "cordoned: takes nothing new" if row.flag("cordoned") and not stands else ""
        return "; ".join(part for part in (row.reason, stands, cordoned) if part)
    if row.state in ("draining", "updating") or row.maintenance:
        said = row.reason if stands in row.reason else ": ".join(filter(None, (stands, row.reason)))
        head, _, rest = said.partition(": ")
        running = row.daemons[0] if row.daemons else 0
        if running and row.state == "draining" and "daemon" not in rest:
            rest = ", ".join(filter(None, (rest, f"{running} daemon{'s' * (running != 1)} to stop")))
        left = row.left_ms(now)
        count = ""
        if left is not None:  # before what may have to be cut
            count = f"{ages.countdown(left)} left" if left > 0 else f"past its deadline by {ages.age(-left)}"
        return ": ".join(filter(None, (", ".join(filter(None, (head, count))), rest)))
    return "cordoned: takes nothing new" if row.flag("cordoned") else ""


def row_height(row: Row) -> int:
    """Lines of a row: two when it has a `detail`."""
    if row.rank >= 4 and not row.expired and not row.maintenance and not row.flag("cordoned"):
        return 1
    return 2 if detail(row, row.received) else 1


def _event_node(event: Event, scene: Scene, cells: int) -> Line:
    return [(elide(event.node, cells, scene.glyphs.ellipsis), "name")] if event.node else []


def _event_mesh(event: Event, scene: Scene, cells: int) -> Line:
    return [(elide(event.mesh, cells, scene.glyphs.ellipsis), "text")] if event.mesh else []


def _move(event: Event, scene: Scene, cells: int) -> Line:
    old, new = event.move
    if not new:
        return []
    if old and cells >= 19:
        return [(f"{elide(old, 8)} {scene.glyphs.arrow} ", "soft"), (elide(new, 8), new)]
    return [(elide(new, cells), new)]


def _when(event: Event, scene: Scene, cells: int) -> Line:
    return [(ages.clock(event.at_ms), "text")]


def _story(event: Event, scene: Scene, cells: int) -> Line:
    return [(shorten(event.story, cells, scene.glyphs.ellipsis), "text")]


def _kind(event: Event, scene: Scene, cells: int) -> Line:
    role = event.role if event.role == "hot" else "text"
    return [(elide(event.kind, cells, scene.glyphs.ellipsis), role)]


EVENTS: tuple[Column[Event], ...] = (
    Column("time", "TIME", "number", (8,), 0, _when, lambda e, now: e.at_ms, "when, by the clock of the node that tells it"),
    Column(
        "kind", "EVENT", "text", (16, 20), 0, _kind, lambda e, now: e.kind, "what happened",
        ideal=lambda e, s: width(e.kind), grows=(4,),
    ),
    Column(
        "node", "NODE", "text", (15, 32), 1, _event_node, lambda e, now: e.node or None, "to which node",
        ideal=lambda e, s: width(e.node), grows=(3,),
    ),
    Column(
        "mesh", "MESH", "word", (5, 16), 6, _event_mesh, lambda e, now: e.mesh or None, "in which mesh",
        ideal=lambda e, s: width(e.mesh), needs="meshes",
    ),
    Column(
        "to", "STATE", "word", (8, 19), 2, _move, lambda e, now: e.text("to") or None, "from which state to which",
        grows=(5,),
    ),
    Column(
        "story", "", "text", (16, 400), 2, _story, lambda e, now: e.story or None, "source, reason, by whom",
        ideal=lambda e, s: width(e.story), grows=(4,),
    ),
)  # fmt: skip


def _event_hidden(key: str, kind: Kind, about: str) -> Column[Event]:
    def value(event: Event, now: float) -> Value:
        return event.text(key) or None

    return hidden(key, kind, about, value)


EVENTS_HIDDEN: tuple[Column[Event], ...] = (
    _event_hidden("id", "word", "the node's id"),
    _event_hidden("from", "word", "from which state"),
    _event_hidden("source", "word", "evidence: left, exited, silent"),
    _event_hidden("reason", "text", "why"),
    _event_hidden("op_id", "word", "the id of the op"),
    _event_hidden("by", "text", "by whom"),
)


def trouble_key(row: Row) -> tuple[int, str, str]:
    """The default order: trouble first, then by name."""
    return row.rank, row.name, row.id
