"""One link: calls, streams and tunnels in both directions over one SSH channel.

A call that arrived is finished even when its caller is gone, so that no op stops half-way; its answer is
dropped. A stream ends with its consumer. A stream sends at most `stream_window_bytes` ahead of what its
consumer took: a slow consumer holds up its own stream's generator, never memory, other calls or other
streams. A side that does not read at all is cut off at `max_unsent_bytes`. Tunnels have a module of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from discovery.errors import LocalError, Refused, Unreachable
from discovery.links.flow import Ended, Inbound, Outbound
from discovery.links.frames import (
    ITEM_COST_BYTES,
    LENGTH_BYTES,
    BadFrame,
    Frame,
    Kind,
    Splitter,
    decode,
    encode,
    error_body,
    error_of,
)
from discovery.links.limits import Limits, Login
from discovery.links.tunnel import Tunnel, TunnelMethod
from discovery.member import Addr, addr_text

_Plain = Callable[["Link", Any], Awaitable[Any] | AsyncIterator[Any]]
Handler = _Plain | TunnelMethod
"""`async def (link, params) -> result`, an async generator `(link, params)` of a stream's items, or a TunnelMethod.
Params and results are plain values: dict, list, str, bytes, int, float, bool, None."""

_CLOSE_FLUSH_S = 1.0
_TURN_BYTES = 16 * 2**10
"""A generator that never waits gives way to others after this much."""
_log = logging.getLogger(__name__)


class Wire(Protocol):
    """The channel below a link."""

    def write(self, data: bytes | bytearray) -> None: ...
    def unsent(self) -> int: ...
    def close(self, code: str) -> None: ...
    def abort(self) -> None: ...


async def settled() -> None:
    """Lets the loop close the sockets that it was told to close: that takes it a few turns."""
    for _ in range(4):
        await asyncio.sleep(0)


class Link:
    """An authenticated connection to another process. Either side calls the other's methods."""

    def __init__(
        self,
        wire: Wire,
        login: Login,
        addr: Addr,
        methods: Mapping[str, Handler],
        limits: Limits,
        counters: Counter[str],
        *,
        dialled: bool,
    ) -> None:
        self.login = login
        self.addr = addr
        self.dialled = dialled
        self.methods = methods
        self.counters = counters
        self.opened = self.last_answer = time.monotonic()
        """Monotonic seconds. `last_answer`: when the other side last answered our call, or proved its key."""
        self.close_reason = ""
        self._wire = wire
        self._limits = limits
        self._splitter = Splitter(limits.max_frame_bytes)
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._inbound: dict[int, Inbound] = {}
        self._outbound: dict[int, Outbound] = {}
        self._asked: dict[int, Tunnel] = {}
        self._granted: dict[int, Tunnel] = {}
        """Tunnels asked for by us, and by the other side, until both sides have said that they end."""
        self._tunnelling: dict[int, asyncio.Task[None]] = {}
        self._serving: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self._on_close: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Link {self.login.kind} {self.addr[0]}:{self.addr[1]}{' closed' if self.closed else ''}>"

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    @property
    def in_use(self) -> bool:
        """Whether a call, a stream or a tunnel is under way, asked for by either side."""
        return bool(
            self._calls or self._inbound or self._serving or any(not t.closed for t in self._asked.values())
        )

    def on_close(self, callback: Callable[[], None]) -> None:
        """Calls back once, when the link is closed by a side or by the network; soon if it is already."""
        if self.closed:
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._on_close.append(callback)

    # --- calling the other side

    async def call(self, method: str, params: Any = None, timeout_s: float = 10.0) -> Any:
        """The other side's answer. Refused and RemoteError as sent by it; Unreachable when none came.

        Being cancelled or timed out does not stop what the other side has begun.
        """
        call = next(self._ids)
        frame = self._encode(Kind.CALL, call, method, params)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        sent = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._drained()
                self._calls[call] = answer
                self._write(frame)
                sent = True
                return await answer
        except TimeoutError as why:
            raise Unreachable(
                f"{self._who()} did not answer {method!r} within {timeout_s:g} s", maybe_arrived=sent
            ) from why
        finally:
            self._calls.pop(call, None)

    async def stream(self, method: str, params: Any = None) -> AsyncIterator[Any]:
        """The items that the other side's generator yields, asked for when iteration begins.

        Closing the iterator (`contextlib.aclosing`, or letting go of it) closes the generator over there.
        """
        call = next(self._ids)
        frame = self._encode(Kind.STREAM, call, method, params)
        await self._drained()
        inbound = self._inbound[call] = Inbound(self._limits.stream_window_bytes)
        self._write(frame)
        try:
            while True:
                item, credit = await inbound.next()
                if credit:
                    self._write(encode(Kind.CREDIT, call, body=credit))
                yield item
        except Ended:
            return
        finally:
            if self._inbound.pop(call, None) and not inbound.ended:
                self._write(encode(Kind.CANCEL, call))

    async def tunnel(self, method: str, params: Any = None, timeout_s: float = 10.0) -> Tunnel:
        """Bytes both ways with a TunnelMethod of the other side, once it has accepted (`tunnel.answer`).

        Refused and RemoteError as sent by it; Unreachable when nothing came in time.
        """
        if len(self._asked) >= self._limits.max_calls:
            raise Refused("busy", f"{self._limits.max_calls} tunnels under way on the link to {self._who()}")
        call = next(self._ids)
        frame = self._encode(Kind.TUNNEL, call, method, params)
        tunnel = Tunnel(
            call, self._send, self._drained, served=False, window=self._limits.stream_window_bytes
        )
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        opened = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._drained()
                self._calls[call], self._asked[call] = answer, tunnel
                self._write(frame)
                tunnel.offer()
                tunnel.answer = await answer
                opened = True
                return tunnel
        except TimeoutError as why:
            raise Unreachable(f"{self._who()} did not answer {method!r} within {timeout_s:g} s") from why
        finally:
            self._calls.pop(call, None)
            if call in self._asked and not opened:
                tunnel.close()

    # --- the end

    async def close(self) -> None:
        """Sends what is waiting (at most a second), tells the other side, and closes."""
        if not self.closed:
            with contextlib.suppress(TimeoutError, Unreachable):
                async with asyncio.timeout(_CLOSE_FLUSH_S):
                    await self._drained()
            self._wire.close(self.close_reason or "closed here")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_FLUSH_S):
                    await self._closed.wait()
        self.abort()
        await settled()

    def abort(self) -> None:
        """Closes at once."""
        self._wire.abort()
        self.lost("closed here")

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def lost(self, why: str) -> None:
        """The channel is gone: everybody who waits is told, streams served here end, calls are finished."""
        if self.closed:
            return
        self.close_reason = self.close_reason or why
        self._closed.set()
        self._writable.set()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._gone(maybe_arrived=True))
        for inbound in self._inbound.values():
            inbound.end(self._gone(maybe_arrived=True))
        for outbound in self._outbound.values():
            outbound.task.cancel()
        for tunnel in (*self._asked.values(), *self._granted.values()):
            tunnel.lost(self._gone(maybe_arrived=True))
        for task in self._tunnelling.values():
            task.cancel()
        self._asked.clear()
        self._granted.clear()
        callbacks, self._on_close = self._on_close, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                self._failed("on_close")

    def cancel_served(self) -> None:
        """Cancels what is still being served, calls too: the process ends."""
        for task in self._tasks:
            task.cancel()

    # --- what the channel tells

    def received(self, data: bytes) -> None:
        try:
            for frame in self._splitter.feed(data):
                self._take(decode(frame), LENGTH_BYTES + len(frame))
                if self.closed:
                    return
        except BadFrame as why:
            self._cut_off(why.code, str(why))

    def pause(self) -> None:
        self._writable.clear()

    def resume(self) -> None:
        self._writable.set()

    # --- serving the other side

    def _take(self, frame: Frame, size: int) -> None:
        match frame.kind:
            case Kind.CALL | Kind.STREAM | Kind.TUNNEL:
                self._begin(frame)
            case Kind.DATA | Kind.DATA_BACK | Kind.GRANT | Kind.GRANT_BACK | Kind.SHUT | Kind.SHUT_BACK:
                self._take_tunnelled(frame)
            case Kind.RESULT | Kind.ERROR if (answer := self._calls.get(frame.id)) is not None:
                self.last_answer = time.monotonic()
                if not answer.done():
                    if frame.kind == Kind.RESULT:
                        answer.set_result(frame.body)
                        if (asked := self._asked.get(frame.id)) is not None:
                            asked.accepted = True
                    else:
                        answer.set_exception(error_of(frame.body))
            case Kind.ITEM | Kind.END | Kind.ERROR if (inbound := self._inbound.get(frame.id)) is not None:
                if frame.kind == Kind.ITEM:
                    inbound.put(frame.body, size + ITEM_COST_BYTES)
                else:
                    inbound.end(error_of(frame.body) if frame.kind == Kind.ERROR else Ended())
            case Kind.CREDIT if (outbound := self._outbound.get(frame.id)) is not None:
                if not isinstance(frame.body, int) or not 0 < frame.body <= 2**32:
                    raise BadFrame("bad_frame", "credit that is no number of bytes")
                outbound.grant(frame.body)
            case Kind.CANCEL if (outbound := self._outbound.get(frame.id)) is not None:
                outbound.task.cancel()

    def _take_tunnelled(self, frame: Frame) -> None:
        tunnels = self._granted if frame.kind in (Kind.DATA, Kind.GRANT, Kind.SHUT) else self._asked
        tunnel = tunnels.get(frame.id)
        match frame.kind:
            case Kind.DATA | Kind.DATA_BACK:
                if tunnel is None:
                    raise BadFrame("bad_frame", "data for a tunnel that there is not")
                tunnel.arrived(frame.body)
            case Kind.GRANT | Kind.GRANT_BACK if tunnel is not None:
                tunnel.granted(frame.body)
            case Kind.SHUT | Kind.SHUT_BACK if tunnel is not None:
                del tunnels[frame.id]
                tunnel.ended(frame.body)
                if frame.kind == Kind.SHUT_BACK:
                    self.last_answer = time.monotonic()
                    answer = self._calls.get(frame.id)
                    if answer is not None and not answer.done():
                        answer.set_exception(error_of(frame.body))
                elif not tunnel.accepted and (task := self._tunnelling.get(frame.id)) is not None:
                    task.cancel()

    def _begin(self, frame: Frame) -> None:
        if frame.id in self._serving or frame.id in self._granted:
            raise BadFrame("bad_frame", "an id that is in use")
        handler = self.methods.get(frame.method)
        if handler is None:
            self.counters["unknown_method"] += 1
            return self._refuse(frame, Refused("unknown_method", f"no method {frame.method!r} here"))
        if max(len(self._serving), len(self._granted)) >= self._limits.max_calls:
            self.counters["calls_full"] += 1
            return self._refuse(
                frame, Refused("busy", f"{self._limits.max_calls} calls under way on this link")
            )
        if isinstance(handler, TunnelMethod) != (frame.kind == Kind.TUNNEL):
            kind = "a tunnel" if isinstance(handler, TunnelMethod) else "no tunnel"
            return self._refuse(frame, Refused("wrong_kind", f"{frame.method!r} is {kind}"))
        self._serving.add(frame.id)
        if isinstance(handler, TunnelMethod):
            window = self._limits.stream_window_bytes
            tunnel = Tunnel(frame.id, self._send, self._drained, served=True, window=window)
            task = self._tunnelling[frame.id] = asyncio.create_task(
                self._serve_tunnel(frame, handler, tunnel)
            )
            self._granted[frame.id] = tunnel
        elif frame.kind == Kind.CALL:
            task = asyncio.create_task(self._serve_call(frame, handler))
        else:
            outbound = Outbound(self._limits.stream_window_bytes)
            task = outbound.task = asyncio.create_task(self._serve_stream(frame, handler, outbound))
            self._outbound[frame.id] = outbound
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._served(frame.id, done))

    def _served(self, call: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._serving.discard(call)
        self._outbound.pop(call, None)
        self._tunnelling.pop(call, None)
        if not task.cancelled() and (why := task.exception()) is not None:
            self.counters["handler_error"] += 1
            _log.debug("serving failed", exc_info=why)

    async def _serve_call(self, frame: Frame, handler: _Plain) -> None:
        try:
            served = handler(self, frame.body)
            if not isinstance(served, Awaitable):
                raise Refused("wrong_kind", f"{frame.method!r} is a stream")
            out = self._encode(Kind.RESULT, frame.id, "", await served)
        except Exception as why:
            out = self._encode_error(frame, why)
        with contextlib.suppress(Unreachable):
            await self._drained()
            self._write(out)

    async def _serve_stream(self, frame: Frame, handler: _Plain, outbound: Outbound) -> None:
        items: Any = None
        turn = 0
        try:
            items = handler(self, frame.body)
            if not isinstance(items, AsyncIterator):
                items = None if not hasattr(items, "close") else items.close()
                raise Refused("wrong_kind", f"{frame.method!r} is a call, not a stream")
            async for item in items:
                out = self._encode(Kind.ITEM, frame.id, "", item)
                cost = len(out) + ITEM_COST_BYTES
                await outbound.spend(cost)
                if (turn := turn + cost) > _TURN_BYTES:
                    turn = 0
                    await asyncio.sleep(0)
                await self._drained()
                self._write(out)
            out = encode(Kind.END, frame.id)
        except Exception as why:
            out = self._encode_error(frame, why)
        finally:
            if hasattr(items, "aclose"):
                with contextlib.suppress(Exception):
                    await items.aclose()
        with contextlib.suppress(Unreachable):
            await self._drained()
            self._write(out)

    async def _serve_tunnel(self, frame: Frame, method: TunnelMethod, tunnel: Tunnel) -> None:
        error: dict[str, Any] | None = None
        try:
            await method.serve(self, frame.body, tunnel)
        except Exception as why:
            self._count_failure(frame, why)
            error = error_body(why)
        finally:
            tunnel.shut(error)

    def _encode_error(self, frame: Frame, why: Exception) -> bytearray:
        self._count_failure(frame, why)
        return encode(Kind.ERROR, frame.id, body=error_body(why))

    def _count_failure(self, frame: Frame, why: Exception) -> None:
        if not isinstance(why, Refused | Unreachable):
            self._failed(frame.method)

    def _refuse(self, frame: Frame, why: Refused) -> None:
        kind = Kind.SHUT_BACK if frame.kind == Kind.TUNNEL else Kind.ERROR
        self._write(encode(kind, frame.id, body=error_body(why)))

    def _failed(self, what: str) -> None:
        self.counters["handler_error"] += 1
        _log.debug("%s failed", what, exc_info=True)

    # --- bytes

    def _encode(self, kind: Kind, call: int, method: str, body: Any) -> bytearray:
        try:
            out = encode(kind, call, method, body)
        except (TypeError, ValueError, OverflowError, RecursionError) as why:
            raise LocalError(f"not a plain value to send: {why}") from why
        if len(out) - LENGTH_BYTES > self._limits.max_frame_bytes:
            raise LocalError(
                f"{len(out)} bytes to send; one frame holds {self._limits.max_frame_bytes}: send it in pieces"
            )
        return out

    def _send(self, kind: Kind, call: int, body: Any) -> None:
        self._write(encode(kind, call, body=body))

    def _write(self, frame: bytearray) -> None:
        if self.closed:
            return
        self._wire.write(frame)
        if self._wire.unsent() > self._limits.max_unsent_bytes:
            self._cut_off("overrun", "the other side does not read what it asked for")

    async def _drained(self) -> None:
        while not self._writable.is_set():
            await self._writable.wait()
        if self.closed:
            raise self._gone(maybe_arrived=False)

    def _cut_off(self, code: str, why: str) -> None:
        self.counters[code] += 1
        self.close_reason = why
        self._wire.close(code)
        self.lost(why)

    def _gone(self, *, maybe_arrived: bool) -> Unreachable:
        return Unreachable(
            f"the link to {self._who()} is closed ({self.close_reason})", maybe_arrived=maybe_arrived
        )

    def _who(self) -> str:
        return addr_text(self.addr)
