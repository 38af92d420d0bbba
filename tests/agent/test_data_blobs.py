"""Blobs on one disk: whole or not at all, resumed, checked, mended, refused when there is no room."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from agent.data import blobs
from agent.data.blobs import BlobStore, Entry
from agent.data.chunks import CHUNK_BYTES, sums_of
from agent.data.parts import BadChunk, Part
from discovery.errors import LocalError, Refused, RemoteError
from tests.agent.data_nodes import chunks_of, entry_for, noise

DATA = noise(2 * CHUNK_BYTES + 5)
LIST = sums_of(chunks_of(DATA)).list


def opened(place: Path, **more: Any) -> BlobStore:
    return BlobStore(place, reserve_bytes=0, **more)


def part_of(store: BlobStore, data: bytes = DATA) -> Part:
    sums = sums_of(chunks_of(data))
    part = store.part(sums.hash, len(data), sums.list)
    part.open()
    return part


def filled(store: BlobStore, name: str = "model", data: bytes = DATA, **more: Any) -> Entry:
    entry = entry_for(name, data, **more)
    part = part_of(store, data)
    for chunk in chunks_of(data)[part.chunk :]:
        part.add(chunk)
    store.adopt(part)
    store.keep(entry)
    return entry


def test_artifact_that_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    entry = filled(opened(tmp_path))
    again = opened(tmp_path)
    assert again.held() == [entry]
    assert again.read(entry.hash, CHUNK_BYTES - 3, 6) == DATA[CHUNK_BYTES - 3 : CHUNK_BYTES + 3]
    assert again.chunk_list(entry.hash) == LIST
    assert again.published(entry.hash)


def test_empty_artifact_is_one_like_any_other(tmp_path: Path) -> None:
    store = opened(tmp_path)
    entry = filled(store, "empty", b"")
    assert store.read(entry.hash, 0, 10) == b"" and opened(tmp_path).held() == [entry]


def test_name_stands_for_its_latest_put_and_lets_go_of_the_bytes_of_the_earlier(tmp_path: Path) -> None:
    store = opened(tmp_path)
    old = filled(store, at_ms=1_000)
    new = filled(store, data=b"new", at_ms=2_000)
    store.keep(old)
    assert store.entry("model") == new
    assert not store.has(old.hash) and not store.blob_file(old.hash).exists()


def test_bytes_of_two_names_stay_until_both_are_dropped(tmp_path: Path) -> None:
    store = opened(tmp_path)
    one, two = filled(store, "one"), filled(store, "two")
    store.drop("one")
    assert store.published(two.hash)
    store.drop("two")
    assert not store.has(one.hash) and opened(tmp_path).entries() == []


def test_blob_without_a_name_is_neither_published_nor_kept_over_a_restart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    part = part_of(store)
    for chunk in chunks_of(DATA):
        part.add(chunk)
    store.adopt(part)
    assert store.has(part.hash) and not store.published(part.hash)
    again = opened(tmp_path)
    assert not again.has(part.hash) and again.counters["stray"] == 2


def test_entry_that_says_another_thing_than_its_signed_put_is_put_aside(tmp_path: Path) -> None:
    entry = filled(opened(tmp_path))
    path = tmp_path / "names" / "model.json"
    path.write_text(path.read_text().replace(entry.hash, "0" * 64))
    again = opened(tmp_path)
    assert again.entries() == [] and again.counters["bad_entry"] == 1
    assert (tmp_path / "quarantine" / "model.json").exists()


def test_place_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(LocalError, match="it needs a disk that you can write to"):
        BlobStore(tmp_path / "f")


# --- parts


def test_part_takes_up_what_fits_and_cuts_off_what_does_not(tmp_path: Path) -> None:
    store = opened(tmp_path)
    part = part_of(store)
    part.add(DATA[:CHUNK_BYTES])
    part.close()
    with part.path.open("ab") as file:
        file.write(b"torn")
    again = part_of(store)
    assert again.verified == CHUNK_BYTES == again.path.stat().st_size
    again.close()
    raw = bytearray(part.path.read_bytes())
    raw[7] ^= 1
    part.path.write_bytes(raw)
    assert part_of(store).verified == 0


def test_chunk_that_does_not_fit_is_named_and_changes_nothing(tmp_path: Path) -> None:
    part = part_of(opened(tmp_path))
    part.add(DATA[:CHUNK_BYTES])
    bad = bytearray(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
    bad[-1] ^= 1
    with pytest.raises(BadChunk) as told:
        part.add(bad)
    assert told.value.index == 1 and part.verified == CHUNK_BYTES
    with pytest.raises(BadChunk):
        part.add(DATA[CHUNK_BYTES:])
    part.add(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
    part.add(DATA[2 * CHUNK_BYTES :])
    assert part.whole


def test_whole_that_is_not_what_was_put_is_never_adopted(tmp_path: Path) -> None:
    store = opened(tmp_path)
    part = store.part("0" * 64, len(DATA), LIST)
    part.open()
    for chunk in chunks_of(DATA):
        part.add(chunk)
    with pytest.raises(RemoteError, match="not what was put"):
        store.adopt(part)
    assert not store.has("0" * 64)


def test_damaged_blob_is_mended_from_its_own_good_chunks(tmp_path: Path) -> None:
    store = opened(tmp_path)
    entry = filled(store)
    with store.blob_file(entry.hash).open("r+b") as file:
        file.seek(CHUNK_BYTES + 1)
        file.write(b"\xff\x00\xff")
    assert [store.check_chunk(entry.hash, index, LIST) for index in range(3)] == [True, False, True]
    store.quarantine(entry.hash)
    assert store.held() == [] and store.entries() == [entry]
    part = part_of(store)
    part.add_seeds()
    assert part.chunk == 1
    part.add(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
    part.add_seeds()
    assert part.whole, "the chunk behind the damage came from the damaged copy"
    store.adopt(part)
    assert store.held() == [entry] and store.counters["mended"] == 1
    assert not list((tmp_path / "quarantine").iterdir())


def test_damaged_list_is_made_anew_from_a_sound_blob_and_a_damaged_blob_is_told(tmp_path: Path) -> None:
    store = opened(tmp_path)
    entry = filled(store)
    (tmp_path / "lists" / entry.hash).write_bytes(b"x" * len(LIST))
    assert store.proved_list(entry) == LIST
    assert store.chunk_list(entry.hash) == LIST
    (tmp_path / "lists" / entry.hash).unlink()
    store.blob_file(entry.hash).write_bytes(b"y" * len(DATA))
    with pytest.raises(Refused) as told:
        store.proved_list(entry)
    assert told.value.code == "corrupt"


def test_blob_cut_short_by_a_crash_is_taken_out_of_use_at_start(tmp_path: Path) -> None:
    store = opened(tmp_path)
    entry = filled(store)
    os.truncate(store.blob_file(entry.hash), CHUNK_BYTES)
    again = opened(tmp_path)
    assert again.held() == [] and again.entries() == [entry]
    part = part_of(again)
    part.add_seeds()
    assert part.verified == CHUNK_BYTES


# --- no room


def test_reserve_is_kept_free_and_what_was_got_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 10 * CHUNK_BYTES}
    monkeypatch.setattr(blobs.disk, "free_bytes", lambda place: free["bytes"])
    store = BlobStore(tmp_path, reserve_bytes=8 * CHUNK_BYTES)
    with pytest.raises(Refused) as told:
        part_of(store)
    assert told.value.code == "disk_full" and "2 more are needed and 8 stay in reserve" in told.value.sentence
    free["bytes"] = 11 * CHUNK_BYTES
    part = part_of(store)
    part.add(DATA[:CHUNK_BYTES])
    free["bytes"] = 8 * CHUNK_BYTES
    with pytest.raises(Refused):
        part.add(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
    part.close()
    free["bytes"] = 20 * CHUNK_BYTES
    assert part_of(store).verified == CHUNK_BYTES


def test_full_disk_refuses_keeps_the_part_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """The kernel's own refusal, by a limit on the size of files: what the disk says when it is full takes this path."""
    store = opened(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    part = part_of(store)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES + 100, hard))
        part.add(DATA[:CHUNK_BYTES])
        with pytest.raises(Refused) as told:
            part.add(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
        assert told.value.code == "disk_full" and part.verified == CHUNK_BYTES
        assert part.path.stat().st_size == CHUNK_BYTES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    part.add(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
    part.add(DATA[2 * CHUNK_BYTES :])
    store.adopt(part)
    assert store.read(part.hash, 0, len(DATA)) == DATA


def test_small_file_system_that_is_full_refuses_and_goes_on_once_it_is_emptied(tmp_path: Path) -> None:
    """A file system of its own, where we may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    try:
        (place / "hog").write_bytes(bytes(5 * 2**19))
        store = opened(place)
        store.room_for = lambda more: None  # type: ignore[method-assign]
        part = part_of(store)
        part.add(DATA[:CHUNK_BYTES])
        with pytest.raises(Refused) as told:
            part.add(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
        assert told.value.code == "disk_full"
        part.close()
        (place / "hog").unlink()
        filled(store)
        assert opened(place).held()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_unwritable_disk_is_told_as_such() -> None:
    why = blobs.disk.refused(OSError(errno.EIO, "Input/output error"), "blob")
    assert why.code == "disk" and "Input/output error" in why.sentence


# --- kill -9


WRITER = """
    import sys
    from pathlib import Path
    from agent.data.blobs import BlobStore
    from tests.agent.test_data_blobs import chunks_of, noise
    from agent.data.chunks import CHUNK_BYTES, sums_of
    place = Path(sys.argv[1])
    data = noise(8 * CHUNK_BYTES, 3)
    sums = sums_of(chunks_of(data))
    part = BlobStore(place, 0).part(sums.hash, len(data), sums.list)
    part.open()
    print(part.verified, flush=True)
    for chunk in chunks_of(data)[part.chunk:]:
        part.add(chunk)
        print(part.verified, flush=True)
        if part.chunk == int(sys.argv[2]):
            sys.stdin.read()
"""


def test_writer_killed_at_any_chunk_leaves_a_part_that_is_taken_up(tmp_path: Path) -> None:
    data = noise(8 * CHUNK_BYTES, 3)
    argv = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), "5"]
    writer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdin is not None
    try:
        deadline = time.monotonic() + 20
        said = ""
        while said != str(5 * CHUNK_BYTES):
            said = writer.stdout.readline().strip()
            assert said and time.monotonic() < deadline
    finally:
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
    store = opened(tmp_path)
    part = part_of(store, data)
    assert part.verified == 5 * CHUNK_BYTES
    for chunk in chunks_of(data)[5:]:
        part.add(chunk)
    store.adopt(part)
    assert store.has(part.hash)
