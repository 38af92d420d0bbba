"""The event log: whole objects, a bounded ring, readers that can't hold it up, lines safe to print."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from typing import BinaryIO

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.events import KEYS, EventLog, LineWriter, plain, text_line


def log(**options: object) -> EventLog:
    return EventLog("alpha.broker.1", 0x11C3A0, "alpha", clock_ms=lambda: 1_000_123, **options)  # type: ignore[arg-type]


def test_event_every_promised_key_is_there_and_null_where_it_does_not_apply() -> None:
    event = log().emit("node.ready")
    assert tuple(event) == KEYS
    assert event["node"] == "alpha.broker.1"
    assert (event["id"], event["mesh"], event["at_ms"]) == ("000000000011c3a0", "alpha", 1_000_123)
    assert {key for key in KEYS if event[key] is None} == {"from", "to", "source", "reason", "op_id", "by"}


def test_event_about_another_node_carries_that_nodes_names() -> None:
    event = log().emit(
        "node.changed", node="beta.x", id="00ff", mesh="beta", from_="alive", to="dead", source="exited"
    )
    assert (event["node"], event["id"], event["mesh"]) == ("beta.x", "00ff", "beta")
    assert (event["from"], event["to"], event["source"]) == ("alive", "dead", "exited")
    assert "from_" not in event


def test_event_extra_keys_are_kept() -> None:
    assert log().emit("node.ready", steps={"bind": 3})["steps"] == {"bind": 3}


def test_ring_beyond_its_size_forgets_the_oldest() -> None:
    events = log(ring=3)
    for n in range(5):
        events.emit("k", reason=str(n))
    assert [event["reason"] for event in events.recent()] == ["2", "3", "4"]
    assert [event["reason"] for event in events.recent(2)] == ["3", "4"]
    assert events.recent(0) == []
    assert events.total == 5


def test_ring_keeps_at_least_what_the_interface_promises() -> None:
    events = log()
    for _ in range(4096):
        events.emit("k")
    events.emit("last")
    assert len(events.recent()) >= 4096
    assert events.recent(1)[0]["kind"] == "last"


def test_about_gives_the_last_events_of_one_node_in_order() -> None:
    events = log()
    for n in range(6):
        events.emit("k", id="aa" if n % 2 else "bb", reason=str(n))
    assert [event["reason"] for event in events.about("aa", 2)] == ["3", "5"]


def test_subscription_sees_recent_then_later_events_once_each() -> None:
    events = log()

    async def read() -> list[str]:
        events.emit("k", reason="old")
        events.emit("k", reason="recent")
        subscription = events.subscribe(recent=1)
        asyncio.get_running_loop().call_soon(lambda: events.emit("k", reason="later"))
        seen = []
        async for event in subscription:
            seen.append(event["reason"])
            if event["reason"] == "later":
                break
        return seen

    assert asyncio.run(read()) == ["recent", "later"]


def test_subscription_too_slow_loses_the_oldest_and_is_told_how_many() -> None:
    events = log()
    subscription = events.subscribe(backlog=3)
    for n in range(10):
        events.emit("k", reason=str(n))
    taken = subscription.take()
    assert taken[0]["kind"] == "events.lost"
    assert taken[0]["count"] == 7
    assert set(KEYS) <= set(taken[0])
    assert [event["reason"] for event in taken[1:]] == ["7", "8", "9"]
    assert subscription.take() == []
    assert all(event["kind"] == "k" for event in events.recent())


def test_subscription_closed_ends_its_reader_and_takes_no_more() -> None:
    events = log()

    async def read() -> list[object]:
        subscription = events.subscribe()
        reader = asyncio.create_task(subscription.ready())
        await asyncio.sleep(0)
        subscription.close()
        ended = await asyncio.wait_for(reader, 5)
        events.emit("k")
        return [ended, subscription.take()]

    assert asyncio.run(read()) == [False, []]


def test_subscription_left_by_its_reader_is_forgotten() -> None:
    events = log()
    with events.subscribe() as subscription:
        events.emit("k")
    events.emit("k")
    assert len(subscription.take()) == 1


def test_json_line_is_the_event_itself() -> None:
    lines: list[bytes] = []
    event = log(form="json", writer=lines.append).emit("node.evicted", source="left", by=["a", "b"])
    assert lines[0].endswith(b"\n")
    assert json.loads(lines[0]) == event


def test_json_line_of_a_hostile_name_is_one_line() -> None:
    lines: list[bytes] = []
    log(form="json", writer=lines.append).emit("node.joined", node="a\nb\x1b[2J")
    assert lines[0].count(b"\n") == 1
    assert b"\x1b" not in lines[0]


def test_text_line_says_when_what_who_the_change_and_why() -> None:
    event = log().emit(
        "node.changed", node="n1", from_="alive", to="dead", source="exited", by=["x", "y"], reason="gone"
    )
    line = text_line(event)
    assert line.startswith(f"{line[:12]} node.changed n1 alive → dead ")
    assert "source=exited" in line
    assert line.endswith("(gone)")


def test_text_line_of_a_hostile_name_holds_no_control_or_turning_character() -> None:
    event = log().emit("node.joined", node="a\x1b[31m\u202eb\n\x9bc\u2028", reason="\x07")
    line = text_line(event)
    assert "a[31mbc" in line
    assert line.isprintable()


@given(st.text())
def test_plain_any_text_becomes_printable_enough(text: str) -> None:
    cleaned = plain(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in cleaned)
    assert plain(cleaned) == cleaned


def test_writer_lines_come_out_in_order_before_close_returns() -> None:
    out = io.BytesIO()
    writer = LineWriter(out)
    for n in range(1000):
        writer(b"%d\n" % n)
    writer.close(5)
    assert out.getvalue() == b"".join(b"%d\n" % n for n in range(1000))


def test_writer_stalled_reader_never_blocks_and_counts_what_it_drops() -> None:
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=0) as stream:  # noqa: PTH123
        writer = LineWriter(stream, backlog=8)
        for _ in range(5000):
            writer(b"x" * 1000 + b"\n")
        dropped = writer.dropped
        got = bytearray()

        def drain() -> None:
            while chunk := os.read(reading, 1 << 16):
                got.extend(chunk)

        reader = threading.Thread(target=drain)
        reader.start()
        writer.close(10)
    reader.join(10)
    os.close(reading)
    assert dropped > 0
    assert got.count(b"\n") == 5000 - dropped


def test_writer_broken_stream_is_given_up_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as stream:  # noqa: PTH123
        writer = LineWriter(stream)
        writer(b"lost\n")
        writer.close(5)
        writer(b"after\n")
    assert writer.dropped >= 1


def test_writer_nothing_written_starts_no_thread() -> None:
    before = threading.active_count()
    writer = LineWriter(io.BytesIO())
    writer.close()
    assert threading.active_count() == before


def test_log_close_flushes_what_was_emitted_last() -> None:
    out: BinaryIO = io.BytesIO()
    writer = LineWriter(out)
    events = log(form="json", writer=writer)
    events.emit("node.stopping", reason="signal")
    writer.close(5)
    assert isinstance(out, io.BytesIO)
    assert msgspec.json.decode(out.getvalue())["kind"] == "node.stopping"


def test_emit_with_a_value_that_json_lacks_still_makes_a_line() -> None:
    lines: list[bytes] = []
    log(form="json", writer=lines.append).emit("k", path=os.path)
    assert json.loads(lines[0])["path"].startswith("<module")


def test_subscription_iterator_survives_cancellation_and_leaves_nothing_behind() -> None:
    events = log()

    async def run() -> int:
        async def read() -> None:
            async for _ in events.subscribe():
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(events._subscribers)

    assert asyncio.run(run()) == 0
