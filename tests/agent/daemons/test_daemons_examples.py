"""The example fleet: its spec is read, and its programs do what their comments say."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec
import pytest

from agent.meshos.controls import DrainStart
from agent.spec.model import DaemonSpec
from agent.spec.reading import read_spec
from tests.agent.daemons.rig import needs_systemd_notify, rig

ROOT = Path(__file__).parents[3]
FLEET = read_spec((ROOT / "examples" / "fleet.toml").read_text())
DAEMONS = {daemon.name: daemon for daemon in FLEET.daemon}


@pytest.mark.parametrize("name", ["beacon", "counter"])
def test_program_of_the_example_fleet_is_ready_and_ends_as_it_says(name: str, tmp_path: Path) -> None:
    if name == "beacon" and (skip := needs_systemd_notify.args[0]):
        pytest.skip(f"systemd-notify is not installed: {skip}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found: DaemonSpec = msgspec.structs.replace(
        DAEMONS[name], cwd=str(ROOT), env={"PATH": path, "PYTHONPATH": str(ROOT)}
    )

    async def play() -> None:
        async with rig(tmp_path, found) as r:
            await r.supervisor.start(name)
            await r.told("started", name)
            if name == "beacon":
                r.supervisor.tell_daemons(DrainStart(5000))
                assert (await r.told("health", name)).reason == "drained"
            else:
                await r.wrote("counting on from 0", name)
            await r.supervisor.stop(name, 5_000)
            assert (await r.told("exited_cleanly", name)).reason == ""
            assert r.lines(name)[-1] in ("beacon out", "stopped at 1")
            assert r.troubles == []

    asyncio.run(play())
