"""Rows and events as they change, for consoles: what each has been told, and what is new for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.events import wall_ms
from agent.params import ROWS_A_FRAME, limit_of
from agent.view import Row, stamp
from discovery.identity import id_text
from discovery.links import Link
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node


GAP_S = 0.1
KEEPALIVE_S = 1.0
EVENTS_DEFAULT = 200


class Watching:
    """The `watch` streams of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._watchers: set[_Watcher] = set()

    def changed(self, remotes: Iterable[int] = ()) -> None:
        """Tells every watcher that a row or an event is new; `remotes`: which rows of other meshes."""
        for watcher in self._watchers:
            watcher.remotes.update(remotes)
            watcher.wake.set()

    async def watch(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Rows and events as they change: a full frame, then deltas at most 10 times a second, at least once a second."""
        node = self._node
        watcher = _Watcher()
        try:
            with (
                node.meshes.following.reading(),
                node.events.subscribe(limit_of(params, EVENTS_DEFAULT, "events")) as feed,
            ):
                await node.meshes.following.ready()
                self._watchers.add(watcher)
                watcher.remotes.update(member.id for _, member in node.meshes.remotes())
                full = True
                while True:
                    watcher.wake.clear()
                    sent_at = time.monotonic()
                    frame = self._frame(watcher, feed.take(), full=full)
                    if len(frame["rows"]) >= ROWS_A_FRAME:
                        watcher.wake.set()
                    yield frame
                    full = False
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(KEEPALIVE_S):
                            await watcher.wake.wait()
                    await asyncio.sleep(max(0.0, sent_at + GAP_S - time.monotonic()))
        finally:
            self._watchers.discard(watcher)

    def _frame(self, watcher: _Watcher, events: list[Any], *, full: bool) -> dict[str, Any]:
        """One frame of `watch`; brings what the watcher has up to date."""
        node = self._node
        now = time.monotonic()
        sent = watcher.sent
        everybody: list[Member] = [node.swim.me, *node.swim.members.values()]
        build = node.pages.disk_build
        others = sum(m.present for m in everybody) - 1
        rows: list[Row] = []
        for member in everybody:
            mark = (stamp(member), build)
            if sent.get(member.id) != mark and len(rows) < ROWS_A_FRAME:
                rows.append(node.pages.row(member, now, others=others, history=member.id not in sent))
                sent[member.id] = mark
        gone = sent.keys() - {m.id for m in everybody}
        for member_id in gone:
            del sent[member_id]
        away = self._remote_rows(watcher, rows, now)
        news = {code: n for code, n in node.counters().items() if watcher.counters.get(code) != n}
        watcher.counters.update(news)
        frame: dict[str, Any] = {
            "full": full,
            "at_ms": wall_ms(),
            "rows": rows + (node.pages.spawned() if full else []),
            "gone": [id_text(g) for g in gone | away],
            "events": events,
            "counters": news,
        }
        if full or away or now - watcher.meshes_at >= KEEPALIVE_S or node.meshes.version != watcher.meshes:
            watcher.meshes, watcher.meshes_at = node.meshes.version, now
            frame["meshes"] = node.meshes.rows()
        if full:
            record = node.swim.me.record
            frame["me"] = {
                "id": id_text(record.id),
                "name": record.name,
                "mesh": record.mesh,
                "kind": record.kind,
                "build": record.build,
                "wire": record.wire,
            }
        return frame

    def _remote_rows(self, watcher: _Watcher, rows: list[Row], now: float) -> set[int]:
        """Adds the changed rows of other meshes, as far as there is room; returns the ids of those that are gone."""
        away: set[int] = set()
        for member_id in list(watcher.remotes):
            if len(rows) >= ROWS_A_FRAME:
                break
            watcher.remotes.discard(member_id)
            row = self._node.pages.remote_row(member_id, now)
            if row is not None:
                rows.append(row)
                watcher.told_remotes.add(member_id)
            elif member_id in watcher.told_remotes:
                watcher.told_remotes.discard(member_id)
                away.add(member_id)
        return away


@dataclass(eq=False)
class _Watcher:
    """What one `watch` stream has been told."""

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sent: dict[int, object] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    remotes: set[int] = field(default_factory=set)
    """Rows of other meshes that have changed since."""
    told_remotes: set[int] = field(default_factory=set)
    meshes: int = -1
    meshes_at: float = 0.0
