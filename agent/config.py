"""Settings of one home: every option once, in a table, read from flags, the environment and config.toml.

A flag beats `QD_<OPTION>` beats the key in `config/config.toml`. Whatever is wrong is said before anything
starts, in one line that names where it was written, why it can't be used and what to do.

An option is declared once, here; its flag, its environment variable and its TOML key follow from its name:
`mem_budget` is `--mem-budget`, `QD_MEM_BUDGET` and `mem_budget`. Adding one is adding a row.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.meshos.states import MaintenanceState
from discovery.errors import LocalError
from discovery.identity import check_kind, check_mesh, check_node_name, default_name
from discovery.lifecycle import State
from discovery.member import MAX_ADDRS, MAX_TAGS, Addr, Record, tags_excess

CONFIG_FILE = "config.toml"
LONGEST_DURATION_MS = 366 * 24 * 3600 * 1000
LONGEST_TAG = 64
UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
_DURATION = re.compile(r"([0-9]{1,15})(ms|s|m|h)|([0-9]{1,12}(?:\.[0-9]{1,6})?)", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})", re.ASCII)
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,32})?", re.ASCII)
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})

_F = TypeVar("_F", bound=Callable[..., Any])


def duration_ms(value: str | int | float) -> int:
    """Milliseconds of `250ms`, `30s`, `5m`, `2h` or a bare number of seconds. ValueError otherwise."""
    legal = "write it as 250ms, 30s, 5m or 2h; a bare number is seconds"
    if isinstance(value, bool):
        raise ValueError(f"not a duration; {legal}")
    text = format(value, "f") if isinstance(value, float) else str(value)
    found = _DURATION.fullmatch(text)
    if not found:
        raise ValueError(f"not a duration; {legal}")
    number, unit, seconds = found.groups()
    ms = int(number) * UNIT_MS[unit] if unit else round(float(seconds) * 1000)
    if ms > LONGEST_DURATION_MS:
        raise ValueError("longer than a year; give a shorter one")
    return ms


def host_port(text: str, default_port: int | None = None) -> Addr:
    """(host, port) of `HOST:PORT` or `[IPv6]:PORT`; `default_port` serves where none is given.

    ValueError("why; what to do") otherwise."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _IPV6.fullmatch(host):
            raise ValueError("not an address in brackets; write it as [::1]:7433")
        port, colon = rest[1:], rest[:1]
        if rest and colon != ":":
            raise ValueError("something other than :PORT after the brackets; write it as [::1]:7433")
    elif text.count(":") > 1:
        raise ValueError("an IPv6 address needs brackets; write it as [::1]:7433")
    else:
        host, colon, port = text.partition(":")
        if not _HOST.fullmatch(host):
            raise ValueError("not a host name or address; write it as HOST:PORT")
    if not colon:
        if default_port is None:
            raise ValueError("no port; write it as HOST:PORT")
        return host, default_port
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError("not a port; use 1 to 65535")
    return host, int(port)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text")
    return value


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,12}", text, re.ASCII):
            raise ValueError(f"not a whole number; use {least} to {most}")
        if not least <= int(text) <= most:
            raise ValueError(f"out of range; use {least} to {most}")
        return int(text)

    return read


def _percent(value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 1 <= number <= 100:
        raise ValueError("not a percentage; use 1 to 100 (100 = never)")
    return number


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("neither yes nor no; use 1 or 0")
    return word in _TRUE


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser().absolute()


def _addr(value: Any) -> Addr:
    return host_port(_text(value))


def _host(value: Any) -> str:
    text = _text(value)
    if _HOST.fullmatch(text) or (":" in text and _IPV6.fullmatch(text)):
        return text
    raise ValueError("not a host name or address; give it without a port")


def _backbone(value: Any) -> str:
    text = _text(value)
    scheme, sep, _ = text.partition("://")
    if sep and scheme not in ("nats", "tls"):
        raise ValueError("not a backbone; use HOST:PORT or nats://HOST:PORT")
    if sep:
        from discovery.backbone.buckets import servers_of

        servers_of(text)
    else:
        host_port(text)
    return text


def _tag(value: Any) -> tuple[str, str]:
    key, sep, word = _text(value).partition("=")
    if (
        not sep
        or not key
        or len(key) > LONGEST_TAG
        or len(word) > LONGEST_TAG
        or not (key + word).isprintable()
    ):
        raise ValueError(f"not a tag; write it as key=value, {LONGEST_TAG} characters each at most")
    return key, word


def _command(value: Any) -> tuple[str, ...]:
    try:
        words = shlex.split(value) if isinstance(value, str) else [_text(word) for word in value]
    except (TypeError, ValueError) as why:
        raise ValueError(f"not a command ({why}); give one line, or a list of words") from why
    if not words:
        raise ValueError("an empty command; give one line, or a list of words")
    return tuple(words)


def _keys(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value.values()):
        raise ValueError('not a table of keys; write keys.drain = "d"')
    return dict(value)


def _choice(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(f"not one of {', '.join(words)}; use one of them")
        return str(value)

    return read


@dataclass(frozen=True)
class Option:
    """One setting. `read` turns what a person wrote (flag or environment: text; TOML: its value) into the
    value used, or raises ValueError("why; what to do"), or LocalError."""

    name: str
    read: Callable[[Any], Any]
    help: str
    default: Any = None
    many: bool = False
    flag: bool = False
    hidden: bool = False
    metavar: str | None = None
    limit: int = 256
    """How many of a `many` option."""
    in_file: bool = True

    @property
    def switch(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "QD_" + self.name.upper()


HOME = Option("home", _path, "Everything of one user in this directory.", metavar="DIR", in_file=False)
MESH = Option("mesh", lambda v: check_mesh(_text(v)), "The mesh.", metavar="MESH")

AGENT_OPTIONS: tuple[Option, ...] = (
    MESH,
    Option(
        "kind",
        lambda v: check_kind(_text(v)),
        "gateway, broker, compute, registry, …",
        "compute",
        metavar="KIND",
    ),
    Option(
        "name",
        lambda v: check_node_name(_text(v)),
        "Name of the node; unique in its home and mesh.",
        metavar="NAME",
    ),
    Option("bind", _host, "Address to listen on.", "0.0.0.0", metavar="HOST"),
    Option("port", _whole(0, 65535), "UDP and TCP port; 0 picks a free one.", metavar="PORT"),
    Option(
        "advertise",
        _host,
        "Address to tell others instead of the ones found.",
        many=True,
        metavar="HOST",
        limit=MAX_ADDRS,
    ),
    Option("join", _addr, "A member to greet first.", many=True, metavar="HOST:PORT"),
    Option(
        "backbone",
        _backbone,
        "Where meshes find each other: a gateway or console of any as HOST:PORT, or nats://HOST:PORT[,…].",
        many=True,
        metavar="ADDR",
    ),
    Option("tag", _tag, "A label that selectors match.", many=True, metavar="KEY=VALUE", limit=MAX_TAGS),
    Option("no_mdns", _truth, "Neither advertise nor browse on the LAN.", False, flag=True),
    Option(
        "log", _choice("text", "json"), "Form of the log on stderr: text or json.", "text", metavar="FORM"
    ),
    Option("record", _path, "Write every event of the node's loop here.", metavar="FILE"),
    Option(
        "profile",
        _choice("local", "lan", "wan"),
        "Timing of gossip: local, lan or wan.",
        "lan",
        metavar="NAME",
    ),
    Option(
        "suspicion_ms",
        _whole(1, LONGEST_DURATION_MS),
        "A fixed suspicion timeout instead of the formula.",
        metavar="N",
    ),
    Option(
        "cpu_budget",
        _percent,
        "CPU of the host beyond which the node is degraded; 100 = never.",
        95.0,
        metavar="PCT",
    ),
    Option(
        "mem_budget",
        _percent,
        "Memory of the host beyond which the node is degraded; 100 = never.",
        95.0,
        metavar="PCT",
    ),
    Option(
        "update_command", _command, "Run by `update` before the new code is checked.", (), metavar="COMMAND"
    ),
    Option("stdin_goodbye", _truth, "Leave when stdin ends.", False, flag=True, hidden=True),
    HOME,
)
"""The options of `qd agent`. Without `port` the node takes its last one, or a free one."""

CLIENT_OPTIONS: tuple[Option, ...] = (
    MESH,
    Option("via", _text, "Whose view: a node, or a mesh of which any node will do.", metavar="NODE"),
    Option("operator_key", _path, "Sign as this key.", metavar="FILE"),
    Option("attach", _text, "An agent elsewhere, to look at and act from.", metavar="HOST[:PORT]"),
    Option("read_only", _truth, "Make no op.", False, flag=True),
    Option("timeout", duration_ms, "How long an op may take.", 30_000, metavar="DURATION"),
    Option("deadline", duration_ms, "How long a drain or a maintenance may take.", metavar="DURATION"),
    Option("ttl", duration_ms, "How long an invitation is good.", 600_000, metavar="DURATION"),
    Option("retire", duration_ms, "How long a rotated key still opens.", 3_600_000, metavar="DURATION"),
    Option("json", _truth, "One JSON document on stdout; everything for people on stderr.", False, flag=True),
    Option("yes", _truth, "Don't ask.", False, flag=True),
    Option("dry_run", _truth, "Show the blast radius; send nothing.", False, flag=True),
    Option(
        "wait",
        _choice("gone", *(state.word for state in State), *(state.value for state in MaintenanceState)),
        "Wait until others see the node in this state: gone, alive, draining, maintenance, ….",
        metavar="STATE",
    ),
    Option("watch", _truth, "Go on: rows as they change (with --json, an object a line).", False, flag=True),
    Option("follow", _truth, "Go on: events as they happen (with --json, one a line).", False, flag=True),
    Option("show", _truth, "Print what is in force; change nothing.", False, flag=True),
    Option("limit", _whole(0, 10_000), "The last N only.", metavar="N"),
    HOME,
)
"""Options that commands share; each command takes those that make sense for it."""

SECTIONS: dict[str, tuple[Option, ...]] = {
    "console": (
        Option("keys", _keys, "Action → key, where it differs from the default.", {}),
        Option(
            "glyphs",
            _choice("unicode", "ascii"),
            "ascii for terminals with double-width ambiguous characters.",
            "unicode",
        ),
        Option("theme", _text, "auto, dark, light or the name of a theme.", "auto"),
    ),
}
"""Tables of config.toml that belong to one program; their keys are no flags."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What `qd agent` runs with: one field an option, read and checked."""

    mesh: str
    kind: str
    name: str | None
    bind: str
    port: int | None
    advertise: tuple[str, ...]
    join: tuple[Addr, ...]
    backbone: tuple[str, ...]
    tag: dict[str, str]
    no_mdns: bool
    log: str
    record: Path | None
    profile: str
    suspicion_ms: int | None
    cpu_budget: float
    mem_budget: float
    update_command: tuple[str, ...]
    stdin_goodbye: bool
    home: Path | None


def load(
    flags: Mapping[str, Any], config_dir: Path | None, environ: Mapping[str, str] | None = None
) -> Settings:
    """The settings of an agent, or LocalError. `flags` is what click gave (unset: None or an empty tuple),
    `config_dir` is `Home.config`, where config.toml may be. A mesh is always needed: there is no default."""
    values = resolve(AGENT_OPTIONS, flags, config_dir, environ)
    if values["mesh"] is None:
        raise LocalError("mesh: none given; name one with --mesh, QD_MESH or `mesh` in config.toml")
    values["tag"] = dict(values["tag"])
    settings = Settings(**values)
    if settings.tag:
        _check_tags(settings)
    return settings


def _check_tags(settings: Settings) -> None:
    """LocalError when the member record has no room for the tags beside all else that it may come to hold."""
    from agent.addresses import advertised

    kind = settings.kind
    record = Record(
        pub=bytes(32),
        mesh=settings.mesh,
        name=settings.name or default_name(settings.mesh, kind, 0),
        kind=kind,
        incarnation=0,
        version=0,
        state=State.JOINING,
        addrs=advertised(settings.bind, 65535, settings.advertise),
        build=12 * "0",
        host=bytes(8),
        tags=settings.tag,
    )
    excess = tags_excess(record)
    if excess > 0:
        size = len(msgspec.msgpack.encode(settings.tag))
        raise LocalError(
            f"tag: {size} bytes of tags, and the member record has room for {max(0, size - excess)}; "
            "give fewer or shorter ones"
        )


def resolve(
    options: Iterable[Option],
    flags: Mapping[str, Any],
    config_dir: Path | None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The value of every option by name: flag, else environment, else file, else its default."""
    environ = os.environ if environ is None else environ
    path = config_dir / CONFIG_FILE if config_dir else None
    written = read_file(path) if path else {}
    values = {}
    for option in options:
        given, variable = flags.get(option.name), environ.get(option.variable, "").strip()
        if given is not None and given != ():
            same = variable and variable == (" ".join(map(str, given)) if option.many else str(given))
            values[option.name] = _read(option, given, option.variable if same else option.switch)
        elif variable:
            values[option.name] = _read(
                option, variable.split() if option.many else variable, option.variable
            )
        elif option.name in written:
            values[option.name] = _read(option, written[option.name], f"{path}: {option.name}")
        else:
            values[option.name] = () if option.many else option.default
    return values


def section(name: str, config_dir: Path | None) -> dict[str, Any]:
    """One program's own table of config.toml, such as `console`: every key, with its default where unset."""
    path = config_dir / CONFIG_FILE if config_dir else None
    written = read_file(path).get(name, {}) if path else {}
    return {
        option.name: _read(option, written[option.name], f"{path}: {name}.{option.name}")
        if option.name in written
        else option.default
        for option in SECTIONS[name]
    }


def read_file(path: Path) -> dict[str, Any]:
    """config.toml as it is written, its keys checked ('-' reads as '_'); an absent file is an empty one."""
    try:
        text = path.read_bytes().decode()
        written = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except OSError as why:
        raise LocalError(f"{path}: {why.strerror}; make it a file that you can read") from why
    except UnicodeDecodeError as why:
        raise LocalError(f"{path}: not UTF-8 at byte {why.start}; save it as UTF-8") from why
    except tomllib.TOMLDecodeError as why:
        raise LocalError(_toml_line(path, text, str(why))) from why
    legal = {option.name: option for option in (*AGENT_OPTIONS, *CLIENT_OPTIONS)}
    known = {}
    for key, value in written.items():
        name = key.replace("-", "_")
        if name in SECTIONS:
            known[name] = _check_section(path, name, value)
        elif name not in legal:
            raise _unknown(path, key, [option for option in legal if legal[option].in_file] + list(SECTIONS))
        elif not legal[name].in_file:
            option = legal[name]
            raise LocalError(f"{path}: {key}: can't be set here; use {option.switch} or {option.variable}")
        else:
            known[name] = value
    return known


def click_options(options: Iterable[Option]) -> Callable[[_F], _F]:
    """A decorator that gives a click command these options. They reach it as text, unset ones as None or (),
    so that `load` alone judges them, with one wording wherever they come from."""
    import click

    declared = list(options)

    def decorate(command: _F) -> _F:
        for option in reversed(declared):
            shape: dict[str, Any] = {"type": str, "metavar": option.metavar, "multiple": option.many}
            if option.flag:
                shape = {"is_flag": True}
            command = click.option(
                option.switch,
                option.name,
                envvar=option.variable,
                default=None,
                hidden=option.hidden,
                help=_help(option),
                **shape,
            )(command)
        return command

    return decorate


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """(variable, nearest legal one) for every QD_ variable that no option reads, for `qd doctor`."""
    environ = os.environ if environ is None else environ
    legal = sorted({option.variable for option in (*AGENT_OPTIONS, *CLIENT_OPTIONS)})
    return [
        (name, _nearest(name, legal))
        for name in sorted(environ)
        if name.startswith("QD_") and name not in legal
    ]


def _help(option: Option) -> str:
    if option.default in (None, False, (), {}):
        return option.help
    default = f"{option.default / 1000:g}s" if option.read is duration_ms else option.default
    return f"{option.help} Default: {default}."


def _read(option: Option, value: Any, where: str) -> Any:
    if not option.many:
        return _read_one(option, value, where)
    if isinstance(value, Mapping) and option is _TAG:
        value = [f"{key}={word}" for key, word in value.items()]
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise LocalError(f'{where}: not a list; write it as ["…", "…"]')
    items = tuple(_read_one(option, item, where) for item in value)
    if len(items) > option.limit:
        raise LocalError(f"{where}: {len(items)} of them; {option.limit} at most")
    return items


def _read_one(option: Option, value: Any, where: str) -> Any:
    try:
        return option.read(value)
    except ValueError as why:
        reason, _, cure = str(why).partition("; ")
        raise LocalError(f"{where} {_shown(value)}: {reason}" + (f"; {cure}" if cure else "")) from why
    except LocalError as why:
        raise LocalError(f"{where}: {why}") from why


_TAG = next(option for option in AGENT_OPTIONS if option.name == "tag")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…" + text[-1]


def _check_section(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LocalError(f"{path}: {name}: not a table; write [{name}] and its keys below")
    legal = [option.name for option in SECTIONS[name]]
    for key in value:
        if key.replace("-", "_") not in legal:
            raise _unknown(path, f"{name}.{key}", [f"{name}.{option}" for option in legal])
    return {key.replace("-", "_"): inner for key, inner in value.items()}


def _unknown(path: Path, key: str, legal: list[str]) -> LocalError:
    return LocalError(f"{path}: unknown key {_shown(key)}; the nearest legal one is {_nearest(key, legal)}")


def _nearest(word: str, legal: list[str]) -> str:
    return difflib.get_close_matches(word, legal, n=1, cutoff=0.0)[0]


def _toml_line(path: Path, text: str, why: str) -> str:
    at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", why)
    line = at.group(1) if at and at.group(1) else len(text.splitlines()) or 1
    return f"{path}: line {line}: {why[: at.start()] if at else why}; correct that line".replace("\n", " ")
