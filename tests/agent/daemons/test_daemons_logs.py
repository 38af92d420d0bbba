"""Output of daemons: every line, in order, safe to show, bounded on disk and in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from agent.daemons import log as logs
from agent.daemons.log import DaemonLog, LogLine, escaped, rotate
from tests.agent.daemons.rig import rig, sh, until


def test_line_is_escaped_where_it_could_steer_a_terminal() -> None:
    assert escaped("plain ünïcode 日本") == "plain ünïcode 日本"
    assert escaped("a\x1b[2J\tb\u202e\x07") == "a\\x1b[2J    b\\u202e\\x07"


def test_both_outputs_of_a_daemon_are_kept_line_by_line(tmp_path: Path) -> None:
    async def play() -> None:
        async with rig(
            tmp_path, sh("echo one; echo two >&2; printf '\\033[2Jthree\\r\\n'; printf four; sleep 100")
        ) as r:
            await r.supervisor.start("d")
            await r.wrote("four")
            assert r.lines() == ["one", "two", "\\x1b[2Jthree", "four"]
            assert (tmp_path / "d" / "log").stat().st_mode & 0o777 == 0o600
            await r.supervisor.stop("d", 5_000)
            await r.told("exited_cleanly")
            assert r.lines()[0] == "one"

    asyncio.run(play())


def test_follower_gets_the_last_lines_and_then_each_new_one(tmp_path: Path) -> None:
    async def play() -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        script = 'echo 1; echo 2; echo 3; while read x; do echo "$x"; done < $FIFO; sleep 100'
        async with rig(tmp_path / "place", sh(script, env={"FIFO": str(fifo)})) as r:
            await r.supervisor.start("d")
            await r.wrote("3")
            log = r.supervisor.log("d")
            assert log is not None
            got: list[str] = []

            async def read() -> None:
                async for line in log.follow(2):
                    got.append(line.line)

            reader = asyncio.create_task(read())
            await until(lambda: len(got) == 2, f"the last two in {got}")
            with fifo.open("w") as to:
                for n in range(4, 10):
                    to.write(f"{n}\n")
                    to.flush()
                    await until(lambda n=n: got and got[-1] == str(n), f"line {n} in {got}")
            assert got == [str(n) for n in range(2, 10)]
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            assert not log.followed

    asyncio.run(play())


def test_lines_kept_are_bounded_and_a_long_one_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DaemonLog(path, wall_ms=lambda: 77)
    with path.open("ab") as f:
        f.write(b"".join(b"%d\n" % n for n in range(5000)))
        f.flush()
        log.poll()
        assert [line.line for line in log.tail(3)] == ["4997", "4998", "4999"]
        assert len(log.tail(10_000)) == logs.RING_LINES
        f.write(b"x" * 20_000)
        f.flush()
        log.poll()
        f.write(b"y" * 20_000 + b"\nnext\n")
        f.flush()
        log.poll()
    assert log.tail(2) == [LogLine(77, "x" * logs.LINE_MAX_BYTES + "…"), LogLine(77, "next")]


def test_more_than_a_reader_can_take_is_told_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DaemonLog(path)
    path.write_bytes(b"first\n" + b"x" * (3 << 20) + b"\nlast\n")
    assert [line.line for line in log.tail(2)] == [
        "… 2,097,164 bytes not shown; they are in the file",
        "last",
    ]


def test_log_of_an_earlier_run_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %06d\n" % n for n in range(50_000)))
    os.utime(path, (1000, 1000))
    log = DaemonLog(path)
    assert log.tail(1) == [LogLine(1_000_000, "line 049999")]
    assert all(line.line.startswith("line ") and len(line.line) == 11 for line in log.tail(10_000))


@pytest.mark.parametrize("in_place", [True, False])
def test_rotation_loses_no_line_of_a_daemon_that_writes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """Where the head can't be cut off in place, the daemon pauses meanwhile: that way is known to lose some."""
    monkeypatch.setattr(logs, "KEPT", 100)
    if not in_place:
        monkeypatch.setattr(logs, "_collapse", lambda fd, length: False)

    async def play() -> None:
        path = tmp_path / "log"
        log = DaemonLog(path, rotate_bytes=20_000)
        fd = log.open()
        total = 0
        while log.rotations < 3:
            os.write(fd, b"%06d\n" % total)
            total += 1
            if total % 50 == 0:
                log.poll()
                await asyncio.sleep(0)
                if not in_place:
                    await log.settle()
        await log.settle()
        os.close(fd)
        assert [line.line for line in log.tail(100)] == [f"{n:06d}" for n in range(total - 100, total)]
        await log.settle()
        older = [tmp_path / f"log.{n}" for n in range(log.rotations, 0, -1)]
        text = b"".join(path.read_bytes() for path in [*older, path])
        assert text == b"".join(b"%06d\n" % n for n in range(total))

    asyncio.run(play())


def test_rotation_keeps_three_older_files(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for n in range(6):
        path.write_bytes(b"%d" % n * 100)
        rotate(path, logs.KEPT)
    assert {p.name: p.read_bytes()[:1] for p in tmp_path.iterdir()} == {
        "log": b"",
        "log.1": b"5",
        "log.2": b"4",
        "log.3": b"3",
    }
    assert (tmp_path / "log.1").stat().st_mode & 0o777 == 0o600


def test_rotation_of_a_flood_keeps_its_end_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"%07d\n" % n for n in range(10_000)))
    rotate(path, logs.KEPT, kept_max_bytes=8192)
    first, *kept = (tmp_path / "log.1").read_bytes().splitlines()
    assert "too much to keep" in first.decode()
    rest = path.read_bytes().splitlines()
    assert (kept + rest)[-1] == b"0009999" and len(kept + rest) in range(1000, 1600)


def test_rotation_that_fails_is_told_and_the_log_goes_on(tmp_path: Path) -> None:
    async def play() -> None:
        (tmp_path / ".log.copy").mkdir()
        log = DaemonLog(tmp_path / "log", rotate_bytes=100)
        (tmp_path / "log").write_bytes(b"x" * 200 + b"\n")
        log.poll()
        await log.settle()
        assert "not rotated" in log.trouble
        with (tmp_path / "log").open("ab") as f:
            f.write(b"more\n")
        assert log.tail(1)[0].line == "more"
        await log.settle()

    asyncio.run(play())
