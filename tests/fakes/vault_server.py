"""A server that stands in for OpenBao and HashiCorp Vault, which no package registry has as a program.

It was written from the contract of their HTTP API: paths, statuses, and the words of each error are those that OpenBao
2.6.2 gives, in its order; a few that only HashiCorp's Vault gives (412, 472, 473, `invalid token`) follow its
documentation. It has a PKI engine with roles and several issuers, policies as far as the one path is concerned, tokens
with leases, and the auth methods token, approle, jwt, kubernetes and cert.
"""

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fakes.hierarchy import Ca, Extension, Key, make_ca, make_crl
from fakes.https_server import HttpsServer, Reply, Request, json_reply

from sds_agent.pki.certificates import write_pem

MINUTE = timedelta(minutes=1)
DENIED_BY_POLICY = "1 error occurred:\n\t* permission denied\n\n"
USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=True,
    data_encipherment=False,
    key_agreement=True,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass
class Role:
    """A role of the PKI engine, with the defaults of a new one."""

    key_type: str = "rsa"
    key_bits: int = 0
    require_cn: bool = True
    allowed_uri_sans: tuple[str, ...] = ()
    use_csr_sans: bool = True
    server_flag: bool = True
    client_flag: bool = True
    max_ttl: timedelta = timedelta(hours=768)


def good_role() -> Role:
    return Role(key_type="any", require_cn=False, allowed_uri_sans=("spiffe://demo.example/*",))


@dataclass
class GivenToken:
    """A token; `ends` is None for one without an end. `most` is when it can be renewed no further."""

    ttl: timedelta | None = None
    ends: datetime | None = None
    most: datetime | None = None
    renewable: bool = False
    batch: bool = False
    policies: tuple[str, ...] = ("default", "sds-agent")
    certificate: x509.Certificate | None = None


@dataclass
class Issuer:
    """An issuer of the mount; one without a key was imported. `above` are the certificates above it."""

    certificate: x509.Certificate
    key: Key | None = field(default=None, repr=False)
    above: tuple[x509.Certificate, ...] = ()
    truncates: bool = False

    @property
    def is_root(self) -> bool:
        return self.certificate.issuer == self.certificate.subject

    @property
    def chain(self) -> list[str]:
        """What `ca_chain` shows of it."""
        return [_pem(each) for each in (self.certificate, *self.above)]


class RefusedError(Exception):
    """An answer with errors."""

    def __init__(self, status: int, *errors: str, **headers: str) -> None:
        super().__init__(*errors)
        self.reply = json_reply({"errors": list(errors)}, status, **headers)


@dataclass
class VaultServer:
    """The server. Its attributes may be changed while it runs; `now` is its clock."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    mount: str = "pki"
    namespace: str | None = None
    roles: dict[str, Role] = field(default_factory=lambda: {"web": good_role()})
    issuers: dict[str, Issuer] = field(default_factory=dict)
    default: str = ""
    tokens: dict[str, GivenToken] = field(default_factory=dict)
    login_ttl: timedelta = 60 * MINUTE
    login_most: timedelta | None = None
    role_id: str = "the-role-id"
    secret_ids: set[str] = field(default_factory=lambda: {"the-secret-id"})
    jwt: str = "a.good.jwt"
    jwt_fault: str = ""
    auth_mounts: set[str] = field(default_factory=lambda: {"approle", "jwt", "kubernetes", "cert"})
    sealed: bool = False
    leader: str | None = None
    leaderless: bool = False
    """Whether its cluster has no leader: it then answers what needs none, such as the issuers."""
    hashicorp: bool = False
    intercept: Callable[[Request], Reply | bytes | None] | None = None
    """Answers in the server's place what it does not return None for."""
    shows_chain: bool = True
    sign: Callable[[bytes], Sequence[x509.Certificate]] | None = None
    """Gives the certificates of an answer in place of the issuer: the leaf, then what is above it."""
    revoked: list[x509.Certificate] = field(default_factory=list)
    signed: list[x509.CertificateSigningRequest] = field(default_factory=list)
    http: HttpsServer = field(init=False)

    def __post_init__(self) -> None:
        self.http = HttpsServer(self.answer)
        self._numbers = itertools.count(1)
        if not self.issuers:
            self.add_root("root one")

    def add_root(self, name: str, *, lasts: timedelta = timedelta(days=300), default: bool = True) -> x509.Certificate:
        """Another self-signed issuer, as root/generate or root/rotate makes it."""
        now = self.now()
        ca = make_ca(name, not_before=now - MINUTE, not_after=now + lasts)
        self.add(Issuer(ca.certificate, ca.key), default=default)
        return ca.certificate

    def add_intermediate(self, name: str, root: Ca, *, import_root: bool = False) -> x509.Certificate:
        """An intermediate, whose root stays elsewhere or is imported with it (intermediate/set-signed)."""
        now = self.now()
        ca = make_ca(name, root, not_before=now - MINUTE, not_after=now + timedelta(days=100))
        self.add(Issuer(ca.certificate, ca.key, (root.certificate,) if import_root else ()))
        if import_root:
            self.add(Issuer(root.certificate), default=False)
        return ca.certificate

    def add(self, issuer: Issuer, *, default: bool = True) -> str:
        """Add an issuer; returns its ID."""
        number = f"{next(self._numbers):08d}-0000-4000-8000-000000000000"
        self.issuers[number] = issuer
        if default:
            self.default = number
        return number

    @property
    def roots(self) -> set[x509.Certificate]:
        """The self-signed issuers."""
        return {each.certificate for each in self.issuers.values() if each.is_root}

    def make_token(self, ttl: timedelta | None = None, **more: Any) -> str:
        """A token of that life."""
        prefix = "b." if more.get("batch") else "s."
        text = prefix + secrets.token_urlsafe(18)
        self.tokens[text] = GivenToken(ttl, None if ttl is None else self.now() + ttl, **more)
        return text

    @property
    def paths(self) -> list[str]:
        """What was asked for, in order, without /v1/."""
        return [each.path.removeprefix("/v1/") for each in self.http.requests]

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return self.paths.count(path)

    @asynccontextmanager
    async def serving(self, *, port: int = 0) -> AsyncIterator["VaultServer"]:
        """Serve over TLS on loopback inside this context."""
        async with self.http.serving(port=port):
            yield self

    async def answer(self, request: Request) -> Reply | bytes | None:
        """The answer to any request."""
        if self.intercept is not None and (instead := self.intercept(request)) is not None:
            return instead
        await asyncio.sleep(0)
        try:
            return self._routed(request)
        except RefusedError as error:
            return error.reply

    def _routed(self, request: Request) -> Reply:
        path = request.path.removeprefix("/v1/")
        if self.leader is not None:
            return Reply(307, b"", {"location": f"{self.leader}/v1/{path}"})
        self._check_place(request)
        if request.method == "GET" and "/issuer" in path:
            if not path.startswith(f"{self.mount}/issuer"):
                raise RefusedError(403, "permission denied")  # it is not said whether there is such a mount
            return self._issuer(path.removeprefix(f"{self.mount}/"))
        if self.leaderless:
            raise RefusedError(500, "local node not active but active cluster node not found")
        if path.startswith("auth/") and path.endswith("/login"):
            return self._login(path.split("/")[1], request)
        token = self._known(request)
        if path == "auth/token/lookup-self":
            return self._look_up(token)
        if path == "auth/token/renew-self":
            return self._renew(token, request)
        mount, _, role = path.partition("/sign/")
        if mount != self.mount:
            raise RefusedError(404, f'no handler for route "{path}". route entry not found.')
        if "sds-agent" not in token.policies:
            raise RefusedError(403, DENIED_BY_POLICY)
        return self._sign(role, request)

    def _check_place(self, request: Request) -> None:
        if self.sealed:
            raise RefusedError(503, "Vault is sealed")
        namespace = request.headers.get("x-vault-namespace")
        if namespace is None and self.namespace is not None:
            raise RefusedError(403, "permission denied")
        if namespace != self.namespace:
            raise RefusedError(404, "namespace not found")

    # tokens

    def _known(self, request: Request) -> GivenToken:
        token = self.tokens.get(request.headers.get("x-vault-token", ""))
        if token is None or (token.ends is not None and token.ends <= self.now()):
            if self.hashicorp:
                raise RefusedError(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")
            raise RefusedError(403, "permission denied")
        return token

    def _look_up(self, token: GivenToken) -> Reply:
        if "default" not in token.policies:
            raise RefusedError(403, DENIED_BY_POLICY)
        left = 0 if token.ends is None else int((token.ends - self.now()).total_seconds())
        shown = {} if token.ttl is None else {"renewable": token.renewable}
        return json_reply({"data": {"id": "shown here", "ttl": left, **shown}, "auth": None, "warnings": None})

    def _renew(self, token: GivenToken, request: Request) -> Reply:
        if "default" not in token.policies:
            raise RefusedError(403, DENIED_BY_POLICY)
        if token.batch:
            raise RefusedError(400, "batch tokens cannot be renewed")
        if not token.renewable or token.ttl is None:
            raise RefusedError(400, "lease is not renewable")
        if token.certificate is not None and token.certificate != request.certificate:
            words = "client identity during renewal not matching client identity used during login"
            raise RefusedError(500, f"1 error occurred:\n\t* failed to renew entry: {words}\n\n")
        wanted = self.now() + token.ttl
        token.ends = wanted if token.most is None else min(wanted, token.most)
        warnings = None if token.ends == wanted else ['TTL of "1h" exceeded the effective max_ttl; it is capped']
        return self._given(request.headers["x-vault-token"], token, warnings)

    def _given(self, text: str, token: GivenToken, warnings: list[str] | None = None) -> Reply:
        lasts = 0 if token.ends is None else round((token.ends - self.now()).total_seconds())
        auth = {"client_token": text, "lease_duration": lasts, "renewable": token.renewable, "policies": ["default"]}
        return json_reply({"data": None, "warnings": warnings, "auth": auth})

    def _login(self, mount: str, request: Request) -> Reply:
        if mount not in self.auth_mounts:
            raise RefusedError(403, "permission denied")
        getattr(self, f"_check_{mount}")(request.json, request)
        most = None if self.login_most is None else self.now() + self.login_most
        certificate = request.certificate if mount == "cert" else None
        text = self.make_token(self.login_ttl, renewable=True, most=most, certificate=certificate)
        return self._given(text, self.tokens[text])

    def _check_approle(self, body: dict[str, str], _request: Request) -> None:
        if not body.get("role_id"):
            raise RefusedError(500, "missing role_id")
        if "secret_id" not in body:
            raise RefusedError(400, "missing secret_id")
        if body["role_id"] != self.role_id or body["secret_id"] not in self.secret_ids:
            raise RefusedError(400, "invalid role or secret ID")

    def _check_jwt(self, body: dict[str, str], _request: Request) -> None:
        if "role" not in body:
            raise RefusedError(400, "missing role")
        if body["role"] != "agent":
            raise RefusedError(400, f'role "{body["role"]}" could not be found')
        if self.jwt_fault or body["jwt"] != self.jwt:
            raise RefusedError(400, f"error validating token: {self.jwt_fault or 'invalid signature'}")

    def _check_kubernetes(self, body: dict[str, str], _request: Request) -> None:
        if body["role"] != "agent":
            raise RefusedError(400, f'invalid role name "{body["role"]}"')
        if body["jwt"] != self.jwt:
            raise RefusedError(403, "permission denied")

    def _check_cert(self, body: dict[str, str], request: Request) -> None:
        if request.certificate is None or body.get("name", "agent") != "agent":
            raise RefusedError(400, "no client certificate found")
        if request.certificate.not_valid_after_utc <= self.now():
            raise RefusedError(
                500, "failed to verify client's certificate: x509: certificate has expired or is not yet valid"
            )
        if not request.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
            raise RefusedError(500, "missing name in alias")

    # the PKI engine

    def _issuer(self, path: str) -> Reply:
        if path == "issuers?list=true":
            if not self.issuers:
                raise RefusedError(404)
            return json_reply({"data": {"key_info": {}, "keys": list(self.issuers)}, "warnings": None})
        name, _, what = path.removeprefix("issuer/").partition("/")
        issuer = self.issuers.get(name)
        if issuer is None:
            raise RefusedError(404)
        if what == "crl/pem":
            return self._crl(name, issuer)
        return json_reply({"data": {"certificate": _pem(issuer.certificate), "ca_chain": issuer.chain}})

    def _crl(self, name: str, issuer: Issuer) -> Reply:
        if issuer.key is None:
            raise RefusedError(500, f"error building CRLs: unable to fetch corresponding key for issuer {name}")
        now, ca = self.now(), Ca(issuer.certificate, issuer.key)
        key = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
        extra: list[Extension] = [(x509.CRLNumber(1), False), (key, False)]
        crl = make_crl(ca, *self.revoked, last_update=now, next_update=now + timedelta(hours=72), extra=extra)
        return Reply(200, crl.public_bytes(Encoding.PEM), {"content-type": "application/x-pem-file"})

    def _sign(self, name: str, request: Request) -> Reply:
        role = self.roles.get(name)
        if role is None:
            raise RefusedError(400, f"unknown role: {name}")
        issuer = self.issuers.get(self.default)
        if issuer is None:
            words = "could not fetch the CA certificate (was one set?): no default issuer currently configured"
            raise RefusedError(500, f"1 error occurred:\n\t* {words}\n\n")
        if issuer.key is None:
            words = f"unable to fetch corresponding key for issuer {self.default}"
            raise RefusedError(400, f"{words}; unable to use this issuer for signing")
        body = request.json
        csr = x509.load_pem_x509_csr(body["csr"].encode())
        _check_key(csr, role)
        if role.require_cn:
            raise RefusedError(
                400,
                'the common_name field is required, or must be provided in a CSR with "use_csr_common_name" set to '
                'true, unless "require_cn" is set to false',
            )
        names = _names(csr, body, role)
        end, warnings = self._end(body, role, issuer)
        self.signed.append(csr)
        certificates = (
            self.sign(body["csr"].encode()) if self.sign else (_leaf(csr, names, (self.now(), end), role, issuer),)
        )
        data = {
            "certificate": _pem(certificates[0]) if certificates else "",
            "issuing_ca": _pem(certificates[1] if certificates[1:] else issuer.certificate),
            "serial_number": "01:02",
            "expiration": int(end.timestamp()),
        }
        if self.shows_chain:
            data["ca_chain"] = issuer.chain
        return json_reply({"data": data, "warnings": warnings or None, "auth": None})

    def _end(self, body: dict[str, Any], role: Role, issuer: Issuer) -> tuple[datetime, list[str]]:
        ttl, warnings = timedelta(seconds=int(body["ttl"].removesuffix("s"))), []
        if ttl > role.max_ttl:
            warnings.append(f'TTL "{ttl}" is longer than permitted maxTTL "{role.max_ttl}", so maxTTL is being used')
            ttl = role.max_ttl
        end, last = self.now() + ttl, issuer.certificate.not_valid_after_utc
        if end > last and not issuer.truncates:
            raise RefusedError(
                400,
                f"cannot satisfy request, as TTL would result in notAfter of {end.isoformat()} that is beyond the "
                f"expiration of the CA certificate at {last.isoformat()}",
            )
        return min(end, last), warnings


def _check_key(csr: x509.CertificateSigningRequest, role: Role) -> None:
    key = csr.public_key()
    kind = "ec" if isinstance(key, ec.EllipticCurvePublicKey) else "rsa"
    if role.key_type not in {"any", kind}:
        raise RefusedError(400, f"role requires keys of type {role.key_type}")
    bits = key.key_size if isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) else 0
    if role.key_type != "any" and bits < role.key_bits:
        raise RefusedError(400, f"role requires a minimum of a {role.key_bits}-bit key, but CSR's key is {bits} bits")


def _names(csr: x509.CertificateSigningRequest, body: dict[str, Any], role: Role) -> list[str]:
    source, asked = "the API", [each for each in body.get("uri_sans", "").split(",") if each]
    if role.use_csr_sans:
        found = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        source, asked = "CSR", found.get_values_for_type(x509.UniformResourceIdentifier)
    words = "URI Subject Alternative Names"
    if asked and not role.allowed_uri_sans:
        raise RefusedError(400, f"{words} are not allowed in this role, but were provided via {source}")
    for each in asked:
        if not any(fnmatchcase(each, pattern) for pattern in role.allowed_uri_sans):
            raise RefusedError(400, f"{words} were provided via {source} which are not valid for this role")
    return asked


def _leaf(
    csr: x509.CertificateSigningRequest,
    names: list[str],
    validity: tuple[datetime, datetime],
    role: Role,
    issuer: Issuer,
) -> x509.Certificate:
    """As the server makes it: an empty subject, a critical SAN, no BasicConstraints, 30 s backdated."""
    assert issuer.key is not None
    flags = {ExtendedKeyUsageOID.SERVER_AUTH: role.server_flag, ExtendedKeyUsageOID.CLIENT_AUTH: role.client_flag}
    builder = x509.CertificateBuilder(
        issuer.certificate.subject, x509.Name([]), csr.public_key(), x509.random_serial_number()
    )
    begin, end = validity
    builder = builder.not_valid_before(begin - timedelta(seconds=30)).not_valid_after(end)
    builder = builder.add_extension(USAGE, critical=True)
    if usages := [usage for usage, flag in flags.items() if flag]:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names:
        uris = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(each) for each in names])
        builder = builder.add_extension(uris, critical=True)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return builder.add_extension(identifier, critical=False).sign(issuer.key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> str:
    """Without a final newline, as the server gives it."""
    return write_pem([certificate]).decode().strip()
