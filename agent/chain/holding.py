"""Who holds a replica of which chain: by rendezvous hash, so that everybody agrees and few move when a node goes. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from agent.chain.weighing import NODE_CHAIN
from discovery.identity import id_text

HOLDERS = 3


def node_chain(node: int) -> str:
    """Name of a node's own action chain."""
    return NODE_CHAIN + id_text(node)


def holders(chain: str, live: Iterable[int], count: int = HOLDERS) -> list[int]:
    """The `count` of these nodes that hold a chain, the first choice first. A node doesn't hold its own."""
    able = [node for node in set(live) if node_chain(node) != chain]
    return sorted(able, key=lambda node: _weight(chain, node), reverse=True)[:count]


def _weight(chain: str, node: int) -> tuple[bytes, int]:
    return hashlib.sha256(f"{chain}\0{node:016x}".encode()).digest(), node
