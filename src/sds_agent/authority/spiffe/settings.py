"""The settings of the kind `spiffe`."""

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from sds_agent.configfile.types import SocketPath, TrustDomain, listing, matching

Hint: TypeAlias = Annotated[str, matching("^[ -~]{1,1024}$", "1 to 1024 printable characters of ASCII")]


class SpiffeSettings(Struct, frozen=True, kw_only=True, tag="spiffe", tag_field="type"):
    """A SPIFFE Workload API, such as that of SPIRE's agent: it makes the certificates and their keys."""

    socket: Annotated[
        SocketPath, Meta(description="The Unix socket of the Workload API, such as /run/spire/agent/public/api.sock.")
    ]
    hint: Annotated[
        Hint | None,
        Meta(
            description="The hint of the entries to take the certificates from, where several entries have one SPIFFE "
            "ID. Left out: any."
        ),
    ] = None
    federated: Annotated[
        tuple[TrustDomain, ...],
        listing("trust domains"),
        Meta(
            description="Other trust domains whose CA certificates the Workload API gives too; an Envoy gets them by "
            "the name spiffe://NAME. Those that are not in this list are not served.",
        ),
    ] = ()
