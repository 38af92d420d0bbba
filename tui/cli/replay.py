"""`qd replay FILE`: the engine of a node over recorded events, in virtual time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO

import click

from tui.cli.common import Scope, scoped
from tui.cli.failures import USAGE, Fail


@click.command()
@click.argument("file")
@click.option("--admit", is_flag=True, help="Pass the actions through admit, and show each verdict.")
@scoped(reach=("home", "json"))
def replay(scope: Scope, file: str, admit: bool) -> None:
    """Run the MeshOS engine over the events recorded in FILE (`-`: standard input).

    A line a tick with its actions, last the snapshot: JSON, always."""
    from agent.meshos.replay import BadLine, play, read

    try:
        if file == "-":
            run = read(sys.stdin.buffer)
        else:
            with _opened(file) as lines:
                run = read(lines)
    except BadLine as why:
        raise Fail(USAGE, f"{file}: {why}; mend that line: `qd agent --record` shows how they look") from why
    for document in play(run, admit=admit):
        sys.stdout.write(json.dumps(document, separators=(",", ":")) + "\n")


def _opened(file: str) -> IO[bytes]:
    try:
        return Path(file).open("rb")
    except OSError as why:
        raise Fail(USAGE, f"{file}: {why.strerror or why}; name a file made by `qd agent --record`") from why
