"""Founding a mesh in a home: the keys and the first operator, made once and never made anew.

Everything here is idempotent: what is there is read and checked, what is missing is made. A home that holds a
mesh's keys may run its nodes; nothing is registered anywhere else.
"""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass
from pathlib import Path

from agent.home import Home, make_identity, make_secret, write_private
from discovery.identity import Identity, check_mesh, openssh_line
from discovery.sshkey import pub_fingerprint


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
    secret(home.mesh_key_file(mesh))
    identity(home.mesh_identity_file(mesh), f"mesh {mesh}")
    identity(home.client_key_file, "quarterdeck client of this home")
    operator = identity(home.operator_key_file, _whose())
    if admit_operator(home, openssh_line(operator.pub), "admin", _whose()):
        made.append(home.operators_file)
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


def _whose() -> str:
    """`user@host`, as ssh-keygen comments its keys."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "operator"
    return f"{user}@{socket.gethostname()}".replace(" ", "-")
