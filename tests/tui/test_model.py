"""The pure model: locators, ages, tables, forecasts, the fold of frames."""

from __future__ import annotations

import itertools
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tui.fakes import delta, event, events, first_frame, fleet, row
from tui.model import ages, glyphs, map, text
from tui.model.blast import forecast
from tui.model.columns import FLEET, trouble_key
from tui.model.events import EventLog
from tui.model.lineedit import LineEdit
from tui.model.locator import parse
from tui.model.ops import OpBook, OpEntry
from tui.model.rows import Change, Fleet, Row, rows_of
from tui.model.spans import fit, keep, line_width, plain, spread
from tui.model.status import alarms, notices
from tui.model.table import Scene, layout
from tui.model.views import VIEWS

# A shared machine may stop for longer than any example takes.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


# -- the table


def table(rows: list[dict[str, Any]]) -> Any:
    made = VIEWS["fleet"].new_table()
    made.items = {item.id: item for item in rows_of(rows)}
    made.rebuild(0.0)
    return made


STATE = st.sampled_from(["alive", "dead", "degraded", "draining", "joining"])
STEP = st.tuples(st.integers(0, 9), STATE, st.floats(0, 1))


@given(st.lists(STEP, max_size=30), st.sampled_from(["", "state:alive", "sort:-cpu", "cpu>50 sort:name"]))
def test_table_kept_up_to_date_equals_one_built_anew(steps: list[tuple[int, str, float]], line: str) -> None:
    view = Fleet()
    kept = VIEWS["fleet"].new_table()
    kept.items = view.rows
    kept.set_locator(parse(line), 0.0)
    for number, state, cpu in steps:
        name = f"alpha.broker.{number}"
        if state == "joining":
            change = view.fold({"rows": [], "gone": [f"{number + 1:016x}"]}, 0.0)
        else:
            change = view.fold({"rows": [row(name, number + 1, state=state, cpu=cpu, reason="r")]}, 0.0)
        kept.apply(change.rows, change.gone, 0.0)
        fresh = VIEWS["fleet"].new_table()
        fresh.items = view.rows
        fresh.set_locator(parse(line), 0.0)
        assert kept.order == fresh.order
        assert kept.starts == fresh.starts
        assert [kept.at_line(y) for y in range(kept.lines)] == [
            (n, i) for n in fresh.order for i in range(fresh.height(view.rows[n]))
        ]
        assert kept.cursor in kept.order or not kept.order


def test_cursor_of_a_row_that_goes_stays_in_its_place() -> None:
    made = table(fleet())
    made.move_to(3)
    after = made.order[4]
    del made.items[made.cursor]
    made.rebuild(0.0)
    assert made.cursor == after


def test_marks_outside_the_filter_are_kept_and_counted_as_targets() -> None:
    made = table(fleet())
    made.set_locator(parse("kind:gateway"), 0.0)
    made.mark_all()
    made.set_locator(parse("kind:broker"), 0.0)
    made.toggle(made.order[0])
    assert {item.kind for item in made.targets()} == {"gateway", "broker"}
    assert len(made.targets()) == 3


@given(st.integers(10, 400))
def test_layout_never_exceeds_the_screen_and_keeps_name_and_state(cells: int) -> None:
    items = rows_of(fleet())
    scene = Scene(facts=frozenset({"meshes", "daemons", "failures", "notes", "maintenance"}))
    placed = layout(FLEET, cells, scene, items)
    assert all(a.x + a.width <= b.x for a, b in itertools.pairwise(placed))
    if placed:
        assert placed[-1].x + placed[-1].width <= cells
    if cells >= 40:
        assert {"name", "state"} <= {place.column.key for place in placed}
    for place in placed:
        for item in items:
            assert line_width(place.column.cell(item, scene, place.width)) <= max(place.width, 4), (
                place.column.key
            )


def test_columns_leave_by_priority() -> None:
    items = rows_of(fleet())
    scene = Scene(facts=frozenset({"notes"}))
    at = {cells: {p.column.key for p in layout(FLEET, cells, scene, items)} for cells in range(30, 220)}
    assert {"cpu", "age", "notes", "mem"} <= at[80]
    assert {"build", "disk", "kind", "addr"} <= at[200]


# -- ages and text


@pytest.mark.parametrize(
    ("ms", "shown"),
    [
        (None, "–"),
        (-5, "0s"),
        (0, "0s"),
        (59_999, "59s"),
        (60_000, "1m"),
        (3_600_000, "60m"),
        (7_200_000, "2h"),
        (172_800_000, "2d"),
        (10**15, "31709y"),
    ],
)
def test_age_is_short(ms: float | None, shown: str) -> None:
    if ms == 3_600_000:
        shown = "1h"
    assert ages.age(ms) == shown


@pytest.mark.parametrize(
    ("ms", "shown"), [(260_000, "4:20"), (0, "0:00"), (-1, "0:00"), (3_723_000, "1:02:03")]
)
def test_countdown(ms: float, shown: str) -> None:
    assert ages.countdown(ms) == shown


@pytest.mark.parametrize(
    ("given_text", "ms"),
    [
        ("30s", 30_000),
        ("1500ms", 1500),
        ("5m", 300_000),
        ("7", 7_000),
        ("x", None),
        ("", None),
        ("-1s", None),
    ],
)
def test_duration(given_text: str, ms: float | None) -> None:
    assert ages.duration_ms(given_text) == ms


@given(st.text(), st.integers(1, 40))
def test_cleaned_text_fits_and_moves_nothing(raw: str, cells: int) -> None:
    clean = text.clean(raw)
    assert text.clean(clean) == clean
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066\u200f\ufeff" for c in clean)
    assert text.width(text.elide(clean, cells)) <= cells
    assert text.width(text.shorten(clean, cells)) <= cells
    assert text.width(text.pad(clean, cells)) <= cells
    if cells > 1:
        assert all(text.width(line) <= cells for line in text.wrap(clean, cells))


def test_names_are_elided_in_the_middle_only_when_too_long() -> None:
    assert text.elide("alpha.broker.11c3a0", 19) == "alpha.broker.11c3a0"
    short = text.elide("alpha.broker.11c3a0", 14)
    assert short.startswith("alpha") and short.endswith("11c3a0") and len(short) == 14


def test_sentences_end_at_a_word() -> None:
    assert text.shorten("cpu over 95 % for 15 s", 14) == "cpu over 95 …"
    assert text.shorten("to gateway.860942, heard", 14) == "to gate…60942,"
    assert text.shorten("to gateway.860942 heard", 18) == "to gateway.860942…"
    assert text.shorten("to gateway.860942", 16) == "to gate…y.860942"


@given(st.lists(st.integers(0, 1000) | st.none(), max_size=80), st.integers(0, 60))
def test_sparkline_is_as_wide_as_asked_and_shows_the_highest(history: list[int | None], cells: int) -> None:
    line = glyphs.spark(history, cells)
    assert len(line) == cells
    known = [v for v in history if v is not None]
    if cells and known:
        assert (
            max(line, key=lambda c: glyphs.UNICODE.spark.find(c))
            == glyphs.UNICODE.spark[max(known) * 8 // 1001]
        )


@given(st.floats(0, 1), st.integers(1, 30))
def test_bar_is_as_wide_as_asked(value: float, cells: int) -> None:
    filled, rest = glyphs.bar(value, cells)
    assert len(filled) + len(rest) == cells


@given(st.lists(st.text(string.ascii_letters + "日é", max_size=9), max_size=6), st.integers(0, 40))
def test_lines_are_fitted_exactly(parts: list[str], cells: int) -> None:
    line = [(part, "text") for part in parts]
    exact = line_width(fit(line, cells))
    assert exact == cells or (exact == cells - 1 and "日" in "".join(parts))
    kept = keep([[piece] for piece in line], cells, (" ", "text"))
    assert line_width(kept) <= cells


def test_right_end_leaves_whole_when_both_do_not_fit() -> None:
    assert plain(spread([("left", "text")], [("right", "text")], 12)) == "left   right"
    assert plain(spread([("left", "text")], [("right", "text")], 8)) == "left    "


@given(
    st.text(string.printable, max_size=20),
    st.lists(
        st.sampled_from(
            ["left", "right", "home", "end", "backspace", "delete", "ctrl+w", "ctrl+u", "ctrl+k", "x"]
        )
    ),
)
def test_line_edit_keeps_its_caret_inside(start: str, keys: list[str]) -> None:
    edit = LineEdit()
    edit.insert(start)
    for key in keys:
        edit.key(key, key if len(key) == 1 else None)
        assert 0 <= edit.caret <= len(edit.text)
        assert edit.text.isprintable() or not edit.text
        assert sum(role == "caret" for _, role in edit.spans(10)) == 1


# -- rows and frames


def test_ages_go_on_from_receipt_and_late_data_is_told() -> None:
    item = Row(row("alpha.broker.1", 1, last_seen_ms=400, since_ms=1000, period_ms=5000), 100.0)
    assert item.age_ms(100.0) == 400
    assert item.age_ms(112.0) == 12_400
    assert not item.late(112.0)
    assert item.late(115.0)
    assert item.since_ms(101.0) == 2000


def test_history_goes_on_with_live_frames_a_sample_a_period() -> None:
    item = Row(row("alpha.broker.1", 1, history=[100, None, 300], cpu=0.3), 0.0)
    bare = {k: v for k, v in row("alpha.broker.1", 1).items() if k != "history"}
    item.update(bare | {"cpu": 0.5}, 5.0)
    assert item.history == [100, None, 300, 500]
    item.update(bare | {"cpu": 0.6}, 6.0)
    assert item.history == [100, None, 300, 600]
    for at in range(200):
        item.update(bare | {"cpu": 0.1}, 10.0 + 5 * at)
    assert len(item.history) == 60


def test_full_frame_replaces_rows_and_delta_changes_them() -> None:
    view = Fleet()
    view.fold(first_frame(), 0.0)
    assert view.by_state()["alive"] == 9
    view.fold(delta([row("alpha.gateway.4f1a77", 0x4F1A77, state="dead")], gone=[f"{0x9E02F1:016x}"]), 1.0)
    assert view.by_state("alpha") == {"alive": 4, "degraded": 1, "draining": 1, "updating": 1, "dead": 1}
    change = view.fold(first_frame([row("beta.x.1", 5)]), 2.0)
    assert list(view.rows) == ["0000000000000005"]
    assert view.meshes() == {"beta": 1}
    assert len(change.gone) == 13


_KEYS = [
    "id",
    "name",
    "cpu",
    "state",
    "tags",
    "evidence",
    "daemons",
    "history",
    "by",
    "mesh",
    "publisher",
    "nodes",
]
_KEYS += ["impostors", "expired", "backbone", "expires_in_ms", "rtt_ms"]


@given(
    st.dictionaries(
        st.sampled_from(["full", "me", "rows", "gone", "events", "counters", "at_ms", "meshes"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=4),
            lambda c: (
                st.lists(c, max_size=3)
                | st.dictionaries(
                    st.text(max_size=4) | st.sampled_from(_KEYS),
                    c,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ),
    )
)
def test_any_frame_is_folded_without_an_error(frame: dict[str, Any]) -> None:
    view = Fleet()
    view.fold(first_frame(), 0.0)
    view.fold(frame, 1.0)
    made = VIEWS["fleet"].new_table()
    made.items = view.rows
    made.rebuild(1.0)
    VIEWS["fleet"].cells([view.rows[node] for node in made.order], 1.0)
    meshes = view.directory.rows
    map.chart(view.rows.values(), "", 80, 1.0, meshes=meshes, bare=meshes)
    VIEWS["meshes"].cells(list(meshes.values()), 1.0)
    notices(view, 0.0)
    alarms(view)


def test_changes_of_one_paint_are_taken_together() -> None:
    first = Change({"a"}, {"b"}, 1)
    first.merge(Change({"b"}, {"a"}, 2, True, True, True))
    assert first.rows == {"a", "b"} and first.gone == {"a"} and first.events == 3 and first.full
    assert first.meshes and first.moved


def test_event_log_is_bounded_and_numbers_go_on() -> None:
    log = EventLog(kept=3)
    log.extend(events()[:2])
    log.extend(events()[:4])
    assert [e.key for e in log.items] == [3, 4, 5]


def test_evidence_of_a_death_reads_as_what_is_known() -> None:
    exited, silent = (
        Row(
            row(
                "a.b.c",
                1,
                state="dead",
                mesh="a",
                evidence={"kind": kind, "by": ["a.x.1", "a.y.2"], "text": "t"},
            ),
            0.0,
        )
        for kind in ("exited", "silent")
    )
    assert exited.reason == "process gone: refused to x.1, y.2 (or a firewall closed its port)"
    assert silent.reason.startswith("no answer to x.1, y.2")


# -- forecasts


@pytest.mark.parametrize(
    ("targets", "verb", "said", "danger", "needs_count"),
    [
        (["alpha.broker.11c3a0"], "kill", [], False, False),
        (["alpha.gateway.4f1a77"], "kill", ["the last gateway of alpha"], True, True),
        (["alpha.gateway.4f1a77"], "drain", ["the last gateway of alpha"], False, False),
        (["gamma.console.6b2f00"], "kill", ["every node of gamma: the mesh ends"], True, True),
        (
            ["alpha.console.31aa90"],
            "kill",
            ["the last console of alpha", "this console is attached to"],
            True,
            True,
        ),
        (["alpha.console.31aa90"], "update", ["it loses its view until that one is back"], False, False),
        (["alpha.broker.11c3a0", "alpha.broker.77b1e9"], "update", [], False, True),
        (["beta.broker.d2c9f0"], "kill", ["no fresh data about beta.broker.d2c9f0"], False, False),
    ],
)
def test_forecast_warns_of_what_is_lost(
    targets: list[str], verb: str, said: list[str], danger: bool, needs_count: bool
) -> None:
    ids = [r["id"] for r in fleet() if r["name"] in targets]
    told = forecast(fleet(), ids, verb, attached=f"{0x31AA90:016x}")
    assert len(told.warnings) == len(said), told.warnings
    assert all(part in warning for part, warning in zip(said, told.warnings, strict=True))
    assert (told.danger, told.needs_count) == (danger, needs_count)


@pytest.mark.parametrize(
    ("name", "verb", "effect"),
    [
        ("alpha.compute.9e02f1", "kill", "is dead"),
        ("alpha.compute.c80d15", "update", "stale: takes the code on its disk"),
        ("alpha.broker.11c3a0", "update", "nothing new to take"),
        ("alpha.broker.0ad412", "resume", "takes work again"),
        ("alpha.broker.0ad412", "drain", "drains already"),
        ("alpha.broker.11c3a0", "kill", "its process ends"),
    ],
)
def test_forecast_tells_each_target_what_happens_to_it(name: str, verb: str, effect: str) -> None:
    ids = [r["id"] for r in fleet() if r["name"] == name]
    assert effect in forecast(fleet(), ids, verb).lines[0][1]


def test_forecast_is_as_old_as_its_oldest_row_and_unknown_without_an_age() -> None:
    rows = rows_of(fleet(), 50.0)
    ids = [r.id for r in rows if r.name in ("alpha.broker.11c3a0", "alpha.compute.5d20bb")]
    assert forecast(rows, ids, "kill", now=51.0).data_age_ms == 3000
    assert forecast([row("a.b.c", 7, last_seen_ms=None)], [f"{7:016x}"], "kill").data_age_ms is None


def test_forecast_of_a_target_outside_the_view_says_that_nothing_is_known() -> None:
    told = forecast(fleet(), ["00000000000000ff"], "kill")
    assert told.count == 1 and "not in this view" in told.lines[0][1]


# -- ops


def test_result_that_is_none_of_the_known_ends_is_unknown() -> None:
    entry = OpEntry("kill", "X", "1", "n", 0.0)
    entry.finish({"result": "fine"}, 1.0)
    assert entry.result == "unknown" and not entry.good


def test_tray_lets_good_ends_go_and_keeps_bad_ones_until_seen() -> None:
    book = OpBook([OpEntry("kill", "X", "1", "n", 0.0), OpEntry("kill", "X", "2", "m", 0.0)])
    book.entries[0].finish({"result": "done"}, 1.0)
    book.entries[1].finish({"result": "refused", "reason": "no"}, 1.0)
    assert len(book.current(2.0)) == 2
    assert [e.target for e in book.current(100.0)] == ["2"]
    book.mark_seen()
    assert book.current(100.0) == []


def test_tray_of_many_ops_counts_them_and_shows_the_bad_ones_first() -> None:
    book = OpBook([OpEntry("kill", "X", str(at), f"alpha.broker.{at}", 0.0) for at in range(9)])
    book.entries[7].finish({"result": "refused", "reason": "role"}, 0.1)
    book.entries[3].finish({"result": "done", "took_ms": 7}, 0.1)
    lines = [plain(line) for line in book.tray(1.0, 80, 4)]
    assert "2 of 9 ended: 1 done, 1 refused" in lines[0]
    assert any("refused: role" in line for line in lines[1:])
    assert len(lines) <= 4


# -- map and headless views


@given(st.integers(40, 200), st.sets(st.integers(0, 13)))
def test_map_has_a_card_for_every_node_and_fits_the_screen(cells: int, left_out: set[int]) -> None:
    rows = [r for at, r in enumerate(fleet()) if at not in left_out]
    drawn = map.chart(rows_of(rows), f"{0x31AA90:016x}", cells, 0.0)
    assert sorted(card.node for card in drawn.cards) == sorted(r["id"] for r in rows)
    assert all(line_width(line) <= cells for line in drawn.lines)
    assert all(card.y + 1 < len(drawn.lines) and card.x + card.width <= cells for card in drawn.cards)


def test_longer_paths_stand_further_out() -> None:
    places = [map.position(rtt, 60) for rtt in (0.01, 0.1, 1, 10, 100, 1000, 10**6)]
    assert places == sorted(places) and places[0] == 0 and places[-1] == 60


def test_keys_lead_from_card_to_card_and_stop_at_the_ends() -> None:
    drawn = map.chart(rows_of(fleet()), f"{0x31AA90:016x}", 160, 0.0)
    first = drawn.cards[0].node
    assert first == f"{0x31AA90:016x}"
    assert drawn.step(first, "up") == first
    assert drawn.step(first, "down") == f"{0x4F1A77:016x}"
    right = drawn.step(first, "right")
    assert right is not None and drawn.card(right).lane == 1  # type: ignore[union-attr]
    assert drawn.step(right, "left") in {c.node for c in drawn.cards if c.lane == 0}
    assert drawn.step(None, "down") == first


def test_trouble_key_puts_unknown_states_first() -> None:
    assert trouble_key(Row(row("a.b.c", state="weird"), 0.0)) < trouble_key(
        Row(row("a.b.c", state="degraded"), 0.0)
    )


def test_notices_are_gravest_first_and_forget_old_news() -> None:
    view = Fleet()
    view.fold(first_frame(), 0.0)
    told = event("wire.incompatible", "x.y.z", 0, addr="10.0.0.9:1", theirs=2, ours=1)
    view.fold(delta(events=[told]), 0.0)
    at = told["at_ms"]
    assert "incompatible peer 10.0.0.9:1" in notices(view, at)[0]
    assert all("incompatible" not in line for line in notices(view, at + 3_600_000))
    assert notices(view, at)[-1] == "refused or dropped 12: forged 9, login 3"
