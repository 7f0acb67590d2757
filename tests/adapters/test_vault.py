"""The client of Vault's PKI engine against a server that stands in for it: logins, tokens, roots and refusals."""

import asyncio
import gc
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import NO_NAME, make_ca
from fakes.https_server import Reply, Request
from fakes.vault_client import HOUR, ID, VaultClient, clients_ca, pass_time
from fakes.vault_server import Role, VaultServer

from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.authority.vault.nodes import TIMEOUT
from sds_agent.issuance.lists import read_lists
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.validation.revocation import is_signed_by

LOGINS = {"approle": "auth/approle/login", "jwt": "auth/jwt/login", "kubernetes": "auth/kubernetes/login"} | {
    "cert": "auth/cert/login"
}


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
def events() -> Iterator[Events]:
    with recorded() as seen:
        yield seen


@pytest.fixture
def client(tmp_path: Path, vault: VaultServer, clock: HandClock) -> VaultClient:
    return VaultClient(tmp_path, vault, clock)


# A certificate


async def test_a_certificate_comes_with_its_root(client: VaultClient, vault: VaultServer) -> None:
    async with vault.serving(), client.open(client.settings()):
        accepted = await client.issue()
    assert set(accepted.anchors) == vault.roots
    issuer = f"pki/issuer/{vault.default}/json"
    assert vault.paths == ["pki/issuers?list=true", issuer, "auth/approle/login", "pki/sign/web"]
    # a Vault Agent with require_request_header refuses all others
    assert {each.headers.get("x-vault-request") for each in vault.http.requests} == {"true"}


async def test_the_identity_stands_in_the_csr_and_beside_it(client: VaultClient, vault: VaultServer) -> None:
    """A role uses one of the two, and ignores the other without a word."""
    async with vault.serving(), client.open(client.settings()):
        for vault.roles["web"].use_csr_sans in (True, False):
            await client.issue()
    body = vault.http.requests[-1].json
    assert (body["uri_sans"], body["ttl"], body["format"]) == (ID, "3600s", "pem")
    assert "common_name" not in body
    assert vault.signed[-1].subject == NO_NAME


async def test_three_renewals_take_one_login_and_read_each_issuer_once(client: VaultClient, vault: VaultServer) -> None:
    async with vault.serving(), client.open(client.settings()):
        serials = {(await client.issue()).leaf.serial_number for _ in range(4)}
    assert len(serials) == 4
    assert vault.count("auth/approle/login") == 1
    assert vault.count(f"pki/issuer/{vault.default}/json") == 1


async def test_a_shortened_life_is_a_warning(client: VaultClient, vault: VaultServer) -> None:
    vault.roles["web"].max_ttl = timedelta(minutes=5)
    async with vault.serving(), client.open(client.settings()):
        accepted = await client.issue()
    assert any("longer than permitted maxTTL" in each for each in accepted.warnings)
    assert accepted.not_after <= client.clock.now() + timedelta(minutes=5)


@pytest.mark.parametrize("shows_chain", [True, False])
async def test_an_intermediate_with_its_root_imported_gives_a_chain(
    client: VaultClient, vault: VaultServer, *, shows_chain: bool
) -> None:
    now = vault.now()
    root = make_ca("offline", not_before=now - HOUR, not_after=now + timedelta(days=30))
    vault.issuers.clear()
    vault.shows_chain = shows_chain
    intermediate = vault.add_intermediate("signer", root, import_root=True)
    async with vault.serving(), client.open(client.settings()):
        accepted = await client.issue()
    assert accepted.anchors == (root.certificate,)
    assert accepted.chain[1:] == (intermediate,)


async def test_an_intermediate_alone_takes_a_file_with_the_roots(client: VaultClient, vault: VaultServer) -> None:
    now = vault.now()
    root = make_ca("offline", not_before=now - HOUR, not_after=now + timedelta(days=30))
    vault.issuers.clear()
    vault.add_intermediate("signer", root)
    async with vault.serving():
        async with client.open(client.settings()):
            error = await client.refused()
        assert error.kind is ErrorKind.INVALID
        assert "name the root's file in roots_file" in str(error)
        assert vault.signed == [], "a certificate without roots is of no use"
        (client.folder / "td.pem").write_bytes(write_pem([root.certificate]))
        vault.http.requests.clear()
        async with client.open(client.settings(roots_file=client.folder / "td.pem")):
            assert (await client.issue()).anchors == (root.certificate,)
            assert await client.anchors() == {root.certificate}
    assert vault.count("pki/issuers?list=true") == 0


async def test_mounts_and_namespace_are_the_operators(client: VaultClient, vault: VaultServer) -> None:
    vault.mount, vault.namespace = "team/pki", "team/mesh"
    async with vault.serving(), client.open(client.settings(mount="team/pki", namespace="team/mesh")):
        await client.issue()
    assert {each.headers["x-vault-namespace"] for each in vault.http.requests} == {"team/mesh"}


async def test_an_unknown_namespace_is_named(client: VaultClient, vault: VaultServer) -> None:
    async with vault.serving(), client.open(client.settings(namespace="nope")):
        error = await client.refused()
    assert error.kind is ErrorKind.INVALID
    assert "404: namespace not found" in str(error)
    assert "namespace (nope)" in str(error)


# Logins


@pytest.mark.parametrize("method", LOGINS)
async def test_each_method_logs_in_once_and_issues(client: VaultClient, vault: VaultServer, method: str) -> None:
    keys = client.certificate(clients_ca(vault)) if method == "cert" else {}
    async with vault.serving(), client.open(client.settings(client.login(method), **keys)):
        await client.issue()
        await client.issue()
    assert vault.count(LOGINS[method]) == 1


async def test_a_jwt_is_read_anew_for_every_login(client: VaultClient, vault: VaultServer) -> None:
    vault.jwt = "b.newer.jwt"
    async with vault.serving(), client.open(client.settings(client.login("jwt"))):
        assert (await client.refused()).kind is ErrorKind.UNAUTHENTICATED
        (client.folder / "jwt").write_text("b.newer.jwt")
        await client.issue()


async def test_many_workloads_share_one_login(client: VaultClient, vault: VaultServer) -> None:
    async with vault.serving(), client.open(client.settings()):
        await asyncio.gather(*(client.authority.issue(client.request()) for _ in range(5)))
    assert vault.count("auth/approle/login") == 1


class LateLogin:
    """Lets the server answer its first login late: the secret ID is `spent` at once, and the token comes when `go`."""

    def __init__(self, *servers: VaultServer) -> None:
        self.spent = asyncio.Event()
        self.go = asyncio.Event()
        self.servers = servers
        servers[0].http.answer = self.answer

    async def answer(self, request: Request) -> Reply | bytes | None:
        reply = await self.servers[0].answer(request)
        if request.path.endswith("/login") and not self.spent.is_set():
            for each in self.servers:
                each.secret_ids.clear()
            self.spent.set()
            await self.go.wait()
        return reply


async def test_a_login_outlives_its_attempt_and_the_next_one_takes_the_token(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    """A secret ID may be good for one login, which no attempt may throw away."""
    late = LateLogin(vault)
    async with vault.serving(), client.open(client.settings()):
        first = asyncio.create_task(client.issue())
        await late.spent.wait()
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        second = asyncio.create_task(client.issue())
        late.go.set()
        await second
        assert len(events.named("logged_in")) == 1
    assert vault.count("auth/approle/login") == 1


async def test_a_login_that_fails_when_its_attempt_has_ended_gives_way_to_another(
    client: VaultClient, vault: VaultServer
) -> None:
    asked, cut, complaints = asyncio.Event(), asyncio.Event(), list[dict[str, Any]]()

    async def cutting(request: Request) -> Reply | bytes | None:
        if not request.path.endswith("/login"):
            return await vault.answer(request)
        asked.set()
        await cut.wait()
        vault.http.answer = vault.answer
        return None

    vault.http.answer = cutting
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with vault.serving(), client.open(client.settings()):
        idle = asyncio.all_tasks()
        first = asyncio.create_task(client.issue())
        await asked.wait()
        first.cancel()
        await asyncio.wait([first])
        cut.set()
        await asyncio.wait(asyncio.all_tasks() - idle)
        await client.issue()
    gc.collect()
    assert complaints == []


async def test_a_login_ends_with_its_authority(client: VaultClient, vault: VaultServer) -> None:
    late, before = LateLogin(vault), asyncio.all_tasks()
    async with vault.serving():
        async with client.open(client.settings()):
            first = asyncio.create_task(client.issue())
            await late.spent.wait()
            first.cancel()
            await asyncio.wait([first])
        late.go.set()
    assert asyncio.all_tasks() == before


async def test_a_late_node_is_still_heard_when_the_next_one_refuses_what_it_has_spent(
    client: VaultClient, vault: VaultServer
) -> None:
    other = VaultServer(now=vault.now, issuers=vault.issuers, default=vault.default, tokens=vault.tokens)
    other.http.ca = vault.http.ca
    late, refused = LateLogin(vault, other), asyncio.Event()

    async def refusing(request: Request) -> Reply | bytes | None:
        reply = await other.answer(request)
        refused.set()
        return reply

    other.http.answer = refusing
    async with vault.serving(), other.serving():
        urls = (vault.http.url, other.http.url)
        async with client.open(client.settings(url=urls)):
            issuing = asyncio.create_task(client.issue())
            await late.spent.wait()
            client.clock.elapse(timedelta(seconds=TIMEOUT / 2 + 1))
            await refused.wait()
            late.go.set()
            await issuing
    assert other.paths == ["auth/approle/login"]
    assert vault.signed


REFUSED_LOGINS: dict[str, tuple[str, Callable[[VaultServer], object], str, str]] = {
    "wrong secret ID": ("approle", lambda v: v.secret_ids.clear(), "400: invalid role or secret ID", "new secret ID"),
    "wrong role ID": ("approle", lambda v: setattr(v, "role_id", "x"), "400: invalid role or", "auth.role_id"),
    "another audience": (
        "jwt",
        lambda v: setattr(v, "jwt_fault", "invalid audience (aud) claim"),
        "invalid audience (aud) claim",
        "check the audience",
    ),
    "unknown to Kubernetes": (
        "kubernetes",
        lambda v: setattr(v, "jwt", "another"),
        "403: permission denied",
        "binds the service account",
    ),
    "no such mount": ("approle", lambda v: v.auth_mounts.clear(), "403: permission denied", "check auth.mount"),
}


@pytest.mark.parametrize("name", REFUSED_LOGINS)
async def test_a_refused_login_says_what_to_do(client: VaultClient, vault: VaultServer, name: str) -> None:
    """The server answers with 400, 403 and 500: each is about the credentials, and a person has to act."""
    method, change, said, fix = REFUSED_LOGINS[name]
    change(vault)
    async with vault.serving(), client.open(client.settings(client.login(method))):
        error = await client.refused()
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert said in str(error)
    assert fix in str(error)


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        (NO_NAME, "has no common name, as SPIFFE certificates have none"),
        (None, "check that the certificate in certificate_file is valid"),
    ],
)
async def test_a_certificate_that_cannot_log_in_is_named(
    client: VaultClient, vault: VaultServer, subject: x509.Name | None, said: str
) -> None:
    """The server answers both with 500, which elsewhere means a fault of its own."""
    keys = client.certificate(clients_ca(vault), subject=subject)
    async with vault.serving(), client.open(client.settings(client.login("cert"), **keys)):
        if subject is None:
            client.clock.set_wall(2 * HOUR)  # TLS goes by the machine's own clock
        error = await client.refused()
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert said in str(error)


async def test_a_certificate_that_was_replaced_logs_in_again(client: VaultClient, vault: VaultServer) -> None:
    ca = clients_ca(vault)
    keys = client.certificate(ca)
    async with vault.serving(), client.open(client.settings(client.login("cert"), **keys)):
        await client.issue()
        client.certificate(ca)
        await client.issue()
        await client.issue()
    assert vault.count("auth/cert/login") == 2


# Tokens


async def test_a_token_in_a_file_is_read_for_every_request(client: VaultClient, vault: VaultServer) -> None:
    auth = client.token_auth()
    async with vault.serving(), client.open(client.settings(auth)):
        await client.issue()
        client.token_auth()
        await client.issue()
    shown = [each.headers["x-vault-token"] for each in vault.http.requests if each.path.endswith("sign/web")]
    assert shown == list(vault.tokens)


async def test_a_token_is_renewed_at_two_thirds_of_its_lease(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    """A secret ID may be good for one login alone: the token that it gave has to last."""
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.secret_ids.clear()
        for number in range(1, 4):
            await pass_time(client, timedelta(minutes=39))
            await client.clock.asleep()
            assert vault.count("auth/token/renew-self") == number - 1
            await pass_time(client, timedelta(minutes=2))
            await events.wait("token_renewed", count=number)
        await client.issue()
    assert vault.count("auth/approle/login") == 1


@pytest.mark.parametrize("step", [timedelta(days=-1), timedelta(days=1)])
async def test_a_clock_that_is_set_costs_no_token(
    client: VaultClient, vault: VaultServer, events: Events, step: timedelta
) -> None:
    """A secret ID may be good for one login alone. The server counts the time by a clock of its own."""
    began, passed = vault.now(), client.clock.passed()
    vault.now = lambda: began + timedelta(seconds=client.clock.passed() - passed)
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.secret_ids.clear()
        client.clock.set_wall(step)
        await pass_time(client, timedelta(minutes=41))
        await events.wait("token_renewed")
        await pass_time(client, timedelta(minutes=39))
        await client.answer()
    assert vault.count("auth/approle/login") == 1


async def test_a_periodic_token_in_a_file_does_not_end(client: VaultClient, vault: VaultServer, events: Events) -> None:
    auth = client.token_auth(ttl=HOUR, renewable=True)
    async with vault.serving(), client.open(client.settings(auth)):
        await client.issue()
        for number in range(1, 4):
            await pass_time(client, timedelta(minutes=41))
            await events.wait("token_renewed", count=number)
        await client.issue()
    assert vault.count("auth/token/lookup-self") == 1


def renewed_token(vault: VaultServer) -> str:
    """The one that was renewed, once."""
    (renewal,) = [each for each in vault.http.requests if each.path.endswith("renew-self")]
    return renewal.headers["x-vault-token"]


async def test_a_token_that_was_replaced_in_its_file_is_the_one_that_is_renewed(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    auth = client.token_auth(ttl=HOUR, renewable=True)
    async with vault.serving(), client.open(client.settings(auth)):
        await client.issue()
        await events.wait("token_looked_up")
        client.token_auth(ttl=HOUR, renewable=True)
        await client.issue()
        await events.wait("token_looked_up", count=2)
        await pass_time(client, timedelta(minutes=41))
        await events.wait("token_renewed")
    assert renewed_token(vault) == list(vault.tokens)[-1]


async def test_a_token_in_a_file_is_renewed_before_the_first_request(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    """After a restart the agent serves what it had stored, and may ask for nothing until the token has ended."""
    auth = client.token_auth(ttl=HOUR, renewable=True)
    async with vault.serving(), client.open(client.settings(auth)):
        await events.wait("token_looked_up")
        await pass_time(client, timedelta(minutes=41))
        await events.wait("token_renewed")
    assert vault.count("pki/sign/web") == 0


async def test_a_token_that_is_put_into_its_file_between_two_requests_is_renewed(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    auth = client.token_auth(ttl=HOUR, renewable=True)
    async with vault.serving(), client.open(client.settings(auth)):
        await client.issue()
        await events.wait("token_looked_up")
        auth.token_file.unlink()
        await client.clock.asleep(2)  # the one that renews, and the one that reads the file
        client.clock.elapse(timedelta(minutes=1))
        await client.clock.asleep(2)
        client.token_auth(ttl=HOUR, renewable=True)
        client.clock.elapse(timedelta(minutes=1))
        await events.wait("token_looked_up", count=2)
        await pass_time(client, timedelta(minutes=41))
        await events.wait("token_renewed")
    assert renewed_token(vault) == list(vault.tokens)[-1]


async def test_a_token_at_its_greatest_age_gives_way_to_a_login(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    """Renewals succeed up to its end and gain nothing: they are not tried faster and faster."""
    vault.login_most = timedelta(minutes=90)
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        for number in range(1, 3):
            await pass_time(client, timedelta(minutes=41))
            await events.wait("token_renewed", count=number)
        await client.issue()
        assert vault.count("auth/approle/login") == 1
        client.clock.elapse(timedelta(minutes=10))
        await client.issue()
    assert vault.count("auth/approle/login") == 2
    assert vault.count("auth/token/renew-self") == 2


@pytest.mark.parametrize("token", [{"batch": True, "ttl": HOUR}, {"ttl": HOUR}, {}], ids=["batch", "fixed", "root"])
async def test_a_token_that_cannot_be_renewed_is_used_and_left_alone(
    client: VaultClient, vault: VaultServer, events: Events, token: dict[str, Any]
) -> None:
    async with vault.serving(), client.open(client.settings(client.token_auth(**token))):
        await client.issue()
        looked_up = await events.wait("token_looked_up")
        client.clock.elapse(timedelta(minutes=50))
        await client.issue()
    assert looked_up["renewable"] is False
    assert vault.count("auth/token/renew-self") == 0
    assert events.named("token_not_renewed") == []


async def test_a_renewal_that_fails_is_tried_again_before_the_token_ends(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.sealed = True
        await pass_time(client, timedelta(minutes=41))
        failed = await events.wait("token_not_renewed")
        assert "503: Vault is sealed" in failed["cause"]
        vault.sealed = False
        await pass_time(client, timedelta(minutes=6))
        await events.wait("token_renewed")


async def test_a_renewal_without_an_answer_says_whose_it_is(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    asked = asyncio.Event()

    async def silent(_request: Request) -> None:
        asked.set()
        await asyncio.Event().wait()

    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.http.answer = silent
        await pass_time(client, timedelta(minutes=41))
        await asked.wait()
        client.clock.elapse(timedelta(seconds=11))
        failed = await events.wait("token_not_renewed")
    said = f"Vault at {vault.http.url} did not answer within 10 s; check that the network lets the agent through"
    assert failed["cause"] == said


async def test_a_policy_without_renewal_is_said_once(client: VaultClient, vault: VaultServer, events: Events) -> None:
    auth = client.token_auth(ttl=HOUR, renewable=True, policies=("sds-agent",))
    async with vault.serving(), client.open(client.settings(auth)):
        await client.issue()
        failed = await events.wait("token_not_renewed")
        await client.issue()
    assert "auth/token/lookup-self, as default does" in failed["cause"]
    assert len(events.named("token_not_renewed")) == 1


async def test_a_policy_without_renewal_is_said_again_of_a_token_after_a_good_one(
    client: VaultClient, vault: VaultServer, events: Events
) -> None:
    auth = client.token_auth(ttl=HOUR, renewable=True, policies=("sds-agent",))
    async with vault.serving(), client.open(client.settings(auth)):
        await client.issue()
        await events.wait("token_not_renewed")
        client.token_auth(ttl=HOUR, renewable=True)
        await client.issue()
        await events.wait("token_looked_up")
        client.token_auth(ttl=HOUR, renewable=True, policies=("sds-agent",))
        await client.issue()
        await events.wait("token_not_renewed", count=2)


@pytest.mark.parametrize("hashicorp", [False, True])
async def test_a_token_that_the_server_lost_is_replaced_at_once(
    client: VaultClient, vault: VaultServer, *, hashicorp: bool
) -> None:
    """As after a restart of a server without storage, or a revocation."""
    vault.hashicorp = hashicorp
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.tokens.clear()
        await client.issue()
    assert vault.count("auth/approle/login") == 2


async def test_a_token_is_given_up_only_for_another(client: VaultClient, vault: VaultServer) -> None:
    """A proxy may refuse what the server knows, when the secret ID that the token came from is spent."""
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        vault.secret_ids.clear()
        vault.intercept = lambda request: Reply(403, b"<html>") if request.path.endswith("sign/web") else None
        assert "400: invalid role or secret ID" in str(await client.refused())
        vault.intercept = None
        await client.issue()


async def test_a_policys_denial_causes_no_login(client: VaultClient, vault: VaultServer) -> None:
    async with vault.serving(), client.open(client.settings()):
        await client.issue()
        for token in vault.tokens.values():
            token.policies = ("default",)
        error = await client.refused()
    assert error.kind is ErrorKind.DENIED
    assert """echo 'path "pki/sign/web" { capabilities = ["update"] }' | vault policy write sds-agent-web -""" in str(
        error
    )
    assert vault.count("auth/approle/login") == 1


async def test_a_token_in_a_file_that_the_server_does_not_know_is_named(
    client: VaultClient, vault: VaultServer
) -> None:
    auth = client.token_auth()
    vault.tokens.clear()
    async with vault.serving(), client.open(client.settings(auth)):
        error = await client.refused()
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert f"the token in {auth.token_file} has ended, was revoked" in str(error)
    assert vault.count("pki/sign/web") == 1


# What a role forbids

TRAPS: dict[str, tuple[Callable[[Role], None], str]] = {
    "key type": (lambda r: setattr(r, "key_type", "rsa"), "vault patch pki/roles/web key_type=any"),
    "key size": (
        lambda r: r.__dict__.update(key_type="ec", key_bits=384),
        "vault patch pki/roles/web key_bits=256",
    ),
    "common name": (lambda r: setattr(r, "require_cn", True), "vault patch pki/roles/web require_cn=false"),
    "no URIs": (
        lambda r: setattr(r, "allowed_uri_sans", ()),
        f'vault patch pki/roles/web allowed_uri_sans="{ID}"',
    ),
    "other URIs": (
        lambda r: setattr(r, "allowed_uri_sans", ("spiffe://demo.example/api",)),
        f'as the list is replaced, fix the role: vault patch pki/roles/web allowed_uri_sans="{ID}"',
    ),
}


@pytest.mark.parametrize("name", TRAPS)
async def test_what_a_role_forbids_comes_with_the_command_that_fixes_it(
    client: VaultClient, vault: VaultServer, name: str
) -> None:
    change, command = TRAPS[name]
    change(vault.roles["web"])
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.DENIED
    assert command in str(error)
    assert "(400: " in str(error)


async def test_the_commands_of_a_new_role_work(client: VaultClient, vault: VaultServer) -> None:
    """One that is there with the server's defaults meets one refusal after another, each with its command."""
    vault.roles["web"] = role = Role()
    seen = []
    async with vault.serving(), client.open(client.settings()):
        for change in (
            {"key_type": "any"},
            {"require_cn": False},
            {"allowed_uri_sans": (ID,)},
        ):
            seen.append(str(await client.refused()))
            role.__dict__.update(change)
        await client.issue()
    assert ["key_type=any" in seen[0], "require_cn=false" in seen[1], "allowed_uri_sans=" in seen[2]] == [True] * 3


async def test_an_unknown_role_comes_with_the_command_that_makes_it(client: VaultClient, vault: VaultServer) -> None:
    vault.roles.clear()
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.INVALID
    made = f'vault write pki/roles/web allowed_uri_sans="{ID}" require_cn=false key_type=any'
    assert made in str(error)


async def test_the_commands_name_the_namespace(client: VaultClient, vault: VaultServer) -> None:
    vault.namespace = "team"
    vault.roles["web"].key_type = "rsa"
    async with vault.serving(), client.open(client.settings(namespace="team")):
        error = await client.refused()
    assert "vault patch -namespace=team pki/roles/web key_type=any" in str(error)


@pytest.mark.parametrize("flag", ["server_flag", "client_flag"])
async def test_a_role_whose_certificates_serve_one_side_is_named(
    client: VaultClient, vault: VaultServer, flag: str
) -> None:
    setattr(vault.roles["web"], flag, False)
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.MISMATCH
    assert f"vault patch pki/roles/web {flag}=true" in str(error)


async def test_a_certificate_without_the_name_is_never_success(client: VaultClient, vault: VaultServer) -> None:
    vault.roles["web"].use_csr_sans = False

    def without_uri_sans(request: Request) -> None:
        if request.path.endswith("sign/web"):
            object.__setattr__(request, "body", json.dumps(request.json | {"uri_sans": ""}).encode())

    vault.intercept = without_uri_sans
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.MISMATCH
    assert "signed a certificate without the URI" in str(error)
    assert "use_csr_sans=true" in str(error)


async def test_a_life_past_the_issuers_end_is_refused_with_three_ways_out(
    client: VaultClient, vault: VaultServer
) -> None:
    vault.issuers.clear()
    vault.add_root("short", lasts=timedelta(minutes=30))
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
        assert "shorten the workload's ttl, renew the issuer" in str(error)
        assert "vault patch pki/issuer/default leaf_not_after_behavior=truncate" in str(error)
        vault.issuers[vault.default].truncates = True
        await client.issue()


async def test_a_mount_without_a_default_issuer_is_named_though_the_server_blames_itself(
    client: VaultClient, vault: VaultServer
) -> None:
    vault.default = ""
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
        assert error.kind is ErrorKind.INVALID
        assert "(500: " in str(error)
        assert "vault write pki/config/issuers default=ID" in str(error)


@pytest.mark.parametrize("empty", [True, False])
async def test_a_mount_that_is_empty_or_not_there_is_named(
    client: VaultClient, vault: VaultServer, *, empty: bool
) -> None:
    if empty:
        vault.issuers.clear()
    else:
        vault.mount = "elsewhere"
    async with vault.serving(), client.open(client.settings()):
        error = await client.refused()
    assert error.kind is ErrorKind.INVALID
    assert ("has no issuer yet" if empty else "no PKI engine is mounted at pki") in str(error)


# Revocation


async def test_every_issuers_list_comes_with_its_certificate(client: VaultClient, vault: VaultServer) -> None:
    """Also that of a new issuer, in the middle of a rotation: its peers are refused without."""
    vault.add_root("root two", default=False)
    async with vault.serving(), client.open(client.settings(revocation_lists=True)):
        accepted = await client.issue()
        vault.revoked.append(accepted.leaf)
        advertised = await client.authority.lists()
    issuers = read_pem(advertised.issuers_pem)
    assert set(issuers) == vault.roots
    for issuer, found in zip(issuers, read_lists(advertised.lists), strict=True):
        assert is_signed_by(found.crl, issuer)
        assert found.crl.get_revoked_certificate_by_serial_number(accepted.leaf.serial_number) is not None


async def test_a_root_without_its_key_has_no_list(client: VaultClient, vault: VaultServer) -> None:
    """The server answers 500 for it, and the other issuers' lists are good all the same."""
    now = vault.now()
    root = make_ca("offline", not_before=now - HOUR, not_after=now + timedelta(days=30))
    vault.issuers.clear()
    intermediate = vault.add_intermediate("signer", root, import_root=True)
    async with vault.serving(), client.open(client.settings(revocation_lists=True)):
        advertised = await client.authority.lists()
    assert read_pem(advertised.issuers_pem) == (intermediate,)
    assert len(advertised.lists) == 1


async def test_a_list_that_there_was_and_cannot_be_read_is_an_error(client: VaultClient, vault: VaultServer) -> None:
    """Were it passed over, a CA that issues would seem to publish none."""
    async with vault.serving(), client.open(client.settings(revocation_lists=True)):
        await client.authority.lists()
        for issuer in vault.issuers.values():
            issuer.key = None
        with pytest.raises(AuthorityError):
            await client.authority.lists()


async def test_lists_take_no_token(client: VaultClient, vault: VaultServer) -> None:
    async with vault.serving(), client.open(client.settings(revocation_lists=True)):
        await client.authority.lists()
    assert all("x-vault-token" not in each.headers for each in vault.http.requests)
