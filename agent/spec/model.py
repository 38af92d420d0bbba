"""What a spec file says, as frozen structs. Durations carry their unit; what is left out has its default here."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.spec.amounts import kept_bytes, kept_ms

Seconds = Annotated[float, Meta(ge=0, le=7 * 24 * 3600)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
Word = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00]+\Z")]
Text = Annotated[str, Meta(max_length=32_768, pattern=r"^[^\x00]*\Z")]
Replicas = Annotated[int, Meta(ge=1, le=64)]


class HealthCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to find out whether a daemon is well: exactly one of `exec` (exit status 0), `tcp` (HOST:PORT that takes a
    connection) and `http` (a URL that answers 2xx or 3xx)."""

    exec: Annotated[list[Word], Meta(min_length=1, max_length=64)] | None = None
    tcp: str | None = None
    http: str | None = None
    interval_s: Annotated[float, Meta(ge=0.1, le=3600)] = 10.0
    timeout_s: Annotated[float, Meta(ge=0.1, le=300)] = 5.0


Hook = str | list[Word]
"""A signal's name (`SIGUSR1`), or a command."""


class ControlHooks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a program that doesn't use the SDK hears of controls. Commands find the grace period or the level in
    QD_GRACE_MS and QD_LEVEL, and the process id in QD_PID."""

    drain_start: Hook | None = None
    drain_finish: Hook | None = None
    backpressure_on: Hook | None = None
    backpressure_off: Hook | None = None


class Resources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a daemon needs of a node: set aside for it where it is placed, and no limit on it. At least one is given."""

    cpu: Annotated[float, Meta(ge=0.001, le=100_000)] | None = None
    """Cores."""
    memory: Annotated[int, Meta(ge=1, le=1 << 60)] | None = None
    """Bytes."""

    @property
    def millicores(self) -> int:
        return round((self.cpu or 0) * 1000)


class DaemonSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[daemon]]`: what runs, and on which nodes. Either `command` or `entry_point` (a class of the entry point
    group `quarterdeck.daemons`, run inside the agent)."""

    name: Name
    command: Annotated[list[Word], Meta(max_length=256)] = []
    entry_point: str | None = None
    on: str = ""
    """Selector: `kind=compute,tag.zone=a`; empty: every node but consoles."""
    count: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    all: bool = False
    """On every node that the selector matches. What neither `count` nor `all` is given for has a count of 1."""
    env: dict[str, Text] = {}
    cwd: str | None = None
    user: str | None = None
    stop_signal: Annotated[str, Meta(pattern=r"^SIG[A-Z0-9]{2,10}\Z")] = "SIGTERM"
    grace_s: Seconds = 30.0
    """From the stop signal to SIGKILL; never longer than the stop's own deadline."""
    start_timeout_s: Seconds = 90.0
    """How long it may take to say READY=1, with `readiness = "sd_notify"`; past it, it is killed: a crash."""
    watchdog_s: Annotated[float, Meta(ge=0.1, le=3600)] | None = None
    """It says WATCHDOG=1 at least this often once it is ready, or it is unhealthy and killed: a crash. None: it
    needn't."""
    after: list[Name] = []
    """Daemons of the same node that have to run and be well before this one is started."""
    health: HealthCheck | None = None
    readiness: Literal["exec", "sd_notify", "none"] = "exec"
    """exec: running once executed (sd_notify messages are heard all the same); sd_notify: running once it said
    READY=1; none: running once executed, and what it says is not listened to."""
    restart_on_update: bool = True
    """False: it lives on while the agent replaces itself."""
    control: ControlHooks = ControlHooks()
    resources: Resources | None = None
    """None: it goes wherever it is meant to, whatever else is there."""


class ChainSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[chain]]`: an append-only log, how many nodes shall hold it, and how much of it each of them keeps."""

    name: Name
    replicas: Replicas = 3
    keep_bytes: int | str = "64M"
    """Of records, at most; the oldest go first."""
    keep_for: str | None = None
    """How old a record gets, `7d`; None: any age."""

    @property
    def keep(self) -> tuple[int, int | None]:
        """Bytes, and milliseconds or None. ValueError for what `read_spec` refuses."""
        return kept_bytes(self.keep_bytes), None if self.keep_for is None else kept_ms(self.keep_for)


class ArtifactSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[artifact]]`: a file put with `qd put`, and how many nodes shall hold it."""

    name: Name
    replicas: Replicas = 3


class FleetSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole spec file of one mesh."""

    daemon: list[DaemonSpec] = []
    chain: list[ChainSpec] = []
    artifact: list[ArtifactSpec] = []
