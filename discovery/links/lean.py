"""Loads asyncssh without what we never use and it would spend a start on. Must be imported before it.

It looks for C libraries of algorithms that `ssh.ALGORITHMS` leaves out, which on Linux runs `ldconfig` and the C
compiler several times a process, and it loads X.509, whose certificates are no identity here.
"""

from __future__ import annotations

import ctypes.util
import sys
from typing import Any

_NEVER_USED = ("oqs", "nettle")
_X509 = "asyncssh.crypto.x509"


def _load() -> None:
    """Imports asyncssh once, with the search answered in the negative; everything is as before afterwards."""
    if "asyncssh" in sys.modules:
        return
    ctypes_util: Any = ctypes.util
    find = ctypes_util.find_library
    blocked = _X509 not in sys.modules
    ctypes_util.find_library = lambda name: None if any(lib in name for lib in _NEVER_USED) else find(name)
    if blocked:
        sys.modules[_X509] = None  # type: ignore[assignment]
    try:
        import asyncssh  # noqa: F401
    finally:
        ctypes_util.find_library = find
        if blocked:
            sys.modules.pop(_X509, None)


_load()
