"""Reading the admin chain: which records were read, whose signatures were found good, and the records in their order.

No record is held here. What was read of a feed is a number and the few below it that were missing then; the order of
any number of records is found by their places, 32 bytes each, and then they are read one after another.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from itertools import islice

import msgspec

from agent.chain import adminop
from agent.chain.adminop import OP, OWN, AdminEvent
from agent.chain.feedreading import Stored
from agent.chain.feeds import FeedStore
from agent.chain.hlc import Position, stamp_of
from agent.chain.weighing import Link, Span, joined, without
from discovery.errors import RemoteError
from discovery.identity import node_id

ADMIN = adminop.ADMIN
STEP = 20
"""Records between two looks at what else there is to do: a few milliseconds."""
DOUBTS_MAX = 1000

_PLACE = struct.Struct(">QQQQ")
Place = bytes
"""A position, in bytes that sort as it does."""


def place_of(stored: Stored) -> Place | None:
    """Where a record stands that may change the state; None for every other one."""
    return _place(stored) if stored.record.kind in (OP, OWN) else None


def any_place_of(stored: Stored) -> Place | None:
    """Where any record stands, as `read_event` has it; None for one that has no place."""
    place = _place(stored)
    if place is not None or stored.record.kind not in (OP, OWN):
        return place
    return _PLACE.pack(stored.record.emitted_at_ms, 0, node_id(stored.writer), stored.record.id)


def _place(stored: Stored) -> Place | None:
    try:
        stamp = stamp_of((stored.record.body or {}).get("hlc"))
    except RemoteError:
        return None
    return _PLACE.pack(*stamp, node_id(stored.writer), stored.record.id)


def position_at(place: Place) -> Position:
    return Position(*_PLACE.unpack(place))


def place_at(position: Position) -> Place:
    return _PLACE.pack(*position)


class Mark:
    """How far one reader is: the newest record of each feed that was read (`read`), and the numbers below it that were
    not (`gaps`)."""

    def __init__(
        self, read: Iterable[tuple[bytes, Link]] = (), gaps: Iterable[tuple[bytes, int, int]] = ()
    ) -> None:
        self.read: dict[bytes, Link] = dict(read)
        self.gaps: dict[bytes, list[Span]] = {}
        for writer, first, last in gaps:
            self.miss(writer, first, last)
        self.filled = -1
        """How many records had been filled in by then when the gaps were last looked at."""

    def miss(self, writer: bytes, first: int, last: int) -> None:
        """These are to be read when they are there."""
        self.gaps[writer] = list(joined([*self.gaps.get(writer, ()), (first, last)]))

    def took(self, writer: bytes, first: int, last: Link, numbers: Iterable[int]) -> None:
        """The records from `first` to `last` were read, and these were there."""
        at = first - 1
        left = without(self.gaps.get(writer, ()), (first, last.id))
        for number in [*numbers, last.id + 1]:
            if number > at + 1:
                left.append((at + 1, number - 1))
            at = number
        self.gaps[writer] = list(joined(left))
        if not self.gaps[writer]:
            del self.gaps[writer]
        if last.id > self.number(writer):
            self.read[writer] = last

    def number(self, writer: bytes) -> int:
        """Of the newest record of a feed that was read."""
        link = self.read.get(writer)
        return 0 if link is None else link.id

    def spans(self) -> list[tuple[bytes, int, int]]:
        """The gaps."""
        return [(writer, first, last) for writer, spans in self.gaps.items() for first, last in spans]


class Checked:
    """Of which records the operator's signature was found good, in this life of the process or an earlier one."""

    def __init__(self, kept: bytes | None = None) -> None:
        self._upto: dict[bytes, int] = {}
        self._doubts: dict[bytes, list[Span]] = {}
        try:
            told = msgspec.msgpack.decode(kept or b"\x90", type=list[tuple[bytes, int, list[Span]]])
        except msgspec.MsgspecError:
            return
        for writer, upto, doubts in told:
            self._upto[writer], self._doubts[writer] = upto, doubts

    def packed(self) -> bytes:
        return msgspec.msgpack.encode([(w, n, self._doubts.get(w, [])) for w, n in self._upto.items()])

    def holds(self, writer: bytes, number: int) -> bool:
        if number > self._upto.get(writer, 0):
            return False
        return not any(first <= number <= last for first, last in self._doubts.get(writer, ()))

    def note(self, writer: bytes, number: int, good: bool) -> None:
        upto = self._upto.get(writer, 0)
        if number > upto:
            self._upto[writer] = number
            if not good:
                self._doubt(writer, upto + 1, number)
            elif number > upto + 1:
                self._doubt(writer, upto + 1, number - 1)
        elif good and writer in self._doubts:
            self._doubts[writer] = without(self._doubts[writer], (number, number))

    def _doubt(self, writer: bytes, first: int, last: int) -> None:
        spans = list(joined([*self._doubts.get(writer, ()), (first, last)]))
        self._doubts[writer] = spans if len(spans) <= DOUBTS_MAX else [(1, last)]


class AdminReader:
    """Reads the records of the admin chain of a mesh from a store."""

    def __init__(self, store: FeedStore, mesh: str) -> None:
        self.checked = Checked()
        self._store = store
        self._mesh = mesh

    def forks(self) -> dict[int, int]:
        """Nodes whose feed is forked, and where."""
        return {feed.node: feed.fork for feed in self._store.feeds(ADMIN) if feed.fork is not None}

    def ends(self) -> dict[bytes, Link]:
        """The newest record of each feed."""
        return {feed.writer: feed.head for feed in self._store.feeds(ADMIN)}

    def beyond(self, mark: Mark) -> int:
        """How many records there are beyond a mark, about."""
        feeds = self._store.standing(ADMIN).values()
        return sum(max(0, feed.head.id - mark.number(feed.writer)) for feed in feeds)

    def filled(self, mark: Mark) -> list[Stored]:
        """What was filled in of a mark's gaps since they were looked at."""
        filled = self._store.counters["record_filled"]
        if mark.filled == filled:
            return []
        mark.filled = filled
        found = []
        for writer, first, last in mark.spans():
            for stored in self._store.records(ADMIN, writer, first - 1, last):
                mark.took(writer, stored.record.id, Link(stored.record.id, stored.digest), [stored.record.id])
                found.append(stored)
        return found

    def take(self, mark: Mark, most: int) -> list[Stored]:
        """The next records beyond a mark, `most` of them, all of one feed; none when there are none."""
        for feed in self._store.standing(ADMIN).values():
            first = mark.number(feed.writer) + 1
            if feed.head.id < first:
                continue
            found = list(islice(self._store.records(ADMIN, feed.writer, first - 1, feed.head.id), most))
            last = feed.head
            if len(found) == most:
                last = Link(found[-1].record.id, found[-1].digest)
            mark.took(feed.writer, first, last, [stored.record.id for stored in found])
            if found:
                return found
        return []

    def at(self, writer: bytes, number: int) -> Stored | None:
        """One record, if it is here."""
        return next(self._store.records(ADMIN, writer, number - 1, number), None)

    def event(self, stored: Stored) -> AdminEvent | None:
        """The event of a record; None for one that has no place. Its signature is checked once."""
        record, writer = stored.record, stored.writer
        checked = self.checked.holds(writer, record.id)
        event = adminop.read_event(record, stored.digest, writer, self._mesh, checked=checked)
        if not checked:
            self.checked.note(writer, record.id, event is None or event.kind != OP or event.wrong is None)
        return event

    def writer_of(self, node: int) -> bytes | None:
        """The key of a node's feed."""
        return next((feed.writer for feed in self._store.feeds(ADMIN) if feed.node == node), None)

    async def places(
        self, mark: Mark, ends: Mapping[bytes, Link], place_of: Callable[[Stored], Place | None] = place_of
    ) -> list[Place]:
        """Of all between a mark and `ends` that has one, in order; the mark is then there. In short steps."""
        found = [place_of(stored) for stored in self.filled(mark)]
        for writer, last in ends.items():
            first = mark.number(writer) + 1
            if last.id < first:
                continue
            numbers = array("Q")
            for stored in self._store.records(ADMIN, writer, first - 1, last.id):
                numbers.append(stored.record.id)
                found.append(place_of(stored))
                if len(numbers) % STEP == 0:
                    await asyncio.sleep(0)
            mark.took(writer, first, last, numbers)
        return sorted(place for place in found if place is not None)

    async def in_order(
        self, places: Iterable[Place], mark: Mark | None = None
    ) -> AsyncIterator[tuple[Stored, AdminEvent]]:
        """The records of these places, in short steps; one that isn't here any more goes into the mark's gaps."""
        writers = {feed.node: feed.writer for feed in self._store.feeds(ADMIN)}
        for count, place in enumerate(places, 1):
            position = position_at(place)
            writer = writers.get(position.node)
            stored = self.at(writer, position.number) if writer is not None else None
            if stored is not None and (event := self.event(stored)) is not None:
                yield stored, event
            elif stored is None and writer is not None and mark is not None:
                mark.miss(writer, position.number, position.number)
            if count % STEP == 0:
                await asyncio.sleep(0)
