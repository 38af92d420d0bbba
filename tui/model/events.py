"""What happened, in the order the attached node tells it: the newest at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from tui.model.ages import number
from tui.model.glyphs import RANK
from tui.model.text import clean

KEPT = 4096
_KEYS = (
    *("at_ms", "kind", "node", "id", "mesh", "from", "to", "source", "reason", "op_id", "by", "daemon"),
    *("op", "target", "result"),
)


class Event:
    """One event, cleaned. `key` numbers it in the order of arrival."""

    __slots__ = ("_search", "at_ms", "data", "id", "key", "kind", "mesh", "node", "node_id")

    def __init__(self, data: Mapping[str, Any], key: int) -> None:
        self.data = data
        self.key = key
        self.id = str(key)
        self.at_ms = number(data.get("at_ms"))
        self.kind = clean(data.get("kind"))
        self.node = clean(data.get("node"))
        self.node_id = clean(data.get("id"))
        self.mesh = clean(data.get("mesh"))
        self._search: str | None = None

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if isinstance(value, (list, tuple)):
            return ", ".join(clean(part) for part in value)
        return clean(value)

    @property
    def to_state(self) -> str:
        """The state that it moves to; empty where it moves to none (a lease moves to a node)."""
        to = self.text("to")
        return to if to in RANK else ""

    @property
    def move(self) -> tuple[str, str]:
        """(from, to) of a node's state; both empty where it is no such move."""
        return (self.text("from"), self.to_state) if self.to_state else ("", "")

    @property
    def story(self) -> str:
        """What the event says beyond its kind and node: source, reason, who, and any extra field."""
        to = self.text("to")
        holder = to.removeprefix(f"{self.mesh}.") if self.kind == "lease.changed" else to
        op = " ".join(
            filter(None, (self.text("op").replace("_", " "), self.text("target"), self.text("result")))
        )
        parts = [op, self.text("daemon"), f"to {holder}" if to and not self.to_state else ""]
        parts += [self.text("source"), self.text("reason")]
        by = self.text("by")
        if by:
            parts.append(f"by {by}")
        for key, value in self.data.items():
            if (
                key not in _KEYS
                and value not in (None, "", [], {})
                and not isinstance(value, (Mapping, list))
            ):
                parts.append(f"{clean(key)}={clean(value)}")
        return ", ".join(part for part in parts if part)

    @property
    def role(self) -> str:
        """How loud it is: a state's colour where it moves to one, else by its kind."""
        if self.to_state:
            return self.to_state
        if self.kind == "node.evicted":
            return "leaving" if self.text("source") == "left" else "dead"
        return "hot" if self.kind in _LOUD else "text"

    @property
    def search(self) -> str:
        if self._search is None:
            parts = [
                self.kind,
                self.node,
                self.node_id,
                self.mesh,
                *self.move,
                self.story,
                self.text("op_id"),
            ]
            self._search = " ".join(part for part in parts if part).lower()
        return self._search


_LOUD = frozenset({"login.refused", "wire.incompatible", "build.stale", "mesh.impostor", "mesh.expired"})


class EventLog:
    """The last events, bounded; `first` and `next` number what is held."""

    def __init__(self, kept: int = KEPT) -> None:
        self.items: deque[Event] = deque(maxlen=kept)
        self.next = 0

    def extend(self, events: Iterable[Mapping[str, Any]]) -> int:
        """Appends; returns how many came."""
        before = self.next
        for data in events:
            self.items.append(Event(data, self.next))
            self.next += 1
        return self.next - before

    def replace(self, events: list[Mapping[str, Any]]) -> int:
        """Takes the first events of a new stream: what is held already is not told twice.

        A new stream begins with the last events of its agent, which overlap with what an earlier stream told.
        """
        held = {_identity(event.data) for event in self.items}
        return self.extend(data for data in events if _identity(data) not in held)

    def backfill(self, events: list[Mapping[str, Any]]) -> int:
        """Takes what the agent keeps from before the first event held here, as far as there is room; how many that were."""
        held = {_identity(event.data) for event in self.items}
        at = next((at for at, data in enumerate(events) if _identity(data) in held), len(events))
        if at == len(events) and self.items:
            return 0  # they don't meet: what lies between isn't known
        room = (self.items.maxlen or KEPT) - len(self.items)
        older = events[max(0, at - room) : at]
        first = self.items[0].key if self.items else self.next
        self.items.extendleft(Event(data, first - 1 - back) for back, data in enumerate(reversed(older)))
        return len(older)

    def about(self, node_id: str, limit: int = 20) -> list[Event]:
        """The last events of one node, oldest first."""
        found: list[Event] = []
        for event in reversed(self.items):
            if event.node_id == node_id:
                found.append(event)
                if len(found) == limit:
                    break
        return found[::-1]


def _identity(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(data.get(key)) for key in ("at_ms", "kind", "id", "to", "op_id"))
