"""After its commit, `qd apply` looks where the spec has got to, and whether it is the one that counts."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from discovery.errors import Refused, Unreachable
from tui.cli import applying


class Goal:
    """A node that answers what it is given, one answer a question; the last one again and again."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def ask(self, method: str, params: Any, timeout_s: float) -> dict[str, Any]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


def reach(*answers: Any) -> dict[str, Any]:
    return asyncio.run(applying._reach(cast("Any", Goal(*answers)), "mine", 0.3))


def at(op_id: str, reached: list[str], missed: list[str]) -> dict[str, Any]:
    return {"op_id": op_id, "by": "bob", "nodes": {"reached": reached, "missed": missed}}


def test_reach_is_asked_until_all_have_it_whatever_fails_between() -> None:
    found = reach({}, at("mine", ["a"], ["b"]), Unreachable("no"), at("mine", ["a", "b"], []))
    assert found == {"reached": ["a", "b"], "missed": []}


def test_reach_names_who_has_not_got_it_in_time() -> None:
    assert reach(at("mine", ["a"], ["b"])) == {"reached": ["a"], "missed": ["b"]}


def test_spec_of_another_operator_that_came_to_count_is_told() -> None:
    with pytest.raises(Refused) as why:
        reach(at("mine", ["a"], ["b"]), at("theirs", ["a"], []))
    assert why.value.code == "superseded" and "bob" in why.value.sentence
