"""Ed25519 keys in OpenSSH form, node ids and names.

A node is its key: the id is the first 8 bytes of the public key, and everything that a node says of itself
is signed with it. The whole 32 bytes are what others pin; the id is only a short name for them.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from discovery.errors import LocalError

NODE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
MESH_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
KIND_NAME = re.compile(r"[a-z0-9-]{1,32}")
KNOWN_KINDS = ("gateway", "broker", "compute", "registry", "console")


def node_id(pub: bytes) -> int:
    """The node id of a 32-byte ed25519 public key: its first 8 bytes, little-endian."""
    return int.from_bytes(pub[:8], "little")


def id_text(node: int) -> str:
    """A node id as people and JSON see it: 16 hex digits."""
    return format(node, "016x")


def default_name(mesh: str, kind: str, node: int) -> str:
    """`<mesh>.<kind>.<first 6 of id>`, for a node that nobody named."""
    return f"{mesh}.{kind}.{id_text(node)[:6]}"


def check_mesh(name: str) -> str:
    """The mesh name itself, or LocalError saying what a mesh name looks like."""
    if not MESH_NAME.fullmatch(name):
        raise LocalError(
            f"mesh {name!r}: not a mesh name; use a-z, 0-9 and '-', at most 64, starting with a letter or digit"
        )
    return name


def check_kind(name: str) -> str:
    """The kind itself, or LocalError."""
    if not KIND_NAME.fullmatch(name):
        raise LocalError(
            f"kind {name!r}: not a kind; use one of {', '.join(KNOWN_KINDS)}, or a-z, 0-9 and '-', at most 32"
        )
    return name


def check_node_name(name: str) -> str:
    """The node name itself, or LocalError."""
    if not NODE_NAME.fullmatch(name):
        raise LocalError(
            f"name {name!r}: not a node name; use a-z, 0-9, '.', '_' and '-', at most 128, starting with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Identity:
    """A private ed25519 key with what follows from it: `pub` (32 bytes) and `id` (64-bit integer)."""

    key: Ed25519PrivateKey
    pub: bytes
    id: int

    @classmethod
    def of(cls, key: Ed25519PrivateKey) -> Identity:
        pub = key.public_key().public_bytes_raw()
        return cls(key, pub, node_id(pub))

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the operating system's randomness."""
        return cls.of(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The key of a 32-byte seed: the same seed gives the same node, for tests and simulations."""
        return cls.of(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_openssh(cls, text: bytes) -> Identity:
        """Reads an unencrypted OpenSSH private key; LocalError when it is none or not ed25519."""
        try:
            key = serialization.load_ssh_private_key(text, None)
        except (ValueError, TypeError) as why:
            raise LocalError(f"not an unencrypted OpenSSH private key: {why}") from why
        if not isinstance(key, Ed25519PrivateKey):
            raise LocalError("not an ed25519 key")
        return cls.of(key)

    def to_openssh(self) -> bytes:
        """The private key as `ssh-keygen` writes it (no passphrase, no comment)."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )

    def pub_openssh(self, comment: str = "") -> str:
        """`ssh-ed25519 AAAA… comment`, one line without its newline."""
        return openssh_line(self.pub) + (f" {comment}" if comment else "")

    def sign(self, data: bytes) -> bytes:
        """The 64-byte ed25519 signature of `data`."""
        return self.key.sign(data)


def openssh_line(pub: bytes) -> str:
    """The OpenSSH text of a raw 32-byte ed25519 public key."""
    key = Ed25519PublicKey.from_public_bytes(pub)
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def openssh_blob(line: str) -> bytes:
    """The key blob of `ssh-ed25519 AAAA… comment` (any algorithm); ValueError when it holds none."""
    return base64.b64decode(line.split()[1], validate=True)


def openssh_pub(line: str) -> bytes | None:
    """The raw 32 bytes of a plain ed25519 key line; None for every other key or text."""
    try:
        return raw_ed25519(openssh_blob(line))
    except (ValueError, IndexError):
        return None


def raw_ed25519(blob: bytes) -> bytes | None:
    """The raw 32 bytes of a plain ed25519 key blob, else None."""
    prefix = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"
    return blob[len(prefix) :] if blob.startswith(prefix) and len(blob) == len(prefix) + 32 else None


def verify(pub: bytes, data: bytes, sig: bytes) -> bool:
    """True when `sig` is the ed25519 signature of `data` by the raw 32-byte key `pub`; never raises."""
    try:
        Ed25519PublicKey.from_public_bytes(pub).verify(sig, data)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
