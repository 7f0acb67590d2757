"""What a person on a terminal can do once the agent serves: the Envoy configuration to paste, and the commands to look.

The text is written here and not built with Envoy's message types, which take longer to import than the whole way to the
first secret; a test holds it against what `sds-agent envoy-config` builds.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sds_agent import log
from sds_agent.config.settings import Settings
from sds_agent.text import ascii_json

STANZA = """\
# static_resources.clusters
name: sds-agent
connect_timeout: 1s
load_assignment:
  cluster_name: sds-agent
  endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {socket}}}}}}}}}]}}]
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    explicit_http_config: {{http2_protocol_options: {{}}}}
---
# a listener's filter_chains[].transport_socket
name: envoy.transport_sockets.tls
typed_config:
  "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
  require_client_certificate: true
  common_tls_context:
    tls_params: {{tls_maximum_protocol_version: TLSv1_3}}
    tls_certificate_sds_secret_configs:
      - name: {name}
        sds_config: &sds
          resource_api_version: V3
          initial_fetch_timeout: 0s
          api_config_source:
            api_type: GRPC
            transport_api_version: V3
            set_node_on_first_message_only: true
            grpc_services:
              - envoy_grpc:
                  cluster_name: sds-agent
                  retry_policy: {{retry_back_off: {{base_interval: 0.100s, max_interval: 2s}}}}
    combined_validation_context:
      default_validation_context:
        match_typed_subject_alt_names: [{{san_type: URI, matcher: {{prefix: "spiffe://{trust_domain}/"}}}}]
      validation_context_sds_secret_config: {{name: {bundle}, sds_config: *sds}}
"""


def stanza(settings: Settings) -> str:
    """The Envoy configuration for the first workload, in YAML."""
    return STANZA.format(
        socket=ascii_json(str(settings.sds.socket)),
        name=ascii_json(settings.workloads[0].name),
        trust_domain=settings.trust_domain,
        bundle=ascii_json(settings.bundle_names[0]),
    )


@contextmanager
def shown_once_ready(settings: Settings, file: Path | None) -> Iterator[None]:
    """Print the next steps on standard error when the agent is ready for the first time, inside this context.

    Only on a terminal: where a service manager or a collector reads, they would be noise.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    with ExitStack() as stack:

        def watch(event: log.Event) -> None:
            if event.name == "ready":
                stack.close()
                with suppress(OSError):
                    print("\n".join(steps(settings, file)), file=sys.stderr)

        stack.enter_context(log.watching(watch))
        yield


def steps(settings: Settings, file: Path | None) -> Iterator[str]:
    """The next steps, as lines."""
    which = f" --config {file}" if file is not None else ""
    name = settings.workloads[0].name
    yield ""
    yield "The agent serves. Next:"
    if file is None:
        yield f"  paste this into an Envoy's configuration; it asks for the workload {name}:\n"
        yield "".join(f"    {line}\n" for line in stanza(settings).splitlines())
    for command, what in (
        (f"envoy-config {name}{which}", "the Envoy configuration, with the reason for each line"),
        (f"secret{which}", "what an Envoy gets"),
        (f"status{which}", "who is served what"),
    ):
        yield f"  {f'sds-agent {command}':50} {what}"
    if settings.admin.enabled and settings.admin.address is not None:
        yield f"  http://{settings.admin.address}/     the same as a page that follows it"
    else:
        yield "  the page: set admin.address, as SDS_AGENT__ADMIN__ADDRESS=127.0.0.1:9902 does"
    yield ""
