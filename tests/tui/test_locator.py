"""Locators: what they mean, how they fail, and what they leave of a fleet."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tui.fakes import events, fleet, row
from tui.model.columns import FLEET
from tui.model.locator import Locator, LocatorError, Term, parse
from tui.model.views import VIEWS, parse_locator

# A shared machine may stop for longer than any example takes.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def names(found: list[Any]) -> list[str]:
    return [item["name"] for item in found]


def select(line: str, rows: list[dict[str, Any]] | None = None) -> list[str]:
    return names(VIEWS["fleet"].json(fleet() if rows is None else rows, parse_locator(line)))


# -- locators


@pytest.mark.parametrize(
    ("line", "locator"),
    [
        ("", Locator()),
        ("fleet", Locator("fleet")),
        ("events broker", Locator("events", (Term("word", "broker"),))),
        ('"fleet"', Locator(None, (Term("word", "fleet"),))),
        ("a !b", Locator(None, (Term("word", "a"), Term("word", "b", negated=True)))),
        ("/x y/", Locator(None, (Term("regex", "x y"),))),
        (r"/a\/b/", Locator(None, (Term("regex", r"a\/b"),))),
        ("state:dead", Locator(None, (Term("match", "dead", "state"),))),
        ("state:dead,alive", Locator(None, (Term("match", "dead\0alive", "state"),))),
        ('reason:"process gone"', Locator(None, (Term("match", "process gone", "reason"),))),
        ("cpu>80", Locator(None, (Term("compare", "80", "cpu", ">"),))),
        (
            "cpu>=80 mem<=5",
            Locator(None, (Term("compare", "80", "cpu", ">="), Term("compare", "5", "mem", "<="))),
        ),
        ("tag.zone=x", Locator(None, (Term("tag", "x", "zone"),))),
        ("sort:-cpu,name", Locator(None, (), (("cpu", True), ("name", False)))),
        ("fleet @beta", Locator("fleet", (), (), "beta")),
        ("127.0.0.1:7946", Locator(None, (Term("word", "127.0.0.1:7946"),))),
        (
            "fleet state:degraded cpu>80 sort:-cpu @beta",
            Locator(
                "fleet",
                (Term("match", "degraded", "state"), Term("compare", "80", "cpu", ">")),
                (("cpu", True),),
                "beta",
            ),
        ),
    ],
)
def test_locator_of_a_line(line: str, locator: Locator) -> None:
    assert parse(line, VIEWS) == locator


@pytest.mark.parametrize(
    ("line", "pos", "said"),
    [
        ("fleet /x", 6, "not closed"),
        ("a //", 2, "nothing between"),
        ("a /(/", 3, "regular expression"),
        ("cpux>3", 0, 'no column "cpux"; did you mean cpu'),
        ("a !cpux>3", 3, "no column"),
        ("cpu>", 4, "nothing after"),
        ("cpu>hot", 4, "figure"),
        ("state>3", 0, "holds no figure"),
        ("age>soon", 4, "30s or 5m"),
        ("fresh:perhaps", 6, "yes or no"),
        ("a @B", 2, "a mesh is"),
        ("@a @b", 3, "one mesh"),
        ("a ! b", 2, "nothing after !"),
        ("!sort:cpu", 0, "can't turn"),
        ("sort:", 5, "takes columns"),
        ("a sort:cpux", 2, "no column"),
        ('name:"x', 5, "not closed"),
        ('""', 0, "nothing between"),
        ('name:"a"b', 8, "blank"),
        ("tag.zone>3", 8, "= only"),
    ],
)
def test_bad_locator_is_an_error_at_its_place(line: str, pos: int, said: str) -> None:
    with pytest.raises(LocatorError) as why:
        parse_locator(line)
    assert said in why.value.text
    assert why.value.pos == pos


@given(st.text(max_size=60))
@example('fleet !"a b" /x y/ cpu>3 sort:-cpu @beta state:a,b tag.z="q r"')
@example("state:,")
@example('\\ " \\"')
def test_any_line_parses_to_a_locator_that_prints_and_parses_again_or_is_an_error_inside_it(
    line: str,
) -> None:
    try:
        locator = parse(line, VIEWS)
    except LocatorError as why:
        assert 0 <= why.pos <= len(line)
        assert why.text
        return
    assert parse(locator.text(), VIEWS) == locator


_WORD = st.text(string.ascii_letters + string.digits + '._-:,<>=!/@"\\ é日', min_size=1, max_size=12).filter(
    str.strip
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["word", "match", "compare", "tag"]), _WORD, st.booleans()), max_size=5
    )
)
def test_every_term_survives_being_printed(made: list[tuple[str, str, bool]]) -> None:
    column = {"word": "", "match": "state", "compare": "cpu", "tag": "zone"}
    terms = tuple(Term(kind, value, column[kind], negated=turned) for kind, value, turned in made)  # type: ignore[arg-type]
    assert parse(Locator("fleet", terms).text(), VIEWS).terms == terms


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("", 14),
        ("state:degraded", 1),
        ("state:d", 3),
        ("state:dead,updating", 2),
        ("!state:alive", 5),
        ("kind:gateway", 2),
        ("@beta", 4),
        ("cpu>90", 1),
        ("cpu:-", 1),
        ("!cpu>0", 1),
        ("cpu>0 cpu<5", 3),
        ("stale:yes", 1),
        ("suspect:yes", 1),
        ("tag.zone=a", 3),
        ("tag.zone:*", 5),
        ("age>10s", 2),
        ("since>1h", 4),
        ("rtt:-", 2),
        ("rtt>10", 4),
        ("evidence:exited", 1),
        ("/broker\\.[07]/", 3),
        ("broker 77", 3),
        ("BROKER @alpha", 4),
    ],
)
def test_filter_leaves_exactly_these(line: str, count: int) -> None:
    assert len(select(line)) == count


@pytest.mark.parametrize("column", [c.key for c in FLEET])
@pytest.mark.parametrize("sign", ["", "-"])
def test_every_column_sorts_and_unknown_comes_last(column: str, sign: str) -> None:
    rows = [*fleet(), dict.fromkeys(row("x.y.z")) | {"id": "ffff", "name": "zz"}]
    found = VIEWS["fleet"].select(rows, parse_locator(f"sort:{sign}{column}"))
    value = next(c.value for c in FLEET if c.key == column)
    known = [value(item, 0.0) for item in found]
    cut = next((at for at, v in enumerate(known) if v is None or v == ""), len(known))
    assert all(v is None or v == "" for v in known[cut:])
    assert known[:cut] == sorted(known[:cut], reverse=sign == "-")


def test_default_order_is_trouble_first_then_name() -> None:
    states = [item["state"] for item in VIEWS["fleet"].json(fleet(), Locator("fleet"))]
    assert states[:5] == ["dead", "degraded", "draining", "updating", "joining"]
    assert set(states[5:]) == {"alive"}


def test_headless_table_is_the_view_without_a_screen() -> None:
    rows = VIEWS["fleet"].table(fleet(), parse_locator("fleet state:degraded"))
    assert rows[0][0] == "NODE"
    assert len(rows) == 2
    assert rows[1][0] == "alpha.broker.77b1e9"
    assert "98%" in rows[1]
    told = VIEWS["events"].table(events(), parse_locator("events dead"))
    assert len(told) == 2 and "dead" in " ".join(told[1])


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_every_view_prints_nothing_for_nothing(view: str) -> None:
    assert len(VIEWS[view].table([], parse_locator(view))) == 1
