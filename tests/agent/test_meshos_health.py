"""Degraded by itself: entered and left with hysteresis, never by one pause."""

from __future__ import annotations

from itertools import pairwise

import pytest

from agent.meshos.config import MeshOsConfig
from agent.meshos.health import Hysteresis, OwnHealth

CONFIG = MeshOsConfig()


def run(loads: list[int | None], mem: int | None = 0) -> list[bool]:
    """Whether the node is Degraded after each CPU sample."""
    health = OwnHealth()
    seen = []
    for load in loads:
        health.sample(load, mem, CONFIG)
        seen.append(bool(health.causes(CONFIG)))
    return seen


@pytest.mark.parametrize(
    ("loads", "degraded"),
    [
        ([951, 951], False),
        ([951, 951, 951], True),
        ([950, 950, 950, 950], False),
        ([951, 951, 950, 951, 951], False),
        ([951, 951, None, 951, 951], False),
        ([951] * 3 + [899, 899], True),
        ([951] * 3 + [899, 899, 899], False),
        ([951] * 3 + [900, 900, 900, 900], True),
        ([951] * 3 + [899, 899, 920, 899, 899], True),
        ([951] * 3 + [None] * 9, True),
        ([951] * 3 + [899] * 3 + [951, 951], False),
        ([951] * 3 + [899] * 3 + [951] * 3, True),
    ],
)
def test_cpu_samples_decide_with_hysteresis(loads: list[int | None], degraded: bool) -> None:
    assert run(loads)[-1] is degraded


def test_cpu_hovering_at_its_budget_turns_at_most_once() -> None:
    seen = run([951, 949] * 50 + [951] * 3 + [951, 905] * 50)
    assert sum(a != b for a, b in pairwise(seen)) == 1


def test_memory_counts_like_cpu_and_says_so() -> None:
    health = OwnHealth()
    for _ in range(3):
        health.sample(0, 990, CONFIG)
    assert health.causes(CONFIG) == ["memory over 95 % for 15 s"]


def test_loads_that_cannot_be_measured_never_degrade() -> None:
    assert not any(run([None] * 10, None))


def late(pattern: list[list[int]]) -> list[bool]:
    """Degraded after each sample; each inner list is how late the ticks before that sample were."""
    health = OwnHealth()
    seen = []
    for ticks in pattern:
        for late_ms in ticks:
            health.tick(late_ms, CONFIG)
        health.sample(0, 0, CONFIG)
        seen.append(bool(health.causes(CONFIG)))
    return seen


def test_loop_late_in_three_samples_running_is_degraded_and_recovers_after_three() -> None:
    pattern = [[0, 500], [500, 0], [600]] + [[0] * 10] * 3
    assert late(pattern) == [False, False, True, True, True, False]


def test_loop_just_in_time_is_not_late() -> None:
    assert not any(late([[499] * 10] * 10))


def test_loop_one_pause_of_any_length_is_one_late_sample() -> None:
    assert not any(late([[0], [3_600_000], [0], [0], [3_600_000], [0]]))


def test_loop_late_with_one_good_sample_between_starts_counting_again() -> None:
    assert not any(late([[500], [500], [0], [500], [500], [0]]))


def test_recovery_says_what_recovered() -> None:
    health = OwnHealth()
    for _ in range(3):
        health.tick(700, CONFIG)
        assert health.sample(0, 990, CONFIG) == []
    assert health.causes(CONFIG) == ["memory over 95 % for 15 s", "loop late by 500 ms or more for 15 s"]
    said = [health.sample(0, 0, CONFIG) for _ in range(3)]
    assert said == [[], [], ["memory back under 90 % for 15 s", "loop on time for 15 s"]]


def test_hysteresis_reports_exactly_its_turns() -> None:
    cause = Hysteresis()
    turns = [cause.step(over, not over, 2) for over in (True, True, True, False, True, False, False)]
    assert turns == [False, True, False, False, False, False, True]
