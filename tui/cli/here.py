"""Commands about this home: init, spawn, completion."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from discovery.errors import LocalError
from tui.cli.common import Scope, document, out, run, say, scoped
from tui.cli.failures import FAILED, USAGE, Fail

if TYPE_CHECKING:
    from agent.founding import Founding


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
        "bring in the next host, while a node runs here:",
        f"  qd invite --mesh {mesh}{here}      (here: prints a token that is good once, for 10 minutes)",
        "  qd join TOKEN                      (there)",
        f"  qd agent --mesh {mesh}              (there)",
    ]
    return "\n".join(lines)


@click.command()
@scoped("kind", "name", reach=("home", "mesh", "json"))
def spawn(scope: Scope) -> None:
    """Start a node of this home in the background, and wait until it answers."""
    run(_spawn(scope, scope.more["kind"], scope.more["name"]))


async def _spawn(scope: Scope, kind: str, name: str | None) -> None:
    from tui.spawning import Ended, answered, choices, start

    mesh = scope.mesh
    known = scope.home.meshes()
    if mesh is None:
        mesh = known[0] if len(known) == 1 else None
    if mesh is None:
        raise Fail(USAGE, f"spawn: which mesh? {choices(known)}")
    try:
        found = await answered(start(scope.home, mesh, kind, name))
    except Ended as why:
        raise Fail(USAGE if why.status == USAGE else FAILED, str(why)) from why
    if scope.json:
        document(found)
    else:
        out("{name}  {id}  pid {pid}  {addr}\nlog {log}".format_map(found))


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
