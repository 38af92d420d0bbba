"""How long `qd` takes until its first full screen is painted, on a terminal of 80×24 and one of 160×45."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

from bench.figures import Figure
from bench.fleet import BIN, Fleet, Hangar, end, environment

BAR_MS = 400.0
LIMIT_S = 15.0
SIZES = ((80, 24), (160, 45))
SEQUENCE = re.compile(
    rb"\x1b\[(?P<args>[0-9;?<>=]*)(?P<final>[@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[PX^_].*?\x1b\\|\x1b."
    rb"|(?P<control>[\x00-\x1a\x1c-\x1f])|(?P<text>[^\x00-\x1f]+)",
    re.DOTALL,
)


def measure(hangar: Hangar) -> Iterator[Figure]:
    fleet = hangar.empty()
    agent, *_ = fleet.boot(3)
    for columns, rows in SIZES:
        painted, shown = [], []
        for _ in range(hangar.runs(7, 2)):
            first, data = first_paint(fleet, ["--via", agent.name], columns, rows, agent.name)
            painted.append(1000 * first)
            if data is not None:
                shown.append(1000 * data)
            time.sleep(0.3)
        yield Figure(f"console first paint, {columns}×{rows}, attached", "ms", painted, BAR_MS)
        yield Figure(f"console shows the fleet, {columns}×{rows}, attached", "ms", shown)
    painted, shown = [], []
    for _ in range(hangar.runs(5, 1)):
        first, data = first_paint(fleet, [], *SIZES[0], agent.name)
        painted.append(1000 * first)
        if data is not None:
            shown.append(1000 * data)
        time.sleep(1.0)
    yield Figure("console first paint, 80×24, with a node of its own", "ms", painted, BAR_MS)
    yield Figure("console shows the fleet, 80×24, with a node of its own", "ms", shown)


class Screen:
    """Just enough of a terminal to know what stands in which cell."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.cells = [[""] * columns for _ in range(rows)]
        self.row = self.column = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        self._rest = b""
        if (last := data.rfind(b"\x1b")) >= 0 and not SEQUENCE.match(data, last):
            data, self._rest = data[:last], data[last:]
        for found in SEQUENCE.finditer(data):
            if (text := found["text"]) is not None:
                self._write(text.decode("utf-8", "replace"))
            elif found["control"] == b"\n":
                self.row = min(self.row + 1, self.rows - 1)
            elif found["control"] == b"\r":
                self.column = 0
            elif found["final"] is not None:
                self._command(found["final"], found["args"])

    def _command(self, final: bytes, args: bytes) -> None:
        if args[:1] in (b"?", b"<", b">", b"="):
            return
        numbers = [int(n) if n else 1 for n in args.split(b";")] if args else [1]
        if final in b"Hf":
            self.row = min(numbers[0], self.rows) - 1
            self.column = (numbers[1] if len(numbers) > 1 else 1) - 1
        elif final == b"C":
            self.column += numbers[0]
        elif final == b"B":
            self.row = min(self.row + numbers[0], self.rows - 1)
        elif final == b"G":
            self.column = numbers[0] - 1

    def _write(self, text: str) -> None:
        for character in text:
            if self.column < self.columns:
                self.cells[self.row][self.column] = character
            self.column += 1

    @property
    def full(self) -> bool:
        """Whether every row was painted, and the frame of the screen (first and last row) says something."""
        return all(any(row) for row in self.cells) and all(
            "".join(self.cells[k]).strip() for k in (0, self.rows - 1)
        )

    @property
    def text(self) -> str:
        return "\n".join("".join(cell or " " for cell in row) for row in self.cells)


def first_paint(
    fleet: Fleet, words: list[str], columns: int, rows: int, wanted: str
) -> tuple[float, float | None]:
    """Seconds from the start of `qd` to its first full screen, and to the one that shows node `wanted`."""
    screen = Screen(columns, rows)
    env = environment(fleet.home) | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8"}
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    began = time.monotonic()
    process = subprocess.Popen(
        [str(BIN / "qd"), "console", "--home", str(fleet.home.root), *words],
        stdin=side,
        stdout=side,
        stderr=side,
        env=env,
        start_new_session=True,
    )
    os.close(side)
    painted: float | None = None
    try:
        while time.monotonic() - began < LIMIT_S:
            if not select.select([main], [], [], 0.5)[0]:
                continue
            try:
                data = os.read(main, 1 << 16)
            except OSError:
                break
            at = time.monotonic() - began
            screen.feed(data)
            if painted is None and screen.full:
                painted = at
            if painted is not None and wanted in screen.text:
                return painted, at
    finally:
        _leave(process, main)
    if painted is None:
        raise RuntimeError(f"no full screen in {LIMIT_S} s; it shows:\n{screen.text.rstrip()}")
    return painted, None


def _leave(process: subprocess.Popen[bytes], main: int) -> None:
    """Ends the console as a terminal does that is closed, and its own node with it."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            if select.select([main], [], [], 0.05)[0]:
                os.read(main, 1 << 16)
    end([process], 1)
    os.close(main)
