"""What to believe of records that came from another node: each must be its writer's, and follow the one before it.

Who hands them over plays no part. A run of records is believed by its links and the signature of its last one: the
hash of each stands in the next, so nobody but the writer can have made any of them. (A sender can spoil the signature
of one in between; that record is found by the scrub, and fetched from somebody else.) A feed is one writer's records
in one chain; two records of one number, both signed, are a fork: the feed is frozen below it, for everybody. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from agent.chain.record import (
    CONTEXT,
    RECORD_MAX_BYTES,
    Record,
    UnsupportedVersion,
    decode,
    genesis,
    hash_of,
    readable,
)
from discovery.errors import RemoteError
from discovery.identity import id_text, node_id

NUMBER_MAX = 2**40 - 1
"""No feed gets this long."""
NODE_CHAIN = "node/"

Pub = Annotated[bytes, Meta(min_length=32, max_length=32)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Number = Annotated[int, Meta(ge=0, le=NUMBER_MAX)]
Blob = Annotated[bytes, Meta(max_length=RECORD_MAX_BYTES)]
Sig = Annotated[bytes, Meta(max_length=64)]
Span = tuple[Number, Number]
Row = tuple[Blob, Sig]
Verify = Callable[[bytes, bytes, bytes], bool]


class Link(NamedTuple):
    """A record's number and hash: what the next one follows."""

    id: Number
    hash: Hash


class Head(msgspec.Struct, frozen=True, array_like=True):
    """How far one node has a feed: its newest record, and where the feed is frozen, if it is."""

    writer: Pub
    link: Link
    fork: Number | None = None


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a feed on its way. The sender lacks what `holes` names; `start` is what the first row follows;
    `cut`: the sender has nothing up to there any more."""

    writer: Pub
    start: Link
    rows: Annotated[list[Row], Meta(max_length=65_536)] = []
    holes: Annotated[list[Span], Meta(max_length=4096)] = []
    forks: Annotated[list[Row], Meta(max_length=2)] = []
    """Two records of one number: the proof of a fork."""
    cut: bool = False


class Feed(msgspec.Struct, frozen=True):
    """One writer's records in one chain, as they are kept here: `base` is the last one cut, `holes` lie between."""

    id: int
    chain: str
    writer: bytes
    base: Link
    head: Link
    fork: int | None = None
    holes: tuple[Span, ...] = ()
    bytes: int = 0

    @property
    def node(self) -> int:
        return node_id(self.writer)

    @property
    def missing(self) -> int:
        """Records that should be here and are not."""
        return sum(last - first + 1 for first, last in self.holes)

    @property
    def records(self) -> int:
        return self.head.id - self.base.id - self.missing


class Fork(NamedTuple):
    """Where a feed is forked, and the two records that prove it."""

    number: int
    rows: tuple[Row, Row]


@dataclass
class Weighed:
    """What becomes of a parcel: the feed as it is with it, the rows to add, and what was wrong."""

    feed: Feed
    add: list[tuple[int, bytes, bytes, int]] = field(default_factory=list)
    """Number, bytes, signature, and when it was emitted (Unix milliseconds)."""
    fork: Fork | None = None
    diverged: bool = False
    """It goes on from another record than ours of that number."""
    behind: bool = False
    """Records between ours and these are missing, and the sender doesn't say that it lacks them."""
    unsupported: UnsupportedVersion | None = None
    bad: str | None = None
    """Why the rest of it was not believed."""
    damaged: list[int] = field(default_factory=list)
    """Records of ours that were found altered."""


def first_link(mesh: str, chain: str, pub: bytes) -> bytes:
    """What the first record of this writer in this chain of this mesh follows; so that it belongs nowhere else."""
    if chain == NODE_CHAIN + id_text(node_id(pub)):
        return genesis(pub)
    name = b"\0".join((b"feed", mesh.encode(), chain.encode(), pub))
    return hashlib.sha256(CONTEXT + name).digest()


def weigh(feed: Feed, parcel: Parcel, held: Callable[[int], Row | None], verify: Verify) -> Weighed:
    """Weighs a parcel against the feed. `held` gives our own record of a number."""
    return _Scales(feed, parcel, held, verify).weigh()


class _Stop(Exception):
    """Nothing after this row is taken."""


class _Scales:
    def __init__(self, feed: Feed, parcel: Parcel, held: Callable[[int], Row | None], verify: Verify) -> None:
        self.feed, self.parcel, self.held, self.verify = feed, parcel, held, verify
        self.out = Weighed(feed)
        self.head, self.base = feed.head, feed.base
        self.holes = list(feed.holes)
        self.lacked = list(parcel.holes)
        """What the sender says that it has not."""
        self.frozen = feed.fork
        self.run: list[tuple[int, bytes, bytes, int]] = []
        """Linked rows at the end, not believed yet."""
        self.run_from = (self.head, list(self.holes))

    def weigh(self) -> Weighed:
        if len(self.parcel.forks) == 2:
            self._fork(self.parcel.forks[0], self.parcel.forks[1])
        try:
            self._start()
            for row in self.parcel.rows:
                self._row(row)
        except _Stop:
            pass
        self._believe()
        if self.head == self.base != self.feed.base:
            self.head, self.base = self.feed.head, self.feed.base
        self.out.feed = msgspec.structs.replace(
            self.feed, base=self.base, head=self.head, fork=self.frozen, holes=joined(self.holes)
        )
        return self.out

    def _start(self) -> None:
        """The sender's feed begins beyond ours. Where we have nothing, ours begins there too, if a record follows;
        else what lies between is missing. Nothing that we have goes for it."""
        start = self.parcel.start
        if not self.parcel.cut or start.id <= self.head.id:
            return
        if self.head == self.base and self.feed.chain != "admin":
            self.base = self.head = start
            self.run_from = (start, [])
        else:
            self.lacked.append((self.head.id + 1, start.id))

    def _row(self, row: Row) -> None:
        blob, sig = row
        digest = hash_of(blob)
        try:
            record = decode(blob)
        except UnsupportedVersion as why:
            self._believe()
            if self._signed(digest, sig):
                self.out.unsupported = why
            else:
                self.out.bad = "its bytes don't fit the writer's signature"
            raise _Stop from None
        except RemoteError as why:
            self.out.bad = str(why)
            raise _Stop from None
        if record.id > NUMBER_MAX or record.id == 0:
            self.out.bad = f"record number {record.id}"
            raise _Stop
        if self.frozen is not None and record.id >= self.frozen:
            raise _Stop
        if record.id <= self.head.id:
            self._within(record, digest, row)
        else:
            self._beyond(record, digest, row)

    def _within(self, record: Record, digest: bytes, row: Row) -> None:
        """A record of a number that we have, or should have."""
        number = record.id
        if number <= self.base.id or any(n == number and hash_of(b) == digest for n, b, _, _ in self.run):
            return
        ours = self.held(number)
        if ours is not None:
            mine = hash_of(ours[0])
            if mine == digest:
                return
            if not self._signed(mine, ours[1]):
                self.out.damaged.append(number)
            elif self._signed(digest, row[1]):
                self._fork(ours, row)
                raise _Stop
            return
        if not any(first <= number <= last for first, last in self.holes):
            return
        if not self._signed(digest, row[1]):
            self.out.bad = f"record {number}: its bytes don't fit the writer's signature"
            raise _Stop
        after = self.head.hash if number == self.head.id else None
        following = self.held(number + 1)
        if following is not None and readable(following[0]):
            after = decode(following[0]).prev
        if after is not None and after != digest and record.kind != "chain.damage":
            self.out.bad = f"record {number}: not the one that record {number + 1} follows"
            raise _Stop
        self._believe()
        self.out.add.append((number, *row, record.emitted_at_ms))
        self.holes = without(self.holes, (number, number))

    def _beyond(self, record: Record, digest: bytes, row: Row) -> None:
        """A record newer than ours."""
        number = record.id
        told = _explained(record)
        if not self.run:
            self.run_from = (self.head, list(self.holes))
        if number != self.head.id + 1 or record.prev != self.head.hash:
            self._believe()
            gap = (self.head.id + 1, number - 1)
            declared = _covered(gap, [*self.lacked, *([told] if told else [])])
            if told is None and number == self.head.id + 1:
                self.out.diverged = self._signed(digest, row[1])
                raise _Stop
            if not declared:
                self.out.behind = True
                raise _Stop
            if not self._signed(digest, row[1]):
                self.out.bad = f"record {number}: its bytes don't fit the writer's signature"
                raise _Stop
            if gap[0] <= gap[1]:
                self.holes.append(gap)
        if told is not None:
            self.holes = without(self.holes, told)
        self.run.append((number, *row, record.emitted_at_ms))
        self.head = Link(number, digest)

    def _believe(self) -> None:
        """Takes the run if its last record is signed; else as much of it as is."""
        if not self.run:
            self.run_from = (self.head, list(self.holes))
            return
        while self.run:
            number, blob, sig, _ = self.run[-1]
            if self._signed(hash_of(blob), sig):
                break
            self.out.bad = f"record {number}: its bytes don't fit the writer's signature"
            self.run.pop()
        if self.run:
            self.out.add += self.run
            self.head = Link(self.run[-1][0], hash_of(self.run[-1][1]))
        else:
            self.head, self.holes = self.run_from
        self.run = []
        self.run_from = (self.head, list(self.holes))

    def _fork(self, one: Row, other: Row) -> None:
        """Freezes the feed where these two records prove it forked, if they do and lower than known."""
        found = fork_of(one, other, self.parcel.writer, self.verify)
        if found is not None and (self.frozen is None or found < self.frozen):
            self.frozen = found
            self.out.fork = Fork(found, (one, other))

    def _signed(self, digest: bytes, sig: bytes) -> bool:
        return self.verify(self.parcel.writer, CONTEXT + digest, sig)


def fork_of(one: Row, other: Row, pub: bytes, verify: Verify) -> int | None:
    """The number that both of these different records of one writer have; None when they prove no fork."""
    numbers = set()
    for blob, sig in (one, other):
        try:
            numbers.add(decode(blob).id)
        except RemoteError:
            return None
        if not verify(pub, CONTEXT + hash_of(blob), sig):
            return None
    return numbers.pop() if len(numbers) == 1 and one[0] != other[0] else None


def _explained(record: Record) -> Span | None:
    """The numbers whose absence a record of a journal explains: they were lost at their writer."""
    if record.kind != "chain.damage" or not record.body:
        return None
    first, last = record.body.get("first"), record.body.get("last")
    if not isinstance(last, int) or not 0 <= last < record.id:
        return None
    return (first if isinstance(first, int) and first > 0 else 1), last


def _covered(gap: Span, spans: Iterable[Span]) -> bool:
    first, last = gap
    for a, b in sorted(spans):
        if a <= first <= b:
            first = b + 1
    return first > last


def without(spans: Iterable[Span], taken: Span) -> list[Span]:
    """The same numbers but for those from the first to the last of `taken`."""
    left = []
    for first, last in spans:
        if taken[1] < first or last < taken[0]:
            left.append((first, last))
            continue
        if first < taken[0]:
            left.append((first, taken[0] - 1))
        if taken[1] < last:
            left.append((taken[1] + 1, last))
    return left


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same numbers in as few spans as possible, ascending."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)
