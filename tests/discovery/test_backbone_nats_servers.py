"""The backbone on NATS servers that die, hang, want a login or lack what is needed; and without the library."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import socket
import sys
import time
from pathlib import Path

import pytest

from discovery.backbone.buckets import Server, servers_of
from discovery.backbone.nats import LEASE_TTL_S
from discovery.errors import LocalError
from tests.discovery.nats_nodes import Node, nodes, raw, summary, timed, until, until_true
from tests.nats_server import NatsServer, nats_cluster, needs_nats_server

# Servers that come and go


@needs_nats_server
def test_server_killed_is_told_calls_return_and_all_works_when_it_is_back_empty(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        with NatsServer(tmp_path) as server:
            node, other = Node(server.url, "alpha"), Node(server.url, "beta", 2)
            async with nodes(node, other):
                assert await node.backbone.hold(1)
                killed_at = time.monotonic()
                server.kill()
                await until(lambda: node.told_up is False)
                assert node.statuses[-1][2] - killed_at < 1.0
                assert "connection" in node.statuses[-1][1] and node.statuses[-1][1].startswith(server.url)
                for call in (
                    node.backbone.hold(1),
                    node.backbone.publish(summary("x"), True),
                    node.backbone.release(),
                ):
                    done, took_s = await timed(call)
                    assert not done and took_s < 0.5

                server.empty()
                server.start()
                back_at = time.monotonic()
                await until(lambda: bool(node.told_up and other.told_up))
                assert time.monotonic() - back_at < 2.0
                assert await node.backbone.hold(1)
                assert await other.backbone.publish(summary("again"))
                await until(lambda: node.has_heard("again"))

    asyncio.run(run())
    assert capfd.readouterr().err == ""


@needs_nats_server
def test_server_that_hangs_is_told_within_about_two_seconds_and_closing_takes_less_than_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        with NatsServer(tmp_path) as server:
            node, leaver = Node(server.url, "alpha"), Node(server.url, "beta", 2)
            async with nodes(node):
                async with nodes(leaver):
                    server.pause()
                    paused_at = time.monotonic()
                    results = await asyncio.gather(
                        timed(node.backbone.hold(1)), timed(node.backbone.publish(summary("x"), True))
                    )
                    assert all(not done and took_s < 2.0 for done, took_s in results)
                    await until(lambda: node.told_up is False and leaver.told_up is False)
                    assert max(node.statuses[-1][2], leaver.statuses[-1][2]) - paused_at < 2.5
                server.resume()
                await until(lambda: bool(node.told_up))
                assert await node.backbone.hold(1)

    asyncio.run(run())
    assert capfd.readouterr().err == ""


@needs_nats_server
def test_bucket_removed_under_it_is_made_anew(tmp_path: Path) -> None:
    async def run() -> None:
        with NatsServer(tmp_path) as server:
            node = Node(server.url, "alpha")
            async with nodes(node):
                assert await node.backbone.hold(1)
                async with raw(server) as operator:
                    for bucket in ("qd-leases", "qd-summaries"):
                        await operator.request(f"$JS.API.STREAM.DELETE.KV_{bucket}", b"", timeout=2)
                await until_true(lambda: node.backbone.hold(1), 2.0)
                await until_true(lambda: node.backbone.publish(summary("x")), 2.0)

    asyncio.run(run())


@needs_nats_server
def test_bucket_made_by_somebody_else_gets_its_ttl(tmp_path: Path) -> None:
    async def run() -> None:
        with NatsServer(tmp_path) as server:
            node = Node(server.url, "alpha")
            async with raw(server) as operator:
                stream = {"name": "KV_qd-leases", "subjects": ["$KV.qd-leases.>"], "max_msgs_per_subject": 1}
                await operator.request(
                    "$JS.API.STREAM.CREATE.KV_qd-leases", json.dumps(stream).encode(), timeout=2
                )
                async with nodes(node):
                    answer = await operator.request("$JS.API.STREAM.INFO.KV_qd-leases", b"", timeout=2)
                    assert json.loads(answer.data)["config"]["max_age"] == LEASE_TTL_S * 10**9

    asyncio.run(run())


@needs_nats_server
def test_server_without_jetstream_is_told_with_what_to_do(tmp_path: Path) -> None:
    async def run() -> None:
        with NatsServer(tmp_path, jetstream=False) as server:
            node, other = Node(server.url, "alpha"), Node(server.url, "beta", 2)
            await node.backbone.start()
            await other.backbone.start()
            await until(lambda: bool(node.statuses and other.statuses))
            expected = (False, f"{server.url}: JetStream is off; start nats-server with -js")
            assert node.statuses[0][:2] == expected
            assert not await node.backbone.hold(1)
            # Whoever is connected hears of each other all the same.
            assert await node.backbone.publish(summary("by subject"))
            await until(lambda: other.has_heard("by subject"))
            await node.backbone.close()
            await other.backbone.close()

    asyncio.run(run())


@needs_nats_server
def test_cluster_goes_on_when_the_connected_server_dies(tmp_path: Path) -> None:
    async def run() -> None:
        with nats_cluster(tmp_path) as servers:
            scout = Node(servers[0].url, "gamma", 3)
            async with nodes(scout):
                leaders = {servers[0].leader_of(bucket) for bucket in ("qd-leases", "qd-summaries")}
            spare = next(server for server in servers if server.name not in leaders)
            rest = ",".join(server.addr for server in servers if server is not spare)

            # `node` is given one address, and learns of the others from the cluster.
            node, other = Node(spare.url, "alpha"), Node(f"nats://{spare.addr},{rest}", "beta", 2)
            async with nodes(node, other):
                assert node.backbone.server == other.backbone.server == spare.url
                assert await node.backbone.hold(1)
                spare.kill()
                await until_true(lambda: node.backbone.hold(1), LEASE_TTL_S - 1)
                await until_true(lambda: node.backbone.publish(summary("after")), 1.0)
                await until(lambda: other.has_heard("after"))
                assert node.backbone.server not in (None, spare.url)

    asyncio.run(run())


@needs_nats_server
def test_cluster_goes_on_when_the_leader_of_the_buckets_dies(tmp_path: Path) -> None:
    async def run() -> None:
        with nats_cluster(tmp_path) as servers:
            url = "nats://" + ",".join(server.addr for server in servers)
            node, other = Node(url, "alpha"), Node(url, "beta", 2)
            async with nodes(node, other):
                assert await node.backbone.hold(1)
                next(s for s in servers if s.name == servers[0].leader_of("qd-leases")).kill()
                # Until a new leader is elected, 4 to 9 s on nats-server 2.9, summaries go by the subject.
                await until_true(lambda: node.backbone.publish(summary("meanwhile"), True), 3.0, every_s=0.2)
                await until(lambda: other.has_heard("meanwhile"))
                await until_true(lambda: node.backbone.hold(2), 20.0, every_s=0.1)
                await until_true(lambda: node.backbone.publish(summary("after")), 10.0, every_s=0.1)
                await until(lambda: other.has_heard("after"))
                await until(lambda: other.backbone.up, 10.0)

    asyncio.run(run())


# Who we are to a server


@needs_nats_server
@pytest.mark.parametrize(
    ("config", "login"),
    [
        ('authorization { user: "qd", password: "p@ss:w0rd" }', "qd:p%40ss%3Aw0rd@"),
        ('authorization { token: "s3cret" }', "s3cret@"),
    ],
    ids=["password", "token"],
)
def test_login_in_the_address_is_used_and_never_shown(tmp_path: Path, config: str, login: str) -> None:
    async def run() -> None:
        with NatsServer(tmp_path, config=config) as server:
            right = Node(f"nats://{login}{server.addr}", "alpha")
            wrong = Node(f"nats://who:knows@{server.addr}", "beta", 2)
            await wrong.backbone.start()
            async with nodes(right):
                assert right.statuses[0][:2] == (True, server.url) and right.backbone.server == server.url
                await until(lambda: bool(wrong.statuses))
                up, reason, _ = wrong.statuses[0]
                assert not up and reason.startswith(f"{server.url}: login refused") and "knows" not in reason
                await wrong.backbone.close()

    asyncio.run(run())


def test_password_is_not_told_to_a_server_without_tls_when_tls_is_asked_for() -> None:
    async def run() -> None:
        said = bytearray()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","version":"2.9.10","max_payload":1048576}\r\n')
            with contextlib.suppress(ConnectionError):
                said.extend(await reader.read())
            writer.close()

        impostor = await asyncio.start_server(greet, "127.0.0.1", 0)
        port = impostor.sockets[0].getsockname()[1]
        node = Node(f"tls://qd:password@127.0.0.1:{port}", "alpha")
        await node.backbone.start()
        await until(lambda: bool(node.statuses))
        assert node.statuses[0][0] is False and "offers no TLS" in node.statuses[0][1]
        await node.backbone.close()
        impostor.close()
        assert b"password" not in said

    asyncio.run(run())


@needs_nats_server
def test_tls_is_used_when_the_certificate_is_trusted_and_refused_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate(tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)

    async def run() -> None:
        with NatsServer(tmp_path, config=f'tls {{ cert_file: "{cert}", key_file: "{key}" }}') as server:
            url = f"tls://localhost:{server.port}"
            stranger = Node(url, "beta", 2)
            await stranger.backbone.start()
            await until(lambda: bool(stranger.statuses))
            await stranger.backbone.close()
            assert stranger.statuses[0][0] is False and "not trusted" in stranger.statuses[0][1]
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            node = Node(url, "alpha")
            async with nodes(node):
                assert await node.backbone.hold(1)

    asyncio.run(run())


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that vouches for itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_file, key_file


# Addresses and the library


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nats://a", [Server(("a", 4222))]),
        ("nats://a:1/", [Server(("a", 1))]),
        ("nats://a:1,b:2,[::1]:3", [Server(("a", 1)), Server(("b", 2)), Server(("::1", 3))]),
        ("nats://a:1,nats://b:2", [Server(("a", 1)), Server(("b", 2))]),
        ("tls://a", [Server(("a", 4222), tls=True)]),
        ("nats://u:p%40@a,b", [Server(("a", 4222), user="u", password="p@"), Server(("b", 4222), user="u", password="p@")]),
        ("nats://t@a", [Server(("a", 4222), token="t")]),
    ],
)  # fmt: skip
def test_address_gives_its_servers_in_order(url: str, expected: list[Server]) -> None:
    assert servers_of(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        *(
            "a:1",
            "http://a",
            "nats://",
            "nats://a:",
            "nats://a:0",
            "nats://a:70000",
            "nats://a:x",
            "nats://a,,b",
        ),
        *("nats://secret@", "nats://secret@a/path", "nats://secret:secret@:4222", "tls://a,nats://b"),
    ],
)
def test_address_that_makes_no_sense_is_refused_in_one_line_without_its_login(url: str) -> None:
    with pytest.raises(LocalError) as refused:
        Node(url, "alpha")
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_library_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "discovery.backbone.jetstream", raising=False)
    for name in [name for name in sys.modules if name == "nats" or name.startswith("nats.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(LocalError) as refused:
        Node("nats://user:secret@127.0.0.1:4222", "alpha")
    assert str(refused.value) == (
        "backbone nats://127.0.0.1:4222: needs nats-py; pip install 'quarterdeck[nats]'"
    )


def test_nobody_there_is_told_with_the_address_and_closing_is_quick() -> None:
    async def run() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            node = Node(f"nats://127.0.0.1:{sock.getsockname()[1]},127.0.0.1:1", "alpha")
            await node.backbone.start()
            await until(lambda: bool(node.statuses))
            up, reason, _ = node.statuses[0]
            assert not up and "connection refused" in reason and "1 more" in reason
            began = time.monotonic()
            await node.backbone.close()
            assert time.monotonic() - began < 0.5
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
