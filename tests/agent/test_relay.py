"""Nodes that can't dial each other meet through a gateway, prove their keys to each other, and can go nowhere else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from agent import openlinks, reach
from agent.contacts import Contacts
from agent.racing import NoneWorked, first_of, shared
from agent.reach import Reach, relays_among
from agent.relay import Relay, RelayLimits
from discovery.errors import Refused, Unreachable
from discovery.identity import Identity, id_text, node_id, raw_ed25519
from discovery.lifecycle import State
from discovery.links import Link, Listener, Login, Tunnel, dial
from discovery.links.limits import LoginKind
from discovery.member import Addr, Member, Record, SignedRecord
from discovery.pool import Pool
from tests.discovery.loopback import bound, until


class Gossip:
    """What contacts tell a pool of, and who its members are."""

    def __init__(self) -> None:
        self.swim = self
        self.members: dict[int, Member] = {}
        self.counters: Counter[str] = Counter()
        self.heard: list[tuple[str, int]] = []

    def link_answered(self, node: int, now: float) -> None:
        self.heard.append(("answered", node))

    def link_opened(self, node: int, addr: Addr, now: float) -> None:
        self.heard.append(("opened", node))

    def link_closed(self, node: int, now: float) -> None:
        self.heard.append(("closed", node))

    def greet(self, node: int, now: float) -> None:
        self.heard.append(("greeted", node))

    def flush(self) -> None: ...


@dataclass
class World:
    """Who knows whom, and who can dial whom: everybody everybody, but for pairs in `apart`."""

    stations: dict[str, Station] = field(default_factory=dict)
    apart: set[tuple[str, str]] = field(default_factory=set)
    wrong: dict[tuple[str, str], list[Addr]] = field(default_factory=dict)
    """Addresses at which one finds another instead of the true ones."""

    def part(self, *pairs: tuple[str, str]) -> None:
        self.apart |= {*pairs, *((b, a) for a, b in pairs)}


class Station:
    """A node as far as links go: a listener, contacts, a relay, and its reach."""

    def __init__(self, world: World, name: str, mesh: str, kind: str, limits: RelayLimits | None) -> None:
        self.world, self.name, self.mesh, self.kind = world, name, mesh, kind
        self.identity = Identity.from_seed(name.encode().ljust(32, b"-"))
        self.mesh_identity = Identity.from_seed(b"mesh of " + mesh.encode().ljust(24, b"-"))
        self.gossip = Gossip()
        self.listed = {"alpha", "beta", "gamma"}
        self.strangers: set[str] = set()
        self.state = State.ALIVE
        self.relay = Relay(
            name=name,
            mesh=mesh,
            find=self.find,
            usable_addrs=self.usable_addrs,
            may_relay=lambda: kind in ("gateway", "console"),
            held=lambda node: self.contacts.open_to(node),
            take=lambda sock, addr: self.listener.take(sock, addr),
            limits=limits,
        )
        methods = {"who": self.who, "hello": self.who, "hang": self.hang, **self.relay.methods()}
        methods["by_relay"] = self.by_relay
        self.methods = methods
        pool = cast("Pool", self.gossip)
        self.contacts = Contacts(pool, self.identity, methods, self.usable_addrs)
        self.reach = Reach(
            me=self.identity.id,
            mesh=mesh,
            identity=self.identity,
            mesh_identity=lambda: self.mesh_identity,
            contacts=self.contacts,
            usable_addrs=self.usable_addrs,
            relays=lambda mesh: relays_among(
                s.member for s in world.stations.values() if s.mesh == mesh and s is not self
            ),
            methods=methods,
        )

    async def start(self) -> None:
        sock = bound()
        self.addr: Addr = sock.getsockname()
        self.listener = await Listener.start(
            sock,
            host_key=self.identity,
            authorise=self.authorise,
            methods=self.methods,
            on_link=lambda link: self.contacts.adopt(link) if link.login.kind == "member" else None,
        )
        self.world.stations[self.name] = self
        for station in self.world.stations.values():
            for other in self.world.stations.values():
                if other is not station and other.mesh == station.mesh:
                    station.gossip.members[other.member.id] = other.member

    async def close(self) -> None:
        for room in (self.reach, self.contacts, self.relay, self.listener):
            await room.close()

    @property
    def member(self) -> Member:
        record = Record(
            pub=self.identity.pub,
            mesh=self.mesh,
            name=self.name,
            kind=self.kind,
            incarnation=1,
            version=1,
            state=State.ALIVE,
            addrs=[self.addr],
        )
        now = time.monotonic()
        return Member(
            record, SignedRecord(b"", bytes(64)), self.state, since=now, last_seen=now, received=now
        )

    def find(self, node: int) -> Member | None:
        others = (s.member for s in self.world.stations.values() if s is not self)
        return next((m for m in others if m.id == node), None)

    def usable_addrs(self, member: Member) -> list[Addr]:
        pair = (self.name, member.record.name)
        if pair in self.world.wrong:
            return self.world.wrong[pair]
        return [] if pair in self.world.apart else list(member.record.addrs)

    def authorise(self, key_line: str, username: str, addr: Addr) -> Login | None:
        pub = raw_ed25519(base64.b64decode(key_line.split()[1]))
        assert pub is not None
        for station in self.world.stations.values():
            if station.name in self.strangers:
                continue
            if username == "member" and station.identity.pub == pub and station.mesh == self.mesh:
                return Login("member", node_id(pub), pub, f"of {station.name}", None, key_line)
            if username == "mesh" and station.mesh_identity.pub == pub and station.mesh in self.listed:
                return Login("mesh", None, pub, f"of {station.mesh}", "observe", key_line)
        if username in ("home", "op", "backbone", "join"):
            kind = cast("LoginKind", username)
            return Login(kind, None, pub, "of a person", "observe" if kind == "op" else None, key_line)
        return None

    async def who(self, link: Link, params: Any) -> Any:
        return [self.name, link.login.kind, link.login.fingerprint]

    async def by_relay(self, link: Link, params: Any) -> Any:
        self.reach.came_by_relay(link)

    async def hang(self, link: Link, params: Any) -> Any:
        await asyncio.sleep(params)
        return "late"


@contextlib.asynccontextmanager
async def world(*names: str, limits: RelayLimits | None = None) -> AsyncIterator[Any]:
    """Stations named like `beta-gateway` or `alpha-node-2`: mesh, kind, and what else is needed."""
    made = World()
    stations = [Station(made, name, *name.split("-")[:2], limits) for name in names]
    for station in stations:
        await station.start()
    try:
        yield made, *stations
    finally:
        for station in stations:
            await station.close()


async def answer_of(caller: Station, target: Station) -> tuple[Any, str]:
    return await caller.reach.call(target.member, "who", {}, 3.0)


# --- routes


def test_member_that_can_be_dialled_is_reached_direct() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "beta-node") as (_, a, _, b):
            assert await answer_of(a, b) == (["beta-node", "mesh", "of alpha"], "direct")
            gateway = a.world.stations["alpha-gateway"]
            assert await answer_of(a, gateway) == (["alpha-gateway", "member", "of alpha-node"], "direct")
            assert gateway.member.id in [node for what, node in a.gossip.heard if what == "answered"]

    asyncio.run(run())


def test_member_without_a_route_is_reached_through_its_meshes_gateway() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (w, caller, gateway, target):
            w.part(("alpha-node", "alpha-far"))
            assert await answer_of(caller, target) == (["alpha-far", "member", "of alpha-node"], "relay")
            assert gateway.relay.counts["relayed"] == gateway.relay.counts["tunnels"] == 1
            link, via = await caller.reach.link_to(target.member)
            assert via == "relay" and caller.reach.relay_of(link).record.name == "alpha-gateway"
            assert ("answered", target.member.id) in caller.gossip.heard
            await link.close()
            await until(lambda: gateway.relay.counts["tunnels"] == 0)
            assert caller.reach.relay_of(link) is None

    asyncio.run(run())


def test_node_of_another_mesh_is_reached_through_that_meshes_gateway() -> None:
    async def run() -> None:
        async with world("alpha-node", "beta-gateway", "beta-far") as (w, caller, gateway, target):
            w.part(("alpha-node", "beta-far"))
            assert await answer_of(caller, target) == (["beta-far", "mesh", "of alpha"], "relay")
            assert gateway.relay.counts["relayed"] == 1

    asyncio.run(run())


def test_node_of_another_mesh_out_of_all_reach_is_met_through_the_own_gateway() -> None:
    async def run() -> None:
        names = ("alpha-node", "alpha-gateway", "beta-gateway", "beta-far")
        async with world(*names) as (w, caller, gateway, foreign, target):
            w.part(("alpha-node", "beta-far"), ("alpha-node", "beta-gateway"))
            assert await answer_of(caller, target) == (["beta-far", "mesh", "of alpha"], "relay")
            assert gateway.relay.counts["relayed"] == 1 and foreign.relay.counts["relayed"] == 0

    asyncio.run(run())


def test_node_that_only_dials_out_is_reached_back_over_the_link_that_it_holds() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-nat") as (w, caller, gateway, target):
            w.part(("alpha-node", "alpha-nat"))
            w.apart.add(("alpha-gateway", "alpha-nat"))
            target.contacts.keep_gateway((gateway.member.id,))
            await until(lambda: gateway.contacts.open_to(target.member.id) is not None)
            await until(lambda: target.contacts.gateway == gateway.member.id)
            assert await answer_of(caller, target) == (["alpha-nat", "member", "of alpha-node"], "relay")
            assert target.relay.counts["arrived"] == 1
            (accepted,) = [x for x in target.listener.links if x.login.kind == "member"]
            assert accepted.addr == gateway.addr

    asyncio.run(run())


@pytest.mark.parametrize("nat", [False, True])
def test_call_back_over_a_link_that_came_by_a_relay_says_relay(nat: bool) -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (w, caller, gateway, target):
            w.part(("alpha-node", "alpha-far"))
            if nat:
                w.apart.add(("alpha-gateway", "alpha-far"))
                await target.contacts.link_to(gateway.member)
                await until(lambda: gateway.contacts.open_to(target.member.id) is not None)
            assert (await answer_of(caller, target))[1] == "relay"
            await until(lambda: target.contacts.open_to(caller.member.id) is not None)
            (who, *_), route = await answer_of(target, caller)
            assert (who, route) == ("alpha-node", "relay")
            assert target.reach.counts["relayed"] == 0  # it is the caller's link, not one more
            assert (await answer_of(target, gateway))[1] == "direct"

    asyncio.run(run())


def test_relay_that_dialled_a_wrong_host_finds_the_node_over_the_link_that_it_holds() -> None:
    async def run() -> None:
        names = ("alpha-node", "alpha-gateway", "alpha-nat", "alpha-other")
        async with world(*names) as (w, caller, gateway, target, other):
            w.part(("alpha-node", "alpha-nat"))
            w.wrong["alpha-gateway", "alpha-nat"] = [other.addr]
            target.contacts.keep_gateway((gateway.member.id,))
            await until(lambda: gateway.contacts.open_to(target.member.id) is not None)
            assert (await answer_of(caller, target))[1] == "relay"
            assert target.relay.counts["arrived"] == 1

    asyncio.run(run())


def test_gateway_that_connects_us_to_somebody_else_is_noticed_by_the_key() -> None:
    async def run() -> None:
        names = ("alpha-node", "alpha-gateway", "alpha-far", "alpha-liar")
        async with world(*names) as (w, caller, _, target, liar):
            w.part(("alpha-node", "alpha-far"))
            w.wrong["alpha-gateway", "alpha-far"] = [liar.addr]
            with pytest.raises(Refused, match="alpha-gateway connects us to somebody else") as why:
                await answer_of(caller, target)
            assert why.value.code == "host_key"
            assert not caller.reach.counts["relayed"]

    asyncio.run(run())


def test_no_way_at_all_is_told_with_what_was_tried() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (w, caller, gateway, target):
            w.part(("alpha-node", "alpha-far"), ("alpha-gateway", "alpha-far"))
            with pytest.raises(Unreachable) as why:
                await answer_of(caller, target)
            for word in ("alpha-far", "direct", "no address", "alpha-gateway", "holds no link"):
                assert word in str(why.value)
            assert gateway.relay.counters == {"relay_no_route": 1}
            assert gateway.relay.counts["tunnels"] == 0

    asyncio.run(run())


def test_target_that_does_not_list_our_mesh_refuses_through_a_relay_too() -> None:
    async def run() -> None:
        async with world("alpha-node", "beta-gateway", "beta-far") as (w, caller, _, target):
            w.part(("alpha-node", "beta-far"))
            target.listed.clear()
            with pytest.raises(Refused) as why:
                await answer_of(caller, target)
            assert why.value.code == "login"

    asyncio.run(run())


@pytest.mark.parametrize("apart", [False, True])
def test_member_that_has_not_heard_of_us_yet_is_asked_again(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "LOGIN_AGAIN_S", (0.05, 0.1))

    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (w, caller, _, target):
            if apart:
                w.part(("alpha-node", "alpha-far"))
            target.strangers = {"alpha-node"}
            asked = asyncio.create_task(answer_of(caller, target))
            await until(lambda: target.listener.counters["login"] == 1)
            target.strangers = set()
            assert (await asked)[1] == ("relay" if apart else "direct")
            target.strangers = {"alpha-node"}
            (await caller.reach.link_to(target.member))[0].abort()
            with pytest.raises(Refused) as why:
                await answer_of(caller, target)
            assert why.value.code == "login"
            await until(lambda: target.listener.counters["login"] == 4)

    asyncio.run(run())


def test_direct_way_that_comes_up_is_used_after_a_while_and_the_relay_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "TOOK_LONG_S", -1.0)
    monkeypatch.setattr(reach, "DIRECT_AGAIN_S", 0.2)
    monkeypatch.setattr(openlinks, "IDLE_CLOSE_S", 0.0)

    async def run() -> None:
        async with world("alpha-node", "beta-gateway", "beta-far") as (w, caller, _, target):
            w.part(("alpha-node", "beta-far"))
            assert (await answer_of(caller, target))[1] == "relay"
            w.apart.clear()
            assert (await answer_of(caller, target))[1] == "relay"
            await asyncio.sleep(0.2)
            assert (await answer_of(caller, target))[1] == "relay"
            await until(lambda: caller.reach.counts["direct"] == 2)
            assert (await answer_of(caller, target))[1] == "direct"
            caller.reach.close_idle()
            await until(lambda: caller.reach.counts["relayed"] == 0)
            caller.reach.close_idle()
            await until(lambda: caller.reach.counts["direct"] == 0)

    asyncio.run(run())


def test_address_that_swallows_everything_delays_only_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "DIRECT_TIMEOUT_S", 0.6)

    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far", "beta-far") as (
            w,
            caller,
            _,
            own,
            other,
        ):
            hole = bound()
            hole.listen(8)
            for target in (own, other):
                w.wrong["alpha-node", target.name] = [hole.getsockname()]
                began = time.monotonic()
                assert (await answer_of(caller, target))[1] == "relay"
                assert 0.5 < time.monotonic() - began < 2.0
                (await caller.reach.link_to(target.member))[0].abort()
                await until(lambda: caller.reach.counts["relayed"] == 0)
                began = time.monotonic()
                assert (await answer_of(caller, target))[1] == "relay"
                assert time.monotonic() - began < 0.4
                (await caller.reach.link_to(target.member))[0].abort()
            hole.close()

    asyncio.run(run())


def test_more_targets_than_relayed_links_are_all_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "MAX_RELAYED", 2)

    async def run() -> None:
        names = [f"alpha-far-{i}" for i in range(5)]
        async with world("alpha-node", "alpha-gateway", *names) as (w, caller, _, *targets):
            w.part(*(("alpha-node", name) for name in names))
            answers = await asyncio.gather(*(answer_of(caller, t) for t in targets))
            assert [a[0][0] for a in answers] == names and {a[1] for a in answers} == {"relay"}
            assert caller.reach.counts["relayed"] <= 2

    asyncio.run(run())


# --- what a relay refuses


async def ask(gateway: Station, caller: Identity, username: str, params: Any) -> Tunnel:
    link = await dial(gateway.addr, identity=caller, username=username, expect_pub=gateway.identity.pub)
    return await link.tunnel("relay", params, 3.0)


@pytest.mark.parametrize(
    ("username", "params", "code"),
    [
        ("backbone", {"target": "TARGET"}, "login"),
        ("join", {"target": "TARGET"}, "login"),
        ("home", {"target": "0123456789abcdef"}, "unknown"),
        ("home", {"target": "10.0.0.1:22"}, "unknown"),
        ("home", {"host": "127.0.0.1", "port": 22}, "unknown"),
        ("home", "TARGET", "unknown"),
        ("home", {"target": "SELF"}, "unknown"),
        ("home", {"target": 7}, "unknown"),
    ],
)
def test_relay_refuses_all_but_members_for_those_who_may(username: str, params: Any, code: str) -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (_, _, gateway, target):
            known = {"TARGET": id_text(target.member.id), "SELF": id_text(gateway.member.id)}
            asked = {k: known.get(v, v) for k, v in params.items()} if isinstance(params, dict) else params
            with pytest.raises(Refused) as why:
                await ask(gateway, Identity.from_seed(b"p" * 32), username, asked)
            assert why.value.code == code and gateway.relay.counters == {f"relay_{code}": 1}
            assert gateway.relay.counts["tunnels"] == 0

    asyncio.run(run())


def test_relay_of_a_node_that_is_no_gateway_refuses() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-far") as (_, node, target):
            with pytest.raises(Refused) as why:
                await ask(node, Identity.from_seed(b"p" * 32), "home", {"target": id_text(target.member.id)})
            assert why.value.code == "not_a_gateway"

    asyncio.run(run())


def test_relay_goes_to_no_member_that_is_dead_or_gone() -> None:
    async def run() -> None:
        async with world("alpha-gateway", "alpha-far") as (_, gateway, target):
            for state in (State.DEAD, State.LEAVING):
                target.state = state
                with pytest.raises(Refused) as why:
                    await ask(
                        gateway, Identity.from_seed(b"p" * 32), "op", {"target": id_text(target.member.id)}
                    )
                assert why.value.code == "unknown"

    asyncio.run(run())


def test_mesh_login_is_relayed_to_members_of_the_relays_own_mesh_only() -> None:
    async def run() -> None:
        async with world("alpha-node", "beta-gateway", "beta-far", "gamma-far") as (
            _,
            a,
            gateway,
            own,
            other,
        ):
            with pytest.raises(Refused) as why:
                await ask(gateway, a.mesh_identity, "mesh", {"target": id_text(other.member.id)})
            assert why.value.code == "unknown"
            tunnel = await ask(gateway, a.mesh_identity, "mesh", {"target": id_text(own.member.id)})
            assert tunnel.answer == {"way": "dialled"}

    asyncio.run(run())


def test_relay_goes_to_what_a_member_advertises_and_only_if_ssh_answers_there() -> None:
    async def run() -> None:
        async with world("alpha-gateway", "alpha-far") as (w, gateway, target):
            heard: list[bytes] = []

            async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                heard.append(await reader.read(100))
                writer.close()

            server = await asyncio.start_server(web, "127.0.0.1", 0)
            w.wrong["alpha-gateway", "alpha-far"] = [server.sockets[0].getsockname()]
            person = Identity.from_seed(b"p" * 32)
            with pytest.raises(Refused, match="is no node") as why:
                await ask(gateway, person, "home", {"target": id_text(target.member.id)})
            assert why.value.code == "no_route"
            await until(lambda: heard == [b""])
            server.close()
            await server.wait_closed()

            w.wrong.clear()
            link = await dial(gateway.addr, identity=person, username="home", expect_pub=gateway.identity.pub)
            more = {"target": id_text(target.member.id), "host": "127.0.0.1", "port": gateway.addr[1]}
            tunnel = await link.tunnel("relay", more, 3.0)
            assert (await tunnel.read()).startswith(b"SSH-2.0-")
            assert gateway.relay.counts["relayed"] == 1 and target.listener.waiting == 1

    asyncio.run(run())


def test_arrive_is_for_members_of_the_own_mesh_only() -> None:
    async def run() -> None:
        async with world("alpha-node", "beta-gateway", "beta-far") as (_, a, _, target):
            for identity, username in ((a.mesh_identity, "mesh"), (Identity.from_seed(b"p" * 32), "home")):
                link = await dial(target.addr, identity=identity, username=username, expect_pub=None)
                with pytest.raises(Refused) as why:
                    await link.tunnel("arrive", {}, 3.0)
                assert why.value.code == "login"
                await link.close()
            # a gateway of another mesh, on a link that this node dialled, is no member of ours either
            link = await dial(
                a.addr,
                identity=target.mesh_identity,
                username="mesh",
                expect_pub=a.identity.pub,
                methods=target.methods,
            )
            (accepted,) = a.listener.links
            with pytest.raises(Refused) as why:
                await accepted.tunnel("arrive", {}, 3.0)
            assert why.value.code == "login" and target.relay.counters["relay_login"] == 3
            await link.close()

    asyncio.run(run())


def test_tunnels_beyond_a_logins_share_or_beyond_all_are_refused_until_some_end() -> None:
    limits = RelayLimits(max_tunnels=3, max_tunnels_per_login=2)

    async def run() -> None:
        async with world("alpha-gateway", "alpha-far", "alpha-node", limits=limits) as (
            _,
            gateway,
            target,
            node,
        ):
            request = {"target": id_text(target.member.id)}

            async def link_as(identity: Identity, username: str) -> Link:
                return await dial(gateway.addr, identity=identity, username=username, expect_pub=None)

            person = await link_as(Identity.from_seed(b"p" * 32), "home")
            member = await link_as(node.identity, "member")
            tunnels = [await person.tunnel("relay", request, 3.0) for _ in range(2)]
            with pytest.raises(Refused) as why:
                await person.tunnel("relay", request, 3.0)
            assert why.value.code == "share"
            tunnels.append(await member.tunnel("relay", request, 3.0))
            with pytest.raises(Refused) as why:
                await member.tunnel("relay", request, 3.0)
            assert why.value.code == "full"
            assert gateway.relay.counters == {"relay_share": 1, "relay_full": 1}
            tunnels[0].close()
            await until(lambda: gateway.relay.counts["tunnels"] == 2)
            await member.tunnel("relay", request, 3.0)
            await person.close()
            await member.close()
            await until(lambda: gateway.relay.counts["tunnels"] == 0)

    asyncio.run(run())


def test_tunnel_without_a_byte_is_cut_off_and_counted() -> None:
    async def run() -> None:
        async with world("alpha-gateway", "alpha-far", limits=RelayLimits(idle_s=0.2)) as (
            _,
            gateway,
            target,
        ):
            tunnel = await ask(
                gateway, Identity.from_seed(b"p" * 32), "home", {"target": id_text(target.member.id)}
            )
            while await tunnel.read():
                pass
            assert gateway.relay.counters == {"relay_idle": 1}
            await until(lambda: target.listener.waiting == 0)

    asyncio.run(run())


def test_relay_that_ends_cuts_off_what_it_carries_and_leaves_nothing() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (w, caller, gateway, target):
            w.part(("alpha-node", "alpha-far"))
            link, _ = await caller.reach.link_to(target.member)
            await gateway.relay.close()
            await asyncio.wait_for(link.wait_closed(), 3)
            await until(lambda: not target.listener.links)
            with pytest.raises(Unreachable, match="relays 0"):
                await answer_of(caller, target)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(run())


def test_target_that_ends_closes_the_callers_link() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-gateway", "alpha-far") as (w, caller, gateway, target):
            w.part(("alpha-node", "alpha-far"))
            link, _ = await caller.reach.link_to(target.member)
            await target.listener.close()
            await asyncio.wait_for(link.wait_closed(), 3)
            await until(lambda: gateway.relay.counts["tunnels"] == 0)

    asyncio.run(run())


# --- links that are kept


def test_call_without_an_answer_breaks_no_other_call_and_is_not_waited_for_again() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-other") as (_, caller, target):
            slow = asyncio.create_task(caller.contacts.call(target.member, "hang", 0.4, 3.0))
            await until(lambda: caller.contacts.counts["links"] == 1)
            first = caller.contacts.open_to(target.member.id)
            with pytest.raises(Unreachable):
                await caller.contacts.call(target.member, "hang", 5, 0.1)
            assert caller.contacts.open_to(target.member.id) is None and not first.closed
            assert (await caller.contacts.call(target.member, "who", {}, 3.0))[0] == "alpha-other"
            assert await slow == "late"
            assert caller.contacts.counts["links"] == 2

    asyncio.run(run())


def test_call_without_an_answer_alone_on_its_link_closes_it() -> None:
    async def run() -> None:
        async with world("alpha-node", "alpha-other") as (_, caller, target):
            link = await caller.contacts.link_to(target.member)
            with pytest.raises(Unreachable):
                await caller.contacts.call(target.member, "hang", 5, 0.1)
            assert link.closed and caller.contacts.counts["links"] == 0

    asyncio.run(run())


def test_unreachable_told_by_the_other_side_is_an_answer() -> None:
    async def gone(link: Link, params: Any) -> Any:
        raise Unreachable("somebody else is away")

    async def run() -> None:
        async with world("alpha-node", "alpha-other") as (_, caller, target):
            target.methods["gone"] = gone
            with pytest.raises(Unreachable, match="somebody else"):
                await caller.contacts.call(target.member, "gone", {}, 3.0)
            assert caller.contacts.open_to(target.member.id) is not None

    asyncio.run(run())


def test_gateway_link_is_spared_when_idle_and_moves_on_when_its_gateway_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openlinks, "IDLE_CLOSE_S", 0.0)

    async def run() -> None:
        names = ("alpha-node", "alpha-gateway-1", "alpha-gateway-2", "alpha-other")
        async with world(*names) as (w, node, one, two, other):
            await node.contacts.link_to(other.member)
            gateways = (one.member.id, two.member.id)
            node.contacts.keep_gateway(gateways)
            await until(lambda: node.contacts.gateway == one.member.id)
            node.contacts.close_idle()
            await until(lambda: node.contacts.counts["links"] == 1)
            kept = node.contacts.open_to(one.member.id)
            assert kept is not None and not kept.closed
            w.part(("alpha-node", "alpha-gateway-1"))
            kept.abort()
            await until(lambda: node.contacts.gateway == two.member.id)
            w.apart.clear()
            node.contacts.keep_gateway(gateways[:1])
            await until(lambda: node.contacts.gateway == one.member.id)
            node.contacts.keep_gateway(())
            await until(lambda: node.contacts.gateway is None)

    asyncio.run(run())


def test_contacts_of_another_pool_log_in_by_its_name() -> None:
    async def run() -> None:
        async with world("alpha-node", "beta-node") as (_, a, b):
            pool = cast("Pool", Gossip())
            contacts = Contacts(pool, a.identity, {}, a.usable_addrs, username="backbone")
            assert (await contacts.call(b.member, "who", {}, 3.0))[1] == "backbone"
            await contacts.close()

    asyncio.run(run())


# --- several ways at once


def test_first_of_several_ways_waits_for_the_preferred_one_and_disposes_of_what_is_too_many() -> None:
    disposed: list[str] = []

    async def run() -> None:
        async def way(name: str, after_s: float, fails: bool = False) -> str:
            await asyncio.sleep(after_s)
            if fails:
                raise Unreachable(name)
            return name

        async def stubborn() -> str:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return "stubborn"
            return "never"

        async def race(*ways: Any) -> str:
            return await first_of(ways, head_start_s=0.05, dispose=disposed.append)

        assert await race(lambda: way("a", 0.02), lambda: way("b", 0)) == "a"
        assert await race(lambda: way("a", 5), lambda: way("b", 0)) == "b"
        began = time.monotonic()
        assert await race(lambda: way("a", 0, True), lambda: way("b", 0)) == "b"
        assert time.monotonic() - began < 0.05
        assert disposed == []
        assert await race(stubborn, lambda: way("b", 0)) == "b"
        assert disposed == ["stubborn"]
        with pytest.raises(NoneWorked) as why:
            await race(lambda: way("a", 0, True), lambda: way("b", 0, True))
        assert [str(e) for e in why.value.errors] == ["a", "b"]

    asyncio.run(run())


def test_try_that_failed_after_all_who_waited_let_go_is_no_defect() -> None:
    async def fail(go: asyncio.Event) -> None:
        await go.wait()
        raise Unreachable("nobody there")

    async def run() -> None:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
        tries: dict[int, asyncio.Task[None]] = {}
        go = asyncio.Event()
        waiting = asyncio.ensure_future(asyncio.shield(shared(tries, 1, fail(go))))
        waiting.cancel()
        await asyncio.wait({waiting})
        go.set()
        await until(lambda: not tries)
        gc.collect()
        assert reported == []

    asyncio.run(run())


def test_relays_are_asked_gateways_first_then_by_id() -> None:
    async def run() -> None:
        async with world("a-console", "a-gateway-1", "a-gateway-2", "a-node") as (_, *stations):
            members = [s.member for s in stations]
            one, two = sorted(members[1:3], key=lambda m: m.id)
            assert relays_among(members) == [one, two, members[0]]
            assert relays_among(members, two.id)[0] == two
            stations[0].state = State.DEAD
            assert stations[0].member not in relays_among([s.member for s in stations])

    asyncio.run(run())


def test_link_in_doubt_is_not_used_again_while_another_way_is_there() -> None:
    async def run() -> None:
        async with world("alpha-node", "beta-gateway", "beta-far") as (_, caller, _, target):
            link, via = await caller.reach.link_to(target.member)
            assert via == "direct"
            caller.reach.doubt(link)
            another, via = await caller.reach.link_to(target.member)
            assert via == "direct" and another is not link
            caller.reach.close_idle()
            await until(lambda: link.closed)
            assert not another.closed

    asyncio.run(run())
