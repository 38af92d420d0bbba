"""Draws the console into docs/screens/*.svg, on a real fleet of this host that is made for it and put into trouble.

    python docs/screens.py [DIR]        (make screens)

Specs give the meshes daemons, one of which crashes, one is sick and one is slow to stop, and an artifact to keep. Then one
broker enters maintenance, another is cordoned, one compute node is killed by signal 9 and another stopped; the rest is
what the agents say.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tui.client import Client
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
    ("daemons", (120, 24), ("4",), {}),
    ("daemons-80x24", NORMAL, ("4",), {}),
    ("chains-160x45", WIDE, ("5",), {}),
    ("failures-80x24", NORMAL, ("6",), {}),
    ("failures-160x45", WIDE, ("6",), {}),
    ("logs-160x45", WIDE, ("4", "/", "=web", "enter", "*", "9"), {}),
    ("events-160x45", WIDE, ("7",), {}),
    ("events-then-160x45", WIDE, ("7", "[", "[", "["), {}),
    ("audit-160x45", WIDE, ("8",), {}),
    ("node-160x45", WIDE, ("/", "=maintenance:entering", "enter", "enter"), {}),
    ("node-80x24", NORMAL, ("/", "=crash-looping", "enter", "enter"), {}),
    ("confirm-80x24", NORMAL, ("/", "=kind:gateway", "enter", "X"), {}),
    ("help-80x24", NORMAL, ("?",), {}),
)

SERVES = """i=0; while :; do i=$((i+1)); echo "GET /orders/$i 200 $((i % 9 + 3)) ms"; sleep 0.7
[ $((i % 7)) = 0 ] && echo "WARN slow answer: /orders/$i took 812 ms"; [ $((i % 19)) = 0 ] &&
echo "ERROR upstream ledger:7001: connection reset by peer"; done"""
SAYS = """import os, socket, time
to = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
name = os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1)
for at in range(10**9):
    to.sendto(f"READY=1\\nSTATUS={4210 + at} rows indexed\\nX_QD_SATURATION=0.{62 + at % 9}".encode(), name)
    time.sleep(2)"""
SPECS = {
    "alpha": f"""
[[daemon]]
name = "web"
command = ["sh", "-c", '''{SERVES}''']
on = "kind=compute"
all = true
health = {{ exec = ["true"], interval_s = 5, timeout_s = 2 }}

[[daemon]]
name = "indexer"
command = ["{sys.executable}", "-c", '''{SAYS}''']
on = "kind=compute"
count = 2
readiness = "sd_notify"

[[daemon]]
name = "billing"
command = ["sh", "-c", "echo 'cannot bind 0.0.0.0:443: permission denied' >&2; sleep 0.2; exit 3"]
on = "kind=gateway"
all = true

[[daemon]]
name = "ledger"
command = ["sh", "-c", "trap 'echo flushing 41 segments; sleep 600' TERM; while :; do sleep 0.2; done"]
on = "kind=broker"
all = true
grace_s = 3600

[[daemon]]
name = "mailer"
command = ["sleep", "100000"]
on = "kind=broker"
count = 1
health = {{ tcp = "127.0.0.1:9", interval_s = 2, timeout_s = 1 }}

[[artifact]]
name = "model-v7.bin"
replicas = 3

[[artifact]]
name = "site.tar"
replicas = 9
""",
    "beta": """
[[daemon]]
name = "api"
command = ["sleep", "100000"]
on = "kind=broker"
all = true
""",
}
FILES = {"model-v7.bin": 12_000_000, "site.tar": 400_000}


async def work(fleet: Fleet) -> None:
    """Gives the meshes their daemons and files, by the commands that anybody would use."""
    home = fleet.home.root
    assert home is not None
    for mesh, text in SPECS.items():
        spec = home / f"{mesh}.toml"
        spec.write_text(text, "utf-8")
        await qd(home, "apply", str(spec), "--mesh", mesh)
    for name, size in FILES.items():
        (home / name).write_bytes(os.urandom(size))
        await qd(home, "put", str(home / name), "--via", "alpha")


async def qd(home: Path, *words: str) -> None:
    """One command on the fleet. One that this build doesn't have, or that fails, is told; the pictures go on without it."""
    command = (sys.executable, "-P", "-m", "tui.cli", *words, "--home", str(home), "--json")
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        print(f"qd {' '.join(words)}: exit {process.returncode}", file=sys.stderr)


async def trouble(fleet: Fleet) -> None:
    """Brings the trouble by signed ops and signals, and waits until others say so."""
    from tui.ops import OpSender
    from tui.signers import find_signer

    nodes = fleet.nodes
    brokers = [node for node in nodes if node.kind == "broker"]
    killed, stopped = [node for node in nodes if node.kind == "compute"][:2]
    async with await attached(fleet) as client:
        sender = OpSender(client, await find_signer(fleet.home, None))
        await sender.act("cordon", brokers[1].id, {}, 30.0)
        os.kill(killed.pid, signal.SIGKILL)
        os.kill(stopped.pid, signal.SIGSTOP)
        async for frame in client.watch():
            rows = await client.nodes()
            if sum(row["state"] == "dead" for row in rows) == 2 and frame:
                break
        await sender.act("maintenance_enter", brokers[0].id, {"deadline_ms": 600_000}, 30.0)


async def attached(fleet: Fleet) -> Client:
    """A client of the fleet's first console node."""
    from tui.client import attach_entry

    console = next(node for node in fleet.nodes if node.kind == "console")
    return await attach_entry(fleet.home, next(e for e in fleet.home.running() if e.name == console.name))


async def shoot(
    fleet: Fleet, name: str, size: tuple[int, int], keys: Sequence[str], options: dict[str, Any], folder: Path
) -> None:
    """Opens the console on the fleet's console node, presses the keys, and writes what is on the screen."""
    from tui.app import QuarterdeckApp
    from tui.elsewhere import Elsewhere
    from tui.options import ConsoleOptions

    async def connect() -> Any:
        return await attached(fleet)

    async def send(*words: Any) -> Any:
        raise RuntimeError("a picture sends nothing")

    elsewhere = Elsewhere(fleet.home, None)
    app = QuarterdeckApp(
        connect, send, ConsoleOptions(signer="the operator key of this home", elsewhere=elsewhere, **options)
    )
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
        await asyncio.sleep(2.5)
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
        await work(fleet)
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
    # The operator's key is named after who makes it and where; the pictures name nobody.
    os.environ["LOGNAME"] = "anna"
    socket.gethostname = lambda: "laptop"
    os.environ["QD_CPU_BUDGET"] = "100"  # a busy host is not what the pictures are about
    asyncio.run(draw(folder))


if __name__ == "__main__":
    main()
