"""The snapshot: immutable, its unchanged sections shared, its ages computed when it is shown."""

from __future__ import annotations

import msgspec
import pytest

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    Admin,
    AdminOp,
    Event,
    Health,
    LocalFailure,
    NodeHealth,
    RttSample,
    SelfHealth,
    Synced,
    Tick,
    UpdateStarted,
)
from agent.meshos.reconcile import run_pass
from agent.meshos.snapshot import Snapshot, SnapshotBuilder, document
from agent.meshos.state import MeshOsState, fold
from discovery.lifecycle import State

ME = 100
SECTIONS = (
    "local",
    "local_maintenance",
    "daemons",
    "replicas",
    "peers",
    "avoid_list",
    "recently_emitted",
    "recent_failures",
    "stats",
)


@pytest.fixture
def built() -> SnapshotBuilder:
    return SnapshotBuilder(MeshOsState(ME))


def after(builder: SnapshotBuilder, *events: Event) -> Snapshot:
    for event in events:
        fold(builder._state, event)
        if isinstance(event, Tick):
            run_pass(builder._state)
    return builder.build()


def shared(one: Snapshot, two: Snapshot) -> set[str]:
    return {name for name in SECTIONS if getattr(one, name) is getattr(two, name)}


def test_snapshot_without_a_change_is_the_same_object(built: SnapshotBuilder) -> None:
    first = after(built, Synced(at_ms=1), RttSample(7, 1.0, at_ms=1))
    assert after(built, Tick(at_ms=500), Tick(at_ms=1000), SelfHealth(100, 100, at_ms=1000)) is first


@pytest.mark.parametrize(
    ("event", "changed"),
    [
        (RttSample(7, 5.0, at_ms=2), {"peers"}),
        (NodeHealth(7, Health.HEALTHY, at_ms=2), {"peers"}),
        (Synced(at_ms=2), {"local", "stats"}),
        (Admin(AdminOp("cordon", ME), at_ms=2), {"local"}),
        (LocalFailure("probe", "p", "x", at_ms=2), {"recent_failures", "stats"}),
    ],
)
def test_snapshot_shares_every_section_that_did_not_change(
    built: SnapshotBuilder, event: Event, changed: set[str]
) -> None:
    before = after(built, RttSample(8, 1.0, at_ms=1))
    assert shared(before, after(built, event)) == set(SECTIONS) - changed


def test_snapshot_shares_the_rows_of_peers_that_did_not_change(built: SnapshotBuilder) -> None:
    before = after(built, RttSample(7, 1.0, at_ms=1), RttSample(8, 1.0, at_ms=1))
    now = after(built, RttSample(8, 2.0, at_ms=2))
    assert now.peers[7] is before.peers[7]
    assert (before.peers[8].rtt_ms, now.peers[8].rtt_ms) == (1.0, 2.0)


def test_snapshot_holds_what_it_held_when_the_state_goes_on(built: SnapshotBuilder) -> None:
    before = after(
        built, RttSample(7, 300.0, at_ms=1), Tick(at_ms=1), LocalFailure("probe", "p", "x", at_ms=1)
    )
    text = msgspec.json.encode(document(before, 1))
    after(built, Tick(at_ms=400_000), LocalFailure("probe", "p", "y", at_ms=400_000))
    assert built._state.rtt == {}
    assert msgspec.json.encode(document(before, 1)) == text


def test_snapshot_cannot_be_written_to(built: SnapshotBuilder) -> None:
    snapshot = after(built, RttSample(7, 300.0), Tick())
    with pytest.raises(TypeError):
        snapshot.peers[9] = snapshot.peers[7]  # type: ignore[index]
    with pytest.raises(TypeError):
        del snapshot.avoid_list[7]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        snapshot.at_ms = 5  # type: ignore[misc]


def test_snapshot_peer_whose_samples_expired_is_gone(built: SnapshotBuilder) -> None:
    after(built, RttSample(7, 1.0, at_ms=0), NodeHealth(7, Health.HEALTHY, at_ms=20_000))
    half = after(built, Tick(at_ms=30_001))
    assert (half.peers[7].rtt_ms, half.peers[7].health) == (None, Health.HEALTHY)
    assert after(built, Tick(at_ms=50_001)).peers == {}


def test_document_has_ages_and_remaining_times_of_the_moment_it_is_made(built: SnapshotBuilder) -> None:
    snapshot = after(
        built,
        RttSample(255, 300.0, at_ms=1000),
        NodeHealth(255, Health.DEGRADED, "suspected", at_ms=1500),
        Tick(at_ms=2000),
        LocalFailure("probe", "rtt", "boom", at_ms=2500),
    )
    shown = document(snapshot, 5000, show=lambda key: format(key, "x"))
    assert shown["peers"] == [
        {
            "peer": "ff",
            "rtt_ms": 300.0,
            "rtt_age_ms": 4000,
            "health": "degraded",
            "reason": "suspected",
            "health_age_ms": 3500,
            "maintenance": "active",
            "cordoned": False,
            "draining": False,
        }
    ]
    assert shown["avoid_list"] == [
        {"peer": "ff", "reason": "rtt 300 ms, over 250 ms", "age_ms": 3000, "expires_in_ms": 297_000}
    ]
    assert shown["recently_emitted"] == [{"kind": "mark_avoid", "target": "ff", "age_ms": 3000}]
    assert shown["recent_failures"] == [
        {
            "age_ms": 2500,
            "source": "probe",
            "action": None,
            "target": "rtt",
            "reason": "boom",
            "retry_after_ms": None,
            "until_in_ms": None,
        }
    ]
    assert shown["local_maintenance"]["state"] == "active"
    assert shown["stats"]["failures"] == 1


def test_document_of_a_draining_node_says_how_long_it_has(built: SnapshotBuilder) -> None:
    snapshot = after(built, Synced(at_ms=0), Admin(AdminOp("drain", ME, 60_000, "ann", "01D"), at_ms=1000))
    local = document(snapshot, 31_000)["local"]
    assert (local["state"], local["since_ms"], local["cordoned"]) == ("draining", 30_000, True)
    assert local["drain"] == {
        "age_ms": 30_000,
        "deadline_in_ms": 30_000,
        "past_deadline": False,
        "left": [],
        "by": "ann",
        "op_id": "01D",
    }
    late = document(snapshot, 61_000)["local"]["drain"]
    assert (late["past_deadline"], late["deadline_in_ms"]) == (True, 0)


def test_document_of_an_updating_node_says_its_deadline(built: SnapshotBuilder) -> None:
    snapshot = after(built, Synced(at_ms=0), UpdateStarted(120_000, "ann", "01U", at_ms=1000))
    assert snapshot.local.state is State.UPDATING
    assert document(snapshot, 2000)["local"]["update_deadline_in_ms"] == 119_000


def test_document_is_plain_json_and_sorted_by_id(built: SnapshotBuilder) -> None:
    snapshot = after(built, *[RttSample(peer, 300.0) for peer in ("b", 10, 9, "a")], Tick())
    again = msgspec.json.decode(msgspec.json.encode(document(snapshot, 0)))
    assert [row["peer"] for row in again["peers"]] == [9, 10, "a", "b"]
    assert [row["peer"] for row in again["avoid_list"]] == [9, 10, "a", "b"]


def test_first_snapshot_of_a_state_that_lived_already_is_whole() -> None:
    state = MeshOsState(ME, MeshOsConfig())
    fold(state, RttSample(7, 1.0, at_ms=3))
    assert set(SnapshotBuilder(state).last.peers) == {7}
