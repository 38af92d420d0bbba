"""The loads in a node's chain, found by their time: all of a stretch, nothing beside it, and little read for it."""

from __future__ import annotations

from collections.abc import Sequence

from agent.chain.blackbox import VITALS
from agent.chain.loads import SAMPLES_MAX, Sample, samples
from agent.chain.record import DISPATCHED, Record, encode
from agent.chain.weighing import Link, Parcel, Span

NONE = Link(0, bytes(32))


class Chain:
    """A chain in memory, which counts what is read of it."""

    def __init__(self, *records: Record) -> None:
        self.rows = {record.id: encode(record) for record in records}
        self.read = 0

    @property
    def head(self) -> Link:
        return Link(max(self.rows), bytes(32))

    def between(self, chain: str, writer: bytes, spans: Sequence[Span], limit_bytes: int) -> list[Parcel]:
        rows = []
        for first, last in spans:
            for number in sorted(n for n in self.rows if first <= n <= last):
                if rows and limit_bytes < 0:
                    break
                rows.append((self.rows[number], b""))
                limit_bytes -= len(self.rows[number])
        self.read += len(rows)
        return [Parcel(writer, NONE, rows, [])] if rows else []

    def told(self, from_ms: int, to_ms: int, base: Link = NONE) -> list[Sample]:
        found = samples(self, "node/1", b"w", base, self.head, from_ms, to_ms)
        return [sample for sample in found if sample is not None]


def record(number: int, at_ms: int, kind: str = VITALS, **body: object) -> Record:
    told = {"cpu": 0.25, "mem": 0.5, "disk": None, "running": 1, "total": 2} | body
    return Record(
        id=number, kind=kind, emitted_at_ms=at_ms, disposition=DISPATCHED, prev=bytes(32), body=told
    )


def test_samples_of_a_stretch_are_told_and_no_others() -> None:
    chain = Chain(*(record(n, n * 100, VITALS if n % 3 else "node.ready") for n in range(1, 400)))
    found = chain.told(20_000, 21_000)
    assert [sample[0] for sample in found] == [20_000, 20_200, 20_300, 20_500, 20_600, 20_800, 20_900]
    assert found[0] == (20_000, 250, 500, None, 1, 2)


def test_little_of_a_long_chain_is_read_for_a_short_stretch() -> None:
    chain = Chain(*(record(n, n * 1_000) for n in range(1, 20_001)))
    assert len(chain.told(9_000_000, 9_060_000)) == 61
    assert chain.read < 1_500


def test_stretch_before_and_after_a_chain_tells_nothing() -> None:
    chain = Chain(*(record(n, n * 1_000) for n in range(10, 20)))
    assert chain.told(0, 9_999) == [] and chain.told(19_001, 30_000) == []
    assert len(chain.told(0, 30_000)) == 10
    assert [sample[0] for sample in chain.told(0, 30_000, Link(14, bytes(32)))] == [
        n * 1_000 for n in range(15, 20)
    ]


def test_numbers_that_jump_hide_nothing() -> None:
    low = [record(n, n * 1_000) for n in range(1, 50)]
    high = [record(10_000_000 + n, (50 + n) * 1_000) for n in range(50)]
    chain = Chain(*low, *high)
    assert [sample[0] for sample in chain.told(47_000, 53_000)] == [
        n * 1_000 for n in (47, 48, 49, 50, 51, 52, 53)
    ]


def test_more_samples_than_an_hour_has_are_cut_and_nonsense_is_unknown() -> None:
    chain = Chain(*(record(n, n) for n in range(1, SAMPLES_MAX + 100)))
    assert len(chain.told(0, 10_000)) == SAMPLES_MAX
    odd = Chain(record(1, 5, cpu=7, mem="x", disk=-0.1, running=True, total=-1))
    assert odd.told(0, 10) == [(5, None, None, None, None, None)]


def test_record_that_does_not_decode_is_left_out() -> None:
    chain = Chain(*(record(n, n * 1_000) for n in range(1, 30)))
    chain.rows[12] = b"\xff no record"
    assert [sample[0] for sample in chain.told(10_000, 14_000)] == [10_000, 11_000, 13_000, 14_000]
