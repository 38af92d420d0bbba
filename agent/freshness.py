"""Is this process running the code that is on disk? The fingerprint that answers it.

The fingerprint is 12 hex digits of a hash over the source files of the three packages, the interpreter's
version and the installed versions of the direct dependencies. A process takes it once when it starts
(`at_start`); `DiskWatch` takes it of the disk again when files have changed. Two nodes are comparable however
they were installed: paths count relative to their package, times don't count.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

DISTRIBUTION = "quarterdeck"
PACKAGES = ("discovery", "agent", "tui")
DEPENDENCIES = (
    "asyncssh",
    "bcrypt",
    "click",
    "cryptography",
    "msgspec",
    "platformdirs",
    "psutil",
    "textual",
    "zeroconf",
)
"""The direct dependencies where the distribution's own metadata can't be read (run from a bare checkout)."""
DIGITS = 12
LOOK_EVERY_S = 2.0

_DIST_INFO = re.compile(r"(.+?)-([0-9][^-]*)\.dist-info")
_REQUIRES = re.compile(r"Requires-Dist: *([A-Za-z0-9._-]+)")

Stamp = tuple[object, ...]


@functools.cache
def at_start() -> str:
    """The fingerprint of the code that this process runs: the first call counts, so make it at once."""
    return fingerprint()


def fingerprint() -> str:
    """The fingerprint of the code on disk now: 12 hex digits. Costs a few milliseconds; never raises."""
    digest = hashlib.sha256()
    for name, path in _sources():
        try:
            content = Path(path).read_bytes()
        except OSError:
            continue
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    digest.update(f"{sys.implementation.name} {sys.version.split()[0]}\0".encode())
    for dependency, version in _versions(_places()):
        digest.update(f"{dependency} {version}\0".encode())
    return digest.hexdigest()[:DIGITS]


class DiskWatch:
    """The fingerprint of the code on disk, cheap to ask for: files are looked at (mtime and size) at most
    every `look_every_s` seconds, and read only when something changed."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, look_every_s: float = LOOK_EVERY_S
    ) -> None:
        self._clock = clock
        self._look_every_s = look_every_s
        self._looked_at: float | None = None
        self._stamp: Stamp = ()
        self._print = ""

    def current(self) -> str:
        """The fingerprint of the disk, at most `look_every_s` old."""
        now = self._clock()
        if self._looked_at is None or now - self._looked_at >= self._look_every_s:
            self._looked_at = now
            stamp = _stamp()
            if stamp != self._stamp or not self._print:
                self._stamp = stamp
                self._print = fingerprint()
        return self._print

    def fresh(self, build: str) -> bool | None:
        """Whether `build` is the code on disk here; None where the build is unknown."""
        return build == self.current() if build else None


@functools.cache
def _folders() -> tuple[tuple[str, str], ...]:
    """(package, folder) of the three packages, where this process's import system finds them."""
    found = []
    for package in PACKAGES:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        found += [(package, folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return tuple(found)


def _walk(name: str, folder: str) -> list[tuple[str, os.DirEntry[str]]]:
    found: list[tuple[str, os.DirEntry[str]]] = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return found
    for entry in entries:
        if entry.name.endswith(".py"):
            found.append((f"{name}/{entry.name}", entry))
        elif entry.name.isidentifier() and entry.name != "__pycache__" and entry.is_dir():
            found += _walk(f"{name}/{entry.name}", entry.path)
    return found


def _sources() -> list[tuple[str, str]]:
    return [(name, entry.path) for package, folder in _folders() for name, entry in _walk(package, folder)]


def _places() -> Stamp:
    """Folders that packages are found in, with their mtimes, which change with what is installed."""
    places = []
    for folder in sys.path:
        try:
            places.append((folder, Path(folder).stat().st_mtime_ns) if folder else None)
        except OSError:
            continue
    return tuple(place for place in places if place)


@functools.lru_cache(maxsize=4)
def _versions(places: Stamp) -> tuple[tuple[str, str], ...]:
    """(name, version) of each direct dependency, `-` for a missing one. Read again when `places` changed.

    Read from the names of the folders that installers leave; importlib.metadata says the same but costs an
    agent 10 ms and several modules, so it is asked only where that is not enough."""
    installed: dict[str, tuple[str, str]] = {}
    for folder in sys.path:
        for name in _names(folder):
            found = _DIST_INFO.fullmatch(name)
            if found:
                installed.setdefault(_normal(found[1]), (found[2], f"{folder}/{name}/METADATA"))
    required = _required(installed[DISTRIBUTION][1]) if DISTRIBUTION in installed else []
    return tuple(
        (name, installed[name][0] if name in installed else _asked(name))
        for name in sorted(required or DEPENDENCIES)
    )


def _names(folder: str) -> list[str]:
    try:
        return sorted(path.name for path in Path(folder).iterdir()) if folder else []
    except OSError:
        return []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _required(metadata: str) -> list[str]:
    """The direct dependencies that a distribution's METADATA names, those of its extras left out."""
    try:
        lines = Path(metadata).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = lines[: lines.index("")] if "" in lines else lines
    found = [_REQUIRES.match(line) for line in lines if "extra ==" not in line]
    return [_normal(match[1]) for match in found if match]


def _asked(name: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, OSError):
        return "-"


def _stamp() -> Stamp:
    """What changes when the fingerprint may have: name, mtime and size of every source, and `_places`."""
    seen: list[object] = [_places()]
    for package, folder in _folders():
        for name, entry in _walk(package, folder):
            try:
                stat = entry.stat()
            except OSError:
                continue
            seen.append((name, stat.st_mtime_ns, stat.st_size))
    return tuple(seen)
