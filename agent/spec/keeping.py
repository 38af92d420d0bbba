"""What a cordoned node still runs, in a few bytes of its member record: 4 that say of which spec, then a bit a daemon.

The bits follow the sorted names of the spec's daemons, so a spec of other names can't be read by them: who has
another one than the node that wrote them knows nothing (None), and goes by what it knew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import sha256

MARK_BYTES = 4


def packed(names: Iterable[str], running: Collection[str]) -> bytes:
    """`running` of the daemons `names`; empty when it is none of them."""
    order = sorted(names)
    bits = sum(1 << place for place, name in enumerate(order) if name in running)
    return _mark(order) + bits.to_bytes((bits.bit_length() + 7) // 8, "little") if bits else b""


def unpacked(names: Iterable[str], keeps: bytes) -> frozenset[str] | None:
    """The daemons that those bytes of another node name, by the names of the own spec; None when they are about
    other names."""
    if not keeps:
        return frozenset()
    order = sorted(names)
    if keeps[:MARK_BYTES] != _mark(order):
        return None
    bits = int.from_bytes(keeps[MARK_BYTES:], "little")
    return frozenset(name for place, name in enumerate(order) if bits >> place & 1)


def _mark(order: Iterable[str]) -> bytes:
    return sha256("\0".join(order).encode()).digest()[:MARK_BYTES]
