"""What daemons say of themselves: readiness, status, watchdog, health; and what is not believed."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.daemons import notify
from agent.daemons.notify import Notice, parse, socket_name
from agent.meshos.events import DaemonHealth
from tests.agent.daemons.rig import (
    alive,
    environ,
    needs_root,
    needs_systemd_notify,
    rig,
    say,
    say_bytes,
    sh,
    spec,
    until,
)


def test_notice_says_what_its_lines_say() -> None:
    said = b"READY=1\nSTATUS=\x1b[2Jhello\nMAINPID=42\nX_QD_HEALTH=degraded: slow disk\nX_QD_SATURATION=1.5\nOTHER=x"
    assert parse(said) == (
        Notice(
            ready=True,
            status="[2Jhello",
            main_pid=42,
            health=(DaemonHealth.DEGRADED, "slow disk"),
            saturation=1.0,
        ),
        0,
    )
    nonsense = b"MAINPID=-3\nMAINPID=" + b"9" * 5000 + b"\nX_QD_HEALTH=great\nX_QD_SATURATION=nan\nhello"
    assert parse(nonsense) == (Notice(), 5)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300) | st.text(max_size=200).map(lambda t: f"X_QD_HEALTH={t}\nMAINPID={t}".encode())
)
def test_notice_of_any_bytes_is_read_without_raising(data: bytes) -> None:
    notice, bad = parse(data)
    assert bad >= 0
    assert notice.status is None or notice.status.isprintable() or not notice.status


def test_socket_name_of_the_longest_daemon_fits_its_address() -> None:
    assert len(socket_name("f" * 16, "d" * 64, "0" * 10, "n")) <= 108


def test_daemon_is_starting_until_it_says_ready(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", readiness="sd_notify")) as r:
            await r.supervisor.start("d")
            assert r.signals() == ["starting"]
            say(r.pid(), "X_QD_HEALTH=degraded:warming up", "STATUS=loading")
            say(r.pid(), "READY=1")
            await r.told("health")
            assert r.signals() == ["starting", "started", "health"]
            facts = r.supervisor.facts("d")
            assert (facts.ready, facts.status, facts.reason) == (True, "loading", "warming up")
            say(r.pid(), "RELOADING=1")
            say(r.pid(), "READY=1", "STOPPING=1")
            await until(lambda: r.supervisor.facts("d").stopping, "STOPPING=1 is seen")
            assert r.signals() == ["starting", "started", "health"]

    asyncio.run(play())


@pytest.mark.parametrize("extended", [False, True])
def test_daemon_that_is_never_ready_is_killed_as_a_crash(tmp_path: Path, extended: bool) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", readiness="sd_notify", start_timeout_s=0.15)) as r:
            began = time.monotonic()
            await r.supervisor.start("d")
            if extended:
                say(r.pid(), "EXTEND_TIMEOUT_USEC=400000")
            event = await r.told("crashed")
            assert event.reason == "not ready: no READY=1 within 0.15 s"
            assert r.signals() == ["starting", "crashed"]
            assert time.monotonic() - began >= (0.4 if extended else 0.15)

    asyncio.run(play())


def test_daemon_that_ends_before_it_is_ready_crashed(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, sh("exit 0", readiness="sd_notify")) as r:
            await r.supervisor.start("d")
            assert (await r.told("crashed")).reason == "exit status 0 before READY=1"

    asyncio.run(play())


def test_daemon_that_feeds_its_watchdog_no_more_is_unhealthy_and_killed(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", readiness="sd_notify", watchdog_s=0.25)) as r:
            await r.supervisor.start("d")
            pid = r.pid()
            assert environ(pid)["WATCHDOG_USEC"] == "250000"
            say(pid, "READY=1")
            await r.told("started")
            for _ in range(8):
                await asyncio.sleep(0.05)
                say(pid, "WATCHDOG=1")
            assert r.signals() == ["starting", "started"]
            event = await r.told("crashed")
            assert event.reason == "watchdog: nothing heard for 0.25 s"
            health = r.last("health")
            assert health is not None and health.health is DaemonHealth.UNHEALTHY
            assert r.signals() == ["starting", "started", "health", "crashed"]
            assert not alive(pid)

    asyncio.run(play())


def test_watchdog_accuses_nobody_after_a_pause_of_the_agent_itself(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", watchdog_s=0.3)) as r:
            await r.supervisor.start("d")
            time.sleep(1.0)  # noqa: ASYNC251 - the pause
            say(r.pid(), "WATCHDOG=1")
            await asyncio.sleep(0.1)
            assert r.signals() == ["started"]
            await r.told("crashed")

    asyncio.run(play())


def test_health_and_saturation_are_told_when_they_change_and_not_for_each_word(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100")) as r:
            await r.supervisor.start("d")
            for n in range(100):
                say(r.pid(), f"X_QD_SATURATION={n / 100}", "X_QD_HEALTH=healthy")
                await asyncio.sleep(0.001)
            await until(lambda: (e := r.last("saturation")) and e.saturation == 0.99, "the last one is told")
            assert r.signals().count("saturation") < 8
            assert r.signals().count("health") == 0
            say(r.pid(), "X_QD_HEALTH=unhealthy:\x1b[31mno disk")
            assert (await r.told("health")).reason == "[31mno disk"

    asyncio.run(play())


def test_main_pid_counts_only_within_the_daemons_own_session(tmp_path: Path) -> None:
    async def play() -> None:
        script = "sleep 100 & echo $!; read x < $FIFO; exit 0"
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        async with rig(tmp_path / "place", sh(script, env={"FIFO": str(fifo)})) as r:
            await r.supervisor.start("d")
            leader = r.pid()
            await until(r.lines, "the child's pid is told")
            child = int(r.lines()[0])
            say(leader, f"MAINPID={os.getpid()}")
            say(leader, "MAINPID=1")
            say(leader, "STATUS=seen")
            await until(lambda: r.supervisor.facts("d").status == "seen", "heard")
            assert r.pid() == leader
            say(leader, f"MAINPID={child}")
            fifo.write_text("go\n")
            await until(lambda: r.pid() == child and not alive(leader), "the first process is gone")
            assert r.signals() == ["started"]
            await r.supervisor.stop("d", 5_000)
            await r.told("exited_cleanly")
            assert not alive(child)

    asyncio.run(play())


def test_garbage_is_counted_and_a_flood_waits_while_others_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "WINDOW_S", 0.4)
    monkeypatch.setattr(notify, "PER_WINDOW", 30)

    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100"), spec("sleep", "100", name="calm")) as r:
            await r.supervisor.start("d")
            await r.supervisor.start("calm")
            pid = r.pid()
            for data in (b"\xff" * 100, b"x" * 5000, b"MAINPID=zero", b""):
                say_bytes(pid, data)
            await until(lambda: r.supervisor.facts("d").refused >= 4, "counted")
            flood = f"""
import socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
    s.connect("\\0" + {environ(pid)["NOTIFY_SOCKET"][1:]!r})
    for n in range(70):
        s.send(b"STATUS=%d" % n)
"""
            with subprocess.Popen([sys.executable, "-I", "-S", "-c", flood]) as flooding:  # noqa: ASYNC220
                say(r.pid("calm"), "STATUS=heard")
                await until(lambda: r.supervisor.facts("calm").status == "heard", "the other is heard")
                await until(lambda: r.supervisor.facts("d").status == "69", "the flood got through")
                assert flooding.wait(5) == 0
            assert r.supervisor.facts("d").throttled >= 1
            assert r.signals() == ["started"]

    asyncio.run(play())


@needs_root
def test_stranger_is_refused_and_the_daemons_own_user_is_heard(tmp_path: Path) -> None:
    def send_as(uid: int, name: str, text: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            pid = os.fork()
            if pid == 0:
                os.setuid(uid)
                sock.sendto(text.encode(), "\0" + name[1:])
                os._exit(0)
            os.waitpid(pid, 0)

    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", user="nobody", cwd="/")) as r:
            await r.supervisor.start("d")
            name = environ(r.pid())["NOTIFY_SOCKET"]
            send_as(12345, name, "STATUS=stranger")
            send_as(65534, name, "STATUS=own")
            await until(lambda: r.supervisor.facts("d").heard, "heard")
            facts = r.supervisor.facts("d")
            assert (facts.status, facts.heard, facts.refused) == ("own", 1, 1)

    asyncio.run(play())


def test_daemon_that_is_not_listened_to_has_no_socket(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(tmp_path, spec("sleep", "100", readiness="none")) as r:
            await r.supervisor.start("d")
            assert "NOTIFY_SOCKET" not in environ(r.pid())
            assert r.signals() == ["started"]

    asyncio.run(play())


@needs_systemd_notify
def test_shell_script_with_systemd_notify_is_a_full_member(tmp_path: Path) -> None:
    async def play() -> None:
        script = (
            "systemd-notify --ready --status='open for all'; systemd-notify X_QD_HEALTH=degraded:half; "
            "echo said; exec sleep 100"
        )
        async with rig(tmp_path, sh(script, readiness="sd_notify")) as r:
            await r.supervisor.start("d")
            assert (await r.told("health")).reason == "half"
            await r.wrote("said")
            assert r.supervisor.facts("d").status == "open for all"
            assert r.signals() == ["starting", "started", "health"]

    asyncio.run(play())


@pytest.mark.skipif(shutil.which("dbus-daemon") is None, reason="dbus-daemon is not installed")
def test_dbus_daemon_unchanged_says_when_it_is_ready(tmp_path: Path) -> None:
    async def play() -> None:
        bus = spec("dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address=unix:dir={tmp_path}")
        async with rig(tmp_path / "place", msgspec.structs.replace(bus, readiness="sd_notify")) as r:
            await r.supervisor.start("d")
            await r.told("started")
            assert r.signals() == ["starting", "started"]
            await r.supervisor.stop("d", 10_000)
            await r.told("exited_cleanly")

    asyncio.run(play())
