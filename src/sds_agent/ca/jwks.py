"""The public keys of a token issuer: a JSON Web Key Set (RFC 7517) from a file or a URL, read again regularly.

The module is anyio's, as the HTTP client is, on asyncio.
"""

import json
import logging
import ssl
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
from cryptography.hazmat.primitives.asymmetric import rsa
from msgspec import Struct

from sds_agent import log
from sds_agent.ca.refusal import Reason, RefusalError
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import read_at_once
from sds_agent.named_files import NamedFileError, read_certificate_file
from sds_agent.pki import openssl
from sds_agent.pki.strength import SMALLEST_RSA
from sds_agent.tasks import NoThreadError, SharedCall, TimeLimit
from sds_agent.text import is_token

if TYPE_CHECKING:
    import httpx

LOG = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

REFRESH = timedelta(minutes=5)
"""From one reading to the next. While the issuer can be reached, a key that it withdrew counts no longer than this."""
SOONEST = timedelta(seconds=10)
"""From one reading to the next where a token names an unknown key. Every client can send such a token."""
TIMEOUT = 10.0
"""Seconds for one request, from connecting to the last byte."""
START_TIMEOUT = 2.0
"""The same for the first request. Without an answer the CA starts too, for callers that need no token."""
LARGEST_SET = 1 << 20
LONGEST_TOKEN = 16 << 10
MOST_KEYS = 100

_ALGORITHMS = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}
_CURVES = {"EC": "P-256", "OKP": "Ed25519"}


class JwksError(SdsAgentError):
    """A key set cannot be read."""


class Jwk(Struct, frozen=True):
    """A public key and the one algorithm that it may be used with. `kid` is its name in the set, if it has one."""

    kid: str | None
    algorithm: str
    key: Any


def read_keys(data: bytes) -> tuple[Jwk, ...]:
    """The keys of a set that can verify a token, without symmetric keys and unknown kinds (RFC 7517 section 5).

    Raises JwksError when the set is malformed or no key is left.
    """
    try:
        listed = json.loads(data)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise JwksError("it is not a JSON Web Key Set: it must be an object with the member keys") from error
    if not isinstance(listed, list) or len(listed) > MOST_KEYS:
        raise JwksError(f"its member keys must be a list of at most {MOST_KEYS} keys")
    keys = tuple(key for each in listed if isinstance(each, dict) and (key := _read_key(each)) is not None)
    if not keys:
        raise JwksError("it holds no public key for RS256, ES256 or EdDSA (Ed25519)")
    return keys


def _read_key(member: Mapping[str, Any]) -> Jwk | None:
    import jwt  # noqa: PLC0415 - measured: 45 ms, for a CA that takes tokens

    kind, kid = member.get("kty"), member.get("kid")
    algorithm = _ALGORITHMS.get(kind) if isinstance(kind, str) else None
    if algorithm is None or member.get("alg", algorithm) != algorithm or member.get("use", "sig") != "sig":
        return None
    if "d" in member or member.get("crv") != _CURVES.get(str(kind)):
        return None  # a private key that is published proves nothing
    try:
        key = jwt.PyJWK(dict(member), algorithm).key
    except jwt.PyJWTError:
        return None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < SMALLEST_RSA:
        return None
    return Jwk(kid if isinstance(kid, str) else None, algorithm, key)


class Location(Struct, frozen=True):
    """Where a set is: a path, or an https URL with the CA to trust and the token to send there, read at each fetch."""

    jwks: str
    ca_file: Path | None = None
    token_file: Path | None = None

    @property
    def is_url(self) -> bool:
        """Whether the set is at a URL."""
        return self.jwks.startswith(("https://", "http://"))


class KnownKeys(ABC):
    """The keys of one issuer that are known here, and a way to have them read again."""

    def __init__(self) -> None:
        self._keys: tuple[Jwk, ...] = ()

    @property
    def current(self) -> tuple[Jwk, ...]:
        """The keys of the last reading: each reading makes another object."""
        return self._keys

    async def find(self, kid: str | None, algorithm: str) -> tuple[Jwk, ...]:
        """The keys that may have signed a token with this header.

        Raises RefusalError (INTERNAL) while no set could be read.
        """
        if not self._matching(kid, algorithm):
            await self.refresh()
        if not self._keys:
            raise RefusalError(Reason.INTERNAL, "the CA could not get the token issuer's keys yet: try again later")
        return self._matching(kid, algorithm)

    async def renewed(self, kid: str | None, algorithm: str) -> tuple[Jwk, ...]:
        """The same, where none of those keys has signed the token: of a set read anew, or nothing while none is due.

        An issuer may change a key that has no name, or change a key and not its name. Every client can send a token
        that no key has signed, so this reads the set no more often than tokens with unknown keys do.
        """
        before = self._keys
        await self.refresh()
        return () if self._keys is before else self._matching(kid, algorithm)

    @abstractmethod
    async def refresh(self) -> None:
        """Have the set read again, unless that was done a moment ago."""

    def _matching(self, kid: str | None, algorithm: str) -> tuple[Jwk, ...]:
        keys = (key for key in self._keys if key.algorithm == algorithm)
        return tuple(key for key in keys if kid is None or key.kid is None or key.kid == kid)


class IssuerKeys(KnownKeys):
    """The keys of one issuer. `open` reads them for the first time."""

    def __init__(self, location: Location, clock: Clock) -> None:
        super().__init__()
        self._location = location
        self._clock = clock
        self._data = b""
        self._tried: datetime | None = None
        self._reading = SharedCall[None]()
        self._disk = TimeLimit(TIMEOUT)
        self._left_out = log.LogOnChange(LOG, "certificates_left_out")

    @classmethod
    async def open(cls, location: Location, clock: Clock) -> "IssuerKeys":
        """Read the set for the first time.

        Raises ConfigurationError for a file that cannot be used. Where a URL does not answer yet, the CA tries again
        later: the issuer may start after it.
        """
        keys = cls(location, clock)
        try:
            await keys._read(START_TIMEOUT)
        except JwksError as error:
            if not location.is_url:
                raise _unusable(location, error) from error
            keys._warn(error)
        return keys

    async def follow(self) -> None:
        """Read the set again every REFRESH, so that no caller has to wait for it, until cancelled: that ends a reading
        too which goes on though its callers have left.
        """
        try:
            while True:
                await self._clock.sleep(REFRESH.total_seconds())
                await self._reading.result(self._read_again)
        finally:
            await self._reading.end()

    @property
    def data(self) -> bytes:
        """The set as it was read last; empty while none could be."""
        return self._data

    async def refresh(self) -> None:
        """Read the set again, unless that was done less than SOONEST ago; where it is being read, wait for that.

        A caller that leaves meanwhile ends no reading: others wait for it, and none begins before SOONEST.
        """
        if self._reading.under_way or self._is_due(self._clock.now()):
            await self._reading.result(self._read_again)

    def _is_due(self, now: datetime) -> bool:
        return self._tried is None or not timedelta() <= now - self._tried < SOONEST

    async def _read_again(self) -> None:
        try:
            await self._read()
        except JwksError as error:
            self._warn(error)

    def _warn(self, error: JwksError) -> None:
        log.event(LOG, "key_set_not_read", level=logging.WARNING, jwks=self._location.jwks, cause=str(error))

    async def _read(self, seconds: float = TIMEOUT) -> None:
        self._tried = self._clock.now()
        if self._location.is_url:
            trust, left_out, headers = await self._from_disk(_credentials, self._location)
            self._report_left_out(left_out)
            data = await _fetch(self._location.jwks, trust, headers, seconds)
        else:
            data = await self._from_disk(_load, Path(self._location.jwks))
        self._keys, self._data = read_keys(data), data

    def _report_left_out(self, causes: tuple[str, ...]) -> None:
        if causes:
            self._left_out.report("; ".join(causes), file=str(self._location.ca_file))
        else:
            self._left_out.resolved()

    async def _from_disk(self, read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Read what may lie on a network disk that does not answer. Raises JwksError."""
        try:
            return await self._disk.call(read, *arguments, **options)
        except TimeoutError as error:
            raise JwksError(f"its files cannot be read: {error.strerror}; check that their disk is there") from error
        except NoThreadError as error:
            raise JwksError(f"its files cannot be read: {error}") from error


def check(location: Location) -> None:
    """See that a CA could begin with that set. It begins without one at a URL too, so nothing is asked there.

    Blocks on the disk: for a command. Raises ConfigurationError.
    """
    if location.is_url:
        return
    try:
        read_keys(_load(Path(location.jwks)))
    except JwksError as error:
        raise _unusable(location, error) from error


def _unusable(location: Location, error: JwksError) -> ConfigurationError:
    fix = "give the file that holds the issuer's public keys, a JSON Web Key Set"
    return ConfigurationError(f"callers.jwt: the key set {location.jwks} cannot be used: {error}; {fix}")


def _load(path: Path) -> bytes:
    try:
        data = read_at_once(path, LARGEST_SET)
    except OSError as error:
        raise JwksError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > LARGEST_SET:
        raise JwksError(f"{path} has more than {LARGEST_SET} bytes")
    return data


def _credentials(location: Location) -> tuple[ssl.SSLContext, tuple[str, ...], dict[str, str]]:
    """The TLS context for the set's server, what the ca_file holds that is left out of it, and the headers to send."""
    return *_trust(location), _headers(location)


async def _fetch(url: str, trust: ssl.SSLContext, headers: Mapping[str, str], seconds: float) -> bytes:
    import httpx  # noqa: PLC0415 - measured: 85 ms, for key sets at a URL

    try:
        with anyio.fail_after(seconds):
            async with (
                httpx.AsyncClient(verify=trust, timeout=seconds, trust_env=False) as client,
                client.stream("GET", url, headers={"accept-encoding": "identity", **headers}) as answer,
            ):
                return await _content(answer)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise JwksError(_failure(error, seconds)) from error


def _failure(error: Exception, seconds: float) -> str:
    """Why no set came from its server, without the text of the error: it may quote what was sent, and the token."""
    import httpx  # noqa: PLC0415 - measured: as above

    causes = openssl.causes_of(error)
    for each in causes:
        if isinstance(each, ssl.SSLCertVerificationError):
            certificate = "the certificate of the key set's server"
            return openssl.fault_of_server(each, certificate) or (
                f"{certificate} is not taken ({each.verify_message.rstrip('.')}); ca_file names the CA certificates to "
                "trust, and the URL must have a name that the certificate has"
            )
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"the key set's server did not answer within {seconds:g} s"
    if isinstance(error, httpx.ConnectError):
        reason = openssl.words_of(causes)
        return f"the key set's server cannot be reached ({reason}); check that it runs at this address"
    return f"the key set cannot be fetched ({openssl.words_of(causes)})"


def _trust(location: Location) -> tuple[ssl.SSLContext, tuple[str, ...]]:
    """The TLS context for the set's server, and what the ca_file holds that is left out of it."""
    if location.ca_file is None:
        return ssl.create_default_context(), ()
    try:
        reading = read_certificate_file(location.ca_file, "the roots that vouch for the key set's server")
    except NamedFileError as error:
        raise JwksError(f"its ca_file cannot be used: {error}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which has no anchors yet, and checks the server's name
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an anchor need not be self-signed
    return context, (*reading.left_out, *openssl.trust(context, reading.certificates))


def _headers(location: Location) -> dict[str, str]:
    if location.token_file is None:
        return {}
    try:
        token = read_at_once(location.token_file, LONGEST_TOKEN)
        if len(token) > LONGEST_TOKEN:
            raise JwksError(f"its token_file {location.token_file} has more than {LONGEST_TOKEN} bytes")
    except OSError as error:
        raise JwksError(f"its token_file {location.token_file} cannot be read: {error.strerror}") from error
    token = token.removeprefix(BOM_UTF8).strip()
    if not token:
        raise JwksError(f"its token_file {location.token_file} is empty; what renews the token has to write it there")
    if not is_token(token):
        raise JwksError(
            f"its token_file {location.token_file} does not hold a token alone: printable characters of ASCII without "
            "spaces"
        )
    return {"authorization": f"Bearer {token.decode()}"}


async def _content(answer: "httpx.Response") -> bytes:
    if answer.status_code != 200:
        raise JwksError(f"the key set's server answered with status {answer.status_code}")
    if answer.headers.get("content-encoding", "identity") != "identity":  # 800 bytes may become any number
        raise JwksError("the key set's server answered with compressed content, which it was asked not to do")
    content = b""
    async for part in answer.aiter_raw():
        content += part
        if len(content) > LARGEST_SET:
            raise JwksError(f"the key set has more than {LARGEST_SET} bytes")
    return content
