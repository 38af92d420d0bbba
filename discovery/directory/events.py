"""What the directory tells its surroundings: frozen values, in the order in which it happened."""

from __future__ import annotations

from dataclasses import dataclass

from discovery.member import Addr
from discovery.summary import SignedSummary


@dataclass(frozen=True, slots=True)
class Seen:
    """A mesh that was not listed until now."""

    mesh: str


@dataclass(frozen=True, slots=True)
class PublisherChanged:
    """Another node publishes the mesh. Its rows stay as they are until somebody feeds new ones."""

    mesh: str
    old: bytes
    new: bytes
    """Node keys, which are SSH host keys."""
    epoch: int


@dataclass(frozen=True, slots=True)
class Expired:
    """Nothing new was heard of the mesh for as long as its last summary counted. Its rows stay, and are not live."""

    mesh: str
    silent_s: float
    """Since its last summary was heard, or made if that is longer ago."""


@dataclass(frozen=True, slots=True)
class Revived:
    """An expired mesh is heard of again."""

    mesh: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """An expired mesh is no longer listed; its rows are gone. Its pin stays."""

    mesh: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """A mesh was heard of for the first time, and this key is the mesh from now on. Keep `Directory.remembered`."""

    mesh: str
    pub: bytes


@dataclass(frozen=True, slots=True)
class ImpostorSeen:
    """Somebody publishes a pinned mesh under another key. At most one a minute a key."""

    mesh: str
    pub: bytes
    publisher: str
    """The name that it gives its publisher."""
    addr: Addr | None
    """Who passed it on: the impostor, or somebody who believed it."""
    count: int


@dataclass(frozen=True, slots=True)
class Behind:
    """A node publishes its mesh, silent otherwise, at an order that is long past: it lost its memory, or somebody
    replays it. Send `newest` to that node: a publisher that lives goes on above it, and is then believed."""

    mesh: str
    node: int
    newest: SignedSummary


@dataclass(frozen=True, slots=True)
class RowsChanged:
    """Rows that are new or differ, and ids whose rows went, since the last drain."""

    mesh: str
    changed: tuple[int, ...]
    gone: tuple[int, ...]


Event = Seen | PublisherChanged | Expired | Revived | Dropped | Pinned | ImpostorSeen | Behind | RowsChanged
