"""Clients of nodes of other meshes: of this home first, else by their address and only with the key of their id."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.home import Home
from discovery.errors import Unreachable
from tests.tui.canned import CannedAgent, founded, row
from tui.elsewhere import Elsewhere


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return founded(tmp_path / "home")


def test_node_of_the_home_is_dialled_once_and_again_when_it_was_lost(home: Home) -> None:
    founded(home.root, "beta")

    async def main() -> None:
        reach = Elsewhere(home, None)
        with CannedAgent(home, "beta.broker.bb", mesh="beta") as agent:
            first = await reach.client("beta", [])
            assert first.mesh == "beta" and await reach.client("beta", []) is first
            await first.close()
            again = await reach.client("beta", [])
            assert again is not first and len(agent.logins) == 2
            await reach.close()
            assert again.closed

    asyncio.run(main())


def test_node_outside_is_taken_only_with_the_key_of_its_id(home: Home) -> None:
    async def main() -> None:
        with CannedAgent(home, "far", listed=False) as agent:
            right = {**row("far", agent.id), "addr": agent.addr}
            reach = Elsewhere(home, None)
            assert (await reach.client("beta", [right])).id == agent.id
            with pytest.raises(Unreachable, match="another node answers"):
                await reach.client("delta", [{**right, "id": "d" * 16}])
            await reach.close()

    asyncio.run(main())


def test_mesh_of_which_no_node_is_up_is_unreachable(home: Home) -> None:
    with pytest.raises(Unreachable, match="no node of it is up"):
        asyncio.run(Elsewhere(home, None).client("gamma", []))
