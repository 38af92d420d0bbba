"""Daemons, failures and logs as models: order, ages, countdowns, who is missing, and what hostile lines can't do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tui.fakes import daemon, daemons, failure, failures, log_of, row
from tui.model import node_sections
from tui.model.asked import KEPT_S, STALE_S
from tui.model.blast import forecast
from tui.model.columns import detail, row_height
from tui.model.daemons import Daemons, amounts
from tui.model.failures import Failures
from tui.model.glyphs import ASCII, UNICODE
from tui.model.locator import Locator
from tui.model.logs import LEVELS, LogBook, Source, at_least, choosing, chosen, least, level_of, marked
from tui.model.replicas import chains_held
from tui.model.rows import Row
from tui.model.spans import plain
from tui.model.views import VIEWS, parse_locator

WEB = Source("a1", "alpha.broker.a1", "alpha", "web")


def names(view: str, rows: list[dict[str, Any]], line: str = "") -> list[str]:
    return [item["name"] for item in VIEWS[view].json(rows, parse_locator(f"{view} {line}"))]


def test_daemons_come_trouble_first_and_stopped_as_wished_last() -> None:
    found = names("daemons", daemons())
    assert found[:5] == ["crasher", "hang", "flaky", "batch", "ingest"]
    assert found[-1] == "old"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("state:crash", ["crasher"]),
        ("health:unhealthy,degraded", ["hang", "ingest"]),
        ("restarts>2", ["crasher", "flaky"]),
        ("saturation>90", ["web"]),
        ("next<1m", ["flaky"]),
        ("trouble:yes !held_back:cordoned", ["crasher", "hang", "flaky", "ingest"]),
        ("@beta", ["indexer"]),
        ("behind", ["ingest"]),
    ],
)
def test_daemon_filter_leaves_exactly_these(line: str, found: list[str]) -> None:
    assert names("daemons", daemons(), line) == found


def test_backoff_counts_down_by_the_viewers_clock_and_stops_at_now() -> None:
    [one] = Daemons.read([daemon("x", "alpha.b.1", 1, state="backing_off", until_ms=3_400)], 100.0)
    assert [one.next_text(now) for now in (100.0, 102.0, 103.4, 200.0)] == [
        "in 0:04",
        "in 0:02",
        "now",
        "now",
    ]
    [running] = Daemons.read([daemon("x", "alpha.b.1", 1, until_ms=3_400)])
    assert running.next_text(0.0) == ""


def test_daemon_that_should_run_and_does_not_says_why() -> None:
    [held] = Daemons.read([daemon("x", "alpha.b.1", 1, state="stopped", held_back="cordoned")])
    [mute] = Daemons.read([daemon("x", "alpha.b.1", 1, state="stopped")])
    [done] = Daemons.read([daemon("x", "alpha.b.1", 1, state="stopped", intent="stop")])
    assert held.detail(0.0) == "held back: cordoned"
    assert "should run and does not" in mute.detail(0.0)
    assert done.detail(0.0) == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cpu": 0.5, "memory": 512 << 20}, "0.5 cores, 512M memory"),
        ({"cpu": 1, "memory": None}, "1 core"),
        ({"memory": 2 << 30}, "2.0G memory"),
        ({"cpu": "1", "memory": -5}, ""),
        ({"cpu": 1e308, "memory": float("nan")}, ""),
        (None, ""),
        (7, ""),
    ],
)
def test_amounts_are_said_in_the_words_of_a_spec_and_nonsense_is_not_said(given: Any, said: str) -> None:
    assert amounts(given) == said
    [one] = Daemons.read([daemon("x", "alpha.b.1", 1, resources=given)])
    assert (f"needs {said}" in one.whole(0.0)) is bool(said)


def test_rows_of_a_silent_node_are_kept_aged_and_let_go_after_a_minute() -> None:
    book = Daemons()
    book.fold({"rows": daemons(), "silent": []}, 10.0)
    quiet = "alpha.broker.11c3a0"
    rest = [d for d in daemons() if d["node"] != quiet]
    book.fold({"rows": rest, "silent": [quiet]}, 10.0 + STALE_S + 1)
    kept = [d for d in book.rows.values() if d.node == quiet]
    assert len(kept) == 2 and all(book.old(d, 10.0 + STALE_S + 1) for d in kept)
    assert not any(book.old(d, 10.0 + STALE_S + 1) for d in book.rows.values() if d.node != quiet)
    assert plain(book.standing(20.0, 60)) == f"1 silent: {quiet}, 3s old" and quiet in book.missing()
    book.fold({"rows": rest, "silent": [quiet]}, 11.0 + KEPT_S)
    assert quiet not in {d.node for d in book.rows.values()}
    book.fold({"rows": rest, "silent": []}, 12.0 + KEPT_S)
    assert book.missing() == ""


def test_rows_of_a_node_that_answers_without_them_go_at_once() -> None:
    book = Daemons()
    book.fold({"rows": daemons()}, 0.0)
    book.fold({"rows": daemons()[:1]}, 1.0)
    assert len(book.rows) == 1


def test_standing_of_a_fleet_wide_answer_fits_and_tells_the_number_last() -> None:
    book = Failures()
    assert plain(book.standing(0.0, 40)) == "asking…"
    book.fold({"rows": [], "silent": [f"alpha.broker.{n:06x}" for n in range(9)]}, 0.0)
    for cells in range(12, 120, 7):
        told = plain(book.standing(5.0, cells))
        assert len(told) <= cells and (cells < 20 or "9 silent" in told)
    book.failed("no agent")
    assert plain(book.standing(5.0, 60)) == "no answer: no agent, 5s old"


def test_failures_come_newest_first_with_their_countdowns_and_replica() -> None:
    items = VIEWS["failures"].select(failures(), Locator("failures"))
    assert [f.action for f in items] == [
        "pull_replica", "stop_daemon", "start_daemon", "start_daemon", "probe",
    ]  # fmt: skip
    assert [f.then(0.0) for f in items] == ["retry 0:04", "", "gate 4:32", "", ""]
    assert items[0].then(3.6) == ""
    assert "from the replica on alpha.broker.11c3a0" in items[1].story


def test_two_failures_that_look_alike_are_two_rows() -> None:
    book = Failures()
    book.fold({"rows": [failure(4, "x", "y"), failure(4, "x", "y")]}, 0.0)
    assert len(book.rows) == 2


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["rows", "silent", "name", "node", "at_ms", "until_ms", "age_ms", "state", "line"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(JUNK)
def test_nonsense_from_a_node_raises_nothing(junk: Any) -> None:
    for book, view in ((Daemons(), "daemons"), (Failures(), "failures")):
        book.fold(junk, 0.0)
        book.fold({"rows": [junk, {"name": "x", "state": junk, "reason": junk}], "silent": [junk]}, 1.0)
        items = list(book.rows.values())
        VIEWS[view].cells(items, 1.0)
        assert all(isinstance(item.whole(1.0), str) for item in items)
        book.standing(2.0, 40)
    document = {"daemons": junk, "wants": junk, "held_back": [junk], "local_maintenance": junk, "local": junk}
    for told in (junk, document):
        if isinstance(told, dict):
            node_sections.daemons(told, 5.0, 60, ASCII)
            node_sections.maintenance(told, 5.0, 60)
            node_sections.wants(told, 5.0, 60)
            node_sections.held_back(told, 5.0, 60)
            node_sections.backpressure(told, 60)
    chains_held({"replicas": [junk, {"chain": junk, "holders": junk}]}, Row(row("alpha.b.1", 1), 0.0))


# --- logs


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("2026-01-01T10:00:00Z ERROR db down", "error"),
        ("error: no such file", "error"),
        ("fatal error: out of memory", "error"),
        ("Traceback (most recent call last):", "error"),
        ("level=warn msg=slow", "warn"),
        ('{"ts":1,"level":"info","msg":"error handler set"}', "info"),
        ("12:00:01 [warning] hm", "warn"),
        ("<3>disk gone", "error"),
        ("<6>fine", "info"),
        ("DEBUG tick", "debug"),
        ("no errors here", ""),
        ("INFORMATION", ""),
        ("", ""),
    ],
)
def test_level_is_told_only_where_the_line_tells_it(line: str, level: str) -> None:
    assert level_of(line) == level


def test_lines_of_several_logs_stand_in_order_of_time() -> None:
    book, cache = LogBook(), Source("a1", "alpha.broker.a1", "alpha", "cache")
    for at, source in ((5, WEB), (1, cache), (3, WEB), (2, cache), (4, cache)):
        book.add(source, {"at_ms": at, "line": str(at)})
    assert [line.text for line in book.shown()] == ["1", "2", "3", "4", "5"]


def test_log_keeps_its_bound_and_the_newest_lines() -> None:
    book = LogBook(kept=100)
    for at in range(1_000):
        book.add(WEB, {"at_ms": at, "line": str(at)})
    assert len(book.lines) <= 113 and [line.text for line in book.shown()] == [
        str(at) for at in range(900, 1_000)
    ]


def test_log_that_is_followed_again_tells_nothing_twice_and_loses_nothing() -> None:
    book = LogBook()
    lines = [{"at_ms": at // 2, "line": "same" if at < 4 else f"{at}"} for at in range(8)]
    for line in lines[:6]:
        book.add(WEB, line)
    book.begin(WEB)
    assert [book.add(WEB, line) for line in lines] == [False] * 6 + [True] * 2
    assert [line.text for line in book.shown()] == [line["line"] for line in lines]


def test_hostile_line_moves_no_cursor_and_is_bounded() -> None:
    book = LogBook()
    book.add(WEB, {"at_ms": 1, "line": "\x1b[2J\x1b]0;x\x07[bold]red\u202e\r\n\x1b[31mz" + "a" * 100_000})
    [line] = book.shown()
    assert "\x1b" not in line.text and "\u202e" not in line.text and "\n" not in line.text
    assert "[bold]red" in line.text and len(line.text) <= 4_000


def test_locator_of_logs_names_what_is_followed_and_narrows_by_level() -> None:
    locator = choosing(["alpha.broker.a1/web", "alpha.gateway.b2"])
    assert chosen(parse_locator(locator.text())) == ["alpha.broker.a1/web", "alpha.gateway.b2"]
    louder = at_least(locator, "warn")
    assert least(louder) == "warn" and least(at_least(louder, "")) == ""
    assert least(parse_locator(at_least(louder, "error").text())) == "error"
    documents = [
        {"at_ms": at, "node": "alpha.broker.a1", "node_id": "a1", "daemon": "web", "line": line}
        for at, line in enumerate(log_of("web"))
    ]
    shown = VIEWS["logs"].table(documents, parse_locator("logs level:warn,error"))
    assert [told[1] for told in shown[1:]] == ["warn", "error", "error"]
    assert set(LEVELS) >= {"warn", "error"}


def test_found_text_is_told_apart_wherever_it_stands() -> None:
    assert marked("abcABc", "bc", "text") == [("a", "text"), ("bc", "caret"), ("A", "text"), ("Bc", "caret")]
    assert marked("abc", "", "text") == [("abc", "text")]


# --- rows, pages and blast radius


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "draining", "maintenance": "entering_maintenance", "reason": "1 daemon to stop",
          "maintenance_until_ms": 260_000}, "entering maintenance, 4:20 left: 1 daemon to stop"),
        ({"state": "draining", "maintenance": "drain_failed", "reason": "slow still runs",
          "maintenance_until_ms": -12_000}, "drain failed, past its deadline by 12s: slow still runs"),
        ({"maintenance": "recovery", "maintenance_until_ms": 60_000}, "recovery, 1:00 left"),
        ({"state": "draining", "maintenance": "entering_maintenance", "maintenance_until_ms": 260_000,
          "reason": "entering maintenance: 1 replica held (big)"},
         "entering maintenance, 4:20 left: 1 replica held (big)"),
        ({"state": "degraded", "maintenance": "recovery", "reason": "cpu over 95 %"}, "cpu over 95 %; recovery"),
        ({"state": "updating", "reason": "update", "deadline_ms": 60_000}, "update, 1:00 left"),
        ({"cordoned": True}, "cordoned: takes nothing new"),
        ({}, ""),
    ],
)  # fmt: skip
def test_fleet_row_tells_its_maintenance_with_what_is_left(changes: dict[str, Any], said: str) -> None:
    one = Row(row("alpha.broker.1", 1, **changes), 0.0)
    assert detail(one, 0.0) == said and row_height(one) == 1 + bool(said)


def test_page_counts_down_from_when_its_document_came() -> None:
    doc = {
        "held_back": [{"what": "start daemon x", "reason": "crash-looping", "in_ms": 272_000}],
        "wants": [{"kind": "start_daemon", "target": "x", "age_ms": 1_000}],
        "local_maintenance": {"state": "entering_maintenance", "since_ms": 0, "deadline_in_ms": 20_000,
                              "left": ["daemon slow", "chain orders"], "by": "op"},
        "local": {"backpressure": True},
    }  # fmt: skip

    def text(lines: list[Any]) -> str:
        return "\n".join(plain(line) for line in lines)

    assert "in 4:32" in text(node_sections.held_back(doc, 0.0, 80))
    assert "in 4:22" in text(node_sections.held_back(doc, 10_000.0, 80))
    assert "start daemon x, wanted for 11s" in text(node_sections.wants(doc, 10_000.0, 80))
    told = text(node_sections.maintenance(doc, 10_000.0, 80))
    assert "for 10s  0:10 left until its deadline" in told and "daemon slow, chain orders" in told
    assert "past its deadline by 5s" in text(node_sections.maintenance(doc, 25_000.0, 80))
    assert "BACKPRESSURE" in text(node_sections.backpressure(doc, 80))
    assert node_sections.backpressure({"local": {"backpressure": False}}, 80) == []
    assert "crasher" in text(node_sections.daemons({"daemons": daemons()}, 0.0, 80, UNICODE))


def foresee(verb: str, changes: dict[str, Any] | None = None, **more: Any) -> Any:
    rows = [
        row("alpha.gateway.1", 1, daemons={"running": 2, "total": 2}, **changes or {}),
        row("alpha.broker.2", 2),
    ]
    return forecast(rows, [rows[0]["id"]], verb, **more)


@pytest.mark.parametrize(
    ("verb", "changes", "said"),
    [
        ("cordon", {}, "takes nothing new; its 2 daemons (cache, web) stay"),
        ("cordon", {"cordoned": True}, "is cordoned already"),
        ("uncordon", {}, "nothing to lift: is not cordoned"),
        ("uncordon", {"cordoned": True}, "takes new work again"),
        ("maintenance_enter", {}, "takes no new work; 2 daemons stop (cache, web), its replicas move off"),
        (
            "maintenance_enter",
            {"maintenance": "entering_maintenance"},
            "enters already: takes the new deadline",
        ),
        ("maintenance_exit", {}, "nothing to exit: is not in maintenance"),
        (
            "maintenance_exit",
            {"maintenance": "drain_failed"},
            "starts its daemons again, recovers, then is active",
        ),
        ("restart_daemons", {}, "2 daemons stop and start again (cache, web)"),
        ("resume", {"state": "draining", "maintenance": "maintenance"}, "only its exit lifts that"),
        ("drop_replicas", {}, "gives up orders"),
    ],
)
def test_forecast_of_an_admin_op_says_what_follows_from_the_row(
    verb: str, changes: dict[str, Any], said: str
) -> None:
    told = foresee(verb, changes, daemons={f"{1:016x}": ("cache", "web")}, chains=["orders"])
    assert said in told.lines[0][1] and "{" not in told.title


def test_maintenance_of_the_last_gateway_needs_the_number_typed() -> None:
    told = foresee("maintenance_enter")
    assert told.needs_count and "the last gateway of alpha" in told.warnings
    assert not foresee("cordon").needs_count and foresee("cordon").warnings == ()
    assert "2 daemons stop" in told.lines[0][1], "counted where no names are known"


def test_names_of_daemons_are_forgotten_when_old_and_never_taken_of_those_that_do_not_run() -> None:
    book = Daemons()
    book.fold({"rows": daemons()}, 0.0)
    assert book.names(1.0)[f"{0x77B1E9:016x}"] == ("ingest",)
    assert book.names(60.0) == {}
    book.learn("b1", [daemon("page", "alpha.b.1", 1)], 60.0)
    assert book.names(61.0) == {"b1": ("page",)}


def test_only_held_chains_with_honest_names_can_be_picked() -> None:
    here = Row(row("alpha.b.1", 1), 0.0)
    replicas = [
        {"chain": "mine", "holders": ["alpha.b.1", "x"], "desired": 3},
        {"chain": "other", "holders": ["x"]},
        {"chain": "evil\u202e", "holders": ["alpha.b.1"]},
        {"chain": None},
    ]
    assert chains_held({"replicas": replicas}, here) == [("mine", "2 of 3 held")]
