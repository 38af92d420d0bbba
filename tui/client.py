"""A client's attachment to one agent: which agent it is, how it is reached, and the calls it answers.

A client sees what one agent sees and nothing else; `Client.hello` says whose view that is. Agents of this home
are found in `run/` without asking anybody; agents elsewhere are addressed as HOST:PORT, and their host key is
pinned at first sight in `config/known_agents`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from agent.config import host_port
from agent.home import Home, RunEntry, read_identity, write_private
from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.identity import id_text, node_id, openssh_line
from discovery.links import Link, dial
from discovery.member import Addr, addr_text
from discovery.sshkey import pub_fingerprint

Row = dict[str, Any]
Tell = Callable[[str], None]
"""Says one line to the person, who may be nobody."""

LOCAL_LIMIT_S = 1.0
"""An agent of this home that doesn't answer within this is passed over."""
REMOTE_LIMIT_S = 10.0
CALL_LIMIT_S = 10.0
OP_LIMIT_S = 65.0
AUDIT_ROWS_MAX = 1_000_000
HEX_ID = re.compile(r"[0-9a-f]{1,16}")


class Client:
    """One open attachment. Calls raise Refused, RemoteError or Unreachable, each with a sentence."""

    def __init__(self, link: Link, hello: dict[str, Any], entry: RunEntry | None = None) -> None:
        self.link = link
        self.hello = hello
        self.entry = entry
        """The run entry of an agent of this home; None for one elsewhere."""

    @property
    def name(self) -> str:
        return str(self.hello.get("name", ""))

    @property
    def id(self) -> str:
        return str(self.hello.get("id", ""))

    @property
    def mesh(self) -> str:
        return str(self.hello.get("mesh", ""))

    @property
    def closed(self) -> bool:
        return self.link.closed

    async def call(
        self, method: str, params: dict[str, Any] | None = None, timeout_s: float = CALL_LIMIT_S
    ) -> Any:
        """One method's answer, as the agent gave it."""
        return await self.link.call(method, params or {}, timeout_s)

    async def ask(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """One method's answer where that must be a map."""
        return _dict(await self.call(method, params))

    async def nodes_answer(self, mesh: str | None = None) -> dict[str, Any]:
        """`{"rows", "answered_by", "meshes"}`; Refused `unknown_mesh` when this agent doesn't know `mesh`."""
        parts = await self._parts("nodes", {"mesh": mesh})
        return {**parts[-1], "rows": [row for part in parts for row in _rows(part.get("rows"))]}

    async def nodes(self, mesh: str | None = None) -> list[Row]:
        return _rows((await self.nodes_answer(mesh)).get("rows"))

    async def node(self, node: str) -> dict[str, Any]:
        """Everything this agent knows about the node with that id."""
        return await self.ask("node", {"id": node})

    async def last(self, name: str) -> dict[str, Any]:
        """As `node`, of one that died and is out of view: what its replicas tell. Refused `gone` or `unknown`."""
        return await self.ask("last", {"name": name})

    async def events(self, limit: int, node: str | None = None) -> list[Row]:
        """The last `limit` events that the agent keeps, or that the node with that id keeps, oldest first."""
        parts = await self._parts("events", {"limit": limit, "node": node})
        return [event for part in parts for event in _rows(part.get("events"))]

    async def daemons(self, mesh: str | None = None) -> dict[str, Any]:
        """`{"rows","silent","answered_by"}`: every daemon of the live nodes of `mesh` (None: of all) as they tell it
        themselves within a second; `silent` names those that didn't."""
        return await self._gathered("daemons", mesh)

    async def failures(self, mesh: str | None = None) -> dict[str, Any]:
        """`{"rows","silent","answered_by"}`: the failure rings of all live nodes, and of dead ones by their replicas."""
        return await self._gathered("failures", mesh)

    async def past(self, from_ms: int, to_ms: int, now_ms: int, mesh: str | None = None) -> dict[str, Any]:
        """`{"rows","silent","answered_by"}`: the loads that the nodes recorded between two times of this agent's clock, now
        `now_ms`; of nodes that are gone by who holds a copy of their chain."""
        span = {"from_ms": from_ms, "to_ms": to_ms, "now_ms": now_ms}
        try:
            parts = await self._parts("past", {**span, "mesh": mesh})
        except Refused as why:
            raise self._unknown("past", why) from why
        return _joined(parts)

    async def chains(self, mesh: str | None = None) -> dict[str, Any]:
        """`{"rows","silent","answered_by"}`: what the mesh of this agent keeps, chains and artifacts, and who holds it.
        Refused `unknown_mesh` for another mesh."""
        answer = await self._known("chains", mesh, {})
        silent = [str(name) for name in answer.get("silent") or []]
        return {"rows": _rows(answer.get("rows")), "silent": silent, "answered_by": self.name}

    async def audit(self, mesh: str | None = None, offset: int = 0) -> dict[str, Any]:
        """`{"rows","silent","answered_by"}`: every op and refusal on record in this agent's mesh, oldest first, from the
        place `offset` on. Refused `unknown_mesh` for another mesh."""
        rows: list[Row] = []
        at: int | None = offset
        while at is not None and len(rows) < AUDIT_ROWS_MAX:
            answer = await self._known("audit", mesh, {"offset": at, "bytes": False})
            rows += _rows(answer.get("rows"))
            following = answer.get("next")
            if following is not None and not (isinstance(following, int) and following > at):
                raise RemoteError(f"audit: {self.name} answers with pages that make no sense")
            at = following
        return {"rows": rows, "silent": [], "answered_by": self.name}

    async def daemon_log(
        self, node: str, daemon: str, limit: int, follow: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The last `limit` lines of a daemon's log, oldest first, as `{"at_ms","line"}`; with `follow` each new one
        too, ending with Unreachable when who tells them goes."""
        params = {"node": node, "daemon": daemon, "limit": limit, "follow": follow}
        async for item in self._stream("daemon_log", params):
            yield item

    async def tail(
        self, chain: str, limit: int, follow: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The newest `limit` records of a user's chain, oldest first; with `follow` each new one too, ending with
        Unreachable when who tells them goes. Refused `not_held` where nobody holds it."""
        async for item in self._stream("tail", {"chain": chain, "limit": limit, "follow": follow}):
            yield item

    async def meshes(self) -> list[Row]:
        return _rows((await self.ask("meshes")).get("meshes"))

    async def resolve(self, text: str) -> dict[str, Any]:
        """`{"id","name","mesh","state"}`; Refused `unknown`, `ambiguous` or `gone`."""
        return await self.ask("resolve", {"name": text})

    async def checks(self) -> list[Row]:
        return _rows((await self.ask("doctor")).get("checks"))

    async def challenge(self, target: str) -> dict[str, Any]:
        """`{"nonce","wall_ms","mesh","name","route"}` of the target, fetched through this agent."""
        return await self.ask("challenge", {"target": target})

    async def op(
        self, target: str, message: bytes, signature: str, timeout_s: float = OP_LIMIT_S
    ) -> dict[str, Any]:
        """Hands a signed op over and gives the target's answer."""
        params = {"target": target, "message": message, "signature": signature}
        return _dict(await self.call("op", params, timeout_s))

    async def follow(self, limit: int = 0, node: str | None = None) -> AsyncIterator[Row]:
        """The last `limit` events, of the agent or of the node with that id, then each new one; ends with Unreachable
        when who tells them goes."""
        async for item in self._stream("follow", {"limit": limit, "node": node}):
            yield item

    async def watch(self, mesh: str | None = None, events: int = 200) -> AsyncIterator[dict[str, Any]]:
        """Frames: the first with `full`, then changes, at least one a second."""
        async for item in self._stream("watch", {"mesh": mesh, "events": events}):
            yield item

    async def _known(self, method: str, mesh: str | None, params: dict[str, Any]) -> dict[str, Any]:
        """A question about this agent's own mesh; Refused for another one, and told whose build doesn't know it."""
        if mesh not in (None, self.mesh):
            said = (
                f"{self.name} is of mesh {self.mesh} and can't answer for {mesh}; attach to a node of {mesh}"
            )
            raise Refused("unknown_mesh", said)
        try:
            return await self.ask(method, params)
        except Refused as why:
            raise self._unknown(method, why) from why

    def _unknown(self, method: str, why: Refused) -> Refused:
        if why.code != "unknown_method":
            return why
        said = f"{self.name}: its build does not know {method}; `qd update {self.name}` takes the code on its disk"
        return Refused(why.code, said)

    async def _gathered(self, method: str, mesh: str | None) -> dict[str, Any]:
        """What an agent gathered from many nodes: one answer, or parts of one where it is longer than a frame."""
        try:
            parts = [await self.ask(method, {"mesh": mesh})]
        except Refused as why:
            if why.code != "wrong_kind":
                raise self._unknown(method, why) from why
            parts = await self._parts(method, {"mesh": mesh})
        return _joined(parts)

    async def _parts(self, method: str, params: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer that comes in parts, at least one; Unreachable when it is not whole in CALL_LIMIT_S."""
        parts: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(CALL_LIMIT_S):
                async for part in self._stream(method, params):
                    parts.append(part)
        except TimeoutError as why:
            raise Unreachable(f"no whole answer to {method} within {CALL_LIMIT_S:g} s") from why
        if not parts:
            raise RemoteError(f"an empty answer to {method}")
        return parts

    async def _stream(self, method: str, params: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        items: Any = self.link.stream(method, params)
        async with contextlib.aclosing(items):
            async for item in items:
                yield _dict(item)

    async def close(self) -> None:
        await self.link.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def attach(
    home: Home,
    via: str | None = None,
    mesh: str | None = None,
    operator_key: Path | None = None,
    host: str | None = None,
    tell: Tell = lambda line: None,
) -> Client:
    """A client of the agent that `host`, `via` and `mesh` mean (INTERFACE, `--via`).

    Unreachable when none answers, or the named one doesn't; Refused `unknown`, `ambiguous` when `via` names
    nothing or too much.
    """
    if host is not None:
        return await attach_outside(home, address(home, host), operator_key, tell)
    entries = home.running()
    if via is None and not entries:
        from tui.nearby import attach_nearby

        if client := await attach_nearby(home, mesh, operator_key, tell):
            return client
    if via is None:
        return await _first(home, _preferred(entries, mesh), operator_key, _nobody(home, entries, mesh))
    chosen = choose(entries, via)
    if chosen is not None:
        return await _first(home, chosen, operator_key, f"{via}: no answer within {LOCAL_LIMIT_S:g} s")
    if looks_like_address(via):
        return await attach_outside(home, address(home, via), operator_key, tell)
    return await _via_elsewhere(home, via, entries, operator_key, tell)


async def attach_entry(home: Home, entry: RunEntry, operator_key: Path | None = None) -> Client:
    """A client of one agent of this home, logged in with the home's client key (else an operator key)."""
    pub = base64.b64decode(entry.pub)
    if home.client_key_file.exists():
        keys: Any = read_identity(home.client_key_file, "client key")
        user = "home"
    else:
        from tui.signers import login_keys

        keys, user = await login_keys(home, operator_key), "op"
    return await _open(entry.host_port, keys, user, pub, LOCAL_LIMIT_S, entry)


async def attach_outside(
    home: Home,
    addr: Addr,
    operator_key: Path | None = None,
    tell: Tell = print,
    limit_s: float = REMOTE_LIMIT_S,
) -> Client:
    """A client of an agent that is not of this home: operator's key, host key pinned at first sight.

    Refused `host_key` when the agent shows another key than the pinned one: nothing was sent to it.
    """
    from tui.signers import login_keys

    pins = KnownAgents(home)
    pinned = pins.get(addr)
    keys = await login_keys(home, operator_key)
    try:
        client = await _open(addr, keys, "op", pinned, limit_s, None)
    except Refused as why:
        if why.code != "host_key" or pinned is None:
            raise
        raise Refused("host_key", changed_key(addr, pinned, why.sentence, pins.path)) from why
    shown = client.link.login.pub
    if pinned is None and shown is not None:
        pins.add(addr, shown)
        tell(f"{addr_text(addr)}: first seen with host key {pub_fingerprint(shown)}; pinned in {pins.path}")
    return client


def choose(entries: Sequence[RunEntry], via: str) -> list[RunEntry] | None:
    """The running agents of this home that `via` means, in the order to try; None when it means none of them.

    An exact name or id wins over a prefix, a node over a mesh of the same name. Refused `ambiguous` with the
    candidates when a prefix fits several.
    """
    if exact := [e for e in entries if via in (e.name, e.id)]:
        return exact if len(exact) == 1 or len({e.id for e in exact}) == 1 else _too_many(via, exact)
    if of_mesh := [e for e in entries if e.mesh == via]:
        return of_mesh
    if fits := [
        e for e in entries if e.name.startswith(via) or (HEX_ID.fullmatch(via) and e.id.startswith(via))
    ]:
        return fits if len(fits) == 1 else _too_many(via, fits)
    return None


class KnownAgents:
    """`config/known_agents`: `HOST:PORT ssh-ed25519 AAAA…`, one pinned host key a line."""

    def __init__(self, home: Home) -> None:
        self.path = home.config / "known_agents"

    def get(self, addr: Addr) -> bytes | None:
        """The pinned 32-byte key of that address, if any."""
        for line in self._lines():
            fields = line.split()
            if len(fields) >= 3 and fields[0] == addr_text(addr) and fields[1] == "ssh-ed25519":
                try:
                    return base64.b64decode(fields[2], validate=True)[-32:]
                except ValueError:
                    raise LocalError(
                        f"{self.path}: the key of {fields[0]} is damaged; remove its line"
                    ) from None
        return None

    def addresses(self) -> list[Addr]:
        """Where agents were met, oldest first; lines that hold no address are passed over."""
        found = []
        for line in self._lines():
            with contextlib.suppress(ValueError, IndexError):
                found.append(host_port(line.split()[0]))
        return found

    def ports(self, host: str) -> list[int]:
        """The ports at which agents on `host` were met."""
        met = (line.split()[0].rpartition(":") for line in self._lines() if line.strip())
        return sorted({int(port) for name, _, port in met if name.strip("[]") == host and port.isdigit()})

    def add(self, addr: Addr, pub: bytes) -> None:
        text = "".join(f"{line}\n" for line in [*self._lines(), f"{addr_text(addr)} {openssh_line(pub)}"])
        write_private(self.path, text.encode())

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []


def changed_key(addr: Addr, pinned: bytes, shown: str, path: Path) -> str:
    """What a person is told when an agent shows another host key than the pinned one."""
    return (
        f"{addr_text(addr)}: host key changed: pinned {pub_fingerprint(pinned)}, {shown}; "
        f"if that host was set up anew, remove its line from {path}"
    )


def address(home: Home, text: str) -> Addr:
    """HOST[:PORT] as an address. Without a port it is the one that was pinned for that host; LocalError if none was."""
    try:
        host, port = host_port(text, 0)
    except ValueError as why:
        raise LocalError(f"{text}: {why}") from why
    if port:
        return host, port
    known = KnownAgents(home).ports(host)
    if len(known) == 1:
        return host, known[0]
    ports = f"known are {', '.join(map(str, known))}" if known else "none is known for it"
    raise LocalError(f"{text}: which port? {ports}; write {text}:PORT")


def looks_like_address(text: str) -> bool:
    """Whether `text` can only be an address: node and mesh names hold no colon."""
    return ":" in text


async def _open(
    addr: Addr, keys: Any, user: str, pub: bytes | None, limit_s: float, entry: RunEntry | None
) -> Client:
    """Connects, logs in and says hello, all within `limit_s`."""
    link: Link | None = None
    try:
        async with asyncio.timeout(limit_s):
            link = await dial(addr, identity=keys, username=user, expect_pub=pub, timeout_s=limit_s)
            return Client(link, _dict(await link.call("hello", {}, limit_s)), entry)
    except TimeoutError as why:
        await _drop(link)
        raise Unreachable(f"{addr_text(addr)}: no answer within {limit_s:g} s") from why
    except OSError as why:
        await _drop(link)
        raise Unreachable(f"{addr_text(addr)}: {why.strerror or why}") from why
    except QuarterdeckError:
        await _drop(link)
        raise


async def _drop(link: Link | None) -> None:
    if link is not None:
        with contextlib.suppress(Exception):
            await link.close()


async def _first(
    home: Home, entries: Sequence[RunEntry], operator_key: Path | None, otherwise: str
) -> Client:
    """A client of the first of `entries` that answers. A refused login counts as an answer only at the end."""
    refusal: Refused | None = None
    for entry in entries:
        try:
            return await attach_entry(home, entry, operator_key)
        except Refused as why:
            refusal = refusal or why
        except (Unreachable, RemoteError):
            continue
    if refusal is not None:
        raise refusal
    raise Unreachable(otherwise)


async def _via_elsewhere(
    home: Home, via: str, entries: Sequence[RunEntry], operator_key: Path | None, tell: Tell
) -> Client:
    """A client of a node that runs on another host, found through whichever agent of this home answers first."""
    async with await _first(home, entries, operator_key, _nobody(home, entries, None)) as guide:
        found = await guide.resolve(via)
        rows = await guide.nodes()
    row = next((r for r in rows if r.get("id") == found.get("id")), None)
    if row is None or not row.get("addr"):
        raise Unreachable(f"{via}: no address is known for it")
    client = await attach_outside(home, address(home, str(row["addr"])), operator_key, tell)
    shown = client.link.login.pub
    if shown is None or id_text(node_id(shown)) != row["id"]:
        await client.close()
        raise Unreachable(f"{via}: another node answers at {row['addr']}")
    return client


def _preferred(entries: Sequence[RunEntry], mesh: str | None) -> list[RunEntry]:
    """Agents in the order to try: those of the mesh asked about first."""
    return sorted(entries, key=lambda e: e.mesh != mesh) if mesh else list(entries)


def _nobody(home: Home, entries: Sequence[RunEntry], mesh: str | None) -> str:
    if entries:
        return f"none of this home's {len(entries)} running agents answers within {LOCAL_LIMIT_S:g} s"
    known = mesh or next(iter(home.meshes()), None)
    return f"no agent of this home runs; start one with `qd agent --mesh {known or 'MESH'}`"


def _too_many(via: str, entries: Sequence[RunEntry]) -> list[RunEntry]:
    raise Refused("ambiguous", f"{via}: could be {', '.join(e.name for e in entries)}; write more of it")


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of the parts in which it came."""
    rows = [row for part in parts for row in _rows(part.get("rows"))]
    silent = [str(name) for part in parts for name in part.get("silent") or []]
    return {**parts[-1], "rows": rows, "silent": list(dict.fromkeys(silent))}


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RemoteError("the agent's answer is not a map; is it of another version?")
    return value


def _rows(value: Any) -> list[Row]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise RemoteError("the agent's answer is not a list of rows; is it of another version?")
    return value
