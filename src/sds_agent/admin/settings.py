"""The section `admin` of the agent's configuration and of the CA server's: where the admin server listens."""

import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from sds_agent.configfile.listening import Listen
from sds_agent.configfile.types import FileMode, FilePath, Mode, SocketPath, duration, filled_in, listing, matching
from sds_agent.errors import Problem

HOST_PATTERN = r"^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\])$"
HOST_ALLOWED = "a host name, or an IP address such as 127.0.0.1 or [::1]"


class AdminSettings(Struct, frozen=True, kw_only=True):
    """The admin server, which shows status, metrics, health and the page. It shows no private key."""

    enabled: Annotated[bool, Meta(description="Whether there is an admin server.")] = True
    socket: Annotated[
        SocketPath | None,
        filled_in("of the agent: see [Places](configuration.md#places); of the CA server: none"),
        Meta(
            description="The path of its Unix socket. Left out: the agent's is beside sds.socket and is named after it "
            "(sds.admin.sock beside sds.sock); the CA server has none."
        ),
    ] = None
    mode: Annotated[
        Mode, Meta(description="The socket's mode. A process that may connect sees who is served what, and no key.")
    ] = msgspec.field(default_factory=lambda: FileMode(0o600))
    address: Annotated[
        Listen | None,
        Meta(
            description="An address and a port to listen on beside the socket, for browsers and Prometheus, such as "
            "127.0.0.1:9902. Every user of the machine can connect to it."
        ),
    ] = None
    beyond_loopback: Annotated[
        bool,
        Meta(
            description="Whether address may be one that other machines can reach. The admin server does not check "
            "who connects: let a firewall or a network policy decide who reaches it."
        ),
    ] = False
    hosts: Annotated[
        tuple[Annotated[str, matching(HOST_PATTERN, HOST_ALLOWED)], ...],
        listing("names"),
        Meta(
            description="Names by which clients may call the server at address, beside localhost and the address "
            "itself. A request for another name is refused: a web page elsewhere could have caused it (DNS rebinding)."
        ),
    ] = ()


class TelemetrySettings(Struct, frozen=True, kw_only=True):
    """Where the metrics, and a span for each attempt at a CA, are sent over OTLP/HTTP. It needs the extra `otel`."""

    otlp_endpoint: Annotated[
        str,
        Meta(
            pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$",
            extra={"allowed": "a URL such as http://127.0.0.1:4318"},
            description="The collector's URL, without /v1/metrics and /v1/traces.",
        ),
    ]
    headers_file: Annotated[
        FilePath | None,
        Meta(
            description="A file with headers to send, such as a token, one NAME: VALUE in each line. It is read anew "
            "each time."
        ),
    ] = None
    interval: Annotated[
        timedelta, duration(timedelta(seconds=1), timedelta(hours=1)), Meta(description="How often they are sent.")
    ] = timedelta(seconds=60)


def without_extra(chosen: TelemetrySettings | None) -> Iterator[Problem]:
    """What is wrong with a section telemetry where the libraries for it are not installed."""
    if chosen is None:
        return
    from importlib.util import find_spec  # noqa: PLC0415 - for this section alone

    try:
        found = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        # another pip would look for sds-agent where it is not, as that of a shell beside pipx's environment
        fix = f"run {sys.executable} -m pip install 'sds-agent[otel]'"
        if find_spec("pip") is None:  # as in the image
            fix = f"install sds-agent[otel] into {sys.prefix}, which has no pip of its own"
        yield Problem(("telemetry",), "needs OpenTelemetry, which is not installed", fix)


def unguarded(chosen: AdminSettings) -> Iterator[Problem]:
    """What is wrong with an address that other machines can reach."""
    if chosen.address and not chosen.address.is_loopback and not chosen.beyond_loopback:
        yield Problem(
            ("admin", "address"),
            f"is {chosen.address}, which other machines can reach, and the admin server does not check who connects",
            "name a loopback address such as 127.0.0.1:9902, or set admin.beyond_loopback: true and let a firewall "
            "decide who reaches it",
        )
