"""What issue 5 promises of chains, shown with real agents at length: thousands of ops under kills, a gigabyte, drains,
deaths, strangers of another version, and what is left of a node that burned."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.chain.record import Failed, Gated
from agent.daemons.leftovers import end_leftovers
from agent.home import Home
from agent.opmessage import NAMESPACE, build_op, new_ulid
from discovery.errors import QuarterdeckError
from tests.fleet.disks import place_of, records, versions
from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.test_artifacts_soak import put_all
from tests.fleet.test_chains import applied, artifact, audit, op, told
from tui.client import Client, attach_entry
from tui.signers import Signer, find_signer

pytestmark = [pytest.mark.fleet, pytest.mark.soak, pytest.mark.timeout(1500)]

NO_TIMER = ("--suspicion-ms", "120000")


@pytest.fixture
def fleet(fleet: Fleet) -> Iterator[Fleet]:
    """A home whose daemons are ended after the test, whatever became of their agents."""
    try:
        yield fleet
    finally:
        fleet.__exit__()
        end_leftovers(fleet.home / "state")


@pytest.fixture
def dice() -> random.Random:
    """Random, by a seed that a failure shows."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    return random.Random(seed)


# --- ops under kills


@dataclass
class Letters:
    """Ops as they were sent, in order, and those that were answered `done` with where they were recorded."""

    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    verbs: dict[str, str] = field(default_factory=dict)
    recorded: dict[str, str] = field(default_factory=dict)

    @property
    def doubtful(self) -> list[str]:
        return [op_id for op_id in self.sent if op_id not in self.recorded]


async def post(letters: Letters, client: Client, signer: Signer, verb: str) -> dict[str, Any]:
    """Signs an op for the node at the other end of this connection and hands it over; what it answers."""
    challenge = await client.challenge(client.id)
    now_ms = int(challenge["wall_ms"])
    op_id = new_ulid(now_ms, os.urandom(10))
    message = build_op(
        verb,
        mesh=client.mesh,
        target=client.id,
        op_id=op_id,
        nonce=str(challenge["nonce"]),
        now_ms=now_ms,
    )
    signature = await signer.sign(message, NAMESPACE)
    letters.sent[op_id] = {"target": client.id, "message": message, "signature": signature}
    letters.verbs[op_id] = verb
    answer = dict(await client.call("op", letters.sent[op_id], 10.0))
    if answer["result"] == "done":
        letters.recorded[op_id] = answer["recorded"]
    return answer


async def life(fleet: Fleet, agent: Agent, letters: Letters, ops: int, last: str, after_s: float) -> None:
    """So many ops over one connection, then one more and the kill that much later; more until the connection is gone."""
    async with await attach_entry(Home.open(fleet.home), fleet.entry(agent)) as client:
        signer = await find_signer(Home.open(fleet.home), None)
        assert (await post(letters, client, signer, "restart_daemons"))["result"] == "done"
        for number in range(ops):
            answer = await post(letters, client, signer, ("uncordon", "clear_avoid")[number % 2])
            assert answer["result"] == "done", answer
        asyncio.get_running_loop().call_later(after_s, os.kill, agent.pid, signal.SIGKILL)
        with contextlib.suppress(QuarterdeckError, OSError):
            await post(letters, client, signer, last)
            while True:
                await post(letters, client, signer, "uncordon")


def repeated(fleet: Fleet, agent: Agent, letters: Letters, op_ids: list[str]) -> dict[str, dict[str, Any]]:
    """What is answered to letters that were sent before, byte for byte."""

    async def go(client: Client) -> dict[str, dict[str, Any]]:
        return {op_id: dict(await client.call("op", letters.sent[op_id], 10.0)) for op_id in op_ids}

    return dict(fleet.ask(agent, go))


def integrity(place: Path, scratch: Path) -> dict[str, str]:
    """What SQLite says of copies of the files that a killed process left."""
    found = {}
    for name in ("journal.db", "chains.db"):
        for suffix in ("", "-wal"):
            if (place / (name + suffix)).exists():
                shutil.copy(place / (name + suffix), scratch / (name + suffix))
        with contextlib.closing(sqlite3.connect(scratch / name)) as db:
            found[name] = ", ".join(row[0] for row in db.execute("PRAGMA integrity_check"))
        for left in scratch.glob(f"{name}*"):
            left.unlink()
    return found


def test_two_thousand_ops_under_twenty_kills_lose_no_answer_and_run_no_command_twice(
    fleet: Fleet, tmp_path: Path, dice: random.Random
) -> None:
    a, b = fleet.boot("a", "b", flags=NO_TIMER)
    starts = tmp_path / "starts"
    job = f"echo $$ >> {starts}; exec sleep 3600"
    spec = f'[[daemon]]\nname = "job"\ncommand = ["sh", "-c", "{job}"]\non = "node=b"\nall = true\n'
    assert applied(fleet, a, spec.encode())["result"] == "done"

    def running() -> bool:
        rows = fleet.ask(b, lambda client: client.daemons())["rows"]
        return [row["state"] for row in rows if row["node"] == "b"] == ["running"]

    def started() -> int:
        return len(starts.read_text().splitlines())

    wait_for(lambda: running() and starts.exists(), "the job runs")
    first, asked = started(), 0
    letters = Letters()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for run in range(20):
        last = dice.choice(("restart_daemons", "uncordon"))
        known, before = set(letters.sent), started()
        asyncio.run(life(fleet, b, letters, dice.randint(85, 125), last, dice.uniform(0, 0.03)))
        b.wait_exit()
        assert integrity(place_of(fleet, b), scratch) == {"journal.db": "ok", "chains.db": "ok"}, run
        there = {row["op_id"] for row in audit(fleet, a) if row["verified"]}
        replicated = {op_id for op_id, how in letters.recorded.items() if how == "replicated"}
        assert replicated <= there, f"run {run}: {len(replicated - there)} said to be replicated are not"
        b.start()
        b.wait("node.ready")
        b.wait("node.joined", node="a")
        of_this_life = [op_id for op_id in letters.sent if op_id not in known]
        again = dice.sample(of_this_life, 5)
        again += [op_id for op_id in letters.doubtful if op_id not in {*known, *again}]
        for op_id, answer in repeated(fleet, b, letters, again).items():
            if op_id in letters.recorded:
                assert (answer["result"], answer["op_id"]) == ("done", op_id), answer
            else:
                assert answer["result"] in ("done", "unknown") or answer["code"] == "unknown_nonce", answer
        commands = sum(letters.verbs[op_id] == "restart_daemons" for op_id in of_this_life)
        asked += commands
        wait_for(running, "the job runs again", 90.0)
        assert started() - before <= commands, (
            f"run {run}: {started() - before} starts for {commands} commands"
        )
    assert len(letters.recorded) >= 2_000, len(letters.recorded)
    assert started() - first > asked // 2, "most commands were carried out"
    acknowledged = list(letters.recorded)
    wait_for(
        lambda: (
            {row["op_id"]: row["result"] for row in audit(fleet, a)}
            == {row["op_id"]: row["result"] for row in audit(fleet, b)}
        ),
        "both nodes tell the same of every op",
        30.0,
        0.5,
    )
    for agent in (a, b):
        rows = [row for row in audit(fleet, agent) if row["op_id"] in letters.sent]
        taken = Counter(row["op_id"] for row in rows if row["result"] != "refused")
        assert max(taken.values()) == 1, "each refusal is a row of its own, an op that was taken is one"
        assert [row["op_id"] for row in rows if row["op_id"] in letters.recorded] == acknowledged
        assert all(row["verified"] for row in rows if row["result"] != "refused"), agent.name
        assert all(row["result"] == "done" for row in rows if row["op_id"] in letters.recorded)
    for agent in (a, b):
        place = tmp_path / f"export-{agent.name}"
        assert fleet.qd("audit", "--via", agent.name, "--export", str(place)).returncode == 0
        for op_id, letter in letters.sent.items():
            path = place / f"{op_id}.json"
            if op_id in letters.recorded or path.exists():
                assert path.read_bytes() == letter["message"], "wholly there, or not at all"
    checks = {check["what"]: check for check in fleet.ask(b, lambda client: client.checks())}
    assert checks["chains"]["ok"] and checks["journal"]["ok"], checks


# --- another version

OF_VERSION = """
import agent.chain.record as record
record.VERSION, record.SUPPORTED = {writes}, {reads}
record.UnsupportedVersion.__init__.__defaults__ = (record.SUPPORTED,)
from agent.cli import main
main()
"""
"""An agent of another build, as far as the version byte of its records goes."""


def of_version(agent: Agent, writes: int, reads: tuple[int, ...]) -> list[str]:
    return [sys.executable, "-P", "-c", OF_VERSION.format(writes=writes, reads=reads), *agent.argv[1:]]


def check_of(fleet: Fleet, agent: Agent, what: str) -> dict[str, Any]:
    checks = fleet.ask(agent, lambda client: client.checks())
    return dict(next(check for check in checks if check["what"] == what))


@pytest.mark.parametrize(("theirs", "hint"), [(2, "this"), (0, "that")])
def test_records_of_another_version_are_refused_by_name_and_nothing_is_lost(
    fleet: Fleet, theirs: int, hint: str
) -> None:
    a, b = fleet.agent("a", *NO_TIMER), fleet.agent("b", *NO_TIMER)
    ours = b.argv
    b.argv = of_version(b, theirs, (theirs,))
    for agent in (a, b):
        agent.start()
    fleet.converged([a, b])
    at_a, at_b = op(fleet, a, "cordon"), op(fleet, b, "cordon")
    assert [(r["result"], r["recorded"]) for r in (at_a, at_b)] == [("done", "local")] * 2
    for agent, other, seen, reads in ((a, "b", theirs, 1), (b, "a", 1, theirs)):
        said = (
            f"chain admin, feed of {other}: chain record of version {seen}, this build reads {reads}; update"
        )
        wait_for(
            lambda agent=agent, said=said: [
                e for e in agent.of("chains.damaged") if e["reason"].startswith(said)
            ],
            f"{agent.name} tells what it can't read",
        )
        assert said in check_of(fleet, agent, "chains")["text"]
    assert f"update {hint} node" in check_of(fleet, a, "chains")["text"]
    assert fleet.node(a)["counters"]["chain.unsupported_version"] > 0
    assert [row["op_id"] for row in audit(fleet, a)] == [at_a["op_id"]], (
        "nothing of it is taken for something else"
    )
    assert [row["op_id"] for row in audit(fleet, b)] == [at_b["op_id"]]

    # all else goes on between them
    assert fleet.rows(a)["b"]["state"] == fleet.rows(b)["a"]["state"] == "alive"
    assert op(fleet, a, "uncordon")["result"] == op(fleet, b, "uncordon")["result"] == "done"
    put_all(fleet, fleet.home, b, {"blob": 2})
    wait_for(lambda: artifact(fleet, a).get("held") == 2, "two copies")

    # this build over what the other wrote
    b.stop()
    b.argv = ours
    b.start()
    fleet.converged([b])
    for what, name in (("chains", "chains.db"), ("journal", "journal.db")):
        check = check_of(fleet, b, what)
        assert not check["ok"] and f"chain record of version {theirs}, this build reads 1" in check["text"], (
            check
        )
        assert theirs in versions(fleet, b, name), "it is kept for who can read it"
    again = op(fleet, b, "cordon")
    assert (again["result"], again["recorded"]) == ("done", "replicated")
    wait_for(
        lambda: told(fleet, a, again["op_id"]).get("result") == "done", "what it writes now is read at a"
    )

    # a build that reads both
    b.stop()
    b.argv = of_version(b, 1, (1, theirs))
    b.start()
    fleet.converged([b])
    mine = (at_b["op_id"], again["op_id"])
    assert [row["op_id"] for row in audit(fleet, b) if row["op_id"] in mine] == list(mine)
    assert check_of(fleet, b, "journal")["ok"] and check_of(fleet, b, "chains")["ok"]
    assert a.running and not a.of("node.defect") and not b.of("node.defect")


# --- what can be shown afterwards


def test_thousand_ops_are_exported_and_verified_by_stock_ssh_keygen(
    fleet: Fleet, tmp_path: Path, dice: random.Random
) -> None:
    a, b = fleet.boot("a", "b", flags=NO_TIMER)
    letters = Letters()

    async def many() -> None:
        async with await attach_entry(Home.open(fleet.home), fleet.entry(a)) as client:
            signer = await find_signer(Home.open(fleet.home), None)
            for number in range(1_000):
                await post(letters, client, signer, ("cordon", "uncordon")[number % 2])

    asyncio.run(many())
    assert len(letters.recorded) == 1_000
    last = list(letters.sent)[-1]
    wait_for(lambda: told(fleet, b, last).get("result") == "done", "all is at b")
    place = tmp_path / "export"
    done = fleet.qd("audit", "--via", "b", "--export", str(place))
    assert done.returncode == 0, done.stderr
    words = ["ssh-keygen", "-Y", "verify", "-f", str(place / "allowed_signers"), "-I", "operator"]

    def verified(op_id: str, message: bytes) -> bool:
        argv = [*words, "-n", NAMESPACE, "-s", str(place / f"{op_id}.json.sig")]
        return subprocess.run(argv, input=message, capture_output=True, timeout=30).returncode == 0

    exported = {op_id: (place / f"{op_id}.json").read_bytes() for op_id in letters.sent}
    assert exported == {op_id: letter["message"] for op_id, letter in letters.sent.items()}
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(verified, exported, exported.values()))
        some = dice.sample(list(exported), 50)
        altered = [flipped(exported[op_id], dice) for op_id in some]
        assert not any(pool.map(verified, some, altered)), "one altered byte fails"
        swapped = [exported[other] for other in [*some[1:], some[0]]]
        assert not any(pool.map(verified, some, swapped)), "a signature is of one op alone"


def flipped(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]


CRASHER = b'[[daemon]]\nname = "job"\ncommand = ["sh", "-c", "exit 7"]\non = "node=c"\nall = true\n'


def test_last_of_a_node_that_burned_down_is_read_from_the_others(fleet: Fleet) -> None:
    nodes = fleet.boot("a", "b", "c", "d")
    c = nodes[2]
    left = [agent for agent in nodes if agent is not c]
    assert applied(fleet, nodes[0], CRASHER)["result"] == "done"
    wait_for(lambda: len(fleet.node(c)["recent_failures"]) >= 3, "its daemon crashes again and again")
    assert op(fleet, c, "cordon")["result"] == "done"
    time.sleep(2.5)  # what is older than that is with its holders
    own = [r for r in records(fleet, c) if r.emitted_at_ms < time.time() * 1000 - 2_500]
    failures = {r.disposition.reason for r in own if isinstance(r.disposition, Failed | Gated)}
    assert failures
    at = c.signal(signal.SIGKILL)
    shutil.rmtree(place_of(fleet, c))
    (fleet.home / "run" / "alpha.c.json").unlink()
    for agent in left:
        agent.wait("node.changed", node="c", to="dead")
        page = fleet.qd_json("node", "c", "--via", agent.name)
        assert page["node"]["state"] == "dead" and page["answered_by"] in ("a", "b", "d")
        assert 0 <= page["age_ms"] <= (time.monotonic() - at) * 1000 + 5_000
        assert failures <= {failure["reason"] for failure in page["recent_failures"]}
        assert [daemon["name"] for daemon in page["daemons"]] == ["job"]
        assert next(e["to"] for e in page["why"] if e["kind"] == "node.state_changed") == "joining"
        rows = [row for row in fleet.qd_json("failures", "--via", agent.name) if row["node"] == "c"]
        assert failures <= {row["reason"] for row in rows}
        assert {row["from_replica"] for row in rows} <= {"a", "b", "d"} and all(
            r["age_ms"] >= 0 for r in rows
        )
        events = fleet.qd_json("events", "--via", agent.name)
        assert [
            e["source"] for e in events if (e["kind"], e["node"], e["to"]) == ("node.changed", "c", "dead")
        ]
        assert any(
            row["op"] == "cordon" and row["node"] == "c" and row["verified"] for row in audit(fleet, agent)
        )
    shown = fleet.qd("node", "c", "--via", "a")
    assert shown.returncode == 0 and "the replica of its chain on" in shown.stdout, shown.stdout
    for agent in left:
        agent.wait("node.evicted", 90.0, node="c")
        rows = [row for row in fleet.qd_json("failures", "--via", agent.name) if row["node"] == "c"]
        assert failures <= {row["reason"] for row in rows}, "its failures are told when its row is long gone"
        page = fleet.qd_json("node", "c", "--via", agent.name)
        assert (page["node"]["state"], page["node"]["evidence"]["kind"]) == ("dead", "exited")
        assert failures <= {failure["reason"] for failure in page["recent_failures"]}
        assert page["age_ms"] > 60_000 and page["answered_by"] in ("a", "b", "d")
