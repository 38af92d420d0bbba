"""The numbers of SEMANTICS 7, each a field of the config with its unit in its name; and health as the pool sees it."""

from __future__ import annotations

import pytest

from agent.meshos.config import MeshOsConfig, with_overrides
from agent.meshos.events import Health
from agent.meshos.peers import link_health, pool_health
from discovery.errors import LocalError

NUMBERS = {
    "event_queue_capacity": 1024,
    "tick_interval_ms": 500,
    "events_per_tick": 32,
    "action_queue_capacity": 1024,
    "sample_ttl_ms": 30_000,
    "recent_failures_capacity": 256,
    "degraded_rtt_ms": 250,
    "avoid_ttl_ms": 300_000,
    "link_degraded_ms": 1500,
    "link_unreachable_ms": 5000,
    "dead_after_ms": 60_000,
    "in_flight_ms": 60_000,
    "start_in_flight_ms": 30_000,
    "stop_grace_ms": 30_000,
    "backoff_initial_ms": 500,
    "backoff_max_ms": 60_000,
    "crash_window_ms": 60_000,
    "crash_loop_crashes": 5,
    "crash_loop_ms": 300_000,
    "stable_run_ms": 60_000,
    "short_run_ms": 1000,
    "drain_deadline_ms": 300_000,
    "maintenance_deadline_ms": 600_000,
    "recovery_ramp_ms": 300_000,
    "score_floor": 0.5,
    "score_gap": 0.2,
    "rebalance_cooldown_ms": 300_000,
    "pull_cooldown_ms": 250,
    "stabilise_ms": 60_000,
    "migrations_per_window": 10,
    "migration_window_ms": 1000,
    "backpressure_high": 1000,
    "backpressure_low": 200,
    "strikes_max": 16,
    "late_tick_ms": 500,
    "health_samples": 3,
    "health_sample_interval_ms": 5000,
    "cpu_budget_permille": 950,
    "mem_budget_permille": 950,
    "budget_margin_permille": 50,
}


@pytest.mark.parametrize(("name", "value"), NUMBERS.items())
def test_number_has_its_default(name: str, value: float) -> None:
    assert getattr(MeshOsConfig(), name) == value


def test_overrides_are_what_differs_and_make_the_same_config_again() -> None:
    config = MeshOsConfig(pull_cooldown_ms=7, exempt_chains=("admin", "mine"))
    assert config.overrides() == {"pull_cooldown_ms": 7, "exempt_chains": ("admin", "mine")}
    assert with_overrides({"pull_cooldown_ms": 7, "exempt_chains": ["admin", "mine"]}) == config
    assert MeshOsConfig().overrides() == {}


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"avoid_ttl": 1}, "did you mean `avoid_ttl_ms`"),
        ({"avoid_ttl_ms": -1}, "avoid_ttl_ms"),
        ({"tick_interval_ms": 0}, "tick_interval_ms"),
        ({"score_floor": "high"}, "score_floor"),
    ],
)
def test_override_that_is_none_is_refused_by_name(overrides: dict[str, object], why: str) -> None:
    with pytest.raises(LocalError, match=why):
        with_overrides(overrides)


@pytest.mark.parametrize(
    ("age_ms", "health"),
    [(0, "healthy"), (1500, "healthy"), (1501, "degraded"), (5000, "degraded"), (5001, "unreachable")],
)
def test_link_health_by_the_age_of_what_was_heard(age_ms: int, health: str) -> None:
    assert link_health(age_ms, MeshOsConfig()) is Health(health)


@pytest.mark.parametrize(
    ("word", "suspected", "link_age_ms", "health"),
    [
        ("alive", False, None, "healthy"),
        ("alive", True, None, "degraded"),
        ("dead", False, 0, "unreachable"),
        ("alive", True, 9000, "unreachable"),
        ("draining", False, 2000, "degraded"),
        ("alive", True, 10, "degraded"),
    ],
)
def test_pool_health_is_the_worse_of_pool_and_link(
    word: str, suspected: bool, link_age_ms: int | None, health: str
) -> None:
    assert pool_health(word, suspected, link_age_ms, MeshOsConfig()) is Health(health)
