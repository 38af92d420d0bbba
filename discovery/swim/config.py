"""The constants of a gossip pool, and the formulas on them as free functions."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log, log10
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SwimConfig:
    """Defaults are those of a LAN; the other presets show only what differs."""

    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.4
    """How long a direct probe may take before others are asked to probe as well."""
    indirect_probes: int = 3
    suspicion_mult: float = 4.0
    suspicion_max_mult: float = 6.0
    suspicion_fixed_s: float | None = None
    """A suspicion timeout whatever the size of the pool and the confirmations; for tests and cautious
    operators."""
    confirmations: int = 2
    gossip_interval_s: float = 0.1
    gossip_fanout: int = 3
    gossip_spacing_s: float = 0.01
    """Something new is sent at once, but bursts of news are gathered for this long."""
    load_gossip_interval_s: float = 0.5
    """Vitals, which are for display only, wait this long for each other and for datagrams that go out anyway."""
    retransmit_mult: int = 4
    push_pull_interval_s: float = 15.0
    redial_interval_s: float = 30.0
    join_retry_min_s: float = 1.0
    join_retry_max_s: float = 30.0
    awareness_max: int = 8
    sentinels: int = 3
    dead_shown_s: float = 60.0
    tombstone_s: float = 86_400.0
    leave_wait_s: float = 0.3
    leave_resend_s: float = 0.08
    leave_acks: int = 3
    refute_spacing_s: float = 0.2
    """Accusers can't make a node write its incarnation to disk more often than this."""
    update_deadline_max_s: float = 3_600.0
    vitals_step_permille: int = 50
    vitals_interval_min_s: float = 2.0
    max_body_bytes: int = 1_140
    max_members: int = 10_000
    max_tombstones: int = 10_000

    @classmethod
    def lan(cls, **changes: Any) -> SwimConfig:
        """One site: the defaults."""
        return cls(**changes)

    @classmethod
    def wan(cls, **changes: Any) -> SwimConfig:
        """Between sites: the backbone."""
        return cls(
            **{
                "probe_interval_s": 3.0,
                "probe_timeout_s": 1.5,
                "gossip_interval_s": 0.5,
                "gossip_fanout": 4,
                "push_pull_interval_s": 30.0,
                **changes,
            }
        )

    @classmethod
    def local(cls, **changes: Any) -> SwimConfig:
        """Everything on one host: answers come at once or not at all."""
        return cls(**{"probe_interval_s": 0.5, "probe_timeout_s": 0.2, "gossip_interval_s": 0.05, **changes})


def suspicion_min_s(n: int, config: SwimConfig) -> float:
    """`4·log10(max(10, n))·interval`: the timeout once enough others confirm. `n` counts this node too."""
    return config.suspicion_mult * log10(max(10, n)) * config.probe_interval_s


def suspicion_timeout_s(n: int, confirmed: int, config: SwimConfig) -> float:
    """`max(min, max − (max − min)·ln(c+1)/ln(k+1))` with `k = min(2, n − 2)`; `min` when k < 1.

    `confirmed` (c) is the number of distinct members that accuse beyond the first. Source: Lifeguard (Dadgar
    et al., 2017).
    """
    if config.suspicion_fixed_s is not None:
        return config.suspicion_fixed_s
    least = suspicion_min_s(n, config)
    k = min(config.confirmations, n - 2)
    if k < 1:
        return least
    most = config.suspicion_max_mult * least
    return max(least, most - (most - least) * log(confirmed + 1) / log(k + 1))


def retransmit_limit(n: int, config: SwimConfig) -> int:
    """`4·ceil(log10(n+1))`: how often one broadcast is passed on by one node."""
    return config.retransmit_mult * ceil(log10(n + 1))


def vitals_spacing_s(n: int, config: SwimConfig) -> float:
    """`max(2 s, n/50 s)`: vitals of the whole pool never cost more than 50 broadcasts a second."""
    return max(config.vitals_interval_min_s, n / 50)


def refusals_needed(others: int) -> int:
    """How many distinct members must have been refused before a process counts as exited: two, or one where
    `others` (members besides the accused, oneself included) is only one."""
    return 1 if others <= 1 else 2
