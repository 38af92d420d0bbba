"""The backbone on a NATS cluster: leases and summaries in JetStream key-value buckets, news on a subject.

=================  ====================  ==========================================================
bucket or subject  key                   holds
=================  ====================  ==========================================================
``qd-leases``      ``MESH_PUB``          who publishes it and in which epoch, for 6 s after each hold
``qd-summaries``   ``MESH_PUB``          its last summary, for 11 min: longer than an expired mesh is shown
``qd-summaries``   ``_clock``            nothing; when it was put tells the time by the servers' clock
``qd.summary.*``   ``MESH_PUB``          a summary that must be seen at once, or while no bucket has a leader
=================  ====================  ==========================================================

A mesh is its name and its identity key (the first 8 bytes in hex): two meshes that chose one name have each their own
lease and summary, and neither keeps the other from publishing. Who is meant by the name, followers judge by their pins.

Every value is sealed with the backbone's key, for its mesh and its place: the cluster sees names and sizes.
What doesn't open is dropped and counted. Someone on the cluster without the key can delete or replay, and can
invent nothing; a replayed summary or lease is no newer than what it repeats.

**Age.** What arrives while connected has age 0: it is told when it is put. What is found on connecting is as old
as the bucket's clock says: something is put, and the times at which the bucket stored the two are compared. No
node's own clock has a say; the servers' have to agree among themselves, which their own expiry needs as well. A
value that seems to come from the future has no known age and is not told: a live mesh renews it within 2 s.

**Away.** `up` says that the buckets answer, not merely that a socket is open. While they don't, holding is refused
and summaries still go out on the subject if the server passes it on. Nothing is kept to be sent later.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Meta

from discovery.backbone.buckets import VALUE_MAX_BYTES, Away, Bucket, BucketGone, Server, Stored, servers_of
from discovery.errors import LocalError, RemoteError
from discovery.identity import MESH_NAME, check_mesh
from discovery.lean import tls
from discovery.member import U64
from discovery.summary import SignedSummary, pack, unpack

if TYPE_CHECKING:
    from discovery.backbone.jetstream import Connection

LEASE_TTL_S = 6
"""As the claim's ttl on the mesh's own pool."""
SUMMARY_TTL_S = 660
"""An expired mesh is shown for 600 s; then nothing of it is left here either."""
CLOCK = "_clock"
SUBJECT = "qd.summary"
KEY_BYTES = 32
PUB_BYTES = 8
"""Of a mesh's identity key, in the key of its values."""
_MESH_KEY = re.compile(rf"{MESH_NAME.pattern}_[0-9a-f]{{{2 * PUB_BYTES}}}")

CHECK_S = 1.0
"""How often the buckets are asked while nothing else proves that they answer; with the second that an answer may
take, a server that hangs is noticed within 2 s."""
AGAIN_S = 0.25
"""How soon they are asked again while they can't be used; it doubles up to `CHECK_S` where they say so at once."""
HOP_S = 3.0
"""After how long without buckets another server is tried: this one may be cut off from the rest."""
REASON_S = 5.0
"""While away, another reason is told this long after the last one at the earliest."""
GRACE_S = 0.5
"""A lost connection isn't told if another server takes its place within this time."""
RETRY_FIRST_S, RETRY_MOST_S = 0.1, 1.0
"""Pause after a round in which no server answered; it doubles up to the second."""
MAX_SERVERS = 32
MAX_SEEN = 4096

_SEALED_VERSION = b"\x01"
_NONCE_BYTES = 12
_LEASE, _SUMMARY = b"lease", b"summary"


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What a lease's value says: the id of who holds it, and the epoch of its claim."""

    holder: Annotated[int, Meta(ge=0)]
    epoch: U64


_encode = msgspec.msgpack.Encoder().encode
_held = msgspec.msgpack.Decoder(Held)


def mesh_key(mesh: str, mesh_pub: bytes) -> str:
    """Under what a mesh's values are kept. LocalError when its name is none."""
    return f"{check_mesh(mesh)}_{mesh_pub[:PUB_BYTES].hex()}"


class NatsBackbone:
    """One node on the cluster. All calls and callbacks happen on the event loop's thread; no call raises because
    of the network, and none takes longer than about a second.

    `urls`: each `nats://` or `tls://`, `[user:password@ or token@]host[:port]`, more hosts after commas. They are
    tried in this order, then those that the cluster tells of. `key`: 32 bytes, the backbone's. `mesh_pub`: 32 bytes,
    the mesh's identity key. `me`: this node's id. `on_summary(signed, age_s)`: a summary, unverified, of any mesh,
    also of this one. `on_status(up, reason)`: told when it is first known, on each change, and when another server
    took over; `reason` names the server, or says what is wrong, in one line. `may_take(holder, epoch)`: whether that
    holder is known to be gone, so that its lease needn't be waited out. LocalError when an URL makes no sense or
    nats-py is missing.
    """

    def __init__(
        self,
        *,
        urls: Sequence[str],
        key: bytes,
        mesh: str,
        mesh_pub: bytes,
        me: int,
        on_summary: Callable[[SignedSummary, float], None],
        on_status: Callable[[bool, str], None],
        may_take: Callable[[int, int], bool] = lambda holder, epoch: False,
    ) -> None:
        if not urls:
            raise LocalError("backbone: no nats:// address; give one")
        given = [server for url in urls for server in servers_of(url)]
        try:
            tls()
            self._jetstream: Any = importlib.import_module("discovery.backbone.jetstream")
        except ImportError as why:
            raise LocalError(f"backbone {given[0]}: needs nats-py; pip install 'quarterdeck[nats]'") from why
        self.mesh = mesh
        self._mesh_key = mesh_key(mesh, mesh_pub)
        self.held: Held | None = None
        """The lease of this mesh as the bucket last had it, whoever holds it; None: nobody, or not known."""
        self.counters: Counter[str] = Counter()
        """`forged`: did not open; `malformed`: opened, and is no value of ours; `ageless`: from the future;
        `lost`: connections that ended."""
        self._box = _Box(key)
        self._me = me
        self._on_summary, self._on_status, self._may_take = on_summary, on_status, may_take
        self._leases, self._summaries = (
            Bucket("qd-leases", LEASE_TTL_S),
            Bucket("qd-summaries", SUMMARY_TTL_S),
        )
        self._given = tuple(dict.fromkeys(given))
        self._servers = deque(self._given)
        self._connection: Connection | None = None
        self._usable = self._good = False
        """Now; and at any time through the present connection."""
        self._revision = 0
        """Of this mesh's lease while it is mine, as far as this connection knows; else 0."""
        self._leasing = asyncio.Lock()
        self._look = asyncio.Event()
        self._told: tuple[bool, str] | None = None
        self._told_at = 0.0
        self._falling: asyncio.TimerHandle | None = None
        self._whys: dict[Server, str] = {}
        self._seen: dict[str, bytes] = {}
        """The nonce of each mesh's last summary: what came by subject and by bucket is told once."""
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether leases can be held and summaries stored, as of the last answer."""
        return self._usable and self._connection is not None and not self._connection.closed.is_set()

    @property
    def server(self) -> str | None:
        """The server this node is connected to, without credentials."""
        return str(self._connection.server) if self._connection else None

    async def start(self) -> None:
        """Begins to connect, and returns at once; `on_status` tells how it went."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="nats backbone")

    async def close(self) -> None:
        """Hangs up, within a second whatever the server does. A lease still held is left to expire."""
        self._closing = True
        self._stay()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=0.9)

    async def hold(self, epoch: int) -> bool:
        """Takes or renews this mesh's lease, to be repeated every 2 s. True only if the bucket has it as mine now.

        A lease of somebody else's is taken when it has expired, or when its epoch is lower and `may_take` allows;
        of several who try, one succeeds."""
        async with self._leasing:
            connection = self._connection
            if connection is not None and self.up:
                with self._trying(connection):
                    return await self._hold(connection, epoch)
            return False

    async def release(self) -> bool:
        """Frees the lease for whoever is next, if it is mine; False if it wasn't, or if nobody knows."""
        async with self._leasing:
            connection = self._connection
            if connection is not None and self.up:
                with self._trying(connection):
                    return await self._release(connection)
            return False

    async def publish(self, signed: SignedSummary, urgent: bool = False) -> bool:
        """Stores this mesh's summary, which all who are connected see at once; `urgent` ones go on the subject first,
        so that they don't wait for the disks of a majority of the cluster. True when it is stored, or, while the
        buckets are away, when the server passed it on to who is connected."""
        connection = self._connection
        if connection is None:
            return False
        value = self._box.seal(_SUMMARY, self._mesh_key, pack(signed))
        with self._trying(connection):
            if urgent or not self.up:
                await connection.tell(f"{SUBJECT}.{self._mesh_key}", value)
            if self.up:
                return bool(await connection.put(self._summaries, self._mesh_key, value))
            return await connection.responds()
        return False

    async def _hold(self, connection: Connection, epoch: int) -> bool:
        value = self._box.seal(_LEASE, self._mesh_key, _encode(Held(self._me, epoch)))
        revision = self._revision
        for _ in range(3):  # it may expire, or be taken, between reading and writing
            revision = await connection.put(self._leases, self._mesh_key, value, revision)
            if revision:
                self._revision, self.held = revision, Held(self._me, epoch)
                return True
            revision = await self._read(connection)
            held = self.held
            if held is None or held.holder == self._me:
                continue
            if held.epoch >= epoch or not self._may_take(held.holder, held.epoch):
                break
        self._revision = 0
        return False

    async def _release(self, connection: Connection) -> bool:
        revision = await self._read(connection)
        mine = self.held is not None and self.held.holder == self._me
        self._revision = 0
        if not mine or not await connection.delete(self._leases, self._mesh_key, revision):
            return False
        self.held = None
        return True

    async def _read(self, connection: Connection) -> int:
        """Reads this mesh's lease into `held`; its revision, or that of the mark which a release left, or 0."""
        stored = await connection.get(self._leases, self._mesh_key)
        self.held = None
        if stored is None:
            return 0
        body = self._open(_LEASE, self._mesh_key, stored.value) if stored.value else None
        if body is not None:
            try:
                self.held = _held.decode(body)
            except msgspec.MsgspecError:
                self.counters["malformed"] += 1
        return stored.revision

    def _open(self, place: bytes, key: str, value: bytes) -> bytes | None:
        """What was sealed for this mesh and place; None, and counted, if it wasn't."""
        possible = len(value) <= VALUE_MAX_BYTES and _MESH_KEY.fullmatch(key)
        body = self._box.open(place, key, value) if possible else None
        if body is None:
            self.counters["forged"] += 1
        return body

    def _heard(self, key: str, value: bytes, age_s: float = 0.0) -> None:
        """A summary, by subject or by bucket."""
        if not value or key == CLOCK:
            return
        nonce = value[: _Box.HEAD]
        if self._seen.get(key) == nonce:
            return
        body = self._open(_SUMMARY, key, value)
        if body is None:
            return
        try:
            signed = unpack(body)
        except RemoteError:
            self.counters["malformed"] += 1
            return
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen[key] = nonce
        self._call(self._on_summary, signed, age_s)

    async def _run(self) -> None:
        """Goes from server to server for ever; `_visit` stays with one while it is good."""
        failed, pause_s = 0, RETRY_FIRST_S
        while not self._closing:
            began = time.monotonic()
            good = await self._visit(self._servers[0])
            self._servers.rotate(-1)
            if good:
                pause_s = RETRY_FIRST_S
                if time.monotonic() - began >= RETRY_MOST_S:
                    failed = 0
                    continue
            failed += 1
            if failed >= len(self._servers):
                self._status(False, self._why())
                await asyncio.sleep(pause_s)
                failed, pause_s = 0, min(2 * pause_s, RETRY_MOST_S)

    async def _visit(self, server: Server) -> bool:
        """One connection, from its beginning to its end; whether the buckets were usable through it."""
        try:
            connection: Connection = await self._jetstream.Connection.open(server, self._look.set)
        except Away as why:
            self._whys[server] = str(why)
            return False
        self._connection, self._good = connection, False
        self._learn(connection.others())
        try:
            await connection.listen(f"{SUBJECT}.*", self._heard)
            await connection.listen(self._summaries.subject("*"), self._heard)
            await self._attend(connection)
            self._whys[server] = f"{server}: connection lost"
        except Away as why:
            self._whys[server] = str(why)
        finally:
            self._learn(connection.others())
            self._connection, self._usable, self._revision, self.held = None, False, 0, None
            if self._told and self._told[0] and self._falling is None:
                loop = asyncio.get_running_loop()
                self._falling = loop.call_later(GRACE_S, self._status, False, f"{server}: connection lost")
            await connection.close()
        self.counters["lost"] += 1
        return self._good

    async def _attend(self, connection: Connection) -> None:
        """Makes the buckets usable and keeps asking them, until the connection ends. Away when it is better given
        up: its server hangs, or has had no buckets for `HOP_S` and there are others to try."""
        failing_since, again_s = None, AGAIN_S
        while not connection.closed.is_set():
            now = time.monotonic()
            self._look.clear()
            try:
                if not self._usable:
                    await self._prepare(connection)
                    failing_since, again_s = None, AGAIN_S
                elif now - connection.answered_at >= CHECK_S:
                    await self._read(connection)
            except Away as why:
                self._stumble(connection, str(why))
                failing_since = failing_since or now
                hopeless = now - failing_since >= HOP_S and len(self._servers) > 1
                if hopeless or not await connection.responds():
                    raise
                await self._pause(max(AGAIN_S, now + again_s - time.monotonic()))
                again_s = min(2 * again_s, CHECK_S)
            else:
                await self._pause(connection.answered_at + CHECK_S - time.monotonic())

    async def _pause(self, pause_s: float) -> None:
        """For this long, or until the connection ends or a call found the buckets wanting."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._look.wait()

    async def _prepare(self, connection: Connection) -> None:
        """Buckets made where there are none, what they hold told, and from then on `up`."""
        await connection.make(self._leases)
        await connection.make(self._summaries)
        for pause_s in (0.05, 0.1, 0.2, 0.4):  # other servers hear of a new bucket a little later
            with contextlib.suppress(BucketGone):
                await connection.put(self._summaries, CLOCK, b"")
                break
            await asyncio.sleep(pause_s)
        read_at = time.monotonic()
        clock = await connection.get(self._summaries, CLOCK)
        found = await connection.all(self._summaries, _MESH_KEY.fullmatch)
        await self._read(connection)
        self._usable = self._good = True
        self._status(True, str(connection.server))
        for stored in found:
            age_s = _age_s(stored, clock)
            if age_s is not None:
                self._heard(stored.key, stored.value, age_s + time.monotonic() - read_at)
            elif stored.value:
                self.counters["ageless"] += 1

    def _learn(self, servers: Iterable[Server]) -> None:
        """Servers that the cluster tells of are tried too, after those given."""
        known = {server.addr for server in self._servers}
        for server in servers:
            if server.addr not in known and len(self._servers) < MAX_SERVERS:
                self._servers.append(server)
                known.add(server.addr)

    @contextlib.contextmanager
    def _trying(self, connection: Connection) -> Iterator[None]:
        """What a call can't do is a status, not an error: the buckets are looked at anew at once."""
        try:
            yield
        except Away as why:
            self._stumble(connection, str(why))
            self._look.set()

    def _stumble(self, connection: Connection, why: str) -> None:
        """This connection's buckets can't be used for now. What was known of the lease is no longer certain:
        a bucket that is made anew counts its revisions from 1 again."""
        if connection is self._connection:
            self._usable, self._revision, self.held = False, 0, None
            if not connection.closed.is_set():
                self._status(False, why)

    def _why(self) -> str:
        """Why none of the servers would do, in one line: the first one's reason."""
        first, *others = self._given
        more = f" ({len(others)} more tried)" if others else ""
        return self._whys.get(first, f"{first}: not usable") + more

    def _stay(self) -> None:
        if self._falling is not None:
            self._falling.cancel()
            self._falling = None

    def _status(self, up: bool, reason: str) -> None:
        self._stay()
        now = time.monotonic()
        if self._closing or self._told == (up, reason):
            return
        if not up and self._told and not self._told[0] and now - self._told_at < REASON_S:
            return
        self._told, self._told_at = (up, reason), now
        self._call(self._on_status, up, reason)

    def _call(self, callback: Callable[..., None], *args: Any) -> None:
        """A callback that raises is its owner's bug: reported as such, and no end of this."""
        try:
            callback(*args)
        except Exception as why:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a callback of the NATS backbone raised", "exception": why}
            )


def _age_s(stored: Stored, clock: Stored | None) -> float | None:
    """How old a stored value was when the clock key was put, by the bucket's own clock; None when unknown."""
    if clock is None:
        return None
    if stored.revision >= clock.revision:
        return 0.0
    age_s = clock.stored_s - stored.stored_s
    return age_s if age_s >= 0 else None


class _Box:
    """Seals a value for one mesh and one place: version (1), nonce (12), AES-256-GCM of the body with its tag (16).

    The AES key is HKDF-SHA256 of the backbone's key with info `quarterdeck/1|nats|place|mesh`, which is the
    authenticated data too. Nonces are random: each mesh and place has a key of its own, so ten years of them
    stay far below the 2³² that a random nonce bears."""

    HEAD = 1 + 12

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise LocalError(f"a backbone key is {KEY_BYTES} bytes, not {len(key)}")
        self._extracted = hmac.digest(bytes(32), key, "sha256")

    def seal(self, place: bytes, mesh_key: str, body: bytes) -> bytes:
        about = self._about(place, mesh_key)
        head = _SEALED_VERSION + os.urandom(_NONCE_BYTES)
        return head + self._aead(about).encrypt(head[1:], body, about)

    def open(self, place: bytes, mesh_key: str, value: bytes) -> bytes | None:
        """The body, or None if it wasn't sealed with this key for this mesh and place."""
        if not value.startswith(_SEALED_VERSION) or len(value) < self.HEAD:
            return None
        about = self._about(place, mesh_key)
        try:
            return self._aead(about).decrypt(value[1 : self.HEAD], value[self.HEAD :], about)
        except InvalidTag:
            return None

    def _about(self, place: bytes, mesh_key: str) -> bytes:
        return b"quarterdeck/1|nats|" + place + b"|" + mesh_key.encode()

    def _aead(self, about: bytes) -> AESGCM:
        return AESGCM(hmac.digest(self._extracted, about + b"\x01", "sha256"))
