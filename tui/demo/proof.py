"""The proof: what this build promises about a fleet, played on a real one and judged from other nodes' views."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.home import make_identity
from agent.meshes import CANDIDATES
from agent.spawn import agent_environment
from discovery.errors import LocalError, QuarterdeckError
from tui.client import Client, attach_entry
from tui.demo.fleet import SETTLED, Fleet, FleetNode
from tui.ops import OpSender
from tui.signers import find_signer

Verdict = Literal["pass", "fail"]

SOON_S = 5.0
"""What other nodes learn by gossip."""
ACROSS_LIMIT_S = 20.0
"""Until the meshes know each other: a lone candidate listens for 4 s before it publishes."""
LEASE_LIMIT_S = 7.0
"""A claim's time to live and a second."""
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
        ("every view lists the same meshes and nodes", proof.everywhere),
        ("lease: its holder is killed by signal 9, another publishes, no view blanks", proof.takeover),
    ]
    if len(fleet.plan) > 1:
        plan.append(("killed by message from another mesh, by who never spawned it", proof.across))
    plan += [
        ("an unknown operator is refused with exit 4, and the node lives", proof.stranger),
        ("drain → update → resume: same id, process and port, the trail as told", proof.cycle),
        ("a spec is applied: its daemon runs; maintenance ends it there, exit brings it back", proof.daemon),
        ("every op is in the audit of another node, and stock ssh-keygen verifies it", proof.audited),
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

    async def everywhere(self) -> str:
        """The first and the last node of every mesh show all nodes of all meshes that somebody can publish."""
        viewers = [
            n
            for mesh, _ in self._fleet.plan
            for n in dict.fromkeys((self._here(mesh)[0], self._here(mesh)[-1]))
        ]
        for viewer in viewers:
            meshes = {mesh for mesh, _ in self._fleet.plan if mesh == viewer.mesh or self._candidates(mesh)}
            wanted = {n.id for n in self._fleet.nodes if n.mesh in meshes and n.running()}

            async def same(viewer: FleetNode = viewer, wanted: set[str] = wanted) -> bool:
                rows = await (await self._client(viewer)).nodes()
                return {str(r["id"]) for r in rows if r.get("state") in SETTLED} == wanted

            await self._until(same, ACROSS_LIMIT_S, f"{viewer.name} to show all {len(wanted)} nodes")
        return f"{len(viewers)} views of {len(self._fleet.plan)} meshes"

    async def takeover(self) -> str:
        """Kills the holder of a lease and watches who publishes, from the own mesh and from another one."""
        mesh = self._fleet.plan[0][0]
        while len(self._candidates(mesh)) < ENOUGH:
            await self._fleet.add(mesh, "gateway")
        viewers = [n for n in (self._here(mesh)[-1], *self._elsewhere(mesh)[:1]) if n]

        async def published() -> bool:
            return all([(await self._mesh(v, mesh)).get("publisher", {}).get("id") for v in viewers])

        await self._until(published, ACROSS_LIMIT_S, f"a publisher of {mesh}")
        holder = (await self._mesh(viewers[0], mesh))["publisher"]["id"]
        target = next(n for n in self._here(mesh) if n.id == holder)
        viewers = [v for v in viewers if v is not target] or [self._witnesses(target)[0]]
        os.kill(target.pid, signal.SIGKILL)
        began = time.monotonic()

        async def another() -> bool:
            found = [await self._mesh(v, mesh) for v in viewers]
            if any(not row or row["expired"] for row in found):
                raise Broken(f"{mesh} went blank in a view while its lease moved")
            return all(row["publisher"]["id"] not in (None, holder) for row in found)

        await self._until(another, LEASE_LIMIT_S, f"another node than {target.name} to publish {mesh}")
        took_s = time.monotonic() - began
        name = (await self._mesh(viewers[0], mesh))["publisher"]["name"]
        await self._until_all(target, self._dead_as("exited"), SOON_S, "dead as exited")
        return f"{target.name} → {name} in {took_s:.2f} s, seen in {len(viewers)} views"

    async def across(self) -> str:
        """A gateway of one mesh, killed through an agent of another; a further gateway keeps its mesh in view."""
        mesh = self._fleet.plan[1][0]
        caller = self._elsewhere(mesh)[0]
        await self._fleet.add(mesh, "gateway")
        target = self._candidates(mesh)[-1]
        seen = functools.partial(self._in_view, caller, target)
        await self._until(seen, ACROSS_LIMIT_S, f"{caller.name} to see {target.name}")
        answer = await self._op("kill", target, caller)
        await self._until(lambda: _true(not target.running()), SOON_S, f"the process of {target.name} to end")
        began = time.monotonic()
        for witness in (caller, *self._witnesses(target)):
            left = functools.partial(self._left, witness, target)
            await self._until(left, SOON_S, f"{witness.name} to see {target.name} gone as left")
        return (
            f"{caller.name} killed {target.name} ({answer['route']}, {answer['took_ms']} ms), "
            f"left in {1 + len(self._witnesses(target))} views within {time.monotonic() - began:.2f} s"
        )

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

    async def daemon(self) -> str:
        """Applies a spec that pins a daemon to a node, puts that node into maintenance and back."""
        target = self._here(self._fleet.plan[0][0])[-1]
        witness = self._witnesses(target)[0]
        with tempfile.TemporaryDirectory() as place:
            spec = Path(place) / "fleet.toml"
            spec.write_text(
                f'[[daemon]]\nname = "proof"\ncommand = ["sleep", "3600"]\non = "node={target.name}"\n'
            )
            code, said = await self._qd("apply", str(spec), "--via", witness.name, "--json")
        if code:
            raise Broken(f"qd apply: exit {code}: {said}")

        async def runs() -> int | None:
            rows = (await (await self._client(witness)).daemons(target.mesh))["rows"]
            found = next((r for r in rows if r["name"] == "proof" and r["node_id"] == target.id), None)
            return found["pid"] if found is not None and found["state"] == "running" else None

        async def running() -> bool:
            return await runs() is not None

        async def in_maintenance() -> bool:
            return (await self._row(witness, target)).get("maintenance") == "maintenance"

        await self._until(running, SOON_S, f"the daemon to run on {target.name}")
        first = await runs()
        await self._op("maintenance_enter", target, witness)
        await self._until(in_maintenance, SOON_S, f"{target.name} to be in maintenance")
        if await running():
            raise Broken(f"{target.name} is in maintenance and still runs the daemon")
        await self._op("maintenance_exit", target, witness)
        await self._until(running, SOON_S, f"the daemon to run on {target.name} again")
        return f"{target.name}: process {first}, then {await runs()}"

    async def audited(self) -> str:
        """Exports the audit from a node that took none of the ops, and has ssh-keygen verify each of them."""
        mesh = self._fleet.plan[0][0]
        viewer = self._here(mesh)[0]
        if shutil.which("ssh-keygen") is None:
            raise Broken("ssh-keygen is not installed: the audit can't be verified")
        with tempfile.TemporaryDirectory() as place:
            code, said = await self._qd("audit", "--export", place, "--via", viewer.name)
            if code:
                raise Broken(f"qd audit: exit {code}: {said}")
            signed = sorted(Path(place).glob("*.json.sig"))
            if not signed:
                raise Broken("no op in the audit")
            for signature in signed:
                process = await asyncio.create_subprocess_exec(
                    *("ssh-keygen", "-Y", "verify", "-I", "operator", "-n", "quarterdeck-op"),
                    *("-f", str(Path(place) / "allowed_signers"), "-s", str(signature)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )
                output, _ = await process.communicate(signature.with_suffix("").read_bytes())
                if process.returncode:
                    raise Broken(f"{signature.stem}: {output.decode(errors='replace').strip()}")
        return f"{len(signed)} ops as {viewer.name} has them"

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

    def _elsewhere(self, mesh: str) -> list[FleetNode]:
        """Running nodes of other meshes, candidates first."""
        found = [n for m, _ in self._fleet.plan if m != mesh for n in self._here(m)]
        return sorted(found, key=lambda n: n.kind not in CANDIDATES)

    def _candidates(self, mesh: str) -> list[FleetNode]:
        """Those that may publish that mesh."""
        return [n for n in self._here(mesh) if n.kind in CANDIDATES]

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

    async def _mesh(self, viewer: FleetNode, mesh: str) -> dict[str, Any]:
        rows = await (await self._client(viewer)).meshes()
        return next((row for row in rows if row.get("mesh") == mesh), {})

    async def _in_view(self, viewer: FleetNode, target: FleetNode) -> bool:
        rows = await (await self._client(viewer)).nodes()
        return any(row.get("id") == target.id for row in rows)

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

    async def _op(self, verb: str, target: FleetNode, via: FleetNode | None = None) -> dict[str, Any]:
        """One op through another node (of the mesh, unless `via` names one), signed by the home's operator."""
        signer = await find_signer(self._fleet.home, None)
        client = await self._client(via or self._witnesses(target)[0])
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
