"""Which addresses a node tells others, and which processes share its host."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from pathlib import Path

import psutil

from discovery.member import MAX_ADDRS, Addr

CONTAINER_BRIDGES = ("docker", "br-", "virbr", "lxcbr", "lxdbr", "cni", "podman", "cbr")


def advertised(bind: str, port: int, advertise: tuple[str, ...] = ()) -> list[Addr]:
    """At most 8 addresses to put into the member record: what was asked for, the bound one, or every usable
    address of this host when bound to all. Loopback only when there is nothing else."""
    if advertise:
        return [split_advertised(text, port) for text in advertise][:MAX_ADDRS]
    if bind not in ("", "0.0.0.0", "::"):
        return [(_numeric(bind), port)]
    found: list[Addr] = []
    for name, entries in sorted(psutil.net_if_addrs().items()):
        if name.startswith(CONTAINER_BRIDGES):
            continue
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if entry.family == socket.AF_INET6 and bind == "0.0.0.0":
                continue
            address = ipaddress.ip_address(entry.address.split("%")[0])
            if not (
                address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
            ):
                found.append((str(address), port))
    return sorted(found, key=lambda a: ":" in a[0])[:MAX_ADDRS] or [("127.0.0.1", port)]


def split_advertised(text: str, port: int) -> Addr:
    """`HOST` or `HOST:PORT` as an address; a host without a port has the node's own."""
    host, sep, tail = text.rpartition(":")
    if sep and tail.isdigit() and (":" not in host or host.startswith("[")):
        return _numeric(host.strip("[]")), int(tail)
    return _numeric(text.strip("[]")), port


def local_address(bind: str, port: int) -> Addr:
    """The address at which a client on this host reaches a node bound to `bind`."""
    if bind in ("", "0.0.0.0"):
        return "127.0.0.1", port
    return ("::1" if bind == "::" else _numeric(bind)), port


def resolve(addr: Addr) -> list[Addr]:
    """The numeric addresses of HOST:PORT; empty when the name can't be looked up now. Blocks: call in a thread."""
    try:
        infos = socket.getaddrinfo(addr[0], addr[1], type=socket.SOCK_DGRAM)
    except socket.gaierror:
        return []
    return list(dict.fromkeys((info[4][0], info[4][1]) for info in infos))  # type: ignore[misc]


def host_mark() -> bytes:
    """8 bytes that are equal on processes which share their loopback: boot id and network namespace, hashed."""
    seed = socket.gethostname()
    try:
        seed = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        seed += str(Path("/proc/self/ns/net").stat().st_ino)
    except OSError:
        pass
    return hashlib.sha256(seed.encode()).digest()[:8]


def _numeric(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        found = resolve((host, 0))
        return found[0][0] if found else host


def is_loopback(addr: Addr) -> bool:
    """Whether an address can only be of its own host."""
    try:
        return ipaddress.ip_address(addr[0]).is_loopback
    except ValueError:
        return False
