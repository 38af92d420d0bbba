"""The bodies of datagrams and push/pulls: typed, bounded, and open to newer senders."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery import wire
from discovery.errors import RemoteError
from discovery.lifecycle import Evidence
from discovery.member import SignedRecord, Vitals

SIGNED = SignedRecord(b"blob", bytes(64))
VITALS = Vitals(cpu=100, mem=None, disk=1000, daemons_running=1, daemons_total=2, failures=3)
EVERY = [
    wire.Ping(2**63 - 1, 2**64 - 1, 1, 2, 3, VITALS),
    wire.Ack(1, 2, 3, 4, bytes(64), 5, None),
    wire.PingRequest(1, 2),
    wire.Nack(1),
    wire.Hello(1, SIGNED),
    wire.HelloAck(1, SIGNED, bytes(64), 7),
    wire.Update(SIGNED),
    wire.Accuse(1, 2, 3, 4, [("10.0.0.1", 7000), ("::1", 1)], bytes(64)),
    wire.Seen(1, 2, 3, 4, bytes(64)),
    wire.Buried(1, 2),
    wire.Goodbye(1, SIGNED),
    wire.GoodbyeAck(1),
    wire.Want([1, 2, 3]),
    wire.Load(1, 2, 3, VITALS),
    wire.Note(1, "alpha", b"claim", 1500),
]


def body(*messages: object) -> bytes:
    return wire.join([msgspec.msgpack.encode(m) for m in messages])


def test_every_message_comes_back_as_it_went() -> None:
    assert wire.decode(body(*EVERY)) == (EVERY, {})


def test_every_number_is_taken_by_exactly_one_message() -> None:
    numbers = [msgspec.msgpack.decode(wire.encode(m))[0] for m in EVERY]
    assert sorted(numbers) == sorted(wire.KNOWN_TAGS)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 40, wire.MESSAGES_MAX])
def test_any_number_of_messages_up_to_the_limit_is_one_body(count: int) -> None:
    parts = [wire.encode(wire.Nack(i)) for i in range(count)]
    joined = wire.join(parts)
    assert len(joined) <= sum(map(len, parts)) + wire.HEADER_MAX_BYTES
    assert wire.decode(joined) == ([wire.Nack(i) for i in range(count)], {})


def test_more_messages_than_the_limit_are_no_body() -> None:
    with pytest.raises(RemoteError):
        wire.decode(body(*[wire.Nack(1)] * (wire.MESSAGES_MAX + 1)))


def test_a_message_of_a_newer_kind_is_skipped_and_the_rest_is_heard() -> None:
    got = wire.decode(body(wire.Nack(1), [99, "new", {"a": 1}], wire.Nack(2), [100]))
    assert got == ([wire.Nack(1), wire.Nack(2)], {"unknown_message": 2})


def test_fields_added_by_a_newer_sender_are_ignored() -> None:
    newer = [*msgspec.msgpack.decode(wire.encode(wire.Buried(1, 2))), "more"]
    assert wire.decode(body(newer)) == ([wire.Buried(1, 2)], {})


def test_fields_an_older_sender_does_not_know_have_their_defaults() -> None:
    older = msgspec.msgpack.decode(wire.encode(wire.Ping(1, 2, 3, 4)))[:5]
    assert wire.decode(body(older)) == ([wire.Ping(1, 2, 3, 4, 0, None)], {})


@pytest.mark.parametrize(
    "bad",
    [
        [1],
        [1, -1, 2, 3, 4],
        [1, "nonce", 2, 3, 4],
        [2, 1, 2, 3, 4, bytes(63)],
        [5, 1, [b"blob", bytes(65)]],
        [5, 1, [bytes(901), bytes(64)]],
        [8, 1, 2, 3, 4, [["10.0.0.1", 0]], bytes(64)],
        [8, 1, 2, 3, 4, [["10.0.0.1", 1]] * 9, bytes(64)],
        [13, [1] * 33],
        [14, 1, 2, 3, [1001]],
        [],
        ["1", 2],
        [True],
        [None],
        {"1": 2},
        7,
        None,
    ],
)
def test_a_message_out_of_bounds_is_skipped_and_the_rest_is_heard(bad: object) -> None:
    assert wire.decode(body(wire.Nack(1), bad, wire.Nack(2))) == (
        [wire.Nack(1), wire.Nack(2)],
        {"malformed_message": 1},
    )


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"\x01", b"\x80", b"\x92\x01", b"\xdd\xff\xff\xff\xff", b"\x91" * 1300]
)
def test_bytes_that_are_no_list_of_messages_are_refused(raw: bytes) -> None:
    try:
        messages, skipped = wire.decode(raw)
    except RemoteError:
        return
    assert not messages and skipped == {"malformed_message": 1}


def test_a_body_too_long_is_refused_before_it_is_looked_at() -> None:
    with pytest.raises(RemoteError, match="exceeds"):
        wire.decode(bytes(wire.BODY_MAX_BYTES + 1))


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_remote_error(raw: bytes) -> None:
    for decode in (wire.decode, wire.decode_request, wire.decode_answer):
        try:
            decode(raw)
        except RemoteError:
            pass


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=70)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(st.one_of(st.tuples(st.integers(0, 16), _values, _values, _values), _values), max_size=6))
def test_no_values_raise_anything_but_a_remote_error(values: list[object]) -> None:
    raw = msgspec.msgpack.encode(values)
    for decode in (wire.decode, wire.decode_request, wire.decode_answer):
        try:
            decode(raw)
        except RemoteError:
            pass


def test_push_pull_bodies_come_back_as_they_went() -> None:
    request = wire.SyncRequest(SIGNED, [(2**64 - 1, 2, 3)], [(4, 5, 1)], False)
    tomb = wire.Tomb(SIGNED, Evidence.EXITED, 5, [EVERY[7]])
    answer = wire.SyncAnswer(SIGNED, [SIGNED], [tomb], [1, 2], True)
    assert wire.decode_request(wire.encode_sync(request)) == request
    assert wire.decode_answer(wire.encode_sync(answer)) == answer


def test_a_push_pull_body_too_long_is_refused() -> None:
    for decode in (wire.decode_request, wire.decode_answer):
        with pytest.raises(RemoteError, match="exceed"):
            decode(bytes(wire.SYNC_MAX_BYTES + 1))


def test_what_is_signed_differs_in_every_part() -> None:
    """No signature serves for another statement: each depends on the mesh and on every number in it."""
    statements = {
        wire.ack_statement("a", 1, 2, 3),
        wire.ack_statement("b", 1, 2, 3),
        wire.ack_statement("a", 9, 2, 3),
        wire.ack_statement("a", 1, 9, 3),
        wire.ack_statement("a", 1, 2, 9),
        wire.hello_statement("a", 1, 2, 3),
        wire.hello_statement("a", 1, 3, 2),
        wire.seen_statement("a", 1, 2, 3, 4),
        wire.seen_statement("a", 1, 2, 3, 5),
        wire.accuse_statement("a", 1, 2, 3, 4, []),
        wire.accuse_statement("a", 1, 2, 3, 4, [("10.0.0.1", 1)]),
        wire.accuse_statement("a", 1, 2, 3, 4, [("10.0.0.1", 2)]),
    }
    assert len(statements) == 12
