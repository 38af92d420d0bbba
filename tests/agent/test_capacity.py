"""What a node has for daemons: its host's, or what its control group and those around it leave."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from agent.capacity import MIB, capacity


def groups(tmp_path: Path, own: str, **limits: str) -> tuple[Path, Path]:
    """A tree of control groups; `limits`: `a_b__cpu_max="50000 100000"` is a/b/cpu.max."""
    (tmp_path / "own").write_text(own)
    for key, text in limits.items():
        place, _, name = key.rpartition("__")
        folder = tmp_path / "groups" / place.replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("_", ".")).write_text(text)
    return tmp_path / "groups", tmp_path / "own"


HOST = 1000 * len(os.sched_getaffinity(0)), psutil.virtual_memory().total // MIB


def test_node_without_limits_has_what_its_host_has(tmp_path: Path) -> None:
    assert capacity(*groups(tmp_path, "0::/a/b\n", a__cpu_max="max 100000", a_b__memory_max="max\n")) == HOST
    assert capacity(tmp_path / "none", tmp_path / "none") == HOST
    assert capacity() <= HOST


def test_node_has_no_more_than_the_narrowest_group_around_it(tmp_path: Path) -> None:
    found = capacity(
        *groups(
            tmp_path,
            "4:memory:/x\n0::/a/b\n",
            a__cpu_max="25000 100000",
            a_b__cpu_max="50000 100000",
            a_b__memory_max=str(64 * MIB + 5),
            a__memory_max=str(96 * MIB),
            c__cpu_max="1000 100000",
        )
    )
    assert found == (250, 64)


@pytest.mark.parametrize("text", ["", "x", "1", "5 0", "-1 100000", "\xff"])
def test_limit_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    found = capacity(*groups(tmp_path, "0::/a\n", a__cpu_max=text, a__memory_max="-3"))
    assert found == HOST


def test_group_outside_the_tree_is_not_looked_at(tmp_path: Path) -> None:
    outside = groups(tmp_path, "0::/../out\n", cpu_max="1 1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cpu.max").write_text("1000 100000")
    assert capacity(*outside) == HOST
