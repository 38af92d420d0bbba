"""What the console survives: hostile text, nonsense, floods, a lost agent, any size of terminal, no colour."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from discovery.errors import LocalError, Unreachable
from tests.tui.console import NORMAL, TINY, WIDE, console
from tests.tui.fakes import FakeClient, delta, event, first_frame, fleet, row, wide_frame


def test_losing_the_agent_keeps_the_rows_under_a_banner_and_comes_back() -> None:
    async def main() -> None:
        first, second = (
            FakeClient(first_frame()),
            FakeClient(first_frame([row("alpha.gateway.4f1a77", 0x4F1A77)])),
        )
        async with console(clients=[first, Unreachable("connection refused"), second]) as here:
            await here.shows("alpha.compute.9e02f1")
            first.lose("peer went away")
            await here.shows(
                "lost alpha.console.31aa90: peer went away", "next try in", "alpha.compute.9e02f1"
            )
            assert first.closed
            await here.press("f5")
            await here.shows("connection refused", "alpha.compute.9e02f1")
            await here.press("f5")
            await here.hides("alpha.compute.9e02f1")
            await here.shows("fleet  1 node ", "alpha.gateway.4f1a77")

    asyncio.run(main())


def test_first_connection_that_fails_says_why_and_when_it_tries_again() -> None:
    async def main() -> None:
        async with console(
            clients=[LocalError("no node of this home runs; start one with `qd agent`")], settle=False
        ) as here:
            await here.shows("no agent: no node of this home runs", "next try in")

    asyncio.run(main())


HOSTILE = [
    "[/x][bold]red[/]",
    "\x1b[31mred\x1b[0m\x1b]0;owned\x07",
    "日本語のノードがここに",
    "a\u202eb\u200dc\nd\te",
    "e\u0301\u0301\u0301",
    "n" * 200,
    "🛥" * 30,
    "[link=https://x]y[/link]",
]


@pytest.mark.parametrize("size", [NORMAL, WIDE])
def test_hostile_names_are_plain_text_in_every_view(size: tuple[int, int]) -> None:
    rows = [
        row(
            name,
            0x100 + at,
            mesh=name,
            kind=name,
            state="dead" if at % 2 else "degraded",
            reason=name,
            addr=name,
            build=name,
            tags={name: name},
            evidence={"kind": "exited", "by": [name], "text": name},
        )
        for at, name in enumerate(HOSTILE)
    ]
    told = [
        event(name, "x.y.z", at, node=name, reason=name, **{"from": name, "to": name}, by=[name])
        for at, name in enumerate(HOSTILE)
    ]

    async def main() -> None:
        frame = first_frame(rows, events=told, counters=dict.fromkeys(HOSTILE, 1))
        async with console(frame, size=size) as here:
            await here.shows("[/x][bold]")
            here.client.doc = {name: [{name: name}, name] for name in HOSTILE} | {
                "why": told,
                "stats": {n: n for n in HOSTILE},
            }
            for keys in (
                ["enter"],
                ["escape", "2"],
                ["7"],
                ["1", "X"],
                ["escape", "?"],
                ["escape", ":", "=[", "tab"],
            ):
                await here.press(*keys)
                await here.pilot.pause()
                text = here.text
                assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
            assert here.app.is_running

    asyncio.run(main())


@pytest.mark.parametrize("junk", [None, "x", [], {}, -1, float("nan"), 10**30, True])
def test_rows_with_nonsense_in_every_field_are_shown_as_unknown(junk: Any) -> None:
    bad = dict.fromkeys(row("alpha.gateway.4f1a77"), junk) | {
        "id": "00000000000000aa",
        "name": "alpha.bad.0000aa",
    }

    async def main() -> None:
        async with console(
            first_frame([bad], events=[dict.fromkeys(event("a", "b.c.d", 0), junk)]), size=WIDE
        ) as here:
            await here.shows("alpha.bad.0000aa")
            for key in ("2", "7", "1", "enter", "escape", "X"):
                await here.press(key)
                await here.pilot.pause()
            assert here.app.is_running

    asyncio.run(main())


def test_flood_of_frames_keeps_the_screen_alive_and_ends_right() -> None:
    async def main() -> None:
        async with console() as here:
            for at in range(2000):
                here.client.put(
                    delta(
                        [row("alpha.gateway.4f1a77", 0x4F1A77, cpu=at % 100 / 100)],
                        events=[event("node.changed", "alpha.gateway.4f1a77", at, to="alive")],
                    )
                )
            here.client.put(delta([row("alpha.gateway.4f1a77", 0x4F1A77, cpu=0.77, state="degraded")]))
            await here.press("down")
            await here.until(lambda: "77%" in here.line("alpha.gateway.4f1a77"))
            assert here.app.view_shown().cursor_id() == f"{0x77B1E9:016x}"
            assert len(here.app.fleet.events.items) == 2012

    asyncio.run(main())


@pytest.mark.parametrize("view", ["1", "2"])
def test_row_that_goes_is_drawn_until_the_next_paint(view: str) -> None:
    async def main() -> None:
        async with console() as here:
            await here.press(view, "down")
            await here.pilot.pause()
            for node in [r["id"] for r in fleet()]:
                here.app.fleet.fold(delta(gone=[node]), here.app.now())
                here.app.view_shown().refresh()
                for child in here.app.view_shown().walk_children():
                    child.refresh()
                assert len(here.text.splitlines()) == 24
                here.app.view_shown().tick()
            await here.press("up", "down", "space", "X", "escape", "enter")
            assert here.app.is_running

    asyncio.run(main())


def test_tiny_terminal_says_so_and_recovers() -> None:
    async def main() -> None:
        async with console(size=TINY) as here:
            await here.shows("too small")
            await here.press("2", "7", "1", "X", "?", "escape", "/", "escape")
            assert len(here.text.splitlines()) == 5
            await here.pilot.resize_terminal(80, 24)
            await here.shows("alpha.compute.9e02f1", "help")

    asyncio.run(main())


@pytest.mark.parametrize(
    "size", [(1, 1), (20, 5), (39, 9), (40, 10), (41, 13), (60, 18), (79, 23), (139, 40), (300, 100)]
)
def test_any_size_is_survived_by_every_view(size: tuple[int, int]) -> None:
    async def main() -> None:
        async with console(wide_frame(), size=size) as here:
            for key in (
                "2",
                "3",
                "7",
                "1",
                "enter",
                "escape",
                "X",
                "escape",
                "?",
                "escape",
                "ctrl+p",
                "escape",
                ":",
                "escape",
            ):
                await here.press(key)
                await here.pilot.pause()
            assert here.app.is_running
            assert len(here.text.splitlines()) == size[1]

    asyncio.run(main())


def test_no_color_draws_without_a_single_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def main() -> None:
        async with console() as here:
            await here.shows("alpha.compute.9e02f1")
            for strip in here.app.screen._compositor.render_strips():
                for segment in strip:
                    style = segment.style
                    assert style is None or (style.color is None or style.color.is_default)
                    assert style is None or (style.bgcolor is None or style.bgcolor.is_default)
            assert "dead" in here.text and "✕" in here.text

    asyncio.run(main())


def test_ascii_glyphs_leave_no_sign_of_ours_beyond_ascii() -> None:
    async def main() -> None:
        async with console(glyphs="ascii") as here:
            await here.shows("alpha.compute.9e02f1")
            await here.press("2")
            await here.shows("+- alpha")
            assert not [sign for sign in here.text if not sign.isascii()], here.text
            await here.press("1", "?")
            await here.shows("Drain:")
            assert not [sign for sign in here.text if not sign.isascii()], here.text

    asyncio.run(main())


def test_old_data_is_dim_and_the_age_goes_on() -> None:
    async def main() -> None:
        async with console() as here:
            await here.shows("beta.broker.d2c9f0")
            look = here.app.look.style("dim", "base")
            for strip in here.app.screen._compositor.render_strips():
                if "beta.broker.d2c9f0" in "".join(s.text for s in strip):
                    assert any(
                        s.style and s.style.color == look.color for s in strip if "beta.broker" in s.text
                    )
            await here.until(
                lambda: "20s" in here.line("beta.broker.d2c9f0") or "21s" in here.line("beta.broker.d2c9f0")
            )

    asyncio.run(main())


def test_counters_of_refused_input_are_shown() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            await here.shows("refused or dropped 12: forged 9, login 3")
            here.client.put(delta(counters={"flood": 40}))
            await here.shows("refused or dropped 52: flood 40")

    asyncio.run(main())


def test_incompatible_peer_is_told_with_what_to_do() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            now = int(here.app.wall_ms())
            here.client.put(
                delta(
                    events=[
                        event(
                            "wire.incompatible",
                            "x.y.z",
                            0,
                            node=None,
                            id=None,
                            at_ms=now,
                            addr="10.0.0.9:7946",
                            theirs=2,
                            ours=1,
                        )
                    ]
                )
            )
            await here.shows("incompatible peer 10.0.0.9:7946 speaks wire 2, we 1")

    asyncio.run(main())
