"""A process that supervises, for the tests to kill: commands on stdin, events as JSON lines on stdout.

`python -m tests.agent.daemons.child PLACE SPECS`; commands: `start NAME`, `exec` (the program anew in this
process); with `--forks`, a path a line: a copy of this process that begins there, says `{"at": "start"}` and starts
every daemon. Its pid is told first.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from agent.daemons.supervisor import Supervisor
from agent.spec.model import DaemonSpec
from tests.agent.daemons.rig import NODE


def out(thing: object) -> None:
    os.write(1, msgspec.json.encode(thing) + b"\n")


async def supervise(place: Path, specs: dict[str, DaemonSpec], commands: bool) -> None:
    supervisor = Supervisor(
        place, node=NODE, tell=out, trouble=lambda daemon, reason: out({"trouble": daemon, "reason": reason})
    )
    out({"adopted": await supervisor.begin(specs), "pid": os.getpid()})
    if not commands:
        out({"at": "start"})
        await asyncio.gather(*(supervisor.start(name) for name in specs))
        await asyncio.sleep(60)
        return
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        match line.split():
            case ["start", name]:
                await supervisor.start(name)
                out({"started": name, "pid": supervisor.facts(name).pid})
            case ["exec"]:
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    place = Path(sys.argv[1])
    specs = msgspec.json.decode(sys.argv[2], type=dict[str, DaemonSpec])
    if "--forks" not in sys.argv:
        asyncio.run(supervise(place, specs, commands=True))
        return
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            asyncio.run(supervise(Path(line.strip()), specs, commands=False))
            os._exit(0)
        out({"forked": pid})
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
