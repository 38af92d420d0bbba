"""How long after SIGSTOP a node is Dead, as `silent` and never as `exited`, beside the formula's answer."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from bench.figures import Figure
from bench.fleet import Hangar
from discovery.swim.config import SwimConfig, suspicion_timeout_s

NODES = 5


def measure(hangar: Hangar) -> Iterator[Figure]:
    config = SwimConfig.lan()
    least, most = (suspicion_timeout_s(NODES, c, config) for c in (config.confirmations, 0))
    fleet = hangar.fleet(NODES)
    last, back, wrong = [], [], 0
    for run in range(hangar.runs(5, 1)):
        victim = fleet.running()[run % NODES]
        began = time.monotonic()
        victim.process.send_signal(signal.SIGSTOP)
        try:
            seen = fleet.seen_by_all(victim.name, "dead", began, most + 30)
        finally:
            again = time.monotonic()
            victim.process.send_signal(signal.SIGCONT)
        last.append(max(s.at for s in seen) - began)
        wrong += sum(s.source != "silent" for s in seen)
        returned = fleet.seen_by_all(victim.name, "alive", again, 30)
        back.append(max(s.at for s in returned) - again)
        fleet.settled()
        time.sleep(3)
    accused = [(a.name, who) for a in fleet.running() for who, s in a.verdicts if s.source != "silent"]
    note = (
        f"formula: {least:.0f} s with two confirmations, {most:.0f} s without; the bar adds a probe interval "
        "each for being probed, for missing it, and for the others' own looks"
    )
    if wrong or accused:
        note = f"WRONG evidence {wrong}, {accused}; {note}"
    expected = least + 3 * config.probe_interval_s
    yield Figure(
        f"SIGSTOP → Dead(silent) in every view, n = {NODES} (last view)",
        "s",
        last,
        expected,
        note=note,
    )
    yield Figure(f"SIGCONT → Alive in every view, n = {NODES} (last view)", "s", back)
