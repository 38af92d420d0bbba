"""Writes what a node's loop folded to a file from which the run can be folded again: `qd agent --record FILE`.

Line 1 says whose run it is and which config fields differ from the defaults; then one event a line, in the
order in which the engine has to take them. A process begins a new file: what an earlier one recorded (an
updated node is started with the same options) is kept as FILE.1, FILE.2 and so on. A disk that refuses ends
the recording and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Event, Id, encode_line
from discovery.errors import LocalError


class RunHeader(msgspec.Struct, frozen=True):
    """Line 1 of a recorded run."""

    this_node: Id
    config: dict[str, float | int] = {}
    scores: dict[str, dict[str, float]] = {}


class Recorder:
    """Appends events to a new file. `failed` holds the reason once writing failed; later events are counted
    in `lost`."""

    def __init__(self, path: Path, this_node: Id, config: MeshOsConfig) -> None:
        self.path = path
        self.failed: str | None = None
        self.lost = 0
        try:
            _keep_earlier(path)
            self._file: BinaryIO = path.open("wb")
            self._file.write(msgspec.json.encode(RunHeader(this_node, config.overrides())) + b"\n")
            self._file.flush()
        except OSError as why:
            raise LocalError(f"record {path}: {why.strerror}; name a file that can be written") from why

    def write(self, event: Event) -> None:
        """Adds an event; it is on its way to the disk at the next `flush`."""
        if self.failed is not None:
            self.lost += 1
            return
        try:
            self._file.write(encode_line(event))
        except (OSError, ValueError) as why:
            self._give_up(why)

    def flush(self) -> None:
        """Hands what was written to the system."""
        if self.failed is None:
            try:
                self._file.flush()
            except (OSError, ValueError) as why:
                self._give_up(why)

    def close(self) -> None:
        """Ends the recording."""
        try:
            self._file.close()
        except OSError as why:
            self._give_up(why)

    def _give_up(self, why: Exception) -> None:
        self.lost += 1
        self.failed = self.failed or f"recording to {self.path} ended: {why}"


def _keep_earlier(path: Path) -> None:
    if path.is_file() and path.stat().st_size:
        number = 1
        while (kept := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(kept)
