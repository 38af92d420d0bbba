"""From a verb and a name to a signed op and its answer: the same path for the command line and the console.

An op is signed for the target's own clock, sent through whichever agent the client is attached to, and always ends
in a result: done, accepted, refused, unreachable, or unknown where the message may have arrived and no answer came.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from agent.home import Home
from agent.opmessage import NAMESPACE, RETRY_LATER, build_op, new_ulid
from discovery.errors import QuarterdeckError, Refused, Unreachable
from tui.client import Client, Row, Tell, attach, attach_entry
from tui.signers import Signer

VERBS = (
    *("kill", "drain", "update", "resume", "cordon", "uncordon", "maintenance_enter", "maintenance_exit"),
    *("restart_daemons", "clear_avoid", "drop_replicas", "invalidate_placement"),
)
"""The ops on nodes, as results name them; on the command line the same words with `-` or a blank."""
RETRY_EVERY_S = 0.25
POLL_EVERY_S = 0.1
DEFAULT_TIMEOUT_S = 30.0
SIDE_BY_SIDE = 32
RESULT_KEYS = ("op_id", "target", "op", "result", "state", "route", "took_ms", "reason", "skew_ms")
TIMED_OUT = "timed_out"

Stage = Callable[[str], None]
"""Told each step of an op on its way: `asking`, `signing`, `sent`, waiting, and last the result's word."""


class OpClient(Protocol):
    """What sending an op needs of a client."""

    async def challenge(self, target: str) -> dict[str, Any]: ...

    async def op(
        self, target: str, message: bytes, signature: str, timeout_s: float = ...
    ) -> dict[str, Any]: ...


class OpSender:
    """Signs and sends ops through one client."""

    def __init__(self, client: OpClient, signer: Signer) -> None:
        self._client = client
        self._signer = signer

    async def act(
        self,
        verb: str,
        target_id: str,
        args: Mapping[str, Any] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_stage: Stage = lambda stage: None,
    ) -> dict[str, Any]:
        """One op to its end: a map of RESULT_KEYS and `code` (the reason's stable code, or None). Never raises ours.

        While the target is updating, the op is tried again, signed anew each time, until `timeout_s` has passed.
        """
        began = time.monotonic()
        until = began + timeout_s
        result: dict[str, Any] = _blank(verb, target_id)
        updating = False
        while True:
            left = until - time.monotonic()
            try:
                async with asyncio.timeout(max(0.05, left)):
                    result = await self._try(verb, target_id, args or {}, max(0.05, left), on_stage, result)
            except TimeoutError:
                result = _late(result)
            except Refused as why:
                result = {**result, "result": "refused", "reason": why.sentence, "code": why.code}
                if why.code == "gone":
                    result["result"] = "unreachable"
            except Unreachable as why:
                arrived = why.maybe_arrived and result["op_id"] is not None
                result = {**result, "result": "unknown" if arrived else "unreachable", "reason": str(why)}
            except QuarterdeckError as why:
                result = {**result, "result": "refused", "reason": str(why), "code": "nonsense"}
            updating = updating or result["code"] in RETRY_LATER
            again = result["code"] in RETRY_LATER or (updating and result["result"] == "unreachable")
            if not again or time.monotonic() + RETRY_EVERY_S >= until:
                break
            on_stage("waiting for its update")
            await asyncio.sleep(RETRY_EVERY_S)
        result["took_ms"] = round((time.monotonic() - began) * 1000, 1)
        on_stage(str(result["result"]))
        return result

    async def _try(
        self,
        verb: str,
        target_id: str,
        args: Mapping[str, Any],
        left_s: float,
        on_stage: Stage,
        progress: dict[str, Any],
    ) -> dict[str, Any]:
        """One challenge, one signature, one answer. `progress` is brought up to date before anything is awaited."""
        progress.update(_blank(verb, target_id))
        on_stage("asking")
        asked_wall, asked = time.time(), time.monotonic()
        challenge = await self._client.challenge(target_id)
        rtt_s = time.monotonic() - asked
        their_ms = int(challenge["wall_ms"])
        progress["skew_ms"] = round(their_ms - (asked_wall + rtt_s / 2) * 1000)
        progress["route"] = challenge.get("route")
        progress["name"] = challenge.get("name")
        now_ms = their_ms + round(rtt_s / 2 * 1000)
        op_id = new_ulid(now_ms, os.urandom(10))
        message = build_op(
            verb,
            mesh=str(challenge["mesh"]),
            target=target_id,
            op_id=op_id,
            nonce=str(challenge["nonce"]),
            now_ms=now_ms,
            **args,
        )
        on_stage("signing")
        signature = await self._signer.sign(message, NAMESPACE)
        on_stage("sent")
        progress["op_id"] = op_id
        answer = await self._client.op(target_id, message, signature, left_s)
        result = {**progress, "code": None, **answer}
        result["op"] = verb
        result["op_id"] = answer.get("op_id") or op_id
        result["route"] = answer.get("route") or progress["route"]
        result["skew_ms"] = progress["skew_ms"]
        return result


def _blank(verb: str, target_id: str) -> dict[str, Any]:
    return {**dict.fromkeys(RESULT_KEYS), "target": target_id, "op": verb, "code": None}


def _late(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an op whose time ran out: unknown once the message was sent, else nothing has happened."""
    sent = result["op_id"] is not None
    reason = "no answer in time; it may have arrived" if sent else "no answer in time; nothing was sent"
    return {
        **result,
        "result": "unknown" if sent else "unreachable",
        "reason": result.get("reason") or reason,
        "code": result.get("code") or TIMED_OUT,
    }


@dataclass(frozen=True)
class Target:
    """A node that was meant, and the client through which it is seen and reached."""

    id: str
    name: str
    mesh: str
    state: str
    row: Row | None
    client: Client

    @property
    def is_agent(self) -> bool:
        """Whether it is the very agent that the client is attached to."""
        return self.client.id == self.id


class Aim:
    """Finds what is meant by a name. Holds the clients it needed; `async with` closes them.

    Without `via` any agent of this home may answer: a name that the first one doesn't know is looked for at the
    agents of the home's other meshes.
    """

    def __init__(
        self,
        home: Home,
        via: str | None,
        mesh: str | None,
        operator_key: Path | None,
        tell: Tell = lambda line: None,
    ) -> None:
        self._home = home
        self._via = via
        self._mesh = mesh
        self._operator_key = operator_key
        self._tell = tell
        self._clients: list[Client] = []
        self._rows: dict[int, list[Row]] = {}

    async def __aenter__(self) -> Aim:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            with contextlib.suppress(Exception):
                await client.close()

    async def first(self) -> Client:
        """The client of the agent that answers."""
        if not self._clients:
            client = await attach(self._home, self._via, self._mesh, self._operator_key, tell=self._tell)
            self._clients.append(client)
            await self._look(client)
        return self._clients[0]

    async def rows(self, client: Client) -> list[Row]:
        """The rows that this client's agent sees, as of when they were first asked for."""
        return self._rows[id(client)]

    async def resolve(self, text: str) -> Target:
        """The one node that `text` means. Refused `unknown`, `ambiguous` (with candidates) or `gone`."""
        if not text.strip():
            raise Refused("unknown", "node: an empty name; give a name, an id, or the beginning of one")
        client = await self.first()
        for known in self._clients:
            if found := self._seen(known, text):
                return found
        try:
            return await self._ask(client, text)
        except Refused as why:
            if why.code != "unknown" or self._via is not None or self._mesh is not None:
                raise
            if found := await self._elsewhere(text):
                return found
            raise

    async def _look(self, client: Client) -> None:
        self._rows[id(client)] = await client.nodes(self._mesh)

    def _seen(self, client: Client, text: str) -> Target | None:
        """A row of exactly that name or id. Prefixes are the agent's to judge: it knows who said goodbye."""
        exact = [row for row in self._rows[id(client)] if text in (row.get("name"), row.get("id"))]
        return _target(exact[0], client) if len(exact) == 1 else None

    async def _ask(self, client: Client, text: str) -> Target:
        found = await client.resolve(text)
        if self._mesh not in (None, found.get("mesh")):
            raise Refused("unknown", f"{text}: no such node in mesh {self._mesh}")
        row = next((r for r in await client.nodes() if r.get("id") == found.get("id")), None)
        return replace(_target({**found, **(row or {})}, client), row=row)

    async def _elsewhere(self, text: str) -> Target | None:
        """The node as agents of this home's other meshes see it; what they refuse for another reason counts."""
        tried = {c.mesh for c in self._clients}
        for entry in self._home.running():
            if entry.mesh in tried:
                continue
            try:
                client = await attach_entry(self._home, entry, self._operator_key)
            except QuarterdeckError:
                continue
            tried.add(entry.mesh)
            self._clients.append(client)
            await self._look(client)
            if found := self._seen(client, text):
                return found
            try:
                return await self._ask(client, text)
            except Refused as why:
                if why.code != "unknown":
                    raise
        return None


def _target(row: Row, client: Client) -> Target:
    return Target(
        str(row["id"]), str(row.get("name")), str(row.get("mesh")), str(row.get("state")), row, client
    )


async def act_on_all(
    verb: str,
    targets: Sequence[Target],
    signer: Signer,
    args: Mapping[str, Any],
    timeout_s: float,
    on_stage: Callable[[Target, str], None] = lambda target, stage: None,
) -> list[dict[str, Any]]:
    """One op a target, side by side, results in the order of `targets`; the agents used for it come last."""
    room = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(target: Target) -> dict[str, Any]:
        async with room:
            sender = OpSender(target.client, signer)
            result = await sender.act(verb, target.id, args, timeout_s, lambda s: on_stage(target, s))
            return {**result, "target": target.name, "id": target.id, "mesh": target.mesh}

    others = [t for t in targets if not t.is_agent]
    agents = [t for t in targets if t.is_agent]
    results: dict[str, dict[str, Any]] = {}
    for group in (others, agents):
        for target, result in zip(group, await asyncio.gather(*map(one, group)), strict=True):
            results[target.id] = result
    return [results[t.id] for t in targets]


async def wait_for(
    home: Home,
    target: Target,
    wanted: str,
    timeout_s: float,
    operator_key: Path | None,
    *,
    restarted: bool = False,
) -> bool:
    """Whether `target` came into the state `wanted` in somebody else's view, in time: a lifecycle state, a maintenance
    state (their words differ), or `gone`: out of the view.

    Refused `drain_failed` as soon as a maintenance that was waited for has failed: it will not come by itself.
    With `restarted` (an update) the state counts only from the new incarnation on. When the agent asked is the target,
    another agent of its mesh is asked; with none left, its own run entry tells whether it is gone.
    """
    until = time.monotonic() + timeout_s
    before = target.row.get("incarnation") if target.row and restarted else None
    stood = target.row.get("maintenance") if target.row else None
    client: Client | None = None if target.is_agent else target.client
    own: Client | None = None
    failure: str | None = None
    try:
        while True:
            try:
                if client is None or client.closed:
                    client = own = await _witness(home, target, operator_key)
                if client is None:
                    if wanted == "gone" and not _runs(home, target.id):
                        return True
                else:
                    row = next((r for r in await client.nodes() if r.get("id") == target.id), None)
                    if _reached(row, wanted, before):
                        return True
                    stands = row.get("maintenance") if row else stood
                    if wanted == "maintenance" and stands == "drain_failed" != stood:
                        failure = str(row.get("reason") or "its deadline passed") if row else ""
                    stood = stands
            except QuarterdeckError:
                client = None
            if failure is not None:
                raise Refused("drain_failed", f"{target.name}: drain_failed: {failure}")
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(POLL_EVERY_S)
    finally:
        if own is not None:
            with contextlib.suppress(Exception):
                await own.close()


def _reached(row: Row | None, wanted: str, before: int | None) -> bool:
    if row is None:
        return wanted == "gone"
    stands = wanted in (row.get("state"), row.get("maintenance"))
    return stands and (before is None or row.get("incarnation") != before)


async def _witness(home: Home, target: Target, operator_key: Path | None) -> Client | None:
    """A client of an agent of the target's mesh, the target itself only where nobody else answers."""
    entries = [e for e in home.running() if e.mesh == target.mesh]
    for entry in sorted(entries, key=lambda e: e.id == target.id):
        try:
            return await attach_entry(home, entry, operator_key)
        except QuarterdeckError:
            continue
    return None


def _runs(home: Home, node: str) -> bool:
    return any(e.id == node for e in home.running())
