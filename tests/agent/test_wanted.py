"""What shall run on a node: what it tells its engine and others, of the spec, of its room, and when it knows no spec."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from agent import wanted as room
from agent.meshos.events import DaemonIntent, Surveyed
from agent.spec.model import DaemonSpec, FleetSpec, Resources
from agent.wanted import Wanted
from discovery.identity import Identity
from discovery.lifecycle import State
from discovery.member import Member, Record, SignedRecord

ME, OTHER = (Identity.from_seed(bytes(31) + bytes([n])) for n in (1, 2))
SEALED = SignedRecord(b"", bytes(64))


def member(of: Identity, **fields: Any) -> Member:
    record = Record(
        pub=of.pub,
        mesh="alpha",
        name=f"n{of.id % 97}",
        kind="compute",
        incarnation=1,
        version=1,
        state=State.ALIVE,
        addrs=[],
        **{"millicores": 4000, "memory_mib": 4096, **fields},
    )
    return Member(record, SEALED, State.ALIVE, 0.0, 0.0, 0.0)


class Host:
    """A node around `wanted`, as far as it looks at one. `said`: what its engine was told, the latest of each."""

    def __init__(
        self, *daemons: DaemonSpec, adopted: tuple[str, ...] = (), kept: Any = None, blind: bool = False
    ) -> None:
        self.said: dict[str, DaemonIntent] = {}
        self.identity, self.stopping = ME, False
        self.facts: dict[str, Any] = {} if kept is None else {"taken_on": kept}
        self.journal = SimpleNamespace(get=self.facts.get, set=self.facts.__setitem__)
        self.swim = SimpleNamespace(me=member(ME), members={})
        self.chains = SimpleNamespace(
            spec=FleetSpec(daemon=list(daemons)),
            spec_missing=blind,
            users=SimpleNamespace(spec=lambda *told: None),
        )
        self.data = SimpleNamespace(spec=lambda counts: None)
        self.there = list(adopted)
        self.engine = SimpleNamespace(
            loop=SimpleNamespace(life=SimpleNamespace(joined=True), state=SimpleNamespace(draining=False)),
            daemons=SimpleNamespace(names=lambda: self.there, define=lambda specs: None),
            begin_daemons=self._begin,
            say=self._say,
            kept=frozenset,
            state_record=self._state_record,
        )
        self.surveyed = 0
        self.wanted = Wanted(self)  # type: ignore[arg-type]

    def _say(self, event: DaemonIntent | Surveyed) -> None:
        if isinstance(event, Surveyed):
            self.surveyed += 1
        else:
            self.said[str(event.daemon)] = event

    async def _begin(self, specs: Any) -> list[str]:
        return list(self.there)

    def _state_record(self) -> None:
        me = self.swim.me
        me.record = msgspec.structs.replace(me.record, keeps=self.wanted.packed(cordoned=False))

    def told(self) -> frozenset[str] | None:
        """What others read in its record."""
        return self.wanted._keeping.unpacked(self.swim.me.record.keeps)

    def runs(self) -> set[str]:
        return {str(i.daemon) for i in self.said.values() if i.intent == "run" and not i.held}


def sized(name: str, cpu: float = 1, **fields: Any) -> DaemonSpec:
    return DaemonSpec(name=name, command=["x"], resources=Resources(cpu=cpu), **fields)


def play(*daemons: DaemonSpec, then: Callable[[Host], None], **more: Any) -> None:
    async def inside() -> None:
        host = Host(*daemons, **more)
        await host.wanted.begin()
        try:
            then(host)
        finally:
            host.wanted.close()

    asyncio.run(inside())


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "JOIN_SETTLE_S", 0.0)


def test_what_is_taken_on_is_told_and_what_does_not_fit_is_held_with_its_reason() -> None:
    def then(host: Host) -> None:
        host.wanted.look()
        assert host.runs() == {"a", "plain"} and host.told() == {"a"}
        assert host.said["b"] == DaemonIntent(
            "b", "run", None, (), host.said["b"].version, "needs 2 cores, 1 free of 4"
        )

    play(sized("a", 3), sized("b", 2), DaemonSpec(name="plain", command=["x"]), then=then)


def test_what_another_has_taken_on_is_left_to_it_and_this_nodes_own_is_kept() -> None:
    def then(host: Host) -> None:
        other = member(OTHER)
        host.swim.members[OTHER.id] = other
        other.record = msgspec.structs.replace(other.record, keeps=host.wanted._keeping.packed({"a", "c"}))
        host.wanted.look()
        assert host.runs() == {"b"} == host.told()

    play(sized("a"), sized("b"), sized("c"), adopted=("b",), then=then)


def test_adopted_daemons_and_those_of_before_an_update_are_told_before_the_first_look() -> None:
    def then(host: Host) -> None:
        assert host.told() == {"a", "b"}
        host.wanted.hand_over()
        assert host.facts["taken_on"] == ["a", "b"]

    play(sized("a"), sized("b"), sized("c"), adopted=("a",), kept=["b", "gone"], then=then)


def test_drained_node_gives_up_what_another_takes_on_at_once_and_does_not_take_it_back() -> None:
    def then(host: Host) -> None:
        host.wanted.look()
        assert host.told() == {"a"}
        other = member(OTHER, keeps=host.wanted._keeping.packed({"a"}))
        host.engine.loop.state.draining = True
        host.wanted.look()
        assert host.told() == frozenset()
        host.swim.members[OTHER.id] = other
        host.wanted.look()
        assert host.runs() == set()
        host.engine.loop.state.draining = False
        host.wanted.look()
        assert host.runs() == set() and host.told() == frozenset()

    play(sized("a"), then=then)


def test_node_that_knows_no_spec_leaves_what_runs_alone_until_one_comes() -> None:
    def then(host: Host) -> None:
        host.wanted.look()
        assert host.said == {} and not host.surveyed
        host.chains.spec_missing = False
        host.wanted.accepted(host.chains.spec)
        assert host.said["stray"].intent == "stop" and host.surveyed == 1, "once, and behind what shall run"
        host.wanted.look()
        assert host.surveyed == 1

    play(adopted=("stray",), blind=True, then=then)
    play(adopted=("stray",), then=lambda host: assert_stopped(host, "stray"))


def assert_stopped(host: Host, name: str) -> None:
    assert host.said[name].intent == "stop"


def test_class_is_held_where_its_own_requirements_do_not_fit_beside_the_rest_and_freed_when_they_do() -> None:
    inner = DaemonSpec(name="inner", entry_point="inner", all=True)

    def then(host: Host) -> None:
        host.wanted.look()
        assert host.runs() == {"a", "inner"} and host.wanted.required("inner") is None
        assert not host.wanted.room_for("inner", Resources(cpu=2))
        assert host.said["inner"].held == "needs 2 cores, 1 free of 4" and host.runs() == {"a"}
        assert host.wanted.required("inner") == Resources(cpu=2)
        host.chains.spec = FleetSpec(daemon=[sized("a", 2), inner])
        host.wanted.accepted(host.chains.spec)
        assert host.runs() == {"a", "inner"} and host.wanted.room_for("inner", Resources(cpu=2))
        host.there = ["a", "inner"]
        host.chains.spec = FleetSpec(daemon=[sized("a", 3), inner])
        host.wanted.accepted(host.chains.spec)
        assert host.runs() == {"a", "inner"}, "what runs is not ended"
        assert host.told() == {"a"}, "others do not count on what only this node knows"

    play(sized("a", 3), inner, then=then)
