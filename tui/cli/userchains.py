"""`qd append`, `qd tail`: records of the chains that a spec's [[chain]] has the mesh keep."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from tui.cli.common import STDIN, Scope, document, json_line, out, read_input, run, say, scoped
from tui.cli.failures import OK, USAGE, Fail, op_failure

if TYPE_CHECKING:
    from tui.client import Client
    from tui.signers import Signer

RECORDS_SHOWN = 2_048


@click.command()
@click.argument("chain", metavar="CHAIN")
@click.argument("file", required=False, default=STDIN, metavar="[FILE|-]")
@scoped("timeout")
def append(scope: Scope, chain: str, file: str) -> int:
    """Put the content of FILE, or of standard input, on CHAIN as one record, by signed message."""
    return run(_append(scope, _named(chain), _read(file)))


def _named(chain: str) -> str:
    from agent.data.userchains import is_user_chain

    if not is_user_chain(chain):
        raise Fail(USAGE, f"{chain}: no name of a chain that a spec can name; see `qd chains`")
    return chain


def _read(file: str) -> bytes:
    from agent.opmessage import APPEND_MAX_BYTES

    too_large = ", the most that a record may have; put what is larger with `qd put`"
    return read_input(file, APPEND_MAX_BYTES, "file", too_large)


async def _append(scope: Scope, chain: str, content: bytes) -> int:
    from tui.signers import find_signer

    async with await _attach(scope) as client:
        holders = (await client.ask("holders", {"chain": chain})).get("holders")
        if not isinstance(holders, list) or not holders or not all(isinstance(h, dict) for h in holders):
            raise RemoteError(f"append {chain}: {client.name} names no holder; is it of another version?")
        signer = await find_signer(scope.home, scope.operator_key)
        for holder in holders:
            result, certain = await _hand_over(
                client, signer, chain, str(holder.get("id")), content, scope.more["timeout"] / 1000
            )
            result["target"] = holder.get("name")
            if not certain:
                break
    if scope.json:
        document([result])
    return _tell(scope, chain, result)


async def _hand_over(
    client: Client, signer: Signer, chain: str, target: str, content: bytes, timeout_s: float
) -> tuple[dict[str, Any], bool]:
    """Signs the op for one holder and hands it over. Its result, and whether another holder may be tried: it is certain
    that nothing was written."""
    from agent.opmessage import NAMESPACE, build_op, new_ulid
    from tui.ops import RESULT_KEYS

    result: dict[str, Any] = {**dict.fromkeys(RESULT_KEYS), "op": "append", "chain": chain}
    result |= {"code": None, "recorded": None}
    began = time.monotonic()
    sent = again = False
    try:
        async with asyncio.timeout(timeout_s):
            challenge = await client.challenge(target)
            now_ms = int(challenge["wall_ms"])
            result["op_id"] = op_id = new_ulid(now_ms, os.urandom(10))
            message = build_op(
                "append",
                mesh=client.mesh,
                target=target,
                op_id=op_id,
                nonce=str(challenge["nonce"]),
                now_ms=now_ms,
                fields={"chain": chain, "sha256": hashlib.sha256(content).hexdigest()},
            )
            letter = {
                "target": target,
                "message": message,
                "signature": await signer.sign(message, NAMESPACE),
            }
            sent = True
            answer = await client.call("op", letter | {"content": content}, timeout_s)
        if not isinstance(answer, dict):
            raise RemoteError("the answer to op is not a map; is the agent of another version?")
        word = answer.get("result")
        result["result"] = word if word in ("done", "accepted", "refused") else "unknown"
        result |= {
            key: answer.get(key) for key in ("state", "route", "reason", "skew_ms", "code", "recorded")
        }
        again = result["code"] in ("not_held", "in_update", "leaving")
    except TimeoutError:
        result.update(
            result="unknown" if sent else "unreachable", reason="no answer in time", code="timed_out"
        )
    except Refused as why:
        result.update(result="refused", reason=why.sentence, code=why.code)
        again = why.code in ("gone", "in_update", "unknown")
    except Unreachable as why:
        arrived = sent and why.maybe_arrived
        result.update(result="unknown" if arrived else "unreachable", reason=str(why))
        again = not arrived
    except QuarterdeckError as why:
        result.update(result="refused", reason=str(why), code="nonsense")
    result["took_ms"] = round((time.monotonic() - began) * 1000, 1)
    return result, again


def _tell(scope: Scope, chain: str, result: Mapping[str, Any]) -> int:
    if failure := op_failure(chain, result, "append"):
        click.echo(failure[1], err=True)
        return failure[0]
    if result["recorded"] == "local":
        say(f"append {chain}: recorded at {result['target']} alone so far")
    if not scope.json:
        from tui.model.ages import took

        out(f"append {chain}: done at {result['target']}, {result['recorded']}, {took(result['took_ms'])}")
    return OK


@click.command()
@click.argument("chain", metavar="CHAIN")
@scoped("follow", "limit")
def tail(scope: Scope, chain: str) -> None:
    """The newest records of CHAIN in its order, oldest first; with --json an object a line."""
    run(_tail(scope, _named(chain)))


async def _tail(scope: Scope, chain: str) -> None:
    limit = RECORDS_SHOWN if scope.more["limit"] is None else scope.more["limit"]
    async with await _attach(scope) as client:
        async with contextlib.aclosing(client.tail(chain, limit, scope.more["follow"])) as rows:
            async for row in rows:
                if row.get("gone") is True:
                    say(
                        f"tail {chain}: older records are gone; the spec's keep_bytes and keep_for say what is kept"
                    )
                if scope.json:
                    json_line(row)
                else:
                    out(record_lines(row))
        if scope.more["follow"]:
            raise Unreachable(f"{client.name}: it has gone")


def record_lines(row: Mapping[str, Any]) -> str:
    """A record for people: when, at which node, by whom; then its text, further lines below the first."""
    from tui.model.ages import clock, number
    from tui.model.text import clean

    head = f"{clock(number(row.get('at_ms')))}  {clean(row.get('node'))}  {clean(row.get('by')) or '–'}"
    if row.get("verified") is not True:
        head += " (not verified)"
    text = row.get("text")
    if not isinstance(text, str):
        return f"{head}  base64 {clean(row.get('base64'))}"
    lines = [clean(line.replace("\t", "    ")) for line in text.rstrip("\n").split("\n")]
    return "\n".join([f"{head}  {lines[0]}", *(f"    {line}" for line in lines[1:])])


async def _attach(scope: Scope) -> Client:
    """A client of a node of the mesh that is meant."""
    client = await scope.attach()
    if scope.mesh not in (None, client.mesh):
        await client.close()
        raise Refused(
            "unknown_mesh", f"mesh {scope.mesh}: {client.name} holds nothing of it; ask one of its nodes"
        )
    return client


__all__ = ["append", "tail"]
