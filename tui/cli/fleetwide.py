"""Commands that ask the whole fleet: daemons, failures, chains. Who doesn't answer is told, and does not hide the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from tui.cli.common import Scope, document, out, run, say, scoped
from tui.cli.looking import known_meshes

DAEMON_KEYS = (
    *("name", "node", "mesh", "state", "health", "reason", "saturation", "restarts", "until_ms", "pid"),
    "age_ms",
)
"""What `qd daemons` promises of each; what an agent adds follows."""
FAILURE_KEYS = (
    *("at_ms", "age_ms", "node", "mesh", "source", "action", "target", "reason", "retry_after_ms"),
    "from_replica",
)


@click.command()
@scoped()
def daemons(scope: Scope) -> None:
    """Every daemon of every live node, as that node tells it."""
    run(_show(scope, "daemons", DAEMON_KEYS))


@click.command()
@scoped()
def failures(scope: Scope) -> None:
    """The failure rings of every live node, and of dead ones as their replicas have them."""
    run(_show(scope, "failures", FAILURE_KEYS))


@click.command()
@scoped()
def chains(scope: Scope) -> None:
    """Chains and artifacts of the answering node's mesh: how many hold each, and who."""
    run(_chains(scope))


async def _chains(scope: Scope) -> None:
    from tui.cli.tables import chains_table

    async with await scope.attach() as client:
        answer = await client.chains(scope.mesh)
    if scope.json:
        document(answer["rows"])
    else:
        out(chains_table(answer["rows"]))
    tell_silent(answer)


async def _show(scope: Scope, what: str, keys: Sequence[str]) -> None:
    from tui.cli.tables import daemons_table, failures_table

    async with await scope.attach() as client:
        if scope.mesh is not None:
            await known_meshes(client, scope.mesh)
        answer = await getattr(client, what)(scope.mesh)
    rows = [whole(row, keys) for row in answer["rows"]]
    if scope.json:
        document(rows)
    else:
        out((daemons_table if what == "daemons" else failures_table)(rows))
    tell_silent(answer)


def whole(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A row with every promised key, first and in their order."""
    return {**{key: row.get(key) for key in keys}, **row}


def tell_silent(answer: Mapping[str, Any]) -> None:
    """Names who didn't answer, on stderr."""
    silent = [str(name) for name in answer.get("silent") or []]
    if silent:
        nodes = "1 node" if len(silent) == 1 else f"{len(silent)} nodes"
        say(f"no answer from {nodes}: {', '.join(silent)}")
