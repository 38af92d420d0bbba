"""A mesh in one signed message: sealed, opened, packed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.errors import RemoteError
from discovery.identity import Identity, verify
from discovery.lifecycle import State
from discovery.summary import (
    SUMMARY_CONTEXT,
    SUMMARY_MAX_BYTES,
    SignedSummary,
    Summary,
    open_summary,
    pack,
    seal_summary,
    unpack,
)
from discovery.wire import NOTE_MAX_BYTES

MESH = Identity.from_seed(bytes(31) + b"\1")
NODE = Identity.from_seed(bytes(31) + b"\2")


def summary(**changes: Any) -> Summary:
    fields = {
        "mesh": "beta",
        "mesh_pub": MESH.pub,
        "epoch": 3,
        "renewal": 4,
        "publisher": NODE.pub,
        "publisher_name": "beta.gateway.1",
        "addrs": [("10.0.0.1", 7000)],
        **changes,
    }
    return Summary(**fields)


def encoded(**changes: Any) -> SignedSummary:
    """Signed by the mesh whatever it says, as a mesh that means ill would."""
    blob = msgspec.msgpack.encode(summary(**changes))
    return SignedSummary(blob, MESH.sign(SUMMARY_CONTEXT + blob))


def test_a_sealed_summary_opens_to_itself() -> None:
    mine = summary(counts={State.ALIVE: 4, State.DEAD: 1}, cpu=250, mem=None, version=9, host=b"12345678")
    assert open_summary(seal_summary(mine, MESH.sign), verify) == mine


def test_a_summary_signed_by_another_key_is_refused() -> None:
    with pytest.raises(RemoteError, match="another key"):
        open_summary(seal_summary(summary(), NODE.sign), verify)


def test_a_summary_changed_by_one_bit_anywhere_is_refused() -> None:
    signed = seal_summary(summary(), MESH.sign)
    for at in range(len(signed.blob)):
        blob = bytearray(signed.blob)
        blob[at] ^= 1
        with pytest.raises(RemoteError):
            open_summary(SignedSummary(bytes(blob), signed.sig), verify)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": ""},
        {"mesh": "Beta"},
        {"mesh": "be\x1b[2Jta"},
        {"mesh": "b" * 65},
        {"publisher_name": "\u202egateway"},
        {"publisher_name": "b" * 129},
        {"mesh_pub": b"short"},
        {"publisher": bytes(33)},
        {"epoch": -1},
        {"epoch": 2**63},
        {"renewal": "4"},
        {"addrs": [("10.0.0.1", 0)]},
        {"addrs": [("10.0.0.1", 7000)] * 9},
        {"addrs": [("a" * 65, 7000)]},
        {"counts": {9: 1}},
        {"counts": {State.ALIVE: -1}},
        {"cpu": 1001},
        {"ttl_ms": 0},
        {"ttl_ms": 600_001},
    ],
)
def test_a_summary_out_of_bounds_is_refused_however_well_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        open_summary(encoded(**changes), verify)


def test_the_largest_summary_fits_into_a_note() -> None:
    longest = summary(
        mesh="m" * 64,
        publisher_name="n" * 128,
        addrs=[(f"2001:db8:1111:2222:3333:4444:5555:{i:04x}", 65535) for i in range(7)],
        counts=dict.fromkeys(State, 1_000_000),
        epoch=2**62,
        renewal=2**62,
        version=2**62,
        cpu=1000,
        mem=1000,
        host=bytes(8),
        ttl_ms=600_000,
    )
    assert len(pack(seal_summary(longest, MESH.sign))) <= NOTE_MAX_BYTES


def test_a_summary_that_is_too_long_is_not_sealed() -> None:
    with pytest.raises(ValueError, match=str(SUMMARY_MAX_BYTES)):
        seal_summary(summary(addrs=[("a" * 64, 65535)] * 12), MESH.sign)


def test_a_packed_summary_unpacks_to_the_same_bytes() -> None:
    signed = seal_summary(summary(), MESH.sign)
    assert unpack(pack(signed)) == signed


def test_a_newer_senders_extra_fields_are_ignored() -> None:
    blob = msgspec.msgpack.encode([*msgspec.msgpack.decode(msgspec.msgpack.encode(summary())), "more", 1])
    assert open_summary(SignedSummary(blob, MESH.sign(SUMMARY_CONTEXT + blob)), verify) == summary()


def test_the_signature_of_a_summary_stands_for_nothing_else() -> None:
    blob = msgspec.msgpack.encode(summary())
    with pytest.raises(RemoteError, match="another key"):
        open_summary(SignedSummary(blob, MESH.sign(b"quarterdeck/member/1\0" + blob)), verify)


@given(st.binary(max_size=1_000))
def test_any_bytes_unpack_or_are_the_senders_fault(body: bytes) -> None:
    try:
        signed = unpack(body)
    except RemoteError:
        return
    with pytest.raises(RemoteError):
        open_summary(signed, verify)
