"""A workload as configured, and a certificate that was accepted for it."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal, TypedDict

from cryptography import x509
from msgspec import Struct, structs

from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted
from sds_agent.issuance.schedule import Renewal
from sds_agent.pki.certificates import read_again, read_issuers_again, serial_hex
from sds_agent.pki.keys import KeyType, PrivateKey, to_pkcs8_pem
from sds_agent.pki.validation.rules import Chain
from sds_agent.secrets.model import CertificateSecret
from sds_agent.values import Sensitive

Origin = Literal["issued", "renewed", "restored"]
"""How a certificate came: the first from the CA, a later one, or from the cache that an earlier process wrote."""


class Workload(Struct, frozen=True):
    """An identity that the agent keeps a certificate for.

    `names` are the resource names under which it is served; `authority` and `kind` are the name and the kind of its CA,
    and `fallbacks` the names, in order, and the kinds of those that are asked while that one fails.
    """

    name: str
    identity: SpiffeId
    key_type: KeyType
    ttl: timedelta
    authority: str
    names: tuple[str, ...]
    kind: str = ""
    renewal: Renewal = Renewal()
    fallbacks: Mapping[str, str] = {}

    @property
    def authorities(self) -> tuple[str, ...]:
        """The names of its CAs, in order."""
        return (self.authority, *self.fallbacks)

    @property
    def cas(self) -> Mapping[str, str]:
        """Its CAs by their names, as a cached certificate names them."""
        return {name: f"{kind} {name}" for name, kind in {self.authority: self.kind, **self.fallbacks}.items()}


class Certificate(Sensitive, frozen=True):
    """An accepted certificate: what is served of it, and how and when it came. Made by `certificate_of`.

    The CA named `authority` answered with it at `issued_at`, and `took` so long. One that is `foreign` came from
    another CA than those that the workload has now; it counts as one of the first.
    Its trust anchor may be new to peers: until `held_until` they have time to load it. `elapsed` is its place in its
    term (`schedule.CurrentLeaf`).

    It was accepted by `anchors`, as valid from `begin` until `end`. `anchor` is the one above it that ends last, and
    where that is what ends first of all, `ends_with_anchor` says so. No certificate below the anchors is kept but in
    the bytes that are served: the objects take ten times as much, and there may be thousands of these.

    Lines of the log on the attempt that gave it have the `attempt_id`, which is empty for one that was restored.
    """

    origin: Origin
    secret: CertificateSecret
    serial: str
    """The leaf's serial number in hexadecimal."""
    anchors: Chain
    begin: datetime
    end: datetime
    anchor: x509.Certificate
    ends_with_anchor: bool
    issued_at: datetime
    took: timedelta
    authority: str
    foreign: bool = False
    held_until: datetime | None = None
    attempt_id: str = ""
    elapsed: float = 0.0

    @property
    def chain(self) -> Chain:
        """The leaf, then its intermediates, read anew."""
        return read_again(self.secret.chain_pem)

    @property
    def intermediates(self) -> Chain:
        """Those of the chain, likewise."""
        return read_issuers_again(self.secret.chain_pem)

    def confirmed(self, accepted: Accepted) -> "Certificate":
        """The same certificate, accepted again and by these anchors from now on."""
        return structs.replace(self, **_judged(accepted), foreign=False)


def certificate_of(
    origin: Origin,
    accepted: Accepted,
    secret: CertificateSecret,
    *,
    issued_at: datetime,
    took: timedelta,
    authority: str,
    foreign: bool = False,
    held_until: datetime | None = None,
    attempt_id: str = "",
    elapsed: float = 0.0,
) -> Certificate:
    """The certificate that an accepted answer holds; `secret` is what is served of it (`secret_of`)."""
    return Certificate(
        origin=origin,
        secret=secret,
        serial=serial_hex(accepted.leaf),
        **_judged(accepted),
        issued_at=issued_at,
        took=took,
        authority=authority,
        foreign=foreign,
        held_until=held_until,
        attempt_id=attempt_id,
        elapsed=elapsed,
    )


class _Judged(TypedDict):
    anchors: Chain
    begin: datetime
    end: datetime
    anchor: x509.Certificate
    ends_with_anchor: bool


def _judged(accepted: Accepted) -> _Judged:
    times = accepted.validity
    return _Judged(
        anchors=accepted.anchors,
        begin=times.begin,
        end=times.end,
        anchor=times.anchor,
        ends_with_anchor=times.ends_with not in accepted.chain,
    )


def secret_of(accepted: Accepted, key: PrivateKey) -> CertificateSecret:
    """What is served of an accepted answer, with its key."""
    return CertificateSecret(accepted.chain_pem, to_pkcs8_pem(key), accepted.not_after)
