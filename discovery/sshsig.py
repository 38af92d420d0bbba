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

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from discovery.errors import Refused

MAGIC = b"SSHSIG"
VERSION = 1
MAX_ARMORED_CHARS = 32_768
RSA_MIN_BITS = 2048
TOUCHED = 0x01
"""Flag of a hardware key's signature: somebody touched it."""
VERIFIED = 0x04
"""Flag of a hardware key's signature: it knew who, by PIN or finger."""

_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_LINE_CHARS = 70
_CERT = "-cert-v01@openssh.com"
_HASHES = {"sha512": hashlib.sha512, "sha256": hashlib.sha256}
_RSA_HASHES: dict[str, hashes.HashAlgorithm] = {
    "rsa-sha2-512": hashes.SHA512(),
    "rsa-sha2-256": hashes.SHA256(),
}
_CURVES: dict[str, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
    "nistp256": (ec.SECP256R1(), hashes.SHA256()),
    "nistp384": (ec.SECP384R1(), hashes.SHA384()),
    "nistp521": (ec.SECP521R1(), hashes.SHA512()),
}
_PARTS = {
    "ssh-ed25519": 1,
    "sk-ssh-ed25519@openssh.com": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
    "ssh-rsa": 2,
}
"""Strings that make up a public key of each type, after its name."""


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


def fingerprint(blob: bytes) -> str:
    """`SHA256:…` of a key blob, as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def to_sign(message: bytes, namespace: str) -> bytes:
    """The bytes that a key has to sign (an ssh-agent's too): they stand for the message in this namespace."""
    digest = hashlib.sha512(message).digest()
    return MAGIC + _strings(namespace.encode(), b"", b"sha512", digest)


def armor(blob: bytes, namespace: str, signature: bytes) -> str:
    """The armored text. `blob`: the signer's public key or certificate; `signature`: the SSH signature blob
    of `to_sign(…)`, as an ssh-agent gives it: algorithm and signature, each a string."""
    data = MAGIC + VERSION.to_bytes(4, "big") + _strings(blob, namespace.encode(), b"", b"sha512", signature)
    text = base64.b64encode(data).decode()
    lines = [text[i : i + _LINE_CHARS] for i in range(0, len(text), _LINE_CHARS)]
    return "\n".join([_BEGIN, *lines, _END, ""])


def sign(message: bytes, signer: Ed25519Signer, namespace: str) -> str:
    """The armored signature of a message by an ed25519 key."""
    if not namespace:
        raise ValueError("a signature needs a namespace")
    blob = _strings(b"ssh-ed25519", signer.pub)
    return armor(blob, namespace, _strings(b"ssh-ed25519", signer.sign(to_sign(message, namespace))))


def verify(message: bytes, armored: str, namespace: str) -> SignerKey:
    """Whose signature of `message` this is. Refused `wrong_namespace`: made for something else;
    `bad_signature`: anything else that doesn't hold, or can't be read, or isn't accepted."""
    try:
        return _verify(message, armored, namespace)
    except _BadSignatureError as why:
        raise Refused("bad_signature", f"the signature is not valid: {why}") from why


class _BadSignatureError(Exception):
    """Why a signature doesn't hold, for people."""


class _Reader:
    """Reads SSH's strings and numbers, and nothing past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise _BadSignatureError("it ends early")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int = 4) -> int:
        return int.from_bytes(self.take(size), "big")

    def string(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        try:
            return self.string().decode()
        except UnicodeDecodeError as why:
            raise _BadSignatureError("a name in it is not text") from why

    def end(self) -> None:
        if self._at != len(self._data):
            raise _BadSignatureError("it goes on after its end")


def _strings(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _verify(message: bytes, armored: str, namespace: str) -> SignerKey:
    reader = _Reader(_dearmor(armored))
    if reader.take(len(MAGIC)) != MAGIC:
        raise _BadSignatureError("it is no SSH signature")
    if (version := reader.number()) != VERSION:
        raise _BadSignatureError(f"it is of version {version}, not {VERSION}")
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
        raise _BadSignatureError("its hash is neither sha512 nor sha256")
    name, parts = _key(blob)
    signed = MAGIC + _strings(made_for, reserved, hash_name, digest(message).digest())
    flags = _check(name, parts, signature, signed)
    key_blob = _strings(name.encode(), *parts)
    shown = _Reader(blob).text()
    return SignerKey(
        f"{shown} {base64.b64encode(blob).decode()}", blob, key_blob, fingerprint(key_blob), flags
    )


def _dearmor(armored: str) -> bytes:
    if len(armored) > MAX_ARMORED_CHARS:
        raise _BadSignatureError(f"it has {len(armored)} characters; {MAX_ARMORED_CHARS} are read")
    text = armored.strip()
    if not text.startswith(_BEGIN) or not text.endswith(_END):
        raise _BadSignatureError("it is not armored as an SSH signature")
    try:
        return base64.b64decode("".join(text[len(_BEGIN) : -len(_END)].split()), validate=True)
    except (binascii.Error, ValueError) as why:
        raise _BadSignatureError("its armor is not base64") from why


def _key(blob: bytes) -> tuple[str, list[bytes]]:
    """Type and parts of a plain key, or of the certified key of a certificate."""
    reader = _Reader(blob)
    name = reader.text()
    certificate = name.endswith(_CERT)
    if certificate:
        name = name.removesuffix(_CERT)
        name += "@openssh.com" if name.startswith("sk-") else ""
        reader.string()
    if name not in _PARTS:
        raise _BadSignatureError(f"keys of type {ascii(name)[:64]} are not accepted")
    parts = [reader.string() for _ in range(_PARTS[name])]
    if not certificate:
        reader.end()
    return name, parts


def _load(name: str, parts: list[bytes]) -> Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    try:
        if "ed25519" in name:
            return Ed25519PublicKey.from_public_bytes(parts[0])
        if name == "ssh-rsa":
            e, n = (int.from_bytes(part, "big") for part in parts)
            if n.bit_length() < RSA_MIN_BITS:
                raise _BadSignatureError(f"RSA keys need {RSA_MIN_BITS} bits; this has {n.bit_length()}")
            return rsa.RSAPublicNumbers(e, n).public_key()
        curve = parts[0].decode()
        if f"ecdsa-sha2-{curve}" != name.removeprefix("sk-").removesuffix("@openssh.com"):
            raise _BadSignatureError("its key is on another curve than its type says")
        return ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[curve][0], parts[1])
    except (ValueError, KeyError, UnsupportedAlgorithm) as why:
        raise _BadSignatureError("its key is broken") from why


def _check(name: str, parts: list[bytes], signature: bytes, signed: bytes) -> int | None:
    """Checks a signature blob; a hardware key's flags, else None."""
    reader = _Reader(signature)
    algorithm, raw = reader.text(), reader.string()
    flags = None
    if name.startswith("sk-"):
        flags, counter = reader.number(1), reader.take(4)
        application = hashlib.sha256(parts[-1]).digest()
        signed = application + bytes([flags]) + counter + hashlib.sha256(signed).digest()
    reader.end()
    key = _load(name, parts)
    try:
        if isinstance(key, rsa.RSAPublicKey):
            if algorithm not in _RSA_HASHES:
                raise _BadSignatureError(f"signatures by {ascii(algorithm)[:32]} are not accepted")
            key.verify(raw, signed, padding.PKCS1v15(), _RSA_HASHES[algorithm])
        elif algorithm != name:
            raise _BadSignatureError("its algorithm doesn't fit its key")
        elif isinstance(key, Ed25519PublicKey):
            key.verify(raw, signed)
        else:
            pair = _Reader(raw)
            r, s = (int.from_bytes(pair.string(), "big") for _ in range(2))
            pair.end()
            key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(_CURVES[parts[0].decode()][1]))
    except (InvalidSignature, ValueError) as why:
        raise _BadSignatureError("the key did not sign this message") from why
    return flags
