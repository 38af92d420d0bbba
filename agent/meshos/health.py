"""When is a node Degraded by itself? CPU, memory and its own loop, each with hysteresis.

Over budget for 3 samples running turns a cause on; 3 samples running under the budget less a margin turn it
off. In between nothing changes, so a load that hovers at its budget makes no noise. A sample that could not
be measured interrupts either run. A pause of the process is one late tick, however long, and so one late
sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.meshos.config import MeshOsConfig


@dataclass(slots=True)
class Hysteresis:
    """A cause that is on or off. `run` counts the samples running that speak for the other."""

    on: bool = False
    run: int = 0

    def step(self, over: bool, under: bool, needed: int) -> bool:
        """Takes one sample (`over` its limit, `under` its margin, or neither); True when the cause turned."""
        speaks = under if self.on else over
        self.run = self.run + 1 if speaks else 0
        if self.run < needed:
            return False
        self.on, self.run = not self.on, 0
        return True


@dataclass(slots=True)
class OwnHealth:
    """The causes of this node's Degraded."""

    cpu: Hysteresis = field(default_factory=Hysteresis)
    mem: Hysteresis = field(default_factory=Hysteresis)
    loop: Hysteresis = field(default_factory=Hysteresis)
    late: bool = False
    """A tick was late since the last sample."""

    def tick(self, late_ms: int, config: MeshOsConfig) -> None:
        """Notes a tick that came `late_ms` late."""
        if late_ms >= config.late_tick_ms:
            self.late = True

    def sample(self, cpu: int | None, mem: int | None, config: MeshOsConfig) -> list[str]:
        """Takes a sample in permille, which closes the window of late ticks; what recovered, in words."""
        seconds = _seconds(config)
        recovered = []
        for name, cause, load, budget in (
            ("cpu", self.cpu, cpu, config.cpu_budget_permille),
            ("memory", self.mem, mem, config.mem_budget_permille),
        ):
            low = budget - config.budget_margin_permille
            over, under = load is not None and load > budget, load is not None and load < low
            if cause.step(over, under, config.health_samples) and not cause.on:
                recovered.append(f"{name} back under {_percent(low)} % for {seconds}")
        if self.loop.step(self.late, not self.late, config.health_samples) and not self.loop.on:
            recovered.append(f"loop on time for {seconds}")
        self.late = False
        return recovered

    def causes(self, config: MeshOsConfig) -> list[str]:
        """Why the node is Degraded by itself, in words; empty when it isn't."""
        seconds = _seconds(config)
        causes = []
        if self.cpu.on:
            causes.append(f"cpu over {_percent(config.cpu_budget_permille)} % for {seconds}")
        if self.mem.on:
            causes.append(f"memory over {_percent(config.mem_budget_permille)} % for {seconds}")
        if self.loop.on:
            causes.append(f"loop late by {config.late_tick_ms} ms or more for {seconds}")
        return causes


def _seconds(config: MeshOsConfig) -> str:
    return f"{config.health_samples * config.health_sample_interval_ms / 1000:g} s"


def _percent(permille: int) -> str:
    return f"{permille / 10:g}"
