"""Clients of nodes of other meshes than the attached one's: what only a mesh itself keeps, its chains and its audit, is
asked of one of its own nodes.

A node that runs in this home comes first; else one that the view has an address of, whose key must be that of its id.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent.home import Home
from discovery.errors import QuarterdeckError, Unreachable
from discovery.identity import id_text, node_id

if TYPE_CHECKING:
    from tui.client import Client, Row

LIMIT_S = 2.0
TRIED = 3
"""Nodes of a mesh that are dialled before it counts as not answering."""


class Elsewhere:
    """One open client a mesh, dialled when it is first asked for and again when it was lost."""

    def __init__(self, home: Home, operator_key: Path | None) -> None:
        self._home = home
        self._operator_key = operator_key
        self._clients: dict[str, Client] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def client(self, mesh: str, rows: Sequence[Row]) -> Client:
        """A client of a node of `mesh`; `rows`: its live nodes as the view has them. Unreachable when none answers."""
        async with self._locks.setdefault(mesh, asyncio.Lock()):
            known = self._clients.get(mesh)
            if known is not None and not known.closed:
                return known
            client = self._clients[mesh] = await self._dial(mesh, rows)
            return client

    async def _dial(self, mesh: str, rows: Sequence[Row]) -> Client:
        from tui.client import attach_entry  # the first paint does not wait for SSH

        why: QuarterdeckError = Unreachable(f"mesh {mesh}: no node of it is up in this view")
        for entry in [entry for entry in self._home.running() if entry.mesh == mesh][:TRIED]:
            try:
                return await attach_entry(self._home, entry, self._operator_key)
            except QuarterdeckError as said:
                why = said
        reachable = [row for row in rows if row.get("addr")]
        for row in sorted(reachable, key=lambda row: row.get("kind") != "gateway")[:TRIED]:
            try:
                return await self._outside(row)
            except QuarterdeckError as said:
                why = said
        raise why

    async def _outside(self, row: Row) -> Client:
        from tui.client import address, attach_outside

        addr = address(self._home, str(row["addr"]))
        client = await attach_outside(self._home, addr, self._operator_key, lambda line: None, LIMIT_S)
        shown = client.link.login.pub
        if shown is None or id_text(node_id(shown)) != row.get("id"):
            await client.close()
            raise Unreachable(f"{row.get('name')}: another node answers at {row['addr']}")
        return client

    async def close(self) -> None:
        """Lets go of all of them."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), 1.0)
