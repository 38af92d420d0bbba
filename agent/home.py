"""Where things live: one user's QD_HOME (or the XDG directories) as typed paths, keys and the list of running nodes.

Layout below a home directory::

    config/config.toml  config/authorized_operators
    config/operator_ed25519(.pub)  config/client_ed25519(.pub)  config/backbone.key
    config/meshes/<mesh>/mesh.key            32 bytes, base64; more of them once it was rotated (`agent.keyring`)
    config/meshes/<mesh>/identity_ed25519    the mesh's own key
    config/meshes/<mesh>/seeds               HOST:PORT a line, where its members may be met
    config/meshes/<mesh>/genesis_operators   the roster with which the mesh began
    state/<mesh>/<node>/identity_ed25519, journal.db, agent.log, lock
    run/<mesh>.<name>.json
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from discovery.errors import LocalError
from discovery.identity import Identity

KEY_BYTES = 32
RUN_FILE_MAX_BYTES = 16 * 1024
START_SLACK_S = 1.5
"""Two readings of one process's start time differ by less than this."""


@dataclass(frozen=True)
class Home:
    """The three directories of one user. `Home.open(None)` follows QD_HOME, then XDG."""

    config: Path
    state: Path
    run: Path
    root: Path | None
    """The one directory of QD_HOME or --home, None for XDG."""

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None) -> Home:
        root = path or os.environ.get("QD_HOME")
        if root:
            base = Path(root).expanduser().absolute()
            return cls(base / "config", base / "state", base / "run", base)
        import platformdirs

        dirs = platformdirs.PlatformDirs("quarterdeck", appauthor=False)
        state = Path(dirs.user_state_dir)
        run = Path(dirs.user_runtime_dir) if os.environ.get("XDG_RUNTIME_DIR") else state / "run"
        return cls(Path(dirs.user_config_dir), state, run, None)

    @property
    def operators_file(self) -> Path:
        return self.config / "authorized_operators"

    @property
    def operator_key_file(self) -> Path:
        return self.config / "operator_ed25519"

    @property
    def client_key_file(self) -> Path:
        return self.config / "client_ed25519"

    @property
    def backbone_key_file(self) -> Path:
        return self.config / "backbone.key"

    def mesh_dir(self, mesh: str) -> Path:
        return self.config / "meshes" / mesh

    def mesh_key_file(self, mesh: str) -> Path:
        return self.mesh_dir(mesh) / "mesh.key"

    def mesh_identity_file(self, mesh: str) -> Path:
        return self.mesh_dir(mesh) / "identity_ed25519"

    def mesh_genesis_file(self, mesh: str) -> Path:
        return self.mesh_dir(mesh) / "genesis_operators"

    def mesh_seeds_file(self, mesh: str) -> Path:
        return self.mesh_dir(mesh) / "seeds"

    def meshes(self) -> list[str]:
        """The meshes this home holds a key for, by name."""
        base = self.config / "meshes"
        return sorted(p.parent.name for p in base.glob("*/mesh.key")) if base.is_dir() else []

    def node_dir(self, mesh: str, node: str) -> Path:
        """`node` is the --name, else the kind."""
        return self.state / mesh / node

    def run_file(self, mesh: str, name: str) -> Path:
        return self.run / f"{mesh}.{name}.json"

    def running(self) -> list[RunEntry]:
        """Nodes of this home whose process is there (pid and start time), gateways first, then by name."""
        found = []
        for path in sorted(self.run.glob("*.json")) if self.run.is_dir() else []:
            entry = RunEntry.read(path)
            if entry is not None and entry.alive():
                found.append(entry)
        return sorted(found, key=lambda e: (e.kind != "gateway", e.name))


class RunEntry(msgspec.Struct, frozen=True):
    """`run/<mesh>.<name>.json`: a running node of this home. `start` is the process's start in Unix seconds."""

    pid: int
    start: float
    id: str
    pub: str
    """Base64 of the 32-byte node key, which is also its SSH host key."""
    name: str
    mesh: str
    kind: str
    addr: str
    """HOST:PORT a local client connects to."""
    build: str = ""

    def __post_init__(self) -> None:
        host, port = self.host_port
        if self.pid < 1 or not host or not 0 < port < 65536:
            raise ValueError("a process id and HOST:PORT expected")

    @classmethod
    def read(cls, path: Path) -> RunEntry | None:
        """What a file of the run directory says; None when it says nothing usable. Never waits, whatever it is."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as f:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return None
                return msgspec.json.decode(f.read(RUN_FILE_MAX_BYTES), type=cls)
        except (OSError, msgspec.MsgspecError):
            return None

    def alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        return still_runs(self.pid, self.start)

    @property
    def host_port(self) -> tuple[str, int]:
        host, _, port = self.addr.rpartition(":")
        return host.strip("[]"), int(port)


def still_runs(pid: int, start: float) -> bool:
    """Whether the process that began at `start` (Unix seconds) as `pid` still runs; a zombie does not."""
    try:
        proc = psutil.Process(pid)
        return bool(abs(proc.create_time() - start) < START_SLACK_S and proc.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def write_private(path: Path, data: bytes) -> None:
    """Writes a file of mode 0600 whole: a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a secret file; LocalError when it is missing, unreadable, or others can read it."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except FileNotFoundError as why:
        raise LocalError(f"{what} {path}: not there; make it with `qd init`") from why
    except OSError as why:
        raise LocalError(f"{what} {path}: {why.strerror}; check who owns it") from why
    if stat.S_IMODE(mode) & 0o077:
        raise LocalError(
            f"{what} {path}: others can read it (mode {stat.S_IMODE(mode):04o}); run `chmod 600 {path}`"
        )
    return data


def read_identity(path: Path, what: str) -> Identity:
    """An ed25519 key file, checked as `read_private` does."""
    try:
        return Identity.from_openssh(read_private(path, what))
    except LocalError as why:
        if str(path) in str(why):
            raise
        raise LocalError(f"{what} {path}: {why}; restore it from a copy or remove it") from why


def make_identity(path: Path, comment: str) -> Identity:
    """Makes a key file (0600) with its `.pub` beside it, or reads the one that is there."""
    if path.exists():
        return read_identity(path, "key")
    identity = Identity.generate()
    try:
        write_private(path, identity.to_openssh())
        path.with_name(path.name + ".pub").write_text(identity.pub_openssh(comment) + "\n")
    except OSError as why:
        raise LocalError(
            f"key {path}: {why.strerror}; it needs a disk with room that you can write to"
        ) from why
    return identity


def read_secret(path: Path, what: str) -> bytes:
    """A 32-byte secret stored as base64."""
    try:
        key = base64.b64decode(read_private(path, what).strip(), validate=True)
    except (binascii.Error, ValueError) as why:
        raise LocalError(f"{what} {path}: not base64; restore it from a copy") from why
    if len(key) != KEY_BYTES:
        raise LocalError(f"{what} {path}: holds {len(key)} bytes, not {KEY_BYTES}; restore it from a copy")
    return key


def make_secret(path: Path) -> bytes:
    """Makes a 32-byte secret file (0600), or reads the one that is there."""
    if path.exists():
        return read_secret(path, "key")
    key = os.urandom(KEY_BYTES)
    write_private(path, base64.b64encode(key) + b"\n")
    return key
