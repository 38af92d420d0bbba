"""The data room of a node, made from what its composition root has: how members look from here, how they are reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from agent.data.blobs import Entry
from agent.data.judging import JudgedPut, PutJudge
from agent.data.puts import WIRE_OP, Put
from agent.data.room import DataRoom
from agent.data.scoring import Candidate
from agent.events import wall_ms
from agent.meshos.events import Event, PeerState
from agent.meshos.maintenance import DRAINING
from agent.meshos.states import MaintenanceState
from agent.opmessage import suffices
from discovery.errors import Refused, Unreachable
from discovery.identity import id_text
from discovery.lifecycle import Evidence, State
from discovery.links import Link
from discovery.member import Member
from discovery.sshsig import SignerKey

if TYPE_CHECKING:
    from agent.node import Node

ZONE_TAG = "zone"
CONSOLE = "console"
"""Takes no replicas: it goes when its window is closed."""

_MAINTENANCE = {state.value: state for state in MaintenanceState}
_EMPTYING = frozenset(state.value for state in DRAINING)


def data_room_of(
    node: Node,
    *,
    incarnation: int,
) -> DataRoom:
    """A `DataRoom` that is not started yet. It asks for the node's swim, reach, loop, control and events when they are
    needed, so it may be made before them. LocalError when its directory can't be used."""
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
            take_nonce=lambda nonce: node.control.take_nonce(nonce),
            wall_ms=wall_ms,
        )
        try:
            return put_judge(message, signature, peer)
        except Refused as why:
            node.control.refused_put(why, message, signature)
            raise

    def vouch(signer: SignerKey, put: Put) -> None:
        operator = node.operators.vouch(signer.blob, put.message.issued_at_ms)
        if not suffices(operator.role, "operate"):
            raise Refused("role", f"put needs role operate, {operator.comment} has {operator.role}")

    return DataRoom(
        node.place.path / "artifacts",
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
        chains=node.chains.users,
        exempt=exempt_chains(me),
        vouch=vouch,
        emit=lambda kind, **fields: node.events.emit(kind, **fields),
        on_put=lambda entry, judged: _record_put(node, entry, judged),
        stabilising_ms=lambda name: node.engine.runtime.executor.settling_ms(name),
    )


def exempt_chains(node: int) -> tuple[str, ...]:
    """Chains that a node may hold in maintenance too: the mesh's admin chain, and its own."""
    return ("admin", f"node/{id_text(node)}")


def _record_put(node: Node, entry: Entry, judged: JudgedPut) -> None:
    """Puts an artifact that was put here on record, with what was signed."""
    about = {"op_id": entry.op_id, "op": WIRE_OP, "target": entry.name, "operator": judged.by}
    signed = {"hash": entry.hash, "size": entry.size, "message": entry.message, "signature": entry.signature}
    at_ms = wall_ms()
    node.journal.append("control.op", about | signed, at_ms=at_ms)
    node.journal.append("control.result", about | {"result": "done", "reason": None}, at_ms=at_ms)
    node.events.emit("artifact.put", op_id=entry.op_id, by=judged.by, artifact=entry.name, size=entry.size)


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
