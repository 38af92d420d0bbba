"""The blobs and names of one node: files named by their SHA-256, and for each name the put that it stands for.

    blobs/HASH          whole, verified, fsynced before it got this name
    lists/HASH          the hashes of its chunks
    parts/HASH.part     on its way here: verified chunks from the start, kept over a crash and a full disk
    names/NAME.json     the put of that name: the signed bytes, and what they say
    quarantine/HASH     damaged: its good chunks mend it, then it goes

A blob without a name is of no use and is removed. All of this blocks; whoever is on an event loop uses a thread for
what is larger than a chunk.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.data import disk
from agent.data.chunks import CHUNK_BYTES, count_of, fits, is_hash, length_of, list_digest, sums_of
from agent.data.parts import Part
from agent.data.puts import Put, decode_put
from discovery.errors import LocalError, QuarterdeckError, Refused, RemoteError

RESERVE_BYTES = 256 * 2**20
"""What is left free on the disk for everything else on this host."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A name, as its put says. `put_by`: the fingerprint of the key that signed `message`."""

    name: str
    hash: str
    list: str
    size: int
    replicas: int
    put_by: str
    at_ms: int
    op_id: str
    message: bytes
    signature: str

    @property
    def stamp(self) -> tuple[int, str]:
        """Of two entries of a name the one with the greater stamp stands."""
        return self.at_ms, self.op_id

    @classmethod
    def of(cls, put: Put, put_by: str, message: bytes, signature: str) -> Entry:
        args = put.args
        return cls(
            name=args.name,
            hash=args.hash,
            list=args.list,
            size=args.size,
            replicas=args.replicas,
            put_by=put_by,
            at_ms=put.message.issued_at_ms,
            op_id=put.message.op_id,
            message=message,
            signature=signature,
        )


class BlobStore:
    """`BlobStore(place)`: LocalError when the place can't be used. `reserve_bytes` stay free."""

    def __init__(self, place: Path, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.place = place
        self.reserve_bytes = reserve_bytes
        self.counters: Counter[str] = Counter()
        """`bad_entry`, `stray`, `bad_chunk`, `quarantined`, `mended`, `kept`, `dropped`."""
        self._entries: dict[str, Entry] = {}
        self._sizes: dict[str, int] = {}
        """Whole blobs."""
        try:
            for folder in ("blobs", "lists", "parts", "names", "quarantine"):
                (place / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._load()
        except OSError as why:
            raise LocalError(
                f"artifacts {place}: {why.strerror or why}; it needs a disk that you can write to"
            ) from why

    def _load(self) -> None:
        for folder in ("names", "lists"):
            for left in (self.place / folder).glob(f"*{disk.TEMPORARY}"):
                left.unlink(missing_ok=True)
        for path in sorted((self.place / "names").glob("*.json")):
            try:
                entry = msgspec.json.decode(path.read_bytes(), type=Entry)
                said = decode_put(entry.message)
                if (
                    path.stem != entry.name
                    or Entry.of(said, entry.put_by, entry.message, entry.signature) != entry
                ):
                    raise RemoteError("says something else than what was signed")
                self._entries[entry.name] = entry
            except (ValueError, OSError, QuarterdeckError):
                self.counters["bad_entry"] += 1
                path.replace(self.place / "quarantine" / path.name)
        for path in (self.place / "blobs").iterdir():
            if is_hash(path.name):
                self._sizes[path.name] = path.stat().st_size
        for entry in list(self._entries.values()):
            if self._sizes.get(entry.hash, entry.size) != entry.size:
                self.quarantine(entry.hash)
        self._sweep()

    # --- names

    def entry(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def held(self) -> list[Entry]:
        """The names whose bytes are here, whole."""
        return [entry for entry in self._entries.values() if entry.hash in self._sizes]

    def keep(self, entry: Entry) -> None:
        """Has the name stand for this entry, durably, unless a later one stands. Refused when the disk won't."""
        known = self._entries.get(entry.name)
        if known is not None and known.stamp >= entry.stamp:
            return
        try:
            disk.write_whole(self._name_file(entry.name), msgspec.json.encode(entry))
        except OSError as why:
            raise disk.refused(why, f"artifact {entry.name}") from why
        self._entries[entry.name] = entry
        self.counters["kept"] += 1
        if known is not None and known.hash != entry.hash:
            self._let_go(known.hash)

    def drop(self, name: str) -> None:
        """Forgets a name, and the bytes that nothing else is named by. Refused when the disk won't."""
        entry = self._entries.get(name)
        if entry is None:
            return
        try:
            self._name_file(name).unlink(missing_ok=True)
            disk.sync_folder(self.place / "names")
        except OSError as why:
            raise disk.refused(why, f"artifact {name}") from why
        del self._entries[name]
        self.counters["dropped"] += 1
        self._let_go(entry.hash)

    # --- bytes

    def has(self, hash: str) -> bool:
        """Whether the bytes of that hash are here, whole."""
        return hash in self._sizes

    def published(self, hash: str) -> bool:
        """Whether others may read it: it is here, whole, and a name stands for it."""
        return hash in self._sizes and any(entry.hash == hash for entry in self._entries.values())

    def size(self, hash: str) -> int:
        return self._sizes[hash]

    def chunk_list(self, hash: str) -> bytes:
        """The hashes of its chunks. The file may be damaged: who reads it has its digest from the put.

        Refused `unknown` when the blob isn't here, `disk` when it can't be read."""
        if hash not in self._sizes:
            raise Refused("unknown", "no such blob is held here")
        try:
            return (self.place / "lists" / hash).read_bytes()
        except OSError as why:
            raise disk.refused(why, "list of chunks") from why

    def read(self, hash: str, offset: int, length: int) -> bytes:
        """So many of its bytes, fewer at its end. Refused `unknown`, or `disk` when it can't be read."""
        if hash not in self._sizes:
            raise Refused("unknown", "no such blob is held here")
        try:
            handle = os.open(self.blob_file(hash), os.O_RDONLY)
            try:
                return os.pread(handle, length, offset)
            finally:
                os.close(handle)
        except OSError as why:
            raise disk.refused(why, "blob") from why

    def room_for(self, more: int) -> None:
        """Refused `disk_full` unless so many more bytes leave the reserve free."""
        try:
            free = disk.free_bytes(self.place)
        except OSError as why:
            raise disk.refused(why, "artifacts") from why
        if free - more < self.reserve_bytes:
            raise Refused(
                "disk_full",
                f"{free // 2**20} MiB are free, {more // 2**20} more are needed and "
                f"{self.reserve_bytes // 2**20} stay in reserve; it goes on when there is room",
            )

    def part(self, hash: str, size: int, hashes: bytes) -> Part:
        """The blob of that hash on its way here; takes up what is there of it already."""
        return Part(
            self.place / "parts" / f"{hash}.part",
            hash,
            size,
            hashes,
            room_for=self.room_for,
            seed=self.place / "quarantine" / hash,
        )

    def adopt(self, part: Part) -> None:
        """Takes a blob that is whole by its last chunk: checks the whole, makes it durable, and gives it its name.

        RemoteError: the whole is not what it should be, although every chunk fits its list."""
        part.finish()
        try:
            disk.write_whole(self.place / "lists" / part.hash, part.hashes)
            part.path.replace(self.blob_file(part.hash))
            disk.sync_folder(self.place / "blobs")
        except OSError as why:
            raise disk.refused(why, "blob") from why
        self._sizes[part.hash] = part.size
        seed = self.place / "quarantine" / part.hash
        if seed.exists():
            self.counters["mended"] += 1
            seed.unlink()

    def blob_file(self, hash: str) -> Path:
        return self.place / "blobs" / hash

    # --- damage

    def check_chunk(self, hash: str, index: int, hashes: bytes) -> bool:
        """Whether that chunk of a blob is what it was. False too when it can't be read."""
        try:
            data = self.read(hash, index * CHUNK_BYTES, length_of(self.size(hash), index))
        except Refused:
            return False
        return fits(hashes, index, data)

    def proved_list(self, entry: Entry) -> bytes:
        """The list of an entry's chunks, as signed; a damaged file is made anew from the blob, if that is sound.

        Refused `corrupt`: neither is."""
        hashes = b""
        with contextlib.suppress(Refused):
            hashes = self.chunk_list(entry.hash)
        if list_digest(hashes) == entry.list:
            return hashes
        hashes = sums_of(self._chunks(entry.hash)).list
        if list_digest(hashes) != entry.list:
            raise Refused(
                "corrupt", f"artifact {entry.name}: neither its bytes nor their list are what was put"
            )
        with contextlib.suppress(OSError):
            disk.write_whole(self.place / "lists" / entry.hash, hashes)
        return hashes

    def quarantine(self, hash: str) -> None:
        """Takes a damaged blob out of use; its good chunks are used to mend it."""
        self.counters["quarantined"] += 1
        self._sizes.pop(hash, None)
        with contextlib.suppress(OSError):
            self.blob_file(hash).replace(self.place / "quarantine" / hash)

    # --- inside

    def _chunks(self, hash: str) -> Iterator[bytes]:
        size = self._sizes.get(hash, 0)
        for index in range(count_of(size)):
            yield self.read(hash, index * CHUNK_BYTES, CHUNK_BYTES)

    def _name_file(self, name: str) -> Path:
        return self.place / "names" / f"{name}.json"

    def _let_go(self, hash: str) -> None:
        if any(entry.hash == hash for entry in self._entries.values()):
            return
        self._sizes.pop(hash, None)
        left = (f"blobs/{hash}", f"lists/{hash}", f"quarantine/{hash}", f"parts/{hash}.part")
        for path in (self.place / name for name in left):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes what no name stands for any more, after a crash between two steps."""
        named = {entry.hash for entry in self._entries.values()}
        for folder in ("blobs", "lists"):
            for path in (self.place / folder).iterdir():
                if path.name not in named:
                    self.counters["stray"] += 1
                    self._sizes.pop(path.name, None)
                    path.unlink(missing_ok=True)


__all__ = ["RESERVE_BYTES", "BlobStore", "Entry"]
