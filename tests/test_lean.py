"""What an agent doesn't load, and that it gets TLS when it is asked for."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import agent.cli, agent.node
assert "ssl" not in sys.modules and "importlib.metadata" not in sys.modules, "loaded"
import asyncio
from discovery.lean import tls
async def stranger(reader, writer):
    writer.write(b"no TLS here, go away\\n" * 20)
    writer.close()
async def main():
    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    there = server.sockets[0].getsockname()
    try:
        await asyncio.open_connection(*there, ssl=True)
    except RuntimeError as why:
        print("before:", why)
    tls(); tls()
    import ssl
    try:
        await asyncio.open_connection(*there, ssl=True)
    except ssl.SSLError as why:
        print("after: SSLError")
asyncio.run(main())
"""


def test_agent_has_no_tls_until_somebody_asks_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert "ssl module" in before and after == "after: SSLError"
