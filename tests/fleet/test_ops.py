"""Ops by signed message against real agents: each takes effect, is answered, and is seen where it is observed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.harness import Fleet, wait_for

pytestmark = pytest.mark.fleet

NO_TIMER = ("--suspicion-ms", "120000")
"""Suspicion can't be what removes a node while it is raised this far."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two nodes, bee-1 and bee-2, for tests that leave them as they are; beside their home the keys `observer` and
    `expired`, which they know."""
    folder = tmp_path_factory.mktemp("pair")
    with Fleet(folder / "home") as fleet:
        fleet.init()
        allow(fleet, stranger_key(folder, "observer"), 'environment="QD_ROLE=observe"')
        allow(fleet, stranger_key(folder, "expired"), 'environment="QD_ROLE=admin",expiry-time="20200101"')
        fleet.boot("bee-1", "bee-2", flags=NO_TIMER)
        yield fleet


def stranger_key(tmp_path: Path, name: str = "stranger") -> Path:
    path = tmp_path / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)], check=True)
    return path


def allow(fleet: Fleet, key: Path, options: str) -> None:
    path = fleet.home / "config" / "authorized_operators"
    line = key.with_name(key.name + ".pub").read_text()
    path.write_text(path.read_text() + f"{options} {line}" if options else path.read_text() + line)


def copied_code(tmp_path: Path, fleet: Fleet) -> Path:
    """A copy of the three packages that the fleet's agents run from, so that a test may change it."""
    code = tmp_path / "code"
    code.mkdir()
    root = Path(__file__).resolve().parents[2]
    for package in ("discovery", "agent", "tui"):
        shutil.copytree(root / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    fleet.env["PYTHONPATH"] = str(code)
    return code


def from_copy(fleet: Fleet, name: str, *flags: str):
    agent = fleet.agent(name, *flags)
    agent.argv = [sys.executable, "-P", "-m", "agent.cli", *agent.argv[1:]]
    return agent


def one(fleet: Fleet, *words: str, status: int = 0) -> dict:
    import json

    done = fleet.qd(*words, "--json")
    assert done.returncode == status, (done.stdout, done.stderr)
    (answer,) = json.loads(done.stdout)
    for key in ("op_id", "target", "op", "result", "state", "route", "took_ms", "reason", "skew_ms"):
        assert key in answer
    return answer


def test_kill_by_message_is_left_in_the_views_of_others(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "c", flags=NO_TIMER)
    answer = one(fleet, "kill", "c", "--via", "a")
    assert (answer["result"], answer["state"], answer["route"]) == ("done", "leaving", "direct")
    assert c.wait_exit() == 0
    for witness in (a, b):
        assert witness.wait("node.evicted", node="c")["source"] == "left"
        assert not witness.of("node.changed", node="c", to="dead")
    stopping = c.of("node.stopping")[0]
    assert stopping["reason"] == "control_op" and stopping["op_id"] == answer["op_id"]
    assert a.of("control.sent")[0]["op_id"] == c.of("control.received")[0]["op_id"] == answer["op_id"]


def test_kill_of_the_node_one_asks_is_done_locally(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b", flags=NO_TIMER)
    assert one(fleet, "kill", "a", "--via", "a")["route"] == "local"
    assert a.wait_exit() == 0
    assert b.wait("node.evicted", node="a")["source"] == "left"


def test_second_kill_says_that_it_said_goodbye(fleet: Fleet) -> None:
    a, _, c = fleet.boot("a", "b", "c", flags=NO_TIMER)
    one(fleet, "kill", "c", "--via", "a")
    c.wait_exit()
    a.wait("node.evicted", node="c")
    done = fleet.qd("kill", "c", "--via", "a")
    assert done.returncode == 3
    assert "said goodbye" in done.stderr


def test_drain_cordons_and_resume_lifts_it(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b")
    assert one(fleet, "drain", "b", "--via", "a", "--deadline", "5m")["state"] == "draining"
    row = wait_for(
        lambda: (r := fleet.rows(a)["b"])["state"] == "draining" and r, "b draining in the view of a"
    )
    assert row["cordoned"] is True
    assert 200_000 < row["deadline_ms"] <= 300_000
    assert one(fleet, "resume", "b", "--via", "a")["state"] == "alive"
    wait_for(lambda: fleet.rows(a)["b"]["state"] == "alive", "b alive in the view of a")
    assert fleet.rows(a)["b"]["cordoned"] is False
    assert b.trail == ["joining", "alive", "draining", "alive"]


def test_drain_survives_a_restart(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b")
    one(fleet, "drain", "b", "--via", "a")
    b.stop()
    b.start()
    b.wait("node.state_changed", to="draining")
    wait_for(
        lambda: (r := fleet.rows(a).get("b")) and r["state"] == "draining" and r["cordoned"],
        "b draining at a",
    )


def test_update_restarts_in_place_with_the_same_identity(fleet: Fleet, tmp_path: Path) -> None:
    copied_code(tmp_path, fleet)
    a, b = from_copy(fleet, "a", *NO_TIMER).start(), from_copy(fleet, "b", *NO_TIMER).start()
    fleet.converged([a, b])
    before, pid = fleet.rows(a)["b"], b.pid
    answer = one(fleet, "update", "b", "--via", "a")
    assert (answer["result"], answer["state"]) == ("accepted", "updating")
    assert "nothing changed" in answer["reason"]
    wait_for(
        lambda: b.trail == ["joining", "alive", "updating", "joining", "alive"], f"the trail of b: {b.trail}"
    )
    after = wait_for(
        lambda: (r := fleet.rows(a)["b"])["incarnation"] > before["incarnation"] and r, "b is back"
    )
    assert (after["id"], after["addr"], b.pid) == (before["id"], before["addr"], pid)
    assert b.running
    back = [e for e in b.of("node.state_changed", to="joining") if e["from"] == "updating"]
    assert back and back[0]["op_id"] == answer["op_id"]
    assert not a.of("node.changed", node="b", to="dead")


def test_op_right_after_an_update_waits_until_the_node_is_back(fleet: Fleet) -> None:
    _, b = fleet.boot("a", "b", flags=NO_TIMER)
    one(fleet, "drain", "b", "--via", "a")
    assert one(fleet, "update", "b", "--via", "a")["state"] == "updating"
    assert one(fleet, "resume", "b", "--via", "a")["result"] == "done"
    wait_for(lambda: b.trail[-1] == "alive", f"b resumed: {b.trail}")


def test_update_of_a_draining_node_comes_back_draining(fleet: Fleet) -> None:
    _, b = fleet.boot("a", "b")
    one(fleet, "drain", "b", "--via", "a")
    one(fleet, "update", "b", "--via", "a")
    wait_for(lambda: b.trail[-2:] == ["joining", "draining"], "b joined again and draining")


def test_stale_node_is_marked_and_update_cures_it_under_the_same_id(fleet: Fleet, tmp_path: Path) -> None:
    code = copied_code(tmp_path, fleet)
    a, b = from_copy(fleet, "a").start(), from_copy(fleet, "b").start()
    fleet.converged([a, b])
    before = fleet.rows(a)["b"]
    assert before["fresh"] is True
    source = code / "agent" / "addresses.py"
    source.write_text(source.read_text() + "\n# changed\n")
    stale = wait_for(lambda: (r := fleet.rows(a)["b"])["fresh"] is False and r, "b is stale")
    assert stale["build"] == before["build"]
    answer = one(fleet, "update", "b", "--via", "a")
    assert "→" in answer["reason"]
    cured = wait_for(
        lambda: (r := fleet.rows(a)["b"])["state"] == "alive" and r["fresh"] is True and r, "b is fresh"
    )
    assert cured["id"] == before["id"] and cured["build"] != before["build"]
    assert fleet.rows(a)["a"]["fresh"] is False


def test_update_to_broken_code_is_refused_and_the_node_lives(fleet: Fleet, tmp_path: Path) -> None:
    code = copied_code(tmp_path, fleet)
    a, b = from_copy(fleet, "a").start(), from_copy(fleet, "b").start()
    fleet.converged([a, b])
    before = fleet.rows(a)["b"]
    (code / "agent" / "node.py").write_text("this is no python\n")
    answer = one(fleet, "update", "b", "--via", "a", status=1)
    assert answer["result"] == "refused"
    assert "SyntaxError" in answer["reason"] or "invalid syntax" in answer["reason"]
    assert b.running
    row = wait_for(lambda: (r := fleet.rows(a)["b"])["state"] == "alive" and r, "b is back")
    assert row["incarnation"] == before["incarnation"] and row["build"] == before["build"]
    assert b.trail == ["joining", "alive", "updating", "alive"]


def test_failing_update_command_refuses_with_its_last_words(fleet: Fleet) -> None:
    fleet.env["QD_UPDATE_COMMAND"] = "sh -c 'echo the mirror is away >&2; exit 7'"
    _, b = fleet.boot("a", "b")
    answer = one(fleet, "update", "b", "--via", "a", status=1)
    assert "the mirror is away" in answer["reason"] and "exit 7" in answer["reason"]
    assert b.trail[-1] == "alive"


def test_unknown_operator_is_exit_4_and_the_node_lives(pair: Fleet, tmp_path: Path) -> None:
    key = stranger_key(tmp_path)
    answer = one(pair, "kill", "bee-2", "--via", "bee-1", "--operator-key", str(key), status=4)
    assert answer["result"] == "refused"
    assert pair.agents["bee-2"].running
    assert pair.agents["bee-2"].wait("control.received", op_id=answer["op_id"])["reason"]


def test_observer_may_look_and_not_act(pair: Fleet) -> None:
    key = pair.home.with_name("observer")
    answer = one(pair, "drain", "bee-2", "--via", "bee-1", "--operator-key", str(key), status=4)
    assert "observe" in answer["reason"]
    assert pair.agents["bee-2"].trail[-1] == "alive"


def test_operate_role_may_kill(fleet: Fleet, tmp_path: Path) -> None:
    _, b = fleet.boot("a", "b")
    key = stranger_key(tmp_path)
    allow(fleet, key, 'environment="QD_ROLE=operate"')
    assert one(fleet, "kill", "b", "--via", "a", "--operator-key", str(key))["result"] == "done"
    assert b.wait_exit() == 0


def test_expired_operator_is_refused(pair: Fleet) -> None:
    key = pair.home.with_name("expired")
    answer = one(pair, "kill", "bee-2", "--via", "bee-1", "--operator-key", str(key), status=4)
    assert "expired" in answer["reason"]
    assert pair.agents["bee-2"].running


def test_op_to_a_stopped_node_does_not_pretend(fleet: Fleet) -> None:
    import signal

    _, b = fleet.boot("a", "b", flags=NO_TIMER)
    b.signal(signal.SIGSTOP)
    done = fleet.qd("kill", "b", "--via", "a", "--timeout", "4", "--json")
    assert done.returncode in (3, 5), done.stdout
    b.signal(signal.SIGCONT)


def test_unknown_and_ambiguous_names_are_exit_2(pair: Fleet) -> None:
    done = pair.qd("kill", "nobody", "--via", "bee-1")
    assert done.returncode == 2 and "nobody" in done.stderr
    done = pair.qd("kill", "bee", "--via", "bee-1")
    assert done.returncode == 2 and "bee-1" in done.stderr and "bee-2" in done.stderr


def test_dry_run_sends_nothing(pair: Fleet) -> None:
    a, b = pair.agents["bee-1"], pair.agents["bee-2"]
    before = len(a.of("control.sent")), len(b.of("control.received"))
    done = pair.qd("kill", "bee-2", "--via", "bee-1", "--dry-run")
    assert done.returncode == 0
    assert (len(a.of("control.sent")), len(b.of("control.received"))) == before


def test_operator_in_the_ssh_agent_can_kill(fleet: Fleet, tmp_path: Path) -> None:
    if not shutil.which("ssh-agent"):
        pytest.skip("needs ssh-agent (openssh-client)")
    _, b = fleet.boot("a", "b")
    key = stranger_key(tmp_path, "in-agent")
    allow(fleet, key, 'environment="QD_ROLE=admin"')
    sock = tmp_path / "agent.sock"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL)
    try:
        wait_for(sock.exists, "the ssh-agent's socket")
        env = {**os.environ, "SSH_AUTH_SOCK": str(sock)}
        subprocess.run(["ssh-add", "-q", str(key)], env=env, check=True, capture_output=True)
        key.unlink()
        (fleet.home / "config" / "operator_ed25519").rename(tmp_path / "put-away")
        done = fleet.qd("kill", "b", "--via", "a", "--json", SSH_AUTH_SOCK=str(sock))
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert b.wait_exit() == 0
    finally:
        agent.terminate()
        agent.wait(5)
