"""`qd apply`: a spec file onto the mesh's admin chain, by signed op, with what it changes shown first."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError, Unreachable
from tui.cli.common import Scope, document, on_terminal, out, read_input, run, say, scoped
from tui.cli.failures import FAILED, OK, USAGE, Fail, op_failure

if TYPE_CHECKING:
    from agent.spec.difference import Difference
    from agent.spec.model import FleetSpec
    from tui.client import Client, Row
    from tui.ops import Aim
    from tui.signers import Signer

LINES_SHOWN = 200
"""Of a difference, before the question; `--json` has them all."""
SKEW_TOLD_MS = 30_000
REACH_WAIT_S = 1.5
REACH_EVERY_S = 0.03


@click.command()
@click.argument("spec", required=False, metavar="SPEC.toml")
@scoped("dry_run", "yes", "show", "timeout")
def apply(scope: Scope, spec: str | None) -> int:
    """Have a mesh run what SPEC.toml says ("-": standard input): --mesh, else the mesh of the node that answers."""
    if scope.more["show"]:
        if spec is not None:
            raise Fail(USAGE, "apply: --show prints the spec in force; leave SPEC.toml out")
        return run(_show(scope))
    if spec is None:
        raise Fail(USAGE, "apply: no file; write `qd apply SPEC.toml`, or `qd apply --show`")
    text = _read(spec)
    return run(_apply(scope, spec, text, _checked(spec, text)))


@dataclass(frozen=True)
class Goal:
    """A node of the mesh that is meant, and the client through which it is reached."""

    client: Client
    mesh: str
    target: str
    rows: Sequence[Row]
    """Of that mesh."""

    async def ask(self, method: str, params: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """A method of that node. RemoteError when its answer is no map."""
        about = {**params, "target": self.target, "mesh": self.mesh}
        answer = await self.client.call(method, about, max(0.05, timeout_s))
        if not isinstance(answer, dict):
            raise RemoteError(f"the answer to {method} is not a map; is the agent of another version?")
        return answer

    def route(self, answer: Mapping[str, Any]) -> Any:
        return answer.get("route") or ("local" if self.target == self.client.id else None)


@dataclass(frozen=True)
class InForce:
    """The spec that a mesh has now. `op_id` empty: none. `spec` is None where it may not be, or can't be, read."""

    op_id: str
    by: str | None
    at_ms: int | None
    spec: FleetSpec | None
    text: str | None
    keeps: Mapping[str, Sequence[str]]
    clock_ahead_ms: float
    """How far that node's wall clock is ahead of this host's monotonic one."""
    skew_ms: int
    route: Any
    unread: str | None = None

    def now_ms(self) -> int:
        """The time by that node's clock."""
        return round(time.monotonic() * 1000 + self.clock_ahead_ms)


async def _apply(scope: Scope, path: str, text: str, spec: FleetSpec) -> int:
    from tui.ops import Aim
    from tui.signers import find_signer

    timeout_s = scope.more["timeout"] / 1000
    async with Aim(scope.home, scope.via, scope.mesh, scope.operator_key, say) as aim:
        goal = await _goal(aim, scope.mesh)
        now = await _in_force(goal, timeout_s)
        diff = _difference(now, spec, goal.rows)
        if scope.more["dry_run"]:
            return _show_difference(scope, goal, now, diff)
        signer = await find_signer(scope.home, scope.operator_key)
        if not scope.json:
            for line in _lines(goal, now, diff):
                say(line)
        if not (scope.more["yes"] or scope.json) and on_terminal():
            say(f"signed as {signer.fingerprint}")
            if not click.confirm("apply it?", err=True):
                raise Fail(FAILED, "apply: not confirmed; nothing was sent")
        result = await _hand_over(goal, now, path, text, signer, timeout_s)
    result["diff"] = None if diff is None else diff.document()
    if scope.json:
        document([result])
    return _tell(scope, result)


async def _show(scope: Scope) -> int:
    from tui.ops import Aim

    async with Aim(scope.home, scope.via, scope.mesh, scope.operator_key, say) as aim:
        goal = await _goal(aim, scope.mesh)
        now = await _in_force(goal, scope.more["timeout"] / 1000)
    if now.unread is not None and now.text is None:
        raise Fail(FAILED, f"apply --show: {now.unread}; ask a node of mesh {goal.mesh} with --via")
    if scope.json:
        import msgspec

        document(
            {
                "mesh": goal.mesh,
                "op_id": now.op_id or None,
                "by": now.by,
                "at_ms": now.at_ms,
                "spec": None if now.text is None else msgspec.to_builtins(now.spec),
                "text": now.text,
            }
        )
    elif now.text is None:
        say(f"mesh {goal.mesh}: no spec is in force")
    else:
        say(f"mesh {goal.mesh}: {_named(now)}")
        out("\n".join(_printable(line) for line in now.text.rstrip("\n").split("\n")))
    return OK


def _named(now: InForce) -> str:
    """The spec in force, in words."""
    from tui.model.ages import age

    if not now.op_id:
        return "none"
    old = "" if now.at_ms is None else f", {age(now.now_ms() - now.at_ms)} ago"
    return f"by {now.by}{old}"


def _read(path: str) -> str:
    from agent.spec.reading import SPEC_MAX_BYTES

    data = read_input(path, SPEC_MAX_BYTES, "spec file", "; a spec of that size is not read")
    try:
        return data.decode()
    except UnicodeDecodeError as why:
        raise Fail(USAGE, f"{path}: not UTF-8 at byte {why.start}; save it as UTF-8") from why


def _checked(path: str, text: str) -> FleetSpec:
    from agent.spec.reading import read_spec

    try:
        return read_spec(text)
    except LocalError as why:
        raise Fail(USAGE, f"{path}: {why}") from why


async def _goal(aim: Aim, mesh: str | None) -> Goal:
    """A node of the mesh that is meant: the one that answers, else its publisher, else the first that is up."""
    client = await aim.first()
    mesh = mesh or client.mesh
    rows = [row for row in await aim.rows(client) if row.get("mesh") == mesh]
    if client.mesh == mesh:
        return Goal(client, mesh, client.id, rows)
    up = [
        row
        for row in rows
        if row.get("state") in ("alive", "degraded")
        and row.get("source") != "spawned"
        and not row.get("expired")
    ]
    if not up:
        raise Unreachable(f"mesh {mesh}: {client.name} sees no node of it that is up; name one with --via")
    publishers = [
        (row.get("publisher") or {}).get("id") for row in await client.meshes() if row.get("mesh") == mesh
    ]
    up.sort(
        key=lambda row: (row.get("id") not in publishers, row.get("kind") != "gateway", str(row.get("name")))
    )
    return Goal(client, mesh, str(up[0].get("id")), rows)


async def _in_force(goal: Goal, timeout_s: float) -> InForce:
    from agent.spec.model import FleetSpec
    from agent.spec.reading import read_spec

    asked, asked_wall = time.monotonic(), time.time()
    answer = await goal.ask("spec", {}, timeout_s)
    half_s = (time.monotonic() - asked) / 2
    try:
        wall_ms = int(answer["wall_ms"])
        op_id = str(answer["op_id"] or "")
        at_ms = None if answer["at_ms"] is None else int(answer["at_ms"])
        keeps = {
            str(node): [str(name) for name in names] for node, names in (answer.get("keeps") or {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as why:
        raise RemoteError(
            "the answer about the spec in force makes no sense; is the agent of another version?"
        ) from why
    spec: FleetSpec | None = FleetSpec()
    text, unread = None, None
    if isinstance(content := answer.get("content"), bytes):
        text = content.decode("utf-8", "replace")
        try:
            spec = read_spec(text, in_force=True)
        except LocalError as why:
            spec, unread = None, f"the one in force can't be read by this build ({why})"
    elif op_id:
        spec, unread = None, f"the one in force may not be read by way of mesh {goal.client.mesh}"
    return InForce(
        op_id=op_id,
        by=None if answer.get("by") is None else str(answer["by"]),
        at_ms=at_ms,
        spec=spec,
        text=text,
        keeps=keeps,
        clock_ahead_ms=wall_ms - (asked + half_s) * 1000,
        skew_ms=round(wall_ms - (asked_wall + half_s) * 1000),
        route=goal.route(answer),
        unread=unread,
    )


def _difference(now: InForce, spec: FleetSpec, rows: Sequence[Row]) -> Difference | None:
    """What the file changes of the spec in force, for the nodes in view; None where that spec is not known."""
    from agent.spec.difference import difference

    if now.spec is None:
        return None
    return difference(now.spec, spec, [c for row in rows if (c := _candidate(row, now.keeps)) is not None])


def _candidate(row: Row, keeps: Mapping[str, Sequence[str]]) -> Any:
    from agent.spec.placing import Candidate, may_run
    from agent.spec.resources import Capacity

    try:
        number = int(str(row.get("id")), 16)
    except ValueError:
        return None
    capacity = row.get("capacity") or {}
    cpu, memory = (capacity.get(key) for key in ("cpu", "memory"))
    eligible = may_run(str(row.get("state")), str(row.get("maintenance") or "active"))
    return Candidate(
        id=number,
        name=str(row.get("name")),
        kind=str(row.get("kind")),
        tags=dict(row.get("tags") or {}),
        eligible=eligible and row.get("source") != "spawned" and not row.get("expired"),
        cordoned=bool(row.get("cordoned")),
        keeps=frozenset(keeps.get(str(row.get("id")), ())),
        capacity=Capacity(None if cpu is None else round(cpu * 1000), memory),
    )


def _lines(goal: Goal, now: InForce, diff: Difference | None) -> list[str]:
    head = f"spec of mesh {goal.mesh}, in force: {_named(now)}"
    if diff is None:
        return [head, f"  ! {now.unread}: what changes is not shown"]
    lines = diff.lines()
    if not diff.changed:
        head += ", nothing changes"
    if len(lines) > LINES_SHOWN:
        lines = [
            *lines[:LINES_SHOWN],
            f"… and {len(lines) - LINES_SHOWN} lines more; --dry-run --json has them",
        ]
    return [head, *(f"  {line}" for line in lines)]


def _show_difference(scope: Scope, goal: Goal, now: InForce, diff: Difference | None) -> int:
    if scope.json:
        row = _row(goal, now)
        document([{**row, "dry_run": True, "diff": None if diff is None else diff.document()}])
    else:
        out("\n".join([*map(_printable, _lines(goal, now, diff)), "nothing was sent"]))
    return OK


def _row(goal: Goal, now: InForce) -> dict[str, Any]:
    from tui.ops import RESULT_KEYS

    return {
        **dict.fromkeys(RESULT_KEYS),
        "target": goal.mesh,
        "op": "apply",
        "skew_ms": now.skew_ms,
        "route": now.route,
        "code": None,
        "mesh": goal.mesh,
        "recorded": None,
        "diff": None,
        "nodes": {"reached": [], "missed": []},
    }


async def _hand_over(
    goal: Goal, now: InForce, path: str, text: str, signer: Signer, timeout_s: float
) -> dict[str, Any]:
    """Signs the op and hands it over with the spec; the result row, whatever comes of it."""
    from agent.opmessage import NAMESPACE, build_op, new_ulid

    result = _row(goal, now)
    content = text.encode()
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            challenge = await goal.client.challenge(goal.target)
            now_ms = int(challenge["wall_ms"])
            op_id = new_ulid(now_ms, os.urandom(10))
            message = build_op(
                "apply",
                mesh=goal.mesh,
                target=goal.target,
                op_id=op_id,
                nonce=str(challenge["nonce"]),
                now_ms=now_ms,
                fields={"sha256": hashlib.sha256(content).hexdigest(), "base": now.op_id},
            )
            signature = await signer.sign(message, NAMESPACE)
            result["op_id"] = op_id
            letter = {"message": message, "signature": signature, "content": content}
            answer = await goal.ask("op", letter, timeout_s)
        word = answer.get("result")
        result["result"] = word if word in ("done", "accepted", "refused") else "unknown"
        result |= {key: answer.get(key) for key in ("reason", "code", "recorded")}
        result["route"] = goal.route(answer) or result["route"]
        if word == "done":
            result["nodes"] = await _reach(goal, op_id, timeout_s)
    except TimeoutError:
        result.update(result="unknown", reason="no answer in time; it may have arrived", code="timed_out")
    except Refused as why:
        result.update(
            result="unreachable" if why.code == "gone" else "refused", reason=why.sentence, code=why.code
        )
    except Unreachable as why:
        result.update(result="unknown" if why.maybe_arrived else "unreachable", reason=str(why))
    except QuarterdeckError as why:
        result.update(result="refused", reason=str(why), code="nonsense")
    result["took_ms"] = round((time.monotonic() - began) * 1000, 1)
    return result


async def _reach(goal: Goal, op_id: str, timeout_s: float) -> dict[str, Any]:
    """Which live nodes have it: asked of the one that committed it until all do, or REACH_WAIT_S have passed. Refused
    `superseded` when another operator's spec of the same moment came to count instead."""
    until = time.monotonic() + min(REACH_WAIT_S, timeout_s)
    nodes: dict[str, Any] = {"reached": [], "missed": []}
    while True:
        answer: dict[str, Any] = {}
        with contextlib.suppress(QuarterdeckError):
            answer = await goal.ask("spec", {}, timeout_s)
        if (other := answer.get("op_id")) not in (None, op_id):
            by = answer.get("by")
            raise Refused(
                "superseded", f"another spec of that moment is in force ({other} by {by}); apply again"
            )
        if other is not None and isinstance(found := answer.get("nodes"), dict):
            nodes = {key: [str(name) for name in found.get(key) or []] for key in ("reached", "missed")}
        if (nodes["reached"] and not nodes["missed"]) or time.monotonic() > until:
            return nodes
        await asyncio.sleep(REACH_EVERY_S)


def _tell(scope: Scope, result: Mapping[str, Any]) -> int:
    """How it ended, for people, and the exit status."""
    if abs(result["skew_ms"]) > SKEW_TOLD_MS:
        way = "ahead" if result["skew_ms"] > 0 else "behind"
        say(
            f"mesh {result['mesh']}: its clock is {abs(result['skew_ms']) / 1000:.0f} s {way}; check its time service"
        )
    if failure := op_failure(str(result["target"]), result, "apply"):
        click.echo(failure[1], err=True)
        return failure[0]
    missed = result["nodes"].get("missed") or []
    if missed:
        for name in missed:
            say(f"not yet at {name}: no answer; it will ask for it when it is back")
    if not scope.json:
        from tui.model.ages import took

        reached = len(result["nodes"].get("reached") or [])
        nodes = f"{reached} node{'s' * (reached != 1)}"
        out(f"apply {result['mesh']}: {result['result']}, {nodes}, {took(result['took_ms'])}")
    return OK


def _printable(line: str) -> str:
    from tui.model.text import clean

    return clean(line.replace("\t", "    "))
