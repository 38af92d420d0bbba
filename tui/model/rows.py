"""A fleet as one agent sees it: node rows folded from frames, aged by the viewer's own clock.

A row keeps the moment it was received. Every age on the screen is the age it had then plus what has passed here
since, so nothing looks younger than it is while the line is silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tui.model.ages import number
from tui.model.events import EventLog
from tui.model.glyphs import RANK, UNICODE
from tui.model.meshes import Meshes, MeshRow
from tui.model.text import clean

Doc = Mapping[str, Any]
HISTORY = 60
STALE_PERIODS = 3
DEFAULT_PERIOD_MS = 5_000.0
PRESENT = frozenset({"joining", "alive", "degraded", "updating", "draining"})


class Row:
    """One node in this view. `data` is the row as received; what a screen asks often is taken out of it once."""

    __slots__ = (
        "_search",
        "data",
        "expired",
        "history",
        "id",
        "kind",
        "mesh",
        "name",
        "rank",
        "received",
        "sampled",
        "state",
        "version",
    )

    def __init__(self, data: Doc, now: float) -> None:
        self.id = clean(data.get("id"))
        self.version = 0
        self.history: list[int | None] = []
        self.sampled = now
        self._take(data, now)
        given = data.get("history")
        if not isinstance(given, list):
            self._sample(now)

    def _take(self, data: Doc, now: float) -> None:
        self.data = data
        self.received = now
        self.name = clean(data.get("name")) or self.id
        self.mesh = clean(data.get("mesh"))
        self.kind = clean(data.get("kind"))
        self.state = clean(data.get("state"))
        self.expired = data.get("expired") is True
        # Of an expired mesh nothing is known, which is less than a death that somebody saw.
        self.rank = RANK["joining"] if self.expired else RANK.get(self.state, 0)
        if self.maintenance == "drain_failed" and not self.expired:
            self.rank = min(self.rank, RANK["degraded"])
        self._search: str | None = None
        self.version += 1
        given = data.get("history")
        if isinstance(given, list):
            self.history = [int(v) if number(v) is not None else None for v in given[-HISTORY:]]
            self.sampled = now

    def update(self, data: Doc, now: float) -> None:
        """Takes a newer row of the same node; its history goes on, a sample a period."""
        self._take(data, now)
        if not isinstance(data.get("history"), list):
            self._sample(now)

    def _sample(self, now: float) -> None:
        cpu = self.figure("cpu")
        permille = None if cpu is None else round(cpu * 1000)
        if self.history and now - self.sampled < self.period_ms / 1000 * 0.8:
            self.history[-1] = permille
            return
        self.history.append(permille)
        del self.history[:-HISTORY]
        self.sampled = now

    @property
    def period_ms(self) -> float:
        """How often this row is expected to be renewed."""
        return number(self.data.get("period_ms")) or DEFAULT_PERIOD_MS

    def figure(self, key: str) -> float | None:
        """A number of the row, None where it is unknown or nonsense."""
        return number(self.data.get(key))

    def text(self, key: str) -> str:
        """A text of the row, cleaned; empty where it is unknown."""
        return clean(self.data.get(key))

    def flag(self, key: str) -> bool:
        return self.data.get(key) is True

    def age_ms(self, now: float) -> float | None:
        """Since the answering node last had news of this one."""
        seen = self.figure("last_seen_ms")
        return None if seen is None else seen + (now - self.received) * 1000

    def since_ms(self, now: float) -> float | None:
        """How long it has been in this state."""
        since = self.figure("since_ms")
        return None if since is None else since + (now - self.received) * 1000

    def late(self, now: float) -> bool:
        """Whether its figures are older than three of their periods. What is dead is old by nature."""
        age = self.age_ms(now)
        return self.state != "dead" and age is not None and age > STALE_PERIODS * self.period_ms

    def left_ms(self, now: float) -> float | None:
        """What is left until its deadline (maintenance, drain), None without one; negative once it has passed."""
        for key in ("deadline_ms", "maintenance_until_ms"):
            until = self.figure(key)
            if until is not None:
                return until - (now - self.received) * 1000
        return None

    @property
    def maintenance(self) -> str:
        """Its maintenance state; empty while that is active or unknown."""
        state = clean(self.data.get("maintenance"))
        return "" if state == "active" else state

    @property
    def remote(self) -> bool:
        """Whether only the publisher of its mesh tells of it: no path to it is measured from here."""
        return self.data.get("source") == "directory"

    @property
    def stale(self) -> bool:
        """Whether it runs other code than is on its disk, as judged by the node that answers."""
        return self.data.get("fresh") is False and self.state != "dead"

    @property
    def present(self) -> bool:
        return self.state in PRESENT

    @property
    def daemons(self) -> tuple[int, int] | None:
        """(running, total), None where unknown."""
        given = self.data.get("daemons")
        if not isinstance(given, Mapping):
            return None
        running, total = number(given.get("running")), number(given.get("total"))
        return None if running is None or total is None else (int(running), int(total))

    @property
    def tags(self) -> dict[str, str]:
        given = self.data.get("tags")
        return {clean(k): clean(v) for k, v in given.items()} if isinstance(given, Mapping) else {}

    @property
    def evidence(self) -> tuple[str, tuple[str, ...], str]:
        """(kind, witnesses, sentence) of a dead node's absence; empty where none was given."""
        given = self.data.get("evidence")
        if not isinstance(given, Mapping):
            return "", (), ""
        by = given.get("by")
        names = tuple(clean(name) for name in by) if isinstance(by, (list, tuple)) else ()
        return clean(given.get("kind")), names, clean(given.get("text"))

    @property
    def reason(self) -> str:
        """Why it is in its state, as the row tells it: a dead node's evidence, else the node's own reason."""
        if self.state == "dead":
            kind, by, text = self.evidence
            names = ", ".join(name.removeprefix(f"{self.mesh}.") for name in by)
            if names and kind == "exited":
                return f"process gone: refused to {names} (or a firewall closed its port)"
            if names and kind == "silent":
                return f"no answer to {names}: host down, stopped or cut off"
            said = text or kind
            return f"{said}: by {names}" if said and names else said or names
        return self.text("reason")

    @property
    def search(self) -> str:
        """What bare words and regular expressions look at: lower case, every text of the row."""
        if self._search is None:
            parts = [
                self.name,
                self.id,
                self.kind,
                self.mesh,
                self.state,
                self.text("build"),
                self.text("addr"),
            ]
            parts += [f"{key}={value}" for key, value in self.tags.items()]
            parts += [self.reason, self.text("maintenance")]
            parts += [mark for mark, _, _ in marks(self)]
            self._search = " ".join(part for part in parts if part).lower()
        return self._search


_MARKING = frozenset({"incompatible", "clock_off", "skew_ms", "suspect", "cordoned"})


def marks(
    row: Row, me: str = "", holders: Collection[str] = (), lease: str = UNICODE.lease
) -> list[tuple[str, str, str]]:
    """(word, role, what to do) for everything about a node that wants a look, the gravest first.

    `holders`: ids of the nodes that hold a mesh's lease.
    """
    found: list[tuple[str, str, str]] = []
    data = row.data
    holds = row.id in holders
    if row.id != me and not holds and data.get("fresh") is not False and not (_MARKING & data.keys()):
        return found
    if row.flag("incompatible"):
        theirs = row.figure("wire")
        found.append(("INCOMPATIBLE", "hot", f"speaks wire version {theirs or '?'}: update the older side"))
    if row.flag("clock_off") or abs(row.figure("skew_ms") or 0) > 30_000:
        found.append(("CLOCK", "hot", "its clock is off by more than 30 s: check time synchronisation there"))
    if row.stale:
        found.append(("STALE", "hot", "runs older code than is on its disk: update takes the new code"))
    if row.flag("suspect"):
        found.append(("suspect", "hot", "does not answer probes; being checked"))
    if row.flag("cordoned") and row.state != "draining":
        found.append(("cordoned", "text", "takes no new work"))
    if holds:
        found.append((f"{lease} lease", "text", f"publishes {row.mesh}: it holds the lease"))
    if me and row.id == me:
        found.append(("you", "accent", "the node this console is attached to"))
    return found


@dataclass
class Change:
    """What one frame did: `rows` changed or new, `gone`, how many events came, whether everything was replaced."""

    rows: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    events: int = 0
    full: bool = False
    meshes: bool = False
    """Whether the meshes were told anew."""
    moved: bool = False
    """Whether a node came, went or changed its state, or a mesh its standing: news, as opposed to newer figures."""

    def merge(self, other: Change) -> None:
        self.rows |= other.rows
        self.gone = (self.gone - other.rows) | other.gone
        self.events += other.events
        self.full |= other.full
        self.meshes |= other.meshes
        self.moved |= other.moved
        self.moved |= other.moved


class Fleet:
    """Everything the console knows, folded from the frames of one `watch` stream after the other.

    Losing the stream changes nothing here: the rows stay and age. The next full frame replaces them.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.events = EventLog()
        self.directory = Meshes()
        self.me: dict[str, Any] = {}
        self.counters: dict[str, int] = {}
        self.counted_at: float | None = None
        """When a counter was last seen to grow."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(mesh, state) → nodes."""
        self._counted = 0
        self.received: float | None = None
        """When the last frame came; None before the first."""
        self.version = 0

    @property
    def my_id(self) -> str:
        return clean(self.me.get("id"))

    @property
    def mesh(self) -> str:
        """The mesh of the attached node."""
        return clean(self.me.get("mesh"))

    def mesh_of(self, row: Row) -> MeshRow | None:
        """The mesh of a node, where the agent tells of it."""
        return self.directory.rows.get(row.mesh)

    def fold(self, frame: Doc, now: float) -> Change:
        """Takes one frame of `watch`. Nonsense in it is left out, never raised: the screen must go on."""
        change = Change(full=frame.get("full") is True)
        self.received = now
        self.version += 1
        me = frame.get("me")
        if isinstance(me, Mapping):
            self.me = dict(me)
        rows = [row for row in _list(frame, "rows") if isinstance(row, Mapping) and row.get("id")]
        if change.full:
            fresh = {clean(row["id"]) for row in rows}
            change.gone = set(self.rows) - fresh
        if gone := _list(frame, "gone"):
            change.gone |= {clean(node) for node in gone} & self.rows.keys()
        for node in change.gone:
            self._count(self.rows.pop(node), -1)
        counted = self._counted
        for data in rows:
            change.rows.add(self._put(data, now))
        change.moved = bool(change.gone) or self._counted != counted
        events = [event for event in _list(frame, "events") if isinstance(event, Mapping)]
        change.events = self.events.replace(events) if change.full else self.events.extend(events)
        if change.full and not isinstance(frame.get("meshes"), list):
            self.directory.clear()
        elif "meshes" in frame:
            change.meshes = True
            change.moved |= self.directory.fold(frame["meshes"], now)
        counters = frame.get("counters")
        if isinstance(counters, Mapping):
            before = dict(self.counters)
            if change.full:
                self.counters = {}
            for code, count in counters.items():
                if (figure := number(count)) is not None:
                    self.counters[clean(code)] = int(figure)
            if self.counters != before:
                self.counted_at = now
        return change

    def started(self, data: Doc, now: float) -> Change:
        """Shows a node that was started here until its own mesh tells of it: nothing is known of it but that."""
        if clean(data.get("id")) in self.rows:
            return Change()
        blank = dict.fromkeys(("cpu", "mem", "disk", "rtt_ms", "build", "fresh", "last_seen_ms", "evidence"))
        row = {**blank, "state": "joining", "source": "spawned", "since_ms": 0, **data}
        return Change({self._put(row, now)}, moved=True)

    def ended(self, node: str) -> Change:
        """Takes away a node that was started here and ended before anybody told of it."""
        row = self.rows.get(node)
        if row is None or row.data.get("source") != "spawned":
            return Change()
        self._count(self.rows.pop(node), -1)
        return Change(gone={node}, moved=True)

    def _put(self, data: Doc, now: float) -> str:
        node = clean(data["id"])
        row = self.rows.get(node)
        if row is None:
            row = self.rows[node] = Row(data, now)
            self._count(row, 1)
            return node
        before = (row.mesh, row.state)
        row.update(data, now)
        if before != (row.mesh, row.state):
            self.counts[before] -= 1
            self._count(row, 1)
        return node

    def _count(self, row: Row, by: int) -> None:
        self.counts[(row.mesh, row.state)] += by
        self._counted += 1

    def by_state(self, mesh: str | None = None) -> Counter[str]:
        """Nodes a state, of one mesh or of all."""
        found: Counter[str] = Counter()
        for (of, state), count in self.counts.items():
            if count > 0 and mesh in (None, of):
                found[state] += count
        return found

    def meshes(self) -> dict[str, int]:
        """Mesh → nodes, by name; the dead count, since they are shown. A mesh that tells only counts has these."""
        found: Counter[str] = Counter()
        for (mesh, _), count in self.counts.items():
            if count > 0:
                found[mesh] += count
        for mesh, row in self.directory.rows.items():
            if mesh not in found:
                found[mesh] = int(row.total or 0)
        return dict(sorted(found.items()))

    def silence_ms(self, now: float) -> float | None:
        """Since the agent's last frame; None before the first."""
        return None if self.received is None else (now - self.received) * 1000

    def refused(self) -> tuple[int, list[tuple[str, int]]]:
        """Refused input of any kind, the total and each code, most first."""
        found = sorted(
            ((c, n) for c, n in self.counters.items() if n > 0), key=lambda item: (-item[1], item[0])
        )
        return sum(count for _, count in found), found


def _list(frame: Doc, key: str) -> list[Any]:
    found = frame.get(key)
    return found if isinstance(found, list) else []


def rows_of(documents: Iterable[Doc], now: float = 0.0) -> list[Row]:
    """Rows from documents that were read once, as `qd nodes` prints them."""
    return [Row(data, now) for data in documents if isinstance(data, Mapping) and data.get("id")]
