"""The backbone's pool in virtual time: WAN timing, no links kept, thirty members and bad weather."""

from __future__ import annotations

import pytest

from discovery import wire
from discovery.lifecycle import Evidence
from discovery.summary import SUMMARY_TOPIC
from discovery.swim import SwimConfig
from tests.sim.net import Net, SimNode

MEMBERS = 30
LOSS = 0.1
SPREAD_WITHIN_S = 3.0


class Newest:
    """Keeps the note with the greatest body, and how old it was when it came."""

    def __init__(self) -> None:
        self.body = b""
        self.age_ms = 0

    def heard(self, note: wire.Note, sender: int, now: float) -> bool:
        if note.body <= self.body:
            return False
        self.body, self.age_ms = note.body, note.age_ms
        return True

    def held(self, now: float) -> list[wire.Note]:
        return [wire.Note(SUMMARY_TOPIC, "alpha", self.body)] if self.body else []


def backbone(seed: int, *, loss: float = LOSS) -> tuple[Net, dict[int, Newest]]:
    """Members of which each was told of the one before it only, once they have met; and what each keeps."""
    net = Net(seed, SwimConfig.wan(sentinels=0))
    net.loss = loss
    net.delay = (0.01, 0.06)
    kept: dict[int, Newest] = {}
    for n in range(MEMBERS):
        node = net.add(seeds=[n - 1] if n else [])
        kept[n] = Newest()
        node.swim.keep_notes(kept[n])
    assert net.run_until(net.all_see_all, 15.0)
    return net, kept


def tell(net: Net, node: SimNode, body: bytes) -> None:
    net.call(node, "spread", SUMMARY_TOPIC, "alpha", body)


@pytest.mark.parametrize("seed", range(3))
def test_summary_published_under_loss_is_everywhere_in_three_seconds(seed: int) -> None:
    net, kept = backbone(seed)
    for renewal in (b"1", b"2"):
        kept[0].body = renewal
        tell(net, net.nodes[0], renewal)
        began = net.now
        assert net.run_until(
            lambda renewal=renewal: all(k.body == renewal for k in kept.values()), SPREAD_WITHIN_S
        )
        longest_ms = 1000 * (net.now - began) + 1
        assert all(k.age_ms <= longest_ms for k in kept.values())
    assert not net.deaths()


def test_members_told_of_one_other_meet_within_two_seconds() -> None:
    net = Net(7, SwimConfig.wan(sentinels=0))
    net.delay = (0.01, 0.06)
    for n in range(MEMBERS):
        net.add(seeds=[n - 1] if n else [])
    assert net.run_until(net.all_see_all, 2.0)


def test_goodbye_under_loss_is_known_to_all_in_a_second() -> None:
    net, _ = backbone(11)
    gone = net.nodes[4]
    net.leave(gone)
    assert net.run_until(lambda: net.all_hold(gone, None), 1.0)
    evicted = [t for node in net.running() for t in node.told if t.what == "evicted" and t.node == gone.id]
    assert evicted and all(t.evidence is Evidence.LEFT for t in evicted)
