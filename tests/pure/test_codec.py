"""The narrow schema against the published one: what we write must read back through Envoy's types as it was meant."""

import hashlib
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from envoy_data_plane.envoy.config.core.v3 import DataSource, Node
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
)
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
from sds_agent.sds.protocol import SECRET_TYPE, Respond
from sds_agent.secrets import model

SOME_TIME = datetime(2026, 1, 1, tzinfo=UTC)

names = st.text(min_size=1, max_size=40)
blobs = st.binary(max_size=300)
secrets = st.one_of(
    st.builds(model.CertificateSecret, blobs, blobs, st.just(SOME_TIME)), st.builds(model.BundleSecret, blobs)
)
served = st.dictionaries(names, secrets, max_size=4)
nonces = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40)


def meant(name: str, secret: model.Secret) -> Secret:
    if isinstance(secret, model.CertificateSecret):
        chain, key = DataSource(inline_bytes=secret.chain_pem), DataSource(inline_bytes=secret.private_key_pem)
        return Secret(name=name, tls_certificate=TlsCertificate(certificate_chain=chain, private_key=key))
    anchors = DataSource(inline_bytes=secret.anchors_pem)
    return Secret(name=name, validation_context=CertificateValidationContext(trusted_ca=anchors))


@given(served, nonces)
def test_sotw_answer_reads_back_as_what_was_meant(secrets: dict[str, model.Secret], nonce: str) -> None:
    resources = tuple(encode_secret(name, secret) for name, secret in secrets.items())
    answer = DiscoveryResponse.parse(encode(Respond(nonce, resources)))
    versions = [secret.version for secret in secrets.values()]
    assert answer.nonce == nonce
    assert answer.type_url == SECRET_TYPE
    assert answer.version_info == versions[0] if len(versions) == 1 else answer.version_info not in {"", *versions}
    assert [r.type_url for r in answer.resources] == [SECRET_TYPE] * len(secrets)
    assert [Secret.parse(r.value) for r in answer.resources] == [meant(n, s) for n, s in secrets.items()]


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
def test_delta_answer_reads_back_as_what_was_meant(
    secrets: dict[str, model.Secret], nonce: str, removed: list[str]
) -> None:
    resources = tuple(encode_secret(name, secret) for name, secret in secrets.items())
    answer = DeltaDiscoveryResponse.parse(encode_delta(Respond(nonce, resources, tuple(removed))))
    assert answer.nonce == nonce
    assert answer.type_url == SECRET_TYPE
    assert answer.removed_resources == removed
    assert [(r.name, r.version) for r in answer.resources] == [(n, s.version) for n, s in secrets.items()]
    inner = [r.resource for r in answer.resources if r.resource is not None]
    assert [Secret.parse(any_.value) for any_ in inner] == [meant(n, s) for n, s in secrets.items()]


errors = st.none() | st.text(max_size=40)


def status(error: str | None) -> Status | None:
    return None if error is None else Status(code=13, message=error)


@given(st.lists(names, max_size=4), names, names, errors, names)
def test_request_written_by_the_published_schema_is_read(
    asked: list[str], nonce: str, version: str, error: str | None, node: str
) -> None:
    message = DiscoveryRequest(
        resource_names=asked,
        response_nonce=nonce,
        version_info=version,
        error_detail=status(error),
        type_url=SECRET_TYPE,
        node=Node(id=node, cluster="c", user_agent_name="envoy"),
    )
    request = decode(bytes(message))
    assert request.names == tuple(asked)
    assert (request.nonce, request.version, request.error) == (nonce, version, error)
    assert (request.type_url, request.node_id) == (SECRET_TYPE, node)


@given(st.lists(names, max_size=4), st.lists(names, max_size=4), st.dictionaries(names, names, max_size=3), errors)
def test_delta_request_written_by_the_published_schema_is_read(
    subscribe: list[str], unsubscribe: list[str], held: dict[str, str], error: str | None
) -> None:
    message = DeltaDiscoveryRequest(
        resource_names_subscribe=subscribe,
        resource_names_unsubscribe=unsubscribe,
        initial_resource_versions=held,
        response_nonce="n",
        error_detail=status(error),
        node=Node(id="node"),
    )
    request = decode_delta(bytes(message))
    assert (request.subscribe, request.unsubscribe) == (tuple(subscribe), tuple(unsubscribe))
    assert (dict(request.held), request.nonce, request.error) == (held, "n", error)
    assert request.node_id == "node"


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused_and_nothing_else(data: bytes) -> None:
    """An exception of any other kind would end in a traceback in the log."""
    for read in (decode, decode_delta):
        with suppress(MalformedMessageError):
            assert isinstance(read(data).node_id, str)


def test_version_is_the_content_alone_and_never_the_key() -> None:
    """The version is logged: nobody may be able to check a guessed key against it."""
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
