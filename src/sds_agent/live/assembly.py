"""The parts of an agent as values, made from its settings: what issues for whom, and by which rules."""

from collections.abc import Iterable, Mapping

from msgspec import Struct

from sds_agent.authority import registry
from sds_agent.authority.protocol import AdvertisesLists, Authority, Supplier
from sds_agent.clock import Clock
from sds_agent.config.settings import OutputSettings, Settings, WorkloadSettings
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.cache import WorkloadCache
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.failover import FailoverPolicy
from sds_agent.issuance.federation import bundle_name
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.schedule import Renewal
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.workload import Workload

NO_UPSTREAMS: Mapping[str, Upstream] = {}

Authorities = Mapping[str, Authority | Supplier]
"""The open authorities by their names."""


class Issuing(Struct, frozen=True):
    """All that says how a workload's certificates are issued."""

    workload: Workload
    upstreams: tuple[Upstream, ...]
    policy: FailoverPolicy

    def same(self, other: "Issuing") -> bool:
        """Whether it says the same. An authority that was opened anew is another one."""
        return (self.workload, self.policy) == (other.workload, other.policy) and [*map(id, self.upstreams)] == [
            *map(id, other.upstreams)
        ]

    def issuer(
        self,
        target: PublicationTarget,
        clock: Clock,
        cache: WorkloadCache | None = None,
        counts: IssuanceCounts | None = None,
    ) -> Issuer:
        """What issues so."""
        first, *others = self.upstreams
        return Issuer(
            self.workload,
            first,
            target,
            clock=clock,
            cache=cache,
            fallbacks=others,
            policy=self.policy,
            counts=counts,
        )


class Written(Struct, frozen=True):
    """What a workload's output is written from: `bundles` are the names of the bundles, by their trust domains."""

    name: str
    output: OutputSettings
    bundles: Mapping[str, str]


def workloads(settings: Settings) -> tuple[Workload, ...]:
    """The configured identities."""
    renewal = Renewal(settings.renewal.fraction, settings.renewal.jitter)
    return tuple(_workload(settings, chosen, renewal) for chosen in settings.workloads)


def _workload(settings: Settings, chosen: WorkloadSettings, renewal: Renewal) -> Workload:
    kinds = {name: registry.name_of(settings.authorities[name]) for name in settings.authorities_of(chosen)}
    first, *others = kinds
    return Workload(
        name=chosen.name,
        identity=SpiffeId.parse(chosen.spiffe_id),
        key_type=chosen.key,
        ttl=chosen.ttl,
        authority=first,
        names=chosen.names,
        kind=kinds[first],
        renewal=renewal,
        fallbacks={name: kinds[name] for name in others},
    )


def upstreams(
    settings: Settings, cas: Authorities, before: Mapping[str, Upstream] = NO_UPSTREAMS
) -> dict[str, Upstream]:
    """How each authority is asked, by its name. Those of `before` go on with the queue that they have."""
    chosen, asked = settings.requests, dict[str, Upstream]()
    for name, ca in cas.items():
        known = before.get(name)
        fresh = Upstream(ca, IssuanceQueue(chosen.concurrency), chosen.timeout.total_seconds())
        asked[name] = known if known is not None and known.authority is ca else fresh
    return asked


def issuing(settings: Settings, asked: Mapping[str, Upstream]) -> dict[str, Issuing]:
    """How each workload's certificates are issued, by its name."""
    chosen = settings.failover
    policy = FailoverPolicy(chosen.failures, chosen.after, chosen.back_after)
    return {
        each.name: Issuing(each, tuple(asked[name] for name in each.authorities), policy)
        for each in workloads(settings)
    }


def written(settings: Settings) -> dict[str, Written]:
    """What outputs are written from, by the names of the workloads that have one."""
    bundles = {settings.trust_domain: settings.bundle_names[0]}
    bundles |= {domain: bundle_name(domain) for domain in settings.federated}
    return {
        each.name: Written(each.name, each.output, bundles) for each in settings.workloads if each.output is not None
    }


def names(settings: Settings) -> tuple[str, ...]:
    """The resource names that the agent is ready with, in the order of the configuration."""
    return (*(name for each in settings.workloads for name in each.names), *settings.bundle_names)


def optional_names(settings: Settings) -> Iterable[str]:
    """The resource names that need not ever have a secret."""
    return map(bundle_name, settings.federated)


def kinds(settings: Settings) -> dict[str, str]:
    """The kind of each authority, by its name."""
    return {name: registry.name_of(chosen) for name, chosen in settings.authorities.items()}


def with_lists(cas: Authorities) -> dict[str, AdvertisesLists]:
    """The authorities that the configuration wants revocation lists of."""
    return {name: ca for name, ca in cas.items() if isinstance(ca, AdvertisesLists) and ca.revocation_lists}
