"""Configurations that Envoy takes and that do less than they say, in some versions or in all: pure.

Each was tried on real Envoys.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sds_agent.doctor.diagnosis import Diagnosis, bad, warning
from sds_agent.doctor.dumps import items, mapping

Version = tuple[int, int, int]

OLDEST: Version = (1, 36, 0)
"""What the agent's tests run."""
_NODE_ONCE_IN_DELTA: Version = (1, 37, 0)
_WATCHES_BUNDLES: Version = (1, 38, 3)
_TICKETS_END_WITH_ROOTS: Version = (1, 40, 0)


def version_of(dump: Mapping[str, Any]) -> Version | None:
    """Which Envoy it is, by the node in its bootstrap; None where that does not say."""
    for each in map(mapping, items(dump.get("configs"))):
        node = mapping(mapping(each.get("bootstrap")).get("node"))
        found = mapping(mapping(node.get("user_agent_build_version")).get("version"))
        numbers = [found.get(f"{part}_number" if part != "patch" else part, 0) for part in ("major", "minor", "patch")]
        if found and all(isinstance(number, int) for number in numbers):
            major, minor, patch = numbers
            return major, minor, patch
    return None


def of_version(subject: str, version: Version | None) -> Iterator[Diagnosis]:
    """Whether the agent is tried with it."""
    if version is not None and version < OLDEST:
        yield warning(
            subject,
            f"it is version {_written(version)}, and this agent is tried with {_written(OLDEST)} and later; upgrade it",
        )


def of_delta(subject: str, name: str, source: Mapping[str, Any], version: Version | None) -> Iterator[Diagnosis]:
    """A source of a secret over Delta."""
    is_delta = mapping(source.get("api_config_source")).get("api_type") == "DELTA_GRPC"
    if is_delta and version is not None and version < _NODE_ONCE_IN_DELTA:
        yield warning(
            subject,
            f"{name}: over Delta this Envoy ({_written(version)}) repeats 60 KB about itself in each ACK; write "
            f"api_type: GRPC, or upgrade to {_written(_NODE_ONCE_IN_DELTA)}",
        )


def of_old_traps(subject: str, context: Mapping[str, Any], version: Version | None) -> Iterator[Diagnosis]:
    """A TLS context."""
    common = mapping(context.get("common_tls_context"))
    combined = mapping(common.get("combined_validation_context"))
    inline = {**mapping(common.get("validation_context")), **mapping(combined.get("default_validation_context"))}
    spiffe = mapping(mapping(inline.get("custom_validator_config")).get("typed_config"))
    yield from _of_tickets(subject, context, version, is_spiffe=bool(spiffe))
    for each in map(mapping, items(spiffe.get("trust_domains"))):
        name = str(each.get("name", ""))
        if name.startswith("spiffe://") or name != name.lower():
            plain = name.removeprefix("spiffe://").lower()
            yield bad(subject, f"the trust domain {name} of its SPIFFE validator matches no peer; write {plain}")
    watched = mapping(spiffe.get("trust_bundles")).get("filename")
    if watched and version is not None and version < _WATCHES_BUNDLES:
        yield warning(
            subject,
            f"this Envoy ({_written(version)}) reads {watched} once, so a new root is not trusted; upgrade to "
            f"{_written(_WATCHES_BUNDLES)}",
        )


def _of_tickets(
    subject: str, context: Mapping[str, Any], version: Version | None, *, is_spiffe: bool
) -> Iterator[Diagnosis]:
    """Keys of session tickets that outlive the secrets: a peer that was refused since then comes in by its ticket."""
    pinned = context.get("session_ticket_keys") or context.get("session_ticket_keys_sds_secret_config")
    if not pinned:
        return
    fix = "write disable_stateless_session_resumption: true in place of the session ticket keys"
    if is_spiffe:
        yield warning(subject, f"a peer that is revoked, or matches no SAN any more, still resumes its session; {fix}")
    elif version is not None and version < _TICKETS_END_WITH_ROOTS:
        yield warning(
            subject,
            f"in this Envoy ({_written(version)}) a peer whose root was removed still resumes its session; {fix}, or "
            f"upgrade to {_written(_TICKETS_END_WITH_ROOTS)}",
        )


def _written(version: Version) -> str:
    return ".".join(map(str, version))
