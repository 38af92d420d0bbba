"""Who may command this node: by the operators file of its host, or by the roster of its mesh.

The file is its host's to write and counts for ops on that host alone; a key that it knows under conditions (an
address, an expiry) has to meet them. The roster counts on every node. Of the two roles the greater one counts. A
key that the mesh revoked may nothing, whatever a file says.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.chain.adminstate import AdminState, Grant, grant_of
from agent.operators import Line, Operator, Operators, judge
from agent.opmessage import suffices
from discovery.errors import Refused, RemoteError
from discovery.sshkey import CERT_TYPES, Certificate, PublicKey, Reader, blob_of


class Authority:
    """Judges keys for one node. `state()`: what the admin chain says now."""

    def __init__(self, file: Operators, state: Callable[[], AdminState]) -> None:
        self._file = file
        self._state = state
        self._lines: dict[str, Line] = {}

    @property
    def problems(self) -> list[str]:
        """What is wrong with the operators file, a line each."""
        return self._file.problems

    def judge(self, key: str | bytes, peer_addr: str | None, now_ms: int) -> Operator:
        """The operator of a key or certificate. Refused as `operators.judge`, and `revoked`."""
        return self._judge(key, peer_addr, now_ms, carried=False)

    def vouch(self, key: bytes, issued_at_ms: int) -> Operator:
        """As `judge`, for what was taken in by another node, which judged where it came from."""
        return self._judge(key, None, issued_at_ms, carried=True)

    def lookup(self, key: str | bytes, peer_addr: str | None, now_ms: int) -> Operator | None:
        """As `judge`, None when refused."""
        try:
            return self.judge(key, peer_addr, now_ms)
        except Refused:
            return None

    def name_of(self, blob: bytes) -> str | None:
        """Who a key is, whether or not it would be let in now; None when not known."""
        if (name := self._file.name_of(blob)) is not None:
            return name
        roster = self._state().roster
        return next((roster[key].comment for key in _fingerprints(blob) if key in roster), None)

    def _judge(self, key: str | bytes, peer_addr: str | None, now_ms: int, *, carried: bool) -> Operator:
        state = self._state()
        try:
            blob = blob_of(key) if isinstance(key, str) else key
        except RemoteError as why:
            raise Refused("unknown_key", f"not a key: {why}") from why
        for fingerprint in _fingerprints(blob):
            if (cut := state.cuts.get(fingerprint)) is not None:
                raise Refused("revoked", f"key {fingerprint} was revoked by {cut.by}")
        try:
            found = self._file.judge(blob, peer_addr, now_ms)
        except Refused as why:
            if why.code != "unknown_key":
                raise
            try:
                return judge(self._roster(state, carried), blob, peer_addr, now_ms)
            except Refused as other_why:
                if other_why.code != "unknown_key":
                    raise
                raise Refused(why.code, f"{why.sentence}, nor in the mesh's roster") from why
        try:
            other = judge(self._roster(state, carried), blob, peer_addr, now_ms)
        except Refused:
            return found
        return found if suffices(found.role, other.role) else other

    def _roster(self, state: AdminState, carried: bool) -> list[Line]:
        return [self._line(grant, carried) for grant in state.roster.values()]

    def _line(self, grant: Grant, carried: bool) -> Line:
        key = f"{carried:d}{grant.line}"
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) > 2 * len(self._state().roster) + 64:
                self._lines.clear()
            line = self._lines[key] = grant_of(grant.line)[1]
            if carried:
                line.sources = None
        return line


def _fingerprints(blob: bytes) -> list[str]:
    """Of a key; of a certificate, of the key in it and of its authority. None where it is neither."""
    try:
        if Reader(blob).text() in CERT_TYPES:
            certificate = Certificate.parse(blob)
            return [certificate.key.fingerprint, certificate.ca.fingerprint]
        return [PublicKey.parse(blob).fingerprint]
    except RemoteError:
        return []
