"""The data room of one node, wired: what its composition root makes, calls, and serves.

room = DataRoom(…)                  reads what is on disk
room.start()                        tells the engine, begins to scrub
methods()                           for the listener and the node's own links
note(), heard(node, note)           into and out of each push/pull
members_changed()                   whenever the view of members changed
dispatch(action)                    from the executor's dispatcher; True: it was one of ours
scorer                              for `install_scorer`
holds(item), keep(item), lost(kind, name)   what the node's chains gain and lose
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from agent.data.announcing import Announcer
from agent.data.artifacts import Artifacts, Vouch
from agent.data.blobs import RESERVE_BYTES, BlobStore, Entry
from agent.data.desk import ArtifactDesk, Judge, OnPut
from agent.data.dropping import ChainHolder
from agent.data.holdings import Holdings, Item, Key, Kind, Own
from agent.data.placing import Placing
from agent.data.scoring import Candidate
from agent.data.scrub import BYTES_PER_S, Scrub
from agent.data.serving import Serving
from agent.meshos.actions import Action
from agent.meshos.events import Event, Id, LocalReplicaIntent
from discovery.links import Handler, Link

BEAT_S = 1.0
"""How often goodbyes that are long enough ago, and a drain, are looked at when nothing else happens."""

_log = logging.getLogger(__name__)

OFFER_AGAIN_S = 0.02
"""How soon the engine is offered again what it had no room for."""

Emit = Callable[..., Any]
"""`(kind, **fields)`: an event of this node, for people."""


class DataRoom:
    """Everything above, of one node.

    `link_to(node)`: a link to a member, dialled if need be. `members()`: all members of the mesh as this node sees them,
    by id, itself too; gone ones may be there with `live` False. `left()`: ids of members that said goodbye.
    `offer(event)`: to the engine; False when it has no room now, and then it is offered again. `draining()`: whether
    this node is to become or stay empty. `chains`: who holds chains. `vouch`: whose puts are copied here.
    """

    def __init__(
        self,
        place: Path,
        *,
        me: int,
        incarnation: int,
        mesh: str,
        link_to: Callable[[int], Awaitable[Link]],
        members: Callable[[], Mapping[int, Candidate]],
        offer: Callable[[Event], bool],
        draining: Callable[[], bool],
        judge: Judge,
        left: Callable[[], Iterable[int]] = lambda: (),
        chains: ChainHolder | None = None,
        exempt: Iterable[str] = ("admin",),
        emit: Emit = lambda kind, **fields: None,
        on_put: OnPut = lambda entry, judged: None,
        vouch: Vouch = lambda signer, put: None,
        stabilising_ms: Callable[[Id], int] = lambda name: 0,
        reserve_bytes: int = RESERVE_BYTES,
        scrub_bytes_per_s: float = BYTES_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self._members = members
        self._left = left
        self._offer = offer
        self._outbox: deque[Event] = deque()
        """For the engine, in order."""
        self._pump: asyncio.Task[None] | None = None
        self._emit = emit
        self._clock = clock
        self._live: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._news_due = False
        self.own_counters: Counter[str] = Counter()
        """`beat_failed`."""
        self.own = Own(incarnation)
        self.holdings = Holdings(me)
        self.store = BlobStore(place, reserve_bytes)
        self.announcer = Announcer(
            self.own, self.holdings, link_to=link_to, live=lambda: self._live, changed=self._changed
        )
        self.artifacts = Artifacts(
            self.store,
            self.own,
            mesh=mesh,
            link_to=link_to,
            name_of=self._name_of,
            changed=self._own_changed,
            damaged=self._told_damaged,
            vouch=vouch,
            disbelieve=self._disbelieve,
        )
        holders: dict[Kind, ChainHolder] = {"artifact": self.artifacts}
        if chains is not None:
            holders["chain"] = chains
        self.placing = Placing(
            me=me,
            own=self.own,
            holdings=self.holdings,
            holders=holders,
            members=members,
            call=self._call_to(link_to),
            learn=self.announcer.learn,
            tell=self._tell,
            draining=draining,
            exempt=tuple(exempt),
            check=self._check,
            room_for=self.store.room_for,
            clock=clock,
        )
        self.scrub = Scrub(self.store, self._found_damaged, bytes_per_s=scrub_bytes_per_s)
        self.serving = Serving(self.store, suspect=self.scrub.suspect)
        self.desk = ArtifactDesk(
            me=me,
            mesh=mesh,
            artifacts=self.artifacts,
            holdings=self.holdings,
            placing=self.placing,
            serving=self.serving,
            judge=judge,
            members=members,
            link_to=link_to,
            tell=self._tell,
            draining=draining,
            on_put=on_put,
            stabilising_ms=stabilising_ms,
            reserved=frozenset(exempt),
        )

    def methods(self) -> Mapping[str, Handler]:
        """What this room serves; who may call what is judged by each."""
        rooms = (self.announcer, self.placing, self.serving, self.desk)
        return {name: method for room in rooms for name, method in room.methods().items()}

    @property
    def scorer(self) -> Callable[[Id], Mapping[Id, float | None]]:
        return self.placing.scorer

    def start(self) -> None:
        """Tells the engine what is here, and begins to look after it. What shall be held here, and isn't whole, is
        fetched again by the engine's own PullReplica."""
        for entry in self.store.entries():
            if entry.replicas:
                self._tell(LocalReplicaIntent(entry.name, "hold"))
        self._own_changed()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._beat(), name="data beat"),
            loop.create_task(self.scrub.run(), name="data scrub"),
        ]

    async def close(self) -> None:
        """Ends what is under way. What was got of a copy on its way is kept."""
        tasks = [*self._tasks, self._pump] if self._pump is not None else self._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.placing.close()
        await self.announcer.close()

    # --- for the composition root

    def note(self) -> Any:
        """What to put into a push/pull, under a key of its own."""
        return self.announcer.note()

    def heard(self, node: int, note: Any, *, act: bool = False) -> None:
        """What a member put into one; None where it put nothing. What is news is asked for either way."""
        self.announcer.heard(node, note)

    def members_changed(self) -> None:
        """The view of members changed: who is new is asked, who is gone leads no more."""
        live = {node for node, seen in self._members().items() if seen.live and node != self.me}
        met, self._live = live - self._live, live
        self.holdings.live(live, self._left(), int(self._clock() * 1000))
        for node in met:
            self.announcer.met(node)
        self._changed()

    def spec(self, counts: Mapping[Key, int]) -> None:
        """How many shall hold what, by the spec in force: `{("artifact", NAME): 3, ("chain", NAME): 3}`."""
        self.holdings.spec(counts)
        self._changed()

    def holds(self, item: Item) -> None:
        """This node holds a chain, or another count or version of it is so now."""
        if self.own.add(item):
            self._own_changed()

    def keep(self, item: Item) -> None:
        """As `holds`, and by this node's own will: it goes on until the engine decides otherwise."""
        self._tell(LocalReplicaIntent(item.name, "hold"))
        self.holds(item)

    def candidates(self) -> Mapping[int, Candidate]:
        """Every node of the mesh as placement sees it, this one too, by id."""
        return self._members()

    def lost(self, kind: Kind, name: str) -> None:
        """This node holds it no longer."""
        if self.own.remove(kind, name):
            self._own_changed()

    async def dispatch(self, action: Action) -> bool:
        """Carries an action out, if it is about replicas; DispatchError when it can't be done (now)."""
        return await self.placing.dispatch(action)

    def counters(self) -> dict[str, int]:
        """What was counted since the start, by room: `data.ROOM.WHAT`."""
        rooms: dict[str, Counter[str]] = {
            "store": self.store.counters,
            "announcer": self.announcer.counters,
            "artifacts": self.artifacts.counters,
            "placing": self.placing.counters,
            "serving": self.serving.counters,
            "desk": self.desk.counters,
            "holdings": self.holdings.counters,
            "room": self.own_counters,
        }
        return {
            f"data.{room}.{what}": number for room, counts in rooms.items() for what, number in counts.items()
        }

    # --- inside

    def _tell(self, event: Event) -> None:
        """Tells the engine, in the order of telling, as soon as it has room: nothing is lost however much comes at
        once."""
        self._outbox.append(event)
        if (self._pump is None or self._pump.done()) and not self._flush():
            self._pump = asyncio.get_running_loop().create_task(self._pumping(), name="data events")

    def _flush(self) -> bool:
        outbox = self._outbox
        while outbox and self._offer(outbox[0]):
            outbox.popleft()
        return not outbox

    async def _pumping(self) -> None:
        while True:
            await asyncio.sleep(OFFER_AGAIN_S)
            if self._flush():
                return

    def _own_changed(self) -> None:
        self.announcer.push()
        self._changed()

    def _changed(self) -> None:
        """Has the engine told of what is new, once for all that happens now."""
        if not self._news_due:
            self._news_due = True
            asyncio.get_running_loop().call_soon(self._news)

    def _news(self) -> None:
        self._news_due = False
        self.holdings.own(self.own)
        for event in self.holdings.events():
            self._tell(event)
        self.placing.settle()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                self.members_changed()
            except Exception:
                self.own_counters["beat_failed"] += 1
                _log.debug("the data room's beat failed", exc_info=True)

    def _call_to(self, link_to: Callable[[int], Awaitable[Link]]) -> Any:
        async def call(node: int, method: str, params: Any, timeout_s: float) -> Any:
            link = await link_to(node)
            return await link.call(method, params, timeout_s)

        return call

    def _name_of(self, node: int) -> str:
        seen = self._members().get(node)
        return seen.name if seen is not None and seen.name else f"{node:016x}"

    async def _check(self, key: Key, nodes: list[int]) -> None:
        if key[0] == "artifact":
            await self.artifacts.check(key[1], nodes)

    def _disbelieve(self, name: str, node: int) -> None:
        self.holdings.disbelieve(("artifact", name), node)
        self._changed()

    def _told_damaged(self, source: str, name: str, chunk: int) -> None:
        with contextlib.suppress(Exception):
            self._emit("artifact.bad_chunk", source=source, reason=f"{name}: chunk {chunk} came damaged")

    def _found_damaged(self, entry: Entry, chunk: int | None) -> None:
        """The scrub took a blob out of use: the engine pulls it again, for it shall be held here."""
        what = "the list of its chunks" if chunk is None else f"chunk {chunk}"
        self.artifacts.lost(entry.hash)
        with contextlib.suppress(Exception):
            self._emit("artifact.damaged", reason=f"{entry.name}: {what} is damaged; fetched again")


__all__ = ["DataRoom"]
