"""Draws the console into docs/screens/*.svg, on a real fleet of this host that is made for it and put into trouble.

    python docs/screens.py [DIR]        (make screens)

One broker is drained, one compute node killed by signal 9, another stopped; the rest is what the agents say.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tui.demo.fleet import Fleet

PLAN = "alpha=gateway:1,broker:3,compute:4,console:1 beta=gateway:1,broker:2 gamma=console:1"
NORMAL, WIDE = (80, 24), (160, 45)
SHOTS: tuple[tuple[str, tuple[int, int], Sequence[str], dict[str, Any]], ...] = (
    ("fleet", (120, 24), (), {}),
    ("fleet-80x24", NORMAL, (), {}),
    ("fleet-160x45", WIDE, ("down",), {}),
    ("fleet-light-160x45", WIDE, ("down",), {"theme": "light"}),
    ("map-160x45", WIDE, ("2",), {}),
    ("meshes-80x24", NORMAL, ("3",), {}),
    ("meshes-160x45", WIDE, ("3",), {}),
    ("events-160x45", WIDE, ("7",), {}),
    ("node-160x45", WIDE, ("enter",), {}),
    ("confirm-80x24", NORMAL, ("/", "=kind:gateway", "enter", "X"), {}),
    ("help-80x24", NORMAL, ("?",), {}),
)


async def trouble(fleet: Fleet) -> None:
    """Drains a broker by a signed op, kills one compute node and stops another; waits until others say so."""
    from tui.client import attach_entry
    from tui.ops import OpSender
    from tui.signers import find_signer

    nodes = fleet.nodes
    broker = next(node for node in nodes if node.kind == "broker")
    killed, stopped = [node for node in nodes if node.kind == "compute"][:2]
    console = next(node for node in nodes if node.kind == "console")
    entry = next(e for e in fleet.home.running() if e.name == console.name)
    async with await attach_entry(fleet.home, entry) as client:
        sender = OpSender(client, await find_signer(fleet.home, None))
        await sender.act("drain", broker.id, {"deadline_ms": 300_000}, 30.0)
        os.kill(killed.pid, signal.SIGKILL)
        os.kill(stopped.pid, signal.SIGSTOP)
        async for frame in client.watch():
            rows = await client.nodes()
            if sum(row["state"] == "dead" for row in rows) == 2 and frame:
                return


async def shoot(
    fleet: Fleet, name: str, size: tuple[int, int], keys: Sequence[str], options: dict[str, Any], folder: Path
) -> None:
    """Opens the console on the fleet's console node, presses the keys, and writes what is on the screen."""
    from tui.app import QuarterdeckApp
    from tui.client import attach_entry
    from tui.options import ConsoleOptions

    console = next(node for node in fleet.nodes if node.kind == "console")
    entry = next(e for e in fleet.home.running() if e.name == console.name)

    async def connect() -> Any:
        return await attach_entry(fleet.home, entry)

    async def send(*words: Any) -> Any:
        raise RuntimeError("a picture sends nothing")

    app = QuarterdeckApp(connect, send, ConsoleOptions(signer="the operator key of this home", **options))
    async with app.run_test(size=size) as pilot:
        while not app.fleet.rows:
            await pilot.pause(0.02)
        for key in keys:
            await pilot.pause()
            if key.startswith("="):
                for character in key[1:]:
                    app.press("space" if character == " " else character, character)
            else:
                app.press(key, key if len(key) == 1 else None)
        await asyncio.sleep(1.2)
        await pilot.pause()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text(
            tidy(app.export_screenshot(title=f"quarterdeck · {name}")), "utf-8"
        )


async def draw(folder: Path) -> None:
    """Boots the fleet, brings the trouble, and draws every picture."""
    from tui.demo.fleet import Fleet, parse_plan

    fleet = Fleet.under(parse_plan(PLAN), None, lambda line: print(line, file=sys.stderr))
    try:
        await fleet.boot()
        await asyncio.sleep(20)  # some history for the sparklines
        await trouble(fleet)
        for name, size, keys, options in SHOTS:
            await shoot(fleet, name, size, keys, options, folder)
            print(folder / f"{name}.svg")
    finally:
        for node in fleet.nodes:
            if node.running():
                os.kill(node.pid, signal.SIGCONT)
        await fleet.stop()
        fleet.sweep()


_TEXT = re.compile(
    r'<text class="([^"]+)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)" clip-path="([^"]+)">([^<]*)</text>'
)


def tidy(svg: str) -> str:
    """A font that has every sign, and pieces that begin where their first visible character stands.

    Some renderers drop blanks at the beginning of a piece and pull the rest to the left.
    """

    def shift(found: re.Match[str]) -> str:
        kind, x, y, length, clip, body = found.groups()
        text = html.unescape(body).replace("\xa0", " ")
        lead = len(text) - len(text.lstrip())
        text = text.strip()
        if not text:
            return ""
        cell = float(length) / max(1, cells(html.unescape(body)))
        wide = cell * cells(text)
        begin = float(x) + cell * lead
        said = html.escape(text).replace(" ", "&#160;")
        return f'<text class="{kind}" x="{begin:g}" y="{y}" textLength="{wide:g}" clip-path="{clip}">{said}</text>'

    return _TEXT.sub(shift, svg).replace("Fira Code", "DejaVu Sans Mono")


def cells(text: str) -> int:
    from tui.model.text import width

    return width(text)


def main() -> None:
    """Draws every picture into the folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "screens"
    os.environ.pop("NO_COLOR", None)
    asyncio.run(draw(folder))


if __name__ == "__main__":
    main()
