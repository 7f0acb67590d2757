"""The adapter of EST before a stand-in that answers as the RFC and a real server do."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import est_server
from fakes.clocks import HandClock
from fakes.configurations import MINIMAL, problems
from fakes.est_server import CHANGED, PASSWORD, UNAUTHORIZED, USER, EstServer, pkcs7, refusal
from fakes.hierarchy import common_name, make_ca, make_leaf, new_key
from fakes.https_server import Reply, Request
from fakes.odd_certificates import NOT_READ
from msgspec import structs

from sds_agent.authority import registry
from sds_agent.authority.est.client import EstAuthority
from sds_agent.authority.est.settings import EstSettings
from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind, Issuance, IssueRequest
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.pki.certificates import read_bundle, read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem

ID = "spiffe://demo.example/web"
HOUR = timedelta(hours=1)


class Setting:
    """An EST server, and an authority that leads to it."""

    def __init__(self, server: EstServer, folder: Path) -> None:
        self.server = server
        self.renew_key()
        self.current: CurrentIdentity | None = None
        self.clock = HandClock(datetime.now(UTC))
        (folder / "server-roots.pem").write_bytes(server.http.roots_pem)
        (folder / "password").write_text(f"{PASSWORD}\n")
        self.chosen = EstSettings(
            url=server.http.url,
            ca_file=folder / "server-roots.pem",
            username=USER,
            password_file=folder / "password",
        )

    def renew_key(self) -> None:
        """A new key, and a request with it."""
        self.key = generate(KeyType.EC_P256)
        self.csr = make_csr(self.key, ID)

    async def issue(self) -> Issuance:
        request = IssueRequest(SpiffeId.parse(ID), self.csr, HOUR, "request", self.current)
        return await EstAuthority(self.chosen, self.clock).issue(request)

    async def enrolled(self) -> "Setting":
        """With the first certificate as the current one, and a new key."""
        issuance = await self.issue()
        self.current = CurrentIdentity(issuance.chain_pem, to_pkcs8_pem(self.key))
        self.renew_key()
        self.server.http.requests.clear()
        return self

    async def refused(self) -> AuthorityError:
        with pytest.raises(AuthorityError) as caught:
            await self.issue()
        return caught.value

    async def anchors(self) -> tuple[object, ...]:
        return read_pem(await EstAuthority(self.chosen, self.clock).anchors())

    def accepted(self, issuance: Issuance) -> Accepted:
        return accept(
            issuance,
            identity=SpiffeId.parse(ID),
            public_key=self.key.public_key(),
            anchors=(),
            now=datetime.now(UTC),
        )


@asynccontextmanager
async def setting(folder: Path) -> AsyncIterator[Setting]:
    server = EstServer()
    async with server.http.serving():
        yield Setting(server, folder)


# Enrolling


async def test_a_certificate_by_password_with_its_chain_and_root_is_accepted(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        accepted = it.accepted(await it.issue())
        assert accepted.chain[1:] == (it.server.ca.intermediate,)
        assert accepted.anchors == (it.server.ca.root,)
        assert accepted.warnings == ()
        assert [(each.method, each.path) for each in it.server.http.requests] == [
            ("GET", "/.well-known/est/cacerts"),
            ("POST", "/.well-known/est/simpleenroll"),
        ]
        asked = it.server.http.requests[1]
    assert "authorization" not in it.server.http.requests[0].headers, "no password for what is public"
    assert all(len(line) <= 76 for line in asked.body.split(b"\r\n"))
    assert asked.headers["content-transfer-encoding"] == "base64", "some servers insist on it"


async def test_a_client_certificate_enrolls_without_a_password(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        now, key = datetime.now(UTC), new_key()
        clients = make_ca("clients", not_before=now - HOUR, not_after=now + HOUR)
        leaf = make_leaf(clients, None, key=key, not_before=now - HOUR, not_after=now + HOUR)
        (tmp_path / "client.pem").write_bytes(write_pem([leaf]))
        (tmp_path / "key.pem").write_bytes(to_pkcs8_pem(key))
        it.server.http.trust = (clients.certificate,)
        async with it.server.http.serving():
            it.chosen = EstSettings(
                url=it.server.http.url,
                ca_file=tmp_path / "server-roots.pem",
                certificate_file=tmp_path / "client.pem",
                key_file=tmp_path / "key.pem",
            )
            assert it.accepted(await it.issue()).warnings == ()
        assert it.server.http.requests[-1].certificate == leaf


async def test_a_label_is_in_every_path(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.label = "mesh"
        error = await it.refused()
        assert (error.kind, "check url and label" in str(error)) == (ErrorKind.INVALID, True)
        it.chosen = structs.replace(it.chosen, label="mesh")
        assert it.accepted(await it.issue()).warnings == ()


async def test_a_request_that_waits_for_an_approval_is_pending_with_its_delay(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.approvals = 1
        error = await it.refused()
        assert (error.kind, error.retry_after) == (ErrorKind.PENDING, 3.0)
        assert "approve it there" in str(error)
        assert it.accepted(await it.issue()).warnings == ()
        first, second = (each.body for each in it.server.http.requests if each.method == "POST")
    assert first == second


@pytest.mark.parametrize("cacerts", [refusal(403, "no"), refusal(404, "no such site"), Reply(200, b"no certificates")])
async def test_a_refusal_of_the_cacerts_costs_no_approval(tmp_path: Path, cacerts: Reply) -> None:
    """Or else the next request has another key, and a person has to approve it anew."""
    async with setting(tmp_path) as it:
        it.server.approvals = 1
        authority = EstAuthority(it.chosen, it.clock)
        request = IssueRequest(SpiffeId.parse(ID), it.csr, HOUR, "request", None)

        async def refused() -> AuthorityError:
            with pytest.raises(AuthorityError) as caught:
                await authority.issue(request)
            return caught.value

        it.server.replies["cacerts"] = cacerts
        assert (await refused()).kind.ends_request, "where nothing waits it is a person who has to act"
        it.server.replies.clear()
        assert (await refused()).kind is ErrorKind.PENDING
        it.server.replies["cacerts"] = cacerts
        assert not (await refused()).kind.ends_request
        it.server.replies.clear()
        assert it.accepted(await authority.issue(request)).warnings == ()


# Renewing


async def test_a_renewal_shows_the_current_certificate_and_no_password(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        (tmp_path / "password").write_text("spent")
        assert it.accepted(await it.issue()).warnings == ()
        assert it.server.operations == ["simplereenroll"]
        shown = it.server.http.requests[-1]
        assert it.current is not None
        assert shown.certificate == read_pem(it.current.chain_pem)[0]
        assert "authorization" not in shown.headers


async def test_a_server_that_wants_a_password_beside_the_certificate_gets_both(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        it.server.renewals_need_the_password = True
        assert it.accepted(await it.issue()).warnings == ()
        assert it.server.operations == ["simplereenroll", "simplereenroll"]


async def test_a_changed_subject_is_enrolled_anew_and_named(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        now, key = datetime.now(UTC), new_key()
        ca = make_ca("clients", not_before=now - HOUR, not_after=now + HOUR)
        named = make_leaf(ca, ID, key=key, subject=common_name("web"), not_before=now - HOUR, not_after=now + HOUR)
        it.current = CurrentIdentity(write_pem([named]), to_pkcs8_pem(key))
        it.server.http.trust = (ca.certificate,)
        async with it.server.http.serving():
            it.chosen = structs.replace(it.chosen, url=it.server.http.url)
            (warning,) = it.accepted(await it.issue()).warnings
        assert it.server.operations == ["simplereenroll", "simpleenroll"]
    assert warning.startswith("the agent enrolled anew, as it could not renew: the EST server refused simplereenroll")
    assert f"(403: {CHANGED}); it renews for the same subject and SAN alone" in warning


@pytest.mark.parametrize("status", [401, 403, 404, 501])
async def test_a_server_that_does_not_renew_enrolls(tmp_path: Path, status: int) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        it.server.replies["simplereenroll"] = refusal(status, "no")
        assert f"({status}: no)" in it.accepted(await it.issue()).warnings[0]


async def test_why_it_did_not_renew_is_said_where_the_password_is_spent(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        (tmp_path / "password").write_text("spent")
        it.server.replies["simplereenroll"] = refusal(403, CHANGED)
        error = await it.refused()
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert str(error) == (
        f"the EST server refused simplereenroll (403: {CHANGED}), and the EST server refused simpleenroll (401: "
        "authorization required); check username and the password in password_file, or the client certificate"
    )


async def test_a_certificate_that_the_server_refuses_is_enrolled_anew(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        now, key = datetime.now(UTC), new_key()
        foreign = make_leaf(make_ca("foreign"), ID, key=key, not_before=now - HOUR, not_after=now + HOUR)
        it.current = CurrentIdentity(write_pem([foreign]), to_pkcs8_pem(key))
        (warning,) = it.accepted(await it.issue()).warnings
        assert it.server.operations == ["simpleenroll"]
    assert "ended the connection after the agent showed its certificate" in warning


async def test_an_expired_certificate_is_never_shown(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        it.clock.elapse(2 * HOUR)
        await it.issue()
        assert it.server.operations == ["simpleenroll"]
        assert it.server.http.requests[-1].certificate is None


async def test_a_renewal_that_fails_for_now_is_not_enrolled_anew(tmp_path: Path) -> None:
    """A password that can be used once must not be spent on an outage."""
    async with setting(tmp_path) as it:
        await it.enrolled()
        it.server.replies["simplereenroll"] = refusal(503, "busy", retry_after="7")
        error = await it.refused()
        assert (error.kind, error.retry_after) == (ErrorKind.TRANSIENT, 7.0)
        assert it.server.operations == ["simplereenroll"]


async def test_turned_off_no_certificate_is_shown(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        await it.enrolled()
        it.chosen = structs.replace(it.chosen, reenroll=False)
        await it.issue()
        assert it.server.operations == ["simpleenroll"]
        assert it.server.http.requests[-1].certificate is None


# Trust


async def test_every_self_signed_one_of_the_cacerts_is_a_root_and_no_other(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        new = make_ca("new root")
        crossed = make_ca("new root", make_ca("old root"), key=new.key)
        it.server.cacerts = [crossed.certificate, new.certificate, it.server.ca.root, it.server.ca.intermediate]
        assert await it.anchors() == (new.certificate, it.server.ca.root)
        issuance = await it.issue()
        assert set(read_pem(issuance.chain_pem)[1:]) == {crossed.certificate, it.server.ca.intermediate}


async def test_one_of_the_cacerts_that_cannot_be_read_is_told_beside_the_roots(tmp_path: Path) -> None:
    """It may be a root, and somebody has to hear that peers below it are refused (`anchors_left_out`)."""
    async with setting(tmp_path) as it:
        odd: Any = SimpleNamespace(public_bytes=lambda _encoding: NOT_READ["_ in PrintableString"])
        it.server.cacerts = [odd, it.server.ca.root, it.server.ca.intermediate]
        accepted = it.accepted(await it.issue())
        assert (accepted.anchors, len(accepted.left_out)) == ((it.server.ca.root,), 1)
        assert len(read_bundle(await EstAuthority(it.chosen, it.clock).anchors()).left_out) == 1
        it.server.cacerts = [odd, it.server.ca.intermediate]
        assert "none of the EST server's cacerts is self-signed" in str(await it.refused())


async def test_the_roots_in_a_file_are_the_only_ones(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.cacerts = [it.server.ca.intermediate]
        error = await it.refused()
        assert "name the root's file in roots_file" in str(error)
        assert it.server.operations == [], "no certificate is asked for that nothing vouches for"
        (tmp_path / "roots.pem").write_bytes(write_pem([it.server.ca.root]))
        it.chosen = structs.replace(it.chosen, roots_file=tmp_path / "roots.pem")
        assert it.accepted(await it.issue()).anchors == (it.server.ca.root,)
        it.server.http.requests.clear()
        assert await it.anchors() == (it.server.ca.root,)
        assert it.server.http.requests == []


# Refusals

REFUSALS = {
    "password": (est_server.UNAUTHORIZED, ErrorKind.UNAUTHENTICATED, "(401: authorization required); check username"),
    "digest": (refusal(401, "no", www_authenticate="Digest x"), ErrorKind.UNAUTHENTICATED, "no Basic authentication"),
    "policy": (refusal(403, "not yours"), ErrorKind.DENIED, "(403: not yours); let its policy give this user"),
    "csr": (refusal(400, "malformed PKCS10"), ErrorKind.INVALID, "(400: malformed PKCS10); check what its policy"),
    "content type": (refusal(415, "no"), ErrorKind.INVALID, "EST's requests are application/pkcs10"),
    "hasty": (refusal(429, "rate limit exceeded"), ErrorKind.THROTTLED, "asked less often"),
    "fault": (refusal(500, "internal server error"), ErrorKind.TRANSIENT, "read the server's own log"),
    "waited": (refusal(408, "too slow"), ErrorKind.TRANSIENT, "read the server's own log"),
    "redirect": (Reply(302), ErrorKind.INVALID, "(302); check url"),
    "nothing": (Reply(204), ErrorKind.INVALID, "nothing to answer with"),
    "page": (Reply(200, b"<html>"), ErrorKind.INVALID, "cannot be used: it is not base64; check that the server"),
    "garbage": (Reply(200, base64.b64encode(b"garbage" * 99)), ErrorKind.INVALID, "no PKCS#7 message in DER"),
    "empty": (pkcs7([]), ErrorKind.INVALID, "it holds no certificate"),
    "no body": (Reply(200), ErrorKind.INVALID, "no PKCS#7 message in DER"),
}
"""What a server answers to simpleenroll, who has to act, and a part of what a user reads."""


@pytest.mark.parametrize("name", REFUSALS)
async def test_each_refusal_says_who_has_to_act(tmp_path: Path, name: str) -> None:
    reply, kind, said = REFUSALS[name]
    async with setting(tmp_path) as it:
        it.server.replies["simpleenroll"] = reply
        error = await it.refused()
    assert (error.kind, said in str(error)) == (kind, True), str(error)
    assert "\n" not in str(error)


# Credentials


async def test_a_password_that_is_replaced_counts_from_the_next_request(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        (tmp_path / "password").write_text("wrong")
        assert (await it.refused()).kind is ErrorKind.UNAUTHENTICATED
        (tmp_path / "password").write_text(PASSWORD)
        assert it.accepted(await it.issue()).warnings == ()


async def test_a_password_that_the_server_sends_back_is_not_quoted(tmp_path: Path) -> None:
    basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    async with setting(tmp_path) as it:
        it.server.replies["simpleenroll"] = refusal(403, f"no {PASSWORD} for Basic {basic}")
        error = await it.refused()
    assert "no [token] for Basic [token]" in str(error)
    assert PASSWORD not in repr(error) + repr(it.chosen)


def test_what_is_wrong_with_the_credentials_is_said_before_the_first_call(tmp_path: Path) -> None:
    chosen = EstSettings(
        url="https://ca.example", ca_file=tmp_path / "r", username=USER, password_file=tmp_path / "password"
    )

    def found() -> list[str]:
        context = Context("corp", "demo.example", tmp_path, HandClock())
        return [f"{each.where[0]} {each.found}" for each in registry.kind("est").credentials(chosen, context)]

    (missing,) = found()
    assert missing.startswith("password_file cannot be used: ")
    (tmp_path / "password").write_text("two\nlines")
    (wrong,) = found()
    assert "one line of text" in wrong
    (tmp_path / "password").write_text(PASSWORD)
    assert found() == []


# Settings


WELL_KNOWN = "holds /.well-known/est"


@pytest.mark.parametrize(
    ("keys", "key", "found"),
    [
        ("url: https://ca.example, username: a, password_file: p", "ca_file", "is missing"),
        ("url: http://127.0.0.1, username: a, password_file: p", "url", "begins with http"),
        ("url: https://ca.example/.well-known/est, ca_file: r, username: a, password_file: p", "url", WELL_KNOWN),
        ("url: https://ca.example, ca_file: r", "username", "is missing"),
        ("url: https://ca.example, ca_file: r, username: a", "password_file", "is missing"),
        ("url: https://ca.example, ca_file: r, password_file: p", "username", "is missing"),
        ("url: https://ca.example, ca_file: r, certificate_file: c", "key_file", "is missing"),
        ("url: https://ca.example, ca_file: r, username: 'a:b', password_file: p", "username", 'is "a:b"'),
        ("url: https://ca.example, ca_file: r, username: a, password_file: p, label: a/b", "label", 'is "a/b"'),
    ],
)
def test_keys_that_do_not_go_together_are_named(tmp_path: Path, keys: str, key: str, found: str) -> None:
    first = problems(tmp_path, f"{MINIMAL}authorities: {{corp: {{type: est, {keys}}}}}\n")[0]
    assert (first.key, first.found) == (f"authorities.corp.{key}", found)


# A password that is good for one request


class OneTimePassword:
    """Lets the server take the password once, and answer that request when it is told to `go`."""

    def __init__(self, server: EstServer) -> None:
        self.spent, self.go = asyncio.Event(), asyncio.Event()
        self.server = server
        server.http.answer = self.answer

    async def answer(self, request: Request) -> Reply | bytes | None:
        reply = await self.server.answer(request)
        if "authorization" in request.headers:
            if self.spent.is_set():
                return UNAUTHORIZED
            self.spent.set()
            await self.go.wait()
        return reply


@asynccontextmanager
async def cancelled_with_its_password(
    chosen: Setting, folder: Path
) -> AsyncIterator[tuple[EstAuthority, IssueRequest, OneTimePassword]]:
    """An attempt that was cancelled when its password was spent, before the server's answer."""
    password = OneTimePassword(chosen.server)
    request = IssueRequest(SpiffeId.parse(ID), chosen.csr, HOUR, "request", chosen.current)
    context = Context("upstream", "demo.example", folder, chosen.clock)
    async with registry.kind("est").open(chosen.chosen, context) as authority:
        assert isinstance(authority, EstAuthority)
        attempt = asyncio.create_task(authority.issue(request))
        await password.spent.wait()
        attempt.cancel()
        await asyncio.wait([attempt])
        assert attempt.cancelled()
        yield authority, request, password


@pytest.mark.parametrize("renewing", [False, True])
async def test_the_next_attempt_takes_the_answer_that_a_password_was_spent_on(tmp_path: Path, renewing: bool) -> None:
    async with setting(tmp_path) as here:
        if renewing:
            await here.enrolled()
            here.server.renewals_need_the_password = True
        async with cancelled_with_its_password(here, tmp_path) as (authority, request, password):
            again = asyncio.create_task(authority.issue(request))
            password.go.set()
            here.accepted(await again)


async def test_a_request_with_a_password_ends_with_its_authority(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with setting(tmp_path) as here:
        async with cancelled_with_its_password(here, tmp_path) as (_, _, password):
            pass
        password.go.set()
    assert asyncio.all_tasks() == before
