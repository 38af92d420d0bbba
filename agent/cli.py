"""`qd-agent` (= `qd agent`): a node in the foreground, its log on stderr.

Nothing of the console is imported here, ever; and nothing heavy before the options are known to be right.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import discovery.lean  # noqa: F401  # isort: skip  (before anything that imports asyncio)

import click

from agent.config import AGENT_OPTIONS, Settings, click_options, load
from agent.home import Home
from discovery.errors import QuarterdeckError

USAGE_ERROR = 2
FAILED = 1
DESCRIPTORS = 8192


@click.command("agent", context_settings={"help_option_names": ["-h", "--help"]})
@click_options(AGENT_OPTIONS)
@click.option(
    "--self-check", is_flag=True, hidden=True, help="Load everything a start needs, print the build, end."
)
@click.pass_context
def agent(context: click.Context, /, self_check: bool, **flags: Any) -> None:
    """Run a node of a mesh in the foreground."""
    try:
        home = Home.open(flags.get("home"))
        settings = load(flags, home.config)
        status = check_self(settings, home) if self_check else run(settings, home)
    except QuarterdeckError as why:
        click.echo(f"qd: {why}", err=True)
        status = USAGE_ERROR
    context.exit(status)


def run(settings: Settings, home: Home) -> int:
    """Runs a node to its end; the exit status. LocalError when it can't start."""
    import asyncio

    from agent.node import Node

    gc.set_threshold(
        20_000, 20, 50
    )  # an idle node allocates little that outlives a packet; collect it rarely
    _raise_descriptor_limit()
    return asyncio.run(Node(settings, home).run())


def _raise_descriptor_limit() -> None:
    """A link takes one descriptor and a daemon two: as many as the system lets this process have."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(DESCRIPTORS, hard) if hard != resource.RLIM_INFINITY else DESCRIPTORS
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_self(settings: Settings, home: Home) -> int:
    """Whether the code on disk starts with these settings: everything imported, keys and state readable."""
    from agent import freshness
    from agent.events import wall_ms
    from agent.keyring import KeyFile
    from agent.node import Node

    KeyFile(home.mesh_key_file(settings.mesh), settings.mesh).read(wall_ms())
    Node(settings, home)
    click.echo(freshness.fingerprint())
    return 0


def main() -> None:
    """The `qd-agent` command."""
    try:
        sys.exit(agent.main(prog_name="qd-agent", standalone_mode=False) or 0)
    except click.ClickException as why:
        click.echo(f"qd: {why.format_message()}; see `qd-agent --help`", err=True)
        sys.exit(USAGE_ERROR)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except Exception as why:
        click.echo(f"qd: agent: {type(why).__name__}: {why}; this is a defect, please report it", err=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
