"""Health checks, and how they and the daemon's own word combine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.daemons import checking
from agent.daemons.checking import checked
from agent.daemons.voice import WELL, worse
from agent.meshos.events import DaemonHealth
from agent.spec.model import HealthCheck
from tests.agent.daemons.rig import rig, say, spec, until
from tests.nats_server import BINARY, free_port, needs_nats_server

SPEC = spec("true")


def check(**fields: object) -> str:
    return asyncio.run(checked(HealthCheck(timeout_s=0.3, **fields), SPEC, {"PATH": "/usr/bin:/bin"}))  # type: ignore[arg-type]


def test_worse_of_two_conditions_is_commutative_and_keeps_the_reason_of_the_worse() -> None:
    healths = list(DaemonHealth)
    for one, other in itertools.product(healths, healths):
        found = worse((one, "a"), (other, "b"))
        assert found[0] == worse((other, "b"), (one, "a"))[0]
        assert healths.index(found[0]) == max(healths.index(one), healths.index(other))
        assert found[1] == ("a; b" if one is other else "a" if found[0] is one else "b")
    assert worse(WELL, WELL) == WELL


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["true"], ""),
        (["sh", "-c", "echo no disk; exit 3"], "exec check: exit status 3: no disk"),
        (["sh", "-c", "head -c 300000 /dev/zero; exit 1"], "exec check: exit status 1"),
        (["sleep", "60"], "within 0.3 s"),
        (["/no/such/check"], "No such file"),
    ],
)
def test_exec_check_goes_by_the_exit_status(argv: list[str], words: str) -> None:
    reason = check(exec=argv)
    assert words in reason if words else reason == ""


@asynccontextmanager
async def answering(answer: bytes | None) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is None:
            await asyncio.sleep(5)
        writer.write(answer or b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", ""),
        (b"HTTP/1.1 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 503 Not\x1b now\r\n\r\n", "http check: answered 503 Not\\x1b now"),
        (b"SSH-2.0-x\r\n", "not in HTTP"),
        (b"x" * 70_000, "http check"),
        (b"", "not in HTTP"),
        (None, "http check: no answer within 0.3 s"),
    ],
)
def test_http_check_wants_two_or_three_hundred(answer: bytes | None, words: str) -> None:
    async def play() -> str:
        async with answering(answer) as port:
            url = f"http://127.0.0.1:{port}/health?deep=1"
            return await checked(HealthCheck(http=url, timeout_s=0.3), SPEC, {})

    reason = asyncio.run(play())
    assert words in reason if words else reason == ""


def test_tcp_check_wants_a_connection() -> None:
    async def play() -> tuple[str, str]:
        async with answering(b"") as port:
            good = await checked(HealthCheck(tcp=f"127.0.0.1:{port}"), SPEC, {})
        return good, await checked(HealthCheck(tcp=f"127.0.0.1:{port}"), SPEC, {})

    good, bad = asyncio.run(play())
    assert good == ""
    assert "connection refused" in bad
    assert "HOST:PORT" in check(tcp="nowhere")
    assert "expected" in check(http="ftp://x/")


def test_daemon_that_fails_its_check_is_degraded_then_unhealthy_and_well_again_after_one_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "FIRST_AFTER_S", 0.05)

    async def play() -> None:
        ok = tmp_path / "ok"
        health = HealthCheck(exec=["test", "-e", str(ok)], interval_s=0.4)
        async with rig(tmp_path / "place", spec("sleep", "100", health=health)) as r:
            await r.supervisor.start("d")

            def told() -> list[DaemonHealth | None]:
                return [e.health for e in r.events if e.signal == "health"]

            await until(lambda: len(told()) == 2, "unhealthy")
            assert told() == [DaemonHealth.DEGRADED, DaemonHealth.UNHEALTHY]
            assert r.events[-1].reason == "exec check: exit status 1"
            ok.touch()
            await until(lambda: len(told()) == 3, "well")
            assert told()[-1] is DaemonHealth.HEALTHY
            say(r.pid(), "X_QD_HEALTH=degraded:slow")
            await until(lambda: len(told()) == 4, "its own word counts too")
            assert (told()[-1], r.events[-1].reason) == (DaemonHealth.DEGRADED, "slow")

    asyncio.run(play())


def test_checks_of_a_daemon_never_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "FIRST_AFTER_S", 0.0)

    async def play() -> None:
        marks = tmp_path / "marks"
        script = f"echo begin >> {marks}; sleep 0.15; echo end >> {marks}"
        health = HealthCheck(exec=["sh", "-c", script], interval_s=0.1)
        async with rig(tmp_path / "place", spec("sleep", "100", health=health)) as r:
            await r.supervisor.start("d")
            await until(lambda: marks.exists() and marks.read_text().count("end") >= 3, "three checks")
            lines = marks.read_text().split()[:6]
            assert lines == ["begin", "end"] * 3
            assert r.signals() == ["started"]

    asyncio.run(play())


@needs_nats_server
def test_nats_server_unchanged_is_watched_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "FIRST_AFTER_S", 0.05)

    async def play() -> None:
        port = free_port()
        health = HealthCheck(http=f"http://127.0.0.1:{port}/healthz", interval_s=0.1)
        server = spec(str(BINARY), "-a", "127.0.0.1", "-p", "-1", "-m", str(port), health=health)
        async with rig(tmp_path, server) as r:
            await r.supervisor.start("d")
            await until(lambda: any("Server is ready" in line for line in r.lines()), "its log")
            await until(lambda: r.supervisor.facts("d").health is DaemonHealth.HEALTHY, "well")
            await r.supervisor.stop("d", 10_000)
            assert (await r.told("exited_cleanly")).reason in ("", "exit status 1")

    asyncio.run(play())
