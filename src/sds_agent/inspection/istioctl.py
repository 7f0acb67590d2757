"""Inspected secrets in the shapes of `istioctl proxy-config secret`, so that scripts for it read ours: pure.

Source: Envoy's envoy.admin.v3.SecretsConfigDump as protobuf's JSON mapping has it, and istioctl's table.
"""

import base64
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sds_agent.inspection.secrets import InspectedSecret, ordered
from sds_agent.log import timestamp
from sds_agent.pki.certificates import serial_hex
from sds_agent.text import visible

HEAD = ("RESOURCE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE")
REDACTED = base64.b64encode(b"[redacted]").decode()
_SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 - the name of a type
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TYPES = {"certificate": "Cert Chain", "bundle": "CA", None: ""}


def dump(secrets: Iterable[InspectedSecret]) -> dict[str, Any]:
    """The JSON of `-o json`: what is in use as active, and what is not, or not there yet, as warming. There is no
    private key in it.
    """
    found = ordered(secrets)
    active = [_entry(each) for each in found if each.state == "ACTIVE"]
    warming = [_entry(each) for each in found if each.state != "ACTIVE"]
    return {"dynamicActiveSecrets": active, **({"dynamicWarmingSecrets": warming} if warming else {})}


def _entry(secret: InspectedSecret) -> dict[str, Any]:
    content: dict[str, Any] = {"@type": _SECRET, "name": secret.name}
    inline = {"inlineBytes": base64.b64encode(secret.pem).decode()}
    if secret.pem and secret.kind == "certificate":
        content["tlsCertificate"] = {"certificateChain": inline, "privateKey": {"inlineBytes": REDACTED}}
    elif secret.pem:
        content["validationContext"] = {"trustedCa": inline}
    return {
        "name": secret.name,
        **({"versionInfo": secret.version} if secret.version else {}),
        **({"lastUpdated": timestamp(secret.updated)} if secret.updated is not None else {}),
        **({"errorState": {"details": secret.detail}} if secret.detail else {}),
        "secret": content,
    }


def rows(secrets: Iterable[InspectedSecret], now: datetime) -> list[Sequence[str]]:
    """The table's rows: one for each secret, by its leaf or its first root, as istioctl has it."""
    return [_row(each, now) for each in ordered(secrets)]


def _row(secret: InspectedSecret, now: datetime) -> Sequence[str]:
    certificates = secret.certificates
    name = visible(secret.name)  # of an argument, which a script may have from elsewhere
    if not certificates:
        return (name, _TYPES[secret.kind], secret.state, "false", "", "", "")
    first = certificates[0]
    valid = first.not_valid_before_utc <= now < first.not_valid_after_utc
    return (
        name,
        _TYPES[secret.kind],
        secret.state,
        str(valid).lower(),
        serial_hex(first),
        f"{first.not_valid_after_utc:{_TIME}}",
        f"{first.not_valid_before_utc:{_TIME}}",
    )
