"""mDNS on the LAN: tells that this node is there, and tells of others. A hint for joining, never a proof.

What is browsed is as true as any packet on the LAN: it names places to greet, and the greeting is sealed.
Multicast goes out on the interfaces whose addresses this node has, on loopback only when it has no other; a
loopback address is never told to another host. What goes wrong is told by `on_problem` and nothing waits for
it: a mesh works without. zeroconf is imported late, in a thread, since it costs 60 ms and 24 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from discovery.identity import MESH_NAME, id_text
from discovery.member import MAX_ADDRS, Addr

SERVICE = "_quarterdeck._udp.local."
REQUEST_TIMEOUT_MS = 3000
MAX_REQUESTS = 64
"""Services being asked about at once; beyond it new ones are ignored (they announce themselves again)."""
MAX_REMEMBERED = 1024

_ID = re.compile(r"[0-9a-f]{16}")
_CLOSE_TIMEOUT_S = 0.5

OnFound = Callable[[str, int, list[Addr]], None]
"""`(mesh, node id, addresses)`: a node of any mesh, other than this one, was seen or has new addresses."""


class Mdns:
    """Advertises one node and browses for others, on the running loop."""

    def __init__(
        self,
        *,
        mesh: str,
        node: int,
        addrs: Iterable[Addr],
        on_found: OnFound,
        on_problem: Callable[[str], None],
    ) -> None:
        self._mesh = mesh
        self._node = node
        self._addrs = [(host, port) for host, port in addrs]
        self._on_found = on_found
        self._on_problem = on_problem
        self._zeroconf: Any = None
        self._browser: Any = None
        self._info: Any = None
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._told: OrderedDict[int, tuple[str, list[Addr]]] = OrderedDict()

    async def start(self) -> None:
        """Browses and advertises from now on; takes a second or two, raises nothing."""
        loop = asyncio.get_running_loop()
        try:
            library = await loop.run_in_executor(None, importlib.import_module, "zeroconf.asyncio")
            _silence()
            advertised, interfaces = await loop.run_in_executor(None, plan, self._addrs)
            self._zeroconf = library.AsyncZeroconf(interfaces=interfaces, ip_version=_v4_only())
            self._browser = library.AsyncServiceBrowser(
                self._zeroconf.zeroconf, [SERVICE], handlers=[self._seen]
            )
            if advertised:
                self._info = self._describe(advertised)
                # No probing for the name's owner: it is the node's key.
                register = self._zeroconf.async_register_service
                await (await register(self._info, cooperating_responders=True))
        except Exception as why:
            self._problem("mDNS does not work here", why)

    async def update(self, addrs: Iterable[Addr]) -> None:
        """Advertises other addresses from now on, on the interfaces chosen at start."""
        self._addrs = [(host, port) for host, port in addrs]
        try:
            advertised, _ = plan(self._addrs)
            if self._info is not None and advertised:
                self._info = self._describe(advertised)
                await self._zeroconf.async_update_service(self._info)
        except Exception as why:
            self._problem("mDNS could not tell the new addresses", why)

    async def close(self) -> None:
        """Says goodbye once and stops, within half a second."""
        for task in self._asking.values():
            task.cancel()
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is None:
            return
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                if (goodbye := zeroconf.zeroconf.generate_unregister_all_services()) is not None:
                    zeroconf.zeroconf.async_send(goodbye)
                zeroconf.zeroconf.registry.async_remove(zeroconf.zeroconf.registry.async_get_service_infos())
                if self._browser is not None:
                    await self._browser.async_cancel()
                await zeroconf.async_close()

    # --- what the LAN tells

    def _seen(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        """Called on the loop by the browser, for any name that anybody announces."""
        label = name.removesuffix("." + SERVICE)
        if state_change.name == "Removed" or not _ID.fullmatch(label) or label == id_text(self._node):
            return
        if name not in self._asking and len(self._asking) < MAX_REQUESTS:
            task = asyncio.get_running_loop().create_task(self._ask(zeroconf, name, int(label, 16)))
            self._asking[name] = task
            task.add_done_callback(lambda _: self._asking.pop(name, None))

    async def _ask(self, zeroconf: Any, name: str, node: int) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        try:
            info = AsyncServiceInfo(SERVICE, name)
            if not await info.async_request(zeroconf, REQUEST_TIMEOUT_MS):
                return
            mesh = (info.properties.get(b"mesh") or b"").decode("ascii", "replace")
            addrs = usable(info.parsed_addresses(), info.port or 0)
        except Exception as why:
            self._problem("mDNS could not read an announcement", why)
            return
        if not addrs or not MESH_NAME.fullmatch(mesh) or self._told.get(node) == (mesh, addrs):
            return
        self._told[node] = (mesh, addrs)
        if len(self._told) > MAX_REMEMBERED:
            self._told.popitem(last=False)
        self._on_found(mesh, node, addrs)

    def _describe(self, addrs: Sequence[Addr]) -> Any:
        from zeroconf.asyncio import AsyncServiceInfo

        node = id_text(self._node)
        return AsyncServiceInfo(
            SERVICE,
            f"{node}.{SERVICE}",
            parsed_addresses=[host for host, _ in addrs],
            port=addrs[0][1],
            properties={"mesh": self._mesh, "id": node},
            server=f"qd-{node}.local.",
        )

    def _problem(self, what: str, why: Exception) -> None:
        text = str(why).partition("\n")[0]
        self._on_problem(f"{what}: {text or type(why).__name__}")


def plan(addrs: Sequence[Addr]) -> tuple[list[Addr], list[str]]:
    """What to advertise, and the IPv4 addresses whose interfaces to use for it.

    Loopback is advertised only when there is nothing else, and then on loopback alone. Without any address
    there is nothing to advertise, and browsing goes out wherever it can. All addresses share the port of the
    first, which is what one service can say.
    """
    import ifaddr

    ours = {str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4}
    outside = [addr for addr in addrs if not ipaddress.ip_address(addr[0]).is_loopback]
    told = outside or list(addrs)
    told = [addr for addr in told if addr[1] == told[0][1]][:MAX_ADDRS]
    here = [host for host, _ in told if host in ours]
    if not here and (outside or not addrs):
        here = sorted(host for host in ours if not ipaddress.ip_address(host).is_loopback)
    return told, here or ["127.0.0.1"]


def usable(hosts: Iterable[str], port: int) -> list[Addr]:
    """The addresses that a packet can be sent to; nothing without a port."""
    found = []
    for host in hosts:
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_address(host)
            if not (ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip.is_reserved):
                found.append((str(ip), port))
    return sorted(found)[:MAX_ADDRS] if port else []


def _v4_only() -> Any:
    from zeroconf import IPVersion

    return IPVersion.V4Only


def _silence() -> None:
    """zeroconf logs what strangers send and what the network refuses; we tell of problems ourselves."""
    logger = logging.getLogger("zeroconf")
    logger.setLevel(logging.CRITICAL)
    logger.propagate = False
