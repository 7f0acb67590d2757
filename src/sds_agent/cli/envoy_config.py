"""`sds-agent envoy-config WORKLOAD`: the Envoy configuration for a workload, with the reasons for its lines."""

import argparse
import os
from collections.abc import Iterator, Mapping
from typing import Any

from sds_agent.cli import output
from sds_agent.cli.config_file import found, report_passed_over
from sds_agent.cli.formats import document
from sds_agent.cli.paths import as_path, as_socket, as_text
from sds_agent.config.defaults import absolute
from sds_agent.config.loading import load
from sds_agent.config.settings import OutputSettings, Settings, WorkloadSettings
from sds_agent.configfile.phrases import did_you_mean
from sds_agent.envoy_config.choices import EnvoyChoices, SecretFiles
from sds_agent.errors import ConfigurationError
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError, TrustDomain

EXIT_CODES = "0 printed; 2 a wrong call, or a configuration that cannot be used"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The workload, and what is to be different."""
    parser.add_argument("workload", metavar="WORKLOAD", help="the workload's name")
    parser.add_argument(
        "--config",
        type=as_path,
        metavar="FILE",
        help="the agent's configuration; by default ./sds-agent.yaml if there is one, or else the defaults",
    )
    parser.add_argument(
        "--socket",
        type=as_socket,
        metavar="PATH",
        help="the agent's socket as this Envoy sees it, in place of sds.socket",
    )
    parser.add_argument("--bootstrap", action="store_true", help="a whole configuration that starts as it is")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="SPIFFE-ID",
        help="accept this identity alone; may be given several times. Without it: all of the trust domain",
    )
    parser.add_argument("--delta", action="store_true", help="Delta SDS in place of state of the world")
    parser.add_argument(
        "--path-config",
        type=as_text,
        metavar="DIRECTORY",
        help="Envoy reads the files of the workload's output by itself; their paths are in files in this directory",
    )
    parser.add_argument("--tls13", action="store_true", help="TLS 1.3 alone")
    parser.add_argument("--post-quantum", action="store_true", help="TLS 1.3 with the key exchange X25519MLKEM768")
    parser.add_argument("--no-resumption", action="store_true", help="each connection shows its certificate anew")
    parser.add_argument(
        "-o", "--output", choices=("yaml", "json"), default="yaml", dest="format", help="by default yaml"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print it. Raises ProblemsError and ConfigurationError."""
    settings = load(arguments.config or found(os.environ), os.environ).settings
    if arguments.config is None:
        report_passed_over(os.environ)
    chosen = choices(settings, arguments)
    _report_foreign(chosen)
    if arguments.format == "json":
        by_heading = dict(_parts(chosen, bootstrap=arguments.bootstrap))
        output.write(document(next(iter(by_heading.values())) if len(by_heading) == 1 else by_heading, "json"))
        return 0
    from sds_agent.envoy_config.commented import written  # noqa: PLC0415 - only here

    parts = _parts(chosen, bootstrap=arguments.bootstrap)
    output.write("---\n".join(f"# {heading}\n{written(part)}" for heading, part in parts).rstrip("\n"))
    return 0


def choices(settings: Settings, arguments: argparse.Namespace) -> EnvoyChoices:
    """What the arguments choose of the configuration. Raises ConfigurationError."""
    workload = next((each for each in settings.workloads if each.name == arguments.workload), None)
    if workload is None:
        names = [each.name for each in settings.workloads]
        hint = did_you_mean(arguments.workload, names) or f"there are {', '.join(names)}"
        raise ConfigurationError(f"no workload is named {arguments.workload}; {hint}")
    return EnvoyChoices(
        name=workload.name,
        spiffe_id=workload.spiffe_id,
        trust_domain=settings.trust_domain,
        bundle=settings.bundle_names[0],
        socket=settings.sds.socket if arguments.socket is None else absolute(arguments.socket),
        peers=tuple(map(_peer, arguments.peer)),
        delta=arguments.delta,
        files=None if arguments.path_config is None else _files(workload, arguments),
        tls13=arguments.tls13,
        post_quantum=arguments.post_quantum,
        no_resumption=arguments.no_resumption,
    )


def _report_foreign(chosen: EnvoyChoices) -> None:
    """Say of peers for whom the bundle need not have a root that a match alone does not let them in."""
    foreign = {SpiffeId.parse(each).trust_domain for each in chosen.peers} - {TrustDomain.parse(chosen.trust_domain)}
    for each in sorted(map(str, foreign)):
        output.report(
            f"warning: --peer: {each} is another trust domain than {chosen.trust_domain}: such a peer is accepted only "
            f"if a root in {chosen.bundle} vouches for it. The roots of a federated one are in spiffe://{each}"
        )


def _peer(written: str) -> str:
    try:
        return str(SpiffeId.parse(written))
    except SpiffeIdError as error:
        raise ConfigurationError(f"--peer: {error}") from error


def _files(workload: WorkloadSettings, arguments: argparse.Namespace) -> SecretFiles:
    from sds_agent.outputs.layout import LAYOUTS  # noqa: PLC0415 - measured: 20 ms for cryptography

    if arguments.delta or arguments.socket is not None:
        raise ConfigurationError("--path-config is for an Envoy that asks no agent; leave out --delta and --socket")
    made: OutputSettings | None = workload.output
    if made is None:
        raise ConfigurationError(
            f"--path-config: the workload {workload.name} has no output, so there are no files; add output: DIRECTORY"
        )
    layout = LAYOUTS[made.layout.value]
    if layout.chain is None or layout.key is None:
        raise ConfigurationError(
            f"--path-config: the layout {made.layout.value} has key and chain in one file, and Envoy reads two; "
            "choose istio, kubernetes or spiffe-helper"
        )
    return SecretFiles(
        chain=made.directory / layout.chain,
        key=made.directory / layout.key,
        roots=made.directory / layout.bundle,
        resources=absolute(arguments.path_config),
    )


def _parts(chosen: EnvoyChoices, *, bootstrap: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each part of the configuration with a line that says where it goes."""
    from sds_agent.envoy_config import messages  # noqa: PLC0415 - measured: 450 ms for envoy-data-plane

    if bootstrap:
        yield (
            "A whole configuration: envoy -c FILE, then curl http://127.0.0.1:10000",
            messages.as_json(messages.bootstrap(chosen)),
        )
    else:
        if chosen.files is None:
            yield "static_resources.clusters: the agent", messages.as_json(messages.sds_cluster(chosen))
        yield (
            "a listener's filter_chains[].transport_socket: mutual TLS in",
            messages.as_json(messages.downstream(chosen)),
        )
        yield "a cluster's transport_socket: mutual TLS out", messages.as_json(messages.upstream(chosen))
    if chosen.files is not None:
        for path, resource in messages.resources(chosen.files, chosen).items():
            yield str(path), messages.as_json(resource)
