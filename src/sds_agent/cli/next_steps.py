"""What a person on a terminal can do once the agent serves: the Envoy configuration to paste, and the commands to look.

The text is written here and not built with Envoy's message types, which take longer to import than the whole way to the
first secret; a test holds it against what `sds-agent envoy-config` builds.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from textwrap import indent

from sds_agent import log
from sds_agent.config.defaults import SOCKET_OPTION
from sds_agent.config.loading import Loaded
from sds_agent.config.settings import Settings
from sds_agent.text import ascii_json, cut, visible

SOCKET_VARIABLE = "SDS_AGENT__SDS__SOCKET"
LONGEST = 600
"""Characters of a line, whose names and paths are the operator's."""

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
        # every workload of the trust domain; to accept one alone: matcher: {{exact: its SPIFFE ID}}
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
def shown_once_ready(loaded: Loaded, form: log.Format) -> Iterator[None]:
    """Print the next steps below the log when the agent is ready for the first time, inside this context.

    Only on a terminal, and where the log is text: where a program reads, they would be noise.
    """
    if form == "json" or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    with ExitStack() as stack:

        def watch(event: log.Event) -> None:
            if event.name == "ready":
                stack.close()
                log.aside("\n".join(steps(loaded)))

        stack.enter_context(log.watching(watch))
        yield


def steps(loaded: Loaded) -> Iterator[str]:
    """The next steps, as lines, with commands that reach this agent from another terminal."""
    settings = loaded.settings
    name = settings.workloads[0].name
    yield ""
    yield "The agent serves. Next:"
    if loaded.file is None:
        yield f"  paste this into an Envoy's configuration; it asks for the workload {visible(cut(name, LONGEST))}:\n"
        yield indent(stanza(settings), "    ")
    envoy = [*_file(loaded), *_socket(loaded)]
    asked = _socket(loaded) or _file(loaded)
    yield _step(["envoy-config", name, *envoy], "the Envoy configuration, with the reason for each line")
    yield _step(["secret", *asked], "what an Envoy gets")
    if settings.admin.enabled:
        yield _step(["status", *asked], "who is served what")
    yield f"  {_page(settings)}"
    yield "\n"


def _step(arguments: Sequence[str], what: str) -> str:
    from shlex import join  # noqa: PLC0415 - measured: 0.6 ms of the way to the first secret

    command = visible(cut(f"sds-agent {join(arguments)}", LONGEST))
    return f"  {command:50} {what}"


def _file(loaded: Loaded) -> list[str]:
    return [] if loaded.file is None else ["--config", str(loaded.file.absolute())]


def _socket(loaded: Loaded) -> list[str]:
    """The socket, where neither the file nor the defaults have it: a command elsewhere would not find it."""
    is_elsewhere = SOCKET_OPTION in loaded.options or any(each.upper() == SOCKET_VARIABLE for each in loaded.variables)
    return ["--socket", str(loaded.settings.sds.socket)] if is_elsewhere else []


def _page(settings: Settings) -> str:
    if not settings.admin.enabled:
        return "status, metrics and a page: remove admin.enabled: false"
    address = settings.admin.address
    if address is None:
        return "the page: set admin.address, as SDS_AGENT__ADMIN__ADDRESS=127.0.0.1:9902 does"
    if address.port == 0:
        return "the page: at the address in the log line admin_listening"
    return f"{f'http://{address}/':50} the same as a page that follows it"
