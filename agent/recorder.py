"""Writes what a node's loop folded to a file from which the run can be folded again: `qd agent --record FILE`.

Line 1 says whose run it is and which config fields differ from the defaults; then one event a line, in the
order in which the engine has to take them. A process begins a new file: what an earlier one recorded (an
updated node is started with the same options) is kept as FILE.1, FILE.2 and so on. A disk that refuses ends
the recording and nothing else. Events are written as soon as they are folded, whole lines in one write: a process
that is killed leaves a file that ends with a whole line.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Event, Id, encode_line
from agent.meshos.replay import RunHeader
from discovery.errors import LocalError

LINES_MAX = 1000
"""Lines kept in memory at most; a flood between two ticks is written earlier."""


class Recorder:
    """Appends events to a new file. `failed` holds the reason once writing failed; later events are counted
    in `lost`."""

    def __init__(self, path: Path, this_node: Id, config: MeshOsConfig) -> None:
        self.path = path
        self.failed: str | None = None
        self.lost = 0
        self._lines: list[bytes] = []
        try:
            _keep_earlier(path)
            self._file: BinaryIO = path.open("wb", buffering=0)
            self._file.write(msgspec.json.encode(RunHeader(this_node, config.overrides())) + b"\n")
        except OSError as why:
            raise LocalError(f"record {path}: {why.strerror}; name a file that can be written") from why

    def write(self, event: Event) -> None:
        """Adds an event; it is written at the next `flush`."""
        if self.failed is not None:
            self.lost += 1
            return
        try:
            self._lines.append(encode_line(event))
        except (msgspec.EncodeError, TypeError, ValueError, OverflowError) as why:
            self._give_up(why)
        if len(self._lines) >= LINES_MAX:
            self.flush()

    def flush(self) -> None:
        """Hands what was added to the system, whole lines in one write."""
        if not self._lines or self.failed is not None:
            return
        lines, self._lines = self._lines, []
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except (OSError, ValueError) as why:
            self.lost += len(lines) - 1
            self._give_up(why)

    def close(self) -> None:
        """Ends the recording."""
        self.flush()
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
