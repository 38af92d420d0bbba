"""Daemons that outlived their agent, found by what its home says of them: for whoever ends a whole home."""

from __future__ import annotations

from pathlib import Path

from agent.daemons.process import kill_marked, marked
from agent.daemons.runs import read_run


def end_leftovers(state: Path) -> list[str]:
    """Kills every process of a daemon that is noted below a home's `state` directory; the names of those daemons. Call
    it when no agent of that home runs any more."""
    runs = [run for path in state.glob("*/*/daemons/*/run.json") if (run := read_run(path)) is not None]
    if not runs:
        return []
    found = marked({run.id for run in runs})
    for mark, pids in found.items():
        kill_marked(pids, mark)
    return sorted(run.daemon for run in runs if run.id in found)
