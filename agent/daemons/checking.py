"""Health checks: a command's exit status, a TCP connect, an HTTP answer; never two of one daemon at a time.

One failure may be a hiccup: degraded. Two running are unhealthy. One success is healthy again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, urlsplit

from agent.daemons.launching import run_command
from agent.daemons.log import escaped
from agent.daemons.voice import WELL, Condition
from agent.executor import DispatchError
from agent.meshos.events import DaemonHealth
from agent.spec.model import DaemonSpec, HealthCheck
from discovery.lean import tls

FIRST_AFTER_S = 1.0
"""The first check comes after this, or after the interval where that is shorter."""
UNHEALTHY_AFTER = 2
HTTP_LINE_MAX = 8192
REASON_MAX = 160


async def watch(spec: DaemonSpec, env: Mapping[str, str], found: Callable[[Condition], None]) -> None:
    """Checks until it is cancelled, and tells what each check comes to. Nothing where the spec has no check."""
    check = spec.health
    if check is None:
        return
    failures = 0
    await asyncio.sleep(min(FIRST_AFTER_S, check.interval_s))
    while True:
        began = time.monotonic()
        reason = await checked(check, spec, env)
        failures = failures + 1 if reason else 0
        if not reason:
            found(WELL)
        else:
            bad = DaemonHealth.UNHEALTHY if failures >= UNHEALTHY_AFTER else DaemonHealth.DEGRADED
            found((bad, reason[:REASON_MAX]))
        await asyncio.sleep(max(0.05, check.interval_s - (time.monotonic() - began)))


async def checked(check: HealthCheck, spec: DaemonSpec, env: Mapping[str, str]) -> str:
    """One check: why it failed, in words; empty when it didn't."""
    try:
        async with asyncio.timeout(check.timeout_s):
            if check.exec is not None:
                return await _exec(check.exec, spec, env, check.timeout_s)
            if check.tcp is not None:
                return await _tcp(check.tcp)
            return await _http(check.http or "")
    except TimeoutError:
        what = "exec" if check.exec is not None else "tcp" if check.tcp is not None else "http"
        return f"{what} check: no answer within {check.timeout_s:g} s"
    except DispatchError as why:
        return f"exec check: {why.reason}"
    except OSError as why:
        return f"check: {why.strerror or type(why).__name__}"


async def _exec(argv: list[str], spec: DaemonSpec, env: Mapping[str, str], timeout_s: float) -> str:
    end, said = await run_command(argv, env, spec, timeout_s)
    if end is None:
        return f"exec check: not done within {timeout_s:g} s"
    if end.status == 0:
        return ""
    return f"exec check: {end.words()}" + (f": {said}" if said else "")


async def _tcp(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit():
        return f"tcp check: {escaped(address)}: HOST:PORT expected"
    try:
        _, writer = await asyncio.open_connection(host.strip("[]") or "127.0.0.1", int(port))
    except (OSError, OverflowError, ValueError) as why:
        return f"tcp check: {escaped(address)}: {_words(why)}"
    writer.transport.abort()
    return ""


async def _http(url: str) -> str:
    try:
        parts = urlsplit(url)
        secure = {"http": False, "https": True}[parts.scheme]
        port = parts.port or (443 if secure else 80)
        host = parts.hostname or ""
    except (KeyError, ValueError):
        return f"http check: {escaped(url)}: http://HOST[:PORT]/PATH expected"
    try:
        if secure:
            tls()
        reader, writer = await asyncio.open_connection(
            host, port, ssl=True if secure else None, limit=HTTP_LINE_MAX
        )
    except (OSError, ValueError) as why:
        return f"http check: {escaped(parts.netloc)}: {_words(why)}"
    try:
        writer.write(_request(parts))
        words = (await reader.readline()).decode("latin-1").split()
    except (OSError, ValueError) as why:
        return f"http check: {escaped(parts.netloc)}: {_words(why)}"
    finally:
        writer.transport.abort()
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        return f"http check: {escaped(parts.netloc)}: answers, but not in HTTP/1.1"
    return "" if 200 <= int(words[1]) < 400 else f"http check: answered {escaped(' '.join(words[1:]))}"


def _request(parts: SplitResult) -> bytes:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "User-Agent: quarterdeck",
        "Accept: */*",
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def _words(why: Exception) -> str:
    if isinstance(why, ConnectionRefusedError):
        return "connection refused"
    return escaped(getattr(why, "strerror", None) or str(why) or type(why).__name__)
