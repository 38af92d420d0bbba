"""The lines around a view: what is known at a glance, and what wants attention."""

from __future__ import annotations

from tui.model import ages
from tui.model.glyphs import STATES, UNICODE, Glyphs
from tui.model.meshes import MeshRow, impostor_text
from tui.model.rows import Fleet
from tui.model.spans import Line
from tui.model.text import clean, elide, width

NOTICE_MS = 600_000
"""How long an event of the wire, or input that was refused, is news."""


def state_counts(fleet: Fleet, mesh: str | None, glyphs: Glyphs = UNICODE) -> Line:
    """`●5 ◐1 ✕1`, in the order of the fleet turned round: what is well first."""
    out: Line = []
    counts = fleet.by_state(mesh)
    for state in reversed(STATES):
        if counts.get(state):
            out += [(f"{glyphs.state(state)}{counts[state]}", state), (" ", "text")]
    return out[:-1]


def build_text(fleet: Fleet) -> str:
    """`build 3c9a1f fresh`, of the attached node; empty while it isn't known."""
    row = fleet.rows.get(fleet.my_id)
    build = clean(fleet.me.get("build")) or (row.text("build") if row else "")
    if not build:
        return ""
    fresh = row.data.get("fresh") if row else None
    return f"build {build[:6]}" + (" fresh" if fresh is True else " STALE" if fresh is False else "")


def alarms(fleet: Fleet) -> Line:
    """A word each for what is wrong with whole meshes, for a place that is always in sight: the gravest first."""
    rows = fleet.directory.rows.values()
    words = [("IMPOSTOR", any(m.impostors for m in rows)), ("EXPIRED", any(m.expired for m in rows))]
    words += [(word.upper(), True) for word in sorted({m.fallen_back for m in rows} - {""})[:1]]
    out: Line = []
    for word, holds in words:
        if holds:
            out += [(elide(word, 16), "hot"), ("  ", "text")]
    return out


def lease_text(mesh: MeshRow | None, now: float, glyphs: Glyphs = UNICODE, cells: int = 28) -> str:
    """`⚑ gateway.4f1a77 4s`, or what is wrong with the lease; empty for a mesh that nobody told of."""
    if mesh is None:
        return ""
    said = mesh.lease(now)
    if mesh.expired:
        return said
    return f"{glyphs.lease} {elide(mesh.known_by, cells - width(said) - 3, glyphs.ellipsis)} {said}".replace(
        "  ", " "
    )


def notices(fleet: Fleet, wall_ms: float, update_key: str = "u", now: float = 0.0) -> list[str]:
    """What is wrong beyond single nodes, a sentence each that says what to do; the gravest first.

    `now`: the viewer's clock, with which the meshes age.
    """
    found = []
    meshes = sorted(fleet.directory.rows.values(), key=lambda m: m.name)
    for mesh in meshes:
        found += [mark.advice for mark in mesh.marks(now) if mark.word == "IMPOSTOR"]
    incompatible: dict[str, str] = {}
    impostors: dict[str, None] = {}
    for event in reversed(fleet.events.items):
        if event.at_ms is not None and wall_ms - event.at_ms > NOTICE_MS:
            break
        if event.kind == "wire.incompatible":
            where = event.text("addr") or "of an unknown address"
            incompatible.setdefault(
                where, f"speaks wire {event.text('theirs') or '?'}, we {event.text('ours') or '?'}"
            )
        elif event.kind == "mesh.impostor" and event.mesh not in fleet.directory.rows:
            impostors.setdefault(event.mesh or "a mesh")
    for name in impostors:
        found.append(impostor_text(name))
    gone = [mesh for mesh in meshes if mesh.expired]
    if len(gone) > 2:
        found.append(
            f"{len(gone)} meshes expired, their nodes are not live: {', '.join(m.name for m in gone)}"
        )
    else:
        found += [f"{mesh.expiry(now)}; its nodes are not live" for mesh in gone]
    found += list(
        dict.fromkeys(m.advice for mesh in meshes for m in mesh.marks(now) if m.word == mesh.fallen_back)
    )
    for where, said in incompatible.items():
        found.append(f"incompatible peer {where} {said}: update the older side")
    rows = fleet.rows.values()
    marked = sum(row.flag("incompatible") for row in rows)
    if marked and not incompatible:
        found.append(f"{marked} incompatible node{'s' * (marked != 1)}: update the older side")
    off = [row.name for row in rows if row.flag("clock_off") or abs(row.figure("skew_ms") or 0) > 30_000]
    if off:
        found.append(
            f"clock off by more than 30 s on {', '.join(sorted(off)[:3])}: check time synchronisation"
        )
    stale = sum(row.stale for row in rows if row.present)
    if stale:
        nodes = "1 node runs" if stale == 1 else f"{stale} nodes run"
        found.append(f"{nodes} stale code: {update_key} takes the code on disk")
    total, codes = fleet.refused()
    if total and (fleet.counted_at is None or (now - fleet.counted_at) * 1000 <= NOTICE_MS):
        found.append(
            f"refused or dropped {total}: " + ", ".join(f"{code} {count}" for code, count in codes[:4])
        )
    return found


def silence(fleet: Fleet, now: float) -> str:
    """`data is 12 s old`, for a banner."""
    quiet = fleet.silence_ms(now)
    return "nothing known yet" if quiet is None else f"what you see is {ages.age(quiet)} old"
