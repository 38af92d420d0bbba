"""The map: a lane a mesh, a card a node, and the measured paths from the node that the console is attached to.

Nodes of other meshes have no measured path: they stand in their lane, and only the lane itself has an edge, as long
as the way to that mesh was measured.

Distance on the map is measured time: a card stands the further to the right the longer its round trip, on a scale
that is drawn over the lane. Only what was measured has an edge. A node without a measurement stands apart and says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from tui.model import ages
from tui.model.columns import load_role
from tui.model.glyphs import STATES, UNICODE, Glyphs, bar
from tui.model.lane_paths import TRUNK, measured, over_group
from tui.model.mesh_columns import counts as mesh_counts
from tui.model.meshes import MeshRow
from tui.model.rows import Row, marks
from tui.model.spans import Line, fit, line_width
from tui.model.text import elide, width, wrap

LEAST_LANE = 37
MOST_LANE = 96
GAP = 2
LEAST_SCALE = 20
"""Cells below which the scale has no room for its marks."""
SCALE_MS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ends of the scale and its marks; shorter and longer paths stand at the ends."""


@dataclass(frozen=True)
class Card:
    """Where a node's card is: its lane, and the place, in cells, of the lines that belong to it."""

    node: str
    lane: int
    x: int
    y: int
    width: int
    height: int = 2


@dataclass
class Chart:
    """The whole map as lines, and the cards on it in reading order."""

    lines: list[Line]
    cards: list[Card]
    _of: dict[str, Card] = field(default_factory=dict)

    def card(self, node: str | None) -> Card | None:
        """The card of a node, None where it has none."""
        if len(self._of) != len(self.cards):
            self._of = {card.node: card for card in self.cards}
        return self._of.get(node or "")

    def at(self, x: int, y: int) -> Card | None:
        """The card under a cell."""
        for card in self.cards:
            if card.y <= y < card.y + card.height and card.x <= x < card.x + card.width:
                return card
        return None

    def step(self, node: str | None, key: str) -> str | None:
        """The card that a key leads to from another one."""
        here = self.card(node)
        if here is None:
            return self.cards[0].node if self.cards else None
        lane = [card for card in self.cards if card.lane == here.lane]
        at = lane.index(here)
        if key in ("up", "down", "page_up", "page_down"):
            by = {"up": -1, "down": 1, "page_up": -5, "page_down": 5}[key]
            return lane[max(0, min(len(lane) - 1, at + by))].node
        if key in ("first", "last"):
            return self.cards[0 if key == "first" else -1].node
        lanes = sorted({card.lane for card in self.cards})
        to = lanes.index(here.lane) + (1 if key == "right" else -1)
        if not 0 <= to < len(lanes):
            return here.node
        there = [card for card in self.cards if card.lane == lanes[to]]
        return min(there, key=lambda card: abs(card.y - here.y)).node


def position(rtt_ms: float, cells: int) -> int:
    """How far to the right of the hub a round trip stands, on a logarithmic scale of `cells`."""
    low, high = math.log10(SCALE_MS[0]), math.log10(SCALE_MS[-1])
    at = (math.log10(max(rtt_ms, 1e-6)) - low) / (high - low)
    return round(max(0.0, min(1.0, at)) * cells)


def chart(
    rows: Iterable[Row],
    me: str,
    cells: int,
    now: float,
    marked: Iterable[str] = (),
    glyphs: Glyphs = UNICODE,
    origin: str = "",
    meshes: Mapping[str, MeshRow] = {},
    bare: Collection[str] = (),
) -> Chart:
    """Draws the map of `rows` for a screen of `cells`. `origin`: name of the node that measures, `me` its id.

    `meshes`: what is known of whole meshes; `bare` names those that get a lane though no node of theirs is known.
    """
    lanes: dict[str, list[Row]] = {mesh: [] for mesh in bare if mesh in meshes}
    for row in rows:
        lanes.setdefault(row.mesh, []).append(row)
    mine = next((row.mesh for found in lanes.values() for row in found if row.id == me), None)
    names = sorted(lanes, key=lambda mesh: (mesh != mine, mesh))
    paths = {mesh: path for mesh, path in measured(meshes, mine).items() if mesh in lanes}
    group = _beside(cells, len(names))
    left = TRUNK if any(mesh in paths for mesh in names[group:]) else 0
    group = _beside(cells - left, len(names))
    lane_cells = min(MOST_LANE, (cells - left - GAP * (group - 1)) // group)
    last = max((at // group for at, mesh in enumerate(names) if mesh in paths), default=0) if left else 0
    out = Chart([], [])
    for first in range(0, len(names), group):
        drawn = [
            _Lane(mesh, lanes[mesh], me, origin, lane_cells, now, frozenset(marked), glyphs, meshes.get(mesh))
            for mesh in names[first : first + group]
        ]
        at_group = first // group
        starts = [left + column * (lane_cells + GAP) for column in range(len(drawn))]
        ways = [(paths[lane.mesh], x) for lane, x in zip(drawn, starts, strict=True) if lane.mesh in paths]
        out.lines += over_group(ways, cells, glyphs, at_group > 0, at_group == last)
        top = len(out.lines)
        for column, (lane, x0) in enumerate(zip(drawn, starts, strict=True)):
            for node, x, y, wide in lane.cards:
                out.cards.append(Card(node, first + column, x0 + x, top + y, wide))
        for at in range(max(len(lane.lines) for lane in drawn)):
            line: Line = []
            if left:
                line.append((_trunk(glyphs, at, at_group, last), "frame"))
            for column, lane in enumerate(drawn):
                line += [(" " * GAP, "text")] if column else []
                line += lane.lines[at] if at < len(lane.lines) else [(" " * lane_cells, "text")]
            out.lines.append(line)
        goes_on = left and at_group < last
        out.lines.append([(glyphs.tree[2], "frame")] if goes_on else [])
    return out


def _beside(cells: int, lanes: int) -> int:
    """How many lanes stand beside each other."""
    return max(1, min(lanes, (cells + GAP) // (LEAST_LANE + GAP)))


def _trunk(glyphs: Glyphs, at: int, group: int, last: int) -> str:
    """The trunk beside one line of a group: it leaves the first lane at its first line, and ends at the last path."""
    if group == 0 and at <= 1:
        return " " * TRUNK if at == 0 else glyphs.box[0] + glyphs.tree[3] * (TRUNK - 1)
    return (glyphs.tree[2] if group < last else " ") + " " * (TRUNK - 1)


class _Lane:
    """One mesh in its frame."""

    def __init__(
        self,
        mesh: str,
        rows: list[Row],
        me: str,
        origin: str,
        cells: int,
        now: float,
        marked: frozenset[str],
        glyphs: Glyphs,
        told: MeshRow | None,
    ) -> None:
        self.mesh, self._me, self._cells, self._now, self._glyphs = mesh, me, cells, now, glyphs
        self._marked, self._told = marked, told
        self.lines: list[Line] = []
        self.cards: list[tuple[str, int, int, int]] = []
        self._inner = cells - 4
        longest = max((width(self._name(row)) for row in rows), default=8)
        self._card = max(16, min(longest + 4, 28, self._inner - 10))
        hub = next((row for row in rows if row.text("source") == "self"), None)
        """The node whose measurements these are: each mesh is answered for by one of its own where one is attached."""
        measured = [
            row for row in rows if row is not hub and row.present and row.figure("rtt_ms") is not None
        ]
        near = {row.id for row in measured}
        apart = [row for row in rows if row is not hub and row.id not in near]
        measured.sort(key=lambda row: (row.figure("rtt_ms") or 0.0, row.name))
        apart.sort(key=lambda row: (row.rank, row.name))
        self._frame_top(rows)
        if hub is not None:
            self._place(hub, 0, [])
        if measured:
            if hub is None:
                self._put([(f"from {elide(origin, self._inner - 5)}" if origin else "from here", "soft")])
            self._scale()
            for row in measured:
                self._path(row, last=row is measured[-1] and not apart)
        if not rows and told is not None:
            for part in wrap(told.detail(now) or "its nodes are not known here yet", self._inner):
                self._put([(part, "soft")])
        if apart:
            if hub is not None or measured:
                self._put([])
            if hub is not None or measured or any(row.remote and row.present for row in apart):
                self._put([("no measured path from here", "soft")])
            for row in apart:
                self._place(row, 2, [])
        self._frame_bottom()

    def _name(self, row: Row) -> str:
        return row.name.removeprefix(f"{self.mesh}.")

    def _put(self, line: Line) -> None:
        side = self._glyphs.box[5]
        self.lines.append([(f"{side} ", "frame"), *fit(line, self._inner), (f" {side}", "frame")])

    def _frame_top(self, rows: list[Row]) -> None:
        top_left, top_right, rule = self._glyphs.box[0], self._glyphs.box[1], self._glyphs.box[4]
        counts: Line = []
        for state in reversed(STATES):
            count = sum(row.state == state for row in rows)
            if count:
                counts += [(" ", "text"), (f"{self._glyphs.state(state)}{count}", state)]
        if not rows and self._told is not None:
            counts = [(" ", "text"), *mesh_counts(self._told, self._glyphs)]
        head: Line = [(f"{top_left}{rule} ", "frame"), (elide(self.mesh, max(4, self._cells - 12)), "title")]
        for tail in (*([*counts, *lease] for lease in self._leases()), counts, []):
            said: Line = [*head, *tail, (" ", "frame")]
            if line_width(said) <= self._cells - 2:
                break
        fill = self._cells - line_width(said) - 1
        self.lines.append([*said, (rule * fill + top_right, "frame")])

    def _leases(self) -> list[Line]:
        """Who holds the lease and for how long, or what is wrong with it: the longest first."""
        told = self._told
        if told is None:
            return []
        gap = ("  ", "text")
        wrong: Line = [gap, ("IMPOSTOR", "hot")] if told.impostors else []
        said = told.lease(self._now)
        if told.expired or told.vacant:
            return [[*wrong, gap, (said, "hot")], [gap, (said, "hot")]]
        sign = self._glyphs.lease
        full: Line = [gap, (f"{sign} {told.known_by} {said}", "text")]
        short: Line = [gap, (f"{sign} {said}", "text")]
        return [[*wrong, *full], [*wrong, *short], short]

    def _frame_bottom(self) -> None:
        low_left, low_right, rule = self._glyphs.box[2], self._glyphs.box[3], self._glyphs.box[4]
        self.lines.append([(low_left + rule * (self._cells - 2) + low_right, "frame")])

    @property
    def _reach(self) -> int:
        """Cells over which the scale goes: what the longest label and the card leave."""
        return max(0, self._inner - self._card - 11)

    def _scale(self) -> None:
        """The scale over the edges: where 0.1 ms, 1 ms, 10 ms and so on are."""
        line = [" "] * self._inner
        if self._reach < LEAST_SCALE:
            label = f"{self._glyphs.arrow} slower"
            line[11 : 11 + len(label)] = label
        else:
            for at in SCALE_MS:
                label = f"{at:g}" + (" ms" if at == SCALE_MS[-1] else "")
                x = 11 + position(at, self._reach)
                line[x : x + len(label)] = label
            line = line[: self._inner]
        self._put([(self._glyphs.tree[2], "frame"), ("".join(line)[1:], "soft")])

    def _path(self, row: Row, last: bool) -> None:
        """A measured path: an edge as long as its time, its time on it, and the card at its end."""
        branch, end, trunk, edge = tuple(self._glyphs.tree)
        rtt = row.figure("rtt_ms") or 0.0
        label = f" {ages.rtt(rtt)} "
        room = 8 + position(rtt, self._reach)
        rest = max(1, room - width(label))
        lead: Line = [
            (end if last else branch, "frame"),
            (edge, "frame"),
            (label, "text"),
            (edge * rest, "frame"),
            (" ", "text"),
        ]
        below: Line = [(" " if last else trunk, "frame"), (" " * (line_width(lead) - 1), "text")]
        self._place(row, line_width(lead), lead, below)

    def _place(self, row: Row, x: int, lead: Line, below: Line | None = None) -> None:
        glyphs = self._glyphs
        self.cards.append((row.id, 2 + x, len(self.lines), min(self._card, self._inner - x)))
        indent: Line = lead if lead else [(" " * x, "text")]
        mark = glyphs.mark if row.id in self._marked else ""
        holds = self._told is not None and not self._told.expired and self._told.publisher_id == row.id
        flag = f" {glyphs.lease}" if holds else ""
        room = self._card - 2 - len(mark) - len(flag)
        old = row.expired or row.late(self._now)
        card: Line = [
            (f"{glyphs.state(row.state)} ", row.state),
            (mark, "accent"),
            (elide(self._name(row), room), "name"),
            (flag, "text"),
        ]
        extra = [(word, role) for word, role, _ in marks(row, self._me)]
        if extra and self._inner - x - line_width(card) > len(extra[0][0]) + 1:
            card += [(" ", "text"), extra[0]]
        cpu = None if row.state == "dead" else row.figure("cpu")
        if row.state == "alive" or row.state == "degraded":
            filled, rest = bar(cpu, max(4, min(10, self._card - 8)), glyphs)
            load: Line = [
                ("  ", "text"),
                (filled, row.state),
                (rest, "track"),
                (f" {ages.share(cpu):>4}", load_role(cpu)),
            ]
        else:
            load = [("  ", "text"), (f"{row.state} {ages.age(row.since_ms(self._now))}", row.state)]
            if cpu is not None:
                load.append((f"  {ages.share(cpu)}", load_role(cpu)))
        if old:
            card = [(text, "dim") for text, _ in card]
            load = [*[(text, "dim") for text, _ in load], (f"  {ages.age(row.age_ms(self._now))} old", "dim")]
        self._put([*indent, *card])
        self._put([*(below if below is not None else [(" " * x, "text")]), *load])
