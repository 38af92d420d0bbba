"""The admin chain as every node folds it: one state of one set of records, whatever way they came."""

from __future__ import annotations

import hashlib
import random
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chain.adminfold import FOLD_VERSION, AdminFold, Checkpoint, Judge
from agent.chain.adminop import OP, OWN, RESULT, AdminEvent, own_body, result_body
from agent.chain.adminstate import AdminState, Cut, genesis_roster, grant_of
from agent.chain.hlc import FUTURE_MAX_MS, Position, Stamp
from discovery.errors import LocalError
from discovery.identity import Identity, id_text
from tests.agent.chains import (
    ANNA,
    BERT,
    CARL,
    GENESIS,
    NODES,
    NOW_MS,
    body_of,
    event,
    fingerprint,
    line,
    mesh_op,
    node_op,
)

A, B, C = NODES[:3]
LATER = NOW_MS + 3_600_000


def place(event_: AdminEvent) -> list[object]:
    """A position as a revocation names it."""
    wall_ms, counter, node, number = event_.position
    return [wall_ms, counter, id_text(node), number]


def drain(number: int, after_ms: int, signer: Identity = ANNA, target: Identity = C, commits: Identity = A):
    message = node_op("drain", number, target, NOW_MS + after_ms)
    return event(commits, number, Stamp(NOW_MS + after_ms, 0), body_of(message, signer))


def revoke(
    number: int, after_ms: int, whom: Identity, last=None, signer: Identity = ANNA, commits: Identity = A
):
    args = {"fingerprint": fingerprint(whom), "last": last}
    message = mesh_op("revoke_operator", args, number, commits, NOW_MS + after_ms)
    return event(commits, number, Stamp(NOW_MS + after_ms, 0), body_of(message, signer))


def grant(number: int, after_ms: int, text: str, signer: Identity = ANNA, commits: Identity = A):
    message = mesh_op("grant_operator", {"line": text}, number, commits, NOW_MS + after_ms)
    return event(commits, number, Stamp(NOW_MS + after_ms, 0), body_of(message, signer))


def folded(events, now_ms: int = LATER, **options) -> AdminFold:
    fold = AdminFold(GENESIS, **options)
    fold.add(events)
    fold.advance(now_ms)
    return fold


def verdicts(fold: AdminFold) -> list[str | None]:
    return [verdict and verdict.partition(":")[0] for _, verdict in fold.judged()]


def test_desired_state_of_a_node_follows_the_ops_in_their_order() -> None:
    def op(verb: str, number: int, **more):
        message = node_op(verb, number, C, NOW_MS + number, **more)
        return event(C, number, Stamp(NOW_MS + number, 0), body_of(message, ANNA, "anna"))

    events = [
        op("cordon", 1),
        op("drain", 2, deadline_ms=9000),
        op("maintenance_enter", 3, deadline_ms=60_000),
    ]
    want = folded(events).state.desired(id_text(C.id))
    assert want.cordoned and want.drain is not None and want.maintenance
    assert (want.drain.deadline_ms, want.drain.by, want.maintenance_deadline_ms) == (9000, "anna", 60_000)
    want = folded([*events, op("resume", 4), op("maintenance_exit", 5)]).state.desired(id_text(C.id))
    assert want.cordoned and want.drain is None and not want.maintenance
    assert not folded([*events, op("uncordon", 6)]).state.desired(id_text(C.id)).cordoned
    assert folded([]).state.desired(id_text(C.id)).maintenance_state == "active"


def test_node_tells_how_far_its_own_maintenance_is_and_nothing_of_others() -> None:
    body = own_body("maintenance", state="drain_failed", reason="2 replicas left")
    own = event(C, 1, Stamp(NOW_MS, 0), body, OWN)
    odd = event(B, 1, Stamp(NOW_MS, 0), own_body("cordon", target=id_text(C.id)), OWN)
    fold = folded([own, odd])
    assert fold.state.desired(id_text(C.id)).maintenance_state == "drain_failed"
    assert fold.state.desired(id_text(C.id)).maintenance_reason == "2 replicas left"
    assert sorted(map(str, verdicts(fold))) == ["None", "malformed"]
    assert id_text(B.id) not in fold.state.nodes


def test_spec_of_the_latest_position_is_in_force_whatever_came_last() -> None:
    def spec(content: bytes, number: int, commits: Identity) -> AdminEvent:
        args = {"sha256": hashlib.sha256(content).hexdigest()}
        message = mesh_op("apply", args, number, commits, NOW_MS + number)
        body = body_of(message, ANNA, content=content)
        return event(commits, number, Stamp(NOW_MS + number, 0), body)

    first, second = spec(b"one", 1, A), spec(b"two", 2, B)
    fold = folded([second])
    fold.add([first])
    state = fold.advance(LATER)
    assert state.spec is not None and state.spec.sha256 == hashlib.sha256(b"two").hexdigest()
    altered = body_of(
        mesh_op("apply", {"sha256": hashlib.sha256(b"three").hexdigest()}, 3, A, NOW_MS + 3),
        ANNA,
        content=b"four",
    )
    fold.add([event(A, 3, Stamp(NOW_MS + 3, 0), altered)])
    assert fold.advance(LATER).spec == state.spec
    assert verdicts(fold)[-1] == "malformed"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: drain(1, 0, CARL), "unknown_key"),
        (lambda: event(A, 1, Stamp(NOW_MS + 200_000, 0), body_of(node_op("drain", 1, C), ANNA)), "expired"),
        (lambda: event(A, 1, Stamp(NOW_MS - 100_000, 0), body_of(node_op("drain", 1, C), ANNA)), "not_yet"),
        (lambda: grant(1, 0, "not a key"), "bad_line"),
        (
            lambda: event(
                B,
                1,
                Stamp(NOW_MS, 0),
                body_of(mesh_op("grant_operator", {"line": line(CARL, "c")}, 1, A), ANNA),
            ),
            "wrong_target",
        ),
        (
            lambda: event(
                A,
                1,
                Stamp(NOW_MS, 0),
                body_of(mesh_op("grant_operator", {"line": line(CARL, "c")}, 1, A, mesh="beta"), ANNA),
            ),
            "wrong_mesh",
        ),
        (
            lambda: event(A, 1, Stamp(NOW_MS, 0), {**body_of(node_op("drain", 1, C), ANNA), "verb": "kill"}),
            "malformed",
        ),
        (
            lambda: event(
                A, 1, Stamp(NOW_MS, 0), {**body_of(node_op("drain", 1, C), ANNA), "message": b'{"v":1}'}
            ),
            "bad_signature",
        ),
        (lambda: event(A, 1, Stamp(NOW_MS, 0), {"x": 1}), "malformed"),
        (lambda: event(A, 1, Stamp(NOW_MS, 0), {}, "admin.other"), "unsupported"),
    ],
)
def test_record_that_must_not_count_is_void_with_its_reason(make, code: str) -> None:
    fold = folded([make()])
    assert verdicts(fold) == [code]
    assert fold.state == folded([]).state


def test_op_that_its_own_host_let_in_counts_there_and_nowhere_else() -> None:
    there = drain(1, 0, CARL, target=C, commits=C)
    elsewhere = drain(2, 1, CARL, target=B, commits=C)
    fold = folded([there, elsewhere])
    assert verdicts(fold) == [None, "unknown_key"]
    assert fold.state.desired(id_text(C.id)).drain is not None


def test_granted_operator_counts_from_the_grant_on_with_its_role() -> None:
    operate = line(CARL, "carl", "operate")
    fold = folded(
        [drain(1, 1, CARL), grant(2, 5, operate), drain(3, 9, CARL), grant(4, 10, line(C, "x"), CARL)]
    )
    assert verdicts(fold) == ["unknown_key", None, None, "role"]
    assert fold.state.roster[fingerprint(CARL)].by == fingerprint(ANNA)


def test_revocation_voids_what_lies_beyond_the_record_it_names_even_before_itself() -> None:
    seen, unseen = drain(1, 10, BERT, target=B), drain(1, 20, BERT, target=C, commits=B)
    cut = revoke(2, 50, BERT, place(seen))
    after = drain(2, 60, BERT, target=A, commits=B)
    for order in ([seen, unseen, cut, after], [after, cut, unseen, seen], [seen, cut, after, unseen]):
        fold = AdminFold(GENESIS)
        for each in order:
            fold.add([each])
            fold.advance(LATER)
        assert verdicts(fold) == [None, "revoked", None, "revoked"]
        assert set(fold.state.nodes) == {id_text(B.id)}
        assert fingerprint(BERT) not in fold.state.roster


def test_revocation_takes_back_what_the_key_had_granted_beyond_the_cut() -> None:
    granted = grant(1, 10, line(CARL, "carl"), BERT)
    used = drain(2, 20, CARL)
    fold = folded([granted, used])
    assert verdicts(fold) == [None, None]
    fold.add([revoke(1, 30, BERT, [NOW_MS, 0, "0" * 16, 0], commits=B)])
    fold.advance(LATER)
    assert verdicts(fold) == ["revoked", "unknown_key", None]


def test_revoked_key_cannot_be_granted_again_and_the_last_admin_stays() -> None:
    fold = folded([revoke(1, 1, BERT), grant(2, 2, line(BERT, "bert")), revoke(3, 3, ANNA), drain(4, 4)])
    assert verdicts(fold) == [None, "revoked_key", "last_admin", None]


def test_of_two_operators_that_revoke_each_other_the_first_wins_everywhere() -> None:
    first = revoke(1, 10, ANNA, [NOW_MS, 0, "0" * 16, 0], BERT, A)
    second = revoke(1, 20, BERT, [NOW_MS, 0, "0" * 16, 0], ANNA, B)
    one, other = folded([first, second]), AdminFold(GENESIS)
    for each in (second, first):
        other.add([each])
        other.advance(LATER)
    assert one.state == other.state
    assert verdicts(one) == verdicts(other) == [None, "revoked"]


def test_late_revocation_of_whoever_revoked_its_author_comes_first_all_the_same() -> None:
    nothing = [NOW_MS, 0, "0" * 16, 0]
    used = [drain(n, n * 10, BERT, NODES[n % 5]) for n in range(1, 5)]
    later = revoke(5, 50, BERT, nothing, ANNA)
    late = revoke(1, 25, ANNA, nothing, BERT, B)
    fold = folded([*used, later], checkpoint_every=1)
    assert verdicts(fold) == ["revoked"] * 4 + [None]
    fold.add([late])
    assert fold.advance(LATER) == folded([*used, late, later], checkpoint_every=99).state
    assert verdicts(fold) == [None] * 5 + ["revoked"]


def test_key_that_revokes_itself_is_in_the_roster_no_more_whatever_it_makes_void() -> None:
    kept, gone = drain(1, 10, BERT, B), drain(2, 20, BERT, C)
    for last, told in ((place(kept), [None, "revoked", None]), (place(gone), [None, None, None])):
        fold = folded([kept, gone, revoke(3, 30, BERT, last, BERT)])
        assert verdicts(fold) == told
        assert fingerprint(BERT) not in fold.state.roster and fingerprint(BERT) in fold.state.cuts


def test_forked_feed_counts_up_to_the_fork_and_is_shown() -> None:
    events = [drain(1, 1, target=B), drain(2, 2, target=C), drain(3, 3, target=A)]
    fold = folded(events)
    fold.fork(A.id, 2)
    state = fold.advance(LATER)
    assert set(state.nodes) == {id_text(B.id)}
    assert verdicts(fold) == [None, "forked", "forked"]
    assert state.forks == {A.id: 2}
    fold.fork(A.id, 3)
    assert fold.advance(LATER).forks == {A.id: 2}


def test_same_op_committed_by_two_nodes_counts_once() -> None:
    message = node_op("kill", 1, C)
    fold = folded([event(n, 1, Stamp(NOW_MS + i, 0), body_of(message, ANNA)) for i, n in enumerate((A, B))])
    assert verdicts(fold) == [None, "op_id_reused"]


def test_record_too_far_ahead_is_held_until_its_time_comes() -> None:
    year_ms = 365 * 86_400_000
    message = node_op("cordon", 7, C, NOW_MS + year_ms)
    early = event(B, 1, Stamp(NOW_MS + year_ms, 0), body_of(message, ANNA))
    fold = AdminFold(GENESIS)
    fold.add([early, drain(1, 0)])
    assert not fold.advance(NOW_MS).desired(id_text(C.id)).cordoned
    assert verdicts(fold) == [None, "ahead"]
    assert not fold.advance(NOW_MS + year_ms - FUTURE_MAX_MS - 1).desired(id_text(C.id)).cordoned
    assert fold.advance(NOW_MS + year_ms - FUTURE_MAX_MS).desired(id_text(C.id)).cordoned


def test_commit_is_refused_for_the_reason_for_which_it_would_be_void() -> None:
    fold = folded([])
    assert fold.refusal(drain(1, 0), NOW_MS) is None
    unknown = fold.refusal(drain(1, 0, CARL), NOW_MS)
    assert unknown is not None and unknown.code == "unknown_key" and "roster" in unknown.sentence
    year_ms = 365 * 86_400_000
    message = node_op("cordon", 7, C, NOW_MS + year_ms)
    early = fold.refusal(event(C, 1, Stamp(NOW_MS, 0), body_of(message, ANNA)), NOW_MS)
    assert early is not None and early.code == "not_yet" and "ahead" in early.sentence
    assert fold.state == folded([]).state


def test_grant_line_that_means_another_moment_on_each_host_is_refused() -> None:
    with pytest.raises(LocalError, match="no Z"):
        grant_of(f'expiry-time="20270101" {ANNA.pub_openssh("anna")}')
    assert grant_of(f'expiry-time="20270101Z" {ANNA.pub_openssh("anna")}')[0].role == "observe"
    assert list(genesis_roster("# who\n\n" + GENESIS[0])) == [fingerprint(ANNA)]


def test_last_record_of_a_key_is_what_a_revocation_would_name() -> None:
    one, two = drain(1, 1, BERT), drain(2, 2, BERT, target=B)
    fold = folded([one, two, drain(3, 3)])
    assert fold.last_of(fingerprint(BERT)) == two.position
    assert fold.last_of(fingerprint(CARL)) is None


# -- any order, any delay, any repetition -----------------------------------------------------


Made = tuple[Identity, int, Stamp, dict[str, Any], str]


@cache
def history(seed: int) -> tuple[AdminEvent, ...]:
    return tuple(event(*made) for made in lively(seed))


@cache
def lively(seed: int) -> tuple[Made, ...]:
    """A lively mesh: three operators on three nodes, with grants, revocations that reach back, and what is void. Of
    each record who committed it, its number, stamp, body and kind."""
    dice = random.Random(seed)
    people = [ANNA, BERT, CARL]
    numbers = dict.fromkeys((A.id, B.id, C.id), 0)
    made: list[Made] = []
    events: list[AdminEvent] = []
    for n in range(1, 41):
        commits = dice.choice((A, B, C))
        signer = dice.choice(people)
        numbers[commits.id] += 1
        number, at_ms = numbers[commits.id], NOW_MS + dice.randrange(40) * 10
        kind = dice.random()
        if kind < 0.12:
            last = place(dice.choice(events)) if events and dice.random() < 0.7 else None
            args = {"fingerprint": fingerprint(dice.choice(people)), "last": last}
            message = mesh_op("revoke_operator", args, n, commits, at_ms)
        elif kind < 0.3:
            args = {"line": line(dice.choice(people), "x", dice.choice(("admin", "operate")))}
            message = mesh_op("grant_operator", args, n, commits, at_ms)
        elif kind < 0.36:
            said = own_body("maintenance", state=dice.choice(("maintenance", "recovery")))
            made.append((commits, number, Stamp(at_ms, 0), said, OWN))
            events.append(event(*made[-1]))
            continue
        elif kind < 0.4:
            told = result_body("0" * 26, "drain", "done", None)
            made.append((commits, number, Stamp(at_ms, 0), told, RESULT))
            events.append(event(*made[-1]))
            continue
        else:
            verb = dice.choice(("cordon", "uncordon", "drain", "resume", "kill", "restart_daemons"))
            message = node_op(verb, n - dice.randrange(2), dice.choice((A, B, C)), at_ms)
        stamp = Stamp(at_ms + dice.choice((0, 0, 0, 500, 200_000)), dice.randrange(3))
        made.append((commits, number, stamp, body_of(message, signer), OP))
        events.append(event(*made[-1]))
    return tuple(made)


@cache
def scratch(seed: int, fork: tuple[int, int] | None) -> tuple[AdminState, list[tuple[bytes, str | None]]]:
    """By the rule itself: all records in order, and from the beginning again with each cut that is made."""
    events = sorted(history(seed), key=lambda e: (e.position, e.digest))
    forks = dict([fork]) if fork else {}
    cuts: dict[str, Cut] = {}
    while True:
        judge = Judge(GENESIS, cuts, forks)
        verdicts = []
        for each in events:
            verdicts.append((each.digest, judge.fold(each)))
            if judge.state.cuts != cuts:
                break
        else:
            now = judge.state
            return AdminState(now.nodes, now.roster, now.cuts, now.spec, forks), verdicts
        cuts = dict(judge.state.cuts)


@settings(max_examples=90, deadline=None)
@given(
    seed=st.integers(0, 24),
    order=st.randoms(use_true_random=False),
    every=st.integers(1, 9),
    forked=st.booleans(),
)
def test_any_order_and_delay_gives_the_same_state_and_verdicts(
    seed: int, order: random.Random, every: int, forked: bool
) -> None:
    fork = (B.id, 4) if forked else None
    events = list(history(seed))
    order.shuffle(events)
    fold = AdminFold(GENESIS, checkpoint_every=every)
    forked_at = order.randrange(len(events)) if fork else -1
    for at, each in enumerate(events):
        fold.add([each])
        if at == forked_at:
            assert fork is not None
            fold.fork(*fork)
        if order.random() < 0.4:
            fold.advance(LATER)
    state = fold.advance(LATER)
    assert not fold.behind
    assert (state, [(e.digest, verdict) for e, verdict in fold.judged()]) == scratch(seed, fork)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 24),
    order=st.randoms(use_true_random=False),
    every=st.integers(1, 9),
    keep=st.integers(0, 12),
    forked=st.booleans(),
)
def test_fold_that_holds_few_events_gives_the_same_state_or_says_that_it_is_behind(
    seed: int, order: random.Random, every: int, keep: int, forked: bool
) -> None:
    fork = (B.id, 4) if forked else None
    events = sorted(history(seed), key=lambda e: (e.position, e.digest))
    for _ in range(order.randrange(3)):
        events.append(events.pop(order.randrange(len(events))))
    fold = AdminFold(GENESIS, checkpoint_every=every)
    checkpoints: list[tuple[Checkpoint, list[AdminEvent]]] = []
    forked_at = order.randrange(len(events)) if fork else -1
    for at, each in enumerate(events):
        fold.add([each])
        if at == forked_at:
            assert fork is not None
            fold.fork(*fork)
        fold.advance(LATER)
        fold.trim(keep)
        if (checkpoint := fold.checkpoint()) is not None:
            checkpoint = msgspec.msgpack.decode(msgspec.msgpack.encode(checkpoint), type=Checkpoint)
            before = [e for e in events[: at + 1] if e.position <= checkpoint.end]
            assert checkpoint.count == len(before)
            checkpoints.append((checkpoint, before))
    wanted, _ = scratch(seed, fork)
    if not fold.behind:
        assert fold.state == wanted
    forks = dict([fork]) if fork else {}
    for checkpoint, before in checkpoints:
        if len(before) == sum(e.position <= checkpoint.end for e in events):
            assert resumed(checkpoint, events, forks) in (None, wanted)


def resumed(checkpoint: Checkpoint, events: list[AdminEvent], forks: dict[int, int]) -> AdminState | None:
    """The state of all events, folded on from a checkpoint; None where the checkpoint can't serve for that."""
    cuts: dict[str, Cut] = {}
    while checkpoint.fits(cuts, forks):
        fold = AdminFold(GENESIS, base=checkpoint, cuts=cuts, forks=forks, checkpoint_every=3)
        for each in sorted(events, key=lambda e: e.position):
            if each.position > checkpoint.end:
                fold.add([each])
                fold.advance(LATER)
                fold.trim(4)
        if not fold.behind:
            return fold.state
        cuts = fold.state.cuts
    return None


def test_same_records_come_to_the_same_state_as_ever() -> None:
    """Where this fails, the fold has changed: FOLD_VERSION goes up, and this with it."""
    states = [scratch(seed, fork)[0] for seed in range(25) for fork in (None, (B.id, 4))]
    told = [(now.nodes, now.roster, now.cuts, now.spec) for now in states]
    packed = msgspec.msgpack.encode([FOLD_VERSION, told], order="deterministic")
    assert hashlib.sha256(packed).hexdigest()[:16] == "ff2ad67db3187c78"


def test_histories_of_the_property_hold_revocations_that_reach_back_and_every_kind_of_void() -> None:
    codes = [
        verdict and verdict.partition(":")[0] for seed in range(25) for _, verdict in scratch(seed, None)[1]
    ]
    assert {
        None,
        "revoked",
        "unknown_key",
        "role",
        "op_id_reused",
        "expired",
        "revoked_key",
        "last_admin",
    } <= set(codes)


def test_late_record_is_folded_from_a_checkpoint_and_not_from_the_beginning() -> None:
    events = [drain(n, 10 * n, target=NODES[n % 5]) for n in range(1, 401)]
    late = drain(1, 3955, target=B, commits=B)
    fold = folded(events, checkpoint_every=32)
    fold.add([late])
    assert fold.advance(LATER) == folded([*events, late], checkpoint_every=10_000).state
    assert 0 < fold.refolded <= 64


def test_positions_are_ordered_by_time_then_counter_then_node() -> None:
    assert Position(1, 5, 9, 1) < Position(2, 0, 0, 1) < Position(2, 1, 0, 1) < Position(2, 1, 3, 1)
