"""Every mesh in the console: the view of meshes, and what other meshes change in the fleet, the map and the panels."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from tests.tui.console import NORMAL, WIDE, console
from tests.tui.fakes import delta, everywhere, first_frame, mesh, meshes, remote, wide_frame

EVIL = {"pub": "SHA256:evil", "publisher": "[bold]\x1b[31mbeta.gateway.666", "age_ms": 3_000}


def changed(name: str, **changes: Any) -> list[dict[str, Any]]:
    """The meshes with one of them changed."""
    return [m | changes if m["mesh"] == name else m for m in meshes()]


@pytest.mark.parametrize("size", [NORMAL, WIDE])
def test_view_of_meshes_shows_every_mesh_and_says_what_is_wrong_with_it(size: tuple[int, int]) -> None:
    async def main() -> None:
        async with console(wide_frame(meshes=changed("beta", impostors=[EVIL])), size=size) as here:
            await here.press("3")
            await here.shows(
                "meshes  5 meshes  4 live",
                "another key publishes beta (not shown): look who holds your backbone key",
                "its nodes are not live here",
                "counts only: it must list this mesh's key",
            )
            assert re.search(r"expired \d+s|expired 1m", here.line("✕ delta"))
            assert re.search(r"⚑ \d+s|overdue \d+s", here.line("gateway.b03c21"))
            assert "●5 ↻1 ▽1 ◐1 ✕1 gateway.4f1a77" in here.line("● alpha")
            names = [
                line.split()[1] for line in here.text.splitlines() if line[1:2] in "!✕●○" and "%" in line
            ]
            assert names == ["beta", "alpha", "gamma", "omega"]
            assert "N spawn" in here.text and "/ filter" in here.text

    asyncio.run(main())


def test_lease_counts_down_and_age_goes_up_while_no_frame_comes() -> None:
    async def main() -> None:
        async with console(wide_frame()) as here:
            await here.press("3")
            await here.shows("gateway.b03c21")
            start = here.app.fleet.directory.rows["beta"].received
            for text, age_s in (("⚑ 3s", 2.0), ("overdue 2s", 7.0)):
                here.app.view_shown().grid.clock = lambda s=age_s: start + s  # type: ignore[attr-defined]
                here.app._tick()
                await here.until(lambda text=text: text in here.line("gateway.b03c21"), text)
            assert any(f" {age}s" in here.line("gateway.b03c21") for age in (7, 8))

    asyncio.run(main())


def test_enter_on_a_mesh_narrows_the_fleet_and_minus_goes_back_to_it() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=WIDE) as here:
            await here.press("3", "/", "=beta", "enter", "enter")
            await here.shows("fleet @beta  4 of 17 nodes  ●3 ◐1", "⚑ gateway.b03c21")
            assert "alpha.broker" not in here.text.split("NODE")[1]
            await here.press("-")
            await here.shows("meshes beta  1 of 5 meshes")

    asyncio.run(main())


def test_mesh_that_tells_only_counts_leaves_an_empty_fleet_that_says_why() -> None:
    async def main() -> None:
        async with console(wide_frame()) as here:
            await here.press(":", "=fleet @omega", "enter")
            await here.shows("omega: counts only: it must list this mesh's key", "Esc clears the filter")
            await here.press("escape")
            await here.shows("fleet  17 nodes")

    asyncio.run(main())


def test_empty_view_of_meshes_says_why() -> None:
    async def main() -> None:
        async with console(first_frame()) as here:
            await here.press("3")
            await here.shows("alpha.console.31aa90 tells of no meshes", "1 shows the nodes it sees")
        async with console(wide_frame()) as here:
            await here.press("3", "/", "=nosuch", "enter")
            await here.shows("no mesh passes nosuch", "Esc clears the filter")

    asyncio.run(main())


def test_alarm_words_stay_in_the_header_of_every_view_and_go_when_it_is_over() -> None:
    async def main() -> None:
        bad = changed("beta", impostors=[EVIL])
        bad[0] |= {"backbone": "pool (nats away)"}
        async with console(wide_frame(meshes=bad)) as here:
            for key in ("1", "2", "3", "7"):
                await here.press(key)
                await here.shows("IMPOSTOR  EXPIRED  NATS AWAY")
                assert "alpha 9" in here.text.splitlines()[0]
            here.client.put(delta(meshes=[m for m in meshes() if not m["expired"]], gone=DELTA))
            await here.hides("IMPOSTOR")
            await here.hides("EXPIRED")
            assert "alpha 9  beta 4" in here.text.splitlines()[0]

    asyncio.run(main())


DELTA = [row["id"] for row in everywhere() if row["mesh"] == "delta"]


def test_nodes_of_an_expired_mesh_stand_below_known_trouble_dimmed_and_dead_with_the_reason() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=WIDE) as here:
            await here.shows("mesh delta expired: nothing heard from it for 42s")
            lines = here.text.splitlines()
            at = {name: next(n for n, line in enumerate(lines) if name in line) for name in (
                "alpha.broker.77b1e9", "delta.broker.de17b1", "alpha.broker.11c3a0")}  # fmt: skip
            assert at["alpha.broker.77b1e9"] < at["delta.broker.de17b1"] < at["alpha.broker.11c3a0"]
            grid = here.app.view_shown().grid  # type: ignore[attr-defined]
            y = at["delta.broker.de17b1"] - grid.region.y
            roles = {role for text, role in grid._line(y)[0] if text.strip()}
            assert roles == {"dim"}

    asyncio.run(main())


def test_holder_of_a_lease_is_marked_in_the_fleet_and_the_mark_moves_with_it() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=WIDE) as here:
            await here.shows("⚑ lease")
            assert "⚑ lease" in here.line("alpha.gateway.4f1a77 gateway")
            assert "⚑" not in here.line("alpha.console.31aa90")
            here.client.put(
                delta(
                    meshes=changed(
                        "alpha", publisher={"id": f"{0x31AA90:016x}", "name": "alpha.console.31aa90"}
                    )
                )
            )
            await here.until(lambda: "⚑ lease" in here.line("alpha.console.31aa90 console"), "the mark")
            assert "⚑" not in here.line("alpha.gateway.4f1a77 gateway")

    asyncio.run(main())


def test_page_of_a_node_of_another_mesh_says_who_tells_of_it_and_how_it_is_reached() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=WIDE) as here:
            await here.press(":", "=gamma.console.6b2f00", "enter")
            await here.shows(
                "node gamma.console.6b2f00",
                "–, not measured: it is in another mesh",
                "by relay, 42ms",
                "the directory of gamma, published by",
                "gamma.console.6b2f00",
                "⚑ lease",
            )

    asyncio.run(main())


def test_map_shows_every_mesh_and_the_same_keys_act_on_a_card_of_another() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=WIDE) as here:
            await here.press("2")
            await here.shows("─ beta ", "─ gamma ", "─ omega ", "42ms relay", "⚑ gateway.b03c21")
            await here.press("right", "G", "X")
            await here.shows(
                "Kill 1 node by message",
                "gamma.console.6b2f00",
                "every node of gamma: the mesh ends",
                "Reached: gamma by relay, 42ms.",
                "Type 1 to send",
            )

    asyncio.run(main())


def test_killing_who_publishes_says_where_the_lease_goes_or_that_nobody_is_left() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=WIDE) as here:
            await here.press("/", "=gateway.4f1a77 !state:dead", "enter", "X")
            await here.shows("lease moves to alpha.console.31aa90")
            await here.press("escape", "escape", "/", "=beta.gateway", "enter", "X")
            await here.shows(
                "its lease falls vacant",
                "nobody left to publish beta: other meshes won't see it",
                "Type 1 to send",
            )

    asyncio.run(main())


@pytest.mark.parametrize("size", [NORMAL, WIDE])
def test_hostile_meshes_are_shown_as_plain_text_everywhere(size: tuple[int, int]) -> None:
    name = "[red]x[/]\x1b[2J\u202e"
    by = {"id": "ff", "name": "[link=evil]p\x07\n\x1b]0;t\x07", "addr": "[b]"}
    evil = mesh(
        "x", 3, 9, mesh=name, publisher=by, impostors=[EVIL], reason="[blink]\x1b[5m", backbone="[i](\x1b[7m)"
    )
    node = remote("[reverse]\x1b[7mn", 0xE1, mesh=name)

    async def main() -> None:
        async with console(
            wide_frame(meshes=[*meshes(), evil], rows=[*everywhere(), node]), size=size
        ) as here:
            await here.press("3")
            await here.shows("[red]x[/][2J", "IMPOSTOR")
            seen = here.text
            for key in ("2", "1", "7"):
                await here.press(key)
                await here.shows("IMPOSTOR")
                seen += here.text
            assert not {"\x1b", "\x07", "\u202e", "\r"} & set(seen)
            await here.press("3", "enter")
            await here.shows("nothing here to open")

    asyncio.run(main())


def test_meshes_are_readable_without_colour_and_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def main() -> None:
        async with console(wide_frame(), glyphs="ascii") as here:
            for key, said in (("3", "L "), ("2", "L "), ("1", "EXPIRED")):
                await here.press(key)
                await here.shows(said)
                assert here.text.isascii(), [c for c in here.text if not c.isascii()]
            await here.press("3")
            await here.shows("expired ", "x3")

    asyncio.run(main())


def test_palette_help_and_locators_know_the_meshes() -> None:
    async def main() -> None:
        async with console(wide_frame(), size=(100, 90)) as here:
            await here.press("3", "?")
            await here.shows("Help · meshes", "what is left of its publisher's lease")
            await here.press("escape", ":", "=meshes sort:-nodes nodes>3", "enter")
            await here.shows("3 of 5 meshes", "by nodes down")
            await here.press("s")
            await here.shows("by publisher")
            await here.press("1", "ctrl+p", "=meshes", "enter")
            await here.shows("3 of 5 meshes")

    asyncio.run(main())


def test_node_that_comes_while_newer_figures_wait_is_shown_with_them() -> None:
    async def main() -> None:
        async with console(wide_frame()) as here:
            here.client.put(delta([remote("beta.broker.d2c9f0", 0xD2C9F0, cpu=0.5)], meshes=meshes()))
            here.client.put(delta([remote("beta.broker.00beef", 0xBEEF)]))
            await here.shows("fleet  18 nodes")

    asyncio.run(main())
