"""The key set of a token issuer: from where it is read, when again, and what of it counts."""

import asyncio
import gzip
import json
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc.aio
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fakes import der
from fakes.ca_servers import AUDIENCE, ISSUER, TRUST_DOMAIN, Shifted, TokenIssuer, served
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.hierarchy import SERVER_AND_CLIENT, Ca, make_ca, make_leaf, new_key
from fakes.odd_certificates import NOT_READ, named
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from sds_agent.ca.callers import ClaimRule
from sds_agent.ca.jwks import (
    LARGEST_SET,
    REFRESH,
    SOONEST,
    START_TIMEOUT,
    TIMEOUT,
    IssuerKeys,
    JwksError,
    Location,
    read_keys,
)
from sds_agent.ca.jwt import MOST_KNOWN, TokenCallers, TrustedIssuer
from sds_agent.ca.refusal import Reason, RefusalError
from sds_agent.clock import SystemClock
from sds_agent.errors import ConfigurationError
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem


class ApiServer(HTTPServer):
    """A stand-in for a kube-apiserver: it gives its key set to a caller that sends the right token."""

    key_set = b""
    status = 200
    encoding = "identity"
    asked = 0
    wanted: str | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.answers = threading.Event()  # until it is cleared
        self.answers.set()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.server_address[1]}/openid/v1/jwks"


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.answers.wait(2 * TIMEOUT)
        known = self.headers["authorization"] == "Bearer reader"
        content = self.server.key_set if known else b"no"
        self.send_response(self.server.status if known else 401)
        self.send_header("content-length", str(len(content)))
        self.send_header("content-encoding", self.server.encoding)
        self.server.wanted = self.headers["accept-encoding"]
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the standard library's name
        """Nothing."""


def server_identity(directory: Path, root: Ca) -> None:
    now = SystemClock().now().replace(microsecond=0)
    key = new_key()
    leaf = make_leaf(
        root,
        None,
        key=key,
        usages=SERVER_AND_CLIENT,
        names=[x509.DNSName("localhost")],
        not_before=now - timedelta(hours=1),
        not_after=now + timedelta(hours=1),
    )
    (directory / "server.pem").write_bytes(write_pem([leaf]) + to_pkcs8_pem(key))
    (directory / "ca.crt").write_bytes(write_pem([root.certificate]))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    now = SystemClock().now().replace(microsecond=0)
    root = make_ca("kubernetes", not_before=now - timedelta(days=1), not_after=now + timedelta(days=1))
    server_identity(tmp_path, root)
    (tmp_path / "token").write_text("reader\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with ApiServer(("localhost", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def location(api: ApiServer, directory: Path) -> Location:
    return Location(api.url, directory / "ca.crt", directory / "token")


async def test_a_url_is_read_with_its_own_ca_and_token(api: ApiServer, tmp_path: Path) -> None:
    api.key_set = TokenIssuer().key_set()
    keys = await IssuerKeys.open(location(api, tmp_path), HandClock())
    assert [key.kid for key in await keys.find("ES256", "ES256")] == ["ES256"]
    assert await keys.find("ES256", "RS256") == ()
    assert await keys.find("nobody's", "ES256") == ()
    assert api.asked == 1, "an unknown key is no reason to ask again at once"


async def test_unknown_keys_make_the_set_be_read_at_a_bounded_rate(api: ApiServer, tmp_path: Path) -> None:
    """Any caller can send tokens with unknown keys; the CA must not ask the issuer for each."""
    api.key_set, clock = TokenIssuer().key_set(), HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    for asked in (1, 2, 3):
        for number in range(9):
            assert await keys.find(f"nobody's {number}", "ES256") == ()
            clock.elapse(SOONEST / 10)
        assert api.asked == asked
        clock.elapse(SOONEST / 10)


def signed(issuer: TokenIssuer, kid: str | None) -> str:
    """A good token of an issuer whose keys have that name, or none."""
    unsigned = jwt.decode(issuer.token(), options={"verify_signature": False})
    return jwt.encode(unsigned, issuer.keys["ES256"], "ES256", headers={} if kid is None else {"kid": kid})


def key_set(issuer: TokenIssuer, kid: str | None) -> bytes:
    key = json.loads(issuer.key_set())["keys"][0]
    del key["kid"]
    return json.dumps({"keys": [key if kid is None else {**key, "kid": kid}]}).encode()


@pytest.mark.parametrize("kid", [None, "1"], ids=["without a name", "under its old name"])
async def test_a_key_that_another_one_replaces_is_found_soon(tmp_path: Path, kid: str | None) -> None:
    """Every token of the issuer would be refused for five minutes."""
    path, clock, old, new = tmp_path / "jwks.json", HandClock(), TokenIssuer(), TokenIssuer()
    path.write_bytes(key_set(old, kid))
    issuers = [TrustedIssuer(ClaimRule(ISSUER, AUDIENCE), await IssuerKeys.open(Location(str(path)), clock))]
    now = SystemClock().now()
    await TokenCallers(issuers, TRUST_DOMAIN).of(signed(old, kid), now)
    path.write_bytes(key_set(new, kid))
    await TokenCallers(issuers, TRUST_DOMAIN).of(signed(old, kid), now)
    with pytest.raises(RefusalError, match="not signed with a key"):
        await TokenCallers(issuers, TRUST_DOMAIN).of(signed(new, kid), now)
    clock.elapse(SOONEST)
    await TokenCallers(issuers, TRUST_DOMAIN).of(signed(new, kid), now)
    with pytest.raises(RefusalError, match="not signed with a key"):
        await TokenCallers(issuers, TRUST_DOMAIN).of(signed(old, kid), now)


async def test_forged_tokens_make_the_set_be_read_at_the_same_bounded_rate(api: ApiServer, tmp_path: Path) -> None:
    """Any caller can send them, with names of known keys and of others; the CA must not ask the issuer for each."""
    known, forger, clock = TokenIssuer(), TokenIssuer(), HandClock()
    api.key_set = key_set(known, "1")
    issuers = [TrustedIssuer(ClaimRule(ISSUER, AUDIENCE), await IssuerKeys.open(location(api, tmp_path), clock))]
    now = SystemClock().now()
    for asked in (1, 2, 3):
        for number in range(9):
            with pytest.raises(RefusalError):
                await TokenCallers(issuers, TRUST_DOMAIN).of(signed(forger, ["1", "2", None][number % 3]), now)
            clock.elapse(SOONEST / 10)
        assert api.asked == asked
        await TokenCallers(issuers, TRUST_DOMAIN).of(signed(known, "1"), now)
        clock.elapse(SOONEST / 10)


async def test_a_token_that_is_known_proves_its_caller_until_its_end_and_while_its_keys_are_in_force(
    tmp_path: Path,
) -> None:
    """What the CA remembers of a token must open no door that the token itself does not open any more."""
    issuer, clock = TokenIssuer(), HandClock()
    (tmp_path / "jwks.json").write_bytes(issuer.key_set())
    keys = await IssuerKeys.open(Location(str(tmp_path / "jwks.json")), clock)
    callers = TokenCallers([TrustedIssuer(ClaimRule(ISSUER, AUDIENCE), keys)], TRUST_DOMAIN)
    end = clock.now() + timedelta(minutes=5)
    token = issuer.token(exp=end, nbf=clock.now())
    assert callers.known(token, clock.now()) is None
    caller = await callers.of(token, clock.now())
    assert callers.known(token, clock.now()) == caller
    assert callers.known(token, end - timedelta(seconds=1)) == caller
    assert callers.known(f"{token}A", clock.now()) is None, "another token"
    with pytest.raises(RefusalError, match="expired"):
        callers.known(token, end)
    with pytest.raises(RefusalError, match="valid only from"):
        callers.known(token, clock.now() - timedelta(hours=1))
    clock.elapse(SOONEST)
    assert await keys.renewed("nobody's", "ES256") == ()
    assert callers.known(token, clock.now()) is None, "verified by keys that may be withdrawn by now"
    assert await callers.of(token, clock.now()) == caller


async def test_the_tokens_that_are_known_are_bounded(tmp_path: Path) -> None:
    """Whoever can get tokens from the issuer can get any number of them."""
    issuer, clock = TokenIssuer(), HandClock()
    (tmp_path / "jwks.json").write_bytes(issuer.key_set())
    keys = await IssuerKeys.open(Location(str(tmp_path / "jwks.json")), clock)
    callers = TokenCallers([TrustedIssuer(ClaimRule(ISSUER, AUDIENCE), keys)], TRUST_DOMAIN)
    end = clock.now() + timedelta(minutes=5)
    tokens = [issuer.token("EdDSA", exp=end, nbf=clock.now(), jti=str(number)) for number in range(MOST_KNOWN + 2)]
    for token in tokens:
        await callers.of(token, clock.now())
    known = [callers.known(token, clock.now()) is not None for token in tokens]
    assert known == [False] * 2 + [True] * MOST_KNOWN


async def test_a_file_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(TokenIssuer().key_set() + b" " * LARGEST_SET)
    with pytest.raises(ConfigurationError, match="has more than"):
        await IssuerKeys.open(Location(str(path)), HandClock())


async def test_a_pipe_in_the_place_of_a_key_set_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "jwks.json")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await IssuerKeys.open(Location(str(tmp_path / "jwks.json")), HandClock())


async def test_a_caller_that_leaves_takes_no_reading_from_those_that_wait_for_it(
    api: ApiServer, tmp_path: Path
) -> None:
    """Every client can send a token with an unknown key and leave at once: no new key would be found on demand."""
    api.key_set, clock = TokenIssuer().key_set(), HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    successor = json.loads(TokenIssuer().key_set())["keys"]
    api.key_set = json.dumps({"keys": [{**each, "kid": "fresh"} for each in successor]}).encode()
    clock.elapse(SOONEST)
    api.answers.clear()
    leaving = asyncio.create_task(keys.find("nobody's", "ES256"))
    with anyio.fail_after(10):
        while api.asked < 2:
            await anyio.lowlevel.checkpoint()
    waiting = asyncio.create_task(keys.find("fresh", "ES256"))
    await asyncio.wait([waiting], timeout=0)
    leaving.cancel()
    await asyncio.wait([leaving], timeout=0)
    api.answers.set()
    with anyio.fail_after(10):
        found = await waiting
    assert [key.kid for key in found] == ["fresh"]
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert api.asked == 2


async def test_the_end_of_the_server_ends_a_reading_whose_caller_has_left(api: ApiServer, tmp_path: Path) -> None:
    """The process would end seconds later, for an answer that nobody waits for."""
    api.key_set, clock = TokenIssuer().key_set(), HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    clock.elapse(SOONEST)
    api.answers.clear()
    before = asyncio.all_tasks()
    with anyio.fail_after(TIMEOUT / 2):
        async with following(keys, clock):
            leaving = asyncio.create_task(keys.find("nobody's", "ES256"))
            while api.asked < 2:
                await anyio.lowlevel.checkpoint()
            leaving.cancel()
            await asyncio.wait([leaving])
    assert asyncio.all_tasks() - before == set()
    api.answers.set()


async def test_a_new_key_is_found_soon_and_an_old_one_forgotten_in_time(api: ApiServer, tmp_path: Path) -> None:
    api.key_set, clock = TokenIssuer().key_set(), HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    async with following(keys, clock):
        fresh = {**json.loads(TokenIssuer().key_set())["keys"][0], "kid": "fresh"}
        api.key_set = json.dumps({"keys": [fresh]}).encode()
        clock.elapse(SOONEST)
        assert len(await keys.find("fresh", "ES256")) == 1
        api.key_set = TokenIssuer().key_set()
        clock.elapse(REFRESH)
        await clock.asleep()
        assert await keys.find("fresh", "ES256") == ()


async def test_a_clock_that_is_set_back_keeps_no_new_key_out(api: ApiServer, tmp_path: Path) -> None:
    """A machine whose clock is ahead when it starts, with its network not up yet, would take no token for hours."""
    clock = HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    api.key_set = TokenIssuer().key_set()
    clock.set_wall(-timedelta(hours=2))
    assert len(await keys.find("ES256", "ES256")) == 1
    async with following(keys, clock):
        api.key_set = json.dumps({"keys": [{**json.loads(api.key_set)["keys"][0], "kid": "fresh"}]}).encode()
        clock.set_wall(-timedelta(hours=2))
        clock.elapse(REFRESH)
        await clock.asleep()
    assert len(await keys.find("fresh", "ES256")) == 1


@asynccontextmanager
async def following(keys: IssuerKeys, clock: HandClock) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keys.follow)
        await clock.asleep()
        yield
        tasks.cancel_scope.cancel()


async def test_a_slow_issuer_delays_no_caller_whose_key_is_known(api: ApiServer, tmp_path: Path) -> None:
    api.key_set, clock = TokenIssuer().key_set(), HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    api.answers.clear()
    async with following(keys, clock):
        clock.elapse(REFRESH)
        with anyio.fail_after(10):
            while api.asked < 2:
                await anyio.lowlevel.checkpoint()
        with anyio.fail_after(TIMEOUT / 2):  # the issuer would be waited for as long as the whole
            assert len(await keys.find("ES256", "ES256")) == 1
        api.answers.set()


async def test_a_compressed_set_is_not_unpacked(api: ApiServer, tmp_path: Path) -> None:
    """800 bytes become 400 MB, which are too large a set only when they are in memory."""
    api.encoding, api.key_set = "gzip, gzip", gzip.compress(gzip.compress(TokenIssuer().key_set()))
    with recorded() as events:
        keys = await IssuerKeys.open(location(api, tmp_path), HandClock())
    (event,) = events.named("key_set_not_read")
    assert event["cause"] == "the key set's server answered with compressed content, which it was asked not to do"
    assert (keys.current, api.wanted) == ((), "identity")


async def test_an_issuer_that_hangs_holds_up_the_start_for_a_moment_only(api: ApiServer, tmp_path: Path) -> None:
    """Until then no caller could renew by certificate, and the CA would be deaf to SIGTERM; per issuer."""
    api.answers.clear()
    with recorded() as events, anyio.fail_after(TIMEOUT / 2):
        await IssuerKeys.open(location(api, tmp_path), HandClock())
    api.answers.set()
    cause = events.named("key_set_not_read")[0]["cause"]
    assert cause == f"the key set's server did not answer within {START_TIMEOUT:g} s"


async def test_a_set_without_an_end_is_not_read_to_it(api: ApiServer, tmp_path: Path) -> None:
    api.key_set = b" " * LARGEST_SET + TokenIssuer().key_set()
    with recorded() as events:
        await IssuerKeys.open(location(api, tmp_path), HandClock())
    assert "more than" in events.named("key_set_not_read")[0]["cause"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ca.crt", b"nothing", "its ca_file"),
        ("ca.crt", None, "its ca_file"),
        ("token", None, "its token_file"),
        ("token", b"secret\xff", "does not hold a token alone"),
        ("token", b"x" * (16 << 10) + b"\n", "has more than"),
        ("token", b"se\ncret", "does not hold a token alone"),
        ("token", b"\xef\xbb\xbf \n", "is empty"),
        ("token", b"secret", "answered with status 401"),
    ],
)
async def test_what_keeps_a_set_from_being_read_is_logged_without_the_token(
    api: ApiServer, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with recorded() as events:
        await IssuerKeys.open(location(api, tmp_path), HandClock())
    (reported,) = events.named("key_set_not_read")
    assert words in reported["cause"]
    assert "cret" not in str(reported)


def refusing(_: socket.socket) -> None:
    """Nothing listens."""


def closing(listener: socket.socket) -> None:
    def serve() -> None:
        with listener.accept()[0] as connection:
            connection.recv(1 << 16)  # a connection that is closed with bytes unread is reset

    listener.listen()
    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize(("server", "words"), [(refusing, "Connection refused"), (closing, "eof")])
async def test_a_server_that_cannot_be_reached_is_said_to_be_so_with_the_reason(
    server: Callable[[socket.socket], None], words: str
) -> None:
    """All that httpx says is that all attempts failed, or nothing."""
    with socket.socket() as listener, recorded() as events:
        listener.bind(("127.0.0.1", 0))
        server(listener)
        await IssuerKeys.open(Location(f"https://localhost:{listener.getsockname()[1]}/keys"), HandClock())
    (reported,) = events.named("key_set_not_read")
    assert reported["cause"].startswith("the key set's server cannot be reached (")
    assert words in reported["cause"].replace("EOF", "eof")


def run_together(pem: bytes) -> bytes:
    return write_pem([make_ca("other").certificate]).strip() + pem


def indented(pem: bytes) -> bytes:
    return b"\n".join(b"  " + line for line in pem.splitlines())


def in_one_line(pem: bytes) -> bytes:
    return pem.replace(b"\n", b" ")


def behind_one_that_cannot_be_read(pem: bytes) -> bytes:
    return der.pem(NOT_READ["_ in PrintableString"]) + pem


def behind_one_that_openssl_does_not_load(pem: bytes) -> bytes:
    return der.pem(named("Root", der.VISIBLE)) + pem


FORMS = (run_together, indented, in_one_line, behind_one_that_cannot_be_read, behind_one_that_openssl_does_not_load)


@pytest.mark.parametrize("form", FORMS)
async def test_roots_are_read_here_as_everywhere_else(
    api: ApiServer, tmp_path: Path, form: Callable[[bytes], bytes]
) -> None:
    api.key_set, where, clock = TokenIssuer().key_set(), location(api, tmp_path), HandClock()
    (tmp_path / "ca.crt").write_bytes(form((tmp_path / "ca.crt").read_bytes()))
    with recorded() as events:
        keys = await IssuerKeys.open(where, clock)
        assert len(await keys.find("ES256", "ES256")) == 1
        clock.elapse(SOONEST)
        await keys.find("another", "ES256")
    assert api.asked == 2
    assert len(events.named("certificates_left_out")) == form.__name__.startswith("behind"), "once for each content"


async def test_a_file_is_read_again_as_it_changes_and_a_bad_one_takes_no_key_away(tmp_path: Path) -> None:
    path, clock = tmp_path / "jwks.json", HandClock()
    path.write_bytes(TokenIssuer().key_set())
    keys = await IssuerKeys.open(Location(str(path)), clock)
    for content in (b"half a file", None):
        path.unlink() if content is None else path.write_bytes(content)
        clock.elapse(SOONEST)
        assert await keys.find("fresh", "ES256") == ()
        assert len(await keys.find("ES256", "ES256")) == 1
    fresh = {**json.loads(TokenIssuer().key_set())["keys"][0], "kid": "fresh"}
    path.write_text(json.dumps({"keys": [fresh]}))
    clock.elapse(SOONEST)
    assert len(await keys.find("fresh", "ES256")) == 1
    assert await keys.find("ES256", "ES256") == ()


async def test_an_issuer_that_is_down_later_does_not_lock_callers_out(api: ApiServer, tmp_path: Path) -> None:
    api.key_set, clock = TokenIssuer().key_set(), HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    api.status = 503
    async with following(keys, clock):
        clock.elapse(REFRESH)
        await clock.asleep()
        assert len(await keys.find("ES256", "ES256")) == 1


async def test_a_ca_starts_before_its_issuer_and_signs_once_that_is_up(api: ApiServer, tmp_path: Path) -> None:
    api.status, clock = 503, Shifted()
    jwks = f'"{api.url}", ca_file: ca.crt, token_file: token'
    async with served(tmp_path, jwks=jwks, clock=clock) as ca:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(ca.issuer.token())
        assert caught.value.code() is grpc.StatusCode.INTERNAL, "which Istio's clients try again"
        api.status, api.key_set = 200, ca.issuer.key_set()
        clock.ahead = SOONEST
        await ca.ask(ca.issuer.token())
        api.status = 503
        clock.ahead = 2 * SOONEST
        await ca.ask(ca.issuer.token())
        assert [line["outcome"] for line in ca.audit] == ["internal", "issued", "issued"]


async def test_a_key_that_was_taken_back_is_not_believed_for_ever(tmp_path: Path) -> None:
    """A stolen key is good until then, and its thief sends no token that would make the set be read again."""
    clock = HandClock(SystemClock().now())
    async with served(tmp_path, clock=clock) as ca:
        token = ca.issuer.token(exp=clock.now() + timedelta(hours=1))
        await ca.ask(token)
        (tmp_path / "jwks.json").write_bytes(TokenIssuer().key_set())
        await clock.asleep(3)
        clock.elapse(REFRESH)
        await clock.asleep(3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(token)
        assert "not signed with a key of its issuer" in (caught.value.details() or "")


async def test_an_issuer_that_is_down_at_first_is_asked_again(api: ApiServer, tmp_path: Path) -> None:
    api.status, clock = 503, HandClock()
    keys = await IssuerKeys.open(location(api, tmp_path), clock)
    with pytest.raises(RefusalError) as error:
        await keys.find("ES256", "ES256")
    assert error.value.reason is Reason.INTERNAL
    api.status, api.key_set = 200, TokenIssuer().key_set()
    clock.elapse(SOONEST)
    assert len(await keys.find("ES256", "ES256")) == 1


async def test_a_server_of_another_ca_is_not_believed(api: ApiServer, tmp_path: Path) -> None:
    api.key_set = TokenIssuer().key_set()
    (tmp_path / "ca.crt").write_bytes(write_pem([make_ca("other").certificate]))
    with recorded() as events:
        keys = await IssuerKeys.open(location(api, tmp_path), HandClock())
    (reported,) = events.named("key_set_not_read")
    assert "is not taken (unable to get local issuer certificate); ca_file names" in reported["cause"]
    with pytest.raises(RefusalError):
        await keys.find("ES256", "ES256")
    assert api.asked == 0


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "AAAA"}]}'])
async def test_a_file_that_holds_no_keys_is_refused_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "jwks.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="key set"):
        await IssuerKeys.open(Location(str(path)), HandClock())


@pytest.mark.parametrize(
    "spoiled",
    [{"kty": "oct"}, {"use": "enc"}, {"alg": "HS256"}, {"crv": "P-384"}, {"d": "AAAA"}, {"x": "AAAA"}, {"kty": 7}],
)
def test_a_key_that_cannot_verify_is_passed_over(spoiled: dict[str, object]) -> None:
    first = json.loads(TokenIssuer().key_set())["keys"][0]
    with pytest.raises(JwksError):
        read_keys(json.dumps({"keys": [{**first, **spoiled}]}).encode())


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (ECAlgorithm, ec.generate_private_key(ec.SECP256R1())),
        (OKPAlgorithm, ed25519.Ed25519PrivateKey.generate()),
        (RSAAlgorithm, rsa.generate_private_key(65537, 2048)),
    ],
    ids=["ES256", "EdDSA", "RS256"],
)
def test_a_private_key_that_is_published_vouches_for_nobody(kind: Any, key: Any) -> None:
    """Everyone who can read the set could sign with it."""
    with pytest.raises(JwksError):
        read_keys(json.dumps({"keys": [json.loads(kind.to_jwk(key))]}).encode())
    read_keys(json.dumps({"keys": [json.loads(kind.to_jwk(key.public_key()))]}).encode())


def test_a_key_that_can_be_broken_vouches_for_nobody() -> None:
    weak = rsa.generate_private_key(65537, 1024).public_key()  # noqa: S505 - weak on purpose
    with pytest.raises(JwksError):
        read_keys(json.dumps({"keys": [json.loads(RSAAlgorithm.to_jwk(weak))]}).encode())
