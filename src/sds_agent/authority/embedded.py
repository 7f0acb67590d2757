"""The kind `embedded`: a self-signed root in the state directory, for one machine, a first try or a test."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated

from msgspec import Meta, Struct

from sds_agent.authority.kind import Context, Kind, Use
from sds_agent.authority.protocol import Authority
from sds_agent.configfile.durations import format_duration
from sds_agent.configfile.types import duration
from sds_agent.pki.keys import KeyType

REFRESH = timedelta(minutes=5)
"""How often the agent asks for the roots when it requests no certificate; a new root is then made if one is due."""


class EmbeddedSettings(Struct, frozen=True, kw_only=True, tag="embedded", tag_field="type"):
    """A CA inside the agent, whose root is stored in the state directory."""

    key: Annotated[KeyType, Meta(description="The kind of the root's key.")] = KeyType.EC_P256
    root_lifetime: Annotated[
        timedelta,
        duration(timedelta(minutes=1), timedelta(days=30 * 365)),
        Meta(description="How long a root is valid. A new one is made in the last fifth of it."),
    ] = timedelta(days=3650)


@asynccontextmanager
async def _open(chosen: EmbeddedSettings, context: Context) -> AsyncIterator[Authority]:
    """The CA in the context's directory, made there when there is none. Raises ConfigurationError."""
    from sds_agent.authority.in_process import StoredAuthority  # noqa: PLC0415 - measured: 47 ms
    from sds_agent.signing.self_signed import SelfSignedCa  # noqa: PLC0415 - measured: 47 ms

    ca = await SelfSignedCa.open(
        context.directory,
        trust_domain=context.trust_domain,
        key_type=chosen.key,
        lifetime=chosen.root_lifetime,
        clock=context.clock,
        setting="state_dir",
    )
    yield StoredAuthority(ca, "the embedded CA", context.clock, REFRESH)


def _sentence(chosen: EmbeddedSettings, name: str) -> str:
    return (
        f"The authority {name} is a CA inside the agent. Its root has a key of the kind {chosen.key}, is valid for "
        f"{format_duration(chosen.root_lifetime)} and is replaced in the last fifth of that."
    )


def _check(_: EmbeddedSettings, context: Context) -> None:
    from sds_agent.signing import self_signed  # noqa: PLC0415 - measured: 62 ms

    self_signed.check(context.directory, "state_dir")


def _warnings(chosen: EmbeddedSettings, use: Use) -> Iterator[str]:
    longest = max((each.ttl for each in use.workloads.values()), default=timedelta())
    if longest > chosen.root_lifetime / 5:
        yield (
            f"authorities.{use.name}.root_lifetime: {format_duration(chosen.root_lifetime)} is less than five times "
            f"the longest ttl, {format_duration(longest)}; before a new root certificates will be cut short"
        )


KIND = Kind(
    settings=EmbeddedSettings,
    open=_open,
    sentence=_sentence,
    check=_check,
    warnings=_warnings,
    stores_state=True,
    holds_ca=True,
)
