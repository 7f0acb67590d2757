"""The adapter of CFSSL before a stand-in that words its errors as CFSSL does."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fakes.cfssl_server import KEY, MESH, NO_BUNDLER, CfsslServer, refusal, success, text
from fakes.clocks import HandClock
from fakes.configurations import MINIMAL, problems
from fakes.hierarchy import SERVER_AND_CLIENT, make_ca, make_leaf, new_key
from fakes.https_server import Answer, Reply, Request
from msgspec import structs

from sds_agent.authority import registry
from sds_agent.authority.cfssl.client import CfsslAuthority
from sds_agent.authority.cfssl.settings import CfsslSettings
from sds_agent.authority.cfssl.wire import MOST_MESSAGES
from sds_agent.authority.http_client import CertificateRefusedError
from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem

ID = "spiffe://demo.example/web"
HOUR = timedelta(hours=1)


class Setting:
    """A CFSSL, and an authority that leads to it."""

    def __init__(self, server: CfsslServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.key = generate(KeyType.EC_P256)
        (folder / "server-roots.pem").write_bytes(server.http.roots_pem)
        (folder / "hmac").write_text(f"{KEY.hex()}\n")
        (folder / "roots.pem").write_bytes(write_pem([server.ca.root]))
        self.chosen = CfsslSettings(
            url=server.http.url,
            ca_file=folder / "server-roots.pem",
            auth_key_file=folder / "hmac",
            profile="mesh",
            bundle=True,
        )

    def with_roots(self) -> "Setting":
        self.chosen = structs.replace(self.chosen, roots_file=self.folder / "roots.pem", bundle=False)
        return self

    async def issue(self, ttl: timedelta = HOUR) -> Issuance:
        csr = make_csr(self.key, ID)
        authority = CfsslAuthority(self.chosen, HandClock(datetime.now(UTC)))
        return await authority.issue(IssueRequest(SpiffeId.parse(ID), csr, ttl, "request"))

    async def refused(self) -> AuthorityError:
        with pytest.raises(AuthorityError) as caught:
            await self.issue()
        return caught.value

    async def anchors(self) -> tuple[object, ...]:
        return read_pem(await CfsslAuthority(self.chosen, HandClock()).anchors())

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
    server = CfsslServer()
    async with server.http.serving():
        yield Setting(server, folder)


def replying(reply: Reply) -> Answer:
    async def answer(_: Request) -> Reply:
        return reply

    return answer


# What comes, and what is asked for


async def test_a_certificate_by_authsign_with_its_chain_and_root_is_accepted(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        accepted = it.accepted(await it.issue())
        assert accepted.chain[1:] == (it.server.ca.intermediate,)
        assert accepted.anchors == (it.server.ca.root,)
        assert accepted.warnings == ()
        (_, asked) = it.server.asked[0]
    assert set(asked) == {"certificate_request", "profile", "bundle"}, "an empty list of hosts would drop the SAN"


async def test_a_default_profile_without_usages_costs_no_certificate(tmp_path: Path) -> None:
    """Most servers have `"default": {"expiry": "8760h"}` alone; Go writes a list that is not there as null."""
    async with setting(tmp_path) as it:
        it.server.profiles[""] = {"usages": None, "expiry": "8760h"}
        accepted = it.accepted(await it.issue())
        assert accepted.anchors == (it.server.ca.root,)
        assert accepted.warnings == ()
        assert await it.anchors() == (it.server.ca.root,)


async def test_without_a_key_the_agent_asks_by_sign_and_for_a_label(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.auth_key = None
        it.chosen = structs.replace(it.chosen, auth_key_file=None, label="primary")
        assert it.accepted(await it.issue()).warnings == ()
        assert [(endpoint, asked["label"]) for endpoint, asked in it.server.asked] == [
            ("sign", "primary"),
            ("info", "primary"),
            ("info", "primary"),
        ]


async def test_a_root_that_signs_by_itself_is_the_anchor(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.signer = it.server.ca.root
        it.chosen = structs.replace(it.chosen, bundle=False)
        assert await it.anchors() == (it.server.ca.root,)
        assert read_pem((await it.issue()).anchors_pem or b"") == (it.server.ca.root,)


async def test_the_roots_in_a_file_are_the_only_ones(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        other = make_ca("other")
        (tmp_path / "roots.pem").write_bytes(write_pem([other.certificate]))
        it.with_roots()
        assert await it.anchors() == (other.certificate,)
        assert it.server.http.requests == []
        assert read_pem((await it.issue()).anchors_pem or b"") == (other.certificate,)


async def test_an_intermediate_is_never_an_anchor_by_itself(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        assert await it.anchors() == (it.server.ca.root,), "the root of the bundle"
        it.chosen = structs.replace(it.chosen, bundle=False)
        error = await it.refused()
    assert error.kind is ErrorKind.INVALID
    assert "name the root's file in roots_file, or turn bundle on" in str(error)


async def test_without_bundle_files_the_server_is_named_as_lacking_them(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.bundles = False
        assert "start CFSSL with -ca-bundle and -int-bundle, or name the roots in roots_file" in str(await it.refused())
        it.with_roots()
        it.chosen = structs.replace(it.chosen, bundle=True)
        assert it.accepted(await it.issue()).warnings == (f"CFSSL says: {NO_BUNDLER}",)


async def test_of_a_flood_of_messages_the_first_become_warnings(tmp_path: Path) -> None:
    """Each of them is logged."""
    async with setting(tmp_path) as it:
        sign = it.server.do_sign
        flood = [{"code": 1, "message": str(number)} for number in range(MOST_MESSAGES + 1)]
        it.server.do_sign = lambda asked: success(json.loads(sign(asked).body)["result"], *flood)  # type: ignore[method-assign]
        warned = [each for each in (await it.issue()).warnings if each.startswith("CFSSL says: ")]
    assert warned == [f"CFSSL says: {number}" for number in range(MOST_MESSAGES)]


async def test_a_server_without_info_serves_where_the_roots_are_in_a_file(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.off = {"info"}
        error = await it.refused()
        assert (error.kind, "name the roots in roots_file" in str(error)) == (ErrorKind.DENIED, True)
        it.with_roots()
        it.chosen = structs.replace(it.chosen, bundle=True)
        assert it.accepted(await it.issue()).chain[1:] == (it.server.ca.intermediate,)


# What CFSSL answers success to


async def test_a_dropped_san_is_named_with_its_cause(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.ca.issue = it.server.ca.without_name
        error = await it.refused()
    assert error.kind is ErrorKind.MISMATCH
    assert "CFSSL answered success and dropped the SAN" in str(error)
    assert "CFSSL before 1.3, such as Debian's 1.2.0" in str(error)


async def test_an_unknown_profile_is_named_in_a_warning(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.profiles = {"": MESH, "mesh": {**MESH, "expiry": "1h2m0s1ms"}}
        it.chosen = structs.replace(it.chosen, profile="mash")
        (warning,) = (await it.issue()).warnings
    assert warning.startswith("info says of the profile 'mash' what it says of CFSSL's default one")


async def test_an_unknown_profile_that_gives_too_little_is_named_in_the_error(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.profiles[""] = {"usages": ["signing", "server auth"], "expiry": "1h2m"}
        it.server.answers["authsign"] = replying(success({"certificate": server_only(it)}))
        it.chosen = structs.replace(it.chosen, profile="mash")
        error = await it.refused()
        assert error.kind is ErrorKind.MISMATCH
        assert "signed with the profile 'mash' and without client auth; it takes the default profile" in str(error)
        it.chosen = structs.replace(it.chosen, profile=None)
        assert "signed with its default profile and without client auth; name a profile" in str(await it.refused())
        it.chosen = structs.replace(it.chosen, profile="mesh")
        assert "so another one signed: check for a second CFSSL behind url" in str(await it.refused())


def server_only(it: Setting) -> str:
    ca, now = make_ca("ca"), datetime.now(UTC)
    leaf = make_leaf(ca, ID, key=it.key, usages=SERVER_AND_CLIENT[:1], not_before=now - HOUR, not_after=now + HOUR)
    return write_pem([leaf]).decode()


async def test_a_lifetime_that_nobody_asked_for_is_named(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        (warning,) = (await it.issue(timedelta(hours=24))).warnings
        assert "and ttl is 24h; CFSSL takes no lifetime from the agent" in warning
        it.server.profiles["mesh"] = {**MESH, "expiry": "24h"}
        (warning,) = (await it.issue()).warnings
        assert warning.startswith("the certificate's lifetime is 1h2m, and info says 24h of the profile 'mesh'")


# Refusals

REFUSALS = {
    "token": (refusal(400, "invalid token"), ErrorKind.UNAUTHENTICATED, "(invalid token); put the key"),
    "no provider": (refusal(400, "no authentication provider"), ErrorKind.DENIED, "correct profile, or leave auth_key"),
    "csr": (refusal(9002, "x509: malformed"), ErrorKind.INVALID, "(9002: x509: malformed); check that the server is"),
    "whitelist": (refusal(5500, "unmatched"), ErrorKind.DENIED, "let the profile's name_whitelist match"),
    "policy": (refusal(5300, "Invalid policy"), ErrorKind.DENIED, "change the profile"),
    "no usages": (refusal(5100, "no usages"), ErrorKind.DENIED, '"server auth", "client auth"]'),
    "bundle": (refusal(1220, "unknown authority"), ErrorKind.INVALID, "into the file of -ca-bundle"),
    "its key": (refusal(2100, "Encrypted"), ErrorKind.TRANSIENT, "read CFSSL's own log"),
    "its database": (refusal(11100, "Insertion failed"), ErrorKind.TRANSIENT, "read CFSSL's own log"),
    "a CFSSL behind it": (refusal(7500, "Server request failed"), ErrorKind.TRANSIENT, "read CFSSL's own log"),
    "another fault": (refusal(500, "disk is full", 500), ErrorKind.TRANSIENT, "(disk is full); read CFSSL's own log"),
    "label": (refusal(400, "bad label"), ErrorKind.INVALID, "label names no signer"),
    "method": (refusal(405, "method is not allowed", 405), ErrorKind.INVALID, "check that the server is CFSSL"),
    "off": (text("404 page not found", 404), ErrorKind.DENIED, "leave auth_key_file out, and check url"),
    "name": (text("Invalid CN", 403), ErrorKind.UNAUTHENTICATED, "(403: Invalid CN); the client certificate's common"),
    "hasty": (text("slow down", 429), ErrorKind.THROTTLED, "asked less often"),
    "waited": (text("Request Time-out", 408), ErrorKind.TRANSIENT, "(408: Request Time-out)"),
    "proxy": (text("Bad Gateway", 502), ErrorKind.TRANSIENT, "(502: Bad Gateway)"),
    "redirect": (Reply(301), ErrorKind.INVALID, "(301); check that the server at url is CFSSL"),
    "page": (Reply(200, b"<html>"), ErrorKind.INVALID, "check that the server at url is CFSSL"),
    "deep": (Reply(200, b'{"success": true, "result": ' + b"[" * 100_000), ErrorKind.INVALID, "check that the server"),
    "untrue": (refusal(5500, "unmatched", 200), ErrorKind.DENIED, "name_whitelist"),
    "empty": (success({"certificate": ""}), ErrorKind.INVALID, "holds no certificate that can be read"),
    "other": (success({"certificates": []}), ErrorKind.INVALID, "check that the server at url is CFSSL"),
}
"""What CFSSL answers to authsign, who has to act, and a part of what a user reads."""


@pytest.mark.parametrize("name", REFUSALS)
async def test_each_refusal_says_who_has_to_act(tmp_path: Path, name: str) -> None:
    reply, kind, said = REFUSALS[name]
    async with setting(tmp_path) as it:
        it.server.answers["authsign"] = replying(reply)
        error = await it.refused()
    assert error.kind is kind
    assert said in str(error)
    assert "\n" not in str(error)


async def test_sign_that_is_off_asks_for_the_key(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.chosen = structs.replace(it.chosen, auth_key_file=None)
        error = await it.refused()
    assert "every profile has an auth_key: name the key in auth_key_file" in str(error)


async def test_a_delay_that_the_server_names_is_kept(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.answers["authsign"] = replying(Reply(503, b"", {"retry-after": "7"}))
        error = await it.refused()
    assert (error.kind, error.retry_after) == (ErrorKind.TRANSIENT, 7.0)


# Credentials


async def test_a_key_that_is_replaced_counts_from_the_next_request(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        it.server.auth_key = b"another"
        assert (await it.refused()).kind is ErrorKind.UNAUTHENTICATED
        (tmp_path / "hmac").write_text(b"another".hex())
        assert it.accepted(await it.issue()).warnings == ()


@pytest.mark.parametrize("content", ["", "no hex", "abc", "ab\ncd", "0xab"])
async def test_a_file_without_a_key_is_named_and_not_quoted(tmp_path: Path, content: str) -> None:
    async with setting(tmp_path) as it:
        (tmp_path / "hmac").write_text(content)
        error = await it.refused()
        assert it.server.http.requests == []
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert f"{tmp_path}/hmac" in str(error)
    assert not content or content not in str(error).replace(str(tmp_path), "")


async def test_the_key_is_in_no_request_and_no_error(tmp_path: Path) -> None:
    async def echo(request: Request) -> Reply:
        return refusal(400, request.body.decode())

    async with setting(tmp_path) as it:
        it.server.answers["authsign"] = echo
        error = await it.refused()
        (request,) = it.server.http.requests
    assert KEY.hex() not in str(error) + repr(error) + request.body.decode()
    assert len(str(error)) < 1000


async def test_a_client_certificate_is_shown_and_its_refusal_named(tmp_path: Path) -> None:
    async with setting(tmp_path) as it:
        now, key = datetime.now(UTC), new_key()
        ca = make_ca("clients", not_before=now - HOUR, not_after=now + HOUR)
        it.server.http.trust, it.server.http.require = (ca.certificate,), True
        async with it.server.http.serving():
            (tmp_path / "key.pem").write_bytes(to_pkcs8_pem(key))
            files = {"certificate_file": tmp_path / "client.pem", "key_file": tmp_path / "key.pem"}
            it.chosen = structs.replace(it.chosen, url=it.server.http.url, **files)
            expired = make_leaf(ca, None, key=key, not_before=now - HOUR, not_after=now - HOUR / 2)
            (tmp_path / "client.pem").write_bytes(write_pem([expired]))
            assert isinstance(await it.refused(), CertificateRefusedError)
            good = make_leaf(ca, None, key=key, not_before=now - HOUR, not_after=now + HOUR)
            (tmp_path / "client.pem").write_bytes(write_pem([good]))
            assert it.accepted(await it.issue()).warnings == ()
        assert it.server.http.requests[-1].certificate == good


def credentials(chosen: CfsslSettings, folder: Path) -> list[str]:
    context = Context("corp", "demo.example", folder, HandClock())
    return [f"{each.where[0]} {each.found}; {each.fix}" for each in registry.kind("cfssl").credentials(chosen, context)]


def test_what_is_wrong_with_the_credentials_is_said_before_the_first_call(tmp_path: Path) -> None:
    now = HandClock().now()
    ca, key = make_ca("clients"), new_key()
    (tmp_path / "key.pem").write_bytes(to_pkcs8_pem(key))
    chosen = CfsslSettings(
        url="https://ca.example:8888",
        ca_file=tmp_path / "roots.pem",
        auth_key_file=tmp_path / "hmac",
        certificate_file=tmp_path / "client.pem",
        key_file=tmp_path / "key.pem",
    )

    def client(**changed: object) -> None:
        leaf = make_leaf(ca, None, key=key, **changed)  # type: ignore[arg-type]
        (tmp_path / "client.pem").write_bytes(write_pem([leaf]))

    (tmp_path / "hmac").write_text("no hex")
    key_problem, pair_problem = credentials(chosen, tmp_path)
    assert key_problem.startswith("auth_key_file cannot be used: the file ")
    assert pair_problem.startswith("certificate_file cannot be used: ")
    (tmp_path / "hmac").write_text(KEY.hex())
    client(not_after=now - HOUR / 4)
    assert credentials(chosen, tmp_path) == [
        "certificate_file has a certificate that expired at 2026-03-14 14:54:26 UTC; renew it"
    ]
    client(not_before=now + HOUR / 4)
    (problem,) = credentials(chosen, tmp_path)
    assert problem.startswith("certificate_file has a certificate that is valid only from 2026-03-14 15:24:26 UTC")
    client(usages=SERVER_AND_CLIENT[:1])
    (problem,) = credentials(chosen, tmp_path)
    assert "lacks clientAuth" in problem
    client()
    assert credentials(chosen, tmp_path) == []


# Settings


@pytest.mark.parametrize(
    ("keys", "key", "found"),
    [
        ("url: https://ca.example:8888", "ca_file", "is missing"),
        ("url: http://127.0.0.1:8888, ca_file: r", "ca_file", "is given"),
        ("url: http://ca.example:8888", "url", 'is "http://ca.example:8888"'),
        ("url: https://ca.example, ca_file: r, key_file: k", "certificate_file", "is missing"),
        ("url: https://ca.example, ca_file: r, certificate_file: c", "key_file", "is missing"),
        ("url: http://127.0.0.1, certificate_file: c, key_file: k", "certificate_file", "is given"),
        ("url: https://ca.example, ca_file: r, profile: ''", "profile", 'is ""'),
    ],
)
def test_keys_that_do_not_go_together_are_named(tmp_path: Path, keys: str, key: str, found: str) -> None:
    first = problems(tmp_path, f"{MINIMAL}authorities: {{corp: {{type: cfssl, {keys}}}}}\n")[0]
    assert (first.key, first.found) == (f"authorities.corp.{key}", found)
