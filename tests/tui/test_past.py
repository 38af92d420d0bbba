"""The fleet as it was, from the kept events: what they tell, what they don't, and the Events view scrubbed back."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.tui.console import NORMAL, WIDE, console
from tests.tui.fakes import WALL_MS, event, events, first_frame, fleet
from tui.model.events import Event, EventLog
from tui.model.past import Now, counts_then, fleet_then, past_lines
from tui.model.spans import plain


def moved(at_s: float, name: str, old: str | None, new: str, kind: str = "node.changed") -> dict[str, Any]:
    return event(kind, name, at_s, id=name, **{"from": old, "to": new})


def log(*documents: dict[str, Any]) -> list[Event]:
    return [Event(document, key) for key, document in enumerate(documents)]


TOLD = log(
    moved(0, "a.b.1", None, "alive", "node.joined"),
    moved(10, "a.b.2", None, "alive", "node.joined"),
    moved(20, "a.b.1", "alive", "degraded"),
    moved(30, "a.b.3", "alive", "draining"),
    event("node.evicted", "a.b.2", 40, id="a.b.2", source="left"),
    moved(50, "a.b.1", "degraded", "alive"),
)


def then(key: int, live: dict[str, Now] | None = None) -> dict[str, str]:
    return {node.id: node.state for node in fleet_then(TOLD, key, live or {})[0]}


def test_fleet_then_is_folded_up_to_the_moment_and_not_beyond() -> None:
    assert then(1) == {"a.b.1": "alive", "a.b.2": "alive", "a.b.3": "alive"}
    assert then(2) == {"a.b.1": "degraded", "a.b.2": "alive", "a.b.3": "alive"}
    assert then(4) == {"a.b.1": "degraded", "a.b.3": "draining"}
    assert then(5) == {"a.b.1": "alive", "a.b.3": "draining"}
    found, moment = fleet_then(TOLD, 4)
    assert moment == WALL_MS + 40_000
    assert {node.id: node.for_ms for node in found} == {"a.b.1": 20_000, "a.b.3": 10_000}


def test_node_that_was_not_in_view_yet_is_not_shown() -> None:
    assert "a.b.2" not in then(0)


def test_state_before_any_event_is_what_the_next_one_came_from_and_its_age_is_unknown() -> None:
    [_, third] = sorted(fleet_then(TOLD, 0)[0], key=lambda node: node.id)
    assert (third.id, third.state, third.for_ms) == ("a.b.3", "alive", None)
    came = log(moved(0, "a.b.1", None, "alive", "node.joined"), event("node.evicted", "a.b.9", 5, id="a.b.9"))
    assert {node.id: node.state for node in fleet_then(came, 0)[0]} == {"a.b.1": "alive", "a.b.9": ""}


def test_node_without_events_is_known_only_where_its_state_began_before() -> None:
    old = Now("a.b.7", "a", "alive", WALL_MS - 60_000)
    young = Now("a.b.8", "a", "alive", WALL_MS + 45_000)
    unknown = Now("a.b.9", "a", "alive", None)
    live = {now.name: now for now in (old, young, unknown)}
    found = then(4, live)
    assert (found["a.b.7"], found["a.b.8"], found["a.b.9"]) == ("alive", "", "")


def test_expired_mesh_leaves_its_nodes_unknown() -> None:
    told = log(
        moved(0, "a.b.1", None, "alive", "node.joined"),
        moved(1, "c.b.1", None, "alive", "node.joined"),
        event("mesh.expired", "c.b.1", 2, id=None, node=None, mesh="c"),
    )
    found, _ = fleet_then(told, 2)
    assert {node.id: node.state for node in found} == {"a.b.1": "alive", "c.b.1": ""}
    assert plain(counts_then(found)) == "●1 –1"


def test_past_says_whose_memory_it_is_and_counts_what_has_no_room() -> None:
    found, moment = fleet_then(TOLD, 2)
    lines = [plain(line) for line in past_lines(found, moment, "a.gateway.1", 66, 4)]
    assert "from events kept by a.gateway.1" in lines[0] and "loads were not recorded" in lines[1]
    assert lines[-1].strip() == "and 2 more" and len(lines) == 4
    assert "◐ a.b.1  degraded" in lines[2] and lines[2].rstrip().endswith("–     –")


def test_backfill_takes_only_what_meets_the_events_held_and_has_room() -> None:
    kept = [moved(at, f"a.b.{at}", None, "alive") for at in range(8)]
    held = EventLog(6)
    held.extend(kept[5:])
    assert held.backfill(kept[:3]) == 0
    assert held.backfill(kept) == 3
    assert [item.node for item in held.items] == [f"a.b.{at}" for at in range(2, 8)]
    assert [item.key for item in held.items] == [-3, -2, -1, 0, 1, 2]
    held.extend([moved(9, "a.b.9", None, "alive")])
    assert held.items[-1].key == 3


# --- on the screen


def test_events_are_scrubbed_back_with_the_fleet_as_it_was_and_to_now_again() -> None:
    async def main() -> None:
        for size in (WIDE, NORMAL):
            async with console(size=size) as here:
                await here.press("7")
                await here.shows("12 held", "node.evicted")
                await here.press("]")
                await here.shows("this is now")
                await here.press("[", "[")
                await here.shows(
                    "events as of ", "from events kept by alpha.console.31aa90", "loads were not recorded"
                )
                await here.until(
                    lambda: "updating" not in here.line("5d20bb  "), "what came later to be away"
                )
                await here.press("]", "]", "]")
                await here.shows("following")
                await here.hides("as of ")

    asyncio.run(main())


def test_scrubbing_asks_once_for_what_the_agent_keeps_from_before() -> None:
    async def main() -> None:
        late = first_frame(fleet(), events=events()[6:])
        async with console(late, size=WIDE) as here:
            await here.press("7")
            await here.shows("6 held", "node.evicted")
            await here.press("[")
            await here.shows("12 held")
            await here.press("[", "[", "[", "[", "[")
            await here.shows("as of ")
            assert here.client.polled == ["events 4096"]

    asyncio.run(main())
