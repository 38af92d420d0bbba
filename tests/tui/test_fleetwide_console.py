"""Daemons, Failures and Logs on the screen, and the keys of the admin ops."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from discovery.errors import Refused, Unreachable
from tests.tui.console import NORMAL, WIDE, console
from tests.tui.fakes import daemons, delta, first_frame, fleet, row
from tui import polling, tailing

BROKER = f"{0x77B1E9:016x}"
CRASHER = f"{BROKER}/crasher"


@pytest.mark.parametrize("size", [NORMAL, WIDE])
def test_daemons_are_shown_trouble_first_with_why_and_for_how_long(size: tuple[int, int]) -> None:
    async def main() -> None:
        async with console(size=size) as here:
            await here.press("4")
            await here.shows(
                "daemons  11 daemons", "●5 □2 ○1 ▽1 ↻1 ✕1", "exit status 1, started again in 4:3"
            )
            line = here.line("crasher ")
            assert (
                "✕" in line and "crash looping" in line and "in 4:3" in line and "alpha.broker.77b1e9" in line
            )
            await here.shows("unhealthy", "no watchdog for 30 s", "held back: cordoned", "0s old")
            assert all(len(text) == size[0] for text in here.text.splitlines())

    asyncio.run(main())


def test_daemons_are_asked_for_while_shown_and_never_while_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "EVERY_S", 0.0)

    async def main() -> None:
        async with console() as here:
            assert here.client.polled == []
            await here.press("4")
            await here.shows("crasher")
            asked = len(here.client.polled)
            here.app._tick()
            await here.until(lambda: len(here.client.polled) == asked + 1, "the next question")
            await here.press("1")
            await here.shows("trouble first")
            seen = len(here.client.polled)
            for _ in range(3):
                here.app._tick()
                here.app.views["daemons"].folded(_change())
            await asyncio.sleep(0)
            assert len(here.client.polled) == seen

    asyncio.run(main())


def _change() -> Any:
    from tui.model.rows import Change

    return Change(full=True)


def test_silent_nodes_are_named_and_a_failed_answer_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "EVERY_S", 0.0)

    async def main() -> None:
        async with console() as here:
            here.client.silent = ["alpha.compute.5d20bb"]
            await here.press("4")
            await here.shows("1 silent: alpha.compute.5d20bb", "does not answer: what is shown of them")
            here.client.daemon_rows = Unreachable("the line is cut")
            here.app._tick()
            await here.shows("no answer")
            assert "crasher" in here.text

    asyncio.run(main())


def test_agent_that_does_not_know_the_question_is_to_be_updated() -> None:
    async def main() -> None:
        async with console() as here:
            here.client.failure_rows = Refused("unknown_method", "no method 'failures' here")
            await here.press("6")
            await here.shows("does not know this question: update it")

    asyncio.run(main())


def test_empty_daemons_and_failures_say_why_and_what_to_press() -> None:
    async def main() -> None:
        async with console() as here:
            here.client.daemon_rows, here.client.failure_rows = [], []
            await here.press("4")
            await here.shows("no daemon runs anywhere", "qd apply SPEC.toml")
            await here.press("6")
            await here.shows("nothing has failed on any node that answers", "4 shows the daemons")
            await here.press("9")
            await here.shows("no log is chosen", "4 Daemons", "then opens the logs of what is marked")

    asyncio.run(main())


def test_failures_show_gate_retry_and_replica_and_open_the_node() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("6")
            await here.shows("failures  5 failures", "retry 0:0", "gate 4:3")
            await here.press("down")
            await here.shows("from the replica on alpha.broker.11c3a0")
            await here.press("enter")
            await here.shows("node alpha.compute.9e02f1")
            await here.press("escape")
            await here.shows("failures  5 failures")

    asyncio.run(main())


def test_enter_on_a_daemon_follows_its_log_until_the_view_is_left() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("4")
            await here.shows("crasher")
            await here.press("enter")
            await here.shows(
                "logs  crasher on alpha.broker.77b1e9  6 lines", "following", "Traceback (most recent"
            )
            assert here.client.followed == {CRASHER: 1}
            here.client.logs[CRASHER].put_nowait({"at_ms": 9e15, "line": "ERROR [bold]boom\x1b[2J"})
            await here.shows("ERROR [bold]boom", "7 lines")
            await here.press("-")
            await here.shows("daemons  11 daemons")
            await here.until(lambda: here.client.followed == {CRASHER: 0}, "the stream to end")
            await here.press("9")
            await here.until(lambda: here.client.followed == {CRASHER: 1}, "the stream again")
            await here.shows("7 lines")

    asyncio.run(main())


def test_marked_daemons_and_nodes_are_followed_side_by_side() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            await here.press("4", "/", "=name:web", "enter")
            await here.shows("2 of 11 daemons")
            await here.press("*", "9")
            await here.shows("logs  2 logs  12 lines", "alpha.gateway.4f1a77/web", "alpha.broker.11c3a0/web")
            await here.press("1", "/", "=0ad412", "enter", "space", "9")
            await here.shows("logs  events of alpha.broker.0ad412", "control.received")
            assert set(here.client.followed.values()) == {0}

    asyncio.run(main())


def test_log_is_narrowed_by_level_and_searched_to_and_fro() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("4")
            await here.shows("crasher")
            await here.press("enter")
            await here.shows("6 lines")
            await here.press("w")
            await here.shows("level:warn,error  3 of 6 lines")
            await here.press("w", "w")
            await here.shows("  6 lines")
            await here.press("F", "=crasher", "enter")
            await here.shows("find crasher")
            cursor = here.app.view_shown().cursor_id
            assert cursor() == "0", "round to the first of two"
            await here.press("n")
            assert cursor() == "2"
            await here.press("N", "N")
            assert cursor() == "2"
            await here.press("F", "ctrl+u", "=nowhere", "enter")
            await here.shows("no line shown has 'nowhere'")

    asyncio.run(main())


def test_log_that_can_not_be_followed_says_why_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailing, "AGAIN_S", 0.0)

    async def main() -> None:
        async with console() as here:
            await here.press(":", "=logs from:alpha.broker.77b1e9/crasher", "enter")
            await here.shows("6 lines")
            here.client.logs[CRASHER].put_nowait(Unreachable("alpha.broker.77b1e9: it has gone"))
            await here.shows("it has gone; trying again")
            here.app._tick()
            await here.until(lambda: here.client.followed[CRASHER] == 1, "the stream again")
            assert "6 lines" in here.text
            await here.press(":", "=logs from:alpha.nobody.1/x", "enter")
            await here.shows("no such node in the view")

    asyncio.run(main())


ADMIN = (
    ("c", "cordon", "Cordon 1 node", "takes nothing new"),
    ("C", "uncordon", "Uncordon 1 node", "nothing to lift: is not cordoned"),
    ("M", "maintenance_exit", "Take 1 node out of maintenance", "is not in maintenance"),
    ("R", "restart_daemons", "Restart all daemons of 1 node", "no daemon runs there"),
    ("A", "clear_avoid", "Clear the avoid list of 1 node", "forgets whom it avoids"),
    ("I", "invalidate_placement", "Invalidate the placement of 1 node", "placed anew"),
)


def test_admin_op_is_told_in_words_and_sent_after_enter() -> None:
    async def main() -> None:
        async with console(size=(80, 40)) as here:
            await here.press("down")
            for key, verb, title, said in ADMIN:
                sent = len(here.client.ops)
                await here.press(key)
                await here.shows(title, said, "Enter sends it")
                assert len(here.client.ops) == sent
                await here.press("enter")
                await here.until(lambda sent=sent: len(here.client.ops) > sent, verb)
                assert here.client.ops[-1] == (verb, BROKER, {})
            await here.press("o")
            await here.shows("maintenance exit alpha.broker.77b1e9  done", "clear avoid alpha.broker.77b1e9")

    asyncio.run(main())


def test_maintenance_asks_for_a_deadline_and_names_the_daemons_that_stop() -> None:
    async def main() -> None:
        rows = [row("alpha.broker.77b1e9", 0x77B1E9, daemons={"running": 1, "total": 2}), *fleet()[:2]]
        async with console(first_frame(rows)) as here:
            here.client.doc = {"daemons": daemons()[3:5], "answered_by": "alpha.broker.77b1e9"}
            await here.press("m")
            await here.shows("Put 1 node into maintenance", "Deadline  10m", "1 daemon stops (ingest)")
            await here.press("ctrl+u", "=15m", "enter")
            await here.until(lambda: here.client.ops)
            assert here.client.ops == [("maintenance_enter", BROKER, {"deadline_ms": 900_000})]

    asyncio.run(main())


def test_replicas_to_drop_are_picked_from_what_the_node_holds() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "D")
            await here.shows("holds none that alpha.console.31aa90")
            held = [
                {"chain": c, "holders": ["alpha.broker.77b1e9", "x"], "desired": 3}
                for c in ("orders", "users")
            ]
            here.client.doc = {"replicas": held, "answered_by": "alpha.broker.77b1e9"}
            await here.press("D")
            await here.shows("Drop which replicas of alpha.broker.77b1e9?", "[ ] orders", "2 of 3 held")
            await here.press("enter")
            await here.shows("nothing is taken")
            await here.press("down", "space", "enter")
            await here.shows("Drop replicas of 1 node", "gives up users (2 of 3 held now)")
            await here.press("enter")
            await here.until(lambda: here.client.ops)
            assert here.client.ops == [("drop_replicas", BROKER, {"chains": ["users"]})]

    asyncio.run(main())


def test_ops_do_not_work_where_rows_are_no_nodes() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("4")
            await here.shows("crasher")
            await here.press("R", "X", "c")
            assert here.app.panel.dialog is None
            await here.press("p")
            await here.shows("node alpha.broker.77b1e9")
            await here.press("c")
            await here.shows("Cordon 1 node")

    asyncio.run(main())


def test_op_is_found_by_the_words_of_the_command_line() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", ":", "=maintenance exit", "enter")
            await here.shows("Take 1 node out of maintenance")
            await here.press("escape", ":", "=restart-daemons", "enter")
            await here.shows("Restart all daemons of 1 node")

    asyncio.run(main())


def test_page_shows_daemons_wants_and_gates_with_their_countdowns() -> None:
    async def main() -> None:
        async with console(size=(100, 90)) as here:
            here.client.doc |= {  # type: ignore[operator]
                "answered_by": "alpha.broker.77b1e9",
                "daemons": daemons()[3:5],
                "wants": [{"kind": "start_daemon", "target": "crasher", "age_ms": 28_000}],
                "held_back": [{"what": "start daemon crasher", "reason": "crash-looping", "in_ms": 272_000}],
                "backpressure": True,
            }
            await here.press("down", "enter")
            await here.shows(
                "BACKPRESSURE",
                "start daemon crasher, wanted for 28s",
                "start daemon crasher: crash-looping  in 4:32",
                "active: neither drained nor in maintenance",
                "queue 4,210 behind",
            )

    asyncio.run(main())


def test_fleet_at_80_cells_tells_maintenance_and_cordon_below_the_row() -> None:
    async def main() -> None:
        async with console() as here:
            changed = [
                row("alpha.broker.0ad412", 0x0AD412, state="draining", maintenance="entering_maintenance",
                    maintenance_until_ms=552_900, reason="1 daemon to stop"),
                row("alpha.compute.e91b04", 0xE91B04, cordoned=True),
            ]  # fmt: skip
            here.client.put(delta(changed))
            await here.shows("entering maintenance, 9:1", "cordoned: takes nothing new")

    asyncio.run(main())


def test_age_of_an_answer_stays_in_the_title_whatever_filter_and_order_stand_there() -> None:
    async def main() -> None:
        async with console(size=NORMAL) as here:
            await here.press("4")
            await here.shows("11 daemons")
            await here.press(":", "=daemons state:crash_looping sort:-restarts @alpha", "enter")
            await here.until(lambda: re.search(r"1 of \d+ daemons .* \ds old", here.line("daemons @alpha")))
            long = "=daemons node:/alpha.*/ health:healthy restarts<9 state:running sort:-restarts @alpha"
            await here.press(":", long, "enter")
            await here.until(lambda: re.search(r" \ds old *$", here.line("daemons @alpha")), "its age")

    asyncio.run(main())
