"""The composition root: the only place that knows every room of this floor.

A node starts in steps that it can tell the times of, runs until something asks it to stop, and says goodbye. What it
is in (its lifecycle state) is decided by the engine's fold alone; this room carries each transition to gossip, the
event stream and the journal, exactly once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import msgspec
import psutil

from agent import addresses, freshness
from agent.acts import UPDATE_DEADLINE_MS, Acts
from agent.admitting import admission_of, key_file, rotation_of
from agent.authority import Authority
from agent.capacity import capacity
from agent.chain.store import LAST_PORT, OVERRIDE
from agent.chains import Chains
from agent.config import Settings
from agent.contacts import Contacts
from agent.control import Control
from agent.data.of_node import data_room_of
from agent.engine import Engine, standing_in
from agent.events import EventLog, LineWriter, wall_ms
from agent.hearing import Hearing
from agent.home import Home, RunEntry, write_private
from agent.logins import Logins
from agent.loop import LoopClosed, QueueFull
from agent.meshes import Meshes
from agent.meshos.events import Alone, Leaving
from agent.meshos.events import Event as EngineEvent
from agent.meshos.events import Synced as EngineSynced
from agent.meshos.own import Transition
from agent.operators import Operators
from agent.pages import Pages
from agent.past import Past
from agent.place import Place
from agent.reach import Reach
from agent.relay import RELAYING_KINDS, Relay
from agent.seeds import Seeds
from agent.service import Service
from agent.view import HISTORY_PERIOD_S
from agent.vitals import VitalsSampler
from agent.wanted import Wanted
from discovery.errors import LocalError, Refused
from discovery.identity import id_text, verify
from discovery.lifecycle import State
from discovery.links import Listener
from discovery.member import Addr, Member, Record, Vitals, addr_text, unmet
from discovery.pool import Pool
from discovery.port import Port, bind_pair
from discovery.seal import Opener, Sealer
from discovery.swim import Swim, SwimConfig

DEFAULT_PORT = 7420
LEAVE_MAX_S = 0.6
HARMLESS = frozenset({"paused", "own_echo", "unasked_ack", "no_witness"})
"""What gossip counts and nobody has to be told of: late answers, pauses of this process."""
LOOK_FOR_NODES_ALONE_S = 0.5
LOOK_FOR_NODES_S = 30.0
REMEMBER_EVERY_S = 60.0

_EXIT_OK = 0


class Node:
    """One running node. `await Node(settings, home).run()` is its whole life; the result is the exit status."""

    def __init__(self, settings: Settings, home: Home) -> None:
        self.settings = settings
        self.home = home
        self._began = time.monotonic()
        self._steps: list[dict[str, Any]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop: asyncio.Future[tuple[str, str | None, str | None]] | None = None
        self.left = asyncio.Event()
        """The goodbye has gone out."""
        self.replacing = False
        """Set by an update: stop without a goodbye and run the code on disk in this process's place."""

    # --- life

    async def run(self) -> int:
        """Starts, runs until asked to stop, says goodbye. LocalError when it can't start; nothing is left behind."""
        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()
        try:
            await self._start()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.add_signal_handler(number, self.request_stop, "signal", signal.Signals(number).name)
            reason, by, op_id = await self._stop
            await self._finish(reason, by, op_id)
        finally:
            await self._close()
        if self.replacing:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        return _EXIT_OK

    def request_stop(self, reason: str, by: str | None = None, op_id: str | None = None) -> None:
        """Asks the node to end: `control_op`, `signal`, `console_exit`, `update` or `error`. The first one counts."""
        if self._stop is not None and not self._stop.done():
            self.replacing = reason == "update"
            self._stop.set_result((reason, by, op_id))

    @property
    def stopping(self) -> bool:
        return self._stop is not None and self._stop.done()

    # --- start

    async def _start(self) -> None:
        settings, home = self.settings, self.home
        self.build = freshness.at_start()
        kept_keys = key_file(self).read(wall_ms())
        self._step("keys")
        self.place = Place(settings, home)
        self.identity, self.name, self.journal = self.place.identity, self.place.name, self.place.journal
        self._step("journal")
        udp, tcp = self._bind()
        port = tcp.getsockname()[1]
        self.journal.set(LAST_PORT, port)
        self.local_addr = addresses.local_address(settings.bind, port)
        self._step("sockets")

        start_ms = self.start_ms = self.journal.next_start_ms(wall_ms())
        standing = standing_in(self.journal)
        millicores, memory_mib = capacity()
        record = Record(
            pub=self.identity.pub,
            mesh=settings.mesh,
            name=self.name,
            kind=settings.kind,
            incarnation=self.journal.next_incarnation(),
            version=1,
            state=State.JOINING,
            addrs=addresses.advertised(settings.bind, port, settings.advertise),
            build=self.build,
            host=addresses.host_mark(),
            maintenance=standing.maintenance.value,
            cordoned=standing.cordoned or self.journal.get(OVERRIDE) is not None,
            tags=settings.tag,
            millicores=millicores,
            memory_mib=memory_mib,
        )
        presets = {"lan": SwimConfig.lan, "wan": SwimConfig.wan, "local": SwimConfig.local}
        fixed_s = settings.suspicion_ms / 1000 if settings.suspicion_ms else None
        self.swim = Swim(
            record=record,
            sign=self.identity.sign,
            verify=verify,
            config=presets[settings.profile](suspicion_fixed_s=fixed_s),
            rng=random.Random(int.from_bytes(os.urandom(16), "big")),
            now=time.monotonic(),
        )
        self._open_log()
        self.pages = Pages(self)
        self.hearing = Hearing(self)
        self.past = Past(self)
        self.keys = rotation_of(self, kept_keys)
        keyring = self.keys.keyring()
        self.port = Port(udp, on_incompatible=self.hearing.incompatible)
        self.pool = Pool(
            self.swim,
            Sealer(keyring, f"mesh/{settings.mesh}", self.identity.id, start_ms, os.urandom(8)),
            Opener(keyring, f"mesh/{settings.mesh}"),
            self.port,
            on_effect=self.hearing.take,
            on_persist=self._persist_incarnation,
        )
        self.keys.bind(self.pool)
        self.admission = admission_of(self)
        self.seeds = Seeds(self)
        self.meshes = Meshes(self)
        self.relay = Relay(
            name=self.name,
            mesh=settings.mesh,
            find=lambda node: self.swim.members.get(node) or self.meshes.find(node),
            usable_addrs=self.usable_addrs,
            may_relay=lambda: settings.kind in RELAYING_KINDS,
            held=lambda node: self.contacts.open_to(node),
            take=lambda sock, addr: self.listener.take(sock, addr),
        )
        self.wanted = Wanted(self)
        self.chains = Chains(self, self.wanted.accepted)
        self.operators = Authority(Operators(home.operators_file), self.chains.admin.state)
        self.data = data_room_of(
            self,
            incarnation=record.incarnation,
        )
        self.service = Service(self)
        methods = self.methods = self.service.methods()
        self.contacts = Contacts(self.pool, self.identity, methods, self.usable_addrs)
        self.contacts.exchanged = self.meshes.synced
        self.reach = Reach(
            me=self.identity.id,
            mesh=settings.mesh,
            identity=self.identity,
            mesh_identity=lambda: self.meshes.identity,
            contacts=self.contacts,
            usable_addrs=self.usable_addrs,
            relays=self.meshes.relays,
            methods=methods,
        )
        self.contacts.notes = {"ring": self.keys, "chains": self.chains, "data": self.data}
        self.control = Control(
            me=self.identity.id,
            mesh=settings.mesh,
            journal=self.journal,
            operators=self.operators,
            applier=Acts(self),
            ledger=self.chains,
            emit=self.events.emit,
        )
        logins = Logins(self)
        self.listener = await Listener.start(
            tcp,
            host_key=self.identity,
            authorise=logins.authorise,
            methods=methods,
            on_link=logins.opened,
            on_refused=logins.refused,
        )
        self._step("listener")
        self._write_run_file()
        self.engine = Engine(self)
        await self.engine.begin()
        await self.chains.begin()
        await self.wanted.begin()
        self.data.start()
        self.chains.users.begin(self.data)
        self.engine.runtime.install_scorer(self.data.scorer)
        self._step("engine")
        self.pool.start()
        self.meshes.start()
        self.seeds.start()
        self._step("gossip")
        self.vitals = VitalsSampler(self._on_vitals, home.state)
        self.vitals.start()
        self.spawn(self._housekeeping())
        self.spawn(self.keys.run())
        self.spawn(self.chains.run())
        if settings.stdin_goodbye:
            self._watch_stdin()
        self.events.emit("node.ready", steps=self._steps, addr=addr_text(self.local_addr), build=self.build)

    def _step(self, name: str) -> None:
        self._steps.append({"step": name, "ms": round((time.monotonic() - self._began) * 1000, 1)})

    def _bind(self) -> tuple[Any, Any]:
        """The port asked for; else the last one, the default one, or any free one."""
        settings = self.settings
        if settings.port:
            return bind_pair(settings.bind, settings.port)
        wanted = [] if settings.port == 0 else [DEFAULT_PORT]
        handover = self.journal.handover()
        if settings.port is None or handover is not None:
            wanted.insert(0, int(self.journal.get(LAST_PORT, 0)))
        for port in filter(None, wanted):
            with contextlib.suppress(LocalError):
                return bind_pair(settings.bind, port)
        return bind_pair(settings.bind, 0)

    def _open_log(self) -> None:
        self._writer = LineWriter()
        self.events = EventLog(
            self.name, self.identity.id, self.settings.mesh, form=self.settings.log, writer=self._writer
        )
        self.events.restore(self.place.kept_events())
        for problem in self.journal.problems:
            self.events.emit("journal.damaged", reason=problem)

    def _write_run_file(self) -> None:
        self._run_entry = RunEntry(
            pid=os.getpid(),
            start=psutil.Process().create_time(),
            id=id_text(self.identity.id),
            pub=base64.b64encode(self.identity.pub).decode(),
            name=self.name,
            mesh=self.settings.mesh,
            kind=self.settings.kind,
            addr=addr_text(self.local_addr),
            build=self.build,
        )
        path = self.home.run_file(self.settings.mesh, self.name)
        try:
            write_private(path, msgspec.json.encode(self._run_entry) + b"\n")
        except OSError as why:
            raise LocalError(
                f"run file {path}: {why.strerror}; it needs a disk with room that you can write to"
            ) from why

    def usable_addrs(self, member: Member) -> list[Addr]:
        """Where this node may dial a member: the address that answers first; loopback only on its own host."""
        same_host = member.record.host == self.swim.me.record.host
        addrs = [member.addr] if member.addr else []
        addrs += [(a[0], a[1]) for a in member.record.addrs]
        return [a for a in dict.fromkeys(addrs) if same_host or not addresses.is_loopback(a)]

    # --- what the node is told

    def _persist_incarnation(self, incarnation: int) -> None:
        """Makes it durable before it is told. On a full disk the refutation goes out all the same: a restart that
        comes back too low learns of it from the others, a node that can't refute is dead to them."""
        try:
            self.journal.set_incarnation(incarnation)
        except Refused as why:
            self.journal_refused(why)

    def journal_refused(self, why: Refused) -> None:
        """Counts and tells that something could not be made durable."""
        self.pool.counters[why.code] += 1
        self.events.emit("journal.refused", reason=why.sentence)

    def name_of(self, node: int) -> str:
        """A node's name as this view knows it, or its id."""
        if node == self.identity.id:
            return self.name
        if member := self.swim.members.get(node):
            return member.record.name
        if tombstone := self.swim.tombstones.get(node):
            return tombstone.name
        if remote := self.meshes.directory.find(node):
            return remote.record.name
        return id_text(node)

    def target(self, text: str) -> Member | None:
        """The node with this id (16 hex digits), of any mesh in view, or started by this home; None for this node
        itself; Refused when it is unknown or gone."""
        try:
            node = int(text, 16)
        except ValueError as why:
            raise Refused("unknown", f"{text[:40]!r}: not a node id") from why
        if node == self.identity.id:
            return None
        member = self.swim.members.get(node) or self.meshes.find(node) or self._started(text)
        if member is None:
            raise self.pages.gone(node) or Refused("unknown", f"{text[:40]}: not known to {self.name}")
        return member

    def _started(self, text: str) -> Member | None:
        """A running node of this home that gossip doesn't know (yet), as its run file tells of it."""
        entry = next((e for e in self.home.running() if e.id == text), None)
        if entry is None:
            return None
        pub = base64.b64decode(entry.pub)
        return unmet(pub, entry.mesh, entry.name, entry.kind, [entry.host_port], addresses.host_mark())

    # --- the engine

    @property
    def state(self) -> State:
        """What the node is in, as of the last event folded."""
        return self.engine.loop.life.state

    async def tell(self, event: EngineEvent) -> Transition | None:
        """Hands an event to the engine and waits until it is folded; the record then says what resulted."""
        return await self.engine.tell(event)

    def _on_vitals(self, vitals: Vitals) -> None:
        self.swim.set_vitals(self.engine.counted(vitals), time.monotonic())
        self.engine.vitals(vitals)
        self.pool.flush()
        self.service.changed()

    def synced(self) -> None:
        self.engine.loop.try_publish(EngineSynced())

    def alone(self, reason: str = "nobody to look for") -> None:
        """Alive without anybody else, if the node is still joining."""
        if self.state is State.JOINING and not self.engine.loop.closed:
            self.engine.loop.try_publish(Alone(reason))
            self.meshes.synced()

    def engine_document(self) -> dict[str, Any]:
        """The engine's snapshot with ages as of now, ids shown as names."""
        return self.engine.loop.document(lambda key: self.name_of(key) if isinstance(key, int) else key)

    def counters(self) -> Counter[str]:
        """What was refused or dropped since the start, by code."""
        found: Counter[str] = Counter()
        for counters in (self.port.counters, self.pool.counters, self.swim.counters, self.journal.counters):
            found.update({code: n for code, n in counters.items() if code not in HARMLESS})
        found.update(self.meshes.counters())
        found.update(self.relay.counters)
        found.update({c: n for c, n in self.listener.counters.items() if c not in ("accepted", "links")})
        found.update({c: n for c, n in self.control.counters.items() if c.startswith("refused")})
        found.update(self.admission.counters)
        found.update({c: n for c, n in self.data.counters().items() if "refused" in c or "damaged" in c})
        found.update(self.chains.counters())
        if self._writer.dropped:
            found["log_dropped"] = self._writer.dropped
        return found

    # --- keeping house

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs a task that lives no longer than the node; one that fails ends the node, saying why."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def watch_task(self, task: asyncio.Task[Any]) -> None:
        """Somebody else's task that the node can't do without: one that fails ends the node, saying why."""
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (why := task.exception()) is not None:
            self.events.emit("node.defect", reason=f"{type(why).__name__}: {why}")
            self.request_stop("error", f"{type(why).__name__}: {why}")

    async def _housekeeping(self) -> None:
        """History samples, remembered peers, idle links, and looking for this home's nodes while alone."""
        remembered_at = looked_at = time.monotonic()
        sampled_at = 0.0
        while True:
            alone = not any(m.present for m in self.swim.members.values())
            now = time.monotonic()
            if now - looked_at >= (LOOK_FOR_NODES_ALONE_S if alone else LOOK_FOR_NODES_S):
                looked_at = now
                self.seeds.look(again=alone)
            if now - sampled_at >= HISTORY_PERIOD_S:
                sampled_at = now
                self.pages.view.sample(self.swim.members, self.swim.me)
                for member in (self.swim.me, *self.swim.members.values()):
                    self.hearing.tell_if_stale(member)
                self.contacts.close_idle()
                self.reach.close_idle()
            if now - remembered_at >= REMEMBER_EVERY_S:
                remembered_at = now
                self.seeds.remember()
            await asyncio.sleep(LOOK_FOR_NODES_ALONE_S if alone else HISTORY_PERIOD_S)

    def _watch_stdin(self) -> None:
        """End of file on stdin is a goodbye: whoever started this node is gone."""

        def readable() -> None:
            try:
                data = os.read(0, 4096)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                asyncio.get_running_loop().remove_reader(0)
                self.request_stop("console_exit")

        try:
            os.set_blocking(0, False)
            asyncio.get_running_loop().add_reader(0, readable)
        except (OSError, ValueError, PermissionError):
            self.request_stop("console_exit")

    # --- end

    async def _finish(self, reason: str, by: str | None, op_id: str | None) -> None:
        """Says what is to be said: nothing but the event for an update, else Leaving and the goodbye to everybody."""
        self.meshes.resign(leaving=reason != "update")
        if reason == "update":
            self.wanted.hand_over()
            await self.engine.hand_over_daemons()
        else:
            with contextlib.suppress(QueueFull, LoopClosed):
                if reason != "error":  # what failed here is no reason to end what runs well
                    await self.engine.stop_daemons(by, op_id)
                await self.tell(Leaving(reason=reason, by=by, op_id=op_id))
        event = self.events.emit("node.stopping", reason=reason, by=by, op_id=op_id)
        kept = {k: event[k] for k in ("reason", "by", "op_id")}
        self.journal.append("node.stopping", kept, at_ms=event["at_ms"])
        self.seeds.remember()
        if reason != "update" and self.journal.handover() is not None:
            with contextlib.suppress(Refused):
                self.journal.set_handover(None)  # who leaves in mid-update is not taken up by the next start
        self.journal.flush()
        if reason == "update":
            self.meshes.backbone.updating(UPDATE_DEADLINE_MS)
            self.place.keep_events(self.events.recent())
            return
        self.swim.leave(time.monotonic())
        over_links = asyncio.create_task(self.contacts.goodbye(self.swim.goodbye()))
        on_backbone = asyncio.create_task(self.meshes.backbone.leave())
        self.pool.flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_MAX_S):
                await self.left.wait()
        await asyncio.gather(over_links, on_backbone, return_exceptions=True)

    async def _close(self) -> None:
        """Ends every task and closes everything that was opened, in the reverse order."""
        for task in self._tasks:
            task.remove_done_callback(self._ended)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name, close in (
            ("vitals", "close"),
            ("wanted", "close"),
            ("data", "close"),
            ("engine", "close"),
            ("meshes", "close"),
            ("relay", "close"),
            ("reach", "close"),
            ("contacts", "close"),
            ("listener", "close"),
            ("chains", "close"),
            ("pool", "close"),
            ("port", "close"),
            ("journal", "close"),
            ("_writer", "close"),
        ):
            room = getattr(self, name, None)
            if room is not None:
                with contextlib.suppress(Exception):
                    done = getattr(room, close)()
                    if done is not None:
                        await done
        if not self.replacing and getattr(self, "_run_entry", None) is not None:
            with contextlib.suppress(OSError):
                self.home.run_file(self.settings.mesh, self.name).unlink()
