"""Commands that act on nodes, one for every op. Ask, sign, send, and tell how each op ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import QuarterdeckError, Refused
from tui.cli.common import Scope, document, node_names, on_terminal, out, run, say, scoped
from tui.cli.failures import (
    FAILED,
    OK,
    TIMED_OUT,
    UNREACHABLE,
    USAGE,
    Fail,
    line_of,
    refusal_status,
    status_of,
)

if TYPE_CHECKING:
    from tui.model.blast import Forecast
    from tui.ops import Target


ACTING = ("dry_run", "yes", "wait", "timeout")
CHAIN_LENGTH = 128
"""Characters of a chain's name, as an op carries it."""
NAMED_TARGETS = 16
"""Targets whose daemons are named in the blast radius; those of more are counted."""
nodes_argument = click.argument(
    "nodes", nargs=-1, required=True, metavar="NODE...", shell_complete=node_names
)


@click.command()
@nodes_argument
@scoped(*ACTING)
def kill(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Have NODEs say goodbye and end, by signed message."""
    return run(_act("kill", scope, {}, nodes))


@click.command()
@nodes_argument
@scoped(*ACTING, "deadline")
def drain(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Cordon NODEs and have them finish what they do."""
    deadline = scope.more["deadline"]
    return run(_act("drain", scope, {} if deadline is None else {"deadline_ms": deadline}, nodes))


@click.command()
@nodes_argument
@scoped(*ACTING)
def update(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Have NODEs check the code on their disk and run it, in place."""
    return run(_act("update", scope, {}, nodes))


@click.command()
@nodes_argument
@scoped(*ACTING)
def resume(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Lift what an operator set on NODEs."""
    return run(_act("resume", scope, {}, nodes))


@click.command()
@nodes_argument
@scoped(*ACTING)
def cordon(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Have NODEs take nothing new; what runs there stays."""
    return run(_act("cordon", scope, {}, nodes))


@click.command()
@nodes_argument
@scoped(*ACTING)
def uncordon(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Have NODEs take new work again."""
    return run(_act("uncordon", scope, {}, nodes))


@click.command()
@click.argument("way", metavar="enter|exit", type=click.Choice(["enter", "exit"]))
@nodes_argument
@scoped(*ACTING, "deadline")
def maintenance(scope: Scope, way: str, nodes: tuple[str, ...]) -> int:
    """Take NODEs out of use: daemons stopped, replicas moved off, failed when that isn't done by the deadline (10m).
    Exit starts their daemons again, and cancels an enter under way; after a recovery they are active."""
    deadline = scope.more["deadline"]
    if way == "exit" and deadline is not None:
        raise Fail(USAGE, "maintenance exit: takes no --deadline; leave it out")
    return run(
        _act(f"maintenance_{way}", scope, {} if deadline is None else {"deadline_ms": deadline}, nodes)
    )


@click.command()
@nodes_argument
@scoped(*ACTING)
def restart_daemons(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Stop every daemon of NODEs and start it again, through its gate."""
    return run(_act("restart_daemons", scope, {}, nodes))


@click.command()
@nodes_argument
@scoped(*ACTING)
def clear_avoid(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Have NODEs forget whom they avoid; they judge anew."""
    return run(_act("clear_avoid", scope, {}, nodes))


@click.command()
@click.argument("node", metavar="NODE", shell_complete=node_names)
@click.argument("chains", nargs=-1, required=True, metavar="CHAIN...")
@scoped(*ACTING)
def drop_replicas(scope: Scope, node: str, chains: tuple[str, ...]) -> int:
    """Have NODE give up its replicas of CHAINs, until it is to hold them again."""
    for chain in chains:
        if not 0 < len(chain) <= CHAIN_LENGTH or not chain.isprintable():
            why = f"a chain's name is 1 to {CHAIN_LENGTH} printable characters"
            raise Fail(USAGE, f"drop-replicas {chain[:40]!r}: {why}; `qd node {node}` shows what it holds")
    return run(_act("drop_replicas", scope, {"chains": list(dict.fromkeys(chains))}, [node]))


@click.command()
@nodes_argument
@scoped(*ACTING)
def invalidate_placement(scope: Scope, nodes: tuple[str, ...]) -> int:
    """Have NODEs place the chains they lead anew."""
    return run(_act("invalidate_placement", scope, {}, nodes))


async def _act(verb: str, scope: Scope, args: Mapping[str, Any], nodes: Sequence[str]) -> int:
    from tui.ops import Aim, act_on_all
    from tui.signers import find_signer

    wanted: str | None = scope.more["wait"]
    loop = asyncio.get_running_loop()
    until = loop.time() + scope.more["timeout"] / 1000
    async with Aim(scope.home, scope.via, scope.mesh, scope.operator_key, say) as aim:
        targets, missed = await _aim(aim, verb, nodes)
        for text, status, _ in missed:
            click.echo(line_of(text, status, verb), err=True)
        if scope.more["dry_run"]:
            return _show_radius(verb, scope, targets, missed, await _foresee(aim, verb, targets, args))
        if targets:
            signer = await find_signer(scope.home, scope.operator_key)
            if not (scope.more["yes"] or scope.json) and on_terminal():
                _ask(verb, targets, await _foresee(aim, verb, targets, args), signer.fingerprint)
                until = loop.time() + scope.more["timeout"] / 1000
            ended = await act_on_all(verb, targets, signer, args, max(0.1, until - loop.time()))
        else:
            ended = []
        statuses = [_status(result) for result in ended] + [status for _, status, _ in missed]
        if wanted is not None:
            statuses += await _wait(scope, verb, targets, ended, wanted, until)
    results = [_shown(result) for result in ended] + [row for _, _, row in missed]
    if scope.json:
        document(results)
    for result, target in zip(ended, targets, strict=True):
        _tell(scope, verb, result, target.name)
    return max(statuses, default=OK)


async def _aim(
    aim: Any, verb: str, nodes: Sequence[str]
) -> tuple[list[Target], list[tuple[str, int, dict[str, Any]]]]:
    """The targets meant, each once; and what could not be resolved as (why, exit status, result row).

    A wrong name (unknown or ambiguous) is told before anybody is asked or anything sent; it does not save the others.
    """
    targets: dict[str, Target] = {}
    missed = []
    await aim.first()
    for text in dict.fromkeys(nodes):
        try:
            target = await aim.resolve(text)
        except QuarterdeckError as why:
            status = status_of(why)
            if status == USAGE and len(nodes) == 1:
                raise
            result = "unreachable" if status == UNREACHABLE else "refused"
            missed.append((str(why), status, _row(verb, text, result, str(why))))
            continue
        targets.setdefault(target.id, target)
    return list(targets.values()), missed


async def _foresee(aim: Any, verb: str, targets: Sequence[Target], args: Mapping[str, Any]) -> Forecast:
    """What `verb` would do, from the views through which the targets are seen."""
    from tui.model.blast import STOPPING, forecast

    clients = {id(t.client): t.client for t in targets}.values()
    rows = [row for client in clients for row in await aim.rows(client)]
    meshes = [row for client in clients for row in await client.meshes()]
    daemons = await _running(targets) if verb in STOPPING else {}
    chains = args.get("chains", ())
    return forecast(rows, [t.id for t in targets], verb, meshes=meshes, daemons=daemons, chains=chains)


async def _running(targets: Sequence[Target]) -> dict[str, tuple[str, ...]]:
    """Which daemons run on the targets, as far as those tell it themselves; the others' are only counted."""
    from tui.model.daemons import Daemons

    book = Daemons()

    async def one(target: Target) -> None:
        with contextlib.suppress(QuarterdeckError):
            page = await target.client.node(target.id)
            if page.get("answered_by") == target.name:
                book.learn(target.id, page.get("daemons"), 0.0)

    some = [t for t in targets if ((t.row or {}).get("daemons") or {}).get("running")]
    await asyncio.gather(*map(one, some[:NAMED_TARGETS]))
    return book.names(0.0)


def _show_radius(
    verb: str,
    scope: Scope,
    targets: Sequence[Target],
    missed: Sequence[tuple[str, int, dict[str, Any]]],
    forecast: Forecast,
) -> int:
    """The forecast alone. With --json a row a target, as an op's, with nothing sent and the forecast in `blast`."""
    if scope.json:
        effects = dict(forecast.lines)
        shown = [
            {
                **_row(verb, target.name, None, None),
                "state": target.state,
                "id": target.id,
                "mesh": target.mesh,
                "dry_run": True,
                "blast": effects.get(target.name),
                "warnings": list(forecast.warnings),
                "data_age_ms": forecast.data_age_ms,
            }
            for target in targets
        ]
        document(shown + [row for _, _, row in missed])
    else:
        out("\n".join([*_radius(forecast), "nothing was sent"]))
    return max((status for _, status, _ in missed), default=OK)


def _ask(verb: str, targets: Sequence[Target], forecast: Forecast, fingerprint: str) -> None:
    """Shows the blast radius and asks; raises unless the person says yes (or types the number of targets)."""
    for line in _radius(forecast):
        say(line)
    say(f"signed as {fingerprint}")
    count = len(targets)
    if forecast.needs_count:
        asked = f"type {count} to send it, anything else to leave it"
        if click.prompt(asked, default="", show_default=False, err=True).strip() == str(count):
            return
    elif click.confirm("send it?", err=True):
        return
    raise Fail(FAILED, f"{verb}: not confirmed; nothing was sent")


def _radius(forecast: Forecast) -> list[str]:
    """A forecast as lines."""
    from tui.model.blast import age_text
    from tui.model.text import pad, width

    widest = max((width(name) for name, _ in forecast.lines), default=0)
    lines = [f"{forecast.title}:", *(f"  {pad(name, widest)}  {effect}" for name, effect in forecast.lines)]
    return [*lines, *(f"  ! {warning}" for warning in forecast.warnings), age_text(forecast.data_age_ms)]


async def _wait(
    scope: Scope,
    verb: str,
    targets: Sequence[Target],
    ended: Sequence[dict[str, Any]],
    wanted: str,
    until: float,
) -> list[int]:
    """Waits for those whose op was taken; what came of it stands in each result's `wait`."""
    from tui.ops import wait_for

    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(target: Target, result: dict[str, Any]) -> int:
        failure = None
        try:
            reached = await wait_for(
                scope.home,
                target,
                wanted,
                until - loop.time(),
                scope.operator_key,
                restarted=verb == "update",
            )
        except Refused as why:
            reached, failure = False, why.sentence
        result["wait"] = {"state": wanted, "reached": reached, "ms": round((loop.time() - began) * 1000)}
        if failure is not None:
            result["wait"]["reason"] = failure
            click.echo(line_of(failure, FAILED, verb), err=True)
            return FAILED
        if not reached:
            text = f"{target.name}: not {wanted} within {scope.more['timeout'] / 1000:g} s"
            click.echo(line_of(text, TIMED_OUT, verb), err=True)
        return OK if reached else TIMED_OUT

    taken = [
        (t, r) for t, r in zip(targets, ended, strict=True) if r["result"] in ("done", "accepted", "unknown")
    ]
    return list(await asyncio.gather(*(one(t, r) for t, r in taken)))


def _status(result: Mapping[str, Any]) -> int:
    """The exit status of one op's result."""
    word = result["result"]
    if word in ("done", "accepted"):
        return OK
    if word == "refused":
        return refusal_status(str(result.get("code")))
    return UNREACHABLE


def _shown(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is printed: the promised keys first, then what else is known."""
    from tui.ops import RESULT_KEYS

    extra = {k: v for k, v in result.items() if k not in RESULT_KEYS and k != "name"}
    return {**{key: result.get(key) for key in RESULT_KEYS}, **extra}


def _row(verb: str, target: str, result: str | None, reason: str | None) -> dict[str, Any]:
    from tui.ops import RESULT_KEYS

    return {**dict.fromkeys(RESULT_KEYS), "target": target, "op": verb, "result": result, "reason": reason}


def _tell(scope: Scope, verb: str, result: Mapping[str, Any], name: str) -> None:
    """One line a target: on stdout when it went well, else an error line on stderr."""
    from tui.cli.tables import result_line

    skew = result.get("skew_ms")
    if isinstance(skew, int | float) and abs(skew) > 30_000:
        say(
            f"{name}: its clock is {abs(skew) / 1000:.0f} s {'ahead' if skew > 0 else 'behind'}; check its time service"
        )
    status = _status(result)
    if status == OK:
        if not scope.json:
            out(result_line({**result, "target": name}))
        return
    why = result.get("reason") or result.get("result")
    code = f" ({result['code']})" if result.get("code") else ""
    word = "outcome unknown: " if result["result"] == "unknown" else ""
    click.echo(line_of(f"{verb} {name}: {word}{why}{code}", status, verb), err=True)
