"""The soft lease: which one node publishes its mesh's summary.

A holder claims, signs its claim and renews it; whoever doesn't hear a renewal in time takes the lease to be vacant,
and the candidates claim in the order of their rank. Nothing is agreed upon: for a moment there may be two holders
(after a partition, or where a renewal was missed), and the rule `weight` makes every node that hears of both name the
same one. Ages are counted from what a note says of itself and by this node's own clock, never by anybody's wall clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from discovery.claim import (
    Claim,
    SignedClaim,
    Weight,
    open_claim,
    pack,
    read_claim,
    seal_claim,
    signed_by_its_holder,
    unpack,
    weight,
)
from discovery.errors import RemoteError
from discovery.identity import node_id

__all__ = [
    "Changed",
    "Claim",
    "Effect",
    "Lease",
    "LeaseConfig",
    "Persist",
    "Publish",
    "Reason",
    "SignedClaim",
    "Spread",
    "Tell",
    "open_claim",
    "pack",
    "seal_claim",
    "unpack",
    "weight",
]

EPOCH_LEAP_MAX = 2**32
"""A claim further ahead of all that is known is refused: no single one can use up the numbers."""
_HOLDERS_MAX = 1_024

Reason = Literal[
    "claimed", "kept", "heard", "yielded", "expired", "gone", "released", "resigned", "unpublished", "paused"
]
"""Why the lease changed, as this node knows it. With a holder: `claimed` it was vacant and this node took it; `kept`
this node holds it and outbid another; `heard` another holds it; `yielded` so does another, to whom this node gave way.
Without: `expired` no renewal in time; `gone` its holder left, is dead or is updating; `released` its holder gave it up;
and of this node's own: `resigned`, `unpublished` (it could not publish), `paused` (it slept longer than its claim)."""


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    """The figures of SEMANTICS 4, "Soft lease"; below the line those that it leaves to us."""

    ttl_s: float = 6.0
    """How long a claim counts from when it was made."""
    renew_s: float = 2.0
    direct_fresh_s: float = 3.0
    """A holder whose own word is younger than this is at work: it isn't preempted."""
    rank_step_s: float = 0.5
    """The candidate of rank k claims this × k after the lease fell vacant."""
    listen_s: float = 4.0
    """Nobody claims before one push/pull or this long of listening."""
    demoted_s: float = 30.0
    """How long who could not publish ranks last."""
    # ours
    late_s: float = 0.25
    """Woken later than this, a node first reads what waits for it."""
    glance_s: float = 0.3
    """How long that takes after a hiccup."""
    look_s: float = 2.5
    """And after a pause: long enough to hear one renewal."""
    aloud_s: float = 600.0
    """How long a holder that was challenged has its renewals passed on by everybody."""
    aloud_renewals: int = 2
    """So are the first renewals of any holder: a broadcast may miss somebody."""
    outbid_spacing_s: float = 0.2
    """A holder makes no two claims within this."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Broadcast this note to the whole pool (`Swim.spread`)."""

    body: bytes
    age_s: float


@dataclass(frozen=True, slots=True)
class Tell:
    """Send this note to these members directly, once (`Swim.send_note`)."""

    nodes: tuple[int, ...]
    body: bytes
    age_s: float


@dataclass(frozen=True, slots=True)
class Persist:
    """Must be durable before any later effect is carried out: `Lease.floor` is told of it at the next start."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Publish:
    """This node holds the lease and has just claimed or renewed it: publish the summary, and say by `published`
    whether that went well."""

    epoch: int
    renewal: int


@dataclass(frozen=True, slots=True)
class Changed:
    """Holder or epoch changed; `holder` None: vacant. `epoch` is that of the newest claim followed."""

    holder: int | None
    pub: bytes | None
    epoch: int
    reason: Reason
    mine: bool


Effect = Spread | Tell | Persist | Publish | Changed


@dataclass(slots=True)
class _Heard:
    """A claim with its times, by this node's clock."""

    claim: Claim
    body: bytes
    born: float
    expires: float
    direct_at: float = -inf
    """When the holder itself last told me of it."""


class Lease:
    """What one node knows of its mesh's lease, and its own part in it. Sans I/O: inputs with a clock reading
    (monotonic seconds) go in, `drain` gives effects in order, `deadline` says when to `wake`.

    `candidate`: whether this node is of a kind that may hold. Only candidates get renewals, so only they can tell a
    live claim from a dead one by its age. Any other node takes the claim that it follows as live for as long as its
    holder is among the candidates (`set_candidates`), however old it is, and learns of the next one by gossip.
    """

    def __init__(
        self,
        *,
        mesh: str,
        pub: bytes,
        candidate: bool,
        sign: Callable[[bytes], bytes],
        verify: Callable[[bytes, bytes, bytes], bool],
        config: LeaseConfig,
        now: float,
    ) -> None:
        self.mesh, self.pub, self.id = mesh, pub, node_id(pub)
        self.candidate = candidate
        self.config = config
        self.counters: Counter[str] = Counter()
        """What was refused, by reason code."""
        self._sign, self._verify = sign, verify
        self._candidates: dict[int, int] = {}
        """Tier by id."""
        self._gone: dict[int, None] = {}
        """Who was a candidate and is none now: its claims are vacant until it is back. Who never was one may be
        somebody not met yet: its claims count until they expire."""
        self._last: dict[int, tuple[int, int]] = {}
        """The newest (epoch, renewal) of each holder: whatever is not newer is a repetition."""
        self._highest = 0
        self._held: _Heard | None = None
        self._other: _Heard | None = None
        """The newest claim that lost against the held one: it counts when that one falls vacant."""
        self._mine = False
        self._resigned = False
        self._vacant_at: float | None = now
        self._eligible_at = now
        self._quiet_until = now + config.listen_s
        self._glanced_at = -inf
        self._demoted_until = -inf
        self._renew_at = inf
        self._outbidding = False
        self._aloud_until = -inf
        self._published_at = now
        self._told: tuple[int, int] | None = None
        self._why: Reason | None = None
        self._effects: list[Effect] = []
        self._due = self.deadline()

    # what may be looked at

    @property
    def holder(self) -> int | None:
        """The id of who holds the lease as far as this node knows; None: vacant (as of the last input)."""
        return None if self._told is None else self._told[0]

    @property
    def epoch(self) -> int:
        """Of the newest claim followed, live or not; 0 before the first."""
        return self._held.claim.epoch if self._held is not None else 0

    @property
    def renewal(self) -> int:
        return self._held.claim.renewal if self._held is not None else 0

    @property
    def mine(self) -> bool:
        """Whether this node is the one to publish."""
        return self._mine

    def expires_in_s(self, now: float) -> float | None:
        """None when vacant, and on a node that gets no renewals: it can't know."""
        held = self._held
        if held is None or not self.candidate or not self._live(held, now):
            return None
        return max(0.0, held.expires - now)

    def held(self, now: float) -> tuple[bytes, float] | None:
        """The claim that a push/pull should carry, and its age in seconds; a dead one too: it tells the epoch."""
        held = self._held
        return None if held is None else (held.body, max(0.0, now - held.born))

    # inputs

    def set_candidates(self, ids: Mapping[int, str], now: float) -> None:
        """Who may hold the lease: kind by id of every candidate in view that is present and not Updating, this node
        included if it may. To be called on every change of that. A holder no longer among them: vacant at once."""
        self._turn(now)
        for node in self._candidates.keys() - ids.keys():
            self._gone[node] = None
        for node in ids:
            self._gone.pop(node, None)
        while len(self._gone) > _HOLDERS_MAX:
            del self._gone[next(iter(self._gone))]
        was = self._eligible()
        if self.id not in ids:
            self._give_up(now, "resigned")
            self._resigned = False
        self._candidates = {node: 0 if kind == "gateway" else 1 for node, kind in ids.items()}
        if self._eligible() and not was:
            self._eligible_at = now
        self._settle(now)

    def heard(self, body: bytes, age_s: float, sender: int, now: float) -> bool:
        """A note from member `sender`, `age_s` after it was made; True when it was news, to be passed on. Never
        raises: what is no claim on this mesh is refused and counted."""
        self._turn(now)
        claim = self._open(body)
        if claim is None:
            return False
        holder, age_s = claim.holder_id, max(0.0, age_s)
        self._last.pop(holder, None)
        self._last[holder] = claim.order
        if len(self._last) > _HOLDERS_MAX:
            del self._last[next(iter(self._last))]
        self._highest = max(self._highest, claim.epoch)
        born = now - age_s
        entry = _Heard(claim, body, born, born + claim.ttl_ms / 1000)
        if sender == holder:
            entry.direct_at = born
        news = self._judge(entry, sender, now)
        self._settle(now)
        return news

    def synced(self, now: float) -> None:
        """One push/pull is done: this node has heard what another one knew, and need not listen any longer."""
        self._turn(now)
        self._quiet_until = min(self._quiet_until, now)
        self._settle(now)

    def floor(self, epoch: int, now: float) -> None:
        """An epoch that was in use, as known from disk or the backbone: claims from here on are above it. A claim
        that this node holds is left as it is."""
        self._turn(now)
        if epoch > self._highest + EPOCH_LEAP_MAX:
            self.counters["lease_leap"] += 1
        else:
            self._highest = max(self._highest, epoch)
        self._settle(now)

    def published(self, ok: bool, now: float) -> None:
        """The outcome of a `Publish`. Without success for one ttl this node gives up, if there is another to take
        over, and ranks last for a while; having done so it isn't picky a second time until that while is over."""
        self._turn(now)
        if ok:
            self._published_at = now
        elif (
            self._mine
            and now - self._published_at >= self.config.ttl_s
            and now >= self._demoted_until
            and len(self._candidates) > 1
        ):
            self._demoted_until = now + self.config.demoted_s
            self._give_up(now, "unpublished")
        self._settle(now)

    def resign(self, now: float) -> None:
        """This node leaves or replaces itself: it gives up at once and claims no more. Undone by `set_candidates`
        once without this node and then with it."""
        self._turn(now)
        self._resigned = True
        self._give_up(now, "resigned")
        self._settle(now)

    def wake(self, now: float) -> None:
        """Does what is due. May be called at any time."""
        self._turn(now)
        self._settle(now)
        if now < self.deadline():
            return
        if self._mine:
            self._renew(now)
        elif self._told is None and self._eligible():
            self._claim(now)
        self._settle(now)

    def deadline(self) -> float:
        """When to call `wake` next; infinity when only news can change anything."""
        if self._mine:
            return max(self._renew_at, self._quiet_until)
        held = self._held
        if self._told is not None and held is not None:
            return held.expires if self.candidate or self._told[0] not in self._candidates else inf
        if self._eligible():
            return self._open_since() + self._delay_s()
        return inf

    def drain(self) -> list[Effect]:
        """Effects since the last drain, in the order in which they must be carried out."""
        out, self._effects = self._effects, []
        return out

    # time

    def _turn(self, now: float) -> None:
        """A node that wakes late slept itself: it neither claims nor renews before it has read what waits for it."""
        late, config, held = now - self._due, self.config, self._held
        lapsed = self._mine and held is not None and now >= held.expires
        if late > config.late_s and now - self._glanced_at > config.ttl_s:
            long = late > config.renew_s and (lapsed or not self._mine)
            self._glanced_at = now
            self._quiet_until = max(self._quiet_until, now + (config.look_s if long else config.glance_s))
        if lapsed:
            self._mine, self._renew_at = False, inf
            self._settle(now, "paused")

    # what is heard

    def _open(self, body: bytes) -> Claim | None:
        """The claim, if it is one on this mesh, newer than what its holder said before, and by its holder."""
        try:
            signed = unpack(body)
            claim = read_claim(signed)
        except RemoteError:
            self.counters["lease_malformed"] += 1
            return None
        if claim.mesh != self.mesh:
            self.counters["lease_foreign"] += 1
            return None
        last = self._last.get(claim.holder_id)
        if last is not None and claim.order <= last:
            return None
        if claim.epoch > self._highest + EPOCH_LEAP_MAX:
            self.counters["lease_leap"] += 1
            return None
        if not signed_by_its_holder(signed, claim, self._verify):
            self.counters["lease_forged"] += 1
            return None
        return claim

    def _live(self, entry: _Heard, now: float) -> bool:
        """Whether this claim makes its holder the holder. One of mine does only while I hold the lease: any other
        is of a former life."""
        claim, holder = entry.claim, entry.claim.holder_id
        if holder == self.id:
            return self._mine
        if claim.released or holder in self._gone:
            return False
        return now < entry.expires or (not self.candidate and holder in self._candidates)

    def _weight(self, entry: _Heard, at: float, now: float) -> Weight:
        """`at`: when its holder was last known to be at work. Who gets no renewals can't judge that, nor who lives:
        it goes by precedence alone, so that all of its kind end up with the same claim."""
        if not self.candidate:
            return weight(entry.claim, live=True, stands=False)
        fresh = entry.claim.renewal > 0 and now - at < self.config.direct_fresh_s
        return weight(entry.claim, live=self._live(entry, now), stands=fresh)

    def _judge(self, entry: _Heard, sender: int, now: float) -> bool:
        held = self._held
        if held is None:
            return self._follow(entry, now)
        if held.claim.holder == entry.claim.holder:
            if self._mine:
                self._outbid(now)
                return False
            return self._follow(entry, now)
        working_at = held.born if self._mine else held.direct_at
        if self._weight(entry, entry.born, now) > self._weight(held, working_at, now):
            was_mine = self._mine
            if was_mine:
                self._mine, self._why = False, "yielded"
            news = self._follow(entry, now)
            self._acquaint(entry, held, () if was_mine else (held.claim.holder_id,), now)
            return news
        if self.candidate:
            self._other = entry
        self._acquaint(held, entry, (entry.claim.holder_id, sender), now)
        return False

    def _follow(self, entry: _Heard, now: float) -> bool:
        """Takes this claim as the newest; whether others should hear of it."""
        held, claim = self._held, entry.claim
        renewed = held is not None and held.claim.holder == claim.holder and held.claim.epoch == claim.epoch
        if held is not None and renewed and not claim.released:
            entry.expires = max(entry.expires, held.expires)
            entry.direct_at = max(entry.direct_at, held.direct_at)
        self._held = entry
        if claim.released:
            return True
        return self._live(entry, now) and (not renewed or claim.aloud)

    def _acquaint(self, winner: _Heard, loser: _Heard, losers: Iterable[int], now: float) -> None:
        """Two claims met here. Who is on the losing side hears of the winner; a winner hears of a loser that others
        may still follow: one with more precedence (it claims above it), or one that I held myself (it speaks up)."""
        if not self.candidate or not self._live(winner, now):
            return
        holder, outbid = winner.claim.holder_id, loser.claim.precedence > winner.claim.precedence
        if self._mine:
            self._aloud_until = max(self._aloud_until, now + self.config.ttl_s)
            if outbid:
                self._outbid(now)
                return
        if loser.claim.holder_id != self.id and not loser.claim.released and now < loser.expires:
            self._tell({node for node in losers if node != holder}, winner, now)
        if outbid or loser.claim.holder_id == self.id:
            self._tell({holder}, loser, now)

    def _tell(self, nodes: set[int], entry: _Heard, now: float) -> None:
        nodes -= {self.id}
        if nodes:
            self._effects.append(Tell(tuple(sorted(nodes)), entry.body, max(0.0, now - entry.born)))

    # claiming, renewing, giving up

    def _eligible(self) -> bool:
        return self.candidate and self.id in self._candidates and not self._resigned

    def _open_since(self) -> float:
        """From when on I might claim, were I the first."""
        return max(self._vacant_at or -inf, self._quiet_until, self._eligible_at)

    def _delay_s(self) -> float:
        """How long this node leaves a vacant lease to those before it. Who held it last and let it lapse is not
        likely to be the one to take it up; who finds a live claim of its own, of before a restart, is."""
        held, last = self._held, None
        if held is not None:
            last = held.claim.holder_id
            if last == self.id and not held.claim.released and (self._vacant_at or 0.0) < held.expires:
                return 0.0
        ranks = sorted((node == last, tier, node) for node, tier in self._candidates.items())
        rank = next((k for k, (_, _, node) in enumerate(ranks) if node == self.id), len(ranks))
        if self._open_since() < self._demoted_until:
            rank += len(ranks)
        return rank * self.config.rank_step_s

    def _claim(self, now: float) -> None:
        """Takes the vacant lease."""
        self._mine, self._why = True, "claimed"
        self._published_at = now
        self._aloud_until = -inf
        self._make(self._highest + 1, 0, now)

    def _renew(self, now: float) -> None:
        assert self._held is not None
        claim = self._held.claim
        if self._outbidding:
            self._why = "kept"
        self._make(self._highest + 1 if self._outbidding else claim.epoch, claim.renewal + 1, now)

    def _outbid(self, now: float) -> None:
        """Claims anew, above everything known: some may follow another who lost to me."""
        self._outbidding = True
        self._aloud_until = now + self.config.aloud_s
        held = self._held
        assert held is not None
        self._renew_at = min(self._renew_at, max(now, held.born + self.config.outbid_spacing_s))
        if now >= self.deadline():
            self._renew(now)

    def _make(self, epoch: int, renewal: int, now: float, *, released: bool = False) -> None:
        """A claim of mine: followed by me, told all other candidates; everybody, when its epoch is new."""
        config, old = self.config, self._held
        claim = Claim(
            mesh=self.mesh,
            epoch=epoch,
            renewal=renewal,
            holder=self.pub,
            ttl_ms=round(config.ttl_s * 1000),
            tier=self._candidates.get(self.id, 1),
            aloud=now < self._aloud_until or renewal <= config.aloud_renewals,
            released=released,
        )
        body = pack(seal_claim(claim, self._sign))
        fresh = old is None or old.claim.holder != self.pub or old.claim.epoch != epoch
        self._held = _Heard(claim, body, now, now + config.ttl_s, now)
        self._last[self.id] = claim.order
        self._highest = max(self._highest, epoch)
        self._outbidding, self._renew_at = False, now + config.renew_s
        if fresh:
            self._effects.append(Persist(epoch))
        self._tell(set(self._candidates), self._held, now)
        if claim.aloud or fresh:
            self._effects.append(Spread(body, 0.0))
        if not released:
            self._settle(now)
            self._effects.append(Publish(epoch, renewal))

    def _give_up(self, now: float, reason: Reason) -> None:
        """Lets go of the lease and says so, so that nobody has to wait for its expiry."""
        if not self._mine or self._held is None:
            return
        claim = self._held.claim
        self._make(claim.epoch, claim.renewal + 1, now, released=True)
        self._mine, self._renew_at = False, inf
        self._settle(now, reason)

    def _settle(self, now: float, reason: Reason | None = None) -> None:
        """Tells of the holder if it is another than told before."""
        held, other = self._held, self._other
        live = held is not None and self._live(held, now)
        if other is not None and not live and self._live(other, now):
            self._held, self._other, held, live = other, None, other, True
        state = (held.claim.holder_id, held.claim.epoch) if held is not None and live else None
        reason, self._why = reason or self._why, None
        if held is not None and state != self._told:
            self._told = state
            pub: bytes | None = None
            if state is not None:
                self._vacant_at, pub = None, held.claim.holder
                self._quiet_until = min(self._quiet_until, now)
                reason = reason or "heard"
            else:
                self._vacant_at = now
                gone = held.claim.holder_id in self._gone
                reason = reason or ("released" if held.claim.released else "gone" if gone else "expired")
            self._effects.append(Changed(state and state[0], pub, self.epoch, reason, self._mine))
        self._due = max(now, self.deadline())
