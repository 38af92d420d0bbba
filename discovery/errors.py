"""Errors say whose fault it is and whether anything changed."""

from __future__ import annotations


class QuarterdeckError(Exception):
    """Every error of ours; its text is one line for people."""


class LocalError(QuarterdeckError):
    """We misused ourselves, or what a person gave us is unusable. Nothing changed."""


class RemoteError(QuarterdeckError):
    """The other side sent something that makes no sense. Nothing changed here."""


class Refused(QuarterdeckError):
    """A rule said no. `code` is stable (`unknown_key`, `expired`, …); the text is the sentence for people."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class Unreachable(QuarterdeckError):
    """Nobody answered. `maybe_arrived` tells whether the message may have been received all the same."""

    def __init__(self, sentence: str, *, maybe_arrived: bool = False) -> None:
        super().__init__(sentence)
        self.maybe_arrived = maybe_arrived
