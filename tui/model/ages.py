"""Figures as people read them: ages, countdowns, durations, shares. Unknown is `–`, never a guess."""

from __future__ import annotations

import math
import re
from datetime import datetime

UNKNOWN = "–"
_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")


def number(value: object) -> float | None:
    """`value` as a finite float; None for anything else, so that a broken figure is shown as unknown."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def age(ms: float | None) -> str:
    """At most four cells: `0s`, `59s`, `59m`, `47h`, `99d`, `9y`."""
    if ms is None:
        return UNKNOWN
    seconds = max(0, int(ms // 1000))
    for size, limit, unit in ((1, 60, "s"), (60, 3600, "m"), (3600, 172_800, "h"), (86_400, 86_400_000, "d")):
        if seconds < limit:
            return f"{seconds // size}{unit}"
    return f"{seconds // 31_536_000}y"


def countdown(ms: float) -> str:
    """What is left, as `4:20` or `1:02:03`; `0:00` once it has passed."""
    left = max(0, math.ceil(ms / 1000))
    hours, rest = divmod(left, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def took(ms: float | None) -> str:
    """How long an op took: `7 ms`, `1.2 s`."""
    if ms is None:
        return UNKNOWN
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def share(value: float | None) -> str:
    """A share of 1 as `98%`."""
    return UNKNOWN if value is None else f"{round(max(0.0, min(1.0, value)) * 100)}%"


def rtt(ms: float | None) -> str:
    """A round-trip time in at most five cells: `0.3ms`, `12ms`, `1.5s`."""
    if ms is None:
        return UNKNOWN
    if ms < 9.95:
        return f"{ms:.1f}ms"
    return f"{ms:.0f}ms" if ms < 1000 else f"{ms / 1000:.1f}s" if ms < 100_000 else f"{ms / 1000:.0f}s"


def size(amount: float | None) -> str:
    """Bytes in at most nine cells: `812 B`, `1.4 KiB`, `120.0 MiB`."""
    if amount is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def date(at_ms: float | None, year: bool = True) -> str:
    """A Unix time in milliseconds as local `YYYY-MM-DD HH:MM:SS`, without `year` as `MM-DD HH:MM:SS`."""
    if at_ms is None:
        return UNKNOWN
    try:
        return datetime.fromtimestamp(at_ms / 1000).strftime(f"{'%Y-' if year else ''}%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return UNKNOWN


def clock(at_ms: float | None) -> str:
    """A Unix time in milliseconds as local `HH:MM:SS`."""
    if at_ms is None:
        return UNKNOWN
    try:
        return datetime.fromtimestamp(at_ms / 1000).strftime("%H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return UNKNOWN


def duration_ms(text: str) -> float | None:
    """`1500ms`, `30s`, `5m`, `2h`, `1d`, or a bare number of seconds; None when it is none of these."""
    found = _DURATION.fullmatch(text.strip())
    return float(found[1]) * _UNITS_MS[found[2] or "s"] if found else None
