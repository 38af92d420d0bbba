"""The fleet as it was, from the kept events: what they tell, what they don't, and the Events view scrubbed back."""

from __future__ import annotations

import asyncio
from typing import Any

from discovery.errors import Refused
from tests.tui.console import NORMAL, WIDE, console
from tests.tui.fakes import WALL_MS, event, events, first_frame, fleet
from tui.model.events import Event, EventLog
from tui.model.loads import NEAR_MS, RETRY_MS, WINDOW_MS, Load, Loads, Question
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


def test_state_that_goes_on_since_after_the_last_event_about_it_was_there_though_nobody_told_of_it() -> None:
    at_s = {"before": 5, "after": 25, "later": 35}
    for when, state in (("before", "degraded"), ("after", "draining"), ("later", "degraded")):
        live = {"a.b.1": Now("a.b.1", "a", "draining", WALL_MS + at_s[when] * 1_000)}
        assert then(3, live)["a.b.1"] == state, when


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
    lines = [
        plain(line) for line in past_lines(found, moment, "a.gateway.1", 66, 4, standing="loads: asking")
    ]
    assert "from events kept by a.gateway.1" in lines[0] and lines[1].endswith("loads: asking")
    assert lines[-1].strip() == "and 2 more" and len(lines) == 4
    assert "◐ a.b.1  degraded" in lines[2] and set(lines[2].split()[4:]) == {"–"}


# --- loads


def loads(*rows: dict[str, Any], silent: tuple[str, ...] = (), at_s: float = 0) -> Loads:
    """What a question about the moment `at_s` was answered with."""
    book = Loads()
    question = book.question(WALL_MS + at_s * 1000, None, WALL_MS)
    assert question is not None
    book.asking(question, WALL_MS)
    book.fold(question, {"rows": list(rows), "silent": list(silent)})
    return book


def told(node: str, *samples: tuple[float, int | None], **changes: Any) -> dict[str, Any]:
    listed = [[WALL_MS + int(at * 1000), cpu, 400, None, 1, 2] for at, cpu in samples]
    return {"node_id": node, "from_replica": None, "samples": listed} | changes


def test_load_is_the_last_one_recorded_by_the_moment_and_never_a_later_one() -> None:
    book = loads(told("n", (-100, 100), (-40, 200), (-5, 300)))
    for at_s, cpu, age_ms in ((-100, 0.1, 0), (-41, 0.1, 59_000), (-40, 0.2, 0), (-6, 0.2, 34_000)):
        load = book.at(WALL_MS + at_s * 1000, None)["n"]
        assert (load.cpu, load.age_ms, load.running, load.total) == (cpu, age_ms, 1, 2)
    assert book.at(WALL_MS - 101_000, None) == {}


def test_load_that_was_recorded_long_before_says_nothing_about_the_moment() -> None:
    book = loads(told("n", (-NEAR_MS / 1000 - 10, 100)))
    assert book.at(WALL_MS - 10_000, None)["n"].cpu == 0.1
    assert book.at(WALL_MS - 9_999, None) == {}
    assert "no loads were recorded near it" in book.standing(WALL_MS - 9_999, None)


def test_loads_are_asked_for_once_an_hour_and_again_only_where_it_may_help() -> None:
    hour = WINDOW_MS
    start = WALL_MS // hour * hour
    book = Loads()
    first = book.question(start + 5_000, None, start + 60_000)
    assert first == Question(start - NEAR_MS, start + hour, None)
    book.asking(first, start + 60_000)
    assert book.question(start + 5_000, None, start + 61_000) is None, "on its way"
    book.fold(first, {"rows": []})
    assert book.question(start + 59_000, None, start + 300_000) is None, "all that can be known"
    assert book.question(start + 61_000, None, start + 300_000) == first, "later than the answer"
    assert book.question(start - 1, None, start + 300_000) == Question(start - hour - NEAR_MS, start, None)
    assert book.question(start + 5_000, "beta", start + 300_000) is not None, "another mesh"
    book.asking(first, start + 300_000)
    book.failed(first, "no answer")
    assert book.question(start, None, start + 301_000) is None
    assert book.question(start, None, start + 300_000 + RETRY_MS) == first
    book.asking(first, start + 320_000)
    book.fold(first, {"rows": [], "silent": ["a.b.1"]})
    assert "1 node silent" in book.standing(start, None)
    assert book.question(start, None, start + 321_000) is None
    assert book.question(start, None, start + 320_000 + RETRY_MS) == first


def test_loads_of_old_hours_are_forgotten() -> None:
    book = Loads()
    for back in range(20):
        moment = WALL_MS - back * WINDOW_MS
        question = book.question(moment, None, WALL_MS)
        assert question is not None
        book.asking(question, WALL_MS)
        book.fold(question, {"rows": [told("n", (-back * 3600, 10))]})
    assert book.at(WALL_MS, None) == {} and book.at(WALL_MS - 19 * WINDOW_MS, None)["n"].cpu == 0.01


def test_nonsense_in_an_answer_about_loads_is_left_out() -> None:
    rubbish: list[Any] = [
        None,
        3,
        {"node_id": 5},
        {"node_id": "a"},
        {"node_id": "b", "samples": [7, [], ["x"] * 6]},
    ]
    bad = {"node_id": "c", "from_replica": 3, "samples": [[WALL_MS, "9", 2_000, -1, True, [1]]]}
    book = loads(*rubbish, bad, silent=(1, "", "\x1b[31mx"))  # type: ignore[arg-type]
    assert book.at(WALL_MS, None) == {"c": Load(None, None, None, None, None, 0, "3")}
    book.fold(Question(0, 1, None), {"rows": []})
    assert book.at(WALL_MS, None)


def test_loads_are_shown_with_their_age_and_none_for_who_was_dead() -> None:
    events = log(
        moved(0, "a.b.1", None, "alive", "node.joined"),
        moved(1, "a.b.2", None, "alive", "node.joined"),
        moved(2, "a.b.2", "alive", "dead"),
        moved(3, "a.b.3", None, "alive", "node.joined"),
    )
    book = loads(told("a.b.1", (-30, 250)), told("a.b.2", (-1, 900), from_replica="a.b.9"))
    for key, second in ((1, "90%   40%     –    1/2    2s"), (3, "–     –     –      –     –")):
        found, moment = fleet_then(events, key)
        assert moment is not None
        at = book.at(moment, None)
        lines = [plain(line) for line in past_lines(found, moment, "a.b.9", 76, 20, loads=at)]
        rows = {line.split()[1]: line for line in lines if "a.b." in line and line[1] in "●✕"}
        assert second in rows["a.b.2"], lines
        assert ("from a copy of its chain on a.b.9: a.b.2" in lines[-1]) is (key == 1)
        assert "25%   40%" in rows["a.b.1"]
    assert set(rows["a.b.3"].split()[4:]) == {"–"}


def test_columns_of_loads_leave_before_a_name_is_cut() -> None:
    found, moment = fleet_then(log(moved(0, "alpha.compute.9e02f1", None, "alive", "node.joined")), 0)
    for cells, there, away in (
        (76, {"DISK", "DMN"}, set()),
        (66, {"DMN"}, {"DISK"}),
        (60, set(), {"DISK", "DMN"}),
    ):
        lines = [plain(line) for line in past_lines(found, moment, "g", cells, 20)]
        words = set(lines[2].split())
        assert there | {"CPU", "MEM", "AGE"} <= words and not away & words
        assert "alpha.compute.9e02f1" in lines[3] and max(map(len, lines)) <= cells


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
                    "events as of ", "from events kept by alpha.console.31aa90", "loads as recorded by then"
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
            await here.shows("loads as recorded by then")
            assert [asked for asked in here.client.polled if asked.startswith("events")] == ["events 4096"]

    asyncio.run(main())


def test_loads_of_a_moment_are_shown_as_recorded_and_asked_for_once_however_long_a_key_is_held() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            await here.press("7")
            await here.shows("12 held")
            await here.press(*"[[[[]]][[[")
            await here.shows("97%   70%   51%    2/3    1s")
            assert "–     –     –      –     –" in here.line("4f1a77  alive")
            await here.press("]")
            await here.shows("98%   71%   51%    2/3   20s")
            await here.press("]")
            await here.shows("98%   71%   51%    2/3   48s")
            assert len([asked for asked in here.client.polled if asked.startswith("past")]) == 1

    asyncio.run(main())


def test_loads_that_nobody_can_tell_are_said_to_be_so() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            here.client.past_rows = Refused("unknown_method", "a: its build does not know past")
            await here.press("7")
            await here.shows("12 held")
            await here.press("[", "[")
            await here.shows("loads: a: its build does not know past")
            assert "–     –     –      –     –" in here.line("77b1e9  degraded")

    asyncio.run(main())
