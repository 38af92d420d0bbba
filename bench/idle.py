"""What an agent costs while nothing happens, in a fleet of 25: processor time, memory, bytes on the wire."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure
from bench.fleet import Hangar

NODES = 25
BAR_CPU = 0.7
BAR_RSS = 55.0
WINDOW_S = 30.0
REST_S = 20.0
"""After the boot, until the broadcasts of the joins have died down and the links stand."""


def measure(hangar: Hangar) -> Iterator[Figure]:
    nodes = NODES if not hangar.quick else 8
    fleet = hangar.fleet(nodes)
    time.sleep(hangar.runs(int(REST_S), 3))
    agents = fleet.running()
    ports = {int(fleet.entry(agent)["addr"].rpartition(":")[2]) for agent in agents}
    before = {a.pid: run_time_s(a.pid) for a in agents}
    verdicts = sum(len(a.verdicts) for a in agents)
    window = WINDOW_S if not hangar.quick else 5.0
    began = time.monotonic()
    with Sniffer(ports) as sniffer:
        time.sleep(window)
    took = time.monotonic() - began
    cpu = [100 * (run_time_s(a.pid) - before[a.pid]) / took for a in agents]
    false = sum(len(a.verdicts) for a in agents) - verdicts
    yield Figure(
        f"idle agent, n = {nodes}: processor time",
        "% of a core",
        cpu,
        BAR_CPU,
        note=f"over {took:.0f} s, all threads" + (f"; {false} FALSE verdicts of Dead" if false else ""),
    )
    sizes = [memory_mb(a.pid) for a in agents]
    yield Figure(f"idle agent, n = {nodes}: RSS", "MB", [s["Rss"] for s in sizes], BAR_RSS)
    yield Figure(f"idle agent, n = {nodes}: PSS (shared pages divided)", "MB", [s["Pss"] for s in sizes])
    yield Figure(f"idle agent, n = {nodes}: private memory", "MB", [s["Private"] for s in sizes])
    threads = [float(len(list(Path(f"/proc/{a.pid}/task").iterdir()))) for a in agents]
    yield Figure(f"idle agent, n = {nodes}: threads", "", threads)
    if sniffer.ok:
        for kind in ("udp", "tcp"):
            sent = sniffer.bytes[kind] / took / nodes
            packets = sniffer.packets[kind] / took / nodes
            yield Figure(
                f"idle agent, n = {nodes}: {kind.upper()} sent, IP bytes",
                "B/s",
                [sent],
                note=f"{packets:.1f} packets/s",
            )


def run_time_s(pid: int) -> float:
    """Seconds that all threads of a process have run, exact to the nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_mb(pid: int) -> dict[str, float]:
    """Rss, Pss and Private (what would be free if this process ended), in MB of 2^20 bytes."""
    found: dict[str, float] = {"Private": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        key = key.rstrip(":")
        if key.startswith("Private"):
            found["Private"] += int(value) / 1024
        found[key] = int(value) / 1024
    return found


class Sniffer:
    """Counts packets that leave these ports over loopback; `ok` says whether it may sniff."""

    def __init__(self, ports: set[int]) -> None:
        self.packets = {"udp": 0, "tcp": 0}
        self.bytes = {"udp": 0, "tcp": 0}
        self._ports = ports
        self._ended = False
        try:
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            self._sock.bind(("lo", 0))
            self._sock.settimeout(0.2)
            self.ok = True
        except OSError:
            self.ok = False

    def __enter__(self) -> Sniffer:
        if self.ok:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self.ok:
            self._thread.join(2)
            self._sock.close()

    def _run(self) -> None:
        while not self._ended:
            try:
                packet, source = self._sock.recvfrom(128)
            except TimeoutError:
                continue
            if source[2] != socket.PACKET_OUTGOING or len(packet) < 38 or packet[12:14] != b"\x08\x00":  # type: ignore[attr-defined]
                continue
            header = (packet[14] & 15) * 4
            kind = {17: "udp", 6: "tcp"}.get(packet[23])
            ports = struct.unpack_from(">HH", packet, 14 + header)
            if kind and not self._ports.isdisjoint(ports):
                self.packets[kind] += 1
                self.bytes[kind] += struct.unpack_from(">H", packet, 16)[0]
