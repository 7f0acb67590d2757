"""The session's words as bytes on the wire and back, through the narrow schema in `proto_gen`.

An answer consists of parts that are the same for every stream (its resources, each encoded once when its secret
changes) and its nonce. Protobuf lets the fields of a message come in any order and repeated fields in any number of
pieces, so an answer is the concatenation of finished parts. DiscoveryResponse and DeltaDiscoveryResponse number
`type_url` (4) and `nonce` (5) alike.
"""

from google.protobuf.message import DecodeError
from sds_agent_proto import sds_pb2 as wire

from sds_agent.digest import sha256
from sds_agent.errors import SdsAgentError
from sds_agent.sds.protocol import SECRET_TYPE, DeltaRequest, Resource, Respond, SotwRequest
from sds_agent.secrets.model import CertificateSecret, Secret

ENVOY = "envoy"
"""What an Envoy says its program is."""

_TYPE_URL = wire.DiscoveryResponse(type_url=SECRET_TYPE).SerializeToString()
_NONCE = wire.DiscoveryResponse(nonce="n").SerializeToString()[:1]


class MalformedMessageError(SdsAgentError):
    """A peer sent bytes that are not the message they should be."""


def decode(data: bytes) -> SotwRequest:
    """Read a DiscoveryRequest. Raises MalformedMessageError."""
    message = wire.DiscoveryRequest()
    _parse(message, data)
    node = message.node
    return SotwRequest(
        names=tuple(message.resource_names),
        nonce=message.response_nonce,
        error=_error(message),
        type_url=message.type_url,
        node_id=node.id,
        cluster=node.cluster,
        version=_client_version(node),
    )


def decode_delta(data: bytes) -> DeltaRequest:
    """Read a DeltaDiscoveryRequest. Raises MalformedMessageError."""
    message = wire.DeltaDiscoveryRequest()
    _parse(message, data)
    node = message.node
    return DeltaRequest(
        subscribe=tuple(message.resource_names_subscribe),
        unsubscribe=tuple(message.resource_names_unsubscribe),
        nonce=message.response_nonce,
        error=_error(message),
        type_url=message.type_url,
        node_id=node.id,
        cluster=node.cluster,
        version=_client_version(node),
    )


def encode_secret(name: str, secret: Secret) -> Resource:
    """The resource of `secret` under `name`, with every part of an answer that does not depend on the stream."""
    return _resource(_secret(name, secret), secret.version)


def varied(resource: Resource, count: int) -> Resource:
    """The same secret and version with other bytes: with so many empty lines more at the end of its PEM."""
    secret = wire.Secret.FromString(wire.DiscoveryResponse.FromString(resource.sotw).resources[0].value)
    if secret.HasField("tls_certificate"):
        secret.tls_certificate.certificate_chain.inline_bytes += b"\n" * count
    else:
        secret.validation_context.trusted_ca.inline_bytes += b"\n" * count
    return _resource(secret, resource.version)


def encode(answer: Respond) -> bytes:
    """A DiscoveryResponse."""
    resources = answer.resources
    version = resources[0].version_info if len(resources) == 1 else _version_of_all(resources)
    return b"".join((version, *[r.sotw for r in resources], _TYPE_URL, _nonce(answer.nonce)))


def encode_delta(answer: Respond) -> bytes:
    """A DeltaDiscoveryResponse."""
    removed = answer.removed and wire.DeltaDiscoveryResponse(removed_resources=answer.removed).SerializeToString()
    return b"".join((*[r.delta for r in answer.resources], removed or b"", _TYPE_URL, _nonce(answer.nonce)))


def _parse(message: wire.DiscoveryRequest | wire.DeltaDiscoveryRequest, data: bytes) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise MalformedMessageError(f"the message is not a {type(message).__name__}") from error


def _client_version(node: wire.Node) -> str:
    """The client's version in the form that it gives: numbers, as Envoys do, or text. The name of a client that is no
    Envoy stands before it.
    """
    version = node.user_agent_version
    if node.HasField("user_agent_build_version"):
        numbers = node.user_agent_build_version.version
        version = f"{numbers.major_number}.{numbers.minor_number}.{numbers.patch}"
    name = node.user_agent_name
    if name in {"", ENVOY}:
        return version
    return f"{name} {version}" if version else name


def _error(message: wire.DiscoveryRequest | wire.DeltaDiscoveryRequest) -> str | None:
    return message.error_detail.message if message.HasField("error_detail") else None


def _resource(secret: wire.Secret, version: str) -> Resource:
    value = wire.Any(type_url=SECRET_TYPE, value=secret.SerializeToString())
    entry = wire.Resource(name=secret.name, version=version, resource=value)
    return Resource(
        name=secret.name,
        version=version,
        sotw=wire.DiscoveryResponse(resources=[value]).SerializeToString(),
        delta=wire.DeltaDiscoveryResponse(resources=[entry]).SerializeToString(),
        version_info=wire.DiscoveryResponse(version_info=version).SerializeToString(),
    )


def _secret(name: str, secret: Secret) -> wire.Secret:
    if isinstance(secret, CertificateSecret):
        certificate = wire.TlsCertificate(
            certificate_chain=wire.DataSource(inline_bytes=secret.chain_pem),
            private_key=wire.DataSource(inline_bytes=secret.private_key_pem),
        )
        return wire.Secret(name=name, tls_certificate=certificate)
    context = wire.CertificateValidationContext(trusted_ca=wire.DataSource(inline_bytes=secret.anchors_pem))
    if secret.lists_pem:
        context.crl.inline_bytes = secret.lists_pem
        context.only_verify_leaf_cert_crl = True  # or else Envoys ask for the list of every CA up to the root
    return wire.Secret(name=name, validation_context=context)


def _version_of_all(resources: tuple[Resource, ...]) -> bytes:
    digest = sha256("\n".join(f"{r.name} {r.version}" for r in resources).encode())
    return wire.DiscoveryResponse(version_info=digest.hex()[:16]).SerializeToString()


def _nonce(nonce: str) -> bytes:
    """A nonce of ours, which is short: its tag, its length in one byte, and itself."""
    text = nonce.encode()
    return b"".join((_NONCE, bytes((len(text),)), text))
