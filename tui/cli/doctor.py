"""`qd doctor`: what could keep this home from working, each with one line that says what to do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from agent.home import Home, RunEntry, read_identity, read_secret
from discovery.errors import LocalError, QuarterdeckError
from tui.cli.common import Scope, colours, document, out, run, scoped
from tui.cli.failures import FAILED, OK, USAGE, Fail

Check = dict[str, Any]
"""`{"what", "ok": true|false|null, "text", "node"}`; null is a warning."""

MDNS_GROUP = "224.0.0.251"
CLOCK_LIMIT_MS = 30_000
MARKS = {True: ("ok", "green"), None: ("warn", "yellow"), False: ("WRONG", "red")}
OTHER_VARIABLES = frozenset({"QD_FLEET", "QD_DEMO_HOME", "QD_HEADLESS", "QD_CHECK", "QD_FOR", "QD_DEBUG"})
"""Read by the demo, and by nobody who has a config file."""


@click.command()
@scoped()
def doctor(scope: Scope) -> int:
    """Check ports, multicast, keys, operators, clock, journal and code of this home and its nodes."""
    return run(_doctor(scope))


async def _doctor(scope: Scope) -> int:
    from agent.freshness import fingerprint

    home = scope.home
    if scope.mesh is not None and scope.mesh not in home.meshes():
        has = ", ".join(home.meshes()) or "none"
        raise Fail(USAGE, f"mesh {scope.mesh}: not in this home; it has {has}")
    entries = [e for e in home.running() if scope.mesh in (None, e.mesh)]
    build = fingerprint()
    checks = [
        *local_checks(home, entries),
        *[
            check
            for found in await asyncio.gather(*(_ask(home, e, build) for e in entries))
            for check in found
        ],
    ]
    wrong = any(check["ok"] is False for check in checks)
    if scope.json:
        document({"ok": not wrong, "build": build, "checks": checks})
    else:
        out("\n".join(map(_line, checks)))
    return FAILED if wrong else OK


def local_checks(home: Home, entries: list[RunEntry]) -> list[Check]:
    """Everything that can be seen without asking a node."""
    checks = [*_key_checks(home), _operators(home), _config(home), *_environment(), _ports(), _multicast()]
    if not entries:
        checks.append(
            _check("nodes", None, "none of this home runs; start one with `qd agent` or `qd spawn`")
        )
    return checks


def _key_checks(home: Home) -> list[Check]:
    meshes = home.meshes()
    if not meshes:
        return [_check("meshes", False, f"no mesh in {home.config}; make one with `qd init --mesh NAME`")]
    wanted: list[tuple[str, Path, Callable[[Path, str], object]]] = [
        ("backbone key", home.backbone_key_file, read_secret),
        ("client key", home.client_key_file, read_identity),
        ("operator key", home.operator_key_file, _readable),
    ]
    for mesh in meshes:
        wanted.append((f"key of mesh {mesh}", home.mesh_key_file(mesh), _key_ring))
        wanted.append((f"identity of mesh {mesh}", home.mesh_identity_file(mesh), read_identity))
    checks = []
    for what, path, read in wanted:
        try:
            read(path, what)
        except LocalError as why:
            missing = not path.exists() and what == "operator key"
            checks.append(_check(what, None if missing else False, str(why)))
        else:
            checks.append(_check(what, True, f"{path}, mode {stat.S_IMODE(path.stat().st_mode):04o}"))
    return checks


def _key_ring(path: Path, what: str) -> object:
    from agent.events import wall_ms
    from agent.keyring import KeyFile

    return KeyFile(path, path.parent.name).read(wall_ms())


def _readable(path: Path, what: str) -> object:
    """An operator key may be of any type and have a passphrase: only its place and mode are judged."""
    from agent.home import read_private

    return read_private(path, what)


def _operators(home: Home) -> Check:
    from agent.operators import Operators

    path = home.operators_file
    if not path.exists():
        return _check("operators", False, f"{path}: not there, so nobody may command; `qd init` makes it")
    operators = Operators(path)
    count = len(operators.lines)
    problems = [str(problem) for problem in operators.problems]
    if problems:
        return _check("operators", False, "; ".join(problems))
    if not count:
        return _check("operators", False, f"{path}: lists nobody, so nobody may command")
    return _check("operators", True, f"{count} key{'s' * (count != 1)} in {path}")


def _config(home: Home) -> Check:
    from agent.config import CONFIG_FILE, read_file

    path = home.config / CONFIG_FILE
    try:
        read_file(path)
    except LocalError as why:
        return _check("config", False, str(why))
    return _check("config", True, f"{path} reads well" if path.exists() else "no config.toml: defaults")


def _environment() -> list[Check]:
    from agent.config import unknown_variables

    return [
        _check("environment", None, f"{name} is read by nothing; the nearest is {nearest}")
        for name, nearest in unknown_variables()
        if name not in OTHER_VARIABLES
    ]


def _ports() -> Check:
    """Whether one number can be had for UDP and TCP, as every node needs."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
            tcp.bind(("", 0))
            port = tcp.getsockname()[1]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.bind(("", port))
    except OSError as why:
        return _check("ports", False, f"no port serves both UDP and TCP ({why.strerror}); see `ss -tulpn`")
    return _check("ports", True, "UDP and TCP can be bound together")


def _multicast() -> Check:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP) as sock:
            member = struct.pack("4sl", socket.inet_aton(MDNS_GROUP), socket.INADDR_ANY)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    except OSError as why:
        text = f"no multicast here ({why.strerror}): nodes won't find each other on the LAN; give them --join HOST:PORT"
        return _check("mDNS", None, text)
    return _check("mDNS", True, f"multicast group {MDNS_GROUP} can be joined")


async def _ask(home: Home, entry: RunEntry, build: str) -> list[Check]:
    """What one running node says of itself, and what can be seen from here: does it answer, clock, code."""
    from tui.client import attach_entry

    asked = time.time()
    try:
        client = await attach_entry(home, entry)
    except QuarterdeckError as why:
        text = f"process {entry.pid} runs but: {why}; see its log, or end it"
        return [_check("answers", False, text, entry.name)]
    async with client:
        took_s = time.time() - asked
        checks = [_check("answers", True, f"at {entry.addr}, in {took_s * 1000:.0f} ms", entry.name)]
        checks += _clock(client.hello, asked, took_s, entry.name)
        theirs = str(client.hello.get("build") or "")
        told: list[Check] = []
        with contextlib.suppress(QuarterdeckError):
            told = [
                _check(str(c.get("what")), c.get("ok"), str(c.get("text")), entry.name)
                for c in await client.checks()
                if c.get("what") not in ("clock", "code")
            ]
    stale = theirs != build
    text = f"stale: runs {theirs}, the disk holds {build}; `qd update {entry.name}` cures it"
    checks.append(
        _check("code", not stale, text if stale else f"runs build {theirs}, as on disk", entry.name)
    )
    return checks + told


def _clock(hello: dict[str, Any], asked: float, took_s: float, name: str) -> list[Check]:
    wall = hello.get("wall_ms")
    if not isinstance(wall, int | float):
        return []
    skew = wall - (asked + took_s / 2) * 1000
    off = max(0.0, abs(skew) - took_s * 500)
    if off > CLOCK_LIMIT_MS:
        text = f"{off / 1000:.0f} s {'ahead of' if skew > 0 else 'behind'} this host; check its time service"
        return [_check("clock", False, text, name)]
    return [_check("clock", True, f"within {max(1, round(took_s * 500))} ms of this host", name)]


def _check(what: str, ok: bool | None, text: str, node: str | None = None) -> Check:
    return {"what": what, "ok": ok, "text": text, "node": node}


def _line(check: Check) -> str:
    from tui.model.text import clean, pad

    word, colour = MARKS[check["ok"]]
    mark = pad(word, 5)
    where = f"{clean(check['node'])}: " if check["node"] else ""
    return f"{click.style(mark, fg=colour) if colours() else mark}  {where}{clean(check['what'])}: {clean(check['text'])}"
