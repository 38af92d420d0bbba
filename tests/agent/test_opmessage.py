"""A control op as bytes: what is built decodes to the same verb, all else is refused by a stable code."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.opmessage import (
    DEADLINE_MAX_MS,
    MESSAGE_MAX_BYTES,
    ROLES,
    VERBS,
    build_op,
    decode_op,
    glimpse,
    is_op_id,
    new_ulid,
    suffices,
)
from discovery.errors import LocalError, Refused

TARGET = "0807060504030201"
NONCE = "ab" * 16
NOW = 1_700_000_000_000
OP_ID = new_ulid(NOW, bytes(range(10)))
RECORD = {"chain": "log", "sha256": "ab" * 32}
ARGS = {
    "drain": {"deadline_ms": 300_000},
    "maintenance_enter": {"deadline_ms": 5},
    "drop_replicas": {"chains": ["x"]},
    "rotate_key": {"retire_ms": 60_000},
    "append": {"fields": RECORD},
}


def built(verb: str = "kill", **changes: object) -> bytes:
    fields: dict[str, object] = {
        "mesh": "alpha",
        "target": TARGET,
        "op_id": OP_ID,
        "nonce": NONCE,
        "now_ms": NOW,
        **ARGS.get(verb, {}),
    }
    return build_op(verb, **(fields | changes))  # type: ignore[arg-type]


def altered(message: bytes, **fields: object) -> bytes:
    return json.dumps(json.loads(message) | fields).encode()


@pytest.mark.parametrize(
    ("verb", "wire", "args"),
    [
        ("kill", "shutdown", {}),
        ("drain", "set_state", {"state": "draining", "deadline_ms": 300_000}),
        ("update", "set_state", {"state": "updating"}),
        ("resume", "set_state", {"state": "alive"}),
        ("cordon", "cordon", {}),
        ("uncordon", "uncordon", {}),
        ("maintenance_enter", "enter_maintenance", {"deadline_ms": 5}),
        ("maintenance_exit", "exit_maintenance", {}),
        ("restart_daemons", "restart_all_daemons", {}),
        ("clear_avoid", "clear_avoid_list", {}),
        ("drop_replicas", "drop_replicas", {"chains": ["x"]}),
        ("invalidate_placement", "invalidate_placement", {}),
        ("rotate_key", "rotate_key", {"retire_ms": 60_000}),
        ("append", "append", RECORD),
    ],
)
def test_verb_travels_as_its_wire_op_and_comes_back(verb: str, wire: str, args: dict[str, object]) -> None:
    message = built(verb)
    assert json.loads(message) == {
        "v": 1,
        "mesh": "alpha",
        "target": TARGET,
        "op": wire,
        "args": args,
        "op_id": OP_ID,
        "issued_at_ms": NOW,
        "expires_at_ms": NOW + 60_000,
        "nonce": NONCE,
    }
    op = decode_op(message)
    assert (op.verb, op.op_id) == (verb, OP_ID)
    assert op.deadline_ms == args.get("deadline_ms")
    assert op.chains == args.get("chains", [])
    assert op.retire_ms == args.get("retire_ms")
    assert glimpse(message) == (OP_ID, verb)


def test_every_verb_is_tested_and_has_a_role() -> None:
    assert len(VERBS) == 17
    assert {v.role for v in VERBS.values()} <= set(ROLES)
    assert [name for name, v in VERBS.items() if v.role == "admin"] == [
        "drop_replicas",
        "rotate_key",
        "apply",
        "grant_operator",
        "revoke_operator",
    ]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "malformed"),
        (b"{}", "malformed"),
        (b"[]", "malformed"),
        (b"null", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[" * MESSAGE_MAX_BYTES, "malformed"),
        (b'{"v":' + b"9" * 9000 + b"}", "malformed"),
        (b"x" * (MESSAGE_MAX_BYTES + 1), "too_large"),
        (built() + b"x", "malformed"),
        (b"\xef\xbb\xbf" + built(), "malformed"),
        (built().replace(b'"v":1', b'"v":1,"v":1'), "malformed"),
        (built().replace(b'"v":1', b'"v":NaN'), "malformed"),
        (altered(built(), v=2), "version"),
        (altered(built(), v=True), "malformed"),
        (altered(built(), v="1"), "malformed"),
        (altered(built(), only_if="raining"), "malformed"),
        (altered(built(), target="0807"), "malformed"),
        (altered(built(), target=TARGET + "\n"), "malformed"),
        (altered(built(), mesh="No Mesh"), "malformed"),
        (altered(built(), op_id="x"), "malformed"),
        (altered(built(), op_id=OP_ID.lower()), "malformed"),
        (altered(built(), nonce=""), "malformed"),
        (altered(built(), issued_at_ms=-1), "malformed"),
        (altered(built(), issued_at_ms="0"), "malformed"),
        (altered(built(), expires_at_ms=2**60), "malformed"),
        (altered(built(), args={"force": True}), "malformed"),
        (altered(built(), args=[]), "malformed"),
        (altered(built(), op="format_disk"), "unknown_op"),
        (altered(built("drain"), args={}), "bad_state"),
        (altered(built("drain"), args={"state": "joining"}), "bad_state"),
        (altered(built("drain"), args={"state": "leaving"}), "bad_state"),
        (altered(built("drain"), args={"state": "dead"}), "bad_state"),
        (altered(built("drain"), args={"state": ["alive"]}), "bad_state"),
        (altered(built("drain"), args={"state": "draining", "deadline_ms": -1}), "malformed"),
        (
            altered(built("drain"), args={"state": "draining", "deadline_ms": DEADLINE_MAX_MS + 1}),
            "malformed",
        ),
        (altered(built("update"), args={"state": "updating", "deadline_ms": 5}), "malformed"),
        (altered(built("drop_replicas"), args={"chains": ["x"] * 257}), "malformed"),
        (altered(built("drop_replicas"), args={"chains": ["\ud800"]}), "malformed"),
        (altered(built("drop_replicas"), args={"chains": ["a\x1b[2J"]}), "malformed"),
        (altered(built("drop_replicas"), args={}), "malformed"),
    ],
)
def test_message_that_is_no_op_is_refused_by_code(message: bytes, code: str) -> None:
    with pytest.raises(Refused) as caught:
        decode_op(message)
    assert caught.value.code == code
    assert "\n" not in caught.value.sentence


def test_refusal_never_repeats_control_characters_of_the_sender() -> None:
    with pytest.raises(Refused) as caught:
        decode_op(altered(built(), **{"\x1b[31m": 1}))
    assert caught.value.sentence.isprintable()


@given(st.binary(max_size=400))
def test_garbage_is_refused_and_nothing_else(message: bytes) -> None:
    with pytest.raises(Refused):
        decode_op(message)
    assert glimpse(message) == (None, None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(json.loads(built()))), json_values)
def test_op_with_any_field_replaced_decodes_or_is_refused(field: str, value: object) -> None:
    message = altered(built("drain"), **{field: value})
    try:
        assert decode_op(message).verb in VERBS
    except Refused:
        pass
    glimpse(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "Not A Mesh"},
        {"target": "short"},
        {"op_id": "none"},
        {"nonce": "none"},
        {"lifetime_ms": 120_001},
        {"lifetime_ms": 0},
        {"deadline_ms": 5},
    ],
)
def test_building_nonsense_is_a_local_error(changes: dict[str, object]) -> None:
    with pytest.raises(LocalError):
        built("kill", **changes)


def test_building_an_unknown_verb_names_the_known_ones() -> None:
    with pytest.raises(LocalError, match="drain"):
        built("explode")


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10), st.integers(0, 2**48 - 1))
def test_ulids_are_well_formed_and_sort_by_time(now: int, random: bytes, later: int) -> None:
    one, two = new_ulid(now, random), new_ulid(later, random)
    assert is_op_id(one)
    assert (one < two) == (now < later)


def test_ulid_of_the_specification() -> None:
    assert new_ulid(1469918176385, bytes(10)) == "01ARYZ6S410000000000000000"
    assert new_ulid(2**48 - 1, b"\xff" * 10) == "7" + "Z" * 25
    with pytest.raises(LocalError):
        new_ulid(0, b"short")


def test_roles_are_ordered_and_unknown_ones_suffice_for_nothing() -> None:
    for i, have in enumerate(ROLES):
        for j, need in enumerate(ROLES):
            assert suffices(have, need) == (i >= j)
    assert not suffices("root", "observe")
    assert not suffices(None, "observe")
