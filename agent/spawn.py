"""Local nodes that this home started: how a node process is started, and the registry of those started.

The registry only bridges the moment between a start and the first gossip about it. It never says whether a
node lives: an entry counts while that very process (pid and start time) runs, and no longer.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

import agent
from agent.home import Home, RunEntry, make_identity, still_runs, write_private
from discovery.identity import Identity, check_kind, check_mesh, check_node_name, default_name, id_text

LOG_ROTATE_BYTES = 5_000_000


class Spawned(msgspec.Struct, frozen=True):
    """One started node. `start` is the process's start in Unix seconds; `id` and `addr` are empty until known."""

    name: str
    mesh: str
    kind: str
    pid: int
    start: float
    id: str = ""
    addr: str = ""
    log: str = ""

    def alive(self) -> bool:
        """Whether that very process still runs."""
        return still_runs(self.pid, self.start)


class SpawnRegistry:
    """`state/spawned.json`: name → what was started. Unreadable is empty: nothing true depends on it."""

    def __init__(self, home: Home) -> None:
        self.path = home.state / "spawned.json"

    def entries(self) -> list[Spawned]:
        """Those whose process still runs, by name."""
        return sorted((e for e in self._read().values() if e.alive()), key=lambda e: e.name)

    def add(self, entry: Spawned) -> None:
        """Remembers `entry`; entries of processes that are gone leave on the way."""
        kept = {key: e for key, e in self._read().items() if e.alive()}
        kept[f"{entry.mesh}/{entry.name}"] = entry
        write_private(self.path, msgspec.json.format(msgspec.json.encode(kept)) + b"\n")

    def _read(self) -> dict[str, Spawned]:
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=dict[str, Spawned])
        except (OSError, msgspec.MsgspecError):
            return {}


@dataclass(frozen=True)
class Seat:
    """Where a node lives in a home: its directory's name, and what to tell `qd-agent` to get exactly that one."""

    mesh: str
    kind: str
    node: str
    """The `<node>` of `state/<mesh>/<node>/`."""
    name: str | None
    """The --name to pass; None: the kind's own directory."""

    def argv(self) -> list[str]:
        args = ["--mesh", self.mesh, "--kind", self.kind]
        return args if self.name is None else [*args, "--name", self.name]

    def log_file(self, home: Home) -> Path:
        return home.node_dir(self.mesh, self.node) / "agent.log"


def numbered_seat(home: Home, mesh: str, kind: str) -> Seat:
    """A seat of its own for one more node of `kind`, named as an unnamed node would be.

    Directories of a kind share one name, so the identity is made first and the default name follows from it.
    """
    staging = home.state / mesh / f".new-{kind}-{os.getpid()}-{os.urandom(4).hex()}"
    staging.mkdir(parents=True, mode=0o700)
    try:
        identity = make_identity(staging / "identity_ed25519", f"{mesh} {kind}")
        name = default_name(mesh, kind, identity.id)
        staging.rename(home.node_dir(mesh, name))
    except BaseException:
        for path in staging.iterdir() if staging.is_dir() else ():
            path.unlink()
        with contextlib.suppress(OSError):
            staging.rmdir()
        raise
    return Seat(mesh, kind, name, name)


def free_seat(home: Home, mesh: str, kind: str, name: str | None = None) -> Seat:
    """The seat a new local node takes: the named one, else the kind's directory while nobody sits there, else a new one."""
    check_mesh(mesh)
    check_kind(kind)
    if name is not None:
        return Seat(mesh, kind, check_node_name(name), name)
    if kind == "console":
        return Seat(mesh, kind, kind, None)
    pub_file = home.node_dir(mesh, kind) / "identity_ed25519.pub"
    if not any(e.mesh == mesh and e.kind == kind for e in home.running()) or not pub_file.exists():
        return Seat(mesh, kind, kind, None)
    return numbered_seat(home, mesh, kind)


def seated(home: Home, mesh: str, kind: str) -> list[Seat]:
    """Seats of earlier `numbered_seat` nodes of this kind, by name: a fleet started again is the same fleet."""
    base = home.state / mesh
    prefix = f"{mesh}.{kind}."
    names = (
        sorted(p.name for p in base.glob(f"{prefix}*") if (p / "identity_ed25519").exists())
        if base.is_dir()
        else []
    )
    return [Seat(mesh, kind, n, n) for n in names if len(n) == len(prefix) + 6]


def agent_command() -> list[str]:
    """The command that starts this very code's agent, whatever folder the caller stands in."""
    return [sys.executable, "-P", "-m", "agent.cli"]


def agent_environment(home: Home, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: the caller's, this home (only where it has one root), and this code first."""
    env = dict(os.environ if base is None else base)
    if home.root is not None:
        env["QD_HOME"] = str(home.root)
    root = str(Path(agent.__file__).resolve().parent.parent)
    if root not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        paths = env.get("PYTHONPATH", "").split(os.pathsep)
        if root not in paths:
            env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
    return env


def start_node(
    home: Home, args: Sequence[str], log: Path, *, goodbye_pipe: bool = False
) -> subprocess.Popen[bytes]:
    """Starts a node process in a session of its own, its stderr appended to `log`.

    With `goodbye_pipe` its stdin is a pipe whose end is the node's goodbye: nothing survives the caller, however
    the caller ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_ROTATE_BYTES:
            log.replace(log.with_name(log.name + ".1"))
    extra = ["--stdin-goodbye"] if goodbye_pipe else []
    with log.open("ab") as out:
        return subprocess.Popen(
            [*agent_command(), *args, *extra],
            stdin=subprocess.PIPE if goodbye_pipe else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=out,
            env=agent_environment(home),
            start_new_session=True,
        )


def entry_of(home: Home, pid: int) -> RunEntry | None:
    """The run entry that the process `pid` wrote, once it has."""
    return next((e for e in home.running() if e.pid == pid), None)


def note(home: Home, seat: Seat, pid: int, identity: Identity, addr: str = "") -> Spawned:
    """Remembers a node that was started, and returns what is remembered. `addr` is empty until it is known."""
    try:
        start = psutil.Process(pid).create_time()
    except psutil.Error:
        start = time.time()
    name = seat.name or default_name(seat.mesh, seat.kind, identity.id)
    log = str(seat.log_file(home))
    entry = Spawned(name, seat.mesh, seat.kind, pid, start, id_text(identity.id), addr, log)
    SpawnRegistry(home).add(entry)
    return entry


def identity_of(home: Home, seat: Seat) -> Identity:
    """The identity at `seat`, made now where there is none: what a node is called is known before it runs."""
    return make_identity(home.node_dir(seat.mesh, seat.node) / "identity_ed25519", f"{seat.mesh} {seat.kind}")


def last_words(log: Path, limit: int = 300) -> str:
    """The last line of a node's log: what it said before it ended. Control characters are dropped."""
    try:
        with log.open("rb") as f:
            f.seek(max(0, log.stat().st_size - 8192))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    line = next((text.strip() for text in reversed(lines) if text.strip()), "")
    return "".join(c for c in line if c.isprintable())[:limit].removeprefix("qd: ")
