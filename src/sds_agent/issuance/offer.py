"""What Envoys are given under a workload's names: its newest certificate that they take, from when they do until they
no longer do.

When to publish is decided in `schedule`. The anchors of a certificate go out as soon as it is accepted, whether it has
to wait or not: peers need them before they meet the first leaf below them.
"""

import logging
from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct

from sds_agent import log
from sds_agent.authority.protocol import CurrentIdentity
from sds_agent.clock import LONGEST_SLEEP, Clock, until
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted
from sds_agent.issuance.schedule import CurrentLeaf, Holdings
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.validity import Validity, validity
from sds_agent.pki.certificates import serial_hex, write_pem
from sds_agent.pki.keys import KeyType, PrivateKey, to_pkcs8_pem
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

How = Literal["issued", "renewed", "restored"]
"""How a certificate came: the first from the CA, a later one, or from what an agent before this one kept."""


class Workload(Struct, frozen=True):
    """An identity to keep: `names` are the resource names it is served under, `authority` and `kind` the name and the
    kind of its CA.
    """

    name: str
    identity: SpiffeId
    key_type: KeyType
    ttl: timedelta
    authority: str
    names: tuple[str, ...]
    kind: str = ""

    @property
    def ca(self) -> str:
        """Its CA, as a kept certificate names it."""
        return f"{self.kind} {self.authority}"


class Certificate(Sensitive, frozen=True):
    """A certificate in hand: what was accepted, what is served of it, and how and when it came.

    `asked_at` and `issued_at` are when the CA was asked for it and when it answered. One that is `foreign` came from
    another CA than the workload has now.
    """

    how: How
    accepted: Accepted
    secret: CertificateSecret
    asked_at: datetime
    issued_at: datetime
    foreign: bool = False

    @property
    def serial(self) -> str:
        """The leaf's serial number in hexadecimal."""
        return serial_hex(self.accepted.leaf)


def secret_of(accepted: Accepted, key: PrivateKey) -> CertificateSecret:
    """What is served of an accepted answer, with its key."""
    return CertificateSecret(write_pem(accepted.chain), to_pkcs8_pem(key), accepted.not_after)


class Offer:
    """One workload's certificates in hand, the store and the trust bundle kept in step with them."""

    def __init__(self, workload: Workload, *, store: SecretStore, trust: Trust, clock: Clock) -> None:
        self._workload = workload
        self._store = store
        self._trust = trust
        self._clock = clock
        self._served: Certificate | None = None
        self._coming: list[Certificate] = []

    @property
    def holdings(self) -> Holdings:
        """The certificates, as far as time is concerned."""
        served = None if self._served is None else self.held(self._served)
        return Holdings(served, tuple(self.held(certificate) for certificate in self._coming))

    @property
    def current(self) -> CurrentIdentity | None:
        """The certificate with which a CA may be asked for the next one."""
        certificates = [*([self._served] if self._served else []), *self._coming]
        if not certificates:
            return None
        certificate = certificates[0]
        return CurrentIdentity(certificate.secret.chain_pem, certificate.secret.private_key_pem)

    def take(self, certificate: Certificate) -> None:
        """Hold a certificate until it is published, and publish its anchors at once."""
        self._coming.append(certificate)
        accepted = certificate.accepted
        self._trust.update(self._workload.authority, accepted.anchors, accepted.left_out)
        self._trust.rely(self._workload.authority, certificate.secret)

    def publish(self, index: int) -> Certificate:
        """Serve the certificate with that index among those coming, and drop those before it."""
        *overtaken, certificate = self._coming[: index + 1]
        self._coming = self._coming[index + 1 :]
        self._served = certificate
        # after its anchors, which went out when it was taken: no peer meets a leaf before what it chains to
        self._store.publish(dict.fromkeys(self._workload.names, certificate.secret))
        for each in overtaken:
            self._trust.release(self._workload.authority, each.secret)
        return certificate

    async def follow(self, certificate: Certificate) -> None:
        """Withhold a published certificate once it has ended, and offer it again if the clock that said so is set back.

        What it chains to is trusted until then, renewed or not: others may have it in use for a while yet.
        """
        name, names, authority = self._workload.name, self._workload.names, self._workload.authority
        while self._served is certificate:
            now, end = self._clock.now(), self._validity(certificate).end
            if now < end:
                if self._store.snapshot[names[0]] is None:
                    self._trust.rely(authority, certificate.secret, certificate.accepted.anchors)
                    self._store.publish(dict.fromkeys(names, certificate.secret))
                    log.event(LOG, "valid_again", level=logging.WARNING, workload=name, not_after=end)
                await until(self._clock, end)
            else:
                self._trust.release(authority, certificate.secret)
                if self._store.withhold(names):
                    log.event(LOG, "expired", level=logging.ERROR, workload=name, not_after=end)
                await until(self._clock, now + timedelta(seconds=LONGEST_SLEEP))
        while self._clock.now() < (end := self._validity(certificate).end):
            await until(self._clock, end)
        self._trust.release(authority, certificate.secret)

    def held(self, certificate: Certificate) -> CurrentLeaf:
        """The certificate, as far as time is concerned."""
        times = self._validity(certificate)
        return CurrentLeaf(
            certificate.issued_at, times.begin, times.end, certificate.serial, foreign=certificate.foreign
        )

    def _validity(self, certificate: Certificate) -> Validity:
        """When it is valid, by the anchors known now: a root that ends first may have been renewed since."""
        known = certificate.accepted.validity
        if known.ends_with in certificate.accepted.chain:
            return known
        anchors = self._trust.of(self._workload.authority)
        times = validity(certificate.accepted.chain, anchors, self._clock.now())
        return times if times is not None and times.end > known.end else known
