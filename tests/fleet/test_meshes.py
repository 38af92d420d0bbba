"""Several meshes of one home, seen and commanded from any of them; all of it on the pool and on a NATS server."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.views import View

pytestmark = pytest.mark.fleet

TTL_S = 6.0
SUMMARY_TTL_S = 8.0


@dataclass
class World:
    """Meshes on loopback with one backbone."""

    fleet: Fleet
    flags: tuple[str, ...]
    agents: dict[str, Agent] = field(default_factory=dict)

    def mesh(self, mesh: str, *kinds: str) -> list[Agent]:
        """Founds a mesh and starts a node of each kind; they are named by mesh, kind and number."""
        self.fleet.init(mesh)
        made = []
        for kind in kinds:
            number = sum(1 for a in self.agents.values() if a.mesh == mesh and a.kind == kind)
            made.append(self.start(mesh, kind, f"{mesh}-{kind}-{number}"))
        self.fleet.converged(made)
        return made

    def start(self, mesh: str, kind: str, name: str) -> Agent:
        self.agents[name] = self.fleet.agent(name, *self.flags, mesh=mesh, kind=kind).start()
        return self.agents[name]

    def everybody(self) -> set[tuple[str, str]]:
        return {(a.mesh, a.name) for a in self.agents.values() if a.running}

    @contextlib.contextmanager
    def views(self, *agents: Agent) -> Iterator[list[View]]:
        """Views of these agents, each showing everybody and who publishes each mesh."""
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(View(self.fleet, agent)) for agent in agents]
            meshes = {a.mesh for a in self.agents.values() if a.kind in ("gateway", "console")}
            for view in found:
                view.wait(lambda v: v.nodes() == self.everybody(), f"shows {sorted(self.everybody())}", 30)
                view.wait(lambda v: all(v.publisher(m) for m in meshes), f"knows who publishes {meshes}", 30)
            yield found


@pytest.fixture(params=["pool", "nats"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        flags: tuple[str, ...] = ("--suspicion-ms", "120000")
        if request.param == "nats":
            from tests.nats_server import NatsServer

            server = stack.enter_context(NatsServer(tmp_path))
            flags += ("--backbone", server.url)
        fleet = stack.enter_context(Fleet(tmp_path / "home"))
        yield World(fleet, flags)


def test_unbalanced_meshes_every_view_lists_the_same(world: World) -> None:
    alpha = world.mesh("alpha", "gateway", "broker", "compute")
    beta = world.mesh("beta", "gateway", "broker", "broker", "broker", "compute")
    gamma = world.mesh("gamma", "console")
    with world.views(alpha[0], alpha[2], beta[0], beta[1], gamma[0]) as views:
        for view in views:
            assert set(view.meshes) == {"alpha", "beta", "gamma"}
            assert view.publisher("gamma") == "gamma-console-0"
            assert view.meshes["beta"]["nodes"]["total"] == 5
            sources = {
                row["mesh"]: row["source"] for row in view.rows.values() if row["mesh"] != view.agent.mesh
            }
            assert set(sources.values()) == {"directory"}


def test_gateway_of_another_mesh_is_killed_by_message(world: World) -> None:
    alpha = world.mesh("alpha", "gateway", "console")
    beta = world.mesh("beta", "gateway", "gateway", "broker")
    victim = beta[1]
    with world.views(alpha[1], alpha[0], beta[0], beta[2]) as views:
        began = time.monotonic()
        (answer,) = world.fleet.qd_json("kill", victim.name, "--via", alpha[1].name)
        assert (answer["result"], answer["state"], answer["route"]) == ("done", "leaving", "direct")
        assert victim.wait_exit() == 0
        stopped = victim.wait("node.stopping")["seen_at"]
        for view in views:
            view.wait(lambda v: victim.name in v.gone_at, f"{victim.name} gone")
            assert view.gone_at[victim.name] - stopped < 1.0, (view.agent.name, began)
        for agent in (alpha[0], alpha[1], beta[0], beta[2]):
            if agent.kind != "broker" or agent.mesh == "beta":
                assert agent.wait("node.evicted", node=victim.name)["source"] == "left"
        op_id = answer["op_id"]
        assert victim.of("control.received", op_id=op_id)
        assert alpha[1].wait("control.sent", op_id=op_id)["target"] == victim.name


@pytest.mark.parametrize("how", ["exit", "goodbye", "update", "stop"])
def test_holder_goes_another_publishes_and_no_view_blanks(world: World, how: str) -> None:
    alpha = world.mesh("alpha", "console", "broker")
    beta = world.mesh("beta", "gateway", "gateway", "compute")
    with world.views(alpha[0], alpha[1], beta[2]) as views:
        holder = world.agents[str(views[0].publisher("beta"))]
        other = next(a for a in beta[:2] if a is not holder)
        for view in views:
            view.publishers.clear()
        # A graceful end is over at once; the others are found out.
        limit_s = {"exit": TTL_S + 1, "stop": TTL_S + 1, "goodbye": 0.5, "update": 0.5}[how]
        began = time.monotonic()
        if how == "exit":
            holder.signal(signal.SIGKILL)
        elif how == "goodbye":
            holder.signal(signal.SIGTERM)
        elif how == "stop":
            holder.signal(signal.SIGSTOP)
        else:
            (answer,) = world.fleet.qd_json("update", holder.name, "--via", other.name)
            assert answer["result"] == "accepted"
            began = wait_for(
                lambda: [
                    e["seen_at"] for e in other.of("node.changed", node=holder.name) if e["to"] == "updating"
                ],
                f"{other.name} sees the update",
            )[0]
        try:
            claimed = other.wait("lease.changed", mesh="beta", to=other.name)["seen_at"]
            assert claimed - began < limit_s
            for view in views:
                view.wait(lambda v: v.publisher("beta") == other.name, f"{other.name} publishes beta")
            time.sleep(0.2)
            for view in views:
                assert not view.blanks, view.agent.name
                assert view.problem is None
        finally:
            if how == "stop":
                holder.signal(signal.SIGCONT)
        if how == "stop":  # it has overslept its lease, and must not take it back
            holder.wait("lease.changed", mesh="beta", to=other.name)
            assert other.of("lease.changed", mesh="beta")[-1]["to"] == other.name


def test_a_mesh_that_dies_is_shown_expired_with_its_age(world: World) -> None:
    alpha = world.mesh("alpha", "console", "broker")
    beta = world.mesh("beta", "gateway", "compute")
    with world.views(alpha[0], alpha[1]) as views:
        for agent in beta:
            agent.signal(signal.SIGKILL)
        for view in views:
            view.wait(lambda v: v.meshes["beta"]["expired"], "beta expired")
            row = view.meshes["beta"]
            assert (
                row["age_ms"] >= SUMMARY_TTL_S * 1000
                and row["nodes"]["alive"] == 0
                and row["nodes"]["dead"] == 2
            )
            view.wait(lambda v: v.rows[beta[1].name]["state"] == "dead", "its nodes are not shown as live")
            assert "beta expired" in view.rows[beta[1].name]["evidence"]["text"]
        done = world.fleet.qd("kill", beta[0].name, "--via", alpha[0].name, "--yes")
        assert done.returncode == 3, done.stderr
        world.agents.pop(beta[0].name).start()
        back = beta[0]
        world.agents[back.name] = back
        for view in views:
            view.wait(lambda v: not v.meshes["beta"]["expired"], "beta is back", 30)


def test_publisher_that_comes_back_at_another_port_is_followed_there(fleet: Fleet) -> None:
    world = World(fleet, ("--suspicion-ms", "120000"))
    (watcher,) = world.mesh("alpha", "console")
    (gateway,) = world.mesh("beta", "gateway")
    with world.views(watcher) as (view,):
        before = view.rows[gateway.name]
        gateway.signal(signal.SIGKILL)
        gateway.wait_exit()
        gateway.start().wait("node.ready")
        view.wait(
            lambda v: v.rows[gateway.name]["incarnation"] > before["incarnation"], "the new process's row"
        )
        row = view.rows[gateway.name]
        assert row["state"] == "alive" and row["addr"] != before["addr"]
        view.wait(lambda v: v.meshes["beta"]["route"] == "direct", "the route to it")
        assert not view.blanks


def test_three_candidates_settle_on_one_publisher(world: World) -> None:
    alpha = world.mesh("alpha", "console")
    world.mesh("beta", "gateway", "gateway", "console")
    with world.views(alpha[0]) as (view,):
        view.publishers.clear()
        end = time.monotonic() + TTL_S + 2
        while time.monotonic() < end:
            assert not view.blanks
            time.sleep(0.2)
        assert not view.publishers
        assert view.meshes["beta"]["age_ms"] < 4_000


@pytest.mark.soak
def test_three_candidates_have_one_publisher_for_five_minutes(world: World) -> None:
    alpha = world.mesh("alpha", "console")
    world.mesh("beta", "gateway", "gateway", "console")
    with world.views(alpha[0]) as (view,):
        view.publishers.clear()
        end = time.monotonic() + 300
        while time.monotonic() < end:
            assert not view.blanks and not view.publishers
            time.sleep(0.5)
