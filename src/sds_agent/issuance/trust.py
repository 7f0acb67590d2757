"""The trust bundle: the anchors of every authority, served as one secret.

Trusted is what an authority advertises, and beyond that only what certificates in use still chain to: a root that is
gone before the last of them has ended would make the workloads of one agent refuse each other from one renewal to the
next. That holds over a restart too, whichever authority advertised the root (`anchors_file`).
"""

import asyncio
import heapq
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from msgspec import structs

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.issuance.acceptance import Accepted
from sds_agent.issuance.anchors_file import AdvertisedAnchors, NeededAnchor, StoredAnchors
from sds_agent.issuance.revocation import Revocation
from sds_agent.issuance.status import AnchorStatus, LeftOut, TrustStatus
from sds_agent.issuance.validity import next_check, validity, vouches
from sds_agent.pki.certificates import (
    describe,
    longest_valid_first,
    read_again,
    serial_hex,
    unique,
    write_pem,
)
from sds_agent.pki.keys import describe_key
from sds_agent.pki.names import issuer_of, subject_of
from sds_agent.pki.validation.choice import current, moments
from sds_agent.pki.validation.rules import Chain, fault_of_ca
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.text import printable
from sds_agent.values import Sensitive

if TYPE_CHECKING:
    from sds_agent.issuance.lists import PublishedList

LOG = logging.getLogger(__name__)

_SLACK = 64
"""Ends that may be remembered beyond twice the certificates in use."""


class _InUse(Sensitive, frozen=True):
    """A certificate that is served, or was and has not ended: the anchors that it chains to, and those of them that are
    served for its sake alone (`retained`).
    """

    secret: CertificateSecret
    chains_to: Chain
    retained: Chain = ()

    @property
    def chain(self) -> Chain:
        """The leaf and its intermediates, read anew: that is seldom needed, and their objects take much memory."""
        return read_again(self.secret.chain_pem)

    @property
    def until(self) -> datetime:
        """When it ends."""
        return self.secret.not_after


class _Ends:
    """When the last certificate ends that chains to an anchor, without a look at all of them."""

    def __init__(self) -> None:
        # of each authority and of what a certificate chains to, the last to end first; some are in use no longer. By
        # the object, which is in it too: to hash certificates takes long, and thousands share one such value
        self._heaps: dict[tuple[str, int], tuple[Chain, list[tuple[float, str, datetime]]]] = {}

    def add(self, authority: str, version: str, until: datetime, chains_to: Chain) -> None:
        """The certificate of this version is in use until then."""
        if chains_to:
            _, heap = self._heaps.setdefault((authority, id(chains_to)), (chains_to, []))
            heapq.heappush(heap, (-until.timestamp(), version, until))

    def latest(self, authority: str, in_use: Mapping[str, _InUse]) -> dict[x509.Certificate, datetime]:
        """By its anchors, when the last of those `in_use` ends."""
        found = dict[x509.Certificate, datetime]()
        for (whose, key), (chains_to, heap) in tuple(self._heaps.items()):
            if whose != authority:
                continue
            if len(heap) > 2 * len(in_use) + _SLACK:
                heap[:] = {each[1]: each for each in heap if _is_of(each[1], chains_to, in_use)}.values()
                heapq.heapify(heap)
            while heap and not _is_of(heap[0][1], chains_to, in_use):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[whose, key]
                continue
            for anchor in chains_to:
                found[anchor] = max(found.get(anchor, heap[0][2]), heap[0][2])
        return found


def _is_of(version: str, chains_to: Chain, in_use: Mapping[str, _InUse]) -> bool:
    certificate = in_use.get(version)
    return certificate is not None and certificate.chains_to == chains_to


class Trust:
    """The anchors that each authority advertises now and those that certificates need, published as one bundle.

    `names` are the resource names of the bundle, `authorities` the configured ones. Those `with_lists` are asked for
    revocation lists, which are published beside the anchors.
    """

    def __init__(
        self,
        store: SecretStore,
        names: Iterable[str],
        clock: Clock,
        *,
        authorities: Iterable[str] = (),
        with_lists: Iterable[str] = (),
    ) -> None:
        self.revocation = Revocation(with_lists)
        self._store = store
        self._names = tuple(names)
        self._clock = clock
        self._authorities = frozenset(authorities)
        self._anchors: dict[str, Chain] = {}
        self._since: dict[str, datetime] = {}  # when an authority began to advertise these
        self._answered: set[str] = set()  # the authorities that have advertised anchors in this process
        self._answers: dict[str, tuple[Chain, tuple[str, ...]]] = {}  # what each advertised last, as it came
        self._left_out: dict[str, tuple[str, ...]] = {}
        self._unusable: dict[str, log.LogOnChange] = {}
        self._in_use: dict[str, dict[str, _InUse]] = {}  # of each authority, by the certificate's version
        # of certificates from before the start, and of removed workloads
        self._outliving: dict[tuple[str, x509.Certificate], NeededAnchor] = {}
        self._ends = _Ends()
        self._chained: dict[str, Chain] = {}  # to what the last one chains: thousands share one such value
        self._moved: dict[str, list[_InUse]] = {}  # to each authority, since the last `follow`
        self._logged: set[NeededAnchor] = set()
        self._served: Chain = ()
        self._entered: dict[x509.Certificate, datetime] = {}  # when an anchor came into a bundle that there was already
        self._checked = clock.now()
        self._stored_changed = asyncio.Event()

    @property
    def status(self) -> TrustStatus:
        """The anchors that are served, and what was left out."""
        needed: dict[x509.Certificate, datetime] = {}
        for each in self.needed:
            needed[each.anchor] = max(each.until, needed.get(each.anchor, each.until))
        return TrustStatus(
            version=bundle.version if (bundle := self._store.secret(self._names[0])) is not None else None,
            anchors=tuple(self._anchor_status(anchor, needed.get(anchor)) for anchor in self._served),
            left_out=tuple(
                LeftOut(authority, tuple(printable(cause, log.LONGEST_VALUE) for cause in causes))
                for authority, causes in self._left_out.items()
                if causes
            ),
        )

    def _anchor_status(self, anchor: x509.Certificate, needed_until: datetime | None) -> AnchorStatus:
        return AnchorStatus(
            subject=describe(anchor),
            serial=serial_hex(anchor),
            not_before=anchor.not_valid_before_utc,
            not_after=anchor.not_valid_after_utc,
            advertised_by=tuple(sorted(name for name, anchors in self._anchors.items() if anchor in anchors)),
            needed_until=needed_until,
            key=describe_key(anchor.public_key()),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The resource names of the bundle."""
        return self._names

    def vouched(self, chain: Chain, since: datetime, vouching: Chain = ()) -> bool:
        """Whether the bundle has had an anchor since that time, or from its beginning, that vouches for this chain, and
        no revocation lists for which Envoys would refuse it. Those `vouching` are known to vouch for it.
        """
        now = self._clock.now()
        return self.revocation.admits(chain, self._served, since) and any(
            anchor in vouching or vouches(anchor, chain, now)
            for anchor in self._served
            if anchor not in self._entered or self._entered[anchor] <= since
        )

    def anchors_of(self, authority: str) -> Chain:
        """The anchors known of one authority."""
        return self._anchors.get(authority, ())

    def anchors_beside(self, authority: str) -> Chain:
        """The anchors known of the other authorities, which are in the bundle too."""
        return tuple(anchor for other, anchors in self._anchors.items() if other != authority for anchor in anchors)

    def update(self, authority: str, anchors: Chain, left_out: tuple[str, ...] = ()) -> None:
        """Replace what an authority advertised before, and publish the bundle if its content changes.

        Certificates are compared as DER, and their order is our own: a CA that advertises the same anchors in another
        order changes nothing. What is no CA certificate is left out: an anchor vouches for the holder of its key. An
        authority that advertises no anchors changes nothing: an empty bundle would make every handshake fail.
        `left_out` says what was wrong with those that could not be used at all.
        """
        answer = (anchors, left_out)
        if authority in self._answered and self._answers.get(authority) == answer:
            return  # as after each certificate; what changes with time is for `check_times`
        self._answers[authority] = answer
        anchors = self._usable(authority, anchors, left_out)
        if not anchors:
            return
        self._answered.add(authority)
        self._replace(authority, anchors, self._clock.now())
        self._publish(authority)

    def update_lists(self, authority: str, lists: "tuple[PublishedList, ...] | None", issuers: Chain = ()) -> None:
        """An authority publishes these revocation lists now, or did not answer (None). `issuers` are CAs that it named.

        They are published beside the anchors, all that are needed or none.
        """
        if lists is None:
            self.revocation.no_answer(authority)
        else:
            self.revocation.update(authority, lists, issuers)
        self._publish(authority)

    def follow(self, authorities: Iterable[str], with_lists: Iterable[str], replaced: Iterable[str] = ()) -> None:
        """From now on these authorities are configured, and those `with_lists` are asked for revocation lists.

        What another one advertised, or one that was `replaced` by another kind, counts only for certificates in use.
        """
        self._authorities = frozenset(authorities)
        known = self._anchors.keys() | self._left_out.keys()
        others = frozenset(replaced)
        gone = sorted(name for name in known if name not in self._authorities or name in others)
        self.revocation.ask(with_lists, others)
        for name in gone:
            before = self._anchors.pop(name, ())
            self._since.pop(name, None)
            self._answered.discard(name)
            self._answers.pop(name, None)
            self._left_out.pop(name, None)
            self._unusable.pop(name, None)
            self._retain(name, before, tuple(self._in_use.get(name, {})))
        for name, certificates in self._moved.items():
            _log_kept(name, certificates)
        self._moved = {}
        self._stored_changed.set()
        self._publish(", ".join(gone or sorted(self._authorities)))

    def restore_advertised(self, authority: str, anchors: Chain, since: datetime) -> None:
        """Take what an authority advertised before the start for what it advertises now, and publish it.

        It counts until the authority answers, unless something newer was restored. What has expired is dropped.
        """
        if self._take_restored(authority, anchors, since):
            self._publish(authority)

    def _take_restored(self, authority: str, anchors: Chain, since: datetime) -> bool:
        if authority in self._answered or (authority in self._since and since <= self._since[authority]):
            return False
        now = self._clock.now()
        usable = tuple(a for a in anchors if now < a.not_valid_after_utc and fault_of_ca(a) is None)
        if usable:
            self._replace(authority, usable, since)
        return bool(usable)

    def _replace(self, authority: str, anchors: Chain, since: datetime) -> None:
        before, self._anchors[authority] = self.anchors_of(authority), anchors
        if set(before) != set(anchors):
            self._since[authority] = since
            self._stored_changed.set()
        if not set(before) <= set(anchors):
            self._retain(authority, before, tuple(self._in_use.get(authority, {})))

    def add_in_use(
        self, authority: str, certificate: CertificateSecret, anchors: Chain = (), accepted: Accepted | None = None
    ) -> None:
        """From now on trust what this certificate chains to, also when its authority advertises it no more.

        It chains to anchors known of the authority, or to those in `anchors`, by which it was accepted: they count for
        a certificate that was in use before, as they may be advertised no more. Where it was `accepted` a moment ago,
        what was found then need not be found again.
        """
        chain = read_again(certificate.chain_pem) if accepted is None else accepted.chain
        known, known_of_authority = self.anchors_of(authority), self.anchors_of(authority)
        if anchors != known:
            known = unique((*known, *anchors))
        if accepted is not None and known == accepted.anchors:
            chains_to = accepted.validity.vouching
        else:
            now, above = self._clock.now(), {issuer_of(below) for below in chain}
            chains_to = tuple(a for a in known if subject_of(a) in above and vouches(a, chain, now))
        if chains_to == self._chained.get(authority):
            chains_to = self._chained[authority]
        self._chained[authority] = chains_to
        version = certificate.version
        self._in_use.setdefault(authority, {})[version] = _InUse(certificate, chains_to)
        self._ends.add(authority, version, certificate.not_after, chains_to)
        self._stored_changed.set()
        if anchors and not set(anchors) <= set(known_of_authority):
            self._retain(authority, anchors, (version,))
            self._publish(authority)
        elif self.revocation.is_new(chain):
            self._publish(authority)  # its CA may have no list

    def remove_in_use(self, authority: str, certificate: CertificateSecret) -> None:
        """The certificate has ended or was never served: trust nothing for its sake any longer."""
        removed = self._in_use.get(authority, {}).pop(certificate.version, None)
        if removed is None:
            return
        self._retire(removed)
        if removed.chains_to:
            self._stored_changed.set()
        if removed.retained:
            self._publish(authority)

    def _retire(self, removed: _InUse) -> None:
        if self.revocation.wanted:
            self.revocation.retire(removed.chain, self._served, self._clock.now())

    def move_in_use(self, authority: str, to: str, certificate: CertificateSecret) -> None:
        """The certificate stays in use, and counts as one of the authority `to` from now on.

        What it chains to is served already, and thousands may move at once: the bundle is made anew by `follow`, which
        is to come.
        """
        version = certificate.version
        moved = self._in_use.get(authority, {}).pop(version, None)
        if moved is None:  # withheld: nothing is trusted for its sake
            return
        if not set(moved.chains_to) <= set(self.anchors_of(to)):
            moved = structs.replace(moved, retained=moved.chains_to)
            self._moved.setdefault(to, []).append(moved)
        self._in_use.setdefault(to, {})[version] = moved
        self._ends.add(to, version, moved.until, moved.chains_to)
        self._stored_changed.set()

    def outlive(self, authority: str, certificate: CertificateSecret) -> None:
        """The certificate is served no longer and has not ended, as its workload is not configured any more.

        Peers may meet it until it ends, and what it chains to stays until then. That is served already, and thousands
        may go at once: the bundle is made anew by `follow`, which is to come.
        """
        removed = self._in_use.get(authority, {}).pop(certificate.version, None)
        if removed is None:
            return
        self._retire(removed)
        for anchor in removed.chains_to:
            known = self._outliving.get((authority, anchor))
            if known is None or known.until < removed.until:
                self._outliving[authority, anchor] = NeededAnchor(authority, anchor, removed.until)
        self._stored_changed.set()

    def restore(self, needed: Iterable[NeededAnchor], advertised: Iterable[AdvertisedAnchors] = ()) -> None:
        """Publish the bundle from before the start, with what authorities `advertised`. Trust also what certificates
        chain to that were in use then, until the last of them has ended.

        The latter are not published alone, but with the first that an authority advertises: a bundle with these alone
        would make Envoys refuse all other peers.
        """
        now = self._clock.now()
        for each in needed:
            if now < each.until and fault_of_ca(each.anchor) is None:
                self._outliving[each.authority, each.anchor] = each
        taken = [a.authority for a in advertised if self._take_restored(a.authority, a.anchors, a.since)]
        if taken:  # all at once: an Envoy that got a part of the bundle would refuse peers
            self._publish(", ".join(taken))

    def drop_ended(self) -> datetime | None:
        """Drop what outlived its process or its workload and is needed no longer; returns when the next of it is."""
        now = self._clock.now()
        if ended := [key for key, each in self._outliving.items() if each.until <= now]:
            for key in ended:
                del self._outliving[key]
            self._stored_changed.set()
            self._publish(ended[0][0])
        return min((each.until for each in self._outliving.values()), default=None)

    @property
    def needed(self) -> tuple[NeededAnchor, ...]:
        """Every anchor that a certificate in use chains to, also one that outlives its process or its workload, in an
        order that depends on nothing else.
        """
        ends = {key: each.until for key, each in self._outliving.items()}
        for authority, in_use in self._in_use.items():
            for anchor, until in self._ends.latest(authority, in_use).items():
                ends[authority, anchor] = max(ends.get((authority, anchor), until), until)
        needed = [NeededAnchor(authority, anchor, end) for (authority, anchor), end in ends.items()]
        return tuple(sorted(needed, key=lambda each: (each.authority, each.until, each.anchor.fingerprint(SHA256()))))

    @property
    def stored(self) -> StoredAnchors:
        """What has to outlive the process."""
        return StoredAnchors(
            self.needed,
            tuple(
                AdvertisedAnchors(name, longest_valid_first(self._anchors[name]), self._since[name])
                for name in sorted(self._anchors)
            ),
        )

    def store_again(self) -> None:
        """What is stored beside `stored` has changed."""
        self._stored_changed.set()

    async def stored_changed(self) -> None:
        """Return when `stored` may have changed since this returned last."""
        await self._stored_changed.wait()
        self._stored_changed.clear()

    def check_times(self) -> datetime:
        """Publish the bundle anew if an anchor or a list has ended or begun since the last check; returns when to check
        next.

        What is `current` changes by itself, and some Envoys choose just the anchor that has ended.
        """
        last, self._checked = self._checked, self._clock.now()
        self.drop_ended()
        for authority, anchors in self._anchors.items():
            if any(last < moment <= self._checked for moment in moments(anchors)):
                self._publish(authority)
        lists_at = self.revocation.check_at
        if lists_at is not None and lists_at <= self._checked:
            self._publish(", ".join(self._anchors))
        ahead = [moment for anchors in self._anchors.values() for moment in moments(anchors)]
        ahead += filter(None, [self.revocation.check_at])
        return next_check(self._checked, ahead)

    def _retain(self, authority: str, before: Chain, versions: Iterable[str]) -> None:
        """Keep what certificates in use chain to among the anchors advertised `before`, where the new ones are not as
        good: they do not vouch for the certificate, begin later, or end before it does.
        """
        now, in_use, retained = self._clock.now(), self._in_use.get(authority, {}), list[_InUse]()
        needed: Chain = ()
        for version in versions:
            certificate = in_use[version]
            chain, known = certificate.chain, certificate.chains_to
            times = validity(chain, self.anchors_of(authority), now)
            if times is not None and times.begin <= now and times.end >= certificate.until:
                continue
            found = tuple(anchor for anchor in before if anchor in known or vouches(anchor, chain, now))
            if found:
                needed = needed if found == needed else found  # thousands share one such value
                in_use[version] = structs.replace(certificate, retained=needed)
                retained.append(in_use[version])
        if retained:
            _log_kept(authority, retained)

    def _publish(self, authority: str) -> None:
        if not self._anchors:
            return
        self._log_outliving()
        advertised = (anchor for anchors in self._anchors.values() for anchor in anchors)
        retained = _retained(each for in_use in self._in_use.values() for each in in_use.values())
        outliving = (anchor for _, anchor in self._outliving)
        before, now = self._served, self._clock.now()
        self._served = current(longest_valid_first((*advertised, *retained, *outliving)), now)
        if before:  # in the first bundle no anchor is newer than another
            known = self._entered.keys() | set(before)
            entered = self._entered | dict.fromkeys((each for each in self._served if each not in known), now)
            self._entered = {each: entered[each] for each in self._served if each in entered}
        chains = (each.chain for in_use in self._in_use.values() for each in in_use.values())
        bundle = BundleSecret(write_pem(self._served), self.revocation.lists_beside(self._served, chains, now))
        if not self._store.publish(dict.fromkeys(self._names, bundle)):
            return
        if self._served == before:
            log.event(LOG, "lists_changed", authority=authority, version=bundle.version)
        else:
            anchors = len(self._served)
            log.event(LOG, "trust_changed", authority=authority, anchors=anchors, version=bundle.version)

    def _log_outliving(self) -> None:
        """Log once what is served though its authority, if there still is one, advertises it no more."""
        advertised = {anchor for anchors in self._anchors.values() for anchor in anchors}
        silent = self._authorities - self._anchors.keys()
        old = [
            each for each in self._outliving.values() if each.authority not in silent and each.anchor not in advertised
        ]
        new = [each for each in old if each not in self._logged]
        for authority in sorted({each.authority for each in new}):
            needed = [each for each in new if each.authority == authority]
            until = max(each.until for each in needed)
            log.event(LOG, "old_anchors_kept", authority=authority, anchors=len(needed), until=until)
        self._logged.update(new)

    def _usable(self, authority: str, anchors: Chain, left_out: tuple[str, ...]) -> Chain:
        faults = {anchor: fault for anchor in anchors if (fault := fault_of_ca(anchor))}
        causes = (*left_out, *faults.values())
        unusable = self._unusable.setdefault(authority, log.LogOnChange(LOG, "anchors_left_out"))
        unusable.report(causes, authority=authority)
        self._left_out[authority] = causes
        return tuple(anchor for anchor in anchors if anchor not in faults)


def _retained(certificates: Iterable[_InUse]) -> Chain:
    """The anchors that are served for the sake of these certificates, thousands of which share one value."""
    values = {id(each.retained): each.retained for each in certificates if each.retained}
    return unique(anchor for retained in values.values() for anchor in retained)


def _log_kept(authority: str, certificates: list[_InUse]) -> None:
    log.event(
        LOG,
        "old_anchors_kept",
        authority=authority,
        anchors=len(_retained(certificates)),
        certificates=len(certificates),
        until=max(each.until for each in certificates),
    )
