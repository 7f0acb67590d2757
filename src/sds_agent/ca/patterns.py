"""Patterns of SPIFFE IDs, as the CA's settings and its deny list have them.

Each is a SPIFFE ID, or ends in `/*`, which stands for everything below it.
"""

from collections.abc import Iterable

from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError

_BELOW = "/*"


def covers(patterns: Iterable[str], uri: str) -> bool:
    """Whether one of them stands for that SPIFFE ID."""
    return any(uri.startswith(each[:-1]) if each.endswith(_BELOW) else uri == each for each in patterns)


def fault_of_pattern(written: str, trust_domain: str | None = None) -> str | None:
    """What is wrong with a pattern, which has to lie in that trust domain if one is given; None if nothing is."""
    try:
        identity = SpiffeId.parse(written.removesuffix(_BELOW))
    except SpiffeIdError as error:
        return str(error)
    if not identity.is_workload and not written.endswith(_BELOW):
        return "it has no path"
    if trust_domain is not None and str(identity.trust_domain) != trust_domain:
        return f"it is not in the trust domain: begin it with spiffe://{trust_domain}/"
    return None
