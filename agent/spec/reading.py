"""Reads a spec file: TOML in, a checked `FleetSpec` out, or one line that says which table, entry and key is wrong.

What is read here can be acted on: names are unique, selectors parse, `after` has an order, signals exist on this host,
a health check's `tcp` is HOST:PORT and `resources.memory` a number of bytes whatever short form they were written in.
"""

from __future__ import annotations

import difflib
import re
import signal
import tomllib
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from agent.config import host_port
from agent.spec.amounts import bytes_of, kept_bytes, kept_ms
from agent.spec.model import (
    ArtifactSpec,
    ChainSpec,
    ControlHooks,
    DaemonSpec,
    FleetSpec,
    HealthCheck,
    Resources,
)
from agent.spec.selector import read_selector
from discovery.errors import LocalError
from discovery.member import addr_text

SPEC_MAX_BYTES = 256 * 1024
ENTRIES_MAX = 1_000
"""Daemons; and as many chains, and as many artifacts."""
ENV_MAX = 256
RESERVED = ("admin",)
"""Names of chains that are the mesh's own."""
LOOPBACK = "127.0.0.1"
TABLES: Mapping[str, type[msgspec.Struct]] = {
    "daemon": DaemonSpec,
    "chain": ChainSpec,
    "artifact": ArtifactSpec,
}
_INNER: Mapping[str, type[msgspec.Struct]] = {
    "health": HealthCheck,
    "control": ControlHooks,
    "resources": Resources,
}
_T = TypeVar("_T", bound=msgspec.Struct)
_AT = re.compile(r" - at `\$(.*)`$")
_LIST_HINT = {"command", "exec", "after"}
_WORDS = {"array": "a list", "object": "a table", "str": "text", "int": "a whole number", "float": "a number"}
_MEANT: Mapping[str, str] = {
    **dict.fromkeys(("args", "run", "exec_start", "program"), "command"),
    **dict.fromkeys(("depends_on", "requires", "needs"), "after"),
    **dict.fromkeys(("nodes", "where", "selector", "placement"), "on"),
    **dict.fromkeys(("environment", "vars"), "env"),
    **dict.fromkeys(("dir", "workdir", "working_directory"), "cwd"),
    **dict.fromkeys(("instances", "scale"), "count"),
    "signal": "stop_signal",
    "healthcheck": "health",
    "copies": "replicas",
    **dict.fromkeys(("requests", "requirements"), "resources"),
    **dict.fromkeys(("cpus", "cores"), "cpu"),
    **dict.fromkeys(("mem", "ram"), "memory"),
    **dict.fromkeys(("max_bytes", "retention_bytes", "max_size"), "keep_bytes"),
    **dict.fromkeys(("max_age", "retention", "ttl", "keep"), "keep_for"),
}
"""What other programs' files call it."""


def read_spec(text: str, *, in_force: bool = False) -> FleetSpec:
    """The spec in a file's text. LocalError(`what: why; what to do`) at the first thing that is wrong.

    `in_force`: a mesh runs by it already. Rules that an earlier build did not have then don't count: to refuse it
    would end what runs."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as why:
        raise LocalError("spec: half of a character in it; save it as UTF-8") from why
    if size > SPEC_MAX_BYTES:
        raise LocalError(f"spec: {size} bytes; at most {SPEC_MAX_BYTES} are read")
    tables = _tables(text)
    daemons = [_check_daemon(daemon) for daemon in _entries("daemon", DaemonSpec, tables)]
    _check_order(daemons)
    chains = _entries("chain", ChainSpec, tables)
    for chain in chains:
        _check_chain(chain)
    if any(chain.name in RESERVED for chain in chains):
        raise LocalError(f"chain {RESERVED[0]}: every mesh has one of that name; rename yours")
    spec = FleetSpec(daemon=daemons, chain=chains, artifact=_entries("artifact", ArtifactSpec, tables))
    if not in_force:
        _check_new(spec)
    return spec


def _check_new(spec: FleetSpec) -> None:
    """What the first builds took, and what never worked."""
    for daemon in spec.daemon:
        if daemon.cwd is not None and not daemon.cwd.startswith("/"):
            said = _plain(daemon.cwd)
            raise LocalError(f"daemon {daemon.name}: `cwd`: {said!r} is relative; write it from / on")
    for name in {chain.name for chain in spec.chain} & {artifact.name for artifact in spec.artifact}:
        raise LocalError(f"artifact {name}: a chain has that name, and they share their names; rename one")


def read_resources(given: Any) -> Resources | None:
    """What a class says that it requires, read like the `resources` of a spec; None: nothing. LocalError
    (`requirements: why; what to do`) when it is no such thing."""
    if given is None or given == {}:
        return None
    if not isinstance(given, dict):
        raise LocalError('requirements: no dictionary; return {"cpu": 0.5, "memory": "512M"}, or {}')
    found = _convert({str(key): value for key, value in given.items()}, Resources, "requirements")
    return None if found == Resources() else found


def _tables(text: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as why:
        at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", str(why))
        line = at[1] if at and at[1] else len(text.splitlines()) or 1
        reason = str(why)[: at.start()] if at else str(why)
        raise LocalError(f"line {line}: {_plain(reason)}; correct that line") from why
    except (ValueError, RecursionError) as why:
        raise LocalError(f"spec: not TOML: {_plain(str(why))}") from why
    for name, entries in tables.items():
        if name not in TABLES:
            raise LocalError(f"spec: no table `{_plain(name)}`; did you mean `[[{_nearest(name, TABLES)}]]`?")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise LocalError(f"{name}: not a list of tables; write [[{name}]] above each one")
        if len(entries) > ENTRIES_MAX:
            raise LocalError(f"{name}: {len(entries)} of them; {ENTRIES_MAX} at most")
    return tables


def _entries(table: str, form: type[_T], tables: Mapping[str, Any]) -> list[_T]:
    """The entries of one table, each converted, their names unique."""
    found: list[_T] = []
    names: set[str] = set()
    for number, entry in enumerate(tables.get(table, ()), 1):
        name = entry.get("name")
        what = f"{table} {_plain(name)}" if isinstance(name, str) and name else f"{table} number {number}"
        if name is None:
            raise LocalError(f"{what}: no `name`; give it one")
        found.append(_convert(entry, form, what))
        if name in names:
            raise LocalError(f"{what}: `name` is there twice; rename one of them")
        names.add(name)
    return found


def _convert(entry: dict[str, Any], form: type[_T], what: str) -> _T:
    _check_keys(entry, form, what, "")
    for key, inner in _INNER.items():
        if form is DaemonSpec and isinstance(entry.get(key), dict):
            _check_keys(entry[key], inner, what, f"{key}.")
    if isinstance(health := entry.get("health"), dict) and type(health.get("tcp")) is int:
        entry = {**entry, "health": {**health, "tcp": str(health["tcp"])}}
    if form is DaemonSpec and isinstance(needs := entry.get("resources"), dict):
        entry = {**entry, "resources": _sized(needs, what, "resources.")}
    if form is Resources:
        entry = _sized(entry, what, "")
    try:
        return msgspec.convert(entry, form)
    except msgspec.ValidationError as why:
        raise LocalError(f"{what}: {_why(why)}") from why


def _sized(needs: dict[str, Any], what: str, prefix: str) -> dict[str, Any]:
    """With `memory` as a number where it is a size in text."""
    if isinstance(memory := needs.get("memory"), str):
        return {**needs, "memory": _checked(what, f"{prefix}memory", lambda: bytes_of(memory))}
    return needs


def _check_keys(entry: Mapping[str, Any], form: type[msgspec.Struct], what: str, prefix: str) -> None:
    legal = form.__struct_fields__
    for key in entry:
        if key not in legal:
            near = f"{prefix}{_nearest(key, legal)}"
            raise LocalError(f"{what}: no key `{prefix}{_plain(key)}`; did you mean `{near}`?")


def _why(error: msgspec.ValidationError) -> str:
    """msgspec's sentence with the key in front, and what to write where that is known."""
    text = str(error)
    at = _AT.search(text)
    key = at[1].removeprefix(".") if at else ""
    said = (text[: at.start()] if at else text).replace("`", "")
    said = re.sub(
        r"\b(array|object|str|int|float)\b", lambda word: _WORDS[word[0]], said[:1].lower() + said[1:]
    )
    first = re.split(r"[.\[]", key.removeprefix("health."), maxsplit=1)[0]
    if key == "name" and "regex" in said:
        said = "not a name; use small letters, digits, '.', '_' and '-', 64 at most, a letter or digit first"
    elif key == "readiness":
        said += "; use exec, sd_notify or none"
    elif key == "resources":
        said += '; write resources = { cpu = 0.5, memory = "512M" }'
    elif first in _LIST_HINT and "expected a list" in said:
        said += f'; write {first} = ["…", "…"]'
    return f"`{key}`: {said}" if key else said


def _check_daemon(daemon: DaemonSpec) -> DaemonSpec:
    what = f"daemon {daemon.name}"
    if bool(daemon.command) == (daemon.entry_point is not None):
        both = "both `command` and `entry_point`" if daemon.command else "neither `command` nor `entry_point`"
        raise LocalError(f"{what}: {both}; give exactly one")
    if daemon.count is not None and daemon.all:
        raise LocalError(f"{what}: both `count` and `all`; keep one of them")
    _checked(what, "on", lambda: read_selector(daemon.on))
    for key in ("entry_point", "cwd", "user"):
        value = getattr(daemon, key)
        if value is not None and (not value or "\0" in value or len(value) > 4096):
            raise LocalError(
                f"{what}: `{key}`: empty, too long, or with a NUL in it; leave it out or correct it"
            )
    if len(daemon.env) > ENV_MAX:
        raise LocalError(f"{what}: `env`: {len(daemon.env)} variables; {ENV_MAX} at most")
    for variable in daemon.env:
        if not variable or "=" in variable or "\0" in variable:
            raise LocalError(f"{what}: `env`: {_plain(variable)!r} is no name of a variable; correct it")
    _check_signal(what, "stop_signal", daemon.stop_signal)
    for key in ControlHooks.__struct_fields__:
        hook = getattr(daemon.control, key)
        if isinstance(hook, str):
            _check_signal(what, f"control.{key}", hook)
        elif hook == []:
            raise LocalError(f"{what}: `control.{key}`: an empty command; leave it out")
    for key, number in _numbers(daemon):
        if number != number:
            raise LocalError(f"{what}: `{key}`: not a number; give seconds")
    if daemon.resources == Resources():
        raise LocalError(f"{what}: `resources`: neither `cpu` nor `memory`; give one, or leave it out")
    if daemon.health is None:
        return daemon
    return msgspec.structs.replace(daemon, health=_check_health(what, daemon.health))


def _check_chain(chain: ChainSpec) -> None:
    what = f"chain {chain.name}"
    _checked(what, "keep_bytes", lambda: kept_bytes(chain.keep_bytes))
    if (age := chain.keep_for) is not None:
        _checked(what, "keep_for", lambda: kept_ms(age))


def _check_health(what: str, health: HealthCheck) -> HealthCheck:
    kinds = [key for key in ("exec", "tcp", "http") if getattr(health, key) is not None]
    if len(kinds) != 1:
        said = " and ".join(f"`{kind}`" for kind in kinds) if kinds else "none of `exec`, `tcp` and `http`"
        raise LocalError(f"{what}: `health`: {said}; give exactly one of exec, tcp and http")
    if health.tcp is not None:
        tcp = health.tcp
        addr = _checked(what, "health.tcp", lambda: host_port(f"{LOOPBACK}:{tcp}" if tcp.isdigit() else tcp))
        return msgspec.structs.replace(health, tcp=addr_text(addr))
    if health.http is not None:
        url = health.http
        _checked(what, "health.http", lambda: _check_url(url))
    return health


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.username is not None:
        raise ValueError("not a plain http:// URL; for anything else use `exec`")
    if not url.isascii() or not url.isprintable() or " " in url or len(url) > 2048:
        raise ValueError("characters that no URL has, or too many; write it as http://127.0.0.1:8080/health")
    if parts.port == 0:
        raise ValueError("not a port; use 1 to 65535")


def _check_signal(what: str, key: str, name: str) -> None:
    known = [member.name for member in signal.Signals]
    if name in known:
        return
    near = _nearest(name, known)
    cure = f"did you mean {near}?" + ("" if key == "stop_signal" else ' A command is a list: ["…"]')
    raise LocalError(f"{what}: `{key}`: {_plain(name)} is no signal here; {cure}")


def _check_order(daemons: Iterable[DaemonSpec]) -> None:
    """Every `after` names a daemon of the spec, and following them comes to an end."""
    after = {daemon.name: daemon.after for daemon in daemons}
    for name, before in after.items():
        for other in before:
            if other not in after:
                near = f"did you mean {_nearest(other, after)}?"
                raise LocalError(f"daemon {name}: `after`: no daemon {other}; {near}")
    try:
        TopologicalSorter(after).prepare()
    except CycleError as why:
        circle = list(reversed(why.args[1]))
        shown = circle if len(circle) <= 8 else [*circle[:6], "…", circle[-1]]
        raise LocalError(f"daemon {' → '.join(shown)}: `after`: goes round in a circle; break it") from why


def _checked(what: str, key: str, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except (ValueError, LocalError) as why:
        reason, _, cure = _plain(str(why)).partition("; ")
        raise LocalError(f"{what}: `{key}`: {reason}" + (f"; {cure}" if cure else "; correct it")) from why


def _numbers(daemon: DaemonSpec) -> Iterable[tuple[str, float]]:
    yield "grace_s", daemon.grace_s
    yield "start_timeout_s", daemon.start_timeout_s
    if daemon.health is not None:
        yield "health.interval_s", daemon.health.interval_s
        yield "health.timeout_s", daemon.health.timeout_s


def _nearest(word: str, legal: Iterable[str]) -> str:
    """The legal word that was meant: another name for it, one that this shortens (`cmd`), or the most alike."""
    choices = sorted(legal)
    if _MEANT.get(word) in choices:
        return _MEANT[word]
    short = [choice for choice in choices if len(word) > 1 and _shortens(word, choice)]
    return short[0] if len(short) == 1 else difflib.get_close_matches(word[:64], choices, n=1, cutoff=0.0)[0]


def _shortens(word: str, whole: str) -> bool:
    rest = iter(whole)
    return word[0] == whole[0] and all(char in rest for char in word)


def _plain(text: str) -> str:
    """What a file says, fit for one line of an error."""
    return "".join(c if c.isprintable() else "?" for c in text)[:160]
