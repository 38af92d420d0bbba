"""Who is at the other end of a new link, by the key it logs in with; and who was refused."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, cast

from agent.events import wall_ms
from agent.home import read_identity
from discovery.errors import LocalError
from discovery.identity import node_id, openssh_blob, openssh_pub
from discovery.links import Link, Login
from discovery.links.limits import LoginKind, Role
from discovery.member import Addr, Member, addr_text
from discovery.sshkey import fingerprint

if TYPE_CHECKING:
    from agent.node import Node

LOGINS_TOLD_A_MINUTE = 30


class Logins:
    """What the listener asks of its node: who may have a link, which of them to keep, whom it has turned away."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._refused: deque[float] = deque()
        self._client_pub = self._read_client_pub()

    def _read_client_pub(self) -> bytes | None:
        """The key with which commands of this home log in, if the home has one."""
        try:
            return read_identity(self._node.home.client_key_file, "client key").pub
        except LocalError as why:
            self._node.events.emit("login.refused", reason=str(why))
            return None

    def authorise(self, key_line: str, username: str, peer: Addr) -> Login | None:
        """A member, the home's own client, an operator, a newcomer with an invitation, a listed mesh, or a member of
        the backbone; None for everybody else."""
        node, pub = self._node, openssh_pub(key_line)
        print_ = fingerprint(openssh_blob(key_line))
        if username == "op":
            operator = node.operators.lookup(key_line, peer[0], wall_ms())
            if operator is None:
                return None
            role = cast("Role", operator.role)
            return Login("op", None, pub, print_, role, key_line, operator.verify_required)
        if pub is None:
            return None
        if username == "member":
            return _member("member", node.swim.members.get(node_id(pub)), pub, print_, key_line)
        if username == "backbone":
            return _member("backbone", node.meshes.backbone.member(node_id(pub)), pub, print_, key_line)
        if username == "home" and pub == self._client_pub:
            return Login("home", None, pub, print_, None, key_line)
        if username == "join" and node.admission.admits(pub, peer):
            return Login("join", None, pub, print_, None, key_line)
        if username == "mesh":
            listed = node.meshes.listed.role_of(key_line, pub, peer[0], wall_ms())
            return None if listed is None else Login("mesh", None, pub, print_, listed, key_line)
        return None

    def opened(self, link: Link) -> None:
        """Keeps the links of members, which serve both ways."""
        if link.login.kind == "member":
            self._node.contacts.adopt(link)
        elif link.login.kind == "backbone":
            self._node.meshes.backbone.adopt(link)

    def refused(self, code: str, addr: Addr, print_: str | None) -> None:
        """Tells of a connection that became no link, at most LOGINS_TOLD_A_MINUTE times; all are counted."""
        now = time.monotonic()
        while self._refused and self._refused[0] < now - 60:
            self._refused.popleft()
        if code == "closed_early" or len(self._refused) >= LOGINS_TOLD_A_MINUTE:
            return
        self._refused.append(now)
        self._node.events.emit("login.refused", reason=code, addr=addr_text(addr), key=print_)


def _member(kind: LoginKind, member: Member | None, pub: bytes, print_: str, key_line: str) -> Login | None:
    if member is None or member.record.pub != pub:
        return None
    return Login(kind, member.id, pub, print_, None, key_line)
