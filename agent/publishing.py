"""A mesh in one message, told to the other meshes by the node that holds the lease: made, signed and handed to the
backbone at each renewal, and sooner when a node comes, goes or changes its state."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from agent.meshrows import summary_load
from discovery.directory import material
from discovery.summary import SignedSummary, Summary, pack, seal_summary

if TYPE_CHECKING:
    from agent.meshes import Meshes
    from agent.node import Node

SUMMARY_TTL_MS = 8_000
"""Longer than a claim on the lease by what a takeover may take, so that no view sees the mesh expire meanwhile."""
HOLD_AGAIN_S = 0.3
BEHIND_S = 6.0
"""A higher epoch of the own mesh that nobody renews for this long is a memory of others, and is gone beyond."""
PUBLISH_GAP_S = 1.0
"""A change of the counts is published at once, but not more often than this."""


class Publishing:
    """What this node publishes of its mesh while it holds the lease."""

    def __init__(self, node: Node, meshes: Meshes) -> None:
        self._node = node
        self._meshes = meshes
        self._summary: SignedSummary | None = None
        self._summary_at = 0.0
        self._told: Summary | None = None
        """The last summary that said something new."""
        self._published_at = 0.0
        self._renewal = 0
        self._others = (0, 0)
        self._others_at = time.monotonic()
        """Epoch and renewal of the newest summary of this mesh that others hold, and when it was first heard of."""
        self._task: asyncio.Task[None] | None = None

    @property
    def newest(self) -> tuple[SignedSummary, float] | None:
        """What was published last, and its age in seconds; None while another node publishes."""
        return None if self._summary is None else (self._summary, time.monotonic() - self._summary_at)

    def document(self) -> dict[str, Any]:
        """The newest for the wire: `{summary, age_ms}`; empty while another node publishes."""
        if self._summary is None:
            return {}
        return {"summary": pack(self._summary), "age_ms": round((time.monotonic() - self._summary_at) * 1000)}

    def may_take(self, holder: int, epoch: int) -> bool:
        """Whether the lease's entry in NATS may be taken from that node before it runs out: the mesh's own pool, in
        which that node is or was, has given the lease to this one."""
        swim, lease = self._node.swim, self._meshes.lease
        known = holder in swim.members or holder in swim.tombstones
        return lease.mine and known and epoch < lease.epoch

    def remembered(self, order: tuple[int, int], now: float) -> None:
        """Epoch and renewal of the newest summary of this mesh that others hold: what is published next goes above."""
        lease = self._meshes.lease
        if order != self._others:
            self._others, self._others_at = order, now
        if order > (lease.epoch, self._renewal):
            lease.floor(order[0], now)
            if lease.mine and order[0] == lease.epoch:
                self._renewal = max(self._renewal, order[1])

    def withdraw(self) -> None:
        """Another node holds the lease now."""
        self._summary = self._told = None
        self._meshes.backbone.withdraw()

    def publish(self) -> None:
        """Publishes now, unless that is under way."""
        if self._task is None or self._task.done():
            self._task = self._node.spawn(self._publish(self._meshes.lease.epoch))

    def look(self) -> None:
        """Publishes soon when the counts are no longer those that were told: others should know before the next renewal."""
        if not self._meshes.lease.mine or self._told is None or self._counts() == self._told.counts:
            return
        wait = self._published_at + PUBLISH_GAP_S - time.monotonic()
        if wait <= 0:
            self.publish()
        else:
            asyncio.get_running_loop().call_later(wait, self._meshes.flush_soon)

    async def _publish(self, epoch: int) -> None:
        meshes = self._meshes
        lease, backbone = meshes.lease, meshes.backbone
        if meshes.identity is None or not lease.mine:
            return
        if self._others[0] > epoch and time.monotonic() - self._others_at > BEHIND_S:
            meshes.claim_anew()
            return
        while not (held := await backbone.hold(epoch)) and lease.mine and lease.epoch == epoch:
            lease.published(False, time.monotonic())
            meshes.flush_soon()
            await asyncio.sleep(HOLD_AGAIN_S)
        now = time.monotonic()
        lease.published(held, now)
        if held and lease.mine:
            self._renewal += 1
            summary = self._make(epoch, meshes.identity.pub)
            urgent = self._told is None or material(self._told, summary)
            self._told = summary if urgent else self._told
            self._published_at = now
            self._summary, self._summary_at = seal_summary(summary, meshes.identity.sign), now
            backbone.publish(self._summary, urgent=urgent)
            meshes.telling.own.wake()
        meshes.flush_soon()

    def _make(self, epoch: int, mesh_pub: bytes) -> Summary:
        swim, record = self._node.swim, self._node.swim.me.record
        cpu, mem = summary_load([swim.me, *swim.members.values()])
        return Summary(
            mesh=record.mesh,
            mesh_pub=mesh_pub,
            epoch=epoch,
            renewal=self._renewal,
            publisher=record.pub,
            publisher_name=record.name,
            addrs=record.addrs,
            host=record.host,
            counts=self._counts(),
            cpu=cpu,
            mem=mem,
            version=self._meshes.telling.version,
            ttl_ms=SUMMARY_TTL_MS,
        )

    def _counts(self) -> dict[Any, int]:
        swim = self._node.swim
        return dict(Counter(m.state for m in (swim.me, *swim.members.values())))
