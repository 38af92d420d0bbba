"""Ops served to operators: judge, make durable, apply once, answer.

The order of judgement, each step on what the ones before it proved (codes of refusal in brackets):

 1. size, shape [too_large, malformed], signature and namespace [bad_signature, wrong_namespace, …]
 2. the key: known, in time, from an address it may come from [unknown_key, key_expired, from_address,
    certificate, principal], and for hardware keys touch and user check [not_touched, not_verified]
 3. only now the bytes are parsed [malformed, version, unknown_op, bad_state]
 4. mesh and target [wrong_mesh, wrong_target], role [role]
 5. op id: the same content gets the recorded answer, other content [op_id_reused]
 6. times, by this node's clock [too_long_lived, not_yet, expired], nonce [unknown_nonce]
 7. the node's own state [in_update, leaving]

What passes is durable before it is applied, and applied in a task of its own: a caller that goes away doesn't
stop it half-way, a second copy waits for the result of the first. What carried an op plays no part but for
`from`, which is judged by the address that handed it over.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from agent.chain import Gated, Journal, OpEntry
from agent.operators import Operator
from agent.opmessage import (
    LIFETIME_MAX_MS,
    MESSAGE_MAX_BYTES,
    NAMESPACE,
    VERBS,
    Op,
    decode_op,
    glimpse,
    suffices,
)
from discovery.errors import QuarterdeckError, Refused, RemoteError
from discovery.identity import id_text
from discovery.lifecycle import State

FUTURE_ALLOWANCE_MS = 5_000
NONCE_LIFETIME_S = 120.0
NONCES_MAX = 4096
NONCES_PER_HOLDER = 256
SIGNATURE_MAX_BYTES = 16 * 1024
REFUSALS_PER_MINUTE = 10
"""Recorded refusals of one unknown key; the rest are counted."""
REFUSALS_PER_MINUTE_ALL = 120
"""Recorded refusals of all unknown keys together, so that making keys doesn't help either."""
UNPROVEN = frozenset({"unknown_key", "bad_signature", "wrong_namespace", "malformed_signature"})

LAST_ACTS = frozenset({"kill", "update"})
"""Verbs after which this process ends: their result is on disk before they take effect."""

DONE = "done"
REFUSED = "refused"
UNKNOWN = "unknown"


class Signer(Protocol):
    """What a verified signature tells: the key as OpenSSH line and blob, its fingerprint."""

    @property
    def line(self) -> str: ...
    @property
    def blob(self) -> bytes: ...
    @property
    def fingerprint(self) -> str: ...


class Carrier(Protocol):
    """The login that handed the op over."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


class Authority(Protocol):
    """Who may command: `agent.operators.Operators`."""

    def judge(self, key: str | bytes, peer_addr: str | None, now_ms: int) -> Operator: ...
    def name_of(self, blob: bytes) -> str | None: ...


class Applied(NamedTuple):
    """What became of an op: one of the four results, the resulting state's word, and what there is to say.

    `then`, if any, is called once the result is kept and the caller has the answer, or has gone away."""

    result: str
    state: str
    reason: str | None = None
    then: Callable[[], None] | None = None


class Applier(Protocol):
    """The node, as far as ops are concerned."""

    @property
    def state(self) -> State: ...

    def check(self, op: Op) -> None:
        """Refused when it would be refused now; it is asked again when it is applied."""

    async def apply(self, op: Op, by: str) -> Applied | tuple[str, str, str | None]:
        """Does it for the operator `by`, or raises Refused (`bad_state`, `unsupported`, …)."""


class Ledger(Protocol):
    """The mesh's admin chain, as far as ops are concerned: `agent.chains.Chains`."""

    async def commit(
        self, op: Op, message: bytes, signature: str, by: str, content: bytes | None = None
    ) -> Any:
        """Puts an op there; `recorded` of what it returns says where. Refused when it may not stand there."""

    async def result(self, op_id: str, verb: str, result: str, reason: str | None, *, last: bool) -> None:
        """Puts what became of it beside it."""


@dataclass(frozen=True)
class Judged:
    """An op that passed. `recorded`: it was here before, and this is what is known of it."""

    op: Op
    operator: Operator
    content: bytes
    recorded: OpEntry | None = None


@dataclass(frozen=True)
class Context:
    """What an op is judged against."""

    mesh: str
    target: str
    """This node's id as text."""
    authority: Authority
    recorded: Callable[[str], OpEntry | None]
    nonce_known: Callable[[str], bool]
    state: State


def judge(message: bytes, signer: Signer, *, peer_addr: str | None, now_ms: int, context: Context) -> Judged:
    """Steps 2 to 7 of the order above, for a message whose signature holds; Refused at the first miss."""
    operator = context.authority.judge(signer.blob, peer_addr, now_ms)
    operator.check_presence(getattr(signer, "flags", None))
    op = decode_op(message)
    asked = op.message
    if asked.mesh != context.mesh:
        raise Refused("wrong_mesh", f"the op is for mesh {asked.mesh}, this is {context.mesh}")
    if asked.target != context.target:
        raise Refused("wrong_target", f"the op is for node {asked.target}, this is {context.target}")
    needed = VERBS[op.verb].role
    if not suffices(operator.role, needed):
        raise Refused("role", f"{op.verb} needs role {needed}, {operator.comment} has {operator.role}")
    content = hashlib.sha256(message).digest()
    recorded = context.recorded(op.op_id)
    if recorded is not None:
        if recorded.content != content:
            raise Refused("op_id_reused", f"op id {op.op_id} was used for another op before")
        return Judged(op, operator, content, recorded)
    _judge_times(asked.issued_at_ms, asked.expires_at_ms, now_ms)
    if not context.nonce_known(asked.nonce):
        raise Refused(
            "unknown_nonce", "the nonce was not given out here in the last 120 s, or was used; ask again"
        )
    if context.state is State.UPDATING and op.verb != "kill":
        raise Refused("in_update", "the node is updating; try again when it is back")
    if context.state is State.LEAVING and op.verb != "kill":
        raise Refused("leaving", "the node is leaving")
    return Judged(op, operator, content)


def _judge_times(issued_ms: int, expires_ms: int, now_ms: int) -> None:
    if expires_ms - issued_ms > LIFETIME_MAX_MS:
        raise Refused(
            "too_long_lived", f"the op would live {(expires_ms - issued_ms) / 1000:.0f} s; 120 s at most"
        )
    if issued_ms > now_ms + FUTURE_ALLOWANCE_MS:
        raise Refused(
            "not_yet", f"the op is dated {(issued_ms - now_ms) / 1000:.0f} s ahead of this node's clock"
        )
    if expires_ms <= now_ms:
        raise Refused(
            "expired", f"the op expired {(now_ms - expires_ms) / 1000:.0f} s ago by this node's clock"
        )


class Nonces:
    """Nonces given out and not used yet: each good for NONCE_LIFETIME_S, once. Who asks for too many loses
    their own oldest, not those of others."""

    def __init__(self, monotonic: Callable[[], float], random_bytes: Callable[[int], bytes]) -> None:
        self._monotonic = monotonic
        self._random = random_bytes
        self._given: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._held: dict[str, OrderedDict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._given)

    def give(self, holder: str) -> str:
        now = self._monotonic()
        while self._given:
            oldest, (until, _) = next(iter(self._given.items()))
            if until > now and len(self._given) < NONCES_MAX:
                break
            self.use(oldest)
        held = self._held.setdefault(holder, OrderedDict())
        if len(held) >= NONCES_PER_HOLDER:
            self.use(next(iter(held)))
        nonce = self._random(16).hex()
        self._given[nonce] = (now + NONCE_LIFETIME_S, holder)
        self._held.setdefault(holder, OrderedDict())[nonce] = None
        return nonce

    def known(self, nonce: str) -> bool:
        given = self._given.get(nonce)
        return given is not None and given[0] > self._monotonic()

    def use(self, nonce: str) -> None:
        given = self._given.pop(nonce, None)
        if given is not None:
            held = self._held[given[1]]
            del held[nonce]
            if not held:
                del self._held[given[1]]


class RefusalLimit:
    """How many refusals of unknown keys are recorded in any minute: a few a key, more for all together."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._passed: deque[tuple[float, str]] = deque()

    def passes(self, key: str) -> bool:
        now = self._monotonic()
        while self._passed and self._passed[0][0] <= now - 60:
            self._passed.popleft()
        if len(self._passed) >= REFUSALS_PER_MINUTE_ALL:
            return False
        if sum(1 for _, passed in self._passed if passed == key) >= REFUSALS_PER_MINUTE:
            return False
        self._passed.append((now, key))
        return True


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


_Outcome = tuple[dict[str, Any], Callable[[], None] | None]
"""An answer, and what is to be done once it is given."""


def _then(task: asyncio.Task[_Outcome]) -> None:
    if not task.cancelled() and task.exception() is None and (then := task.result()[1]) is not None:
        then()


def _verify_sshsig(message: bytes, armored: str, namespace: str) -> Signer:
    from discovery import sshsig

    return sshsig.verify(message, armored, namespace)


class Control:
    """The ops desk of one node. `emit(kind, **fields)` tells of each op as an event."""

    def __init__(
        self,
        *,
        me: int,
        mesh: str,
        journal: Journal,
        operators: Authority,
        applier: Applier,
        ledger: Ledger | None = None,
        emit: Callable[..., Any] | None = None,
        verify_signature: Callable[[bytes, str, str], Signer] = _verify_sshsig,
        wall_ms: Callable[[], int] = _wall_ms,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Ops by result (`done`, …), by refusal code (`refused.role`, …), and `refused.unrecorded`."""
        self._target = id_text(me)
        self._mesh = mesh
        self._journal = journal
        self._operators = operators
        self._applier = applier
        self._ledger = ledger
        self._emit = emit
        self._verify = verify_signature
        self._wall_ms = wall_ms
        self._nonces = Nonces(monotonic, random_bytes)
        self._limit = RefusalLimit(monotonic)
        self._applying: dict[str, tuple[bytes, asyncio.Task[_Outcome]]] = {}

    def challenge(self, carrier: Carrier | None = None) -> dict[str, Any]:
        """A nonce for one op, and this node's wall clock, in which the op has to be dated."""
        return {
            "nonce": self._nonces.give(carrier.fingerprint if carrier else ""),
            "wall_ms": self._wall_ms(),
        }

    def take_nonce(self, nonce: str) -> bool:
        """Whether this node gave the nonce out and nobody used it; it is used now."""
        known = self._nonces.known(nonce)
        self._nonces.use(nonce)
        return known

    async def submit(
        self,
        message: bytes,
        signature: str | bytes,
        carrier: Carrier | None = None,
        peer_addr: str | None = None,
        content: bytes | None = None,
    ) -> dict[str, Any]:
        """The answer to a signed op: `{op_id, target, op, result, state, reason, code, recorded}`; it never raises.

        `reason` and `code` are None unless there is something to say. `peer_addr`: who handed it over. `content`: what the
        op names by its hash. `recorded`: `replicated` once another node has it too, else `local`."""
        signer: Signer | None = None
        try:
            signer = self._check_signature(message, signature)
            judged = judge(
                message,
                signer,
                peer_addr=peer_addr,
                now_ms=self._wall_ms(),
                context=Context(
                    self._mesh,
                    self._target,
                    self._operators,
                    self._recorded,
                    self._nonces.known,
                    self._applier.state,
                ),
            )
            if judged.recorded is not None:
                return await self._repeat(judged, judged.recorded)
            return await self._accept(judged, message, signature, carrier, content)
        except Refused as why:
            return self._refuse(why, message, signer, carrier)

    def _check_signature(self, message: bytes, signature: str | bytes) -> Signer:
        if not isinstance(message, bytes) or not isinstance(signature, str | bytes):
            raise Refused("malformed", "an op is bytes, and its signature text")
        if len(message) > MESSAGE_MAX_BYTES:
            raise Refused("too_large", f"an op of {len(message)} bytes; at most {MESSAGE_MAX_BYTES} are read")
        if len(signature) > SIGNATURE_MAX_BYTES:
            raise Refused(
                "too_large", f"a signature of {len(signature)} bytes; at most {SIGNATURE_MAX_BYTES}"
            )
        try:
            armored = signature.decode("ascii") if isinstance(signature, bytes) else signature
            return self._verify(message, armored, NAMESPACE)
        except Refused:
            raise
        except (RemoteError, ValueError) as why:
            raise Refused("bad_signature", f"the signature can't be read: {why}") from why

    def _recorded(self, op_id: str) -> OpEntry | None:
        applying = self._applying.get(op_id)
        if applying is not None:
            return OpEntry(op_id, applying[0], "", "", "", 0, None, None)
        return self._journal.lookup(op_id)

    async def _repeat(self, judged: Judged, entry: OpEntry) -> dict[str, Any]:
        self.counters["repeated"] += 1
        applying = self._applying.get(entry.op_id)
        if applying is not None:
            return (await asyncio.shield(applying[1]))[0]
        if entry.result is not None:
            return entry.result
        reason = (
            "it was accepted here, and the node ended before its result was known; look at the node's state"
        )
        return self._result(judged.op.op_id, judged.op.verb, UNKNOWN, reason, "interrupted")

    async def _accept(
        self,
        judged: Judged,
        message: bytes,
        signature: str | bytes,
        carrier: Carrier | None,
        content: bytes | None,
    ) -> dict[str, Any]:
        op, operator = judged.op, judged.operator
        body = {
            "fingerprint": operator.fingerprint,
            "role": operator.role,
            "carrier": carrier.kind if carrier else None,
            "message": message,
            "signature": signature,
        }
        entry = self._journal.reserve(
            op.op_id,
            judged.content,
            verb=op.verb,
            target=self._target,
            operator=operator.comment,
            at_ms=self._wall_ms(),
            body=body,
        )
        if entry is not None:
            return await self._repeat(judged, entry)
        self._nonces.use(op.message.nonce)
        armored = signature.decode("ascii") if isinstance(signature, bytes) else signature
        task = asyncio.get_running_loop().create_task(
            self._apply(op, operator, carrier, message, armored, content), name=f"op {op.verb}"
        )
        self._applying[op.op_id] = (judged.content, task)
        task.add_done_callback(lambda _: self._applying.pop(op.op_id, None))
        try:
            return (await asyncio.shield(task))[0]
        finally:
            task.add_done_callback(_then)

    async def _apply(
        self,
        op: Op,
        operator: Operator,
        carrier: Carrier | None,
        message: bytes,
        signature: str,
        content: bytes | None,
    ) -> _Outcome:
        code: str | None = None
        recorded: str | None = None
        try:
            if op.verb == "kill" and self._applier.state is State.LEAVING:
                applied = Applied(DONE, State.LEAVING.word, "it was leaving already")
            else:
                self._applier.check(op)
                if self._ledger is not None:
                    by = operator.comment
                    recorded = (await self._ledger.commit(op, message, signature, by, content)).recorded
                applied = Applied(*await self._applier.apply(op, operator.comment))
        except Refused as why:
            applied, code = Applied(REFUSED, self._applier.state.word, why.sentence), why.code
        except asyncio.CancelledError:
            applied = Applied(UNKNOWN, self._applier.state.word, "the node stopped while it did this")
            code = "interrupted"
        except Exception as why:
            text = str(why) if isinstance(why, QuarterdeckError) else f"{type(why).__name__}: {why}"
            applied, code = (
                Applied(REFUSED, self._applier.state.word, (text.splitlines() or ["it failed"])[0][:300]),
                "failed",
            )
        result = self._result(op.op_id, op.verb, applied.result, applied.reason or None, code, applied.state)
        result["recorded"] = recorded
        try:
            self._journal.finish(op.op_id, result, at_ms=self._wall_ms(), durable=op.verb in LAST_ACTS)
        except Refused as why:
            self.counters["result_not_durable"] += 1
            result["reason"] = "; ".join(filter(None, (result["reason"], why.sentence)))
        if self._ledger is not None and recorded is not None:
            last = op.verb in LAST_ACTS
            await self._ledger.result(op.op_id, op.verb, result["result"], result["reason"], last=last)
        self._tell(result, operator.comment, carrier, operator.fingerprint)
        return result, applied.then

    def refused_put(self, why: Refused, message: bytes, signature: str) -> None:
        """Records and tells that a put was refused, which its own desk judged, as for any op."""
        try:
            signer = self._check_signature(message, signature)
        except Refused:
            signer = None
        self._refuse(why, message, signer, None, "put")

    def _refuse(
        self,
        why: Refused,
        message: object,
        signer: Signer | None,
        carrier: Carrier | None,
        verb: str | None = None,
    ) -> dict[str, Any]:
        op_id = None
        if signer is not None and isinstance(message, bytes):
            op_id, seen = glimpse(message)
            verb = verb or seen
        result = self._result(op_id, verb, REFUSED, why.sentence, why.code)
        proven = signer is not None and why.code not in UNPROVEN
        key = signer.fingerprint if signer else f"by {carrier.fingerprint if carrier else ''}"
        if not proven and not self._limit.passes(key):
            self.counters["refused"] += 1
            self.counters[f"refused.{why.code}"] += 1
            self.counters["refused.unrecorded"] += 1
            return result
        by = self._name(signer) if signer else None
        body = dict(result, by=by, fingerprint=signer.fingerprint if signer else None)
        body["carrier"] = carrier.kind if carrier else None
        self._journal.append("control.refused", body, Gated(why.sentence[:4096]), at_ms=self._wall_ms())
        self._tell(result, by, carrier, signer.fingerprint if signer else None)
        return result

    def _name(self, signer: Signer) -> str:
        return self._operators.name_of(signer.blob) or signer.fingerprint

    def _tell(
        self, result: Mapping[str, Any], by: str | None, carrier: Carrier | None, fingerprint: str | None
    ) -> None:
        self.counters[result["result"]] += 1
        if result["code"]:
            self.counters[f"{result['result']}.{result['code']}"] += 1
        if self._emit is None:
            return
        try:
            self._emit(
                "control.received",
                op_id=result["op_id"],
                by=by,
                reason=result["reason"],
                source=result["code"],
                op=result["op"],
                result=result["result"],
                state=result["state"],
                code=result["code"],
                carrier=carrier.kind if carrier else None,
                fingerprint=fingerprint,
            )
        except Exception:
            self.counters["emit_failed"] += 1

    def _result(
        self,
        op_id: str | None,
        verb: str | None,
        result: str,
        reason: str | None,
        code: str | None,
        state: str | None = None,
    ) -> dict[str, Any]:
        return {
            "op_id": op_id,
            "target": self._target,
            "op": verb,
            "result": result,
            "state": state or self._applier.state.word,
            "reason": reason,
            "code": code,
            "recorded": None,
        }
