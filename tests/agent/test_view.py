"""Rows and pages: what a view says of a member, and what it refuses to invent."""

from __future__ import annotations

import pytest

from agent.view import View, spawned_row, stamp
from discovery.identity import Identity
from discovery.lifecycle import Evidence, State
from discovery.member import Member, Record, Vitals, seal_record

KEY = Identity.from_seed(b"\1" * 32)
OTHER = Identity.from_seed(b"\2" * 32)
PROMISED = {
    *("id", "name", "mesh", "kind", "state", "since_ms", "source", "cpu", "mem", "disk", "rtt_ms", "addr"),
    *("build", "fresh", "wire", "maintenance", "maintenance_until_ms", "cordoned", "daemons", "failures"),
    *("last_seen_ms", "tags", "evidence"),
}


def member(key: Identity = KEY, *, now: float = 100.0, **changes: object) -> Member:
    fields: dict = {
        "pub": key.pub, "mesh": "alpha", "name": "n1", "kind": "compute", "incarnation": 1, "version": 1,
        "state": State.ALIVE, "addrs": [("10.0.0.1", 7420)], "build": "aaaaaaaaaaaa",
    }  # fmt: skip
    record = Record(**{**fields, **changes})
    return Member(record, seal_record(record, key.sign), record.state, now, now, now)


def view() -> View:
    return View(OTHER.id, lambda node: {KEY.id: "n1", OTHER.id: "me"}.get(node, "?"))


def test_row_has_every_promised_key_and_null_for_what_is_not_known() -> None:
    row = view().row(member(), 103.0, others=4, disk_build="aaaaaaaaaaaa")
    assert set(row) >= PROMISED
    assert (row["cpu"], row["mem"], row["disk"], row["rtt_ms"], row["evidence"]) == (None,) * 5
    assert row["daemons"] == {"running": None, "total": None}
    assert (row["since_ms"], row["last_seen_ms"], row["period_ms"]) == (3000, 3000, 4000)


@pytest.mark.parametrize(
    ("build", "disk", "fresh"),
    [("aa", "aa", True), ("aa", "bb", False), ("", "bb", None), ("aa", None, None)],
)
def test_freshness_is_judged_only_when_both_builds_are_known(
    build: str, disk: str | None, fresh: bool | None
) -> None:
    assert view().row(member(build=build), 100.0, others=1, disk_build=disk)["fresh"] is fresh


def test_figures_of_a_dead_node_are_not_shown() -> None:
    dead = member()
    dead.vitals, dead.vitals_at, dead.rtt_s = Vitals(500, 500, 500), 100.0, 0.002
    dead.state, dead.evidence, dead.evidence_by = State.DEAD, Evidence.EXITED, (OTHER.id,)
    row = view().row(dead, 101.0, others=4, disk_build=None)
    assert (row["cpu"], row["rtt_ms"]) == (None, None)
    assert (
        row["evidence"]["kind"] == "exited"
        and row["evidence"]["by"] == ["me"]
        and "me" in row["evidence"]["text"]
    )


def test_figures_past_their_age_are_unknown_again() -> None:
    old = member()
    old.vitals, old.vitals_at = Vitals(500, 400, 300), 100.0
    assert view().row(old, 101.0, others=2, disk_build=None)["cpu"] == 0.5
    assert view().row(old, 100.0 + 6 * 5 + 1, others=2, disk_build=None)["cpu"] is None


def test_silent_evidence_says_for_how_long() -> None:
    dead = member()
    dead.state, dead.evidence = State.DEAD, Evidence.SILENT
    assert "no answer for 12 s" in view().row(dead, 112.0, others=2, disk_build=None)["evidence"]["text"]


def test_deadline_counts_down_from_when_the_record_arrived() -> None:
    row = view().row(member(state=State.DRAINING, deadline_ms=300_000), 110.0, others=1, disk_build=None)
    assert row["deadline_ms"] == 290_000


def test_stamp_changes_with_what_a_watcher_must_be_told() -> None:
    one = member()
    before = stamp(one)
    one.last_seen += 0.2
    assert stamp(one) == before
    one.suspect_since = 100.0
    assert stamp(one) != before


def test_history_forgets_who_is_gone() -> None:
    seen, me, one = view(), member(OTHER), member()
    one.vitals = Vitals(cpu=120)
    seen.sample({one.id: one}, me)
    assert list(seen.history[one.id]) == [120] and list(seen.history[me.id]) == [None]
    seen.sample({}, me)
    assert one.id not in seen.history


def test_spawned_row_promises_the_same_keys_and_claims_nothing() -> None:
    row = spawned_row("0" * 16, "n", "alpha", "compute", None, 2.0)
    assert set(row) >= PROMISED
    assert row["source"] == "spawned" and row["cpu"] is None and row["fresh"] is None
