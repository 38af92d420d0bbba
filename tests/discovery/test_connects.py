"""A fresh TCP connect as evidence: only a port that is closed for good counts as refused."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time

import pytest

from discovery import pool
from discovery.pool import connect_outcome


def listening() -> tuple[socket.socket, tuple[str, int]]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(8)
    return sock, sock.getsockname()


def test_connect_to_closed_port_is_refused() -> None:
    sock, addr = listening()
    sock.close()
    assert asyncio.run(connect_outcome(addr)) == "refused"


def test_connect_to_listener_that_says_nothing_is_open() -> None:
    sock, addr = listening()
    with sock:
        assert asyncio.run(connect_outcome(addr)) == "open"


def test_connect_accepted_by_a_process_that_is_ending_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_BYTE_TIMEOUT_S", 5.0)
    sock, addr = listening()
    ending = threading.Thread(target=lambda: (time.sleep(0.05), sock.close()))
    ending.start()
    assert asyncio.run(connect_outcome(addr)) == "refused"
    ending.join()


def test_connect_that_a_live_listener_drops_is_not_refused() -> None:
    """A full listener closes what it can't serve; it lives all the same."""
    sock, addr = listening()
    dropped = []

    def drop() -> None:
        for _ in range(2):
            with sock.accept()[0] as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                dropped.append(one)

    with sock:
        dropping = threading.Thread(target=drop)
        dropping.start()
        assert asyncio.run(connect_outcome(addr)) != "refused"
        dropping.join(5)
    assert len(dropped) == 2
