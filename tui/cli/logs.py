"""`qd logs`: what a node tells of itself, asked of that very node, in whatever mesh and by whatever route."""

from __future__ import annotations

import click

from discovery.errors import Unreachable
from tui.cli.common import Scope, json_line, node_names, out, run, say, scoped
from tui.cli.failures import USAGE, Fail
from tui.cli.looking import EVENTS_KEPT


@click.command()
@click.argument("node", metavar="NODE", shell_complete=node_names)
@scoped("follow", "limit")
def logs(scope: Scope, node: str) -> None:
    """What NODE itself tells, oldest first: its own events, as it keeps them, also through a gateway."""
    if "/" in node:
        raise Fail(USAGE, f"logs {node}: this build runs no daemons; name a node alone, see `qd logs --help`")
    run(_logs(scope, node))


async def _logs(scope: Scope, text: str) -> None:
    from tui.cli.tables import event_line, events_lines
    from tui.ops import Aim

    limit = EVENTS_KEPT if scope.more["limit"] is None else scope.more["limit"]
    async with Aim(scope.home, scope.via, scope.mesh, scope.operator_key, say) as aim:
        target = await aim.resolve(text)
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
        raise Unreachable(f"{target.name}: it has gone")
