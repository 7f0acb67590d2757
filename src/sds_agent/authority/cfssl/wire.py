"""CFSSL's requests and answers as values, and what its refusals mean (its doc/api, and the server's source).

Requests and answers are JSON. An answer has `success`, `result`, `errors` and `messages`. A refusal comes as
text/plain: JSON all the same where a handler wrote it, and plain text where there is no handler. Success proves little:
the SAN may be dropped, and an unknown profile means the default one, without a word. So what was issued is compared
with what `info` says of the profile.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import Struct

from sds_agent.authority.answers import decoded, status_and, words
from sds_agent.authority.http_message import is_passing
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.configfile.durations import format_duration, parse
from sds_agent.pki.certificates import extended_key_usages, subject_alternative_uris
from sds_agent.text import quoted
from sds_agent.values import Sensitive

T = TypeVar("T")

API = "/api/v1/cfssl"
MOST_MESSAGES = 10
"""Messages of an answer that become warnings, each of which is logged."""
_USAGES = {"server auth": ExtendedKeyUsageOID.SERVER_AUTH, "client auth": ExtendedKeyUsageOID.CLIENT_AUTH}
"""CFSSL's names of the usages that an Envoy needs."""
_ROUNDING = timedelta(minutes=6)
"""CFSSL rounds NotBefore to a minute and backdates it, by 5 minutes unless the profile says otherwise."""


class AuthKey(Sensitive, frozen=True):
    """The key of a profile's auth_key."""

    key: bytes


class CfsslMessage(Struct, frozen=True):
    """An error or a message."""

    code: int = 0
    message: str = ""


class CfsslBundle(Struct, frozen=True):
    """A chain of PEM blocks, from the certificate up without its root, and the root, empty where there is none."""

    bundle: str = ""
    root: str = ""


class CfsslSigned(Struct, frozen=True):
    """The result of `sign` and `authsign`."""

    certificate: str
    bundle: CfsslBundle | None = None


class CfsslInfo(Struct, frozen=True):
    """The result of `info`: the signer's certificate, and what the profile gives to those that it signs.

    The default profile may have no usages, which is null.
    """

    certificate: str
    usages: tuple[str, ...] | None = None
    expiry: str = ""

    @property
    def lifetime(self) -> timedelta | None:
        """The profile's lifetime; None where it cannot be read."""
        return parse(self.expiry)

    @property
    def lacking(self) -> tuple[str, ...]:
        """The usages that an Envoy needs and the profile does not give."""
        return tuple(name for name in _USAGES if name not in (self.usages or ()))


class _Envelope(Struct, frozen=True):
    success: bool
    result: msgspec.Raw = msgspec.Raw(b"null")
    errors: tuple[CfsslMessage, ...] | None = None
    messages: tuple[CfsslMessage, ...] | None = None


def sign_request(csr_pem: bytes, profile: str | None, label: str | None, *, bundle: bool) -> bytes:
    """The request to sign. It has no `hosts`: an empty list of them drops the SAN."""
    asked: dict[str, object] = {"certificate_request": csr_pem.decode("ascii"), **_named(profile, label)}
    return msgspec.json.encode(asked | {"bundle": True} if bundle else asked)


def authenticated(request: bytes, key: AuthKey) -> bytes:
    """The request as `authsign` takes it."""
    token = hmac.new(key.key, request, hashlib.sha256).digest()
    return msgspec.json.encode({"token": _base64(token), "request": _base64(request)})


def info_request(profile: str | None, label: str | None) -> bytes:
    """The request for the signer's certificate and what a profile gives."""
    return msgspec.json.encode({"label": "", **_named(profile, label)})


def bundle_request(certificate_pem: str) -> bytes:
    """The request for the chain above a certificate."""
    return msgspec.json.encode({"certificate": certificate_pem, "flavor": "optimal"})


def _named(profile: str | None, label: str | None) -> dict[str, str]:
    return {key: value for key, value in (("profile", profile), ("label", label)) if value is not None}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def read_auth_key(text: str) -> AuthKey | None:
    """The key that these hexadecimal digits write; None where they are none."""
    digits = re.fullmatch("(?:[0-9A-Fa-f]{2})+", text)
    return None if digits is None else AuthKey(bytes.fromhex(text))


def read_result(body: bytes, result: type[T], endpoint: str) -> tuple[T, tuple[CfsslMessage, ...]]:
    """The result and the messages of an answer with the status 200. Raises AuthorityError INVALID."""
    envelope = decoded(body, _Envelope)
    if envelope is not None and not envelope.success:
        raise refused(200, body, endpoint)
    read = None if envelope is None else decoded(bytes(envelope.result), result)
    if envelope is None or read is None:
        message = f"CFSSL's answer to {endpoint} is none; check that the server at url is CFSSL"
        raise AuthorityError(ErrorKind.INVALID, message)
    return read, envelope.messages or ()


def refused(status: int, body: bytes, endpoint: str) -> AuthorityError:
    """What an answer means that is no success.

    Refusals that CFSSL gives no number of their own have the number 400 and one of a few fixed texts.
    """
    envelope = decoded(body, _Envelope)
    errors = () if envelope is None else envelope.errors or ()
    if not errors:
        return _without_number(status, words(body), endpoint)
    first = errors[0]
    kind, fix = _TEXTS.get(first.message) or _numbered(first.code, status)
    number = "" if first.code < 1000 else f"{first.code}: "
    return AuthorityError(kind, f"CFSSL refused {endpoint} ({number}{words(first.message)}); {fix}")


_TEXTS = {
    "invalid token": (
        ErrorKind.UNAUTHENTICATED,
        "put the key that the profile's auth_key names in the server's auth_keys into auth_key_file",
    ),
    "no authentication provider": (
        ErrorKind.DENIED,
        "the profile has no auth_key, or CFSSL does not know its name and takes the default one: correct profile, or "
        "leave auth_key_file out",
    ),
    "authentication required": (
        ErrorKind.UNAUTHENTICATED,
        "the profile has an auth_key: name its key in auth_key_file",
    ),
    "bad label": (ErrorKind.INVALID, "label names no signer of this multirootca: correct it"),
}
_NUMBERS = {
    5100: (ErrorKind.DENIED, 'give the profile "usages": ["digital signature", "server auth", "client auth"]'),
    5400: (ErrorKind.INVALID, "profile names none of the server's profiles: correct it"),
    5500: (ErrorKind.DENIED, "let the profile's name_whitelist match the workload's SPIFFE ID"),
}
_THOUSANDS = {
    1: (
        ErrorKind.INVALID,
        "it cannot build the bundle: put the signer's root into the file of -ca-bundle and its intermediates into that "
        "of -int-bundle, or turn bundle off",
    ),
    5: (ErrorKind.DENIED, "change the profile: CFSSL's log names what its policy does not allow"),
    9: (ErrorKind.INVALID, "check that the server is CFSSL 1.3 or newer, and the workload's key"),
}
"""By CFSSL's categories. All others are about its own key, its database, or a CFSSL behind it."""


def _numbered(code: int, status: int) -> tuple[ErrorKind, str]:
    if code in _NUMBERS:
        return _NUMBERS[code]
    if code // 1000 in _THOUSANDS:
        return _THOUSANDS[code // 1000]
    if 400 <= code < 500 and status < 500:
        return ErrorKind.INVALID, "check that the server is CFSSL 1.3 or newer"
    return ErrorKind.TRANSIENT, "read CFSSL's own log"


def _without_number(status: int, own_words: str, endpoint: str) -> AuthorityError:
    said = status_and(own_words, status)
    if status == 404:
        kind, fix = ErrorKind.DENIED, _OFF.get(endpoint, "the server has this endpoint turned off")
    elif status == 403:
        kind = ErrorKind.UNAUTHENTICATED
        fix = "the client certificate's common name does not match the server's -mutual-tls-cn: show another"
    elif status == 429:
        kind, fix = ErrorKind.THROTTLED, "it is asked less often from now on"
    elif is_passing(status):
        kind, fix = ErrorKind.TRANSIENT, "read CFSSL's own log"
    else:
        kind, fix = ErrorKind.INVALID, "check that the server at url is CFSSL"
    return AuthorityError(kind, f"CFSSL refused {endpoint} ({said}); {fix}")


_OFF = {
    "sign": "the server has no such endpoint where every profile has an auth_key: name the key in auth_key_file, and "
    "check url",
    "authsign": "the server has no such endpoint where no profile has an auth_key: leave auth_key_file out, and check "
    "url",
    "info": "turn it on, for it tells CFSSL's certificate, or name the roots in roots_file",
    "bundle": "start CFSSL with -ca-bundle and -int-bundle, or name the roots in roots_file",
}
"""What to do where an endpoint is off, which CFSSL answers like one that never was."""


def said(message: CfsslMessage) -> str:
    """A message of an answer that was a success, for a warning."""
    return f"CFSSL says: {words(message.message)}"


def check_san(leaf: x509.Certificate) -> None:
    """Raise AuthorityError MISMATCH where CFSSL dropped the SAN."""
    if not subject_alternative_uris(leaf):
        raise AuthorityError(
            ErrorKind.MISMATCH,
            "CFSSL answered success and dropped the SAN, the URI that is the workload's identity; CFSSL before 1.3, "
            "such as Debian's 1.2.0, knows no URIs: install a newer one; where it is newer, let the profile issue no "
            "CAs, and its CSRWhitelist have URIs",
        )


def check_usages(leaf: x509.Certificate, profile: str | None, info: CfsslInfo | None, *, as_default: bool) -> None:
    """Raise AuthorityError MISMATCH where the certificate lacks a usage that an Envoy needs.

    `info` is the answer of that name for the profile, and `as_default` whether it says the same of the default one.
    """
    lacking = [name for name, oid in _USAGES.items() if oid not in extended_key_usages(leaf)]
    if not lacking:
        return
    signed = "its default profile" if profile is None else f"the profile {quoted(profile)}"
    add = f'add {" and ".join(map(_in_quotes, lacking))} to its "usages"'
    if profile is not None and as_default:
        fix = f"it takes the default profile for a name that it does not know: correct profile, or {add}"
    elif info is not None and not info.lacking:
        fix = "info says that this profile gives it, so another one signed: check for a second CFSSL behind url"
    else:
        fix = add if profile is not None else f"name a profile that gives them in profile, or {add}"
    raise AuthorityError(ErrorKind.MISMATCH, f"CFSSL signed with {signed} and without {' and '.join(lacking)}; {fix}")


def _in_quotes(text: str) -> str:
    return f'"{text}"'


def warnings(
    leaf: x509.Certificate,
    profile: str | None,
    info: CfsslInfo | None,
    *,
    ttl: timedelta,
    left: timedelta,
    as_default: bool,
) -> Iterator[str]:
    """What differs from what was asked for, in a certificate that can be used. `left` is how long it is valid yet."""
    name = "the default profile" if profile is None else f"the profile {quoted(profile)}"
    if profile is not None and as_default:
        yield (
            f"info says of {name} what it says of CFSSL's default one, which is taken for unknown names; check profile "
            'against the names in the server\'s "profiles"'
        )
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    if info is not None and info.lifetime is not None and abs(info.lifetime - lifetime) > timedelta(seconds=1):
        yield (
            f"the certificate's lifetime is {format_duration(lifetime)}, and info says {info.expiry} of {name}; "
            "another profile signed, or this one has a fixed not_after"
        )
    if abs(left - ttl) > max(_ROUNDING, ttl / 10):
        yield (
            f"the certificate is valid for {format_duration(left)}, and ttl is {format_duration(ttl)}; CFSSL takes no "
            f"lifetime from the agent: set the expiry of {name} to it, or ttl to that"
        )
