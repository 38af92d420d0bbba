"""Real `nats-server` processes with JetStream, on loopback, each with a store of its own; ended by their pid.

with NatsServer(tmp_path) as server:        # server.url, server.kill(), server.start(), server.pause() …
with nats_cluster(tmp_path) as servers:     # three of them, elected and ready
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

STARTED_WITHIN_S = 10.0
ELECTED_WITHIN_S = 30.0
BINARY = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin")

needs_nats_server = pytest.mark.skipif(
    BINARY is None and not os.environ.get("CI"),
    reason="nats-server is not installed: apt install nats-server",
)


PORTS = range(12_000, 19_900)


def free_port() -> int:
    """A port that nobody has, below those that the system gives out by itself: so nobody gets it in between."""
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no free port from {PORTS.start} to {PORTS.stop}")


class NatsServer:
    """One server: started on entering, gone on leaving. `config` is appended to its configuration file.

    `inside`: what its command line begins with, where it is to run in a network namespace; `host`: its address there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "nats",
        jetstream: bool = True,
        config: str = "",
        inside: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.name, self.host = name, host
        self._inside = inside
        self.port, self.monitor = free_port(), free_port()
        self.store = folder / f"{name}-store"
        self.log = folder / f"{name}.log"
        self._file = folder / f"{name}.conf"
        kept = f'jetstream {{ store_dir: "{self.store}" }}\n' if jetstream else ""
        self._file.write_text(
            f'server_name: "{name}"\nlisten: "{host}:{self.port}"\nhttp: "127.0.0.1:{self.monitor}"\n'
            f'{kept}log_file: "{self.log}"\n{config}\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def addr(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"nats://{self.addr}"

    def start(self, *, wait: bool = True) -> None:
        assert BINARY, "nats-server is not installed"
        assert self._process is None, "it runs"
        self.log.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [*self._inside, BINARY, "-c", str(self._file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if wait:
            self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        """Until it greets whoever connects; in a namespace, until its log says that it would."""
        deadline = time.monotonic() + STARTED_WITHIN_S
        while not self._answers():
            assert self._process is not None and self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "nats-server does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        if self._inside:
            return self.log.exists() and "Server is ready" in self.log.read_text()
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1) as sock:
            return sock.recv(4) == b"INFO"
        return False

    def kill(self) -> None:
        """SIGKILL: nothing is handed over."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """SIGSTOP: its sockets stay open and say nothing. Returns when it has stopped."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def empty(self) -> None:
        """Forgets all that it stored; while it doesn't run."""
        assert self._process is None
        shutil.rmtree(self.store, ignore_errors=True)

    def jetstream(self) -> dict[str, Any]:
        """What it says of its JetStream; empty while it says nothing."""
        url = f"http://127.0.0.1:{self.monitor}/jsz?streams=1"
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                return dict(json.load(answer))
        except (OSError, ValueError):
            return {}

    def leader_of(self, bucket: str) -> str | None:
        """The name of the server that leads a bucket, as far as this one knows."""
        for account in self.jetstream().get("account_details", []):
            for stream in account.get("stream_detail", []):
                if stream["name"] == f"KV_{bucket}":
                    return stream.get("cluster", {}).get("leader") or None
        return None

    def __enter__(self) -> NatsServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


@contextlib.contextmanager
def nats_cluster(folder: Path, size: int = 3) -> Iterator[Sequence[NatsServer]]:
    """Servers of one cluster, once they have elected who leads them."""
    ports = [free_port() for _ in range(size)]
    routes = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in ports)
    servers = [
        NatsServer(
            folder,
            name=f"n{index}",
            config=f'cluster {{ name: "qd", listen: "127.0.0.1:{port}", routes: [{routes}] }}',
        )
        for index, port in enumerate(ports)
    ]
    try:
        for server in servers:
            server.start(wait=False)
        for server in servers:
            server.wait_until_it_answers()
        deadline = time.monotonic() + ELECTED_WITHIN_S
        while not all(_whole(server, size) for server in servers):
            assert time.monotonic() < deadline, "the cluster has elected no leader"
            time.sleep(0.05)
        yield servers
    finally:
        for server in servers:
            server.kill()


def _whole(server: NatsServer, size: int) -> bool:
    """Whether a server knows who leads the cluster, and of all the others, up to date."""
    meta = server.jetstream().get("meta_cluster") or {}
    fine = all(replica["current"] and not replica.get("offline") for replica in meta.get("replicas") or ())
    return fine and bool(meta.get("leader")) and meta.get("cluster_size") == size
