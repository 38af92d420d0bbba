"""What a node of a mesh keeps of its chains, and what it answers others about them. Frames are bounded: a longer
answer is cut, and asked for again from where it ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from agent.chain import holding
from agent.chain.blackbox import BlackBox, unfold
from agent.chain.feedreading import Given, Want
from agent.chain.feeds import FeedStore
from agent.chain.journalfeed import JournalFeed
from agent.chain.weighing import NODE_CHAIN, Feed, Head, Link, Parcel, Span
from discovery.errors import Refused
from discovery.identity import id_text, node_id

ADMIN = "admin"
PULL_BYTES = 192 * 1024
"""Of records in one frame, or one record: a few milliseconds of reading. A frame may have 1 MiB."""
HEADS_A_FRAME = 5000
WANTS_A_FRAME = 1000
TRACE_RECORDS = 1024
BLACK_BOX_RECORDS = 4096


class Peer(Protocol):
    """A member of the mesh, as far as this room goes."""

    @property
    def id(self) -> int: ...
    @property
    def present(self) -> bool: ...


class _Pull(msgspec.Struct, frozen=True):
    chain: str
    wants: list[tuple[bytes, Link]] = []
    spans: list[tuple[bytes, list[Span]]] = []


class _Push(msgspec.Struct, frozen=True):
    chain: str
    parcels: list[Parcel]


class _Vectors(msgspec.Struct, frozen=True):
    chain: str
    after: bytes = b""
    writers: list[bytes] | None = None


class _Trace(msgspec.Struct, frozen=True):
    chain: str
    writer: bytes
    first: int
    last: int


class _Source(Protocol):
    def heads(self, chain: str) -> dict[bytes, Head]: ...
    def mark(self, chain: str) -> bytes: ...
    def since(self, chain: str, wants: Sequence[Want], limit_bytes: int) -> Given: ...
    def between(self, chain: str, writer: bytes, spans: Sequence[Span], limit_bytes: int) -> list[Parcel]: ...
    def hashes(self, chain: str, writer: bytes, first: int, last: int) -> list[Link]: ...
    def end_of(self, chain: str, writer: bytes) -> Link: ...


class Serving:
    """The chains of one node, as far as it answers for them."""

    def __init__(
        self,
        store: FeedStore,
        *,
        me: int,
        members: Callable[[], Mapping[int, Peer]],
        journal: JournalFeed | None = None,
    ) -> None:
        self.store = store
        self.counters: Counter[str] = Counter()
        self.held: set[str] = set()
        """User chains of which this node is to hold a replica."""
        self.holders_of: Callable[[str], Collection[int]] | None = None
        """Who holds a user chain, where that is known; else every member is asked, and who doesn't keep it says so."""
        self._me = me
        self._members = members
        self._journal = journal
        self._boxes: dict[int, tuple[Link, BlackBox]] = {}

    # -- serving -------------------------------------------------------------------------

    def methods(self) -> dict[str, Callable[[Any, Any], Awaitable[Any]]]:
        """What members may call, as handlers of a link."""

        def handler(method: str) -> Callable[[Any, Any], Awaitable[Any]]:
            async def handle(link: Any, params: Any) -> Any:
                if link.login.node is None:
                    raise Refused("login", "not a member")
                return await self.serve(method, params)

            return handle

        names = ("chain_vectors", "chain_pull", "chain_push", "chain_trace", "chain_latest")
        return {name: handler(name) for name in names}

    async def serve(self, method: str, params: Any) -> dict[str, Any]:
        """Answers a member. Refused `malformed`, `not_held`, or as the store refuses."""
        try:
            match method:
                case "chain_vectors":
                    return self._serve_vectors(msgspec.convert(params, _Vectors))
                case "chain_pull":
                    return self._serve_pull(msgspec.convert(params, _Pull))
                case "chain_push":
                    return await self._serve_push(msgspec.convert(params, _Push))
                case "chain_trace":
                    asked = msgspec.convert(params, _Trace)
                    last = min(asked.last, asked.first + TRACE_RECORDS - 1)
                    found = self._source(asked.chain).hashes(asked.chain, asked.writer, asked.first, last)
                    return {"hashes": found}
                case "chain_latest":
                    node = params.get("node") if isinstance(params, dict) else None
                    return {"page": self.latest_here(node if isinstance(node, int) else -1)}
        except (msgspec.ValidationError, OverflowError) as why:
            self.counters["malformed"] += 1
            raise Refused("malformed", f"{method}: not what is asked there") from why
        raise Refused("unknown_method", f"{method}: no method of chains")

    def _serve_vectors(self, asked: _Vectors) -> dict[str, Any]:
        heads = self._source(asked.chain).heads(asked.chain)
        if asked.writers is not None:
            return {"heads": [heads[w] for w in asked.writers if w in heads], "more": False}
        found = sorted((h for w, h in heads.items() if w > asked.after), key=lambda h: h.writer)
        return {"heads": found[:HEADS_A_FRAME], "more": len(found) > HEADS_A_FRAME}

    def _serve_pull(self, asked: _Pull) -> dict[str, Any]:
        source = self._source(asked.chain)
        wants = [Want(writer, link) for writer, link in asked.wants[:WANTS_A_FRAME]]
        given = source.since(asked.chain, wants, PULL_BYTES)
        parcels, left = list(given.parcels), PULL_BYTES
        for writer, spans in asked.spans:
            found = source.between(asked.chain, writer, spans[:WANTS_A_FRAME], left)
            parcels += found
            left -= sum(len(blob) + len(sig) + 16 for parcel in found for blob, sig in parcel.rows)
            if left <= 0:
                break
        return {"parcels": parcels, "diverged": given.diverged, "more": given.more}

    async def _serve_push(self, push: _Push) -> dict[str, Any]:
        if not self.keeps(push.chain) or self._is_own(push.chain):
            raise Refused("not_held", f"chain {push.chain}: not kept here")
        taken = await self.store.take(push.chain, push.parcels, durable=True)
        self._listen(push.chain, push.parcels)
        return {"heads": list(taken.heads.values())}

    # -- what there is ---------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """For `qd chains`: each chain of which this node has anything, and how far it has it."""
        found = [self._row(chain, self.store.feeds(chain)) for chain in self.store.chains()]
        if (journal := self._journal) is not None:
            found.append(self._row(journal.chain, [journal.feed()]))
        return sorted(found, key=lambda row: str(row["chain"]))

    def _row(self, chain: str, feeds: Sequence[Feed]) -> dict[str, Any]:
        listed: list[dict[str, Any]] = [
            {
                "node": id_text(feed.node),
                "records": self._count(chain, feed),
                "newest": feed.head.id,
                "missing": self._missing(chain, feed),
                "frozen_at": feed.fork,
            }
            for feed in feeds
        ]
        return {
            "chain": chain,
            "own": self._is_own(chain),
            "kept": self.keeps(chain),
            "records": sum(each["records"] for each in listed),
            "bytes": sum(feed.bytes for feed in feeds) if not self._is_own(chain) else None,
            "missing": sum(each["missing"] for each in listed),
            "unsupported": [said for (name, _), said in self.store.unsupported.items() if name == chain],
            "feeds": listed,
        }

    def _count(self, chain: str, feed: Feed) -> int:
        return feed.records if self._is_own(chain) else self.store.count(feed)

    def _missing(self, chain: str, feed: Feed) -> int:
        return feed.missing if self._is_own(chain) else self.store.lacking(feed)

    # -- who keeps what ------------------------------------------------------------------

    def keeps(self, chain: str) -> bool:
        """Whether this node is to have a replica of a chain."""
        if chain == ADMIN or chain in self.held or self._is_own(chain):
            return True
        if chain.startswith(NODE_CHAIN):
            return self._me in holding.holders(chain, [self._me, *self._live()])
        return False

    def _keepers(self, chain: str) -> list[Peer]:
        """Others who are there and to have it."""
        members = {m.id: m for m in self._members().values() if m.present and m.id != self._me}
        if chain.startswith(NODE_CHAIN):
            return [members[n] for n in holding.holders(chain, [*members, self._me]) if n in members]
        if chain != ADMIN and self.holders_of is not None:
            return [members[n] for n in self.holders_of(chain) if n in members]
        return list(members.values())

    def _live(self) -> list[int]:
        return [m.id for m in self._members().values() if m.present and m.id != self._me]

    def _is_own(self, chain: str) -> bool:
        return self._journal is not None and chain == self._journal.chain

    def _source(self, chain: str) -> _Source:
        return self._journal if self._journal is not None and self._is_own(chain) else self.store

    def _known(self) -> list[str]:
        own = [self._journal.chain] if self._journal is not None else []
        return [*own, *(chain for chain in self.store.chains() if self.keeps(chain))]

    def latest_here(self, node: int) -> BlackBox | None:
        """The fold of a node's action chain as far as it is held here; None where nothing is."""
        chain = holding.node_chain(node)
        feeds = [f for f in self.store.feeds(chain) if node_id(f.writer) == node]
        if not feeds:
            return None
        head = feeds[0].head
        cached = self._boxes.get(node)
        if cached is None or cached[0] != head:
            records = self.store.tail(chain, feeds[0].writer, BLACK_BOX_RECORDS)
            cached = self._boxes[node] = (head, unfold(stored.record for stored in records))
        return cached[1]

    def _listen(self, chain: str, parcels: Sequence[Parcel]) -> None:
        """Told of parcels that were taken."""
