"""Who is let in by `authorized_operators`, and which lines are void. Certificates are made by ssh-keygen."""

from __future__ import annotations

import base64
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from agent.operators import Operators, VoidLine, expiry_time, judge, parse, source_allowed, sources
from discovery.errors import Refused, RemoteError
from discovery.identity import Identity
from discovery.sshkey import KEY_TYPES, Certificate, PublicKey, blob_of, fingerprint

KEY = Identity.from_seed(b"a" * 32).pub_openssh()
OTHER = Identity.from_seed(b"b" * 32).pub_openssh()
NOW_MS = 1_800_000_000_000
NOW_S = NOW_MS // 1000
SK = "sk-ssh-ed25519@openssh.com"

needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed"
)


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def line_of(kind: str, *parts: bytes) -> str:
    blob = b"".join(map(string, (kind.encode(), *parts)))
    return f"{kind} {base64.b64encode(blob).decode()}"


SK_KEY = line_of(SK, Identity.from_seed(b"s" * 32).pub, b"ssh:")


def role_of(text: str, key: str = KEY, peer_addr: str | None = "10.1.2.3", now_ms: int = NOW_MS) -> str:
    """The role that a file gives a key, or the code by which it is refused."""
    lines, _ = parse(text)
    try:
        return judge(lines, blob_of(key), peer_addr, now_ms).role
    except Refused as why:
        return why.code


# -- lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "role"),
    [
        (f"{KEY} anna", "observe"),
        (f'environment="QD_ROLE=observe" {KEY}', "observe"),
        (f'environment="QD_ROLE=operate" {KEY} anna', "operate"),
        (f'ENVIRONMENT="QD_ROLE=admin" {KEY}', "admin"),
        (f'  \tenvironment="QD_ROLE=admin"   {KEY}\r', "admin"),
        (f'# a comment\n\n   # another\n{OTHER}\nenvironment="QD_ROLE=admin" {KEY}', "admin"),
        (f'environment="QD_ROLE=admin",from="10.0.0.0/8,!10.9.9.9" {KEY} x, y "z"', "admin"),
        (f'from="192.168.0.1" {KEY}', "from_address"),
        (f'expiry-time="20200101" {KEY}', "key_expired"),
        (f'expiry-time="20200101" {KEY}\nenvironment="QD_ROLE=operate" {KEY}', "operate"),
        (f'{KEY}\nenvironment="QD_ROLE=operate" {KEY}', "observe"),
        (OTHER, "unknown_key"),
        ("", "unknown_key"),
        (f"cert-authority {KEY}", "unknown_key"),
    ],
)
def test_line_gives_its_role(text: str, role: str) -> None:
    assert role_of(text) == role


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ('command="/bin/true"', "command is not enforced"),
        ('permitopen="*:*"', "permitopen is not enforced"),
        ('permitlisten="1"', "permitlisten is not enforced"),
        ('tunnel="0"', "tunnel is not enforced"),
        ("restrict", "restrict is not enforced"),
        ("no-pty", "no-pty is not enforced"),
        ("port-forwarding", "port-forwarding is not enforced"),
        ("agent-forwarding", "agent-forwarding is not enforced"),
        ('subject="x"', "subject is not enforced"),
        ("made-up", "made-up is not enforced"),
        ('environment="QD_ROLE=root"', "role 'root' is none of"),
        ('environment="QD_ROLE="', "role '' is none of"),
        ('environment="QD_ROLE"', "only QD_ROLE"),
        ('environment="PATH=/tmp"', "PATH is not set here"),
        ('environment="QD_ROLE=admin",environment="QD_ROLE=observe"', "there twice"),
        ('from="10.0.0.1",from="10.0.0.2"', "there twice"),
        ("environment", "needs a value"),
        ("from=10.0.0.1", "can't be read"),
        ('from="10.0.0.1', "quote that doesn't end"),
        ('from=""', "no address"),
        ('from="*.example.com"', "host names are not looked up"),
        ('from="!bastion"', "no address"),
        ('from="10.0.0.1/8"', "no address, block"),
        ('expiry-time="tomorrow"', "is not YYYYMMDD"),
        ('expiry-time="20261301"', "is no date"),
        ('expiry-time="202601011"', "is not YYYYMMDD"),
        ("expiry-time", "needs a value"),
        ('principals="ops"', "beside cert-authority"),
        ('cert-authority,principals=","', "names nobody"),
        ('cert-authority="yes"', "takes no value"),
        ("verify-required", "can't verify its user"),
        ('environment="QD_ROLE=admin",', "can't be read"),
        (',environment="QD_ROLE=admin"', "can't be read"),
        ('environment="QD_ROLE=admin"x', "can't be read"),
    ],
)
def test_line_with_an_option_not_enforced_or_not_readable_is_void_and_named(options: str, why: str) -> None:
    text = f"{OTHER}\n{options} {KEY} anna"
    lines, problems = parse(text)
    assert [line.number for line in lines] == [1]
    assert len(problems) == 1
    assert problems[0].startswith("line 2: ")
    assert why in problems[0]
    assert problems[0].endswith("the line is void")
    assert role_of(text) == "unknown_key"


@pytest.mark.parametrize(
    "line",
    [
        "ssh-ed25519",
        "ssh-ed25519 !!!!",
        "ssh-ed25519 AAAA",
        KEY[:-8],
        KEY.replace("ssh-ed25519 ", "ssh-rsa "),
        "ssh-dss AAAAB3NzaC1kc3MAAACBAA==",
        "just some words here",
        "\x1b[31mred",
        "\x1f",
        "\x0c\x1c",
        'environment="QD_ROLE=admin"',
        f"ssh-ed25519\x1f{KEY.split()[1]}",
        line_of("ssh-ed25519", b"short"),
        line_of("ssh-ed25519", b"k" * 32, b"more"),
        line_of("ecdsa-sha2-nistp256", b"nistp384", b"\x04" + b"\1" * 64),
        line_of("ecdsa-sha2-nistp256", b"nistp256", b"\x04" + b"\1" * 64),
    ],
)
def test_line_without_a_sound_key_is_void_and_told_without_control_characters(line: str) -> None:
    lines, problems = parse(line)
    assert lines == []
    assert len(problems) == 1
    assert problems[0].isprintable()


def test_weak_rsa_key_is_void() -> None:
    numbers = rsa.generate_private_key(65537, 1024).public_key().public_numbers()
    line = line_of("ssh-rsa", b"\1\0\1", b"\0" + numbers.n.to_bytes(128, "big"))
    assert "1024 bits" in parse(line)[1][0]


@given(st.text(max_size=200))
def test_any_text_parses_without_raising_and_lets_nobody_in(text: str) -> None:
    lines, problems = parse(text)
    assert lines == []
    assert all(problem.isprintable() for problem in problems)


@given(st.text(alphabet='abc"\\,=! \t-', max_size=60))
def test_any_options_before_a_key_give_at_most_observe(options: str) -> None:
    lines, problems = parse(f"{options} {KEY}")
    assert all(line.role == "observe" for line in lines)
    assert len(lines) + len(problems) == (0 if options.strip().startswith("#") else 1)


def test_comment_names_the_operator_and_the_fingerprint_does_where_there_is_none() -> None:
    lines, _ = parse(f"{KEY} anna \x07@laptop\n{OTHER}")
    assert judge(lines, blob_of(KEY), None, NOW_MS).comment == "anna ?@laptop"
    operator = judge(lines, blob_of(OTHER), None, NOW_MS)
    assert operator.comment == operator.fingerprint == fingerprint(blob_of(OTHER))


# -- expiry-time -------------------------------------------------------------------------------------


@pytest.fixture
def berlin() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "CET-1CEST,M3.5.0,M10.5.0/3"
    time.tzset()
    yield
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()


@pytest.mark.parametrize(
    ("value", "utc"),
    [
        ("20260101", "2025-12-31T23:00:00"),
        ("20260701", "2026-06-30T22:00:00"),
        ("202607011230", "2026-07-01T10:30:00"),
        ("20260701123045", "2026-07-01T10:30:45"),
        ("20260701Z", "2026-07-01T00:00:00"),
        ("202607011230Z", "2026-07-01T12:30:00"),
        ("20260701123045Z", "2026-07-01T12:30:45"),
    ],
)
def test_expiry_time_is_local_or_with_z_utc(berlin: None, value: str, utc: str) -> None:
    assert time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(expiry_time(value))) == utc


def test_key_is_good_up_to_its_expiry_and_not_beyond() -> None:
    text = f'expiry-time="20300101Z" {KEY}'
    moment = int(expiry_time("20300101Z")) * 1000
    assert role_of(text, now_ms=moment) == "observe"
    assert role_of(text, now_ms=moment + 1) == "key_expired"


@pytest.mark.parametrize(
    "value", ["", "2026", "20260101z", "20260101T10", "２０２６０１０１", "20260230", "202601012460"]
)
def test_expiry_time_of_another_shape_is_void(value: str) -> None:
    with pytest.raises(VoidLine):
        expiry_time(value)


# -- from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "addr", "allowed"),
    [
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.0.0.0/8", "10.200.0.1", True),
        ("10.0.0.0/8,!10.1.0.0/16", "10.1.2.3", False),
        ("!10.1.0.0/16,10.0.0.0/8", "10.1.2.3", False),
        ("!10.1.0.0/16,10.0.0.0/8", "10.2.2.3", True),
        ("!10.1.2.3", "10.9.9.9", False),
        ("10.1.*", "10.1.2.3", True),
        ("10.1.2.?", "10.1.2.3", True),
        ("10.1.2.?", "10.1.2.33", False),
        ("1?.1.2.3", "1x.1.2.3", False),
        ("*", "2001:db8::1", True),
        ("*,!10.*", "10.1.2.3", False),
        ("2001:db8::/32", "2001:DB8:0::7", True),
        ("2001:DB8:*", "2001:db8::7", True),
        ("2001:db8::/32", "10.1.2.3", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("10.0.0.0/8", "not an address", False),
        ("*", None, False),
    ],
)
def test_source_patterns_decide_by_address(patterns: str, addr: str | None, allowed: bool) -> None:
    assert source_allowed(sources(patterns), addr) is allowed


# -- hardware keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "flags", "code"),
    [
        ("", 0x01, None),
        ("", 0x00, "not_touched"),
        ("", None, "not_touched"),
        ("no-touch-required ", 0x00, None),
        ("verify-required ", 0x05, None),
        ("verify-required ", 0x01, "not_verified"),
        ("verify-required ", None, "not_verified"),
        ("verify-required,no-touch-required ", 0x04, None),
    ],
)
def test_hardware_key_must_say_what_its_line_demands(
    options: str, flags: int | None, code: str | None
) -> None:
    lines, problems = parse(f"{options}{SK_KEY} token")
    assert problems == []
    operator = judge(lines, blob_of(SK_KEY), None, NOW_MS)
    if code is None:
        operator.check_presence(flags)
    else:
        with pytest.raises(Refused) as caught:
            operator.check_presence(flags)
        assert caught.value.code == code


def test_ordinary_key_needs_no_touch() -> None:
    judge(parse(KEY)[0], blob_of(KEY), None, NOW_MS).check_presence(None)


# -- certificates ------------------------------------------------------------------------------------


class Authority:
    """A certificate authority, by ssh-keygen."""

    def __init__(self, place: Path, kind: str = "ed25519") -> None:
        self.place = place
        self.number = 0
        bits = ["-b", {"rsa": "3072", "ecdsa": "384"}[kind]] if kind != "ed25519" else []
        self.run("-q", "-t", kind, *bits, "-N", "", "-C", "the-ca", "-f", str(place / "ca"))
        self.pub = (place / "ca.pub").read_text().strip()

    def run(self, *args: str) -> None:
        subprocess.run(["ssh-keygen", *args], check=True, cwd=self.place, capture_output=True)

    def issue(self, *args: str, principals: str = "op", valid: str = "always:forever") -> str:
        """The certificate line of a new key."""
        self.number += 1
        name = f"user{self.number}"
        self.run("-q", "-t", "ed25519", "-N", "", "-f", name)
        who = ["-n", principals] if principals else []
        self.run("-q", "-s", "ca", "-I", "anna-cert", *who, "-V", valid, *args, f"{name}.pub")
        return (self.place / f"{name}-cert.pub").read_text().strip()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    return Authority(tmp_path_factory.mktemp("ca"))


def trusts(ca: Authority, *options: str) -> str:
    return ",".join(("cert-authority", 'environment="QD_ROLE=operate"', *options)) + f" {ca.pub}"


def test_certificate_of_a_trusted_ca_has_the_role_of_its_line(ca: Authority) -> None:
    certificate = ca.issue()
    assert role_of(trusts(ca), certificate) == "operate"
    operator = judge(parse(trusts(ca))[0], blob_of(certificate), None, NOW_MS)
    assert operator.comment == "anna-cert"
    plain = (ca.place / f"user{ca.number}.pub").read_text()
    assert operator.fingerprint == fingerprint(blob_of(plain))


def test_ca_line_admits_neither_the_ca_key_nor_the_bare_key_of_a_certificate(ca: Authority) -> None:
    ca.issue()
    bare = (ca.place / f"user{ca.number}.pub").read_text()
    assert role_of(trusts(ca), ca.pub) == "unknown_key"
    assert role_of(trusts(ca), bare) == "unknown_key"


def test_certificate_is_not_admitted_by_a_plain_line_of_its_key_or_ca(ca: Authority) -> None:
    certificate = ca.issue()
    bare = (ca.place / f"user{ca.number}.pub").read_text().strip()
    assert role_of(f"{bare}\n{ca.pub}", certificate) == "unknown_key"


def test_certificate_of_an_unknown_ca_is_an_unknown_key(ca: Authority, tmp_path: Path) -> None:
    assert role_of(trusts(ca), Authority(tmp_path).issue()) == "unknown_key"


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_certificate_of_a_ca_of_another_kind_of_key_is_admitted(tmp_path: Path, kind: str) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    other = Authority(tmp_path, kind)
    assert role_of(trusts(other), other.issue()) == "operate"


def test_certificate_signed_with_sha1_is_refused(tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    old = Authority(tmp_path, "rsa")
    try:
        certificate = old.issue("-t", "ssh-rsa")
    except subprocess.CalledProcessError:
        pytest.skip("this ssh-keygen signs with SHA-1 no more")
    assert role_of(trusts(old), certificate) == "certificate"


@pytest.mark.parametrize(
    ("principals", "options", "outcome"),
    [
        ("op", (), "operate"),
        ("root,op", (), "operate"),
        ("root", (), "principal"),
        ("", (), "principal"),
        ("op", ('principals="ops,oncall"',), "principal"),
        ("oncall", ('principals="ops,oncall"',), "operate"),
        ("", ('principals="ops,oncall"',), "principal"),
        ("op", ('from="10.0.0.0/8"',), "operate"),
        ("op", ('from="!10.0.0.0/8,*"',), "from_address"),
        ("op", ('expiry-time="20200101"',), "key_expired"),
    ],
)
def test_certificate_is_judged_by_principals_and_by_the_options_of_its_line(
    ca: Authority, principals: str, options: tuple[str, ...], outcome: str
) -> None:
    assert role_of(trusts(ca, *options), ca.issue(principals=principals)) == outcome


@pytest.mark.parametrize(
    ("valid", "outcome"),
    [
        ("always:forever", "operate"),
        ("20200101:20210101", "key_expired"),
        ("20500101:20510101", "certificate"),
        ("20200101:20500101", "operate"),
    ],
)
def test_certificate_is_good_within_its_validity_only(ca: Authority, valid: str, outcome: str) -> None:
    assert role_of(trusts(ca), ca.issue(valid=valid)) == outcome


@pytest.mark.parametrize(
    ("args", "outcome"),
    [
        (("-O", "source-address=10.0.0.0/8"), "operate"),
        (("-O", "source-address=192.168.0.0/16"), "from_address"),
        (("-O", "force-command=/bin/true"), "certificate"),
        (("-O", "critical:made-up@example.com=x"), "certificate"),
        (("-O", "extension:made-up@example.com=x"), "operate"),
        (("-O", "clear"), "operate"),
    ],
)
def test_certificate_demands_are_enforced_or_it_is_refused(
    ca: Authority, args: tuple[str, ...], outcome: str
) -> None:
    assert role_of(trusts(ca), ca.issue(*args)) == outcome


def test_certificate_that_demands_user_verification_passes_it_on(ca: Authority) -> None:
    certificate = ca.issue("-O", "verify-required")
    operator = judge(parse(trusts(ca))[0], blob_of(certificate), None, NOW_MS)
    with pytest.raises(Refused) as caught:
        operator.check_presence(None)
    assert caught.value.code == "not_verified"


def test_host_certificate_is_refused(ca: Authority) -> None:
    assert role_of(trusts(ca), ca.issue("-h")) == "certificate"


def test_certificate_with_any_byte_altered_lets_nobody_in(ca: Authority) -> None:
    lines, _ = parse(trusts(ca))
    blob = blob_of(ca.issue())
    assert judge(lines, blob, None, NOW_MS).role == "operate"
    for at in range(len(blob)):
        altered = bytearray(blob)
        altered[at] ^= 0x01
        with pytest.raises(Refused):
            judge(lines, bytes(altered), None, NOW_MS)


def test_certificate_cut_short_or_made_longer_lets_nobody_in(ca: Authority) -> None:
    lines, _ = parse(trusts(ca))
    blob = blob_of(ca.issue())
    for broken in [*(blob[:n] for n in range(len(blob))), blob + b"\0"]:
        with pytest.raises(Refused):
            judge(lines, broken, None, NOW_MS)


@given(st.binary(max_size=200))
def test_key_and_certificate_of_garbage_raise_remote_error_only(blob: bytes) -> None:
    for kind in (b"", string(b"ssh-ed25519"), string(b"ssh-ed25519-cert-v01@openssh.com")):
        for shape in (PublicKey, Certificate):
            try:
                shape.parse(kind + blob)
            except RemoteError:
                pass


@needs_ssh_keygen
@pytest.mark.parametrize("args", [("rsa", "2048"), ("ecdsa", "256"), ("ecdsa", "521"), ("ed25519", "256")])
def test_fingerprint_is_that_of_ssh_keygen(tmp_path: Path, args: tuple[str, str]) -> None:
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", args[0], "-b", args[1], "-N", "", "-f", file], check=True)
    shown = subprocess.run(["ssh-keygen", "-lf", file], check=True, capture_output=True, text=True).stdout
    key = PublicKey.parse(blob_of(file.with_suffix(".pub").read_text()))
    assert shown.split()[1] == key.fingerprint
    assert key.type in KEY_TYPES


# -- the file ----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "authorized_operators"
    path.write_text(f'environment="QD_ROLE=operate" {KEY} anna\n')
    path.chmod(0o600)
    return path


def test_file_changed_is_read_again_within_a_second(file: Path) -> None:
    clock = Clock()
    operators = Operators(file, monotonic=clock)
    assert operators.lookup(KEY, None, NOW_MS) is not None
    file.write_text(f'environment="QD_ROLE=admin" {OTHER} bob\n')
    assert operators.lookup(KEY, None, NOW_MS) is not None
    clock.now += 1.0
    assert operators.lookup(KEY, None, NOW_MS) is None
    assert operators.judge(OTHER, None, NOW_MS).role == "admin"
    file.unlink()
    clock.now += 1.0
    assert operators.lookup(OTHER, None, NOW_MS) is None
    assert operators.missing


def test_file_is_looked_at_once_a_second_at_most(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    operators = Operators(file, monotonic=clock)
    looks = []
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **kw: (looks.append(self), real(self, **kw))[1])
    for _ in range(50):
        clock.now += 0.1
        operators.lookup(KEY, None, NOW_MS)
    assert 5 <= len(looks) <= 6


def test_problems_are_told_before_any_key_was_asked_for(file: Path) -> None:
    file.write_text(f'command="x" {KEY}\n')
    assert "not enforced" in Operators(file).problems[0]
    assert Operators(file.with_name("nothing")).missing


def test_missing_file_lets_nobody_in_and_is_told(tmp_path: Path) -> None:
    operators = Operators(tmp_path / "nothing")
    assert operators.lookup(KEY, None, NOW_MS) is None
    assert operators.missing
    assert "qd init" in operators.problems[0]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_can_write_lets_nobody_in_until_it_is_mended(file: Path, mode: int) -> None:
    clock = Clock()
    file.chmod(mode)
    operators = Operators(file, monotonic=clock)
    assert operators.lookup(KEY, None, NOW_MS) is None
    assert "others can write it" in operators.problems[0]
    file.chmod(0o644)
    clock.now += 1
    assert operators.lookup(KEY, None, NOW_MS) is not None
    assert operators.problems == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_lets_nobody_in(file: Path) -> None:
    os.chown(file, 12345, 12345)
    operators = Operators(file)
    assert operators.lookup(KEY, None, NOW_MS) is None
    assert "another user" in operators.problems[0]


def test_place_that_is_no_file_lets_nobody_in_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        operators = Operators(place)
        assert operators.lookup(KEY, None, NOW_MS) is None
        assert "regular file" in operators.problems[0]


def test_void_lines_are_named_with_the_file_and_the_rest_holds(file: Path) -> None:
    file.write_text(f'command="x" {OTHER}\n\xff\xfe\n{KEY}\n')
    operators = Operators(file)
    assert operators.lookup(KEY, None, NOW_MS) is not None
    assert operators.lookup(OTHER, None, NOW_MS) is None
    assert [p.split(":")[0] for p in operators.problems] == [f"{file} line 1", f"{file} line 2"]


def test_name_is_known_whether_or_not_the_key_is_let_in(ca: Authority, file: Path) -> None:
    file.write_text(f'expiry-time="20200101" {KEY} anna\n{trusts(ca)}\n')
    operators = Operators(file)
    assert operators.name_of(blob_of(KEY)) == "anna"
    assert operators.name_of(blob_of(OTHER)) is None
    assert operators.name_of(blob_of(ca.issue())) == "the-ca"
    assert operators.name_of(b"junk") is None
