"""A table without a screen: which items are shown, in what order, in which columns, under which cursor.

Order and filter are kept, not recomputed: a change to some items re-sorts only when it moves one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Generic, TypeVar

from tui.model import ages
from tui.model.glyphs import UNICODE, Glyphs
from tui.model.locator import Field, Kind, Locator, Predicate, Value, compile_filter, sort_key
from tui.model.spans import Line
from tui.model.text import elide

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """What a cell may depend on besides its item."""

    now: float = 0.0
    me: str = ""
    mesh: str | None = None
    glyphs: Glyphs = UNICODE
    facts: frozenset[str] = frozenset()
    """What is there at all: names that `Column.needs` may ask for."""
    here: str = ""
    """The mesh of the attached node."""
    holders: Collection[str] = ()
    """Ids of the nodes that hold a mesh's lease."""
    find: str = ""
    """What is searched for, to be told apart."""


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: how it reads, filters, sorts, and when it leaves.

    `widths` go up: the first is the least it can live with, the others are taken when there is room.
    """

    key: str
    title: str
    kind: Kind
    widths: tuple[int, ...]
    priority: int
    """0 never leaves; the highest leaves first."""
    cell: Callable[[T, Scene, int], Line]
    value: Callable[[T, float], Value]
    about: str
    right: bool = False
    ideal: Callable[[T, Scene], int] | None = None
    """The width one item would like, for columns that fit their content; bounded by the last of `widths`."""
    needs: str = ""
    """Shown only when this fact holds, because it would be empty else."""
    grows: tuple[int, ...] = ()
    """For each further width, the priority after whose columns it is taken; without it, after all of them."""

    @property
    def schema(self) -> Field:
        return Field(self.kind, self.value)


def hidden(key: str, kind: Kind, about: str, value: Callable[[T, float], Value]) -> Column[T]:
    """A column to filter and sort by that has no place in the table."""
    return Column(key, "", kind, (1,), 99, lambda item, scene, cells: [], value, about, needs="never")


def text_cell(
    of: Callable[[T], str], role: str = "text", cut: Callable[[str, int, str], str] = elide
) -> Callable[[T, Scene, int], Line]:
    """A cell of one text, `–` where that is empty; `cut` shortens it."""

    def cell(item: T, scene: Scene, cells: int) -> Line:
        text = of(item)
        return [(cut(text, cells, scene.glyphs.ellipsis), role)] if text else [(ages.UNKNOWN, "soft")]

    return cell


@dataclass(frozen=True)
class Placed(Generic[T]):
    """A column with the place it got."""

    column: Column[T]
    x: int
    width: int


_LAST = 1000


def layout(
    columns: Sequence[Column[T]], cells: int, scene: Scene, sample: Iterable[T], left: int = 3, gap: int = 1
) -> list[Placed[T]]:
    """Columns for `cells`: by priority as many as fit at their least width, each wider when its turn comes.

    A column never pushes out one of a lower priority number, and the order on screen is that of `columns`.
    """
    wanted = [column for column in columns if not column.needs or column.needs in scene.facts]
    items = list(sample)
    room = cells - left
    chosen: dict[str, int] = {}
    levels = sorted({_LAST} | {turn for column in wanted for turn in (column.priority, *column.grows)})
    for level in levels:
        for column in wanted:
            if column.priority != level:
                continue
            need = column.widths[0] + (gap if chosen else 0)
            if need <= room:
                chosen[column.key] = column.widths[0]
                room -= need
            elif level == 0 and room > 4:
                chosen[column.key] = room - gap
                room = 0
        for column in wanted:
            for at, target in enumerate(column.widths[1:]):
                turn = column.grows[at] if at < len(column.grows) else _LAST
                have = chosen.get(column.key)
                if turn != level or have is None:
                    continue
                if column.ideal is not None:
                    content = max((column.ideal(item, scene) for item in items), default=have)
                    target = max(have, min(target, content, have + room))
                if have < target <= have + room:
                    room -= target - have
                    chosen[column.key] = target
    placed = []
    x = left
    for column in wanted:
        if column.key in chosen:
            placed.append(Placed(column, x, chosen[column.key]))
            x += chosen[column.key] + gap
    return placed


@dataclass
class Table(Generic[T]):
    """Items by id, narrowed and ordered by a locator, with a cursor and marks that follow the items they are on."""

    columns: Sequence[Column[T]]
    search: Callable[[T], str]
    tags: Callable[[T], Mapping[str, str]]
    default_key: Callable[[T], Any]
    height: Callable[[T], int] = lambda item: 1
    locator: Locator = field(default_factory=Locator)
    order: list[str] = field(default_factory=list)
    items: Mapping[str, T] = field(default_factory=dict)
    marks: set[str] = field(default_factory=set)
    cursor: str | None = None
    touched: bool = False
    """Whether the cursor was ever moved; until then it stays on the first line."""
    revision: int = 0
    """Goes up whenever the order of lines changed."""

    def __post_init__(self) -> None:
        self.schema = {column.key: column.schema for column in self.columns}
        self._accepts: Predicate[T] | None = None
        self._starts: list[int] | None = None
        self._at: dict[str, int] | None = None
        self._keys: dict[str, Any] = {}
        self._base: list[str] = []
        """Every item, in the default order of the last time."""
        self._last_index = 0

    def set_locator(self, locator: Locator, now: float) -> None:
        """Narrows and orders anew. LocatorError leaves everything as it was."""
        accepts = compile_filter(locator, self.schema, self.search, self.tags)
        if self.cursor in self.index and (locator.terms, locator.mesh) != (
            self.locator.terms,
            self.locator.mesh,
        ):
            self.touched = True  # who was found by a filter stays under the cursor when the filter goes
        self.locator = locator
        self._accepts = accepts
        self.rebuild(now)

    @property
    def timed(self) -> bool:
        """Whether filter or order depend on the clock, so that they change while nothing happens."""
        used = [term.column for term in self.locator.terms] + [column for column, _ in self.locator.sort]
        return any(column in self.schema and self.schema[column].kind == "duration" for column in used)

    def rebuild(self, now: float) -> None:
        """Filters and sorts everything."""
        accepts, items, key = self._accepts, self.items, self.default_key
        # The order of last time is nearly right, and a list nearly in order is sorted in one pass.
        known = [node for node in self._base if node in items]
        if len(known) != len(items):
            have = set(known)
            known += [node for node in items if node not in have]
        keys = {node: key(items[node]) for node in known}
        known.sort(key=keys.__getitem__)
        self._base = known
        if accepts is None:
            self._keys, self.order = keys, list(known)
        else:
            self.order = [node for node in known if accepts(items[node], now)]
            self._keys = {node: keys[node] for node in self.order}
        if self.locator.sort:
            self._keys = {
                node: (k, self._sort_values(self.items[node], now)) for node, k in self._keys.items()
            }
            for by, down in sort_key(self.locator, self.schema, now):
                self.order.sort(key=lambda node: by(self.items[node]), reverse=down)
        self.marks.intersection_update(self.items)
        self._moved()

    def _sort_values(self, item: T, now: float) -> tuple[Value, ...]:
        return tuple(self.schema[column].value(item, now) for column, _ in self.locator.sort)

    def _moved(self) -> None:
        self.revision += 1
        self._at = None
        self._starts = None
        if not self.order:
            return
        if not self.touched or self.cursor is None:
            self.cursor = self.order[0]
        elif self.cursor not in self.index:
            self.cursor = self.order[min(self._last_index, len(self.order) - 1)]
        self._last_index = self.index[self.cursor]

    def apply(self, changed: Collection[str], gone: Collection[str], now: float) -> bool:
        """Takes changes of some items; whether lines moved."""
        if self.timed or (gone and not self.index.keys().isdisjoint(gone)):
            self.rebuild(now)
            return True
        accepts, keys, taller = self._accepts, self._keys, False
        for node in changed:
            item = self.items.get(node)
            shown = item is not None and (accepts is None or accepts(item, now))
            if shown != (node in keys):
                self.rebuild(now)
                return True
            if item is None or not shown:
                continue
            key: Any = self.default_key(item)
            if self.locator.sort:
                key = (key, self._sort_values(item, now))
            if key != keys[node]:
                self.rebuild(now)
                return True
            if self._starts is not None and not taller:
                at = self.index[node]
                taller = self._starts[at + 1] - self._starts[at] != self.height(item)
        if taller:
            self._starts = None
            self.revision += 1
        return taller

    # -- lines

    @property
    def index(self) -> dict[str, int]:
        """Id → place in the order."""
        if self._at is None:
            self._at = {node: at for at, node in enumerate(self.order)}
        return self._at

    @property
    def starts(self) -> list[int]:
        """The first line of each item, and at the end how many lines there are."""
        if self._starts is None:
            height, items = self.height, self.items
            self._starts = list(accumulate((height(items[node]) for node in self.order), initial=0))
        return self._starts

    @property
    def lines(self) -> int:
        return self.starts[-1]

    def at_line(self, y: int) -> tuple[str, int] | None:
        """(id, line inside the item) at a line of the table, None below the last."""
        starts = self.starts
        if not 0 <= y < starts[-1]:
            return None
        at = bisect_right(starts, y) - 1
        return self.order[at], y - starts[at]

    def span(self, node: str) -> tuple[int, int] | None:
        """(first line, height) of an item, None when it isn't shown."""
        at = self.index.get(node)
        return None if at is None else (self.starts[at], self.starts[at + 1] - self.starts[at])

    # -- cursor and marks

    def move(self, by: int) -> None:
        """Moves the cursor by items, stopping at both ends."""
        self.move_to((self.index.get(self.cursor or "", 0)) + by)

    def move_to(self, at: int) -> None:
        if self.order:
            self.touched = True
            self._last_index = max(0, min(len(self.order) - 1, at))
            self.cursor = self.order[self._last_index]

    def go(self, node: str) -> bool:
        """Puts the cursor on an item; False when it isn't shown."""
        if node not in self.index:
            return False
        self.move_to(self.index[node])
        return True

    @property
    def current(self) -> T | None:
        return self.items.get(self.cursor) if self.cursor is not None and self.cursor in self.index else None

    def toggle(self, node: str) -> None:
        """Marks or unmarks one item."""
        self.marks ^= {node}

    def mark_all(self) -> None:
        """Marks all that the filter shows; a second time, none."""
        shown = set(self.order)
        self.marks = set() if shown and shown <= self.marks else self.marks | shown

    def targets(self) -> list[T]:
        """What an op acts on: the marks in their order on screen, then those that the filter hides; else the cursor."""
        if self.marks:
            hidden = sorted(self.marks - set(self.order))
            return [self.items[node] for node in [n for n in self.order if n in self.marks] + hidden]
        return [] if self.current is None else [self.current]
