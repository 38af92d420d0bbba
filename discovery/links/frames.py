"""What travels on a link: frames of four bytes of length and a msgpack array `[kind, id, method, body]`.

The side that starts a call or a stream chooses its id. Kinds say which side started it, so both sides number
from 1 without ever meeting.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable

LENGTH_BYTES = 4
ITEM_COST_BYTES = 256
"""What an item of a stream counts beside its bytes: small items cost memory too."""


class Kind(IntEnum):
    """What a frame is. CALL, STREAM, CANCEL, CREDIT and TUNNEL go to who serves; RESULT to END come back from there.

    A tunnel is asked for with TUNNEL and granted with RESULT. Then each side sends at most the bytes that the other
    granted it, and both end it with one SHUT each: only then is its id free. Kinds with BACK come from who serves.
    """

    CALL = 0
    RESULT = 1
    ERROR = 2
    STREAM = 3
    ITEM = 4
    END = 5
    CANCEL = 6
    CREDIT = 7
    TUNNEL = 8
    DATA = 9
    DATA_BACK = 10
    GRANT = 11
    GRANT_BACK = 12
    SHUT = 13
    SHUT_BACK = 14


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """One frame. `body`: params, a result, an item, an error (a SHUT's may be None), bytes, or a number of them."""

    kind: Annotated[int, Meta(ge=0, le=255)]
    id: Annotated[int, Meta(ge=0, le=2**53)]
    method: Annotated[str, Meta(max_length=64)] = ""
    body: Any = None


class BadFrame(RemoteError):
    """A frame that breaks the rules of the link; `code` is counted and the link is closed."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(kind: Kind, call: int, method: str = "", body: Any = None) -> bytearray:
    """The frame with its length before it. TypeError, ValueError or OverflowError: no plain value."""
    out = bytearray(LENGTH_BYTES)
    _encoder.encode_into(Frame(kind, call, method, body), out, LENGTH_BYTES)
    out[:LENGTH_BYTES] = (len(out) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big")
    return out


def decode(data: bytes | memoryview) -> Frame:
    """The frame of these bytes (without the length); BadFrame when they are none."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as why:
        raise BadFrame("bad_frame", f"a frame that does not decode: {why}") from why


class Splitter:
    """Cuts a byte stream into frames, of which none may exceed `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are whole now, without their lengths. BadFrame: one too large was announced."""
        self._buffer += data
        buffer, at = self._buffer, 0
        try:
            while len(buffer) - at >= LENGTH_BYTES:
                size = int.from_bytes(buffer[at : at + LENGTH_BYTES], "big")
                if size > self._max:
                    raise BadFrame("frame_too_large", f"a frame of {size} bytes; {self._max} are allowed")
                end = at + LENGTH_BYTES + size
                if len(buffer) < end:
                    break
                frame = bytes(buffer[at + LENGTH_BYTES : end])
                at = end
                yield frame
        finally:
            del buffer[:at]


def error_body(why: BaseException) -> dict[str, Any]:
    """How an exception of a handler goes to the caller: one line, and of a bug of ours only its type."""
    match why:
        case Refused():
            return {"kind": "refused", "code": why.code, "text": one_line(why.sentence)}
        case Unreachable():
            return {"kind": "unreachable", "maybe_arrived": why.maybe_arrived, "text": one_line(str(why))}
        case QuarterdeckError():
            return {"kind": "remote", "text": one_line(str(why))}
        case _:
            return {"kind": "remote", "text": f"internal error ({type(why).__name__})"}


def error_of(body: Any) -> QuarterdeckError:
    """The exception that an ERROR frame stands for, whatever its body is."""
    fields = body if isinstance(body, dict) else {}
    text = one_line(str(fields.get("text", "failed without a word")))
    match fields.get("kind"):
        case "refused":
            return Refused(one_line(str(fields.get("code", "refused")))[:64], text)
        case "unreachable":
            return Unreachable(text, maybe_arrived=bool(fields.get("maybe_arrived", True)))
        case _:
            return RemoteError(text)


def one_line(text: str, limit: int = 500) -> str:
    """Text that fits one line of a terminal and holds no control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:limit])
