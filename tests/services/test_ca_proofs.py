"""Who is who to our CA, over real TLS: by a token, a certificate or a join token, and by nothing else."""

import base64
import hmac
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fakes.ca_servers import (
    AUDIENCE,
    ISSUER,
    TRUST_DOMAIN,
    WEB,
    Served,
    TokenIssuer,
    ask,
    refused,
    served,
)

from sds_agent.ca.jwt import LONGEST_TOKEN, TokenCallers
from sds_agent.ca.refusal import RefusalError
from sds_agent.ca.server import serving
from sds_agent.ca.settings import load
from sds_agent.clock import SystemClock
from sds_agent.pki.certificates import extended_key_usages, read_pem, serial_hex, subject_alternative_uris, write_pem
from sds_agent.pki.keys import KeyType, generate


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as it:
        yield it


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
async def test_a_service_account_token_gets_its_own_identity(ca: Served, algorithm: str) -> None:
    got = await ca.ask(ca.issuer.token(algorithm), uri=f"spiffe://{TRUST_DOMAIN}/somebody/else")
    assert subject_alternative_uris(got.leaf) == (WEB,), "the CSR has no say in the name"
    assert len(extended_key_usages(got.leaf)) == 2
    (line,) = ca.audit
    assert line["serial"] == serial_hex(got.leaf)
    assert (line["spiffe_id"], line["caller"], line["proof"]) == (WEB, WEB, "jwt")
    assert line["not_after"] == got.leaf.not_valid_after_utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def test_a_certificate_renews_without_a_token_and_counts_before_one(ca: Served) -> None:
    first = await ca.ask(ca.issuer.token())
    await ca.ask(identity=first)
    other = ca.issuer.token(sub="system:serviceaccount:default:other")
    both = await ca.ask(other, first)
    assert subject_alternative_uris(both.leaf) == (WEB,)
    assert [line["proof"] for line in ca.audit] == ["jwt", "certificate", "certificate"]
    shown = f"serial {serial_hex(first.leaf)}"
    assert [line["proof_detail"] for line in ca.audit] == [f"issuer {ISSUER}", shown, shown]


async def test_a_caller_without_a_proof_gets_no_certificate(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask()
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "no proof")


LATE = datetime.now(UTC) - timedelta(minutes=1)


BAD_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"exp": LATE}, "expired"),
    "endless": ({"exp": None}, "never expires"),
    "another audience": ({"aud": "vault"}, "audience"),
    "no audience": ({"aud": None}, "audience"),
    "another issuer": ({"iss": "https://elsewhere"}, "issuer"),
    "not yet": ({"nbf": datetime.now(UTC) + timedelta(hours=1)}, "valid only from"),
    "a user": ({"sub": "system:admin"}, "service account"),
    "more than a name": ({"sub": "system:serviceaccount:default:web:admin"}, "service account"),
    "a path in the name": ({"sub": "system:serviceaccount:default:a/b"}, "slash"),
    "a path in the namespace": ({"sub": "system:serviceaccount:default/sa/web:x"}, "slash"),
    "no name": ({"sub": "system:serviceaccount:default:"}, "SPIFFE ID"),
}


@pytest.mark.parametrize(("claims", "words"), BAD_CLAIMS.values(), ids=list(BAD_CLAIMS))
async def test_a_token_that_is_not_good_gets_nothing(ca: Served, claims: dict[str, Any], words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(**claims))
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, words)


async def test_an_unsigned_token_gets_nothing(ca: Served) -> None:
    token = jwt.encode(jwt.decode(ca.issuer.token(), options={"verify_signature": False}), "", "none")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "not signed by")


async def test_a_public_key_is_no_shared_secret(ca: Served) -> None:
    """The issuer's keys are public, so any caller could "sign" a token with one by HMAC."""
    _, claims, _ = ca.issuer.token().split(".")
    for name, key in ca.issuer.keys.items():
        header = encoded(json.dumps({"alg": "HS256", "typ": "JWT", "kid": name}).encode())
        form = (PublicFormat.SubjectPublicKeyInfo,)
        for secret in (key.public_key().public_bytes(kind, *form) for kind in (Encoding.PEM, Encoding.DER)):
            signature = hmac.digest(secret, f"{header}.{claims}".encode(), "sha256")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(f"{header}.{claims}.{encoded(signature)}")
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert {line["reason"] for line in ca.audit} == {"the token is not signed by RS256, ES256 or EdDSA"}


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def test_a_key_verifies_only_by_its_own_algorithm(ca: Served) -> None:
    """The header chooses among the issuer's keys, never how one of them is used."""
    header, claims, _ = ca.issuer.token("RS256").split(".")
    _, _, signature = ca.issuer.token("ES256").split(".")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(f"{header}.{claims}.{signature}")
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "key of its issuer")


async def test_a_bound_service_account_token_is_mapped_by_its_subject(ca: Served) -> None:
    """What a kubelet puts into a projected volume; what its claim kubernetes.io adds changes nothing."""
    bound: dict[str, Any] = {
        "namespace": "default",
        "node": {"name": "n1", "uid": "1"},
        "pod": {"name": "web-7d", "uid": "2"},
        "serviceaccount": {"name": "web", "uid": "3"},
    }
    reported: dict[str, Any] = {"kubernetes.io": bound, "iat": datetime.now(UTC), "jti": "4"}
    got = await ca.ask(ca.issuer.token(**reported))
    assert subject_alternative_uris(got.leaf) == (WEB,)


async def test_a_legacy_service_account_token_gets_nothing(ca: Served) -> None:
    """Those in Secrets have the same subject, but neither an end nor an audience: a thief has one for good."""
    legacy: dict[str, Any] = {
        "iss": "kubernetes/serviceaccount",
        "kubernetes.io/serviceaccount/namespace": "default",
        "kubernetes.io/serviceaccount/service-account.name": "web",
        "aud": None,
        "exp": None,
        "nbf": None,
    }
    for claims in (legacy, {**legacy, "iss": ISSUER}, {**legacy, "iss": ISSUER, "aud": AUDIENCE}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(ca.issuer.token(**claims))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert ["issuer" in line["reason"] for line in ca.audit] == [True, False, False]
    assert "audience" in ca.audit[1]["reason"]
    assert "never expires" in ca.audit[2]["reason"]


async def test_a_call_with_two_tokens_gets_nothing(ca: Served) -> None:
    """Which of them counted would be a matter of who reads them."""
    headers = [("authorization", f"Bearer {ca.issuer.token()}")] * 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(headers=headers)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "more than one authorization header")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
async def test_a_scheme_in_any_case_brings_a_token(ca: Served, scheme: str) -> None:
    """Not every client writes Bearer with a capital letter, and it need not (RFC 9110 section 11.1)."""
    async with ca.connected() as channel:
        await ask(channel, headers=[("authorization", f"{scheme} {ca.issuer.token()}")])


async def test_a_token_under_another_scheme_gets_nothing(ca: Served) -> None:
    async with ca.connected() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, headers=[("authorization", f"Basic {ca.issuer.token()}")])
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "no proof")


async def test_a_certificate_proves_nothing_where_that_is_switched_off(tmp_path: Path) -> None:
    async with served(tmp_path, callers="  mtls: false") as ca:
        got = await ca.ask(ca.issuer.token())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(identity=got)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_foreign_certificate_harms_no_caller_where_certificates_are_switched_off(tmp_path: Path) -> None:
    """A caller may have one for other servers, and its library shows it to every server that asks."""
    (tmp_path / "elsewhere").mkdir()
    async with served(tmp_path / "elsewhere") as other:
        foreign = await other.ask(other.issuer.token())
    async with served(tmp_path, callers="  mtls: false") as ca:
        got = await ca.ask(ca.issuer.token(), foreign)
    assert subject_alternative_uris(got.leaf) == (WEB,)


async def test_a_token_that_is_far_too_long_is_not_even_read() -> None:
    with pytest.raises(RefusalError, match="more than"):
        await TokenCallers([], TRUST_DOMAIN).of("a." * LONGEST_TOKEN, datetime.now(UTC))


async def test_a_long_token_is_taken_every_time(ca: Served) -> None:
    """An issuer that lists a person's groups writes long ones; gRPC by itself refuses most of these, and not all."""
    token = ca.issuer.token(groups=["administrators of something"] * 370)
    assert LONGEST_TOKEN - 2000 < len(token) < LONGEST_TOKEN
    async with ca.connected() as channel:
        for _ in range(10):
            await ask(channel, token)


async def test_a_token_that_demands_what_is_not_understood_gets_nothing(ca: Served) -> None:
    """Its issuer says that without it the token means something else (RFC 7515 section 4.1.11)."""
    _, claims, _ = ca.issuer.token().split(".")
    header = {"kid": "ES256", "crit": ["bound"], "bound": "elsewhere"}
    payload = base64.urlsafe_b64decode(claims + "==")
    token = jwt.PyJWS().encode(payload, ca.issuer.keys["ES256"], "ES256", headers=header)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "token")


async def test_a_token_without_a_bottom_is_only_refused(ca: Served) -> None:
    token = jwt.PyJWS().encode(b"[" * 9000, ca.issuer.keys["ES256"], "ES256")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "neither a JSON Web Token")


@pytest.mark.parametrize("claims", [[], "text", 7, None])
async def test_a_signed_token_that_holds_no_claims_gets_nothing(ca: Served, claims: object) -> None:
    token = jwt.PyJWS().encode(json.dumps(claims).encode(), ca.issuer.keys["ES256"], "ES256")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "holds no claims")


async def test_a_kind_of_token_that_is_not_configured_gets_nothing(tmp_path: Path) -> None:
    least = f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:0\nserver_names: [localhost]\naudit: audit.log\n"
    ways = {
        "join_tokens: t": (TokenIssuer().token(), "callers.jwt"),
        f"jwt: [{{issuer: i, audience: a, jwks: {tmp_path / 'keys'}}}]": ("sds-join-x", "callers.join_tokens"),
    }
    (tmp_path / "keys").write_bytes(TokenIssuer().key_set())
    for number, (callers, (token, words)) in enumerate(ways.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "ca.yaml").write_text(f"{least}signer: {{self_signed: r}}\ncallers: {{{callers}}}\n")
        async with serving(load(directory / "ca.yaml"), SystemClock()) as address:
            roots = write_pem(read_pem((directory / "r" / "roots.pem").read_bytes()))
            ca = Served(str(address), directory, TokenIssuer(), roots)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(token)
            refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, words)


async def test_a_token_of_another_key_gets_nothing(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(TokenIssuer().token())
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "key of its issuer")


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "sds-join-nobody-made-this", "e30.e30.e30", "\u007f"])
async def test_what_is_no_token_gets_nothing(ca: Served, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(headers=(("authorization", f"Bearer {token.encode('unicode_escape').decode()}"),))
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "")


async def test_a_join_token_is_spent_by_its_first_key(ca: Served) -> None:
    """An answer that was lost can be asked for again; a token that leaked is worth nothing."""
    token, key = ca.join_token(), generate(KeyType.EC_P256)
    await ca.ask(token, key=key)
    again = await ca.ask(token, key=key)
    assert subject_alternative_uris(again.leaf) == (WEB,)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [line["outcome"] for line in ca.audit] == ["issued", "issued", "unauthenticated"]
    assert "another key" in ca.audit[-1]["reason"]
    for path in (ca.directory / "tokens").iterdir():
        assert token.encode() not in (bytes(path.readlink()) if path.is_symlink() else path.read_bytes())


async def test_of_many_keys_at_once_one_gets_the_join_token(ca: Served) -> None:
    token = ca.join_token()
    outcomes: list[bool] = []

    async def attempt(channel: grpc.aio.Channel) -> None:
        try:
            await ask(channel, token)
        except grpc.aio.AioRpcError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    async with ca.connected() as channel, anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(attempt, channel)
    assert sorted(outcomes) == [False] * 7 + [True]


async def test_an_expired_join_token_gets_nothing(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.join_token(ttl=timedelta(seconds=-1)))
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "expired")


async def test_a_refused_csr_does_not_spend_the_join_token(ca: Served) -> None:
    token = ca.join_token()
    with pytest.raises(grpc.aio.AioRpcError):
        await ca.ask(token, csr="nonsense")
    await ca.ask(token)
