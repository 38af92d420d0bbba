"""The columns of the meshes: what each shows, filters by, sorts by, and when it leaves."""

from __future__ import annotations

from collections.abc import Callable

from tui.model import ages
from tui.model.columns import load_role
from tui.model.glyphs import STATES, UNICODE, Glyphs
from tui.model.meshes import MeshRow
from tui.model.spans import Line, line_width
from tui.model.table import Column, Scene, hidden
from tui.model.text import elide, width

MeshCell = Callable[[MeshRow, Scene, int], Line]


def lead(row: MeshRow, glyphs: Glyphs) -> Line:
    """The sign before a mesh: how it is, without colour too."""
    if row.impostors:
        return [("!", "hot")]
    if row.expired:
        return [(glyphs.state("dead"), "dead")]
    if row.vacant:
        return [(glyphs.state("joining"), "joining")]
    return [(glyphs.state("alive"), "alive")]


def counts(row: MeshRow, glyphs: Glyphs = UNICODE) -> Line:
    """`●5 ◐1 ✕1`, what is well first. Of an expired mesh nothing is shown as live."""
    out: Line = []
    for state in reversed(STATES):
        if count := row.counts.get(state):
            out += [(f"{glyphs.state(state)}{count}", state), (" ", "text")]
    return out[:-1]


def _name(row: MeshRow, scene: Scene, cells: int) -> Line:
    return [(elide(row.name, cells, scene.glyphs.ellipsis), "name")]


def _nodes(row: MeshRow, scene: Scene, cells: int) -> Line:
    total = row.total
    return [(ages.UNKNOWN if total is None else f"{total:.0f}", "soft" if total is None else "text")]


def _states(row: MeshRow, scene: Scene, cells: int) -> Line:
    found = counts(row, scene.glyphs)
    while found and line_width(found) > cells:  # the last ones are the troubled: what is well leaves first
        found = found[2:]
    return found or [(ages.UNKNOWN, "soft")]


def _publisher(row: MeshRow, scene: Scene, cells: int) -> Line:
    if not row.publisher:
        return [(ages.UNKNOWN, "soft")]
    return [(elide(row.known_by, cells, scene.glyphs.ellipsis), "text")]


def _lease(row: MeshRow, scene: Scene, cells: int) -> Line:
    text = row.lease(scene.now)
    plain = text[:1].isdigit()
    role = "text" if plain else "soft" if text == ages.UNKNOWN else "hot"
    return [(elide(f"{scene.glyphs.lease} {text}" if plain else text, cells), role)]


def _figure(key: str) -> MeshCell:
    def cell(row: MeshRow, scene: Scene, cells: int) -> Line:
        value = row.figure(key)
        return [(ages.UNKNOWN if value is None else f"{value:.0f}", "soft" if value is None else "text")]

    return cell


def _load(key: str) -> MeshCell:
    def cell(row: MeshRow, scene: Scene, cells: int) -> Line:
        value = None if row.expired else row.figure(key)
        return [(ages.share(value), load_role(value))]

    return cell


def _rtt(row: MeshRow, scene: Scene, cells: int) -> Line:
    value = row.figure("rtt_ms")
    return [(ages.rtt(value), "soft" if value is None else "text")]


def _word(key: str) -> MeshCell:
    def cell(row: MeshRow, scene: Scene, cells: int) -> Line:
        text = "" if key == "route" and row.expired else row.text(key)
        return [
            (elide(text, cells, scene.glyphs.ellipsis) if text else ages.UNKNOWN, "text" if text else "soft")
        ]

    return cell


def _age(row: MeshRow, scene: Scene, cells: int) -> Line:
    return [(ages.age(row.age_ms(scene.now)), "text")]


def _mine(row: MeshRow, scene: Scene) -> bool:
    return bool(scene.here) and row.name == scene.here


def _notes(row: MeshRow, scene: Scene, cells: int) -> Line:
    out: Line = []
    room = cells
    for mark in row.marks(scene.now, _mine(row, scene)):
        if mark.word in ("EXPIRED", "vacant"):
            continue  # the lease says so
        size = width(mark.word) + (2 if out else 0)
        if size > room:
            break
        out += [("  ", "text"), (mark.word, mark.role)] if out else [(mark.word, mark.role)]
        room -= size
    return out


def _notes_ideal(row: MeshRow, scene: Scene) -> int:
    words = [m.word for m in row.marks(scene.now, _mine(row, scene)) if m.word not in ("EXPIRED", "vacant")]
    return sum(width(word) + 2 for word in words) - 2


MESHES: tuple[Column[MeshRow], ...] = (
    Column(
        "mesh", "MESH", "word", (6, 32), 0, _name, lambda m, now: m.name, "the mesh's name",
        ideal=lambda m, s: width(m.name), grows=(4,),
    ),
    Column("nodes", "NODES", "number", (5,), 1, _nodes, lambda m, now: m.total, "nodes in it", right=True),
    Column(
        "states", "STATES", "text", (8, 40), 1, _states, lambda m, now: " ".join(m.counts) or None,
        "its nodes by state", ideal=lambda m, s: line_width(counts(m, s.glyphs)), grows=(2,),
    ),
    Column(
        "publisher", "PUBLISHER", "text", (12, 40), 1, _publisher, lambda m, now: m.publisher or None,
        "the node that publishes it", ideal=lambda m, s: width(m.known_by), grows=(2,),
    ),
    Column(
        "lease", "LEASE", "duration", (11,), 0, _lease, lambda m, now: m.expires_ms(now),
        "what is left of its publisher's lease, or since when it has expired",
    ),
    Column("epoch", "EPOCH", "number", (5,), 4, _figure("epoch"), lambda m, now: m.figure("epoch"),
        "how often its lease has passed on", right=True,
    ),
    Column("cpu", "CPU", "share", (4,), 2, _load("cpu"), lambda m, now: m.figure("cpu"),
        "processor load over its nodes", right=True,
    ),
    Column("mem", "MEM", "share", (4,), 3, _load("mem"), lambda m, now: m.figure("mem"),
        "memory in use over its nodes", right=True,
    ),
    Column("route", "ROUTE", "word", (6,), 6, _word("route"), lambda m, now: m.route or None,
        "how it is reached: direct, relay", needs="route",
    ),
    Column("rtt", "RTT", "number", (5,), 5, _rtt, lambda m, now: m.figure("rtt_ms"),
        "round-trip time to its publisher, milliseconds", right=True, needs="rtt",
    ),
    Column(
        "backbone", "BACKBONE", "word", (8, 20), 7, _word("backbone"), lambda m, now: m.backbone or None,
        "what carries the backbone: pool or nats", needs="backbone", ideal=lambda m, s: width(m.backbone),
    ),
    Column("age", "AGE", "duration", (4,), 1, _age, lambda m, now: m.age_ms(now), "since there was news of it", right=True),
    Column(
        "notes", "", "text", (11, 40), 3, _notes,
        lambda m, now: " ".join(mark.word for mark in m.marks(now)) or None,
        "IMPOSTOR, nats away, counts only, you", ideal=_notes_ideal, needs="notes",
    ),
)  # fmt: skip


def _count(state: str) -> Column[MeshRow]:
    return hidden(state, "number", f"nodes that are {state}", lambda m, now: m.counts.get(state, 0))


MESHES_HIDDEN: tuple[Column[MeshRow], ...] = (
    hidden("expired", "flag", "whether its publisher is not heard any more", lambda m, now: m.expired),
    hidden("impostor", "flag", "whether another key publishes its name", lambda m, now: bool(m.impostors)),
    hidden("listed", "flag", "whether it shows this mesh its nodes", lambda m, now: not m.counts_only),
    hidden("home", "flag", "whether this home holds its keys", lambda m, now: m.data.get("home") is True),
    hidden("id", "word", "the id of its publisher", lambda m, now: m.publisher_id or None),
    hidden("addr", "text", "where its publisher answers", lambda m, now: m.publisher_addr or None),
    hidden("pub", "text", "the fingerprint of its key", lambda m, now: m.text("pub") or None),
    hidden("version", "number", "the version of its listing", lambda m, now: m.figure("version")),
    hidden("reason", "text", "what the agent adds", lambda m, now: m.text("reason") or None),
    *(_count(state) for state in STATES),
)


def mesh_facts(rows: list[MeshRow], mine: str = "") -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    tests: dict[str, Callable[[MeshRow], object]] = {
        "route": lambda m: m.route,
        "rtt": lambda m: m.figure("rtt_ms") is not None,
        "backbone": lambda m: m.backbone,
        "notes": lambda m: m.impostors or m.counts_only or m.fallen_back or (mine and m.name == mine),
    }
    return frozenset(fact for fact, test in tests.items() if any(map(test, rows)))


def mesh_height(row: MeshRow) -> int:
    """Lines of a mesh: two when there is something to say about it."""
    return 2 if row.detail(row.received) else 1


def mesh_key(row: MeshRow) -> tuple[int, bool, str]:
    """The default order: trouble first, then the mesh of the answering node, then by name."""
    return row.rank, not row.own, row.name
