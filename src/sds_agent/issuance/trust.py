"""The trust bundle: the anchors of every authority, served as one secret.

What a CA tells is trusted, and what it tells no more is not, but for what certificates in use need: a root that is gone
before the last of them has ended would make the workloads of one agent refuse each other from one renewal to the next.
That holds over a restart too, whichever CA told the root (`needed`).
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, TellsTrust
from sds_agent.clock import Clock, until
from sds_agent.issuance.needed import Need, NeedsFile
from sds_agent.issuance.validity import validity, vouches
from sds_agent.pki.certificates import (
    CertificateError,
    longest_valid_first,
    read_bundle,
    read_pem,
    unique,
    write_pem,
)
from sds_agent.pki.names import canonical
from sds_agent.pki.validation.choice import current
from sds_agent.pki.validation.rules import fault_of_ca
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import NoThreadError, background_tasks

LOG = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that it may take to tell them."""
LOOK = timedelta(minutes=1)
"""How long anchors that are new are not looked at: by then the next end or beginning among them is waited for."""
RETRY = 10.0
"""Seconds until a file that could not be written is tried again."""


class Trust:
    """Keeps the newest anchors of each authority, and publishes their union under the bundle's names."""

    def __init__(
        self, store: SecretStore, names: Iterable[str], clock: Clock, *, authorities: Iterable[str] = ()
    ) -> None:
        self._store = store
        self._names = tuple(names)
        self._clock = clock
        self._authorities = frozenset(authorities)
        self._anchors: dict[str, tuple[x509.Certificate, ...]] = {}
        self._left_out: dict[str, tuple[str, ...]] = {}
        self._in_use: dict[str, dict[str, CertificateSecret]] = {}  # of each authority, by version
        self._needed: dict[str, tuple[x509.Certificate, ...]] = {}  # by the version of what needs them: told no more
        self._chains_to: dict[str, tuple[x509.Certificate, ...]] = {}  # by the version of what is in use
        self._remembered: tuple[Need, ...] = ()
        self._noted: set[Need] = set()
        self._turned = clock.now()
        self._news = asyncio.Event()

    def of(self, authority: str) -> tuple[x509.Certificate, ...]:
        """The anchors known of one authority."""
        return self._anchors.get(authority, ())

    def beside(self, authority: str) -> tuple[x509.Certificate, ...]:
        """The anchors known of the other authorities, which are in the bundle too."""
        return tuple(anchor for other, anchors in self._anchors.items() if other != authority for anchor in anchors)

    def update(self, authority: str, anchors: tuple[x509.Certificate, ...], left_out: tuple[str, ...] = ()) -> None:
        """Take an authority's anchors, and publish the bundle if that changes its content.

        Certificates are compared as DER, and their order is our own: a CA that tells the same anchors in another
        order changes nothing. What is no CA certificate is left out: in a bundle it would vouch for its holder, whoever
        that is. An authority that tells no anchors changes nothing: an empty bundle would make every handshake fail.
        `left_out` says what was wrong with those that could not be used at all.
        """
        anchors = self._usable(authority, anchors, left_out)
        if not anchors:
            return
        before, self._anchors[authority] = self.of(authority), anchors
        if not set(before) <= set(anchors):
            self._keep_needed(authority, before, self._in_use.get(authority, {}).values())
        self._publish(authority)

    def rely(self, authority: str, certificate: CertificateSecret, anchors: tuple[x509.Certificate, ...] = ()) -> None:
        """A certificate is in use that chains to the anchors known of its authority: keep what it needs of them.

        `anchors` are those that it was accepted by, for one that was released before it had ended: they may be told no
        more.
        """
        self._in_use.setdefault(authority, {})[certificate.version] = certificate
        chain, now = read_pem(certificate.chain_pem), self._clock.now()
        above = {canonical(below.issuer) for below in chain}
        self._chains_to[certificate.version] = tuple(
            anchor
            for anchor in unique((*self.of(authority), *anchors))
            if canonical(anchor.subject) in above and vouches(anchor, chain, now)
        )
        self._news.set()
        if not set(anchors) <= set(self.of(authority)):
            self._keep_needed(authority, anchors, [certificate])
            self._publish(authority)

    def release(self, authority: str, certificate: CertificateSecret) -> None:
        """A certificate has ended, so that nobody needs anchors for its sake any longer."""
        self._in_use[authority].pop(certificate.version, None)
        if self._chains_to.pop(certificate.version, None):
            self._news.set()
        if self._needed.pop(certificate.version, None):
            self._publish(authority)

    def remember(self, needs: Iterable[Need]) -> None:
        """Keep what the agent before this one needed, from when an authority has told its anchors until it has ended.

        Not sooner: a bundle with these alone would make Envoys refuse everybody else.
        """
        now = self._clock.now()
        self._remembered = tuple(need for need in needs if now < need.until and fault_of_ca(need.anchor) is None)

    def forget(self) -> datetime | None:
        """Drop what is remembered and has ended; returns when the next of it ends."""
        now, before = self._clock.now(), self._remembered
        self._remembered = tuple(need for need in before if now < need.until)
        if self._remembered != before:
            self._news.set()
            self._publish(before[0].authority)
        return min((need.until for need in self._remembered), default=None)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Every anchor that a certificate in use chains to, and what is remembered, in an order of its own."""
        ends = {(need.authority, need.anchor): need.until for need in self._remembered}
        for authority, certificates in self._in_use.items():
            for version, certificate in certificates.items():
                for anchor in self._chains_to[version]:
                    known = ends.get((authority, anchor), certificate.not_after)
                    ends[authority, anchor] = max(known, certificate.not_after)
        needs = [Need(authority, anchor, end) for (authority, anchor), end in ends.items()]
        return tuple(sorted(needs, key=lambda need: (need.authority, need.until, need.anchor.fingerprint(SHA256()))))

    async def news(self) -> None:
        """Return when `needs` may have changed since the last time that this has returned."""
        await self._news.wait()
        self._news.clear()

    def turn(self) -> datetime:
        """Publish the bundle anew where an anchor has ended or begun since the last turn; returns when the next is due.

        What is `current` changes by itself, and some Envoys choose just the anchor that has ended.
        """
        last, self._turned = self._turned, self._clock.now()
        for authority, anchors in self._anchors.items():
            if any(last < moment <= self._turned for moment in _moments(anchors)):
                self._publish(authority)
        told = (moment for anchors in self._anchors.values() for moment in _moments(anchors))
        look = self._turned + LOOK
        return min((moment for moment in told if self._turned < moment < look), default=look)

    def _keep_needed(
        self, authority: str, before: tuple[x509.Certificate, ...], in_use: Iterable[CertificateSecret]
    ) -> None:
        """Of the anchors told `before` keep what the certificates in use chain to, where the new ones are not as good:
        they do not vouch for it, begin later, or end before the certificate does.
        """
        now, kept = self._clock.now(), list[CertificateSecret]()
        for certificate in in_use:
            chain = read_pem(certificate.chain_pem)
            times = validity(chain, self.of(authority), now)
            if times is not None and times.begin <= now and times.end >= certificate.not_after:
                continue
            if needed := tuple(anchor for anchor in before if vouches(anchor, chain, now)):
                self._needed[certificate.version] = needed
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
        if not self._anchors:
            return
        self._note_remembered()
        remembered = tuple(need.anchor for need in self._remembered)
        told = (*self._anchors.values(), *self._needed.values(), remembered)
        everything = longest_valid_first(anchor for anchors in told for anchor in anchors)
        together = current(everything, self._clock.now())
        bundle = BundleSecret(write_pem(together))
        if self._store.publish(dict.fromkeys(self._names, bundle)):
            log.event(LOG, "trust_changed", authority=authority, anchors=len(together), version=bundle.version)

    def _note_remembered(self) -> None:
        """Log what is kept though its authority tells it no more, or there is no such authority any more."""
        told = {anchor for anchors in self._anchors.values() for anchor in anchors}
        gone = [each for each in self._remembered if each.authority not in self._authorities - self._anchors.keys()]
        old = [need for need in gone if need.anchor not in told and need not in self._noted]
        for authority in sorted({need.authority for need in old}):
            needs = [need for need in old if need.authority == authority]
            until = max(need.until for need in needs)
            log.event(LOG, "old_anchors_kept", authority=authority, anchors=len(needs), until=until)
        self._noted.update(old)

    def _usable(
        self, authority: str, anchors: tuple[x509.Certificate, ...], left_out: tuple[str, ...]
    ) -> tuple[x509.Certificate, ...]:
        faults = {anchor: fault for anchor in anchors if (fault := fault_of_ca(anchor))}
        causes = (*left_out, *faults.values())
        if causes and causes != self._left_out.get(authority):
            log.event(LOG, "anchors_left_out", level=logging.ERROR, authority=authority, causes=causes)
        self._left_out[authority] = causes
        return tuple(anchor for anchor in anchors if anchor not in faults)


def _moments(anchors: tuple[x509.Certificate, ...]) -> Iterator[datetime]:
    for anchor in anchors:
        yield anchor.not_valid_before_utc
        yield anchor.not_valid_after_utc


async def follow(trust: Trust, clock: Clock) -> None:
    """Keep the bundle to the anchors that are current, for ever."""
    while True:
        await until(clock, trust.turn())


async def refresh(trust: Trust, name: str, authority: TellsTrust, clock: Clock) -> None:
    """Keep the anchors of the authority `name` fresh for ever, also while nothing is issued."""
    while True:
        try:
            async with asyncio.timeout(TIMEOUT):
                told = read_bundle(await authority.anchors())
            trust.update(name, told.certificates, told.left_out)
        except (AuthorityError, CertificateError, NoThreadError, TimeoutError) as error:
            _not_refreshed(name, str(error) or f"no answer within {TIMEOUT:.0f} s")
        except Exception as error:  # noqa: BLE001 - a bug in one adapter must not end the agent
            log.fault(LOG, f"authority {name}", error)
            cause = f"the adapter failed with {type(error).__name__}; please report the event fault in the log"
            _not_refreshed(name, cause)
        await until(clock, clock.now() + authority.refresh_every)


async def remember(trust: Trust, file: NeedsFile, clock: Clock) -> None:
    """Keep the file as the trust's needs, drop what has ended, and `follow` the anchors' times, for ever."""
    async with background_tasks() as start:
        start(_forget(trust, clock))
        start(follow(trust, clock))
        while True:
            while not await file.save(trust.needs):
                await clock.sleep(RETRY)
            await trust.news()


async def _forget(trust: Trust, clock: Clock) -> None:
    while (end := trust.forget()) is not None:
        await until(clock, end)


def _not_refreshed(authority: str, cause: str) -> None:
    log.event(LOG, "trust_not_refreshed", level=logging.WARNING, authority=authority, cause=cause)
