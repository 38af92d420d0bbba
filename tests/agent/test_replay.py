"""`qd replay`: the contract of its lines, in and out, and that an incident replays to the same actions."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.executor import DispatchError, LoggingDispatcher
from agent.meshos.actions import Action, document
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    Admin,
    AdminOp,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    Health,
    LocalReplicaIntent,
    MaintenanceObserved,
    PlacementIntent,
    ReplicaUpdate,
    Started,
    Synced,
    encode_line,
)
from agent.meshos.replay import BadLine, play, read
from agent.meshos.states import MaintenanceState
from agent.recorder import Recorder
from agent.runtime import MeshOsRuntime
from tests.agent.meshos_events import long_run
from tui.cli.program import main

ME = 100
HEADER: dict[str, Any] = {"this_node": ME, "config": {}, "scores": {}}


def tick(at_ms: int) -> dict[str, Any]:
    return {"at_ms": at_ms, "event": "tick"}


def replayed(*events: dict[str, Any], header: dict[str, Any] = HEADER, admit: bool = False) -> list[Any]:
    """The documents of a run, as a script would read them."""
    lines = [json.dumps(line).encode() for line in (header, *events)]
    return json.loads(json.dumps(list(play(read(lines), admit=admit))))  # type: ignore[no-any-return]


def at(at_ms: int, event: str, **fields: Any) -> dict[str, Any]:
    return {"at_ms": at_ms, "event": event, **fields}


def test_every_event_of_the_contract_is_read_and_every_kind_of_action_comes_out() -> None:
    out = replayed(
        at(0, "daemon_intent", daemon="web", intent="run", node=None),
        at(0, "daemon_intent", daemon="bad", intent="run"),
        at(0, "daemon_lifecycle", daemon="bad", signal="crashed", reason="exit 1"),
        at(0, "daemon_lifecycle", daemon=7, signal="started"),
        at(0, "daemon_intent", daemon=7, intent="stop"),
        at(0, "daemon_lifecycle", daemon=7, signal="health", health="degraded", reason="slow"),
        at(0, "daemon_lifecycle", daemon=7, signal="saturation", saturation=0.5),
        at(0, "placement_intent", chain=1, count=2),
        at(0, "replica_update", chain=1, change="added", holder=ME),
        at(0, "replica_leader", chain=1, leader=ME),
        at(0, "replica_update", chain=2, change="added", holder=ME, leader=ME),
        at(0, "replica_update", chain=3, change="added", holder=5),
        at(0, "local_replica_intent", chain=3, intent="hold"),
        at(0, "replica_update", chain=4, change="added", holder=ME),
        at(0, "replica_update", chain=4, change="added", holder=5),
        at(0, "admin", admin={"op": "drop_replicas", "node": ME, "chains": [4]}),
        at(0, "rtt_sample", peer="far", rtt_ms=251),
        at(0, "node_health", peer=5, health="healthy"),
        at(0, "blob", blob="x", change="added", holder=ME),
        tick(100),
        at(200, "admin", admin={"op": "enter_maintenance", "node": ME, "deadline_ms": 400}),
        at(200, "action_outcome", kind="start_daemon", target="web", outcome="failed"),
        tick(500),
        at(600, "maintenance_observed", node=ME, state="drain_failed", reason="left"),
        at(700, "replica_leader", chain=1, leader=None),
        header_free_shutdown := at(800, "shutdown"),
        at(900, "rtt_sample", peer="never folded", rtt_ms=900),
        header={**HEADER, "scores": {"2": {"100": 0.3, "5": 0.9}}},
    )
    assert header_free_shutdown["event"] == "shutdown"
    first, second, last = out
    assert first == {
        "at_ms": 100,
        "actions": [
            {"kind": "stop_daemon", "daemon": 7, "deadline_ms": 30_100},
            {"kind": "apply_backoff", "daemon": "bad", "until_ms": 500},
            {"kind": "start_daemon", "daemon": "web"},
            {"kind": "pull_replica", "chain": 3, "source": 5},
            {"kind": "drop_replica", "chain": 4},
            {"kind": "request_placement", "chain": 1, "exclude": [ME]},
            {"kind": "mark_avoid", "peer": "far", "reason": "rtt 251 ms, over 250 ms", "ttl_ms": 300_000},
            {"kind": "request_eviction", "chain": 2, "victim": ME},
        ],
    }
    assert second["at_ms"] == 500
    assert [a["kind"] for a in second["actions"]] == [
        "migrate_blob",
        "request_placement",
        "commit_maintenance_transition",
    ] or second["actions"][0] == {"kind": "migrate_blob", "blob": "x", "target": 5}
    assert second["actions"][-1]["target"] == "drain_failed"
    snapshot = last["snapshot"]
    assert snapshot["local_maintenance"]["state"] == "drain_failed"
    assert [row["peer"] for row in snapshot["avoid_list"]] == ["far"]
    assert {row["daemon"]: row["state"] for row in snapshot["daemons"]} == {
        7: "stopping",
        "bad": "stopped",
        "web": "stopped",
    }
    assert snapshot["recent_failures"][0]["action"] == "start_daemon"


def test_ids_are_numbers_or_strings_compared_within_their_type() -> None:
    out = replayed(
        at(0, "daemon_intent", daemon=7, intent="run"),
        at(0, "daemon_lifecycle", daemon="7", signal="started"),
        tick(500),
        header={"this_node": "100"},
    )
    assert out[0]["actions"] == [{"kind": "start_daemon", "daemon": 7}]


def test_a_line_a_tick_and_one_snapshot_though_nothing_happens() -> None:
    out = replayed(tick(0), tick(500), tick(500))
    assert out[:3] == [{"at_ms": 0, "actions": []}, *[{"at_ms": 500, "actions": []}] * 2]
    assert list(out[3]) == ["snapshot"]
    assert list(replayed()[0]) == ["snapshot"]


def test_config_overrides_count() -> None:
    out = replayed(
        at(0, "rtt_sample", peer=1, rtt_ms=20), tick(1), header={**HEADER, "config": {"degraded_rtt_ms": 10}}
    )
    assert [a["peer"] for a in out[0]["actions"]] == [1]


def test_nan_and_null_scores_are_read_as_unknown() -> None:
    header = b'{"this_node":100,"scores":{"1":{"100":0.1,"2":NaN,"3":null,"4":0.8}}}'
    lines = [
        header,
        json.dumps(at(0, "replica_update", chain=1, change="added", holder=ME, leader=ME)).encode(),
    ]
    assert next(iter(play(read([*lines, json.dumps(tick(1)).encode()]))))["actions"] == [
        {"kind": "request_eviction", "chain": 1, "victim": ME}
    ]


def test_polled_events_are_folded_within_their_tick() -> None:
    out = replayed(
        {**tick(500), "polled": 1},
        at(500, "rtt_sample", peer=1, rtt_ms=300),
        at(500, "rtt_sample", peer=2, rtt_ms=300),
    )
    assert [a["peer"] for a in out[0]["actions"]] == [1]


# --- admit


def test_admit_gives_each_action_a_verdict_and_reports_a_deferred_one_once() -> None:
    events = [at(0, "replica_update", chain=chain, change="added", holder=5) for chain in range(3)]
    events += [at(0, "local_replica_intent", chain=chain, intent="hold") for chain in range(3)]
    out = replayed(*events, *[tick(at_ms) for at_ms in (0, 500, 1000)], admit=True)
    verdicts = [(a["verdict"], a["retry_after_ms"], a["until_ms"], a["reason"]) for a in out[0]["actions"]]
    assert verdicts == [
        ("admit", None, None, None),
        ("defer", 250, None, "pull-cooldown"),
        ("defer", 500, None, "pull-cooldown"),
    ]
    assert [line["actions"] for line in out[1:3]] == [[], []]


def test_admit_changes_no_action() -> None:
    events = [at(0, "replica_update", chain=chain, change="added", holder=5) for chain in range(9)]
    events += [at(0, "local_replica_intent", chain=chain, intent="hold") for chain in range(9)]
    events += [tick(at_ms) for at_ms in range(0, 130_000, 500)]
    plain, judged = replayed(*events), replayed(*events, admit=True)
    stripped = [
        [{k: a[k] for k in ("kind", "chain", "source")} for a in line["actions"]] for line in judged[:-1]
    ]
    assert stripped == [line["actions"] for line in plain[:-1]]
    assert judged[-1] == plain[-1]


def test_admit_keeps_the_fields_of_the_action_itself() -> None:
    out = replayed(
        at(0, "daemon_intent", daemon="web", intent="run"),
        at(0, "daemon_lifecycle", daemon="web", signal="crashed"),
        at(0, "rtt_sample", peer=1, rtt_ms=300),
        tick(100),
        admit=True,
    )
    backoff, avoid = out[0]["actions"]
    assert (backoff["until_ms"], backoff["verdict"]) == (500, "admit")
    assert avoid["reason"].startswith("rtt 300")


def test_admit_drain_does_not_dodge_the_pull_cooldown() -> None:
    events = [at(0, "replica_update", chain=chain, change="added", holder=5) for chain in range(4)]
    events += [at(0, "local_replica_intent", chain=chain, intent="hold") for chain in range(4)]
    out = replayed(at(0, "admin", admin={"op": "drain", "node": 5}), *events, tick(0), admit=True)
    assert [a["retry_after_ms"] for a in out[0]["actions"]] == [None, 250, 500, 750]


# --- bad input


@pytest.mark.parametrize(
    ("lines", "number", "why"),
    [
        ([], 1, "no header"),
        (["", " "], 2, "no header"),
        (["nonsense"], 1, "no JSON"),
        (["[]"], 1, "not a header"),
        (['{"config":{}}'], 1, "this_node"),
        (['{"this_node":1.5}'], 1, "not a header"),
        (['{"this_node":1,"config":{"avoid_ttl":1}}'], 1, "did you mean `avoid_ttl_ms`"),
        (['{"this_node":1,"config":{"avoid_ttl_ms":"x"}}'], 1, "avoid_ttl_ms"),
        (['{"this_node":1,"scores":{"1":3}}'], 1, "scores"),
        (['{"this_node":1}', "{"], 2, "no JSON"),
        (['{"this_node":1}', "", '{"at_ms":1}'], 3, "event"),
        (['{"this_node":1}', '{"event":"tick"}'], 2, "at_ms"),
        (['{"this_node":1}', '{"at_ms":-1,"event":"tick"}'], 2, "at_ms"),
        (['{"this_node":1}', '{"at_ms":"soon","event":"tick"}'], 2, "at_ms"),
        (['{"this_node":1}', '{"at_ms":1,"event":"moonrise"}'], 2, "unknown event `moonrise`"),
        (['{"this_node":1}', '{"at_ms":1,"event":"rtt_sample","peer":1}'], 2, "rtt_ms"),
        (['{"this_node":1}', '{"at_ms":1,"event":"daemon_intent","daemon":1,"intent":"fly"}'], 2, "fly"),
        (
            ['{"this_node":1}', '{"at_ms":1,"event":"daemon_lifecycle","daemon":1,"signal":"health"}'],
            2,
            "health",
        ),
        (['{"this_node":1}', '{"at_ms":1,"event":"placement_intent","chain":1,"count":-1}'], 2, "count"),
        (['{"this_node":1}', '{"at_ms":1,"event":"admin","admin":{"op":"explode","node":1}}'], 2, "explode"),
        (['{"this_node":1}', '{"at_ms":5,"event":"tick"}', '{"at_ms":4,"event":"tick"}'], 3, "before 5"),
        (['{"this_node":1}', "[" * 5000], 2, "not an event"),
    ],
)
def test_bad_line_is_named_with_its_number_and_what_is_wrong(lines: list[str], number: int, why: str) -> None:
    with pytest.raises(BadLine, match=why) as caught:
        read([line.encode() for line in lines])
    assert caught.value.number == number


def test_bytes_that_are_no_text_are_a_bad_line() -> None:
    with pytest.raises(BadLine, match="line 2"):
        read([b'{"this_node":1}', b'{"at_ms":1,"event":"\xff"}'])


# --- the command


def qd(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["replay", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_command_prints_a_json_line_a_tick_and_the_snapshot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (HEADER, tick(500), tick(1000))))
    for words in ((str(path),), (str(path), "--admit"), ("--json", str(path))):
        status, out, err = qd(capsys, *words)
        assert (status, err) == (0, "")
        ticks = [json.loads(line) for line in out.splitlines()]
        assert ticks[:2] == [{"at_ms": 500, "actions": []}, {"at_ms": 1000, "actions": []}]
        assert "snapshot" in ticks[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"this_node":1}\n{"at_ms":1,"event":"no"}\n', "line 2: unknown event `no`"), (None, "No such file")],
)
def test_command_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    status, out, err = qd(capsys, str(path))
    assert (status, out) == (2, "")
    assert err.startswith("qd: ") and err.count("\n") == 1 and said in err


# --- an incident


class Flaky(LoggingDispatcher):
    """Fails now and then, for ever or for a while."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)

    async def dispatch(self, action: Action) -> None:
        roll = self._rng.random()
        if roll < 0.15:
            raise DispatchError("link down", 5)
        if roll < 0.3:
            raise OSError("gone")
        await super().dispatch(action)


def test_recorded_incident_of_a_running_engine_replays_to_the_same_actions(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    config = MeshOsConfig(
        tick_interval_ms=5, pull_cooldown_ms=2, backoff_initial_ms=10, stop_grace_ms=50, in_flight_ms=40,
        recovery_ramp_ms=30, rebalance_cooldown_ms=20, probe_refresh_ms=10, action_queue_capacity=3,
    )  # fmt: skip
    rng = random.Random(3)
    asked: list[list[Any]] = []

    async def live() -> dict[str, Any]:
        runtime = MeshOsRuntime.start(
            config, Flaky(5), this_node=ME, recorder=Recorder(path, ME, config), on_control=lambda _: 1 / 0
        )
        loop = runtime.loop
        hand_out = loop._hand_out
        loop._hand_out = lambda action, at_ms: (asked.append(document(action)), hand_out(action, at_ms))  # type: ignore[assignment,method-assign,arg-type,func-returns-value]
        runtime.install_rtt_probe("rtt", lambda: [(n, rng.choice([10.0, 900.0])) for n in range(3)])
        runtime.install_health_probe("pool", lambda: [(n, rng.choice(list(Health)), "") for n in range(4)])
        runtime.install_rtt_probe("broken", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        runtime.install_scorer(lambda chain: {n: rng.random() for n in (ME, 1, 2, 3)})
        events: list[Event] = [Started(), Synced()]
        for step in range(250):
            daemon, chain = rng.choice(["web", "db", 7]), rng.randrange(5)
            events += rng.choices(
                [
                    DaemonIntent(daemon, rng.choice(["run", "stop"])),
                    DaemonLifecycle(daemon, rng.choice(["started", "crashed", "exited_cleanly"])),
                    PlacementIntent(chain, rng.randrange(4)),
                    ReplicaUpdate(chain, rng.choice(["added", "removed"]), rng.choice([ME, 1, 2]), leader=ME),
                    LocalReplicaIntent(chain, rng.choice(["hold", "drop"])),
                    Admin(AdminOp(rng.choice(["drain", "resume", "enter_maintenance", "exit_maintenance",
                                              "restart_all_daemons", "clear_avoid_list"]), ME, 20)),
                    MaintenanceObserved(ME, rng.choice(list(MaintenanceState))),
                ],
                k=2,
            )  # fmt: skip
            for event in events:
                await loop.publish(event)
            events.clear()
            if step % 3 == 0:
                await asyncio.sleep(0.004)
        await asyncio.sleep(0.05)
        await runtime.shutdown()
        assert loop._recorder is not None and not loop._recorder.failed
        from agent.meshos.snapshot import document as shown

        return shown(loop.snapshot, loop.state.now_ms)

    last = asyncio.run(asyncio.wait_for(live(), 60))
    with path.open("rb") as lines:
        *ticks, replay = play(read(lines))
    assert [action for line in ticks for action in line["actions"]] == asked
    assert len(asked) > 50
    assert len({action["kind"] for action in asked}) >= 7
    assert json.dumps(replay["snapshot"]) == json.dumps(last)


def test_recording_that_is_cut_off_anywhere_between_writes_still_replays(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    recorder = Recorder(path, ME, MeshOsConfig())
    for n in range(5000):
        recorder.write(DaemonIntent(n, "run", at_ms=n))
    with path.open("rb") as lines:
        assert len(read(lines).events) == 5000
    recorder.write(Synced(at_ms=5000))
    with path.open("rb") as lines:
        assert len(read(lines).events) == 5000
    recorder.close()
    with path.open("rb") as lines:
        assert len(read(lines).events) == 5001


def test_standard_input_is_a_file_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stdin:
        buffer = [json.dumps(HEADER).encode(), json.dumps(tick(1)).encode()]  # noqa: RUF012

    monkeypatch.setattr(sys, "stdin", Stdin)
    status, out, _ = qd(capsys, "-")
    assert (status, out.splitlines()[0]) == (0, '{"at_ms":1,"actions":[]}')


def test_replay_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Ids that are strings hash differently in each process; nothing that is shown may follow it."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"this_node":100}\n' + b"".join(map(encode_line, long_run(7))))
    command = [sys.executable, "-m", "tui.cli", "replay", str(path), "--admit"]
    outputs = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) > 10
