"""Commands that let hosts into a mesh and keep its key: invite, join, rotate-key."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from discovery.errors import LocalError, Refused, RemoteError, Unreachable
from tui.cli.common import Scope, document, on_terminal, out, run, say, scoped
from tui.cli.failures import FAILED, OK, TIMED_OUT, UNREACHABLE, USAGE, Fail, line_of, refusal_status

if TYPE_CHECKING:
    from agent.admission import Glance, Token
    from agent.founding import Joining
    from agent.home import Home
    from discovery.links import Link
    from discovery.member import Addr
    from tui.client import Client

DIAL_LIMIT_S = 4.0
ANSWER_LIMIT_S = 10.0
CLOCK_TOLD_MS = 30_000
POLL_EVERY_S = 0.2
TOKEN_MAX_CHARS = 4096


# --- invite


@click.command()
@scoped("ttl")
def invite(scope: Scope) -> None:
    """Make a token with which one further host can join the mesh, once."""
    run(_invite(scope))


async def _invite(scope: Scope) -> None:
    from agent.admission import TTL_MAX_MS, TTL_MIN_MS

    ttl_ms = int(scope.more["ttl"])
    if not TTL_MIN_MS <= ttl_ms <= TTL_MAX_MS:
        raise Fail(USAGE, "invite: an invitation is good for 1 s to 24 h; give it another --ttl")
    async with await scope.attach() as client:
        _of_mesh(client, scope.mesh, "invite")
        given = {**await client.ask("invite", {"ttl_ms": ttl_ms}), "node": client.name, "id": client.id}
    if scope.json:
        document(given)
        return
    out(str(given["token"]))
    say(f"good once, for {_span(ttl_ms)}, at {', '.join(given['addrs'])} ({client.name}); on the new host:")
    say("  qd join TOKEN")
    if all(_loopback(addr) for addr in given["addrs"]):
        say(f"{client.name} has no address but loopback: the token serves this host alone")


def _of_mesh(client: Client, mesh: str | None, what: str) -> None:
    """Keys are the business of a mesh's own nodes."""
    if mesh is not None and client.mesh != mesh:
        raise Fail(
            USAGE, f"{what}: {client.name} is of mesh {client.mesh}; name a node of mesh {mesh} with --via"
        )


def _loopback(addr: str) -> bool:
    from agent.addresses import is_loopback
    from agent.config import host_port

    return is_loopback(host_port(addr))


# --- join


@click.command()
@click.argument("token", metavar="TOKEN")
@scoped(reach=("home", "json"))
def join(scope: Scope, token: str) -> None:
    """Join a mesh with the TOKEN that `qd invite` printed there; - reads it from stdin."""
    from agent.admission import read_token

    if token == "-":
        token = sys.stdin.read(TOKEN_MAX_CHARS) if sys.stdin is not None else ""
    run(_join(scope, read_token(token)))


async def _join(scope: Scope, token: Token) -> None:
    from agent.founding import holds_already, join_mesh, make_folders

    home, mesh = scope.home, token.mesh
    late_s = time.time() - token.expires_s
    if late_s > 0:
        say(f"by this host's clock the invitation expired {_span(late_s * 1000)} ago; the other host decides")
    link, met = await _knock(token)
    try:
        glance = _read(await _ask(link, "admission"), "Glance")
        if glance.mesh != mesh:
            raise RemoteError(f"invitation: for mesh {mesh}, and {met[0]} is of another")
        _tell_clock(glance)
        same = holds_already(home, glance)
        if same and glance.state != "open":
            _tell_same(scope, glance)
            return
        make_folders(home, mesh)
        try:
            bundle = _read(await _ask(link, "join"), "Bundle")
        except Unreachable as why:
            raise Unreachable(
                f"invitation: {why}; it may be spent: ask for a new one with `qd invite`", maybe_arrived=True
            ) from why
    finally:
        await link.close()
    try:
        joining = join_mesh(home, mesh, bundle, met)
    except LocalError as why:
        what, _, cure = str(why).partition("; ")
        raise Fail(
            FAILED, f"{what}; {cure or 'see `qd doctor`'}; then ask for a new invitation: this one is spent"
        ) from why
    if scope.json:
        document(_joined(home, joining, glance.node))
    else:
        out(_joining_text(home, joining, glance.node))


async def _knock(token: Token) -> tuple[Link, list[Addr]]:
    """A link to the agent that gave the token, and where it answered, with its other addresses behind."""
    from discovery.links import dial
    from discovery.member import addr_text

    missed: list[str] = []
    other: Refused | None = None
    for addr in token.addrs:
        try:
            link = await dial(
                addr,
                identity=token.key(),
                username="join",
                expect_pub=token.host_pub,
                timeout_s=DIAL_LIMIT_S,
            )
            return link, [addr, *(a for a in token.addrs if a != addr)]
        except Refused as why:
            if why.code == "login":
                raise Fail(
                    FAILED,
                    f"invitation: not known at {addr_text(addr)} (invitation_unknown); ask for a new one with `qd invite`",
                ) from why
            if why.code != "host_key":
                raise
            other = why
        except (Unreachable, RemoteError) as why:
            missed.append(str(why))
    if other is not None:
        raise Fail(
            FAILED, f"invitation: {other.sentence}; nothing was sent: ask for a new one with `qd invite`"
        )
    raise Unreachable(f"invitation: {', '.join(missed)}; is that node running, and reachable from here?")


async def _ask(link: Link, method: str) -> Any:
    try:
        return await link.call(method, {}, ANSWER_LIMIT_S)
    except Refused as why:
        what, _, cure = why.sentence.partition("; ")
        raise Fail(FAILED, f"{what} ({why.code}); {cure or 'ask for a new one with `qd invite`'}") from why


def _read(answer: Any, kind: str) -> Any:
    from agent import admission

    try:
        return msgspec.convert(answer, getattr(admission, kind))
    except msgspec.ValidationError as why:
        raise RemoteError(f"invitation: an answer that makes no sense: {why}") from why


def _tell_clock(glance: Glance) -> None:
    off_ms = glance.wall_ms - time.time() * 1000
    if abs(off_ms) > CLOCK_TOLD_MS:
        way = "ahead of" if off_ms > 0 else "behind"
        say(f"{glance.node}: its clock is {_span(abs(off_ms))} {way} this host's; check the time service")


def _tell_same(scope: Scope, glance: Glance) -> None:
    """This home joined before: the same token again changes nothing."""
    if scope.json:
        document(
            {"mesh": glance.mesh, "home": _root(scope.home), "config": str(scope.home.config)}
            | {"created": False, "made": [], "changed": [], "by": glance.node}
            | {
                "generation": glance.ring[0],
                "operators": {"added": 0, "had": None},
                "seeds": [],
                "operator": None,
            }
        )
    else:
        out(
            f"mesh {glance.mesh} is in {scope.home.config} already, just as {glance.node} has it; nothing changed"
        )


def _joined(home: Home, joining: Joining, by: str) -> dict[str, Any]:
    from discovery.member import addr_text

    return {
        "mesh": joining.mesh,
        "home": _root(home),
        "config": str(home.config),
        "created": joining.created,
        "made": [str(path) for path in joining.made],
        "changed": [str(path) for path in joining.changed],
        "by": by,
        "generation": joining.generation,
        "operators": {"added": joining.operators_added, "had": joining.operators_had},
        "seeds": [addr_text(addr) for addr in joining.seeds],
        "operator": joining.operator_fingerprint,
    }


def _joining_text(home: Home, joining: Joining, by: str) -> str:
    """What came, and what to do next."""
    mesh = joining.mesh
    here = f" --home {shlex.quote(str(home.root))}" if home.root else ""
    done = "joined" if joining.created else "was here; brought up to date"
    lines = [f"mesh {mesh} {done}, invited by {by}, in {home.config}"]
    lines += [f"  made {path}" for path in joining.made]
    lines += [f"  changed {path}" for path in joining.changed]
    added, had = joining.operators_added, joining.operators_had
    lines.append(f"  operators: {added} added, {had} were listed here already")
    lines.append(
        f"  this home's own operator {joining.operator_fingerprint} commands the nodes of this home;"
    )
    lines.append("  for others it has to be listed in their authorized_operators")
    lines += [
        "",
        "start a node here and look at the mesh:",
        f"  qd agent --mesh {mesh}{here}",
        f"  qd nodes{here}",
    ]
    if not joining.created:
        lines.append("nodes of this home that run already take a new key within seconds")
    return "\n".join(lines)


def _root(home: Home) -> str | None:
    return str(home.root) if home.root else None


# --- rotate-key


@click.command("rotate-key")
@scoped("retire", "yes", "timeout")
def rotate_key(scope: Scope) -> int:
    """Give the mesh a new key: every node gets it over SSH, then all seal with it, and the old one retires."""
    return run(_rotate(scope))


async def _rotate(scope: Scope) -> int:
    from tui.ops import OpSender
    from tui.signers import find_signer

    retire_ms = int(scope.more["retire"])
    _check_retire(retire_ms)
    loop = asyncio.get_running_loop()
    async with await scope.attach() as client:
        _of_mesh(client, scope.mesh, "rotate-key")
        before = await client.ask("keys")
        signer = await find_signer(scope.home, scope.operator_key)
        if before["away"]:
            say(f"away: {', '.join(before['away'])}; back within {_span(retire_ms)}, or to be invited anew")
        if not (scope.more["yes"] or scope.json) and on_terminal():
            others = sum(row["state"] != "dead" for row in before["members"])
            say(
                f"mesh {client.mesh}: a new key for {client.name} and {others} other nodes; signed as {signer.fingerprint}"
            )
            if not click.confirm("rotate it?", err=True):
                raise Fail(FAILED, "rotate-key: not confirmed; nothing was sent")
        began = loop.time()
        until = began + scope.more["timeout"] / 1000
        result = await OpSender(client, signer).act(
            "rotate_key", client.id, {"retire_ms": retire_ms}, max(0.1, until - loop.time())
        )
        after: dict[str, Any] = before
        if result["result"] == "accepted":
            after = await _wait_switched(client, before["generation"] + 2, until)
        result |= {"target": client.name, "id": client.id, "mesh": client.mesh, "keys": after}
        result["took_ms"] = round((loop.time() - began) * 1000, 1)
    if scope.json:
        document([result])
    return _tell_rotated(scope, result, before, retire_ms)


def _check_retire(retire_ms: int) -> None:
    from agent.opmessage import DEADLINE_MAX_MS, RETIRE_MIN_MS

    if not RETIRE_MIN_MS <= retire_ms <= DEADLINE_MAX_MS:
        raise Fail(USAGE, "rotate-key: an old key opens for 1 s to 7 days; give it another --retire")


async def _wait_switched(client: Client, generation: int, until: float) -> dict[str, Any]:
    """The state of the keys once every present member seals with the new one, or when the time is over."""
    loop = asyncio.get_running_loop()
    while True:
        keys = await client.ask("keys")
        switched = keys["generation"] >= generation and keys["stage"] != "spreading"
        if (switched and not keys["waiting_for"]) or loop.time() >= until:
            return keys
        await asyncio.sleep(POLL_EVERY_S)


def _tell_rotated(scope: Scope, result: dict[str, Any], before: dict[str, Any], retire_ms: int) -> int:
    if result["result"] != "accepted":
        why = result.get("reason") or result["result"]
        code = f" ({result['code']})" if result.get("code") else ""
        refused = result["result"] == "refused"
        status = refusal_status(str(result.get("code"))) if refused else UNREACHABLE
        click.echo(line_of(f"rotate-key {result['target']}: {why}{code}", status, "rotate-key"), err=True)
        return status
    keys = result["keys"]
    mesh, waiting = result["mesh"], keys["waiting_for"]
    spreading = keys["generation"] < before["generation"] + 2
    if spreading or waiting:
        reasons = {row["name"]: row["reason"] for row in keys["members"]}
        names = ", ".join(f"{n} ({reasons[n]})" if reasons.get(n) else n for n in waiting) or "its driver"
        where = (
            "nothing seals with it yet, and it goes on by itself" if spreading else "the rest has switched"
        )
        text = f"mesh {mesh}: the new key still waits for {names}; {where}"
        click.echo(line_of(text, TIMED_OUT, "rotate-key"), err=True)
        return TIMED_OUT
    if not scope.json:
        count = sum(row["state"] not in ("dead", "leaving") for row in keys["members"]) + 1
        out(
            f"mesh {mesh}: key rotated, generation {keys['generation']}; "
            f"{count} node{'s' * (count != 1)} seal{'s' * (count == 1)} with it, "
            f"the old one opens for {_span(retire_ms)} more"
        )
    return OK


def _span(ms: float) -> str:
    """A duration for people."""
    for unit, size in (("h", 3_600_000), ("min", 60_000)):
        if ms >= 2 * size or ms == size:
            return f"{ms / size:.3g} {unit}"
    return f"{ms / 1000:.3g} s"
