"""The pages say what is there: links lead somewhere, every room is named, the diagram is that of the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from discovery.lifecycle import diagram

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("floor", ["discovery", "agent", "tui"])
def test_architecture_names_every_room_of_a_floor_and_no_other(floor: str) -> None:
    section = ARCHITECTURE.split(f"## {floor}/")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    named = set(re.findall(r"`(\w+)/?`", " ".join(first_cells)))
    rooms = {
        path.stem
        for path in (ROOT / floor).iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert named == rooms


def test_architecture_shows_the_diagram_of_the_table_of_moves() -> None:
    assert diagram().strip() in ARCHITECTURE
