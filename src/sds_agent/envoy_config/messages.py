"""Envoy configuration as messages of its published schema (envoy-data-plane), which makes a wrong field an error here.

Source: Envoy's API v3. What real Envoys do with each field was tried on 1.36 to 1.40.
"""

import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sds_agent.envoy_config.choices import EnvoyChoices, SecretFiles

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # envoy-data-plane's own, at import
    import betterproto2
    from envoy_data_plane.envoy.config.bootstrap.v3 import Admin, Bootstrap, BootstrapStaticResources
    from envoy_data_plane.envoy.config.cluster.v3 import Cluster
    from envoy_data_plane.envoy.config.core.v3 import (
        Address,
        ApiConfigSource,
        ApiConfigSourceApiType,
        ApiVersion,
        BackoffStrategy,
        ConfigSource,
        DataSource,
        GrpcService,
        GrpcServiceEnvoyGrpc,
        Http2ProtocolOptions,
        Node,
        PathConfigSource,
        Pipe,
        RetryPolicy,
        SocketAddress,
        TransportSocket,
        WatchedDirectory,
    )
    from envoy_data_plane.envoy.config.endpoint.v3 import (
        ClusterLoadAssignment,
        Endpoint,
        LbEndpoint,
        LocalityLbEndpoints,
    )
    from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener
    from envoy_data_plane.envoy.config.route.v3 import (
        DirectResponseAction,
        Route,
        RouteAction,
        RouteConfiguration,
        RouteMatch,
        VirtualHost,
    )
    from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
    from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
        HttpConnectionManager,
        HttpFilter,
    )
    from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
        CertificateValidationContext,
        CommonTlsContext,
        CommonTlsContextCombinedCertificateValidationContext,
        DownstreamTlsContext,
        SdsSecretConfig,
        Secret,
        SubjectAltNameMatcher,
        SubjectAltNameMatcherSanType,
        TlsCertificate,
        TlsParameters,
        TlsParametersTlsProtocol,
        UpstreamTlsContext,
    )
    from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
        HttpProtocolOptions,
        HttpProtocolOptionsExplicitHttpConfig,
    )
    from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
    from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
    from envoy_data_plane.google.protobuf import Any as Packed

CLUSTER = "sds-agent"
PEER = "peer"
ADMIN_PORT, INBOUND_PORT, OUTBOUND_PORT = 9901, 10443, 10000
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CURVES = ["X25519MLKEM768", "X25519", "P-256"]


def as_json(message: betterproto2.Message) -> dict[str, Any]:
    """A message in protobuf's JSON mapping, with the names as the .proto files have them."""
    return message.to_dict(casing=betterproto2.Casing.SNAKE)


def sds_cluster(choices: EnvoyChoices) -> Cluster:
    """The agent's socket."""
    options = HttpProtocolOptions(
        explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=Http2ProtocolOptions())
    )
    return Cluster(
        name=CLUSTER,
        connect_timeout=timedelta(seconds=1),
        load_assignment=_endpoint(CLUSTER, Address(pipe=Pipe(path=str(choices.socket)))),
        typed_extension_protocol_options={_HTTP_OPTIONS: Packed.pack(options)},
    )


def downstream(choices: EnvoyChoices) -> TransportSocket:
    """Mutual TLS in: for a listener's filter chain."""
    common = _common(choices)
    if choices.is_tls13_alone:
        common.tls_params = _parameters(choices)
    context = DownstreamTlsContext(require_client_certificate=True, common_tls_context=common)
    if choices.no_resumption:
        context.disable_stateless_session_resumption = True
        context.disable_stateful_session_resumption = True
    return _tls(context)


def upstream(choices: EnvoyChoices) -> TransportSocket:
    """Mutual TLS out: for a cluster."""
    common = _common(choices)
    common.tls_params = _parameters(choices)
    common.tls_params.tls_maximum_protocol_version = TlsParametersTlsProtocol.TLSv1_3  # TLS 1.2 by default
    context = UpstreamTlsContext(common_tls_context=common)
    if choices.no_resumption:
        context.max_session_keys = 0
    return _tls(context)


def bootstrap(choices: EnvoyChoices) -> Bootstrap:
    """An Envoy that starts as it is: its own outbound listener reaches its own inbound one over mutual TLS."""
    answer = Route(
        match=RouteMatch(prefix="/"),
        direct_response=DirectResponseAction(status=200, body=DataSource(inline_string="hello over mutual TLS\n")),
    )
    onward = Route(match=RouteMatch(prefix="/"), route=RouteAction(cluster=PEER))
    peer = Cluster(
        name=PEER,
        connect_timeout=timedelta(seconds=5),
        load_assignment=_endpoint(PEER, _loopback(INBOUND_PORT)),
        transport_socket=upstream(choices),
    )
    clusters = [peer] if choices.files is not None else [peer, sds_cluster(choices)]
    return Bootstrap(
        node=Node(id=f"{choices.name}-1", cluster=choices.name),
        admin=Admin(address=_loopback(ADMIN_PORT)),
        static_resources=BootstrapStaticResources(
            listeners=[
                _listener("inbound", INBOUND_PORT, answer, downstream(choices)),
                _listener("outbound", OUTBOUND_PORT, onward),
            ],
            clusters=clusters,
        ),
    )


def resources(files: SecretFiles, choices: EnvoyChoices) -> dict[Path, DiscoveryResponse]:
    """The files that name the secrets' files: Envoy watches their directory, whose link the agent replaces."""
    certificate = Secret(
        name=choices.name,
        tls_certificate=TlsCertificate(
            certificate_chain=DataSource(filename=str(files.chain)),
            private_key=DataSource(filename=str(files.key)),
            watched_directory=WatchedDirectory(path=str(files.chain.parent)),
        ),
    )
    roots = Secret(
        name=choices.bundle,
        validation_context=CertificateValidationContext(
            trusted_ca=DataSource(filename=str(files.roots)),
            watched_directory=WatchedDirectory(path=str(files.roots.parent)),
        ),
    )
    return {
        files.certificate_resource: DiscoveryResponse(resources=[Packed.pack(certificate)]),
        files.roots_resource: DiscoveryResponse(resources=[Packed.pack(roots)]),
    }


def _common(choices: EnvoyChoices) -> CommonTlsContext:
    files = choices.files
    return CommonTlsContext(
        tls_certificate_sds_secret_configs=[
            SdsSecretConfig(
                name=choices.name, sds_config=_source(choices, None if files is None else files.certificate_resource)
            )
        ],
        combined_validation_context=CommonTlsContextCombinedCertificateValidationContext(
            default_validation_context=CertificateValidationContext(
                match_typed_subject_alt_names=_matchers(choices.peers, choices.trust_domain)
            ),
            validation_context_sds_secret_config=SdsSecretConfig(
                name=choices.bundle, sds_config=_source(choices, None if files is None else files.roots_resource)
            ),
        ),
    )


def _parameters(choices: EnvoyChoices) -> TlsParameters:
    parameters = TlsParameters(ecdh_curves=_CURVES if choices.post_quantum else [])
    if choices.is_tls13_alone:
        parameters.tls_minimum_protocol_version = TlsParametersTlsProtocol.TLSv1_3
    return parameters


def _matchers(peers: Sequence[str], trust_domain: str) -> list[SubjectAltNameMatcher]:
    uri = SubjectAltNameMatcherSanType.URI
    if not peers:
        anyone = StringMatcher(prefix=f"spiffe://{trust_domain}/")
        return [SubjectAltNameMatcher(san_type=uri, matcher=anyone)]
    return [SubjectAltNameMatcher(san_type=uri, matcher=StringMatcher(exact=each)) for each in peers]


def _source(choices: EnvoyChoices, resource: Path | None) -> ConfigSource:
    if resource is not None:
        return ConfigSource(resource_api_version=ApiVersion.V3, path_config_source=PathConfigSource(path=str(resource)))
    variant = ApiConfigSourceApiType.DELTA_GRPC if choices.delta else ApiConfigSourceApiType.GRPC
    backoff = BackoffStrategy(base_interval=timedelta(milliseconds=100), max_interval=timedelta(seconds=2))
    service = GrpcServiceEnvoyGrpc(cluster_name=CLUSTER, retry_policy=RetryPolicy(retry_back_off=backoff))
    return ConfigSource(
        resource_api_version=ApiVersion.V3,
        initial_fetch_timeout=timedelta(0),
        api_config_source=ApiConfigSource(
            api_type=variant,
            transport_api_version=ApiVersion.V3,
            set_node_on_first_message_only=True,
            grpc_services=[GrpcService(envoy_grpc=service)],
        ),
    )


def _tls(context: betterproto2.Message) -> TransportSocket:
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Packed.pack(context))


def _loopback(port: int) -> Address:
    return Address(socket_address=SocketAddress(address="127.0.0.1", port_value=port))


def _endpoint(cluster: str, address: Address) -> ClusterLoadAssignment:
    endpoint = LbEndpoint(endpoint=Endpoint(address=address))
    return ClusterLoadAssignment(cluster_name=cluster, endpoints=[LocalityLbEndpoints(lb_endpoints=[endpoint])])


def _listener(name: str, port: int, route: Route, tls: TransportSocket | None = None) -> Listener:
    manager = HttpConnectionManager(
        stat_prefix=name,
        route_config=RouteConfiguration(virtual_hosts=[VirtualHost(name=name, domains=["*"], routes=[route])]),
        http_filters=[HttpFilter(name="envoy.filters.http.router", typed_config=Packed.pack(Router()))],
    )
    chain = FilterChain(
        filters=[Filter(name="envoy.filters.network.http_connection_manager", typed_config=Packed.pack(manager))],
        transport_socket=tls,
    )
    return Listener(name=name, address=_loopback(port), filter_chains=[chain])
