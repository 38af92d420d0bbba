"""What a pool promises, played in virtual time with the real engine."""

from __future__ import annotations

from statistics import median

import pytest

from discovery.lifecycle import Evidence, State
from discovery.swim import SwimConfig
from discovery.swim.config import suspicion_min_s, suspicion_timeout_s
from tests.sim.net import Net
from tests.sim.scenario import (
    Converged,
    CrashHost,
    Grow,
    Heal,
    Held,
    Kill,
    Leave,
    NobodyDied,
    Pause,
    Restart,
    Resume,
    Run,
    Split,
    Weather,
    play,
)

LAN = SwimConfig.lan()
BAD = Weather(loss=0.1, duplicate=0.05, late=0.02)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_nodes_started_together_see_each_other_within_two_seconds(n: int, seed: int) -> None:
    play(seed, [Grow(n), Converged(2.0), Run(10), Converged(0.1), NobodyDied()])


@pytest.mark.parametrize("seed", range(3))
def test_nodes_started_in_bad_weather_see_each_other_before_the_first_push_pull_round(seed: int) -> None:
    play(seed, [BAD, Grow(50), Converged(12.0), NobodyDied()])


def test_a_hundred_and_fifty_nodes_started_together_see_each_other_within_three_seconds() -> None:
    play(1, [Grow(150), Converged(3.0), NobodyDied()])


def test_a_chain_of_seeds_still_makes_one_pool() -> None:
    net = Net(1)
    net.add()
    for i in range(1, 30):
        net.add(seeds=(i - 1,))
    assert net.run_until(net.all_see_all, 5.0)


def test_two_nodes_that_are_each_others_seed_find_each_other_though_one_comes_later() -> None:
    net = Net(1)
    first, second = net.add(start=False), net.add(start=False)
    net.start(first, (1,))
    net.run(20)
    net.start(second, (0,))
    assert net.run_until(net.all_see_all, 1.0)


def test_a_seed_that_comes_up_an_hour_later_is_still_greeted() -> None:
    net = Net(1)
    first, second = net.add(start=False), net.add(start=False)
    net.start(first, (1,))
    net.run(3600)
    net.start(second)
    assert net.run_until(net.all_see_all, LAN.join_retry_max_s * 1.3)


def test_two_pools_whose_seeds_were_late_become_one() -> None:
    """Each half was synced long before the other's seed came up: the unanswered seed is tried again all the same."""
    net = Net(3)
    for _ in range(4):
        net.add(start=False)
    net.start(net.nodes[0])
    net.start(net.nodes[1], (0, 2))
    net.run(30)
    net.start(net.nodes[2])
    net.start(net.nodes[3], (2,))
    assert net.run_until(net.all_see_all, 40)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 3, 5, 25])
def test_a_killed_process_is_dead_as_exited_within_half_a_second(n: int, seed: int) -> None:
    net = play(seed, [Grow(n), Converged(3), Run(20), NobodyDied()])
    victim, killed_at = net.nodes[n - 1], net.now
    net.kill(victim)
    assert net.run_until(lambda: net.all_hold(victim, State.DEAD, Evidence.EXITED), 1.0), f"seed {seed}"
    times = [told.at - killed_at for _, told in net.deaths()]
    assert median(times) <= 0.05 and max(times) <= 0.5, f"seed {seed}: {sorted(times)}"
    for _, told in net.deaths():
        assert len(told.by) >= min(2, n - 1) and victim.id not in told.by


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_is_exited_in_bad_weather_too(seed: int) -> None:
    play(
        seed,
        [
            BAD,
            Grow(25),
            Converged(15),
            Run(20),
            NobodyDied(),
            Kill(7),
            Held(7, State.DEAD, 1.5, Evidence.EXITED),
        ],
    )


def test_processes_on_one_host_are_told_exited_by_their_loopback() -> None:
    play(
        5,
        [Grow(8), Converged(3), Run(15), Kill(3), Held(3, State.DEAD, 0.5, Evidence.EXITED)],
        one_host=True,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 5, 25, 60])
def test_a_crashed_host_is_dead_as_silent_within_the_bound_of_the_formula(n: int, seed: int) -> None:
    net = play(seed, [Grow(n), Converged(4), Run(20), NobodyDied()])
    victim, crashed_at = net.nodes[n // 2], net.now
    net.crash_host(victim)
    first_asked = 6 * LAN.probe_interval_s
    bound = first_asked + suspicion_timeout_s(n, 0, LAN) + 2 * LAN.probe_interval_s
    assert net.run_until(lambda: net.all_hold(victim, State.DEAD, Evidence.SILENT), bound), f"seed {seed}"
    earliest = min(told.at for _, told in net.deaths()) - crashed_at
    assert earliest >= suspicion_min_s(n, LAN)


def test_confirmations_bring_a_silent_death_down_to_the_least_timeout() -> None:
    net = play(2, [Grow(25), Converged(3), Run(20), CrashHost(4)])
    crashed_at = net.now
    assert net.run_until(lambda: net.all_hold(net.nodes[4], State.DEAD), 60)
    times = sorted(told.at - crashed_at for _, told in net.deaths())
    assert times[-1] <= suspicion_min_s(25, LAN) + 4 * LAN.probe_interval_s


def test_a_fixed_suspicion_timeout_holds_a_silent_death_back() -> None:
    net = play(
        2,
        [Grow(6), Converged(3), CrashHost(4), Run(100), NobodyDied()],
        SwimConfig.lan(suspicion_fixed_s=120),
    )
    assert net.run_until(lambda: net.all_hold(net.nodes[4], State.DEAD, Evidence.SILENT), 40)


def test_a_stopped_process_is_silent_never_exited_and_comes_back() -> None:
    net = play(
        4,
        [
            Grow(10), Converged(3), Run(20), NobodyDied(),
            Pause(3), Held(3, State.DEAD, 40, Evidence.SILENT),
            Resume(3), Converged(1.0),
        ],
    )  # fmt: skip
    assert {told.evidence for _, told in net.deaths()} == {Evidence.SILENT}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pause_s", [1.5, 4.0, 40.0, 4000.0])
def test_a_paused_node_accuses_nobody_when_it_wakes(pause_s: float, seed: int) -> None:
    net = play(seed, [Grow(8), Converged(3), Run(20), Pause(3), Run(pause_s)])
    sleeper = net.nodes[3]
    told = len(sleeper.told)
    net.resume(sleeper)
    net.run(0.9)
    suspects = [member for member in sleeper.swim.members.values() if member.suspect_since is not None]
    assert not suspects, f"seed {seed}"
    assert net.run_until(net.all_see_all, 3.0), f"seed {seed}"
    net.run(20)
    assert not [t for t in sleeper.told[told:] if t.new is State.DEAD], f"seed {seed}"


def test_everybody_paused_at_once_wakes_to_a_whole_pool() -> None:
    ops = [Grow(12), Converged(3), Run(10), *(Pause(i) for i in range(12)), Run(900)]
    net = play(9, [*ops, *(Resume(i) for i in range(12)), Run(30), Converged(0.1)])
    assert not net.deaths()


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_a_goodbye_reaches_all(loss: float, seed: int) -> None:
    net = play(seed, [Grow(60), Converged(8), Run(5), Weather(loss=loss)])
    leaver, began = net.nodes[10], net.now
    net.leave(leaver)
    assert net.run_until(lambda: net.all_hold(leaver, None), 1.0), f"seed {seed}"
    assert net.now - began <= (0.05 if not loss else 0.5)
    for node in net.running():
        ends = [told for told in node.told if told.node == leaver.id and told.what == "evicted"]
        assert [told.evidence for told in ends] == [Evidence.LEFT]
    assert not net.deaths()
    assert leaver.left_at is not None or net.run_until(lambda: leaver.left_at is not None, 0.31)


def test_a_goodbye_while_cut_off_waits_no_longer_than_promised() -> None:
    net = play(1, [Grow(5), Converged(3), Split((2,)), Leave(2)])
    assert net.run_until(lambda: net.nodes[2].left_at is not None, LAN.leave_wait_s + 0.02)


def test_a_node_alone_leaves_at_once() -> None:
    net = play(1, [Grow(1), Run(5), Leave(0)])
    assert net.nodes[0].left_at == net.now


def test_a_node_that_left_and_starts_again_is_back_at_once() -> None:
    play(1, [Grow(10), Converged(3), Leave(4), Held(4, None, 1), Restart(4), Converged(1)])


def test_a_killed_node_that_starts_again_is_alive_at_once() -> None:
    play(1, [Grow(10), Converged(3), Run(10), Kill(4), Held(4, State.DEAD, 1), Restart(4), Converged(1)])


def test_a_dead_node_is_shown_for_a_minute_then_evicted() -> None:
    net = play(
        1,
        [Grow(10), Converged(3), Run(10), Kill(4), Held(4, State.DEAD, 1), Run(59), Held(4, State.DEAD, 0.1)],
    )
    assert net.run_until(lambda: net.all_hold(net.nodes[4], None), 2.0)
    for node in net.running():
        last = [told for told in node.told if told.node == net.nodes[4].id][-1]
        assert (last.what, last.evidence) == ("evicted", Evidence.EXITED)


@pytest.mark.parametrize("seed", range(3))
def test_late_and_doubled_packets_raise_nobody(seed: int) -> None:
    net = Net(seed)
    net.duplicate, net.late, net.late_s = 0.3, 0.2, 30.0
    net.grow(15)
    net.run(30)
    left, killed = net.nodes[3], net.nodes[5]
    net.leave(left)
    net.kill(killed)
    assert net.run_until(lambda: net.all_hold(left, None), 2), f"seed {seed}"
    assert net.run_until(lambda: net.all_hold(killed, State.DEAD) or net.all_hold(killed, None), 20)
    for node in net.running():
        node.told.clear()
    net.run(150)
    for node in net.running():
        back = [told for told in node.told if told.node in (left.id, killed.id) and told.what != "evicted"]
        assert not back, f"seed {seed}: {back}"


@pytest.mark.parametrize("cut_s", [5, 30, 200, 5000])
@pytest.mark.parametrize("side", [(0,), (1, 2), (0, 1, 2, 3, 4)])
def test_a_split_of_any_length_heals_by_itself(cut_s: float, side: tuple[int, ...]) -> None:
    play(len(side), [Grow(10), Converged(3), Run(5), Split(side), Run(cut_s), Heal(), Converged(40)])


def test_a_split_of_a_pair_heals_after_eviction() -> None:
    play(1, [Grow(2), Converged(3), Split((1,)), Run(600), Held(1, None, 1), Heal(), Converged(40)])


def test_a_split_into_halves_of_a_big_pool_heals_within_seconds() -> None:
    play(1, [Grow(40), Converged(3), Split(tuple(range(20))), Run(300), Heal(), Converged(10)])


@pytest.mark.parametrize("seed", range(3))
def test_an_asymmetric_cut_of_one_pair_kills_nobody(seed: int) -> None:
    """A reaches B never, B reaches A always: the others vouch for both."""
    net = play(seed, [Grow(10), Converged(3), Run(5)])
    net.cut = lambda a, b: a.index == 1 and b.index == 2
    net.run(300)
    assert not net.deaths(), f"seed {seed}: {net.deaths()[:2]}"


def test_a_node_that_hears_but_is_not_heard_is_dead_and_back_when_heard() -> None:
    net = play(3, [Grow(10), Converged(3), Run(5)])
    net.cut = lambda a, b: a.index == 4
    assert net.run_until(lambda: net.all_hold(net.nodes[4], State.DEAD, Evidence.SILENT), 60)
    net.heal()
    assert net.run_until(net.all_see_all, 5)


def test_an_updating_node_is_not_suspected_inside_its_deadline_and_is_after_it() -> None:
    net = play(3, [Grow(8), Converged(3), Run(15)])
    target = net.nodes[2]
    net.call(target, "update_self", state=State.UPDATING, deadline_ms=20_000)
    assert net.run_until(lambda: net.all_hold(target, State.UPDATING), 0.5)
    net.kill(target)
    net.run(19)
    assert net.all_hold(target, State.UPDATING)
    assert not any(n.swim.members[target.id].suspect_since for n in net.running())
    assert net.run_until(lambda: net.all_hold(target, State.DEAD, Evidence.EXITED), 2.5)


def test_an_update_that_comes_back_in_time_was_never_away() -> None:
    net = play(3, [Grow(8), Converged(3), Run(15)])
    target = net.nodes[2]
    net.call(target, "update_self", state=State.UPDATING, deadline_ms=20_000)
    net.run(0.5)
    net.kill(target)
    net.run(2)
    net.start(target, (0,))
    assert net.run_until(net.all_see_all, 1)
    net.run(60)
    assert not net.deaths()


def test_a_change_of_state_is_everywhere_at_once() -> None:
    net = play(3, [Grow(25), Converged(3), Run(15)])
    net.call(net.nodes[2], "update_self", state=State.DRAINING)
    began = net.now
    assert net.run_until(lambda: net.all_hold(net.nodes[2], State.DRAINING), 1.0, every_s=0.005)
    assert net.now - began <= 0.25


def test_a_missed_broadcast_is_repaired_by_the_next_probes_not_by_the_next_push_pull() -> None:
    net = play(3, [Grow(10), Converged(3), Run(10)])
    deaf = net.nodes[5]
    net.cut = lambda a, b: b is deaf
    net.call(net.nodes[2], "update_self", cordoned=True)
    net.run(0.3)
    net.heal()
    began = net.now
    subject = net.nodes[2].id
    assert net.run_until(lambda: deaf.swim.members[subject].record.cordoned, 10)
    assert net.now - began <= 6.0


def test_sentinels_form_a_ring_that_closes_around_the_dead() -> None:
    net = play(3, [Grow(10), Converged(3), Run(5), Kill(4), Held(4, State.DEAD, 1), Run(0.1)])
    ids = sorted(node.id for node in net.running())
    for node in net.running():
        at = ids.index(node.id)
        assert node.wanted == tuple((ids * 2)[at + 1 : at + 4])


def test_a_lossless_idle_pool_says_next_to_nothing() -> None:
    net = play(3, [Grow(25), Converged(3), Run(30)])
    before = sum(net.bytes.values())
    net.run(60)
    per_node = (sum(net.bytes.values()) - before) / 60 / 25
    assert per_node < 200, f"{per_node:.0f} bytes a second a node"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("run_s", [900, pytest.param(3600, marks=pytest.mark.soak)])
def test_a_live_node_is_never_dead_at_ten_percent_loss(run_s: int) -> None:
    net = play(20, [Weather(loss=0.1), Grow(100), Converged(20), Run(run_s)])
    assert not net.deaths(), net.deaths()[:3]
    assert net.run_until(net.all_see_all, 10)
    for node in net.nodes:
        assert node.swim.counters["forged_ack"] == node.swim.counters["malformed"] == 0


@pytest.mark.parametrize("profile", [SwimConfig.wan(), SwimConfig.local()])
def test_other_profiles_converge_detect_and_see_off(profile: SwimConfig) -> None:
    play(
        3,
        [
            Grow(12), Converged(5), Run(60), NobodyDied(),
            Kill(3), Held(3, State.DEAD, 2, Evidence.EXITED),
            CrashHost(5), Held(5, State.DEAD, 60, Evidence.SILENT),
            Leave(6), Held(6, None, 2), Restart(3), Held(3, State.ALIVE, 3),
        ],
        profile,
    )  # fmt: skip


def test_an_idle_pool_stays_up_for_a_quarter_of_a_day() -> None:
    net = play(3, [Grow(5), Converged(3), Run(6 * 3600), Converged(0.1), NobodyDied()])
    _assert_small(net)


@pytest.mark.soak
def test_an_idle_pool_stays_up_for_a_day() -> None:
    net = play(3, [Weather(loss=0.02), Grow(25), Converged(5), Run(24 * 3600), Converged(10), NobodyDied()])
    _assert_small(net)


@pytest.mark.parametrize("rounds", [120, pytest.param(2000, marks=pytest.mark.soak)])
def test_a_churning_pool_keeps_its_tables_small_and_its_views_true(rounds: int) -> None:
    net = play(7, [Weather(loss=0.05), Grow(40), Converged(10)])
    for _ in range(rounds):
        node = net.rng.choice(net.nodes[1:])
        if not node.up:
            net.start(node, (0,))
        else:
            net.rng.choice((net.kill, net.leave))(node)
        net.run(net.rng.uniform(0.1, 20))
    net.run(300)
    assert net.run_until(net.all_see_all, 60)
    _assert_small(net)


def _assert_small(net: Net) -> None:
    for node in net.running():
        swim = node.swim
        assert len(swim.view.timers) < 20 and len(swim._prober.probes) < 5
        assert len(swim._prober._relays) < 20 and len(swim._judge.suspicions) < 3
        assert len(swim.view.news) < 10
