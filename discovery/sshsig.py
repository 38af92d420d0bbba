"""Detached signatures in OpenSSH's SSHSIG format: what `ssh-keygen -Y sign` makes and `-Y verify` checks.

A signature is over the namespace and the hash of the message, so one made for another purpose never counts
here. It carries the signer's public key, or its certificate; *who that is* is the caller's to judge. Formats:
OpenSSH PROTOCOL.sshsig, PROTOCOL.u2f (hardware keys) and PROTOCOL.certkeys. SHA-1 is refused everywhere.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Protocol

from discovery.errors import Refused, RemoteError
from discovery.sshkey import CERT_SUFFIX, PublicKey, Reader, strings

MAGIC = b"SSHSIG"
VERSION = 1
MAX_ARMORED_CHARS = 32_768

_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_LINE_CHARS = 70
_HASHES = {"sha512": hashlib.sha512, "sha256": hashlib.sha256}


class Ed25519Signer(Protocol):
    """Whoever holds an ed25519 key: an `Identity`, for one."""

    @property
    def pub(self) -> bytes: ...
    def sign(self, data: bytes) -> bytes: ...


@dataclass(frozen=True)
class SignerKey:
    """Whose signature held."""

    line: str
    """The key or certificate as the signature carries it, in OpenSSH form without a comment."""
    blob: bytes
    """The same in bytes."""
    key_blob: bytes
    """The plain public key: `blob` itself, or the certified key of a certificate."""
    fingerprint: str
    """`SHA256:…` of the plain key, as `ssh-keygen -l` prints it."""
    flags: int | None
    """What a hardware key says of its user (TOUCHED, VERIFIED); None for any other key."""

    @property
    def certificate(self) -> bytes | None:
        """The certificate, if the signature carries one. Nothing in it has been checked."""
        return self.blob if self.blob != self.key_blob else None


def to_sign(message: bytes, namespace: str) -> bytes:
    """The bytes that a key has to sign (an ssh-agent's too): they stand for the message in this namespace."""
    digest = hashlib.sha512(message).digest()
    return MAGIC + strings(namespace.encode(), b"", b"sha512", digest)


def armor(blob: bytes, namespace: str, signature: bytes) -> str:
    """The armored text. `blob`: the signer's public key or certificate; `signature`: the SSH signature blob
    of `to_sign(…)`, as an ssh-agent gives it: algorithm and signature, each a string."""
    data = MAGIC + VERSION.to_bytes(4, "big") + strings(blob, namespace.encode(), b"", b"sha512", signature)
    text = base64.b64encode(data).decode()
    lines = [text[i : i + _LINE_CHARS] for i in range(0, len(text), _LINE_CHARS)]
    return "\n".join([_BEGIN, *lines, _END, ""])


def sign(message: bytes, signer: Ed25519Signer, namespace: str) -> str:
    """The armored signature of a message by an ed25519 key."""
    if not namespace:
        raise ValueError("a signature needs a namespace")
    blob = strings(b"ssh-ed25519", signer.pub)
    return armor(blob, namespace, strings(b"ssh-ed25519", signer.sign(to_sign(message, namespace))))


def verify(message: bytes, armored: str, namespace: str) -> SignerKey:
    """Whose signature of `message` this is. Refused `wrong_namespace`: made for something else;
    `bad_signature`: anything else that doesn't hold, or can't be read, or isn't accepted."""
    try:
        return _verify(message, armored, namespace)
    except RemoteError as why:
        raise Refused("bad_signature", f"the signature is not valid: {why}") from why


def _verify(message: bytes, armored: str, namespace: str) -> SignerKey:
    reader = Reader(_dearmor(armored))
    if reader.take(len(MAGIC)) != MAGIC:
        raise RemoteError("it is no SSH signature")
    if (version := reader.number()) != VERSION:
        raise RemoteError(f"it is of version {version}, not {VERSION}")
    blob, made_for, reserved, hash_name, signature = (
        reader.string(),
        reader.string(),
        reader.string(),
        reader.string(),
        reader.string(),
    )
    reader.end()
    if made_for != namespace.encode():
        raise Refused(
            "wrong_namespace", f"the signature was made for {ascii(made_for)[2:66]}, not {namespace}"
        )
    digest = _HASHES.get(hash_name.decode(errors="replace"))
    if digest is None:
        raise RemoteError("its hash is neither sha512 nor sha256")
    name = Reader(blob).text()
    key = PublicKey.certified(blob) if name.endswith(CERT_SUFFIX) else PublicKey.parse(blob)
    flags = key.verify(signature, MAGIC + strings(made_for, reserved, hash_name, digest(message).digest()))
    line = f"{name} {base64.b64encode(blob).decode()}"
    return SignerKey(line, blob, key.blob, key.fingerprint, flags)


def _dearmor(armored: str) -> bytes:
    if len(armored) > MAX_ARMORED_CHARS:
        raise RemoteError(f"it has {len(armored)} characters; {MAX_ARMORED_CHARS} are read")
    text = armored.strip()
    if not text.startswith(_BEGIN) or not text.endswith(_END):
        raise RemoteError("it is not armored as an SSH signature")
    try:
        return base64.b64decode("".join(text[len(_BEGIN) : -len(_END)].split()), validate=True)
    except (binascii.Error, ValueError) as why:
        raise RemoteError("its armor is not base64") from why
