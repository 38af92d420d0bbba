"""The loads that a node recorded in its own chain, between two moments: read from the chain, whoever holds it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from agent.chain.blackbox import VITALS
from agent.chain.record import Record, decode
from agent.chain.weighing import Link, Parcel, Span
from discovery.errors import RemoteError

LOOK_RECORDS = 16
"""So many numbers are looked at for the next record before all that follow are: numbers jump where a file was lost."""
READ_BYTES = 64 * 1024
"""Of records between two pauses: about a millisecond of reading."""
READ_RECORDS_MAX = 20_000
SAMPLES_MAX = 512
COUNT_MAX = 100_000

Sample = tuple[int, int | None, int | None, int | None, int | None, int | None]
"""`(at_ms, cpu, mem, disk, running, total)`: Unix milliseconds by the node's clock, permille of the host, daemons that
run and that run or shall. None where that was not recorded."""


class Source(Protocol):
    """Who can read a chain: a journal of one's own, or the store of what is held for others."""

    def between(self, chain: str, writer: bytes, spans: Sequence[Span], limit_bytes: int) -> list[Parcel]: ...


def samples(
    source: Source, chain: str, writer: bytes, base: Link, head: Link, from_ms: int, to_ms: int
) -> Iterator[Sample | None]:
    """The samples from `from_ms` to `to_ms`, oldest first, of the records after `base` up to `head`; None in between where
    a caller that must not stop for long may pause. Times in a chain grow but where its node's clock was set back."""

    def read(first: int, last: int, limit_bytes: int) -> list[Record]:
        found = []
        for parcel in source.between(chain, writer, [(first, last)], limit_bytes):
            for blob, _ in parcel.rows:
                try:
                    found.append(decode(blob))
                except RemoteError:
                    continue
        return found

    def next_from(number: int) -> Record | None:
        near = read(number, min(number + LOOK_RECORDS - 1, head.id), 1)
        found = near or read(number, head.id, 1)
        return found[0] if found else None

    last = next_from(head.id)
    if last is None or last.emitted_at_ms < from_ms:
        return
    low, high = base.id + 1, head.id
    while low < high:
        middle = (low + high) // 2
        found = next_from(middle)
        if found is None or found.emitted_at_ms >= from_ms:
            high = middle
        else:
            low = found.id + 1
    told = looked = 0
    while low <= head.id and looked < READ_RECORDS_MAX:
        records = read(low, head.id, READ_BYTES)
        if not records:
            return
        for record in records:
            if record.emitted_at_ms > to_ms or told == SAMPLES_MAX:
                return
            if record.kind == VITALS and record.emitted_at_ms >= from_ms:
                told += 1
                yield sample(record)
        looked += len(records)
        low = records[-1].id + 1
        yield None


def sample(record: Record) -> Sample:
    """What a record of a load says."""
    body = record.body or {}
    cpu, mem, disk = (_permille(body.get(key)) for key in ("cpu", "mem", "disk"))
    return (record.emitted_at_ms, cpu, mem, disk, _count(body.get("running")), _count(body.get("total")))


def _permille(value: Any) -> int | None:
    return round(value * 1000) if type(value) in (int, float) and 0 <= value <= 1 else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= COUNT_MAX else None
