"""How a spec writes sizes and ages: `64M`, `7d`. Pure."""

from __future__ import annotations

import re

KEEP_BYTES_MIN = 1 << 20
KEEP_BYTES_MAX = 1 << 50
KEEP_MS_MIN = 60_000
KEEP_MS_MAX = 3650 * 86_400_000
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZE = re.compile(r"([0-9]{1,18})([KMGT]?)")
_AGE = re.compile(r"([0-9]{1,15})(ms|s|m|h|d)")


def bytes_of(value: int | str) -> int:
    """Bytes of `512K`, `64M` or `2G` (units of 1,024), or of a bare number. ValueError otherwise."""
    found = _SIZE.fullmatch(str(value))
    if not found:
        raise ValueError(f"{str(value)[:40]!r} is no size; write it as 512K, 64M or 2G")
    return int(found[1]) * SUFFIXES.get(found[2], 1)


def kept_bytes(value: int | str) -> int:
    """How much of a chain is kept, in bytes. ValueError otherwise."""
    size = bytes_of(value)
    if not KEEP_BYTES_MIN <= size <= KEEP_BYTES_MAX:
        raise ValueError("out of range; give 1M at least, and 1024T at most")
    return size


def kept_ms(value: str) -> int:
    """For how long a record is kept, in milliseconds: `90m`, `12h` or `7d`. ValueError otherwise."""
    found = _AGE.fullmatch(value)
    if not found:
        raise ValueError(f"{value[:40]!r} is no age; write it as 90m, 12h or 7d")
    age = int(found[1]) * _UNIT_MS[found[2]]
    if not KEEP_MS_MIN <= age <= KEEP_MS_MAX:
        raise ValueError("out of range; give 1m at least, and 3650d at most")
    return age
