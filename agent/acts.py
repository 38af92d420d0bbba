"""What an operator's op does to this node. `control` has judged it already; here it takes effect, or is refused with
a reason.

Each act ends when its effect stands, and its answer carries the state that resulted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent import freshness
from agent.chain.store import Handover
from agent.control import Applied
from agent.events import plain, wall_ms
from agent.meshos.events import AdminOp, AdminVerb, UpdateFailed, UpdateStarted
from agent.meshos.own import refusal
from agent.opmessage import Op
from discovery.errors import Refused
from discovery.lifecycle import State

if TYPE_CHECKING:
    from agent.node import Node

UPDATE_DEADLINE_MS = 120_000
UPDATE_COMMAND_TIMEOUT_S = 90.0
SELF_CHECK_TIMEOUT_S = 20.0
ANSWER_FIRST_S = 0.1
"""The answer to an update gets this long to be written before the process replaces itself."""
REASON_CHARS = 300
ADMIN_OPS: dict[str, AdminVerb] = {
    "drain": "drain",
    "resume": "resume",
    "cordon": "cordon",
    "uncordon": "uncordon",
    "maintenance_enter": "enter_maintenance",
    "maintenance_exit": "exit_maintenance",
    "restart_daemons": "restart_all_daemons",
    "clear_avoid": "clear_avoid_list",
    "drop_replicas": "drop_replicas",
    "invalidate_placement": "invalidate_placement",
}
"""Verbs that the engine carries out, as it calls them."""


class Acts:
    """Applies ops to one node, one at a time where they would touch each other."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._turn = asyncio.Lock()
        """Held from the look at the node's state until the op is folded: no other op can come between."""

    @property
    def state(self) -> State:
        """What the node is in now."""
        return State.LEAVING if self._node.stopping else self._node.state

    def check(self, op: Op) -> None:
        """Refused when the node's state refuses it now."""
        verb = ADMIN_OPS.get(op.verb, op.verb)
        if op.verb in ADMIN_OPS or op.verb == "update":
            node = self._node
            if why := refusal(node.state, verb, node.engine.loop.life.maintenance.state):
                raise why

    async def apply(self, op: Op, by: str) -> Applied:
        """Carries out a judged op of the operator `by`; Refused says why it has no effect."""
        match op.verb:
            case "kill":
                return self._kill(op, by)
            case "apply" | "grant_operator" | "revoke_operator" | "append":
                return Applied("done", self.state.word, None)  # it stands since it is on the chain
            case verb if verb in ADMIN_OPS:
                return await self._admin(op, by)
            case "update":
                return await self._update(op, by)
            case "rotate_key":
                reason = self._node.keys.rotate(op.retire_ms, by, op.op_id)
                return Applied("accepted", self.state.word, reason)
        raise Refused("unsupported", f"{op.verb} is not in this build of {self._node.name}")

    def _kill(self, op: Op, by: str) -> Applied:
        def leave() -> None:
            self._node.request_stop("control_op", by, op.op_id)

        return Applied("done", State.LEAVING.word, None, leave)

    async def _admin(self, op: Op, by: str) -> Applied:
        """Hands the engine what the operator wills. `accepted` where it takes time: the state and its events tell
        how far it is."""
        node = self._node
        verb = ADMIN_OPS[op.verb]
        order = AdminOp(verb, node.identity.id, op.deadline_ms, by, op.op_id, tuple(op.chains))
        async with self._turn:
            before, engine = node.state, node.engine
            if why := refusal(before, verb, engine.loop.life.maintenance.state):
                raise why
            note = self._note(op, before)
            await engine.admin(order)
            after, state = node.state, engine.loop.state
        result = "done"
        if op.verb in ("maintenance_enter", "maintenance_exit"):
            result, note = (
                "accepted",
                note or f"maintenance: {state.maintenance.state.value.replace('_', ' ')}",
            )
        elif op.verb == "drain" and (left := state.left()):
            result, note = "accepted", f"still to stop or move: {', '.join(left)}"
        return Applied(result, after.word, note)

    def _note(self, op: Op, before: State) -> str | None:
        """What there is to say beforehand of what an op will do, as things stand."""
        state = self._node.engine.loop.state
        match op.verb:
            case "resume" if before in (State.ALIVE, State.DEGRADED):
                return "nothing to resume: no drain in force"
            case "cordon" if state.life.cordon:
                return "it was cordoned already"
            case "uncordon" if not state.life.cordon:
                return (
                    "it is cordoned by its drain: resume lifts that"
                    if state.life.drain
                    else "it was not cordoned"
                )
            case "restart_daemons":
                count = sum(daemon.running for daemon in state.daemons.values())
                return f"{count} daemon{'s restart' if count != 1 else ' restarts'}"
            case "clear_avoid":
                count = len(state.avoid)
                return f"{count} entr{'ies' if count != 1 else 'y'} cleared"
            case "drop_replicas":
                held = state.held_by.get(state.this_node, set())
                away = [chain for chain in op.chains if chain not in held]
                return f"not held here: {', '.join(away)}" if away else None
            case "invalidate_placement":
                count = len(state.led)
                return f"{count} chain{'s' * (count != 1)} led here"
        return None

    async def _update(self, op: Op, by: str) -> Applied:
        """Checks the code on disk and replaces this process by it: same id, port and process; Refused changes nothing."""
        node = self._node
        async with self._turn:
            earlier = node.state
            if why := refusal(earlier, "update"):
                raise why
            await node.tell(UpdateStarted(deadline_ms=UPDATE_DEADLINE_MS, by=by, op_id=op.op_id))
        try:
            if command := node.settings.update_command:
                await _run(command, UPDATE_COMMAND_TIMEOUT_S, "update command")
            check = [sys.executable, *sys.orig_argv[1:], "--self-check"]
            await _run(check, SELF_CHECK_TIMEOUT_S, "self-check of the code on disk")
            if node.stopping:
                raise Refused("leaving", "the node is leaving")
            node.journal.set_handover(
                Handover(op_id=op.op_id, earlier=earlier.word, by=by, started_ms=wall_ms(), build=node.build)
            )
        except Refused as why:
            await node.tell(UpdateFailed(reason=why.sentence))
            raise Refused(why.code, f"{why.sentence}; still running build {node.build}") from why
        on_disk = freshness.fingerprint()
        note = f"build {node.build} → {on_disk}"
        if on_disk == node.build:
            note = f"nothing changed: build {on_disk} is started again"

        def replace() -> None:
            asyncio.get_running_loop().call_later(ANSWER_FIRST_S, node.request_stop, "update", by, op.op_id)

        return Applied("accepted", State.UPDATING.word, note, replace)


async def _run(command: Sequence[str], timeout_s: float, what: str) -> None:
    """Runs a command to its end; Refused("update_failed") with its last words when it fails or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as why:
        raise Refused("update_failed", f"{what} can't be started: {why.strerror}") from why
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except TimeoutError as why:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
        raise Refused("update_failed", f"{what} took longer than {timeout_s:.0f} s") from why
    if process.returncode != 0:
        lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
        last = plain(lines[-1].strip())[:REASON_CHARS] if lines else "no output"
        raise Refused("update_failed", f"{what} failed with exit {process.returncode}: {last}")
