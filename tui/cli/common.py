"""What commands share: their common options, where their output goes, and the run of an async command."""

from __future__ import annotations

import asyncio
import functools
import os
import stat
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click
import msgspec

from agent.config import AGENT_OPTIONS, CLIENT_OPTIONS, click_options, resolve
from agent.home import Home
from tui.cli.failures import FAILED, USAGE, Fail

if TYPE_CHECKING:
    from tui.client import Client

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = {option.name: option for option in (*AGENT_OPTIONS, *CLIENT_OPTIONS)}
REACH = ("home", "via", "mesh", "operator_key", "json")


@dataclass(frozen=True)
class Scope:
    """Which home, whose view, and in what form to answer: the options that every command takes."""

    home: Home
    via: str | None
    mesh: str | None
    operator_key: Path | None
    json: bool
    more: dict[str, Any]
    """Further shared options of this command, by name."""

    async def attach(self) -> Client:
        """A client of the agent that answers this command."""
        from tui.client import attach

        return await attach(self.home, self.via, self.mesh, self.operator_key, tell=say)


def scoped(*more: str, reach: tuple[str, ...] = REACH) -> Callable[[F], Any]:
    """A decorator: the command takes the common options and the declared ones named, all as one `scope`.
    What was written before the name of a subcommand counts for it too."""
    options = [OPTIONS[name] for name in (*more, *reach)]

    def decorate(command: F) -> Any:
        def wrapped(**given: Any) -> Any:
            above = click.get_current_context().parent
            before = above.params if above is not None else {}
            flags = {option.name: given.pop(option.name) or before.get(option.name) for option in options}
            home = Home.open(flags.get("home"))
            values = resolve(options, flags, home.config)
            scope = Scope(
                home,
                values.get("via"),
                values.get("mesh"),
                values.get("operator_key"),
                bool(values.get("json")),
                {name: values[name] for name in more},
            )
            return command(scope=scope, **given)

        functools.update_wrapper(wrapped, command)
        return click_options(options)(wrapped)

    return decorate


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs one async command to its end, or until nobody reads its output any more: BrokenPipeError."""
    return asyncio.run(_while_read(work))


async def _while_read(work: Coroutine[Any, Any, T]) -> T:
    """A command that follows something may have nothing to write for long, and must end with its reader all the same."""
    task = asyncio.ensure_future(work)
    unread = False

    def gone() -> None:
        nonlocal unread
        unread = True
        task.cancel()
        if pipe is not None:
            loop.remove_reader(pipe)

    loop, pipe = asyncio.get_running_loop(), _piped_to()
    if pipe is not None:
        loop.add_reader(pipe, gone)
    try:
        return await task
    except asyncio.CancelledError:
        if unread:
            raise BrokenPipeError("nobody reads stdout any more") from None
        raise
    finally:
        if pipe is not None:
            loop.remove_reader(pipe)


def _piped_to() -> int | None:
    """The descriptor of stdout where that is a pipe; its write end turns readable when the reader has gone."""
    try:
        fd = sys.stdout.fileno()
        return fd if stat.S_ISFIFO(os.fstat(fd).st_mode) else None
    except (OSError, ValueError, AttributeError):
        return None


STDIN = "-"


def read_input(path: str, most_bytes: int, what: str, too_large: str) -> bytes:
    """The content of a file, of standard input for `-`; an error of usage where it can't be read, or is larger."""
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read(most_bytes + 1)
        else:
            with Path(path).expanduser().open("rb") as file:
                data = file.read(most_bytes + 1)
    except OSError as why:
        raise Fail(USAGE, f"{path}: {why.strerror or why}; name a {what} that you can read") from why
    if len(data) > most_bytes:
        raise Fail(USAGE, f"{path}: larger than {most_bytes} bytes{too_large}")
    return data


def say(line: str) -> None:
    """One line for the person, never on stdout."""
    from tui.model.text import clean

    click.echo(clean(line), err=True)


def out(text: str) -> None:
    """Text for people, where they asked for it. Colour goes where a terminal shows it and NO_COLOR is not set."""
    click.echo(text, color=colours())


def document(value: Any) -> None:
    """The one JSON document of a command."""
    _stdout().write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def json_line(value: Any) -> None:
    """One JSON object on a line of its own, at once."""
    stdout = _stdout()
    stdout.write(msgspec.json.encode(value).decode() + "\n")
    stdout.flush()


def _stdout() -> TextIO:
    """Standard output; BrokenPipeError where it was closed before we started."""
    if sys.stdout is None:
        raise BrokenPipeError("stdout is closed")
    return sys.stdout


def colours() -> bool:
    """Whether stdout is a terminal that wants colour."""
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def is_terminal(stream: Any) -> bool:
    """Whether that stream is a terminal; a closed one is not."""
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:
        return False


def on_terminal() -> bool:
    """Whether there is a person to ask: both sides of the conversation are a terminal."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def failed(text: str, status: int = FAILED) -> Fail:
    """An error of this command, to be raised."""
    return Fail(status, text)


def node_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of a NODE: names and meshes of this home's running nodes, found without asking anybody."""
    try:
        home = Home.open(ctx.params.get("home"))
        return sorted({e.name for e in home.running() if e.name.startswith(incomplete)})
    except Exception:
        return []
