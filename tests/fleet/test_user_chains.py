"""Users' chains with real agents: made by a spec, appended to and read anywhere, whole after a holder's death."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.test_chains import applied, audit, op
from tui.client import Client

pytestmark = pytest.mark.fleet
RECORDED = ("replicated", "local")
"""Local where the other holder took longer than an op waits for it; that both have it is looked at by `tail`."""

NO_TIMER = ("--suspicion-ms", "120000")
SPEC = b'[[chain]]\nname = "log"\nreplicas = 2\n'


def row(fleet: Fleet, at: Agent) -> dict[str, Any]:
    """The chain as `qd chains` has it there, {} while nobody holds it."""
    rows = fleet.ask(at, lambda client: client.ask("chains"))["rows"]
    found = [row for row in rows if row["name"] == "log"]
    assert len(found) <= 1, found
    return dict(found[0]) if found else {}


def tail(fleet: Fleet, at: Agent, limit: int = 100) -> list[dict[str, Any]]:
    async def go(client: Client) -> list[dict[str, Any]]:
        return [row async for row in client.tail("log", limit)]

    return list(fleet.ask(at, go))


def appended(fleet: Fleet, at: Agent, content: bytes) -> dict[str, Any]:
    return op(fleet, at, "append", content=content, chain="log", sha256=hashlib.sha256(content).hexdigest())


def held_by_two(fleet: Fleet, at: Agent) -> dict[str, Any]:
    return dict(wait_for(lambda: (r := row(fleet, at)).get("held") == 2 and r, "two nodes hold it"))


def test_chain_of_the_spec_is_appended_to_read_everywhere_and_whole_after_a_holder_died(
    fleet: Fleet, tmp_path: Path
) -> None:
    nodes = fleet.boot("a", "b", "c", flags=NO_TIMER)
    assert applied(fleet, nodes[0], SPEC)["result"] == "done"
    held = held_by_two(fleet, nodes[1])
    assert (held["kind"], held["desired"]) == ("chain", 2) and held["leader"] in held["holders"]
    (away,) = (node for node in nodes if node.name not in held["holders"])
    holders = [node for node in nodes if node is not away]
    for number in range(4):
        answer = appended(fleet, holders[number % 2], b"record %d\n" % number)
        assert answer["result"] == "done" and answer["recorded"] in RECORDED, answer
    refused = appended(fleet, away, b"no")
    assert (refused["result"], refused["code"]) == ("refused", "not_held")
    assert all(holder.name in refused["reason"] for holder in holders)
    (tmp_path / "record").write_bytes(b"\xff\x00")
    done = fleet.qd("append", "log", str(tmp_path / "record"), "--via", away.name, "--json")
    (result,) = json.loads(done.stdout)
    assert (result["result"], result["target"]) == ("done", held["leader"]) and result["recorded"] in RECORDED
    told = tail(fleet, away)
    assert [found.get("text") for found in told] == [*(f"record {n}\n" for n in range(4)), None]
    assert told[4]["base64"] == "/wA=" and all(found["verified"] for found in told)
    assert all(tail(fleet, node) == told for node in holders)
    shown = fleet.qd("tail", "log", "--json", "--via", away.name, "--limit", "2")
    assert [json.loads(line) for line in shown.stdout.splitlines()] == told[3:]
    grown = row(fleet, away)
    assert grown["records"] == 5 and grown["size"] > 0

    def appends(result: str) -> list[str]:
        return [r["op_id"] for r in audit(fleet, away) if (r["op"], r["result"]) == ("append", result)]

    wait_for(lambda: len(appends("done")) == 5, "every append in the audit with its result")
    assert appends("refused") == [refused["op_id"]]
    dies = fleet.agents[held["leader"]]
    dies.signal(signal.SIGKILL)
    left = [node for node in nodes if node is not dies]
    for node in left:
        node.wait("node.changed", node=dies.name, to="dead")
        assert tail(fleet, node) == told


@pytest.mark.soak
def test_chain_of_a_drained_holder_moves_once_its_minute_of_settling_is_over(fleet: Fleet) -> None:
    nodes = fleet.boot("a", "b", "c", flags=NO_TIMER)
    assert applied(fleet, nodes[0], SPEC)["result"] == "done"
    held = held_by_two(fleet, nodes[0])
    drained = fleet.agents[held["leader"]]
    assert appended(fleet, drained, b"one")["result"] == "done"
    one, two = (node for node in nodes if node is not drained)
    assert op(fleet, drained, "drain")["result"] in ("done", "accepted")
    wait_for(
        lambda: set(row(fleet, one).get("holders", ())) == {one.name, two.name},
        "the copy of the drained holder moved to the third node",
        100.0,
    )
    assert all([found["text"] for found in tail(fleet, node)] == ["one"] for node in nodes)
    assert not [
        r for r in fleet.ask(drained, lambda client: client.failures())["rows"] if r["target"] == "log"
    ]
