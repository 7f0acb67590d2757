"""The mistakes in an Envoy's configuration, by its `/config_dump`: pure.

The dump is read as plain JSON and only where it is needed, so that every version of Envoy can be read. A value that has
another shape than Envoy's counts as left out. What each mistake leads to was tried on real Envoys.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sds_agent.doctor.diagnosis import Diagnosis, bad, good, warning
from sds_agent.doctor.dumps import SHOWN, clusters_of, items, mapping, pipes
from sds_agent.doctor.envoy_ads import ads_of, of_ads
from sds_agent.doctor.envoy_versions import of_delta, of_old_traps, of_version, version_of
from sds_agent.doctor.served import Served


def of_dump(dump: Mapping[str, Any], envoy: str, socket: str, served: Sequence[str]) -> list[Diagnosis]:
    """The mistakes of the Envoy of that name in the secrets that come from an agent at `socket`, which serves these
    names.
    """
    found: list[Diagnosis] = []
    names = Served(served)
    clusters = set[str]()
    contexts = list(_contexts(dump, ""))
    ads, version = ads_of(dump, socket), version_of(dump)
    found += of_version(f"Envoy {envoy}", version)
    for where, context in contexts:
        subject = f"Envoy {envoy}, {where}"
        for name, source in _sds_sources(context):
            if "ads" in source:
                found += of_ads(subject, name, ads, served)
                continue
            clusters |= set(_grpc_clusters(source))
            found += _of_source(subject, name, source, names)
            found += of_delta(subject, name, source, version)
        found += _of_context(subject, context, downstream=_is_downstream(where, context))
        found += of_old_traps(subject, context, version)
    for cluster in clusters_of(dump):
        if str(cluster.get("name", "")) in clusters:
            found += _of_cluster(f"Envoy {envoy}, cluster {cluster['name']}", cluster, socket)
    if not contexts:
        return [warning(f"Envoy {envoy}", f"no listener and no cluster has TLS; {SHOWN}")]
    return found or [good(f"Envoy {envoy}", f"no mistake in its {len(contexts)} TLS contexts")]


def _contexts(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every TLS context with the listener or the cluster that it is in."""
    match value:
        case {"common_tls_context": dict(), **_rest}:
            yield where, value
        case dict():
            for key, inner in value.items():
                if key in {"listener", "cluster"} and isinstance(inner, dict):
                    yield from _contexts(inner, f"{key} {inner.get('name', '')}")
                elif key != "bootstrap":  # which repeats what the others have
                    yield from _contexts(inner, where)
        case list():
            for inner in value:
                yield from _contexts(inner, where)


def _sds_sources(context: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The names that come by gRPC, from a source of their own or over ADS, and from where."""
    common = context["common_tls_context"]
    combined = mapping(common.get("combined_validation_context"))
    configs = [
        *items(common.get("tls_certificate_sds_secret_configs")),
        common.get("validation_context_sds_secret_config"),
        combined.get("validation_context_sds_secret_config"),
    ]
    for each in map(mapping, configs):
        source = mapping(each.get("sds_config"))
        if isinstance(source.get("api_config_source"), dict) or "ads" in source:
            yield str(each.get("name", "")), source


def _grpc_clusters(source: Mapping[str, Any]) -> Iterator[str]:
    for service in _grpc_services(source):
        if name := service.get("cluster_name"):
            yield str(name)


def _grpc_services(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What Envoy's own gRPC client is told, for each service that uses it."""
    services = map(mapping, items(source["api_config_source"].get("grpc_services")))
    return [mapping(each["envoy_grpc"]) for each in services if "envoy_grpc" in each]


def _of_source(subject: str, name: str, source: Mapping[str, Any], served: Served) -> Iterator[Diagnosis]:
    if served and name not in served and not name.startswith(("file-cert:", "file-root:")):
        yield bad(subject, f"asks for {name}, which the agent does not serve; {served.instead_of(name)}")
    timeout = source.get("initial_fetch_timeout")
    if timeout not in ("0s", "0.0s"):
        yield warning(
            subject,
            f"{name}: initial_fetch_timeout is {timeout or 'left out, which is 15s'}: the listener goes on without a "
            "certificate after that; write 0s",
        )
    if not source["api_config_source"].get("set_node_on_first_message_only"):
        yield warning(
            subject, f"{name}: each ACK repeats 60 KB about this Envoy; set set_node_on_first_message_only: true"
        )
    if any("retry_policy" not in each for each in _grpc_services(source)):
        yield warning(subject, f"{name}: it connects again only after up to 30 s; set retry_policy in envoy_grpc")


def _is_downstream(where: str, context: Mapping[str, Any]) -> bool:
    """Whether it is for connections that are accepted. One inside another transport socket, as QUIC's, has no type."""
    kind = str(context.get("@type", ""))
    return kind.endswith("DownstreamTlsContext") if kind else where.startswith("listener ")


def _of_context(subject: str, context: Mapping[str, Any], *, downstream: bool) -> Iterator[Diagnosis]:
    common = context["common_tls_context"]
    combined = mapping(common.get("combined_validation_context"))
    inline = {**mapping(common.get("validation_context")), **mapping(combined.get("default_validation_context"))}
    by_name = common.get("validation_context_sds_secret_config") or combined.get("validation_context_sds_secret_config")
    matched = any(inline.get(key) for key in ("match_typed_subject_alt_names", "match_subject_alt_names"))
    if not by_name and not inline.get("trusted_ca") and not inline.get("custom_validator_config"):
        if downstream and not context.get("require_client_certificate"):
            yield warning(subject, f"it asks callers for no certificate: anyone may call; {SHOWN} for mutual TLS")
            return
        yield bad(subject, f"it has no roots, so it accepts any certificate; {SHOWN}")
    elif not matched and not inline.get("custom_validator_config"):
        yield bad(
            subject,
            "it matches no SAN, so every certificate of the CA is accepted; set match_typed_subject_alt_names in "
            f"combined_validation_context.default_validation_context: {SHOWN}",
        )
    if inline.get("trust_chain_verification") == "ACCEPT_UNTRUSTED":
        yield bad(
            subject,
            "it accepts certificates of any CA, and self-signed ones; remove trust_chain_verification: "
            "ACCEPT_UNTRUSTED",
        )
    if inline.get("allow_expired_certificate"):
        yield bad(subject, "it accepts expired certificates; remove allow_expired_certificate")
    if downstream and not context.get("require_client_certificate"):
        yield bad(subject, "it asks callers for no certificate; set require_client_certificate: true")
    if not downstream and mapping(common.get("tls_params")).get("tls_maximum_protocol_version") != "TLSv1_3":
        yield warning(subject, "it stays at TLS 1.2; set tls_params.tls_maximum_protocol_version: TLSv1_3")


def _of_cluster(subject: str, cluster: Mapping[str, Any], socket: str) -> Iterator[Diagnosis]:
    options = map(mapping, mapping(cluster.get("typed_extension_protocol_options")).values())
    explicit = any("http2_protocol_options" in mapping(each.get("explicit_http_config")) for each in options)
    if not explicit and "http2_protocol_options" not in cluster:
        yield bad(subject, "gRPC needs HTTP/2; set explicit_http_config.http2_protocol_options")
    for path in pipes(cluster):
        if socket and path != socket:
            yield warning(subject, f"it connects to {path}, and the agent serves at {socket}")
