"""A node's engine among its other rooms: what it is told, what it has done, and what becomes of its decisions.

The engine itself (`meshos`) decides; here its decisions reach the daemons, gossip, the event stream and the journal,
and what this node finds out of itself and of others reaches the engine. What an operator set (drain, cordon, maintenance,
replicas to drop) is kept durably, and taken up again by the next process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from agent.chain.blackbox import DAEMON, VITALS
from agent.chain.record import FAILURE, Failed
from agent.chain.store import OVERRIDE, STANDING, Journal
from agent.crashes import Crashes
from agent.daemons.supervisor import Supervisor
from agent.data.of_node import PeerStates, exempt_chains
from agent.events import wall_ms
from agent.executor import DispatchError, keep_in
from agent.meshos.actions import (
    Action,
    ApplyBackoff,
    CommitMaintenanceTransition,
    MarkAvoid,
    StartDaemon,
    StopDaemon,
)
from agent.meshos.actual import FailureRecord
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    Admin,
    AdminOp,
    DaemonLifecycle,
    Event,
    Health,
    Id,
    LocalFailure,
    MaintenanceObserved,
    Restored,
    SelfHealth,
    Started,
    Stopping,
)
from agent.meshos.own import Transition
from agent.meshos.peers import pool_health
from agent.meshos.snapshot import Snapshot
from agent.meshos.states import MaintenanceState
from agent.recorder import Recorder
from agent.runtime import MeshOsRuntime
from agent.spec.model import DaemonSpec
from discovery.errors import Refused
from discovery.identity import id_text
from discovery.lifecycle import State
from discovery.member import Vitals

if TYPE_CHECKING:
    from agent.node import Node

ENGINE_TIMEOUT_S = 2.0
SAMPLE_MAX_AGE_S = 30.0
REASON_CHARS = 96
VITALS_KEPT_EVERY_S = 60.0
CRASH_KEPT_AFTER_S = 0.05
"""Sooner than the next tick would: so long the fold may take."""
STOP_GRACE_S = 30.0
"""How long the daemons of a leaving node have, each at most its own grace."""


class Standing(msgspec.Struct, frozen=True):
    """What operators set and the next process takes up. Times are Unix milliseconds: they outlive the process."""

    cordoned: bool = False
    maintenance: MaintenanceState = MaintenanceState.ACTIVE
    reason: str = ""
    since_ms: int = 0
    until_ms: int | None = None
    by: str | None = None
    op_id: str | None = None
    ran: list[str] = []
    """While cordoned: the daemons that it keeps."""


def standing_in(journal: Journal) -> Standing:
    """What operators set, as the last process kept it."""
    try:
        return msgspec.convert(journal.get(STANDING) or {}, Standing)
    except msgspec.ValidationError:
        return Standing()


class Engine:
    """The engine of one node. Made when identity, journal and gossip stand; begun once there is an event loop."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._told_counts = (0, 0, 0)
        self._kept_daemons: dict[str, dict[str, Any]] = {}
        """How each daemon is by the journal."""
        self._seen_daemons: Any = None
        self._last_failure: FailureRecord | None = None
        self._vitals_kept_at = float("-inf")
        self._vitals: tuple[int, Vitals] | None = None
        """The last sample and its wall time; None where it is kept already."""
        self._told_deadline_ms: int | None = None
        self._explained: tuple[Any, ...] = ()
        self._claimed: frozenset[str] = frozenset()
        """Daemons that a cordoned node kept before its update, and that are not up again yet."""
        self._kept: frozenset[str] = frozenset()
        self._taken_up = self._crash_due = False

    # --- its life

    async def begin(self) -> None:
        """Starts loop and executor, takes up what the last process left in force, and its daemons."""
        node, settings, journal = self.node, self.node.settings, self.node.journal
        config = MeshOsConfig(
            cpu_budget_permille=round(settings.cpu_budget * 10),
            mem_budget_permille=round(settings.mem_budget * 10),
            exempt_chains=exempt_chains(node.identity.id),
        )
        recorder = Recorder(settings.record, node.identity.id, config) if settings.record else None
        self.runtime = MeshOsRuntime.start(
            config,
            Dispatch(self),
            this_node=node.identity.id,
            on_transition=self._on_transition,
            on_control=lambda control: self.daemons.tell_daemons(control),
            on_snapshot=self._on_snapshot,
            keep=keep_in(journal, wall_ms),
            recorder=recorder,
            zone_of=self._zone_of,
        )
        self.loop = self.runtime.loop
        self._crashes = Crashes(journal, self.loop.now_ms)
        for task in self.runtime.tasks:
            node.watch_task(task)
        self.daemons: Supervisor = Supervisor(
            node.place.path / "daemons",
            node=id_text(node.identity.id),
            mesh=settings.mesh,
            tell=self._daemon_said,
            trouble=self._daemon_trouble,
            room_for=node.wanted.room_for,
        )
        self.runtime.install_rtt_probe("pool", self._rtt_samples)
        self.runtime.install_health_probe("pool", self._health_samples)
        self.loop.install_event_probe("members", PeerStates(node))
        handover = journal.handover()
        if handover is not None:
            self._claimed = frozenset(standing_in(journal).ran)
            await self.tell(Started(True, handover.by, handover.op_id, survey=True))
            journal.set_handover(None)
        else:
            await self.tell(Started(survey=True))
        self.loop.hurry()  # maintenance is anchored on ticks: there has to be one before an op comes
        await self._take_up()
        self._taken_up = True

    async def _take_up(self) -> None:
        await asyncio.gather(*map(self.loop.publish_folded, self._crashes.kept()))
        standing = standing_in(self.node.journal)
        if standing != Standing():
            now = wall_ms()
            left_ms = None
            if standing.until_ms is not None:  # a clock that was set back makes no deadline longer
                left_ms = max(0, standing.until_ms - max(now, standing.since_ms))
            await self.tell(
                Restored(
                    cordoned=standing.cordoned,
                    maintenance=standing.maintenance,
                    reason=standing.reason,
                    age_ms=max(0, now - standing.since_ms),
                    left_ms=left_ms,
                    ran=tuple(standing.ran),
                    by=standing.by,
                    op_id=standing.op_id,
                )
            )
        override = self.node.journal.get(OVERRIDE)
        if isinstance(override, dict) and override.get("op") == "drain":
            began_ms = int(override.get("since_ms", 0))
            left_ms = max(0, int(override.get("until_ms", 0)) - max(wall_ms(), began_ms))
            by, op_id = override.get("by"), override.get("op_id")
            order = AdminOp("drain", self.node.identity.id, left_ms, by, op_id)
            await self.tell(Admin(admin=order))

    async def begin_daemons(self, specs: dict[str, DaemonSpec]) -> list[str]:
        """Takes up the daemons that an earlier process left running; their names."""
        adopted = await self.daemons.begin(specs)
        if adopted:
            self.node.events.emit("daemons.adopted", reason=", ".join(adopted))
        return adopted

    async def stop_daemons(self, by: str | None, op_id: str | None) -> None:
        """Shows Draining (`stopping`) until every daemon has ended, or was killed at the end of its grace."""
        if not self.daemons.names():
            return
        await self.tell(Stopping(by, op_id))
        self.loop.hurry()
        await self.daemons.stop_all(STOP_GRACE_S)

    async def hand_over_daemons(self) -> None:
        """For an update: ends the daemons but those that live through it."""
        await self.daemons.stop_all(STOP_GRACE_S, lambda spec: not spec.restart_on_update)

    async def close(self) -> None:
        """Ends the loop and lets go of the daemons; those that still run live on."""
        if hasattr(self, "daemons"):
            await self.daemons.close()
        if hasattr(self, "runtime"):
            await self.runtime.shutdown()

    # --- what it is told

    async def tell(self, event: Event) -> Transition | None:
        """Hands it an event and waits until it is folded; the record then says what resulted."""
        move = await self.loop.publish_folded(event, ENGINE_TIMEOUT_S)
        if isinstance(event, Admin | MaintenanceObserved):
            self._keep_standing()
        self.state_record()
        return move

    async def admin(self, op: AdminOp) -> Transition | None:
        """An accepted op of an operator; what follows from it follows at once, not at the next tick."""
        move = await self.tell(Admin(admin=op))
        self.loop.hurry()
        return move

    def say(self, event: Event) -> None:
        """Hands it an event in the order said, as soon as it has room; nothing waits for it."""
        self.runtime.executor.tell(event)

    def vitals(self, vitals: Vitals) -> None:
        """A sample of this host's load. One a minute is kept, and the last before each change of state, for who looks
        back, also when this node is gone."""
        self.loop.try_publish(SelfHealth(cpu=vitals.cpu, mem=vitals.mem))
        self._vitals = (wall_ms(), vitals)
        if time.monotonic() - self._vitals_kept_at >= VITALS_KEPT_EVERY_S:
            self._keep_vitals()

    def _keep_vitals(self) -> None:
        if self._vitals is None:
            return
        (at_ms, vitals), self._vitals = self._vitals, None
        self._vitals_kept_at = time.monotonic()
        shares = {key: getattr(vitals, key) for key in ("cpu", "mem", "disk")}
        body = {key: None if value is None else value / 1000 for key, value in shares.items()}
        running, total, _ = self.counts(self.loop.snapshot)
        self.node.journal.append(VITALS, {**body, "running": running, "total": total}, at_ms=at_ms)

    def _daemon_said(self, event: DaemonLifecycle) -> None:
        if event.signal == "crashed":
            self.say(LocalFailure("daemon", str(event.daemon), event.reason))
        if event.signal in ("crashed", "exited_cleanly") and not self._crash_due:
            self._crash_due = True
            asyncio.get_running_loop().call_later(CRASH_KEPT_AFTER_S, self._keep_crashes)
        if event.signal in ("starting", "started"):
            event = msgspec.structs.replace(event, version=self.daemons.fingerprint(str(event.daemon)))
        self.say(event)
        if event.signal in ("crashed", "exited_cleanly", "started"):
            self.node.events.emit(
                f"daemon.{event.signal}",
                daemon=event.daemon,
                reason=event.reason or None,
                source="supervisor",
            )

    def _daemon_trouble(self, daemon: str, reason: str) -> None:
        self.say(LocalFailure("daemon", daemon, reason))

    def _rtt_samples(self) -> Iterator[tuple[Id, float]]:
        oldest = time.monotonic() - SAMPLE_MAX_AGE_S
        for node, member in self.node.swim.members.items():
            if member.rtt_s is not None and member.last_seen > oldest and member.present:
                yield node, member.rtt_s * 1000

    def _health_samples(self) -> Iterator[tuple[Id, Health, str]]:
        config, waits = self.loop.config, self.node.contacts.waiting_ms
        for node, member in self.node.swim.members.items():
            link_age_ms = waits(node)
            suspected = member.suspect_since is not None
            health = pool_health(member.state.word, suspected, link_age_ms, config)
            reason = ""
            if member.state is State.DEAD:
                reason = member.evidence.value if member.evidence else "dead"
            elif health is not Health.HEALTHY:
                reason = "suspected" if suspected else f"link silent for {link_age_ms} ms"
            yield node, health, reason

    def _zone_of(self, node: Id) -> str:
        member = self.node.swim.members.get(node) if isinstance(node, int) else None
        return member.record.tags.get("zone", "") if member is not None else ""

    # --- what becomes of its decisions

    def _on_transition(self, move: Transition) -> None:
        """Carries one move to gossip, the event stream and the journal."""
        node = self.node
        self.state_record()
        event = node.events.emit(
            "node.state_changed",
            from_=move.old.word if move.old is not None else None,
            to=move.new.word,
            reason=move.reason or None,
            by=move.by,
            op_id=move.op_id,
        )
        self._keep_vitals()
        kept = {k: event[k] for k in ("from", "to", "reason", "by", "op_id")}
        node.journal.append("node.state_changed", kept, at_ms=event["at_ms"])
        node.service.changed()

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        """Brings what others see up to date: counts of daemons and failures, and why a drain goes on."""
        swim = self.node.swim
        counts = self.counts(snapshot)
        if counts != self._told_counts and swim.me.vitals is not None:
            self._told_counts = counts
            swim.set_vitals(self.counted(swim.me.vitals), time.monotonic())
            self.node.pool.flush()
            self.node.service.changed()
        self._keep_daemons(snapshot)
        self._keep_failures(snapshot)
        local, maintenance = snapshot.local, snapshot.local_maintenance
        explained = (local.drain and local.drain.left, maintenance.left, maintenance.state, local.cordoned)
        if explained != self._explained or (local.cordoned and snapshot.daemons):
            self._explained = explained
            self.state_record()
        if local.cordoned and self._steady and self.kept() != self._kept:
            self._keep_standing()

    def _keep_daemons(self, snapshot: Snapshot) -> None:
        """Keeps how each daemon is from now on in this node's own chain, where it changed."""
        if snapshot.daemons is self._seen_daemons:
            return
        self._seen_daemons = snapshot.daemons
        self._keep_crashes()
        kept = self._kept_daemons
        for key, view in snapshot.daemons.items():
            name = str(key)
            told: dict[str, Any] = {"name": name, "state": view.state}
            told["health"] = view.health and view.health.value
            told |= {"reason": view.reason, "restarts": view.restarts}
            if kept.get(name) != told:
                kept[name] = told
                self.node.journal.append(
                    DAEMON, {**told, "pid": self.daemons.facts(name).pid}, at_ms=wall_ms()
                )

    def _keep_crashes(self) -> None:
        self._crash_due = False
        if self._taken_up:
            self._crashes.keep(self.loop.state)

    def _keep_failures(self, snapshot: Snapshot) -> None:
        """Keeps failures of this node's own in its chain, too; how actions ended is kept by the executor."""
        ring = snapshot.recent_failures
        new: list[FailureRecord] = []
        for failure in reversed(ring):
            if failure is self._last_failure:
                break
            new.append(failure)
        self._last_failure = ring[-1] if ring else None
        for failure in reversed(new):
            if failure.source != "action":
                body = {"target": failure.target, "action": failure.action}
                reason = Failed(failure.reason[:4096] or failure.source)
                self.node.journal.append(f"{FAILURE}{failure.source}"[:64], body, reason, at_ms=wall_ms())

    def counts(self, snapshot: Snapshot) -> tuple[int, int, int]:
        """(daemons that run, daemons that run or shall, failures on the ring)."""
        me = self.node.identity.id
        running = wanted = 0
        for view in snapshot.daemons.values():
            runs = view.state in ("running", "stopping")
            running += runs
            wanted += runs or (view.intent == "run" and view.pinned in (None, me))
        return running, wanted, len(snapshot.recent_failures)

    def counted(self, vitals: Vitals) -> Vitals:
        """The same load with the counts of now."""
        running, total, failures = self.counts(self.loop.snapshot)
        return msgspec.structs.replace(
            vitals,
            daemons_running=min(running, 65535),
            daemons_total=min(total, 65535),
            failures=failures,
        )

    def state_record(self) -> None:
        """Brings the member record up to what the engine says of this node; broadcast when it changed."""
        node, life = self.node, self.loop.life
        record, state = node.swim.me.record, self.loop.state
        if life.state is State.LEAVING:
            return  # the goodbye says it
        maintenance = life.maintenance
        deadline_at_ms = None
        if life.update is not None:
            deadline_at_ms = life.update.deadline_at_ms
        elif life.state is State.DRAINING:
            deadline_at_ms = maintenance.deadline_at_ms or (life.drain.deadline_at_ms if life.drain else None)
        reason = "" if life.state in (State.JOINING, State.ALIVE) else life.reason
        if life.state is State.DRAINING and state.draining and (left := state.left()):
            what = ", ".join(left)
            reason = (
                reason if what in reason else f"{reason}: {what}"
            )  # a failed drain has said what was left
        wanted: dict[str, Any] = {
            "state": life.state,
            "cordoned": life.cordoned,
            "reason": _short(reason),
            "maintenance": maintenance.state.value,
            "keeps": node.wanted.packed(cordoned=life.cordoned),
        }
        changes = {k: v for k, v in wanted.items() if getattr(record, k) != v}
        if changes or deadline_at_ms != self._told_deadline_ms:
            self._told_deadline_ms = deadline_at_ms
            left_ms = None if deadline_at_ms is None else max(0, deadline_at_ms - self.loop.now_ms())
            changes["deadline_ms"] = left_ms
            node.swim.update_self(time.monotonic(), **changes)
            node.pool.flush()
            node.meshes.members_changed()
            node.wanted.members_changed()
            node.service.changed()

    @property
    def _steady(self) -> bool:
        """Whether what runs here is what shall: nothing is ended for a drain, a goodbye or an update."""
        return not (self.loop.state.draining or self.loop.life.update or self.node.stopping)

    def kept(self) -> frozenset[str]:
        """The daemons that stay on this node when it is cordoned: those that run, or are about to run again."""
        if self.loop.life.update is not None:
            return self._kept  # what an update ends comes back
        daemons = self.loop.state.daemons
        kept = {
            str(key) for key, d in daemons.items() if d.running or (d.ran and d.backoff.until_ms is not None)
        }
        if self.loop.state.draining or not self.loop.life.cordoned:
            self._claimed = frozenset()
        return self._claimed.union(kept)

    def _keep_standing(self) -> None:
        """Keeps what operators set. A disk that refuses is told; what was set stands all the same."""
        life, journal = self.loop.life, self.node.journal
        if self._steady:
            self._kept = self.kept()
        offset_ms = wall_ms() - self.loop.now_ms()
        drain, maintenance = life.drain, life.maintenance
        override = None
        if drain is not None:
            override = {
                "op": "drain",
                "since_ms": offset_ms + drain.since_ms,
                "until_ms": offset_ms + drain.deadline_at_ms,
                "by": drain.by,
                "op_id": drain.op_id,
            }
        deadline_ms = maintenance.deadline_at_ms
        standing = Standing(
            cordoned=life.cordon,
            maintenance=maintenance.state,
            reason=maintenance.reason,
            since_ms=offset_ms + (maintenance.since_ms or self.loop.now_ms()),
            until_ms=None if deadline_ms is None else offset_ms + deadline_ms,
            by=maintenance.by,
            op_id=maintenance.op_id,
            ran=sorted(self._kept) if life.cordoned else [],
        )
        idle = not life.cordon and maintenance.state is MaintenanceState.ACTIVE
        try:
            journal.set(OVERRIDE, override, durable=True)
            journal.set(STANDING, None if idle else msgspec.to_builtins(standing), durable=True)
        except Refused as why:
            self.node.journal_refused(why)

    async def commit_maintenance(self, action: CommitMaintenanceTransition) -> None:
        """Makes this node's own maintenance transition durable, then lets it come back as observed."""
        node = self.node
        body = {"state": action.state.value, "reason": action.reason}
        try:
            node.journal.append("maintenance.transition", body, at_ms=wall_ms(), durable=True)
        except Refused as why:
            raise DispatchError(why.sentence, retry_after_ms=1000) from why
        before = self.loop.life.maintenance.state
        await self.tell(MaintenanceObserved(node.identity.id, action.state, action.reason))
        self.loop.hurry()
        node.events.emit(
            "node.maintenance",
            from_=before.value,
            to=self.loop.life.maintenance.state.value,
            reason=action.reason,
            op_id=self.loop.life.maintenance.op_id,
            by=self.loop.life.maintenance.by,
        )


class Dispatch:
    """Carries actions out: each returns once it is on its way; what becomes of it comes back as events."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def dispatch(self, action: Action) -> None:
        engine = self._engine
        match action:
            case StartDaemon(daemon=daemon):
                await engine.daemons.start(str(daemon))
            case StopDaemon(daemon=daemon, deadline_ms=deadline_ms):
                await engine.daemons.stop(str(daemon), max(0, deadline_ms - engine.loop.now_ms()))
            case CommitMaintenanceTransition():
                await engine.commit_maintenance(action)
            case MarkAvoid() | ApplyBackoff():
                return  # they stand since their write-back
            case _:
                await engine.node.data.dispatch(action)


def _short(text: str) -> str:
    return text if len(text) <= REASON_CHARS else text[: REASON_CHARS - 1] + "…"
