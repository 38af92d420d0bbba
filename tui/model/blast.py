"""The blast radius: what an op would do to the fleet, told from the live rows before anything is sent.

It says only what follows from the view at hand, and how old that view is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tui.model import ages
from tui.model.chains import Chain
from tui.model.meshes import MeshRow
from tui.model.rows import Row
from tui.model.text import clean

CANDIDATES = ("gateway", "console")
"""Kinds that may hold a mesh's lease, in the order in which they take it."""
VERBS = {
    "kill": "Kill {n} by message",
    "drain": "Drain {n}",
    "update": "Update {n} to the code on disk",
    "resume": "Resume {n}",
    "cordon": "Cordon {n}",
    "uncordon": "Uncordon {n}",
    "maintenance_enter": "Put {n} into maintenance",
    "maintenance_exit": "Take {n} out of maintenance",
    "restart_daemons": "Restart all daemons of {n}",
    "clear_avoid": "Clear the avoid list of {n}",
    "drop_replicas": "Drop replicas of {n}",
    "invalidate_placement": "Invalidate the placement of {n}",
}
"""The op in words; `{n}` is `1 node` or `3 nodes`."""
STOPPING = frozenset({"kill", "drain", "update", "maintenance_enter", "restart_daemons"})
"""Ops that stop daemons."""
NAMED = 4
"""Daemons or chains that are named; the rest is counted."""
MAINTAINED = frozenset({"entering_maintenance", "maintenance", "drain_failed"})
"""Maintenance states in which a node is out of use, or on its way there."""


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
    daemons: Mapping[str, Sequence[str]] = {},
    chains: Sequence[str] = (),
    holdings: Iterable[Chain] = (),
) -> Forecast:
    """What `verb` on the nodes `ids` would do. `rows`: the whole view, as rows or as the documents of `qd nodes`;
    `meshes`: what is known of the meshes, as rows or as the documents of `qd meshes`; `daemons`: node id → names of
    those that run there, where they are known; `chains`: what drop_replicas is about; `holdings`: who holds what, where
    that is known."""
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
    under, lost = _underheld(targets, holdings) if verb == "kill" else ({}, [])
    lines = [
        (
            row.name,
            "; ".join(
                filter(
                    None,
                    (
                        leases.get(row.id),
                        _effect(row, verb, daemons.get(row.id), chains),
                        *under.get(row.id, ()),
                    ),
                )
            ),
        )
        for row in targets
    ]
    lines += [(node, "not in this view: nothing is known of it") for node in unknown]
    warnings: list[str] = []
    danger = False
    if verb in ("kill", "drain", "maintenance_enter"):
        losses = _losses(view, targets, verb)
        danger = verb != "drain" and bool(losses or orphaned)
        warnings += losses
    if lost:
        danger = True
        warnings.append(f"nobody left to hold {_some(lost)}")
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


def _underheld(
    targets: Iterable[Row], holdings: Iterable[Chain]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What has too few holders once all targets are gone, said of each target that holds it: `orders 3 → 1 of 3 held`; and
    the names of what nobody holds then. Of the chains that the mesh keeps of its own accord only their number is said."""
    found: dict[str, list[str]] = {}
    own: dict[str, int] = {}
    lost = []
    struck = {(row.mesh, row.name): row.id for row in targets if row.present}
    counting = {row.id for row in targets if row.state != "draining"}
    for chain in holdings:
        of = [struck[chain.mesh, name] for name in chain.holders if (chain.mesh, name) in struck]
        if not of or chain.held is None or chain.desired is None:
            continue
        if len(of) == len(chain.holders):
            lost += [] if chain.own else [chain.name]
        elif not (of := [node for node in of if node in counting]):
            continue
        after = max(0, int(chain.held) - len(counting.intersection(of)))
        if after >= chain.desired:
            continue
        if chain.own:
            own |= {node: own.get(node, 0) + 1 for node in of}
            continue
        for node in of:
            found.setdefault(node, []).append(
                f"{chain.name} {chain.held:.0f} → {after} of {chain.desired:.0f} held"
            )
    said: dict[str, tuple[str, ...]] = {node: (_some(names),) for node, names in found.items()}
    for node, count in own.items():
        said[node] = (*said.get(node, ()), f"{count} action chain{'s' * (count != 1)} of nodes under-held")
    return said, lost


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
    return "keeps its lease" if verb in ("drain", "maintenance_enter") else ""


def _reach(targets: Iterable[Row], meshes: Mapping[str, MeshRow]) -> str:
    """`beta direct, 18ms; gamma by relay, 42ms`."""
    away = dict.fromkeys(row.mesh for row in targets if row.remote)
    paths = [(name, meshes[name].path()) for name in away if name in meshes]
    return "; ".join(f"{name} {path}" for name, path in paths if path)


def _effect(row: Row, verb: str, names: Sequence[str] | None, chains: Sequence[str]) -> str:
    """What becomes of one target. `names`: the daemons that run there, None where only their count is known."""
    if row.state == "dead":
        return "is dead: it can't receive anything"
    if row.state == "leaving":
        return "is leaving already"
    running = len(names) if names is not None else row.daemons[0] if row.daemons else 0
    named = f" ({_some(names)})" if names else ""
    daemons = f"{running} daemon{'s' * (running != 1)} stop" + "s" * (running == 1) + named if running else ""
    if verb == "kill":
        return daemons or ("its process ends; no daemons" if row.daemons else "its process ends")
    if verb == "drain":
        if row.state == "draining":
            return "drains already: takes the new deadline"
        return f"takes no new work; {daemons}" if daemons else "takes no new work"
    if verb == "update":
        if row.state == "updating":
            return "updates already"
        new = "stale: takes the code on its disk" if row.stale else "takes the code on its disk"
        if row.data.get("fresh") is True:
            new = "runs the code on its disk: nothing new to take"
        one = running == 1
        restart = "restarts, unless it lives" if one else "restart, unless they live"
        return (
            f"{new}; {running} daemon{'s' * (not one)}{named} {restart} through updates" if running else new
        )
    if verb == "resume":
        if row.text("maintenance") in MAINTAINED:
            return "is in maintenance: only its exit lifts that"
        return {"draining": "takes work again", "alive": "nothing to lift: is alive"}.get(
            row.state, "lifts what was set"
        )
    if verb in ("maintenance_enter", "maintenance_exit"):
        return _maintenance(row, verb, daemons)
    return _quiet_effect(row, verb, running, named, chains)


def _maintenance(row: Row, verb: str, daemons: str) -> str:
    """What entering or exiting maintenance does to a node, from where it stands."""
    stands = row.text("maintenance")
    if verb == "maintenance_enter":
        if stands == "maintenance":
            return "is in maintenance already"
        if stands == "entering_maintenance":
            return "enters already: takes the new deadline"
        moved = "its replicas move off"
        return f"takes no new work; {daemons}, {moved}" if daemons else f"takes no new work; {moved}"
    if stands in ("", "active"):
        return "nothing to exit: is not in maintenance"
    if stands in ("exiting_maintenance", "recovery"):
        return "is on its way back already"
    return "starts its daemons again, recovers, then is active"


def _quiet_effect(row: Row, verb: str, running: int, named: str, chains: Sequence[str]) -> str:
    """What an op does that leaves a node where it stands."""
    cordoned = row.flag("cordoned")
    if verb == "cordon":
        if cordoned:
            return "is cordoned already"
        stays = (
            f"; its {running} daemon{'s' * (running != 1)}{named} stay{'s' * (running == 1)}"
            if running
            else ""
        )
        return f"takes nothing new{stays}"
    if verb == "uncordon":
        if row.state == "draining":
            return "drains: that goes on until it is resumed, or its maintenance exits"
        return "takes new work again" if cordoned else "nothing to lift: is not cordoned"
    if verb == "restart_daemons":
        if not running:
            return "no daemon runs there" if row.daemons else "stops and starts what runs there"
        each = "stops and starts" if running == 1 else "stop and start"
        return f"{running} daemon{'s' * (running != 1)} {each} again{named}"
    if verb == "clear_avoid":
        return "forgets whom it avoids; judged anew at its next tick"
    if verb == "drop_replicas":
        return f"gives up {_some(chains)}" if chains else "gives up the replicas named"
    if verb == "invalidate_placement":
        return "chains that it leads are placed anew: cooldown, pending moves and scores are forgotten"
    return ""


def _some(names: Sequence[str]) -> str:
    """`web, cache, +3 more`."""
    more = [f"+{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*map(clean, names[:NAMED]), *more])


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
