"""`python -m bench [NAME…] [--quick] [--json FILE]`: measures, prints a table, keeps it in bench/out.

A figure over its bar is marked, and is never a failure: timings on a shared machine are read, not asserted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path

from bench.figures import Figure, markdown
from bench.fleet import Hangar

SUBJECTS = (
    "engine",
    "daemons",
    "swim",
    "table",
    "artifacts",
    "meshes",
    "directory",
    "chains",
    "demo",
    "console",
    "start",
    "op",
    "silent",
    "idle",
    "goodbye",
    "crash",
)
"""In the order they are run: those that need a fleet of 25 come last and share it."""
OUT = Path(__file__).parent / "out"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="fewer runs, smaller fleets: does it work at all"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SUBJECTS):
        parser.error(f"{', '.join(sorted(unknown))}: no such subject; there are {', '.join(SUBJECTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures: list[Figure] = []
    failed: list[str] = []
    with Hangar(quick=options.quick) as hangar:
        for name in options.names or SUBJECTS:
            say(f"{name} …")
            try:
                for figure in importlib.import_module(f"bench.{name}").measure(hangar):
                    say(f"  {figure.line()}")
                    figures.append(figure)
            except KeyboardInterrupt:
                say("interrupted: what was measured so far")
                break
            except Exception:
                failed.append(name)
                traceback.print_exc()
    print(markdown(figures))
    if failed:
        print(f"\nnot measured: {', '.join(failed)}")
    keep(figures, options.json)
    return 0


def keep(figures: list[Figure], also: str | None) -> None:
    """Writes the figures with the circumstances they were taken in."""
    document = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "figures": [figure.document() for figure in figures],
    }
    text = json.dumps(document, indent=1) + "\n"
    OUT.mkdir(exist_ok=True)
    (OUT / f"{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(text)
    if also:
        Path(also).write_text(text)


def say(line: str) -> None:
    """Progress, for people: stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
