"""The data room of a node, made from what its composition root has: how members look from here, how they are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agent.data.artifacts import Vouch
from agent.data.desk import OnPut
from agent.data.dropping import ChainHolder
from agent.data.judging import JudgedPut, PutJudge
from agent.data.room import DataRoom
from agent.data.scoring import Candidate
from agent.events import wall_ms
from agent.meshos.events import Event, Id, PeerState
from agent.meshos.maintenance import DRAINING
from agent.meshos.states import MaintenanceState
from discovery.errors import Refused, Unreachable
from discovery.identity import id_text
from discovery.lifecycle import Evidence, State
from discovery.links import Link
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node

ZONE_TAG = "zone"
CONSOLE = "console"
"""Takes no replicas: it goes when its window is closed."""

_MAINTENANCE = {state.value: state for state in MaintenanceState}
_EMPTYING = frozenset(state.value for state in DRAINING)


def data_room_of(
    node: Node,
    place: Path,
    *,
    incarnation: int,
    take_nonce: Callable[[str], bool],
    chains: ChainHolder | None = None,
    exempt: Iterable[str] = ("admin",),
    vouch: Vouch = lambda signer, put: None,
    on_put: OnPut = lambda entry, judged: None,
    stabilising_ms: Callable[[Id], int] = lambda name: 0,
) -> DataRoom:
    """A `DataRoom` that is not started yet. It asks for the node's swim, reach, loop, control and events when they are
    needed, so it may be made before them. `take_nonce`: uses up a nonce of this node's own challenge. LocalError when
    the place can't be used."""
    me, mesh = node.identity.id, node.settings.mesh

    async def link_to(other: int) -> Link:
        member = node.swim.members.get(other)
        if member is None or not member.present:
            raise Unreachable(f"{id_text(other)}: no member that lives")
        link, _ = await node.reach.link_to(member)
        return link

    def members() -> dict[int, Candidate]:
        avoided = node.engine.loop.state.avoid
        seen = {member.id: candidate(member, member.id in avoided) for member in node.swim.members.values()}
        seen[me] = candidate(node.swim.me, False, draining=node.engine.loop.state.draining)
        return seen

    def judge(message: bytes, signature: str, peer: str | None) -> JudgedPut:
        put_judge = PutJudge(
            mesh=mesh,
            target=id_text(me),
            authority=node.operators,
            take_nonce=take_nonce,
            wall_ms=wall_ms,
        )
        try:
            return put_judge(message, signature, peer)
        except Refused as why:
            node.control.refused_put(why, message, signature)
            raise

    return DataRoom(
        place,
        me=me,
        incarnation=incarnation,
        mesh=mesh,
        link_to=link_to,
        members=members,
        left=lambda: [n for n, stone in node.swim.tombstones.items() if stone.evidence is Evidence.LEFT],
        offer=lambda event: (
            node.engine.loop.closed or (node.engine.loop.has_room() and node.engine.loop.try_publish(event))
        ),
        draining=lambda: node.engine.loop.state.draining,
        judge=judge,
        chains=chains,
        exempt=exempt,
        vouch=vouch,
        emit=lambda kind, **fields: node.events.emit(kind, **fields),
        on_put=on_put,
        stabilising_ms=stabilising_ms,
    )


class PeerStates:
    """An event probe (`loop.install_event_probe`): tells the engine what members say of themselves that placement has to
    know, whenever that is news. A draining holder counts no more from then on."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._told: dict[int, PeerState] = {}

    def __call__(self) -> Iterator[Event]:
        members = self._node.swim.members
        for member in members.values():
            state = peer_state(member)
            if self._told.get(member.id, PeerState(member.id)) != state:
                yield state
            self._told[member.id] = state
        for gone in self._told.keys() - members.keys():
            del self._told[gone]


def peer_state(member: Member) -> PeerState:
    """What a member's record says of its willingness to hold things."""
    record = member.record
    maintenance = _MAINTENANCE.get(record.maintenance, MaintenanceState.ACTIVE)
    return PeerState(member.id, record.cordoned, member.state is State.DRAINING, maintenance)


def candidate(member: Member, avoided: bool, *, draining: bool = False) -> Candidate:
    """A member as the scorer sees it."""
    record, vitals = member.record, member.vitals
    shares = (None, None, None) if vitals is None else (vitals.disk, vitals.cpu, vitals.mem)
    disk, cpu, mem = (None if value is None else value / 1000 for value in shares)
    return Candidate(
        member.id,
        record.name,
        live=member.present,
        cordoned=record.cordoned or record.kind == CONSOLE,
        draining=draining or member.state is State.DRAINING or record.maintenance in _EMPTYING,
        avoided=avoided,
        disk=disk,
        cpu=cpu,
        mem=mem,
        rtt_ms=None if member.rtt_s is None else member.rtt_s * 1000,
        zone=record.tags.get(ZONE_TAG, ""),
    )
