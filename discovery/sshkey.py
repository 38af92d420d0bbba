"""SSH public keys and OpenSSH user certificates, read strictly and byte by byte.

What a library leaves to its caller decides who may stop a machine, so it is all here: every field of the
certificate is read, its CA's signature is checked with an algorithm that fits the CA's key, and what isn't
known is refused. Formats: OpenSSH PROTOCOL, PROTOCOL.certkeys and PROTOCOL.u2f.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from discovery.errors import RemoteError

RSA_MIN_BITS = 2048
CERT_SUFFIX = "-cert-v01@openssh.com"
USER_CERT = 1
TOUCHED = 0x01
"""Flag of a hardware key's signature: somebody touched it."""
VERIFIED = 0x04
"""Flag of a hardware key's signature: it knew who, by PIN or finger."""

_CURVES: dict[str, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
    "nistp256": (ec.SECP256R1(), hashes.SHA256()),
    "nistp384": (ec.SECP384R1(), hashes.SHA384()),
    "nistp521": (ec.SECP521R1(), hashes.SHA512()),
}
_RSA_HASHES: dict[str, hashes.HashAlgorithm] = {
    "rsa-sha2-256": hashes.SHA256(),
    "rsa-sha2-512": hashes.SHA512(),
}
_FIELDS = {
    "ssh-ed25519": 1,
    "sk-ssh-ed25519@openssh.com": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
    "ssh-rsa": 2,
}
"""Strings that make up a key of each type, after its name."""

KEY_TYPES = frozenset(_FIELDS)
CERT_TYPES = frozenset(name.removesuffix("@openssh.com") + CERT_SUFFIX for name in _FIELDS)


class Reader:
    """Reads SSH's strings and numbers, and nothing past the end; RemoteError where the data is of another shape."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise RemoteError("SSH data ends early")
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
            raise RemoteError("SSH data with a text that is not UTF-8") from why

    @property
    def position(self) -> int:
        return self._at

    def more(self) -> bool:
        return self._at < len(self._data)

    def end(self) -> None:
        if self.more():
            raise RemoteError("SSH data goes on after its end")


def strings(*parts: bytes) -> bytes:
    """SSH strings, one after the other."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@dataclass(frozen=True)
class PublicKey:
    """A plain public key: its type, and the strings that make it up."""

    type: str
    parts: tuple[bytes, ...]

    @classmethod
    def parse(cls, blob: bytes) -> PublicKey:
        """RemoteError when these aren't the bytes of a key that can verify something."""
        reader = Reader(blob)
        kind = reader.text()
        if kind not in _FIELDS:
            raise RemoteError(f"key type {ascii(kind)[:64]} is not supported")
        key = cls._read(reader, kind)
        reader.end()
        key._load()
        return key

    @classmethod
    def certified(cls, blob: bytes) -> PublicKey:
        """The key that a certificate is about; nothing else in the certificate is read. RemoteError as `parse`."""
        key = cls._certified(Reader(blob))
        key._load()
        return key

    @classmethod
    def _certified(cls, reader: Reader) -> PublicKey:
        name = reader.text()
        if name not in CERT_TYPES:
            raise RemoteError(f"certificate type {ascii(name)[:64]} is not supported")
        plain = name.removesuffix(CERT_SUFFIX)
        reader.string()
        return cls._read(reader, f"{plain}@openssh.com" if plain.startswith("sk-") else plain)

    @classmethod
    def _read(cls, reader: Reader, kind: str) -> PublicKey:
        return cls(kind, tuple(reader.string() for _ in range(_FIELDS[kind])))

    @property
    def blob(self) -> bytes:
        return strings(self.type.encode(), *self.parts)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.blob)

    @property
    def hardware(self) -> bool:
        """A FIDO key: its signatures say whether somebody touched it and whether it asked who."""
        return self.type.startswith("sk-")

    def _load(self) -> Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
        try:
            if self.type.endswith("ssh-ed25519") or self.type == "sk-ssh-ed25519@openssh.com":
                return Ed25519PublicKey.from_public_bytes(self.parts[0])
            if self.type == "ssh-rsa":
                e, n = (int.from_bytes(part, "big") for part in self.parts)
                if n.bit_length() < RSA_MIN_BITS:
                    raise RemoteError(f"an RSA key of {n.bit_length()} bits; {RSA_MIN_BITS} are the least")
                return rsa.RSAPublicNumbers(e, n).public_key()
            name = self.parts[0].decode()
            if f"ecdsa-sha2-{name}" != self.type.removeprefix("sk-").removesuffix("@openssh.com"):
                raise RemoteError("an ECDSA key whose curve is not that of its type")
            return ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[name][0], self.parts[1])
        except (ValueError, KeyError, UnsupportedAlgorithm) as why:
            raise RemoteError(f"a broken {self.type} key") from why

    def verify(self, signature: bytes, data: bytes) -> int | None:
        """Checks an SSH signature blob; the flags that a hardware key signed, else None. Or RemoteError."""
        reader = Reader(signature)
        algorithm, raw = reader.text(), reader.string()
        flags = None
        if self.hardware:
            flags, counter = reader.number(1), reader.take(4)
            application = hashlib.sha256(self.parts[-1]).digest()
            data = application + bytes([flags]) + counter + hashlib.sha256(data).digest()
        reader.end()
        key = self._load()
        try:
            if isinstance(key, rsa.RSAPublicKey):
                if algorithm not in _RSA_HASHES:
                    raise RemoteError(f"signed with {ascii(algorithm)[:32]}, which is not accepted")
                key.verify(raw, data, padding.PKCS1v15(), _RSA_HASHES[algorithm])
            elif algorithm != self.type:
                raise RemoteError("signed with an algorithm that doesn't fit the key")
            elif isinstance(key, Ed25519PublicKey):
                key.verify(raw, data)
            else:
                pair = Reader(raw)
                r, s = (int.from_bytes(pair.string(), "big") for _ in range(2))
                pair.end()
                key.verify(encode_dss_signature(r, s), data, ec.ECDSA(_CURVES[self.parts[0].decode()][1]))
        except (InvalidSignature, ValueError) as why:
            raise RemoteError("the signature doesn't fit") from why
        return flags


@dataclass(frozen=True)
class Certificate:
    """An OpenSSH certificate as it stands in its bytes; whether it holds is the caller's to judge."""

    key: PublicKey
    serial: int
    kind: int
    key_id: str
    principals: tuple[str, ...]
    valid_after_s: int
    valid_before_s: int
    critical: dict[str, str]
    """Critical options; a flag has an empty value."""
    extensions: frozenset[str]
    ca: PublicKey
    signed: bytes
    signature: bytes

    @classmethod
    def parse(cls, blob: bytes) -> Certificate:
        """RemoteError when these aren't the bytes of a certificate. The signature is not checked yet."""
        reader = Reader(blob)
        key = PublicKey._certified(reader)
        key._load()
        serial, usage, key_id = reader.number(8), reader.number(4), reader.text()
        principals = _texts(reader.string())
        after, before = reader.number(8), reader.number(8)
        critical = _options(reader.string())
        extensions = frozenset(_options(reader.string()))
        reader.string()
        ca = PublicKey.parse(reader.string())
        signed = blob[: reader.position]
        signature = reader.string()
        reader.end()
        return cls(
            key, serial, usage, key_id, principals, after, before, critical, extensions, ca, signed, signature
        )

    def check_signature(self) -> None:
        """RemoteError unless the CA named in it signed it."""
        self.ca.verify(self.signature, self.signed)


def _texts(data: bytes) -> tuple[str, ...]:
    reader, found = Reader(data), []
    while reader.more():
        found.append(reader.text())
    return tuple(found)


def _options(data: bytes) -> dict[str, str]:
    reader, found = Reader(data), {}
    while reader.more():
        name, value = reader.text(), reader.string()
        if name in found:
            raise RemoteError("a certificate option is there twice")
        inner = Reader(value)
        found[name] = inner.text() if value else ""
        if value:
            inner.end()
    return found


def fingerprint(blob: bytes) -> str:
    """`SHA256:…` of a key blob, as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def pub_fingerprint(pub: bytes) -> str:
    """The same of a raw 32-byte ed25519 public key."""
    return fingerprint(strings(b"ssh-ed25519", pub))


def blob_of(line: str) -> bytes:
    """The blob of `type base64 [comment]`; RemoteError when it isn't base64 or of another type."""
    words = line.split(None, 2)
    if len(words) < 2:
        raise RemoteError("no key here")
    try:
        blob = base64.b64decode(words[1], validate=True)
    except (binascii.Error, ValueError) as why:
        raise RemoteError("a key that is not base64") from why
    if Reader(blob).text() != words[0]:
        raise RemoteError("a key of another type than its line says")
    return blob
