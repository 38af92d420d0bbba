"""How long the demo fleet of ten takes until in each mesh everybody sees everybody."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure
from bench.fleet import Hangar, end, environment

BAR_S = 6.0
LIMIT_S = 120


def measure(hangar: Hangar) -> Iterator[Figure]:
    hangar.clear()
    ready, line, whole = [], [], []
    for _ in range(hangar.runs(5, 1)):
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "demo_fleet.py", "--headless", "--json", "--for", "1"],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env=environment(),
        )
        try:
            assert process.stdout is not None
            document = json.loads(process.stdout.readline())
            line.append(time.monotonic() - began)
            ready.append(document["ready_ms"] / 1000)
            process.wait(LIMIT_S)
            whole.append(time.monotonic() - began)
        finally:
            end([process], 10)
    yield Figure("demo fleet of 10: start → everybody sees everybody", "s", ready, BAR_S)
    yield Figure("demo fleet of 10: from the command to its line", "s", line)
    yield Figure("demo fleet of 10: the whole command with `--for 1`", "s", whole)
