"""How good a node is as a holder, 0 to 1: the default scorer. Pure, and the same on every node with the same view.

    score = 0.4 · free + 0.2 · (1 − load) + 0.2 · near + 0.2 · spread

    free    share of its disk that is free, less what is on its way to it; unknown: 0.5
    load    the higher of CPU and memory, as shares of the host; unknown: 0.5
    near    1 / (1 + rtt / 50 ms), seen from the node that scores; itself: 1; unknown: 0.5
    spread  1 / (1 + other holders in its zone); a node that names no zone shares one with nobody

A node that is not live, cordoned, draining, in maintenance (or on the way there) or avoided has no score: it is not
eligible. Nor is one whose disk has less than 5 % free, unless it holds the thing already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

FREE_WEIGHT, LOAD_WEIGHT, NEAR_WEIGHT, SPREAD_WEIGHT = 0.4, 0.2, 0.2, 0.2
NEAR_MS = 50.0
"""A round trip at which `near` is a half."""
FREE_MIN = 0.05
UNKNOWN = 0.5
PENDING_SHARE = 0.01
"""Of its disk, that a copy on its way to a node is taken for where nobody knows the disk's size."""


@dataclass(frozen=True)
class Candidate:
    """A node as the scorer sees it. Shares are 0 to 1, None: unknown."""

    id: int
    name: str = ""
    live: bool = True
    cordoned: bool = False
    draining: bool = False
    """Or in maintenance, or on the way there: it doesn't count as a holder."""
    avoided: bool = False
    disk: float | None = None
    """Used."""
    cpu: float | None = None
    mem: float | None = None
    rtt_ms: float | None = None
    zone: str = ""
    pending: int = 0
    """Copies on their way to it."""


def fit(candidate: Candidate, holder: bool = False) -> bool:
    """Whether it may be a holder at all."""
    if not candidate.live or candidate.cordoned or candidate.draining or candidate.avoided:
        return False
    return holder or candidate.disk is None or _free(candidate) >= FREE_MIN


def score(candidate: Candidate, me: int, zones_of_holders: Counter[str]) -> float:
    """The formula above. `zones_of_holders`: how many holders, other than this node, each zone has."""
    load = max((_known(x) for x in (candidate.cpu, candidate.mem) if _known(x) >= 0), default=UNKNOWN)
    if candidate.id == me:
        near = 1.0
    elif candidate.rtt_ms is None or not math.isfinite(candidate.rtt_ms):
        near = UNKNOWN
    else:
        near = 1 / (1 + max(0.0, candidate.rtt_ms) / NEAR_MS)
    spread = 1.0 if not candidate.zone else 1 / (1 + max(0, zones_of_holders[candidate.zone]))
    total = (
        FREE_WEIGHT * _free(candidate)
        + LOAD_WEIGHT * (1 - _share(load))
        + NEAR_WEIGHT * near
        + SPREAD_WEIGHT * spread
    )
    return min(1.0, max(0.0, total))


def scores(candidates: Iterable[Candidate], holders: Collection[int], me: int) -> dict[int, float]:
    """The score of every node that may hold a thing held by `holders`; a holder's own copy doesn't count against it."""
    known = {candidate.id: candidate for candidate in candidates}
    zones = Counter(known[node].zone for node in holders if node in known and known[node].zone)
    found = {}
    for node, candidate in sorted(known.items()):
        holds = node in holders
        if not fit(candidate, holds):
            continue
        others = zones.copy()
        if holds and candidate.zone:
            others[candidate.zone] -= 1
        found[node] = score(candidate, me, others)
    return found


def ranked(
    candidates: Iterable[Candidate], holders: Collection[int], exclude: Collection[int], me: int
) -> list[int]:
    """Who may be asked to hold one more copy, the best first; of equal ones the highest id."""
    graded = scores(candidates, holders, me)
    fitting = [node for node in graded if node not in exclude and node not in holders]
    return sorted(fitting, key=lambda node: (-graded[node], -node))


def nobody_else(candidates: Iterable[Candidate], holders: Collection[int]) -> str | None:
    """Why no node but the holders may take a copy, in a few words; None where one may."""
    others = [candidate for candidate in candidates if candidate.live and candidate.id not in holders]
    if any(map(fit, others)):
        return None
    if not others:
        return "every live node has one" if holders else "no node is live"
    reasons = Counter(_unfit(candidate) for candidate in others)
    told = ", ".join(f"{count} {why}" for why, count in sorted(reasons.items()))
    return f"no {'other ' if holders else ''}node may take it: {told}"


def _unfit(candidate: Candidate) -> str:
    if candidate.draining:
        return "draining or in maintenance"
    if candidate.cordoned:
        return "taking nothing new"
    return "avoided" if candidate.avoided else "short of disk"


def _free(candidate: Candidate) -> float:
    used = _known(candidate.disk)
    return max(0.0, 1 - (_share(used) if used >= 0 else UNKNOWN) - PENDING_SHARE * max(0, candidate.pending))


def _known(value: float | None) -> float:
    """The value, or -1 where it is not known."""
    return -1.0 if value is None or math.isnan(value) else max(0.0, value)


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))
