"""How members look to placement: from their records, their load and their distance."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from agent.data.of_node import PeerStates, candidate, peer_state
from agent.data.scoring import fit
from agent.meshos.events import PeerState
from agent.meshos.states import MaintenanceState
from discovery.identity import Identity
from discovery.lifecycle import State
from discovery.member import Member, Vitals, unmet

PUB = Identity.from_seed(b"p" * 32).pub


def member(kind: str = "compute", state: State = State.ALIVE, **changes: Any) -> Member:
    made = unmet(PUB, "alpha", "n", kind, [], b"")
    return replace(made, record=msgspec.structs.replace(made.record, **changes), state=state)


def test_candidate_carries_load_distance_and_zone_and_leaves_the_unknown_unknown() -> None:
    seen = replace(member(tags={"zone": "east"}), vitals=Vitals(100, 200, 300), rtt_s=0.004)
    found = candidate(seen, False)
    assert (found.cpu, found.mem, found.disk, found.rtt_ms, found.zone) == (0.1, 0.2, 0.3, 4.0, "east")
    bare = candidate(member(), True)
    assert (bare.cpu, bare.disk, bare.rtt_ms, bare.zone, bare.avoided) == (None, None, None, "", True)


@pytest.mark.parametrize(
    ("seen", "is_fit", "counts"),
    [
        (member(), True, True),
        (member(cordoned=True), False, True),
        (member(kind="console"), False, True),
        (member(state=State.DRAINING), False, False),
        (member(maintenance="entering_maintenance"), False, False),
        (member(maintenance="drain_failed"), False, False),
        (member(maintenance="recovery"), True, True),
        (member(maintenance="a state of a newer build"), True, True),
        (member(state=State.DEAD), False, True),
        (member(state=State.LEAVING), False, True),
    ],
)
def test_who_may_hold_and_who_counts_follows_from_the_record(
    seen: Member, is_fit: bool, counts: bool
) -> None:
    found = candidate(seen, False)
    assert fit(found) is is_fit and (not found.draining) is counts


def test_peer_states_are_told_once_and_when_they_change() -> None:
    seen = member()
    members = {seen.id: seen}
    probe = PeerStates(cast("Any", SimpleNamespace(swim=SimpleNamespace(members=members))))
    assert list(probe()) == [], "an untouched member is what the engine takes it for"
    members[seen.id] = member(state=State.DRAINING)
    assert list(probe()) == [PeerState(seen.id, draining=True)] and list(probe()) == []
    members[seen.id] = member(maintenance="maintenance", cordoned=True)
    assert list(probe()) == [PeerState(seen.id, True, False, MaintenanceState.MAINTENANCE)]
    members[seen.id] = member()
    assert list(probe()) == [PeerState(seen.id)]
    members.clear()
    assert list(probe()) == [] and peer_state(seen) == PeerState(seen.id)
