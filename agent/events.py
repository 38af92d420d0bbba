"""What happened at this node, as it sees it: the objects that `qd events`, the console and the log show.

One object an event, the same for everybody: kept in a ring, handed to subscribers, and written to stderr.
Every promised key is always there, null where it doesn't apply. Neither a slow subscriber nor a stalled
reader of stderr ever holds the node up: what they miss is counted and told.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, BinaryIO

import msgspec

from discovery.identity import id_text

Event = dict[str, Any]

RING_EVENTS = 4096
BACKLOG_EVENTS = 1024
BACKLOG_LINES = 4096
CLOSE_TIMEOUT_S = 0.5
KEYS = ("at_ms", "kind", "node", "id", "mesh", "from", "to", "source", "reason", "op_id", "by")


def wall_ms() -> int:
    """Unix milliseconds: what labels events, and nothing else."""
    return time.time_ns() // 1_000_000


def plain(text: str) -> str:
    """`text` without what could steer a terminal or turn its line around: control and format characters, line
    separators, lone surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))


def text_line(event: Event) -> str:
    """One line for people: time, kind, node, the change, by whom, what else the event carries, and why."""
    at = event["at_ms"]
    clock = time.strftime("%H:%M:%S", time.localtime(at / 1000))
    words = [f"{clock}.{at % 1000:03d}", event["kind"], event["node"]]
    if event["to"] is not None:
        words.append(f"{event['from'] or '–'} → {event['to']}")
    elif event["from"] is not None:
        words.append(f"was {event['from']}")
    words += [f"{key}={event[key]}" for key in ("source", "op_id", "by") if event[key] not in (None, [], ())]
    words += [f"{key}={value}" for key, value in event.items() if key not in KEYS and value is not None]
    if event["reason"]:
        words.append(f"({event['reason']})")
    return plain(" ".join(str(word) for word in words))


class EventLog:
    """The events of one node, oldest first. `writer` gets each as a line of bytes, `form` json or text."""

    def __init__(
        self,
        name: str,
        node: int,
        mesh: str,
        *,
        clock_ms: Callable[[], int] = wall_ms,
        form: str = "text",
        writer: Callable[[bytes], None] | None = None,
        ring: int = RING_EVENTS,
    ) -> None:
        self._name, self._id, self._mesh = name, id_text(node), mesh
        self._clock_ms = clock_ms
        self._form = form
        self._writer = writer
        self._ring: deque[Event] = deque(maxlen=ring)
        self._subscribers: list[Subscription] = []
        self.total = 0
        """Events since the start, kept or not."""

    def emit(self, kind: str, **fields: Any) -> Event:
        """Records an event now and returns it. `from_` stands for the key `from`; unless given, `node`, `id`
        and `mesh` are this node's own; keys beyond the promised ones are kept as they are."""
        event: Event = dict.fromkeys(KEYS)
        event.update(at_ms=self._clock_ms(), kind=kind, node=self._name, id=self._id, mesh=self._mesh)
        if "from_" in fields:
            fields["from"] = fields.pop("from_")
        event.update(fields)
        self._ring.append(event)
        self.total += 1
        for subscriber in self._subscribers:
            subscriber.offer(event)
        if self._writer is not None:
            self._writer(self._line(event))
        return event

    def restore(self, events: list[Event]) -> None:
        """Puts events of this node's life before it was re-executed first. They are told to nobody again."""
        self._ring = deque([*events, *self._ring], self._ring.maxlen)

    def recent(self, limit: int | None = None) -> list[Event]:
        """The last `limit` events that are kept, oldest first; all of them without a limit."""
        if limit is None or limit >= len(self._ring):
            return list(self._ring)
        return [self._ring[i] for i in range(len(self._ring) - max(0, limit), len(self._ring))]

    def about(self, node_id: str, limit: int) -> list[Event]:
        """The last `limit` events about the node with this id (16 hex digits), oldest first."""
        found: list[Event] = []
        for event in reversed(self._ring):
            if len(found) >= limit:
                break
            if event["id"] == node_id:
                found.append(event)
        return found[::-1]

    def subscribe(self, recent: int = 0, backlog: int = BACKLOG_EVENTS) -> Subscription:
        """The last `recent` events, then every later one: none twice, none missed but those told as lost."""
        subscription = Subscription(self, backlog)
        for event in self.recent(recent):
            subscription.offer(event)
        self._subscribers.append(subscription)
        return subscription

    def _line(self, event: Event) -> bytes:
        if self._form == "json":
            return msgspec.json.encode(event, enc_hook=str) + b"\n"
        return (text_line(event) + "\n").encode("utf-8", "replace")

    def lost_event(self, count: int) -> Event:
        """What a subscription tells in place of events that it had no room for; kept nowhere."""
        event: Event = dict.fromkeys(KEYS)
        event.update(
            at_ms=self._clock_ms(), kind="events.lost", node=self._name, id=self._id, mesh=self._mesh
        )
        return event | {"reason": f"{count} events not shown: this reader was too slow", "count": count}

    def forget(self, subscription: Subscription) -> None:
        """Ends a subscription (see `Subscription.close`)."""
        if subscription in self._subscribers:
            self._subscribers.remove(subscription)


class Subscription:
    """One reader of an event log: iterate it, and `close()` it (or leave its `with` block) when done.

    At most `backlog` events wait; beyond that the oldest go, and an event `events.lost` tells how many."""

    def __init__(self, log: EventLog, backlog: int) -> None:
        self._log = log
        self._waiting: deque[Event] = deque()
        self._backlog = backlog
        self._lost = 0
        self._wake: asyncio.Future[None] | None = None
        self._closed = False

    def offer(self, event: Event) -> None:
        """Takes an event of the log; never waits."""
        if len(self._waiting) >= self._backlog:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._rouse()

    def take(self) -> list[Event]:
        """What waits now, oldest first, the loss (if any) told before it; empty when there is nothing."""
        events = [self._log.lost_event(self._lost)] if self._lost else []
        events += self._waiting
        self._waiting.clear()
        self._lost = 0
        return events

    async def ready(self) -> bool:
        """Waits until `take` gives something; False once closed."""
        while not self._waiting and not self._closed:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return bool(self._waiting)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while await self.ready():
                for event in self.take():
                    yield event
        finally:
            self.close()

    def close(self) -> None:
        """No more events come; a waiting reader ends. Safe to call twice."""
        self._closed = True
        self._log.forget(self)
        self._rouse()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class LineWriter:
    """Writes lines to a stream from a thread of its own, so that a full pipe stalls the log and not the node.

    At most `backlog` lines wait; what doesn't fit is dropped and counted in `dropped`. A stream that breaks
    is written to no more."""

    def __init__(self, stream: BinaryIO | None = None, backlog: int = BACKLOG_LINES) -> None:
        self._stream = stream
        self._backlog = backlog
        self._lines: deque[bytes] = deque()
        self._filled = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._broken = False
        self.dropped = 0

    def __call__(self, line: bytes) -> None:
        """Queues one line, its newline included."""
        with self._filled:
            if self._closed or self._broken or len(self._lines) >= self._backlog:
                self.dropped += 1
                return
            self._lines.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._filled.notify()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Lets what is queued go out, for at most `timeout_s`."""
        with self._filled:
            self._closed = True
            self._filled.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        stream = self._stream or sys.stderr.buffer
        while True:
            with self._filled:
                while not self._lines and not self._closed:
                    self._filled.wait()
                if not self._lines:
                    return
                chunk = b"".join(self._lines)
                self._lines.clear()
            try:
                stream.write(chunk)
                stream.flush()
            except (OSError, ValueError):
                with self._filled:
                    self._broken = True
                    self._lines.clear()
                return
