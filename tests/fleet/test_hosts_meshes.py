"""Two meshes on hosts that really differ: clocks an hour apart, a cable pulled between them, no route but a gateway.
All of it on the pool, and on a NATS server on a host of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.harness import BIN, Agent, wait_for
from tests.fleet.namespaces import Host, Lan, Segment, lan, need_nat
from tests.nats_server import NatsServer

pytestmark = pytest.mark.fleet

NO_TIMER = ("--suspicion-ms", "120000")


@pytest.fixture(params=["pool", "nats"])
def kind(request: pytest.FixtureRequest) -> str:
    """What carries the backbone."""
    return str(request.param)


def first(net: Lan, *segments: Segment) -> Host:
    """A host whose home holds alpha and beta; those made after it get a copy."""
    host = net.host(*segments)
    host.fleet.init("beta")
    return host


@contextlib.contextmanager
def backbone(kind: str, net: Lan, one: Host, *segments: Segment) -> Iterator[tuple[str, ...]]:
    """The flags by which agents find the backbone: the pool at host `one`, or a server on a further host, with a leg
    in each of these segments."""
    if kind == "pool":
        yield ("--backbone", one.seed)
        return
    hub = net.host(*segments)
    with NatsServer(net.base, inside=hub.inside, host="0.0.0.0") as server:
        urls = ",".join(f"{segment.address(hub.number)}:{server.port}" for segment in hub.segments)
        yield ("--backbone", f"nats://{urls}")


def asked(host: Host, *words: str) -> Any:
    done = host.qd(*words, "--json")
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout)


def rows(host: Host, via: Agent) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in asked(host, "nodes", "--via", via.name)}


def mesh(host: Host, via: Agent, name: str) -> dict[str, Any]:
    return next((row for row in asked(host, "meshes", "--via", via.name) if row["mesh"] == name), {})


def lives(host: Host, via: Agent, name: str, nodes: int) -> bool:
    """Whether that mesh is live in the view, with that many nodes alive."""
    row = mesh(host, via, name)
    alive = [r for r in rows(host, via).values() if r["mesh"] == name and r["state"] == "alive"]
    return bool(row) and not row["expired"] and len(alive) == nodes


def test_clocks_an_hour_apart_change_nothing_between_meshes(tmp_path: Path, kind: str) -> None:
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None:
        pytest.skip("needs libfaketime (Debian's package faketime)")
    with lan(tmp_path) as net, contextlib.ExitStack() as stack:
        ahead = {"LD_PRELOAD": str(library), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        one, two = first(net), net.host(**ahead)
        flags = stack.enter_context(backbone(kind, net, one))
        a = one.agent("a", *NO_TIMER, *flags, kind="gateway").start()
        a.wait("node.ready")
        b = two.agent("b", *NO_TIMER, *flags, kind="gateway", mesh="beta").start()
        c = two.agent("c", *NO_TIMER, mesh="beta")
        c.argv[c.argv.index("--port") + 1] = "7421"
        c.argv += ["--join", two.seed]
        c.start()
        wait_for(lambda: lives(one, a, "beta", 2) and lives(two, b, "alpha", 1), "both see both")
        for host, via, other in ((one, a, "beta"), (two, b, "alpha")):
            row = mesh(host, via, other)
            assert row["backbone"] == kind
            assert row["age_ms"] < 8_000 and 0 < row["expires_in_ms"] <= 8_000
            assert all(r["since_ms"] < 60_000 for r in rows(host, via).values())
        (answer,) = asked(one, "drain", "c", "--via", "a")
        assert answer["result"] in ("done", "accepted") and answer["route"] == "direct", answer
        assert 3_590_000 < answer["skew_ms"] < 3_610_000
        (answer,) = asked(two, "drain", "a", "--via", "b")
        assert answer["result"] in ("done", "accepted"), answer
        assert -3_610_000 < answer["skew_ms"] < -3_590_000
        b.signal(signal.SIGTERM)
        wait_for(lambda: mesh(one, a, "beta")["expired"], "beta, which nobody publishes now, expires", 15.0)


def cut_for(net: Lan, cut_s: float, kind: str) -> None:
    """A mesh of one node and one of two; the cable between them is pulled until each has expired in the other's view,
    and for at least `cut_s`; meanwhile the second loses its publisher."""
    one, two = first(net), net.host()
    with backbone(kind, net, one) as flags:
        _cut_for(one, two, cut_s, flags, kind)


def _cut_for(one: Host, two: Host, cut_s: float, flags: tuple[str, ...], kind: str) -> None:
    a = one.agent("a", *NO_TIMER, *flags, kind="gateway").start()
    a.wait("node.ready")
    b = two.agent("b", *NO_TIMER, *flags, kind="gateway", mesh="beta").start()
    d = two.agent("d", *NO_TIMER, *flags, kind="gateway", mesh="beta")
    d.argv[d.argv.index("--port") + 1] = "7421"
    d.argv += ["--join", two.seed]
    d.start()
    wait_for(lambda: lives(one, a, "beta", 2) and lives(two, b, "alpha", 1), "both see both")
    assert {mesh(one, a, "beta")["backbone"], mesh(two, d, "alpha")["backbone"]} == {kind}
    holder = mesh(two, b, "beta")["publisher"]["name"]
    gone, stays = (b, d) if holder == "b" else (d, b)
    began = time.monotonic()
    two.cut()
    gone.signal(signal.SIGKILL)
    stays.wait("lease.changed", mesh="beta", to=stays.name)
    a.wait("mesh.expired", 15.0, mesh="beta")
    stays.wait("mesh.expired", 15.0, mesh="alpha")
    assert rows(one, a)["b"]["state"] == "dead" and rows(two, stays)["a"]["state"] == "dead"
    wait_for(lambda: time.monotonic() - began > cut_s, "the cut lasts", cut_s + 1)
    assert a.running and stays.running
    two.mend()
    mended = time.monotonic()
    wait_for(lambda: lives(one, a, "beta", 1) and lives(two, stays, "alpha", 1), "both see both again", 30.0)
    assert time.monotonic() - mended < 10.0
    assert mesh(one, a, "beta")["publisher"]["name"] == stays.name
    wait_for(lambda: mesh(two, stays, "alpha")["backbone"] == kind, f"{stays.name} is back on {kind}", 10.0)


def test_meshes_that_were_cut_apart_agree_again_soon_after(tmp_path: Path, kind: str) -> None:
    with lan(tmp_path) as net:
        cut_for(net, 0.0, kind)


@pytest.mark.soak
def test_meshes_cut_apart_for_two_minutes_agree_again_soon_after(tmp_path: Path, kind: str) -> None:
    with lan(tmp_path) as net:
        cut_for(net, 120.0, kind)


@pytest.mark.soak
def test_publisher_whose_streams_get_lost_is_followed_by_a_relay_before_its_mesh_expires(
    tmp_path: Path,
) -> None:
    need_nat()
    with lan(tmp_path) as net:
        one, two, three = first(net), net.host(), net.host()
        flags = ("--backbone", one.seed)
        a = one.agent("a", *NO_TIMER, kind="gateway").start()
        a.wait("node.ready")
        b = two.agent("b", *NO_TIMER, *flags, kind="gateway", mesh="beta").start()
        b.wait("lease.changed", mesh="beta", to="b")
        d = three.agent("d", *NO_TIMER, *flags, kind="gateway", mesh="beta", join=two).start()
        d.wait("node.joined", node="b")
        wait_for(lambda: mesh(one, a, "beta").get("route") == "direct", "a follows b")
        two.swallow(one.address)
        wait_for(lambda: mesh(one, a, "beta")["route"] == "relay", "a follows b through d", 30.0)
        assert lives(one, a, "beta", 2) and not a.of("mesh.expired")


def test_node_of_another_mesh_without_a_route_is_reached_through_its_gateway(
    tmp_path: Path, kind: str
) -> None:
    with lan(tmp_path) as net, contextlib.ExitStack() as stack:
        here, there = net.segments[0], net.segment()
        one = first(net, here)
        middle, far = net.host(here, there), net.host(there)
        flags = stack.enter_context(backbone(kind, net, one, here, there))
        a = one.agent("a", *NO_TIMER, *flags, kind="gateway").start()
        a.wait("node.ready")
        g = middle.agent("g", *NO_TIMER, *flags, kind="gateway", mesh="beta").start()
        g.wait("node.ready")
        c = far.agent("c", *NO_TIMER, join=middle, mesh="beta").start()
        wait_for(lambda: lives(one, a, "beta", 2), "a sees beta", 30.0)
        assert not one.reaches(far.address, far.port)
        told = [json.loads(line) for line in one.qd("logs", "c", "--via", "a", "--json").stdout.splitlines()]
        assert ("node.ready", "c") in {(e["kind"], e["node"]) for e in told}
        argv = [*one.inside, str(BIN / "qd"), "logs", "--home", str(one.fleet.home), "c"]
        argv += ["--via", "a", "--follow", "--limit", "0"]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=one.fleet.env
        ) as following:
            try:
                (answer,) = asked(one, "drain", "c", "--via", "a")
                assert (answer["result"], answer["route"]) == ("done", "relay"), answer
                (again,) = asked(one, "resume", "c", "--via", "a")
                assert (again["result"], again["route"]) == ("done", "relay"), again
                assert following.stdout is not None
                while "alive" not in (line := following.stdout.readline()):
                    assert line, "the stream has ended"
            finally:
                following.terminate()
        (answer,) = asked(one, "kill", "c", "--via", "a")
        assert (answer["result"], answer["route"]) == ("done", "relay"), answer
        assert c.wait_exit() == 0
        assert a.wait("node.evicted", node="c")["source"] == "left"
