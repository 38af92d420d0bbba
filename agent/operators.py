"""Who may command this node: the file `authorized_operators`, in the format of OpenSSH's `authorized_keys`.

    environment="QD_ROLE=operate",expiry-time="20270101" ssh-ed25519 AAAA… anna@laptop
    cert-authority,principals="ops",environment="QD_ROLE=admin" ssh-ed25519 AAAA… the-ca

Every option that a line carries is enforced here, or the line is void and `problems` names it: an option that
is read and not enforced would be a lock painted on a door. The first line that fits a key counts, as in sshd.
Where we are stricter than sshd: no option of a shell login is accepted at all, `from` takes addresses and no
host names, a certificate needs a principal (the line's `principals`, else the login name `op`).
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from agent.opmessage import ROLES
from discovery.errors import Refused, RemoteError
from discovery.sshkey import (
    CERT_TYPES,
    KEY_TYPES,
    TOUCHED,
    USER_CERT,
    VERIFIED,
    Certificate,
    PublicKey,
    blob_of,
)

LOGIN_NAME = "op"
FILE_MAX_BYTES = 1024 * 1024
STAT_INTERVAL_S = 1.0
ROLE_VARIABLE = "QD_ROLE"

_EXPIRY = re.compile(r"\d{8}(\d{4}(\d{2})?)?Z?", re.ASCII)
_BLANKS = re.compile(r"[ \t]+")
_ADDRESS_PATTERN = re.compile(r"[0-9a-fA-F:.*?]+")


@dataclass(frozen=True)
class Operator:
    """A key that is allowed in, now, from where it came."""

    role: str
    comment: str
    """Who it is, for people: the line's comment, a certificate's key id, else the fingerprint."""
    fingerprint: str
    line: int
    """Its line in the file."""
    verify_required: bool = False
    touch_required: bool = False

    def check_presence(self, flags: int | None) -> None:
        """Refused when a hardware key must have been touched, or must have asked who, and its signature's
        `flags` don't say so (None: not a hardware key, or not known)."""
        if self.verify_required and not (flags or 0) & VERIFIED:
            raise Refused("not_verified", "this key must verify its user (PIN or biometry), and did not")
        if self.touch_required and not (flags or 0) & TOUCHED:
            raise Refused("not_touched", "this key must be touched to sign, and was not")


@dataclass
class Line:
    """One valid line of the file."""

    number: int
    key: PublicKey
    comment: str
    role: str = "observe"
    authority: bool = False
    expires_s: float | None = None
    sources: tuple[str, ...] | None = None
    principals: tuple[str, ...] | None = None
    verify_required: bool = False
    no_touch: bool = False
    seen: set[str] = field(default_factory=set)


class VoidLine(Exception):
    """This line authorises nobody; the text says why."""


def parse(text: str) -> tuple[list[Line], list[str]]:
    """The valid lines of such a file, and a sentence on each void one."""
    lines: list[Line] = []
    problems: list[str] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        try:
            lines.append(_parse_line(number, line))
        except (VoidLine, RemoteError) as why:
            problems.append(f"line {number}: {_printable(str(why))}; the line is void")
    return lines, problems


def _parse_line(number: int, line: str) -> Line:
    options: list[tuple[str, str | None]] = []
    if _BLANKS.split(line, 1)[0] not in KEY_TYPES | CERT_TYPES:
        head, line = _split_options(line)
        options = list(_options(head))
    words = _BLANKS.split(line, 2)
    if words[0] in CERT_TYPES:
        raise VoidLine("a certificate where a key or a cert-authority is expected")
    if words[0] not in KEY_TYPES:
        raise VoidLine(f"no key of a supported type ({words[0][:40] or 'nothing'})")
    key = PublicKey.parse(blob_of(line))
    comment = _printable(words[2].strip())[:128] if len(words) > 2 else ""
    found = Line(number, key, comment or key.fingerprint)
    for name, value in options:
        _apply(found, name.lower(), name, value)
    if found.principals is not None and not found.authority:
        raise VoidLine("principals= means something only beside cert-authority")
    if found.verify_required and not found.authority and not key.hardware:
        raise VoidLine("verify-required on a key that can't verify its user")
    return found


def _split_options(line: str) -> tuple[str, str]:
    quoted = False
    at = 0
    while at < len(line) and (quoted or line[at] not in " \t"):
        if line[at] == "\\" and line[at + 1 : at + 2] == '"':
            at += 1
        elif line[at] == '"':
            quoted = not quoted
        at += 1
    if quoted:
        raise VoidLine("a quote that doesn't end")
    return line[:at], line[at:].strip(" \t")


def _options(text: str) -> Iterable[tuple[str, str | None]]:
    at = 0
    while at <= len(text):
        match = re.compile(r'([A-Za-z0-9-]+)(?:(=)("((?:\\"|[^"])*)")?)?').match(text, at)
        if match is None or (match[2] and match[3] is None):
            raise VoidLine(f"options that can't be read at {text[at : at + 24]!r}")
        yield match[1], match[4].replace('\\"', '"') if match[2] else None
        at = match.end()
        if at == len(text):
            return
        if text[at] != ",":
            raise VoidLine(f"options that can't be read at {text[at : at + 24]!r}")
        at += 1


def _apply(line: Line, option: str, shown: str, value: str | None) -> None:
    flag = option in ("cert-authority", "verify-required", "no-touch-required")
    if flag == (value is not None) or not (flag or option in _VALUED):
        known = flag or option in _VALUED
        raise VoidLine(
            f"option {shown} {'takes no value' if flag else 'needs a value'}"
            if known
            else f"option {shown} is not enforced here"
        )
    if option in line.seen:
        raise VoidLine(f"option {shown} is there twice")
    line.seen.add(option)
    match option:
        case "cert-authority":
            line.authority = True
        case "verify-required":
            line.verify_required = True
        case "no-touch-required":
            line.no_touch = True
        case _:
            _VALUED[option](line, value or "")


def _set_role(line: Line, value: str) -> None:
    name, equals, role = value.partition("=")
    if name != ROLE_VARIABLE or not equals:
        raise VoidLine(
            f"environment variable {name[:40]} is not set here; only {ROLE_VARIABLE} means something"
        )
    if role not in ROLES:
        raise VoidLine(f"role {role[:40]!r} is none of {', '.join(ROLES)}")
    line.role = role


def _set_expiry(line: Line, value: str) -> None:
    line.expires_s = expiry_time(value)


def _set_sources(line: Line, value: str) -> None:
    line.sources = sources(value)


def _set_principals(line: Line, value: str) -> None:
    names = tuple(name for name in value.split(",") if name)
    if not names:
        raise VoidLine("principals= names nobody")
    line.principals = names


_VALUED: dict[str, Callable[[Line, str], None]] = {
    "environment": _set_role,
    "expiry-time": _set_expiry,
    "from": _set_sources,
    "principals": _set_principals,
}


def expiry_time(value: str) -> float:
    """Unix seconds of `YYYYMMDD[HHMM[SS]]`, in this host's zone or with `Z` in UTC; VoidLine otherwise."""
    if not _EXPIRY.fullmatch(value):
        raise VoidLine(f"expiry-time {value[:24]!r} is not YYYYMMDD[HHMM[SS]][Z]")
    digits = value.removesuffix("Z").ljust(14, "0")
    try:
        moment = datetime.strptime(digits, "%Y%m%d%H%M%S")
        return (moment.replace(tzinfo=UTC) if value.endswith("Z") else moment).timestamp()
    except (ValueError, OverflowError) as why:
        raise VoidLine(f"expiry-time {value[:24]!r} is no date") from why


def sources(value: str) -> tuple[str, ...]:
    """The patterns of a `from`: addresses, CIDR blocks, `*` and `?`, each with `!` in front to forbid."""
    patterns = tuple(part.strip() for part in value.split(","))
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if "*" in bare or "?" in bare:
            if not _ADDRESS_PATTERN.fullmatch(bare):
                raise VoidLine(f"from= {bare[:64]!r}: host names are not looked up here, give addresses")
            continue
        try:
            ipaddress.ip_network(bare)
        except ValueError as why:
            raise VoidLine(f"from= {bare[:64]!r} is no address, block or pattern of addresses") from why
    return patterns


def source_allowed(patterns: Iterable[str], addr: str | None) -> bool:
    """Whether an address passes: some pattern fits, and no `!` pattern does. Unknown (None) never passes."""
    if addr is None:
        return False
    try:
        ip = ipaddress.ip_address(addr.split("%", 1)[0].strip("[]"))
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    ip = mapped or ip
    allowed = False
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if "*" in bare or "?" in bare:
            shape = re.escape(bare.lower()).replace(r"\*", ".*").replace(r"\?", ".")
            fits = re.fullmatch(shape, str(ip)) is not None
        else:
            fits = ip in ipaddress.ip_network(bare)
        if fits and pattern.startswith("!"):
            return False
        allowed = allowed or fits
    return allowed


def judge(lines: Iterable[Line], blob: bytes, peer_addr: str | None, now_ms: int) -> Operator:
    """The operator that this key or certificate is, at this time, coming from this address.

    Refused: `unknown_key`, `key_expired`, `from_address`, `certificate`, `principal`."""
    try:
        certificate = Certificate.parse(blob) if _is_certificate(blob) else None
        key = certificate.key if certificate else PublicKey.parse(blob)
    except RemoteError as why:
        raise Refused("unknown_key", f"not a key that can be known here: {why}") from why
    wanted = certificate.ca if certificate else key
    refusal = Refused("unknown_key", f"key {key.fingerprint} is not in authorized_operators here")
    for line in lines:
        if line.key != wanted or line.authority != (certificate is not None):
            continue
        try:
            return _judge_line(line, key, certificate, peer_addr, now_ms)
        except Refused as why:
            refusal = why
    raise refusal


def _judge_line(
    line: Line, key: PublicKey, certificate: Certificate | None, peer_addr: str | None, now_ms: int
) -> Operator:
    if certificate is not None:
        _judge_certificate(line, certificate, peer_addr, now_ms)
    if line.expires_s is not None and now_ms > line.expires_s * 1000:
        raise Refused("key_expired", f"the key of {line.comment} expired")
    if line.sources is not None and not source_allowed(line.sources, peer_addr):
        raise Refused(
            "from_address", f"the key of {line.comment} may not be used from {peer_addr or 'there'}"
        )
    verify = line.verify_required or (certificate is not None and "verify-required" in certificate.critical)
    waived = line.no_touch and (certificate is None or "no-touch-required" in certificate.extensions)
    return Operator(
        role=line.role,
        comment=_printable(certificate.key_id)[:128] or line.comment if certificate else line.comment,
        fingerprint=key.fingerprint,
        line=line.number,
        verify_required=verify,
        touch_required=key.hardware and not waived,
    )


def _judge_certificate(line: Line, certificate: Certificate, peer_addr: str | None, now_ms: int) -> None:
    try:
        certificate.check_signature()
    except RemoteError as why:
        raise Refused(
            "certificate", f"the certificate is not signed by the CA {line.comment}: {why}"
        ) from why
    if certificate.kind != USER_CERT:
        raise Refused("certificate", "the certificate is not a user's")
    if now_ms < certificate.valid_after_s * 1000:
        raise Refused("certificate", "the certificate is not valid yet")
    if now_ms >= certificate.valid_before_s * 1000:
        raise Refused("key_expired", "the certificate expired")
    accepted = line.principals or (LOGIN_NAME,)
    if not set(accepted) & set(certificate.principals):
        raise Refused("principal", f"the certificate is for none of {', '.join(accepted)}")
    for name, value in certificate.critical.items():
        if name == "source-address":
            try:
                passes = source_allowed(sources(value), peer_addr)
            except VoidLine as why:
                raise Refused("certificate", "the certificate's source-address can't be read") from why
            if not passes:
                raise Refused("from_address", f"the certificate may not be used from {peer_addr or 'there'}")
        elif name != "verify-required":
            raise Refused(
                "certificate", f"the certificate demands {ascii(name)[:64]}, which is not enforced here"
            )


def _is_certificate(blob: bytes) -> bool:
    size = int.from_bytes(blob[:4], "big")
    return size < 64 and blob[4 : 4 + size].decode("ascii", "replace") in CERT_TYPES


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


class Operators:
    """The file, read again when it changed (looked at once a second at most). No file: nobody is let in.

    A file that others can write, or that another user owns, is refused as a whole."""

    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._problems: list[str] = []
        self._missing = False
        self._monotonic = monotonic
        self._looked_at: float | None = None
        self._version: tuple[int, ...] | None = None
        self._lines: list[Line] = []

    @property
    def lines(self) -> list[Line]:
        """The valid lines, as of now."""
        self._look()
        return self._lines

    @property
    def problems(self) -> list[str]:
        """A sentence on everything in the file that isn't as its author may think, as of now."""
        self._look()
        return self._problems

    @property
    def missing(self) -> bool:
        """Whether there is no file."""
        self._look()
        return self._missing

    def judge(self, key: str | bytes, peer_addr: str | None, now_ms: int) -> Operator:
        """The operator of a key (OpenSSH line or blob, certificates too), or Refused with the reason."""
        try:
            blob = blob_of(key) if isinstance(key, str) else key
        except RemoteError as why:
            raise Refused("unknown_key", f"not a key: {why}") from why
        return judge(self.lines, blob, peer_addr, now_ms)

    def name_of(self, blob: bytes) -> str | None:
        """Who a key is by its line's comment, whether or not it would be let in now; None when not known."""
        try:
            key = Certificate.parse(blob).ca if _is_certificate(blob) else PublicKey.parse(blob)
        except RemoteError:
            return None
        return next((line.comment for line in self.lines if line.key == key), None)

    def lookup(self, key: str | bytes, peer_addr: str | None, now_ms: int) -> Operator | None:
        """As `judge`, None when refused."""
        try:
            return self.judge(key, peer_addr, now_ms)
        except Refused:
            return None

    def _look(self) -> None:
        now = self._monotonic()
        if self._looked_at is not None and now - self._looked_at < STAT_INTERVAL_S:
            return
        self._looked_at = now
        try:
            info = self.path.stat()
            if not stat.S_ISREG(info.st_mode):
                self._nobody(f"{self.path}: not a regular file; nobody can command this node")
            elif _version(info) != self._version:
                self._read()
        except FileNotFoundError:
            self._nobody(f"{self.path}: not there, so nobody can command this node; make it with `qd init`")
            self._missing = True
        except OSError as why:
            self._nobody(f"{self.path}: {why.strerror}; nobody can command this node")

    def _read(self) -> None:
        with self.path.open("rb") as file:
            info = os.fstat(file.fileno())
            mode = stat.S_IMODE(info.st_mode)
            wrong = None
            if mode & 0o022:
                wrong = f"others can write it (mode {mode:04o}); run `chmod go-w {self.path}`"
            elif info.st_uid not in (0, os.geteuid()):
                wrong = f"it belongs to another user (uid {info.st_uid})"
            elif info.st_size > FILE_MAX_BYTES:
                wrong = f"larger than {FILE_MAX_BYTES} bytes"
            text = "" if wrong else file.read(FILE_MAX_BYTES + 1).decode("utf-8", "replace")
        if wrong:
            self._nobody(f"{self.path}: {wrong}; nobody in it can command this node")
        else:
            self._lines, found = parse(text)
            self._problems = [f"{self.path} {problem}" for problem in found]
            self._missing = False
        self._version = _version(info)

    def _nobody(self, problem: str) -> None:
        self._lines = []
        self._version = None
        self._problems = [problem]
        self._missing = False


def _version(info: os.stat_result) -> tuple[int, ...]:
    return (info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino, info.st_mode, info.st_uid)
