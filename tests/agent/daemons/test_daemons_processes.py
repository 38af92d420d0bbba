"""Processes of daemons: begun, ended, killed with all they started, and told of as they are."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from agent.daemons.runs import fingerprint_of
from agent.executor import DispatchError
from agent.meshos.controls import BackpressureOff, BackpressureOn, DrainFinish, DrainStart
from agent.spec.model import ControlHooks, Resources
from tests.agent.daemons.rig import alive, environ, needs_root, rig, running, sh, spec, until


def test_daemon_that_runs_once_executed_is_started_and_stops_within_its_grace(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100"), mesh="alpha") as r:
            await r.supervisor.start("d")
            pid = r.pid()
            assert r.signals() == ["started"]
            assert r.supervisor.facts("d").ready
            assert os.getsid(pid) == pid
            told = environ(pid)
            assert (told["QD_NODE"], told["QD_DAEMON"], told["QD_MESH"]) == ("00000000000000aa", "d", "alpha")
            await r.supervisor.start("d")
            assert r.pid() == pid
            await r.supervisor.stop("d", 10_000)
            ended = await r.told("exited_cleanly")
            assert ended.reason == ""
            assert not alive(pid)
            assert r.signals() == ["started", "exited_cleanly"]
            assert r.supervisor.names() == []
            assert not (tmp_path / "d" / "run.json").exists()

    asyncio.run(play())


def test_environment_of_a_daemon_holds_nothing_of_the_operator_or_the_agents_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QD_OPERATOR_KEY", "QD_HOME", "SSH_AUTH_SOCK", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("KEPT", "yes")

    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", env={"MINE": "1", "QD_DAEMON": "another"})) as r:
            await r.supervisor.start("d")
            told = environ(r.pid())
            assert "secret" not in told.values()
            assert (told["KEPT"], told["MINE"], told["QD_DAEMON"]) == ("yes", "1", "d")

    asyncio.run(play())


@pytest.mark.parametrize(
    ("script", "signal_told", "reason"),
    [
        ("echo cannot bind >&2; exit 3", "crashed", "exit status 3: cannot bind"),
        ("kill -SEGV $$", "crashed", "killed by SIGSEGV"),
        ("exit 0", "exited_cleanly", ""),
    ],
)
def test_end_of_a_daemon_is_told_with_how_it_ended(
    tmp_path: Path, script: str, signal_told: str, reason: str
) -> None:
    async def play() -> None:
        async with rig(tmp_path, sh(f"ulimit -c 0; {script}")) as r:
            await r.supervisor.start("d")
            event = await r.told(signal_told)
            assert event.reason == reason
            assert r.signals() == ["started", signal_told]

    asyncio.run(play())


def test_daemon_that_ignores_its_signal_is_killed_after_the_shorter_grace(tmp_path: Path) -> None:
    async def play() -> None:
        stubborn = sh("trap '' TERM; echo ready; while :; do sleep 100; done", grace_s=30)
        async with rig(tmp_path, stubborn) as r:
            await r.supervisor.start("d")
            await r.wrote("ready")
            pid = r.pid()
            began = time.monotonic()
            await r.supervisor.stop("d", 20_000)
            assert r.supervisor.facts("d").stopping
            with pytest.raises(DispatchError) as still:
                await r.supervisor.start("d")
            assert still.value.retry_after_ms
            await r.supervisor.stop("d", 200)
            event = await r.told("exited_cleanly")
            assert 0.2 <= time.monotonic() - began < 10
            assert event.reason.startswith("killed")
            assert not alive(pid)

    asyncio.run(play())


def test_stop_signal_of_the_spec_is_what_a_daemon_gets(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(
            tmp_path,
            sh("trap 'echo hup; exit 0' HUP; echo ready; while :; do sleep 0.02; done", stop_signal="SIGHUP"),
        ) as r:
            await r.supervisor.start("d")
            await r.wrote("ready")
            await r.supervisor.stop("d", 5_000)
            await r.told("exited_cleanly")
            assert r.lines()[-1] == "hup"

    asyncio.run(play())


def test_group_of_a_daemon_ends_with_its_main_process(tmp_path: Path) -> None:
    async def play() -> None:
        word = f"100.{os.getpid()}1"
        async with rig(tmp_path, sh(f"trap '' TERM; sleep {word} & sleep {word} & echo $!; exit 7")) as r:
            await r.supervisor.start("d")
            event = await r.told("crashed")
            assert event.reason.startswith("exit status 7")
            await until(lambda: not running(word), "the rest of the group is gone")

    asyncio.run(play())


def test_stop_ends_the_children_too_and_a_stopped_process_is_woken_for_it(tmp_path: Path) -> None:
    async def play() -> None:
        word = f"100.{os.getpid()}2"
        async with rig(tmp_path, sh(f"sleep {word} & echo up; wait")) as r:
            await r.supervisor.start("d")
            await r.wrote("up")
            os.kill(r.pid(), signal.SIGSTOP)
            await r.supervisor.stop("d", 10_000)
            await r.told("exited_cleanly")
            await until(lambda: not running(word), "the child is gone")

    asyncio.run(play())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (spec("/no/such/program"), "No such file"),
        (spec("sleep", "1", cwd="/no/such/place"), "no such directory"),
        (spec("sleep", "1", user="nobody-of-that-name"), "not known on this host"),
        (spec("sleep", "1", stop_signal="SIGNONE"), "signal SIGNONE"),
        (spec("/etc/passwd"), "Permission denied"),
        (spec(), "neither"),
        (spec(entry_point="nowhere"), "entry point nowhere"),
    ],
)
def test_daemon_that_cannot_be_executed_is_a_crash_and_no_retry(
    tmp_path: Path, bad: object, words: str
) -> None:
    async def play() -> None:
        async with rig(tmp_path, bad) as r:  # type: ignore[arg-type]
            with pytest.raises(DispatchError, match=words) as why:
                await r.supervisor.start("d")
            assert why.value.retry_after_ms is None
            assert r.signals() == ["crashed"]
            assert words in r.events[0].reason
            assert r.supervisor.names() == []
            assert not (tmp_path / "d" / "run.json").exists()

    asyncio.run(play())


def test_daemon_without_a_spec_is_refused(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path) as r:
            with pytest.raises(DispatchError, match="no spec"):
                await r.supervisor.start("ghost")
            await r.supervisor.stop("ghost", 0)
            assert r.signals("ghost") == ["crashed", "exited_cleanly"]

    asyncio.run(play())


@needs_root
def test_user_of_the_spec_runs_the_daemon_with_its_groups_and_without_our_snapshot(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, sh("id -un; id -gn; exec sleep 100", user="nobody", cwd="/")) as r:
            await r.supervisor.start("d")
            await r.wrote("nogroup")
            assert r.lines()[0] == "nobody"
            told = environ(r.pid())
            assert "QD_SNAPSHOT" not in told
            assert told["USER"] == "nobody"

    asyncio.run(play())


def test_all_are_stopped_side_by_side_and_those_to_keep_run_on(tmp_path: Path) -> None:
    async def play() -> None:
        slow = [
            sh("trap 'sleep 0.3; exit 0' TERM; echo up; while :; do sleep 0.02; done", name=f"s{i}")
            for i in range(4)
        ]
        kept = spec("sleep", "100", name="kept", restart_on_update=False)
        async with rig(tmp_path, *slow, kept) as r:
            for name in r.specs:
                await r.supervisor.start(name)
            for one in slow:
                await r.wrote("up", one.name)
            began = time.monotonic()
            await r.supervisor.stop_all(10, keep=lambda s: not s.restart_on_update)
            assert time.monotonic() - began < 4 * 0.3 + 2
            assert r.supervisor.names() == ["kept"]
            assert alive(r.pid("kept"))
            assert [r.signals(one.name)[-1] for one in slow] == ["exited_cleanly"] * 4

    asyncio.run(play())


def test_fingerprint_tells_a_changed_process_from_a_changed_place(tmp_path: Path) -> None:
    async def play() -> None:
        first = spec("sleep", "100")
        async with rig(tmp_path, first) as r:
            assert r.supervisor.fingerprint("d") is None
            await r.supervisor.start("d")
            r.supervisor.define({"d": spec("sleep", "200")})
            assert (
                r.supervisor.fingerprint("d") == fingerprint_of(first) != fingerprint_of(spec("sleep", "200"))
            )
            assert fingerprint_of(spec("sleep", "100", on="kind=compute", count=3)) == fingerprint_of(first)
            assert fingerprint_of(spec("sleep", "100", resources=Resources(cpu=1))) == fingerprint_of(first)


def test_run_file_has_no_key_that_an_earlier_build_would_refuse(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(
            tmp_path, spec("sleep", "100", resources=Resources(cpu=1)), spec("sleep", "100", name="e")
        ) as r:
            for name in ("d", "e"):
                await r.supervisor.start(name)
                run = json.loads((tmp_path / name / "run.json").read_bytes())
                assert "resources" not in run["spec"] and run["spec"]["command"] == ["sleep", "100"]

    asyncio.run(play())


def test_controls_reach_a_program_as_signals_and_as_commands_in_order(tmp_path: Path) -> None:
    async def play() -> None:
        said = tmp_path / "said"
        hooks = ControlHooks(
            drain_start=["sh", "-c", f'sleep 0.1; echo "drain $QD_GRACE_MS $QD_PID" >> {said}'],
            drain_finish=["sh", "-c", f"echo finish >> {said}; exit 4"],
            backpressure_on=["sh", "-c", f'echo "level $QD_LEVEL" >> {said}'],
            backpressure_off="SIGUSR1",
        )
        script = f"trap 'echo usr1 >> {said}' USR1; echo up; while :; do sleep 0.02; done"
        async with rig(tmp_path / "place", sh(script, control=hooks)) as r:
            await r.supervisor.start("d")
            await r.wrote("up")
            for control in (DrainStart(5000), DrainFinish(), BackpressureOn(0.5), BackpressureOff()):
                r.supervisor.tell_daemons(control)
            await until(lambda: said.exists() and "usr1" in said.read_text(), "the hooks ran")
            assert said.read_text().splitlines() == [f"drain 5000 {r.pid()}", "finish", "level 0.5", "usr1"]
            assert r.troubles == [("d", "DrainFinish hook: exit status 4")]

    asyncio.run(play())
