"""An agent without TLS until somebody asks for it: what speaks to other nodes is SSH, and TLS would be 4 MB of each.

asyncio loads the TLS library where it finds it. Here it doesn't find it, and gets it later by `tls`, which whoever is
about to open a TLS connection calls before. Must be imported before asyncio; else it changes nothing.
"""

from __future__ import annotations

import importlib
import sys

_USERS = ("asyncio.sslproto", "asyncio.base_events", "asyncio.selector_events")


def _load() -> None:
    """Imports asyncio once, with TLS hidden from it."""
    if "asyncio" in sys.modules or "ssl" in sys.modules:
        return
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        import asyncio  # noqa: F401
    finally:
        del sys.modules["ssl"]


def tls() -> None:
    """Gives asyncio the TLS library. Twice is once; an ImportError says that this Python has none."""
    ssl = importlib.import_module("ssl")
    protocol = sys.modules.get(_USERS[0])
    if protocol is None or getattr(protocol, "ssl", ssl) is not None:
        return
    protocol.__dict__["ssl"] = ssl
    importlib.reload(protocol)
    for name in _USERS[1:]:
        if (module := sys.modules.get(name)) is not None:
            module.__dict__["ssl"] = ssl


_load()
