"""`qd put`, `qd get`: files that the mesh keeps."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import QuarterdeckError, Refused, RemoteError
from tui.cli.common import Scope, document, is_terminal, out, run, scoped
from tui.cli.failures import USAGE, Fail
from tui.model.ages import size

if TYPE_CHECKING:
    from tui.client import Client

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
REPLICAS = 3
REPLICAS_MAX = 64
REDRAW_EVERY_S = 0.1
MIB = 2**20


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--replicas",
    type=click.IntRange(0, REPLICAS_MAX),
    default=REPLICAS,
    show_default=True,
    envvar="QD_REPLICAS",
    metavar="N",
    help="How many nodes shall hold it; a spec's [[artifact]] goes before it. 0: the one that takes it, uncounted.",
)
@click.option(
    "--name", "name", default=None, metavar="NAME", help="Its name in the mesh. Default: the file's."
)
@scoped()
def put(scope: Scope, file: Path, replicas: int, name: str | None) -> None:
    """Have the mesh keep FILE, by signed message. A put that was broken off goes on where it stopped."""
    run(_put(scope, file, replicas, name))


async def _put(scope: Scope, file: Path, replicas: int, name: str | None) -> None:
    from agent.data.offering import Offer

    name = _name(name if name is not None else file.name.lower(), file, given=name is not None)
    offer = Offer(file)
    try:
        bar = Progress(f"reading {name}", offer.size)
        await asyncio.to_thread(offer.measure, bar.at)
        bar.end()
        began = time.monotonic()
        async with await scope.attach() as client:
            answer = await _send(scope, client, offer, name, replicas)
    finally:
        offer.close()
    answer["took_ms"] = round((time.monotonic() - began) * 1000, 1)
    if scope.json:
        document(answer)
    else:
        wanted = "uncounted" if not replicas else f"{replicas} wanted"
        out(
            f"{name}: {size(offer.size)} put at {answer['node']}, {wanted}; "
            f"sha256 {offer.hash}; see `qd chains`"
        )


async def _send(scope: Scope, client: Client, offer: Any, name: str, replicas: int) -> dict[str, Any]:
    """Signs the put for the node that answers, and lets it read the file."""
    from agent.data.puts import build_put
    from agent.opmessage import NAMESPACE, new_ulid
    from tui.signers import find_signer

    signer = await find_signer(scope.home, scope.operator_key)
    asked = time.monotonic()
    challenge = await client.challenge(client.id)
    now_ms = int(challenge["wall_ms"]) + round((time.monotonic() - asked) * 500)
    message = build_put(
        name=name,
        hash=offer.hash,
        list=offer.list_digest,
        size=offer.size,
        replicas=replicas,
        mesh=str(challenge["mesh"]),
        target=client.id,
        op_id=new_ulid(now_ms, os.urandom(10)),
        nonce=str(challenge["nonce"]),
        now_ms=now_ms,
    )
    signature = await signer.sign(message, NAMESPACE)
    client.link.methods = {**client.link.methods, **offer.methods()}
    bar = Progress(f"putting {name}", offer.size)
    answer: dict[str, Any] = {}
    try:
        async for item in client.link.stream("artifact_put", {"message": message, "signature": signature}):
            if not isinstance(item, dict):
                raise RemoteError(f"{client.name}: its answer to a put is none")
            if "result" in item:
                answer = item
            elif isinstance(item.get("done"), int):
                bar.at(item["done"])
    finally:
        bar.end()
    if not answer:
        raise RemoteError(f"put {name}: {client.name} did not say how it ended; put it again")
    keys = ("result", "name", "hash", "size", "replicas", "op_id", "node")
    return {key: answer.get(key) for key in keys}


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, metavar="FILE", help="Default: ./NAME."
)
@scoped()
def get(scope: Scope, name: str, output: Path | None) -> None:
    """Write artifact NAME to a file, from whichever node holds it. One that was broken off goes on where it stopped."""
    run(_get(scope, name, output))


async def _get(scope: Scope, name: str, output: Path | None) -> None:
    from agent.data.fetching import LinkSource, Want, fetch
    from agent.data.parts import Part
    from agent.data.puts import decode_put
    from agent.opmessage import NAMESPACE
    from discovery import sshsig

    _name(name, None, given=True)
    target = Path(name) if output is None else output
    if target.is_dir():
        target = target / name
    if not target.parent.is_dir():
        raise Fail(USAGE, f"{target.parent}: no such directory; name a place that you can write")
    began = time.monotonic()
    async with await scope.attach() as client:
        found = await client.ask("artifact", {"name": name})
        message, signature = found.get("message"), found.get("signature")
        if not isinstance(message, bytes) or not isinstance(signature, str):
            raise RemoteError(f"get {name}: {client.name} shows no signed put; is it of another version?")
        signer = sshsig.verify(message, signature, NAMESPACE)
        put = decode_put(message).args
        if put.name != name:
            raise RemoteError(f"get {name}: {client.name} shows the put of {put.name}")

        async def link() -> Any:
            return client.link

        bar = Progress(f"getting {name}", put.size)
        path = target.with_name(f".{target.name}.{put.hash[:12]}.part")
        source = LinkSource(client.name, link, "fetch")
        want = Want(put.hash, put.size, put.list)
        try:
            part = await fetch(
                want, [source], lambda hashes: Part(path, put.hash, put.size, hashes), progress=bar.at
            )
            await asyncio.to_thread(part.finish)
        except Refused as why:
            raise Refused(why.code, f"get {name}: {why.sentence}") from why
        except QuarterdeckError as why:
            raise type(why)(f"get {name}: {why}; the same command goes on from there") from why
        finally:
            bar.end()
        path.replace(target)
        answer = {
            "result": "done",
            "name": name,
            "file": str(target),
            "hash": put.hash,
            "size": put.size,
            "put_by": signer.fingerprint,
            "holders": found.get("holders"),
            "node": client.name,
            "took_ms": round((time.monotonic() - began) * 1000, 1),
        }
    if scope.json:
        document(answer)
    else:
        out(f"{target}: {size(put.size)}, verified; put by {signer.fingerprint}")


class Progress:
    """How far a transfer is, redrawn on one line where there is a terminal to draw on."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._drawn = 0.0
        self._terminal = is_terminal(sys.stderr)
        self._shown = False

    def at(self, done: int) -> None:
        """So many bytes are done."""
        now = time.monotonic()
        if not self._terminal or (now - self._drawn < REDRAW_EVERY_S and done != self._total):
            return
        self._drawn, self._shown = now, True
        line = f"{self._what}: {share_words(done, self._total)} of {size(self._total)}"
        click.echo(f"\r{line}\x1b[K", err=True, nl=False)

    def end(self) -> None:
        """Leaves the line empty for what is said next."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._shown = False


def share_words(done: Any, total: Any) -> str:
    """A share in per cent; – where it isn't known yet."""
    if not isinstance(done, int) or not isinstance(total, int) or total <= 0:
        return "–"
    return f"{100 * done // total} %"


def _name(name: str, file: Path | None, *, given: bool) -> str:
    """The name, if it can be one."""
    if NAME.fullmatch(name):
        return name
    what = name if given or file is None else file.name
    cure = "a name is made of a-z, 0-9, dot, dash and underscore"
    if not given:
        cure = f"give it one with --name; {cure}"
    raise Fail(USAGE, f"{what}: no name for an artifact; {cure}")


__all__ = ["get", "put"]
