"""The trust bundle: the anchors of every authority, served as one secret.

What a CA tells is trusted, and what it tells no more is not, but for what certificates in use need: a root that is gone
before the last of them has ended would make the workloads of one agent refuse each other from one renewal to the next.
"""

import asyncio
import logging
from collections.abc import Iterable

from cryptography import x509

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, TellsTrust
from sds_agent.clock import Clock, until
from sds_agent.issuance.validity import validity, vouches
from sds_agent.pki.certificates import CertificateError, longest_valid_first, read_pem, unique, write_pem
from sds_agent.pki.rules import fault_of_ca
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import NoThreadError

LOG = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that it may take to tell them."""


class Trust:
    """Keeps the newest anchors of each authority, and publishes their union under the bundle's names."""

    def __init__(self, store: SecretStore, names: Iterable[str], clock: Clock) -> None:
        self._store = store
        self._names = tuple(names)
        self._clock = clock
        self._anchors: dict[str, tuple[x509.Certificate, ...]] = {}
        self._left_out: dict[str, tuple[str, ...]] = {}
        self._in_use: dict[str, dict[str, CertificateSecret]] = {}  # of each authority, by version
        self._needed: dict[str, tuple[x509.Certificate, ...]] = {}  # by the version of what needs them: told no more

    def of(self, authority: str) -> tuple[x509.Certificate, ...]:
        """The anchors known of one authority."""
        return self._anchors.get(authority, ())

    def update(self, authority: str, anchors: tuple[x509.Certificate, ...]) -> None:
        """Take an authority's anchors, and publish the bundle if that changes its content.

        Certificates are compared as DER, and their order is our own: a CA that tells the same anchors in another
        order changes nothing. What is no CA certificate is left out: in a bundle it would vouch for its holder, whoever
        that is. An authority that tells no anchors changes nothing: an empty bundle would make every handshake fail.
        """
        anchors = self._usable(authority, anchors)
        if not anchors:
            return
        before, self._anchors[authority] = self.of(authority), anchors
        if not set(before) <= set(anchors):
            self._keep_needed(authority, before)
        self._publish(authority)

    def rely(self, authority: str, certificate: CertificateSecret) -> None:
        """A certificate is in use that chains to the anchors known of its authority: keep what it needs of them."""
        self._in_use.setdefault(authority, {})[certificate.version] = certificate

    def release(self, authority: str, certificate: CertificateSecret) -> None:
        """A certificate has ended, so that nobody needs anchors for its sake any longer."""
        self._in_use[authority].pop(certificate.version, None)
        if self._needed.pop(certificate.version, None):
            self._publish(authority)

    def _keep_needed(self, authority: str, before: tuple[x509.Certificate, ...]) -> None:
        """Of the anchors told `before` keep what certificates in use chain to, where the new ones are not as good: they
        do not vouch for it, begin later, or end before the certificate does.
        """
        now, kept = self._clock.now(), list[CertificateSecret]()
        for version, certificate in self._in_use.get(authority, {}).items():
            chain = read_pem(certificate.chain_pem)
            times = validity(chain, self._anchors[authority], now)
            if times is not None and times.begin <= now and times.end >= certificate.not_after:
                continue
            if needed := tuple(anchor for anchor in before if vouches(anchor, chain, now)):
                self._needed[version] = needed
                kept.append(certificate)
        if kept:
            log.event(
                LOG,
                "old_anchors_kept",
                authority=authority,
                anchors=len(unique(anchor for each in kept for anchor in self._needed[each.version])),
                certificates=len(kept),
                until=max(each.not_after for each in kept),
            )

    def _publish(self, authority: str) -> None:
        told = (*self._anchors.values(), *self._needed.values())
        together = longest_valid_first(anchor for anchors in told for anchor in anchors)
        bundle = BundleSecret(write_pem(together))
        if self._store.publish(dict.fromkeys(self._names, bundle)):
            log.event(LOG, "trust_changed", authority=authority, anchors=len(together), version=bundle.version)

    def _usable(self, authority: str, anchors: tuple[x509.Certificate, ...]) -> tuple[x509.Certificate, ...]:
        faults = {anchor: fault for anchor in anchors if (fault := fault_of_ca(anchor))}
        causes = tuple(faults.values())
        if causes and causes != self._left_out.get(authority):
            log.event(LOG, "anchors_left_out", level=logging.ERROR, authority=authority, causes=causes)
        self._left_out[authority] = causes
        return tuple(anchor for anchor in anchors if anchor not in faults)


async def refresh(trust: Trust, name: str, authority: TellsTrust, clock: Clock) -> None:
    """Keep the anchors of the authority `name` fresh for ever, also while nothing is issued."""
    while True:
        try:
            async with asyncio.timeout(PATIENCE):
                trust.update(name, read_pem(await authority.anchors()))
        except (AuthorityError, CertificateError, NoThreadError, TimeoutError) as error:
            _not_refreshed(name, str(error) or f"no answer within {PATIENCE:.0f} s")
        except Exception as error:
            LOG.exception("adapter_fault")
            _not_refreshed(name, f"the adapter failed with {type(error).__name__}; please report it")
        await until(clock, clock.now() + authority.refresh_every)


def _not_refreshed(authority: str, cause: str) -> None:
    log.event(LOG, "trust_not_refreshed", level=logging.WARNING, authority=authority, cause=cause)
