"""Daemons that take their time to get ready, that wait for others, that are another version, and a node that stops."""

from __future__ import annotations

from agent.meshos.events import DaemonIntent, DaemonLifecycle, Stopping, Synced
from agent.meshos.own import refusal
from discovery.lifecycle import State
from tests.agent.meshos_play import Play


def kinds(actions: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(action["kind"], action.get("daemon")) for action in actions]


def word(node: Play, daemon: str) -> str:
    return next(row["state"] for row in node.snapshot()["daemons"] if row["daemon"] == daemon)


def test_starting_daemon_is_shown_as_such_and_not_started_twice() -> None:
    node = Play().tell(Synced()).want("web")
    assert kinds(node.tick(500)) == [("start_daemon", "web")]
    node.signal("web", "starting")
    assert word(node, "web") == "starting"
    assert node.tick(60_000) == []
    node.signal("web", "started")
    assert word(node, "web") == "running"


def test_starting_daemon_that_is_no_longer_wanted_is_stopped() -> None:
    node = Play().tell(Synced()).want("web")
    node.tick(500)
    node.signal("web", "starting").want("web", "stop")
    assert kinds(node.tick(1000)) == [("stop_daemon", "web")]
    node.signal("web", "started")
    assert word(node, "web") == "stopping", "getting ready while it is asked to end takes nothing back"
    assert node.tick(1500) == []


def test_starting_daemon_keeps_a_draining_node_from_being_empty() -> None:
    node = Play().tell(Synced()).want("web")
    node.tick(500)
    node.signal("web", "starting").admin("drain")
    assert node.state.left() == ["1 daemon running (web)"]


def test_starting_daemon_is_not_well_so_exiting_waits_for_it() -> None:
    node = Play().tell(Synced()).want("web").admin("enter_maintenance").observed("maintenance")
    node.admin("exit_maintenance")
    assert kinds(node.tick(500)) == [("start_daemon", "web")]
    node.signal("web", "starting")
    assert node.tick(1000) == []
    node.signal("web", "started")
    assert [a["target"] for a in node.tick(1500)] == ["recovery"]


def test_daemon_is_started_after_those_it_names_run_well() -> None:
    node = Play().tell(Synced()).want("db").tell(DaemonIntent("web", "run", None, ("db", "elsewhere")))
    assert kinds(node.tick(500)) == [("start_daemon", "db")]
    assert {"what": "start daemon web", "reason": "db is not running well yet", "in_ms": None} in (
        node.snapshot()["held_back"]
    )
    node.signal("db", "starting")
    assert node.tick(1000) == []
    node.signal("db", "started")
    assert kinds(node.tick(1500)) == [("start_daemon", "web")]
    node.signal("web", "started").signal("db", "crashed", reason="exit 1")
    assert "web" not in [target for _, target in kinds(node.tick(2000))], "what runs stays"


def test_daemon_of_another_version_than_wanted_is_restarted_once() -> None:
    node = Play().tell(Synced(), DaemonIntent("web", "run", version="v1"))
    node.tick(500)
    node.tell(DaemonLifecycle("web", "started", version="v1"))
    assert node.tick(1000) == []
    node.tell(DaemonIntent("web", "run", version="v2"))
    assert kinds(node.tick(1500)) == [("stop_daemon", "web")]
    node.signal("web", "crashed", reason="signal 15")
    assert kinds(node.tick(2000)) == [("start_daemon", "web")], "it ended because we said so: no crash"
    node.tell(DaemonLifecycle("web", "started", version="v2"))
    assert node.tick(2500) == []


def test_daemon_taken_up_after_a_restart_in_an_older_version_is_restarted() -> None:
    node = Play().tell(Synced(), DaemonLifecycle("web", "started", version="v1"))
    node.tell(DaemonIntent("web", "run", version="v2"))
    assert kinds(node.tick(500)) == [("stop_daemon", "web")]


def test_version_that_is_not_known_restarts_nothing() -> None:
    node = Play().tell(Synced(), DaemonLifecycle("web", "started"), DaemonIntent("web", "run", version="v2"))
    assert node.tick(500) == []


def test_stopping_node_is_draining_stops_its_daemons_and_starts_none() -> None:
    node = Play().tell(Synced()).want("web").want("db")
    node.tick(500)
    node.signal("web", "started").tell(Stopping("alice", "01OP"))
    assert node.moves[-1].new is State.DRAINING
    assert (node.moves[-1].reason, node.moves[-1].by) == ("stopping", "alice")
    assert kinds(node.tick(1000)) == [("stop_daemon", "web")]
    node.signal("web", "exited_cleanly")
    assert node.tick(60_000) == [] and node.state.left() == []


def test_resume_does_not_bring_a_stopping_node_back() -> None:
    node = Play().tell(Synced(), Stopping()).admin("resume")
    assert node.state.life.state is State.DRAINING
    assert refusal(State.LEAVING, "resume") is not None
