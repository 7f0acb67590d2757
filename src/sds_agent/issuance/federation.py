"""The trust anchors of other trust domains: a bundle for each, under the name `spiffe://NAME` and under no other.

A certificate of another trust domain must be accepted only where an Envoy is configured to accept that domain, so its
anchors never enter the bundle of the agent's own. Only the trust domains that the configuration lists are served:
whatever else an authority knows of would otherwise make names of its choice.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime

from msgspec import Struct

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.issuance.anchors_file import FederatedAnchors
from sds_agent.issuance.status import AnchorStatus, FederatedStatus
from sds_agent.issuance.validity import next_check
from sds_agent.pki.certificates import (
    CertificateError,
    describe,
    longest_valid_first,
    read_bundle,
    serial_hex,
    write_pem,
)
from sds_agent.pki.keys import describe_key
from sds_agent.pki.validation.choice import current, moments
from sds_agent.pki.validation.rules import Chain, fault_of_ca
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.text import first, printable

LOG = logging.getLogger(__name__)

MOST_SHOWN = 10
"""Trust domains that are named in one event."""
_NONE = "its bundle holds no certificate of a CA"


class _Read(Struct, frozen=True):
    """The usable anchors of a bundle, and what is wrong with the others."""

    anchors: Chain
    causes: tuple[str, ...] = ()


def bundle_name(trust_domain: str) -> str:
    """The resource name of a trust domain's bundle."""
    return f"spiffe://{trust_domain}"


class Federation:
    """The bundles of other trust domains. `sources` has the trust domains that each authority gives, by its name;
    `changed` is called when `stored` has changed.
    """

    def __init__(
        self,
        store: SecretStore,
        sources: Mapping[str, Sequence[str]],
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._sources = sources
        self._clock = clock
        self._changed = changed
        self._anchors: dict[str, Chain] = {}
        self._served: dict[str, Chain] = {}
        self._faults = {name: log.LogOnChange(LOG, "federated_anchors_left_out") for name in self.trust_domains}
        self._ignored: dict[str, frozenset[str]] = {}

    @property
    def trust_domains(self) -> tuple[str, ...]:
        """Those that the configuration lists."""
        return tuple(name for names in self._sources.values() for name in names)

    @property
    def status(self) -> tuple[FederatedStatus, ...]:
        """Every listed trust domain with what is served for it."""
        return tuple(self._status(name, authority) for authority, names in self._sources.items() for name in names)

    def _status(self, name: str, authority: str) -> FederatedStatus:
        if (served := self._store.secret(bundle_name(name))) is None:
            return FederatedStatus(name, authority)
        anchors = tuple(
            AnchorStatus(
                describe(each),
                serial_hex(each),
                each.not_valid_before_utc,
                each.not_valid_after_utc,
                (authority,),
                None,
                describe_key(each.public_key()),
            )
            for each in self._served.get(name, ())
        )
        return FederatedStatus(name, authority, served.version, anchors)

    @property
    def stored(self) -> tuple[FederatedAnchors, ...]:
        """What has to outlive the process."""
        return tuple(
            FederatedAnchors(name, authority, self._anchors[name])
            for authority, names in self._sources.items()
            for name in names
            if name in self._anchors
        )

    def follow(self, sources: Mapping[str, Sequence[str]], replaced: Collection[str] = ()) -> None:
        """From now on these authorities give the anchors of these trust domains.

        What another one gave, or one that was `replaced` by another kind, is withheld.
        """
        stays = {(name, each) for name in sources if name not in replaced for each in sources[name]}
        for authority, names in self._sources.items():
            for name in names:
                if (authority, name) not in stays and self._anchors.pop(name, None) is not None:
                    self._withdraw(authority, name)
        self._sources = sources
        known, self._faults = self._faults, {}
        for name in self.trust_domains:
            self._faults[name] = known.get(name) or log.LogOnChange(LOG, "federated_anchors_left_out")
        self._ignored = {name: names for name, names in self._ignored.items() if name in sources}
        self._changed()

    def restore(self, stored: Iterable[FederatedAnchors]) -> None:
        """Serve what an earlier process was given, until the authority says something else."""
        for each in stored:
            anchors = tuple(anchor for anchor in each.anchors if fault_of_ca(anchor) is None)
            if anchors and each.trust_domain in self._sources.get(each.authority, ()):
                self._anchors[each.trust_domain] = anchors
                self._publish(each.authority, each.trust_domain)

    def update(self, authority: str, bundles: Mapping[str, bytes]) -> None:
        """Serve what an authority says now, in PEM by the names of the trust domains.

        One that it names no longer is withheld. One whose bundle holds nothing usable keeps what it had, which is
        logged (`federated_anchors_left_out`).
        """
        listed = self._sources.get(authority, ())
        self._report_others(authority, frozenset(bundles) - frozenset(listed))
        for name in listed:
            if name in bundles:
                self._take(authority, name, bundles[name])
            elif self._anchors.pop(name, None) is not None:
                self._withdraw(authority, name)
        self._changed()

    def check_times(self) -> datetime:
        """Publish a bundle anew if an anchor in it has ended or begun; returns when to check next."""
        now = self._clock.now()
        for authority, names in self._sources.items():
            for name in names:
                if name in self._anchors:
                    self._publish(authority, name)
        return next_check(now, (moment for anchors in self._anchors.values() for moment in moments(anchors)))

    def _take(self, authority: str, name: str, pem: bytes) -> None:
        read = _read(pem)
        self._faults[name].report(read.causes, authority=authority, trust_domain=name)
        if read.anchors:
            self._anchors[name] = read.anchors
            self._publish(authority, name)

    def _publish(self, authority: str, name: str) -> None:
        served = current(longest_valid_first(self._anchors[name]), self._clock.now())
        self._served[name] = served
        bundle = BundleSecret(write_pem(served))
        if self._store.publish({bundle_name(name): bundle}):
            log.event(
                LOG,
                "federated_trust_changed",
                authority=authority,
                trust_domain=name,
                anchors=len(served),
                version=bundle.version,
            )

    def _withdraw(self, authority: str, name: str) -> None:
        self._served.pop(name, None)
        self._faults[name].resolved()
        self._store.withhold([bundle_name(name)])
        log.event(LOG, "federated_trust_withdrawn", level=logging.WARNING, authority=authority, trust_domain=name)

    def _report_others(self, authority: str, others: frozenset[str]) -> None:
        if new := others - self._ignored.get(authority, frozenset()):
            log.event(LOG, "federation_not_listed", authority=authority, trust_domains=_shown(new))
        self._ignored[authority] = others


def _read(pem: bytes) -> _Read:
    try:
        parsed = read_bundle(pem)
    except CertificateError as error:
        return _Read((), (str(error),))
    faults = {anchor: fault for anchor in parsed.certificates if (fault := fault_of_ca(anchor))}
    anchors = tuple(anchor for anchor in parsed.certificates if anchor not in faults)
    causes = (*parsed.left_out, *faults.values())
    return _Read(anchors, causes if anchors else (*causes, _NONE))


def _shown(names: frozenset[str]) -> tuple[str, ...]:
    return tuple(printable(name, log.LONGEST_VALUE) for name in first(sorted(names), MOST_SHOWN))
