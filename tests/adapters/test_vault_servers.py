"""The client of Vault and the servers themselves: nodes of a cluster, a rotation of the CA, limits, secrets."""

import asyncio
import json
import traceback
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from fakes.clocks import HAND_LOOP, HandClock
from fakes.der import pem
from fakes.events import Events, recorded
from fakes.hierarchy import NO_NAME
from fakes.https_server import Reply, Request, json_reply
from fakes.odd_certificates import NOT_READ
from fakes.vault_client import HOUR, SECRET, VaultClient, clients_ca
from fakes.vault_server import VaultServer

from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import ErrorKind
from sds_agent.authority.vault.kind import KIND
from sds_agent.authority.vault.nodes import TIMEOUT
from sds_agent.authority.vault.settings import VaultJwtAuth, VaultSettings
from sds_agent.pki.certificates import describe_time, read_bundle
from sds_agent.tasks import giving


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def clock() -> HandClock:
    return HandClock(datetime.now(UTC))


@pytest.fixture
def vault(clock: HandClock) -> VaultServer:
    return VaultServer(now=clock.now)


@pytest.fixture
def client(tmp_path: Path, vault: VaultServer, clock: HandClock) -> VaultClient:
    return VaultClient(tmp_path, vault, clock)


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as seen:
        yield seen


# A rotation of the CA


async def test_a_root_that_will_sign_is_trusted_before_it_does(client: VaultClient, vault: VaultServer) -> None:
    (old,) = vault.roots
    async with vault.serving(), client.open(client.settings()):
        assert await client.anchors() == {old}
        new = vault.add_root("root two", default=False)
        assert await client.anchors() == {old, new}
        assert set((await client.issue()).anchors) == {old, new}
        (vault.default,) = [number for number, each in vault.issuers.items() if each.certificate == new]
        accepted = await client.issue()
        assert accepted.leaf.issuer == new.subject
        del vault.issuers[next(number for number, each in vault.issuers.items() if each.certificate == old)]
        assert await client.anchors() == {new}


async def test_a_root_that_signs_from_one_moment_to_the_next_is_found(client: VaultClient, vault: VaultServer) -> None:
    """An operator made it and let it sign between our two requests."""

    def rotate(request: Request) -> None:
        if request.path.endswith("sign/web") and len(vault.roots) == 1:
            vault.add_root("root two")

    vault.intercept = rotate
    async with vault.serving(), client.open(client.settings()):
        accepted = await client.issue()
    assert set(accepted.anchors) == vault.roots
    assert len(accepted.anchors) == 2


@pytest.mark.parametrize("held", ["issuers?list=true", "sign/web", "issuer/"])
async def test_a_root_that_another_caller_has_read_meanwhile_is_not_dropped(
    client: VaultClient, vault: VaultServer, held: str
) -> None:
    reached, go = asyncio.Event(), asyncio.Event()

    async def holding(request: Request) -> Reply | bytes | None:
        reply = await vault.answer(request)
        if held in request.path and not reached.is_set():
            reached.set()
            await go.wait()
        return reply

    vault.http.answer = holding
    async with vault.serving(), client.open(client.settings()):
        issuing = asyncio.create_task(client.issue())
        await reached.wait()
        vault.add_root("root two", default=False)
        assert await client.anchors() == vault.roots
        go.set()
        assert set((await issuing).anchors) == vault.roots
        assert len(vault.roots) == 2


async def test_an_issuer_that_cannot_be_read_is_told_beside_the_roots(client: VaultClient, vault: VaultServer) -> None:
    """Or nobody would hear that peers below it are refused (`anchors_left_out`)."""
    (good,) = vault.issuers
    vault.add_root("odd", default=False)
    odd = json_reply({"data": {"certificate": pem(NOT_READ["_ in PrintableString"]).decode()}})
    vault.intercept = lambda request: odd if request.path.endswith("/json") and good not in request.path else None
    async with vault.serving(), client.open(client.settings()):
        told = read_bundle(await client.authority.anchors())
        assert (told.certificates, len(told.left_out)) == ((vault.issuers[good].certificate,), 1)
        assert len((await client.issue()).left_out) == 1


async def test_an_issuer_that_is_deleted_while_the_issuers_are_read_is_passed_over(
    client: VaultClient, vault: VaultServer
) -> None:
    gone = vault.add_root("gone", default=False)
    number = next(number for number, each in vault.issuers.items() if each.certificate == gone)

    def delete(request: Request) -> None:
        if request.path.endswith(f"{number}/json"):
            vault.issuers.pop(number, None)

    vault.intercept = delete
    async with vault.serving(), client.open(client.settings()):
        assert await client.anchors() == vault.roots


async def test_issuers_that_cannot_be_read_keep_no_certificate_from_being_renewed(
    client: VaultClient, vault: VaultServer
) -> None:
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.intercept = lambda request: Reply(500) if "issuers" in request.path else None
        accepted = await client.issue()
    assert any("the roots that were read before stay in use" in each for each in accepted.warnings)


# Nodes


async def test_a_sealed_node_gives_way_to_the_next_which_is_asked_first_from_then_on(
    client: VaultClient, vault: VaultServer
) -> None:
    other = VaultServer(now=vault.now, issuers=vault.issuers, default=vault.default)
    other.http.ca = vault.http.ca
    async with vault.serving(), other.serving(), client.open(client.settings(url=(vault.http.url, other.http.url))):
        await client.issue()
        assert other.paths == []
        vault.sealed = True
        other.tokens = vault.tokens
        await client.issue()
        asked = len(vault.paths)
        await client.issue()
        assert len(vault.paths) == asked
        other.sealed = True
        error = await client.refused()
    assert error.kind is ErrorKind.TRANSIENT
    assert str(error).count("503: Vault is sealed") == 2


async def test_a_node_without_a_leader_gives_way_though_it_answers_500(client: VaultClient, vault: VaultServer) -> None:
    """It answers what needs no leader, so the next one has to be asked for a single request."""
    other = VaultServer(now=vault.now, issuers=vault.issuers, default=vault.default)
    other.http.ca, vault.leaderless = vault.http.ca, True
    async with vault.serving(), other.serving():
        async with client.open(client.settings(url=(vault.http.url, other.http.url))):
            await client.issue()
        async with client.open(client.settings()):
            error = await client.refused()
    assert len(other.signed) == 1
    assert error.kind is ErrorKind.TRANSIENT
    assert "its cluster has no leader at present" in str(error)


async def test_a_silent_node_leaves_the_next_one_its_time(client: VaultClient, vault: VaultServer) -> None:
    other = VaultServer(now=vault.now, issuers=vault.issuers, default=vault.default)
    other.http.ca = vault.http.ca

    async def silent(_request: Request) -> None:
        client.clock.elapse(timedelta(seconds=TIMEOUT / 2 + 1))
        await asyncio.Event().wait()

    vault.http.answer = silent
    async with vault.serving(), other.serving(), client.open(client.settings(url=(vault.http.url, other.http.url))):
        async with asyncio.timeout(10 + TIMEOUT):
            await client.issue()
    assert other.signed


async def test_a_silent_node_leaves_the_next_its_part_of_what_the_caller_gives(
    client: VaultClient, vault: VaultServer
) -> None:
    other = VaultServer(now=vault.now)
    other.http.ca = vault.http.ca

    async def silent(_request: Request) -> None:
        client.clock.elapse(timedelta(seconds=1.9))
        await asyncio.Event().wait()

    vault.http.answer = silent
    async with vault.serving(), other.serving(), client.open(client.settings(url=(vault.http.url, other.http.url))):
        async with asyncio.timeout(4.3):  # half of the usual time would not be over by then
            with giving(4):
                await client.issue()
    assert other.signed


@pytest.mark.parametrize("status", [412, 472, 473, 502, 503, 504])
async def test_a_node_that_does_not_serve_now_is_asked_again(
    client: VaultClient, vault: VaultServer, status: int
) -> None:
    vault.intercept = lambda _request: json_reply({"errors": ["not here"]}, status, retry_after="7")
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.TRANSIENT
    assert error.retry_after == 7
    assert f"({status}: not here)" in str(error)


async def test_a_redirect_leads_to_a_configured_node_and_takes_the_token_there(
    client: VaultClient, vault: VaultServer
) -> None:
    async with AsyncExitStack() as stack:
        leader = await stack.enter_async_context(VaultServer(now=vault.now).serving())
        vault.http.ca = leader.http.ca
        await stack.enter_async_context(vault.serving())
        vault.leader = leader.http.url
        await stack.enter_async_context(client.open(client.settings(url=(vault.http.url, leader.http.url))))
        await client.issue()
        redirected = len(vault.paths)
        await client.issue()
        assert len(vault.paths) == redirected == 1, "the leader is asked first from then on"
    assert len(leader.signed) == 2
    assert vault.signed == []


async def test_no_redirect_leads_to_a_host_that_no_configuration_names(client: VaultClient, vault: VaultServer) -> None:
    """Whoever could answer in a node's place would get the token otherwise."""
    async with VaultServer(now=vault.now).serving() as stranger, vault.serving():
        auth = client.token_auth()
        vault.leader = stranger.http.url
        async with client.open(client.settings(auth)):
            error = await client.refused()
        assert stranger.http.connections == 0
    assert error.kind is ErrorKind.TRANSIENT
    assert f"sends the agent to {stranger.http.url}/v1/pki/issuers?list=true" in str(error)
    assert "which gets no token as url does not name it" in str(error)


async def test_the_place_that_a_redirect_names_is_quoted_without_the_token(
    client: VaultClient, vault: VaultServer
) -> None:
    def redirect(request: Request) -> Reply | None:
        token = request.headers.get("x-vault-token")
        return Reply(307, b"", {"location": f"https://other.example/?token={token}"}) if token else None

    vault.intercept = redirect
    async with vault.serving(), client.open(client.settings(client.token_auth())):
        error = await client.refused()
    assert "sends the agent to https://other.example/?token=[token], which" in str(error)


async def test_a_servers_warnings_are_quoted_without_the_token(client: VaultClient, vault: VaultServer) -> None:
    async def warning(request: Request) -> Reply | bytes | None:
        reply = await vault.answer(request)
        if not request.path.endswith("sign/web"):
            return reply
        assert isinstance(reply, Reply)
        said = [f"the token {request.headers['x-vault-token']} ends soon"]
        return json_reply(json.loads(reply.body) | {"warnings": said})

    vault.http.answer = warning
    async with vault.serving(), client.open(client.settings()):
        answer = await client.answer()
    assert "the token [token] ends soon" in answer.warnings


@pytest.mark.parametrize(
    ("namespace", "place"), [(None, "check mount and namespace"), ("team", "check mount and namespace (team)")]
)
async def test_a_server_that_knows_no_token_of_its_own_is_a_matter_of_the_place(
    client: VaultClient, vault: VaultServer, namespace: str | None, place: str
) -> None:
    vault.namespace = namespace
    vault.intercept = lambda request: (
        json_reply({"errors": ["permission denied"]}, 403) if request.path.endswith("sign/web") else None
    )
    async with vault.serving(), client.open(client.settings(namespace=namespace)):
        error = await client.refused()
    assert str(error).endswith(f"it does not know the token that it gave at the login: {place}")


async def test_two_standbys_that_redirect_to_each_other_are_no_loop(client: VaultClient, vault: VaultServer) -> None:
    other = VaultServer(now=vault.now)
    other.http.ca = vault.http.ca
    async with vault.serving(), other.serving(), client.open(client.settings(url=(vault.http.url, other.http.url))):
        vault.leader, other.leader = other.http.url, vault.http.url
        error = await client.refused()
    assert error.kind is ErrorKind.TRANSIENT
    assert len(vault.paths) + len(other.paths) == 4


# Limits


@pytest.mark.parametrize(("headers", "delay"), [({}, None), ({"retry_after": "30"}, 30.0)])
async def test_a_quota_throttles_with_and_without_a_delay(
    client: VaultClient, vault: VaultServer, headers: dict[str, str], delay: float | None
) -> None:
    words = 'request path "pki/sign/web": rate limit quota exceeded'

    def throttle(request: Request) -> Reply | None:
        return json_reply({"errors": [words]}, 429, **headers) if request.path.endswith("sign/web") else None

    vault.intercept = throttle
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.THROTTLED
    assert error.retry_after == delay
    assert words in str(error)


async def test_a_quota_below_the_number_of_issuers_delays_and_does_not_prevent(
    client: VaultClient, vault: VaultServer
) -> None:
    for number in range(3):
        vault.add_root(f"another {number}", default=False)
    read: list[str] = []

    def throttle(request: Request) -> Reply | None:
        if not request.path.endswith("/json"):
            read.clear()
            return None
        read.append(request.path)
        return json_reply({"errors": ["rate limit quota exceeded"]}, 429) if len(read) > 1 else None

    vault.intercept = throttle
    async with vault.serving(), client.open(client.settings()):
        for _ in range(3):
            assert (await client.refused()).kind is ErrorKind.THROTTLED
        assert len((await client.issue()).anchors) == 4


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"data": null}', b'{"data": {"keys": ["../../sys/seal"]}}', b'{"data": {"keys": [1]}}']
)
async def test_an_answer_of_another_program_is_invalid(client: VaultClient, vault: VaultServer, body: bytes) -> None:
    vault.intercept = lambda _request: Reply(200, body)
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.INVALID
    assert len(vault.paths) == 1


# Secrets, and what is said of them before the first call


async def test_no_secret_is_in_an_error_a_log_or_a_repr(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    """Even where the server sends it back."""
    seen = []
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        token = next(iter(vault.tokens))

        def echo(request: Request) -> Reply | None:
            secrets = f"{request.headers.get('x-vault-token')} {request.body.decode()}"
            return json_reply({"errors": [secrets]}, 400) if request.method == "POST" else None

        vault.intercept = echo
        seen.append("".join(traceback.format_exception(await client.refused())))
        vault.tokens.clear()
        vault.intercept = lambda request: echo(request) if "login" in request.path else None
        seen.append("".join(traceback.format_exception(await client.refused())))
        held = vars(client.authority) | vars(vars(client.authority)["_session"])
        seen.append(repr(held))
    assert "[token]" in seen[0]
    shown = "".join(seen) + repr(events.seen)
    assert SECRET not in shown
    assert token not in shown


def found(chosen: VaultSettings, client: VaultClient) -> list[str]:
    context = Context("upstream", "demo.example", client.folder / "state", client.clock)
    return [f"{'.'.join(map(str, each.where))} {each.found}" for each in KIND.credentials(chosen, context)]


def test_good_credentials_are_not_spoken_of(client: VaultClient, vault: VaultServer) -> None:
    keys = client.certificate(clients_ca(vault))
    assert found(client.settings(), client) == []
    assert found(client.settings(client.token_auth()), client) == []
    assert found(client.settings(client.login("cert"), **keys), client) == []


@pytest.mark.parametrize(("ends", "complains"), [(HOUR, False), (-HOUR, True)])
def test_an_expired_jwt_is_named_before_the_first_call(client: VaultClient, ends: timedelta, complains: bool) -> None:
    end = client.clock.now() + ends
    claims = {"sub": "web", "exp": int(end.timestamp())}
    (client.folder / "jwt").write_text(jwt.encode(claims, "k" * 32, algorithm="HS256"))
    expected = [f"auth.jwt_file names a token that expired at {describe_time(end)}"] if complains else []
    assert found(client.settings(VaultJwtAuth(jwt_file=client.folder / "jwt")), client) == expected


def test_a_file_of_the_wrong_kind_is_named_before_the_first_call(client: VaultClient) -> None:
    (client.folder / "jwt").write_text("s.atoken")
    auth = client.token_auth()
    auth.token_file.write_text(jwt.encode({"sub": "web"}, "k" * 32, algorithm="HS256"))
    assert found(client.settings(client.login("jwt")), client) == ["auth.jwt_file names a file that holds no JWT"]
    assert found(client.settings(auth), client) == ["auth.token_file names a file that holds a JWT"]
    wrapped = {"token": "hvs.wrapping", "accessor": "a", "ttl": 300, "creation_path": "sys/wrapping/wrap"}
    auth.token_file.write_text(json.dumps(wrapped, separators=(",", ":")))  # as Vault Agent writes it, without spaces
    (said,) = found(client.settings(auth), client)
    assert said == "auth.token_file names a file that holds JSON, as of a wrapped or encrypted token"


@pytest.mark.parametrize("method", ["approle", "jwt", "kubernetes"])
def test_a_missing_file_is_named_before_the_first_call(client: VaultClient, method: str) -> None:
    (client.folder / "secret-id").unlink()
    (client.folder / "jwt").unlink()
    (said,) = found(client.settings(client.login(method)), client)
    key = "auth.secret_id_file" if method == "approle" else "auth.jwt_file"
    assert said.startswith(f"{key} cannot be used: ")
    assert "No such file" in said


def test_a_certificate_that_cannot_log_in_is_named_before_the_first_call(
    client: VaultClient, vault: VaultServer
) -> None:
    ca = clients_ca(vault)
    keys = client.certificate(ca, subject=NO_NAME)
    (nameless,) = found(client.settings(client.login("cert"), **keys), client)
    assert nameless == "certificate_file has a certificate without a common name"
    client.certificate(ca, lasts=-HOUR)
    (expired,) = found(client.settings(client.login("cert"), **keys), client)
    assert expired.startswith("certificate_file has a certificate that expired at ")


def test_every_file_of_an_auth_method_is_the_operators(client: VaultClient) -> None:
    """The agent warns where others can change it, or read the secret in it."""
    for method, key in (("approle", "secret_id_file"), ("jwt", "jwt_file"), ("kubernetes", "jwt_file")):
        assert f"auth.{key}" in KIND.files(client.settings(client.login(method)))
        assert f"auth.{key}" in KIND.secrets
    assert "auth.token_file" in KIND.files(client.settings(client.token_auth()))
    assert {"auth.token_file", "key_file"} <= set(KIND.secrets)
