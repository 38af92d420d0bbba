"""A node's page as lines: what waits comes first, what is told by whom, two columns where there is room."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.errors import Refused
from tests.tui.console import console
from tests.tui.fakes import daemon, first_frame, row
from tui import polling
from tui.cli.program import COMMANDS, SECTIONS
from tui.model import node_sections
from tui.model.events import Event
from tui.model.glyphs import UNICODE
from tui.model.page import BESIDE, history, node_page
from tui.model.rows import Fleet
from tui.model.spans import line_width, plain

NAME, NUMBER = "alpha.broker.77b1e9", 0x77B1E9
FAILED = {"source": "daemon", "action": None, "target": "crasher", "reason": "exit status 3"}
DOC: dict[str, Any] = {
    "answered_by": NAME,
    "age_ms": 0,
    "daemons": [
        daemon("crasher", NAME, NUMBER, state="crash_looping", until_ms=60_000, reason="exit status 3")
    ],
    "held_back": [{"what": "start daemon crasher", "reason": "crash-looping", "in_ms": 60_000}],
    "recent_failures": [{**FAILED, "age_ms": age} for age in (90_000, 60_000, 30_000)]
    + [{**FAILED, "target": "web", "age_ms": 10_000, "until_in_ms": None, "retry_after_ms": 30_000}],
    "peers": [
        {"peer": "alpha.gateway.4f1a77", "rtt_ms": 0.31, "health": "healthy", "maintenance": "active"},
        {"peer": "alpha.compute.9e02f1", "rtt_ms": None, "health": "unreachable", "reason": "exited"},
    ],
    "replicas": [
        {
            "chain": "orders",
            "holders": [NAME, "alpha.gateway.4f1a77"],
            "desired": 3,
            "leader": NAME,
            "intent": "drop",
        }
    ],
    "stats": {"ticks": 4210, "late_ticks": 0, "dropped": 0},
    "why": [],
}


def page(doc: dict[str, Any] | None, cells: int = 100, passed_ms: float = 0.0) -> list[str]:
    view = Fleet()
    view.fold(first_frame([row(NAME, NUMBER, state="degraded", reason="daemon crasher crash-looping")]), 0.0)
    lines = node_page(next(iter(view.rows.values())), doc, passed_ms, "", view, 0.0, cells)
    assert all(line_width(line) <= cells for line in lines)
    return [plain(line) for line in lines]


def places(lines: list[str], *titles: str) -> list[int]:
    return [next(at for at, line in enumerate(lines) if f" {title} ─" in line) for title in titles]


def test_page_puts_what_waits_before_what_the_node_is() -> None:
    found = places(
        page(DOC), "held back by", "daemons", "why it is in this state", "vitals", "facts", "peers"
    )
    assert found == sorted(found)


def test_page_on_a_wide_terminal_has_both_beside_each_other() -> None:
    lines = page(DOC, BESIDE)
    held, vitals = places(lines, "held back by", "vitals")
    assert held == vitals and len(lines) < len(page(DOC))


def test_page_says_in_facts_what_is_as_it_should_be_and_who_told() -> None:
    text = "\n".join(page(DOC))
    assert "told by     the node itself, 0s old" in text and "avoids      nobody" in text
    assert "maintenance active: neither drained nor in maintenance" in text
    other = "\n".join(page({**DOC, "answered_by": "alpha.gateway.4f1a77"}, passed_ms=4_000))
    assert "alpha.gateway.4f1a77, 4s old: the node itself was not heard" in other and "avoids" not in other


def test_page_of_a_dead_node_names_the_replica_and_its_age_in_every_section() -> None:
    last = {
        **DOC,
        "answered_by": "alpha.gateway.4f1a77",
        "age_ms": 26_000,
        "last_vitals": {"cpu": 0.97, "mem": None},
    }
    lines = page(last, passed_ms=2_000)
    text = "\n".join(lines)
    assert "the replica of its chain on alpha.gateway.4f1a77, 28s old" in text
    assert "last loads  cpu 97%" in text and "maintenance active" not in text
    places(lines, "daemons, as of 28s ago", "recent failures, as of 28s ago")


def test_same_failure_over_and_over_is_one_line_with_its_newest_age() -> None:
    lines = [plain(line).strip() for line in node_sections.failures(DOC, 0.0, 90, UNICODE)]
    assert lines == ["10s web: exit status 3  retry 0:20", "30s crasher: exit status 3 ×3"]


def test_peers_with_trouble_come_first() -> None:
    lines = [plain(line) for line in node_sections.peers(DOC, 90, UNICODE)]
    assert "unreachable, exited" in lines[0] and "0.3ms  healthy" in lines[1]


def test_replica_that_lacks_holders_or_is_given_up_says_so() -> None:
    [line] = node_sections.replicas(DOC, 90, UNICODE)
    assert "2/3 held" in plain(line) and "to be dropped" in plain(line) and ("    2/3 held", "hot") in line


def test_counters_at_zero_are_only_named() -> None:
    lines = [plain(line).strip() for line in node_sections.stats(DOC, 90)]
    assert lines == ["ticks  4210", "0: late_ticks, dropped"]


def test_move_of_a_lease_is_no_state() -> None:
    moved = Event({"kind": "lease.changed", "to": "alpha.gateway.4f1a77", "at_ms": 0, "source": "heard"}, 0)
    assert (moved.role, moved.move, moved.to_state) == ("text", ("", ""), "")
    assert "lease.changed  to alpha.gateway.4f1a77, heard" in plain(history([moved], 90, UNICODE)[0])


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["peers", "replicas", "recent_failures", "stats", "last_vitals", "daemons"]),
        st.none()
        | st.text(max_size=5)
        | st.lists(st.none() | st.dictionaries(st.text(max_size=9), st.none())),
    )
)
def test_page_of_nonsense_never_raises(doc: dict[str, Any]) -> None:
    page({**DOC, **doc})


def test_agent_that_does_not_know_the_question_is_not_asked_over_and_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(polling, "EVERY_S", 0.0)

    async def main() -> None:
        async with console() as here:
            here.client.chain_rows = Refused("unknown_method", "no method 'chains' here")
            await here.press("5")
            await here.shows("keeps no chains: update it")
            asked = len(here.client.polled)
            for _ in range(3):
                here.app._tick()
                await asyncio.sleep(0)
            assert len(here.client.polled) == asked
            here.client.chain_rows = None
            await here.press("f5")
            await here.shows("chains  5 chains")

    asyncio.run(main())


def test_sections_of_the_help_name_only_commands_there_are() -> None:
    named = [name for names in SECTIONS.values() for name in names]
    assert set(named) <= set(COMMANDS) and len(named) == len(set(named))
