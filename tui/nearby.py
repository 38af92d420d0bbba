"""Agents of no home of ours that a command may ask when none of its own runs: those met before, then the LAN's.

A find is only a place to knock: the operator's key logs in, the agent's host key is pinned at first sight, and
whoever does not let us in is passed over without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from agent.config import AGENT_OPTIONS, resolve
from agent.home import Home
from discovery.errors import QuarterdeckError
from discovery.identity import id_text
from discovery.member import Addr
from tui.client import LOCAL_LIMIT_S, Client, KnownAgents, Tell, attach_outside
from tui.signers import login_keys

LAN_LIMIT_S = 1.0
"""How long the LAN gets to answer."""
MET_TRIED = 4
"""How many of the agents met before are tried, the last first."""


async def attach_nearby(home: Home, mesh: str | None, operator_key: Path | None, tell: Tell) -> Client | None:
    """A client of the first agent of `mesh` (None: of any mesh of this home) that lets the operator in, or None."""
    try:
        await login_keys(home, operator_key)
    except QuarterdeckError:
        return None
    wanted = {mesh} if mesh else set(home.meshes())
    for addr in KnownAgents(home).addresses()[: -MET_TRIED - 1 : -1]:
        if client := await _knock(home, addr, None, wanted, operator_key, tell):
            return client
    if _is_off(home):
        return None
    found = _on_the_lan(wanted)
    async with contextlib.aclosing(found):
        async for node, addr in found:
            if client := await _knock(home, addr, node, wanted, operator_key, tell):
                return client
    return None


async def _knock(
    home: Home, addr: Addr, node: str | None, wanted: set[str], operator_key: Path | None, tell: Tell
) -> Client | None:
    """A client of the agent at `addr` if it is `node` (where that is known) and of a wanted mesh."""
    try:
        client = await attach_outside(home, addr, operator_key, tell, LOCAL_LIMIT_S)
    except QuarterdeckError:
        return None
    if (wanted and client.mesh not in wanted) or node not in (None, client.id):
        await client.close()
        return None
    return client


async def _on_the_lan(wanted: set[str]) -> AsyncGenerator[tuple[str, Addr], None]:
    """(node id, address) of what announces itself within LAN_LIMIT_S, in a wanted mesh (none: in any)."""
    from discovery.mdns import Mdns

    heard: asyncio.Queue[tuple[str, Addr]] = asyncio.Queue()

    def on_found(mesh: str, node: int, addrs: list[Addr]) -> None:
        if not wanted or mesh in wanted:
            for addr in addrs:
                heard.put_nowait((id_text(node), addr))

    mdns = Mdns(mesh="", node=0, addrs=[], on_found=on_found, on_problem=lambda text: None)
    until = asyncio.get_running_loop().time() + LAN_LIMIT_S
    try:
        async with asyncio.timeout_at(until):
            await mdns.start()
        while True:
            async with asyncio.timeout_at(until):
                found = await heard.get()
            yield found
    except TimeoutError:
        pass
    finally:
        await mdns.close()


def _is_off(home: Home) -> bool:
    return bool(resolve([o for o in AGENT_OPTIONS if o.name == "no_mdns"], {}, home.config)["no_mdns"])
