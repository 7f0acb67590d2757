"""Reads from an Envoy's admin interface which secrets it has loaded.

`/config_dump` shows a secret that Envoy refused as if it were active. What is in use shows elsewhere. `/certs` has
serial numbers without names. The statistic `sds.NAME.version_text` has the version that was last accepted; it is empty
where the server names versions of resources alone, as on Delta streams. So a secret counts as in use only if its first
certificate is in `/certs`, where it is of a kind that has any, and its version, where the statistic has one, is the
accepted one.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from sds_agent.inspection import web
from sds_agent.inspection.secrets import InspectedSecret, certificates_only
from sds_agent.inspection.web import WebAnswer
from sds_agent.text import one_line, printable

Shape = TypeVar("Shape")

LONGEST = 600
_OK = 200
_HEX = re.compile("[0-9A-Fa-f]+")
_CERTS = "/certs"
_STATS = "/stats?filter=version_text&format=json"
_DUMP = "/config_dump"
_IN_STATISTICS = re.compile("://|:/|:")
"""What an underscore stands for in a statistic's name: Envoy's Stats::Utility::sanitizeStatsName."""
_DUMPS = tuple(f"/config_dump?resource={each}" for each in ("dynamic_active_secrets", "dynamic_warming_secrets"))


class EnvoyAdminError(Exception):
    """The admin interface does not answer, or with something else; the message says why."""


class _Inline(Struct):
    inline_bytes: str = ""
    inline_string: str = ""


class _Certificate(Struct):
    certificate_chain: _Inline = msgspec.field(default_factory=_Inline)
    pkcs12: Any = None


class _Validation(Struct):
    trusted_ca: _Inline = msgspec.field(default_factory=_Inline)
    custom_validator_config: Any = None
    system_root_certs: Any = None


class _Secret(Struct):
    tls_certificate: _Certificate | None = None
    validation_context: _Validation | None = None
    session_ticket_keys: Any = None
    generic_secret: Any = None

    @property
    def is_of_another_kind(self) -> bool:
        """Whether it is one that shows no certificates: the agent serves none, and others do, such as SPIRE with roots
        for Envoy's SPIFFE validator.
        """
        certificate, validation = self.tls_certificate, self.validation_context
        if certificate is not None:
            return certificate.pkcs12 is not None
        if validation is not None and not _bytes(validation.trusted_ca):
            return validation.custom_validator_config is not None or validation.system_root_certs is not None
        return self.session_ticket_keys is not None or self.generic_secret is not None


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

    def secrets(self) -> tuple[InspectedSecret, ...]:
        """What Envoy has got by SDS. Raises EnvoyAdminError."""
        # /certs twice: a push between two requests must not look like a refusal
        before, *dumps, after, stats = self._get(_CERTS, *_DUMPS, _CERTS, _STATS)
        serials = self._serials(before) | self._serials(after)
        in_use = _UsedNow(serials, self._versions(stats))
        found = [self._read(path, dump, _Dump).configs for path, dump in zip(_DUMPS, dumps, strict=True)]
        return tuple(
            _inspected(each, in_use, active=path == _DUMPS[0])
            for path, configs in zip(_DUMPS, found, strict=True)
            for each in configs
        )

    def config(self) -> dict[str, list[dict[str, Any]]]:
        """The whole configuration. Raises EnvoyAdminError."""
        (dump,) = self._get(_DUMP)
        shape: type[dict[str, list[dict[str, Any]]]] = dict[str, list[dict[str, Any]]]
        return self._read(_DUMP, dump, shape)

    def _serials(self, certs: WebAnswer) -> frozenset[int]:
        pairs = self._read(_CERTS, certs, _Certs).certificates
        found = (each.serial_number for pair in pairs for each in (*pair.cert_chain, *pair.ca_cert))
        return frozenset(int(each, 16) for each in found if _HEX.fullmatch(each))

    def _versions(self, stats: WebAnswer) -> Mapping[str, str]:
        texts = self._read(_STATS, stats, _Readouts).stats
        return {each.name: each.value for each in texts if isinstance(each.value, str)}

    def _get(self, *paths: str) -> Sequence[WebAnswer]:
        try:
            answers = web.get(self._place, *paths)
        except web.WebError as error:
            raise EnvoyAdminError(
                f"no Envoy answers at {self._place} ({error}); name the address of its admin section, such as "
                "http://127.0.0.1:9901, or its socket"
            ) from error
        for path, each in zip(paths, answers, strict=True):
            if each.status != _OK:
                raise EnvoyAdminError(f"{self._place}{path} answers {each.status}; is that an Envoy's admin address?")
        return answers

    def _read(self, path: str, answer: WebAnswer, shape: type[Shape]) -> Shape:
        try:
            return msgspec.json.decode(answer.body, type=shape, strict=False)
        except RecursionError as error:
            raise self._no_envoy(path, answer, "it is nested too deep") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._no_envoy(path, answer, one_line(str(error), LONGEST)) from error

    def _no_envoy(self, path: str, answer: WebAnswer, why: str) -> EnvoyAdminError:
        return EnvoyAdminError(
            f"what answers {path} is no Envoy; name the address of its admin section ({self._place}: {why}; it sent "
            f"{answer.looks()})"
        )


def _inspected(found: _Dynamic, in_use: _UsedNow, *, active: bool) -> InspectedSecret:
    details = found.error_state.get("details")
    detail = printable(details if isinstance(details, str) else "", LONGEST)
    kind, pem = _content(found.secret)
    secret = InspectedSecret(
        name=_name(found.name),
        state="ACTIVE" if active and (pem or found.secret.is_of_another_kind) else "WARMING",
        kind=kind,
        pem=pem,
        version=printable(found.version_info, LONGEST),
        updated=_moment(found.last_updated),
        detail=detail,
    )
    if secret.state == "ACTIVE" and not _is_used(secret, found, in_use):
        reason = detail or "Envoy was sent it and does not use it: it refused it, or no listener or cluster needs it"
        return msgspec.structs.replace(secret, state="REJECTED", detail=reason)
    return secret


def _name(name: str) -> str:
    """As it is, if it is fit to be shown: by it the agent is asked what it serves."""
    return name if name.isprintable() and len(name) <= LONGEST else printable(name, LONGEST)


def _is_used(secret: InspectedSecret, found: _Dynamic, in_use: _UsedNow) -> bool:
    certificates = secret.certificates
    accepted = in_use.versions.get(statistic(found.name))
    if accepted and found.version_info and accepted != found.version_info:
        return False
    if found.secret.is_of_another_kind:
        return True
    return bool(certificates) and certificates[0].serial_number in in_use.serials


def statistic(name: str) -> str:
    """The statistic that has the accepted version of the secret of that name."""
    return f"{_IN_STATISTICS.sub('_', f'sds.{name}').rstrip('.')}.version_text"


def _content(secret: _Secret) -> tuple[Any, bytes]:
    if secret.tls_certificate is not None:
        return "certificate", _bytes(secret.tls_certificate.certificate_chain)
    if secret.validation_context is not None:
        return "bundle", _bytes(secret.validation_context.trusted_ca)
    return None, b""


def _bytes(inline: _Inline) -> bytes:
    try:
        return certificates_only(base64.b64decode(inline.inline_bytes, validate=True) or inline.inline_string.encode())
    except ValueError:  # no base64, or not ASCII
        return b""


def _moment(found: datetime | None) -> datetime | None:
    """The time in UTC; None for one that names no zone, or that UTC has no year for."""
    try:
        return None if found is None or found.tzinfo is None else found.astimezone(UTC)
    except OverflowError:
        return None
