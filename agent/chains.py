"""The chains of one node: its feeds and those it holds for others, the admin chain folded, and what follows from it.

The admin chain says who may what and how the mesh shall be; whatever comes in by any way is folded, and who has to
hear of a change is told (`changed`). The node's own journal is a feed like the others: three members hold a copy, so the
last of a node is read from them when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from agent.chain import audit
from agent.chain.adminchain import AdminChain
from agent.chain.adminstate import AdminState
from agent.chain.adminstate import Spec as SpecInForce
from agent.chain.auditing import Auditing
from agent.chain.feeds import FeedStore
from agent.chain.holding import HOLDERS, node_chain
from agent.chain.journalfeed import JournalFeed
from agent.chain.replicating import Committed, Replicating
from agent.chain.serving import ADMIN
from agent.chain.weighing import NODE_CHAIN
from agent.data.userchains import APPEND, UserChains, is_user_chain
from agent.events import wall_ms
from agent.founding import genesis_of
from agent.opmessage import Op, suffices
from agent.spec.model import FleetSpec
from agent.spec.reading import read_spec
from discovery.errors import LocalError, Refused
from discovery.identity import id_text
from discovery.lifecycle import Evidence

if TYPE_CHECKING:
    from agent.node import Node

COMMIT_WAIT_S = 1.5
"""How long an op waits for a second node to have it; it is done all the same, and told as recorded here alone."""
LAST_WAIT_S = 0.3
LOOK_EVERY_S = 5.0
SAVE_EVERY_S = 60.0
DEAD_KEPT_S = 24 * 3600.0
NODE_ID = re.compile(r"\b[0-9a-f]{16}\b")
GENESIS = "genesis roster"
"""No chain; what the mark of the roster is told under."""
OTHERS_MAX = 10_000
LISTED = 8


class Chains:
    """Made before the node listens; `begin` folds what is there, `run` keeps it alike with others."""

    def __init__(self, node: Node, on_spec: Callable[[FleetSpec], None]) -> None:
        self._node = node
        self._on_spec = on_spec
        me, mesh = node.identity.id, node.settings.mesh
        self.store = FeedStore(node.place.path / "chains.db", node.identity, mesh)
        self.journal = JournalFeed(node.journal, node.identity.pub, node_chain(me))
        self.replicas = Replicating(
            self.store,
            me=me,
            members=lambda: node.swim.members,
            call=lambda member, method, params, timeout_s: node.contacts.call(
                member, method, params, timeout_s
            ),
            journal=self.journal,
        )
        self.users = UserChains(
            self.replicas,
            me=me,
            mesh=mesh,
            members=lambda: node.swim.members,
            signed=self._signed,
            name_of=node.name_of,
            ready=lambda: node.engine.loop.life.joined and not node.stopping,
        )
        self.store.changed = self._changed
        genesis = genesis_of(node.home, mesh)
        self._genesis = _mark(genesis)
        self._other_genesis: set[int] = set()
        """Members whose mesh began with another roster than this node's."""
        self.admin = AdminChain(self.store, self.replicas, node.identity, mesh, genesis)
        self.audit = Auditing(self.admin, self.store, node.journal, own=node_chain(me), me=me)
        self.spec = FleetSpec()
        """In force here."""
        self.spec_of: SpecInForce | None = None
        self._unread: SpecInForce | None = None
        self._meant: SpecInForce | None = None
        """By the admin chain, whether its content is here and can be read or not."""
        self._look_at: asyncio.Event = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self) -> None:
        """Folds what is on disk."""
        await self.admin.load()
        self._look_at_spec(self.admin.state())

    async def run(self) -> None:
        """Keeps chains alike, for ever."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self.replicas.run())
            both.create_task(self._folding())
            both.create_task(self.users.run())

    async def _folding(self) -> None:
        """Folds what is new as it comes; and once in a while all the same, as records dated ahead come to count. Tells
        each problem once."""
        saved_at = time.monotonic()
        told: list[str] = []
        while True:
            problems = self._problems_of_store()
            for problem in problems:
                if problem not in told:
                    self._node.events.emit("chains.damaged", reason=problem)
            told = problems
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._look_at.wait()
            self._look_at.clear()
            self._look_at_spec(await self.admin.catch_up())
            self.audit.forget()
            if time.monotonic() - saved_at >= SAVE_EVERY_S:
                saved_at = time.monotonic()
                await self.admin.save()

    async def close(self) -> None:
        """Ends what is under way; what was answered is on disk."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.replicas.stop()
        with contextlib.suppress(Refused, TimeoutError):
            async with asyncio.timeout(1.0):
                await self.admin.save()
        await self.store.close()

    def note(self) -> Any:
        """What goes into each push/pull: the roster that the mesh began with, and the mark of each chain kept here."""
        return [[GENESIS, self._genesis], *self.replicas.note()]

    def heard(self, node: int, note: Any, *, act: bool = False) -> None:
        """What a member put into one."""
        self.replicas.heard(node, note, act=act)
        match note:
            case [[str(first), bytes(mark)], *_] if first == GENESIS:
                self._compare(node, mark)

    def _compare(self, node: int, genesis: bytes) -> None:
        """Tells, once, of a member that began with another roster: it will judge the same records otherwise."""
        if genesis == self._genesis:
            self._other_genesis.discard(node)
        elif node not in self._other_genesis and len(self._other_genesis) < OTHERS_MAX:
            self._other_genesis.add(node)
            name = self._node.name_of(node)
            why = f"{name} began with another roster than {self._node.name}: compare genesis_operators"
            self._node.events.emit("roster.differs", other=name, reason=why)

    # --- what counts

    def _changed(self, chain: str) -> None:
        if chain == ADMIN:
            self._look_at.set()
        self.users.changed(chain)

    def _signed(self, signer: Any, op: Op) -> str:
        """The operator who signed for a record of a user's chain. Refused unless that key might, by the roster or this
        host's own file."""
        operator = self._node.operators.vouch(signer.blob, op.message.issued_at_ms)
        if not suffices(operator.role, op.role):
            raise Refused("role", f"{op.verb} needs role {op.role}, {operator.comment} has {operator.role}")
        return str(operator.comment)

    def _look_at_spec(self, state: AdminState) -> None:
        wanted = self._meant = state.spec
        if (
            wanted is None and self.spec_of is not None
        ):  # what was in force is void, and there was none before it
            gone, self.spec, self.spec_of = self.spec_of, FleetSpec(), None
            self._node.events.emit("spec.void", op_id=gone.op_id, by=gone.by)
            self._on_spec(self.spec)
        if wanted is None or wanted in (self.spec_of, self._unread):
            return
        content = self.admin.content(wanted)
        if content is None:
            return  # it is fetched again, and looked at when it comes
        try:
            spec = read_spec(content.decode("utf-8", "replace"), in_force=True)
        except LocalError as why:
            self._unread = wanted
            self._node.events.emit("spec.unreadable", op_id=wanted.op_id, by=wanted.by, reason=str(why))
            return
        self.spec, self.spec_of = spec, wanted
        self._node.events.emit("spec.applied", op_id=wanted.op_id, by=wanted.by)
        self._on_spec(spec)

    @property
    def spec_missing(self) -> bool:
        """Whether this node knows that there is a spec, and none that it could act by: the content has not come yet, or
        it was written for a later build."""
        return self._meant is not None and self.spec_of is None

    # --- committing

    async def commit(
        self, op: Op, message: bytes, signature: str, by: str, content: bytes | None = None
    ) -> Committed:
        """Puts an op that this node has judged on the admin chain, or what it appends on the user's chain that it names.
        Refused where the mesh's roster or the chain's rules say no; then nothing was written."""
        if op.verb == APPEND:
            return await self.users.append(op, message, signature, by, content)
        if op.verb == "apply":
            self._check_spec(op, content)
        committed: Committed = await self.admin.commit_op(
            message, signature, by, content, timeout_s=COMMIT_WAIT_S
        )
        self._look_at_spec(await self.admin.catch_up())
        return committed

    def _check_spec(self, op: Op, content: bytes | None) -> None:
        if content is None:
            raise Refused("malformed", "apply_spec: the spec did not come with it")
        base = getattr(op.args, "base", None)
        held = self.spec_of
        if base is not None and base != (held.op_id if held is not None else ""):
            who = f"by {held.by}" if held is not None else "none"
            raise Refused("superseded", f"another spec is in force now ({who}); look at the difference again")
        try:
            read_spec(content.decode("utf-8"))
        except (LocalError, UnicodeDecodeError) as why:
            raise Refused("bad_spec", str(why)) from why

    async def result(self, op_id: str, verb: str, result: str, reason: str | None, *, last: bool) -> None:
        """Puts what became of an op beside it, where that is the admin chain. `last`: the process is about to end, so
        it is waited for."""
        if verb == APPEND:
            return
        work = asyncio.ensure_future(self.admin.commit_result(op_id, verb, result, reason))
        self._tasks.add(work)
        work.add_done_callback(self._done)
        if last:
            await asyncio.wait([work], timeout=LAST_WAIT_S)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (why := task.exception()) is not None:
            if isinstance(why, Refused):
                self._node.journal_refused(why)
            else:
                self._node.events.emit("node.defect", reason=f"{type(why).__name__}: {why}")

    async def own(self, verb: str, **fields: Any) -> None:
        """Puts this node's word on itself there. Refused when it can't be written."""
        await self.admin.commit_own(verb, **fields)

    # --- looking

    def by_name(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row of an audit with names for ids."""
        for key in ("target", "node"):
            if isinstance(text := row[key], str) and NODE_ID.fullmatch(text):
                row[key] = self._node.name_of(int(text, 16))
        return row

    def operators(self) -> list[dict[str, Any]]:
        """The roster, and the keys that were revoked."""
        state = self.admin.state()
        return audit.operators(state, {key: self.admin.last_of(key) for key in state.roster})

    def own_rows(self) -> list[list[Any]]:
        """What this node has of each chain it keeps: `[name, bytes, records, missing]`."""
        return [
            [row["chain"], row["bytes"], row["records"], row["missing"]]
            for row in self.replicas.rows()
            if row["kept"] and row["records"]
        ]

    def rows(self, told: Mapping[int, list[list[Any]]]) -> list[dict[str, Any]]:
        """Rows of `qd chains` for the mesh's own chains. `told`: `own_rows` of each live node, by its id. Users' chains
        are `sized`: who holds them is the data room's to say."""
        node = self._node
        live = set(told)
        found: dict[str, dict[int, list[Any]]] = {}
        for holder, rows in told.items():
            for row in rows:
                found.setdefault(row[0], {})[holder] = row
        shown = []
        for chain, holders in sorted(found.items()):
            if is_user_chain(chain):
                continue
            writer = int(chain.removeprefix(NODE_CHAIN), 16) if chain.startswith(NODE_CHAIN) else None
            desired = len(live) if writer is None else min(HOLDERS, len(live - {writer})) + (writer in live)
            sizes = [row[1] for row in holders.values() if row[1] is not None]
            shown.append(
                {
                    "name": chain if writer is None else f"{NODE_CHAIN}{node.name_of(writer)}",
                    "kind": "chain",
                    "mesh": node.settings.mesh,
                    "held": len(holders),
                    "desired": desired,
                    "leader": None if writer is None or writer not in live else node.name_of(writer),
                    "holders": sorted(node.name_of(holder) for holder in holders),
                    "size": max(sizes, default=None),
                    "hash": None,
                    "stabilising_ms": 0,
                    "pulls": [],
                    "records": max(row[2] for row in holders.values()),
                    "missing": sum(row[3] for row in holders.values()),
                }
            )
        return shown

    def unheld(self) -> list[dict[str, Any]]:
        """Rows of `qd chains` for those of the spec that nobody holds, with what each waits for."""
        empty: dict[str, Any] = {
            "leader": None,
            "holders": [],
            "size": None,
            "hash": None,
            "stabilising_ms": 0,
            "pulls": [],
        }
        return [
            {"name": name, "kind": "chain", "mesh": self._node.settings.mesh, "held": 0, "desired": count}
            | empty
            | {"records": 0, "missing": 0, "held_back": why}
            for name, (count, why) in self.users.unheld().items()
        ]

    @staticmethod
    def sized(row: dict[str, Any], told: Mapping[int, list[list[Any]]]) -> dict[str, Any]:
        """A row of the data room, with how much its holders told of it where it is a chain."""
        if row["kind"] != "chain":
            return row
        found = [own for rows in told.values() for own in rows if own[0] == row["name"]]
        size = max((own[1] for own in found if own[1] is not None), default=0)
        records = max((own[2] for own in found), default=0)
        return {**row, "size": size, "records": records, "missing": sum(own[3] for own in found)}

    def reach(self) -> dict[str, list[str]]:
        """Which live members have the spec in force, as far as this node knows: it does where it committed it."""
        held, node = self.spec_of, self._node
        if held is None or held.position.node != node.identity.id:
            return {"reached": [node.name] if held is not None else [], "missed": []}
        having = set(self.replicas.having(ADMIN, held.position.number))
        others = {m.id: m.record.name for m in node.swim.members.values() if m.present}
        reached = [name for other, name in others.items() if other in having]
        missed = [name for other, name in others.items() if other not in having]
        return {"reached": sorted([node.name, *reached]), "missed": sorted(missed)}

    async def latest(self, node: int) -> dict[str, Any]:
        """The last of a node, from whoever holds its action chain. Refused `unknown`."""
        return await self.replicas.latest(node)

    def failures_of_dead(self) -> list[dict[str, Any]]:
        """The failure rings of nodes that died, as far as their chains are held here."""
        node = self._node
        now = time.monotonic()
        dead = {
            member.id: member.record.name for member in node.swim.members.values() if not member.present
        } | {
            gone: stone.name
            for gone, stone in node.swim.tombstones.items()
            if stone.evidence is not Evidence.LEFT and now - stone.at < DEAD_KEPT_S
        }
        rows: list[dict[str, Any]] = []
        for gone, name in dead.items():
            box = self.replicas.latest_here(gone)
            for failure in box.failures if box is not None else ():
                row = {
                    **failure,
                    "age_ms": max(0, wall_ms() - failure["at_ms"]),
                    "node": name,
                    "node_id": id_text(gone),
                    "mesh": node.settings.mesh,
                    "from_replica": node.name,
                }
                until_ms = row.get("until_ms")
                row["until_ms"] = None if until_ms is None else max(0, until_ms - wall_ms())
                rows.append(row)
        return rows

    def problems(self) -> list[str]:
        """What was found damaged, or can't agree, a line each."""
        found = self._problems_of_store()
        if others := sorted(self._node.name_of(node) for node in self._other_genesis):
            names = ", ".join(others[:LISTED]) + (
                f" and {len(others) - LISTED} more" * (len(others) > LISTED)
            )
            path = self._node.home.mesh_genesis_file(self._node.settings.mesh)
            found.append(f"{names}: began with another roster than this node; compare {path} on both")
        return found

    def _problems_of_store(self) -> list[str]:
        return [
            NODE_ID.sub(lambda id: self._node.name_of(int(id[0], 16)), said) for said in self.store.problems
        ]

    def counters(self) -> dict[str, int]:
        counters = self.store.counters.items()
        found = {f"chain.{c}": n for c, n in counters if "refused" in c or c == "unsupported_version"}
        found |= {f"chain.{code}": n for code, n in self.replicas.counters.items() if code == "malformed"}
        return found


def _mark(genesis: str) -> bytes:
    """The same for rosters that say the same."""
    lines = sorted({line.strip() for line in genesis.splitlines() if line.strip() and line.strip()[0] != "#"})
    return hashlib.sha256("\n".join(lines).encode()).digest()[:8]
