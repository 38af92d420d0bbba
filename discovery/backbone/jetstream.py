"""One connection to one NATS server: each call ends within its time and says in one line what went wrong.

`nats-py` is used for its connection only. Its own way of reconnecting keeps what was to be sent for later and
takes a server that hangs for a good one; here a connection that fails is thrown away, and the caller makes the
next. JetStream is asked in its own words (JSON on subjects), with the timeouts that its state deserves, so that
any nats-py 2.x will do. What this module needs of the server is JetStream as of 2.9: nothing newer.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError, NoServersError

from discovery.backbone.buckets import VALUE_MAX_BYTES, Away, Bucket, BucketGone, Server, Stored

CONNECT_S = 1.5
"""For TCP, TLS and the server's greeting together."""
ANSWER_S = 1.0
"""How long a server, or the leader of a bucket, may take for one answer."""
CREATE_S = 3.0
"""A bucket on three servers elects a leader before it answers."""
SNAPSHOT_S = 3.0
"""For the list of a bucket's keys."""
AT_ONCE = 64
"""How many keys are asked for at once."""
KEYS_MOST = 2000
"""Twice the meshes that a directory takes; a bucket that a stranger filled is not read to its end."""
CLOSE_S = 0.2
"""Each for what is still to be sent, and for the library's own tidying."""
COPIES = 3
"""Of a bucket, where the cluster has three servers with JetStream; else one: two copies need both servers
alive, which is worse than one."""

_NO_MESSAGE, _NO_STREAM, _OTHER_CONFIG = 10037, 10059, 10058
_UNAVAILABLE = 503
"""Of the API's own codes: not now, rather than not so."""
_WRONG_REVISION = frozenset({10071, 10164})
_OFF = frozenset({10039, 10076})
_LOGIN = "login refused; correct user:password@ or token@ in the address"
_NS = 1_000_000_000

logging.getLogger("nats").propagate = False
logging.getLogger("nats").addHandler(logging.NullHandler())


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Message(msgspec.Struct):
    seq: int
    time: datetime.datetime
    data: bytes = b""


class _State(msgspec.Struct, frozen=True):
    subjects: dict[str, int] | None = None


class _Answer(msgspec.Struct):
    """The fields that are read of any answer of JetStream."""

    error: _Error | None = None
    seq: int = 0
    message: _Message | None = None
    config: dict[str, Any] | None = None
    cluster: dict[str, Any] | None = None
    state: _State = _State()


_answer = msgspec.json.Decoder(_Answer)


class _Client(Client):
    """Says who we are only over TLS where TLS was asked for: nats-py takes `tls://` for a hint, and would
    tell a password in the clear to whoever answers without it."""

    tls_wanted = False

    def _connect_command(self) -> bytes:
        if self.tls_wanted and not self._server_info.get("tls_required"):
            raise NatsError("nats: it offers no TLS; use nats://, or give the server a certificate")
        return super()._connect_command()


class Connection:
    """A live connection. `closed` is set when it ends, whoever ended it; it never comes back."""

    def __init__(self, server: Server, client: Client, ended: Callable[[], None]) -> None:
        self.server = server
        self.closed = asyncio.Event()
        self.answered_at = 0.0
        """Monotonic seconds of the last answer of JetStream."""
        self._client = client
        self._ended = ended
        self._waits: set[asyncio.Timeout] = set()

    @classmethod
    async def open(cls, server: Server, ended: Callable[[], None]) -> Connection:
        """Connects and logs in. Away otherwise. `ended` is called when it is over, after `closed` is set."""
        client = _Client()
        client.tls_wanted = server.tls
        last: list[Exception] = []

        async def on_error(why: Exception) -> None:
            last[:] = [why]

        async def on_closed() -> None:
            connection._end()

        connection = cls(server, client, ended)
        options: dict[str, Any] = {"tls_hostname": server.tls_name} if server.tls_name else {}
        try:
            async with asyncio.timeout(CONNECT_S):
                await client.connect(
                    servers=[str(server)],
                    name="quarterdeck",
                    user=server.user,
                    password=server.password,
                    token=server.token,
                    error_cb=on_error,
                    closed_cb=on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=1,
                    no_echo=True,
                    **options,
                )
                reading = getattr(client, "_reading_task", None)
                if not client.is_connected or reading is None:
                    raise ConnectionResetError("connection reset by peer")
                # The one sign of an end that every version gives; some don't call `closed_cb` for a lost server.
                reading.add_done_callback(lambda _: connection._end())
        except Exception as why:
            cut = isinstance(why, ConnectionError) and connection._asks_for_login()
            told = _told(last[0] if last and isinstance(why, NoServersError) else why)
            await connection.close()
            raise Away(f"{server}: {_LOGIN if cut else told}") from why
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        """Sends what is still to be sent, if the server takes it, and hangs up. Never raises; under 0.5 s."""
        self._end()
        try:
            if self._client.is_connected:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(CLOSE_S):
                        await self._client.flush(timeout=1)
        finally:
            # Without this, tidying would wait for a server that takes no more bytes.
            writer = getattr(getattr(self._client, "_transport", None), "_io_writer", None)
            if writer is not None:
                writer.transport.abort()
            tasks = self._tasks()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await self._client.close()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=CLOSE_S)

    def _tasks(self) -> list[asyncio.Task[Any]]:
        """What the library runs for this connection. Versions before 2.15 leave some of it behind."""
        subscriptions = getattr(self._client, "_subs", {}).values()
        tasks = [
            *(
                getattr(self._client, name, None)
                for name in ("_reading_task", "_ping_interval_task", "_flusher_task")
            ),
            *(getattr(subscription, "_wait_for_msgs_task", None) for subscription in subscriptions),
        ]
        return [task for task in tasks if task is not None and not task.done()]

    def _end(self) -> None:
        """Whoever waits for an answer is told at once that none will come."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._ended()
        for wait in self._waits:
            with contextlib.suppress(RuntimeError):
                wait.reschedule(0.0)

    def others(self) -> list[Server]:
        """The servers of the cluster that this one told of, with our credentials for it."""
        found = []
        for uri in self._client.discovered_servers:
            if uri.hostname and uri.port:
                mine = self.server
                name = (mine.tls_name or mine.addr[0]) if mine.tls else None
                addr = (uri.hostname, uri.port)
                found.append(Server(addr, mine.tls, mine.user, mine.password, mine.token, name))
        return found

    def _asks_for_login(self) -> bool:
        """Such a server hangs up on who it doesn't know, and may be gone before its reason is read."""
        return bool(getattr(self._client, "_server_info", {}).get("auth_required"))

    async def responds(self) -> bool:
        """Whether the server itself answers, whatever its JetStream does."""
        with contextlib.suppress(Exception):
            async with self._within(ANSWER_S / 2):
                await self._client.flush(timeout=1)
            return not self.closed.is_set()
        return False

    async def listen(self, subject: str, heard: Callable[[str, bytes], None]) -> None:
        """From now on `heard(last word of the subject, payload)` for each message there."""

        async def on_message(message: Msg) -> None:
            heard(message.subject.rpartition(".")[2], message.data)

        with self._as_away():
            async with self._within(ANSWER_S):
                await self._client.subscribe(subject, cb=on_message)

    async def tell(self, subject: str, payload: bytes) -> None:
        """To whoever listens; nobody acknowledges it."""
        with self._as_away():
            async with self._within(ANSWER_S):
                await self._client.publish(subject, payload)

    async def put(self, bucket: Bucket, key: str, value: bytes, revision: int | None = None) -> int:
        """Stores and returns the new revision. With `revision`: only if that is the last one of the key
        (0: there is none), else returns 0 and nothing changed. After Away nobody knows."""
        return await self._put(bucket, key, value, revision, {})

    async def delete(self, bucket: Bucket, key: str, revision: int) -> bool:
        """Leaves a mark that the key is free, if this is its last revision."""
        return bool(await self._put(bucket, key, b"", revision, {"KV-Operation": "DEL"}))

    async def get(self, bucket: Bucket, key: str) -> Stored | None:
        """The last value as the bucket's leader has it, never an older copy."""
        ask = {"last_by_subj": bucket.subject(key)}
        answer = await self._api(f"STREAM.MSG.GET.{bucket.stream}", ask, spare=_NO_MESSAGE)
        found = answer.message
        return Stored(key, found.data, found.seq, found.time.timestamp()) if found else None

    async def all(self, bucket: Bucket, wanted: Callable[[str], object]) -> list[Stored]:
        """The last value of each wanted key, deleted ones included, `KEYS_MOST` of them at most. Each is asked for
        by itself: a consumer, which would send them all, has to be placed, and in a cluster may be placed on a
        server that just died."""
        ask = {"subjects_filter": bucket.subject("*")}
        answer = await self._api(f"STREAM.INFO.{bucket.stream}", ask, within_s=SNAPSHOT_S)
        named = (subject.removeprefix(bucket.subject("")) for subject in answer.state.subjects or ())
        keys = [key for key in named if wanted(key)][:KEYS_MOST]
        found: list[Stored | None] = []
        for start in range(0, len(keys), AT_ONCE):
            found += await asyncio.gather(*(self.get(bucket, key) for key in keys[start : start + AT_ONCE]))
        return [stored for stored in found if stored is not None]

    async def make(self, bucket: Bucket) -> None:
        """Makes the bucket where there is none; gives it its ttl, and its copies where the cluster grew."""
        answer = await self._api(f"STREAM.INFO.{bucket.stream}", None, spare=_NO_STREAM)
        there, wanted = answer.config, _config(bucket, COPIES)
        if there is None:
            where = f"STREAM.CREATE.{bucket.stream}"
            answer = await self._api(where, wanted, within_s=CREATE_S, refusable=True)
            if answer.error and answer.error.code == _UNAVAILABLE:
                self._check(answer)
            elif answer.error and answer.error.err_code != _OTHER_CONFIG:
                await self._api(where, _config(bucket, 1), within_s=CREATE_S, spare=_OTHER_CONFIG)
        elif there.get("max_age") != wanted["max_age"]:
            fixed = {**there, **{key: wanted[key] for key in ("max_age", "duplicate_window")}}
            await self._api(f"STREAM.UPDATE.{bucket.stream}", fixed, within_s=CREATE_S)
        elif answer.cluster and there.get("num_replicas", 1) < COPIES:
            grown = {**there, "num_replicas": COPIES}
            await self._api(f"STREAM.UPDATE.{bucket.stream}", grown, within_s=CREATE_S, refusable=True)

    async def _put(
        self, bucket: Bucket, key: str, value: bytes, revision: int | None, headers: dict[str, str]
    ) -> int:
        headers = {"Nats-Expected-Stream": bucket.stream, **headers}
        if revision is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        try:
            answer = await self._ask(bucket.subject(key), value, ANSWER_S, headers)
        except NoRespondersError as why:
            raise BucketGone(f"{self.server}: nobody keeps the bucket {bucket.name}") from why
        if answer.error and revision is not None and answer.error.err_code in _WRONG_REVISION:
            return 0
        self._check(answer)
        return answer.seq

    async def _api(
        self,
        what: str,
        body: dict[str, Any] | None,
        *,
        within_s: float = ANSWER_S,
        spare: int = 0,
        refusable: bool = False,
    ) -> _Answer:
        """An answer of JetStream's API. Away for an error other than `spare`, if not every one is `refusable`."""
        payload = msgspec.json.encode(body) if body is not None else b""
        try:
            answer = await self._ask(f"$JS.API.{what}", payload, within_s, None)
        except NoRespondersError as why:
            raise Away(f"{self.server}: JetStream is off; start nats-server with -js") from why
        if not refusable and not (answer.error and answer.error.err_code == spare):
            self._check(answer)
        return answer

    def _check(self, answer: _Answer) -> None:
        error = answer.error
        if error is None:
            return
        if error.err_code == _NO_STREAM:
            raise BucketGone(f"{self.server}: {error.description}")
        if error.err_code in _OFF:
            raise Away(f"{self.server}: JetStream is off for this account; give the account JetStream")
        raise Away(f"{self.server}: JetStream says: {error.description or error.code}")

    async def _ask(
        self, subject: str, payload: bytes, within_s: float, headers: dict[str, str] | None
    ) -> _Answer:
        """One request, its answer decoded. NoRespondersError where nobody listens, Away for the rest."""
        with self._as_away():
            async with self._within(within_s):
                message = await self._client.request(subject, payload, timeout=within_s, headers=headers)
            answer = _answer.decode(message.data)
        self.answered_at = time.monotonic()
        return answer

    @contextlib.asynccontextmanager
    async def _within(self, limit_s: float) -> Any:
        """Ends with TimeoutError when the time is up, or at once when the connection is closed."""
        async with asyncio.timeout(0 if self.closed.is_set() else limit_s) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    @contextlib.contextmanager
    def _as_away(self) -> Any:
        try:
            yield
        except (NoRespondersError, Away):
            raise
        except Exception as why:  # whatever a library does is a state of the connection, not an end of ours
            if self._client.is_closed:
                self._end()
            lost = self.closed.is_set()
            raise Away(f"{self.server}: {'connection lost' if lost else _told(why)}") from why


def _config(bucket: Bucket, copies: int) -> dict[str, Any]:
    ttl_ns = bucket.ttl_s * _NS
    return {
        "name": bucket.stream,
        "subjects": [bucket.subject(">")],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_consumers": -1,
        "max_msg_size": VALUE_MAX_BYTES,
        "max_age": ttl_ns,
        "duplicate_window": min(ttl_ns, 120 * _NS),
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "num_replicas": copies,
    }


def _told(why: BaseException) -> str:
    """What went wrong, in words of ours where the library's help nobody."""
    if isinstance(why, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({why.verify_message}); name its CA in SSL_CERT_FILE"
    if isinstance(why, TimeoutError):
        return "no answer in time"
    if isinstance(why, ConnectionRefusedError) or "Connect call failed" in str(why):
        return "connection refused; is nats-server running there?"
    if isinstance(why, OSError):
        return (why.strerror or str(why)).lower()
    if isinstance(why, msgspec.MsgspecError):
        return f"an answer that makes no sense ({why})"
    text = str(why).removeprefix("nats: ").strip().strip("'")
    if "authorization" in text.lower():
        return _LOGIN
    return text or type(why).__name__
