"""What the mesh keeps as replicas, chains and artifacts: how many hold each, how many should, and what is on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tui.model import ages
from tui.model.ages import number
from tui.model.asked import Asked
from tui.model.locator import Locator, Term
from tui.model.spans import Line
from tui.model.table import Column, Scene, hidden, text_cell
from tui.model.text import clean, shorten, width

ADMIN, NODE = "admin", "node/"
"""The mesh's own chains: the admin chain, and how the name of a node's action chain begins."""
KNOWN_S = 15.0
"""So long an answer is good for a forecast."""
MOST_NAMES = 64
"""Holders and pulls of a row that are looked at."""
Cell = Callable[["Chain", Scene, int], Line]


class Pull:
    """A copy on its way: to whom, and which share of it is there; None where that isn't known yet."""

    __slots__ = ("node", "share")

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.node = clean(data.get("node"))
        done, total = number(data.get("done")), number(data.get("total"))
        self.share = None if done is None or not total or total < 0 else max(0.0, min(1.0, done / total))

    @property
    def text(self) -> str:
        return f"{self.node} {'begins' if self.share is None else ages.share(self.share)}"


class Chain:
    """One chain or artifact, as the answering node counts it. `settles` counts on by the viewer's own clock."""

    __slots__ = (
        *("data", "desired", "held", "holders", "id", "kind", "leader", "mesh", "name", "node", "pulls"),
        *("rank", "received", "search"),
    )

    def __init__(self, data: Mapping[str, Any], now: float) -> None:
        self.data = data
        self.received = now
        self.name = clean(data.get("name"))
        self.kind = clean(data.get("kind"))
        self.mesh = clean(data.get("mesh"))
        self.leader = clean(data.get("leader"))
        self.node = of_mesh(self.mesh)
        holders = data.get("holders")
        self.holders = (
            tuple(clean(name) for name in holders[:MOST_NAMES]) if isinstance(holders, list) else ()
        )
        pulls = data.get("pulls")
        given = pulls[:MOST_NAMES] if isinstance(pulls, list) else []
        self.pulls = tuple(Pull(pull) for pull in given if isinstance(pull, Mapping))
        self.held, self.desired = number(data.get("held")), number(data.get("desired"))
        self.id = f"{self.mesh}/{self.kind}/{self.name}"
        self.rank = self._rank()
        words = [self.name, self.kind, self.mesh, *self.holders, *(pull.node for pull in self.pulls)]
        self.search = " ".join([*words, clean(data.get("hash"))]).lower()

    def _rank(self) -> int:
        """Under-held first, and of those what nobody holds; then what moves; what is as it should be last."""
        if self.missing:
            return 0 if not self.held else 1
        return 2 if self.pulls else 3 if self.spare or self.held is None else 4

    @property
    def own(self) -> bool:
        """Whether the mesh keeps it of its own accord: the admin chain, and the action chain of a node."""
        return self.kind == "chain" and (self.name == ADMIN or self.name.startswith(NODE))

    @property
    def missing(self) -> int:
        """How many holders too few; 0 where that isn't known."""
        return 0 if self.held is None or self.desired is None else max(0, int(self.desired - self.held))

    @property
    def spare(self) -> int:
        """How many holders too many."""
        return 0 if self.held is None or self.desired is None else max(0, int(self.held - self.desired))

    @property
    def uncounted(self) -> str:
        """Said where some of the holders don't count, because they are drained or in maintenance."""
        extra = len(self.holders) - int(self.held or 0)
        if extra <= 0 or self.held is None or len(self.holders) == MOST_NAMES:
            return ""
        who = "1 holder is" if extra == 1 else f"{extra} holders are"
        return f"{who} drained or in maintenance, and not counted"

    @property
    def counts(self) -> str:
        """`2/3`; `–` for what isn't known."""
        return "/".join(ages.UNKNOWN if n is None else f"{n:.0f}" for n in (self.held, self.desired))

    def left_ms(self, now: float) -> float | None:
        """For how long still changes of it wait until it has settled; None when nothing waits."""
        left = number(self.data.get("stabilising_ms"))
        left = None if not left else left - (now - self.received) * 1000
        return left if left is not None and left > 0 else None

    def coming(self) -> str:
        """Every copy on its way with its progress; empty for none."""
        return ", ".join(pull.text for pull in self.pulls)

    def detail(self, now: float) -> str:
        """The line below one that has too few or too many holders; empty for one as it should be."""
        coming, left = self.coming(), self.left_ms(now)
        waits = f"changes wait {ages.countdown(left)} until it has settled" if left is not None else ""
        if self.missing:
            lack = f"{self.missing} more wanted" if self.held else "nobody holds it"
            back = clean(self.data.get("held_back"))
            how = f"on its way to {coming}" if coming else back or "no copy is on its way"
            return "; ".join(part for part in (f"{lack}: {how}", self.uncounted) if part)
        if self.spare:
            return ", ".join(part for part in (f"{self.spare} more than wanted", waits) if part)
        return f"on its way to {coming}" if coming else ""

    def whole(self, now: float) -> str:
        """Everything about it in one paragraph."""
        left = self.left_ms(now)
        parts = [
            f"{self.kind or 'chain'} {self.name}",
            f"{self.counts} held" + (f": {', '.join(self.holders)}" if self.holders else ""),
            f"leader {self.leader}"
            if self.leader
            else "no leader"
            if self.name != ADMIN
            else "on every node",
            self.detail(now),
            f"settles in {ages.countdown(left)}" if left is not None and not self.missing else "",
            "" if self.bytes is None else ages.size(self.bytes),
            f"sha256 {clean(self.data.get('hash'))}" if self.data.get("hash") else "",
        ]
        return "; ".join(part for part in parts if part)

    @property
    def bytes(self) -> float | None:
        return number(self.data.get("size"))

    def holders_place(self) -> Locator | None:
        """The fleet, narrowed to who holds it; None when nobody does."""
        if not self.holders:
            return None
        return Locator("fleet", (Term("match", "\0".join(self.holders), "name"),))


def of_mesh(mesh: str) -> str:
    """Who is silent when a mesh doesn't say what it keeps; its rows stay for a while, as those of a silent node do."""
    return f"mesh {mesh}"


def make(data: Mapping[str, Any], now: float) -> Chain | None:
    """A row; None for one without a name."""
    return Chain(data, now) if isinstance(data.get("name"), str) and clean(data["name"]) else None


class Chains(Asked[Chain]):
    """Every chain and artifact of the attached node's mesh, as last asked for."""

    how = "knows"

    def __init__(self) -> None:
        super().__init__(make)

    def known(self, now: float) -> list[Chain]:
        """What was told within KNOWN_S, for a forecast."""
        return list(self.rows.values()) if self.at is not None and now - self.at <= KNOWN_S else []

    def summary(self) -> Line:
        """`2 under-held`, `1 on its way`; empty while all is as it should be."""
        lacking = sum(chain.missing > 0 for chain in self.rows.values())
        moving = sum(bool(chain.pulls) for chain in self.rows.values())
        out: Line = [(f"{lacking} under-held  ", "hot")] if lacking else []
        return [*out, (f"{moving} on the way", "text")] if moving else out


def chain_key(chain: Chain) -> tuple[int, bool, str, str, str]:
    """The default order: under-held first; of equals those of people before the mesh's own; then by name."""
    return chain.rank, chain.own, chain.name, chain.kind, chain.mesh


def chain_height(chain: Chain) -> int:
    """Lines of a row: two when there is something to say about it."""
    return 2 if chain.detail(chain.received) else 1


def chain_lead(chain: Chain, scene: Scene) -> Line:
    """The sign before a row: too few hold it, a copy is on its way, or all is well."""
    if chain.missing:
        return [(scene.glyphs.state("degraded") if chain.held else "!", "degraded" if chain.held else "dead")]
    if chain.pulls:
        return [(scene.glyphs.state("updating"), "updating")]
    return [(scene.glyphs.state("alive"), "alive")] if chain.held is not None else [("?", "soft")]


def _held(chain: Chain, scene: Scene, cells: int) -> Line:
    return [(chain.counts, "hot" if chain.missing else "text")]


def _size(chain: Chain, scene: Scene, cells: int) -> Line:
    return [(ages.size(chain.bytes), "soft" if chain.bytes is None else "text")]


def _settles(chain: Chain, scene: Scene, cells: int) -> Line:
    left = chain.left_ms(scene.now)
    return [] if left is None else [(ages.countdown(left), "hot")]


def _coming(chain: Chain, scene: Scene, cells: int) -> Line:
    return [(shorten(chain.coming(), cells, scene.glyphs.ellipsis), "updating")] if chain.pulls else []


def _held_by(chain: Chain) -> str:
    """The holders, without the mesh that all of their names begin with."""
    return ", ".join(name.removeprefix(f"{chain.mesh}.") for name in chain.holders)


CHAINS: tuple[Column[Chain], ...] = (
    Column(
        "name", "NAME", "text", (12, 40), 0, text_cell(lambda c: c.name, "name"), lambda c, now: c.name,
        "its name in the mesh", ideal=lambda c, s: width(c.name), grows=(3,),
    ),
    Column("kind", "KIND", "word", (8,), 2, text_cell(lambda c: c.kind), lambda c, now: c.kind or None, "chain or artifact"),
    Column(
        "held", "HELD", "number", (5,), 0, _held, lambda c, now: c.held,
        "how many hold it and count, of how many should", right=True,
    ),
    Column("size", "SIZE", "number", (10,), 5, _size, lambda c, now: c.bytes, "how large it is, in bytes", right=True),
    Column(
        "leader", "LEADER", "text", (14, 40), 3, text_cell(lambda c: c.leader.removeprefix(f"{c.mesh}.")),
        lambda c, now: c.leader or None, "the node that leads it: its highest-id live holder",
        ideal=lambda c, s: width(c.leader.removeprefix(f"{c.mesh}.")), grows=(6,),
    ),
    Column(
        "settles", "SETTLES", "duration", (7,), 2, _settles, lambda c, now: c.left_ms(now),
        "until changes of it are let through again", needs="settles", right=True,
    ),
    Column(
        "coming", "COMING", "text", (16, 60), 1, _coming, lambda c, now: c.coming() or None,
        "copies on their way, with their progress", needs="coming", ideal=lambda c, s: width(c.coming()), grows=(5,),
    ),
    Column(
        "mesh", "MESH", "word", (5, 16), 7, text_cell(lambda c: c.mesh), lambda c, now: c.mesh or None,
        "the mesh that keeps it", needs="meshes", ideal=lambda c, s: width(c.mesh),
    ),
    Column(
        "holders", "HOLDERS", "text", (16, 400), 4, text_cell(_held_by, cut=shorten),
        lambda c, now: ", ".join(c.holders) or None, "who holds it and lives",
        ideal=lambda c, s: width(_held_by(c)), grows=(6,),
    ),
)  # fmt: skip


CHAINS_HIDDEN: tuple[Column[Chain], ...] = (
    hidden("desired", "number", "how many should hold it", lambda c, now: c.desired),
    hidden("missing", "number", "how many holders too few", lambda c, now: float(c.missing)),
    hidden("underheld", "flag", "whether too few hold it", lambda c, now: c.missing > 0),
    hidden("hash", "word", "the hash of an artifact", lambda c, now: clean(c.data.get("hash")) or None),
)


def chain_facts(rows: list[Chain]) -> frozenset[str]:
    """Which of the optional columns have anything to show."""
    facts = {"meshes"} if len({chain.mesh for chain in rows}) > 1 else set()
    facts |= {"settles"} if any(c.left_ms(c.received) is not None for c in rows) else set()
    return frozenset(facts | ({"coming"} if any(chain.pulls for chain in rows) else set()))
