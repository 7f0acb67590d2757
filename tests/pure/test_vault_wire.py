"""What Vault's answers say, how long its tokens last, and which settings go together: values alone."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, problems, settings

from sds_agent.authority.credentials import Token
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.authority.vault import wire
from sds_agent.authority.vault.lease import LEAST_WAIT, HeldToken, TokenLease
from sds_agent.authority.vault.refusals import VaultRefusal, not_listed, not_signed
from sds_agent.authority.vault.settings import VaultSettings, VaultTokenAuth

NOW = datetime(2026, 3, 14, 15, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
CHOSEN = VaultSettings(
    url=("https://vault.example:8200",), role="web", auth=VaultTokenAuth(token_file=Path("/token")), namespace="team"
)


def lease(lasts: timedelta | None = HOUR, since: datetime = NOW, *, renewable: bool = True) -> TokenLease:
    return TokenLease(since, lasts, renewable)


# How long a token lasts


def test_a_token_is_renewed_at_two_thirds() -> None:
    assert lease().renew_at == NOW + 40 * MINUTE
    assert lease(renewable=False).renew_at is None
    assert lease(None).renew_at is None
    assert lease(None).ends is None


def test_a_token_ends_at_the_end_of_its_lease() -> None:
    held = HeldToken(Token("s.x"), lease())
    assert held.is_good(NOW + HOUR - timedelta(seconds=1), "")
    assert not held.is_good(NOW + HOUR, "")
    assert HeldToken(Token("s.x"), lease(None)).is_good(NOW + 10_000 * HOUR, "")
    assert HeldToken(Token("s.x")).is_good(NOW, ""), "the server knows how long it lasts"
    assert not HeldToken(Token("s.x"), lease(), "mark").is_good(NOW, "another mark")


def test_a_periodic_token_is_renewed_for_ever() -> None:
    current = lease()
    for _ in range(100):
        assert current.renew_at is not None
        current = current.followed_by(lease(since=current.renew_at))
    assert current.renewable


def test_renewals_near_a_greatest_age_come_to_an_end() -> None:
    """Each gives what is left alone, so without an end they would come ever faster."""
    most, current = NOW + 10 * HOUR, lease()
    renewals = 0
    while (now := current.renew_at) is not None and renewals < 20:
        renewals += 1
        current = current.followed_by(lease(min(HOUR, most - now), now))
    assert renewals < 20
    assert current.renew_at is None
    assert current.ends == most


def test_a_renewal_that_failed_is_tried_again_until_the_end_and_not_at_every_moment() -> None:
    current, attempts = lease(), 0
    while (when := current.renew_at) is not None and attempts < 40:
        assert when < NOW + HOUR + LEAST_WAIT
        attempts += 1
        current = current.after_failure(when)
    assert 5 < attempts < 40


# What answers say


def test_a_certificate_and_its_chain_are_separate_blocks_of_pem() -> None:
    """The server ends none of them with a line break."""
    data = {"certificate": "-----A-----", "issuing_ca": "-----B-----", "ca_chain": ["-----B-----", "-----C-----"]}
    signed = wire.read_signed(json.dumps({"data": data, "warnings": ["a\nb"] * 50}).encode())
    assert signed.chain == b"-----A-----\n-----B-----\n-----B-----\n-----C-----\n"
    assert signed.issuer == b"-----B-----"
    assert signed.warnings == ("a b",) * wire.MOST_WARNINGS


def test_an_answer_without_a_chain_still_has_the_issuer() -> None:
    data = {"certificate": "-----A-----", "issuing_ca": "-----B-----"}
    assert wire.read_signed(json.dumps({"data": data, "warnings": None}).encode()).chain.endswith(b"-----B-----\n")


@pytest.mark.parametrize("text", ["", "s.a b", "s.\n", "s.ö"])
def test_a_token_that_no_header_can_hold_is_no_token(text: str) -> None:
    with pytest.raises(AuthorityError) as refused:
        wire.read_login(json.dumps({"auth": {"client_token": text}}).encode(), NOW)
    assert refused.value.kind is ErrorKind.INVALID


def test_what_is_no_answer_is_not_quoted() -> None:
    with pytest.raises(AuthorityError) as refused:
        wire.read_login(b'{"auth": {"client_token": 5, "hunter2": "hunter2"', NOW)
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"errors":["1 error occurred:\\n\\t* permission denied\\n\\n"]}', "1 error occurred: * permission denied"),
        (b'{"errors":["one","two s.hunter2"]}', "one; two [token]"),
        (b'{"errors":[]}', ""),
        (b"<html>\n <b>502</b>", "<html> <b>502</b>"),
        (b"\xff", "?"),
    ],
)
def test_the_servers_words_are_one_line(body: bytes, said: str) -> None:
    assert wire.words(body, [Token("s.hunter2")]) == said


@pytest.mark.parametrize(
    ("said", "denied"),
    [
        ("1 error occurred: * permission denied", True),
        ("permission denied", False),
        ("2 errors occurred: * permission denied * invalid token", False),
        ("1 error occurred: * invalid token", False),
        ("bad token", False),
    ],
)
def test_a_policys_denial_is_distinguished_from_an_unknown_token(said: str, *, denied: bool) -> None:
    """A login helps against the one alone."""
    assert wire.is_policys_denial(said) is denied
    error = not_signed(VaultRefusal("Vault", 403, said), CHOSEN, "spiffe://demo.example/web")
    assert error.kind is (ErrorKind.DENIED if denied else ErrorKind.UNAUTHENTICATED)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ErrorKind.INVALID),
        (404, ErrorKind.INVALID),
        (405, ErrorKind.INVALID),
        (408, ErrorKind.TRANSIENT),
        (412, ErrorKind.TRANSIENT),
        (429, ErrorKind.THROTTLED),
        (472, ErrorKind.TRANSIENT),
        (473, ErrorKind.TRANSIENT),
        (500, ErrorKind.TRANSIENT),
        (502, ErrorKind.TRANSIENT),
        (503, ErrorKind.TRANSIENT),
    ],
)
def test_a_status_alone_says_little(status: int, kind: ErrorKind) -> None:
    said = VaultRefusal("Vault", status, "words", 7.0)
    assert not_signed(said, CHOSEN, "spiffe://demo.example/web").kind is kind
    assert not_listed(said, CHOSEN).kind is kind
    assert not_listed(said, CHOSEN).retry_after == 7.0


# Settings

LEAST = "type: vault, url: 'https://v:1', ca_file: r, role: web"


@pytest.mark.parametrize(
    ("keys", "key", "found"),
    [
        ("type: vault, url: 'https://v:1', role: web, auth: {type: token, token_file: t}", "ca_file", "is missing"),
        (
            "type: vault, url: 'http://127.0.0.1:1', ca_file: r, role: w, auth: {type: token, token_file: t}",
            "ca_file",
            "is given",
        ),
        (
            "type: vault, url: ['https://v:1', 'http://127.0.0.1:1'], role: w, auth: {type: token, token_file: t}",
            "url",
            "has both http and https",
        ),
        (f"{LEAST}, auth: {{type: aprole}}", "auth.type", 'is "aprole"'),
        (f"{LEAST}, auth: {{role_id: x}}", "auth.type", "is missing"),
        (f"{LEAST}, auth: {{type: approle, role_id: x, token_file: t}}", "auth.token_file", "is not a known key"),
        (f"{LEAST}, auth: {{type: kubernetes}}", "auth.role", "is missing"),
        (f"{LEAST}, auth: {{type: jwt}}", "auth.jwt_file", "is missing"),
        (f"{LEAST}, certificate_file: c, auth: {{type: cert}}", "key_file", "is missing"),
        (f"{LEAST}, key_file: c, auth: {{type: token, token_file: t}}", "certificate_file", "is missing"),
        ("type: vault, url: 'http://127.0.0.1:1', role: web, auth: {type: cert}", "auth.type", "is cert"),
        (f"{LEAST}, mount: /pki, auth: {{type: token, token_file: t}}", "mount", 'is "/pki"'),
        (f"{LEAST}, mount: v1/pki, auth: {{type: token, token_file: t}}", "mount", 'is "v1/pki"'),
        (f"{LEAST}, role: a/b, auth: {{type: token, token_file: t}}".replace("role: web, ", ""), "role", 'is "a/b"'),
    ],
)
def test_a_wrong_key_is_named_with_what_to_do(tmp_path: Path, keys: str, key: str, found: str) -> None:
    text = f"{MINIMAL}authorities: {{upstream: {{{keys}}}}}\n"
    (problem,) = problems(tmp_path, text)
    assert (problem.key, problem.found) == (f"authorities.upstream.{key}", found)
    assert problem.fix


def test_one_url_is_a_list_of_one(tmp_path: Path) -> None:
    text = f"{MINIMAL}authorities: {{upstream: {{{LEAST}, auth: {{type: token, token_file: t}}}}}}\n"
    chosen = settings(tmp_path, text).authorities["upstream"]
    assert isinstance(chosen, VaultSettings)
    assert chosen.url == ("https://v:1",)
    assert chosen.auth == VaultTokenAuth(token_file=tmp_path / "t")
