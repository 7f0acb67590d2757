"""A stand-in for upstream CAs: real keys and certificates, each call answered by the next step of a script."""

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.lowlevel import checkpoint
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes.hierarchy import HOUR, URI, Ca, Key, key_usage, make_ca, make_leaf, new_key

from sds_agent.authority.embedded import REFRESH
from sds_agent.authority.in_process import StoredAuthority
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest, Supplied
from sds_agent.clock import Clock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType
from sds_agent.signing.self_signed import SelfSignedCa

BACKDATE = timedelta(minutes=2)
DECADE = timedelta(days=3650)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
MUST_STAPLE = (x509.TLSFeature([x509.TLSFeatureType.status_request]), False)
"""The extension by which a certificate is good only with an OCSP response beside it (RFC 7633)."""


class UpstreamCa:
    """A hierarchy of a root and two intermediates that answers CSRs, by the clock of its argument."""

    def __init__(self, now: Callable[[], datetime], name: str = "upstream") -> None:
        self.now = now
        validity: dict[str, Any] = {"not_before": now() - DECADE, "not_after": now() + DECADE}
        self.root = make_ca(f"{name} root", **validity)
        self.upper = make_ca(f"{name} upper", self.root, **validity)
        self.lower = make_ca(f"{name} lower", self.upper, **validity)
        self.stranger = make_ca(f"{name} stranger", **validity)
        """A root that the CA does not advertise."""

    def leaf(self, request: IssueRequest, *, issuer: Ca | None = None, **changed: Any) -> x509.Certificate:
        """A leaf for the request, good except for `changed` (keywords of `make_leaf`)."""
        # the CSR carries the public key, which is all that the CA needs
        key = cast("Key", x509.load_pem_x509_csr(request.csr_pem))
        now = self.now()
        asked = {
            "uri": str(request.identity),
            "key": key,
            "not_before": now - BACKDATE,
            "not_after": now + request.ttl,
        }
        return make_leaf(issuer or self.lower, **{**asked, **changed})

    def issuance(self, *chain: x509.Certificate) -> Issuance:
        """An answer with this chain and the root as anchor."""
        return Issuance(write_pem(chain), write_pem([self.root.certificate]))

    def under(self, leaf: x509.Certificate) -> Issuance:
        """An answer with this leaf and its intermediates in order."""
        return self.issuance(leaf, self.lower.certificate, self.upper.certificate)


Answer = Callable[[UpstreamCa, IssueRequest], Issuance]


def _with(**changed: Any) -> Answer:
    return lambda ca, request: ca.under(ca.leaf(request, **changed))


def good(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    """The answer to the request."""
    return ca.under(ca.leaf(request))


def another_key(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    """An answer to another caller's request."""
    return ca.under(ca.leaf(request, key=new_key()))


def shifted(begin: timedelta, end: timedelta) -> Answer:
    """A leaf that is valid from and until so long after now."""

    def answer(ca: UpstreamCa, request: IssueRequest) -> Issuance:
        return ca.under(ca.leaf(request, not_before=ca.now() + begin, not_after=ca.now() + end))

    return answer


def _uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


def _leads_nowhere(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return ca.under(ca.leaf(request, issuer=ca.stranger))


def _anchors_of_another(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return Issuance(good(ca, request).chain_pem, write_pem([ca.stranger.certificate]))


def _garbage_for_the_leaf(ca: UpstreamCa, _request: IssueRequest) -> Issuance:
    pem = b"-----BEGIN CERTIFICATE-----\nnot base64 at all!\n-----END CERTIFICATE-----\n"
    return Issuance(pem + write_pem([ca.root.certificate]), write_pem([ca.root.certificate]))


def _garbage_anchors(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return Issuance(good(ca, request).chain_pem, b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")


def _no_anchors(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return Issuance(good(ca, request).chain_pem, b"")


def _missing_intermediate(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return ca.issuance(ca.leaf(request), ca.lower.certificate)


def _expired_intermediate(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    expired = make_ca("expired", ca.root, not_before=ca.now() - DAY, not_after=ca.now() - SECOND)
    return ca.issuance(ca.leaf(request, issuer=expired), expired.certificate)


WRONG: Mapping[str, tuple[Answer, ErrorKind]] = {
    "another key": (another_key, ErrorKind.MISMATCH),
    "another SAN": (_with(uri="spiffe://demo.example/ns/default/sa/other"), ErrorKind.MISMATCH),
    "SAN in capitals": (_with(uri="spiffe://demo.example/ns/default/sa/WEB"), ErrorKind.MISMATCH),
    "SAN with more at its end": (_with(uri="spiffe://demo.example/ns/default/sa/web/"), ErrorKind.MISMATCH),
    "two SANs": (_with(names=[_uri("spiffe://demo.example/ns/default/sa/other")]), ErrorKind.MISMATCH),
    "a DNS name beside": (_with(names=[x509.DNSName("web.demo.example")]), ErrorKind.MISMATCH),
    "a DNS name instead": (
        _with(uri=None, names=[x509.DNSName("spiffe://demo.example/ns/default/sa/web")]),
        ErrorKind.MISMATCH,
    ),
    "no SAN": (_with(uri=None), ErrorKind.MISMATCH),
    "a CA certificate": (_with(is_ca=True), ErrorKind.MISMATCH),
    "no EKU": (_with(usages=()), ErrorKind.MISMATCH),
    "only serverAuth": (_with(usages=[ExtendedKeyUsageOID.SERVER_AUTH]), ErrorKind.MISMATCH),
    "only clientAuth": (_with(usages=[ExtendedKeyUsageOID.CLIENT_AUTH]), ErrorKind.MISMATCH),
    "a key usage without digitalSignature": (_with(usage=key_usage(cert_sign=True)), ErrorKind.MISMATCH),
    "must-staple": (_with(extra=[MUST_STAPLE]), ErrorKind.MISMATCH),
    "expired": (shifted(-DAY, -SECOND), ErrorKind.INVALID),
    "from the future": (shifted(DAY, 2 * DAY), ErrorKind.INVALID),
    "a chain that leads nowhere": (_leads_nowhere, ErrorKind.INVALID),
    "the anchors of another CA": (_anchors_of_another, ErrorKind.INVALID),
    "an intermediate missing": (_missing_intermediate, ErrorKind.INVALID),
    "an expired intermediate": (_expired_intermediate, ErrorKind.INVALID),
    "no anchors": (_no_anchors, ErrorKind.INVALID),
    "garbage": (lambda _ca, _request: Issuance(b"\x00\xff<html>502 Bad Gateway</html>"), ErrorKind.INVALID),
    "garbage for the leaf": (_garbage_for_the_leaf, ErrorKind.INVALID),
    "garbage as anchors": (_garbage_anchors, ErrorKind.INVALID),
    "nothing": (lambda _ca, _request: Issuance(b""), ErrorKind.INVALID),
}
"""Answers that the agent must never serve, by what is wrong, each with the kind of its error."""


def _roots_inside(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    chain = [ca.leaf(request), ca.lower.certificate, ca.upper.certificate, ca.root.certificate, ca.stranger.certificate]
    return ca.issuance(*chain)


def _wrong_order(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return ca.issuance(ca.upper.certificate, ca.lower.certificate, ca.leaf(request))


def _root_first(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    return ca.issuance(ca.root.certificate, ca.upper.certificate, ca.leaf(request), ca.lower.certificate)


def _repeated(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    chain = [ca.leaf(request), ca.lower.certificate, ca.upper.certificate]
    return Issuance(write_pem([*chain, *chain]), write_pem([ca.root.certificate] * 3))


def _text_between(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    answer = good(ca, request)
    chain = answer.chain_pem.replace(b"-----BEGIN", b"subject=\r\nissuer=/CN=x\r\n-----BEGIN").replace(b"\n", b"\r\n")
    return Issuance(b"\xef\xbb\xbf" + chain, answer.anchors_pem)


def _another_leaf_too(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    others = [ca.leaf(request, key=new_key()), ca.leaf(request)]
    return ca.issuance(*others, ca.lower.certificate, ca.upper.certificate)


ODD: Mapping[str, Answer] = {
    "as it should be": good,
    "roots inside the chain": _roots_inside,
    "intermediates in wrong order": _wrong_order,
    "the root first": _root_first,
    "everything twice": _repeated,
    "text, CRLF and a byte order mark": _text_between,
    "a leaf for another key too": _another_leaf_too,
    "a common name beside the SAN": _with(subject=x509.Name.from_rfc4514_string("CN=web")),
}
"""Good answers in odd forms: all give the leaf, its lower and its upper intermediate."""


def huge_serial(ca: UpstreamCa, request: IssueRequest) -> Issuance:
    """A leaf with a serial number of 300 bits. RFC 5280 allows 160, but parsers take more."""
    tbs, rest = _split(_inside(ca.leaf(request).public_bytes(Encoding.DER)))
    algorithm, _signature = _split(rest)
    version, rest = _split(_inside(tbs))
    _serial, rest = _split(rest)
    tbs = _element(_SEQUENCE, version + _element(_INTEGER, b"\x10" + bytes(37)) + rest)
    assert isinstance(ca.lower.key, ec.EllipticCurvePrivateKey)
    signature = ca.lower.key.sign(tbs, ec.ECDSA(hashes.SHA256()))
    der = _element(_SEQUENCE, tbs + algorithm + _element(_BIT_STRING, b"\x00" + signature))
    return ca.under(x509.load_der_x509_certificate(der))


_INTEGER, _BIT_STRING, _SEQUENCE = b"\x02", b"\x03", b"\x30"


def _element(tag: bytes, content: bytes) -> bytes:
    """A DER element of up to 64 KiB."""
    size = len(content)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
    return tag + length + content


def _inside(element: bytes) -> bytes:
    """A DER element's content."""
    size = element[1]
    return element[2:] if size < 0x80 else element[2 + (size & 0x7F) :]


def _split(der: bytes) -> tuple[bytes, bytes]:
    """The first of several DER elements, and what follows it."""
    begin = 2 if der[1] < 0x80 else 2 + (der[1] & 0x7F)
    size = der[1] if der[1] < 0x80 else int.from_bytes(der[2:begin], "big")
    return der[: begin + size], der[begin + size :]


Step = Callable[[IssueRequest], Awaitable[Issuance]]
"""The effect of one call."""


def answering(ca: UpstreamCa, answer: Answer = good) -> Step:
    """Answer at once."""

    async def step(request: IssueRequest) -> Issuance:
        return answer(ca, request)

    return step


def failing(kind: ErrorKind, message: str = "the CA says no", *, retry_after: float | None = None) -> Step:
    """Fail at once."""

    async def step(_request: IssueRequest) -> Issuance:
        raise AuthorityError(kind, message, retry_after=retry_after)

    return step


async def faulty(request: IssueRequest) -> Issuance:
    """A bug in the adapter. The exception holds the request, as one from a lookup by it would."""
    raise KeyError(request)


class Hang:
    """Wait until `release` is set, then act as `then`."""

    def __init__(self, then: Step) -> None:
        self.release = anyio.Event()
        self.given_up = False
        """Whether the caller has cancelled the call."""
        self._then = then

    async def __call__(self, request: IssueRequest) -> Issuance:
        try:
            await self.release.wait()
        except BaseException:
            self.given_up = True
            raise
        return await self._then(request)


async def embedded(
    directory: Path,
    clock: Clock,
    *,
    lifetime: timedelta = DECADE,
    key_type: KeyType = KeyType.EC_P256,
    trust_domain: str = "demo.example",
) -> StoredAuthority:
    """The agent's embedded CA, made in `directory` when there is none."""
    ca = await SelfSignedCa.open(
        directory,
        trust_domain=trust_domain,
        key_type=key_type,
        lifetime=lifetime,
        clock=clock,
        setting="state_dir",
    )
    return StoredAuthority(ca, "the embedded CA", clock, REFRESH)


class ScriptedAuthority:
    """An `Authority` that takes one step of its script for each call, and repeats the last."""

    def __init__(self, *script: Step) -> None:
        self.requests: list[IssueRequest] = []
        self.under_way = 0
        self.most_under_way = 0
        self._script = deque(script)
        self._asked = anyio.Event()

    async def issue(self, request: IssueRequest) -> Issuance:
        """Take the next step."""
        step = self._script.popleft() if len(self._script) > 1 else self._script[0]
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self._asked.set()
        self._asked = anyio.Event()
        try:
            await checkpoint()  # other tasks run before a CA answers
            return await step(request)
        finally:
            self.under_way -= 1

    async def asked(self, count: int) -> IssueRequest:
        """Wait for the count-th request, and return it."""
        with anyio.fail_after(10):
            while len(self.requests) < count:
                await self._asked.wait()
        return self.requests[count - 1]


class ScriptedTrust:
    """A `AdvertisesAnchors`: each step is a PEM text, an exception, or None to hang; it repeats the last."""

    refresh_every = timedelta(minutes=5)

    def __init__(self, *script: bytes | BaseException | None) -> None:
        self.calls = 0
        self._script = deque(script)
        self._asked = anyio.Event()

    async def anchors(self) -> bytes:
        """Take the next step."""
        self.calls += 1
        self._asked.set()
        self._asked = anyio.Event()
        step = self._script.popleft() if len(self._script) > 1 else self._script[0]
        if step is None:
            await anyio.sleep_forever()
        if isinstance(step, BaseException):
            raise step
        assert step is not None
        return step

    async def asked(self, count: int) -> None:
        """Wait for the count-th call."""
        with anyio.fail_after(10):
            while self.calls < count:
                await self._asked.wait()


def made(ca: UpstreamCa, *, key: Key | None = None, answer: Answer = good, **changed: Any) -> Supplied:
    """A certificate for the workload that is valid for an hour, with its key; `changed` as for `UpstreamCa.leaf`."""
    own = key or new_key()
    stand_in = own if isinstance(own, ec.EllipticCurvePrivateKey) else new_key()  # for the request; the leaf has `own`
    request = IssueRequest(SpiffeId.parse(URI), make_csr(stand_in, URI), HOUR, "made")
    issuance = ca.under(ca.leaf(request, **{"key": own, **changed})) if key or changed else answer(ca, request)
    return Supplied(issuance, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


class ScriptedSupplier:
    """A `Supplier` that gives what a test has put there last, a certificate or an error, and waits without."""

    def __init__(self, newest: Supplied | AuthorityError | None = None) -> None:
        self.calls = 0
        self.waiting = 0
        self._newest = newest
        self._changed = anyio.Event()

    def give(self, newest: Supplied | AuthorityError) -> None:
        """From now on this is what there is."""
        self._newest = newest
        self._changed.set()
        self._changed = anyio.Event()

    async def supply(self, _identity: SpiffeId, held: bytes | None) -> Supplied:
        """What was given last, as soon as it is another than `held`."""
        self.calls += 1
        self.waiting += 1
        try:
            while True:
                await checkpoint()
                newest, changed = self._newest, self._changed
                if isinstance(newest, AuthorityError):
                    raise newest
                if newest is not None and newest.issuance.chain_pem != held:
                    return newest
                await changed.wait()
        finally:
            self.waiting -= 1
