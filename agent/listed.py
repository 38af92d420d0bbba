"""Which other meshes may look into this one: those of this home, and those that `authorized_meshes` lists.

    environment="QD_ROLE=observe" ssh-ed25519 AAAA… beta

A mesh logs in with its identity key. What its nodes may see is the role's; an op is judged by its own signature,
whoever carries it. A mesh that isn't listed learns of this one what its summary says, and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, cast

from agent.home import Home
from agent.operators import Operators
from discovery.identity import openssh_pub

LOOK_EVERY_S = 1.0
LOOK_AGAIN_S = 0.1
"""For a key that isn't known: its mesh may have been founded just now."""
Role = Literal["observe", "operate", "admin"]


class ListedMeshes:
    """Judges the identity keys of meshes."""

    def __init__(self, home: Home, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self._file = Operators(home.config / "authorized_meshes")
        self._monotonic = monotonic
        self._looked_at = -LOOK_EVERY_S
        self._of_home: dict[bytes, str] = {}

    def role_of(self, key_line: str, pub: bytes, peer: str, now_ms: int) -> Role | None:
        """What the mesh with this key may do here; None for one that isn't listed."""
        if pub in self.of_home() or pub in self.of_home(LOOK_AGAIN_S):
            return "observe"
        listed = self._file.lookup(key_line, peer, now_ms)
        return None if listed is None else cast("Role", listed.role)

    def of_home(self, age_s: float = LOOK_EVERY_S) -> dict[bytes, str]:
        """Identity key → name of the meshes whose keys this home holds, as of `age_s` ago at most."""
        now = self._monotonic()
        if now - self._looked_at >= age_s:
            self._looked_at = now
            self._of_home = {}
            for mesh in self._home.meshes():
                path = self._home.mesh_identity_file(mesh)
                try:
                    line = path.with_name(path.name + ".pub").read_text(encoding="ascii")
                except (OSError, UnicodeDecodeError):
                    continue
                if pub := openssh_pub(line.strip()):
                    self._of_home[pub] = mesh
        return self._of_home

    @property
    def problems(self) -> list[str]:
        """What is wrong with the file, for `qd doctor`; a file that isn't there is right."""
        missing = not self._file.path.exists()
        return [] if missing else [str(p) for p in self._file.problems]
