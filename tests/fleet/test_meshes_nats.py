"""A NATS cluster as the backbone that goes away and comes back: the pool stands in, and every view says so."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.test_meshes import World
from tests.nats_server import NatsServer, needs_nats_server

pytestmark = [pytest.mark.fleet, needs_nats_server]


def mode(fleet: Fleet, agent: Agent) -> set[str]:
    return {str(row["backbone"]) for row in fleet.meshes(agent).values()}


def names(fleet: Fleet, agent: Agent) -> set[str]:
    return {n for n, row in fleet.rows(agent).items() if row["state"] == "alive"}


def changed(agent: Agent, to: str) -> dict[str, Any]:
    return agent.wait("backbone.changed", to=to)


def test_pool_stands_in_while_the_server_is_away(tmp_path: Path) -> None:
    with NatsServer(tmp_path) as server, Fleet(tmp_path / "home") as fleet:
        world = World(fleet, ("--suspicion-ms", "120000", "--backbone", server.url))
        (watcher,) = world.mesh("alpha", "console")
        one, two = world.mesh("beta", "gateway", "gateway")
        with world.views(watcher) as (view,):
            assert mode(fleet, watcher) == {"nats"}
            server.kill()
            for agent in (watcher, one, two):
                assert changed(agent, "pool (nats away)")["reason"]
            view.wait(lambda v: v.meshes["beta"]["backbone"] == "pool (nats away)", "the view says so")
            holder = world.agents[str(view.publisher("beta"))]
            other = two if holder is one else one
            holder.signal(signal.SIGKILL)
            view.wait(lambda v: v.publisher("beta") == other.name, f"{other.name} takes over", 7.0)
            assert not view.blanks
            before = len(watcher.of("backbone.changed", to="nats"))
            server.start()
            wait_for(lambda: len(watcher.of("backbone.changed", to="nats")) > before, "nats is back")
            wait_for(lambda: mode(fleet, other) == {"nats"}, f"{other.name} is back on it")
            view.wait(lambda v: v.meshes["beta"]["age_ms"] < 3_000, "beta is published there", 10.0)
            assert view.publisher("beta") == other.name and not view.blanks
            gone = {e["node"] for a in (watcher, other) for e in a.of("node.evicted")}
            assert gone <= {holder.name} and set(view.gone_at) <= {holder.name}, "nobody else has ever left"


def test_server_that_was_never_there_leaves_the_pool(tmp_path: Path) -> None:
    with Fleet(tmp_path / "home") as fleet:
        world = World(fleet, ("--backbone", "nats://127.0.0.1:9"))
        (alpha,) = world.mesh("alpha", "gateway")
        (beta,) = world.mesh("beta", "gateway")
        wait_for(
            lambda: names(fleet, alpha) == names(fleet, beta) == {alpha.name, beta.name}, "both see both"
        )
        assert mode(fleet, alpha) == {"pool (nats away)"}
        checks = [c for c in fleet.qd_json("doctor", "--via", beta.name)["checks"] if c["what"] == "backbone"]
        assert any(c["ok"] is False and "nats" in c["text"] for c in checks), checks
