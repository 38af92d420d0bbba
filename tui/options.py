"""What a console is started with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ConsoleOptions:
    """Everything that a config, a flag or the environment can say about the console."""

    locator: str = ""
    """The view to open on; empty is Fleet."""
    mesh: str | None = None
    """Narrows the stream itself to one mesh."""
    read_only: bool = False
    """Start in read-only mode, and stay in it."""
    theme: str = "auto"
    """auto, dark, light or plain."""
    glyphs: str = "unicode"
    """unicode, or ascii for terminals that draw ambiguous characters two cells wide."""
    keys: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Action id → key or keys."""
    bookmarks: Path | None = None
    """File that keeps the bookmarks, a locator a line; None keeps them in memory."""
    export_dir: Path | None = None
    """Where exports go; None is the current directory."""
    spawner: Any = None
    """Starts nodes (`tui.spawning.Spawner`); None where there is no home to start them in."""
    elsewhere: Any = None
    """`client(mesh, rows)` gives a client of a node of another mesh; None where there is no way to one."""
    signer: str = ""
    """Which key signs ops, as told in the confirm panel; empty where it isn't known beforehand."""
