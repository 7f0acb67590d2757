"""Reads from an Envoy's admin interface which secrets it has loaded.

`/config_dump` shows a secret that Envoy refused as if it were active. `/certs` shows what is in use, by serial numbers
and without names. So a secret counts as in use only if its first certificate is among those.
"""

import base64
import binascii
from datetime import datetime
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from sds_agent.inspection.secrets import InspectedSecret
from sds_agent.text import printable

TIMEOUT = 5.0
LONGEST = 600
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


class EnvoyAdmin:
    """An Envoy's admin interface, at a URL or a Unix socket."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._is_url = place.startswith(("http://", "https://"))

    def secrets(self) -> tuple[InspectedSecret, ...]:
        """What Envoy has got by SDS. Raises EnvoyAdminError."""
        with self._client() as client:
            in_use = self._get(client, "/certs", _Certs)
            serials = {
                int(each.serial_number or "0", 16)
                for pair in in_use.certificates
                for each in (*pair.cert_chain, *pair.ca_cert)
            }
            found = []
            for resource in SECRETS:
                dump = self._get(client, f"/config_dump?resource={resource}", _Dump)
                found += [_inspected(each, serials, active=resource == SECRETS[0]) for each in dump.configs]
            return tuple(found)

    def config(self) -> bytes:
        """The whole configuration, as JSON. Raises EnvoyAdminError."""
        with self._client() as client:
            return self._body(client, "/config_dump")

    def _client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=None if self._is_url else self._place)
        base = self._place.rstrip("/") if self._is_url else "http://envoy"
        return httpx.Client(base_url=base, transport=transport, timeout=TIMEOUT, trust_env=False)

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


def _inspected(found: _Dynamic, serials: set[int], *, active: bool) -> InspectedSecret:
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
    certificates = secret.certificates
    if secret.state == "ACTIVE" and (not certificates or certificates[0].serial_number not in serials):
        reason = detail or "Envoy was sent it and does not use it: it refused it, or no listener or cluster needs it"
        return msgspec.structs.replace(secret, state="REJECTED", detail=reason)
    return secret


def _content(secret: _Secret) -> tuple[Any, bytes]:
    if secret.tls_certificate is not None:
        return "certificate", _bytes(secret.tls_certificate.certificate_chain)
    if secret.validation_context is not None:
        return "bundle", _bytes(secret.validation_context.trusted_ca)
    return None, b""


def _bytes(inline: _Inline) -> bytes:
    try:
        return base64.b64decode(inline.inline_bytes, validate=True) or inline.inline_string.encode()
    except binascii.Error:
        return b""
