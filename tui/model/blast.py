"""The blast radius: what an op would do to the fleet, told from the live rows before anything is sent.

It says only what follows from the view at hand, and how old that view is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tui.model import ages
from tui.model.meshes import MeshRow
from tui.model.rows import Row

CANDIDATES = ("gateway", "console")
"""Kinds that may hold a mesh's lease, in the order in which they take it."""
VERBS = {
    "kill": "Kill {n} by message",
    "drain": "Drain {n}",
    "update": "Update {n} to the code on disk",
    "resume": "Resume {n}",
}
"""The op in words; `{n}` is `1 node` or `3 nodes`."""


@dataclass(frozen=True)
class Forecast:
    """What to tell before sending. `lines`: (node name, what happens to it), in the order of the targets."""

    title: str
    lines: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    danger: bool
    """A mesh loses its last gateway or console, or its last node."""
    needs_count: bool
    """The number of targets must be typed."""
    data_age_ms: float | None
    """Age of the oldest row that this was told from; None when one of them has no age."""
    count: int
    reach: str = ""
    """How the targets of other meshes are reached, as far as that is known."""


def forecast(
    rows: Iterable[Row | Mapping[str, Any]],
    ids: Collection[str],
    verb: str,
    *,
    attached: str = "",
    now: float = 0.0,
    meshes: Iterable[MeshRow | Mapping[str, Any]] = (),
) -> Forecast:
    """What `verb` on the nodes `ids` would do. `rows`: the whole view, as rows or as the documents of `qd nodes`;
    `meshes`: what is known of the meshes, as rows or as the documents of `qd meshes`."""
    view = [row if isinstance(row, Row) else Row(row, now) for row in rows]
    wanted = list(dict.fromkeys(ids))
    by_id = {row.id: row for row in view}
    targets = [by_id[node] for node in wanted if node in by_id]
    unknown = [node for node in wanted if node not in by_id]
    known_meshes = {
        mesh.name: mesh for mesh in (m if isinstance(m, MeshRow) else MeshRow(m, now) for m in meshes)
    }
    struck = {row.id for row in targets}
    leases: dict[str, str] = {}
    orphaned: list[str] = []
    for row in targets:
        mesh = known_meshes.get(row.mesh)
        if mesh is not None and not mesh.expired and mesh.publisher_id == row.id and row.present:
            heir = next_holder(view, row.mesh, struck)
            leases[row.id] = _lease(verb, heir)
            left = any(r.mesh == row.mesh and r.present and r.id not in struck for r in view)
            if verb in ("kill", "update") and heir is None and (left or verb == "update"):
                orphaned.append(row.mesh)
    lines = [(row.name, "; ".join(filter(None, (leases.get(row.id), _effect(row, verb))))) for row in targets]
    lines += [(node, "not in this view: nothing is known of it") for node in unknown]
    warnings: list[str] = []
    danger = False
    if verb in ("kill", "drain"):
        losses = _losses(view, targets, verb)
        danger = verb == "kill" and bool(losses or orphaned)
        warnings += losses
    for name in orphaned:
        until = "" if verb == "kill" else " until it is back"
        warnings.append(f"nobody left to publish {name}: other meshes won't see it{until}")
    if any(row.id == attached for row in targets) and verb in ("kill", "update"):
        after = "it loses its view" if verb == "kill" else "it loses its view until that one is back"
        warnings.append(f"this console is attached to {by_id[attached].name}: {after}")
    old = [row.name for row in targets if row.late(now)]
    if old:
        warnings.append(f"no fresh data about {', '.join(old)}: this forecast may be wrong there")
    known = [row.age_ms(now) for row in targets]
    age = max((a for a in known if a is not None), default=None) if None not in known else None
    count = len(targets) + len(unknown)
    noun = "1 node" if count == 1 else f"{count} nodes"
    title = VERBS.get(verb, verb.capitalize() + " {n}").format(n=noun)
    reach = _reach(targets, known_meshes)
    return Forecast(title, tuple(lines), tuple(warnings), danger, count > 1 or danger, age, count, reach)


def next_holder(view: Iterable[Row], mesh: str, struck: Collection[str] = ()) -> Row | None:
    """Who takes a mesh's lease when it falls vacant, as far as this view tells: gateways before consoles, then by id."""
    candidates = [
        row
        for row in view
        if row.mesh == mesh
        and row.kind in CANDIDATES
        and row.present
        and row.state != "updating"
        and row.id not in struck
    ]
    return min(candidates, key=lambda row: (CANDIDATES.index(row.kind), row.id), default=None)


def _lease(verb: str, heir: Row | None) -> str:
    """What becomes of the lease that a target holds. Draining doesn't end it: the node goes on publishing."""
    if verb in ("kill", "update"):
        return f"lease moves to {heir.name}" if heir else "its lease falls vacant"
    return "keeps its lease" if verb == "drain" else ""


def _reach(targets: Iterable[Row], meshes: Mapping[str, MeshRow]) -> str:
    """`beta direct, 18ms; gamma by relay, 42ms`."""
    away = dict.fromkeys(row.mesh for row in targets if row.remote)
    paths = [(name, meshes[name].path()) for name in away if name in meshes]
    return "; ".join(f"{name} {path}" for name, path in paths if path)


def _effect(row: Row, verb: str) -> str:
    if row.state == "dead":
        return "is dead: it can't receive anything"
    if row.state == "leaving":
        return "is leaving already"
    running = row.daemons[0] if row.daemons else 0
    daemons = f"{running} daemon{'s' * (running != 1)} stop" + "s" * (running == 1) if running else ""
    if verb == "kill":
        return daemons or ("its process ends; no daemons" if row.daemons else "its process ends")
    if verb == "drain":
        if row.state == "draining":
            return "drains already: takes the new deadline"
        return f"takes no new work; {daemons}" if daemons else "takes no new work"
    if verb == "update":
        if row.state == "updating":
            return "updates already"
        if row.data.get("fresh") is True:
            return "runs the code on its disk: nothing new to take"
        return "stale: takes the code on its disk" if row.stale else "takes the code on its disk"
    if verb == "resume":
        return {"draining": "takes work again", "alive": "nothing to lift: is alive"}.get(
            row.state, "lifts what was set"
        )
    return ""


def _losses(view: list[Row], targets: list[Row], verb: str) -> list[str]:
    """Meshes that would be left without a gateway, without a console, or without any node."""
    found = []
    struck = {row.id for row in targets}
    for mesh in sorted({row.mesh for row in targets}):
        here = [
            row
            for row in view
            if row.mesh == mesh and row.present and (verb == "kill" or row.state != "draining")
        ]
        if not any(row.id in struck for row in here):
            continue
        if all(row.id in struck for row in here):
            found.append(
                f"every node of {mesh}: the mesh " + ("ends" if verb == "kill" else "takes no work any more")
            )
            continue
        for kind in ("gateway", "console"):
            of = [row for row in here if row.kind == kind]
            if of and all(row.id in struck for row in of):
                found.append(f"the last {kind} of {mesh}")
    return found


def age_text(data_age_ms: float | None) -> str:
    """How old the forecast's data is, as a sentence."""
    if data_age_ms is None:
        return "The age of this data is not known."
    if data_age_ms < 10_000:
        return f"Forecast from data {data_age_ms / 1000:.1f} s old."
    return f"Forecast from data {ages.age(data_age_ms)} old."
