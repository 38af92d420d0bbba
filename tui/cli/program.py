"""The program: its commands by name, which word is a command, and how it ends whatever happens."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from discovery.errors import QuarterdeckError
from tui.cli.failures import FAILED, USAGE, Fail, line_of, nearest, status_of

COMMANDS: dict[str, tuple[str, str]] = {
    "agent": ("agent.cli:agent", "Run a node in the foreground."),
    "audit": (
        "tui.cli.auditing:audit",
        "Every op and every refusal, signed.",
    ),
    "operators": ("tui.cli.auditing:operators", "Who may command the mesh; grant and revoke."),
    "append": ("tui.cli.userchains:append", "Put a record on a chain."),
    "apply": ("tui.cli.applying:apply", "Have a mesh run what a spec file says."),
    "chains": ("tui.cli.fleetwide:chains", "What is held where."),
    "get": ("tui.cli.artifacts:get", "Write an artifact to a file."),
    "put": ("tui.cli.artifacts:put", "Have the mesh keep a file."),
    "clear-avoid": ("tui.cli.acting:clear_avoid", "Have nodes forget whom they avoid."),
    "completion": ("tui.cli.here:completion", "Print the completion script of a shell."),
    "console": ("tui.cli.console:console", "Open the console."),
    "cordon": ("tui.cli.acting:cordon", "Have nodes take nothing new."),
    "daemons": ("tui.cli.fleetwide:daemons", "Every daemon, as its node tells it."),
    "demo": ("demo_fleet:command", "Boot a real fleet here, with the console on it."),
    "doctor": ("tui.cli.doctor:doctor", "Check ports, keys, clock, journal, code."),
    "drain": ("tui.cli.acting:drain", "Cordon nodes and have them finish."),
    "drop-replicas": ("tui.cli.acting:drop_replicas", "Have a node give up replicas."),
    "events": ("tui.cli.looking:events", "What happened, as one node keeps it."),
    "failures": ("tui.cli.fleetwide:failures", "What failed, on every node."),
    "init": ("tui.cli.here:init", "Make a mesh in this home."),
    "invalidate-placement": ("tui.cli.acting:invalidate_placement", "Have nodes place their chains anew."),
    "invite": ("tui.cli.admission:invite", "Make a token for a further host."),
    "join": ("tui.cli.admission:join", "Join a mesh with a token, in this home."),
    "kill": ("tui.cli.acting:kill", "Have nodes say goodbye and end."),
    "logs": ("tui.cli.logs:logs", "The log of a daemon, or of a node."),
    "maintenance": ("tui.cli.acting:maintenance", "Take nodes out of use, and back: enter, exit."),
    "meshes": ("tui.cli.looking:meshes", "The meshes that a node knows."),
    "node": ("tui.cli.looking:node", "Everything about one node."),
    "nodes": ("tui.cli.looking:nodes", "Every node that a node sees."),
    "replay": ("tui.cli.replay:replay", "Run the engine over recorded events."),
    "restart-daemons": ("tui.cli.acting:restart_daemons", "Restart every daemon of nodes."),
    "resume": ("tui.cli.acting:resume", "Lift a drain."),
    "rotate-key": ("tui.cli.admission:rotate_key", "Give a mesh a new key, without an outage."),
    "spawn": ("tui.cli.here:spawn", "Start a node of this home in the background."),
    "tail": ("tui.cli.userchains:tail", "The records of a chain."),
    "uncordon": ("tui.cli.acting:uncordon", "Have nodes take new work again."),
    "update": ("tui.cli.acting:update", "Have nodes run the code on their disk."),
    "view": ("tui.cli.looking:view", "Any console view as a table."),
}
"""Name → where the click command is, and what `qd --help` says of it without importing it."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "Begin": ("init", "invite", "join", "agent", "spawn", "console", "demo"),
    "Look": (
        *("nodes", "node", "meshes", "daemons", "logs", "failures", "events", "chains", "audit", "view"),
        "doctor",
    ),
    "Have a mesh run and keep": ("apply", "put", "get", "append", "tail"),
    "Act on nodes": (
        *("drain", "resume", "cordon", "uncordon", "maintenance", "update", "kill", "restart-daemons"),
        *("clear-avoid", "drop-replicas", "invalidate-placement"),
    ),
    "Authority": ("operators", "rotate-key"),
}
"""How `qd --help` puts the commands in order; those that no section names come last."""

LOCATOR_MARKS = ":><="
LEADING_OPTIONS = {
    "--home": True,
    "--mesh": True,
    "--via": True,
    "--operator-key": True,
    "--attach": True,
    "--json": False,
    "--read-only": False,
}
"""Options that may stand before the command as well; True: a value follows."""

INTERRUPTED = 130


class Program(click.Group):
    """The group `qd`. Anything that is no command is a view locator for the console, or a mistake told as such."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if ctx.resilient_parsing else command_first(args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word in COMMANDS:
            return word, self.get_command(ctx, word), args[1:]
        if ctx.resilient_parsing:
            return None, None, args[1:]
        if is_locator(word):
            return "console", self.get_command(ctx, "console"), args
        raise Fail(
            USAGE,
            f"{word}: neither a command nor a view; did you mean `qd {nearest(word, {*COMMANDS, *view_names()})}`?",
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        named = {name for names in SECTIONS.values() for name in names}
        rest = tuple(sorted(set(COMMANDS) - named))
        wide = max(map(len, COMMANDS))
        for title, names in {**SECTIONS, "Besides": rest}.items():
            with formatter.section(title):
                rows = [(name.ljust(wide), COMMANDS[name][1]) for name in names if name in COMMANDS]
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        words = {name: text for name, (_, text) in COMMANDS.items()}
        words |= {name: "Open the console on this view." for name in view_names() if name not in words}
        found = [
            CompletionItem(w, help=text) for w, text in sorted(words.items()) if w.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def is_locator(word: str) -> bool:
    """Whether a first word that is no command can only mean a view."""
    return word in view_names() or word.startswith("@") or any(mark in word for mark in LOCATOR_MARKS)


def view_names() -> list[str]:
    """First words that open the console on that view (a command of the same name comes first)."""
    from tui.model.views import VIEWS

    return list(VIEWS)


def command_first(args: Sequence[str]) -> list[str]:
    """`args` with the command in front: options typed before it move behind it, and no command means the console."""
    at = 0
    while at < len(args) and args[at].startswith("-"):
        name, equals, _ = args[at].partition("=")
        if name not in LEADING_OPTIONS:
            return list(args) if at == 0 else ["console", *args]
        at += 1 + (LEADING_OPTIONS[name] and not equals)
    if at == 0 and args:
        return list(args)
    if at < len(args) and args[at] in COMMANDS:
        return [args[at], *args[:at], *args[at + 1 :]]
    return ["console", *args]


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(version_line())
        ctx.exit()


def version_line() -> str:
    """`quarterdeck X.Y.Z (build 12HEX)`."""
    from importlib.metadata import PackageNotFoundError, version

    from agent.freshness import fingerprint

    try:
        number = version("quarterdeck")
    except PackageNotFoundError:
        number = "0+unpackaged"
    return f"quarterdeck {number} (build {fingerprint()})"


program = Program(
    name="qd",
    help="Your machines, seen and commanded. Without a command: the console, opened on VIEW.",
    subcommand_metavar="COMMAND | VIEW [ARGS]...",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and the build, and exit.",
        )
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qd` and returns its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    called = Path(sys.argv[0]).name
    prog_name = called if called in ("qd", "quarterdeck") else "qd"
    return run_command(program, args, prog_name, next((word for word in args if word in COMMANDS), None))


def run_command(entry: click.Command, args: list[str], prog_name: str, command: str | None) -> int:
    """Runs a click command and returns its exit status. Nothing that goes wrong reaches a person as a traceback."""
    try:
        status = entry.main(args, prog_name=prog_name, standalone_mode=False)
        _flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as why:
        return why.exit_code
    except click.UsageError as why:
        what = why.ctx.info_name if why.ctx and why.ctx.parent else command
        return _told(f"{what or 'command line'}: {why.format_message()}", USAGE, command)
    except click.ClickException as why:
        return _told(f"{command or 'qd'}: {why.format_message()}", FAILED, command)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except QuarterdeckError as why:
        return _told(str(why), status_of(why), command)
    except BrokenPipeError:
        _abandon(sys.stdout)
        return FAILED
    except OSError as why:
        _abandon(sys.stdout)
        where = f"{why.filename}: " if why.filename else f"{command or 'qd'}: "
        return _told(f"{where}{why.strerror or why}", FAILED, command)
    except Exception as why:
        if os.environ.get("QD_DEBUG"):
            raise
        what = f"{command or 'qd'}: unexpected {type(why).__name__}: {why}"
        return _told(f"{what}; this is a fault of ours: QD_DEBUG=1 shows where", FAILED, command)


def _told(text: str, status: int, command: str | None) -> int:
    """Says what went wrong, in one line, and gives the status back."""
    try:
        _flush()
    except OSError:
        _abandon(sys.stdout)
    try:
        click.echo(line_of(text, status, command), err=True)
    except OSError:
        pass
    return status


def _flush() -> None:
    """Writes out what is buffered while an error can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _abandon(stream: Any) -> None:
    """Lets go of an output that nobody reads, so that the interpreter says nothing about it at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):
        pass
