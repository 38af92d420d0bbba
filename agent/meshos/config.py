"""Every number of the engine, with its unit in its name and the default of this fleet."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from agent.meshos.events import Id
from discovery.errors import LocalError

Count: TypeAlias = Annotated[int, Meta(ge=0)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]


class MeshOsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine measures with. A recorded run carries the fields that differ from the defaults."""

    # the loop
    tick_interval_ms: Positive = 500
    event_queue_capacity: Positive = 1024
    events_per_tick: Positive = 32
    """Queued events folded within a tick; the rest are folded after it."""
    action_queue_capacity: Positive = 1024
    full_pass_interval_ms: Count = 30_000
    """Reconcile looks at everything this often, and between at what changed."""
    sample_ttl_ms: Count = 30_000
    """RTT and health samples older than this are forgotten."""
    probe_refresh_ms: Count = 5_000
    """A probe's sample that says what the last one said is folded again only after this long."""
    scored_chains_per_tick: Count = 32
    """How many chains the scorer is asked about in a tick; it gets around to all of them."""
    score_refresh_ms: Count = 30_000
    """Scores of a chain are asked for again after this long."""
    recent_failures_capacity: Positive = 256

    # locality and peers
    degraded_rtt_ms: float = 250.0
    """An RTT strictly above it puts the peer on the avoid list."""
    avoid_ttl_ms: Count = 300_000
    link_degraded_ms: Count = 1_500
    link_unreachable_ms: Count = 5_000
    """A link nothing was heard on for longer than these shows its peer as degraded, as unreachable."""
    dead_after_ms: Count = 60_000
    """A holder unreachable for this long no longer counts as one."""

    # actions
    in_flight_ms: Count = 60_000
    """An action whose end nobody reported is believed lost after this long."""
    start_in_flight_ms: Count = 30_000
    stop_grace_ms: Count = 30_000
    """From StopDaemon to its deadline."""

    # backoff of daemons
    backoff_initial_ms: Count = 500
    backoff_max_ms: Count = 60_000
    crash_window_ms: Count = 60_000
    crash_loop_crashes: Positive = 5
    crash_loop_ms: Count = 300_000
    stable_run_ms: Count = 60_000
    """A run at least this long forgets the crashes before it, at its end."""
    short_run_ms: Count = 1_000
    """A clean exit after less than this counts as a crash."""

    # drain and maintenance
    drain_deadline_ms: Count = 300_000
    maintenance_deadline_ms: Count = 600_000
    recovery_ramp_ms: Count = 300_000
    exempt_chains: tuple[Id, ...] = ("admin",)
    """Chains that a node in maintenance may hold: the admin chain and its own action chain."""

    # scheduler
    score_floor: float = 0.5
    """A holder scored strictly below it is moved, if there is a place that is better by more than the gap."""
    score_gap: float = 0.2
    rebalance_cooldown_ms: Count = 300_000

    # admit
    pull_cooldown_ms: Count = 250
    stabilise_ms: Count = 60_000
    """After a pull or drop of a chain, the next one of that chain waits this long."""
    migrations_per_window: Positive = 10
    migration_window_ms: Count = 1_000
    """At most so many MigrateBlob a zone in such a window."""
    backpressure_high: Positive = 1000
    backpressure_low: Count = 200
    backpressure_retry_ms: Positive = 5_000
    """What backpressure holds back is asked about again after this long."""

    # executor
    strikes_max: Count = 16
    """Retries and deferrals of an action, those for a slot apart, before it is dropped."""
    dispatches_at_once: Positive = 8
    dispatch_timeout_ms: Positive = 60_000

    # this node's own health
    cpu_budget_permille: int = 950
    mem_budget_permille: int = 950
    """Of the host. 1000 = never degraded by it."""
    budget_margin_permille: int = 50
    """How far under its budget a load has to fall before it counts as recovered."""
    health_samples: Positive = 3
    """Samples running that it takes to become degraded, and to recover."""
    health_sample_interval_ms: Count = 5_000
    late_tick_ms: Count = 500

    def overrides(self) -> dict[str, Any]:
        """The fields that differ from the defaults, by name."""
        fields = msgspec.structs.asdict(self)
        return {name: value for name, value in fields.items() if value != getattr(_DEFAULTS, name)}


_DEFAULTS = MeshOsConfig()


def with_overrides(overrides: dict[str, Any]) -> MeshOsConfig:
    """A config of these fields and the defaults; LocalError names what is unknown or can't be used."""
    for name in overrides:
        if name not in MeshOsConfig.__struct_fields__:
            nearest = difflib.get_close_matches(name, MeshOsConfig.__struct_fields__, 1, 0.0)
            raise LocalError(f"config has no field `{name}`; did you mean `{nearest[0]}`?")
    try:
        return msgspec.convert(overrides, MeshOsConfig)
    except msgspec.ValidationError as why:
        raise LocalError(f"config: {why}") from why
