"""Carries frames between two interfaces of a network namespace, each MS milliseconds late: `slow_wire.py ONE OTHER MS`.

For kernels without netem. Frames come and go with the kernel's own note on checksums and segments, so nothing has to be
worked out anew.
"""

from __future__ import annotations

import heapq
import select
import socket
import sys
import time

ALL_FRAMES = 0x0003
SOL_PACKET, PACKET_VNET_HDR = 263, 15
OUTGOING = 4
FRAME_MAX = 70_000


def wire(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_FRAMES))
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.bind((name, ALL_FRAMES))
    sock.setblocking(False)
    return sock


def carry(one: socket.socket, other: socket.socket, late_s: float) -> None:
    """For ever."""
    beyond = {one: other, other: one}
    waiting: list[tuple[float, int, bytes, socket.socket]] = []
    number = 0
    while True:
        rest_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for sock in select.select([one, other], [], [], rest_s)[0]:
            frame, about = sock.recvfrom(FRAME_MAX)
            if about[2] != OUTGOING:
                number += 1
                heapq.heappush(waiting, (time.monotonic() + late_s, number, frame, beyond[sock]))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, frame, sock = heapq.heappop(waiting)
            try:
                sock.send(frame)
            except OSError:
                pass  # lost, as on any wire


if __name__ == "__main__":
    carry(wire(sys.argv[1]), wire(sys.argv[2]), int(sys.argv[3]) / 1000)
