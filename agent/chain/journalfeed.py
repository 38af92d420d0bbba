"""A node's journal as a feed: the same reading as from `feeds`, of the one chain that the node writes elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agent.chain.feedreading import Given, Want, mark_of
from agent.chain.log import Log
from agent.chain.record import hash_of, readable
from agent.chain.weighing import Feed, Head, Link, Parcel, Row, Span

READ_ROWS = 512


class JournalFeed:
    """Serves what a journal has committed. It is never written through here."""

    def __init__(self, journal: Log, pub: bytes, chain: str) -> None:
        self.chain = chain
        self._journal = journal
        self._pub = pub
        self._looked = -1
        self._missing: list[Span] = []

    def on_growth(self, call: Callable[[], None]) -> None:
        """Has this called whenever records were committed."""
        self._journal.grown = call

    def missing(self) -> list[Span]:
        """What the journal lost; looked for anew only when there was damage since, or it was not mended yet."""
        said = len(self._journal.problems)
        if self._missing or self._looked != said:
            self._looked = said
            self._missing = self._journal.missing()
        return self._missing

    def fill(self, parcels: Sequence[Parcel]) -> int:
        """Puts back what a holder still has of it."""
        mine = [row for parcel in parcels if parcel.writer == self._pub for row in parcel.rows]
        return self._journal.fill(mine)

    def feed(self) -> Feed:
        """How it stands; its size in bytes is not counted."""
        journal = self._journal
        return Feed(
            0,
            self.chain,
            self._pub,
            Link(*journal.base),
            Link(*journal.committed),
            None,
            tuple(self.missing()),
        )

    def heads(self, chain: str) -> dict[bytes, Head]:
        return {self._pub: Head(self._pub, Link(*self._journal.committed))}

    def mark(self, chain: str) -> bytes:
        return mark_of(self.heads(chain).values())

    def end_of(self, chain: str, writer: bytes) -> Link:
        return Link(*self._journal.committed)

    def since(self, chain: str, wants: Sequence[Want], limit_bytes: int) -> Given:
        """What is newer than that, about `limit_bytes` of it."""
        for want in wants:
            if want.writer != self._pub:
                continue
            head, base = self._journal.committed, Link(*self._journal.base)
            after = want.after if want.after.id >= base.id else base
            diverged = []
            if base.id < after.id <= head.id:
                known = self.hashes(chain, self._pub, after.id, after.id)
                diverged = [self._pub] if known and known[0].hash != after.hash else []
            rows, holes, more = self._stretch(after.id + 1, head.id, limit_bytes)
            parcels = [Parcel(self._pub, after, rows, holes, [], after is base)] if rows else []
            return Given(parcels, diverged, more)
        return Given([], [], False)

    def between(self, chain: str, writer: bytes, spans: Sequence[Span], limit_bytes: int) -> list[Parcel]:
        if writer != self._pub:
            return []
        parcels = []
        for first, last in spans:
            rows, holes, _ = self._stretch(first, min(last, self._journal.committed.id), limit_bytes)
            if rows:
                parcels.append(Parcel(self._pub, Link(0, bytes(32)), rows, holes))
                limit_bytes -= sum(len(blob) + len(sig) + 16 for blob, sig in rows)
            if limit_bytes <= 0:
                break
        return parcels

    def hashes(self, chain: str, writer: bytes, first: int, last: int) -> list[Link]:
        rows = self._journal.rows(first, last, last - first + 1) if writer == self._pub else []
        return [Link(number, hash_of(blob)) for number, blob, _ in rows]

    def _stretch(self, first: int, last: int, limit_bytes: int) -> tuple[list[Row], list[Span], bool]:
        rows: list[Row] = []
        holes: list[Span] = []
        at = seen = first - 1
        while seen < last:
            found = self._journal.rows(seen + 1, last, READ_ROWS)
            for number, blob, sig in found:
                seen = number
                if not readable(blob):  # a hole to others, until a build that reads it is back
                    continue
                if rows and limit_bytes < len(blob) + len(sig) + 16:
                    return rows, holes, True
                if number > at + 1:
                    holes.append((at + 1, number - 1))
                rows.append((blob, sig))
                limit_bytes -= len(blob) + len(sig) + 16
                at = number
            if len(found) < READ_ROWS:
                break
        return rows, holes, False
