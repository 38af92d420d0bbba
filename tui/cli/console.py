"""`qd`, `qd console`: finds the agent to attach to, or starts the console's own node, and runs the screen on it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tui.cli.common import Scope, is_terminal, say, scoped
from tui.cli.failures import USAGE, Fail

if TYPE_CHECKING:
    from agent.home import Home


@click.command()
@click.argument("view", nargs=-1)
@scoped("attach", "read_only")
def console(scope: Scope, view: tuple[str, ...]) -> int:
    """Open the console on VIEW (such as `fleet state:degraded sort:-cpu @beta`).

    It joins the mesh as a node of kind console, or attaches to a running agent with --attach or --via.
    """
    if scope.json or not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        raise Fail(USAGE, "console: needs a terminal; use `qd nodes`, or `qd view LOCATOR`")
    os.environ.setdefault("ESCDELAY", "25")
    if scope.more["attach"] is None and scope.via is None:
        mesh = choose_mesh(scope.home, scope.mesh)
        if mesh is None:
            return first_start(scope.home)
        return asyncio.run(_on_own_node(scope, mesh, " ".join(view)))
    return asyncio.run(_attached(scope, " ".join(view)))


def choose_mesh(home: Home, wanted: str | None) -> str | None:
    """The mesh whose node the console becomes; None when this home has none. Fail when that is for a person to say."""
    known = home.meshes()
    if wanted is not None:
        if wanted not in known:
            has = f"this home has {', '.join(known)}" if known else "this home has none"
            raise Fail(USAGE, f"mesh {wanted}: not in this home; {has}: `qd init --mesh {wanted}` makes it")
        return wanted
    if len(known) > 1:
        running = {e.mesh for e in home.running()}
        known = [m for m in known if m in running] if len(running) == 1 else known
    if len(known) > 1:
        raise Fail(USAGE, f"console: which mesh? name one with --mesh: {', '.join(known)}")
    return known[0] if known else None


def first_start(home: Home) -> int:
    """A home without a mesh: make one, or open the demo."""
    say(f"no mesh in {home.config} yet")
    say("  m  make one here, and open the console on it")
    say("  d  open the demo: a real fleet on this host, gone when you leave")
    say("  q  leave")
    choice = click.prompt("what will it be?", type=click.Choice(["m", "d", "q"]), default="d", err=True)
    if choice == "q":
        return 0
    if choice == "d":
        import demo_fleet

        return int(demo_fleet.main([]))
    from agent.founding import found_mesh

    name = click.prompt("name of the mesh", default="home", err=True)
    found_mesh(home, name)
    scope = Scope(home, None, name, None, False, {"attach": None, "read_only": False})
    return asyncio.run(_on_own_node(scope, name, ""))


async def _on_own_node(scope: Scope, mesh: str, locator: str) -> int:
    from tui.launch import start_console_node

    node = start_console_node(scope.home, mesh)
    try:
        return await run_app(scope, node.connect, locator)
    finally:
        await node.stop()


async def _attached(scope: Scope, locator: str) -> int:
    from tui.client import Client, attach

    first: Client | None = await attach(
        scope.home, scope.via, scope.mesh, scope.operator_key, host=scope.more["attach"], tell=say
    )

    async def connect() -> Client:
        nonlocal first
        if first is not None and not first.closed:
            client, first = first, None
            return client
        return await attach(
            scope.home,
            scope.via,
            scope.mesh,
            scope.operator_key,
            host=scope.more["attach"],
            tell=lambda line: None,
        )

    return await run_app(scope, connect, locator)


async def run_app(scope: Scope, connect: Any, locator: str) -> int:
    """Runs the screen until its person leaves it; nothing here waits for an agent."""
    from agent.config import section

    written = section("console", scope.home.config)
    signer = LateSigner(scope.home, scope.operator_key)
    await signer.unlock()

    from tui.app import QuarterdeckApp
    from tui.elsewhere import Elsewhere
    from tui.options import ConsoleOptions
    from tui.spawning import Spawner

    options = ConsoleOptions(
        locator=locator,
        mesh=scope.mesh,
        read_only=scope.more["read_only"],
        theme=written["theme"],
        glyphs=written["glyphs"],
        keys=written["keys"],
        bookmarks=scope.home.config / "bookmarks",
        signer=signer.label(),
        spawner=Spawner(scope.home),
        elsewhere=Elsewhere(scope.home, scope.operator_key),
    )
    app = QuarterdeckApp(connect, signer.send, options)
    status = await app.run_async()
    return status if isinstance(status, int) else app.return_code or 0


class LateSigner:
    """The operator's key, looked for when the first op is made: painting never waits for it."""

    def __init__(self, home: Home, operator_key: Path | None) -> None:
        self._home = home
        self._operator_key = operator_key
        self._signer: Any = None

    async def unlock(self) -> None:
        """Asks for the key's passphrase now, where it has one: once the screen is up nobody could."""
        path = self._operator_key or self._home.operator_key_file
        with contextlib.suppress(OSError):
            if is_locked(path.read_bytes()):
                await self._find()

    def label(self) -> str:
        """Which key will sign, as far as its `.pub` file tells."""
        from discovery.sshkey import fingerprint

        path = self._operator_key or self._home.operator_key_file
        try:
            kind, blob = path.with_name(path.name + ".pub").read_text().split()[:2]
            return f"{kind} {fingerprint(base64.b64decode(blob))}"
        except (OSError, ValueError):
            return "the ssh-agent's key" if os.environ.get("SSH_AUTH_SOCK") else ""

    async def send(
        self, client: Any, verb: str, target: str, args: dict[str, Any], on_stage: Callable[[str], None]
    ) -> dict[str, Any]:
        """One op to its end, as the console asks for it."""
        from tui.ops import OpSender

        return await OpSender(client, await self._find()).act(verb, target, args, on_stage=on_stage)

    async def _find(self) -> Any:
        from tui.signers import find_signer

        if self._signer is None:
            self._signer = await find_signer(self._home, self._operator_key)
        return self._signer


def is_locked(text: bytes) -> bool:
    """Whether a private key file needs a passphrase, told without the libraries that could read it."""
    if b"ENCRYPTED" in text:
        return True
    body = b"".join(line for line in text.splitlines() if not line.startswith(b"-"))
    try:
        return b"bcrypt" in base64.b64decode(body)[:64]
    except ValueError:
        return False
