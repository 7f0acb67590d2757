"""One workload's certificates, and the store and the trust bundle that follow them.

`schedule` decides whether and when to publish, withhold, offer again or release. The anchors of a certificate are
published as soon as it is accepted, even if it has to wait itself: peers need them before they meet the first leaf
below them. They stay until it has ended, even if it was renewed: peers may meet it until then.
"""

import logging
from collections.abc import Container, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cryptography import x509
from msgspec import Struct, structs

from sds_agent import log
from sds_agent.authority.protocol import CurrentIdentity
from sds_agent.clock import Clock
from sds_agent.issuance.acceptance import Accepted
from sds_agent.issuance.schedule import CurrentLeaf, IssuanceState, Succession
from sds_agent.issuance.status import CertificateEnd, LeafStatus, WorkloadStatus
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.validity import Validity, validity
from sds_agent.issuance.workload import Certificate, Workload
from sds_agent.pki.certificates import describe, describe_name, serial_hex
from sds_agent.pki.keys import describe_key
from sds_agent.pki.validation.rules import Chain
from sds_agent.secrets.store import SecretStore

LOG = logging.getLogger(__name__)

HOLD = timedelta(seconds=10)
"""The longest time that a leaf below a new trust anchor waits for Envoys to acknowledge the bundle with that anchor.
Real Envoys do in some milliseconds; one that refuses the bundle, or never replies, holds up no renewal.
"""
MOST_CAS = 64
"""CAs whose descriptions are kept."""
HANDSHAKE = timedelta(seconds=1)
"""What is left for a handshake that began with the bundle before, after the last acknowledgement. It is also the time
for programs that read the bundle as a file.
"""


class PublicationTarget(Struct, frozen=True):
    """Where certificates and their anchors are published: the store, and the trust bundle in it."""

    store: SecretStore
    trust: Trust


class Publication:
    """What Envoys are given under the names of one workload.

    The authorities in `supplying` make certificates by themselves, and decide when the next one comes.
    """

    def __init__(
        self, workload: Workload, target: PublicationTarget, clock: Clock, supplying: Container[str] = ()
    ) -> None:
        self._workload = workload
        self._supplying = supplying
        self._store = target.store
        self._trust = target.trust
        self._clock = clock
        self._certificates = Succession[Certificate]()
        self._acknowledged_at: datetime | None = None

    @property
    def certificates(self) -> Succession[Certificate]:
        """The certificates, as they were accepted."""
        return self._certificates

    @property
    def given(self) -> Certificate | None:
        """The certificate that an Envoy is given that asks; None where it is given none."""
        return None if self._certificates.withheld else self._certificates.served

    @property
    def serving(self) -> bool:
        """Whether an Envoy that asks is given a certificate."""
        return self.given is not None

    def hold_until(self, accepted: Accepted) -> datetime | None:
        """Until when a certificate that came now is to be held back for peers to load its trust anchor first.

        None where they have it, and where nothing is served: then a certificate that some peers refuse is better.
        """
        if not self.serving:
            return None
        now, vouching = self._clock.now(), accepted.validity.vouching
        if self._trust.vouched(accepted.chain, now - HOLD, vouching):
            return None
        self._acknowledged_at = None
        return now + HOLD

    @property
    def holding(self) -> bool:
        """Whether a certificate is held back and not every Envoy has acknowledged the bundle."""
        held = [each.held_until for each in self._certificates.coming if each.held_until is not None]
        return bool(held) and self._acknowledged_at is None and max(held) > self._clock.now()

    def acknowledged(self) -> None:
        """Every Envoy has acknowledged the bundle: what is held back for that follows in a moment."""
        self._acknowledged_at = self._clock.now()

    def identity(self, authority: str) -> CurrentIdentity | None:
        """The certificate that authenticates the request for the next one at this authority, where that renews over
        mTLS: one that it issued itself; None if there is none.
        """
        certificates = self._certificates
        candidates = (certificates.served, *certificates.coming, *reversed(certificates.earlier))
        secret = next((each.secret for each in candidates if each is not None and each.authority == authority), None)
        return None if secret is None else CurrentIdentity(secret.chain_pem, secret.private_key_pem)

    @property
    def state(self) -> IssuanceState:
        """What `decide` needs of the certificates: their times by the anchors known now."""
        certificates = self._certificates
        return IssuanceState(
            served=None if certificates.served is None else self.leaf(certificates.served),
            withheld=certificates.withheld,
            coming=tuple(map(self.leaf, certificates.coming)),
            earlier=tuple(map(self.leaf, certificates.earlier)),
        )

    def add(self, certificate: Certificate, accepted: Accepted) -> None:
        """Add a certificate that is to be published, as it was `accepted`, and publish its anchors at once."""
        self._certificates = self._certificates.add(certificate)
        authority = certificate.authority
        if certificate.origin == "restored":
            # what another CA advertised says nothing of when this one did
            since = datetime.min.replace(tzinfo=UTC) if certificate.foreign else certificate.issued_at
            self._trust.restore_advertised(authority, accepted.anchors, since)
            self._trust.add_in_use(authority, certificate.secret, accepted.anchors, accepted)
            return
        self._trust.update(authority, accepted.anchors, accepted.left_out)
        self._trust.add_in_use(authority, certificate.secret, accepted=accepted)

    def take_over(self, certificates: Succession[Certificate], cas: Mapping[str, str]) -> None:
        """Go on with the certificates of this identity from before its configuration changed.

        `cas` were its CAs then, as `Workload.cas`. A certificate of a CA that it has no longer counts as one of the
        first from now on, as it would after a restart.
        """
        self._certificates = certificates.map(lambda each: self._taken_over(each, cas))

    def _taken_over(self, certificate: Certificate, cas: Mapping[str, str]) -> Certificate:
        workload = self._workload
        here = {ca: name for name, ca in workload.cas.items()}
        if (name := here.get(cas.get(certificate.authority, ""))) == certificate.authority:
            return certificate
        name = workload.authority if name is None else name
        self._trust.move_in_use(certificate.authority, name, certificate.secret)
        return structs.replace(certificate, authority=name, foreign=True)

    def leave(self) -> None:
        """The workload is not configured any more: peers may meet its certificates until they end."""
        certificates = self._certificates
        served = () if certificates.served is None or certificates.withheld else (certificates.served,)
        for each in (*served, *certificates.earlier):
            self._trust.outlive(each.authority, each.secret)
        for each in certificates.coming:  # never served
            self._trust.remove_in_use(each.authority, each.secret)

    def forget(self) -> None:
        """Keep none of the certificates: others do, or nobody."""
        self._certificates = Succession[Certificate]()

    def confirm(self, authority: str, accepted: Accepted) -> Certificate | None:
        """The newest certificate if it is this one, and from now on with the anchors that came with it; else None.

        Nothing is published but a changed bundle.
        """
        newest = (*(each for each in (self._certificates.served,) if each is not None), *self._certificates.coming)[-1:]
        if not newest or newest[0].authority != authority or newest[0].secret.chain_pem != accepted.chain_pem:
            return None
        self._trust.update(authority, accepted.anchors, accepted.left_out)
        if newest[0].anchors == accepted.anchors and not newest[0].foreign:
            return newest[0]
        confirmed = newest[0].confirmed(accepted)
        self._certificates = self._certificates.replace_newest(confirmed)
        return confirmed

    def publish(self, index: int) -> Certificate:
        """Serve the certificate with that index among those coming, drop those before it, and return it."""
        *overtaken, certificate = self._certificates.coming[: index + 1]
        self._certificates = self._certificates.publish(index)
        # after its anchors, which `add` published: no peer may meet a leaf before what it chains to
        self._store.publish(dict.fromkeys(self._workload.names, certificate.secret))
        for each in overtaken:
            self._trust.remove_in_use(each.authority, each.secret)
        return certificate

    def withhold(self) -> None:
        """Stop serving the current certificate, which has ended, and its anchors. Logs `expired`."""
        if (certificate := self._certificates.served) is None:
            return
        self._certificates = self._certificates.withhold()
        self._trust.remove_in_use(certificate.authority, certificate.secret)
        self._store.withhold(self._workload.names)
        _, end = self._times(certificate)
        log.event(LOG, "expired", level=logging.ERROR, workload=self._workload.name, not_after=end)

    def offer_again(self) -> None:
        """Serve the withheld certificate again, its anchors first. Logs `valid_again`."""
        if (certificate := self._certificates.served) is None:
            return
        self._certificates = self._certificates.offer_again()
        self._trust.add_in_use(certificate.authority, certificate.secret, certificate.anchors)
        self._store.publish(dict.fromkeys(self._workload.names, certificate.secret))
        _, end = self._times(certificate)
        log.event(LOG, "valid_again", level=logging.WARNING, workload=self._workload.name, not_after=end)

    def release(self, index: int) -> None:
        """Drop the earlier certificate with that index, which has ended, and the anchors that only it needs."""
        released = self._certificates.earlier[index]
        self._trust.remove_in_use(released.authority, released.secret)
        self._certificates = self._certificates.release(index)

    def leaf(self, certificate: Certificate) -> CurrentLeaf:
        """The times of a certificate."""
        (begin, end), held_until = self._times(certificate), certificate.held_until
        if held_until is not None and self._acknowledged_at is not None:
            held_until = min(held_until, self._acknowledged_at + HANDSHAKE)
        return CurrentLeaf(
            certificate.issued_at,
            begin,
            end,
            certificate.serial,
            foreign=certificate.foreign,
            held_until=held_until,
            elapsed=certificate.elapsed,
        )

    def ends(self, certificate: Certificate) -> tuple[CurrentLeaf, tuple[CertificateEnd, ...]]:
        """The times of a certificate, and its intermediates."""
        return self.leaf(certificate), tuple(map(_end_of, certificate.intermediates))

    def placed(self, certificate: Certificate) -> Certificate:
        """The certificate, which came now, with its place in its term."""
        before = self.state.newest(certificate.issued_at)
        return structs.replace(certificate, elapsed=self.leaf(certificate).place(before, self._workload.renewal))

    @property
    def status(self) -> WorkloadStatus:
        """What can be seen of the workload's certificates."""
        workload, certificates = self._workload, self._certificates
        return WorkloadStatus(
            name=workload.name,
            spiffe_id=str(workload.identity),
            authority=workload.authority,
            current=None if certificates.served is None else self._leaf_status(certificates.served),
            served=self.serving,
            coming=tuple(map(self._leaf_status, certificates.coming)),
            earlier=tuple(map(self._leaf_status, certificates.earlier)),
        )

    def _leaf_status(self, certificate: Certificate) -> LeafStatus:
        chain = certificate.chain
        leaf, times = chain[0], self._renewed(certificate, chain)
        begin, end, anchor = certificate.begin, certificate.end, certificate.anchor
        ends_with = anchor if certificate.ends_with_anchor else min(reversed(chain), key=_not_after)
        if times is not None:
            begin, end, anchor, ends_with = times.begin, times.end, times.anchor, times.ends_with
        # else the identity is its only name, as was checked: to read that from it would take a third of all this
        subject = describe_name(leaf.subject if leaf.subject.rdns else self._workload.identity)
        return LeafStatus(
            serial=certificate.serial,
            issued_at=certificate.issued_at,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            valid_from=begin,
            valid_until=end,
            ends_with=subject if ends_with is leaf else describe(ends_with),
            renew_at=self._renew_at(certificate),
            foreign=certificate.foreign,
            authority=certificate.authority,
            intermediates=tuple(map(_end_of, chain[1:])),
            anchor=_end_of(anchor),
            subject=subject,
            issuer=_name_of(leaf.issuer),
            key=describe_key(leaf.public_key()),
        )

    @property
    def renew_at(self) -> datetime | None:
        """When the next certificate is due, by the age of the newest one; None without any or where the CA decides."""
        certificates = self._certificates
        newest = certificates.coming[-1] if certificates.coming else certificates.served
        return None if newest is None else self._renew_at(newest)

    def _renew_at(self, certificate: Certificate) -> datetime | None:
        if certificate.authority in self._supplying:
            return None
        return self.leaf(certificate).renew_at(self._workload.renewal)

    def _times(self, certificate: Certificate) -> tuple[datetime, datetime]:
        """From when until when the certificate is valid, by the anchors known now."""
        times = self._renewed(certificate)
        return (certificate.begin, certificate.end) if times is None else (times.begin, times.end)

    def _renewed(self, certificate: Certificate, chain: Chain | None = None) -> Validity | None:
        """When the certificate is valid, where its root ended first and was renewed; else None."""
        if not certificate.ends_with_anchor:
            return None
        anchors = self._trust.anchors_of(certificate.authority)
        if anchors == certificate.anchors:
            return None
        times = validity(chain or certificate.chain, anchors, self._clock.now())
        return times if times is not None and times.end > certificate.end else None


_name_of = lru_cache(MOST_CAS)(describe_name)
"""A CA's name in words, which many leaves have as their issuer."""


@lru_cache(MOST_CAS)
def _end_of(certificate: x509.Certificate) -> CertificateEnd:
    """A CA's certificate, which is in many chains."""
    return CertificateEnd(
        describe(certificate),
        serial_hex(certificate),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        _name_of(certificate.issuer),
        describe_key(certificate.public_key()),
    )


def _not_after(certificate: x509.Certificate) -> datetime:
    return certificate.not_valid_after_utc
