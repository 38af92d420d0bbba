"""Keys, ids and names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from discovery.errors import LocalError
from discovery.identity import (
    Identity,
    check_kind,
    check_mesh,
    check_node_name,
    default_name,
    id_text,
    node_id,
    openssh_line,
    verify,
)

ONE = Identity.from_seed(bytes(31) + b"\1")
TWO = Identity.from_seed(bytes(31) + b"\2")


def test_a_node_id_is_the_first_eight_bytes_little_endian() -> None:
    pub = bytes(range(1, 33))
    assert id_text(node_id(pub)) == "0807060504030201"


def test_an_id_is_shown_with_all_its_zeros() -> None:
    assert id_text(5) == "0000000000000005"


def test_the_default_name_is_mesh_kind_and_the_beginning_of_the_id() -> None:
    assert default_name("alpha", "gateway", 0x0807060504030201) == "alpha.gateway.080706"


def test_a_key_written_as_openssh_reads_back_as_the_same_node() -> None:
    again = Identity.from_openssh(ONE.to_openssh())
    assert (again.id, again.pub) == (ONE.id, ONE.pub)


def test_a_key_is_one_that_ssh_keygen_reads(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(ONE.to_openssh())
    path.chmod(0o600)
    done = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ONE.pub_openssh().split()


def test_the_public_line_carries_the_comment() -> None:
    assert ONE.pub_openssh("me@here") == openssh_line(ONE.pub) + " me@here"
    assert ONE.pub_openssh() == openssh_line(ONE.pub)


def test_a_signature_holds_for_its_key_and_its_bytes_only() -> None:
    sig = ONE.sign(b"words")
    assert verify(ONE.pub, b"words", sig)
    assert not verify(ONE.pub, b"other words", sig)
    assert not verify(TWO.pub, b"words", sig)


@pytest.mark.parametrize("pub", [b"", bytes(31), bytes(33), b"\xff" * 32])
@pytest.mark.parametrize("sig", [b"", bytes(63), bytes(64), bytes(65)])
def test_nonsense_keys_and_signatures_are_refused_without_an_exception(pub: bytes, sig: bytes) -> None:
    assert not verify(pub, b"words", sig)


@pytest.mark.parametrize("text", [b"", b"garbage", ONE.pub_openssh().encode()])
def test_text_that_is_no_private_key_is_our_users_error(text: bytes) -> None:
    with pytest.raises(LocalError):
        Identity.from_openssh(text)


def test_a_key_of_another_kind_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    with pytest.raises(LocalError, match="not an ed25519 key"):
        Identity.from_openssh(text)


def test_a_key_with_a_passphrase_is_refused() -> None:
    text = ONE.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(LocalError):
        Identity.from_openssh(text)


@pytest.mark.parametrize("name", ["a", "alpha", "a-1", "0", "a" * 64])
def test_a_mesh_name_is_taken_as_it_is(name: str) -> None:
    assert check_mesh(name) == name


@pytest.mark.parametrize("name", ["", "-a", "A", "a.b", "a b", "a" * 65, "a\n", "é", "[/x]", "a\x1b[31m"])
def test_a_bad_mesh_name_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match="not a mesh name"):
        check_mesh(name)


@pytest.mark.parametrize("name", ["gateway", "my-kind", "0", "a" * 32])
def test_a_kind_is_taken_as_it_is(name: str) -> None:
    assert check_kind(name) == name


@pytest.mark.parametrize("name", ["", "a.b", "A", "a" * 33, "a\n"])
def test_a_bad_kind_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match="not a kind"):
        check_kind(name)


@pytest.mark.parametrize("name", ["a", "alpha.gateway.0a1b2c", "a_b-c.d", "a" * 128])
def test_a_node_name_is_taken_as_it_is(name: str) -> None:
    assert check_node_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "A", "a b", "a" * 129, "a\n", "[red]x", "\x1b[31m"])
def test_a_bad_node_name_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match="not a node name"):
        check_node_name(name)
