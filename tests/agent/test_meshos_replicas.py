"""Arms 2, 3 and 6: what this node holds, how many hold what it leads, and moving the worst holder."""

from __future__ import annotations

from typing import Any

import pytest

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    ActionOutcome,
    Health,
    NodeHealth,
    PeerState,
    ReplicaLeader,
    ReplicaUpdate,
    RttSample,
)
from agent.meshos.scheduler import best_alternative, worst
from tests.agent.meshos_play import ME, Play, drop, evict, place, pull


def health(node: Play, peer: Any, word: str) -> Play:
    return node.tell(NodeHealth(peer, Health(word)))


# --- 2: local replicas


def test_hold_and_not_holder_pulls_from_the_lowest_other_holder() -> None:
    node = Play().holds(1, 30, 4, "2").local(1, "hold")
    assert node.tick(500) == [pull(1, 4)]
    assert node.tick(1000) == []
    node.holds(1, ME)
    assert node.tick(1500) == []


def test_hold_without_any_holder_does_nothing_until_there_is_one() -> None:
    node = Play().local(1, "hold")
    assert node.tick(500) == []
    node.holds(1, 5)
    assert node.tick(1000) == [pull(1, 5)]


def test_pull_passes_over_avoided_and_unreachable_holders() -> None:
    node = Play().holds(1, 2, 3, 4).tell(RttSample(2, 300.0))
    health(node, 3, "unreachable").tick(500)
    assert node.local(1, "hold").tick(1000) == [pull(1, 4)]


def test_pull_takes_the_lowest_when_all_are_avoided_or_unreachable() -> None:
    node = Play().holds(1, 2, 3).tell(RttSample(2, 300.0))
    health(node, 3, "unreachable").tick(500)
    assert node.local(1, "hold").tick(1000) == [pull(1, 2)]


def test_drop_and_holder_drops_once() -> None:
    node = Play().holds(1, ME, 2).local(1, "drop")
    assert node.tick(500) == [drop(1)]
    assert node.tick(1000) == []
    node.gone(1, ME)
    assert node.tick(1500) == []


def test_drop_of_what_is_not_held_does_nothing() -> None:
    assert Play().holds(1, 2).local(1, "drop").tick(500) == []


@pytest.mark.parametrize("free", ["outcome", "minute", "intent"])
def test_pull_in_flight_is_freed_by_outcome_intent_or_a_minute(free: str) -> None:
    node = Play().holds(1, 2).local(1, "hold")
    node.tick(500)
    node.holds(1, 3)
    assert node.tick(60_499) == []
    if free == "outcome":
        node.tell(ActionOutcome("pull_replica", 1, "dropped"))
    elif free == "intent":
        node.local(1, "drop").local(1, "hold")
    assert node.tick(60_500 if free == "minute" else 60_499) == [pull(1, 2)]


def test_admin_drop_replicas_is_an_intent_until_a_later_hold() -> None:
    node = Play().holds(1, ME, 2).holds(2, ME, 2).holds(3, ME, 2).admin("drop_replicas", chains=(1, 2))
    assert node.tick(500) == [drop(1), drop(2)]
    node.gone(1, ME)
    assert node.tick(1000) == []
    assert node.local(1, "hold").tick(1500) == [pull(1, 2)]


def test_admin_drop_replicas_of_another_node_does_nothing_here() -> None:
    assert Play().holds(1, ME, 2).admin("drop_replicas", 7, chains=(1,)).tick(500) == []


# --- 2: artifacts of a draining node


def migrate(blob: Any, target: Any) -> dict[str, Any]:
    return {"kind": "migrate_blob", "blob": blob, "target": target}


def test_draining_hands_on_artifacts_that_have_no_copy_elsewhere() -> None:
    node = Play().blob("x", ME).blob("y", ME, 3).blob("z", ME).tell(NodeHealth(2, Health.HEALTHY))
    assert node.tick(500) == []
    node.admin("drain")
    assert node.tick(1000) == [migrate("x", 2), migrate("z", 2)]
    assert node.tick(1500) == []
    node.blob("x", 2).tell(ActionOutcome("migrate_blob", "z", "failed"))
    assert node.tick(2000) == [migrate("z", 2)]


def test_migrations_go_to_takers_in_turn_and_not_to_the_shunned() -> None:
    node = Play().blob("x", ME).blob("y", ME).blob("z", ME)
    for peer in (2, 3, 4, 5):
        node.tell(NodeHealth(peer, Health.HEALTHY))
    node.admin("cordon", 2).admin("drain", 4).admin("drain")
    assert node.tick(500) == [migrate("x", 3), migrate("y", 5), migrate("z", 3)]


def test_copy_on_a_draining_node_is_none() -> None:
    node = Play().blob("x", ME, 3).tell(NodeHealth(2, Health.HEALTHY)).admin("drain", 3).admin("drain")
    assert node.tick(500) == [migrate("x", 2)]


def test_migration_without_a_taker_waits_for_one() -> None:
    node = Play().blob("x", ME).admin("drain")
    assert node.tick(500) == []
    node.tell(NodeHealth(2, Health.HEALTHY))
    assert node.tick(1000) == [migrate("x", 2)]


# --- 3: counts


def led(chain: Any, *holders: Any) -> Play:
    return Play().holds(chain, *holders, leader=ME)


def test_too_few_holders_requests_one_more_elsewhere() -> None:
    node = led(1, ME, 2).place(1, 3)
    assert node.tick(500) == [place(1, 2, ME)]
    assert node.tick(1000) == []
    node.holds(1, 5)
    assert node.tick(1500) == []


def test_placement_excludes_holders_cordoned_draining_avoided_and_unreachable() -> None:
    node = led(1, ME).place(1, 2)
    node.admin("cordon", 11).admin("drain", 12).admin("enter_maintenance", 13).tell(RttSample(14, 300.0))
    node.tell(PeerState(16, cordoned=True), PeerState(17, draining=True))
    health(node, 15, "unreachable")
    health(node, 18, "degraded")
    first = node.tick(500)
    assert first[0] == place(1, 11, 12, 13, 15, 16, 17, ME)
    node.tell(ActionOutcome("request_placement", 1, "failed")).admin("uncordon", 11).admin("resume", 12)
    assert node.tick(1000) == [place(1, 13, 14, 15, 16, 17, ME)]


def test_this_node_is_excluded_when_it_is_cordoned_itself() -> None:
    node = led(1, 2).place(1, 2).admin("cordon")
    assert node.tick(500) == [place(1, 2, ME)]


def test_too_many_holders_evicts_the_lowest_and_one_at_a_time() -> None:
    node = led(1, ME, 5, 4, "3").place(1, 2)
    assert node.tick(500) == [evict(1, 4)]
    assert node.tick(1000) == []
    node.gone(1, 4)
    assert node.tick(1500) == [evict(1, 5)]


def test_too_many_holders_with_scores_evicts_the_worst() -> None:
    node = led(1, ME, 4, 5, 6).place(1, 2).score(1, n100=0.9, n4=0.8, n5=0.7)
    assert node.tick(500) == [evict(1, 5)]


def test_only_the_leader_counts() -> None:
    assert Play().holds(1, ME, 2, leader=2).place(1, 1).tick(500) == []


def test_leader_in_the_same_event_is_a_step_down() -> None:
    node = led(1, ME, 2, 3).place(1, 1)
    node.tell(ReplicaUpdate(1, "removed", ME, leader=None))
    assert node.tick(500) == []
    node.tell(ReplicaUpdate(1, "added", ME, leader=ME))
    assert node.tick(1000) == [evict(1, 2)]


def test_leader_unchanged_by_an_update_that_does_not_carry_one() -> None:
    node = led(1, ME, 2, 3).place(1, 1).gone(1, 3)
    assert node.tick(500) == [evict(1, 2)]
    node.tell(ReplicaLeader(1, None))
    assert node.state.led == set()


@pytest.mark.parametrize("op", ["drain", "enter_maintenance"])
def test_holder_that_is_drained_or_enters_maintenance_does_not_count(op: str) -> None:
    node = led(1, ME, 2, 3).place(1, 3)
    assert node.tick(500) == []
    node.admin(op, 2)
    assert node.tick(1000) == [place(1, 2, 3, ME)]


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        ("entering_maintenance", False),
        ("maintenance", False),
        ("drain_failed", False),
        ("exiting_maintenance", True),
        ("recovery", True),
        ("active", True),
    ],
)
def test_holder_counts_by_its_maintenance_state(state: str, counts: bool) -> None:
    node = led(1, ME, 2).place(1, 2).observed(state, 2)
    assert (node.tick(500) == []) is counts


def test_holder_counts_until_it_was_dead_for_a_minute_though_nobody_speaks_of_it_any_more() -> None:
    node = led(1, ME, 2).place(1, 2).at(1000)
    health(node, 2, "unreachable")
    for at_ms in (30_000, 31_001, 60_999):
        assert node.tick(at_ms) == []
    assert node.tick(61_000) == [place(1, 2, ME)]
    health(node, 2, "healthy")
    node.tell(ActionOutcome("request_placement", 1, "failed"))
    assert node.tick(61_500) == []


def test_this_node_draining_does_not_count_as_holder_of_what_it_leads() -> None:
    node = led(1, ME, 2).place(1, 2).admin("drain")
    assert node.tick(500) == [place(1, 2, ME)]


def test_count_of_zero_evicts_and_a_forgotten_count_does_not() -> None:
    node = led(1, ME).place(1, 0)
    assert node.tick(500) == [evict(1, ME)]
    assert led(1, ME).place(1, 0).place(1, None).tick(500) == []


def test_changed_count_frees_what_was_requested() -> None:
    node = led(1, ME).place(1, 2)
    assert node.tick(500) == [place(1, ME)]
    assert node.place(1, 3).tick(1000) == [place(1, ME)]


# --- 6: scheduler


def test_worst_holder_is_moved_where_another_node_is_better() -> None:
    node = led(1, ME, 2, 3).score(1, n100=0.9, n2=0.49, n3=0.6, n7=0.7)
    assert node.tick(500) == [evict(1, 2)]


@pytest.mark.parametrize(
    ("holder", "other", "moves"),
    [(0.5, 1.0, False), (0.49, 1.0, True), (0.3, 0.5, False), (0.3, 0.51, True), (0.25, 0.45, False)],
)
def test_floor_and_gap_are_strict(holder: float, other: float, moves: bool) -> None:
    node = led(1, ME).score(1, n100=holder, n7=other)
    assert (node.tick(500) == [evict(1, ME)]) is moves


def test_equal_scores_move_the_lowest_id() -> None:
    assert led(1, ME, 3, 2).score(1, n100=0.1, n3=0.1, n2=0.1, n7=0.9).tick(500) == [evict(1, 2)]


def test_unknown_and_nan_scores_take_no_part() -> None:
    node = led(1, ME, 2, 3).score(1, n100=0.4, n2=None, n3=float("nan"), n7=float("nan"), n8=0.7)
    assert node.tick(500) == [evict(1, ME)]
    assert led(1, ME, 2).score(1, n2=None, n7=0.9).tick(500) == []
    assert led(1, ME).score(1, n100=0.1, n7=None).tick(500) == []


def test_worst_and_best_skip_what_is_no_number() -> None:
    scores = {"1": float("nan"), "2": 0.2, "9": float("nan"), "8": 0.3}
    assert worst([1, 2, 3], scores) == (2, 0.2)
    assert best_alternative([1, 2], scores) == 0.3
    assert worst([1], scores) is None and best_alternative([2, 8], {"2": 0.2}) is None


def test_eviction_pending_holds_the_scheduler_until_a_holder_goes_and_then_the_cooldown() -> None:
    node = led(1, ME, 2, 3).score(1, n100=0.1, n2=0.2, n3=0.3, n7=0.9)
    assert node.tick(500) == [evict(1, ME)]
    assert node.tick(400_000) == []
    node.gone(1, 3)
    assert node.tick(400_500) == [evict(1, ME)]
    node.gone(1, ME).tell(ReplicaLeader(1, ME))
    assert node.tick(700_499) == []
    assert node.tick(700_500) == [evict(1, 2)]


def test_failed_eviction_is_no_longer_pending_but_keeps_the_cooldown() -> None:
    node = led(1, ME).score(1, n100=0.1, n7=0.9)
    node.tick(500)
    node.tell(ActionOutcome("request_eviction", 1, "failed"))
    assert node.tick(300_499) == []
    assert node.tick(300_500) == [evict(1, ME)]


def test_one_eviction_a_chain_a_tick_over_all_arms() -> None:
    node = led(1, ME, 2, 3).place(1, 2).score(1, n100=0.1, n2=0.05, n3=0.2, n7=0.9)
    assert node.tick(500) == [evict(1, 2)]
    node.gone(1, 2)
    assert node.tick(1000) == []


def test_scheduler_is_the_leaders_alone_and_sorted_by_chain() -> None:
    node = Play()
    for chain in (9, 10, "a"):
        node.holds(chain, ME, leader=ME).score(chain, n100=0.1, n7=0.9)
    node.holds(3, ME, leader=7).score(3, n100=0.1, n7=0.9)
    assert [action["chain"] for action in node.tick(500)] == [9, 10, "a"]


def test_invalidate_placement_forgets_cooldown_pending_and_scores_of_chains_led_here() -> None:
    node = led(1, ME).score(1, n100=0.1, n7=0.9)
    node.holds(2, 5, leader=5).score(2, n5=0.1, n7=0.9)
    node.tick(500)
    node.admin("invalidate_placement").tell(ActionOutcome("request_eviction", 1, "dispatched"))
    assert node.tick(1000) == []
    assert set(node.state.scores) == {"2"}
    node.gone(1, 3).at(61_000).score(1, n100=0.1, n7=0.9)
    assert node.tick(61_000) == [evict(1, ME)]


def test_invalidate_placement_of_another_node_forgets_nothing_here() -> None:
    node = led(1, ME).score(1, n100=0.1, n7=0.9).admin("invalidate_placement", 7)
    assert node.tick(500) == [evict(1, ME)]


def test_score_ids_as_text_mean_ids_of_either_type_that_read_so() -> None:
    node = Play().holds("1", "100", leader=ME).score("1", n100=0.1, n7=0.9)
    assert node.tick(500) == [evict("1", "100")]


def test_scheduler_limits_come_from_the_config() -> None:
    config = MeshOsConfig(score_floor=0.9, score_gap=0.01, rebalance_cooldown_ms=1000)
    node = Play(config).holds(1, ME, leader=ME).score(1, n100=0.8, n7=0.82)
    assert node.tick(500) == [evict(1, ME)]


# --- what is shown


def test_replica_rows_say_holders_count_leader_and_intent() -> None:
    node = led(1, ME, 2).place(1, 2).local(1, "hold").place("z", 3)
    assert node.snapshot()["replicas"] == [
        {
            "chain": 1,
            "holders": [2, ME],
            "desired": 2,
            "leader": ME,
            "intent": "hold",
            "eviction_pending": False,
            "last_rebalance_age_ms": None,
        },
        {
            "chain": "z",
            "holders": [],
            "desired": 3,
            "leader": None,
            "intent": None,
            "eviction_pending": False,
            "last_rebalance_age_ms": None,
        },
    ]


def test_chain_that_nobody_holds_leads_or_wants_is_forgotten() -> None:
    node = Play().holds(1, 2, leader=2)
    node.gone(1, 2).tell(ReplicaLeader(1, None))
    assert node.snapshot()["replicas"] == []
    assert node.state.chains == {} and node.state.held_by == {}
