"""What only the nodes themselves know, asked of all of them side by side; who gives no answer in time is named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from agent.chain.audit import Entry
from agent.params import ROWS_A_FRAME, chunked, limit_of, mapping
from agent.view import Row
from discovery.errors import QuarterdeckError
from discovery.identity import id_text
from discovery.links import Link
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node


PASTS_A_FRAME = 40
ASK_EACH_S = 1.0
ASKED_AT_ONCE = 64
ROWS_A_NODE = 2000
FAILURE_KEY = ("node_id", "at_ms", "source", "action", "target", "reason")
"""What makes two tellings of a failure the same one."""
AUDIT_MAX = 10_000_000
REFUSALS_TOLD = 2000


class Gathering:
    """Methods of a node about the whole fleet, and what each node tells of itself for them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._audits: dict[Link, tuple[list[Entry | Row], bool]] = {}
        """Audits that are being read page by page, and whether with what was signed."""

    async def own_daemons(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.pages.daemons()}

    async def own_failures(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.pages.failures()}

    async def dead_failures(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.chains.failures_of_dead()[-ROWS_A_NODE:]}

    async def daemons(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Every live node's daemons, each as that node tells of them."""
        async for part in self._of_all(params, "own_daemons", self._node.pages.daemons):
            yield part

    async def failures(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Every live node's ring of failures, each as that node keeps it."""
        async for part in self._of_all(params, "own_failures", self._node.pages.failures):
            yield part
        rows: dict[tuple[Any, ...], Row] = {}
        async for part in self._of_all(
            params, "dead_failures", self._node.chains.failures_of_dead, keep_names=True
        ):
            for row in part["rows"]:
                rows.setdefault(tuple(row.get(key) for key in FAILURE_KEY), row)
        for some in chunked(list(rows.values()), ROWS_A_FRAME):
            yield {"rows": some, "silent": [], "answered_by": self._node.name}

    async def _of_all(
        self, params: Any, method: str, own: Callable[[], list[dict[str, Any]]], *, keep_names: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """Rows of this node and of every live node in its view (with `mesh`, of that mesh), asked side by side, each for
        at most ASK_EACH_S; ROWS_A_FRAME at a time. `silent` names those that gave no answer."""
        node = self._node
        told = await self._ask_all(params, method, {})
        rows = own() if mapping(params).get("mesh") in (None, node.settings.mesh) else []
        for member, answer in told:
            name = {"node": member.record.name, "node_id": id_text(member.id), "mesh": member.record.mesh}
            if keep_names:
                name = {"mesh": member.record.mesh, "from_replica": member.record.name}
            rows += [{**row, **name} for row in answer or []]
        silent = _silent(told)
        for part in chunked(rows, ROWS_A_FRAME):
            yield {"rows": part, "silent": silent, "answered_by": node.name}

    async def _ask_all(
        self, params: Any, method: str, request: dict[str, Any]
    ) -> list[tuple[Member, list[dict[str, Any]] | None]]:
        """Every other live node in view (with `mesh` in `params`, of that mesh) and the rows that it answers, None where it
        doesn't within ASK_EACH_S. Refused `unknown_mesh`."""
        node = self._node
        mesh = mapping(params).get("mesh")
        with node.meshes.following.reading():
            await node.meshes.following.ready()
        node.meshes.in_view(mesh)
        everybody: list[Member] = [m for m in node.swim.members.values() if m.present]
        everybody += [m for listing, m in node.meshes.remotes() if m.present and not listing.expired]
        asked = [m for m in everybody if mesh in (None, m.record.mesh)]
        slots = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(member: Member) -> list[dict[str, Any]] | None:
            async with slots:
                try:
                    async with asyncio.timeout(ASK_EACH_S):
                        answer, _ = await node.reach.call(member, method, request, ASK_EACH_S)
                    told = mapping(answer).get("rows")
                except (QuarterdeckError, TimeoutError):
                    return None
            if not isinstance(told, list):
                return None
            return [row for row in told[:ROWS_A_NODE] if isinstance(row, dict)]

        return list(zip(asked, await asyncio.gather(*(ask(m) for m in asked)), strict=True))

    async def past(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The loads that the nodes recorded from `from_ms` to `to_ms`, `now_ms` being the time at who asks: a row a node
        that told any, or of whose chain somebody holds a copy."""
        node = self._node
        span = {key: mapping(params).get(key) for key in ("from_ms", "to_ms", "now_ms")}
        rows = await node.past.own(span) if mapping(params).get("mesh") in (None, node.settings.mesh) else []
        told = await self._ask_all(params, "own_past", span)
        for member, answer in told:
            name, mesh = member.record.name, member.record.mesh
            for row in answer or []:
                own = row.get("node_id") == id_text(member.id)
                told_by = {"node": name, "from_replica": None} if own else {"from_replica": name}
                rows.append({**row, "mesh": mesh, **told_by})
        silent = _silent(told)
        for part in chunked(node.past.merged(rows), PASTS_A_FRAME):
            yield {"rows": part, "silent": silent, "answered_by": node.name}

    async def own_past(self, link: Link, params: Any) -> Any:
        return {"rows": await self._node.past.own(params)}

    async def audit(self, link: Link, params: Any) -> Any:
        """Rows of the audit from `offset` on, `{rows, next}`; with `bytes` what was signed, too."""
        offset = limit_of(params, 0, "offset", AUDIT_MAX)
        audit = self._node.chains.audit
        kept = self._audits.get(link)
        if offset == 0 or kept is None:
            with_bytes = mapping(params).get("bytes") is True
            listed = await audit.listing()
            elsewhere = await self._refusals_elsewhere(listed, with_bytes)
            kept = (sorted([*listed, *elsewhere], key=_by_time), with_bytes)
            self._audits[link] = kept
            link.on_close(lambda: _forget(self._audits, link))
        listed_all, with_bytes = kept
        answer = await audit.page(listed_all, offset, self._node.chains.by_name, with_bytes=with_bytes)
        if answer["next"] is None:
            self._audits.pop(link, None)
        return answer

    async def _refusals_elsewhere(self, known: list[Entry], with_bytes: bool) -> list[Row]:
        """What other live nodes of the mesh took or refused, and this one holds no copy of."""
        node = self._node
        held = {(node.name_of(entry.node), entry.at_ms, entry.op_id) for entry in known}
        slots = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(member: Member) -> list[Row]:
            async with slots:
                try:
                    async with asyncio.timeout(ASK_EACH_S):
                        answer, _ = await node.reach.call(
                            member, "own_refusals", {"bytes": with_bytes}, ASK_EACH_S
                        )
                    told = mapping(answer).get("rows")
                except (QuarterdeckError, TimeoutError):
                    return []
            rows = told if isinstance(told, list) else []
            return [{**row, "node": member.record.name} for row in rows if _audit_row(row)]

        members = [m for m in node.swim.members.values() if m.present]
        found = await asyncio.gather(*(ask(m) for m in members))
        return [
            row
            for rows in found
            for row in rows
            if (row["node"], row["at_ms"], str(row["op_id"] or "")) not in held
        ]

    async def chains(self, link: Link, params: Any) -> Any:
        """Every artifact and chain of this mesh, and who holds it; each live node tells what it has."""
        node = self._node
        members = [m for m in node.swim.members.values() if m.present]
        answers = await asyncio.gather(*(self._told(m, "own_chains") for m in members))
        told = {node.identity.id: node.chains.own_rows()}
        told |= {m.id: rows for m, rows in zip(members, answers, strict=True) if rows is not None}
        artifacts = mapping(await node.data.desk.chains(link, params))["rows"]
        silent = sorted(m.record.name for m, rows in zip(members, answers, strict=True) if rows is None)
        held = [node.chains.sized(row, told) for row in artifacts]
        known = {row["name"] for row in held if row["kind"] == "chain"}
        unheld = [row for row in node.chains.unheld() if row["name"] not in known]
        rows = [{"held_back": None, **row} for row in (*held, *unheld, *node.chains.rows(told))]
        return {"rows": rows, "silent": silent, "answered_by": node.name}

    async def own_chains(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.chains.own_rows()}

    async def _told(self, member: Member, method: str) -> list[Any] | None:
        """Rows that a member gives, each a list with a name first; None when it gives none that make sense in time."""
        try:
            async with asyncio.timeout(ASK_EACH_S):
                answer, _ = await self._node.reach.call(member, method, {}, ASK_EACH_S)
            return msgspec.convert(mapping(answer).get("rows"), list[tuple[str, int | None, int, int]])
        except (QuarterdeckError, TimeoutError, msgspec.ValidationError):
            return None

    async def own_refusals(self, link: Link, params: Any) -> Any:
        """The newest refusals of this node, as many as go into a frame."""
        chains, with_bytes = self._node.chains, mapping(params).get("bytes") is True
        rows = await chains.audit.taken_alone(REFUSALS_TOLD, chains.by_name, with_bytes=with_bytes)
        return {"rows": rows}


def _by_time(listed: Entry | Row) -> tuple[int, str]:
    return listed[:2] if isinstance(listed, Entry) else (listed["at_ms"], str(listed["op_id"] or ""))


def _silent(told: Iterable[tuple[Member, Any]]) -> list[str]:
    """Names of those who gave no answer."""
    return sorted(member.record.name for member, answer in told if answer is None)


def _forget(kept: dict[Link, Any], link: Link) -> None:
    kept.pop(link, None)


def _audit_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("at_ms"), int)
        and {"op_id", "op", "target"} <= row.keys()
    )
