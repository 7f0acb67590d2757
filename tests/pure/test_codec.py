"""The narrow schema against the published one: what we write must read back through Envoy's types as it was meant."""

import hashlib
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from betterproto2 import Message
from envoy_data_plane.envoy.config.core.v3 import BuildVersion, DataSource, Extension, Locality, Node
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    Secret,
    TlsCertificate,
)
from envoy_data_plane.envoy.service.discovery.v3 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
    Resource,
)
from envoy_data_plane.envoy.type.v3 import SemanticVersion
from envoy_data_plane.google.protobuf import Any
from envoy_data_plane.google.rpc import Status
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.sds.codec import (
    MalformedMessageError,
    decode,
    decode_delta,
    encode,
    encode_delta,
    encode_secret,
)
from sds_agent.sds.protocol import SECRET_TYPE, DeltaRequest, Respond, SotwRequest
from sds_agent.secrets import model

SOME_TIME = datetime(2026, 1, 1, tzinfo=UTC)

names = st.text(min_size=1, max_size=40)
blobs = st.binary(max_size=300)
secrets = st.one_of(
    st.builds(model.CertificateSecret, blobs, blobs, st.just(SOME_TIME)), st.builds(model.BundleSecret, blobs, blobs)
)
served = st.dictionaries(names, secrets, max_size=4)
nonces = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40)


def meant(name: str, secret: model.Secret) -> Secret:
    if isinstance(secret, model.CertificateSecret):
        chain, key = DataSource(inline_bytes=secret.chain_pem), DataSource(inline_bytes=secret.private_key_pem)
        return Secret(name=name, tls_certificate=TlsCertificate(certificate_chain=chain, private_key=key))
    context = CertificateValidationContext(trusted_ca=DataSource(inline_bytes=secret.anchors_pem))
    if secret.lists_pem:
        context.crl, context.only_verify_leaf_cert_crl = DataSource(inline_bytes=secret.lists_pem), True
    return Secret(name=name, validation_context=context)


def any_of(name: str, secret: model.Secret) -> Any:
    return Any(type_url=SECRET_TYPE, value=bytes(meant(name, secret)))


def unknown_fields(message: Message) -> bytes:
    """What the published schema does not know, in the message and in all it holds."""
    found = message._unknown_fields
    for value in vars(message).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Message):
                found += unknown_fields(each)
    return found


@given(served, nonces)
def test_sotw_answer_reads_back_as_exactly_what_was_meant(secrets: dict[str, model.Secret], nonce: str) -> None:
    answer = Respond(nonce, tuple(encode_secret(name, secret) for name, secret in secrets.items()))
    read = DiscoveryResponse.parse(encode(answer))
    versions = [secret.version for secret in secrets.values()]
    assert read.version_info == versions[0] if len(versions) == 1 else read.version_info not in {"", *versions}
    assert read == DiscoveryResponse(
        version_info=read.version_info,
        resources=[any_of(name, secret) for name, secret in secrets.items()],
        type_url=SECRET_TYPE,
        nonce=nonce,
    )
    inner = [Secret.parse(resource.value) for resource in read.resources]
    assert inner == [meant(name, secret) for name, secret in secrets.items()]
    assert b"".join(map(unknown_fields, (read, *inner))) == b""


@given(served, served)
def test_version_of_an_answer_is_its_content(one: dict[str, model.Secret], other: dict[str, model.Secret]) -> None:
    """After a restart the same answer has the same version, whatever it is made of."""

    def version(secrets: dict[str, model.Secret]) -> str:
        resources = tuple(encode_secret(name, secret) for name, secret in secrets.items())
        return DiscoveryResponse.parse(encode(Respond("n", resources))).version_info

    same = [(n, s.version) for n, s in one.items()] == [(n, s.version) for n, s in other.items()]
    if max(len(one), len(other)) > 1:
        assert (version(one) == version(other)) is same
    assert version(one) == version(one)


def test_version_of_an_answer_holds_its_names() -> None:
    """Two workloads that swap their certificates have changed."""
    one, two = model.BundleSecret(b"1"), model.BundleSecret(b"2")
    swapped = [(("a", one), ("b", two)), (("a", two), ("b", one)), (("a", one), ("c", two))]
    answers = [encode(Respond("n", tuple(encode_secret(n, s) for n, s in pairs))) for pairs in swapped]
    assert len({DiscoveryResponse.parse(answer).version_info for answer in answers}) == 3


@given(served, nonces, st.lists(names, max_size=3))
def test_delta_answer_reads_back_as_exactly_what_was_meant(
    secrets: dict[str, model.Secret], nonce: str, removed: list[str]
) -> None:
    resources = tuple(encode_secret(name, secret) for name, secret in secrets.items())
    read = DeltaDiscoveryResponse.parse(encode_delta(Respond(nonce, resources, tuple(removed))))
    assert read == DeltaDiscoveryResponse(
        resources=[Resource(name=n, version=s.version, resource=any_of(n, s)) for n, s in secrets.items()],
        type_url=SECRET_TYPE,
        removed_resources=removed,
        nonce=nonce,
    )
    assert unknown_fields(read) == b""


errors = st.none() | st.text(max_size=40)


def status(error: str | None) -> Status | None:
    return None if error is None else Status(code=13, message=error)


def program(node: Node | None) -> str:
    """What is to be read of a node's `user_agent_name`, where it has no version."""
    return "" if node is None or node.user_agent_name == "envoy" else node.user_agent_name


types = st.sampled_from([SECRET_TYPE, "", "type.googleapis.com/x.Cluster"])
maybe = st.just("") | names
nodes = st.none() | st.builds(
    Node,
    id=maybe,
    cluster=maybe,
    user_agent_name=maybe | st.just("envoy"),
    locality=st.none() | st.builds(Locality, region=maybe),
    extensions=st.lists(st.builds(Extension, name=names, category=names), max_size=3),
)


@given(st.lists(names, max_size=4), maybe, maybe, errors, types, nodes)
def test_request_written_by_the_published_schema_is_read(
    asked: list[str], nonce: str, version: str, error: str | None, url: str, node: Node | None
) -> None:
    message = DiscoveryRequest(
        resource_names=asked,
        response_nonce=nonce,
        version_info=version,
        error_detail=status(error),
        type_url=url,
        node=node,
    )
    assert decode(bytes(message)) == SotwRequest(
        tuple(asked),
        nonce=nonce,
        error=error,
        type_url=url,
        node_id=node.id if node else "",
        cluster=node.cluster if node else "",
        version=program(node),
    )


@given(
    st.lists(names, max_size=4),
    st.lists(names, max_size=4),
    st.dictionaries(names, maybe, max_size=3),
    maybe,
    errors,
    types,
    nodes,
)
def test_delta_request_written_by_the_published_schema_is_read(
    subscribe: list[str],
    unsubscribe: list[str],
    versions: dict[str, str],
    nonce: str,
    error: str | None,
    url: str,
    node: Node | None,
) -> None:
    message = DeltaDiscoveryRequest(
        resource_names_subscribe=subscribe,
        resource_names_unsubscribe=unsubscribe,
        initial_resource_versions=versions,
        response_nonce=nonce,
        error_detail=status(error),
        type_url=url,
        node=node,
    )
    assert decode_delta(bytes(message)) == DeltaRequest(
        tuple(subscribe),
        tuple(unsubscribe),
        nonce,
        error,
        url,
        node.id if node else "",
        node.cluster if node else "",
        program(node),
    )


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused_and_nothing_else(data: bytes) -> None:
    """An exception of any other kind would end in a traceback in the log."""
    for read in (decode, decode_delta):
        with suppress(MalformedMessageError):
            assert isinstance(read(data).node_id, str)


@pytest.mark.parametrize(
    ("node", "version"),
    [
        (Node(user_agent_build_version=BuildVersion(version=SemanticVersion(1, 40, 3))), "1.40.3"),
        (
            Node(user_agent_name="envoy", user_agent_build_version=BuildVersion(version=SemanticVersion(1, 40, 3))),
            "1.40.3",
        ),
        (Node(user_agent_name="envoy"), ""),
        (Node(user_agent_version="gateway 2"), "gateway 2"),
        (Node(user_agent_name="gateway", user_agent_version="2"), "gateway 2"),
        (Node(user_agent_name="gateway"), "gateway"),
        (Node(), ""),
        (None, ""),
    ],
)
def test_the_version_of_an_envoy_is_read_as_it_says_it(node: Node | None, version: str) -> None:
    assert decode(bytes(DiscoveryRequest(node=node))).version == version
    assert decode_delta(bytes(DeltaDiscoveryRequest(node=node))).version == version


def test_version_is_the_content_alone_and_never_the_key() -> None:
    """The version is logged: no reader of the log may be able to check a guessed key against it."""
    later = datetime(2027, 1, 1, tzinfo=UTC)
    one, two = model.CertificateSecret(b"chain", b"key", SOME_TIME), model.CertificateSecret(b"chain", b"other", later)
    assert one.version == two.version
    assert one.version != model.CertificateSecret(b"chain 2", b"key", SOME_TIME).version
    assert one.version != model.BundleSecret(b"chain").version
    assert hashlib.sha256(b"key").hexdigest()[:16] != one.version


@pytest.mark.parametrize("form", [repr, str])
def test_no_representation_shows_the_key(form: object) -> None:
    assert callable(form)
    secret = model.CertificateSecret(b"chain", b"PLANTED", SOME_TIME)
    assert "PLANTED" not in form(secret)
    assert "PLANTED" not in form(encode_secret("default", secret))
    assert "PLANTED" not in form(Respond("n", (encode_secret("default", secret),)))
