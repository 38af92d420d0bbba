"""From an error to its one line and its exit status: the statuses of the interface contract, decided here alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from agent import opmessage
from discovery.errors import LocalError, QuarterdeckError, Refused, Unreachable

OK = 0
FAILED = 1
"""Refused or failed."""
USAGE = 2
"""Bad usage, unknown or ambiguous name."""
UNREACHABLE = 3
"""Not reachable, or outcome unknown."""
NOT_AUTHORISED = 4
TIMED_OUT = 5
STALE = 6

AUTHORITY_CODES = opmessage.NOT_AUTHORISED | {"login", "no_key"}
"""Refusals that say: not by you."""
NAME_CODES = frozenset({"unknown", "ambiguous", "unknown_mesh"})
GONE_CODES = frozenset({"gone"})

CURES = {
    FAILED: "see `qd doctor`",
    USAGE: "see `qd --help`",
    UNREACHABLE: "see `qd nodes` and `qd doctor`",
    NOT_AUTHORISED: "have your key listed in that host's authorized_operators, or name another with --operator-key",
    TIMED_OUT: "look with `qd nodes`, or give it longer with --timeout",
    STALE: "`qd update` runs the code on disk",
}


class Fail(QuarterdeckError):
    """An error with its exit status. The text reads `what: why`, or `what: why; what to do`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def refusal_status(code: str) -> int:
    """The exit status of a refusal with that reason code."""
    if code in AUTHORITY_CODES:
        return NOT_AUTHORISED
    if code in NAME_CODES:
        return USAGE
    return UNREACHABLE if code in GONE_CODES else FAILED


def status_of(error: QuarterdeckError) -> int:
    """The exit status of any error of ours."""
    if isinstance(error, Fail):
        return error.status
    if isinstance(error, Refused):
        return refusal_status(error.code)
    if isinstance(error, Unreachable):
        return UNREACHABLE
    if isinstance(error, LocalError):
        return USAGE
    return FAILED


def line_of(text: str, status: int, command: str | None) -> str:
    """`qd: <what>: <why>; <what to do>` of an error's text, on one line, safe to show."""
    from tui.model.text import clean

    said = " ".join(clean(text).split()).rstrip(".") or "failed"
    if ": " not in said:
        said = f"{command or 'command line'}: {said}"
    if "; " not in said:
        cure = CURES[status]
        if status == USAGE and command:
            cure = f"see `qd {command} --help`"
        said = f"{said}; {cure}"
    return f"qd: {said}"


def op_failure(what: str, result: Mapping[str, Any], command: str) -> tuple[int, str] | None:
    """Exit status and line of an op that was neither done nor accepted; None for one that was."""
    if result["result"] in ("done", "accepted"):
        return None
    refused = result["result"] == "refused"
    status = refusal_status(str(result["code"])) if refused else UNREACHABLE
    word = "outcome unknown: " if result["result"] == "unknown" else ""
    code = f" ({result['code']})" if result["code"] else ""
    why = result["reason"] or result["result"]
    return status, line_of(f"{command} {what}: {word}{why}{code}", status, command)


def nearest(word: str, known: Iterable[str]) -> str:
    """The legal word nearest to what was typed."""
    choices = sorted(known)
    return difflib.get_close_matches(word, choices, n=1, cutoff=0.0)[0]
