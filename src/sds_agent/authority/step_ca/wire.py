"""step-ca's requests and answers as values, and what each failure means. No I/O.

A token is a JWT that the provisioner's key signs (RFC 7519). step-ca takes each once, also where the request with it
fails, so every attempt needs another.
"""

import hashlib
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import Struct

from sds_agent.authority import answers
from sds_agent.authority.answers import decoded, status_and
from sds_agent.authority.credentials import Token
from sds_agent.authority.http_message import http_date, is_passing
from sds_agent.authority.protocol import AuthorityError, ErrorKind, IssueRequest
from sds_agent.authority.step_ca.jwk import SigningKey, StepCaJwk
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import (
    CertificateError,
    ParsedBundle,
    describe_time,
    extended_key_usages,
    read_bundle,
    san_values,
    write_pem,
)
from sds_agent.text import one_line, quoted
from sds_agent.values import Sensitive

T = TypeVar("T", bound=Struct)

SIGN = "/1.0/sign"
REKEY = "/1.0/rekey"
ROOTS = "/1.0/roots"
FEDERATION = "/1.0/federation"
INTERMEDIATES = "/1.0/intermediates"
CRL = "/1.0/crl"
PROVISIONERS = "/1.0/provisioners"

TOKEN_LIFETIME = timedelta(minutes=5)
BACKDATE = timedelta(minutes=1)
"""How far step-ca sets NotBefore back, unless its configuration says otherwise (`backdate`)."""
SKEW = timedelta(minutes=1)
"""How far step-ca's clock may be from the token's."""
SUCCESS = frozenset({200, 201})
SECOND = timedelta(seconds=1)
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


class StepCaProof(Sensitive, frozen=True):
    """What signs the tokens for a provisioner, and what in the token says which one it is."""

    key: SigningKey
    algorithm: str
    headers: Mapping[str, Any]
    fragment: str = ""
    kind: str = "JWK"

    @property
    def kid(self) -> str | None:
        """The name of a JWK provisioner's key."""
        kid = self.headers.get("kid")
        return kid if isinstance(kid, str) else None


class SignBody(Struct, frozen=True, rename="camel"):
    """What `/1.0/sign` takes."""

    csr: str
    ott: str
    not_after: str


class RekeyBody(Struct, frozen=True):
    """What `/1.0/rekey` takes."""

    csr: str


class CertificateAnswer(Struct, frozen=True, rename="camel"):
    """What both answer: the certificate, its issuer, and both in `cert_chain`. `ca` may be null."""

    crt: str = ""
    ca: str | None = None
    cert_chain: tuple[str, ...] = ()


class _Certificates(Struct, frozen=True):
    crts: tuple[str, ...]


class _Root(Struct, frozen=True):
    ca: str


class _ErrorBody(Struct, frozen=True):
    message: str = ""


class _ProvisionerKey(Struct, frozen=True):
    kid: str = ""


class StepCaProvisioner(Struct, frozen=True):
    """A provisioner as step-ca shows it to everybody."""

    type: str = ""
    name: str = ""
    key: _ProvisionerKey | None = None


class ProvisionersPage(Struct, frozen=True, rename="camel"):
    """A page of `/1.0/provisioners`; where `next_cursor` is not empty there is another one."""

    provisioners: tuple[StepCaProvisioner, ...] = ()
    next_cursor: str = ""


def jwk_proof(jwk: StepCaJwk) -> StepCaProof:
    """What a JWK provisioner's key proves."""
    return StepCaProof(jwk.key, jwk.algorithm, {"kid": jwk.kid})


def x5c_proof(chain: Iterable[x509.Certificate], key: SigningKey, provisioner: str) -> StepCaProof:
    """What a certificate proves to the X5C provisioner of this name (RFC 7515 section 4.1.6)."""
    shown = [b64encode(each.public_bytes(Encoding.DER)).decode() for each in chain]
    return StepCaProof(key, _algorithm(key), {"x5c": shown}, f"#x5c/{provisioner}", "X5C")


def _algorithm(key: SigningKey) -> str:
    size = getattr(getattr(key, "curve", None), "name", "")
    return {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}.get(size, "RS256")


def claims(
    request: IssueRequest, proof: StepCaProof, *, provisioner: str, host: str, jti: str, now: datetime
) -> dict[str, Any]:
    """What the token for a request says. `host` is one of step-ca's dnsNames.

    `sub` becomes the common name by step-ca's default template. `cnf` binds the token to the CSR. There is no `iat`:
    step-ca would compare it with the time of its own start, and so refuse the tokens of a clock that is behind.
    """
    der = x509.load_pem_x509_csr(request.csr_pem).public_bytes(Encoding.DER)
    digest = urlsafe_b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")
    return {
        "iss": provisioner,
        "aud": f"https://{host}{SIGN}{proof.fragment}",
        "sub": str(request.identity),
        "sans": [str(request.identity)],
        "nbf": int(now.timestamp()),
        "exp": int((now + TOKEN_LIFETIME).timestamp()),
        "jti": jti,
        "cnf": {"x5rt#S256": digest},
    }


def audience_host(url: str, server_name: str | None) -> str:
    """The CA's own name for the audience; ports do not count there."""
    parts = urlsplit(url)
    if server_name is None:
        return parts.netloc
    return server_name if parts.port is None else f"{server_name}:{parts.port}"


def sign_body(request: IssueRequest, token: str) -> bytes:
    """The body for `/1.0/sign`. The lifetime has a unit: step-ca refuses a number alone, and "" means its default."""
    seconds = max(1, int(request.ttl.total_seconds()))
    return msgspec.json.encode(SignBody(request.csr_pem.decode("ascii"), token, f"{seconds}s"))


def rekey_body(request: IssueRequest) -> bytes:
    """The body for `/1.0/rekey`."""
    return msgspec.json.encode(RekeyBody(request.csr_pem.decode("ascii")))


def rekey_fault(
    leaf: x509.Certificate | None, identity: SpiffeId, ttl: timedelta, backdate: timedelta, now: datetime
) -> str | None:
    """Why a certificate cannot be renewed by `/1.0/rekey`, or would not become what is asked for; None if it can.

    step-ca keeps names and span, which is the lifetime that was asked for and the backdate. Its configuration sets the
    backdate; it is learnt from each certificate that was signed.
    """
    if leaf is None:
        return "there is none"
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        return "it is not valid now"
    names = san_values(leaf)
    if len(names) != 1 or names[0] != x509.UniformResourceIdentifier(str(identity)):
        return "it is for another identity"
    if abs(span(leaf) - backdate - ttl) > SECOND:
        return "it has another lifetime than the ttl"
    return None


def span(leaf: x509.Certificate) -> timedelta:
    """From NotBefore to NotAfter."""
    return leaf.not_valid_after_utc - leaf.not_valid_before_utc


def read_answer(body: bytes, kind: type[T], what: str) -> T:
    """An answer in JSON. Raises AuthorityError INVALID for what is none; `what` names it."""
    if (answer := decoded(body, kind)) is None:
        raise _unusable(what, "is not what step-ca sends")
    return answer


def read_chain(body: bytes, what: str) -> bytes:
    """The certificate and its intermediates, in PEM. Raises AuthorityError INVALID."""
    answer = read_answer(body, CertificateAnswer, what)
    chain = answer.cert_chain or tuple(each for each in (answer.crt, answer.ca) if each)
    if not chain:
        raise _unusable(what, "holds no certificate")
    return "\n".join(chain).encode()


def read_certificates(body: bytes, what: str) -> ParsedBundle:
    """The certificates of `/1.0/roots` and of `/1.0/federation`. Raises AuthorityError INVALID."""
    answer = read_answer(body, _Certificates, what)
    try:
        return read_bundle("\n".join(answer.crts).encode())
    except CertificateError as error:
        raise _unusable(what, f"holds certificates that cannot be read ({error})") from error


def read_root(body: bytes, fingerprint: str, what: str) -> bytes:
    """The root with this fingerprint, in PEM. Raises AuthorityError INVALID for any other.

    Who answered is not known: the hash of the DER alone proves the root.
    """
    answer = read_answer(body, _Root, what)
    try:
        found = read_bundle(answer.ca.encode()).certificates
    except CertificateError as error:
        raise _unusable(what, f"holds a root that cannot be read ({error})") from error
    for each in found:
        if hashlib.sha256(each.public_bytes(Encoding.DER)).hexdigest() == fingerprint:
            return write_pem([each])
    raise AuthorityError(
        ErrorKind.INVALID,
        f"{what} answered with another root than the one with the fingerprint {fingerprint}; check url, and that "
        "nothing on the way answers in place of step-ca",
    )


def lists_refusal(status: int, words: str, what: str, *, retry_after: float | None = None) -> AuthorityError:
    """The error for an answer to CRL that is no list. step-ca has none where its ca.json does not turn them on."""
    if status not in {404, 501}:
        return refusal(status, words, what, retry_after=retry_after)
    return AuthorityError(
        ErrorKind.INVALID,
        f'{what} publishes no revocation list ({status}: {words}); set "crl": {{"enabled": true, "generateOnRevoke": '
        "true} in its ca.json, with a db, or turn revocation_lists off",
    )


def template_error(chain_pem: bytes, identity: SpiffeId, what: str) -> AuthorityError | None:
    """The error for a certificate that a provisioner's template has spoilt, with the line that it lacks."""
    try:
        leaf = read_bundle(chain_pem).certificates[0]
    except (CertificateError, IndexError):
        return None
    if x509.UniformResourceIdentifier(str(identity)) not in san_values(leaf):
        found, line = "without the SPIFFE ID", '"sans": {{ toJson .SANs }}'
    elif not extended_key_usages(leaf) >= _USAGES:
        found, line = "without both extended key usages", '"extKeyUsage": ["serverAuth", "clientAuth"]'
    else:
        return None
    message = f"{what} issued a certificate {found}; put {line} into the template of the provisioner"
    return AuthorityError(ErrorKind.MISMATCH, message)


def vouched(chain_pem: bytes, anchors: Iterable[x509.Certificate]) -> bool:
    """Whether one of the anchors issued a certificate of the chain, so that they need not be read again."""
    try:
        chain = read_bundle(chain_pem).certificates
    except CertificateError:
        return True  # new anchors do not help
    return any(_issued(each, anchor) for each in chain for anchor in anchors)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _unusable(what: str, found: str) -> AuthorityError:
    return AuthorityError(ErrorKind.INVALID, f"the answer of {what} {found}; check that url is step-ca's")


def words_of(body: bytes, *secret: Token) -> str:
    """What step-ca says of an error, on one line and without these secrets."""
    error = decoded(body, _ErrorBody)
    return answers.words(body if error is None else error.message, *secret)


def refusal(
    status: int, words: str, what: str, *, retry_after: float | None = None, checks: str = ""
) -> AuthorityError:
    """The error that a status means to a caller that asked for a certificate or for roots.

    `checks` is what to check after a 401, whose text is always the same: step-ca logs the reason and does not send it.
    """
    kind, fix = _meaning(status)
    if status == 401 and checks:
        fix = checks
    said = status_and(words, status)
    return AuthorityError(kind, f"{what} did not issue ({said}); {fix}", retry_after=retry_after)


def _meaning(status: int) -> tuple[ErrorKind, str]:
    if status in _MEANINGS:
        return _MEANINGS[status]
    if 300 <= status < 400:
        return ErrorKind.INVALID, "the agent follows no redirect: set url to the address of step-ca itself"
    if is_passing(status):
        return ErrorKind.TRANSIENT, "read step-ca's own log"
    return ErrorKind.INVALID, "check that url is step-ca's"


_MEANINGS = {
    400: (
        ErrorKind.INVALID,
        "read step-ca's own log, and check the provisioner's template and that no proxy changes requests",
    ),
    401: (ErrorKind.UNAUTHENTICATED, "read step-ca's own log for the reason"),
    403: (
        ErrorKind.DENIED,
        "change the provisioner's claims (minTLSCertDuration, maxTLSCertDuration) or policy in ca.json, or the "
        "workload's ttl, key or spiffe_id",
    ),
    404: (ErrorKind.INVALID, "the server at this address is no step-ca: check url"),
    429: (ErrorKind.THROTTLED, "it is asked less often from now on"),
}


def checks_of_401(proof: StepCaProof, provisioner: str, host: str, found: str | None, clock: str | None) -> str:
    """What to check after a 401. `found` is what step-ca's public list of provisioners shows to be wrong, `clock` what
    its clock does.
    """
    if found is not None:
        return found
    key = "jwk_file holds its key" if proof.kind == "JWK" else "a root of certificate_file is among its roots"
    listed = [
        f"the provisioner {quoted(provisioner)} is of the type {proof.kind} and {key}",
        f"{host} is one of step-ca's dnsNames (or set server_name)",
        clock or "both clocks agree to a minute",
    ]
    return f"step-ca's own log alone has the reason; check that {', that '.join(listed)}"


def clock_difference(date: str, now: datetime) -> str | None:
    """A clause for a server's clock (the header Date) from which this machine's differs by more than step-ca allows."""
    theirs = http_date(date)
    if theirs is None or abs(ahead := now - theirs) <= SKEW:
        return None
    way = "ahead of" if ahead > timedelta(0) else "behind"
    return (
        f"the clocks are set: this machine's is {abs(ahead).total_seconds():.0f} s {way} step-ca's, which has "
        f"{describe_time(theirs)}"
    )


def provisioner_fault(provisioners: Iterable[StepCaProvisioner], name: str, proof: StepCaProof) -> str | None:
    """What is wrong with a provisioner, by step-ca's public list: there is none of the name, or with another key."""
    every = tuple(provisioners)
    named = [each for each in every if each.name == name]
    if not named:
        others = ", ".join(quoted(each.name) for each in every if each.type == proof.kind)
        fix = f"set provisioner to one of {answers.words(others)}" if others else "add one to its ca.json"
        return f"it has no provisioner {quoted(name)}; {fix}"
    typed = [each for each in named if each.type == proof.kind]
    if not typed:
        keys = "jwk_file is for JWK" if proof.kind == "JWK" else "certificate_file is for X5C"
        return f"its provisioner {quoted(name)} is of the type {one_line(named[0].type, 20)}; {keys}"
    kids = {each.key.kid for each in typed if each.key is not None}
    if proof.kid is not None and kids and proof.kid not in kids:
        found = ", ".join(quoted(kid) for kid in sorted(kids)[:5])
        return (
            f"its provisioner {quoted(name)} has the key {found}, and jwk_file holds {quoted(proof.kid)}; "
            "provision the key again"
        )
    return None
