"""The fingerprint: equal for equal code, different for any change, and cheap to keep asking for."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent import freshness
from agent.freshness import DiskWatch, fingerprint


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of sources of our own in place of the installed packages."""
    for package in freshness.PACKAGES:
        (tmp_path / package / "inner").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("x = 1\n")
        (tmp_path / package / "inner" / "a.py").write_text(f"name = {package!r}\n")
    folders = tuple((package, str(tmp_path / package)) for package in freshness.PACKAGES)
    monkeypatch.setattr(freshness, "_folders", lambda: folders)
    return tmp_path


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_fingerprint_is_12_hex_digits_and_stable() -> None:
    assert re.fullmatch(r"[0-9a-f]{12}", fingerprint())
    assert fingerprint() == fingerprint()
    assert freshness.at_start() == freshness.at_start()


def test_fingerprint_covers_the_sources_of_this_very_checkout() -> None:
    files = {name for name, _ in freshness._sources()}
    assert {
        "agent/freshness.py",
        "discovery/identity.py",
        "tui/__init__.py",
        "agent/meshos/state.py",
    } <= files
    assert all(name.endswith(".py") for name in files)


def test_fingerprint_changes_with_content_name_new_and_lost_files(tree: Path) -> None:
    seen = {fingerprint()}
    source = tree / "agent" / "inner" / "a.py"
    source.write_text("name = 'other'\n")
    seen.add(fingerprint())
    source.rename(tree / "agent" / "inner" / "b.py")
    seen.add(fingerprint())
    (tree / "tui" / "new.py").write_text("")
    seen.add(fingerprint())
    (tree / "discovery" / "__init__.py").unlink()
    seen.add(fingerprint())
    assert len(seen) == 5


def test_fingerprint_content_moved_between_files_changes_it(tree: Path) -> None:
    one, two = tree / "agent" / "inner" / "a.py", tree / "agent" / "inner" / "b.py"
    one.write_text("ab")
    two.write_text("c")
    before = fingerprint()
    one.write_text("a")
    two.write_text("bc")
    assert fingerprint() != before


def test_fingerprint_ignores_time_place_and_what_is_no_source(tree: Path, tmp_path: Path) -> None:
    before = fingerprint()
    os.utime(tree / "agent" / "__init__.py", (1, 1))
    (tree / "agent" / "__pycache__").mkdir()
    (tree / "agent" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    (tree / "agent" / "__pycache__" / "odd.py").write_bytes(b"x")
    (tree / "agent" / "style.tcss").write_text("x")
    assert fingerprint() == before


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages of our own, first on the path: quarterdeck, needing two others."""
    folder = tmp_path / "site"
    install(folder, "quarterdeck", "1.0", "Requires-Dist: msgspec<1,>=0.19\nRequires-Dist: Foo_Bar>=2\n")
    install(folder, "msgspec", "0.20.0")
    install(folder, "foo_bar", "2.1")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def install(folder: Path, name: str, version: str, requires: str = "") -> Path:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    extra = 'Requires-Dist: pytest>=8; extra == "dev"\n'
    (info / "METADATA").write_text(f"Name: {name}\n{requires}{extra}\nRequires-Dist: in-prose\n")
    return info


def installed() -> dict[str, str]:
    return dict(freshness._versions(freshness._places()))


def test_versions_are_those_of_the_direct_dependencies_without_extras(site: Path) -> None:
    assert installed() == {"msgspec": "0.20.0", "foo-bar": "2.1"}


def test_versions_agree_with_what_python_says_of_this_installation() -> None:
    assert installed() == {name: importlib.metadata.version(name) for name in freshness.DEPENDENCIES}


def test_versions_of_a_missing_dependency_are_told_as_missing(site: Path) -> None:
    shutil.rmtree(site / "foo_bar-2.1.dist-info")
    assert installed() == {"msgspec": "0.20.0", "foo-bar": "-"}


def test_versions_without_our_own_metadata_are_those_of_the_list(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "DISTRIBUTION", "nothing-of-that-name")
    assert set(installed()) == set(freshness.DEPENDENCIES)
    assert installed()["msgspec"] == "0.20.0"


def test_watch_sees_a_dependency_that_was_upgraded(site: Path) -> None:
    clock = Clock()
    watch = DiskWatch(clock)
    build = watch.current()
    shutil.rmtree(site / "msgspec-0.20.0.dist-info")
    install(site, "msgspec", "0.20.1")
    os.utime(site, (7, 7))
    clock.now += 3
    assert watch.current() == fingerprint() != build


def test_fingerprint_file_that_vanishes_meanwhile_is_no_error(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "_sources", lambda: [("agent/gone.py", str(tree / "gone.py"))])
    assert re.fullmatch(r"[0-9a-f]{12}", fingerprint())


def test_watch_sees_a_change_at_its_next_look_and_not_before(tree: Path) -> None:
    clock = Clock()
    watch = DiskWatch(clock)
    build = watch.current()
    assert build == fingerprint()
    (tree / "agent" / "__init__.py").write_text("x = 22\n")
    clock.now += 1.9
    assert watch.current() == build
    clock.now += 0.2
    assert watch.current() == fingerprint() != build
    assert watch.fresh(build) is False
    assert watch.fresh(fingerprint()) is True
    assert watch.fresh("") is None


def test_watch_change_of_equal_size_is_seen_by_its_time(tree: Path) -> None:
    clock = Clock()
    watch = DiskWatch(clock)
    source = tree / "agent" / "__init__.py"
    build = watch.current()
    before = source.stat().st_mtime_ns
    source.write_text("x = 2\n")
    os.utime(source, ns=(before + 1_000_000, before + 1_000_000))
    clock.now += 3
    assert watch.current() != build


def test_watch_unchanged_files_are_not_read_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    watch = DiskWatch(clock)
    watch.current()
    reads: list[int] = []
    monkeypatch.setattr(freshness, "fingerprint", lambda: reads.append(1) or "f" * 12)
    for _ in range(5):
        clock.now += 10
        watch.current()
    assert reads == []


def test_watch_touched_but_equal_file_stays_fresh(tree: Path) -> None:
    clock = Clock()
    watch = DiskWatch(clock)
    build = watch.current()
    os.utime(tree / "agent" / "__init__.py", (5, 5))
    clock.now += 3
    assert watch.current() == build


def test_fingerprint_is_the_same_in_another_process_started_elsewhere(tmp_path: Path) -> None:
    code = "from agent.freshness import at_start; print(at_start())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == fingerprint()
