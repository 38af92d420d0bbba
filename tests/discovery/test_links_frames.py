"""Frames: whatever the bytes and however they are cut, frames or a named error come out."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.links import Limits, Link, Login
from discovery.links.frames import BadFrame, Frame, Kind, Splitter, decode, encode, error_body, error_of
from tests.discovery.loopback import METHODS

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=9,
)


@given(st.sampled_from(Kind), st.integers(0, 2**53), st.text(max_size=64), PLAIN)
def test_frame_encoded_decodes_to_itself(kind: Kind, call: int, method: str, body: Any) -> None:
    data = encode(kind, call, method, body)
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert decode(memoryview(data)[4:]) == Frame(kind, call, method, body)


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 40))
def test_splitter_fed_in_any_pieces_gives_the_same_frames(frames: list[bytes], piece: int) -> None:
    data = b"".join(len(f).to_bytes(4, "big") + f for f in frames)
    splitter = Splitter(50)
    got = [f for i in range(0, len(data), piece) for f in splitter.feed(data[i : i + piece])]
    assert got == frames


def test_splitter_gives_the_frames_before_one_too_large() -> None:
    got = []
    with pytest.raises(BadFrame) as why:
        got.extend(Splitter(10).feed(b"\0\0\0\x02ok"))
        for frame in Splitter(10).feed(b"\0\0\0\x02ok" + b"\0\0\0\x0b"):
            got.append(frame)
    assert got == [b"ok", b"ok"] and why.value.code == "frame_too_large"


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_decode_of_random_bytes_is_a_frame_or_a_bad_frame(data: bytes) -> None:
    try:
        assert isinstance(decode(data), Frame)
    except BadFrame as why:
        assert why.code == "bad_frame"


@pytest.mark.parametrize(
    "why",
    [
        Refused("expired", "too late"),
        Unreachable("nobody", maybe_arrived=True),
        Unreachable("x"),
        RemoteError("y"),
    ],
)
def test_error_goes_over_the_wire_as_it_is(why: QuarterdeckError) -> None:
    there = error_of(error_body(why))
    assert type(there) is type(why) and str(there) == str(why)
    assert vars(there) == vars(why)


def test_error_of_ours_tells_its_type_and_nothing_else() -> None:
    assert str(error_of(error_body(KeyError("/home/me/secret")))) == "internal error (KeyError)"
    assert isinstance(error_of(error_body(LocalError("not usable"))), RemoteError)


@given(PLAIN)
def test_error_of_any_body_is_one_line(body: Any) -> None:
    why = error_of(body)
    assert isinstance(why, QuarterdeckError) and "\n" not in str(why)


class Pipe:
    """A channel that goes nowhere."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = ""

    def write(self, data: bytes | bytearray) -> None:
        self.sent.append(bytes(data))

    def unsent(self) -> int:
        return 0

    def close(self, code: str) -> None:
        self.closed = code

    def abort(self) -> None:
        pass


frames = st.builds(
    lambda kind, call, method, body: bytes(encode(kind, call, method, body)),
    st.sampled_from(Kind),
    st.integers(0, 3),
    st.sampled_from(["echo", "count", "nothing", ""]),
    st.none() | st.integers(-3, 2**40) | st.binary(max_size=5),
)


@given(st.lists(frames | st.binary(min_size=1, max_size=12), max_size=30))
@settings(max_examples=200, deadline=None)
def test_link_fed_anything_lives_or_is_cut_off_by_name(chunks: list[bytes]) -> None:
    async def run() -> None:
        pipe, counters = Pipe(), Counter[str]()
        login = Login("member", 1, None, "SHA256:x", None, "")
        limits = Limits(max_frame_bytes=1000, max_calls=2)
        link = Link(pipe, login, ("127.0.0.1", 1), METHODS, limits, counters, dialled=False)
        asking = asyncio.create_task(link.call("echo", 1, 0.05))
        for chunk in chunks:
            await asyncio.sleep(0)
            if not link.closed:
                link.received(chunk)
        await asyncio.gather(asking, return_exceptions=True)
        assert link.closed == bool(pipe.closed)
        assert pipe.closed in ("", "bad_frame", "frame_too_large")
        assert sum(counters[code] for code in ("bad_frame", "frame_too_large")) == int(link.closed)
        link.abort()
        link.cancel_served()
        await asyncio.sleep(0)

    asyncio.run(run())
