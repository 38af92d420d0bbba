"""Commands about authority: audit, operators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from discovery.errors import LocalError, Refused, RemoteError
from tui.cli.common import Scope, document, on_terminal, out, run, say, scoped
from tui.cli.failures import FAILED, OK, USAGE, Fail, refusal_status

if TYPE_CHECKING:
    from tui.client import Client

KEYFILE_MAX_BYTES = 64 * 1024
ROWS_MAX = 1_000_000


# --- audit


@click.command()
@click.option(
    "--export",
    "place",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the signed bytes of each op there, to be verified by ssh-keygen.",
)
@scoped()
def audit(scope: Scope, place: Path | None) -> None:
    """Every op and every refusal that the answering node knows of its mesh, oldest first."""
    run(_audit(scope, place))


async def _audit(scope: Scope, place: Path | None) -> None:
    async with await scope.attach() as client:
        _of_mesh(client, scope.mesh, "audit")
        rows = await _audit_rows(client, with_bytes=place is not None)
    if place is not None:
        from agent.chain.audit import export

        count = export(rows, place)
        say(f"{count} op{'s' * (count != 1)} of {len(rows)} rows written to {place}; see {place / 'README'}")
    shown = [
        {key: row.get(key) for key in (*_keys(), *row) if key not in ("message", "signature")} for row in rows
    ]
    if scope.json:
        document(shown)
    elif place is None:
        out(audit_table(shown))


async def _audit_rows(client: Client, *, with_bytes: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    offset: int | None = 0
    while offset is not None and len(rows) < ROWS_MAX:
        answer = await client.ask("audit", {"offset": offset, "bytes": with_bytes})
        found = answer.get("rows")
        rows += [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
        following = answer.get("next")
        if following is not None and not (isinstance(following, int) and following > offset):
            raise RemoteError(f"audit: {client.name} answers with pages that make no sense")
        offset = following
    return rows


def _when(at_ms: Any) -> str:
    """A Unix time as local date and time: an audit reaches back further than a day."""
    from datetime import datetime

    from tui.model.ages import UNKNOWN

    try:
        return datetime.fromtimestamp(at_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, OverflowError, OSError, ValueError):
        return UNKNOWN


def _keys() -> tuple[str, ...]:
    from agent.chain.audit import KEYS

    return KEYS


def audit_table(rows: list[dict[str, Any]]) -> str:
    """`qd audit` for people."""
    from tui.cli.tables import table
    from tui.model.ages import UNKNOWN

    if not rows:
        return "nothing recorded"
    verified = {True: "verified", False: "NOT VERIFIED", None: UNKNOWN}
    return table(
        ["AT", "OP", "TARGET", "OPERATOR", "RESULT", "SIGNATURE", "REASON"],
        [
            [
                _when(row.get("at_ms")),
                *(str(row.get(key) or UNKNOWN) for key in ("op", "target", "operator", "result")),
                verified.get(row.get("verified"), UNKNOWN),
                str(row.get("reason") or ""),
            ]
            for row in rows
        ],
    )


# --- operators


@click.group(invoke_without_command=True)
@scoped()
@click.pass_context
def operators(ctx: click.Context, scope: Scope) -> None:
    """Who may command the mesh, by its roster; grant and revoke change it."""
    if ctx.invoked_subcommand is None:
        run(_operators(scope))


async def _operators(scope: Scope) -> None:
    async with await scope.attach() as client:
        _of_mesh(client, scope.mesh, "operators")
        rows = await _roster(client)
    if scope.json:
        document(rows)
    else:
        out(operators_table(rows))


def operators_table(rows: list[dict[str, Any]]) -> str:
    """`qd operators` for people: those who may, then those who no longer may."""
    from tui.cli.tables import table
    from tui.model.ages import UNKNOWN

    if not rows:
        return "nobody"
    lines = []
    for row in rows:
        gone = row.get("revoked")
        how = gone if isinstance(gone, dict) else row
        lines.append(
            [
                str(row.get("comment") or UNKNOWN),
                "revoked" if gone else str(row.get("role") or UNKNOWN),
                str(row.get("fingerprint") or UNKNOWN),
                str(how.get("by") or "qd init"),
                _when(how.get("at_ms")),
            ]
        )
    return table(["WHO", "ROLE", "KEY", "BY", "SINCE"], lines)


@operators.command("grant")
@click.argument("keyfile", type=click.Path(path_type=Path))
@click.option(
    "--role",
    type=click.Choice(("observe", "operate", "admin")),
    required=True,
    help="What that key may do.",
)
@click.option("--yes", is_flag=True, help="Don't ask.")
@scoped("timeout")
def grant(scope: Scope, keyfile: Path, role: str, yes: bool) -> None:
    """Lets the public key in KEYFILE command the mesh."""
    line = _grant_line(keyfile, role)
    raise click.exceptions.Exit(run(_change(scope, "grant_operator", {"line": line}, yes)))


@operators.command("revoke")
@click.argument("who", metavar="KEY")
@click.option("--from-now", is_flag=True, help="Let everything stand that it signed before this moment.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@scoped("timeout")
def revoke(scope: Scope, who: str, from_now: bool, yes: bool) -> None:
    """Takes the right of KEY (fingerprint, or name in the roster) to command the mesh.

    What it signed beyond its newest record that the answering node knows is void everywhere, also what reaches others
    only later."""
    raise click.exceptions.Exit(run(_revoke(scope, who, from_now, yes)))


async def _revoke(scope: Scope, who: str, from_now: bool, yes: bool) -> int:
    async with await scope.attach() as client:
        rows = [row for row in await _roster(client) if not row.get("revoked")]
    found = [row for row in rows if who in (row.get("fingerprint"), row.get("comment"))]
    if not found:
        known = ", ".join(sorted(str(row.get("comment")) for row in rows))
        raise Fail(USAGE, f"operators revoke: {who}: not in the roster; there are {known or 'none'}")
    if len(found) > 1:
        keys = ", ".join(str(row.get("fingerprint")) for row in found)
        raise Fail(USAGE, f"operators revoke: {who}: several keys; name one of {keys}")
    last = found[0].get("last")
    if not from_now and last is None:
        last = [0, 0, "0" * 16, 0]
    args = {"fingerprint": found[0].get("fingerprint"), "last": None if from_now else last}
    return await _change(scope, "revoke_operator", args, yes)


async def _change(scope: Scope, verb: str, args: dict[str, Any], yes: bool) -> int:
    """Signs a change of the roster and has the answering node commit it."""
    import os
    import time

    from agent.opmessage import NAMESPACE, build_op, new_ulid
    from tui.cli.tables import result_line
    from tui.signers import find_signer

    async with await scope.attach() as client:
        _of_mesh(client, scope.mesh, "operators")
        about = args.get("line") or args.get("fingerprint")
        question = f"{verb.replace('_', ' ')} {about} in mesh {client.mesh}?"
        if not (yes or scope.json) and on_terminal() and not click.confirm(question, err=True):
            raise click.Abort
        signer = await find_signer(scope.home, scope.operator_key)
        began = time.monotonic()
        challenge = await client.challenge(client.id)
        now_ms = int(challenge["wall_ms"])
        message = build_op(
            verb,
            fields=args,
            mesh=str(challenge["mesh"]),
            target=client.id,
            op_id=new_ulid(now_ms, os.urandom(10)),
            nonce=str(challenge["nonce"]),
            now_ms=now_ms,
        )
        signature = await signer.sign(message, NAMESPACE)
        answer = await client.op(client.id, message, signature, int(scope.more["timeout"]) / 1000)
    took_ms = round(1000 * (time.monotonic() - began))
    row = {**answer, "op": verb, "target": client.name, "took_ms": took_ms}
    if scope.json:
        document([row])
    else:
        out(result_line(row))
    if row.get("result") in ("done", "accepted"):
        return OK
    return refusal_status(str(row["code"])) if row.get("code") else FAILED


def _grant_line(keyfile: Path, role: str) -> str:
    """The line of the roster for the one public key in a file; its options, if any, stay."""
    from agent.chain.adminstate import grant_of

    try:
        with keyfile.open("rb") as file:
            text = file.read(KEYFILE_MAX_BYTES).decode("utf-8", "replace")
    except OSError as why:
        raise Fail(
            USAGE, f"operators grant: {keyfile}: {why.strerror}; name a file with a public key"
        ) from why
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if len(lines) != 1 or "PRIVATE KEY" in text:
        raise Fail(USAGE, f"operators grant: {keyfile}: not one public key; name the file that ends in .pub")
    if "QD_ROLE" in lines[0]:
        raise Fail(USAGE, f"operators grant: {keyfile}: names a role itself; take it out, --role says it")
    option = f'environment="QD_ROLE={role}"'
    for line in (f"{option} {lines[0]}", f"{option},{lines[0]}"):
        try:
            grant_of(line)
        except LocalError as why:
            reason = str(why)
        else:
            return line
    raise Fail(USAGE, f"operators grant: {keyfile}: {reason}")


async def _roster(client: Client) -> list[dict[str, Any]]:
    found = (await client.ask("operators")).get("operators")
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _of_mesh(client: Client, mesh: str | None, what: str) -> None:
    if mesh is not None and client.mesh != mesh:
        raise Refused(
            "unknown_mesh",
            f"{what}: {client.name} is of mesh {client.mesh}; name a node of {mesh} with --via",
        )
