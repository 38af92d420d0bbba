"""What a node's key ring and its desk for newcomers are made of: the two rooms know nothing of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.addresses import is_loopback
from agent.admission import Admission, Bundle, key_mark
from agent.founding import SEEDS_MAX, bundle_of
from agent.home import read_identity, read_secret
from agent.keyring import Kept, KeyFile
from agent.rotation import Rotation
from discovery.errors import LocalError, Refused
from discovery.identity import Identity
from discovery.member import Addr

if TYPE_CHECKING:
    from agent.node import Node


def key_file(node: Node) -> KeyFile:
    """Where the keys of the node's mesh are kept."""
    mesh = node.settings.mesh
    return KeyFile(node.home.mesh_key_file(mesh), mesh)


def rotation_of(node: Node, kept: Kept) -> Rotation:
    """The key ring of a node; `kept` is what its file held at the start."""
    return Rotation(
        key_file(node),
        kept,
        me=node.identity.id,
        identity=lambda: _mesh_identity(node),
        members=lambda: node.swim.members,
        call=lambda *asked: node.contacts.call(*asked),
        emit=node.events.emit,
    )


def admission_of(node: Node) -> Admission:
    """The desk of a node that has its key ring, its members and its journal."""
    home, mesh = node.home, node.settings.mesh

    def addrs() -> list[Addr]:
        mine = [(host, port) for host, port in node.swim.me.record.addrs]
        return [a for a in mine if not is_loopback(a)] or mine

    def seeds() -> list[Addr]:
        """Where others are, for the day on which this node is not; loopback where this node has nothing else."""
        local = all(map(is_loopback, addrs()))
        found = [*addrs()]
        for member in node.swim.members.values():
            where = [member.addr] if member.addr else []
            where += [(host, port) for host, port in member.record.addrs]
            found += [a for a in where if member.present and (local or not is_loopback(a))][:1]
        return list(dict.fromkeys(found))[:SEEDS_MAX]

    def glance() -> dict[str, Any]:
        backbone = home.backbone_key_file
        try:
            mark = key_mark(read_secret(backbone, "backbone key")) if backbone.exists() else None
            pub = _mesh_identity(node).pub
        except LocalError as why:
            raise Refused("incomplete", str(why)) from why
        return {
            "mesh": mesh,
            "node": node.name,
            "mesh_pub": pub,
            "ring": node.keys.ring.order,
            "backbone": mark,
        }

    def bundle() -> Bundle:
        try:
            return bundle_of(home, mesh, node.keys.parcel(), seeds())
        except LocalError as why:
            raise Refused("incomplete", str(why)) from why

    return Admission(
        mesh=mesh,
        host_pub=node.identity.pub,
        facts=node.journal,
        addrs=addrs,
        glance=glance,
        bundle=bundle,
        emit=node.events.emit,
    )


def _mesh_identity(node: Node) -> Identity:
    mesh = node.settings.mesh
    return read_identity(node.home.mesh_identity_file(mesh), f"identity of mesh {mesh}")
