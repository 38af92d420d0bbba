"""Whose word an op is: finds the operator's key (file, ssh-agent, hardware) and signs with it.

In order: the key that was named, the home's operator key, the keys of a running ssh-agent, `~/.ssh/id_ed25519`.
A private key never leaves this process, and an agent's never enters it.
"""

from __future__ import annotations

import asyncio
import base64
import stat
import sys
from pathlib import Path
from typing import Any, Protocol

import asyncssh

from agent.home import Home
from discovery import sshkey, sshsig
from discovery.errors import LocalError, Refused
from discovery.links import agent_keys

RSA_ALGORITHM = b"rsa-sha2-512"
PASSPHRASE_TRIES = 3
DEFAULT_KEY = Path("~/.ssh/id_ed25519")


class Signer(Protocol):
    """Signs an op's bytes. `fingerprint` (`SHA256:…`) and `label` say who that is."""

    fingerprint: str
    label: str

    async def sign(self, message: bytes, namespace: str) -> str: ...


class KeySigner:
    """Signs with an asyncssh key pair: a key file's, or one that lives in an ssh-agent."""

    def __init__(self, pair: Any, label: str) -> None:
        self._pair = pair
        self.label = label
        self.fingerprint = sshkey.fingerprint(pair.public_data)

    async def sign(self, message: bytes, namespace: str) -> str:
        """The armored SSHSIG signature of `message`; Refused `signing` when the agent or the hardware says no."""
        pair = self._pair
        if pair.algorithm == b"ssh-rsa" or pair.algorithm.startswith(b"rsa-"):
            pair.set_sig_algorithm(RSA_ALGORITHM)
        try:
            signature = await self._signature(sshsig.to_sign(message, namespace))
        except (OSError, ValueError, asyncssh.Error) as why:
            raise Refused("signing", f"{self.label}: does not sign: {why}") from why
        return sshsig.armor(pair.public_data, namespace, signature)

    async def _signature(self, data: bytes) -> bytes:
        """The SSH signature blob of `data`. Hardware waits for a touch, so it gets a thread."""
        if hasattr(self._pair, "sign_async"):
            return bytes(await self._pair.sign_async(data))
        return bytes(await asyncio.to_thread(self._pair.sign, data))


async def find_signer(home: Home, operator_key: Path | None) -> Signer:
    """The signer that ops of this home are signed with. Refused `no_key` when there is none to be found."""
    for pair, label in await _pairs(home, operator_key):
        return KeySigner(pair, label)
    raise Refused(
        "no_key", "operator key: none found; make one with `qd init`, or name one with --operator-key"
    )


async def login_keys(home: Home, operator_key: Path | None) -> list[Any]:
    """The keys to log in with as an operator, in the order to try. Refused `no_key` when there is none."""
    pairs = [pair for pair, _ in await _pairs(home, operator_key, every=True)]
    if not pairs:
        raise Refused(
            "no_key", "operator key: none found; make one with `qd init`, or name one with --operator-key"
        )
    return pairs


async def _pairs(home: Home, operator_key: Path | None, every: bool = False) -> list[tuple[Any, str]]:
    """(key pair, label) of what there is, best first; a named key is the only one."""
    if operator_key is not None:
        return [(_load(operator_key), str(operator_key))]
    found: list[tuple[Any, str]] = []
    if home.operator_key_file.exists():
        found.append((_load(home.operator_key_file), str(home.operator_key_file)))
    if every or not found:
        found += await _agent_pairs(home)
    default = DEFAULT_KEY.expanduser()
    if not found and default.exists():
        found.append((_load(default), str(default)))
    return found


async def _agent_pairs(home: Home) -> list[tuple[Any, str]]:
    """Keys of the ssh-agent; those that this home's own authorized_operators lists come first."""
    try:
        listed = home.operators_file.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        listed = []
    pairs = [(key, f"ssh-agent: {key.get_comment()}") for key in await agent_keys()]
    return sorted(pairs, key=lambda pair: base64.b64encode(pair[0].public_data).decode() not in listed)


def _load(path: Path) -> Any:
    """The key pair of a private key file, with the certificate beside it where there is one (`KEY-cert.pub`).

    Its passphrase is asked for on a terminal.
    """
    text = _read(path)
    certificate = _certificate(path)
    passphrase: str | None = None
    for _ in range(1 + PASSPHRASE_TRIES):
        try:
            key = asyncssh.import_private_key(text, passphrase)
        except (asyncssh.KeyEncryptionError, asyncssh.KeyImportError, ValueError) as why:
            locked = isinstance(why, asyncssh.KeyEncryptionError) or "passphrase" in str(why).lower()
            if not locked:
                raise LocalError(f"operator key {path}: {why}; name a private key in OpenSSH form") from why
            if passphrase is not None:
                _say("that is not its passphrase")
            passphrase = _ask_passphrase(path, why)
            continue
        return asyncssh.load_keypairs([key if certificate is None else (key, certificate)])[0]
    raise LocalError(f"operator key {path}: no passphrase fits; add it to an ssh-agent, or try again")


def _certificate(path: Path) -> Any:
    beside = path.with_name(path.name + "-cert.pub")
    try:
        return asyncssh.import_certificate(beside.read_bytes())
    except OSError:
        return None
    except (asyncssh.KeyImportError, ValueError) as why:
        raise LocalError(f"certificate {beside}: {why}; remove it or have it issued again") from why


def _read(path: Path) -> bytes:
    from tui.cli.failures import FAILED, Fail

    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise LocalError(f"operator key {path}: not a file; name a private key")
        if stat.S_IMODE(info.st_mode) & 0o077:
            mode = f"{stat.S_IMODE(info.st_mode):04o}"
            raise Fail(
                FAILED, f"operator key {path}: others can read it (mode {mode}); run `chmod 600 {path}`"
            )
        return path.read_bytes()
    except OSError as why:
        raise LocalError(
            f"operator key {path}: {why.strerror}; name one that is there and that you can read"
        ) from why


def _ask_passphrase(path: Path, why: Exception) -> str:
    import getpass

    try:
        terminal = sys.stdin is not None and sys.stdin.isatty()
    except ValueError:
        terminal = False
    if not terminal:
        raise LocalError(
            f"operator key {path}: has a passphrase and there is no terminal to ask for it; add it to an ssh-agent"
        ) from why
    return getpass.getpass(f"passphrase of {path}: ", stream=sys.stderr)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
