"""The console as its user sees it: text on a screen of 80×24, 160×45 or less, and keys."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from discovery.errors import LocalError, Refused, Unreachable
from tests.tui.console import NORMAL, WIDE, console, screen_text
from tests.tui.fakes import FakeClient, delta, event, first_frame, fleet, row, send_done
from tui.app import QuarterdeckApp
from tui.options import ConsoleOptions


def rows_shown(text: str) -> list[str]:
    """Names in the order they stand on the screen."""
    names = [r["name"] for r in fleet()]
    return [name for line in text.splitlines() for name in names if f" {name} " in line[:40]]


@pytest.mark.parametrize("size", [NORMAL, WIDE])
def test_fleet_first_frame_shows_every_node_trouble_first(size: tuple[int, int]) -> None:
    async def main() -> None:
        async with console(size=size) as here:
            await here.shows(*[r["name"] for r in fleet()], "14 nodes", "operate")
            shown = rows_shown(here.text)
            assert shown[:3] == ["alpha.compute.9e02f1", "alpha.broker.77b1e9", "alpha.broker.0ad412"]
            for glyph, word in (
                ("✕", "dead"),
                ("◐", "degraded"),
                ("▽", "draining"),
                ("↻", "updating"),
                ("○", "joining"),
                ("●", "alive"),
            ):
                assert any(glyph in line and word in line for line in here.text.splitlines()), word
            assert "refused to broker.11c3a0, gateway.4f1a77" in here.text
            assert "cpu over 95 % for 15 s" in here.text
            assert "STALE" in here.line("alpha.compute.c80d15")
            assert "98%" in here.line("alpha.broker.77b1e9")
            await here.shows("1 node runs stale code")

    asyncio.run(main())


def test_every_line_at_80_cells_ends_inside_the_screen() -> None:
    async def main() -> None:
        async with console() as here:
            await here.shows("alpha.compute.9e02f1")
            lines = here.text.splitlines()
            assert len(lines) == 24
            assert all(len(line) == 80 for line in lines)
            assert all(word in lines[-1] for word in ("help", "quit", "kill", "drain", "filter"))

    asyncio.run(main())


def test_first_paint_comes_before_any_connection() -> None:
    async def main() -> None:
        blocked = asyncio.Event()

        async def connect() -> Any:
            await blocked.wait()
            raise Unreachable("nobody")

        app = QuarterdeckApp(connect, send_done)
        async with app.run_test(size=NORMAL) as pilot:
            await pilot.pause()
            text = screen_text(app)
            assert "QUARTERDECK" in text and "joining…" in text and "no agent has answered yet" in text

    asyncio.run(main())


def test_wide_terminal_has_a_live_pane_of_the_row_under_the_cursor() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            await here.shows("what led here")
            await here.press("down")
            await here.shows("degraded 3m", "memory")
            assert "000000000077b1e9" in here.text
            here.client.put(
                delta([row("alpha.broker.77b1e9", 0x77B1E9, state="alive", cpu=0.21, since_ms=0)])
            )
            await here.shows("alive 0s")

    asyncio.run(main())


def test_map_draws_measured_paths_only() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            await here.press("2")
            await here.shows(
                "no measured path from here", "round trips as alpha.console.31aa90 measures them"
            )
            assert "├─ 0.3ms" in here.line("gateway.4f1a77")
            assert "ms" not in here.line("broker.d2c9f0")
            await here.press("down", "X")
            await here.shows("Kill 1 node by message", "the last gateway of alpha")
            assert "alpha.gateway.4f1a77" in here.text

    asyncio.run(main())


def test_map_at_80_cells_stacks_its_lanes_and_scrolls_with_the_cursor() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("2")
            await here.shows("╭─ alpha")
            await here.press("G")
            await here.shows("console.6b2f00")

    asyncio.run(main())


def test_events_follow_until_somebody_looks_back() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("7")
            await here.shows("following", "node.evicted", "12 held")
            await here.press("up")
            here.client.put(
                delta(
                    events=[
                        event(
                            "node.changed", "alpha.gateway.4f1a77", 5, **{"from": "alive", "to": "degraded"}
                        )
                    ]
                )
            )
            await here.shows("1 new below", "13 held")
            await here.press("f")
            await here.shows("following")
            assert here.app.views["events"].cursor_id() == "12"

    asyncio.run(main())


def test_events_of_a_new_stream_are_not_told_twice() -> None:
    async def main() -> None:
        first, second = FakeClient(first_frame()), FakeClient(first_frame())
        async with console(clients=[first, second]) as here:
            held = len(here.app.fleet.events.items)
            first.lose()
            await here.shows("lost alpha.console.31aa90")
            await here.press("f5")
            await here.until(lambda: here.app.session.client is second and here.app.session.phase == "live")
            assert len(here.app.fleet.events.items) == held

    asyncio.run(main())


def test_node_page_tells_why_and_comes_back_to_the_same_place() -> None:
    async def main() -> None:
        async with console(size=(100, 60)) as here:
            await here.press("/", "=kind:broker", "enter", "down", "enter")
            await here.shows(
                "why it is in this state",
                "alpha.console.31aa90, 0s old: the node itself was not heard",
                "peers",
            )
            assert here.client.asked[0] == f"{0x0AD412:016x}"
            await here.shows("alpha.gateway.4f1a77", "ticks   4210")
            await here.press("escape")
            await here.shows("6 of 14 nodes")
            assert here.app.view_shown().cursor_id() == f"{0x0AD412:016x}"

    asyncio.run(main())


def test_node_page_whose_document_is_refused_says_so_and_keeps_the_row() -> None:
    async def main() -> None:
        async with console(size=(100, 50)) as here:
            here.client.doc = Refused("gone", "said goodbye 12 s ago")
            await here.press("enter")
            await here.shows("said goodbye 12 s ago", "alpha.compute.9e02f1", "vitals")

    asyncio.run(main())


def test_node_page_of_a_node_that_left_says_so() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("enter")
            await here.shows("facts")
            here.client.put(delta(gone=[f"{0x9E02F1:016x}"]))
            await here.shows("no longer in the view")

    asyncio.run(main())


def test_filter_narrows_while_typing_and_escape_takes_it_back() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("/", "=kind:gate")
            await here.shows("2 of 14 nodes")
            assert "alpha.broker.77b1e9" not in here.text
            await here.press("escape")
            await here.shows("14 nodes", "alpha.broker.77b1e9")

    asyncio.run(main())


def test_filter_error_is_shown_at_its_place_and_the_old_filter_stays() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("/", "=kind:broker", "enter", "/", "= cpux>3")
            await here.shows('no column "cpux"')
            await here.until(
                lambda: "cpux" in here.text.splitlines()[-1] and "^" in here.text.splitlines()[-2]
            )
            lines = here.text.splitlines()
            assert lines[-2].index("^") == lines[-1].index("cpux")
            assert "6 of 14 nodes" in here.text
            await here.press("enter")
            assert here.app.prompt is not None

    asyncio.run(main())


def test_empty_result_says_why_and_what_to_press() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("/", "=nothinglikethis", "enter")
            await here.shows("no node passes", "clears the filter")
            await here.press("escape")
            await here.shows("alpha.compute.9e02f1")

    asyncio.run(main())


def test_command_goes_to_a_locator_and_minus_goes_back() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press(":", "=fleet state:alive sort:-cpu @beta", "enter")
            await here.shows("@beta", "by cpu down")
            assert rows_shown(here.text)[0] == "beta.broker.77aa01"
            await here.press(":", "=events dead", "enter")
            await here.shows("1 of 12 held")
            await here.press("-")
            await here.shows("by cpu down")
            await here.press("-")
            await here.shows("trouble first")

    asyncio.run(main())


def test_command_completes_with_tab_and_takes_a_node_by_name() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press(":", "=ev", "tab")
            await here.shows(":events")
            await here.press("ctrl+u", "=alpha.gateway.4f", "tab", "enter")
            await here.shows("node alpha.gateway.4f1a77")
            await here.press("escape", ":", "=nonsense", "enter")
            await here.shows("no view, action or node of this name")

    asyncio.run(main())


def test_sort_keys_go_through_the_columns_and_turn_round() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("s", "s", "s")
            await here.shows("by cpu down")
            assert rows_shown(here.text)[0] == "alpha.broker.77b1e9"
            await here.press("S")
            await here.hides("by cpu down")
            await here.shows("by cpu")

    asyncio.run(main())


def test_cursor_stays_on_its_node_while_rows_move() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "down")
            on = here.app.view_shown().cursor_id()
            here.client.put(
                delta(
                    [
                        row(
                            "alpha.gateway.4f1a77",
                            0x4F1A77,
                            state="dead",
                            evidence={"kind": "silent", "by": ["alpha.broker.11c3a0"], "text": ""},
                        )
                    ]
                )
            )
            await here.shows("no answer to broker.11c3a0")
            assert here.app.view_shown().cursor_id() == on

    asyncio.run(main())


def test_help_lists_every_key_of_this_view_and_every_view() -> None:
    async def main() -> None:
        async with console(size=(100, 100)) as here:
            await here.press("?")
            await here.shows("Help · fleet", "Drain:", "Kill:", "Cordon:", "Invalidate placement:", "To Logs")
            await here.press("escape")
            await here.shows(
                "1 Fleet  2 Map  3 Meshes  4 Daemons  5 Chains  6 Failures  7 Events  8 Audit  9 Logs"
            )

    asyncio.run(main())


def test_palette_finds_an_action_and_does_it() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("ctrl+p", "=events", "enter")
            await here.shows("following")

    asyncio.run(main())


def test_remapped_key_acts_and_the_old_one_does_not() -> None:
    async def main() -> None:
        async with console(keys={"op_kill": "K"}) as here:
            assert "K kill" in here.text
            await here.press("down", "X")
            assert here.app.panel.dialog is None
            await here.press("K")
            await here.shows("Kill 1 node")

    asyncio.run(main())


@pytest.mark.parametrize(("keys", "said"), [({"op_kil": "K"}, "op_kill"), ({"op_kill": "d"}, "'d'")])
def test_bad_keys_are_refused_with_a_sentence(keys: dict[str, str], said: str) -> None:
    async def connect() -> Any:
        return FakeClient()

    with pytest.raises(LocalError, match=said):
        QuarterdeckApp(connect, send_done, ConsoleOptions(keys=keys))


@pytest.mark.parametrize("kind", ["c", "j", "t"])
def test_export_writes_what_is_shown_and_says_where(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        evil = row("alpha.evil.0000aa", 0xAA, addr="=cmd()|x")
        async with console(first_frame([*fleet(), evil]), size=WIDE, export_dir=tmp_path) as here:
            await here.press("/", "=evil", "enter", "e", kind)
            await here.shows("1 rows written to")
            (path,) = tmp_path.iterdir()
            text = path.read_text("utf-8")
            assert "alpha.evil.0000aa" in text and "alpha.gateway" not in text
            if kind == "c":
                assert ",=cmd" not in text
            if kind == "j":
                assert json.loads(text)[0]["id"] == evil["id"]

    asyncio.run(main())


def test_bookmark_is_kept_in_its_file_and_completed(tmp_path: Path) -> None:
    file = tmp_path / "bookmarks"

    async def main() -> None:
        async with console(bookmarks=file) as here:
            await here.press("/", "=broker", "enter", "b")
            await here.shows("bookmarked: fleet broker")
            assert file.read_text() == "fleet broker\n"
        async with console(bookmarks=file) as here:
            assert here.app.finding.bookmarks == ["fleet broker"]

    asyncio.run(main())


def test_start_locator_opens_its_view_and_a_bad_one_is_told() -> None:
    async def main() -> None:
        async with console(locator="events dead") as here:
            await here.shows("1 of 12 held")
        async with console(locator="fleet cpux>1") as here:
            await here.shows('no column "cpux"')

    asyncio.run(main())


def test_copy_hands_the_row_to_the_terminal() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("down", "y")
            assert "alpha.broker.77b1e9" in here.app.clipboard and "\x1b" not in here.app.clipboard

    asyncio.run(main())


def test_ctrl_c_twice_leaves_and_once_does_not() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("ctrl+c")
            await here.shows("again leaves the console")
            assert here.app.is_running
            await here.press("ctrl+c")
            await here.until(lambda: not here.app.is_running)

    asyncio.run(main())


def test_escape_delay_is_set_before_textual_reads_it() -> None:
    env = {key: value for key, value in os.environ.items() if key != "ESCDELAY"}
    code = "import tui.app; from textual.constants import ESCAPE_DELAY; print(ESCAPE_DELAY)"
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "0.025"


def test_mesh_option_is_shown_in_every_title() -> None:
    async def main() -> None:
        async with console(mesh="alpha", size=WIDE) as here:
            assert "beta.broker" not in here.text
            for key, title in (
                ("1", " fleet @alpha  9 of 14 nodes"),
                ("2", " map @alpha"),
                ("7", " events @alpha"),
            ):
                await here.press(key)
                await here.shows(title)
            await here.press("1", "escape")
            await here.shows("fleet  14 nodes")

    asyncio.run(main())


def test_mouse_puts_the_cursor_opens_a_row_and_switches_views() -> None:
    async def main() -> None:
        async with console() as here:
            await here.shows("alpha.broker.77b1e9")
            grid = here.app.view_shown().grid  # type: ignore[attr-defined]
            line = next(y for y, text in enumerate(here.text.splitlines()) if "alpha.broker.77b1e9" in text)
            await here.pilot.click(grid, offset=(10, line - grid.region.y))
            await here.until(lambda: here.app.view_shown().cursor_id() == f"{0x77B1E9:016x}", "the cursor")
            await here.pilot.click(grid, offset=(10, line - grid.region.y), times=2)
            await here.shows("node alpha.broker.77b1e9")
            await here.press("escape")
            x = here.line("7 Events").index("Events")
            await here.pilot.click("#viewbar", offset=(x + 1, 0))
            await here.shows("following")

    asyncio.run(main())
