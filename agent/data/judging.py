"""Whether a put may be: the judgement of `agent.control`, in the same order, for the one op that carries a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.control import SIGNATURE_MAX_BYTES, Authority
from agent.data.puts import ROLE, Put, decode_put, judge_times
from agent.opmessage import MESSAGE_MAX_BYTES, NAMESPACE, suffices
from discovery import sshsig
from discovery.errors import Refused


@dataclass(frozen=True)
class JudgedPut:
    """A put that may be. `by`: the operator's name; `fingerprint`: of the key that signed."""

    put: Put
    by: str
    fingerprint: str


class PutJudge:
    """Judges puts for one node. `take_nonce(nonce)`: whether this node gave it out and nobody used it; it is used now.
    `known(op_id)`: the hash that a put of this op id was for, if one was taken in here."""

    def __init__(
        self,
        *,
        mesh: str,
        target: str,
        authority: Authority,
        take_nonce: Callable[[str], bool],
        wall_ms: Callable[[], int],
        verify: Callable[[bytes, str, str], Any] = sshsig.verify,
    ) -> None:
        self._mesh = mesh
        self._target = target
        self._authority = authority
        self._take_nonce = take_nonce
        self._wall_ms = wall_ms
        self._verify = verify

    def __call__(self, message: bytes, signature: str, peer_addr: str | None) -> JudgedPut:
        """Refused at the first miss, with the codes of `agent.control`."""
        if len(message) > MESSAGE_MAX_BYTES or len(signature) > SIGNATURE_MAX_BYTES:
            raise Refused("too_large", "a put and its signature of at most 16 KiB each are read")
        signer = self._verify(message, signature, NAMESPACE)
        now_ms = self._wall_ms()
        operator = self._authority.judge(signer.blob, peer_addr, now_ms)
        operator.check_presence(getattr(signer, "flags", None))
        put = decode_put(message)
        asked = put.message
        if asked.mesh != self._mesh:
            raise Refused("wrong_mesh", f"the put is for mesh {asked.mesh}, this is {self._mesh}")
        if asked.target != self._target:
            raise Refused("wrong_target", f"the put is for node {asked.target}, this is {self._target}")
        if not suffices(operator.role, ROLE):
            raise Refused("role", f"put needs role {ROLE}, {operator.comment} has {operator.role}")
        judge_times(put, now_ms)
        if not self._take_nonce(asked.nonce):
            raise Refused(
                "unknown_nonce",
                "the nonce was not given out here in the last 120 s, or was used; ask again",
            )
        return JudgedPut(put, operator.comment, signer.fingerprint)
