"""The relay between a client's TLS connection and gRPC's socket: what one end sends arrives at the other, and no more
waits in between than an end has room for.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import SocketStream
from anyio.streams.tls import TLSAttribute, TLSStream
from fakes.calls import counted

from sds_agent.ca.acceptor import ConnectionLimits, TlsAcceptor
from sds_agent.ca.relay import BackEnd, FrontEnd, reach, relay, shake_hands
from sds_agent.ca.server import FRAMES
from sds_agent.ca.tls import sign_server
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem
from sds_agent.signing.signer import make_root

MANY = bytes(range(256)) * (32 << 10)
"""Bytes: 8 MiB, more than the buffers of all sockets between two ends take."""


def contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's."""
    now = datetime.now(UTC)
    root = make_root(generate(KeyType.EC_P256), "demo.example", now, timedelta(days=1))
    key = generate(KeyType.EC_P256)
    leaf = sign_server(root, key.public_key(), ["localhost"], now, timedelta(hours=1))
    (directory / "server.pem").write_bytes(to_pkcs8_pem(key) + write_pem([leaf]))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "server.pem")
    client = ssl.create_default_context(cadata=write_pem([root.certificate]).decode())
    for context in (server, client):
        context.set_alpn_protocols(["h2"])
    return server, client


@dataclass(frozen=True)
class Relayed:
    """A relay, and what is connected to its two ends."""

    front: FrontEnd
    back: BackEnd
    client: TLSStream
    grpc: SocketStream


@asynccontextmanager
async def relayed(directory: Path) -> AsyncIterator[Relayed]:
    """A client that is relayed to a Unix socket of this process."""
    server, client = contexts(directory)
    front, back = FrontEnd(server, lambda _: None), BackEnd()

    async def serve() -> None:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        await shake_hands(connection, front, 10)
        await reach(directory / "grpc", directory.name, back)
        await relay(front, back)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with await anyio.create_unix_listener(directory / "grpc") as grpc, anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            with anyio.fail_after(20):
                stream = await anyio.connect_tcp(*listener.getsockname(), ssl_context=client, tls_hostname="localhost")
                async with await grpc.accept() as accepted:
                    try:
                        yield Relayed(front, back, stream, accepted)
                    finally:
                        await anyio.aclose_forcefully(stream)
            tasks.cancel_scope.cancel()


async def read_whole(stream: TLSStream) -> bytes:
    """Everything up to the end of TLS; a connection that ends without one raises BrokenResourceError."""
    parts = []
    try:
        while True:
            parts.append(await stream.receive())
    except anyio.EndOfStream:
        return b"".join(parts)


async def test_an_answer_of_many_tls_records_arrives_whole_though_grpc_closes_behind_it(tmp_path: Path) -> None:
    """A CA's roots may take megabytes, and gRPC closes a connection that is old right after an answer."""
    async with relayed(tmp_path) as it, anyio.create_task_group() as tasks:

        async def answer() -> None:
            await it.grpc.send(MANY)
            await it.grpc.aclose()

        tasks.start_soon(answer)
        assert await read_whole(it.client) == MANY


async def test_records_that_come_together_are_one_write_to_grpc(tmp_path: Path) -> None:
    """A client's first bytes are three records: each would be a system call here and a wake-up of gRPC's thread."""
    async with relayed(tmp_path) as it:
        tls = it.client.extra(TLSAttribute.ssl_object)
        with counted() as calls:
            tls.write(b"preface ")
            tls.write(b"settings ")
            await it.client.send(b"call")  # with what was written before
            assert await it.grpc.receive() == b"preface settings call"
    assert calls.of["socket.send"] == 2, "the client's, and one to gRPC"


async def test_what_a_client_does_not_read_waits_in_grpc_and_not_in_the_relay(tmp_path: Path) -> None:
    """Or else a client that asks and never reads could fill the memory."""
    async with relayed(tmp_path) as it, anyio.create_task_group() as tasks:

        async def answer() -> None:
            await it.grpc.send(MANY)
            await it.grpc.aclose()

        tasks.start_soon(answer)
        while it.back.is_reading:
            await anyio.lowlevel.checkpoint()
        assert it.front.transport.get_write_buffer_size() < 1 << 20
        assert await read_whole(it.client) == MANY


async def test_what_grpc_does_not_read_waits_at_the_client_and_not_in_the_relay(tmp_path: Path) -> None:
    async with relayed(tmp_path) as it, anyio.create_task_group() as tasks:
        tasks.start_soon(it.client.send, MANY)
        while it.front.transport.is_reading() or not it.back.left:
            await anyio.lowlevel.checkpoint()
        assert it.back.left < 1 << 20
        received = b""
        while len(received) < len(MANY):
            received += await it.grpc.receive()
        assert received == MANY


async def test_a_ca_that_ends_waits_for_open_connections_and_takes_no_more(tmp_path: Path) -> None:
    """Their answers may still be in a relay; and a client that comes late is to try another CA at once."""
    server, client = contexts(tmp_path)
    limits = ConnectionLimits(10, FRAMES, handshake=60, unproven=60)
    acceptor = TlsAcceptor(lambda: server, lambda: datetime.now(UTC), limits)
    emptied = anyio.Event()

    async def wait() -> None:
        await acceptor.emptied()
        emptied.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, anyio.fail_after(20):
        listener.setblocking(False)
        async with await anyio.create_unix_listener(tmp_path / "grpc"), anyio.create_task_group() as tasks:
            tasks.start_soon(acceptor.run, listener, [tmp_path / "grpc"])
            address = listener.getsockname()
            first = await anyio.connect_tcp(*address, ssl_context=client, tls_hostname="localhost")
            acceptor.close()
            tasks.start_soon(wait)
            async with await anyio.connect_tcp(*address) as late:
                with pytest.raises(anyio.EndOfStream):
                    await late.receive()
            assert not emptied.is_set()
            await anyio.aclose_forcefully(first)
            await emptied.wait()
            tasks.cancel_scope.cancel()
