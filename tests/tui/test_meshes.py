"""The meshes without a screen: their fold, ages, marks, columns, map lanes, forecasts and tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tui.canned import CannedAgent, founded
from tests.tui.fakes import delta, everywhere, first_frame, fleet, mesh, meshes, remote, wide_frame
from tui.cli.tables import meshes_table
from tui.model import map
from tui.model.blast import forecast
from tui.model.glyphs import ASCII
from tui.model.mesh_columns import MESHES, mesh_facts
from tui.model.meshes import MeshRow, rows_of
from tui.model.rows import Fleet
from tui.model.rows import rows_of as nodes_of
from tui.model.spans import line_width, plain
from tui.model.status import alarms, lease_text, notices
from tui.model.table import Scene, layout
from tui.model.views import VIEWS, parse_locator

# A shared machine may stop for longer than any example takes.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

EVIL = {"pub": "SHA256:evil", "publisher": "beta.gateway.666", "age_ms": 3_000}


def seen(**changes: Any) -> Fleet:
    view = Fleet()
    view.fold(wide_frame(**changes), 0.0)
    return view


def one(name: str = "beta", **changes: Any) -> MeshRow:
    return MeshRow(mesh(name, 4, 0xB03C21, **changes), 100.0)


# -- the fold


def test_list_of_a_frame_replaces_the_meshes_and_a_frame_without_one_leaves_them() -> None:
    view = seen()
    assert list(view.directory.rows) == ["alpha", "beta", "gamma", "delta", "omega"]
    view.fold(delta(), 1.0)
    assert len(view.directory.rows) == 5
    change = view.fold(delta(meshes=meshes()[:2]), 2.0)
    assert list(view.directory.rows) == ["alpha", "beta"] and change.meshes and change.moved


def test_full_frame_of_an_agent_that_tells_no_meshes_leaves_none() -> None:
    view = seen()
    view.fold(first_frame(), 1.0)
    assert view.directory.rows == {} and view.directory.holders == {}


def test_newer_figures_of_a_mesh_are_no_news_and_another_holder_is() -> None:
    view = seen()
    figures = [m | {"cpu": 0.9, "expires_in_ms": 5_900} for m in meshes()]
    assert not view.fold(delta(meshes=figures), 1.0).moved
    moved = [mesh("beta", 4, 0x77AA01), *(m for m in meshes() if m["mesh"] != "beta")]
    assert view.fold(delta(meshes=moved), 2.0).moved
    assert f"{0x77AA01:016x}" in view.directory.holders and f"{0xB03C21:016x}" not in view.directory.holders


def test_nonsense_among_the_meshes_is_left_out_and_hostile_names_are_cleaned() -> None:
    evil = mesh(
        "x", 1, 5, mesh="be\x1b[2Jta\u202e", publisher={"id": 7, "name": "[red]\x07gate\n", "addr": None}
    )
    given_list = [
        None,
        3,
        {},
        {"mesh": ""},
        {"mesh": 9},
        evil,
        mesh("beta"),
        mesh("beta", 99),
        {"mesh": "y" * 900},
    ]
    view = Fleet()
    view.fold(first_frame(meshes=given_list), 0.0)
    assert list(view.directory.rows) == ["be[2Jta", "beta", "y" * 64]
    assert view.directory.rows["be[2Jta"].publisher == "[red]gate "
    assert not view.directory.rows["be[2Jta"].named
    assert view.directory.rows["beta"].total == 4


def test_mesh_that_tells_only_counts_is_counted_by_them_and_the_others_by_their_rows() -> None:
    assert seen().meshes() == {"alpha": 9, "beta": 4, "delta": 3, "gamma": 1, "omega": 200}


# -- ages and what they mean


@pytest.mark.parametrize(
    ("changes", "after_s", "said"),
    [
        ({"expires_in_ms": 4_600}, 0.0, "5s"),
        ({"expires_in_ms": 4_600}, 1.0, "4s"),
        ({"expires_in_ms": 4_600}, 4.7, "0s"),
        ({"expires_in_ms": 4_600}, 8.0, "overdue 3s"),
        ({"expires_in_ms": -36_000, "expired": True}, 6.0, "expired 42s"),
        ({"expires_in_ms": None, "expired": True}, 6.0, "expired"),
        ({"expires_in_ms": None}, 6.0, "–"),
        ({"publisher": {"id": None, "name": None, "addr": None}, "expires_in_ms": None}, 6.0, "vacant"),
        ({"publisher": None}, 6.0, "vacant"),
    ],
)
def test_lease_is_told_by_the_viewers_own_clock(changes: dict[str, Any], after_s: float, said: str) -> None:
    assert one(**changes).lease(100.0 + after_s) == said


def test_expired_mesh_shows_none_of_its_nodes_as_live_whatever_was_told() -> None:
    item = one(expired=True, expires_in_ms=-1)
    assert item.counts == {"dead": 4} and item.path() == ""
    assert item.age_ms(142.0) == 42_900
    assert "nothing heard for 42s" in item.detail(141.2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"impostors": [EVIL]}, ["IMPOSTOR"]),
        ({"expired": True}, ["EXPIRED"]),
        ({"backbone": "pool (nats away)"}, ["nats away"]),
        ({"listed": False}, ["counts only"]),
        ({"publisher": {}, "expired": False}, ["vacant"]),
        ({"impostors": [EVIL], "expired": True, "listed": False}, ["IMPOSTOR", "EXPIRED", "counts only"]),
        ({"impostors": ["x", None]}, []),
    ],
)
def test_each_trouble_of_a_mesh_has_its_mark_and_says_what_to_do(
    changes: dict[str, Any], words: list[str]
) -> None:
    marks = one(**changes).marks(100.0)
    assert [mark.word for mark in marks] == words
    assert all(len(mark.advice) <= 76 for mark in marks), "it fits under its row at 80 cells"


def test_impostor_says_whose_listing_is_not_shown_and_what_to_look_at() -> None:
    (mark,) = one(impostors=[EVIL]).marks(100.0)
    assert mark.advice == "another key publishes beta (not shown): look who holds your backbone key"


# -- what is said around the views


def test_alarms_and_notices_tell_of_impostor_expiry_and_fallback_until_they_are_over() -> None:
    bad = [m | {"impostors": [EVIL]} if m["mesh"] == "beta" else m for m in meshes()]
    bad[0] |= {"backbone": "pool (nats away)"}
    view = seen(meshes=bad)
    assert plain(alarms(view)).split("  ")[:3] == ["IMPOSTOR", "EXPIRED", "NATS AWAY"]
    said = notices(view, 0.0, now=10.0)
    assert said[0].startswith("another key publishes beta")
    assert said[1] == "mesh delta expired: nothing heard from it for 52s; its nodes are not live"
    assert said[2].startswith("nats away: ")
    view.fold(delta(meshes=[m for m in meshes() if not m["expired"]]), 11.0)
    assert alarms(view) == [] and not any("delta" in text for text in notices(view, 0.0, now=11.0))


def test_many_expired_meshes_are_one_notice() -> None:
    view = seen(meshes=[mesh(f"m{at}", 2, at, expired=True) for at in range(1, 5)])
    said = [text for text in notices(view, 0.0) if "expired" in text]
    assert said == ["4 meshes expired, their nodes are not live: m1, m2, m3, m4"]


def test_lease_of_a_mesh_is_told_in_a_title() -> None:
    assert lease_text(one(), 100.0) == "⚑ gateway.b03c21 5s"
    assert lease_text(one(), 100.0, ASCII) == "L gateway.b03c21 5s"
    assert lease_text(one(expired=True, expires_in_ms=-5000), 100.0) == "expired 5s"
    assert lease_text(one(publisher={}), 100.0) == "⚑ vacant"
    assert lease_text(None, 100.0) == ""


# -- the view


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("meshes", ["delta", "alpha", "beta", "gamma", "omega"]),
        ("meshes expired", ["delta"]),
        ("meshes expired:yes", ["delta"]),
        ("meshes !expired:yes nodes>5", ["alpha", "omega"]),
        ("meshes publisher:gamma.console", ["gamma"]),
        ("meshes route:relay", ["gamma"]),
        ("meshes listed:no", ["omega"]),
        ("meshes degraded>0", ["alpha"]),
        ("meshes rtt<10", ["omega"]),
        ("meshes home:yes sort:-epoch", ["beta", "alpha"]),
        ("meshes @beta", ["beta"]),
        ("meshes sort:-nodes,mesh nodes>3", ["omega", "alpha", "beta"]),
        ("meshes impostor:yes", []),
    ],
)
def test_meshes_are_filtered_and_ordered_by_a_locator(line: str, names: list[str]) -> None:
    found = VIEWS["meshes"].select(meshes(), parse_locator(line))
    assert [item.name for item in found] == names


@given(st.integers(20, 300), st.booleans())
def test_columns_of_the_meshes_fit_any_screen(cells: int, ascii_only: bool) -> None:
    given_list = [
        *meshes(),
        mesh("m" * 64, 9999, 1, backbone="pool (nats away)", impostors=[EVIL], listed=False),
    ]
    items = rows_of(given_list)
    scene = Scene(facts=mesh_facts(items, "alpha"), here="alpha", **({"glyphs": ASCII} if ascii_only else {}))
    placed = layout(MESHES, cells, scene, items)
    assert placed and placed[-1].x + placed[-1].width <= cells
    for place in placed:
        for item in items:
            assert line_width(place.column.cell(item, scene, place.width)) <= place.width, place.column.key


def test_columns_of_the_meshes_leave_by_priority() -> None:
    items = rows_of(meshes())
    scene = Scene(facts=mesh_facts(items, "alpha"))
    at = {cells: {p.column.key for p in layout(MESHES, cells, scene, items)} for cells in (44, 79, 160)}
    assert {"mesh", "lease", "nodes"} <= at[44]
    assert at[79] >= {"mesh", "nodes", "states", "publisher", "lease", "cpu", "mem", "age"}
    assert at[160] >= {column.key for column in MESHES} - {"notes"}


def test_table_of_qd_meshes_has_the_columns_of_the_view_and_says_what_is_wrong() -> None:
    evil = mesh(
        "beta", 4, 1, impostors=[EVIL], publisher={"id": "1", "name": "\x1b]0;x\x07gate", "addr": None}
    )
    text = meshes_table([*meshes()[2:], evil])
    titles = text.splitlines()[0].split()
    assert titles[:5] == ["MESH", "NODES", "STATES", "PUBLISHER", "LEASE"]
    assert "\x1b" not in text and "]0;xgate" in text
    lines = text.splitlines()
    assert lines[1].startswith("beta") and "look who holds your backbone key" in lines[2]
    assert lines[3].startswith("delta") and "expired 36s" in lines[3] and "not live here" in lines[4]
    assert meshes_table([]) == "no meshes"


def test_view_meshes_of_an_agent_is_a_table_and_the_same_documents(tmp_path: Any, capfd: Any) -> None:
    from tui.cli import main

    home = founded(tmp_path / "home")
    with CannedAgent(home, "alpha.gateway.1"):
        assert main(["view", "meshes", "nodes>0", "--home", str(home.root)]) == 0
        assert capfd.readouterr().out.splitlines()[1].startswith("alpha")
        assert main(["view", "meshes", "nodes>1", "--home", str(home.root), "--json"]) == 0
        assert capfd.readouterr().out.strip() == "[]"
        assert main(["meshes", "--home", str(home.root)]) == 0
        assert "vacant" in capfd.readouterr().out


# -- the map


def drawn(cells: int = 158, only: str = "", known: list[dict[str, Any]] | None = None) -> map.Chart:
    view = Fleet()
    view.fold(wide_frame(meshes=known or meshes()), 0.0)
    rows = [row for row in view.rows.values() if only in ("", row.mesh)]
    bare = [] if only else view.directory.rows
    return map.chart(rows, view.my_id, cells, 0.0, (), meshes=view.directory.rows, bare=bare)


def text_of(chart: map.Chart) -> str:
    return "\n".join(plain(line) for line in chart.lines)


def test_map_has_a_lane_for_every_mesh_and_marks_who_holds_its_lease() -> None:
    text = text_of(drawn())
    for name in ("alpha", "beta", "gamma", "delta", "omega"):
        assert f"─ {name} " in text
    assert "⚑ gateway.b03c21 5s" in text and "● gateway.b03c21 ⚑" in text
    assert "expired 36s" in text and "● gateway.de17a0" not in text
    assert "counts only" in text


def test_map_has_an_edge_for_every_measured_way_dashed_where_it_is_relayed_and_no_other() -> None:
    text = text_of(drawn())
    (direct,) = (line for line in text.splitlines() if " 18ms " in line)
    (relayed,) = (line for line in text.splitlines() if " 42ms relay " in line)
    assert "───── 18ms ─" in direct and "┄" not in direct
    assert "┄┄┄┄┄ 42ms relay ┄" in relayed
    unknown = [m | {"rtt_ms": None} for m in meshes()]
    assert "relay" not in text_of(drawn(known=unknown)) and " 18ms " not in text_of(drawn(known=unknown))
    gone = [m | {"expired": m["mesh"] != "alpha"} for m in meshes()]
    assert " 18ms " not in text_of(drawn(known=gone))


def test_map_of_another_mesh_alone_claims_no_place_and_no_edge() -> None:
    text = text_of(drawn(only="beta"))
    assert "no measured path from here" in text and "18ms" not in text and "1000 ms" not in text


@given(st.integers(40, 220), st.integers(0, 12))
def test_map_with_paths_fits_the_screen_and_every_card_is_where_it_is_drawn(cells: int, more: int) -> None:
    others = [mesh(f"m{at}", 1, 1000 + at, rtt_ms=0.2 * 5**at) for at in range(more)]
    rows = nodes_of([*everywhere(), *(remote(f"m{at}.broker.{at:06x}", 5000 + at) for at in range(more))])
    told = {item.name: item for item in rows_of([*meshes(), *others])}
    chart = map.chart(rows, f"{0x31AA90:016x}", cells, 0.0, (), meshes=told, bare=told)
    assert all(line_width(line) <= cells for line in chart.lines)
    assert sorted(card.node for card in chart.cards) == sorted(row.id for row in rows)
    by_id = {row.id: row for row in rows}
    for card in chart.cards:
        row = by_id[card.node]
        line = plain(chart.lines[card.y])
        assert row.name[-6:] in line[card.x : card.x + card.width + 2], line
    text = text_of(chart)
    for at in range(more):
        assert told[f"m{at}"].path().split(", ")[1] in text


# -- forecasts


HOLDER = "alpha.gateway.4f1a77"


def told(names: list[str], verb: str, rows: list[dict[str, Any]] | None = None) -> Any:
    view = rows or everywhere()
    return forecast(view, [r["id"] for r in view if r["name"] in names], verb, meshes=meshes())


@pytest.mark.parametrize("verb", ["kill", "update"])
def test_forecast_names_who_takes_the_lease_gateways_first(verb: str) -> None:
    assert "lease moves to alpha.console.31aa90" in told([HOLDER], verb).lines[0][1]
    second = [*fleet(), remote("alpha.gateway.00ffff", 0xFFFF, source="gossip")]
    third = [*second, remote("alpha.gateway.000001", 1, source="gossip", state="updating")]
    assert "lease moves to alpha.gateway.00ffff" in told([HOLDER], verb, third).lines[0][1]
    both = told([HOLDER, "alpha.gateway.00ffff"], verb, second)
    assert [("lease moves" in effect) for _, effect in both.lines] == [True, False]
    assert "lease moves to alpha.console.31aa90" in both.lines[0][1]


def test_forecast_of_a_drain_keeps_the_lease_where_it_is() -> None:
    done = told([HOLDER], "drain")
    assert "keeps its lease" in done.lines[0][1]
    assert not any("publish" in warning for warning in done.warnings)


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("kill", "nobody left to publish beta: other meshes won't see it"),
        ("update", "nobody left to publish beta: other meshes won't see it until it is back"),
    ],
)
def test_forecast_warns_when_nobody_is_left_to_publish(verb: str, said: str) -> None:
    done = told(["beta.gateway.b03c21"], verb)
    assert said in done.warnings
    assert "its lease falls vacant" in done.lines[0][1]
    assert done.danger == (verb == "kill")


def test_forecast_of_a_whole_mesh_says_that_it_ends_and_not_that_nobody_publishes_it() -> None:
    done = told(["gamma.console.6b2f00"], "kill")
    assert any("the mesh ends" in warning for warning in done.warnings)
    assert not any("publish" in warning for warning in done.warnings)


def test_forecast_says_nothing_of_leases_where_none_is_known() -> None:
    done = forecast(everywhere(), [f"{0x4F1A77:016x}"], "kill")
    assert "lease" not in done.lines[0][1] and done.reach == ""


def test_forecast_tells_how_other_meshes_are_reached() -> None:
    done = told(["gamma.console.6b2f00", "beta.broker.d2c9f0", HOLDER], "drain")
    assert done.reach in (
        "beta direct, 18ms; gamma by relay, 42ms",
        "gamma by relay, 42ms; beta direct, 18ms",
    )
