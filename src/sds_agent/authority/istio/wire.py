"""Istio's certificate service, `istio.v1.auth.IstioCertificateService/CreateCertificate`, as values: what is asked, how
an answer is read, and what a refusal means. No I/O.

istiod answers with the leaf, then every certificate of its cert-chain.pem in the order of that file, and last its
root-cert.pem, unchanged. So there is text around the certificates, one element may hold several, their order means
nothing, and the anchors are exactly the certificates in the last element, self-signed or not. A self-signed certificate
before it is no anchor.
"""

import re

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct as Metadata
from msgspec import Struct
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.authority.answers import status_and, words
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.pki.certificates import CertificateError, read_bundle
from sds_agent.signing.signing_set import LARGEST_ANSWER

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"


# gRPC's own words: nothing else in what it gives tells its refusal of a large answer from a CA's of a hasty caller
_TOO_LARGE = re.compile(
    rf"Received message larger than max \(([0-9]+) vs\. {LARGEST_ANSWER}\)|Decompressed message larger than max"
)
_WORKLOAD = re.compile(r"spiffe://[^/]+/.+")

_KINDS = {
    "RESOURCE_EXHAUSTED": ErrorKind.THROTTLED,
    "UNAUTHENTICATED": ErrorKind.UNAUTHENTICATED,
    "PERMISSION_DENIED": ErrorKind.DENIED,
    "FAILED_PRECONDITION": ErrorKind.DENIED,
    "INVALID_ARGUMENT": ErrorKind.INVALID,
    "OUT_OF_RANGE": ErrorKind.INVALID,
    "NOT_FOUND": ErrorKind.INVALID,
    "UNIMPLEMENTED": ErrorKind.INVALID,
}
"""All other codes are transient: the CA is not there, not ready, or was interrupted."""

_FIXES = {
    "RESOURCE_EXHAUSTED": "it is asked less often from now on",
    "UNAUTHENTICATED": "check the token's audience (istio-ca) and age, and cluster_id; istio-csr also answers so to a "
    "CSR that it refuses, such as one for another identity than the caller's",
    "PERMISSION_DENIED": "let the CA's policy allow this caller the identity, or turn impersonate off",
    "INVALID_ARGUMENT": "check the workload's key and ttl: Istio's CAs accept at most 90d",
    "UNIMPLEMENTED": "the server at this address is no Istio CA: check address",
    "UNAVAILABLE": "check that it runs at this address, and that ca_file and server_name fit its certificate",
    "DEADLINE_EXCEEDED": "check that the network lets the agent through to this address",
    "INTERNAL": "read the CA's own log: it may not be ready yet, or its signer has expired",
}

_NOT_FOR_OTHERS = (
    "check the token, and that the CA lets this caller act for others: istiod wants it in "
    "CA_TRUSTED_NODE_ACCOUNTS, a pod of that identity on its node, and cluster_id, which is Kubernetes unless set there"
)


class CallStatus(Struct, frozen=True):
    """How a call failed: the name of the gRPC status code, and the CA's (or the library's) words about it.

    `retry_after` is in seconds, and None unless the CA named a delay.
    """

    code: str
    details: str
    retry_after: float | None = None


def request_bytes(request: IssueRequest, *, cert_signer: str | None = None, impersonate: bool = False) -> bytes:
    """The CertificateRequest. The lifetime is in whole seconds and always positive, since 0 means a day to Istio's CAs
    and is clamped without a word by others.
    """
    message = CertificateRequest(
        csr=request.csr_pem.decode("ascii"), validity_duration=max(1, int(request.ttl.total_seconds()))
    )
    wanted = {"CertSigner": cert_signer, "ImpersonatedIdentity": str(request.identity) if impersonate else None}
    given = {key: value for key, value in wanted.items() if value is not None}
    if given:
        metadata = Metadata()
        metadata.update(given)
        message.metadata.CopyFrom(metadata)
    return message.SerializeToString()


def read_response(data: bytes, extra_anchors: bytes = b"") -> Issuance:
    """The answer in `data`; `extra_anchors` (PEM) are added to those that it advertises.

    Raises AuthorityError INVALID for what is no such answer.
    """
    response = CertificateResponse()
    try:
        response.ParseFromString(data)
    except DecodeError as error:
        raise _invalid("is not a CertificateResponse") from error
    elements = [element.encode() for element in response.cert_chain]
    advertised = list(response.root_cert)
    if advertised:
        chain, anchors, where = elements, b"\n".join(advertised), "its root_cert"
    elif len(elements) < 2:
        raise _invalid(f"has {len(elements)} elements, and two are the least: the certificate and the root bundle")
    else:
        chain, anchors, where = elements[:-1], elements[-1], "its last element, where the root bundle belongs,"
    _check_anchors(anchors, where)
    return Issuance(b"\n".join(chain), b"\n".join(filter(None, [anchors, extra_anchors])))


def _check_anchors(anchors: bytes, where: str) -> None:
    try:
        found = read_bundle(anchors)
    except CertificateError as error:
        raise _invalid(f"cannot be used: {where} cannot be read ({error})") from error
    if not found.certificates:
        raise _invalid(f"cannot be used: {where} holds no certificate")


def _invalid(what: str) -> AuthorityError:
    return AuthorityError(
        ErrorKind.INVALID, f"the CA's answer {what}; check the CA's root-cert.pem and cert-chain.pem, and address"
    )


def refusal(status: CallStatus, address: str, *, impersonate: bool = False) -> AuthorityError:
    """The error that a failed call means. An Istio CA answers UNAUTHENTICATED to a caller that may not impersonate."""
    if status.code == "RESOURCE_EXHAUSTED" and (size := _TOO_LARGE.search(status.details)):
        return AuthorityError(
            ErrorKind.INVALID,
            f"the answer of the Istio CA at {address} has {size[1] or 'too many'} bytes, and at most {LARGEST_ANSWER} "
            "are received; remove the roots that are no longer needed from the CA's root bundle",
        )
    kind = _KINDS.get(status.code, ErrorKind.TRANSIENT)
    said = status_and(words(status.details), status.code)
    fix = _FIXES.get(status.code, "read the CA's own log")
    if impersonate and kind is ErrorKind.UNAUTHENTICATED:
        fix = _NOT_FOR_OTHERS
    message = f"the Istio CA at {address} did not issue ({said}); {fix}"
    return AuthorityError(kind, message, retry_after=status.retry_after)


def names_a_workload(uris: tuple[str, ...]) -> bool:
    """Whether a certificate with these URIs identifies a workload: it has one SPIFFE ID with a path.

    istiod accepts only `spiffe://TD/ns/NS/sa/SA`, and authenticates by the token otherwise. Other CAs accept any, and
    after a token that can be used only once the certificate is the only proof left.
    """
    return len(uris) == 1 and _WORKLOAD.fullmatch(uris[0]) is not None
