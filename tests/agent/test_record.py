"""The format of a chain record: what is read back is what was written, and nothing else is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chain import Dispatched, EmptyRecord, Failed, Gated, Record, UnsupportedVersion
from agent.chain import record as chain
from discovery.errors import RemoteError
from discovery.identity import Identity, verify

ME = Identity.from_seed(b"m" * 32)
OTHER = Identity.from_seed(b"o" * 32)
PREV = bytes(range(32))

numbers = st.integers(0, 2**62)
dispositions = (
    st.just(Dispatched())
    | st.builds(Failed, st.text(max_size=40), st.none() | numbers)
    | st.builds(Gated, st.text(max_size=40), st.none() | numbers)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
records = st.builds(
    Record,
    id=numbers,
    kind=st.text(min_size=1, max_size=64),
    emitted_at_ms=numbers,
    disposition=dispositions,
    prev=st.binary(min_size=32, max_size=32),
    body=st.none() | st.dictionaries(st.text(max_size=8), values, max_size=4),
)


def a_record(**changes: object) -> Record:
    fields: dict[str, object] = {
        "id": 7,
        "kind": "mark_avoid",
        "emitted_at_ms": 1_700_000_000_000,
        "disposition": Dispatched(),
        "prev": PREV,
    }
    return Record(**(fields | changes))  # type: ignore[arg-type]


@given(records)
def test_record_encoded_and_decoded_is_the_same(record: Record) -> None:
    assert chain.decode(chain.encode(record)) == record


def test_record_bytes_are_pinned() -> None:
    blob = chain.encode(a_record(disposition=Failed("no route", 500), body={"peer": 3}))
    assert blob.hex() == (
        "01"
        "9607aa6d61726b5f61766f6964cf0000018bcfe56800"
        "93a66661696c6564a86e6f20726f757465cd01f4"
        "c420" + PREV.hex() + "81a4706565720" + "3"
    )


def test_record_of_no_bytes_is_empty_record() -> None:
    with pytest.raises(EmptyRecord):
        chain.decode(b"")


def test_record_of_another_version_names_what_it_saw_and_what_is_supported() -> None:
    blob = chain.encode(a_record())
    with pytest.raises(UnsupportedVersion) as caught:
        chain.decode(b"\x02" + blob[1:])
    assert (caught.value.seen, caught.value.supported) == (2, (1,))


@given(st.binary(max_size=300))
def test_record_of_garbage_raises_remote_error_only(blob: bytes) -> None:
    try:
        chain.decode(blob)
    except RemoteError:
        pass


@given(st.binary(max_size=300))
def test_record_of_garbage_behind_the_version_byte_raises_remote_error_only(blob: bytes) -> None:
    try:
        chain.decode(b"\x01" + blob)
    except RemoteError:
        pass


def test_record_too_large_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        chain.encode(a_record(body={"x": b"\0" * chain.RECORD_MAX_BYTES}))


def test_record_with_a_later_field_appended_still_decodes() -> None:
    blob = chain.encode(a_record())
    assert blob[1] == 0x96
    longer = blob[:1] + b"\x97" + blob[2:] + b"\x05"
    assert chain.decode(longer) == a_record()


@given(st.integers(0, 200), st.integers(1, 255))
def test_record_with_any_byte_altered_fails_its_signature(at: int, flip: int) -> None:
    blob = chain.encode(a_record(body={"reason": "x" * 200}))
    sig = chain.sign(chain.hash_of(blob), ME.sign)
    altered = bytearray(blob)
    altered[at] ^= flip
    with pytest.raises(RemoteError, match="signature"):
        chain.check(bytes(altered), sig, pub=ME.pub, verify=verify)


def test_record_signed_by_another_key_is_not_believed() -> None:
    blob = chain.encode(a_record())
    sig = chain.sign(chain.hash_of(blob), OTHER.sign)
    with pytest.raises(RemoteError, match="signature"):
        chain.check(blob, sig, pub=ME.pub, verify=verify)
    assert chain.check(blob, sig, pub=OTHER.pub, verify=verify) == (a_record(), chain.hash_of(blob))


def test_genesis_differs_by_writer() -> None:
    assert chain.genesis(ME.pub) != chain.genesis(OTHER.pub)
