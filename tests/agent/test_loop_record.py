"""A recorded run, replayed through the pure engine, gives the same moves, actions and snapshot."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.loop import MeshLoop
from agent.meshos.actions import Action
from agent.meshos.actions import document as shown
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    Admin,
    AdminOp,
    Event,
    Health,
    LocalFailure,
    RttSample,
    SelfHealth,
    Started,
    Synced,
    UpdateFailed,
    UpdateStarted,
)
from agent.meshos.own import Transition
from agent.meshos.replay import play, read
from agent.meshos.snapshot import document
from agent.recorder import Recorder
from discovery.errors import LocalError

ME = 2**63 + 5
CONFIG = MeshOsConfig(degraded_rtt_ms=100.0, avoid_ttl_ms=5_000)


def replay(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The actions of a recorded run, shown as they are to people, and its last snapshot."""
    with path.open("rb") as lines:
        *ticks, last = play(read(lines))
    return [action for tick in ticks for action in tick["actions"]], last["snapshot"]


def test_recorded_run_replays_to_the_same_moves_actions_and_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    now = 50.0
    rng = random.Random(7)
    moves: list[Transition] = []
    actions: list[Action] = []

    def take(action: Action) -> bool:
        actions.append(action)
        if rng.random() < 0.2:
            raise OSError("dispatch")
        return rng.random() < 0.7

    def rtts() -> list[tuple[int, float]]:
        if rng.random() < 0.1:
            raise RuntimeError("probe")
        return [(peer, rng.choice([20.0, 99.5, 100.5, 400.25])) for peer in rng.sample(range(20), 5)]

    loop = MeshLoop(
        ME,
        CONFIG,
        on_transition=moves.append,
        on_action=take,
        recorder=Recorder(path, ME, CONFIG),
        clock=lambda: now,
    )
    loop.install_rtt_probe("rtt", rtts)
    loop.install_health_probe("health", lambda: [(p, rng.choice(list(Health)), "") for p in range(3)])
    choices: list[Event] = [
        Started(),
        Synced(),
        SelfHealth(990, 10),
        SelfHealth(10, 10),
        SelfHealth(None, 990),
        RttSample("other", 300.0),
        Admin(AdminOp("drain", ME, 2000, "ann", "01D")),
        Admin(AdminOp("resume", ME)),
        UpdateStarted(1000),
        UpdateFailed("why"),
        LocalFailure("x", "y", "z"),
    ]
    for _ in range(400):
        for event in rng.choices(choices, k=rng.randrange(4)):
            loop.try_publish(event)
        now += rng.choice([0.5, 0.5, 0.5, 1.2, 31.0])
        loop.tick()
    live = document(loop.snapshot, loop.state.now_ms)
    loop._close()

    assert len(moves) > 20 and len(actions) > 20
    again_actions, again = replay(path)
    assert again_actions == [shown(action) for action in actions]
    assert again["stats"]["transitions"] == len(moves)
    assert msgspec.json.encode(again) == msgspec.json.encode(live)


def test_record_first_line_names_the_node_and_what_differs_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    Recorder(path, 100, CONFIG).close()
    assert msgspec.json.decode(path.read_bytes()) == {
        "this_node": 100,
        "config": {"degraded_rtt_ms": 100.0, "avoid_ttl_ms": 5000},
        "scores": {},
    }


def test_record_of_an_earlier_process_is_kept_beside(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for node in (1, 2, 3):
        Recorder(path, node, CONFIG).close()
    nodes = [
        msgspec.json.decode((tmp_path / name).read_bytes())["this_node"]
        for name in ("run.jsonl.1", "run.jsonl.2", "run.jsonl")
    ]
    assert nodes == [1, 2, 3]


def test_record_that_cannot_be_opened_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"record .*/no/run\.jsonl: No such file or directory; name a file"):
        Recorder(tmp_path / "no" / "run.jsonl", 1, CONFIG)


def test_record_disk_that_refuses_ends_the_recording_and_not_the_loop(tmp_path: Path) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None: ...

        def close(self) -> None: ...

    recorder = Recorder(tmp_path / "run.jsonl", ME, CONFIG)
    recorder._file.close()
    recorder._file = Full()  # type: ignore[assignment]
    now = 0.0
    loop = MeshLoop(ME, CONFIG, on_transition=print, on_action=print, recorder=recorder, clock=lambda: now)
    for _ in range(4):
        now += 0.5
        loop.tick()
    assert loop.stats()["ticks"] == 4
    assert recorder.lost >= 4
    reasons = [failure.reason for failure in loop.snapshot.recent_failures]
    assert len(reasons) == 1 and "No space left" in reasons[0]
