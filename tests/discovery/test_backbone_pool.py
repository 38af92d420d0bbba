"""The embedded backbone with real sockets on the loopback: who is told what, and how soon."""

from __future__ import annotations

import asyncio
import time
from statistics import median

import pytest

from discovery.errors import RemoteError
from discovery.identity import Identity
from discovery.lifecycle import Evidence, State
from discovery.summary import LEASE_TOPIC, SUMMARY_TOPIC, SignedSummary, pack
from discovery.swim import Evicted, Joined
from tests.discovery.ports import Place, Site, join, mesh_pool, summary, until

WITHIN_S = 0.05
"""A published summary is at every member of a LAN by then."""


async def meet(*sites: Site) -> None:
    """Each is told of the one before it only."""
    for site, known in zip(sites[1:], sites, strict=False):
        site.backbone.greet([known.addr])
    await until(lambda: all(site.sees(*(o for o in sites if o is not site)) for site in sites))
    await until(lambda: all(site.backbone.swim.synced for site in sites))


def close(*sites: Site) -> None:
    for site in sites:
        site.close()


def test_backbone_beside_mesh_pools_packets_never_cross() -> None:
    async def scenario() -> None:
        sites = [Site(mesh) for mesh in ("alpha", "alpha", "beta")]
        pools = [
            mesh_pool(site.place, site.backbone.mesh, site.backbone.mesh.encode().ljust(32)) for site in sites
        ]
        join(pools[1], sites[0].addr)
        join(pools[2], sites[0].addr)
        await meet(*sites)
        await until(lambda: bool(pools[0].swim.members and pools[1].swim.members))
        assert set(pools[0].swim.members) == {pools[1].swim.me.id}
        assert not pools[2].swim.members
        assert [sites[0].backbone.mesh_of(m) for m in sites[2].backbone.members.values()] == [
            "alpha",
            "alpha",
        ]
        assert all(m.record.mesh == "backbone" for m in sites[2].backbone.members.values())
        for site, pool in zip(sites, pools, strict=True):
            assert site.place.port.counters.keys() <= {"unknown_key"}
            assert not {"wrong_mesh", "malformed", "second_key"} & (
                pool.swim.counters.keys() | site.backbone.counters.keys()
            )
            pool.close()
        assert not sites[1].place.port.counters
        close(*sites)

    asyncio.run(scenario())


def test_members_known_through_others_meet_within_two_seconds() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, c = (Site(mesh, sites) for mesh in ("alpha", "beta", "gamma"))
        b.backbone.greet([a.addr])
        await until(lambda: a.sees(b) and b.sees(a))
        c.backbone.greet([b.addr])
        took = await until(lambda: a.sees(b, c) and c.sees(a, b))
        await until(lambda: a.backbone.members[c.id].addr == c.addr)
        assert took < 2.0
        close(a, b, c)

    asyncio.run(scenario())


def test_two_parts_joined_by_one_greeting_become_one() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, c, d = (Site(mesh, sites) for mesh in ("alpha", "alpha", "beta", "beta"))
        await asyncio.gather(meet(a, b), meet(c, d))
        a.backbone.greet([c.addr])
        took = await until(lambda: a.sees(b, c, d) and d.sees(a, b, c))
        assert took < 2.0
        close(a, b, c, d)

    asyncio.run(scenario())


def test_greeting_whose_answer_is_lost_is_made_again() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, late = Site("alpha", sites), Site("alpha", sites), Place()
        await meet(a, b)
        a.backbone.greet([late.addr, a.addr])
        await asyncio.get_running_loop().sock_recv(late.udp, 2048)
        c = Site("beta", sites, place=late)
        took = await until(lambda: a.sees(b, c))
        assert took < 2.0
        close(a, b, c)

    asyncio.run(scenario())


def test_published_summary_is_at_every_member_at_once() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, *others = (Site(mesh, sites) for mesh in ("alpha", "alpha", "beta", "beta", "gamma"))
        await meet(a, *others)
        took = []
        for epoch in range(1, 8):
            a.backbone.publish(summary("alpha", epoch), age_s=0.5)
            took.append(await until(lambda: all(o.knows("alpha", epoch, 1) for o in others)))  # noqa: B023
        assert median(took) < WITHIN_S
        mesh, _, _, age_s, addr = others[0].heard[0]
        assert mesh == "alpha" and 0.5 <= age_s < 1.0
        assert addr in {site.addr for site in (a, *others)}
        close(a, *others)

    asyncio.run(scenario())


def test_summary_that_its_publisher_could_not_tell_is_passed_on() -> None:
    """The publisher knows one member only; that one tells the third, with its age."""

    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, c = (Site(mesh, sites) for mesh in ("alpha", "beta", "gamma"))
        await meet(b, c)
        b.backbone.swim.spread(SUMMARY_TOPIC, "alpha", pack(summary("alpha")), time.monotonic(), 3.0)
        b.backbone.pool.flush()
        await until(lambda: c.knows("alpha"))
        assert 3.0 <= c.heard[0][3] < 4.0 and c.heard[0][4] == b.addr
        close(a, b, c)

    asyncio.run(scenario())


def test_renewal_reaches_the_chosen_and_goes_no_further() -> None:
    async def scenario() -> None:
        a, b, c = (
            Site(mesh) for mesh in ("alpha", "beta", "gamma")
        )  # no push/pull, which carries renewals too
        await meet(a, b, c)
        a.backbone.publish(summary("alpha", 1, 1))
        await until(lambda: b.knows("alpha", 1, 1) and c.knows("alpha", 1, 1))
        for renewal in range(2, 20):
            a.backbone.renew(summary("alpha", 1, renewal), [b.id, 12345])
        await until(lambda: b.knows("alpha", 1, 19))
        b.backbone.publish(summary("beta", 1, 1))  # would carry along what else b has to say
        await until(lambda: c.knows("beta"))
        assert c.knows("alpha", 1, 1)
        close(a, b, c)

    asyncio.run(scenario())


def test_newcomer_is_told_the_summaries_without_waiting_for_a_renewal() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, c = (Site(mesh, sites) for mesh in ("alpha", "beta", "gamma"))
        await meet(a, b)
        for site, mesh in ((a, "alpha"), (b, "beta")):
            site.take(summary(mesh, 3), 0.0, time.monotonic(), None)
            site.backbone.publish(summary(mesh, 3))
        c.backbone.greet([a.addr])
        took = await until(lambda: c.knows("alpha", 3, 1) and c.knows("beta", 3, 1))
        assert took < 0.5
        close(a, b, c)

    asyncio.run(scenario())


def test_newcomer_without_push_pull_is_told_by_each_publisher() -> None:
    async def scenario() -> None:
        a, c = Site("alpha"), Site("gamma")  # neither can call the other
        a.backbone.publish(summary("alpha", 3), age_s=2.0)
        c.backbone.greet([a.addr])
        await until(lambda: c.knows("alpha", 3, 1))
        assert c.heard[0][3] >= 2.0
        close(a, c)

    asyncio.run(scenario())


@pytest.mark.parametrize("withdrawn", [False, True])
def test_newcomer_is_not_told_a_summary_past_its_time_or_withdrawn(withdrawn: bool) -> None:
    async def scenario() -> None:
        a, b, c = Site("alpha"), Site("beta"), Site("gamma")
        a.backbone.publish(summary("alpha", 4), age_s=0.0 if withdrawn else 6.0)
        if withdrawn:
            a.backbone.withdraw()
        b.backbone.publish(summary("beta"))
        a.backbone.greet([b.addr])
        await until(lambda: a.sees(b) and b.sees(a) and a.knows("beta"))
        c.backbone.greet([b.addr])
        await until(lambda: c.sees(a, b) and c.knows("beta"))
        assert not b.heard and not c.knows("alpha")
        close(a, b, c)

    asyncio.run(scenario())


def test_goodbye_is_known_on_the_backbone_at_once() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, c = (Site(mesh, sites) for mesh in ("alpha", "beta", "gamma"))
        await meet(a, b, c)
        a.backbone.leave()
        took = await until(lambda: b.sees(c) and c.sees(b))
        assert took < 0.25
        (gone,) = [e for e in b.effects if isinstance(e, Evicted)]
        assert gone.id == a.id and gone.evidence is Evidence.LEFT
        await asyncio.wait_for(a.backbone.left.wait(), 1.0)
        heard = len(b.heard)
        a.backbone.publish(summary("alpha", 9))
        a.backbone.renew(summary("alpha", 9, 2), [b.id])
        a.close()
        b.backbone.publish(summary("beta"))
        await until(lambda: c.knows("beta"))
        assert len(b.heard) == heard and not b.knows("alpha")
        close(b, c)

    asyncio.run(scenario())


def test_member_started_anew_replaces_its_former_self_and_is_told_again() -> None:
    async def scenario() -> None:
        a, b = Site("alpha"), Site("beta")
        await meet(a, b)
        a.backbone.publish(summary("alpha", 2))
        await until(lambda: b.knows("alpha"))
        addr, identity, place = b.addr, b.identity, b.place
        b.backbone.close()  # no goodbye
        again = Site("beta", place=place, identity=identity, incarnation=2)
        again.backbone.greet([a.addr])
        await until(lambda: again.knows("alpha", 2, 1))
        row = a.backbone.members[identity.id]
        assert (row.record.incarnation, row.state, again.addr) == (2, State.ALIVE, addr)
        assert len([e for e in a.effects if isinstance(e, Joined)]) == 1
        close(a, again)

    asyncio.run(scenario())


def test_member_whose_incarnation_was_lost_takes_a_higher_one_and_persists_it() -> None:
    async def scenario() -> None:
        a, b = Site("alpha"), Site("beta", incarnation=5)
        await meet(a, b)
        b.backbone.leave()
        await until(lambda: not a.backbone.members)
        b.backbone.close()
        again = Site("beta", place=b.place, identity=b.identity, incarnation=1)
        again.backbone.greet([a.addr])
        await until(lambda: again.sees(a) and a.sees(again))
        assert again.persisted == [6]
        close(a, again)

    asyncio.run(scenario())


def test_backbone_stopped_and_started_leaves_the_mesh_pool_alone() -> None:
    async def scenario() -> None:
        a, b = Site("alpha"), Site("alpha")
        pools = [mesh_pool(site.place, "alpha", b"m" * 32) for site in (a, b)]
        join(pools[1], a.addr)
        await meet(a, b)
        await until(lambda: bool(pools[0].swim.members and pools[1].swim.members))
        b.backbone.leave()
        b.backbone.close()
        version = pools[1].swim.me.record.version
        pools[1].swim.update_self(time.monotonic(), cordoned=True)
        pools[1].flush()
        await until(lambda: pools[0].swim.members[pools[1].swim.me.id].record.version > version)
        await until(lambda: not a.backbone.members)
        again = Site("alpha", place=b.place, identity=b.identity, incarnation=2)
        again.backbone.greet([a.addr])
        await until(lambda: a.sees(again) and again.sees(a))
        assert not b.place.port.counters["forged"]
        for pool in pools:
            pool.close()
        close(a, again)

    asyncio.run(scenario())


def test_member_with_another_key_is_never_met() -> None:
    async def scenario() -> None:
        a, b, stranger = Site("alpha"), Site("beta"), Site("gamma", key=b"x" * 32)
        stranger.backbone.greet([a.addr])
        await meet(a, b)
        await until(lambda: a.place.port.counters["unknown_key"] > 0)
        assert a.sees(b) and not stranger.backbone.members
        close(a, b, stranger)

    asyncio.run(scenario())


def test_process_that_vanished_is_found_by_its_closed_link() -> None:
    async def scenario() -> None:
        sites: dict[int, Site] = {}
        a, b, c = (Site(mesh, sites) for mesh in ("alpha", "beta", "gamma"))
        await meet(a, b, c)
        await until(lambda: all(s.backbone.members[c.id].addr for s in (a, b)))
        c.close()
        a.backbone.link_closed(c.id)
        await until(lambda: a.backbone.members[c.id].state is State.DEAD)
        assert a.backbone.members[c.id].evidence is Evidence.EXITED
        close(a, b)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "topic, subject, body",
    [
        (SUMMARY_TOPIC, "alpha", b"nonsense"),
        (SUMMARY_TOPIC, "beta", pack(summary("alpha"))),
        (SUMMARY_TOPIC, "alpha", pack(SignedSummary(b"\x90", bytes(64)))),
        (LEASE_TOPIC, "alpha", pack(summary("alpha"))),
    ],
)
def test_note_that_is_no_summary_of_its_mesh_is_dropped(topic: int, subject: str, body: bytes) -> None:
    async def scenario() -> None:
        a, b = Site("alpha"), Site("beta")
        await meet(a, b)
        a.backbone.swim.send_note([b.id], topic, subject, body, time.monotonic())
        a.backbone.publish(summary("alpha", 2))
        await until(lambda: b.knows("alpha", 2, 1))
        assert b.backbone.counters["bad_summary"] == (topic == SUMMARY_TOPIC)
        assert all(epoch == 2 for _, epoch, *_ in b.heard)
        close(a, b)

    asyncio.run(scenario())


def test_publishing_what_is_no_summary_is_refused_and_tells_nobody() -> None:
    async def scenario() -> None:
        a = Site("alpha")
        with pytest.raises(RemoteError):
            a.backbone.publish(SignedSummary(b"\x90", bytes(64)))
        with pytest.raises(RemoteError):
            a.backbone.renew(SignedSummary(b"", bytes(64)), [])
        close(a)

    asyncio.run(scenario())


def test_push_pull_carries_no_more_than_one_answer_holds() -> None:
    async def scenario() -> None:
        a = Site("alpha")
        lines = [("127.0.0.1", 1)] * 8
        for n in range(300):
            a.held[f"m{n}"] = summary("alpha", n, addrs=lines, publisher_name="n" * 120), time.monotonic()
        b = Site("beta")
        await meet(a, b)
        request = a.backbone.push_pull_request()
        assert 30_000 < len(request) < 100_000
        assert b.backbone.push_pull_answer(request, a.id) != b"\x90"
        assert len(b.heard) > 100
        close(a, b)

    asyncio.run(scenario())


def test_update_of_oneself_is_seen_by_the_others() -> None:
    async def scenario() -> None:
        a, b = Site("alpha"), Site("beta", identity=Identity.generate())
        await meet(a, b)
        b.backbone.update_self(state=State.UPDATING, deadline_ms=120_000)
        await until(lambda: a.backbone.members[b.id].state is State.UPDATING)
        close(a, b)

    asyncio.run(scenario())


def test_summary_of_another_mesh_told_to_one_member_comes_with_its_age_and_goes_no_further() -> None:
    async def scenario() -> None:
        a, b, c = (Site(mesh) for mesh in ("alpha", "beta", "gamma"))
        await meet(a, b, c)
        a.backbone.tell(b.id, summary("beta", 7), age_s=4.0)
        await until(lambda: b.knows("beta", 7, 1))
        assert b.heard[0][3] >= 4.0 and b.heard[0][4] == a.addr
        b.backbone.publish(summary("beta", 8))
        await until(lambda: c.knows("beta", 8, 1))
        assert [epoch for _, epoch, *_ in c.heard if epoch != 8] == []
        close(a, b, c)

    asyncio.run(scenario())
