"""Attaching to agents: of the home, by name, and elsewhere with a pinned host key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.home import Home
from discovery.errors import LocalError, Refused, Unreachable
from discovery.identity import Identity
from discovery.sshkey import pub_fingerprint
from tests.tui.canned import CannedAgent, client_line, founded
from tui.client import KnownAgents, address, attach, choose


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return founded(tmp_path / "home")


async def hello(*args: Any, **more: Any) -> dict[str, Any]:
    client = await attach(*args, **more)
    try:
        return client.hello
    finally:
        await client.close()


def test_agent_of_the_home_is_logged_in_to_with_the_homes_client_key(home: Home) -> None:
    with CannedAgent(home, "alpha.gateway.aaaaaa") as agent:
        assert asyncio.run(hello(home))["id"] == agent.id
        assert agent.logins == [("home", client_line(home))]


def test_agent_with_another_host_key_than_its_run_entry_is_passed_over(home: Home) -> None:
    with CannedAgent(home, "alpha.gateway.aaaaaa") as agent:
        entry = agent.entry
        text = home.run_file("alpha", agent.name).read_text()
        home.run_file("alpha", agent.name).write_text(
            text.replace(entry.pub, CannedAgent(home, "x").entry.pub)
        )
        with pytest.raises(Refused) as told:
            asyncio.run(hello(home))
        assert told.value.code == "host_key"


def test_agent_of_the_mesh_asked_about_is_tried_first(home: Home) -> None:
    founded(home.root, "beta")
    with (
        CannedAgent(home, "alpha.gateway.aaaaaa"),
        CannedAgent(home, "beta.broker.bb", mesh="beta", kind="broker"),
    ):
        assert asyncio.run(hello(home))["mesh"] == "alpha"
        assert asyncio.run(hello(home, None, "beta"))["mesh"] == "beta"


def test_outside_agent_is_pinned_at_first_sight_and_told_once(home: Home, tmp_path: Path) -> None:
    told: list[str] = []
    with CannedAgent(home, "far", listed=False) as agent:
        for _ in range(2):
            asyncio.run(hello(home, host=agent.addr, tell=told.append))
        assert [user for user, _ in agent.logins] == ["op", "op"]
        assert len(told) == 1 and pub_fingerprint(agent.identity.pub) in told[0]
        assert KnownAgents(home).get(("127.0.0.1", agent.port)) == agent.identity.pub
        assert asyncio.run(hello(home, host="127.0.0.1"))["id"] == agent.id, "its port is known by now"


def test_outside_agent_with_a_changed_host_key_is_refused_with_both_fingerprints(home: Home) -> None:
    other = Identity.generate()
    with CannedAgent(home, "far", listed=False) as agent:
        KnownAgents(home).add(("127.0.0.1", agent.port), other.pub)
        with pytest.raises(Refused) as told:
            asyncio.run(hello(home, host=agent.addr))
        assert agent.logins == [], "nothing was offered to it"
    assert told.value.code == "host_key"
    assert (
        pub_fingerprint(other.pub) in told.value.sentence
        and pub_fingerprint(agent.identity.pub) in told.value.sentence
    )


def test_refused_login_is_told_as_such(home: Home) -> None:
    with CannedAgent(home, "far", listed=False) as agent:
        agent.refuse_login = True
        with pytest.raises(Refused) as told:
            asyncio.run(hello(home, host=agent.addr))
    assert told.value.code == "login"


def test_agent_that_stalls_is_unreachable_within_its_limit(home: Home) -> None:
    with CannedAgent(home, "alpha.gateway.aaaaaa") as agent:
        agent.stall_hello_s = 3.0
        with pytest.raises(Unreachable):
            asyncio.run(hello(home))


def test_address_without_a_port_needs_a_known_one(home: Home) -> None:
    assert address(home, "h:80") == ("h", 80) and address(home, "[::1]:80") == ("::1", 80)
    with pytest.raises(LocalError):
        address(home, "h")
    with pytest.raises(LocalError):
        address(home, "h:0")


def test_via_prefers_exact_names_then_meshes_then_prefixes(home: Home) -> None:
    def entry(name: str, mesh: str, kind: str) -> Any:
        return CannedAgent(home, name, mesh=mesh, kind=kind).entry

    gateway, broker, beta = (
        entry("a.g", "a", "gateway"),
        entry("a.b", "a", "broker"),
        entry("a", "beta", "broker"),
    )
    entries = [gateway, broker, beta]
    assert choose(entries, "a") == [beta]
    assert choose([gateway, broker], "a") == [gateway, broker]
    assert choose(entries, "a.b") == [broker]
    assert choose(entries, gateway.id[:12]) == [gateway]
    assert choose(entries, "zz") is None
    with pytest.raises(Refused):
        choose([gateway, broker], "a.")
