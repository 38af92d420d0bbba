"""Sealed packets: what opens, what does not, and that nothing forged leaves a trace."""

from __future__ import annotations

import copy
import time

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery import seal
from discovery.errors import LocalError
from discovery.seal import (
    OVERHEAD,
    QUIET_S,
    WINDOW,
    Forged,
    IncompatibleVersion,
    Keyring,
    OldSalt,
    Opener,
    Replayed,
    Sealer,
    SealError,
    UnknownKey,
    packet_key_id,
)

KEY, OTHER = bytes(range(32)), b"k" * 32
RING = Keyring([KEY])
ME = 0x0807060504030201


def sealer(start_ms: int = 1_000, random: bytes = b"r" * 8, ring: Keyring = RING, sender: int = ME) -> Sealer:
    return Sealer(ring, "alpha", sender, start_ms, random)


def memory(opener: Opener) -> object:
    """Everything an opener remembers, as comparable values."""
    return [
        (
            who,
            s.newest.start_ms,
            [(salt, x.top, x.seen, x.heard, x.admitted, len(x.aeads)) for salt, x in s.salts.items()],
        )
        for who, s in opener._senders.items()
    ]


def test_packet_sealed_opens_to_sender_and_body() -> None:
    packet = sealer().seal(b"hello")
    assert Opener(RING, "alpha").open(packet, 0) == (ME, b"hello")
    assert len(packet) == len(b"hello") + OVERHEAD


def test_packet_matches_the_layout_that_the_docs_promise() -> None:
    box = sealer()
    box.seal(b"")
    packet = box.seal(b"body")
    header = packet[:34]
    assert header[0] == 1 and header[2:10] == ME.to_bytes(8, "big")
    assert header[10:18] == (1_000).to_bytes(8, "big") and header[18:26] == b"r" * 8
    assert header[26:34] == (1).to_bytes(8, "big")
    info = b"quarterdeck/1|alpha|" + ME.to_bytes(8, "big") + b"|" + header[10:26]
    key = HKDF(hashes.SHA256(), 32, None, info).derive(KEY)
    assert AESGCM(key).decrypt((1).to_bytes(12, "big"), packet[34:], header) == b"body"


def test_packet_of_another_pool_does_not_open() -> None:
    with pytest.raises(Forged):
        Opener(RING, "beta").open(sealer().seal(b"x"), 0)


def test_packet_of_another_key_is_unknown_key() -> None:
    with pytest.raises(UnknownKey) as caught:
        Opener(Keyring([OTHER]), "alpha").open(sealer().seal(b"x"), 0)
    assert caught.value.code == "unknown_key"


@pytest.mark.parametrize("version", [0, 2, 255])
def test_packet_of_another_wire_version_is_incompatible_whatever_its_length(version: int) -> None:
    for packet in (bytes([version]), bytes([version]) + sealer().seal(b"x")[1:]):
        with pytest.raises(IncompatibleVersion) as caught:
            Opener(RING, "alpha").open(packet, 0)
        assert (caught.value.theirs, caught.value.ours, caught.value.code) == (version, 1, "wire_version")


def test_packet_replayed_is_refused_and_later_ones_still_open() -> None:
    opener, box = Opener(RING, "alpha"), sealer()
    packets = [box.seal(bytes([i])) for i in range(5)]
    for i in (2, 0, 4, 1, 3):
        assert opener.open(packets[i], 0)[1] == bytes([i])
    for packet in packets:
        with pytest.raises(Replayed):
            opener.open(packet, 0)


def test_packet_behind_the_window_is_refused_and_at_its_edge_opens() -> None:
    opener, box = Opener(RING, "alpha"), sealer()
    packets = [box.seal(b"") for _ in range(WINDOW + 1)]
    opener.open(packets[-1], 0)
    with pytest.raises(Replayed):
        opener.open(packets[0], 0)
    opener.open(packets[1], 0)


def test_window_jumped_over_forgets_nothing_that_it_covers() -> None:
    opener, box = Opener(RING, "alpha"), sealer()
    packets = [box.seal(b"") for _ in range(3 * WINDOW)]
    opener.open(packets[0], 0)
    opener.open(packets[2 * WINDOW + 5], 0)
    opener.open(packets[2 * WINDOW + 4], 0)
    for i in (0, 2 * WINDOW + 4, 2 * WINDOW + 5):
        with pytest.raises(Replayed):
            opener.open(packets[i], 0)


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=60))
@settings(max_examples=60, deadline=None)
def test_window_in_any_order_opens_each_packet_at_most_once(order: list[int]) -> None:
    opener, box = Opener(RING, "alpha"), sealer()
    packets = [box.seal(b"") for _ in range(3 * WINDOW + 1)]
    opened: set[int] = set()
    top = -1
    for i in order:
        expected = i not in opened and i > top - WINDOW
        try:
            opener.open(packets[i], 0)
        except Replayed:
            assert not expected
        else:
            assert expected
            opened.add(i)
            top = max(top, i)


def test_sender_restarted_takes_over_and_its_old_packets_are_dropped() -> None:
    opener, old, new = Opener(RING, "alpha"), sealer(1_000), sealer(2_000)
    late = old.seal(b"late")
    opener.open(old.seal(b"a"), 0)
    opener.open(new.seal(b"b"), 1)
    for packet in (late, old.seal(b"later")):
        with pytest.raises(OldSalt):
            opener.open(packet, 2)
    assert opener.open(new.seal(b"c"), 3)[1] == b"c"


def test_sender_restarted_with_its_clock_set_back_is_heard_after_ten_quiet_seconds() -> None:
    opener, old, new = Opener(RING, "alpha"), sealer(5_000_000), sealer(1_000)
    opener.open(old.seal(b"a"), 100)
    with pytest.raises(OldSalt):
        opener.open(new.seal(b"b"), 100 + QUIET_S - 0.1)
    assert opener.open(new.seal(b"c"), 100 + QUIET_S)[1] == b"c"
    assert opener.open(new.seal(b"d"), 100 + QUIET_S + 0.1)[1] == b"d"


def test_sender_with_clock_set_back_is_not_shut_out_by_replays_of_its_past() -> None:
    opener, past, live = Opener(RING, "alpha"), sealer(5_000_000), sealer(1_000)
    recorded = [past.seal(b"") for _ in range(3)]
    opener.open(past.seal(b""), 0)
    opener.open(live.seal(b""), 20)
    for i, packet in enumerate(recorded):
        opener.open(packet, 21 + i)
        opener.open(live.seal(b""), 21.5 + i)


def test_sender_alive_is_never_shut_out_by_an_old_recording() -> None:
    opener, past, live = Opener(RING, "alpha"), sealer(1_000), sealer(2_000)
    opener.open(live.seal(b""), 0)
    for i in range(5):
        opener.open(past.seal(b""), 20 + i)
        opener.open(live.seal(b""), 20.5 + i)


def test_salt_that_comes_back_still_knows_what_it_opened() -> None:
    opener, old, new = Opener(RING, "alpha"), sealer(1_000), sealer(2_000)
    first = old.seal(b"")
    opener.open(first, 0)
    opener.open(new.seal(b""), 1)
    with pytest.raises(Replayed):
        opener.open(first, 100)


def test_salts_of_one_sender_are_bounded_and_the_newest_is_kept() -> None:
    opener, newest = Opener(RING, "alpha"), sealer(10**9)
    first = newest.seal(b"")
    opener.open(first, 0)
    for i in range(50):
        opener.open(sealer(i + 1, bytes([i]) * 8).seal(b""), 100 + i)
    assert len(opener._senders[ME].salts) == seal.SALTS_A_SENDER
    with pytest.raises(Replayed):
        opener.open(first, 200)


def test_senders_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "MAX_SENDERS", 3)
    opener = Opener(RING, "alpha")
    boxes = [sealer(sender=i) for i in range(5)]
    for box in boxes:
        opener.open(box.seal(b""), 0)
    assert list(opener._senders) == [2, 3, 4]
    opener.open(boxes[2].seal(b""), 0)
    opener.open(boxes[0].seal(b""), 0)
    assert list(opener._senders) == [4, 2, 0]


def test_key_rotated_opens_both_keys_and_then_only_the_new_one() -> None:
    both_old, both_new, only_new = Keyring([KEY, OTHER]), Keyring([OTHER, KEY]), Keyring([OTHER])
    opener, box = Opener(both_old, "alpha"), sealer(ring=both_old)
    before = box.seal(b"1")
    opener.open(before, 0)
    box.rotate(both_new)
    assert opener.open(box.seal(b"2"), 0)[1] == b"2"
    opener.rotate(only_new)
    assert opener.open(box.seal(b"3"), 0)[1] == b"3"
    with pytest.raises(UnknownKey):
        opener.open(before, 0)


def test_keys_that_share_an_id_are_both_tried() -> None:
    twin = next(
        k
        for k in (i.to_bytes(32, "big") for i in range(10_000))
        if Keyring([k]).primary_id == RING.primary_id
    )
    opener = Opener(Keyring([twin, KEY]), "alpha")
    assert opener.open(sealer().seal(b"x"), 0)[1] == b"x"
    assert opener.open(sealer(ring=Keyring([twin]), sender=5).seal(b"y"), 0) == (5, b"y")


def test_packet_key_id_tells_pools_on_one_port_apart() -> None:
    assert packet_key_id(sealer().seal(b"")) == RING.primary_id
    assert packet_key_id(b"") is None and packet_key_id(b"\x02\x01") is None


@pytest.mark.parametrize("keys", [[], [b"short"], [KEY, b""]])
def test_keyring_of_nonsense_is_a_local_error(keys: list[bytes]) -> None:
    with pytest.raises(LocalError):
        Keyring(keys)


def refused_without_a_trace(opener: Opener, packet: bytes, now: float) -> None:
    before = copy.deepcopy(memory(opener))
    with pytest.raises(SealError) as caught:
        opener.open(packet, now)
    assert caught.value.code in {"short", "wire_version", "unknown_key", "forged", "replayed", "old_salt"}
    assert memory(opener) == before


def listening() -> tuple[Opener, Sealer]:
    opener, box = Opener(RING, "alpha"), sealer()
    for _ in range(3):
        opener.open(box.seal(b"abc"), 0)
    return opener, box


@given(st.binary(max_size=200), st.floats(0, 1e6))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_by_name_and_leaves_no_trace(packet: bytes, now: float) -> None:
    refused_without_a_trace(listening()[0], packet, now)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_packet_with_any_bit_flipped_leaves_no_trace(data: st.DataObject) -> None:
    opener, box = listening()
    packet = bytearray(box.seal(b"some body"))
    bit = data.draw(st.integers(0, len(packet) * 8 - 1))
    packet[bit // 8] ^= 1 << bit % 8
    refused_without_a_trace(opener, bytes(packet), data.draw(st.floats(0, 1e6)))


@given(st.integers(0, OVERHEAD + 8))
@settings(deadline=None)
def test_packet_truncated_leaves_no_trace(length: int) -> None:
    opener, box = listening()
    refused_without_a_trace(opener, box.seal(b"some body")[:length], 0)


@given(
    st.integers(0, 2**64 - 1),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_packet_with_a_made_up_header_leaves_no_trace(
    sender: int, salt: bytes, counter: int, body: bytes
) -> None:
    head = bytes([1, RING.primary_id]) + sender.to_bytes(8, "big") + salt + counter.to_bytes(8, "big")
    refused_without_a_trace(listening()[0], head + body + b"\0" * 16, 0)


def test_old_salt_leaves_no_trace() -> None:
    opener, _ = listening()
    refused_without_a_trace(opener, sealer(1).seal(b""), 1.0)


def test_seal_and_open_cost_about_ten_microseconds_each() -> None:
    opener, box = Opener(RING, "alpha"), sealer()
    body = b"x" * 600
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(200):
            opener.open(box.seal(body), 0)
        best = min(best, (time.perf_counter() - began) / 200)
    assert best < 60e-6  # seal and open together; 3 times the aim, for a busy machine
