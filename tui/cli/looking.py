"""Commands that only look: nodes, node, meshes, events, view."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import Refused, Unreachable
from tui.cli.common import Scope, document, is_terminal, json_line, node_names, out, run, say, scoped
from tui.cli.failures import USAGE, Fail

if TYPE_CHECKING:
    from tui.client import Client
    from tui.model.locator import Locator

EVENTS_KEPT = 10_000
REDRAW_EVERY_S = 0.5

NODE_PAGE: dict[str, Any] = {
    "node": {},
    "daemons": [],
    "replicas": [],
    "peers": [],
    "avoid_list": [],
    "local_maintenance": {},
    "recently_emitted": [],
    "recent_failures": [],
    "stats": {},
    "answered_by": None,
    "age_ms": None,
}
"""Every key that `qd node` promises, with what stands there when the agent says nothing about it."""


@click.command()
@scoped("watch")
def nodes(scope: Scope) -> None:
    """Every node that the answering node sees, in every mesh it knows."""
    run(_watch(scope) if scope.more["watch"] else _nodes(scope))


async def _nodes(scope: Scope) -> None:
    from tui.cli.tables import nodes_table

    async with await scope.attach() as client:
        rows = await client.nodes(scope.mesh)
        if scope.json:
            document(rows)
        else:
            out(nodes_table(rows, client.id))


async def _watch(scope: Scope) -> None:
    """With --json a row is printed when it is new or changed, and a last time, `gone` true, when it leaves."""
    from tui.cli.tables import nodes_table

    async with await scope.attach() as client:
        await client.nodes_answer(scope.mesh)
        rows: dict[str, dict[str, Any]] = {}
        redraw, drawn = is_terminal(sys.stdout), 0.0
        async for frame in client.watch(scope.mesh, events=0):
            changed = [r for r in frame.get("rows") or [] if scope.mesh in (None, r.get("mesh"))]
            for row in changed:
                rows[str(row.get("id"))] = row
            gone = [rows.pop(str(node)) for node in frame.get("gone") or [] if str(node) in rows]
            if scope.json:
                for row in changed:
                    json_line({**row, "gone": False})
                for row in gone:
                    json_line({**row, "gone": True})
            elif redraw and (frame.get("full") or time.monotonic() - drawn >= REDRAW_EVERY_S):
                drawn = time.monotonic()
                click.clear()
                out(nodes_table(list(rows.values()), client.id))
            elif not redraw and (changed or gone):
                out(nodes_table(list(rows.values()), client.id) + "\n")
        raise Unreachable(f"{client.name}: the agent has gone")


@click.command()
@click.argument("node_", metavar="NODE", shell_complete=node_names)
@scoped()
def node(scope: Scope, node_: str) -> None:
    """Everything that the answering node knows about NODE (a name, an id, or the beginning of one)."""
    run(_node(scope, node_))


async def _node(scope: Scope, text: str) -> None:
    from tui.cli.tables import node_page
    from tui.ops import Aim

    async with Aim(scope.home, scope.via, scope.mesh, scope.operator_key, say) as aim:
        try:
            target = await aim.resolve(text)
            told = await target.client.node(target.id)
        except Refused as why:
            if why.code != "gone":
                raise
            try:  # its row is gone, and its last may still be held
                told = await (await aim.first()).last(text)
            except Refused:
                raise why from None
        page = {**NODE_PAGE, **told}
        if scope.json:
            document(page)
        else:
            out(node_page(page))


@click.command()
@scoped()
def meshes(scope: Scope) -> None:
    """The meshes that the answering node knows."""
    run(_meshes(scope))


async def _meshes(scope: Scope) -> None:
    from tui.cli.tables import meshes_table

    async with await scope.attach() as client:
        rows = await known_meshes(client, scope.mesh)
    if scope.json:
        document(rows)
    else:
        out(meshes_table(rows))


async def known_meshes(client: Client, mesh: str | None) -> list[dict[str, Any]]:
    """Rows of the meshes that the agent knows, or of the one asked for; Refused when it doesn't know that."""
    rows = await client.meshes()
    if mesh is None:
        return rows
    found = [row for row in rows if row.get("mesh") == mesh]
    if not found:
        sees = ", ".join(str(row.get("mesh")) for row in rows)
        raise Refused("unknown_mesh", f"mesh {mesh}: not known to {client.name}; it sees {sees}")
    return found


@click.command()
@scoped("follow", "limit")
def events(scope: Scope) -> None:
    """What happened, oldest first, as one node keeps it."""
    limit = scope.more["limit"]
    run(_follow(scope, limit) if scope.more["follow"] else _events(scope, limit))


async def _events(scope: Scope, limit: int | None) -> None:
    from tui.cli.tables import events_lines

    async with await scope.attach() as client:
        await known_meshes(client, scope.mesh)
        kept = _of_mesh(
            await client.events(EVENTS_KEPT if limit is None or scope.mesh else limit), scope.mesh
        )
    kept = kept[len(kept) - limit :] if limit is not None and limit < len(kept) else kept
    if scope.json:
        document(kept)
    else:
        out(events_lines(kept))


async def _follow(scope: Scope, limit: int | None) -> None:
    from tui.cli.tables import event_line

    async with await scope.attach() as client:
        await known_meshes(client, scope.mesh)
        async for event in client.follow(EVENTS_KEPT if limit is None else limit):
            if _of_mesh([event], scope.mesh):
                if scope.json:
                    json_line(event)
                else:
                    out(event_line(event))
        raise Unreachable(f"{client.name}: the agent has gone")


def _of_mesh(events: list[dict[str, Any]], mesh: str | None) -> list[dict[str, Any]]:
    return events if mesh is None else [event for event in events if event.get("mesh") in (mesh, None)]


@click.command()
@click.argument("locator", nargs=-1, required=True)
@scoped()
def view(scope: Scope, locator: tuple[str, ...]) -> None:
    """Any console view as a table: VIEW, filter, order and @mesh, as the console's `:` takes them.

    Such as `qd view 'fleet state:degraded cpu>80 sort:-cpu @beta'`.
    """
    run(_view(scope, " ".join(locator)))


async def _view(scope: Scope, text: str) -> None:
    from tui.cli.fleetwide import tell_silent
    from tui.cli.tables import view_table
    from tui.model.audit import named
    from tui.model.views import VIEWS, LocatorError, parse_locator

    try:
        locator = parse_locator(text)
    except LocatorError as why:
        raise Fail(
            USAGE, f"view {text!r}: {why.text}, at character {why.pos + 1}; see `qd view --help`"
        ) from why
    spec = VIEWS[locator.view or "fleet"]
    async with await scope.attach() as client:
        mesh = scope.mesh or locator.mesh
        silent: dict[str, Any] = {}
        if spec.source == "rows":
            found = await client.nodes(mesh)
        elif spec.source in ("daemons", "failures", "chains", "audit"):
            if mesh is not None:
                await known_meshes(client, mesh)
            silent = await getattr(client, spec.source)(mesh)
            found = silent["rows"]
            if spec.source == "audit":
                found = named(found, {row["id"]: row["name"] for row in await client.nodes()})
        elif spec.source == "logs":
            found = await _lines(client, locator)
        elif spec.source == "meshes":
            found = await known_meshes(client, mesh)
        else:
            await known_meshes(client, mesh)
            found = _of_mesh(await client.events(EVENTS_KEPT), mesh)
        me = client.id
    tell_silent(silent)
    if scope.json:
        document(spec.json(found, locator))
    else:
        out(view_table(spec.table(found, locator, me=me)))


async def _lines(client: Client, locator: Locator) -> list[dict[str, Any]]:
    """The last lines of every log that the locator's `from:` names, with whose they are."""
    from tui.model.logs import BACKLOG, chosen

    names = chosen(locator)
    if not names:
        raise Fail(
            USAGE, "view logs: no log is named; write from:NODE/DAEMON, or from:NODE for its own events"
        )
    found: list[dict[str, Any]] = []
    for name in names:
        node, _, daemon = name.partition("/")
        target = await client.resolve(node)
        whose = {
            "node_id": target["id"],
            "node": target["name"],
            "mesh": target.get("mesh"),
            "daemon": daemon,
        }
        if daemon:
            found += [
                {**item, **whose} async for item in client.daemon_log(str(target["id"]), daemon, BACKLOG)
            ]
        else:
            found += [{**event, **whose} for event in await client.events(BACKLOG, str(target["id"]))]
    return found
