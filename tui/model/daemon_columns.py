"""The columns of the daemons: what each shows, filters by, sorts by, and when it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tui.model import ages
from tui.model.columns import load_role
from tui.model.daemons import ROLES, STATES, Daemon, saturation
from tui.model.glyphs import UNICODE, Glyphs
from tui.model.spans import Line
from tui.model.table import Column, Scene, hidden, text_cell
from tui.model.text import elide, shorten, width

Cell = Callable[[Daemon, Scene, int], Line]


def lead(daemon: Daemon, glyphs: Glyphs) -> Line:
    """The sign before a daemon: how it is, without colour too."""
    if daemon.ails:
        return [(glyphs.state("degraded") if daemon.health == "degraded" else "!", daemon.role)]
    return [(glyphs.daemon(daemon.state), daemon.role)]


def counts(found: Counter[str], glyphs: Glyphs = UNICODE) -> Line:
    """`●30 ○1 ✕1`, what is well first."""
    out: Line = []
    for state in reversed(STATES):
        if found.get(state):
            out += [(f"{glyphs.daemon(state)}{found[state]}", ROLES[state]), (" ", "text")]
    return out[:-1]


def _name(daemon: Daemon, scene: Scene, cells: int) -> Line:
    return [(elide(daemon.name, cells, scene.glyphs.ellipsis), "name")]


def _state(daemon: Daemon, scene: Scene, cells: int) -> Line:
    return [(elide(daemon.word, cells, scene.glyphs.ellipsis), ROLES.get(daemon.state, "text"))]


def _age(daemon: Daemon, scene: Scene, cells: int) -> Line:
    return [(ages.age(daemon.age_ms(scene.now)), "text")]


def _health(daemon: Daemon, scene: Scene, cells: int) -> Line:
    if not daemon.health:
        return [(ages.UNKNOWN, "soft")]
    return [(elide(daemon.health, cells, scene.glyphs.ellipsis), daemon.role if daemon.ails else "text")]


def _next(daemon: Daemon, scene: Scene, cells: int) -> Line:
    return [(daemon.next_text(scene.now), "hot")] if daemon.next_text(scene.now) else []


def _restarts(daemon: Daemon, scene: Scene, cells: int) -> Line:
    value = daemon.figure("restarts")
    return [(ages.UNKNOWN if value is None else f"{value:.0f}", "hot" if value else "text")]


def _full(daemon: Daemon, scene: Scene, cells: int) -> Line:
    value = saturation(daemon)
    return [(ages.share(value), load_role(value))]


def _pid(daemon: Daemon, scene: Scene, cells: int) -> Line:
    value = daemon.figure("pid")
    return [(ages.UNKNOWN if value is None else f"{value:.0f}", "soft" if value is None else "text")]


def _said(daemon: Daemon) -> str:
    return daemon.status or ("" if daemon.detail(daemon.received) else daemon.reason)


DAEMONS: tuple[Column[Daemon], ...] = (
    Column(
        "name", "DAEMON", "text", (10, 32), 0, _name, lambda d, now: d.name, "the daemon's name",
        ideal=lambda d, s: width(d.name), grows=(3,),
    ),
    Column("state", "STATE", "word", (13,), 0, _state, lambda d, now: d.state or None,
        "running, starting, stopping, stopped, backing_off, crash_looping",
    ),
    Column("age", "FOR", "duration", (4,), 3, _age, lambda d, now: d.age_ms(now),
        "how long it has been in its state", right=True,
    ),
    Column("health", "HEALTH", "word", (9,), 2, _health, lambda d, now: d.health or None,
        "healthy, degraded, unhealthy, as it says or as its check found",
    ),
    Column("next", "AGAIN", "duration", (7,), 1, _next, lambda d, now: d.left_ms(now),
        "until it is started again: backoff, or the gate of a crash loop", needs="next",
    ),
    Column("restarts", "RST", "number", (4,), 3, _restarts, lambda d, now: d.figure("restarts"),
        "how often it was started again", right=True,
    ),
    Column("saturation", "FULL", "share", (4,), 4, _full, lambda d, now: saturation(d),
        "how full it says it is", right=True, needs="saturation",
    ),
    Column(
        "node", "NODE", "text", (16, 40), 1, text_cell(lambda d: d.node), lambda d, now: d.node or None,
        "the node it is on", ideal=lambda d, s: width(d.node), grows=(3,),
    ),
    Column(
        "mesh", "MESH", "word", (5, 16), 6, text_cell(lambda d: d.mesh), lambda d, now: d.mesh or None,
        "the mesh it is in", needs="meshes", ideal=lambda d, s: width(d.mesh),
    ),
    Column("pid", "PID", "number", (7,), 7, _pid, lambda d, now: d.figure("pid"), "its process", right=True),
    Column(
        "status", "SAYS", "text", (12, 200), 5, text_cell(_said, cut=shorten), lambda d, now: _said(d) or None,
        "what it last said of itself, else the reason of its state", ideal=lambda d, s: width(_said(d)),
        needs="status",
    ),
)  # fmt: skip


DAEMONS_HIDDEN: tuple[Column[Daemon], ...] = (
    hidden("daemon", "text", "the daemon's name", lambda d, now: d.name),
    hidden("id", "word", "the id of its node", lambda d, now: d.node_id or None),
    hidden("reason", "text", "why it is in its state", lambda d, now: d.reason or None),
    hidden("held_back", "text", "what keeps it from running", lambda d, now: d.held_back or None),
    hidden("intent", "word", "run or stop, as its spec has it", lambda d, now: d.intent or None),
    hidden("trouble", "flag", "whether it needs a look", lambda d, now: d.rank <= 3),
)


def daemon_facts(rows: list[Daemon]) -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    facts = {"meshes"} if len({daemon.mesh for daemon in rows}) > 1 else set()
    tests: dict[str, Callable[[Daemon], object]] = {
        "next": lambda daemon: daemon.left_ms(daemon.received) is not None,
        "saturation": lambda daemon: saturation(daemon) is not None,
        "status": _said,
    }
    return frozenset(facts | {fact for fact, test in tests.items() if any(map(test, rows))})
