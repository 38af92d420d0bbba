"""What a cordoned node keeps, in the bytes of its member record."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.spec.keeping import packed, unpacked
from discovery.member import MAX_KEEPS_BYTES

NAMES = st.sets(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True), max_size=40)


@given(NAMES, NAMES)
def test_keeps_are_read_back_by_who_has_the_same_names_in_any_order(
    names: set[str], running: set[str]
) -> None:
    told = packed(sorted(names, reverse=True), running)
    assert unpacked(sorted(names), told) == names & running


def test_keeps_by_other_names_are_not_known_and_none_at_all_are_none() -> None:
    told = packed(["a", "b"], {"b"})
    assert unpacked(["a", "b", "c"], told) is None
    assert unpacked(["a", "b"], b"") == frozenset() == unpacked(["a", "b"], packed(["a", "b"], {"z"}))


def test_keeps_of_the_largest_spec_fit_a_member_record() -> None:
    names = [f"daemon-{n}" for n in range(1000)]
    assert len(packed(names, names)) <= MAX_KEEPS_BYTES
