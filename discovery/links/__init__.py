"""Links: SSH connections between our processes, keys proved both ways; calls, streams and tunnels both ways."""

import discovery.links.lean  # noqa: F401  (before anything that imports asyncssh)
from discovery.links.dialling import dial
from discovery.links.limits import Limits, Login
from discovery.links.link import Handler, Link
from discovery.links.listener import Authorise, Listener, OnRefused
from discovery.links.ssh import agent_keys, key_line, sign_with
from discovery.links.tunnel import Idle, SocketStream, Tunnel, TunnelMethod, splice

__all__ = [
    "Authorise",
    "Handler",
    "Idle",
    "Limits",
    "Link",
    "Listener",
    "Login",
    "OnRefused",
    "SocketStream",
    "Tunnel",
    "TunnelMethod",
    "agent_keys",
    "dial",
    "key_line",
    "sign_with",
    "splice",
]
