"""The client of Istio's certificate service against a real gRPC server over real TLS."""

import codecs
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import grpc
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.clocks import HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import HOUR, NOW, Ca, common_name, make_ca, make_leaf, new_key
from fakes.istio_ca import Asked, IstioCa, RefusedError, Trailers
from fakes.odd_certificates import LOADED, NOT_LOADED, NOT_READ
from fakes.ports import reserved_port
from fakes.raw_http2 import announcing
from sds_agent_proto.istio_pb2 import CertificateResponse

from sds_agent.authority.credentials import read_token
from sds_agent.authority.istio.client import BACK_TO_THE_FIRST, TIMEOUT, IstioAuthority
from sds_agent.authority.istio.kind import KIND
from sds_agent.authority.istio.reach import fault_of_name
from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import SystemClock
from sds_agent.errors import ConfigurationError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import PrivateKey, to_pkcs8_pem
from sds_agent.signing.signing_set import LARGEST_ANSWER
from sds_agent.tasks import giving

URI = "spiffe://cluster.local/ns/default/sa/web"
PLANTED = "planted-token.with-a.signature"
DAY = timedelta(days=1)


@dataclass
class Client:
    """A CA, the client's files, and the key that it asks for."""

    ca: IstioCa
    folder: Path
    key: PrivateKey = field(default_factory=new_key)

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def ca_file(self) -> Path:
        return self.folder / "root-cert.pem"

    def settings(self, *addresses: str, **options: Any) -> IstioSettings:
        return IstioSettings(address=addresses, **{"token_file": self.token_file, "ca_file": self.ca_file, **options})

    def authority(self, *addresses: str, clock: Any = None, timeout: float = TIMEOUT, **options: Any) -> IstioAuthority:
        return IstioAuthority(self.settings(*addresses, **options), clock or SystemClock(), timeout=timeout)

    async def open(self, *addresses: str, **options: Any) -> None:
        """As the agent opens an authority of its configuration."""
        context = Context("mesh", "demo.example", self.folder, SystemClock())
        async with KIND.open(self.settings(*addresses, **options), context):
            pass

    def request(self, ttl: timedelta = DAY, current: CurrentIdentity | None = None) -> IssueRequest:
        return IssueRequest(SpiffeId.parse(URI), make_csr(self.key, URI), ttl, "0" * 32, current)

    def current(self, issuer: Ca | None = None, uri: str = URI, *, expired: bool = False) -> CurrentIdentity:
        """A certificate as an earlier attempt brought it."""
        key, now = new_key(), datetime.now(UTC)
        end = now - timedelta(minutes=1) if expired else now + DAY
        leaf = make_leaf(issuer or self.ca.signer, uri, key=key, not_before=now - DAY, not_after=end)
        return CurrentIdentity(write_pem([leaf, self.ca.signer.certificate]), to_pkcs8_pem(key))

    def accepted(self, issuance: Issuance) -> tuple[x509.Certificate, ...]:
        """The chain, after all the checks there are."""
        identity, key = SpiffeId.parse(URI), self.key.public_key()
        return accept(issuance, identity=identity, public_key=key, anchors=(), now=datetime.now(UTC)).chain


@pytest.fixture
def ca() -> IstioCa:
    return IstioCa()


@pytest.fixture
def client(ca: IstioCa, tmp_path: Path) -> Client:
    made = Client(ca, tmp_path)
    made.token_file.write_text("first.token.x\n")
    made.ca_file.write_bytes(ca.root_pem)
    return made


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as seen:
        yield seen


async def refused(authority: IstioAuthority, request: IssueRequest) -> AuthorityError:
    with pytest.raises(AuthorityError) as caught:
        await authority.issue(request)
    return caught.value


def bearer(asked: Asked) -> str | None:
    return asked.headers.get("authorization")


# What is asked


async def test_a_certificate_is_issued_with_its_chain_and_anchors(client: Client) -> None:
    async with client.ca.serving() as address:
        issuance = await client.authority(address).issue(client.request())
    assert client.accepted(issuance)[1:] == (client.ca.signer.certificate,)
    assert issuance.anchors_pem == client.ca.root_pem


async def test_the_request_is_what_istio_reads(client: Client) -> None:
    request = client.request(timedelta(hours=1, milliseconds=1500))
    async with client.ca.serving() as address:
        await client.authority(address).issue(request)
    (asked,) = client.ca.asked
    assert asked.message.csr.encode() == request.csr_pem
    assert asked.message.validity_duration == 3601
    assert asked.wanted == {}
    assert not asked.message.HasField("metadata")
    assert bearer(asked) == "Bearer first.token.x"
    assert "clusterid" not in asked.headers


async def test_a_ttl_under_a_second_is_not_sent_as_zero_which_means_a_day(client: Client) -> None:
    async with client.ca.serving() as address:
        await client.authority(address).issue(client.request(timedelta(milliseconds=300)))
    assert client.ca.asked[0].message.validity_duration == 1


async def test_the_clusters_id_goes_along(client: Client) -> None:
    async with client.ca.serving() as address:
        await client.authority(address, cluster_id="cluster2").issue(client.request())
    assert client.ca.asked[0].headers["clusterid"] == "cluster2"


async def test_a_node_agent_asks_for_others_and_names_a_signer(client: Client) -> None:
    async with client.ca.serving() as address:
        await client.authority(address, impersonate=True, cert_signer="clusterissuers.x").issue(client.request())
    assert client.ca.asked[0].wanted == {"ImpersonatedIdentity": URI, "CertSigner": "clusterissuers.x"}


# Who asks


async def test_a_token_that_was_replaced_is_used_for_the_next_call(client: Client) -> None:
    async with client.ca.serving() as address:
        authority = client.authority(address)
        await authority.issue(client.request())
        client.token_file.write_text("second.token.x")
        await authority.issue(client.request())
    assert [bearer(asked) for asked in client.ca.asked] == ["Bearer first.token.x", "Bearer second.token.x"]


@pytest.mark.parametrize("content", [b"", b" \n", b"two tokens", b"a\nb: c", b"\xff\xfe", b"x" * 20_000, None])
async def test_the_agent_reports_a_file_without_a_token_and_does_not_ask_the_ca(
    client: Client, content: bytes | None
) -> None:
    client.token_file.unlink()
    if content is not None:
        client.token_file.write_bytes(content)
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request())
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert str(client.token_file) in str(error)
    assert content is None or not content.strip() or content.decode("latin-1") not in str(error)
    assert client.ca.asked == []


async def test_the_current_certificate_renews_without_a_token(client: Client) -> None:
    client.token_file.unlink()
    identity = client.current()
    async with client.ca.serving(mtls=True) as address:
        await client.authority(address).issue(client.request(current=identity))
    (asked,) = client.ca.asked
    assert asked.certificate is not None
    assert read_pem(asked.certificate)[0] == read_pem(identity.chain_pem)[0]
    assert bearer(asked) is None


async def test_a_foreign_certificate_fails_the_connection_and_the_token_goes_alone(
    client: Client, events: Events
) -> None:
    """A server that takes certificates, but not this one, is followed by one at the same port that takes none."""
    foreign = client.current(client.ca.stranger)
    async with client.ca.serving(mtls=True) as first, client.ca.serving() as second:
        error = await refused(client.authority(first), client.request(current=foreign))
        assert error.kind is ErrorKind.TRANSIENT
        assert client.ca.asked == []
        assert len(events.named("certificate_not_taken")) == 1
        await client.authority(first, second).issue(client.request(current=foreign))
    assert bearer(client.ca.asked[0]) == "Bearer first.token.x"


async def test_a_certificate_that_the_ca_does_not_know_gives_way_to_the_token(client: Client, events: Events) -> None:
    """The agent logs the CA's reason, since what the token comes to says nothing of it."""

    def first_time(_asked: Asked) -> CertificateResponse:
        client.ca.answer = client.ca.signed
        raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "it was\nrevoked")

    client.ca.answer = first_time
    async with client.ca.serving() as address:
        await client.authority(address).issue(client.request(current=client.current()))
    assert len(client.ca.asked) == 2
    assert events.named("certificate_not_taken")[0]["cause"] == "it was revoked"


async def test_a_certificate_that_the_ca_knows_and_refuses_does_not_give_way_to_the_token(client: Client) -> None:
    """The CA has said no to this caller: to ask again with a token would only count against it twice."""
    client.ca.answer = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "slower")
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request(current=client.current()))
    assert error.kind is ErrorKind.THROTTLED
    assert len(client.ca.asked) == 1


@pytest.mark.parametrize("uri", ["spiffe://cluster.local", "https://cluster.local/web"])
async def test_a_certificate_that_names_no_workload_is_not_presented(client: Client, uri: str) -> None:
    client.token_file.unlink()
    async with client.ca.serving(mtls=True) as address:
        error = await refused(client.authority(address), client.request(current=client.current(uri=uri)))
    assert error.kind is ErrorKind.UNAUTHENTICATED


async def test_an_expired_certificate_is_not_presented(client: Client, events: Events) -> None:
    async with client.ca.serving() as address:
        await client.authority(address).issue(client.request(current=client.current(expired=True)))
    assert len(client.ca.asked) == 1
    assert events.named("certificate_not_taken") == []


@pytest.mark.parametrize("options", [{"mtls": False}, {"impersonate": True}])
async def test_no_certificate_goes_along_where_it_must_not(client: Client, options: dict[str, bool]) -> None:
    """An impersonated identity beside a certificate would be refused."""
    async with client.ca.serving(mtls=True) as address:
        error = await refused(client.authority(address, **options), client.request(current=client.current()))
    assert error.kind is ErrorKind.TRANSIENT
    assert client.ca.asked == []


async def test_a_provisioned_certificate_asks_for_the_first_one(client: Client) -> None:
    identity = client.current()
    (client.folder / "cert-chain.pem").write_bytes(identity.chain_pem)
    (client.folder / "key.pem").write_bytes(identity.private_key_pem)
    async with client.ca.serving(mtls=True) as address:
        authority = client.authority(address, token_file=None, provisioned=client.folder)
        await authority.issue(client.request())
        await authority.issue(client.request(current=client.current(expired=True)))
        (client.folder / "key.pem").write_bytes(client.current().private_key_pem)
        error = await refused(authority, client.request())
    assert len(client.ca.asked) == 2
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert "do not belong together" in str(error)


async def test_the_agent_reports_an_expired_provisioned_certificate_and_does_not_present_it(client: Client) -> None:
    identity = client.current(expired=True)
    (client.folder / "cert-chain.pem").write_bytes(identity.chain_pem)
    (client.folder / "key.pem").write_bytes(identity.private_key_pem)
    async with client.ca.serving() as address:
        error = await refused(client.authority(address, token_file=None, provisioned=client.folder), client.request())
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert "has expired" in str(error)
    assert client.ca.asked == []


async def test_a_provisioned_certificate_that_cannot_be_read_leaves_the_token(client: Client) -> None:
    async with client.ca.serving() as address:
        await client.authority(address, provisioned=client.folder / "nowhere").issue(client.request())
    assert bearer(client.ca.asked[0]) == "Bearer first.token.x"


# Whom to believe


async def test_roots_that_were_replaced_count_for_the_next_connection(client: Client) -> None:
    client.ca_file.write_bytes(write_pem([client.ca.stranger.certificate]))
    async with client.ca.serving() as address:
        authority = client.authority(address)
        error = await refused(authority, client.request())
        assert error.kind is ErrorKind.TRANSIENT
        assert client.ca.asked == []
        client.ca_file.write_bytes(client.ca.root_pem)
        await authority.issue(client.request())
        client.ca_file.write_bytes(write_pem([client.ca.stranger.certificate]))
        await refused(authority, client.request())
    assert len(client.ca.asked) == 1


@pytest.mark.parametrize("content", [b"", b"no certificate\n", b"-----BEGIN CERTIFICATE-----\nMIIB\n", None])
async def test_a_root_file_without_roots_is_an_error_and_not_the_systems_roots(
    client: Client, content: bytes | None
) -> None:
    client.ca_file.unlink()
    if content is not None:
        client.ca_file.write_bytes(content)
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request())
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert str(client.ca_file) in str(error)
    assert client.ca.asked == []


def with_byte_order_mark(pem: bytes) -> bytes:
    return codecs.BOM_UTF8 + pem


def after_a_block_without_line_break(pem: bytes) -> bytes:
    """As `cat` makes it of two files, the first of which ends without one."""
    return pem.rstrip() + pem


@pytest.mark.parametrize("form", [with_byte_order_mark, after_a_block_without_line_break])
async def test_grpc_loads_every_form_of_pem_that_the_agent_reads(
    client: Client, form: Callable[[bytes], bytes]
) -> None:
    identity = client.current()
    client.ca_file.write_bytes(form(client.ca.root_pem))
    (client.folder / "cert-chain.pem").write_bytes(form(identity.chain_pem))
    (client.folder / "key.pem").write_bytes(form(identity.private_key_pem))
    async with client.ca.serving(mtls=True) as address:
        await client.authority(address, token_file=None, provisioned=client.folder).issue(client.request())
    assert len(client.ca.asked) == 1


async def test_the_agent_reports_an_unusable_root_once_and_uses_the_others(client: Client, events: Events) -> None:
    """gRPC takes no root of a file where there is one that it does not load."""
    odd = der.pem(NOT_LOADED["version 1 with extensions"]) + der.pem(NOT_READ["_ in PrintableString"])
    client.ca_file.write_bytes(odd + client.ca.root_pem)
    extra = client.folder / "extra.pem"
    extra.write_bytes(odd + write_pem([client.ca.stranger.certificate]))
    async with client.ca.serving() as address:
        authority = client.authority(address, extra_anchors=extra)
        await authority.issue(client.request())
        issuance = await authority.issue(client.request())
    assert read_pem(issuance.anchors_pem or b"") == (client.ca.root.certificate, client.ca.stranger.certificate)
    reported = events.named("certificates_left_out")
    assert [each["file"] for each in reported] == [str(extra), str(client.ca_file)]
    assert all("version 1" in str(each["cause"]) and "Old_Root!" in str(each["cause"]) for each in reported)


@pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")
async def test_grpc_loads_every_odd_root_that_the_agent_reads(client: Client) -> None:
    client.ca_file.write_bytes(b"".join(map(der.pem, LOADED.values())) + client.ca.root_pem)
    async with client.ca.serving() as address:
        await client.authority(address).issue(client.request())


async def test_an_unreadable_root_in_the_cas_chain_does_not_stop_issuing(client: Client) -> None:
    def answer(asked: Asked) -> CertificateResponse:
        response = client.ca.signed(asked)
        response.cert_chain[-1] = der.pem(NOT_READ["critical FALSE"]).decode() + response.cert_chain[-1]
        return response

    client.ca.answer = answer
    async with client.ca.serving() as address:
        issuance = await client.authority(address).issue(client.request())
    assert client.accepted(issuance)[1:] == (client.ca.signer.certificate,)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
async def test_a_root_file_that_is_no_file_holds_nothing_up(client: Client, kind: str) -> None:
    place = client.folder / kind
    make = os.mkdir if kind == "directory" else os.mkfifo
    make(place)
    error = await refused(client.authority("127.0.0.1:1", ca_file=place), client.request())
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert str(place) in str(error)


async def test_the_error_for_a_server_of_another_name_says_to_set_server_name(client: Client, events: Events) -> None:
    async with client.ca.serving("istiod.istio-system.svc", "localhost") as address:
        error = await refused(client.authority(address), client.request(current=client.current()))
        assert error.kind is ErrorKind.TRANSIENT
        fault = "its certificate is for istiod.istio-system.svc, localhost, not for 127.0.0.1; set server_name"
        assert str(error) == f"the Istio CA at {address} cannot be reached: {fault}"
        assert events.named("certificate_not_taken") == [], "no other way of asking would do better"
        await client.authority(address, server_name="istiod.istio-system.svc").issue(client.request())
    assert len(client.ca.asked) == 1


async def test_the_agent_reports_a_ca_that_is_down_and_not_a_refused_certificate(
    client: Client, events: Events
) -> None:
    async with client.ca.serving() as address:
        pass
    error = await refused(client.authority(address), client.request(current=client.current()))
    assert error.kind is ErrorKind.TRANSIENT
    fault = "nothing answers there (Connection refused); check that it runs at this address"
    assert str(error) == f"the Istio CA at {address} cannot be reached: {fault}"
    assert events.named("certificate_not_taken") == []


async def test_the_error_for_an_impossible_host_quotes_grpc(client: Client) -> None:
    address = f"{'a' * 64}.invalid:15012"  # a label has 63 bytes at most, so no server is asked for it
    error = await refused(client.authority(address), client.request())
    assert error.kind is ErrorKind.TRANSIENT
    assert f"the Istio CA at {address} did not issue (UNAVAILABLE: " in str(error)


async def test_the_error_for_a_server_of_an_unknown_ca_says_to_add_its_root(client: Client, events: Events) -> None:
    client.ca_file.write_bytes(write_pem([client.ca.stranger.certificate]))
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request(current=client.current()))
    assert "cannot be reached: the roots in ca_file do not vouch for its certificate (unable to get" in str(error)
    assert str(error).endswith("put its CA's root there")
    assert events.named("certificate_not_taken") == []


@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [
        (-timedelta(days=2), -timedelta(days=1), "has expired, or this machine's clock is ahead; renew it"),
        (timedelta(days=1), timedelta(days=2), "is not valid yet, or this machine's clock is behind; set the clock"),
    ],
    ids=["expired", "future"],
)
async def test_the_error_for_a_server_certificate_of_another_time_does_not_blame_the_roots(
    client: Client, begins: timedelta, ends: timedelta, said: str
) -> None:
    now = datetime.now(UTC)
    client.ca.validity = {"not_before": now + begins, "not_after": now + ends}
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request())
    assert f"cannot be reached: its certificate, or that of a CA above it, {said}" in str(error)


async def test_the_error_for_a_server_without_tls_quotes_grpc(client: Client) -> None:
    async with client.ca.serving(plaintext=True) as address:
        error = await refused(client.authority(address), client.request())
    assert error.kind is ErrorKind.TRANSIENT
    assert f"the Istio CA at {address} did not issue (UNAVAILABLE: " in str(error)


def server_certificate(*names: x509.GeneralName, subject: str = "istiod") -> bytes:
    leaf = make_leaf(make_ca("root"), None, names=names, subject=common_name(subject))
    return leaf.public_bytes(Encoding.DER)


DNS, IP = x509.DNSName, x509.IPAddress


@pytest.mark.parametrize(
    ("names", "name", "words"),
    [
        ((DNS("istiod.svc"),), "istiod.svc", None),
        ((DNS("istiod.svc"),), "ISTIOD.svc", None),
        ((DNS("*.svc"),), "istiod.svc", None),
        ((DNS("*.svc"),), "a.istiod.svc", "for *.svc, not for a.istiod.svc"),
        ((DNS("*.svc"),), "svc", "for *.svc, not for svc"),
        ((IP(ip_address("::1")),), "0:0::1", None),
        ((IP(ip_address("10.0.0.1")), DNS("localhost")), "127.0.0.1", "for 10.0.0.1, localhost, not for 127.0.0.1"),
        ((), "istiod", None),
        ((), "localhost", "for istiod, not for localhost"),
        (tuple(DNS(f"{n}.svc") for n in range(9)), "svc", "for 0.svc, 1.svc, 2.svc, 3.svc, 4.svc, ..., not for svc"),
    ],
)
def test_a_server_certificate_for_another_name_is_reported_and_a_right_one_is_not(
    names: tuple[x509.GeneralName, ...], name: str, words: str | None
) -> None:
    """A certificate without names of these kinds is for its CN, as gRPC has it."""
    fault = fault_of_name(server_certificate(*names), name)
    assert fault == (words and f"its certificate is {words}; set server_name")


async def test_extra_anchors_are_added_and_survive_a_bad_file(client: Client) -> None:
    extra = client.folder / "mesh.pem"
    extra.write_bytes(write_pem([client.ca.stranger.certificate]))
    async with client.ca.serving() as address:
        authority = client.authority(address, extra_anchors=extra)
        issuance = await authority.issue(client.request())
        extra.write_bytes(b"")
        again = await authority.issue(client.request())
        error = await refused(client.authority(address, extra_anchors=extra), client.request())
    anchors = (client.ca.root.certificate, client.ca.stranger.certificate)
    assert read_pem(issuance.anchors_pem or b"") == read_pem(again.anchors_pem or b"") == anchors
    assert issuance.warnings == ()
    assert str(extra) in again.warnings[0]
    assert str(extra) in str(error)


# Without TLS


async def test_a_token_goes_in_the_clear_only_where_it_is_allowed_and_stays_on_the_machine(client: Client) -> None:
    async with client.ca.serving(plaintext=True) as address:
        error = await refused(client.authority(address), client.request())
        assert error.kind is ErrorKind.TRANSIENT
        assert client.ca.asked == []
        await client.authority(address, ca_file=None, plaintext_loopback=True).issue(client.request())
    assert bearer(client.ca.asked[0]) == "Bearer first.token.x"


@pytest.mark.parametrize(
    "address", ["ca.example:15012", "10.0.0.1:15012", "127.evil.example:1", "evil-localhost:1", "[2001:db8::1]:1"]
)
async def test_no_token_leaves_the_machine_in_the_clear(client: Client, address: str) -> None:
    with pytest.raises(ConfigurationError, match="never leaves it without TLS"):
        await client.open("127.0.0.1:1", address, ca_file=None, plaintext_loopback=True)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.9.1:1", "localhost:15012", "[::1]:15012"])
async def test_loopback_has_many_names(client: Client, address: str) -> None:
    await client.open(address, ca_file=None, plaintext_loopback=True)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"ca_file": None}, "ca_file"),
        ({"plaintext_loopback": True}, "ca_file"),
        ({"token_file": None}, "token_file"),
        ({"token_file": None, "impersonate": True, "provisioned": Path("p")}, "token_file"),
        ({"token_file": None, "mtls": False, "provisioned": Path("p")}, "token_file"),
        ({"token_file": None, "plaintext_loopback": True, "ca_file": None, "provisioned": Path("p")}, "token_file"),
    ],
)
async def test_the_error_for_an_impossible_option_names_its_key(
    client: Client, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^authorities\.mesh\.{key}: "):
        await client.open("127.0.0.1:1", **options)


# Refusals

KINDS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorKind.THROTTLED,
    grpc.StatusCode.UNAUTHENTICATED: ErrorKind.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: ErrorKind.DENIED,
    grpc.StatusCode.INVALID_ARGUMENT: ErrorKind.INVALID,
    grpc.StatusCode.UNIMPLEMENTED: ErrorKind.INVALID,
    grpc.StatusCode.INTERNAL: ErrorKind.TRANSIENT,
    grpc.StatusCode.UNAVAILABLE: ErrorKind.TRANSIENT,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorKind.TRANSIENT,
    grpc.StatusCode.UNKNOWN: ErrorKind.TRANSIENT,
}


def refusing(code: grpc.StatusCode, details: str, trailers: Trailers = ()) -> Callable[[Asked], CertificateResponse]:
    def answer(_asked: Asked) -> CertificateResponse:
        raise RefusedError(code, details, trailers)

    return answer


@pytest.mark.parametrize("code", KINDS)
async def test_a_status_says_who_can_fix_it(client: Client, code: grpc.StatusCode) -> None:
    client.ca.answer = refusing(code, "not today")
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request())
    assert error.kind is KINDS[code]
    assert f"{address} did not issue ({code.name}: not today)" in str(error)


RETRY_IN_7_S = b"\x08\x08\x12\x06slower\x1a\x30\x0a\x28type.googleapis.com/google.rpc.RetryInfo\x12\x04\x0a\x02\x08\x07"
"""google.rpc.Status with a google.rpc.RetryInfo of 7 s, as the protobuf encoding has it."""


@pytest.mark.parametrize(
    ("trailers", "seconds"),
    [
        ((), None),
        ((("retry-after", "42"),), 42),
        ((("grpc-status-details-bin", RETRY_IN_7_S),), 7),
        ((("grpc-status-details-bin", RETRY_IN_7_S), ("retry-after", "42")), 7),
    ],
)
async def test_a_ca_that_names_a_time_is_not_asked_before_it(
    client: Client, trailers: Trailers, seconds: float | None
) -> None:
    client.ca.answer = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "slower", trailers)
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request())
    assert (error.kind, error.retry_after) == (ErrorKind.THROTTLED, seconds)


@pytest.mark.parametrize(("second", "seconds"), [("300", 60), ("0", None)])
async def test_of_several_endpoints_the_least_patient_is_heard(
    client: Client, second: str, seconds: float | None
) -> None:
    impatient, patient = IstioCa(), client.ca
    client.ca_file.write_bytes(impatient.root_pem + patient.root_pem)
    patient.answer = refusing(grpc.StatusCode.UNAVAILABLE, "later", (("retry-after", "60"),))
    impatient.answer = refusing(grpc.StatusCode.UNAVAILABLE, "later", (("retry-after", second),))
    async with patient.serving() as one, impatient.serving() as other:
        error = await refused(client.authority(one, other), client.request())
    assert (error.kind, error.retry_after) == (ErrorKind.TRANSIENT, seconds)


async def test_an_answer_of_the_largest_size_is_received(client: Client) -> None:
    def answer(asked: Asked) -> CertificateResponse:
        response = client.ca.signed(asked)
        response.cert_chain[-1] += "\n" * (LARGEST_ANSWER - response.ByteSize() - 2)
        assert response.ByteSize() == LARGEST_ANSWER
        return response

    client.ca.answer = answer
    async with client.ca.serving() as address:
        assert client.accepted(await client.authority(address).issue(client.request()))


async def test_the_agent_reports_the_size_of_a_too_large_answer_and_does_not_receive_it(client: Client) -> None:
    """What a CA announces costs no memory: it is refused by its prefix, though the rest never comes."""
    async with announcing(100 << 20) as address:
        error = await refused(client.authority(address, ca_file=None, plaintext_loopback=True), client.request())
    assert error.kind is ErrorKind.INVALID
    assert f"has {100 << 20} bytes, and at most {LARGEST_ANSWER} are received; remove the roots" in str(error)


async def test_an_answer_that_is_too_large_once_it_is_decompressed_is_no_throttling(client: Client) -> None:
    def answer(asked: Asked) -> CertificateResponse:
        response = client.ca.signed(asked)
        response.cert_chain[-1] += "\n" * LARGEST_ANSWER
        return response

    client.ca.answer = answer
    async with client.ca.serving(compression=grpc.Compression.Gzip) as address:
        error = await refused(client.authority(address), client.request())
    assert error.kind is ErrorKind.INVALID
    assert f"has too many bytes, and at most {LARGEST_ANSWER} are received; remove the roots" in str(error)


async def test_an_exhausted_ca_counts_as_throttling_whatever_its_message(client: Client) -> None:
    client.ca.answer = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)")
    async with client.ca.serving() as address:
        assert (await refused(client.authority(address), client.request())).kind is ErrorKind.THROTTLED


async def test_the_cas_words_are_bounded_and_of_one_line(client: Client) -> None:
    client.ca.answer = refusing(grpc.StatusCode.INTERNAL, "line\nanother\x1b[31m " + "x" * 5_000)
    async with client.ca.serving() as address:
        error = await refused(client.authority(address), client.request())
    assert len(str(error)) < 700
    assert str(error).isprintable()


async def test_the_token_is_in_no_error_no_log_and_no_repr(
    client: Client, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the CA sends it back."""
    client.token_file.write_text(PLANTED)
    seen: list[str] = []

    def echo(asked: Asked) -> CertificateResponse:
        raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, f"bad header {bearer(asked)}")

    client.ca.answer = echo
    async with client.ca.serving() as address:
        authority = client.authority(address)
        error = await refused(authority, client.request(current=client.current()))
        seen += [repr(authority), repr(vars(authority)), repr(read_token(client.token_file))]
    seen += ["".join(traceback.format_exception(error)), repr(error), repr(error.__context__), repr(events.seen)]
    assert bearer(client.ca.asked[0]) == f"Bearer {PLANTED}"
    assert "[token]" in str(error)
    assert all(PLANTED not in text for text in [*seen, caplog.text])


async def test_an_answer_that_is_no_message_is_invalid(client: Client) -> None:
    client.ca.answer = lambda _asked: b"\x0a\xff not protobuf"
    async with client.ca.serving() as address:
        assert (await refused(client.authority(address), client.request())).kind is ErrorKind.INVALID


async def test_success_without_an_answer_is_invalid(client: Client) -> None:
    """HTTP allows it, and gRPC's library hands on that there is none."""
    async with client.ca.serving(silent=True) as address:
        error = await refused(client.authority(address), client.request())
    assert error.kind is ErrorKind.INVALID
    assert "has 0 elements" in str(error)


# Endpoints and connections


async def test_every_attempt_has_a_connection_of_its_own(client: Client) -> None:
    async with client.ca.serving() as address:
        authority = client.authority(address)
        await authority.issue(client.request())
        await authority.issue(client.request())
    assert len({asked.peer for asked in client.ca.asked}) == 2


async def test_a_proxy_of_the_environment_never_sees_a_call(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's proxy is for the web: it could neither reach the CA nor is the token its business."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with client.ca.serving() as address:
        await client.authority(address).issue(client.request())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_attempts_leave_no_file_open(client: Client) -> None:
    """An agent asks for years, and may have no more than some hundred open."""
    client.ca_file.write_bytes(b"")
    authority = client.authority("127.0.0.1:1")
    await refused(authority, client.request())
    before = open_files()
    for _ in range(5):
        await refused(authority, client.request())
    assert open_files() <= before


async def test_the_next_endpoint_steps_in_and_the_first_has_its_turn_again(
    client: Client, events: Events, port: int
) -> None:
    clock = HandClock(datetime.now(UTC))
    standby = IstioCa()
    with client.ca_file.open("ab") as file:
        file.write(standby.root_pem)
    first = f"127.0.0.1:{port}"
    async with standby.serving() as second:
        authority = client.authority(first, second, clock=clock)
        await authority.issue(client.request())
        assert (len(client.ca.asked), len(standby.asked)) == (0, 1)
        assert events.named("endpoint_changed")[0]["address"] == second
        clock.set_wall(BACK_TO_THE_FIRST)
        await authority.issue(client.request())  # the first is asked before, and does not answer
        assert len(events.named("endpoint_changed")) == 1
        async with client.ca.serving(port=port):
            await authority.issue(client.request())
            assert (len(client.ca.asked), len(standby.asked)) == (0, 3)
            clock.set_wall(BACK_TO_THE_FIRST)
            await authority.issue(client.request())
            await authority.issue(client.request())
    assert (len(client.ca.asked), len(standby.asked)) == (2, 3)
    changes = [(each["address"], each["level"]) for each in events.named("endpoint_changed")]
    assert changes == [(second, "warning"), (first, "info")]


async def test_a_refusal_is_not_carried_from_endpoint_to_endpoint(client: Client) -> None:
    client.ca.answer = refusing(grpc.StatusCode.PERMISSION_DENIED, "no")
    async with client.ca.serving() as first, client.ca.serving() as second:
        error = await refused(client.authority(first, second), client.request())
    assert error.kind is ErrorKind.DENIED
    assert len(client.ca.asked) == 1


async def test_an_endpoint_that_says_nothing_leaves_the_next_one_its_time(client: Client) -> None:
    async with client.ca.serving(hanging=True) as first, client.ca.serving() as second:
        with anyio.fail_after(2.0):  # the caller gives up then
            await client.authority(first, second, timeout=2.0).issue(client.request())
        assert client.ca.hung.is_set()
        assert (await refused(client.authority(first, timeout=0.5), client.request())).kind is ErrorKind.TRANSIENT


class PatientCa(IstioCa):
    """Notes how long each of its callers would wait, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.timeout: list[float] = []

    async def create(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.timeout.append(context.time_remaining() or 0)
        return await super().create(request, context)


async def test_the_time_that_the_caller_gives_is_used_and_divided(tmp_path: Path) -> None:
    """A CA whose key is far away may take longer than is usual (requests.timeout)."""
    client = Client(PatientCa(), tmp_path)
    client.token_file.write_text("first.token.x")
    client.ca_file.write_bytes(client.ca.root_pem)
    async with client.ca.serving() as first, client.ca.serving() as second:
        for addresses, seconds in (((first,), 100.0), ((first, second), 50.0)):
            with giving(100.0):
                await client.authority(*addresses).issue(client.request())
            assert isinstance(client.ca, PatientCa)
            assert seconds * 0.8 < client.ca.timeout[-1] < seconds, "a part of it is left for the caller"


class LateCa(IstioCa):
    """Takes no certificate, says so only when half of its caller's time has passed, and then says nothing more.

    `timeout` is how long each of its callers would wait, in seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timeout: list[float] = []

    async def create(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.timeout.append(context.time_remaining() or 0)
        if len(self.timeout) == 1:
            await anyio.sleep(self.timeout[0] / 2)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not with this certificate")
        return await self.hang(request, context)


async def test_an_endpoint_that_takes_no_certificate_has_no_more_time_than_others(client: Client) -> None:
    """The token goes alone in what is left of the endpoint's time, or the next one would hardly be asked."""
    late = LateCa()
    with client.ca_file.open("ab") as file:
        file.write(late.root_pem)
    async with late.serving() as first, client.ca.serving() as second:
        await client.authority(first, second, timeout=4.0).issue(client.request(current=client.current()))
    assert len(client.ca.asked) == 1
    with_certificate, with_token = late.timeout
    assert with_token < with_certificate * 0.75, "half of it is left; gRPC rounds what it sends"


async def test_the_error_when_no_endpoint_answers_names_every_endpoint(client: Client) -> None:
    with reserved_port() as first_port, reserved_port() as second_port:
        first, second = f"127.0.0.1:{first_port}", f"127.0.0.1:{second_port}"
        error = await refused(client.authority(first, second), client.request())
    assert error.kind is ErrorKind.TRANSIENT
    assert first in str(error)
    assert second in str(error)


async def test_a_cancelled_attempt_leaves_no_call_behind(client: Client) -> None:
    async with client.ca.serving(hanging=True) as address, anyio.create_task_group() as asking:
        asking.start_soon(client.authority(address).issue, client.request())
        with anyio.fail_after(10):
            await client.ca.hung.wait()
            asking.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await client.ca.left.wait()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sds-join-abc", None),  # not every token says when it ends
        (jwt.encode({"exp": (NOW + HOUR).timestamp()}, "k" * 32), None),
        (
            jwt.encode({"exp": (NOW - HOUR).timestamp()}, "k" * 32),
            "names a token that expired at 2026-03-14 14:09:26 UTC",
        ),
        (jwt.encode({"exp": -1e300}, "k" * 32), None),
        ("two words", "does not hold the token alone"),
    ],
)
def test_a_token_that_the_ca_would_refuse_is_named_before_the_first_call(
    content: str, said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(content)
    chosen = IstioSettings(address=("127.0.0.1:1",), ca_file=tmp_path / "roots", token_file=tmp_path / "token")
    found = [str(each) for each in KIND.credentials(chosen, Context("mesh", "demo.example", tmp_path, HandClock()))]
    assert [said in each for each in found if said] == ([True] if said else [])
    assert bool(found) is bool(said)


def test_a_join_token_that_was_removed_after_its_use_is_no_fault(tmp_path: Path) -> None:
    chosen = IstioSettings(address=("127.0.0.1:1",), ca_file=tmp_path / "roots", token_file=tmp_path / "token")
    assert list(KIND.credentials(chosen, Context("mesh", "demo.example", tmp_path, HandClock()))) == []
