"""A stand-in for step-ca, written from its contract and not from its source: real TLS, real tokens, real certificates.

It checks tokens as step-ca does, takes each once, also when the request fails, and answers errors with step-ca's
statuses: 400 for what is missing, 401 always with one text, 403 with the reason. An expired or foreign certificate of
the client breaks the connection, whatever is asked over it. The leaves are those of step-ca's default template.
"""

import hashlib
import json
import re
from base64 import b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.hierarchy import UNKNOWN, Ca, Key, common_name, make_ca, make_crl, make_leaf
from fakes.https_server import HttpsServer, Reply, Request, json_reply

from sds_agent.pki.certificates import san_values, write_pem

DAY = timedelta(days=1)
BACKDATE = timedelta(minutes=1)
UNAUTHORIZED = (
    "The request lacked necessary authorization to be completed. Please see the certificate authority logs for more "
    "info."
)
NO_CRL = (
    "The certificate authority received an unexpected HTTP status code - '404'. Please see the certificate authority "
    "logs for more info."
)
POINT = x509.UniformResourceIdentifier("https://127.0.0.1/1.0/crl")
"""Where step-ca says that its list is: the first of its names, without a port."""
UNITS = {"s": 1, "m": 60, "h": 3600}
KID = "the-key-of-sds"


_POINTS = x509.CRLDistributionPoints([x509.DistributionPoint([POINT], None, None, None)])


def encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def jwk_of(key: ec.EllipticCurvePrivateKey, *, kid: str | None = KID, private: bool = True) -> dict[str, str]:
    """The key as a JWK."""
    numbers, size = key.private_numbers(), (key.curve.key_size + 7) // 8
    point = numbers.public_numbers
    curve = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}[key.curve.name]
    found = {
        "kty": "EC",
        "crv": curve,
        "x": encoded(point.x.to_bytes(size, "big")),
        "y": encoded(point.y.to_bytes(size, "big")),
    }
    if private:
        found["d"] = encoded(numbers.private_value.to_bytes(size, "big"))
    return found if kid is None else found | {"kid": kid}


def jwe_of(
    plain: bytes, password: bytes, *, enc: str = "A256GCM", rounds: int = 1000, in_json: bool = False, **header: object
) -> str:
    """The text encrypted as step does it (RFC 7518 sections 4.8 and 5.3), compact or in JSON."""
    size = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32}[enc]
    salt, key, nonce = b"0123456789abcdef", bytes(range(size)), bytes(12)
    said = {"alg": "PBES2-HS256+A128KW", "enc": enc, "p2s": encoded(salt), "p2c": rounds, "cty": "jwk+json"} | header
    protected = encoded(json.dumps(said).encode())
    derived = PBKDF2HMAC(SHA256(), 16, b"PBES2-HS256+A128KW\0" + salt, rounds).derive(password)
    sealed = AESGCM(key).encrypt(nonce, plain, protected.encode())
    parts = [protected, *map(encoded, (aes_key_wrap(derived, key), nonce, sealed[:-16], sealed[-16:]))]
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    return json.dumps(dict(zip(names, parts, strict=True))) if in_json else ".".join(parts)


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.reply = json_reply({"status": status, "message": message}, status)


def _unauthorized() -> _RefusedError:
    return _RefusedError(401, UNAUTHORIZED)


class StepCaStandIn:
    """step-ca with a provisioner `sds`. What its attributes say may be changed while it runs."""

    def __init__(self) -> None:
        now = datetime.now(UTC)
        self.validity: dict[str, Any] = {"not_before": now - DAY, "not_after": now + DAY}
        self.root = make_ca("step root", **self.validity)
        self.signer = make_ca("step intermediate", self.root, **self.validity)
        self.roots = [self.root]
        self.federated: list[Ca] = []
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.provisioners: list[dict[str, object]] = [
            {"type": "JWK", "name": "sds", "key": jwk_of(self.key, private=False)}
        ]
        self.x5c_root: x509.Certificate | None = None
        self.names = ("127.0.0.1",)
        self.spent: set[str] = set()
        self.renewal_disabled = False
        self.backdate = BACKDATE
        self.reasons: list[str] = []
        """Why it answered 401, as only its log says."""
        self.crl: x509.CertificateRevocationList | None = None
        """Its revocation list, where its ca.json turns them on."""
        self.names_intermediates = True
        """Whether it is of a version that does."""
        self.names_point = True
        """Whether the provisioner's template has the CRL distribution point, as the docs have it."""
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        """Its clock."""
        self.issue: Callable[[x509.CertificateSigningRequest], Sequence[x509.Certificate]] | None = None
        """Another CA that signs what the provisioner allows."""
        self.server = HttpsServer(self.answer)
        self.server.ca = self.root
        self.server.trust = (self.root.certificate,)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.root.certificate.public_bytes(Encoding.DER)).hexdigest()

    def rotate(self) -> Ca:
        """A new root and intermediate, which the server uses from its next start; returns the old root."""
        old, self.root = self.root, make_ca("step root 2", **self.validity)
        self.signer = make_ca("step intermediate 2", self.root, **self.validity)
        self.roots, self.server.ca = [self.root], self.root
        self.server.trust = (self.root.certificate,)
        return old

    def revoke(self, *revoked: x509.Certificate, life: timedelta = DAY, **changed: Any) -> None:
        """Publish the list of the CA that signs now, with these certificates and step-ca's extensions."""
        now = self.now()
        scope = x509.IssuingDistributionPoint(
            full_name=[POINT],
            relative_name=None,
            only_contains_user_certs=False,
            only_contains_ca_certs=False,
            only_some_reasons=None,
            indirect_crl=False,
            only_contains_attribute_certs=False,
        )
        key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.signer.key.public_key())
        times = {"last_update": now, "next_update": now + life, **changed}
        self.crl = make_crl(self.signer, *revoked, extra=[(key, False), (scope, True)], **times)

    @asynccontextmanager
    async def serving(self, *, port: int = 0) -> AsyncIterator["StepCaStandIn"]:
        async with self.server.serving(port=port):
            yield self

    def asked(self, path: str) -> list[Request]:
        """The requests for a path so far."""
        return [each for each in self.server.requests if each.path == path]

    async def answer(self, request: Request) -> Reply:
        try:
            reply = self._answer(request)
        except _RefusedError as refused:
            reply = refused.reply
        return Reply(reply.status, reply.body, {**reply.headers, "date": f"{self.now():%a, %d %b %Y %H:%M:%S} GMT"})

    def _answer(self, request: Request) -> Reply:  # noqa: PLR0911 - one for each path
        match request.method, request.path.partition("?")[0]:
            case "POST", "/1.0/sign":
                return self._sign(request.json)
            case "POST", "/1.0/rekey":
                return self._rekey(request)
            case "GET", "/1.0/roots":
                return _certificates(self.roots)
            case "GET", "/1.0/federation":
                return _certificates(self.federated)
            case "GET", "/1.0/intermediates" if self.names_intermediates:
                return _certificates([self.signer])
            case "GET", "/1.0/crl":
                return self._crl()
            case "GET", "/1.0/provisioners":
                return self._provisioners(request)
            case "GET", path if path.startswith("/root/"):
                return self._root(path.removeprefix("/root/"))
        raise _RefusedError(404, "404 page not found")

    def _crl(self) -> Reply:
        if self.crl is None:
            raise _RefusedError(404, NO_CRL)
        return Reply(200, self.crl.public_bytes(Encoding.DER), {"content-type": "application/pkix-crl"})

    def _provisioners(self, request: Request) -> Reply:
        """One to a page."""
        cursor = int(request.path.partition("cursor=")[2] or 0)
        page = {"provisioners": self.provisioners[cursor : cursor + 1], "nextCursor": ""}
        if cursor + 1 < len(self.provisioners):
            page["nextCursor"] = str(cursor + 1)
        return json_reply(page)

    def _root(self, sha: str) -> Reply:
        for each in (*self.roots, *self.federated):
            der = each.certificate.public_bytes(Encoding.DER)
            if hashlib.sha256(der).hexdigest() == sha:
                return json_reply({"ca": _pem(each.certificate)})
        raise _RefusedError(404, "certificate with fingerprint " + sha + " was not found")

    def _sign(self, body: dict[str, str]) -> Reply:
        if not body.get("csr") or not body.get("ott"):
            raise _RefusedError(400, "missing csr" if not body.get("csr") else "missing ott")
        csr = x509.load_pem_x509_csr(body["csr"].encode())
        seconds = self._seconds(body.get("notAfter", ""))
        claims = self._claims(body["ott"])
        wanted = [str(each.value) for each in csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]
        if wanted != claims["sans"]:
            raise _RefusedError(403, f"certificate request does not contain the valid URIs - got {wanted}")
        digest = claims.get("cnf", {}).get("x5rt#S256")
        if digest and digest != encoded(hashlib.sha256(csr.public_bytes(Encoding.DER)).digest()):
            raise _RefusedError(403, "certificate request fingerprint does not match")
        if seconds > 86_400:
            raise _RefusedError(403, f"requested duration of {seconds}s is more than the authorized maximum")
        return self._issued(csr, common_name(claims["sub"]), claims["sans"][0], timedelta(seconds=seconds))

    @staticmethod
    def _seconds(duration: str) -> int:
        if not duration:
            return 86_400
        if duration[-1] not in UNITS or not duration[:-1].isdecimal():
            raise _RefusedError(400, f"notAfter {duration} is neither a duration nor a time")
        return int(duration[:-1]) * UNITS[duration[-1]]

    def _claims(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        said = jwt.decode(token, options={"verify_signature": False})
        spent = said.get("jti") in self.spent
        self.spent.add(said.get("jti", ""))
        try:
            claims = self._checked(token, header)
        except jwt.InvalidTokenError as error:
            self.reasons.append(str(error))
            raise _unauthorized() from error
        if spent:
            self.reasons.append("token already used")
            raise _unauthorized()
        return claims

    def _checked(self, token: str, header: dict[str, Any]) -> dict[str, Any]:
        x5c = "x5c" in header
        key: Any = self._x5c_key(header["x5c"]) if x5c else self.key.public_key()
        if not x5c and header.get("kid") != KID:
            raise jwt.InvalidTokenError("provisioner not found")
        claims = jwt.decode(
            token,
            key,
            algorithms=["ES256", "RS256"],
            issuer=str(self.provisioners[0].get("name")),
            options={
                "verify_aud": False,
                "verify_exp": False,
                "verify_nbf": False,
                "require": ["iss", "exp", "nbf", "sub", "aud", "jti"],
            },
        )
        if not claims["nbf"] - 60 <= self.now().timestamp() < claims["exp"] + 60:
            raise jwt.InvalidTokenError("not valid now")
        fragment = "#x5c/sds" if x5c else ""
        audiences = [f"https://{name}/1.0/sign{fragment}" for name in self.names]  # ports do not count
        if re.sub(":[0-9]+/", "/", claims["aud"]) not in audiences or not claims["sub"] or "iat" in claims:
            raise jwt.InvalidTokenError("audience, subject or time of issue")
        return claims

    def _x5c_key(self, chain: list[str]) -> Any:
        leaf = x509.load_der_x509_certificate(b64decode(chain[0]))
        assert self.x5c_root is not None
        leaf.verify_directly_issued_by(self.x5c_root)
        return leaf.public_key()

    def _rekey(self, request: Request) -> Reply:
        old = request.certificate
        if old is None:
            raise _RefusedError(400, "missing client certificate")
        if self.renewal_disabled:
            raise _unauthorized()
        csr = x509.load_pem_x509_csr(request.json["csr"].encode())
        life = old.not_valid_after_utc - old.not_valid_before_utc - self.backdate
        return self._issued(csr, old.subject, str(san_values(old)[0].value), life)

    def _issued(self, csr: x509.CertificateSigningRequest, subject: x509.Name, uri: str, life: timedelta) -> Reply:
        if self.issue is not None:
            return _answer([_pem(each) for each in self.issue(csr)])
        now = self.now()
        leaf = make_leaf(
            self.signer,
            uri,
            key=cast("Key", csr),
            subject=subject,
            extra=[(UNKNOWN, False), *([(_POINTS, False)] if self.names_point else [])],
            not_before=now - self.backdate,
            not_after=now + life,
        )
        return _answer([_pem(leaf), _pem(self.signer.certificate)])


def _answer(chain: list[str]) -> Reply:
    first, second = [*chain, "", ""][:2]
    return json_reply({"crt": first, "ca": second, "certChain": chain, "tlsOptions": {}}, 201)


def _certificates(cas: list[Ca]) -> Reply:
    return json_reply({"crts": [_pem(each.certificate) for each in cas]}, 201)


def _pem(certificate: x509.Certificate) -> str:
    return write_pem([certificate]).decode()


def write_jwk(folder: Path, ca: StepCaStandIn, password: bytes | None = None) -> dict[str, Path]:
    """The provisioner's key in files of that directory, and the keys of a configuration that name them."""
    text, files = json.dumps(jwk_of(ca.key)), {"jwk_file": folder / "sds.jwk"}
    if password is not None:
        files["password_file"] = folder / "password"
        files["password_file"].write_bytes(password + b"\n")
        text = jwe_of(text.encode(), password)
    files["jwk_file"].write_text(text)
    return files
