"""The documents a node answers with: rows, the page of one node, its mesh, its own checks.

All of them are made from what gossip, the engine and the journal hold at that moment; nothing is folded here.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from agent import freshness
from agent.events import KEYS, wall_ms
from agent.view import Row, View, spawned_row
from discovery.directory import Listing, Remote
from discovery.errors import Refused
from discovery.identity import id_text
from discovery.lifecycle import EVIDENCE_TEXT, Evidence, State
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node

WHY_EVENTS = 20
OWN_WORD = ("node.state_changed", "node.changed", "node.joined", "build.stale")
"""Kinds of events that say less of a node than the moves in its own chain."""
CANDIDATES_SHOWN = 8
DAEMON_LIVE_KEYS = ("saturation", "until_ms", "intent", "held_back", "status", "resources")
"""Of a daemon's row: not known of a node that is dead."""
CLOCK_SET_MS = 1_000
"""Where wall clock and engine's clock part by more than this, the wall clock was set."""


class Pages:
    """Answers about one node's view."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._disk = freshness.DiskWatch()
        self._began_ms = 0
        """The wall time at which the engine's clock was 0."""
        self.view = View(node.identity.id, node.name_of)

    @property
    def disk_build(self) -> str:
        """The fingerprint of the code on this disk, looked at every 2 s at most."""
        return self._disk.current()

    def row(self, member: Member, now: float, *, others: int | None = None, history: bool = False) -> Row:
        """One member's row in this view. `others`: how many other members are present, where that is known already."""
        if others is None:
            others = sum(m.present for m in self._node.swim.members.values())
        return self.view.row(member, now, others=others, disk_build=self.disk_build, history=history)

    def rows(self) -> list[Row]:
        """Everybody in view, this node first, then by name; then what this home started and gossip has not met."""
        now = time.monotonic()
        swim = self._node.swim
        members = [swim.me, *sorted(swim.members.values(), key=lambda m: m.record.name)]
        others = sum(m.present for m in swim.members.values())
        build = self.disk_build
        own = [self.view.row(m, now, others=others, disk_build=build) for m in members]
        return own + self.remote_rows() + self.spawned()

    def remote_rows(self) -> list[Row]:
        """The nodes of other meshes, by mesh and name."""
        now, build = time.monotonic(), self.disk_build
        found = sorted(self._node.meshes.remotes(), key=lambda f: (f[0].mesh, f[1].record.name))
        return [self._remote_row(listing, member, now, build) for listing, member in found]

    def remote_row(self, node_id: int, now: float) -> Row | None:
        """The row of one node of another mesh, None when it isn't in view."""
        member = self._node.meshes.directory.find(node_id)
        listing = self._node.meshes.directory.listings.get(member.record.mesh) if member is not None else None
        if member is None or listing is None:
            return None
        return self._remote_row(listing, member, now, self.disk_build)

    def _remote_row(self, listing: Listing, member: Remote, now: float, build: str) -> Row:
        expired_s = max(0.0, now - (listing.expired_at or now)) if listing.expired else None
        return self.view.remote_row(
            member, now, silent_s=listing.silent_s(now), expired_s=expired_s, disk_build=build
        )

    def spawned(self) -> list[Row]:
        """Rows of running processes that this home started and that gossip does not know (yet)."""
        from agent.spawn import SpawnRegistry

        node = self._node
        remotes = [member for _, member in node.meshes.remotes()]
        known = {id_text(m.id) for m in (node.swim.me, *node.swim.members.values(), *remotes)}
        names = {
            (m.record.mesh, m.record.name) for m in (node.swim.me, *node.swim.members.values(), *remotes)
        }
        return [
            spawned_row(
                entry.id, entry.name, entry.mesh, entry.kind, entry.addr or None, time.time() - entry.start
            )
            for entry in SpawnRegistry(node.home).entries()
            if entry.id and entry.id not in known and (entry.mesh, entry.name) not in names
        ]

    def member(self, text: str) -> Member:
        """The member with this id (16 hex digits), this node included; Refused when unknown or gone."""
        return self._node.target(text) or self._node.swim.me

    def page(self, member: Member) -> dict[str, Any]:
        """Everything this node knows about one node: its row; its engine's snapshot when it is this very node."""
        node = self._node
        now = time.monotonic()
        mine = member.id == node.identity.id
        snapshot = node.engine_document() if mine else {}
        if isinstance(member, Remote):
            row = self.remote_row(member.id, now) or {}
        else:
            row = self.row(member, now, history=True)
        return {
            "node": row,
            "daemons": self.daemons() if mine else [],
            "replicas": snapshot.get("replicas", []),
            "peers": snapshot.get("peers", []),
            "avoid_list": snapshot.get("avoid_list", []),
            "local_maintenance": snapshot.get("local_maintenance", {"state": member.record.maintenance}),
            "recently_emitted": snapshot.get("recently_emitted", []),
            "recent_failures": snapshot.get("recent_failures", []),
            "stats": snapshot.get("stats", {}),
            "answered_by": node.name,
            "told_by": node.name,
            "age_ms": 0 if mine else round((now - member.last_seen) * 1000),
            "why": node.events.about(id_text(member.id), WHY_EVENTS),
            "wants": snapshot.get("recently_emitted", []),
            "held_back": snapshot.get("held_back", []),
            "local": snapshot.get("local", {}),
            "backpressure": bool(snapshot.get("local", {}).get("backpressure")),
            "counters": dict(node.counters()) if mine else {},
        }

    async def page_of_gone(self, text: str) -> dict[str, Any]:
        """The page of a node that died and is out of view, by its name or id or the beginning of one, as long as its
        tombstone is kept. Refused `unknown` where there is none, `gone` where nobody holds anything of it."""
        stones = [stone for stone in self._node.swim.tombstones.values() if not stone.final]
        known = sorted(stones, key=lambda stone: (text in (stone.name, id_text(stone.record.id)), stone.at))
        named = [s for s in known if s.name.startswith(text) or id_text(s.record.id).startswith(text)]
        if not text or not named:
            raise Refused("unknown", f"{text}: no node of that name died in the view of {self._node.name}")
        last = named[-1]
        member = Member(
            last.record, last.signed, State.DEAD, last.at, last.at, last.at, last.evidence, last.by
        )
        page = await self.page_of_dead(member)
        if "last_vitals" not in page and (why := self.gone(member.id)):
            raise why
        return page

    async def page_of_dead(self, member: Member) -> dict[str, Any]:
        """The page of a node that is dead in this view: its last, read from a replica of its own chain."""
        page, text = self.page(member), id_text(member.id)
        node = self._node
        try:
            last = await node.chains.latest(member.id)
        except Refused:
            return page
        box, source = last["page"], node.name_of(int(last["source"], 16))
        who = {"node": page["node"].get("name"), "node_id": text, "mesh": node.settings.mesh}
        now = wall_ms()
        page["daemons"] = [
            {**dict.fromkeys(DAEMON_LIVE_KEYS), **daemon, **who} | {"age_ms": max(0, now - daemon["at_ms"])}
            for daemon in box["daemons"]
        ]
        page["recent_failures"] = [
            {**failure, "age_ms": max(0, now - failure["at_ms"])} for failure in box["failures"]
        ]
        me = {"kind": "node.state_changed", "node": who["node"], "mesh": who["mesh"], "id": text}
        moves = [{**dict.fromkeys(KEYS), **move, **me} for move in box["trail"]]
        seen = [e for e in page["why"] if e["kind"] not in OWN_WORD or e["to"] == State.DEAD.word]
        page["why"] = sorted([*moves, *seen], key=lambda event: event["at_ms"])[-WHY_EVENTS:]
        page["last_vitals"] = box["vitals"]
        page["answered_by"] = page["told_by"] = source
        page["age_ms"] = last["age_ms"]
        return page

    def daemons(self) -> list[dict[str, Any]]:
        """This node's own daemons: as the engine sees them, and what their processes tell."""
        node = self._node
        supervisor = node.engine.daemons
        specs = {daemon.name: daemon.resources for daemon in node.wanted.spec.daemon}
        rows = []
        for seen in node.engine_document()["daemons"]:
            name = seen["name"]
            if seen["intent"] is None and seen["state"] == "stopped":
                continue  # it was here once, and nobody wants it any more
            facts = supervisor.facts(name)
            rows.append(
                {
                    **{
                        key: seen[key]
                        for key in ("name", "state", "health", "reason", "saturation", "restarts")
                    },
                    "health": seen["health"] or (facts.health and facts.health.value),
                    "until_ms": seen["until_in_ms"],
                    "pid": facts.pid,
                    "age_ms": seen["age_ms"],
                    "node": node.name,
                    "node_id": id_text(node.identity.id),
                    "mesh": node.settings.mesh,
                    "intent": seen["intent"],
                    "held_back": seen["held_back"],
                    "status": facts.status or None,
                    "resources": (needs := specs.get(name) or node.wanted.required(name))
                    and msgspec.to_builtins(needs),
                }
            )
        return rows

    def failures(self) -> list[dict[str, Any]]:
        """This node's own ring of failures, oldest first. The same failure has the same time in every answer, unless the
        wall clock was set meanwhile."""
        node, loop = self._node, self._node.engine.loop
        began_ms = wall_ms() - loop.now_ms()
        if abs(began_ms - self._began_ms) > CLOCK_SET_MS:
            self._began_ms = began_ms
        ring = zip(loop.snapshot.recent_failures, node.engine_document()["recent_failures"], strict=True)
        return [
            {
                "at_ms": self._began_ms + record.at_ms,
                **{key: failure[key] for key in ("age_ms", "source", "action", "target", "reason")},
                "retry_after_ms": failure["retry_after_ms"],
                "until_ms": failure["until_in_ms"],
                "node": node.name,
                "node_id": id_text(node.identity.id),
                "mesh": node.settings.mesh,
                "from_replica": None,
            }
            for record, failure in ring
        ]

    def resolve(self, text: str) -> dict[str, Any]:
        """What a name, an id or a unique prefix of either means here; an exact one wins over a prefix.

        Refused: `unknown`, `ambiguous` (with the candidates), `gone` (known only by its tombstone)."""
        node = self._node
        members: list[Member] = [node.swim.me, *node.swim.members.values()]
        members += [member for listing, member in node.meshes.remotes() if not listing.expired]
        found = [m for m in members if text in (m.record.name, id_text(m.id))]
        live = [m for m in found if m.present] or found
        if not found:
            for member_id, name in self._departed():
                if text in (name, id_text(member_id)) and (why := self.gone(member_id)):
                    raise why
            live = [m for m in members if m.record.name.startswith(text) or id_text(m.id).startswith(text)]
        if text and len(live) == 1:
            member = live[0]
            return {
                "id": id_text(member.id),
                "name": member.record.name,
                "mesh": member.record.mesh,
                "kind": member.record.kind,
                "state": member.state.word,
            }
        if text and live:
            names = Counter(m.record.name for m in live)
            raise _ambiguous(
                text, [m.record.name if names[m.record.name] == 1 else id_text(m.id) for m in live]
            )
        faded = [
            (name, member_id)
            for member_id, name in self._departed()
            if name.startswith(text) or id_text(member_id).startswith(text)
        ]
        if text and len({name for name, _ in faded}) > 1:
            raise _ambiguous(text, [name for name, _ in faded])
        if text and faded and (why := self.gone(faded[-1][1])):
            raise why
        raise Refused("unknown", f"{text}: no such node in the view of {node.name}")

    def _departed(self) -> list[tuple[int, str]]:
        """(id, name) of who is known by a tombstone only, the last to go last."""
        swim, meshes = self._node.swim, self._node.meshes
        own = [(t.at, member_id, t.name) for member_id, t in swim.tombstones.items()]
        other = [(at, member_id, name) for member_id, (name, _, at) in meshes.gone.items()]
        return [(member_id, name) for _, member_id, name in sorted(own + other)]

    def gone(self, member_id: int) -> Refused | None:
        """Why a node that is known only by its tombstone can't be reached, or None when there is no tombstone."""
        tombstone = self._node.swim.tombstones.get(member_id)
        if tombstone is None:
            text = self._node.meshes.gone_text(member_id)
            return Refused("gone", text) if text is not None else None
        ago = f"{max(0, round(time.monotonic() - tombstone.at))} s ago"
        if tombstone.evidence is Evidence.LEFT:
            return Refused("gone", f"{tombstone.name}: said goodbye {ago}")
        return Refused(
            "gone", f"{tombstone.name}: dead, evicted from view; {EVIDENCE_TEXT[tombstone.evidence]}"
        )

    def checks(self) -> list[dict[str, Any]]:
        """What `qd doctor` asks this node about itself."""
        node = self._node
        fresh = self.disk_build == node.build
        problems = node.operators.problems
        listed = node.meshes.listed.problems
        backbone = node.meshes.backbone
        return [
            {
                "what": "code",
                "ok": fresh,
                "text": f"runs build {node.build}"
                + ("" if fresh else f", stale: the disk holds {self.disk_build}; `qd update {node.name}`"),
            },
            {"what": "clock", "ok": None, "text": "wall clock", "wall_ms": wall_ms()},
            {
                "what": "operators",
                "ok": not problems,
                "text": "; ".join(str(p) for p in problems) or "authorized_operators reads well",
            },
            {
                "what": "meshes",
                "ok": not listed,
                "text": "; ".join(listed) or f"sees {', '.join(node.meshes.known())}",
            },
            {
                "what": "backbone",
                "ok": None if not node.meshes.candidate else backbone.well,
                "text": backbone.text,
            },
            {
                "what": "chains",
                "ok": not (damage := node.chains.problems()),
                "text": "; ".join(damage) or "chains intact",
            },
            {
                "what": "journal",
                "ok": not node.journal.problems,
                "text": "; ".join(node.journal.problems) or "journal intact",
            },
        ]


def _ambiguous(text: str, names: list[str]) -> Refused:
    several = sorted(set(names))
    more = f" and {len(several) - CANDIDATES_SHOWN} more" if len(several) > CANDIDATES_SHOWN else ""
    return Refused(
        "ambiguous", f"{text}: means {', '.join(several[:CANDIDATES_SHOWN])}{more}; write more of it"
    )
