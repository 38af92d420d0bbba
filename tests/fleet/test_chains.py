"""What a mesh decided and what happened to it, against real agents: told the same everywhere, proved to strangers, and
there after deaths, cuts and damage."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.home import Home
from agent.opmessage import NAMESPACE, build_op, new_ulid
from discovery.errors import QuarterdeckError
from tests.fleet.harness import Agent, Fleet, wait_for
from tests.fleet.namespaces import Host, lan
from tests.fleet.test_ops import stranger_key
from tui.client import Client
from tui.signers import find_signer

pytestmark = pytest.mark.fleet

YEAR_MS = 365 * 24 * 3600 * 1000
NO_TIMER = ("--suspicion-ms", "120000")
SPEC = b'[[daemon]]\nname = "job"\ncommand = ["/nowhere/job"]\non = "kind=compute"\nall = true\n'


def op(
    fleet: Fleet,
    at: Agent,
    verb: str,
    *,
    key: Path | None = None,
    ahead_ms: int = 0,
    content: bytes | None = None,
    deadline_ms: int | None = None,
    chains: list[str] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """An op for this node, signed and handed over to it; what it answers."""

    async def go(client: Client) -> Any:
        signer = await find_signer(Home.open(fleet.home), key)
        challenge = await client.challenge(client.id)
        now_ms = int(challenge["wall_ms"]) + ahead_ms
        message = build_op(
            verb,
            deadline_ms=deadline_ms,
            chains=chains,
            fields=fields,
            mesh=at.mesh,
            target=client.id,
            op_id=new_ulid(now_ms, os.urandom(10)),
            nonce=str(challenge["nonce"]),
            now_ms=now_ms,
        )
        signature = await signer.sign(message, NAMESPACE)
        letter = {"target": client.id, "message": message, "signature": signature}
        return await client.call("op", letter | ({"content": content} if content else {}), 10.0)

    return dict(fleet.ask(at, go))


def applied(fleet: Fleet, at: Agent, spec: bytes, key: Path | None = None) -> dict[str, Any]:
    """As `qd apply` on top of whatever is in force."""
    import hashlib

    return op(fleet, at, "apply", key=key, content=spec, sha256=hashlib.sha256(spec).hexdigest())


def audit(fleet: Fleet, at: Agent) -> list[dict[str, Any]]:
    async def go(client: Client) -> Any:
        rows: list[Any] = []
        offset: int | None = 0
        while offset is not None:
            page = await client.ask("audit", {"offset": offset})
            rows += page["rows"]
            offset = page["next"]
        return rows

    return list(fleet.ask(at, go))


def told(fleet: Fleet, at: Agent, op_id: str) -> dict[str, Any]:
    """The row of an op in the audit of a node, {} while it has none."""
    return next((row for row in audit(fleet, at) if row["op_id"] == op_id), {})


def roster(fleet: Fleet, at: Agent) -> list[dict[str, Any]]:
    return list(fleet.ask(at, lambda client: client.ask("operators"))["operators"])


def granted(fleet: Fleet, at: Agent, key: Path, role: str = "admin") -> dict[str, Any]:
    line = key.with_name(key.name + ".pub").read_text().strip()
    return op(fleet, at, "grant_operator", line=f'environment="QD_ROLE={role}" {line}')


def fingerprint(key: Path) -> str:
    done = subprocess.run(
        ["ssh-keygen", "-lf", str(key)], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.split()[1]


def chains_db(fleet: Fleet, agent: Agent) -> Path:
    return fleet.home / "state" / agent.mesh / agent.name / "chains.db"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Nodes a, b and c, for tests that leave them as they are."""
    with Fleet(tmp_path_factory.mktemp("trio") / "home") as fleet:
        fleet.init()
        fleet.boot("a", "b", "c", flags=NO_TIMER)
        yield fleet


def three(fleet: Fleet) -> tuple[Agent, Agent, Agent]:
    return fleet.agents["a"], fleet.agents["b"], fleet.agents["c"]


def test_op_is_in_the_audit_of_every_node_with_its_signature(trio: Fleet) -> None:
    answer = op(trio, trio.agents["b"], "cordon")
    assert (answer["result"], answer["recorded"]) == ("done", "replicated")
    for agent in three(trio):
        row = wait_for(
            lambda agent=agent: (r := told(trio, agent, answer["op_id"])) and r["result"] == "done" and r,
            f"the op in the audit of {agent.name}",
        )
        assert row["verified"] is True and (row["op"], row["target"], row["node"]) == ("cordon", "b", "b")
    assert op(trio, trio.agents["b"], "uncordon")["result"] == "done"


@pytest.mark.parametrize(
    ("who", "ahead_ms", "code"), [("stranger", 0, "unknown_key"), ("admin", YEAR_MS, "not_yet")]
)
def test_refusal_is_in_the_audit_of_every_node_with_its_reason(
    trio: Fleet, tmp_path: Path, who: str, ahead_ms: int, code: str
) -> None:
    key = stranger_key(tmp_path) if who == "stranger" else None
    answer = op(trio, trio.agents["c"], "drain", key=key, ahead_ms=ahead_ms)
    assert (answer["result"], answer["code"]) == ("refused", code)
    for agent in three(trio):
        row = told(trio, agent, answer["op_id"])
        assert (row["result"], row["node"]) == ("refused", "c") and row["reason"].startswith(f"{code}: ")
    assert trio.rows("a")["c"]["state"] == "alive"


def test_export_is_verified_by_stock_ssh_keygen_and_an_altered_byte_is_not(
    trio: Fleet, tmp_path: Path
) -> None:
    for agent in three(trio):
        op(trio, agent, "uncordon")
    place = tmp_path / "export"
    done = trio.qd("audit", "--via", "a", "--export", str(place))
    assert done.returncode == 0, done.stderr
    files = sorted(path for path in place.glob("*.json") if path.name != "audit.json")
    assert len(files) >= 3 and (place / "README").exists()

    def verify(path: Path, message: bytes) -> int:
        words = ["ssh-keygen", "-Y", "verify", "-f", str(place / "allowed_signers"), "-I", "operator"]
        words += ["-n", NAMESPACE, "-s", f"{path}.sig"]
        return subprocess.run(words, input=message, capture_output=True, timeout=10).returncode

    for path in files:
        message = path.read_bytes()
        assert verify(path, message) == 0, path
    at = random.randrange(len(message))
    assert verify(path, message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]) != 0


def test_granted_operator_may_everywhere_and_a_revoked_one_nowhere(trio: Fleet, tmp_path: Path) -> None:
    ben = stranger_key(tmp_path, "ben")
    a, b, c = three(trio)
    assert applied(trio, b, SPEC, ben)["code"] == "unknown_key"
    assert granted(trio, a, ben)["result"] == "done"
    for agent in (b, c):
        wait_for(
            lambda agent=agent: fingerprint(ben) in {r["fingerprint"] for r in roster(trio, agent)},
            f"ben in the roster of {agent.name}",
        )
        answer = applied(trio, agent, SPEC.replace(b"job", agent.name.encode()), ben)
        assert (answer["result"], answer["recorded"]) == ("done", "replicated"), answer
    for agent in three(trio):
        wait_for(
            lambda agent=agent: (
                trio.ask(agent, lambda client: client.ask("spec"))["op_id"] == answer["op_id"]
            ),
            f"the spec in force at {agent.name}",
            1.0,
        )
    assert op(trio, a, "cordon", key=ben)["result"] == "done"
    assert op(trio, a, "uncordon", key=ben)["result"] == "done"
    assert op(trio, a, "revoke_operator", fingerprint=fingerprint(ben), last=None)["result"] == "done"
    for agent in three(trio):
        wait_for(
            lambda agent=agent: [r for r in roster(trio, agent) if r["revoked"]],
            f"ben revoked at {agent.name}",
            1.0,
        )
        answer = applied(trio, agent, SPEC, ben)
        assert (answer["result"], answer["code"]) == ("refused", "revoked")
    done = trio.qd("cordon", "c", "--via", "b", "--operator-key", str(ben))
    assert done.returncode == 4 and "revoked" in done.stderr
    assert applied(trio, a, b"# nothing to run\n")["result"] == "done"


def loads_then(fleet: Fleet, via: Agent) -> list[dict[str, Any]]:
    """What the nodes recorded of their loads within the last minute."""
    now_ms = time.time_ns() // 1_000_000
    rows = fleet.ask(via, lambda client: client.past(now_ms - 60_000, now_ms, now_ms))["rows"]
    return [row for row in rows if row["samples"]]


def test_last_of_a_node_that_died_is_told_by_a_holder(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "c")
    assert applied(fleet, a, SPEC)["result"] == "done"
    own = wait_for(
        lambda: (f := fleet.node(c)["recent_failures"]) and f[0]["age_ms"] > 2_500 and f,
        "c failed to start what it is to run, and two ticks passed",
    )
    c_id = fleet.entry(c).id
    times = [
        {row["at_ms"] for row in fleet.ask(a, lambda client: client.failures())["rows"] if row["node"] == "c"}
        for _ in range(2)
    ]
    assert times[0] <= times[1], "a failure keeps its time"
    wait_for(lambda: len(loads_then(fleet, a)) == 3, "each has recorded its load")
    at, wall_ms = c.signal(signal.SIGKILL), time.time_ns() // 1_000_000
    for witness in (a, b):
        witness.wait("node.changed", node="c", to="dead")
        page = fleet.ask(witness, lambda client: client.node(c_id))
        assert page["answered_by"] in ("a", "b")
        assert 0 <= page["age_ms"] <= (time.monotonic() - at) * 1000 + 5_000
        assert own[0]["reason"] in {failure["reason"] for failure in page["recent_failures"]}
        assert [daemon["name"] for daemon in page["daemons"]] == ["job"]
        rows = [
            row for row in fleet.ask(witness, lambda client: client.failures())["rows"] if row["node"] == "c"
        ]
        assert rows and {row["from_replica"] for row in rows} <= {"a", "b"}
        past = {row["node"]: row for row in loads_then(fleet, witness)}
        assert past["c"]["from_replica"] in ("a", "b"), "the dead one's loads, from a copy of its chain"
        assert past["a"]["from_replica"] is past["b"]["from_replica"] is None
        assert all(0 < row["samples"][0][2] <= 1000 for row in past.values())
        assert past["c"]["samples"][0][0] <= wall_ms


def test_every_acknowledged_op_outlives_kills_at_random_moments(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b", flags=NO_TIMER)
    dice = random.Random(os.urandom(8))
    acknowledged: list[str] = []
    for _ in range(4):
        end = time.monotonic() + dice.uniform(0.3, 0.8)
        killed = False
        while not killed:
            if time.monotonic() > end and not killed:
                os.kill(b.pid, signal.SIGKILL)
                killed = True
            with contextlib.suppress(QuarterdeckError, OSError):
                answer = op(fleet, b, dice.choice(["cordon", "uncordon"]))
                if answer["result"] == "done":
                    acknowledged.append(answer["op_id"])
        b.wait_exit()
        b.start()
        b.wait("node.ready")
    assert len(acknowledged) >= 8
    for agent in (b, a):
        wait_for(
            lambda agent=agent: (
                set(acknowledged) <= {row["op_id"] for row in audit(fleet, agent) if row["verified"]}
            ),
            f"all {len(acknowledged)} ops in the audit of {agent.name}",
        )


def test_flipped_byte_of_a_stopped_node_is_named_and_fetched_again(fleet: Fleet) -> None:
    a, _, c = fleet.boot("a", "b", "c", flags=NO_TIMER)
    op_ids = [op(fleet, a, verb)["op_id"] for verb in ("cordon", "uncordon", "cordon", "uncordon")]
    wait_for(lambda: told(fleet, c, op_ids[-1]), "all is at c")
    c.stop()
    path = chains_db(fleet, c)
    content = bytearray(path.read_bytes())
    for found in re.finditer(op_ids[1].encode(), bytes(content)):
        content[found.start()] ^= 1
    path.write_bytes(content)
    c.start()
    c.wait("node.ready")
    named = wait_for(
        lambda: [
            k for k in fleet.ask(c, lambda client: client.checks()) if k["what"] == "chains" and not k["ok"]
        ],
        "the damage is named",
    )
    assert "chain admin" in named[0]["text"] and "not the bytes that were written" in named[0]["text"]
    wait_for(lambda: told(fleet, c, op_ids[1]).get("verified"), "what was damaged is there again")
    assert [row["op_id"] for row in audit(fleet, c) if row["op_id"] in op_ids] == op_ids


@pytest.mark.parametrize("how", ["deleted", "truncated", "scribbled"])
def test_node_that_lost_its_chains_has_them_again_and_goes_on(fleet: Fleet, how: str) -> None:
    a, b = fleet.boot("a", "b", flags=NO_TIMER)
    before = [op(fleet, x, "uncordon")["op_id"] for x in (a, b, b)]
    wait_for(lambda: told(fleet, a, before[-1]), "all is at a")
    b.stop()
    path = chains_db(fleet, b)
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(os.urandom(path.stat().st_size))
    for extra in ("-wal", "-shm"):
        path.with_name(path.name + extra).unlink(missing_ok=True)
    b.start()
    b.wait("node.ready")
    b.wait("node.joined", node="a")
    answer = op(fleet, b, "cordon")
    assert answer["result"] == "done", answer
    for agent in (a, b):
        wait_for(
            lambda agent=agent: (
                {*before, answer["op_id"]}
                <= {row["op_id"] for row in audit(fleet, agent) if row["result"] == "done"}
            ),
            f"ops from before and after in the audit of {agent.name}",
        )


def test_host_that_began_with_another_roster_is_named(fleet: Fleet, tmp_path: Path) -> None:
    a = fleet.agent("a", *NO_TIMER).start()
    with Fleet(tmp_path / "other") as other:
        shutil.copytree(fleet.home / "config", other.home / "config")
        genesis = Home.open(other.home).mesh_genesis_file("alpha")
        genesis.write_text(genesis.read_text() + stranger_key(tmp_path).with_suffix(".pub").read_text())
        b = other.agent("b", *NO_TIMER)
        b.argv += ["--join", fleet.addr(a)]
        b.start()
        for agent, theirs, home in ((a, "b", fleet), (b, "a", other)):
            assert theirs in agent.wait("roster.differs", other=theirs)["reason"]
            (check,) = [c for c in home.ask(agent, lambda client: client.checks()) if c["what"] == "chains"]
            assert check["ok"] is False and f"{theirs}: began with another roster" in check["text"]


def test_home_without_room_refuses_ops_for_that_reason_and_recovers(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    disk = tmp_path / "home" / "state"
    disk.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        with Fleet(tmp_path / "home") as fleet:
            fleet.init()
            a, b = fleet.boot("a", "b", flags=NO_TIMER)
            assert op(fleet, a, "cordon")["recorded"] == "replicated"
            with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(b"\0" * 4096)
            answer = wait_for(
                lambda: (r := op(fleet, a, "uncordon"))["result"] == "refused" and r, "ops are refused"
            )
            assert answer["code"] == "journal_full" and "disk" in answer["reason"]
            assert a.running and fleet.rows(b)["a"]["state"] == "alive" and fleet.rows(b)["a"]["cordoned"]
            (disk / "filler").unlink()
            answer = wait_for(lambda: (r := op(fleet, a, "uncordon"))["result"] == "done" and r, "ops again")
            wait_for(lambda: told(fleet, b, answer["op_id"]), "b has it")
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def asked(host: Host, *words: str) -> Any:
    done = host.qd(*words, "--json")
    assert done.stdout.strip(), (words, done.stderr)
    return json.loads(done.stdout)


def seen(host: Host) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Audit of ops and roster in the view of the one node of a host, as far as they have to be alike."""
    keys = ("at_ms", "op_id", "op", "target", "operator", "result", "reason", "verified", "position")
    rows = [row for row in asked(host, "audit") if row["position"]]
    members = [(row["fingerprint"], row["role"], bool(row["revoked"])) for row in asked(host, "operators")]
    return [tuple(str(row[key]) for key in keys) for row in rows], sorted(map(str, members))


def test_two_sides_of_a_cut_agree_after_it_and_what_a_revoked_operator_did_meanwhile_is_void(
    tmp_path: Path,
) -> None:
    with lan(tmp_path) as net:
        one, two = net.host(), net.host()
        ben = stranger_key(tmp_path, "ben")
        a = one.agent("a", *NO_TIMER).start()
        a.wait("node.ready")
        b = two.agent("b", *NO_TIMER, join=one).start()
        b.wait("node.joined", node="a")
        words = ("operators", "grant", f"{ben}.pub", "--role", "admin")
        (granted,) = asked(one, *words)
        assert (granted["result"], granted["recorded"]) == ("done", "replicated")
        (before,) = asked(two, "cordon", "b", "--operator-key", str(ben))
        assert before["result"] == "done", before
        two.cut()
        (revoked,) = asked(one, "operators", "revoke", "ben")
        assert (revoked["result"], revoked["recorded"]) == ("done", "local")
        spec = tmp_path / "spec.toml"
        spec.write_bytes(SPEC)
        (void,) = asked(two, "apply", str(spec), "--operator-key", str(ben))
        (ours,) = asked(two, "uncordon", "b")
        (theirs,) = asked(one, "cordon", "a")
        assert {answer["recorded"] for answer in (void, ours, theirs)} == {"local"}
        two.mend()
        mended = time.monotonic()
        wait_for(
            lambda: (s := seen(one)) == seen(two) and any(void["op_id"] in row for row in s[0]),
            "both see the same",
            15.0,
        )
        assert time.monotonic() - mended <= 10.0
        rows = {row["op_id"]: row for row in asked(two, "audit")}
        assert rows[void["op_id"]]["result"] == "void" and "revoked" in rows[void["op_id"]]["reason"]
        assert {rows[answer["op_id"]]["result"] for answer in (before, ours, theirs)} == {"done"}
        assert asked(two, "apply", "--show")["op_id"] is None


def artifact(fleet: Fleet, via: Agent, name: str = "blob") -> dict[str, Any]:
    """Its row in `qd chains`, {} while there is none."""
    rows = fleet.ask(via, lambda client: client.ask("chains"))["rows"]
    return next((row for row in rows if row["name"] == name and row["kind"] == "artifact"), {})


def put(
    fleet: Fleet, folder: Path, via: Agent, *, key: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Puts 1.5 MiB as `blob`, to be held twice."""
    (folder / "blob").write_bytes(random.Random(5).randbytes(3 << 19))
    words = ["put", str(folder / "blob"), "--replicas", "2", "--via", via.name]
    return fleet.qd(*words, *(["--operator-key", str(key)] if key else []))


def test_artifact_is_copied_moves_off_a_drained_holder_and_its_put_is_in_every_audit(
    fleet: Fleet, tmp_path: Path
) -> None:
    nodes = fleet.boot("a", "b", "c", flags=NO_TIMER)
    refused = put(fleet, tmp_path, nodes[0], key=stranger_key(tmp_path))
    assert refused.returncode == 4 and "roster" in refused.stderr, refused.stderr
    assert put(fleet, tmp_path, nodes[0]).returncode == 0
    row = wait_for(lambda: (r := artifact(fleet, nodes[0])).get("held") == 2 and r, "two copies")
    assert 0 < row["stabilising_ms"] <= 60_000, (
        "who pulled a copy keeps it for a minute, and says so elsewhere"
    )
    drained = nodes[0]  # who pulled its copy gives it up only a minute later
    stays = next(agent for agent in nodes[1:] if agent.name in row["holders"])
    spare = next(agent for agent in nodes if agent.name not in row["holders"])
    assert op(fleet, drained, "drain")["result"] in ("done", "accepted")
    wait_for(
        lambda: set(artifact(fleet, stays).get("holders", ())) == {stays.name, spare.name},
        "the copy of the drained holder moved to the third node",
    )
    done = fleet.qd("get", "blob", "--via", drained.name, "-o", str(tmp_path / "got"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got").read_bytes() == (tmp_path / "blob").read_bytes()
    for agent in nodes:
        rows = [row for row in audit(fleet, agent) if row["op"] == "put"]
        assert [(row["result"], row["verified"], row["node"]) for row in rows] == [
            ("refused", None, "a"),
            ("done", True, "a"),
        ], rows
