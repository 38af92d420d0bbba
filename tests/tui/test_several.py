"""One screen on agents of several meshes: every row from its own mesh's agent, every op to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.home import Home
from discovery.errors import Refused, Unreachable
from tests.tui.canned import CannedAgent, founded, row
from tui.client import Client
from tui.ops import OpSender
from tui.several import Several, attach_several
from tui.signers import find_signer


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return founded(tmp_path / "home", "alpha", "beta")


@pytest.fixture
def agents(home: Home) -> Iterator[tuple[CannedAgent, CannedAgent]]:
    with (
        CannedAgent(home, "alpha.gateway.a") as alpha,
        CannedAgent(home, "beta.console.b", mesh="beta") as beta,
    ):
        beta.rows.append(row("beta.broker.c", "c1" * 8, mesh="beta"))
        for agent in (alpha, beta):
            agent.frames = [
                {
                    "full": True,
                    "rows": agent.rows,
                    "gone": [],
                    "events": [{"at_ms": 1}],
                    "counters": {"forged": 1},
                },
                {"full": False, "rows": [], "gone": [], "events": [{"at_ms": 2}], "counters": {}},
            ]
        yield alpha, beta


async def attached(home: Home, agent: CannedAgent) -> Several:
    client = await attach_several(home, agent.entry)
    assert isinstance(client, Several)
    return client


def test_first_frame_holds_every_mesh_and_the_end_of_one_agent_ends_the_stream(
    home: Home, agents: Any
) -> None:
    _, beta = agents

    async def watched() -> list[dict[str, Any]]:
        client = await attached(home, beta)
        assert client.hello["id"] == beta.id
        frames = []
        with pytest.raises(Unreachable):
            async for frame in client.watch():
                frames.append(frame)
        await client.close()
        return frames

    first, *later = asyncio.run(watched())
    assert first["full"] is True and {r["mesh"] for r in first["rows"]} == {"alpha", "beta"}
    assert first["counters"] == {"forged": 2} and len(first["events"]) == 2
    assert all(frame["full"] is False for frame in later)


def test_op_goes_to_the_agent_that_sees_its_target(home: Home, agents: Any) -> None:
    alpha, beta = agents

    async def acted() -> dict[str, Any]:
        client = await attached(home, alpha)
        result = await OpSender(client, await find_signer(home, None)).act("kill", "c1" * 8)
        await client.close()
        return result

    assert asyncio.run(acted())["result"] == "done"
    assert len(beta.ops) == 1 and beta.ops[0]["mesh"] == "beta" and alpha.ops == []


def test_name_is_looked_for_in_every_mesh(home: Home, agents: Any) -> None:
    alpha, _ = agents

    async def looked() -> None:
        client = await attached(home, alpha)
        assert (await client.resolve("beta.broker.c"))["mesh"] == "beta"
        assert (await client.node("c1" * 8))["node"]["name"] == "beta.broker.c"
        with pytest.raises(Refused) as told:
            await client.resolve("nobody")
        assert told.value.code == "unknown"
        await client.close()

    asyncio.run(looked())


def test_home_of_one_mesh_is_a_plain_client(tmp_path: Path) -> None:
    home = founded(tmp_path / "one")
    with CannedAgent(home, "alpha.gateway.a") as alpha:

        async def looked() -> None:
            client = await attach_several(home, alpha.entry)
            assert isinstance(client, Client)
            await client.close()

        asyncio.run(looked())
