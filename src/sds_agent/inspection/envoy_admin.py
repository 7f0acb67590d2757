"""Reads from an Envoy's admin interface which secrets it has loaded.

`/config_dump` shows a secret that Envoy refused as if it were active. What is in use shows elsewhere. `/certs` has
serial numbers without names. The statistic `sds.NAME.version_text` has the version that was last accepted; it is empty
where the server names versions of resources alone, as on Delta streams. So a secret counts as in use only if its first
certificate is in `/certs`, and its version, where the statistic has one, is the accepted one.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from sds_agent.inspection.secrets import InspectedSecret, certificates_only
from sds_agent.text import printable

TIMEOUT = 5.0
LONGEST = 600
_HEX = re.compile("[0-9A-Fa-f]+")
SECRETS = ("dynamic_active_secrets", "dynamic_warming_secrets")


class EnvoyAdminError(Exception):
    """The admin interface does not answer, or with something else; the message says why."""


class _Inline(Struct):
    inline_bytes: str = ""
    inline_string: str = ""


class _Certificate(Struct):
    certificate_chain: _Inline = msgspec.field(default_factory=_Inline)


class _Validation(Struct):
    trusted_ca: _Inline = msgspec.field(default_factory=_Inline)


class _Secret(Struct):
    tls_certificate: _Certificate | None = None
    validation_context: _Validation | None = None


class _Dynamic(Struct):
    name: str = ""
    version_info: str = ""
    last_updated: datetime | None = None
    secret: _Secret = msgspec.field(default_factory=_Secret)
    error_state: dict[str, Any] = {}


class _Dump(Struct):
    configs: list[_Dynamic] = []


class _Loaded(Struct):
    serial_number: str = ""


class _Pair(Struct):
    ca_cert: list[_Loaded] = []
    cert_chain: list[_Loaded] = []


class _Certs(Struct):
    certificates: list[_Pair] = []


class _Readout(Struct):
    name: str = ""
    value: Any = None


class _Readouts(Struct):
    stats: list[_Readout] = []


class _UsedNow(Struct, frozen=True):
    """The serial numbers of what is in use, and the accepted versions by the statistic's name."""

    serials: frozenset[int]
    versions: Mapping[str, str]


class EnvoyAdmin:
    """An Envoy's admin interface, at a URL or a Unix socket."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._is_url = place.startswith(("http://", "https://"))

    def secrets(self) -> tuple[InspectedSecret, ...]:
        """What Envoy has got by SDS. Raises EnvoyAdminError."""
        with self._client() as client:
            before = self._serials(client)
            found = [(resource, self._get(client, f"/config_dump?resource={resource}", _Dump)) for resource in SECRETS]
            # a push between two requests must not look like a refusal
            in_use = _UsedNow(before | self._serials(client), self._versions(client))
            return tuple(
                _inspected(each, in_use, active=resource == SECRETS[0])
                for resource, dump in found
                for each in dump.configs
            )

    def _serials(self, client: httpx.Client) -> frozenset[int]:
        pairs = self._get(client, "/certs", _Certs).certificates
        found = (each.serial_number for pair in pairs for each in (*pair.cert_chain, *pair.ca_cert))
        return frozenset(int(each, 16) for each in found if _HEX.fullmatch(each))

    def _versions(self, client: httpx.Client) -> Mapping[str, str]:
        texts = self._get(client, "/stats?filter=version_text&format=json", _Readouts).stats
        return {each.name: each.value for each in texts if isinstance(each.value, str)}

    def config(self) -> bytes:
        """The whole configuration, as JSON. Raises EnvoyAdminError."""
        with self._client() as client:
            return self._body(client, "/config_dump")

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        transport = httpx.HTTPTransport(uds=None if self._is_url else self._place)
        base = self._place.rstrip("/") if self._is_url else "http://envoy"
        try:
            client = httpx.Client(base_url=base, transport=transport, timeout=TIMEOUT, trust_env=False)
        except httpx.InvalidURL as error:
            raise EnvoyAdminError(f"{self._place} is no address: {error}") from error
        with client:
            yield client

    def _get(self, client: httpx.Client, path: str, shape: type[Any]) -> Any:
        try:
            return msgspec.json.decode(self._body(client, path), type=shape, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EnvoyAdminError(f"{self._place}{path} is not what an Envoy answers: {error}") from error

    def _body(self, client: httpx.Client, path: str) -> bytes:
        try:
            answer = client.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise EnvoyAdminError(
                f"no Envoy answers at {self._place} ({why}); name the address of its admin section, such as "
                "http://127.0.0.1:9901, or its socket"
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise EnvoyAdminError(
                f"{self._place}{path} answers {answer.status_code}; is that an Envoy's admin address?"
            )
        return answer.content


def _inspected(found: _Dynamic, in_use: _UsedNow, *, active: bool) -> InspectedSecret:
    name, detail = printable(found.name, LONGEST), printable(str(found.error_state.get("details", "")), LONGEST)
    kind, pem = _content(found.secret)
    secret = InspectedSecret(
        name=name,
        state="ACTIVE" if active and pem else "WARMING",
        kind=kind,
        pem=pem,
        version=printable(found.version_info, LONGEST),
        updated=found.last_updated,
        detail=detail,
    )
    if secret.state == "ACTIVE" and not _is_used(secret, found, in_use):
        reason = detail or "Envoy was sent it and does not use it: it refused it, or no listener or cluster needs it"
        return msgspec.structs.replace(secret, state="REJECTED", detail=reason)
    return secret


def _is_used(secret: InspectedSecret, found: _Dynamic, in_use: _UsedNow) -> bool:
    certificates = secret.certificates
    accepted = in_use.versions.get(f"sds.{found.name.replace(':', '_')}.version_text")
    if accepted and found.version_info and accepted != found.version_info:
        return False
    return bool(certificates) and certificates[0].serial_number in in_use.serials


def _content(secret: _Secret) -> tuple[Any, bytes]:
    if secret.tls_certificate is not None:
        return "certificate", _bytes(secret.tls_certificate.certificate_chain)
    if secret.validation_context is not None:
        return "bundle", _bytes(secret.validation_context.trusted_ca)
    return None, b""


def _bytes(inline: _Inline) -> bytes:
    try:
        return certificates_only(base64.b64decode(inline.inline_bytes, validate=True) or inline.inline_string.encode())
    except binascii.Error:
        return b""
