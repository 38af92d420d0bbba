"""Chains and Audit: models, headless twins and views; agents without them; how little is asked again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.errors import Refused, Unreachable
from tests.tui.console import NORMAL, WIDE, console
from tests.tui.fakes import FakeClient, audit, chain, chains, op, row
from tui import polling
from tui.model.audit import AGAIN, Audit
from tui.model.blast import forecast
from tui.model.chains import Chains
from tui.model.views import VIEWS, parse_locator


def names(rows: list[dict[str, Any]], line: str = "") -> list[str]:
    return [row["name"] for row in VIEWS["chains"].json(rows, parse_locator(f"chains {line}"))]


def ops(rows: list[dict[str, Any]], line: str = "") -> list[str]:
    return [row["op"] for row in VIEWS["audit"].json(rows, parse_locator(f"audit {line}"))]


def test_chains_come_under_held_first_and_what_nobody_holds_before_all() -> None:
    assert names(chains()) == ["gone.iso", "model-v7.bin", "site.tar", "spare.img", "orders"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("underheld:yes", ["gone.iso", "model-v7.bin", "site.tar"]),
        ("kind:chain", ["orders"]),
        ("held<2", ["gone.iso", "site.tar"]),
        ("holders:77b1e9 sort:name", ["orders", "spare.img"]),
        ("settles<1m", ["site.tar"]),
        ("coming:e91b04", ["model-v7.bin"]),
        ("leader:gateway !underheld:yes", ["spare.img", "orders"]),
    ],
)
def test_chain_filter_leaves_exactly_these(line: str, found: list[str]) -> None:
    assert names(chains(), line) == found


def test_chain_says_what_lacks_what_is_on_its_way_and_what_waits() -> None:
    told = {row.name: row for row in Chains.read(chains(), 100.0)}
    assert told["model-v7.bin"].detail(100.0) == "1 more wanted: on its way to alpha.compute.e91b04 43%"
    assert told["site.tar"].detail(102.0) == "2 more wanted: no copy is on its way"
    [spare] = Chains.read([chain("spare", 4, stabilising_ms=42_000)], 100.0)
    assert spare.detail(102.0) == "1 more than wanted, changes wait 0:40 until it has settled"
    assert told["site.tar"].detail(200.0) == "2 more wanted: no copy is on its way"
    assert told["gone.iso"].detail(100.0) == "nobody holds it: no copy is on its way"
    assert told["spare.img"].detail(100.0) == "1 more than wanted"
    [waiting] = Chains.read(
        [chain("log", 2) | {"held": 0, "holders": [], "held_back": "no node\x1b may take it: 2 cordoned"}]
    )
    assert waiting.detail(0.0) == "nobody holds it: no node may take it: 2 cordoned"
    [drained] = Chains.read([chain("x", 3) | {"held": 2}])
    assert drained.detail(0.0).endswith("1 holder is drained or in maintenance, and not counted")
    assert told["orders"].detail(100.0) == "" and told["orders"].counts == "3/3"


def test_chain_without_figures_shows_them_as_unknown() -> None:
    [row] = Chains.read(
        [chain("x", 0, None) | {"held": None} | {"pulls": [{"node": "n", "done": None, "total": 0}]}]
    )
    assert (row.counts, row.missing, row.coming()) == ("–/–", 0, "n begins")


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(sorted(chain("x", 1))),
        st.none() | st.integers() | st.text(max_size=9) | st.lists(st.none()),
    )
)
def test_chain_rows_of_nonsense_never_raise(data: dict[str, Any]) -> None:
    book = Chains()
    book.fold({"rows": [chain("x", 1) | data]}, 0.0)
    VIEWS["chains"].cells(list(book.rows.values()), 1.0)
    for made in book.rows.values():
        made.whole(1.0)


def test_audit_comes_newest_first_with_the_refused_and_the_void() -> None:
    assert ops(audit()) == ["resume", "drain", "kill", "maintenance_enter", "cordon"]
    assert ops(audit(), "trouble:yes") == ["resume", "drain", "kill"]
    assert ops(audit(), "result:refused,void") == ["drain", "kill"]
    assert ops(audit(), "verified:no") == ["resume"]
    assert ops(audit(), "operator:anna sort:op") == ["maintenance_enter"]
    assert ops(audit(), "replay") == ["kill"]


def test_audit_table_shows_verdict_and_date_of_each() -> None:
    titles, *rows = VIEWS["audit"].table(audit(), parse_locator("audit"))
    assert titles == ["WHEN", "OP", "TARGET", "RESULT", "OPERATOR", "SIGNATURE", "REASON"]
    assert [row[5] for row in rows] == ["NOT VERIFIED", "verified", "–", "verified", "verified"]
    assert rows[3][1] == "maintenance enter" and len(rows[0][0]) == 19


def test_audit_is_joined_at_its_end_and_asked_anew_when_a_late_record_moved_it() -> None:
    book = Audit()
    rows = [op(at, "cordon", at) for at in range(AGAIN + 50)]
    book.fold({"rows": rows, "answered_by": "a"}, 0.0)
    assert book.ask_from() == 50
    later = [*rows[50:], op(900, "kill", 1)]
    joined = book.joined(50, later)
    assert joined == [*rows, later[-1]]
    assert book.joined(50, [op(49, "late", 7), *later]) is None
    assert book.joined(50, []) is None


def test_audit_that_is_the_same_is_not_made_anew() -> None:
    book = Audit()
    book.fold({"rows": audit()}, 0.0)
    version, rows = book.version, book.rows
    book.fold({"rows": audit()}, 9.0)
    assert book.version == version and book.rows is rows and book.at == 9.0
    book.fold({"rows": [*audit(), op(5, "kill", 1)]}, 10.0)
    assert len(book.rows) == 6 and next(iter(book.rows.values())).op == "kill"


def test_audit_names_targets_that_the_view_knows() -> None:
    book = Audit()
    book.fold({"rows": audit(), "names": {f"{0x4F1A77:016x}": "alpha.gateway.4f1a77"}}, 0.0)
    killed = next(entry for entry in book.rows.values() if entry.op == "kill")
    assert killed.target == "alpha.gateway.4f1a77"
    assert "refused: replay: op_id seen before" in killed.whole(0.0)
    assert "recorded by alpha.gateway.4f1a77" in killed.whole(0.0)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(sorted(op(0, "kill", 1))),
        st.none() | st.integers() | st.text(max_size=9) | st.lists(st.none()),
    )
)
def test_audit_rows_of_nonsense_never_raise(data: dict[str, Any]) -> None:
    book = Audit()
    book.fold({"rows": [op(0, "kill", 1) | data, None, 7], "names": 3, "first": "x"}, 0.0)
    VIEWS["audit"].cells(list(book.rows.values()), 1.0)
    for made in book.rows.values():
        made.whole(1.0)


# --- on the screen


@pytest.mark.parametrize("size", [NORMAL, WIDE])
def test_chains_view_shows_counts_progress_and_countdown(size: tuple[int, int]) -> None:
    async def main() -> None:
        async with console(size=size) as here:
            await here.press("5")
            await here.shows(
                "chains  5 chains and artifacts", "3 under-held", "1 on the way", "0/3", "43%", "0:4"
            )
            await here.shows("nobody holds it: no copy is on its way")
            assert here.text.splitlines()[1].split()[-2:] == ["9", "Logs"]
            assert all(len(text) == size[0] for text in here.text.splitlines())

    asyncio.run(main())


def test_enter_on_a_chain_shows_its_holders_in_the_fleet() -> None:
    async def main() -> None:
        async with console() as here:
            await here.press("5")
            await here.shows("model-v7.bin")
            await here.press("down", "enter")
            await here.shows("fleet name:alpha.gateway.4f1a77,alpha.broker.11c3a0", "2 of 14 nodes")
            await here.press("-")
            await here.shows("chains  5 chains")

    asyncio.run(main())


def test_audit_view_tells_outcomes_and_asks_only_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "EVERY_S", 0.0)

    async def main() -> None:
        rows = [op(at - 9_000, "cordon", 0x11C3A0) for at in range(AGAIN + 10)]
        async with console(size=WIDE) as here:
            here.client.audit_rows = [*rows, *audit()[2:]]
            await here.press("8")
            await here.shows(
                "audit  213 ops  of alpha  1 refused  1 void  1 NOT VERIFIED", "replay: op_id seen before"
            )
            assert "alpha.gateway.4f1a77" in here.line("mallory") and "refused" in here.line("mallory")
            polled = here.client.polled
            here.client.audit_rows.append(op(5, "kill", 0x4F1A77))
            here.app._tick()
            await here.shows("audit  214 ops")
            assert polled[:2] == ["audit 0", "audit 13"] and "audit 0" not in polled[1:]
            here.client.audit_rows.insert(0, op(-99_000, "uncordon", 0x11C3A0))
            here.app._tick()
            await here.shows("audit  215 ops")
            assert polled.count("audit 0") == 2 and polled[polled.index("audit 0", 1) - 1] == "audit 14"

    asyncio.run(main())


def test_agent_without_chains_or_audit_is_to_be_updated() -> None:
    async def main() -> None:
        async with console() as here:
            here.client.chain_rows = here.client.audit_rows = Refused("unknown_method", "no method here")
            await here.press("5")
            await here.shows("alpha.console.31aa90 keeps no chains: update it")
            await here.press("8")
            await here.shows("alpha.console.31aa90 keeps no audit: update it")
            here.client.chain_rows = here.client.audit_rows = []
            await here.press("f5")
            await here.shows("no op is on record in alpha", "qd audit --export DIR")
            await here.press("5", "f5")
            await here.shows("alpha keeps no chain and no artifact", "qd put FILE")

    asyncio.run(main())


def test_ops_work_neither_in_chains_nor_in_audit() -> None:
    async def main() -> None:
        async with console() as here:
            for key, there in (("5", "chains  5 chains"), ("8", "audit  5 ops")):
                await here.press(key)
                await here.shows(there)
                await here.press("X")
                assert here.app.panel.dialog is None

    asyncio.run(main())


# --- forecasts


def test_kill_tells_what_goes_under_held_over_all_its_targets() -> None:
    held = [f"alpha.broker.{n:06x}" for n in (1, 2, 3)]
    rows = [row(name, at) for at, name in enumerate(held, 1)]
    kept = Chains.read(
        [
            chain("orders", 3, holders=held),
            chain("log", 2, 2, holders=held[:2]),
            chain("spare", 3, 1, holders=held),
            chain("node/alpha.broker.000001", 3, kind="chain", holders=held),
        ]
    )
    told = forecast(rows, [rows[0]["id"], rows[1]["id"]], "kill", holdings=kept)
    assert (
        "orders 3 → 1 of 3 held, log 2 → 0 of 2 held; 1 action chain of nodes under-held" in told.lines[0][1]
    )
    assert "nobody left to hold log" in told.warnings and told.danger
    one = forecast(rows, [rows[2]["id"]], "kill", holdings=kept)
    assert "orders 3 → 2 of 3 held" in one.lines[0][1] and "log" not in one.lines[0][1] and not one.danger
    assert "held" not in forecast(rows, [rows[2]["id"]], "drain", holdings=kept).lines[0][1]


def test_holder_that_does_not_count_takes_nothing_away_unless_it_is_the_last() -> None:
    held = [f"alpha.broker.{n:06x}" for n in (1, 2)]
    rows = [row(held[0], 1, state="draining"), row(held[1], 2)]
    kept = Chains.read([chain("orders", 1, 3, holders=held), chain("log", 0, 2, holders=held[:1])])
    told = forecast(rows, [rows[0]["id"]], "kill", holdings=kept)
    assert "orders" not in told.lines[0][1] and "nobody left to hold log" in told.warnings
    both = forecast(rows, [r["id"] for r in rows], "kill", holdings=kept)
    assert "nobody left to hold orders, log" in both.warnings


def test_kill_panel_asks_who_holds_what() -> None:
    async def main() -> None:
        async with console(size=WIDE) as here:
            await here.press("/", "=name:11c3a0", "enter", "X")
            await here.shows(
                "Kill 1 node by message", "model-v7.bin 2 → 1 of 3 held", "orders 3 → 2 of 3 held"
            )
            assert here.client.polled == ["chains"]

    asyncio.run(main())


class Reach:
    """Gives clients of other meshes; `lost` names those that none answers of."""

    def __init__(self, **clients: FakeClient) -> None:
        self.clients = clients
        self.asked: list[str] = []

    async def client(self, mesh: str, rows: Any) -> FakeClient:
        self.asked.append(mesh)
        assert all(found["mesh"] == mesh for found in rows)
        if mesh not in self.clients:
            raise Unreachable(f"mesh {mesh}: nobody answers")
        return self.clients[mesh]

    async def close(self) -> None:
        return


def other_mesh() -> FakeClient:
    client = FakeClient()
    client.hello |= {"mesh": "beta", "name": "beta.gateway.b03c21"}
    client.chain_rows = [chain("beta.img", 1, 2, mesh="beta", leader="beta.gateway.b03c21")]
    client.audit_rows = [op(-5, "update", 0xB03C21)]
    return client


def test_chains_of_every_mesh_are_asked_of_one_of_its_nodes_and_the_silent_are_named() -> None:
    async def main() -> None:
        reach = Reach(beta=other_mesh())
        async with console(size=WIDE, elsewhere=reach) as here:
            await here.press("5")
            await here.shows("chains  6 chains and artifacts", "beta.img", "1 silent: mesh gamma")
            assert sorted(reach.asked) == ["beta", "gamma"]
            await here.press(":", "=chains @beta", "enter")
            await here.shows("chains @beta", "as beta.gateway.b03c21 knows it")

    asyncio.run(main())


def test_audit_is_of_the_attached_mesh_or_of_the_one_that_is_named() -> None:
    async def main() -> None:
        async with console(size=WIDE, elsewhere=Reach(beta=other_mesh())) as here:
            await here.press("8")
            await here.shows("audit  5 ops  of alpha")
            await here.press(":", "=audit @beta", "enter")
            await here.shows(
                "audit @beta  1 op", "as beta.gateway.b03c21 has it", "beta.gateway.b03c21", "update"
            )
            await here.press(":", "=audit @gamma", "enter")
            await here.shows("mesh gamma: nobody answers")

    asyncio.run(main())


def test_kill_panel_asks_the_mesh_of_its_target() -> None:
    async def main() -> None:
        beta = other_mesh()
        beta.chain_rows = [
            chain("beta.img", 2, 2, mesh="beta", holders=["beta.broker.e4410c", "beta.broker.d2c9f0"])
        ]
        async with console(size=WIDE, elsewhere=Reach(beta=beta)) as here:
            await here.press("/", "=name:e4410c", "enter", "X")
            await here.shows("beta.img 2 → 1 of 2 held")
            assert here.client.polled == []

    asyncio.run(main())
