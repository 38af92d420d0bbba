"""The proof: what this build promises about a fleet, played on a real one and judged from other nodes' views."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.home import make_identity
from agent.spawn import agent_environment
from discovery.errors import LocalError, QuarterdeckError
from tui.client import Client, attach_entry
from tui.demo.fleet import SETTLED, Fleet, FleetNode
from tui.ops import OpSender
from tui.signers import find_signer

Verdict = Literal["pass", "fail", "planned"]

SOON_S = 5.0
"""What other nodes learn by gossip."""
UPDATE_LIMIT_S = 30.0
SILENT_LIMIT_S = 60.0
"""Beyond the longest suspicion timeout of the formula at this size."""
LOOK_EVERY_S = 0.05
NOT_AUTHORISED = 4
ENOUGH = 2
"""Nodes that a mesh needs to play on: one to lose, one to see it."""
LOST = 2
"""Nodes that the proof ends."""


@dataclass(frozen=True)
class Finding:
    """One promise: whether it held, and what was seen."""

    what: str
    verdict: Verdict
    text: str
    took_ms: int | None = None


class Broken(QuarterdeckError):
    """A promise that did not hold; the text says what was seen instead."""


async def play(fleet: Fleet, tell: Callable[[str], None]) -> list[Finding]:
    """Plays every promise on a booted, fresh fleet. LocalError when it has too few nodes to lose LOST of them."""
    proof = Proof(fleet)
    findings = [
        Finding("every node runs the code on disk", "pass", f"build {fleet.build}"),
        Finding(
            "every node sees every other of its mesh", "pass", f"{len(fleet.nodes)} nodes", fleet.ready_ms
        ),
    ]
    plan: list[tuple[str, Callable[[], Awaitable[str]]]] = [
        ("an unknown operator is refused with exit 4, and the node lives", proof.stranger),
        ("drain → update → resume: same id, process and port, the trail as told", proof.cycle),
        ("stopped by SIGSTOP: dead as silent; continued: alive again", proof.silence),
        ("killed by message: gone from other views as left", proof.kill),
        ("killed by signal 9: dead in other views as exited", proof.crash),
    ]
    for what, act in plan:
        tell(what)
        began = time.monotonic()
        try:
            text, verdict = await act(), "pass"
        except QuarterdeckError as why:
            text, verdict = str(why), "fail"
        took_ms = round((time.monotonic() - began) * 1000)
        findings.append(Finding(what, "pass" if verdict == "pass" else "fail", text, took_ms))
    findings.append(
        Finding("cross-mesh kill of a node the caller never spawned", "planned", "needs the backbone")
    )
    findings.append(Finding("lease takeover", "planned", "needs the lease"))
    return findings


class Proof:
    """The promises, each a method that returns what was seen or raises Broken."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        if sum(max(0, len(self._here(mesh)) - ENOUGH + 1) for mesh, _ in fleet.plan) < LOST:
            raise LocalError(
                "demo --check: too few nodes to lose some and see it; "
                "give it a mesh of 3 with --fleet, or two meshes of 2"
            )

    # --- the promises

    async def stranger(self) -> str:
        """`qd kill` with a key that nobody listed, as a process of its own: its exit status counts."""
        target = self._victim()
        with tempfile.TemporaryDirectory(prefix="qd-stranger-") as folder:
            key = Path(folder) / "id_ed25519"
            make_identity(key, "a stranger")
            code, err = await self._qd(
                "kill", target.id, "--via", target.mesh, "--operator-key", str(key), "--yes"
            )
        if code != NOT_AUTHORISED:
            raise Broken(f"qd kill {target.name} exits {code} ({err}), not {NOT_AUTHORISED}")
        await self._all_see(target, SETTLED, SOON_S)
        if not target.running():
            raise Broken(f"{target.name} has ended all the same")
        return f"exit {code}: {err.removeprefix('qd: ').partition(';')[0]}"

    async def cycle(self) -> str:
        """Drain, update and resume one node, and its own trail of states over it."""
        target = self._victim()
        pid, addr = target.pid, target.entry.addr if target.entry else None
        before = (await self._row(self._witnesses(target)[0], target)).get("incarnation")
        await self._op("drain", target)
        await self._all_see(target, {"draining"}, SOON_S)
        await self._op("update", target)
        back = functools.partial(self._restarted, target, before)
        await self._until(back, UPDATE_LIMIT_S, f"{target.name} to come back from its update")
        await self._op("resume", target)
        await self._all_see(target, SETTLED, SOON_S)
        if target.pid != pid or not target.running():
            raise Broken(f"{target.name} is not the same process")
        row = await self._row(self._witnesses(target)[0], target)
        if row.get("addr") != addr:
            raise Broken(f"{target.name} moved from {addr} to {row.get('addr')}")
        words = await self._trail(target)
        if not _holds(words, ["draining", "updating", "joining", "draining"]) or words[-1] not in SETTLED:
            raise Broken(f"its trail reads {' → '.join(words)}")
        return " → ".join(words)

    async def kill(self) -> str:
        """A kill by message, signed by the fleet's operator, through another node."""
        target = self._victim()
        answer = await self._op("kill", target)
        if answer["result"] != "done":
            raise Broken(f"kill of {target.name}: {answer['result']}: {answer['reason']}")
        seen = await self._until_all(target, self._left, SOON_S, "gone as left")
        await self._until(lambda: _true(not target.running()), SOON_S, f"the process of {target.name} to end")
        code = target.process.returncode if target.process else None
        if code != 0:
            raise Broken(f"{target.name} ended with {code}, not 0")
        return f"{target.name}: {answer['state']} in {answer['took_ms']} ms, left in {seen} views"

    async def crash(self) -> str:
        """SIGKILL, from outside: nobody says goodbye."""
        target = self._victim()
        os.kill(target.pid, signal.SIGKILL)
        seen = await self._until_all(target, self._dead_as("exited"), SOON_S, "dead as exited")
        return f"{target.name}: exited in {seen} views"

    async def silence(self) -> str:
        """SIGSTOP: the process is there and says nothing; SIGCONT brings it back."""
        target = self._victim()
        os.kill(target.pid, signal.SIGSTOP)
        try:
            seen = await self._until_all(target, self._dead_as("silent"), SILENT_LIMIT_S, "dead as silent")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target.pid, signal.SIGCONT)
        await self._all_see(target, SETTLED, UPDATE_LIMIT_S)
        return f"{target.name}: silent in {seen} views, alive again after SIGCONT"

    # --- whom to play on

    def _here(self, mesh: str) -> list[FleetNode]:
        return [n for n in self._fleet.nodes if n.mesh == mesh and n.running()]

    def _victim(self) -> FleetNode:
        """The last node of the mesh with most nodes running: gateways come first, so they stay longest."""
        mesh = max((m for m, _ in self._fleet.plan), key=lambda m: len(self._here(m)))
        here = self._here(mesh)
        if len(here) < ENOUGH:
            raise Broken(f"only {len(here)} nodes are left in {mesh}; {ENOUGH} are needed to see it")
        return here[-1]

    def _witnesses(self, target: FleetNode) -> list[FleetNode]:
        return [n for n in self._here(target.mesh) if n is not target]

    # --- what others see

    async def _rows(self, node: FleetNode) -> list[dict[str, Any]]:
        client = await self._client(node)
        return await client.nodes(node.mesh)

    async def _client(self, node: FleetNode) -> Client:
        if node.client is None or node.client.closed:
            assert node.entry is not None
            node.client = await attach_entry(self._fleet.home, node.entry)
        return node.client

    async def _row(self, witness: FleetNode, target: FleetNode) -> dict[str, Any]:
        return next((r for r in await self._rows(witness) if r.get("id") == target.id), {})

    async def _left(self, witness: FleetNode, target: FleetNode) -> bool:
        """Out of the view, and `left` is the evidence in the witness's own events."""
        if await self._row(witness, target):
            return False
        events = await (await self._client(witness)).events(200)
        return any(
            e.get("kind") == "node.evicted" and e.get("id") == target.id and e.get("source") == "left"
            for e in events
        )

    def _dead_as(self, kind: str) -> Callable[[FleetNode, FleetNode], Awaitable[bool]]:
        async def seen(witness: FleetNode, target: FleetNode) -> bool:
            row = await self._row(witness, target)
            evidence = row.get("evidence") or {}
            if row.get("state") == "dead" and evidence.get("kind") != kind:
                raise Broken(f"{witness.name} holds {target.name} dead as {evidence.get('kind')}, not {kind}")
            return bool(row.get("state") == "dead")

        return seen

    async def _all_see(self, target: FleetNode, states: frozenset[str] | set[str], limit_s: float) -> None:
        async def seen(witness: FleetNode, of: FleetNode) -> bool:
            return (await self._row(witness, of)).get("state") in states

        await self._until_all(target, seen, limit_s, " or ".join(sorted(states)))

    async def _until_all(
        self,
        target: FleetNode,
        seen: Callable[[FleetNode, FleetNode], Awaitable[bool]],
        limit_s: float,
        what: str,
    ) -> int:
        """Waits until every witness sees it; returns how many they are."""
        witnesses = self._witnesses(target)
        for witness in witnesses:
            held = functools.partial(seen, witness, target)
            await self._until(held, limit_s, f"{witness.name} to see {target.name} {what}")
        return len(witnesses)

    async def _until(self, held: Callable[[], Awaitable[bool]], limit_s: float, what: str) -> None:
        until = time.monotonic() + limit_s
        while True:
            try:
                if await held():
                    return
            except Broken:
                raise
            except QuarterdeckError:
                pass
            if time.monotonic() > until:
                raise Broken(f"waited {limit_s:g} s in vain for {what}")
            await asyncio.sleep(LOOK_EVERY_S)

    async def _restarted(self, target: FleetNode, before: object) -> bool:
        """Whether a witness sees `target` settled or draining in a new incarnation, and it answers itself."""
        row = await self._row(self._witnesses(target)[0], target)
        if row.get("incarnation") == before or row.get("state") not in SETTLED | {"draining"}:
            return False
        return bool(await self._rows(target))

    async def _trail(self, target: FleetNode) -> list[str]:
        """The states that it came into, as it tells itself: an update takes none of them with it."""
        events = await (await self._client(target)).events(500)
        own = [e for e in events if e.get("kind") == "node.state_changed" and e.get("id") == target.id]
        return [str(e.get("to")) for e in own]

    # --- acting

    async def _op(self, verb: str, target: FleetNode) -> dict[str, Any]:
        """One op through another node of the mesh, signed by the home's operator."""
        signer = await find_signer(self._fleet.home, None)
        client = await self._client(self._witnesses(target)[0])
        answer = await OpSender(client, signer).act(verb, target.id)
        if answer["result"] not in ("done", "accepted"):
            raise Broken(f"{verb} of {target.name}: {answer['result']}: {answer['reason']}")
        return answer

    async def _qd(self, *args: str) -> tuple[int, str]:
        """Exit status and stderr of a `qd` process of this home."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tui.cli", *args, "--home", str(self._fleet.home.root)),
            env=agent_environment(self._fleet.home),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await process.communicate()
        return process.returncode or 0, err.decode("utf-8", "replace").strip()


def _holds(trail: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted` occurs in `trail` in that order, other states in between allowed."""
    rest = iter(trail)
    return all(state in rest for state in wanted)


async def _true(value: bool) -> bool:
    return value
