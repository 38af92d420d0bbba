"""`qd logs`: the log of a daemon, or what a node tells of itself; asked of that very node, by whatever route."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import Unreachable
from tui.cli.common import Scope, json_line, node_names, out, run, say, scoped
from tui.cli.failures import USAGE, Fail
from tui.cli.looking import EVENTS_KEPT

if TYPE_CHECKING:
    from tui.ops import Target

LINES_KEPT = 2_048
"""Lines of a daemon that its node keeps at hand."""


@click.command()
@click.argument("source", metavar="NODE/DAEMON", shell_complete=node_names)
@scoped("follow", "limit")
def logs(scope: Scope, source: str) -> None:
    """The log of DAEMON on NODE, oldest first; of NODE alone, its own events as it keeps them."""
    node, slash, daemon = source.partition("/")
    if not node or (slash and not daemon):
        raise Fail(USAGE, f"logs {source}: no such form; write NODE/DAEMON, or NODE: `qd daemons` shows them")
    run(_logs(scope, node, daemon))


async def _logs(scope: Scope, text: str, daemon: str) -> None:
    from tui.ops import Aim

    async with Aim(scope.home, scope.via, scope.mesh, scope.operator_key, say) as aim:
        target = await aim.resolve(text)
        await (_daemon(scope, target, daemon) if daemon else _events(scope, target))
        if scope.more["follow"]:
            raise Unreachable(f"{target.name}: it has gone")


async def _daemon(scope: Scope, target: Target, daemon: str) -> None:
    limit = LINES_KEPT if scope.more["limit"] is None else scope.more["limit"]
    lines = target.client.daemon_log(target.id, daemon, limit, scope.more["follow"])
    async with contextlib.aclosing(lines):
        async for item in lines:
            if scope.json:
                json_line({"at_ms": None, "node": target.name, "daemon": daemon, "line": None} | item)
            else:
                out(_line(item))


def _line(item: Mapping[str, Any]) -> str:
    from tui.model.ages import clock, number
    from tui.model.logs import Source, text_of

    return f"{clock(number(item.get('at_ms')))}  {text_of(Source('', '', daemon='-'), item)}"


async def _events(scope: Scope, target: Target) -> None:
    from tui.cli.tables import event_line, events_lines

    limit = EVENTS_KEPT if scope.more["limit"] is None else scope.more["limit"]
    if not scope.more["follow"]:
        kept = await target.client.events(limit, target.id)
        if scope.json:
            for event in kept:
                json_line(event)
        else:
            out(events_lines(kept))
        return
    async for event in target.client.follow(limit, target.id):
        if scope.json:
            json_line(event)
        else:
            out(event_line(event))
