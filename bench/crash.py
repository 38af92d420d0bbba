"""How long after SIGKILL a node is Dead, with evidence `exited`, in the views of all 24 others."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

from bench.figures import Figure
from bench.fleet import Hangar
from bench.goodbye import bring_back

NODES = 25
BAR_MS = 500.0


def measure(hangar: Hangar) -> Iterator[Figure]:
    nodes = NODES if not hangar.quick else 8
    fleet = hangar.fleet(nodes)
    runs = hangar.runs(11, 3)
    rng = random.Random(11)
    first, last, each, wrong = [], [], [], 0
    for _ in range(runs):
        victim = rng.choice(fleet.running())
        began = time.monotonic()
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait(5)
        seen = fleet.seen_by_all(victim.name, "dead", began, 60)
        times = [1000 * (s.at - began) for s in seen]
        first.append(min(times))
        last.append(max(times))
        each += times
        wrong += sum(s.source != "exited" for s in seen)
        bring_back(fleet, victim)
    note = "evidence `exited` everywhere" if not wrong else f"{wrong} views with other evidence than `exited`"
    yield Figure(
        f"SIGKILL → Dead(exited) in every view, n = {nodes} (last view)", "ms", last, BAR_MS, note=note
    )
    yield Figure(f"SIGKILL → Dead(exited), n = {nodes} (first view)", "ms", first)
    yield Figure(f"SIGKILL → Dead(exited), n = {nodes} (each view)", "ms", each, runs=runs)
