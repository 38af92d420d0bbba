"""A node's own word about itself: sealed, opened, and compared."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from discovery.errors import RemoteError
from discovery.identity import Identity, verify
from discovery.lifecycle import State
from discovery.member import (
    RECORD_CONTEXT,
    RECORD_MAX_BYTES,
    Member,
    Record,
    SignedRecord,
    fitted,
    open_record,
    seal_record,
    supersedes,
)

ONE = Identity.from_seed(bytes(31) + b"\1")
TWO = Identity.from_seed(bytes(31) + b"\2")


def record(**changes: Any) -> Record:
    fields = {
        "pub": ONE.pub,
        "mesh": "alpha",
        "name": "n1",
        "kind": "compute",
        "incarnation": 3,
        "version": 4,
        "state": State.ALIVE,
        "addrs": [("10.0.0.1", 7000)],
        **changes,
    }
    return Record(**fields)


def test_a_sealed_record_opens_to_itself() -> None:
    mine = record(tags={"zone": "a"}, cordoned=True, deadline_ms=5, host=b"12345678", build="0a1b2c3d4e5f")
    assert open_record(seal_record(mine, ONE.sign), verify) == mine


def test_a_record_too_long_loses_the_end_of_its_reason_and_then_what_it_keeps() -> None:
    full = record(tags={f"k{n}": "v" * 64 for n in range(9)}, reason="ö" * 96, keeps=b"k" * 40)
    less = fitted(full)
    assert less.keeps == full.keeps and full.reason.startswith(less.reason) and less.reason
    assert open_record(seal_record(less, ONE.sign), verify) == less
    fuller = msgspec.structs.replace(full, keeps=b"k" * 132, addrs=[("x" * 60, 1)] * 2)
    least = fitted(fuller)
    assert (least.keeps, least.reason) == (b"", "") and least.tags == full.tags
    assert fitted(record(reason="why", keeps=b"k")) == record(reason="why", keeps=b"k")


def test_a_record_signed_by_another_is_refused() -> None:
    with pytest.raises(RemoteError, match="another key"):
        open_record(seal_record(record(), TWO.sign), verify)


def test_a_record_changed_by_one_bit_anywhere_is_refused() -> None:
    signed = seal_record(record(), ONE.sign)
    for at in range(len(signed.blob)):
        blob = bytearray(signed.blob)
        blob[at] ^= 1
        with pytest.raises(RemoteError):
            open_record(SignedRecord(bytes(blob), signed.sig), verify)


def test_a_signature_made_for_something_else_is_refused() -> None:
    blob = seal_record(record(), ONE.sign).blob
    with pytest.raises(RemoteError):
        open_record(SignedRecord(blob, ONE.sign(blob)), verify)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": State.DEAD},
        {"name": "Bad Name"},
        {"name": "x\x1b[31m"},
        {"mesh": "a.b"},
        {"kind": "UPPER"},
        {"pub": b"short"},
        {"incarnation": -1},
        {"incarnation": 2**63},
        {"addrs": [("10.0.0.1", 0)]},
        {"addrs": [("10.0.0.1", 70_000)]},
        {"addrs": [("x" * 65, 1)]},
        {"addrs": [("10.0.0.1", 1)] * 9},
        {"tags": {str(i): "" for i in range(17)}},
        {"tags": {"k": "v" * 65}},
        {"wire": 256},
        {"maintenance": "m" * 25},
        {"build": "0" * 13},
        {"host": bytes(9)},
        {"keeps": bytes(133)},
        {"millicores": -1},
        {"memory_mib": 2**43},
    ],
)
def test_a_record_out_of_bounds_is_refused_though_its_signature_holds(changes: dict[str, Any]) -> None:
    blob = msgspec.msgpack.encode(record(**changes))
    with pytest.raises(RemoteError):
        open_record(SignedRecord(blob, ONE.sign(RECORD_CONTEXT + blob)), verify)


@pytest.mark.parametrize("blob", [b"", b"\xc1", b"\x90", b"\x80", b"\xff" * 40, b"\x91" * 800])
def test_a_blob_that_is_no_record_is_refused(blob: bytes) -> None:
    with pytest.raises(RemoteError):
        open_record(SignedRecord(blob, ONE.sign(RECORD_CONTEXT + blob)), verify)


def test_a_record_of_a_later_version_with_more_fields_is_read() -> None:
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(record()))
    blob = msgspec.msgpack.encode([*plain, "from the future", {"a": [1]}])
    assert open_record(SignedRecord(blob, ONE.sign(RECORD_CONTEXT + blob)), verify) == record()


def test_a_record_of_an_earlier_version_gets_truthful_defaults() -> None:
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(record()))
    blob = msgspec.msgpack.encode(plain[:8])
    opened = open_record(SignedRecord(blob, ONE.sign(RECORD_CONTEXT + blob)), verify)
    assert (opened.maintenance, opened.cordoned, opened.tags, opened.deadline_ms) == (
        "active",
        False,
        {},
        None,
    )
    assert opened.keeps == b"" and opened.millicores is None and opened.memory_mib is None


def test_what_a_node_has_costs_few_bytes_and_is_passed_over_by_an_earlier_version() -> None:
    known = msgspec.structs.fields(Record)[:17]
    assert known[-1].name == "keeps"
    earlier = msgspec.defstruct("Earlier", [(f.name, f.type) for f in known], array_like=True)
    full = record(keeps=b"k", millicores=64_000, memory_mib=1 << 20)
    blob = msgspec.msgpack.encode(full)
    assert len(blob) - len(msgspec.msgpack.encode(record(keeps=b"k"))) <= 8
    opened = msgspec.msgpack.decode(blob, type=earlier)
    assert all(getattr(opened, f.name) == getattr(full, f.name) for f in known)


def test_a_record_too_long_is_never_sealed() -> None:
    with pytest.raises(ValueError, match=str(RECORD_MAX_BYTES)):
        seal_record(record(tags={f"{i:02}" + "k" * 60: "v" * 64 for i in range(16)}), ONE.sign)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(itertools.product(range(3), range(3)), repeat=2)))
def test_a_record_supersedes_by_incarnation_then_version(a: tuple[int, int], b: tuple[int, int]) -> None:
    new, old = (record(incarnation=i, version=v) for i, v in (a, b))
    assert supersedes(new, old) == (a[0] > b[0] or (a[0] == b[0] and a[1] > b[1]))


@pytest.mark.parametrize("state", State)
def test_a_member_is_present_unless_leaving_or_dead(state: State) -> None:
    mine = record()
    row = Member(mine, seal_record(mine, ONE.sign), state, 0.0, 0.0, 0.0)
    assert row.present == (state not in (State.LEAVING, State.DEAD)) and row.id == ONE.id
