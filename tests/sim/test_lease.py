"""The soft lease over the real pool, in virtual time: one publisher, and soon another when it fails."""

from __future__ import annotations

import pytest

from discovery.lifecycle import State
from tests.sim.leases import LeaseNet
from tests.sim.net import SimNode

TTL_S, STEP_S = 6.0, 0.5
THREE = ("gateway", "console", "gateway", "compute", "broker")


def settled(seed: int = 1, *kinds: str, run_s: float = 20.0, **options: float) -> LeaseNet:
    """A mesh with one holder, at work for a while."""
    net = LeaseNet(seed, **options)
    net.mesh(*(kinds or THREE))
    assert net.run_until(net.one_holder, 10), net.report()
    net.run(run_s)
    assert net.one_holder(), net.report()
    return net


def the_holder(net: LeaseNet) -> SimNode:
    (holder,) = net.holders()
    return holder


def taken_over(net: LeaseNet, old: SimNode, within_s: float) -> float:
    """How long until everybody running names one holder that is another than `old`."""
    began = net.now
    assert net.run_until(lambda: net.one_holder() and the_holder(net) is not old, within_s, every_s=0.01), (
        net.report()
    )
    return net.now - began


def changes_since(net: LeaseNet, when: float) -> list[str]:
    return [told.reason for side in net.sides.values() for told in side.told if told.at > when]


def test_a_lone_console_claims_after_listening_for_four_seconds() -> None:
    net = LeaseNet(1)
    (console,) = net.mesh("console")
    net.run(3.99)
    assert not net.holders()
    net.run(0.02)
    assert the_holder(net) is console
    net.run(300)
    assert changes_since(net, 4.01) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_mesh_started_together_has_one_publisher_within_five_seconds(seed: int) -> None:
    net = LeaseNet(seed)
    net.mesh("console", "gateway", "gateway", "compute", "console")
    assert net.run_until(net.one_holder, 5), net.report()
    since = net.now
    net.run(30)
    assert net.one_holder() and len(changes_since(net, since)) <= 5, net.report()


@pytest.mark.parametrize("seed", range(3))
def test_three_candidates_have_one_publisher_for_five_minutes(seed: int) -> None:
    net = settled(seed, skew=0.01)
    holder, since = the_holder(net), net.now
    published = len(net.side(holder).published)
    net.run(300)
    assert the_holder(net) is holder and changes_since(net, since) == [], net.report()
    assert 145 <= len(net.side(holder).published) - published <= 155
    assert all(not side.published for node, side in net.sides.items() if node != holder.index)


def test_a_candidate_that_joins_respects_the_holder_whatever_its_rank() -> None:
    net = settled(2, "console", "compute")
    holder, since = the_holder(net), net.now
    for _ in range(3):
        net.add(kind="gateway", seeds=(0,))
    net.run(60)
    assert net.one_holder() and the_holder(net) is holder, net.report()
    assert net.lease(holder).epoch == 1 and set(changes_since(net, since)) == {"heard"}


@pytest.mark.parametrize("seed", range(4))
def test_a_goodbye_hands_over_within_half_a_second(seed: int) -> None:
    net = settled(seed)
    old = the_holder(net)
    net.leave(old)
    assert taken_over(net, old, 1.0) <= 0.1
    assert net.lease(the_holder(net)).epoch == 2


@pytest.mark.parametrize("seed", range(4))
def test_an_update_hands_over_within_half_a_second_and_the_new_process_takes_nothing_back(seed: int) -> None:
    net = settled(seed)
    old = the_holder(net)
    net.update(old)
    assert taken_over(net, old, 1.0) <= 0.1
    new = the_holder(net)
    net.start(old, (new.index,), kind="gateway")
    net.run(30)
    assert net.one_holder() and the_holder(net) is new, net.report()


def test_an_update_that_fails_makes_a_candidate_again() -> None:
    net = settled(1, "gateway", "console")
    old = the_holder(net)
    net.update(old)
    taken_over(net, old, 1.0)
    net.call(old, "update_self", state=State.ALIVE, deadline_ms=None)
    net.run(5)
    other = the_holder(net)
    net.leave(other)
    assert taken_over(net, other, 1.0) <= 0.2 and the_holder(net) is old


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_holder_is_replaced_within_the_ttl_and_a_second(seed: int) -> None:
    net = settled(seed)
    old = the_holder(net)
    net.kill(old)
    assert taken_over(net, old, TTL_S + 1) <= 2.0, "its death is known long before its claim expires"


@pytest.mark.parametrize("seed", range(4))
def test_a_crashed_host_of_the_holder_is_replaced_within_the_ttl_and_a_second(seed: int) -> None:
    net = settled(seed)
    old = the_holder(net)
    net.crash_host(old)
    taken_over(net, old, TTL_S + 1)


@pytest.mark.parametrize("pause_s", [4.5, 7.5, 20.0, 300.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_paused_holder_is_replaced_in_time_and_wakes_to_follow(seed: int, pause_s: float) -> None:
    net = settled(seed)
    old = the_holder(net)
    net.pause(old)
    if pause_s > TTL_S + 1:
        assert taken_over(net, old, TTL_S + 1) >= TTL_S - 2.0
    began = net.now
    net.run(pause_s)
    holder = net.holders()
    net.resume(old)
    assert net.run_until(net.one_holder, 8), net.report()
    if holder:
        assert net.holders() == holder, net.report()
        assert not [t for t in net.side(old).told if t.at > began and t.mine]
    since = net.now
    net.run(60)
    assert net.one_holder() and changes_since(net, since) == [], net.report()


def test_everybody_paused_at_once_wakes_to_one_holder() -> None:
    net = settled(3)
    for node in net.nodes:
        net.pause(node)
    net.run(900)
    for node in net.nodes:
        net.resume(node)
    assert net.run_until(net.one_holder, 10), net.report()


@pytest.mark.parametrize("cut_s", [10, 120])
@pytest.mark.parametrize("seed", range(3))
def test_a_partition_has_a_publisher_on_either_side_and_one_again_when_it_heals(
    seed: int, cut_s: float
) -> None:
    net = settled(seed, "gateway", "gateway", "console", "compute", "compute", "console")
    net.split((0, 3, 5))
    net.run(cut_s)
    assert len(net.holders()) == 2, net.report()
    net.heal()
    assert net.run_until(net.all_see_all, 40)
    assert net.run_until(net.one_holder, 5), net.report()
    since = net.now
    net.run(60)
    assert net.one_holder() and changes_since(net, since) == [], net.report()


def test_a_holder_cut_off_from_one_candidate_only_keeps_the_lease() -> None:
    """Two that never hear each other (behind two NATs): others vouch, and carry the renewals on."""
    net = settled(4, "gateway", "gateway", "console", "compute")
    holder = the_holder(net)
    other = next(n for n in net.nodes if n.swim.me.record.kind != "compute" and n is not holder)
    net.cut = lambda a, b: {a.index, b.index} == {holder.index, other.index}
    net.run(20)
    since = net.now
    net.run(300)
    assert net.one_holder() and the_holder(net) is holder, net.report()
    assert changes_since(net, since) == [], "and it is not challenged again and again"
    assert not any(told.mine for told in net.side(net.nodes[2]).told)


def test_a_holder_that_hears_but_is_not_heard_is_replaced_and_yields_when_it_is_heard() -> None:
    net = settled(5)
    old = the_holder(net)
    net.cut = lambda a, b: a is old
    taken = net.run_until(lambda: any(node is not old for node in net.holders()), TTL_S + 1)
    assert taken, net.report()
    net.run(10)
    net.heal()
    assert net.run_until(net.all_see_all, 40)
    assert net.run_until(net.one_holder, 5) and the_holder(net) is not old, net.report()


def test_a_holder_that_cannot_publish_yields_and_the_next_takes_over() -> None:
    net = settled(6)
    old, began = the_holder(net), net.now
    net.side(old).can_publish = False
    assert taken_over(net, old, TTL_S + 3) <= TTL_S + 2.1
    assert net.side(the_holder(net)).published[-1] > began
    net.side(old).can_publish = True
    net.run(60)
    assert the_holder(net) is not old, "it doesn't take it back"


def test_epochs_survive_the_whole_mesh() -> None:
    net = settled(7, "gateway", "console")
    assert {side.epoch for side in net.sides.values()} == {0, 1}
    for node in net.nodes:
        net.kill(node)
    net.run(5)
    for node in net.nodes:
        net.start(node, (0, 1), kind="gateway")
    assert net.run_until(net.one_holder, 6), net.report()
    holder = the_holder(net)
    assert net.lease(holder).epoch == net.side(holder).epoch >= 1


@pytest.mark.parametrize("seed", range(3))
def test_in_bad_weather_the_holder_stays_and_is_named_by_all(seed: int) -> None:
    net = settled(seed, "gateway", "gateway", "console", "compute", "compute")
    holder = the_holder(net)
    net.loss, net.duplicate, net.late = 0.1, 0.05, 0.02
    net.run(300)
    net.loss = net.duplicate = net.late = 0.0
    assert net.run_until(net.one_holder, 20), net.report()
    assert the_holder(net) is holder, net.report()


def chaos(net: LeaseNet, steps: int) -> None:
    """Random trouble, then none."""
    rng = net.rng
    kinds = [node.swim.me.record.kind for node in net.nodes]
    for _ in range(steps):
        node = rng.choice(net.nodes)
        if not node.up:
            node.host_up = True
            net.start(node, [n.index for n in net.nodes if n is not node], kind=kinds[node.index])
        elif node.paused:
            net.resume(node)
        elif len(net.running()) > 2:
            act = rng.choice((net.kill, net.leave, net.crash_host, net.pause, None, None))
            if act is not None:
                act(node)
            elif rng.random() < 0.5:
                net.split(rng.sample(range(len(net.nodes)), rng.randrange(1, len(net.nodes))))
            else:
                net.heal()
                net.loss, net.duplicate, net.late = rng.random() * 0.3, rng.random() * 0.2, rng.random() * 0.1
        net.run(rng.choice((0.1, 1.0, 5.0, 20.0)) * rng.random())
    net.heal()
    net.loss = net.duplicate = net.late = 0.0
    for node in net.nodes:
        if node.paused and node.up:
            net.resume(node)


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(n, marks=pytest.mark.soak) for n in range(6, 300))]
)
def test_after_any_chaos_there_is_one_holder_soon_after_everybody_sees_everybody(seed: int) -> None:
    net = LeaseNet(seed, skew=0.01)
    net.mesh("gateway", "gateway", "console", "compute", "console", "compute")
    net.run(3)
    chaos(net, 40)
    assert net.run_until(net.all_see_all, 150, every_s=0.2), f"seed {seed}"
    if any(node.swim.me.record.kind != "compute" for node in net.running()):
        net.run(10)
        assert net.run_until(net.one_holder, 20, every_s=0.1), net.report()
        since = net.now
        net.run(30)
        assert net.one_holder() and changes_since(net, since) == [], net.report()
