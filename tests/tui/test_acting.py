"""Ops in the console: forecast, confirmation, sending, and the end of each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from discovery.errors import Refused, Unreachable
from tests.tui.console import console
from tests.tui.fakes import FakeClient, delta, first_frame, row, send_refused
from tui.model.blast import forecast


def test_kill_is_sent_after_one_enter_and_followed_to_its_end() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "X")
            await here.shows(
                "Kill 1 node by message", "its process ends", "Forecast from data 0.", "Enter sends it"
            )
            assert here.client.ops == []
            await here.press("enter")
            await here.shows("kill alpha.broker.77b1e9  done, leaving, 7 ms")
            assert here.client.ops == [("kill", f"{0x77B1E9:016x}", {})]

    asyncio.run(main())


def test_op_left_at_the_panel_sends_nothing() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "X")
            await here.shows("Kill 1 node")
            await here.press("escape", "enter")
            await here.hides("Kill 1 node")
            assert here.client.ops == []

    asyncio.run(main())


def test_ops_on_marks_need_their_number_typed() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("/", "=kind:gateway", "enter", "*", "X")
            await here.shows(
                "Kill 2 nodes by message",
                "the last gateway of alpha",
                "the last gateway of beta",
                "Type 2 to send",
            )
            await here.press("enter")
            await here.shows("not sent: type 2")
            await here.press("3", "enter")
            assert here.client.ops == []
            await here.press("2", "enter")
            await here.until(lambda: len(here.client.ops) == 2)
            assert {target for _, target, _ in here.client.ops} == {f"{0x4F1A77:016x}", f"{0xB03C21:016x}"}

    asyncio.run(main())


def test_op_on_the_attached_node_goes_last_because_the_other_answers_come_by_way_of_it() -> None:
    async def main() -> None:
        slow = asyncio.Event()

        async def send(
            client: FakeClient, verb: str, target: str, args: Any, on_stage: Any
        ) -> dict[str, Any]:
            client.ops.append((verb, target, args))
            await slow.wait()
            return {"result": "accepted", "state": "updating"}

        async with console(send=send) as here:
            await here.press("/", "=alpha !compute !dead", "enter", "*", "u")
            await here.shows("Update 5 nodes", "Type 5 to send")
            await here.press("5", "enter")
            await here.until(lambda: len(here.client.ops) == 4, "the others are sent")
            me = f"{0x31AA90:016x}"
            assert me not in {target for _, target, _ in here.client.ops}
            await here.shows("0 of 5 ended")
            slow.set()
            await here.shows("5 of 5 ended")
            assert here.client.ops[-1][1] == me

    asyncio.run(main())


def test_update_tells_which_daemons_restart_with_it() -> None:
    running = {"running": 2, "total": 2}
    rows = [row("alpha.broker.1", 1, daemons=running), row("alpha.broker.2", 2, daemons=running)]
    told = forecast(rows, [r["id"] for r in rows], "update", daemons={rows[0]["id"]: ["web"]})
    assert dict(told.lines) == {
        "alpha.broker.1": "runs the code on its disk: nothing new to take; "
        "1 daemon (web) restarts, unless it lives through updates",
        "alpha.broker.2": "runs the code on its disk: nothing new to take; "
        "2 daemons restart, unless they live through updates",
    }


def test_marks_hidden_by_a_filter_are_named_before_sending() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("/", "=kind:gateway", "enter", "*", "escape", "/", "=beta", "enter", "r")
            await here.shows("Resume 2 nodes", "1 of these are marked but hidden", "alpha.gateway.4f1a77")

    asyncio.run(main())


def test_drain_asks_for_a_deadline_and_sends_it() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "d")
            await here.shows("Drain 1 node", "Deadline  5m")
            await here.press("ctrl+u", "=soon", "enter")
            await here.shows("'soon' is no duration")
            await here.press("ctrl+u", "=90s", "enter")
            await here.until(lambda: here.client.ops)
            assert here.client.ops == [("drain", f"{0x77B1E9:016x}", {"deadline_ms": 90_000})]

    asyncio.run(main())


def test_refusal_is_shown_in_full_and_stays_until_looked_at() -> None:
    async def main() -> None:
        async with console(send=send_refused) as here:
            await here.press("down", "X", "enter")
            await here.shows("refused: the key SHA256:t9QbL0")
            words = [
                "the",
                "key",
                "SHA256:t9QbL0",
                "is",
                "not",
                "in",
                "authorized_operators",
                "of",
                "this",
                "host",
            ]
            tail = " ".join(here.text.split())
            assert " ".join(words[:3]) in tail and words[-1] in tail
            await here.press("o")
            await here.shows("Ops of this session", "target 000000000077b1e9")
            await here.press("escape")
            assert all(entry.seen for entry in here.app.acting.book.entries)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (Unreachable("no route"), "unreachable: no route"),
        (Unreachable("cut off", maybe_arrived=True), "unknown: it may have arrived"),
        (Refused("role", "observe may not kill"), "refused: observe may not kill"),
        (RuntimeError("boom"), "unknown: it may have arrived"),
    ],
)
def test_op_that_fails_ends_as_what_it_is(failure: Exception, shown: str) -> None:
    async def send(*_: Any) -> dict[str, Any]:
        raise failure

    async def main() -> None:
        async with console(send=send) as here:
            await here.press("down", "X", "enter")
            await here.shows(shown)

    asyncio.run(main())


def test_stages_of_an_op_are_shown_as_they_come() -> None:
    async def main() -> None:
        arrived, go = asyncio.Event(), asyncio.Event()

        async def send(_c: Any, _v: str, _t: str, _a: Any, on_stage: Any) -> dict[str, Any]:
            on_stage("sent")
            arrived.set()
            await go.wait()
            on_stage("received")
            return {"result": "accepted", "state": "draining", "took_ms": 9}

        async with console(send=send) as here:
            await here.press("down", "d", "enter")
            await arrived.wait()
            await here.shows("drain alpha.broker.77b1e9  sent")
            await here.press("q")
            await here.shows("1 op has no answer yet")
            await here.press("escape")
            go.set()
            await here.shows("accepted, draining, 9 ms")

    asyncio.run(main())


def test_read_only_makes_no_op() -> None:
    async def main() -> None:
        async with console(read_only=True) as here:
            await here.press("down")
            for key in "XdurcCmMRADI":
                here.app.message = None
                await here.press(key)
                await here.shows("READ-ONLY", "no op is made")
                assert here.app.panel.dialog is None and here.client.ops == []
            await here.press("ctrl+r")
            await here.shows("it stays on", "READ-ONLY")

    asyncio.run(main())


def test_read_only_switched_on_under_an_open_panel_still_holds() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "X")
            await here.shows("Kill 1 node")
            here.app.acting.toggle_read_only()
            await here.press("enter")
            await here.shows("read-only mode was switched on")
            assert here.client.ops == []

    asyncio.run(main())


def test_op_while_the_agent_is_lost_is_not_made() -> None:
    async def main() -> None:
        first = FakeClient(first_frame())
        async with console(clients=[first, Unreachable("gone")]) as here:
            first.lose()
            await here.shows("lost alpha.console.31aa90")
            await here.press("X")
            await here.shows("an op can't be sent now")

    asyncio.run(main())


def test_marks_of_nodes_that_left_are_forgotten() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("*")
            await here.shows("14 marked")
            here.client.put(delta(gone=[f"{0x9E02F1:016x}"]))
            await here.shows("13 marked")

    asyncio.run(main())
