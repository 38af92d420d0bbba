"""Lets a script of this checkout start under any Python: it goes on under the checkout's own `.venv`.

Standard library only: this runs before anything else is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from agent.freshness import DEPENDENCIES

FAILED = 1


def equip(script: str) -> None:
    """Returns where this Python has what `script` needs; else runs it again under `.venv`, made first where it is not.

    Exits with one line on stderr when that can't be had.
    """
    if not missing():
        return
    root = Path(script).resolve().parent
    venv = root / ".venv"
    python = venv / "bin" / "python"
    here = Path(sys.prefix).resolve() == venv.resolve()
    if here or not python.exists():
        sys.stderr.write(
            f"demo: {sys.executable} lacks {missing()[0]}: setting up {venv} with `make setup`\n"
        )
        why = set_up(root)
        importlib.invalidate_caches()
        if why or (here and missing()) or not python.exists():
            sys.stderr.write(f"qd: demo: {why or f'{venv} is not whole'}; run `make setup` in {root}\n")
            sys.exit(FAILED)
        if here:
            return
    sys.stderr.flush()
    os.execv(python, [str(python), script, *sys.argv[1:]])


def missing() -> list[str]:
    """What is needed and not installed; textual and the rest are looked for, never loaded."""
    return [name for name in DEPENDENCIES if importlib.util.find_spec(name) is None]


def set_up(root: Path) -> str:
    """Runs `make setup`, what it prints on stderr; why it failed, or nothing."""
    try:
        done = subprocess.run(
            ["make", "--silent", "-C", str(root), "setup"], stdin=subprocess.DEVNULL, stdout=2, check=False
        )
    except OSError as why:
        return f"make can't be run ({why.strerror})"
    return f"`make setup` failed with exit {done.returncode}" if done.returncode else ""
