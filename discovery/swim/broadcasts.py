"""What there is to say: each piece of news is passed on a limited number of times, the least told first."""

from __future__ import annotations

from collections.abc import Hashable

from discovery.swim.notes import Aging

_LENGTH_MAX = 4_096


class Broadcasts:
    """Encoded messages by subject. A newer one about the same subject replaces the older.

    Kept in one dict a number of transmissions, so that choosing costs what is chosen, not what is queued.
    """

    __slots__ = ("_rows", "_told")

    def __init__(self) -> None:
        self._rows: list[dict[Hashable, bytes | Aging]] = [{}]
        self._told: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._told)

    def put(self, subject: Hashable, message: bytes | Aging) -> bool:
        """Queues news; False when that very message is queued already. The most told goes when there is no
        room."""
        told = self._told.get(subject)
        if told is not None:
            if self._rows[told][subject] == message:
                return False
            del self._rows[told][subject]
        elif len(self._told) >= _LENGTH_MAX:
            row = next(row for row in reversed(self._rows) if row)
            victim = next(iter(row))
            del row[victim], self._told[victim]
        self._told[subject] = 0
        self._rows[0][subject] = message
        return True

    def drop(self, subject: Hashable) -> None:
        """Forgets news that something newer has made idle."""
        told = self._told.pop(subject, None)
        if told is not None:
            del self._rows[told][subject]

    def take(self, room: int, limit: int, now: float = 0.0) -> list[bytes]:
        """Messages that together fit into `room` bytes, the least told and then the newest first; each
        counts as told once more, and goes at `limit`. Notes tell their age as of `now`."""
        if not self._told:
            return []
        chosen: list[tuple[int, Hashable, bytes | Aging]] = []
        misses = 0
        for told, row in enumerate(self._rows):
            for subject in reversed(row):
                message = row[subject]
                if len(message) <= room:
                    room -= len(message)
                    chosen.append((told, subject, message))
                else:
                    misses += 1
                if misses > 4 or room < 40 or len(chosen) >= 32:
                    break
            if misses > 4 or room < 40 or len(chosen) >= 32:
                break
        for told, subject, message in chosen:
            del self._rows[told][subject]
            if told + 1 >= limit:
                del self._told[subject]
                continue
            if told + 1 == len(self._rows):
                self._rows.append({})
            self._rows[told + 1][subject] = message
            self._told[subject] = told + 1
        return [m.at(now) if isinstance(m, Aging) else m for _, _, m in chosen]

    def clear(self) -> None:
        self._rows = [{}]
        self._told.clear()
