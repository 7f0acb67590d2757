"""The SPIFFE Workload API as values: what is asked, how a message is read, and what the end of a stream means. No I/O.

Each message of `FetchX509SVID` is the whole state: every certificate that the caller may have, each with its key and
the bundle of its trust domain, and the bundles of other trust domains. What a message leaves out is gone. The order of
the certificates means nothing, and the same state is sent again and again (SPIFFE Workload API, section 5.2).
"""

import base64
import re
from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError
from msgspec import Struct
from sds_agent_proto.spiffe_pb2 import X509Svid, X509SvidsRequest, X509SvidsResponse

from sds_agent.authority.answers import status_and, words
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, Supplied
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError, TrustDomain
from sds_agent.pki.der import split
from sds_agent.text import quoted
from sds_agent.values import Sensitive

METHOD = "/SpiffeWorkloadAPI/FetchX509SVID"
METADATA = (("workload.spiffe.io", "true"),)
"""What every call has to have: it shows that the caller was not made to call by somebody else (section 6)."""
REQUEST = X509SvidsRequest().SerializeToString()

LARGEST_MESSAGE = 4 << 20
"""Bytes. A certificate with its key takes two kilobytes, and an agent gives a caller some dozens at most."""
MOST = 1000
"""Certificates with keys, trust domains, and certificates in each of them: far more than any agent gives."""
LONGEST_NAME = 200
"""Characters of a SPIFFE ID in a message."""
MOST_NAMED = 5
"""SPIFFE IDs that a message names."""

_KINDS = {
    "PERMISSION_DENIED": ErrorKind.DENIED,
    "UNAUTHENTICATED": ErrorKind.UNAUTHENTICATED,
    "RESOURCE_EXHAUSTED": ErrorKind.THROTTLED,
    "INVALID_ARGUMENT": ErrorKind.INVALID,
    "UNIMPLEMENTED": ErrorKind.INVALID,
}
"""All other codes are transient: the agent is not there, restarts, or waits for its server."""

_FIXES = {
    "PERMISSION_DENIED": "register an entry whose selectors fit the process of sds-agent, such as unix:uid:ITS_UID; it "
    "takes some seconds to get here",
    "UNAUTHENTICATED": "let the agent of this Workload API identify the process of sds-agent",
    "RESOURCE_EXHAUSTED": "it is asked less often from now on",
    "INVALID_ARGUMENT": "check that socket is that of a SPIFFE Workload API",
    "UNIMPLEMENTED": "there is another service at this socket: check socket",
    "UNAVAILABLE": "check that its agent runs and has reached its server, that socket is right, and that the user of "
    "sds-agent may connect to it",
}
# gRPC's own words: nothing else in what it gives tells its refusal of a large message from that of a busy server
_TOO_LARGE = re.compile("(Received|Decompressed) message larger than max")


class Svid(Sensitive, frozen=True, order=True):
    """A certificate as it was sent: the chain and the bundle in PEM, the key as PKCS#8 in PEM."""

    spiffe_id: str
    hint: str
    chain_pem: bytes
    private_key_pem: bytes
    bundle_pem: bytes


class WorkloadState(Sensitive, frozen=True):
    """All that the Workload API gives to this process. Two states are equal if they say the same, in whatever order.

    `federated` has the anchors of other trust domains, in PEM, by their bare names.
    """

    svids: tuple[Svid, ...]
    federated: Mapping[str, bytes]

    def supplied(self, identity: SpiffeId, hint: str | None, socket: str) -> Supplied:
        """The certificate of this identity. Raises AuthorityError DENIED where there is none.

        Where several entries give one, which of them is taken depends on this state alone.
        """
        named = [svid for svid in self.svids if svid.spiffe_id == str(identity)]
        fitting = [svid for svid in named if hint is None or svid.hint == hint]
        if not fitting:
            raise self._none(identity, hint if named else None, socket)
        svid = fitting[0]
        return Supplied(Issuance(svid.chain_pem, svid.bundle_pem), svid.private_key_pem)

    def anchors(self, trust_domain: str) -> bytes:
        """The anchors of the trust domain that come with its certificates, in PEM."""
        own = f"{TrustDomain(trust_domain).uri}/"
        return b"".join(dict.fromkeys(svid.bundle_pem for svid in self.svids if svid.spiffe_id.startswith(own)))

    def _none(self, identity: SpiffeId, hint: str | None, socket: str) -> AuthorityError:
        if hint is not None:
            hints = ", ".join(sorted({quoted(svid.hint, LONGEST_NAME) for svid in self.svids})[:MOST_NAMED])
            wanted, given, fix = f"{identity} with the hint {quoted(hint)}", f"the hints {hints}", "correct hint"
        else:
            names = sorted({quoted(svid.spiffe_id, LONGEST_NAME) for svid in self.svids})
            more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
            wanted, given = str(identity), ", ".join([*names[:MOST_NAMED], *more]) or "none"
            fix = "register an entry with that ID for this process, or correct spiffe_id"
        return AuthorityError(
            ErrorKind.DENIED, f"the Workload API at {socket} gives no certificate for {wanted} but {given}; {fix}"
        )


def read_state(data: bytes, own: str) -> WorkloadState:
    """The state that a message tells to an agent of the trust domain `own`.

    What is said of a trust domain whose name is none is left out. Raises AuthorityError INVALID for what is no such
    message.
    """
    message = X509SvidsResponse()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise _invalid("is no X509SVIDResponse") from error
    if max(len(message.svids), len(message.federated_bundles)) > MOST:
        raise _invalid(f"holds more than {MOST} certificates or trust domains")
    svids = sorted(map(_svid, message.svids))
    return WorkloadState(tuple(svids), dict(_federated(message.federated_bundles, own)))


def _svid(sent: X509Svid) -> Svid:
    try:
        chain, bundle = _certificates(sent.x509_svid), _certificates(sent.bundle)
    except IndexError as error:
        raise _invalid(f"holds no usable DER for {quoted(sent.spiffe_id, LONGEST_NAME)}") from error
    return Svid(sent.spiffe_id, sent.hint, chain, _pem("PRIVATE KEY", sent.x509_svid_key), bundle)


def _federated(bundles: Mapping[str, bytes], own: str) -> Iterable[tuple[str, bytes]]:
    for uri, der in bundles.items():
        try:
            name = TrustDomain.parse(uri.removeprefix("spiffe://")).name
        except SpiffeIdError:
            continue
        if name == own:
            continue
        try:
            yield name, _certificates(der)
        except IndexError:
            yield name, b""  # the caller reports then that there is no usable anchor in it


def _certificates(der: bytes) -> bytes:
    """DER certificates, one after another, in PEM. Raises IndexError for what is no DER, and for too many."""
    return b"".join(_pem("CERTIFICATE", each) for each in split(der, MOST))


def _pem(label: str, der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----\n".encode()])


def _invalid(what: str) -> AuthorityError:
    return AuthorityError(
        ErrorKind.INVALID, f"a message of the Workload API {what}; check that socket is that of a SPIFFE Workload API"
    )


class StreamEnd(Struct, frozen=True):
    """How a stream ended: the name of the gRPC status code, and the other side's (or the library's) words about it."""

    code: str
    details: str = ""

    def error(self, socket: str) -> AuthorityError:
        """What that means for a caller."""
        if self.code == "RESOURCE_EXHAUSTED" and _TOO_LARGE.search(self.details):
            return AuthorityError(
                ErrorKind.INVALID,
                f"the Workload API at {socket} sent a message of more than {LARGEST_MESSAGE} bytes; register fewer "
                "entries for this process, or fewer trust domains to federate with",
            )
        said = status_and(words(self.details), self.code)
        fix = _FIXES.get(self.code, "read the log of its agent")
        kind = _KINDS.get(self.code, ErrorKind.TRANSIENT)
        return AuthorityError(kind, f"the Workload API at {socket} gives no certificate ({said}); {fix}")
