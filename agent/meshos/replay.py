"""A recorded run, folded again in virtual time: the same events give the same actions, byte for byte.

Line 1 says whose run it is (`this_node`), which config fields differ from the defaults, and the scores known
from the start; then one event a line, in the order and at the times in which a loop took them. Read literally:

- times never decrease; a line that goes back in time is refused, like every other that can't be meant;
- `shutdown` ends the run, whatever stands behind it; blank lines and unknown fields mean nothing;
- a tick folds, then the events polled within it (`polled`, 0 unless recorded), then reconcile writes back;
- with `admit`, the executor is played as well: what a tick asks for waits first in first out, every dispatch
  succeeds at once, and deferred actions go out between the ticks, unreported. Asked for again while it is
  deferred, an action keeps its place. Outcomes are never made up: those that matter are recorded events.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from agent.meshos.actions import Action, document, key_of
from agent.meshos.admit import ADMIT, Admission, Defer, Verdict
from agent.meshos.config import MeshOsConfig, with_overrides
from agent.meshos.desk import Desk, Dropped, Go
from agent.meshos.events import Event, Id, Shutdown, Tick, decode_line
from agent.meshos.reconcile import run_pass
from agent.meshos.replicas import set_scores
from agent.meshos.snapshot import SnapshotBuilder
from agent.meshos.snapshot import document as snapshot_document
from agent.meshos.state import MeshOsState, fold
from discovery.errors import LocalError

NO_LIMIT = 2**31


class RunHeader(msgspec.Struct, frozen=True):
    """Line 1 of a recorded run."""

    this_node: Id
    config: dict[str, Any] = {}
    scores: dict[str, dict[str, float | None]] = {}


class Run(msgspec.Struct, frozen=True):
    """A recorded run, read."""

    header: RunHeader
    config: MeshOsConfig
    events: list[Event]


class BadLine(LocalError):
    """A line of a recorded run that can't be used; `number` counts from 1."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")
        self.number = number
        self.why = why


class _Envelope(msgspec.Struct):
    """What every event line has to say."""

    event: str
    at_ms: Annotated[int, Meta(ge=0, le=2**62)]


_envelope = msgspec.json.Decoder(_Envelope)
_header = msgspec.json.Decoder(RunHeader)


def read(lines: Iterable[bytes]) -> Run:
    """Reads a recorded run; BadLine says which line can't be used, and why."""
    number = 0
    header: RunHeader | None = None
    config = MeshOsConfig()
    events: list[Event] = []
    last_ms = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if header is None:
            header, config = _read_header(number, line)
            continue
        event = _read_event(number, line)
        if event.at_ms < last_ms:
            raise BadLine(number, f"at_ms {event.at_ms} is before {last_ms}, the time of the event before it")
        last_ms = event.at_ms
        events.append(event)
    if header is None:
        raise BadLine(max(1, number), 'no header; line 1 is {"this_node":ID,"config":{},"scores":{}}')
    return Run(header, config, events)


def _read_header(number: int, line: bytes) -> tuple[RunHeader, MeshOsConfig]:
    try:
        header = _converted(line, _header, RunHeader)
    except (ValueError, RecursionError) as why:
        raise BadLine(number, f"not a header: {_plain(why)}") from why
    try:
        return header, with_overrides(header.config)
    except LocalError as why:
        raise BadLine(number, str(why)) from why


def _read_event(number: int, line: bytes) -> Event:
    try:
        envelope = _converted(line, _envelope, _Envelope)
    except (ValueError, RecursionError) as why:
        raise BadLine(number, f"not an event: {_plain(why)}") from why
    if envelope.event not in EVENT_NAMES:
        raise BadLine(number, f"unknown event `{envelope.event[:40]}`; one of {', '.join(EVENT_NAMES)}")
    try:
        return decode_line(line)
    except LocalError as why:
        raise BadLine(number, f"{envelope.event}: {str(why).removeprefix('not an event: ')}") from why


def _converted(line: bytes, decoder: msgspec.json.Decoder[Any], kind: type[Any]) -> Any:
    """Decodes strictly, and once more by a reader that knows NaN where that is all that is wrong."""
    try:
        return decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(line), kind)


def _plain(why: Exception) -> str:
    if isinstance(why, json.JSONDecodeError):
        return f"no JSON: {why.msg} at column {why.colno}"
    if isinstance(why, UnicodeDecodeError):
        return "no UTF-8"
    return str(why) or type(why).__name__


EVENT_NAMES: tuple[str, ...] = tuple(
    str(kind.__struct_config__.tag) for kind in Event.__args__ if kind.__struct_config__.tag is not None
)


def play(run: Run, *, admit: bool = False) -> Iterator[dict[str, Any]]:
    """A document a tick, `{"at_ms", "actions"}`, then `{"snapshot"}`."""
    state = MeshOsState(run.header.this_node, run.config)
    for chain, scores in run.header.scores.items():
        set_scores(state, chain, scores)
    gate = _Gate(state) if admit else None
    events = run.events
    at = 0
    while at < len(events):
        event = events[at]
        at += 1
        _take(state, event)
        if isinstance(event, Shutdown):
            break
        if not isinstance(event, Tick):
            continue
        polled_end = min(len(events), at + event.polled)
        while at < polled_end and not isinstance(events[at], Tick | Shutdown):
            _take(state, events[at])
            at += 1
        try:
            actions = run_pass(state)
        except Exception:  # as live, where a LocalFailure follows in the record
            actions = []
        now_ms = state.last_tick_ms
        shown = [document(action) for action in actions] if gate is None else gate.judge(actions, now_ms)
        yield {"at_ms": event.at_ms, "actions": shown}
    yield {"snapshot": snapshot_document(SnapshotBuilder(state).last, state.now_ms)}


def _take(state: MeshOsState, event: Event) -> None:
    try:
        fold(state, event)
    except Exception:  # as live, where a LocalFailure follows in the record
        pass
    state.controls.clear()


class _Gate:
    """The executor, played: what it would say of each action."""

    def __init__(self, state: MeshOsState) -> None:
        config = msgspec.structs.replace(state.config, action_queue_capacity=NO_LIMIT)
        self._desk = Desk(config, Admission(config, state.gate_of))
        self._deferred: dict[Any, tuple[int, str]] = {}

    def judge(self, actions: list[Action], now_ms: int) -> list[dict[str, Any]]:
        """The actions of a tick with their verdicts, after all that came due before."""
        desk = self._desk
        while (due_ms := desk.due_ms()) is not None and due_ms <= now_ms:
            self._step(due_ms)
        desk.admission.forget(now_ms)
        for action in actions:
            desk.submit(action)
        verdicts: dict[Any, Verdict] = {}
        while desk.waiting:
            key, verdict = self._step(now_ms)
            verdicts[key] = verdict
        desk.edges().clear()
        return [
            _with(action, verdicts.get(key_of(action)) or self._rest(action, now_ms)) for action in actions
        ]

    def _rest(self, action: Action, now_ms: int) -> Verdict:
        due_ms, reason = self._deferred[key_of(action)]
        return Defer(max(0, due_ms - now_ms), reason, True)

    def _step(self, now_ms: int) -> tuple[Any, Verdict]:
        step = self._desk.step(now_ms)
        assert step is not None
        key = key_of(step.action)
        if isinstance(step, Go):
            self._deferred.pop(key, None)
            self._desk.went(step.action)
            return key, ADMIT
        if isinstance(step, Dropped):
            self._deferred.pop(key, None)
            return key, Defer(0, step.reason)
        if isinstance(step.verdict, Defer):
            self._deferred[key] = (now_ms + step.verdict.retry_after_ms, step.verdict.reason)
        return key, step.verdict


def _with(action: Action, verdict: Verdict) -> dict[str, Any]:
    """An action's fields, and the verdict's beside them; `until_ms` and `reason` of the action itself stay."""
    said = msgspec.to_builtins(verdict)
    said.pop("slot", None)
    shown = {**document(action), **said}
    for name in ("retry_after_ms", "until_ms", "reason"):
        shown.setdefault(name, None)
    return shown
