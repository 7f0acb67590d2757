"""Secrets that an Envoy asks for over ADS, the one stream for everything from its control plane: pure.

The agent serves SDS alone. Such an Envoy starts, logs `StreamAggregatedResources ... Method not found` where its ADS
leads to the agent, and waits.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from sds_agent.doctor.diagnosis import Diagnosis, bad, warning
from sds_agent.doctor.dumps import SHOWN, clusters_of, items, mapping, pipes


class Ads(Struct, frozen=True):
    """The clusters that an Envoy's ads_config names, and whether one of them leads to the agent."""

    clusters: tuple[str, ...]
    is_agent: bool


def ads_of(dump: Mapping[str, Any], socket: str) -> Ads:
    """Where an Envoy's ADS goes; `socket` is the agent's."""
    services = [
        mapping(mapping(service).get("envoy_grpc"))
        for config in items(dump.get("configs"))
        for service in items(_ads_config(mapping(config)).get("grpc_services"))
    ]
    names = tuple(str(each["cluster_name"]) for each in services if each.get("cluster_name"))
    to_agent = any(path == socket for each in clusters_of(dump) if each.get("name") in names for path in pipes(each))
    return Ads(names, to_agent and bool(socket))


def _ads_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(mapping(config.get("bootstrap")).get("dynamic_resources")).get("ads_config"))


def of_ads(subject: str, name: str, ads: Ads, served: Sequence[str]) -> Iterator[Diagnosis]:
    """A context asks for this name over ADS."""
    fix = f"give it an api_config_source with the agent's cluster in place of ads: {SHOWN}"
    where = f"the cluster {' or '.join(ads.clusters)}" if ads.clusters else "no server, as there is no ads_config"
    if ads.is_agent:
        yield bad(subject, f"asks the agent for {name} over ADS, and the agent serves SDS alone; {fix}")
    elif name in served:
        yield bad(subject, f"asks for {name} over ADS, so from {where}, and not from the agent; {fix}")
    else:
        yield warning(subject, f"gets {name} over ADS from {where}; if it is to come from the agent, {fix}")
