#!/usr/bin/env python3
"""A real fleet on this host in one command, with the console on it, or headless, or as a proof that plays itself.

    python demo_fleet.py [--fleet "alpha=gateway:1,broker:2 beta=…"] [--home DIR] [--headless] [--json] [--check]
                         [--for SECONDS]

Its nodes are agents like any other, each with its own key, port and state under one home. They end when it ends.
"""

from __future__ import annotations

from tui.equip import equip

if __name__ == "__main__":
    equip(__file__)

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

import click

from tui.cli.common import document, is_terminal, json_line, out, say
from tui.cli.failures import FAILED, OK, STALE, USAGE, Fail
from tui.cli.program import INTERRUPTED, run_command

if TYPE_CHECKING:
    from tui.demo import Finding, Fleet

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--fleet", "plan", envvar="QD_FLEET", default=None, help='Such as "alpha=gateway:1,broker:2 beta=…".'
)
@click.option(
    "--home",
    envvar="QD_DEMO_HOME",
    default=None,
    help="Keep it under DIR; default: a temporary one, removed.",
)
@click.option("--headless", is_flag=True, envvar="QD_HEADLESS", help="No console; stay until told to end.")
@click.option(
    "--json", "as_json", is_flag=True, envvar="QD_JSON", help="With --headless: one line when ready."
)
@click.option("--check", is_flag=True, envvar="QD_CHECK", help="Play the proof, print how it went, and end.")
@click.option(
    "--for", "for_s", type=click.FloatRange(min=0), envvar="QD_FOR", help="End SECONDS after it is ready."
)
def command(
    plan: str | None, home: str | None, headless: bool, as_json: bool, check: bool, for_s: float | None
) -> int:
    """Boot a real fleet on this host and open the console on it."""
    from tui.demo import DEFAULT_FLEET, parse_plan

    if not (headless or check) and not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        raise Fail(USAGE, "demo: needs a terminal for the console; use --headless")
    parsed = parse_plan(plan or DEFAULT_FLEET)
    return asyncio.run(_run(parsed, home, headless, as_json, check, for_s))


async def _run(
    plan: Any, home: str | None, headless: bool, as_json: bool, check: bool, for_s: float | None
) -> int:
    """Boots, does what was asked, and ends the fleet whatever happens in between."""
    from tui.demo import Fleet, StaleFleet

    ended = Ending()
    fleet = Fleet.under(plan, home, say)
    try:
        if not await ended.unless(fleet.boot()):
            return ended.status
        if check:
            return await _check(fleet, ended, as_json)
        if headless:
            return await _stay(fleet, ended, as_json, for_s)
        return await _console(fleet, ended, for_s)
    except StaleFleet as why:
        raise Fail(STALE, str(why)) from why
    finally:
        ended.listen_no_more()
        await fleet.stop()


class Ending:
    """SIGINT, SIGTERM and SIGHUP as one event: whoever waits goes on to the clean end."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.number = 0
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, self._take, number)

    @property
    def status(self) -> int:
        """The exit status of an end that came before the work was done."""
        return INTERRUPTED if self.number in (0, signal.SIGINT) else 128 + self.number

    def listen_no_more(self) -> None:
        """A further signal changes nothing: the end is under way."""
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, lambda: None)

    async def unless(self, work: Awaitable[Any], limit_s: float | None = None) -> bool:
        """Does `work`, for at most `limit_s`; False when a signal came first and the work was stopped."""
        task = asyncio.ensure_future(work)
        waiting = asyncio.create_task(self.event.wait())
        try:
            await asyncio.wait({task, waiting}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                return False
            task.result()
            return True
        finally:
            waiting.cancel()

    def _take(self, number: int) -> None:
        self.number = self.number or number
        self.event.set()


async def _stay(fleet: Fleet, ended: Ending, as_json: bool, for_s: float | None) -> int:
    if as_json:
        json_line(fleet.document())
    else:
        out(f"qd nodes --home {fleet.home.root}")
        say("Ctrl+C ends the fleet")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            await ended.event.wait()
    return OK


async def _check(fleet: Fleet, ended: Ending, as_json: bool) -> int:
    from tui.demo import play

    findings: list[Finding] = []

    async def played() -> None:
        findings.extend(await play(fleet, say))

    if not await ended.unless(played()):
        return ended.status
    if as_json:
        document(
            [{"what": f.what, "verdict": f.verdict, "text": f.text, "took_ms": f.took_ms} for f in findings]
        )
    else:
        out(findings_table(findings))
    return FAILED if any(f.verdict == "fail" for f in findings) else OK


def findings_table(findings: Sequence[Finding]) -> str:
    """The proof as a table: what was promised, how it went, what was seen."""
    from tui.cli.tables import table
    from tui.model.ages import took

    rows = [[f.what, f.verdict, took(f.took_ms), f.text] for f in findings]
    return table(["PROMISE", "VERDICT", "TOOK>", "SEEN"], rows, [COLOURS[f.verdict] for f in findings])


COLOURS = {"pass": "green", "fail": "red"}


async def _console(fleet: Fleet, ended: Ending, for_s: float | None) -> int:
    from tui.cli.common import Scope
    from tui.cli.console import run_app
    from tui.client import attach, attach_entry
    from tui.launch import ConsoleNode

    scope = Scope(fleet.home, None, None, None, False, {"attach": None, "read_only": False})
    seat = next((n for n in fleet.nodes if n.kind == "console" and n.entry), None)
    own = None if seat else ConsoleNode(fleet.home, fleet.plan[0][0])

    async def connect() -> Any:
        """A client of the console's seat; of any other node of the fleet once that one is gone."""
        if own is not None:
            return await own.connect()
        assert seat is not None and seat.entry is not None
        if seat.running():
            return await attach_entry(fleet.home, seat.entry)
        return await attach(fleet.home)

    try:
        await ended.unless(run_app(scope, connect, ""), for_s)
    finally:
        if own is not None:
            await own.stop()
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    return run_command(command, list(sys.argv[1:] if argv is None else argv), "demo_fleet.py", "demo")


if __name__ == "__main__":
    sys.exit(main())
