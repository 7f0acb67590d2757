"""A secret as it was found, without its private key: pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Literal

from cryptography import x509
from msgspec import Struct

from sds_agent.pki.certificates import CertificateError, read_pem, serial_hex
from sds_agent.pki.pem import blocks

_ENVOY = "Envoy is behind"
_CERTIFICATES = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE", b"TRUSTED CERTIFICATE"})
_NOT_PEM = re.compile(rb"[^\t\r\n\x20-\x7e]|\r(?!\n)")

Kind = Literal["certificate", "bundle"]
State = Literal["ACTIVE", "WARMING", "REJECTED", "UNKNOWN", "DENIED"]
"""Whether it is in use: it is; it is not there yet; Envoy was sent it and refuses it; the server does not serve the
name; or it does not serve it to who asks.
"""


def certificates_only(pem: bytes) -> bytes:
    """The certificates of PEM, without whatever is beside them: a private key may be in a chain by mistake, where Envoy
    does not redact it. A byte that could tell a terminal something, and that no PEM has, becomes a question mark.
    """
    return b"".join(
        _NOT_PEM.sub(b"?", each.text.strip()) + b"\n" for each in blocks(pem, _CERTIFICATES) if each.has_end
    )


class InspectedSecret(Struct, frozen=True, kw_only=True):
    """A secret under a name: the chain of a certificate with its leaf first, or the roots of a bundle, in PEM.

    `detail` says why there is none. `updated` is when Envoy got it, None where nobody says that.
    """

    name: str
    state: State
    kind: Kind | None = None
    pem: bytes = b""
    version: str = ""
    updated: datetime | None = None
    detail: str = ""

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """What is in it; nothing if that cannot be read."""
        try:
            return read_pem(self.pem) if self.pem else ()
        except CertificateError:
            return ()

    @property
    def serials(self) -> tuple[str, ...]:
        """The serial numbers in hexadecimal."""
        return tuple(map(serial_hex, self.certificates))


def ordered(secrets: Iterable[InspectedSecret]) -> tuple[InspectedSecret, ...]:
    """In the order of istioctl: a certificate, a bundle, then the others, so that the first two have known places."""
    found = list(secrets)
    first: list[InspectedSecret] = []
    for kind in ("certificate", "bundle"):
        first += next(([each] for each in found if each.kind == kind), [])
    return (*first, *(each for each in found if each not in first))


class Difference(Struct, frozen=True):
    """How what an Envoy uses under a name stands to what the agent serves; `same` is whether there is nothing to do."""

    name: str
    same: bool
    text: str


_NOT_SERVED: Mapping[State, str] = {
    "UNKNOWN": "the agent does not serve it",
    "DENIED": "the agent does not give it to who asks here; ask as the user that this Envoy runs as",
}


def difference(served: InspectedSecret, used: InspectedSecret | None) -> Difference:
    """Hold the two against each other."""

    def differs(text: str) -> Difference:
        return Difference(served.name, same=False, text=text)

    if used is None:
        return differs("this Envoy does not ask for it, or has got no answer yet")
    if served.state in _NOT_SERVED:
        return differs(_NOT_SERVED[served.state])
    if served.state == "WARMING":
        return differs(
            f"the agent has none to give, and Envoy {'uses ' + _named(used) if used.pem else 'waits for it'}"
        )
    if used.state == "REJECTED":
        return differs(f"Envoy refuses {_named(used)} and goes on with what it had; its log and the agent's say why")
    if served.certificates == used.certificates and used.certificates:
        return Difference(served.name, same=True, text=f"both have {_named(served)}")
    which, refused = _behind(served, used), "`sds-agent explain` says whether it has refused that"
    fix = f"; {refused}" if which == _ENVOY else ""
    return differs(f"{which}: the agent serves {_named(served)}, Envoy uses {_named(used)}{fix}")


def _behind(served: InspectedSecret, used: InspectedSecret) -> str:
    if not used.certificates and used.state == "WARMING":
        return "Envoy has nothing yet"
    if not (used.certificates and served.certificates):
        return "they cannot be compared"
    if served.kind == "certificate" and _begins(served) < _begins(used):
        return "the agent is behind"
    return _ENVOY


def _begins(secret: InspectedSecret) -> datetime:
    return secret.certificates[0].not_valid_before_utc


def _named(secret: InspectedSecret) -> str:
    serials: Sequence[str] = secret.serials
    if not serials:
        return "nothing that can be read"
    if secret.kind == "certificate":
        return f"the certificate {serials[0]}"
    return f"{len(serials)} root{'s' if len(serials) > 1 else ''} ({', '.join(serials)})"
