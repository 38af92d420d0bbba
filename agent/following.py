"""Following the other meshes: over SSH from who publishes each of them, or from a candidate of the own mesh.

A candidate for the lease (gateway, console) follows every publisher by itself, so that a takeover needs nobody else.
Any other node asks a candidate of its mesh, and only while somebody reads: what is not looked at costs nothing.
What a stream loses, the directory keeps and ages; the next full frame replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from discovery.directory import Entry, decode_entries
from discovery.errors import QuarterdeckError, Refused, RemoteError
from discovery.identity import id_text
from discovery.links import Link
from discovery.member import Member, unmet
from discovery.summary import Summary, unpack

if TYPE_CHECKING:
    from agent.node import Node

RETRY_FIRST_S = 0.3
RETRY_MAX_S = 10.0
UNLISTED_RETRY_S = 30.0
RTT_EVERY_S = 15.0
HELLO_TIMEOUT_S = 3.0
FRAME_PATIENCE_S = 5.0
"""A publisher sends something every 2 s; one that doesn't is wedged or can't send to us, and is dialled anew. Soon enough
for it to tell us by gossip, as those that follow no stream, before its summary runs out."""
ASK_PATIENCE_S = 3.0
"""A candidate that is asked sends something every second; another is asked before what it told runs out."""
OPEN_AT_ONCE = 32
"""Records verified before others get their turn: 4 ms. Of the streams that bring more, one at a time has a turn."""
LINGER_S = 60.0
FIRST_S = 1.0
"""How long a reader waits for the first frames."""
SEEN_MAX = 20_000

_seen = msgspec.msgpack.Decoder(list[tuple[int, int]])


class Silent(RemoteError):
    """A stream on which nothing came in time."""


@dataclass
class Tie:
    """How one mesh is followed just now."""

    mesh: str
    publisher: bytes
    task: asyncio.Task[None] | None = None
    route: str | None = None
    rtt_s: float | None = None
    listed: bool | None = None
    """Whether its publisher lets this mesh in; None while nobody has answered."""
    problem: str = ""
    pieces: list[Entry] = field(default_factory=list)
    """Rows of a full telling of which more is to come."""


class Following:
    """The streams of one node. `ties` is by mesh."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.ties: dict[str, Tie] = {}
        self.mesh_rows: dict[str, tuple[float, dict[str, Any]]] = {}
        """For a node that asks a candidate: its rows of meshes, and when they came."""
        self._source: asyncio.Task[None] | None = None
        self._whole = asyncio.Event()
        self._read_at = 0.0
        self._readers = 0
        self._opening = asyncio.Lock()
        self._closing = False

    # --- as a candidate: every publisher

    def publisher(self, summary: Summary) -> None:
        """Follows who publishes this mesh from now on, if that is somebody else than until now."""
        tie = self.ties.get(summary.mesh)
        if self._closing or (tie is not None and tie.publisher == summary.publisher and tie.task is not None):
            return
        if tie is None:
            tie = self.ties[summary.mesh] = Tie(summary.mesh, summary.publisher)
        elif tie.task is not None:
            tie.task.cancel()
        tie.publisher = summary.publisher
        tie.task = self._node.spawn(self._keep(tie))

    def drop(self, mesh: str) -> None:
        """Stops following a mesh: it has expired, and starts anew when somebody publishes it."""
        tie = self.ties.get(mesh)
        if tie is not None and tie.task is not None:
            tie.task.cancel()
            tie.task = tie.route = tie.rtt_s = None

    async def _keep(self, tie: Tie) -> None:
        retry_s = RETRY_FIRST_S
        while True:
            began = time.monotonic()
            try:
                await self._follow(tie)
                tie.problem = "the stream has ended"
            except Refused as why:
                tie.problem = why.sentence
                if why.code == "login":
                    tie.listed = False
            except QuarterdeckError as why:
                tie.problem = str(why)
            tie.route = tie.rtt_s = None
            self._node.meshes.changed()
            if time.monotonic() - began > RETRY_MAX_S:
                retry_s = RETRY_FIRST_S
            await asyncio.sleep(retry_s * random.uniform(0.75, 1.25))
            retry_s = min(UNLISTED_RETRY_S if tie.listed is False else RETRY_MAX_S, retry_s * 2)

    async def _follow(self, tie: Tie) -> None:
        node = self._node
        listing = node.meshes.directory.listings.get(tie.mesh)
        if listing is None:
            raise RemoteError(f"{tie.mesh}: nobody publishes it")
        member = publisher(listing.summary)
        await node.reach.link_to(member)
        asked = time.monotonic()
        _, route = await node.reach.call(member, "hello", {}, HELLO_TIMEOUT_S)
        link, _ = await node.reach.link_to(member)
        tie.route, tie.rtt_s, tie.listed = route, time.monotonic() - asked, True
        node.meshes.changed()
        timing = asyncio.create_task(self._time(tie, link))
        try:
            params = {"scope": "mesh", "node": id_text(node.identity.id)}
            async for frame in _patient(link.stream("directory", params)):
                tie.problem = ""
                await self._take(frame, tie.pieces, mesh=tie.mesh)
        except Silent:
            node.reach.doubt(link)
            raise
        finally:
            timing.cancel()
            if link.closed:
                node.meshes.backbone.lost(member.id)

    async def _time(self, tie: Tie, link: Link) -> None:
        """Measures the way to the publisher every RTT_EVERY_S."""
        while not link.closed:
            await asyncio.sleep(RTT_EVERY_S)
            asked = time.monotonic()
            with contextlib.suppress(QuarterdeckError):
                await link.call("hello", {}, HELLO_TIMEOUT_S)
                tie.rtt_s = time.monotonic() - asked

    # --- as any other node: a candidate of the own mesh

    @contextlib.contextmanager
    def reading(self) -> Any:
        """While somebody reads, this node asks a candidate; it goes on for LINGER_S after the last one."""
        self._readers += 1
        self._wanted()
        try:
            yield
        finally:
            self._readers -= 1
            self._read_at = time.monotonic()

    async def ready(self) -> None:
        """Waits until the directory has been told once, at most FIRST_S."""
        if self._node.meshes.candidate:
            return
        self._wanted()
        if not self._whole.is_set() and self._node.meshes.tellers():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await self._whole.wait()

    def _wanted(self) -> None:
        self._read_at = time.monotonic()
        if self._node.meshes.candidate or self._closing:
            return
        if self._source is None or self._source.done():
            self._whole.clear()
            self._source = self._node.spawn(self._ask())

    async def _ask(self) -> None:
        """Follows one candidate after the other, the holder of the lease first, while somebody reads."""
        tried: set[int] = set()
        while self._readers or time.monotonic() - self._read_at < LINGER_S:
            tellers = self._node.meshes.tellers()
            member = next((m for m in tellers if m.id not in tried), None)
            if member is None:
                tried.clear()
                await asyncio.sleep(0.5)
                continue
            try:
                async with asyncio.timeout(FIRST_S):
                    link, _ = await self._node.reach.link_to(member)
                pieces: dict[str, list[Entry]] = {}
                async for frame in _patient(link.stream("directory", {"scope": "all"}), ASK_PATIENCE_S):
                    tried.clear()
                    if frame.get("mesh") is not None:
                        await self._take(frame, pieces.setdefault(str(frame["mesh"]), []))
                    self._note_rows(frame.get("rows"))
                    self._hear_all(frame.get("summaries"))
                    if frame.get("whole"):
                        self._whole.set()
                    if not self._readers and time.monotonic() - self._read_at >= LINGER_S:
                        break
            except (QuarterdeckError, TimeoutError):
                pass
            tried.add(member.id)
        self._whole.clear()

    def _note_rows(self, rows: Any) -> None:
        if not isinstance(rows, list):
            return
        now = time.monotonic()
        found = {str(row["mesh"]): (now, row) for row in rows if isinstance(row, dict) and "mesh" in row}
        if found:
            self.mesh_rows = found
            self._node.service.changed()

    def _hear_all(self, summaries: Any) -> None:
        for item in summaries if isinstance(summaries, list) else ():
            if isinstance(item, dict):
                self._hear(item, of_member=True)

    # --- frames

    def _hear(self, frame: Mapping[str, Any], *, of_member: bool) -> None:
        body, age_ms = frame.get("summary"), frame.get("age_ms", 0)
        if isinstance(body, bytes) and isinstance(age_ms, int) and age_ms >= 0:
            self._node.meshes.hear(unpack(body), age_ms / 1000, None, of_member=of_member)

    async def _take(self, frame: Mapping[str, Any], pieces: list[Entry], mesh: str | None = None) -> None:
        """One frame of a directory into the directory; RemoteError when it is none."""
        meshes = self._node.meshes
        told = frame.get("mesh")
        if not isinstance(told, str) or (mesh is not None and told != mesh):
            raise RemoteError(f"a directory of {str(told)[:64]!r}, not of {mesh}")
        self._hear(frame, of_member=mesh is None)
        body = frame.get("entries")
        now = time.monotonic()
        if isinstance(body, bytes):
            entries = decode_entries(body)
            if len(entries) > OPEN_AT_ONCE:
                await self._open_ahead(entries)
            gone = _gone(frame.get("gone"))
            if frame.get("full"):
                pieces.clear()
            if frame.get("full") or pieces or frame.get("more"):
                pieces.extend(entries)
                if len(pieces) > SEEN_MAX:
                    raise RemoteError("a directory without end")
                if not frame.get("more"):
                    meshes.feed(told, pieces, gone, now, full=True)
                    pieces.clear()
            else:
                meshes.feed(told, entries, gone, now, full=False)
        meshes.refreshed(told, now)
        seen = frame.get("seen")
        if isinstance(seen, bytes) and len(seen) <= 1 << 20:
            try:
                meshes.seen(told, _seen.decode(seen)[:SEEN_MAX], now)
            except (msgspec.MsgspecError, ValueError) as why:
                raise RemoteError("a list of what was seen that does not decode") from why

    async def _open_ahead(self, entries: list[Entry]) -> None:
        """Verifies records in slices, so that the feed that follows takes no time."""
        async with self._opening:
            for start in range(0, len(entries), OPEN_AT_ONCE):
                for entry in entries[start : start + OPEN_AT_ONCE]:
                    self._node.meshes.directory.open(entry.record)
                await asyncio.sleep(0)

    def close(self) -> None:
        self._closing = True


async def _patient(
    stream: AsyncIterator[Any], patience_s: float = FRAME_PATIENCE_S
) -> AsyncIterator[dict[str, Any]]:
    """Items of a stream that are maps; RemoteError when one isn't, Silent when none comes for `patience_s`."""
    items: Any = stream
    async with contextlib.aclosing(items):
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError as why:
                raise Silent(f"nothing came for {patience_s:g} s") from why
            if not isinstance(item, dict):
                raise RemoteError("a frame that is not a map")
            yield item


def _gone(value: Any) -> dict[int, str]:
    """Id → evidence of what has left a directory."""
    found: dict[int, str] = {}
    for item in value if isinstance(value, list) else ():
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], int):
            found[item[0]] = str(item[1])
    return found


def publisher(summary: Summary) -> Member:
    """A publisher as its summary tells of it: at the addresses that it has now, whatever its row still says."""
    addrs = [(host, port) for host, port in summary.addrs]
    return unmet(
        summary.publisher,
        summary.mesh,
        summary.publisher_name,
        "gateway",
        addrs,
        summary.host,
        time.monotonic(),
    )
