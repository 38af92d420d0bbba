"""What is kept of one mesh, and the rule that decides which of two summaries counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from discovery.directory.entries import Remote
from discovery.member import Addr
from discovery.summary import SignedSummary, Summary

Rank = tuple[int, int, int, bytes]


@dataclass(frozen=True, kw_only=True)
class DirectoryConfig:
    """Limits and durations of a directory."""

    ttl_max_s: float = 60.0
    """No summary counts for longer, whatever it says."""
    drop_after_s: float = 600.0
    """How long an expired mesh stays listed."""
    impostor_told_s: float = 60.0
    """An impostor's key is told of this often at most, and its place goes to no other key sooner."""
    impostor_shown_s: float = 600.0
    """How long an impostor is shown after its last word."""
    impostor_spacing_s: float = 1.0
    """An impostor known already is looked at this often at most, and only counted in between."""
    behind_spacing_s: float = 5.0
    """The publishers of one mesh are told this often at most that they are behind."""
    wake_grid_s: float = 0.25
    """`deadline` is rounded up to a multiple, so that many meshes cost few awakenings."""
    max_impostors: int = 8
    """Of one mesh."""
    max_meshes: int = 1_000
    """Besides those whose key is configured."""
    max_pins: int = 2_000
    """Names remembered at most, listed or not, besides configured ones."""
    max_rows: int = 20_000
    """Of all meshes together."""
    max_rows_of_mesh: int = 10_000
    max_bad_records: int = 8
    """A feed with more unproven records than this is refused whole: an honest publisher sends none."""
    max_proven_ahead: int = 10_000
    """Records opened ahead of their feed that are remembered: a whole mesh."""


@dataclass(slots=True)
class Impostor:
    """Another key under a pinned name, as last heard."""

    addr: Addr | None
    last_at: float
    count: int
    publisher: str
    told_at: float


@dataclass(slots=True)
class Pin:
    """What a mesh name means here, for as long as this directory lives: also after the mesh was dropped."""

    pub: bytes
    configured: bool
    rank: Rank | None = None
    """Of the newest summary ever taken: nothing at or below it counts again."""
    signed: SignedSummary | None = None
    behind_at: float | None = None
    impostors: dict[bytes, Impostor] = field(default_factory=dict)


@dataclass(slots=True)
class Listing:
    """One mesh as this node knows it. Times are this node's monotonic clock, in seconds."""

    mesh: str
    pub: bytes
    summary: Summary
    signed: SignedSummary
    heard_at: float
    """When this very summary was first taken."""
    born: float
    """When it was made, as far as its age tells."""
    until: float
    """It counts until then."""
    impostors: dict[bytes, Impostor]
    told: Summary
    """The last summary that was news."""
    alone: tuple[str, ...]
    """`(mesh,)`: one tuple for all rows that are in no other mesh."""
    expired: bool = False
    expired_at: float | None = None
    members: dict[int, Remote] = field(default_factory=dict)
    fed_at: float | None = None
    """When the rows were last known to be current; None while only counts are known."""

    @property
    def fed(self) -> bool:
        """Whether the rows are known, else only the counts of the summary are."""
        return self.fed_at is not None

    def live(self, now: float) -> bool:
        """Whether its summary still counts."""
        return not self.expired and now < self.until

    def silent_s(self, now: float) -> float:
        """How long ago the newest summary was made."""
        return max(0.0, now - self.born)


def rank(summary: Summary, signed: SignedSummary) -> Rank:
    """Of two summaries of one mesh the one of higher rank counts: by epoch, renewal, then version.

    Two different ones that agree in all three come from two publishers, or from one that lost its memory; that the
    greater bytes win is arbitrary, but the same everywhere.
    """
    return summary.epoch, summary.renewal, summary.version, signed.blob


def material(old: Summary, new: Summary) -> bool:
    """Whether a newer summary says something that all should hear at once: another epoch, publisher, address or count,
    or a load that moved by 5 points. A publisher spreads those, and every hop passes them on; a mere renewal it
    sends to each by itself."""
    return (
        (old.epoch, old.publisher, old.publisher_name, old.addrs, old.host, old.ttl_ms, old.counts)
        != (new.epoch, new.publisher, new.publisher_name, new.addrs, new.host, new.ttl_ms, new.counts)
        or _moved(old.cpu, new.cpu)
        or _moved(old.mem, new.mem)
    )


def _moved(old: int | None, new: int | None) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(old - new) >= 50
