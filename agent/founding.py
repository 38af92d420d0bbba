"""A mesh comes into a home: founded there, or joined with what an invitation brought.

Everything here is idempotent: what is there is read and checked, what is missing is made or taken over. A home that
holds a mesh's keys may run its nodes; nothing is registered anywhere else.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.admission import Bundle, Glance, key_mark
from agent.config import host_port
from agent.events import wall_ms
from agent.home import Home, make_identity, make_secret, read_identity, read_secret, write_private
from agent.keyring import KeyFile, unpack
from agent.operators import parse
from discovery.errors import LocalError, Refused
from discovery.identity import Identity, check_mesh, openssh_line, verify
from discovery.member import Addr, addr_text
from discovery.sshkey import pub_fingerprint

SEEDS_MAX = 16
OPERATORS_MAX_BYTES = 512 * 1024
"""Of operators' lines that an invitation carries; a frame of a link holds twice as much."""


@dataclass(frozen=True)
class Founding:
    """What `found_mesh` did: `made` lists the files that were not there before, in the order they were made."""

    mesh: str
    existed: bool
    """Whether this home held the mesh's key already."""
    made: tuple[Path, ...]
    operator_fingerprint: str
    """`SHA256:…` of the home's operator key."""


def found_mesh(home: Home, mesh: str) -> Founding:
    """Makes whatever of `mesh` this home lacks: keys, client key, operator key and its admin line.

    LocalError when the name is no mesh name or a key that is there can't be used; files made until then stay.
    """
    check_mesh(mesh)
    for directory in (home.config, home.state, home.run):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    made: list[Path] = []
    existed = home.mesh_key_file(mesh).exists()

    def secret(path: Path) -> None:
        fresh = not path.exists()
        make_secret(path)
        if fresh:
            made.append(path)

    def identity(path: Path, comment: str) -> Identity:
        fresh = not path.exists()
        key = make_identity(path, comment)
        if fresh:
            made.append(path)
        return key

    secret(home.backbone_key_file)
    if existed:
        KeyFile(home.mesh_key_file(mesh), mesh).read(wall_ms())
    else:
        secret(home.mesh_key_file(mesh))
    identity(home.mesh_identity_file(mesh), f"mesh {mesh}")
    identity(home.client_key_file, "quarterdeck client of this home")
    operator = identity(home.operator_key_file, _whose())
    if admit_operator(home, openssh_line(operator.pub), "admin", _whose()):
        made.append(home.operators_file)
    genesis = home.mesh_genesis_file(mesh)
    if not existed and not genesis.exists():
        line = f'environment="QD_ROLE=admin" {openssh_line(operator.pub)} {_whose()}\n'
        write_private(genesis, line.encode())
        made.append(genesis)
    return Founding(mesh, existed, tuple(made), pub_fingerprint(operator.pub))


def admit_operator(home: Home, key_line: str, role: str, comment: str) -> bool:
    """Adds an operator's key to this home's `authorized_operators` unless it stands there; True when added."""
    path = home.operators_file
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    blob = key_line.split()[1]
    if any(blob in line.split() for line in text.splitlines() if not line.lstrip().startswith("#")):
        return False
    if not text:
        text = "# Who may command the nodes of this home, in the format of OpenSSH's authorized_keys.\n"
    elif not text.endswith("\n"):
        text += "\n"
    text += f'environment="QD_ROLE={role}" {key_line} {comment}\n'
    write_private(path, text.encode("utf-8", errors="surrogateescape"))
    return True


def genesis_of(home: Home, mesh: str) -> str:
    """The roster with which the mesh began: lines of `authorized_keys`, made by `qd init` and handed on by invitations.

    A home of an earlier build has none: then this host's operators, as they stand now, are taken and kept."""
    from agent.chain.adminstate import genesis_roster

    path = home.mesh_genesis_file(mesh)
    try:
        kept = str(path.read_text(encoding="utf-8"))
        genesis_roster(kept)
        return kept
    except FileNotFoundError:
        pass
    except OSError as why:
        raise LocalError(f"{path}: {why.strerror}; make it a file that you can read") from why
    except (UnicodeDecodeError, LocalError) as why:
        raise LocalError(f"{path}: {why}; take the file from another host of the mesh") from why
    lines = []
    with contextlib.suppress(OSError):
        text = home.operators_file.read_text(encoding="utf-8", errors="replace")
        rows = text.split("\n")
        for line in parse(text)[0]:
            with contextlib.suppress(LocalError):
                row = rows[line.number - 1].strip()
                genesis_roster(row)
                lines.append(row)
    found = "".join(f"{line}\n" for line in lines)
    with contextlib.suppress(OSError):
        write_private(path, found.encode())
    return found


# --- inviting and joining


def bundle_of(home: Home, mesh: str, ring: bytes, seeds: Sequence[Addr]) -> Bundle:
    """What this home hands to a newcomer. `ring`: the mesh's keys as they stand, packed. LocalError when a key is
    missing here."""
    identity = read_identity(home.mesh_identity_file(mesh), f"identity of mesh {mesh}")
    backbone = (
        read_secret(home.backbone_key_file, "backbone key") if home.backbone_key_file.exists() else None
    )
    return Bundle(
        ring=ring,
        identity=identity.to_openssh(),
        backbone=backbone,
        operators=operator_lines(home.operators_file),
        seeds=list(seeds)[:SEEDS_MAX],
        genesis=genesis_of(home, mesh),
    )


def operator_lines(path: Path) -> list[str]:
    """The valid lines of an `authorized_operators`, as they stand there, as far as an invitation can carry them."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = text.split("\n")
    found: list[str] = []
    room = OPERATORS_MAX_BYTES
    for line in parse(text)[0]:
        row = rows[line.number - 1].strip()
        room -= len(row.encode())
        if room < 0:
            break
        found.append(row)
    return found


@dataclass(frozen=True)
class Joining:
    """What `join_mesh` did. `made`: files that were not there before, `changed`: those that now say something else."""

    mesh: str
    created: bool
    """This home did not hold the mesh before."""
    generation: int
    made: tuple[Path, ...]
    changed: tuple[Path, ...]
    operators_added: int
    operators_had: int
    seeds: tuple[Addr, ...]
    operator_fingerprint: str


def holds_already(home: Home, glance: Glance) -> bool:
    """Whether this home holds the mesh just as the inviter does. Refused when it can't join without losing something:
    `other_mesh`, `other_key`, `other_backbone`. LocalError when a key here can't be read."""
    mesh, folder = glance.mesh, home.mesh_dir(glance.mesh)
    key, identity = home.mesh_key_file(mesh), home.mesh_identity_file(mesh)
    if identity.exists():
        other = read_identity(identity, f"identity of mesh {mesh}").pub != glance.mesh_pub
    else:
        other = key.exists()
    if other:
        raise Refused(
            "other_mesh",
            f"mesh {mesh}: this home holds another mesh of that name ({folder}); join in a home of its own, with --home",
        )
    backbone = (
        key_mark(read_secret(home.backbone_key_file, "key")) if home.backbone_key_file.exists() else None
    )
    others = [name for name in home.meshes() if name != mesh]
    if others and None not in (backbone, glance.backbone) and backbone != glance.backbone:
        raise Refused(
            "other_backbone",
            f"mesh {mesh}: meets other meshes over another backbone than {', '.join(others)} of this home, and a home "
            "has one backbone; join in a home of its own, with --home",
        )
    if not key.exists():
        return False
    mine = KeyFile(key, mesh).read(wall_ms()).ring.order
    if mine != glance.ring and mine[0] >= glance.ring[0]:
        raise Refused(
            "other_key",
            f"mesh {mesh}: this home holds another key of it, generation {mine[0]}, the inviter has {glance.ring[0]}; "
            f"if the inviter's is right, move {key} away and join again",
        )
    return mine == glance.ring and glance.backbone in (None, backbone)


def join_mesh(home: Home, mesh: str, bundle: Bundle, met: Sequence[Addr]) -> Joining:
    """Takes over what an invitation brought, and makes what else a home needs: client key, operator key.

    `met`: where the inviter answered, best first. The mesh's key is written last: until then nothing here runs with
    half of it. LocalError when something can't be written, RemoteError or Refused when the bundle makes no sense.
    """
    check_mesh(mesh)
    make_folders(home, mesh)
    identity = Identity.from_openssh(bundle.identity)
    kept = unpack(bundle.ring, mesh, identity.pub, verify, wall_ms())
    key_file = home.mesh_key_file(mesh)
    created = not key_file.exists()
    made: list[Path] = []
    changed: list[Path] = []

    def put(path: Path, data: bytes) -> None:
        there = path.read_bytes() if path.exists() else None
        if there != data:
            _write(path, data)
            (made if there is None else changed).append(path)

    identity_file = home.mesh_identity_file(mesh)
    if not identity_file.exists():
        put(identity_file, bundle.identity)
        public = identity_file.with_name(identity_file.name + ".pub")
        put(public, (identity.pub_openssh(f"mesh {mesh}") + "\n").encode())
    elif read_identity(identity_file, f"identity of mesh {mesh}").pub != identity.pub:
        raise Refused("other_mesh", f"mesh {mesh}: this home holds another mesh of that name")
    if bundle.backbone is not None:
        put(home.backbone_key_file, base64.b64encode(bundle.backbone) + b"\n")
    genesis = home.mesh_genesis_file(mesh)
    if bundle.genesis and not genesis.exists():
        put(genesis, bundle.genesis.encode())
    seeds = tuple(dict.fromkeys([*met, *map(_addr, bundle.seeds), *read_seeds(home, mesh)]))[:SEEDS_MAX]
    put(home.mesh_seeds_file(mesh), "".join(f"{addr_text(addr)}\n" for addr in seeds).encode())
    text, added, had = with_operators(home.operators_file, bundle.operators, f"of mesh {mesh}")
    if added:
        put(home.operators_file, text.encode("utf-8", errors="surrogateescape"))
    before = key_file.read_bytes() if not created else None
    KeyFile(key_file, mesh).advance(kept, wall_ms())
    if key_file.read_bytes() != before:
        (made if created else changed).append(key_file)
    founding = found_mesh(home, mesh)
    made += [path for path in founding.made if path not in (*made, *changed)]
    return Joining(
        mesh,
        created,
        kept.ring.generation,
        tuple(made),
        tuple(changed),
        added,
        had,
        seeds,
        founding.operator_fingerprint,
    )


def make_folders(home: Home, mesh: str) -> None:
    """The folders of a home that holds `mesh`, to be made before an invitation is spent. LocalError."""
    for directory in (home.config, home.state, home.run, home.mesh_dir(mesh)):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as why:
            raise LocalError(
                f"home {directory}: {why.strerror}; make it a directory that you can write to"
            ) from why


def read_seeds(home: Home, mesh: str) -> list[Addr]:
    """Where members of the mesh may be met, as joining noted; lines that hold no address are passed over."""
    found: list[Addr] = []
    with contextlib.suppress(OSError):
        text = home.mesh_seeds_file(mesh).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found.append(host_port(line.strip()))
    return found[:SEEDS_MAX]


def with_operators(path: Path, lines: Sequence[str], whence: str) -> tuple[str, int, int]:
    """The text of an `authorized_operators` with those of `lines` that it lacks, how many these are, and how many it
    had. A key that is there stays as it is, whatever its role."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    known = {(line.authority, line.key) for line in parse(text)[0]}
    offered = "\n".join(lines)
    rows = offered.split("\n")
    new: list[str] = []
    had = 0
    for line in parse(offered)[0]:
        if (line.authority, line.key) in known:
            had += 1
            continue
        known.add((line.authority, line.key))
        new.append(rows[line.number - 1].strip())
    if new:
        text += "" if text.endswith("\n") or not text else "\n"
        text += "".join(f"{row}\n" for row in [f"# Operators {whence}, as its inviter listed them.", *new])
    return text, len(new), had


def _write(path: Path, data: bytes) -> None:
    try:
        write_private(path, data)
    except OSError as why:
        raise LocalError(f"{path}: {why.strerror}; it needs a disk with room that you can write to") from why


def _addr(pair: tuple[str, int]) -> Addr:
    return pair[0], pair[1]


def _whose() -> str:
    """`user@host`, as ssh-keygen comments its keys."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "operator"
    return f"{user}@{socket.gethostname()}".replace(" ", "-")
