"""Which daemons stay on a node, in a few bytes of its member record: 4 that say of which spec, then a bit a daemon.

The bits follow the sorted names of the spec's daemons, so a spec of other names can't be read by them: who has
another one than the node that wrote them knows nothing (None), and goes by what it knew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import sha256

MARK_BYTES = 4


class Keeping:
    """Those bytes, written and read by the names of the daemons of one spec."""

    def __init__(self, names: Iterable[str]) -> None:
        self._order = sorted(names)
        self._mark = sha256("\0".join(self._order).encode()).digest()[:MARK_BYTES]

    def packed(self, kept: Collection[str]) -> bytes:
        """`kept` of the daemons; empty when it is none of them."""
        bits = sum(1 << place for place, name in enumerate(self._order) if name in kept)
        return self._mark + bits.to_bytes((bits.bit_length() + 7) // 8, "little") if bits else b""

    def unpacked(self, keeps: bytes) -> frozenset[str] | None:
        """The daemons that those bytes of another node name; None when they are about other names."""
        if not keeps:
            return frozenset()
        if keeps[:MARK_BYTES] != self._mark:
            return None
        bits = int.from_bytes(keeps[MARK_BYTES:], "little")
        found = []
        while bits:
            place = (bits & -bits).bit_length() - 1
            if place >= len(self._order):
                break
            found.append(self._order[place])
            bits &= bits - 1
        return frozenset(found)
