"""What is to be done: (actual, desired, this node, config, now) → actions. Arms in a fixed order, each sorted by
id, all pure.

An arm sees a `Look` and yields actions; adding one is a function more in `ARMS`. Reconcile asks twice for the
same while nothing changed; `write_back` is what makes the second pass after it empty. A look at some work only
asks for what a look at everything would: the fold notes every id that something changed for, or that came due.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from agent.meshos.actions import (
    Action,
    ApplyBackoff,
    CommitMaintenanceTransition,
    DropReplica,
    MarkAvoid,
    MigrateBlob,
    PullReplica,
    RequestEviction,
    RequestPlacement,
    StartDaemon,
    StopDaemon,
    key_of,
)
from agent.meshos.actual import Emitted, MeshOsState, Work
from agent.meshos.config import MeshOsConfig
from agent.meshos.daemons import Daemon
from agent.meshos.desired import Desired
from agent.meshos.events import Health, Id, by_id
from agent.meshos.maintenance import EXITING, due
from agent.meshos.peers import AvoidEntry
from agent.meshos.replicas import Chain
from agent.meshos.scheduler import by_score, worst


@dataclass(slots=True)
class Look:
    """What an arm may see. `now_ms` is the time of the last tick. `work` None: look at everything."""

    actual: MeshOsState
    desired: Desired
    this_node: Id
    config: MeshOsConfig
    now_ms: int
    work: Work | None = None
    _shunned: frozenset[Id] | None = field(default=None, init=False)

    def chains(self, among: Collection[Id]) -> Collection[Id]:
        """The ids to look at of those that an arm is about."""
        if self.work is None:
            return among
        return [key for key in self.work.chains if key in among]

    def shunned(self) -> frozenset[Id]:
        """Nodes that get nothing new: cordoned, draining, avoided, unreachable."""
        if self._shunned is None:
            state = self.actual
            shunned = state.avoid.keys() | state.unreachable | state.dead
            shunned |= {node for node, mirror in state.mirrors.items() if mirror.cordoned or mirror.draining}
            if state.life.cordoned or state.draining:
                shunned.add(self.this_node)
            self._shunned = frozenset(shunned)
        return self._shunned

    def held(self, chain: Chain) -> set[Id] | frozenset[Id]:
        """The holders of a chain that count: not draining, not in maintenance, not dead."""
        uncounted = self.actual.uncounted
        return chain.holders if uncounted.isdisjoint(chain.holders) else chain.holders - uncounted


Arm: TypeAlias = Callable[[Look], Iterable[Action]]


# --- 1: daemons


def daemons(look: Look) -> Iterator[Action]:
    """Start what shall run and doesn't, stop what runs and shall not, tell what is gated."""
    state, work = look.actual, look.work
    if work is None or work.all_daemons:
        keys: Collection[Id] = state.daemons.keys() | look.desired.daemons.keys()
    else:
        keys = work.daemons
    for key in sorted(keys, key=by_id):
        daemon = state.daemons.get(key)
        run = shall_run(look, key, daemon)
        if run is None:
            continue
        if daemon is not None and daemon.running:
            if not run or daemon.restart:
                yield StopDaemon(key, look.now_ms + look.config.stop_grace_ms)
        elif run:
            until_ms = None if daemon is None else daemon.backoff.until_ms
            if daemon is None or daemon.backoff.admissible(look.now_ms):
                yield StartDaemon(key)
            elif until_ms is not None and until_ms != daemon.applied_until_ms:
                yield ApplyBackoff(key, until_ms)


def shall_run(look: Look, key: Id, daemon: Daemon | None) -> bool | None:
    """The effective intent for a daemon here; None: leave it as it is.

    A cordon holds back what has not run since; a node that leaves or is replaced starts nothing, and what it
    stops then is its supervisor's to say."""
    state = look.actual
    if state.draining:
        return False
    intent = look.desired.daemons.get(key)
    if intent is None:
        return None
    if not intent.run or intent.held or (intent.node is not None and intent.node != look.this_node):
        return False
    if daemon is None or not daemon.running:
        if state.life.leaving is not None or state.life.update is not None:
            return None
        if held_by_cordon(state, daemon) or waits_for(state, key, look.this_node) is not None:
            return None
    return True


def held_by_cordon(state: MeshOsState, daemon: Daemon | None) -> bool:
    """Whether a daemon that doesn't run is not started because of a cordon."""
    return state.life.cordoned and (daemon is None or not daemon.ran)


def waits_for(state: MeshOsState, key: Id, this_node: Id) -> Id | None:
    """The first of the daemons it is to be started after that shall run here and is not well yet, if there is one."""
    wanted = state.desired.daemons
    intent = wanted.get(key)
    for first in intent.after if intent is not None else ():
        before = wanted.get(first)
        if before is not None and before.run and before.node in (None, this_node) and first != key:
            daemon = state.daemons.get(first)
            if daemon is None or not daemon.well:
                return first
    return None


# --- 2: local replicas


def local_replicas(look: Look) -> Iterator[Action]:
    """Pull what shall be held here, drop what shall not; when draining, hand on what only this node has.

    A draining node still pulls what it shall hold: who shall hold a chain is its leader's to change."""
    state, me, intents = look.actual, look.this_node, look.desired.local
    held = state.held_by.get(me, set())
    found: list[Action] = []
    for key in look.chains(intents):
        if intents[key] == "drop":
            if key in held:
                found.append(DropReplica(key))
        elif key not in held and (chain := state.chains.get(key)) and chain.holders:
            found.append(PullReplica(key, source(look, chain.holders)))
    yield from sorted(found, key=_by_target)
    if state.draining and state.blobs_here:
        yield from migrations(look)


def source(look: Look, others: Collection[Id]) -> Id:
    """Whom to pull from: the lowest id that is neither avoided nor unreachable, else the lowest."""
    state = look.actual
    good = [n for n in others if n not in state.avoid and n not in state.unreachable and n not in state.dead]
    return min(good or others, key=by_id)


def migrations(look: Look) -> Iterator[Action]:
    """Artifacts held here that have no copy on a node that counts, each to one of the nodes that may take it:
    in turn, from the lowest id, so that a drain doesn't end on a single node."""
    state, me = look.actual, look.this_node
    lone = [
        key
        for key in state.blobs_here
        if not any(node != me and node not in state.uncounted for node in state.blobs[key])
    ]
    if not lone:
        return
    takers = _takers(look)
    for number, key in enumerate(sorted(lone, key=by_id)):
        holders = state.blobs[key]
        fit = [node for node in takers if node not in holders] if len(holders) > 1 else takers
        if fit:
            yield MigrateBlob(key, fit[number % len(fit)])


def _takers(look: Look) -> list[Id]:
    """Nodes that may take a copy: those that answer; where nothing is known of any, all that hold something."""
    state, shunned = look.actual, look.shunned()
    seen = {
        n for n, sample in state.health.items() if sample.health is not Health.UNREACHABLE
    } | state.rtt.keys()
    fit = [node for node in seen if node not in shunned and node != look.this_node]
    if not fit:
        known = set(state.held_by).union(*state.blobs.values())
        fit = [node for node in known if node not in shunned and node != look.this_node]
    return sorted(fit, key=by_id)


# --- 3: counts


def counts(look: Look) -> Iterator[Action]:
    """For chains led here: one more holder where too few count, one less where too many do. The victim is one of
    those that count: to evict a dead one would change nothing."""
    state, desired = look.actual, look.desired.counts
    found: list[Action] = []
    for key in look.chains(state.led):
        wanted = desired.get(key)
        if wanted is None:
            continue
        chain = state.chains[key]
        held = look.held(chain)
        if len(held) < wanted:
            found.append(RequestPlacement(key, tuple(sorted(chain.holders | look.shunned(), key=by_id))))
        elif len(held) > wanted:
            scores = state.scores.get(str(key))
            graded = worst(held, scores) if scores else None
            found.append(RequestEviction(key, min(held, key=by_id) if graded is None else graded[0]))
    yield from sorted(found, key=_by_target)


# --- 4: locality


def locality(look: Look) -> Iterator[Action]:
    """Keep away from a peer whose round trip is strictly above the limit and that is not on the list yet."""
    limit_ms, avoid, rtt = look.config.degraded_rtt_ms, look.actual.avoid, look.actual.rtt
    peers: Iterable[Id] = rtt if look.work is None else look.work.peers & rtt.keys()
    slow = [peer for peer in peers if rtt[peer].rtt_ms > limit_ms and peer not in avoid]
    for peer in sorted(slow, key=by_id):
        measured = rtt[peer].rtt_ms
        yield MarkAvoid(peer, f"rtt {measured:.0f} ms, over {limit_ms:g} ms", look.config.avoid_ttl_ms)


# --- 5: maintenance


def maintenance(look: Look) -> Iterator[Action]:
    """Ask for this node's next maintenance state once its condition is met."""
    state = look.actual
    if not state.surveyed:
        return
    mine = state.maintenance
    unwell = mine.state is EXITING and any(
        intent.run
        and not intent.held
        and intent.node in (None, look.this_node)
        and not ((daemon := state.daemons.get(key)) and daemon.well)
        and not held_by_cordon(state, daemon)
        for key, intent in look.desired.daemons.items()
    )
    left = state.left() if mine.deadline_at_ms is not None else []
    found = due(mine, look.now_ms, left, unwell, look.config.recovery_ramp_ms)
    if found is not None:
        yield CommitMaintenanceTransition(*found)


# --- 6: scheduler


def scheduler(look: Look) -> Iterator[Action]:
    """For chains led here: move the worst holder where another node is better by enough."""
    state, desired = look.actual, look.desired.counts
    if not state.scores:
        return
    found: list[Action] = []
    for key in look.chains(state.led):
        scores = state.scores.get(str(key))
        chain = state.chains[key]
        if scores is None or chain.pending or not chain.holders:
            continue
        wanted = desired.get(key)
        if wanted is not None and len(look.held(chain)) > wanted:
            continue  # arm 3 evicts from it on this very tick
        victim = by_score(chain.holders, scores, chain.last_rebalance_ms, look.now_ms, look.config)
        if victim is not None:
            found.append(RequestEviction(key, victim, True))
    yield from sorted(found, key=_by_target)


ARMS: tuple[Arm, ...] = (daemons, local_replicas, counts, locality, maintenance, scheduler)


def _by_target(action: Action) -> tuple[bool, Id]:
    return by_id(action.target)


# --- a pass


def reconcile(state: MeshOsState, arms: tuple[Arm, ...] = ARMS, work: Work | None = None) -> list[Action]:
    """The actions that follow from the state at its last tick, in the order of the arms. Changes nothing."""
    look = Look(state, state.desired, state.this_node, state.config, state.last_tick_ms, work)
    in_flight = state.in_flight
    return [action for arm in arms for action in arm(look) if key_of(action) not in in_flight]


def write_back(state: MeshOsState, actions: Iterable[Action]) -> None:
    """Notes what reconcile asked for: its effect where it is local, that it is under way where it isn't."""
    now_ms, config = state.last_tick_ms, state.config
    for action in actions:
        key = key_of(action)
        until_ms = now_ms + config.in_flight_ms
        match action:
            case MarkAvoid():
                state.avoid[action.peer] = AvoidEntry(action.reason, now_ms, now_ms + action.ttl_ms)
                state.changed.add("avoid_list")
            case ApplyBackoff():
                state.daemon(action.daemon).applied_until_ms = action.until_ms
                _daemon_changed(state, action.daemon)
            case StartDaemon():
                until_ms = now_ms + config.start_in_flight_ms
                _daemon_changed(state, action.daemon)
            case StopDaemon():
                until_ms = action.deadline_ms
                daemon = state.daemon(action.daemon)
                daemon.since_ms = daemon.since_ms if daemon.stopping else now_ms
                daemon.stopping = True
                _daemon_changed(state, action.daemon)
            case RequestEviction():
                chain = state.chain(action.chain)
                chain.last_rebalance_ms, chain.pending = now_ms, True
                state.wake(now_ms + config.rebalance_cooldown_ms, "cooled", action.chain)
                state.changed.add("replicas")
                state.changed_chains.add(action.chain)
        if not action.ENDS_AT_WRITE_BACK:
            state.fly(key, until_ms)
        state.emitted.pop(key, None)
        if len(state.emitted) >= config.action_queue_capacity:
            del state.emitted[next(iter(state.emitted))]
        state.emitted[key] = Emitted(action, now_ms)
        state.counts.actions_emitted += 1
        state.changed.update(("recently_emitted", "stats"))


def _daemon_changed(state: MeshOsState, key: Id) -> None:
    state.changed.add("daemons")
    state.changed_daemons.add(key)


def run_pass(state: MeshOsState, arms: tuple[Arm, ...] = ARMS) -> list[Action]:
    """One pass over what changed since the last one, once in a while over everything: reconcile, write back,
    and the actions to dispatch."""
    now_ms, last_ms = state.last_tick_ms, state.last_full_pass_ms
    full = last_ms is None or now_ms - last_ms >= state.config.full_pass_interval_ms
    actions = reconcile(state, arms, None if full else state.work)
    if full:
        state.last_full_pass_ms = now_ms
    state.work = Work()
    if actions:
        write_back(state, actions)
    return actions
