"""The replicas that a node's page tells of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tui.model.ages import number
from tui.model.rows import Row
from tui.model.text import clean

MOST = 1_000


def chains_held(doc: object, row: Row) -> list[tuple[str, str]]:
    """(chain, what is known of it) for each replica that the node of this page holds, by name.

    A name that shows as another one than it is can't be meant by whoever reads it, and is left out.
    """
    given = doc.get("replicas") if isinstance(doc, Mapping) else None
    found: dict[str, str] = {}
    for replica in given[:MOST] if isinstance(given, list) else ():
        if not isinstance(replica, Mapping):
            continue
        chain = replica.get("chain")
        holders = replica.get("holders")
        names = [clean(holder) for holder in holders] if isinstance(holders, list) else None
        if not isinstance(chain, str) or not chain or clean(chain) != chain:
            continue
        if names is None or row.name in names or row.id in names:
            found[chain] = _known(replica, names)
    return sorted(found.items())


def _known(replica: Mapping[str, Any], holders: list[str] | None) -> str:
    desired, leader = number(replica.get("desired")), clean(replica.get("leader"))
    held = (
        ""
        if holders is None
        else f"{len(holders)} of {desired:.0f} held"
        if desired is not None
        else f"{len(holders)} held"
    )
    return ", ".join(part for part in (held, f"leader {leader}" if leader else "") if part)


def told(chain: str, known: Mapping[str, str]) -> str:
    """A chain with how many hold it: `orders (2 of 3 held)`."""
    held = known.get(chain, "").partition(",")[0]
    return f"{chain} ({held} now)" if held.endswith("held") else chain
