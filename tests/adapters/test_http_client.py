"""One request to a CA over real TLS: what comes back, and what a user reads where nothing does."""

import asyncio
import socket
import ssl
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes.counting_server import Calls
from fakes.hierarchy import Ca, make_ca, make_leaf, new_key
from fakes.https_server import Answer, HttpsServer, Reply, Request

from sds_agent.authority.credentials import Token
from sds_agent.authority.http_client import (
    LARGEST_ANSWER,
    LONGEST_LINE,
    CertificateRefusedError,
    HttpAnswer,
    HttpsRequest,
    lines,
    send,
)
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem

DAY = timedelta(days=1)
NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)


async def fine(_request: Request) -> Reply:
    return Reply(body=b"fine")


def replying(reply: Reply | bytes | None) -> Answer:
    async def answer(_request: Request) -> Reply | bytes | None:
        return reply

    return answer


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[HttpsServer]:
    async with HttpsServer(answer).serving() as server:
        yield server


def get(server: HttpsServer, **changed: object) -> HttpsRequest:
    return HttpsRequest(**{"method": "GET", "url": server.url, "roots": server.roots_pem, **changed})  # type: ignore[arg-type]


async def refused(request: HttpsRequest) -> AuthorityError:
    with pytest.raises(AuthorityError) as caught:
        await send(request, "the CA")
    return caught.value


async def streamed(request: HttpsRequest, what: str) -> list[bytes | HttpAnswer]:
    async with aclosing(lines(request, what)) as received:
        return [each async for each in received]


def client(ca: Ca, not_after: datetime) -> CurrentIdentity:
    key = new_key()
    leaf = make_leaf(ca, key=key, not_before=not_after - DAY, not_after=not_after)
    return CurrentIdentity(write_pem([leaf]), to_pkcs8_pem(key))


async def test_what_is_sent_arrives_and_the_answer_comes_back() -> None:
    async with serving(replying(Reply(201, b"{}", {"X-Odd": "Yes"}))) as server:
        answer = await send(get(server, method="POST", body=b"csr", headers={"x-token": "t"}), "the CA")
        (request,) = server.requests
    assert (answer.status, answer.body, answer.headers["x-odd"], answer.host) == (
        201,
        b"{}",
        "Yes",
        server.url.removeprefix("https://"),
    )
    assert (request.method, request.body, request.headers["x-token"]) == ("POST", b"csr", "t")
    assert request.headers["accept-encoding"] == "identity"


async def test_roots_are_read_for_the_first_request_and_hold_for_each() -> None:
    """A file with all that a system trusts takes a good part of a tenth of a second, in which no Envoy is served."""
    key = new_key()
    many = write_pem([make_ca(f"root {number}", key=key).certificate for number in range(100)])
    calls = Calls()
    async with serving(fine) as server:
        request = get(server, roots=server.roots_pem + many)
        await send(request, "the CA")
        sys.setprofile(calls)
        try:
            await send(request, "the CA")
        finally:
            sys.setprofile(None)
        assert calls.functions < 100, "it would take some for each of the roots"
        assert "do not vouch" in str(await refused(get(server, roots=many)))
        await send(request, "the CA")


async def test_a_server_that_other_roots_vouch_for_gets_no_request() -> None:
    async with serving(fine) as server:
        error = await refused(get(server, roots=write_pem([make_ca("another").certificate])))
        assert server.requests == []
    assert error.kind is ErrorKind.TRANSIENT
    assert "the roots in ca_file do not vouch for the certificate of the CA" in str(error)


async def test_an_intermediate_ca_in_the_file_of_roots_vouches_too() -> None:
    server = HttpsServer(fine)
    begin, end = server.validity
    root = make_ca("root", not_before=begin, not_after=end)
    server.ca = make_ca("issuing", root, not_before=begin, not_after=end)
    async with server.serving():
        assert (await send(get(server), "the CA")).body == b"fine"


async def test_a_server_with_another_name_gets_no_request() -> None:
    server = HttpsServer(fine, names=("other.example",))
    async with server.serving():
        error = await refused(get(server))
        assert server.requests == []
        assert (await send(get(server, server_name="other.example"), "the CA")).body == b"fine"
    assert "is not for 127.0.0.1" in str(error)
    assert "set server_name" in str(error)


@pytest.mark.parametrize(
    ("begins", "ends", "usage", "said"),
    [
        (-2 * DAY, -DAY, ExtendedKeyUsageOID.SERVER_AUTH, "has expired, or this machine's clock is ahead; renew it"),
        (DAY, 2 * DAY, ExtendedKeyUsageOID.SERVER_AUTH, "is not valid yet, or this machine's clock is behind; set"),
        (-DAY, DAY, ExtendedKeyUsageOID.CLIENT_AUTH, "is not for a server: its extended key usage lacks serverAuth;"),
    ],
    ids=["expired", "future", "client's"],
)
async def test_a_fault_of_the_servers_certificate_is_not_blamed_on_the_roots(
    begins: timedelta, ends: timedelta, usage: x509.ObjectIdentifier, said: str
) -> None:
    """Another file of roots would cure none of these."""
    server, now = HttpsServer(fine), datetime.now(UTC)
    server.validity, server.usages = (now + begins, now + ends), (usage,)
    async with server.serving():
        error = await refused(get(server))
    assert str(error).startswith(f"the certificate of the CA, or that of a CA above it, {said}")


async def test_a_root_that_was_renewed_at_the_server_alone_is_to_be_renewed_here() -> None:
    """OpenSSL says that a certificate has expired, whose it does not say; each of those that the server has is good."""
    async with serving(fine) as server:
        now = datetime.now(UTC)
        old = make_ca("server root", key=server.ca.key, not_before=now - 2 * DAY, not_after=now - DAY)
        error = await refused(get(server, roots=write_pem([old.certificate])))
        assert (await send(get(server), "the CA")).status == 200
    assert str(error).endswith("; renew it, also in the file of roots here if it is there, or set the clock")


async def test_a_certificate_of_the_client_is_shown() -> None:
    ca = make_ca("clients", not_before=NOW - DAY, not_after=datetime.now(UTC) + DAY)
    server = HttpsServer(fine)
    server.trust, server.require = (ca.certificate,), True
    shown = client(ca, datetime.now(UTC) + timedelta(hours=1))
    async with server.serving():
        await send(get(server, certificate=shown), "the CA")
        (request,) = server.requests
    assert request.certificate is not None
    assert write_pem([request.certificate]) == shown.chain_pem


@pytest.mark.parametrize("fault", ["expired", "foreign"])
async def test_a_certificate_that_the_server_refuses_is_an_error_of_its_own(fault: str) -> None:
    """The client may then go on without it; an unreachable server is another matter."""
    ca = make_ca("clients", not_before=NOW - DAY, not_after=datetime.now(UTC) + DAY)
    server = HttpsServer(fine)
    server.trust, server.require = (ca.certificate,), True
    shown = client(
        make_ca("foreign") if fault == "foreign" else ca, datetime.now(UTC) - timedelta(hours=fault == "expired")
    )
    async with server.serving():
        error = await refused(get(server, certificate=shown))
    assert isinstance(error, CertificateRefusedError)
    assert error.kind is ErrorKind.UNAUTHENTICATED


async def test_a_certificate_is_refused_within_the_handshake_by_an_alert() -> None:
    """As by a server of TLS 1.2."""
    server, end = HttpsServer(fine), datetime.now(UTC) + DAY
    server.trust, server.require = (make_ca("clients", not_before=NOW - DAY, not_after=end).certificate,), True
    context = server.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.port = listening.getsockname()[1]

        def refuse() -> None:  # asyncio's own servers send no alert
            with listening.accept()[0] as accepted, pytest.raises(ssl.SSLError):
                context.wrap_socket(accepted, server_side=True)

        refusing = asyncio.create_task(asyncio.to_thread(refuse))
        error = await refused(get(server, certificate=client(make_ca("foreign"), end)))
        await refusing
    assert isinstance(error, CertificateRefusedError)
    assert error.kind is ErrorKind.UNAUTHENTICATED


async def test_a_connection_that_a_balancer_without_a_server_ends_is_no_matter_of_the_certificate() -> None:
    """Or an outage would be taken for one that a person has to end, and be waited for ten times as long."""

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.abort()

    server = HttpsServer(fine)
    shown = client(make_ca("clients"), datetime.now(UTC) + timedelta(hours=1))
    async with await asyncio.start_server(leave, "127.0.0.1", 0) as listening:
        server.port = listening.sockets[0].getsockname()[1]
        error = await refused(get(server, certificate=shown))
    assert isinstance(error, CertificateRefusedError), "who has another proof may try it all the same"
    assert error.kind is ErrorKind.TRANSIENT
    assert "ended the connection in the TLS handshake" in str(error)


@pytest.mark.parametrize("ask", [send, streamed], ids=["whole", "by lines"])
async def test_an_answer_that_is_cut_off_refuses_no_certificate(ask: Callable[..., Awaitable[object]]) -> None:
    """A server that has begun to answer has accepted the certificate: nobody has to renew it."""
    ca = make_ca("clients", not_before=NOW - DAY, not_after=datetime.now(UTC) + DAY)
    server = HttpsServer(replying(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf\n"))
    server.trust, server.require = (ca.certificate,), True
    shown = client(ca, datetime.now(UTC) + timedelta(hours=1))
    async with server.serving():
        with pytest.raises(AuthorityError) as caught:
            await ask(get(server, certificate=shown), "the CA")
    assert caught.value.kind is ErrorKind.TRANSIENT
    assert "ended the connection without a whole answer" in str(caught.value)


async def test_no_redirect_is_followed() -> None:
    async with serving(fine) as other:
        moved = Reply(307, b"", {"location": f"{other.url}/elsewhere"})
        async with serving(replying(moved)) as server:
            answer = await send(get(server, headers={"x-token": "secret"}), "the CA")
        assert other.requests == []
    assert answer.status == 307


async def test_a_proxy_of_the_environment_never_sees_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's proxy is for the web: it could neither reach the CA nor is the token its business."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:1")
    async with serving(fine) as server:
        assert (await send(get(server), "the CA")).body == b"fine"


@pytest.mark.parametrize(
    "reply",
    [
        None,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
        b"HTTP/1.1 999999 \r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"\x00" * 5000,
    ],
)
async def test_what_is_no_answer_is_transient(reply: bytes | None) -> None:
    async with serving(replying(reply)) as server:
        error = await refused(get(server))
    assert error.kind is ErrorKind.TRANSIENT
    assert "ended the connection without a whole answer" in str(error)


async def test_a_server_that_says_goodbye_within_tls_is_no_missing_device() -> None:
    """Such an error has a number of OpenSSL's, which is another one of the system's."""
    close_notify = bytes.fromhex("15 0303 0002 0100")

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(close_notify)
        writer.write_eof()
        while await reader.read(65536):
            pass
        writer.close()

    server = HttpsServer(fine)
    async with await asyncio.start_server(leave, "127.0.0.1", 0) as listening:
        server.port = listening.sockets[0].getsockname()[1]
        error = await refused(get(server))
    assert str(error).endswith("without a whole answer (TLS/SSL connection has been closed (EOF))")


async def test_an_endless_answer_is_cut_off() -> None:
    async with serving(replying(Reply(200, b"x" * (LARGEST_ANSWER + 1)))) as server:
        error = await refused(get(server))
    assert error.kind is ErrorKind.INVALID
    assert str(LARGEST_ANSWER) in str(error)


async def test_a_compressed_answer_is_not_inflated() -> None:
    async with serving(replying(Reply(200, b"\x1f\x8b junk", {"content-encoding": "gzip"}))) as server:
        assert (await send(get(server), "the CA")).body == b"\x1f\x8b junk"


async def test_a_refused_connection_is_said_in_words(port: int) -> None:
    server = HttpsServer(fine)
    server.port = port
    error = await refused(get(server))
    assert error.kind is ErrorKind.TRANSIENT
    assert str(error) == "the CA cannot be reached (Connection refused); check that it runs at this address"


def test_the_words_for_a_host_with_several_addresses_are_those_of_each(port: int) -> None:
    """As one with an address of each family has them."""

    class TwoAddresses(asyncio.SelectorEventLoop):
        async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:  # noqa: ARG002 - its names
            tcp = socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
            return [(*tcp, (address, port)) for address in ("127.0.0.1", "127.0.0.2")]

    with asyncio.Runner(loop_factory=TwoAddresses) as runner:
        error = runner.run(refused(HttpsRequest("GET", f"https://ca.example:{port}", b"")))
    assert str(error) == "the CA cannot be reached (Connection refused); check that it runs at this address"


async def test_what_was_sent_is_in_no_error() -> None:
    async with serving(replying(None)) as server:
        error = await refused(get(server, headers={"authorization": "Bearer hunter2"}, body=b"hunter2"))
    assert "hunter2" not in "".join(traceback.format_exception(error))


async def test_a_cancelled_request_leaves_no_connection() -> None:
    arrived, never = asyncio.Event(), asyncio.Event()

    async def silent(_request: Request) -> None:
        arrived.set()
        await never.wait()

    async with serving(silent) as server:
        task = asyncio.create_task(send(get(server), "the CA"))
        await arrived.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_a_request_that_is_cancelled_in_its_handshake_leaves_no_connection() -> None:
    """A CA that accepts and is silent would otherwise cost a descriptor for each attempt."""
    accepted, left = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)  # of the client's hello
        accepted.set()
        await reader.read()
        left.set()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        task = asyncio.create_task(send(HttpsRequest("GET", url, b""), "the CA"))
        await accepted.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:  # which holds what the request held
            await task
        async with asyncio.timeout(10):
            await left.wait()
        del cancelled


def answer(**headers: str) -> HttpAnswer:
    return HttpAnswer(503, {name.replace("_", "-"): value for name, value in headers.items()}, b"", "ca:1")


@pytest.mark.parametrize(
    ("headers", "delay"),
    [
        ({}, None),
        ({"retry_after": "120"}, 120.0),
        ({"retry_after": "0"}, None),
        ({"retry_after": "-5"}, None),
        ({"retry_after": "soon"}, None),
        ({"retry_after": "9" * 400}, None),
        ({"retry_after": "Sat, 14 Mar 2026 15:10:26 GMT"}, 60.0),
        ({"retry_after": "Sat, 14 Mar 2026 15:08:26 GMT"}, None),
        ({"retry_after": "Sat, 14 Mar 2026 17:00:30 GMT", "date": "Sat, 14 Mar 2026 17:00:00 GMT"}, 30.0),
        ({"retry_after": "Sat, 99 Mar 2026 17:00:30 GMT"}, None),
    ],
)
def test_a_delay_is_read_in_seconds_and_as_a_date(headers: dict[str, str], delay: float | None) -> None:
    """A date counts by the clock of the server that named it."""
    assert answer(**headers).retry_after(NOW) == delay


def test_a_servers_words_are_one_short_line_without_the_secret() -> None:
    said = HttpAnswer(403, {}, b"no:\n\x1b[31m the token s.hunter2 is bad " + b"x" * 1000, "ca:1").words(
        Token("s.hunter2")
    )
    assert said.startswith("no: ?[31m the token [token] is bad xxx")
    assert len(said) < 320


@pytest.mark.parametrize("begin", [0, 1, 7, 30])
@pytest.mark.parametrize("length", [16, 17, 31, 40])
@pytest.mark.parametrize("before", ["", "x", "the token ", "no, the token is not good: "])
def test_a_piece_of_the_secret_that_a_server_cut_is_removed_from_its_words(
    before: str, length: int, begin: int
) -> None:
    """Servers and proxies quote the first or the last characters of what they do not like."""
    secret = Token(f"eyJh{'.'.join(sha256(bytes([n])).hexdigest() for n in range(2))}")
    piece = secret.text[begin : begin + length]
    said = HttpAnswer(401, {}, f"{before}{piece}... and {piece}!".encode(), "ca:1").words(secret)
    assert said == f"{before}[token]... and [token]!"


def test_words_that_are_no_piece_of_the_secret_stay() -> None:
    said = "the token for spiffe://demo.example/web is of another audience"
    secrets = Token("demo.example/way-of-another-aud"), Token("another token for")
    assert HttpAnswer(401, {}, said.encode(), "ca:1").words(*secrets) == said


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """An answer in these chunks; without its end the connection is cut before it."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + sent + (b"0\r\n\r\n" if end else b"")


async def received(request: HttpsRequest) -> list[bytes | HttpAnswer]:
    return [each async for each in lines(request, "the CA")]


async def test_lines_come_whole_however_they_were_cut_on_their_way() -> None:
    async with serving(replying(chunked(b"on", b"e\ntwo", b"\n\n  \nthree"))) as server:
        assert await received(get(server)) == [b"one", b"two", b"three"]


async def test_a_line_is_there_before_the_answer_has_ended() -> None:
    """A watch goes on for minutes: who waited for its end would wait that long for a certificate."""
    seen = asyncio.Event()

    async def answer(_request: Request) -> Reply | bytes | None:
        await seen.wait()
        return None

    class Begun(HttpsServer):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(chunked(b"first\n", end=False))
            await super()._serve(reader, writer)

    async with Begun(answer).serving() as server, aclosing(lines(get(server), "the CA")) as coming:
        async for line in coming:
            assert line == b"first"
            break
        seen.set()


async def test_another_status_comes_as_a_whole_answer_in_place_of_lines() -> None:
    async with serving(replying(Reply(403, b"not\nyou", {"X-Odd": "Yes"}))) as server:
        (answer,) = await received(get(server))
    assert isinstance(answer, HttpAnswer)
    assert (answer.status, answer.body, answer.headers["x-odd"]) == (403, b"not\nyou", "Yes")


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"x" * (LONGEST_LINE + 1), f"larger than {LONGEST_LINE} bytes"), (b"\n" * (LARGEST_ANSWER + 1), "larger than")],
)
async def test_lines_without_an_end_do_not_fill_the_memory(body: bytes, said: str) -> None:
    async with serving(replying(chunked(body))) as server:
        with pytest.raises(AuthorityError) as caught:
            await received(get(server))
    assert caught.value.kind is ErrorKind.INVALID
    assert said in str(caught.value)


async def test_lines_that_are_cut_off_are_a_failure_and_no_end() -> None:
    async with serving(replying(chunked(b"one\n", end=False))) as server:
        with pytest.raises(AuthorityError) as caught:
            await received(get(server, headers={"authorization": "s3" + "cret"}))
    assert caught.value.kind is ErrorKind.TRANSIENT
    assert "ended the connection without a whole answer" in str(caught.value)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_request_shows_no_token_in_its_representation() -> None:
    request = HttpsRequest("GET", "https://ca.example", None, headers={"authorization": "Bearer s3cret"})
    assert "s3cret" not in repr(request)
