"""Invitations: the token, the desk that gives it out once, and the home that joins with it."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from agent.admission import (
    OPEN_MAX,
    Admission,
    Bundle,
    Glance,
    Token,
    key_mark,
    packed_host,
    read_token,
    token_text,
)
from agent.chain import Journal
from agent.founding import (
    bundle_of,
    found_mesh,
    holds_already,
    join_mesh,
    operator_lines,
    read_seeds,
    with_operators,
)
from agent.home import Home, read_identity, read_secret
from agent.keyring import Kept, KeyFile, begin, moved, pack, switch
from agent.operators import parse
from discovery.errors import LocalError, Refused
from discovery.identity import Identity, openssh_line

HOST = Identity.from_seed(bytes(32))
NOW_MS = 1_800_000_000_000
FROM = ("192.0.2.7", 50_000)
ADDRS = [("192.0.2.1", 7420), ("2001:db8::1", 7420), ("node.example", 9)]


def token(**change: Any) -> Token:
    hosts = [(packed_host(host), port) for host, port in ADDRS]
    return msgspec.structs.replace(
        Token("alpha", HOST.pub, bytes(range(16)), NOW_MS // 1000, hosts), **change
    )


# --- tokens


def test_token_is_one_word_that_says_it_all() -> None:
    word = token_text(token())
    assert word.isascii() and word.replace("_", "").isalnum() and len(word) < 300
    assert read_token(word) == token()
    assert read_token(word).addrs == ADDRS


def test_token_survives_capitals_and_line_breaks() -> None:
    word = token_text(token())
    assert read_token(f"  {word[:40].upper()}\n  {word[40:]}\n") == token()


def test_token_with_any_letter_mistyped_is_told_so() -> None:
    word = token_text(token())
    for at in range(len("qd1_"), len(word)):
        other = word[:at] + ("a" if word[at] != "a" else "b") + word[at + 1 :]
        with pytest.raises(LocalError, match=r"mistyped|version"):
            read_token(other)


@pytest.mark.parametrize("word", ["", "qd1_", "qd1_!", "qd1_aaaa", "hello", "qd1_" + "a" * 5000, "qd2_aaaa"])
def test_text_that_is_no_token_is_told_so(word: str) -> None:
    with pytest.raises(LocalError, match="copy the whole word"):
        read_token(word)


def test_token_cut_short_is_told_so() -> None:
    word = token_text(token())
    for size in range(len(word)):
        with pytest.raises(LocalError):
            read_token(word[:size])


def test_token_of_a_name_that_is_no_mesh_is_refused() -> None:
    with pytest.raises(LocalError, match="version"):
        read_token(token_text(token(mesh="../../etc")))


def test_key_of_a_token_hangs_on_secret_mesh_and_host() -> None:
    keys = {
        token().key().pub,
        token(secret=bytes(16)).key().pub,
        token(mesh="beta").key().pub,
        token(host_pub=bytes(32)).key().pub,
    }
    assert len(keys) == 4
    assert token().key().pub == token(expires_s=1).key().pub


# --- the desk


class Desk:
    """An agent's desk with a journal of its own, and a clock for each kind of time."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.wall_ms = NOW_MS
        self.now = 1000.0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.bundle = Bundle(ring=b"r", identity=b"i", backbone=None, operators=[], seeds=[])
        self.start()

    def start(self) -> None:
        self.journal = Journal(self.place / "journal.db", HOST)
        self.desk = Admission(
            mesh="alpha",
            host_pub=HOST.pub,
            facts=self.journal,
            addrs=lambda: ADDRS,
            glance=lambda: {
                "mesh": "alpha",
                "node": "a",
                "mesh_pub": bytes(32),
                "ring": (0, b""),
                "backbone": None,
            },
            bundle=lambda: self.bundle,
            emit=lambda kind, **fields: self.events.append((kind, fields)),
            wall=lambda: self.wall_ms,
            monotonic=lambda: self.now,
        )

    def restart(self) -> None:
        self.journal.close()
        self.start()

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.wall_ms += round(seconds * 1000)

    def invite(self, ttl_ms: int = 600_000) -> bytes:
        """The public key of a new invitation."""
        return read_token(self.desk.invite(ttl_ms, "anna")["token"]).key().pub

    def refused(self, pub: bytes) -> str:
        with pytest.raises(Refused) as caught:
            self.desk.redeem(pub, FROM)
        return caught.value.code

    @property
    def told(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.events)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_invitation_is_good_once(desk: Desk) -> None:
    pub = desk.invite()
    assert desk.desk.admits(pub, FROM)
    assert desk.desk.glance(pub).state == "open"
    assert desk.desk.redeem(pub, FROM) == desk.bundle
    assert desk.desk.admits(pub, FROM), "it may still come in, to be told"
    assert desk.desk.glance(pub).state == "used"
    assert desk.refused(pub) == "invitation_used"
    assert desk.told == {"admission.invited": 1, "admission.joined": 1, "admission.refused": 1}
    assert desk.desk.counters == {"invitation_used": 1}


def test_second_use_is_told_when_and_from_where_it_was_used(desk: Desk) -> None:
    pub = desk.invite()
    desk.desk.redeem(pub, FROM)
    desk.pass_s(180)
    with pytest.raises(Refused, match=r"used 3 min ago from 192\.0\.2\.7"):
        desk.desk.redeem(pub, FROM)


def test_invitation_expires_by_the_agents_clock(desk: Desk) -> None:
    pub = desk.invite(60_000)
    desk.pass_s(59.9)
    assert desk.desk.glance(pub).state == "open"
    desk.pass_s(0.2)
    assert desk.desk.glance(pub).state == "expired"
    assert desk.refused(pub) == "invitation_expired"


def test_clock_that_is_set_while_the_agent_runs_moves_no_expiry(desk: Desk) -> None:
    pub = desk.invite(60_000)
    desk.wall_ms += 3_600_000
    assert desk.desk.glance(pub).state == "open"
    desk.wall_ms -= 7_200_000
    desk.now += 61
    assert desk.refused(pub) == "invitation_expired"


def test_unknown_invitation_does_not_come_in_and_is_counted(desk: Desk) -> None:
    for n in range(50):
        assert not desk.desk.admits(bytes([n]) * 32, FROM)
    assert desk.desk.counters == {"invitation_unknown": 50}
    assert desk.told["admission.refused"] == 10, "told at most ten times a minute"
    assert desk.refused(bytes(32)) == "invitation_unknown"


def test_invitations_outlive_a_restart(desk: Desk) -> None:
    fresh, used, short = desk.invite(), desk.invite(), desk.invite(60_000)
    desk.desk.redeem(used, FROM)
    desk.pass_s(61)
    desk.restart()
    assert desk.refused(used) == "invitation_used"
    assert desk.refused(short) == "invitation_expired"
    assert desk.desk.redeem(fresh, FROM) == desk.bundle
    desk.restart()
    assert desk.refused(fresh) == "invitation_used"


def test_restart_with_the_clock_set_back_gives_no_more_than_the_whole_time(desk: Desk) -> None:
    pub = desk.invite(60_000)
    desk.wall_ms -= 3_600_000
    desk.restart()
    desk.now += 61
    assert desk.refused(pub) == "invitation_expired"


def test_journal_holds_nothing_that_admits(desk: Desk) -> None:
    given = read_token(desk.desk.invite(600_000, "anna")["token"])
    desk.journal.close()
    kept = b"".join(path.read_bytes() for path in desk.place.iterdir())
    for secret in (given.secret, given.secret.hex().encode(), base64.b64encode(given.secret)):
        assert secret not in kept
    assert base64.b64encode(given.key().pub) in kept


def test_invitation_that_cannot_be_marked_as_used_stays_good(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pub = desk.invite()

    def full(*args: Any, **kwargs: Any) -> None:
        raise Refused("journal_full", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(desk.journal, "set", full)
        assert desk.refused(pub) == "journal_full"
    assert desk.desk.redeem(pub, FROM) == desk.bundle


def test_only_so_many_invitations_are_open(desk: Desk) -> None:
    pubs = [desk.invite() for _ in range(OPEN_MAX)]
    with pytest.raises(Refused) as caught:
        desk.invite()
    assert caught.value.code == "too_many_invitations"
    desk.desk.redeem(pubs[0], FROM)
    desk.invite()
    desk.pass_s(601)
    assert desk.desk.open == 0
    assert desk.desk.invite(1000, "anna")["open"] == 1


@pytest.mark.parametrize("ttl_ms", [0, 999, 24 * 3600 * 1000 + 1, -5])
def test_invitation_for_too_short_or_too_long_is_refused(desk: Desk, ttl_ms: int) -> None:
    with pytest.raises(Refused) as caught:
        desk.invite(ttl_ms)
    assert caught.value.code == "bad_ttl"


def test_spent_invitations_are_forgotten_after_a_day(desk: Desk) -> None:
    pub = desk.invite(60_000)
    desk.pass_s(24 * 3600 + 61)
    desk.invite()
    assert desk.refused(pub) == "invitation_unknown"


def test_only_admins_and_the_home_may_invite(desk: Desk) -> None:
    def ask(kind: str, role: str | None) -> Any:
        link: Any = SimpleNamespace(login=SimpleNamespace(kind=kind, role=role, fingerprint="SHA256:x"))
        return asyncio.run(desk.desk.serve_invite(link, {"ttl_ms": 1000}))

    for role in ("operate", "observe"):
        with pytest.raises(Refused) as caught:
            ask("op", role)
        assert caught.value.code == "role"
    assert ask("op", "admin")["open"] == 1
    assert ask("home", None)["open"] == 2


# --- the home that joins


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Home, Home]:
    one, other = Home.open(tmp_path / "one"), Home.open(tmp_path / "other")
    found_mesh(one, "alpha")
    return one, other


def ring_of(home: Home, mesh: str = "alpha") -> Kept:
    return KeyFile(home.mesh_key_file(mesh), mesh).read(NOW_MS)


def bundle(home: Home, mesh: str = "alpha") -> Bundle:
    identity = read_identity(home.mesh_identity_file(mesh), "key")
    return bundle_of(home, mesh, pack(ring_of(home, mesh), identity.sign, NOW_MS), [("192.0.2.9", 7420)])


def glance(home: Home, mesh: str = "alpha") -> Glance:
    return Glance(
        mesh=mesh,
        node="a",
        mesh_pub=read_identity(home.mesh_identity_file(mesh), "key").pub,
        ring=ring_of(home, mesh).ring.order,
        backbone=key_mark(read_secret(home.backbone_key_file, "key")),
        wall_ms=NOW_MS,
        state="open",
    )


def rotated(home: Home) -> None:
    kept = ring_of(home)
    for step in (lambda r: begin(r, bytes([7]) * 32, 60_000), switch):
        kept = moved(kept, step(kept.ring), NOW_MS)
    KeyFile(home.mesh_key_file("alpha"), "alpha").advance(kept, NOW_MS)


def test_home_that_joins_holds_what_the_inviter_holds(homes: tuple[Home, Home]) -> None:
    one, other = homes
    assert holds_already(other, glance(one)) is False
    joining = join_mesh(other, "alpha", bundle(one), [("192.0.2.1", 7420)])
    assert joining.created and joining.operators_added == 1 and joining.operators_had == 0
    assert ring_of(other) == ring_of(one)
    assert glance(other) == glance(one), "the same keys"
    assert read_seeds(other, "alpha") == [("192.0.2.1", 7420), ("192.0.2.9", 7420)]
    secrets = [p for p in other.config.rglob("*") if p.is_file() and p.suffix != ".pub"]
    assert all(p.stat().st_mode & 0o077 == 0 for p in secrets)
    assert holds_already(other, glance(one)) is True


def test_home_that_joins_has_operators_of_both_and_keys_of_its_own(homes: tuple[Home, Home]) -> None:
    one, other = homes
    join_mesh(other, "alpha", bundle(one), [])
    listed = {line.key.parts[0]: line.role for line in parse(other.operators_file.read_text())[0]}
    keys = [read_identity(home.operator_key_file, "key").pub for home in (one, other)]
    assert keys[0] != keys[1] and listed == dict.fromkeys(keys, "admin")
    assert len(parse(one.operators_file.read_text())[0]) == 1, "and nothing came to the inviter"
    assert read_identity(one.client_key_file, "key").pub != read_identity(other.client_key_file, "key").pub


def test_joining_again_changes_nothing(homes: tuple[Home, Home]) -> None:
    one, other = homes
    join_mesh(other, "alpha", bundle(one), [("192.0.2.1", 7420)])
    before = {p: p.read_bytes() for p in other.config.rglob("*") if p.is_file()}
    joining = join_mesh(other, "alpha", bundle(one), [("192.0.2.1", 7420)])
    assert not joining.created and not joining.made and not joining.changed
    assert (joining.operators_added, joining.operators_had) == (0, 1)
    assert {p: p.read_bytes() for p in other.config.rglob("*") if p.is_file()} == before


def test_home_that_was_away_during_a_rotation_joins_anew(homes: tuple[Home, Home]) -> None:
    one, other = homes
    join_mesh(other, "alpha", bundle(one), [])
    rotated(one)
    assert holds_already(other, glance(one)) is False
    joining = join_mesh(other, "alpha", bundle(one), [])
    assert not joining.created and joining.changed == (other.mesh_key_file("alpha"),)
    assert ring_of(other).ring.order == ring_of(one).ring.order


def test_home_with_another_mesh_of_that_name_is_refused(homes: tuple[Home, Home]) -> None:
    one, other = homes
    found_mesh(other, "alpha")
    with pytest.raises(Refused, match="another mesh of that name") as caught:
        holds_already(other, glance(one))
    assert caught.value.code == "other_mesh"


def test_home_with_a_newer_key_is_refused(homes: tuple[Home, Home]) -> None:
    one, other = homes
    join_mesh(other, "alpha", bundle(one), [])
    rotated(other)
    with pytest.raises(Refused) as caught:
        holds_already(other, glance(one))
    assert caught.value.code == "other_key"


def test_backbone_of_a_home_with_other_meshes_is_not_replaced(homes: tuple[Home, Home]) -> None:
    one, other = homes
    found_mesh(other, "beta")
    with pytest.raises(Refused, match="beta") as caught:
        holds_already(other, glance(one))
    assert caught.value.code == "other_backbone"


def test_backbone_key_that_no_mesh_uses_is_replaced(homes: tuple[Home, Home]) -> None:
    one, other = homes
    found_mesh(other, "beta")
    for path in other.mesh_dir("beta").iterdir():
        path.unlink()
    assert holds_already(other, glance(one)) is False
    joining = join_mesh(other, "alpha", bundle(one), [])
    assert other.backbone_key_file in joining.changed
    assert other.backbone_key_file.read_bytes() == one.backbone_key_file.read_bytes()


def test_ring_that_the_identity_did_not_sign_leaves_the_home_without_the_mesh(
    homes: tuple[Home, Home],
) -> None:
    one, other = homes
    forged = msgspec.structs.replace(bundle(one), ring=pack(ring_of(one), Identity.generate().sign, NOW_MS))
    with pytest.raises(Refused):
        join_mesh(other, "alpha", forged, [])
    assert other.meshes() == []


# --- operators that come along


ANNA, BERT = (openssh_line(Identity.from_seed(bytes([n]) * 32).pub) for n in (5, 6))


def test_void_lines_and_comments_of_operators_stay_behind(tmp_path: Path) -> None:
    path = tmp_path / "authorized_operators"
    good = f'cert-authority,expiry-time="20990101",environment="QD_ROLE=admin" {ANNA} the ca'
    path.write_text(f'# who\n{good}\ncommand="x" {BERT}\nnonsense\n')
    assert operator_lines(path) == [good]
    assert operator_lines(tmp_path / "nowhere") == []


def test_operator_that_is_listed_keeps_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "authorized_operators"
    mine = f'environment="QD_ROLE=observe" {ANNA} anna'
    path.write_text(mine)
    text, added, had = with_operators(
        path, [f'environment="QD_ROLE=admin" {ANNA} anna', f"{BERT} bert", f"cert-authority {ANNA}"], "x"
    )
    assert (added, had) == (2, 1)
    lines, problems = parse(text)
    assert not problems
    assert [(line.role, line.authority) for line in lines] == [
        ("observe", False),
        ("observe", False),
        ("observe", True),
    ]
    assert text.startswith(mine + "\n")
