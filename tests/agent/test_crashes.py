"""What a node's next process knows of daemons that crashed before it began."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import crashes
from agent.chain.store import CRASHES, Journal
from agent.crashes import Crashes
from agent.meshos.daemons import crashed
from discovery.identity import Identity
from tests.agent.meshos_play import Play


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.db", Identity.generate())


def looping() -> Play:
    node = Play()
    for at_ms in (1000, 2000, 3000, 4000, 5000):
        node.at(at_ms).signal("web", "started").signal("web", "crashed", reason="exit status 3")
    return node


def test_crashes_are_in_the_file_at_once_and_taken_up_as_they_were(journal: Journal, tmp_path: Path) -> None:
    node = looping()
    Crashes(journal, lambda: 5000, "boot").keep(node.state)
    with Journal(tmp_path / "copy.db", Identity.generate()) as other:
        assert Crashes(other, lambda: 5000, "boot").kept() == []
    copy = tmp_path / "killed"
    copy.mkdir()
    for name in ("journal.db", "journal.db-wal"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    with Journal(copy / "journal.db", journal._identity) as killed:
        assert Crashes(killed, lambda: 90_000, "boot").kept() == crashed(node.state)


def test_clock_that_jumped_changes_nothing_within_one_boot(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = looping()
    Crashes(journal, lambda: 5000, "boot").keep(node.state)
    monkeypatch.setattr(crashes, "wall_ms", lambda: 0)
    assert Crashes(journal, lambda: 6000, "boot").kept() == crashed(node.state)


@pytest.mark.parametrize(
    ("wall_later_ms", "left_ms"), [(100_000, 200_000), (400_000, None), (-(10**9), 300_000)]
)
def test_after_a_boot_the_wall_clock_tells_what_is_left_and_never_more_than_a_gate(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, wall_later_ms: int, left_ms: int | None
) -> None:
    monkeypatch.setattr(crashes, "wall_ms", lambda: 10**12)
    Crashes(journal, lambda: 5000, "boot").keep(looping().state)
    monkeypatch.setattr(crashes, "wall_ms", lambda: 10**12 + wall_later_ms)
    node = Play().at(77).tell(*Crashes(journal, lambda: 77, "another boot").kept())
    assert node.snapshot()["daemons"][0]["until_in_ms"] == left_ms


def test_what_is_over_is_forgotten_and_what_makes_no_sense_is_passed_over(journal: Journal) -> None:
    node, kept = looping(), Crashes(journal, lambda: 5000, "boot")
    kept.keep(node.state)
    node.tick(400_000)
    node.signal("web", "started").at(500_000).signal("web", "exited_cleanly")
    kept.keep(node.state)
    assert journal.get(CRASHES) is None
    journal.set(CRASHES, {"boot": 7})
    assert kept.kept() == []
