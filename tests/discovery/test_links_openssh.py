"""Links and what OpenSSH brings: its client, its agent, its certificates, its hardware keys, its files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discovery import sshkey, sshsig
from discovery.errors import Refused
from discovery.links import Login, agent_keys, dial, sign_with
from discovery.member import Addr
from tests.discovery.loopback import (
    CLIENT,
    SERVER,
    STRANGER,
    admit_client,
    dial_as_client,
    listening,
    until,
)

# --- OpenSSH's own client


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(CLIENT.to_openssh())
    path.chmod(0o600)
    return path


def ssh(port: int, key: Path, *args: str) -> list[str]:
    options = {
        "IdentityFile": key,
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "BatchMode": "yes",
        "ConnectTimeout": 5,
        "LogLevel": "ERROR",
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", "-F", "none", "-p", str(port), *flags, *args, "member@127.0.0.1"]


async def run_program(*command: str, timeout_s: float = 10) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        out, _ = await asyncio.wait_for(child.communicate(), timeout_s)
    except TimeoutError:
        child.kill()
        await child.wait()
        raise
    return child.returncode or 0, out.decode()


needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client installed")
needs_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen installed")


@needs_ssh
@pytest.mark.parametrize("what", ["shell", "terminal", "command", "sftp", "stdio_forward"])
def test_openssh_client_with_a_good_key_gets_nothing_but_a_refusal(what: str, key_file: Path) -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            command = {
                "shell": ssh(addr[1], key_file, "-T"),
                "terminal": ssh(addr[1], key_file, "-tt"),
                "command": [*ssh(addr[1], key_file), "id"],
                "sftp": [*ssh(addr[1], key_file, "-s"), "sftp"],
                "stdio_forward": ssh(addr[1], key_file, "-W", f"127.0.0.1:{addr[1]}"),
            }[what]
            status, text = await run_program(*command)
            assert status == 255
            assert "Traceback" not in text and "uid=" not in text
            assert listener.counters["refused_request"] >= 1 and not listener.links
            link = await dial_as_client(addr)
            assert await link.call("echo", 1) == 1
            await link.close()

    asyncio.run(run())


@needs_ssh
def test_openssh_client_forwards_no_port_through_us(key_file: Path) -> None:
    async def run() -> None:
        async with listening() as (listener, addr):
            status, text = await run_program(
                *ssh(addr[1], key_file, "-N", "-R", "0:127.0.0.1:1", "-o", "ExitOnForwardFailure=yes")
            )
            assert status == 255 and "forward" in text
            assert listener.counters["refused_request"] == 1

    asyncio.run(run())


@needs_ssh
def test_openssh_client_without_a_key_of_ours_is_denied(key_file: Path) -> None:
    key_file.write_bytes(STRANGER.to_openssh())

    async def run() -> None:
        async with listening() as (listener, addr):
            status, text = await run_program(*ssh(addr[1], key_file))
            assert status == 255 and "Permission denied (publickey)" in text
            await until(lambda: listener.counters["login"] == 1)

    asyncio.run(run())


# --- ssh-agent and certificates


@pytest.fixture
def agent(tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if shutil.which("ssh-agent") is None or shutil.which("ssh-add") is None:
        pytest.skip("no ssh-agent installed")
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 5
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    subprocess.run(["ssh-add", "-q", str(key_file)], check=True, capture_output=True)
    yield path
    process.kill()
    process.wait()


def test_dial_with_a_key_of_the_ssh_agent_logs_in(agent: Path) -> None:
    async def run() -> None:
        keys = await agent_keys()
        assert len(keys) == 1
        async with listening() as (listener, addr):
            link = await dial_as_client(addr, identity=keys)
            assert await link.call("echo", 1) == 1
            assert next(iter(listener.links)).login.pub == CLIENT.pub
            await link.close()

    asyncio.run(run())


def test_key_of_the_ssh_agent_signs_what_verifies(agent: Path) -> None:
    async def run() -> str:
        (key,) = await agent_keys()
        return await sign_with(key, b"message", "quarterdeck-op")

    signer = sshsig.verify(b"message", asyncio.run(run()), "quarterdeck-op")
    assert signer.line == CLIENT.pub_openssh()


def test_key_that_the_ssh_agent_lost_is_refused(agent: Path) -> None:
    async def run() -> None:
        (key,) = await agent_keys()
        assert (await run_program("ssh-add", "-q", "-D"))[0] == 0
        with pytest.raises(Refused) as why:
            await sign_with(key, b"message", "quarterdeck-op")
        assert why.value.code == "signing"

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"])
def test_key_of_a_file_signs_what_verifies(kind: str) -> None:
    key = asyncssh.generate_private_key(kind)
    (pair,) = asyncssh.load_keypairs([key])
    armored = asyncio.run(sign_with(pair, b"message", "quarterdeck-op"))
    signer = sshsig.verify(b"message", armored, "quarterdeck-op")
    assert signer.line == key.export_public_key().decode().strip()


def test_agent_keys_without_an_agent_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    assert list(asyncio.run(agent_keys())) == []
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "nothing"))
    assert list(asyncio.run(agent_keys())) == []


def test_dial_asks_no_agent_by_itself(agent: Path) -> None:
    async def run() -> None:
        async with listening() as (_, addr):
            with pytest.raises(Refused):  # the agent's key would have been let in
                await dial_as_client(addr, identity=STRANGER)

    asyncio.run(run())


@needs_keygen
def test_login_with_a_certificate_shows_the_certificate_to_the_authoriser(
    tmp_path: Path, key_file: Path
) -> None:
    ca = tmp_path / "ca"
    ca.write_bytes(STRANGER.to_openssh())
    ca.chmod(0o600)
    key_file.with_suffix(".pub").write_text(CLIENT.pub_openssh() + "\n")
    command = [
        "ssh-keygen",
        "-q",
        "-s",
        str(ca),
        "-I",
        "alice",
        "-n",
        "ops",
        "-V",
        "+1h",
        str(tmp_path / "key.pub"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    shown: list[str] = []

    def authorise(key_line: str, username: str, addr: Addr) -> Login | None:
        shown.append(key_line)
        if "-cert-" not in key_line:
            return None
        return Login("op", None, None, "SHA256:x", "operate", key_line)

    async def run() -> None:
        pair = asyncssh.load_keypairs([(str(key_file), str(tmp_path / "key-cert.pub"))])
        async with listening(authorise=authorise) as (listener, addr):
            link = await dial_as_client(addr, identity=list(pair), username="op")
            assert await link.call("echo", 1) == 1
            assert next(iter(listener.links)).login.role == "operate"
            await link.close()

    asyncio.run(run())
    certificate = (tmp_path / "key-cert.pub").read_text().split()[1]
    assert shown[0] == f"ssh-ed25519-cert-v01@openssh.com {certificate}"


def test_dial_reads_nothing_from_the_users_ssh_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".ssh"
    folder.mkdir()
    (folder / "config").write_text("Host *\n  ProxyCommand /bin/false\n  User root\n")
    (folder / "known_hosts").write_text("* " + STRANGER.pub_openssh() + "\n")
    (folder / "id_ed25519").write_bytes(CLIENT.to_openssh())
    (folder / "id_ed25519").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))

    async def run() -> None:
        async with listening() as (_, addr):
            link = await dial_as_client(addr)
            assert link.login.pub == SERVER.pub
            await link.close()
            with pytest.raises(Refused):
                await dial_as_client(addr, identity=STRANGER)

    asyncio.run(run())


def test_dial_where_the_user_has_no_name_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))

    async def run() -> None:
        async with listening() as (_, addr):
            link = await dial_as_client(addr)
            assert await link.call("echo", 1) == 1
            await link.close()

    try:
        asyncio.run(run())
    finally:
        os.environ.pop("LOGNAME", None)


class SoftHardwareKey(asyncssh.SSHKeyPair):
    """A hardware key in software: signs with the flags it is told to."""

    def __init__(self, flags: int) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(b"h" * 32)
        self._flags = bytes([flags])
        name = b"sk-ssh-ed25519@openssh.com"
        pub = self._private.public_key().public_bytes_raw()
        super().__init__(name, name, [name], [name], sshkey.strings(name, pub, b"ssh:"), None)

    def sign(self, data: bytes) -> bytes:
        tail = self._flags + (1).to_bytes(4, "big")
        signed = hashlib.sha256(b"ssh:").digest() + tail + hashlib.sha256(data).digest()
        return sshkey.strings(b"sk-ssh-ed25519@openssh.com", self._private.sign(signed)) + tail


@pytest.mark.parametrize("flags", [0, 1, 4, 5])
@pytest.mark.parametrize("need_touch", [False, True])
@pytest.mark.parametrize("need_verified", [False, True])
def test_login_with_a_hardware_key_needs_the_user_as_told(
    flags: int, need_touch: bool, need_verified: bool
) -> None:
    def authorise(key_line: str, username: str, addr: Addr) -> Login | None:
        return Login("op", None, None, "SHA256:x", "admin", key_line, need_verified, need_touch)

    async def run() -> bool:
        async with listening(authorise=authorise) as (_, addr):
            try:
                link = await dial_as_client(addr, identity=[SoftHardwareKey(flags)], username="op")
            except Refused as why:
                assert why.code == "login"
                return False
            await link.close()
            return True

    allowed = (bool(flags & 1) or not need_touch) and (bool(flags & 4) or not need_verified)
    assert asyncio.run(run()) == allowed


def test_login_that_needs_user_verification_is_refused_to_a_plain_key() -> None:
    def authorise(key_line: str, username: str, addr: Addr) -> Login | None:
        login = admit_client(key_line, username, addr)
        assert login is not None
        return Login("op", None, login.pub, "SHA256:x", "admin", key_line, need_verified=True)

    async def run() -> None:
        async with listening(authorise=authorise) as (_, addr):
            with pytest.raises(Refused) as why:
                await dial(addr, identity=CLIENT, username="op", expect_pub=SERVER.pub)
            assert why.value.code == "login"

    for _ in range(3):
        asyncio.run(run())
