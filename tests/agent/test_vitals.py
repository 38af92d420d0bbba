"""Vitals: a first sample at once, honest nulls, and nothing that can hold the node up."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import psutil
import pytest

from agent import vitals
from agent.vitals import VitalsSampler, permille
from discovery.member import Vitals


async def samples(
    count: int, sampler_of: object = None, **options: float
) -> tuple[list[Vitals], VitalsSampler]:
    """The first `count` samples of a sampler, and the sampler, closed."""
    seen: list[Vitals] = []
    enough = asyncio.Event()

    def deliver(sample: Vitals) -> None:
        seen.append(sample)
        if len(seen) >= count:
            enough.set()

    sampler = VitalsSampler(deliver, Path(str(sampler_of or "/")), **options)
    sampler.start()
    await asyncio.wait_for(enough.wait(), 10)
    await sampler.close()
    return seen, sampler


def test_sampler_first_sample_comes_soon_and_is_whole() -> None:
    begun = time.monotonic()
    seen, sampler = asyncio.run(samples(1))
    assert time.monotonic() - begun < 3.0
    assert seen[0].cpu is not None and 0 <= seen[0].cpu <= 1000
    assert seen[0].mem is not None and 0 < seen[0].mem <= 1000
    assert seen[0].disk is not None and 0 <= seen[0].disk <= 1000
    assert sampler.latest == seen[-1]


def test_sampler_goes_on_at_its_interval() -> None:
    seen, _ = asyncio.run(samples(3, interval_s=0.05))
    assert len(seen) >= 3


def test_sampler_before_its_first_sample_knows_nothing() -> None:
    assert VitalsSampler(lambda _: None, Path("/")).latest == Vitals()


def test_sampler_receiver_that_raises_is_counted_and_sampling_goes_on() -> None:
    async def run() -> tuple[int, int]:
        calls = 0
        twice = asyncio.Event()

        def deliver(_: Vitals) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                twice.set()
            raise RuntimeError("receiver")

        sampler = VitalsSampler(deliver, Path("/"), interval_s=0.05)
        sampler.start()
        await asyncio.wait_for(twice.wait(), 10)
        await asyncio.sleep(0)
        await sampler.close()
        return calls, sampler.failed

    calls, failed = asyncio.run(run())
    assert calls == failed == 2


def test_sampler_what_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "cpu_percent", broken)
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    seen, _ = asyncio.run(samples(1))
    assert (seen[0].cpu, seen[0].mem) == (None, None)
    assert seen[0].disk is not None


def test_sampler_disk_that_does_not_answer_delays_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(vitals, "_disk_permille", lambda _: answer.wait(60) and 500)
    begun = time.monotonic()
    try:
        seen, _ = asyncio.run(samples(2, interval_s=0.05))
    finally:
        answer.set()
    assert [sample.disk for sample in seen[:2]] == [None, None]
    assert time.monotonic() - begun < 30


def test_disk_of_a_home_not_made_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    there = vitals._disk_permille(tmp_path)
    assert there is not None
    assert abs((vitals._disk_permille(tmp_path / "not" / "yet") or 0) - there) <= 5


@pytest.mark.parametrize(
    ("percent", "expected"), [(0.0, 0), (12.34, 123), (100.0, 1000), (250.0, 1000), (-1.0, 0)]
)
def test_permille_is_clamped(percent: float, expected: int) -> None:
    assert permille(percent) == expected
