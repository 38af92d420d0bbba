"""Commands about this home: init, spawn, completion."""

from __future__ import annotations

import asyncio
import shlex
import socket
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import LocalError, QuarterdeckError
from tui.cli.common import Scope, document, out, run, say, scoped
from tui.cli.failures import FAILED, UNREACHABLE, USAGE, Fail

if TYPE_CHECKING:
    from agent.founding import Founding

SPAWN_LIMIT_S = 10.0
POLL_EVERY_S = 0.02


@click.command()
@scoped(reach=("home", "mesh", "json"))
def init(scope: Scope) -> None:
    """Make a mesh in this home: its keys, and an operator who may command it."""
    from agent.founding import found_mesh

    if scope.mesh is None:
        raise Fail(USAGE, "init: which mesh? name it with --mesh NAME; see `qd init --help`")
    try:
        founding = found_mesh(scope.home, scope.mesh)
    except LocalError as why:
        raise Fail(USAGE if str(why).startswith("mesh ") else FAILED, str(why)) from why
    home = scope.home
    if scope.json:
        document(
            {
                "home": str(home.root) if home.root else None,
                "config": str(home.config),
                "mesh": founding.mesh,
                "created": not founding.existed,
                "made": [str(path) for path in founding.made],
                "operator": founding.operator_fingerprint,
            }
        )
    else:
        out(founding_text(scope, founding))


def founding_text(scope: Scope, founding: Founding) -> str:
    """What was made, and what to do next: here, and on the next host."""
    config, mesh = scope.home.config, founding.mesh
    here = f" --home {shlex.quote(str(scope.home.root))}" if scope.home.root else ""
    lines = [f"mesh {mesh} exists in {config}" if founding.existed else f"mesh {mesh} made in {config}"]
    lines += [f"  made {path}" for path in founding.made]
    lines += [
        f"  operator {founding.operator_fingerprint} (admin)",
        "",
        "start a node here and look at it:",
        f"  qd agent --mesh {mesh} --kind gateway{here}",
        f"  qd nodes{here}",
        "",
        "on the next host, this build has no invitation: carry the keys there yourself. HOST is that host, and",
        f"its home is where Quarterdeck looks by default there, unless you give --home (here: {config})",
    ]
    there = shlex.quote(str(config))
    lines += [
        f"  ssh HOST mkdir -p -m 700 {there}/meshes",
        f"  scp -rp {there}/meshes/{mesh} HOST:{there}/meshes/",
        f"  scp -p {there}/backbone.key {there}/authorized_operators HOST:{there}/",
        f"  ssh HOST qd init --mesh {mesh}{here}      (adds that host's own keys to what was copied)",
        f"  ssh HOST qd agent --mesh {mesh}{here} --join {socket.gethostname()}:PORT",
        "PORT is that of a node here: `qd nodes` shows it. Who holds these files is a member of the mesh.",
    ]
    return "\n".join(lines)


@click.command()
@scoped("kind", "name", reach=("home", "mesh", "json"))
def spawn(scope: Scope) -> None:
    """Start a node of this home in the background, and wait until it answers."""
    run(_spawn(scope, scope.more["kind"], scope.more["name"]))


async def _spawn(scope: Scope, kind: str, name: str | None) -> None:
    from agent.spawn import entry_of, free_seat, identity_of, last_words, note, start_node
    from tui.client import attach_entry

    home, mesh = scope.home, scope.mesh
    known = home.meshes()
    if mesh is None:
        mesh = known[0] if len(known) == 1 else None
    if mesh is None:
        raise Fail(USAGE, f"spawn: which mesh? {_choices(known)}")
    seat = free_seat(home, mesh, kind, name)
    if mesh not in known:
        raise Fail(USAGE, f"mesh {mesh}: not in this home; {_choices(known)}")
    if any(e.mesh == mesh and e.name == name for e in home.running()):
        raise Fail(USAGE, f"spawn: {name} already runs in {mesh}; give it another --name")
    log = seat.log_file(home)
    identity = None if seat.kind == "console" else identity_of(home, seat)
    process = start_node(home, seat.argv(), log)
    if identity is not None:
        note(home, seat, process.pid, identity)
    answers: dict[str, Any] | None = None
    try:
        async with asyncio.timeout(SPAWN_LIMIT_S):
            while answers is None and process.poll() is None:
                if entry := entry_of(home, process.pid):
                    try:
                        async with await attach_entry(home, entry) as client:
                            answers = {**client.hello, "addr": entry.addr}
                    except QuarterdeckError:
                        pass
                if answers is None:
                    await asyncio.sleep(POLL_EVERY_S)
    except TimeoutError:
        pass
    if answers is None and process.poll() is not None:
        status = USAGE if process.returncode == USAGE else FAILED
        raise Fail(
            status, f"spawn: the node ended: {last_words(log) or f'exit {process.returncode}'}; see {log}"
        )
    if answers is None:
        raise Fail(
            UNREACHABLE,
            f"spawn: process {process.pid} runs but does not answer within {SPAWN_LIMIT_S:g} s; see {log}",
        )
    if identity is not None:
        note(home, seat, process.pid, identity, answers["addr"])
    found = {
        "name": answers["name"],
        "id": answers["id"],
        "mesh": mesh,
        "kind": kind,
        "pid": process.pid,
        "addr": answers["addr"],
        "log": str(log),
    }
    if scope.json:
        document(found)
    else:
        out("{name}  {id}  pid {pid}  {addr}\nlog {log}".format_map(found))


def _choices(known: list[str]) -> str:
    if not known:
        return "this home has none; make one with `qd init --mesh NAME`"
    return f"name one with --mesh; this home has {', '.join(known)}"


SHELLS = {
    "bash": 'add to ~/.bashrc:  eval "$(qd completion bash)"',
    "zsh": 'add to ~/.zshrc:  eval "$(qd completion zsh)"',
    "fish": "run:  qd completion fish > ~/.config/fish/completions/qd.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(sorted(SHELLS)))
def completion(shell: str) -> None:
    """Print the completion script of SHELL, for `qd` and `quarterdeck`."""
    from click.shell_completion import get_completion_class

    from tui.cli.program import program

    source = get_completion_class(shell)
    assert source is not None
    for name in ("qd", "quarterdeck"):
        click.echo(source(program, {}, name, f"_{name.upper()}_COMPLETE").source())
    say(SHELLS[shell])
