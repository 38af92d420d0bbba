"""What was recorded of the loads of a fleet at an earlier time: read from this node's chain and those it holds for others,
and gathered from the nodes that live. Nothing is kept for it; it costs when somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from agent.chain.loads import Sample, samples
from agent.chain.weighing import NODE_CHAIN, Feed
from agent.events import wall_ms
from discovery.errors import RemoteError
from discovery.identity import id_text, node_id

if TYPE_CHECKING:
    from agent.node import Node

SPAN_MAX_MS = 2 * 3_600_000
"""Of time that one question may be about."""
SAMPLES_A_NODE = 8_000
"""In all that one node answers: well within a frame."""
SKEW_MS = 1_000
"""A clock that differs by less from the asking one is taken for the same: the question was on its way."""

Row = dict[str, Any]


class Span(msgspec.Struct, frozen=True):
    """From when to when, and what time it is, in Unix milliseconds by the clock of who asks."""

    from_ms: int
    to_ms: int
    now_ms: int


class Past:
    """Answers of one node about loads of the past. A row: `{node, node_id, mesh, from_replica, samples}`; `from_replica`:
    who holds the copy of its chain that this comes from, None by the node's own word; `samples`: oldest first."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def own(self, params: Any) -> list[Row]:
        """This node's own loads, and those of nodes that are gone and whose chain it holds."""
        try:
            span = msgspec.convert(params, Span)
        except msgspec.ValidationError as why:
            raise RemoteError(f"past: {why}") from why
        if not 0 <= span.to_ms - span.from_ms <= SPAN_MAX_MS:
            raise RemoteError(f"past: a span of at most {SPAN_MAX_MS // 3_600_000} h expected")
        node, chains = self._node, self._node.chains
        behind_ms = wall_ms() - span.now_ms
        shift_ms = behind_ms if abs(behind_ms) > SKEW_MS else 0
        mine = chains.journal.feed()
        asked = (span.from_ms + shift_ms, span.to_ms + shift_ms)
        found = await _read(samples(chains.journal, mine.chain, mine.writer, mine.base, mine.head, *asked))
        rows = [self._row(node.identity.id, [(at - shift_ms, *rest) for at, *rest in found], None)]
        left = SAMPLES_A_NODE
        for gone, feed in self._gone():
            if left <= 0:
                break
            found = await _read(
                samples(chains.store, feed.chain, feed.writer, feed.base, feed.head, span.from_ms, span.to_ms)
            )
            if found:
                left -= len(found)
                rows.append(self._row(gone, found, node.name))
        return rows

    def _gone(self) -> Iterator[tuple[int, Feed]]:
        """Nodes that are not there, with the feed that is held of each one's chain."""
        node, store = self._node, self._node.chains.store
        held = [feed for name in store.chains() if name.startswith(NODE_CHAIN) for feed in store.feeds(name)]
        for feed in held:
            writer = node_id(feed.writer)
            member = node.swim.members.get(writer)
            if feed.chain == f"{NODE_CHAIN}{id_text(writer)}" and (member is None or not member.present):
                yield writer, feed

    def _row(self, node: int, found: list[Any], holder: str | None) -> Row:
        who = {"node": self._node.name_of(node), "node_id": id_text(node), "mesh": self._node.settings.mesh}
        return {**who, "from_replica": holder, "samples": found}

    @staticmethod
    def merged(rows: Iterable[Row]) -> list[Row]:
        """One row a node: its own word, else the copy that goes furthest."""
        best: dict[str, Row] = {}
        for row in rows:
            told = row.get("samples")
            if not isinstance(told, list) or not isinstance(key := row.get("node_id"), str):
                continue
            known = best.get(key)
            if known is None or _rank(row) > _rank(known):
                best[key] = row
        return list(best.values())


def _rank(row: Row) -> tuple[bool, int, int]:
    told = row["samples"]
    last = told[-1][0] if told and isinstance(told[-1], list | tuple) and told[-1] else 0
    return row.get("from_replica") is None, last if isinstance(last, int) else 0, len(told)


async def _read(found: Any) -> list[Sample]:
    taken = []
    for sample in found:
        if sample is None:
            await asyncio.sleep(0)
        else:
            taken.append(sample)
    return taken
