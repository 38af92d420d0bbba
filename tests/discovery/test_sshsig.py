"""SSHSIG: ours and OpenSSH's signatures verify in both, and nothing else does."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery import sshkey, sshsig
from discovery.errors import Refused
from discovery.identity import Identity

SIGNER = Identity.from_seed(b"o" * 32)
MESSAGE = b'{"v":1,"op":"shutdown"}'
SPACE = "quarterdeck-op"
SIGNED = sshsig.sign(MESSAGE, SIGNER, SPACE)

needs_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen installed")


def refused(message: bytes, armored: str, namespace: str = SPACE) -> Refused:
    with pytest.raises(Refused) as why:
        sshsig.verify(message, armored, namespace)
    return why.value


def parts_of(armored: str) -> list[bytes]:
    """Blob, namespace, reserved, hash and signature."""
    data = base64.b64decode("".join(armored.split("\n")[1:-2]))[10:]
    parts = []
    while data:
        size = int.from_bytes(data[:4], "big")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return parts


def armored(*parts: bytes, head: bytes = b"SSHSIG\0\0\0\1") -> str:
    text = base64.b64encode(head + sshkey.strings(*parts)).decode()
    return f"-----BEGIN SSH SIGNATURE-----\n{text}\n-----END SSH SIGNATURE-----\n"


def test_signature_of_ours_names_its_signer() -> None:
    signer = sshsig.verify(MESSAGE, SIGNED, SPACE)
    assert signer.line == SIGNER.pub_openssh()
    assert signer.blob == signer.key_blob and signer.certificate is None and signer.flags is None
    assert signer.fingerprint == sshkey.fingerprint(signer.blob)


def test_signature_of_another_message_is_bad() -> None:
    assert refused(MESSAGE + b" ", SIGNED).code == "bad_signature"


def test_signature_for_another_namespace_is_told_apart() -> None:
    assert refused(MESSAGE, SIGNED, "file").code == "wrong_namespace"
    blob, _, *rest = parts_of(SIGNED)
    assert refused(MESSAGE, armored(blob, b"file", *rest), "file").code == "bad_signature"


def test_signature_by_another_key_than_it_carries_is_bad() -> None:
    other = parts_of(sshsig.sign(MESSAGE, Identity.from_seed(b"x" * 32), SPACE))
    mine = parts_of(SIGNED)
    assert refused(MESSAGE, armored(other[0], *mine[1:])).code == "bad_signature"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        SIGNED[:-10],
        SIGNED.replace("BEGIN SSH", "BEGIN PGP"),
        armored(*parts_of(SIGNED), head=b"SSHSIG\0\0\0\2"),
        armored(*parts_of(SIGNED), head=b"SSHSIC\0\0\0\1"),
        armored(*parts_of(SIGNED), b"more"),
        armored(*parts_of(SIGNED)[:4]),
        armored(*parts_of(SIGNED)[:3], b"sha1", parts_of(SIGNED)[4]),
        armored(*parts_of(SIGNED)[:4], parts_of(SIGNED)[4] + b"x"),
        "-----BEGIN SSH SIGNATURE-----\n" + "A" * 40_000 + "\n-----END SSH SIGNATURE-----",
        "-----BEGIN SSH SIGNATURE----------END SSH SIGNATURE-----",
        "-----BEGIN SSH SIGNATURE-----\n¡¢£\n-----END SSH SIGNATURE-----",
    ],
)
def test_signature_that_is_malformed_is_bad(text: str) -> None:
    assert refused(MESSAGE, text).code == "bad_signature"


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_signature_with_any_byte_changed_never_verifies_as_anybody(at: int, change: int) -> None:
    data = bytearray(base64.b64decode("".join(SIGNED.split("\n")[1:-2])))
    data[at % len(data)] ^= change
    text = base64.b64encode(data).decode()
    why = refused(MESSAGE, f"-----BEGIN SSH SIGNATURE-----\n{text}\n-----END SSH SIGNATURE-----\n")
    assert why.code in ("bad_signature", "wrong_namespace")


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_signature_of_random_bytes_is_refused_by_name(data: bytes) -> None:
    assert refused(MESSAGE, armored(data, head=b"SSHSIG\0\0\0\1")).code == "bad_signature"
    assert refused(MESSAGE, armored(*parts_of(SIGNED)[:4], data)).code == "bad_signature"
    assert refused(MESSAGE, armored(data, *parts_of(SIGNED)[1:])).code == "bad_signature"


def test_sign_without_a_namespace_is_an_error() -> None:
    with pytest.raises(ValueError, match="namespace"):
        sshsig.sign(MESSAGE, SIGNER, "")


# --- hardware keys, whose signatures say what their user did


def hardware_signature(flags: int, application: bytes = b"ssh:") -> str:
    key = Ed25519PrivateKey.from_private_bytes(b"h" * 32)
    name = b"sk-ssh-ed25519@openssh.com"
    blob = sshkey.strings(name, key.public_key().public_bytes_raw(), application)
    tail = bytes([flags]) + (7).to_bytes(4, "big")
    signed = hashlib.sha256(application).digest() + tail
    signed += hashlib.sha256(sshsig.to_sign(MESSAGE, SPACE)).digest()
    return sshsig.armor(blob, SPACE, sshkey.strings(name, key.sign(signed)) + tail)


@pytest.mark.parametrize("flags", [0, sshkey.TOUCHED, sshkey.TOUCHED | sshkey.VERIFIED])
def test_hardware_ed25519_key_tells_touch_and_verification(flags: int) -> None:
    signer = sshsig.verify(MESSAGE, hardware_signature(flags), SPACE)
    assert signer.flags == flags
    assert signer.line.startswith("sk-ssh-ed25519@openssh.com ")


def test_hardware_key_whose_flags_were_changed_is_bad() -> None:
    parts = parts_of(hardware_signature(0))
    forged = parts[4][:-5] + b"\x05" + parts[4][-4:]
    assert refused(MESSAGE, armored(*parts[:4], forged)).code == "bad_signature"


def test_hardware_ecdsa_key_verifies() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    name = b"sk-ecdsa-sha2-nistp256@openssh.com"
    tail = b"\x01" + (9).to_bytes(4, "big")
    signed = hashlib.sha256(b"ssh:").digest() + tail
    signed += hashlib.sha256(sshsig.to_sign(MESSAGE, SPACE)).digest()
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA256())))
    pair = sshkey.strings(*(n.to_bytes(33, "big") for n in (r, s)))
    text = sshsig.armor(
        sshkey.strings(name, b"nistp256", point, b"ssh:"), SPACE, sshkey.strings(name, pair) + tail
    )
    assert sshsig.verify(MESSAGE, text, SPACE).flags == sshkey.TOUCHED


def rsa_signature(bits: int, algorithm: bytes, digest: hashes.HashAlgorithm) -> str:
    key = rsa.generate_private_key(65537, bits)
    numbers = key.public_key().public_numbers()
    size = bits // 8 + 1
    blob = sshkey.strings(b"ssh-rsa", b"\x01\x00\x01", numbers.n.to_bytes(size, "big"))
    raw = key.sign(sshsig.to_sign(MESSAGE, SPACE), padding.PKCS1v15(), digest)
    return sshsig.armor(blob, SPACE, sshkey.strings(algorithm, raw))


def test_rsa_signature_by_sha1_or_with_a_short_key_is_bad() -> None:
    assert sshsig.verify(MESSAGE, rsa_signature(2048, b"rsa-sha2-512", hashes.SHA512()), SPACE)
    assert refused(MESSAGE, rsa_signature(2048, b"ssh-rsa", hashes.SHA1())).code == "bad_signature"
    short = refused(MESSAGE, rsa_signature(1024, b"rsa-sha2-256", hashes.SHA256()))
    assert short.code == "bad_signature" and "bits" in short.sentence


# --- OpenSSH itself


def keygen(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ssh-keygen", *args], input=stdin, capture_output=True, timeout=20)


@needs_keygen
def test_openssh_accepts_our_signature(tmp_path: Path) -> None:
    (tmp_path / "signers").write_text(f"alice {SIGNER.pub_openssh()}\n")
    (tmp_path / "sig").write_text(SIGNED)
    check = ["-Y", "verify", "-f", str(tmp_path / "signers"), "-I", "alice", "-n", SPACE]
    ours = keygen(*check, "-s", str(tmp_path / "sig"), stdin=MESSAGE)
    assert ours.returncode == 0, ours.stderr
    assert keygen(*check, "-s", str(tmp_path / "sig"), stdin=MESSAGE + b"x").returncode != 0


@needs_keygen
@pytest.mark.parametrize(
    "kind", [("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521"), ("rsa", "3072")]
)
@pytest.mark.parametrize("digest", ["sha512", "sha256"])
def test_openssh_signature_of_every_kind_of_key_verifies(
    kind: tuple[str, str], digest: str, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    assert keygen("-q", "-t", kind[0], "-b", kind[1], "-N", "", "-f", str(key)).returncode == 0
    options = ["-Y", "sign", "-f", str(key), "-n", SPACE, "-O", f"hashalg={digest}"]
    made = keygen(*options, stdin=MESSAGE)
    assert made.returncode == 0, made.stderr
    signer = sshsig.verify(MESSAGE, made.stdout.decode(), SPACE)
    assert signer.line == " ".join((tmp_path / "key.pub").read_text().split()[:2])
    assert signer.fingerprint == keygen("-l", "-f", str(key)).stdout.decode().split()[1]
    assert refused(b"other", made.stdout.decode()).code == "bad_signature"


@needs_keygen
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_openssh_signature_with_a_certificate_shows_key_and_certificate(kind: str, tmp_path: Path) -> None:
    key, ca = tmp_path / "key", tmp_path / "ca"
    for name, made_of in ((key, kind), (ca, "ed25519")):
        assert keygen("-q", "-t", made_of, "-N", "", "-f", str(name)).returncode == 0
    assert keygen("-q", "-s", str(ca), "-I", "alice", "-n", "op", str(key) + ".pub").returncode == 0
    certificate = tmp_path / "key-cert.pub"
    agentless = tmp_path / "key-cert"
    agentless.write_bytes(key.read_bytes())
    agentless.chmod(0o600)
    made = keygen("-Y", "sign", "-f", str(agentless), "-n", SPACE, stdin=MESSAGE)
    if made.returncode != 0:
        pytest.skip("this ssh-keygen signs with a certificate only through an agent")
    plain = base64.b64decode((tmp_path / "key.pub").read_text().split()[1])
    signer = sshsig.verify(MESSAGE, made.stdout.decode(), SPACE)
    assert signer.key_blob == plain and signer.fingerprint == sshkey.fingerprint(plain)
    assert signer.certificate in (None, base64.b64decode(certificate.read_text().split()[1]))


@needs_keygen
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_signature_that_carries_a_certificate_exposes_both(kind: str, tmp_path: Path) -> None:
    key, ca = tmp_path / "key", tmp_path / "ca"
    for name, made_of in ((key, kind), (ca, "ed25519")):
        assert keygen("-q", "-t", made_of, "-N", "", "-f", str(name)).returncode == 0
    assert keygen("-q", "-s", str(ca), "-I", "alice", "-n", "op", str(key) + ".pub").returncode == 0
    certificate = base64.b64decode((tmp_path / "key-cert.pub").read_text().split()[1])
    plain = base64.b64decode((tmp_path / "key.pub").read_text().split()[1])
    made = keygen("-Y", "sign", "-f", str(key), "-n", SPACE, stdin=MESSAGE).stdout.decode()
    parts = parts_of(made)
    parts[0] = certificate  # the key is not part of what is signed: the signature holds for both
    signer = sshsig.verify(MESSAGE, armored(*parts), SPACE)
    assert (signer.blob, signer.certificate, signer.key_blob) == (certificate, certificate, plain)
    assert "-cert-v01@openssh.com " in signer.line
    assert signer.fingerprint == sshkey.fingerprint(plain)
