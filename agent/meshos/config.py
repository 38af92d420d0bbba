"""Every number of the engine, with its unit in its name and the default of this fleet."""

from __future__ import annotations

import msgspec


class MeshOsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine measures with. A recorded run carries the fields that differ from the defaults."""

    tick_interval_ms: int = 500
    event_queue_capacity: int = 1024
    events_per_tick: int = 32
    """Queued events folded within a tick; the rest are folded after it."""
    action_queue_capacity: int = 1024
    sample_ttl_ms: int = 30_000
    """RTT and health samples older than this are forgotten."""
    probe_refresh_ms: int = 5_000
    """A probe's sample that says what the last one said is folded again only after this long."""
    degraded_rtt_ms: float = 250.0
    """An RTT strictly above it puts the peer on the avoid list."""
    avoid_ttl_ms: int = 300_000
    in_flight_ms: int = 60_000
    """An action whose end nobody reported is believed lost after this long."""
    recent_failures_capacity: int = 256
    cpu_budget_permille: int = 950
    mem_budget_permille: int = 950
    """Of the host. 1000 = never degraded by it."""
    budget_margin_permille: int = 50
    """How far under its budget a load has to fall before it counts as recovered."""
    health_samples: int = 3
    """Samples running that it takes to become degraded, and to recover."""
    health_sample_interval_ms: int = 5_000
    late_tick_ms: int = 500
    drain_deadline_ms: int = 300_000

    def overrides(self) -> dict[str, int | float]:
        """The fields that differ from the defaults, by name."""
        fields = msgspec.structs.asdict(self)
        return {name: value for name, value in fields.items() if value != getattr(_DEFAULTS, name)}


_DEFAULTS = MeshOsConfig()
