"""The meshes as one agent tells them: who publishes each, how long its lease still runs, and what is wrong with it.

A mesh keeps the moment it was received, as a node's row does: its countdown goes down and its age goes up by the
viewer's own clock, so that a silent line never shows a lease that still runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.glyphs import STATES
from tui.model.text import clean

Doc = Mapping[str, Any]
MOST = 1_000
"""Meshes that are taken from one frame; as many as an agent may know."""
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
"""What a mesh may be called, and so what `@` can narrow to."""


@dataclass(frozen=True)
class Impostor:
    """Another key that publishes under the name of a mesh."""

    pub: str
    publisher: str
    age_ms: float | None
    """As of when the mesh was received."""


@dataclass(frozen=True)
class Mark:
    """Something about a mesh that wants a look, and one line saying what to do."""

    word: str
    role: str
    advice: str


class MeshRow:
    """One mesh in this view. `data` is the row as received."""

    __slots__ = (
        "_search",
        "backbone",
        "counts",
        "data",
        "expired",
        "id",
        "impostors",
        "name",
        "publisher",
        "publisher_addr",
        "publisher_id",
        "received",
        "route",
    )

    def __init__(self, data: Doc, now: float) -> None:
        self.update(data, now)

    def update(self, data: Doc, now: float) -> None:
        """Takes newer news of the same mesh."""
        self.data = data
        self.received = now
        self.name = self.id = mesh_name(data)
        publisher = data.get("publisher")
        given: Mapping[str, Any] = publisher if isinstance(publisher, Mapping) else {}
        self.publisher_id = clean(given.get("id"))
        self.publisher = clean(given.get("name")) or self.publisher_id
        self.publisher_addr = clean(given.get("addr"))
        self.expired = data.get("expired") is True
        self.route = clean(data.get("route"))
        self.backbone = clean(data.get("backbone"))
        self.impostors = tuple(_impostors(data.get("impostors")))
        nodes = data.get("nodes")
        counts = nodes if isinstance(nodes, Mapping) else {}
        figures = {state: number(counts.get(state)) for state in STATES}
        self.counts = {state: int(count) for state, count in figures.items() if count and count > 0}
        if self.expired:  # whatever was told of them, nobody knows any more
            gone = number(counts.get("total")) or sum(self.counts.values())
            self.counts = {"dead": int(gone)} if gone > 0 else {}
        self._search: str | None = None

    def figure(self, key: str) -> float | None:
        """A number of the row, None where it is unknown or nonsense."""
        return number(self.data.get(key))

    def text(self, key: str) -> str:
        """A text of the row, cleaned; empty where it is unknown."""
        return clean(self.data.get(key))

    @property
    def total(self) -> float | None:
        """Nodes in it, the dead included; None where nobody told."""
        nodes = self.data.get("nodes")
        return number(nodes.get("total")) if isinstance(nodes, Mapping) else None

    @property
    def own(self) -> bool:
        """Whether it is the mesh of the node that answers."""
        return self.data.get("listed") is None

    @property
    def counts_only(self) -> bool:
        """Whether it tells this mesh nothing but its counts."""
        return self.data.get("listed") is False

    @property
    def vacant(self) -> bool:
        """Whether nobody holds its lease."""
        return not self.expired and not self.publisher_id

    @property
    def fallen_back(self) -> str:
        """What its backbone lacks, such as `nats away`; empty while nothing does."""
        found = re.search(r"\(([^()]+)\)", self.backbone)
        return found[1].strip() if found else ""

    @property
    def named(self) -> bool:
        """Whether a locator can name it: another machine may call a mesh anything."""
        return NAME.fullmatch(self.name) is not None

    @property
    def rank(self) -> int:
        """Trouble first."""
        return 0 if self.impostors else 1 if self.expired else 2 if self.fallen_back or self.vacant else 3

    @property
    def known_by(self) -> str:
        """Its publisher without the mesh's own name before it."""
        return self.publisher.removeprefix(f"{self.name}.")

    def expires_ms(self, now: float) -> float | None:
        """What is left of its lease, negative once that is over; None where nobody holds it."""
        left = self.figure("expires_in_ms")
        return None if left is None else left - (now - self.received) * 1000

    def age_ms(self, now: float) -> float | None:
        """Since the answering node last had news of it."""
        age = self.figure("age_ms")
        return None if age is None else age + (now - self.received) * 1000

    def gone_ms(self, now: float) -> float | None:
        """Since it has expired; None where that isn't known."""
        left = self.expires_ms(now)
        return -left if left is not None and left < 0 else None

    def lease(self, now: float) -> str:
        """`4s`, `expired 42s`, `overdue 3s` where it should have been renewed, `vacant`."""
        left = self.expires_ms(now)
        if self.expired:
            gone = self.gone_ms(now)
            return "expired" if gone is None else f"expired {ages.age(gone)}"
        if not self.publisher_id:
            return "vacant"
        if left is None:
            return ages.UNKNOWN
        if left <= -1000:
            return f"overdue {ages.age(-left)}"
        return ages.age(math.ceil(max(0.0, left) / 1000) * 1000)

    def expiry(self, now: float) -> str:
        """Why its nodes are not shown as live, as a sentence that counts on."""
        age = self.age_ms(now)
        heard = "nothing is heard from it" if age is None else f"nothing heard from it for {ages.age(age)}"
        return f"mesh {self.name} expired: {heard}"

    def path(self) -> str:
        """How it is reached from here: `direct, 18ms`, `by relay`; empty where that isn't known."""
        if self.expired:
            return ""
        way = {"relay": "by relay"}.get(self.route, self.route)
        rtt = self.figure("rtt_ms")
        return ", ".join(part for part in (way, "" if rtt is None else ages.rtt(rtt)) if part)

    def marks(self, now: float, mine: bool = False) -> list[Mark]:
        """Everything about it that wants a look, the gravest first."""
        found = []
        if self.impostors:
            found.append(Mark("IMPOSTOR", "hot", impostor_text(self.name)))
        if self.expired:
            age = self.age_ms(now)
            heard = "" if age is None else f" for {ages.age(age)}"
            said = f"nothing heard{heard}: its nodes are not live here, and leave after 10 min"
            found.append(Mark("EXPIRED", "dead", said))
        if self.fallen_back:
            said = f"{self.fallen_back}: the pool carries the backbone meanwhile; see to its servers"
            found.append(Mark(self.fallen_back, "hot", said))
        if self.vacant:
            said = "nobody publishes it: other meshes don't see it; start a gateway or console"
            found.append(Mark("vacant", "hot", said))
        if self.counts_only:
            said = "counts only: it must list this mesh's key in its config/authorized_meshes"
            found.append(Mark("counts only", "text", said))
        if mine:
            found.append(Mark("you", "accent", "the mesh of the node this console is attached to"))
        return found

    def detail(self, now: float) -> str:
        """The line below it: the gravest that there is to say, else what its agent adds; mostly empty."""
        told = [mark.advice for mark in self.marks(now)]
        return told[0] if told else self.text("reason")

    @property
    def search(self) -> str:
        """What bare words and regular expressions look at."""
        if self._search is None:
            words = [self.name, self.publisher, self.publisher_id, self.publisher_addr, self.text("pub")]
            words += [self.route, self.backbone, self.text("reason")]
            words += [mark.word for mark in self.marks(self.received)]
            words += [word for imp in self.impostors for word in (imp.pub, imp.publisher)]
            words += ["home"] if self.data.get("home") is True else []
            self._search = " ".join(word for word in words if word).lower()
        return self._search


def impostor_text(mesh: str) -> str:
    """What another key under a mesh's name means, and what to do."""
    return f"another key publishes {mesh} (not shown): look who holds your backbone key"


def mesh_name(data: Doc) -> str:
    """What a mesh is called, in at most 64 characters."""
    name = data.get("mesh")
    return clean(name).strip()[:64] if isinstance(name, str) else ""


def _impostors(given: object) -> Iterable[Impostor]:
    for item in given[:8] if isinstance(given, list) else ():
        if isinstance(item, Mapping):
            by = item.get("publisher")
            name = by.get("name") if isinstance(by, Mapping) else by
            yield Impostor(clean(item.get("pub")), clean(name), number(item.get("age_ms")))


def rows_of(documents: Iterable[object], now: float = 0.0) -> list[MeshRow]:
    """The meshes of one list, each once; what has no name is no mesh."""
    found: dict[str, MeshRow] = {}
    for data in documents:
        if isinstance(data, Mapping) and (name := mesh_name(data)) and name not in found:
            found[name] = MeshRow(data, now)
            if len(found) == MOST:
                break
    return list(found.values())


class Meshes:
    """Every mesh of the view by name, as the last frame that told of them has it."""

    def __init__(self) -> None:
        self.rows: dict[str, MeshRow] = {}
        self.holders: dict[str, MeshRow] = {}
        """Node id → the mesh that it publishes."""

    def fold(self, given: object, now: float) -> bool:
        """Takes the whole list of a frame; whether that is news, as opposed to newer figures. Any nonsense will do."""
        if not isinstance(given, list):
            return False
        before = {name: self._standing(row) for name, row in self.rows.items()}
        self.rows = {row.name: row for row in rows_of(given, now)}
        self.holders = {
            row.publisher_id: row for row in self.rows.values() if row.publisher_id and not row.expired
        }
        return before != {name: self._standing(row) for name, row in self.rows.items()}

    def clear(self) -> None:
        self.rows, self.holders = {}, {}

    @staticmethod
    def _standing(row: MeshRow) -> tuple[object, ...]:
        return row.publisher_id, row.expired, row.counts, row.backbone, len(row.impostors), row.counts_only
