"""What one spec changes of another, and what that means for each node: the same answer for people and for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.spec.model import ArtifactSpec, ChainSpec, DaemonSpec, FleetSpec, Resources
from agent.spec.placing import Candidate, Plan, Shortfall, plan
from agent.spec.resources import needs_text, size_text

RESTARTING_KEYS = frozenset({"command", "entry_point", "env", "cwd", "user", "readiness"})
"""Keys of a daemon that only a new process can take up. The others count at once, for the process that runs."""
TABLES = ("daemon", "chain", "artifact")

Entry = DaemonSpec | ChainSpec | ArtifactSpec


@dataclass(frozen=True)
class Change:
    """One key of one entry. A key of an inner table is written `health.tcp`; None: not there."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class EntryChange:
    """One entry of a table: `what` is added, removed, changed or unchanged."""

    table: str
    name: str
    what: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class NodeChange:
    """What becomes of one node's daemons, by name. `restarts`: they run before and after, but as another program."""

    node: int
    name: str
    starts: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """All that a new spec changes: entries in the order of TABLES and their names, nodes by name."""

    entries: tuple[EntryChange, ...]
    nodes: tuple[NodeChange, ...]
    shortfalls: tuple[Shortfall, ...]
    """Of the new spec, whether or not the old one fell short too."""
    placed: Mapping[str, tuple[str, ...]]
    """Names of the nodes of each daemon, under the new spec."""
    held: Mapping[str, Mapping[str, str]]
    """Daemon → names of the nodes that it is held back on for lack of room, and why; under the new spec."""
    needs: Mapping[str, Resources]
    """What the daemons of the new spec need, where it says."""

    @property
    def changed(self) -> bool:
        return any(entry.what != "unchanged" for entry in self.entries)

    def document(self) -> dict[str, Any]:
        """As JSON: `{"added", "removed", "changed", "unchanged"}` with entries as `{"table", "name"}` (changed ones
        with `keys`: `[{"key", "old", "new"}]`), `nodes`: `[{"node", "id", "starts", "stops", "restarts"}]`,
        `shortfalls`: `[{"daemon", "wanted", "placed", "reason"}]`, `placed`: node names by daemon, `held`: why by node
        name by daemon."""
        found: dict[str, Any] = {what: [] for what in ("added", "removed", "changed", "unchanged")}
        for entry in self.entries:
            row: dict[str, Any] = {"table": entry.table, "name": entry.name}
            if entry.what == "changed":
                row["keys"] = [{"key": c.key, "old": c.old, "new": c.new} for c in entry.changes]
            found[entry.what].append(row)
        found["nodes"] = [
            {
                "node": change.name,
                "id": format(change.node, "016x"),
                "starts": list(change.starts),
                "stops": list(change.stops),
                "restarts": list(change.restarts),
            }
            for change in self.nodes
        ]
        found["shortfalls"] = [
            {"daemon": s.daemon, "wanted": s.wanted, "placed": s.placed, "reason": s.reason or None}
            for s in self.shortfalls
        ]
        found["placed"] = {name: list(nodes) for name, nodes in self.placed.items()}
        found["held"] = {name: dict(nodes) for name, nodes in self.held.items()}
        return found

    def lines(self) -> list[str]:
        """For people: an entry a line (its keys below it), then what each node does, then what is wanting."""
        said = []
        for entry in self.entries:
            if entry.what == "unchanged":
                continue
            mark = {"added": "+", "removed": "-", "changed": "~"}[entry.what]
            where = ""
            if entry.table == "daemon" and entry.what != "removed":
                where = f" on {_listed(self.placed.get(entry.name, ()))}"
                if entry.what == "added" and entry.name in self.needs:
                    where += f", needs {needs_text(self.needs[entry.name])}"
            said.append(f"{mark} {entry.table} {entry.name}{where}")
            said += [f"    {c.key}: {_shown(c.key, c.old)} → {_shown(c.key, c.new)}" for c in entry.changes]
        same = sum(entry.what == "unchanged" for entry in self.entries)
        if same:
            said.append(f"= {same} unchanged")
        for node in self.nodes:
            acts = [
                f"{verb} {_listed(names)}"
                for verb, names in (
                    ("starts", node.starts),
                    ("stops", node.stops),
                    ("restarts", node.restarts),
                )
                if names
            ]
            said.append(f"@ {node.name}: {'; '.join(acts)}")
        short = {shortfall.daemon for shortfall in self.shortfalls}
        for name, nodes in self.held.items():
            if name not in short:  # those say it themselves
                said += [f"! {name}: held back on {node}: {why}" for node, why in nodes.items()]
        return said + [f"! {shortfall}" for shortfall in self.shortfalls]


def difference(old: FleetSpec, new: FleetSpec, candidates: Iterable[Candidate] = ()) -> Difference:
    """What `new` changes of `old`, and who starts, stops and restarts what, as these nodes are now."""
    view = list(candidates)
    names = {c.id: c.name for c in view}
    before, after = plan(old, -1, view), plan(new, -1, view)
    entries = tuple(change for table in TABLES for change in _entries(table, old, new))
    restarted = {
        entry.name
        for entry in entries
        if entry.table == "daemon"
        and any(change.key.split(".", 1)[0] in RESTARTING_KEYS for change in entry.changes)
    }
    return Difference(
        entries,
        tuple(_nodes(before, after, names, restarted)),
        after.shortfalls,
        {name: tuple(sorted(names[node] for node in nodes)) for name, nodes in after.placed.items()},
        {
            name: dict(sorted((names[node], why) for node, why in nodes.items()))
            for name, nodes in sorted(after.held.items())
        },
        {daemon.name: daemon.resources for daemon in new.daemon if daemon.resources},
    )


def restarts(old: DaemonSpec, new: DaemonSpec) -> bool:
    """Whether a process started by `old` has to be replaced to be as `new` says."""
    return any(getattr(old, key) != getattr(new, key) for key in RESTARTING_KEYS)


def _entries(table: str, old: FleetSpec, new: FleetSpec) -> Iterable[EntryChange]:
    before: dict[str, Entry] = {entry.name: entry for entry in getattr(old, table)}
    after: dict[str, Entry] = {entry.name: entry for entry in getattr(new, table)}
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            yield EntryChange(table, name, "added")
        elif name not in after:
            yield EntryChange(table, name, "removed")
        elif before[name] == after[name]:
            yield EntryChange(table, name, "unchanged")
        else:
            yield EntryChange(table, name, "changed", tuple(_changes(before[name], after[name])))


def _changes(old: Entry, new: Entry) -> Iterable[Change]:
    before, after = _flat(old), _flat(new)
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            yield Change(key, before.get(key), after.get(key))


def _flat(entry: Entry) -> dict[str, Any]:
    """Key → value, inner tables and single variables as `health.tcp` and `env.PORT`."""
    flat: dict[str, Any] = {}
    for key, value in msgspec.to_builtins(entry).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": inner_value for inner, inner_value in value.items()})
        elif value is not None:
            flat[key] = value
    return flat


def _nodes(before: Plan, after: Plan, names: Mapping[int, str], restarted: set[str]) -> Iterable[NodeChange]:
    had, has = _by_node(before), _by_node(after)
    for node in sorted(had.keys() | has.keys(), key=lambda node: (names[node], node)):
        old, new = had.get(node, set()), has.get(node, set())
        change = NodeChange(
            node,
            names[node],
            tuple(sorted(new - old)),
            tuple(sorted(old - new)),
            tuple(sorted(old & new & restarted)),
        )
        if change.starts or change.stops or change.restarts:
            yield change


def _by_node(of: Plan) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for name, nodes in of.placed.items():
        for node in nodes:
            found.setdefault(node, set()).add(name)
    return found


def _listed(names: Iterable[str], most: int = 6) -> str:
    words = list(names)
    if not words:
        return "no node"
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if key == "resources.memory":
        return size_text(value)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:79] + "…"
