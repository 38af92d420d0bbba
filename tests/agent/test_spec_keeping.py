"""What stays on a node, in the bytes of its member record."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.spec.keeping import MARK_BYTES, Keeping
from discovery.member import MAX_KEEPS_BYTES

NAMES = st.sets(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True), max_size=40)


@given(NAMES, NAMES)
def test_keeps_are_read_back_by_who_has_the_same_names_in_any_order(
    names: set[str], running: set[str]
) -> None:
    told = Keeping(sorted(names, reverse=True)).packed(running)
    assert Keeping(sorted(names)).unpacked(told) == names & running


def test_keeps_by_other_names_are_not_known_and_none_at_all_are_none() -> None:
    ab = Keeping(["a", "b"])
    assert Keeping(["a", "b", "c"]).unpacked(ab.packed({"b"})) is None
    assert ab.unpacked(b"") == frozenset() == ab.unpacked(ab.packed({"z"}))


@given(st.binary(max_size=MAX_KEEPS_BYTES - MARK_BYTES))
def test_any_bits_of_another_node_name_daemons_of_the_spec_or_nothing(bits: bytes) -> None:
    ab = Keeping(["a", "b"])
    found = ab.unpacked(ab.packed({"a"})[:MARK_BYTES] + bits)
    assert found is not None and found <= {"a", "b"}


def test_keeps_of_the_largest_spec_fit_a_member_record() -> None:
    names = [f"daemon-{n}" for n in range(1000)]
    assert len(Keeping(names).packed(names)) <= MAX_KEEPS_BYTES
