"""What the tests of this folder start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.harness import Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A home with mesh alpha in it; whatever a test starts there is ended after it."""
    with Fleet(tmp_path / "home") as fleet:
        fleet.init()
        yield fleet
