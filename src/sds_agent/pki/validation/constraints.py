"""Name constraints: which names the certificates below a CA may have (RFC 5280 section 4.2.1.10).

SVIDs need the URI form, which cryptography's own verifier refuses altogether. What RFC 5280 leaves open is judged as
Envoy's TLS library does (BoringSSL, crypto/x509/v3_ncons.cc), and where its versions differ as the strictest does: its
newest wants DNS names for hosts, and finds more names to be excluded. A certificate with a name of a form that it does
not judge is refused where a constraint of that form applies.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from cryptography import x509

from sds_agent.errors import SdsAgentError
from sds_agent.pki.certificates import describe_name, san_values
from sds_agent.pki.names import canonical, email_addresses

ConstrainedName: TypeAlias = tuple[type[x509.GeneralName], Any]
"""A name's form, and its value as cryptography gives it; None for an e-mail address in a string that is not ASCII."""

MOST_COMPARISONS = 2**20
"""Names times constraints: the work that BoringSSL does at most."""

# Compiled on use: few CAs have name constraints, and compiling costs more than reading a chain.
_FLAGS = re.IGNORECASE | re.ASCII | re.DOTALL
# RFC 1034 section 3.5 and RFC 1123 section 2.1. A last label that is a number makes an IP address of it for browsers
# (https://url.spec.whatwg.org/#ends-in-a-number-checker), and for BoringSSL no name of a host.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = rf"(?:{_LABEL}\.)*(?!(?:[0-9]+|0x[0-9a-f]*)$){_LABEL}"
# RFC 3986 section 3: scheme, authority and what follows. No user part: section 4.2.1.10 wants a host name alone.
_URI = r"[a-z][a-z0-9+.-]*://(?P<host>[^/?#:@]*)(?::[0-9]*)?(?:[/?#].*)?"
_LOCAL_PART = r"[a-z0-9!#$%&'*+/=?^_`{|}~.-]+"
_DOMAIN = r"[a-z0-9.-]+"
_MOST_QUOTED = 5


class _UnusableError(SdsAgentError):
    """A name, or a constraint, cannot be compared."""


def constrained_names(certificate: x509.Certificate) -> Iterator[ConstrainedName]:
    """Every name that constraints bind: a subject that is not empty, the e-mail addresses in it, and all SANs."""
    if certificate.subject.rdns:
        yield x509.DirectoryName, certificate.subject
    for address in email_addresses(certificate.subject):
        yield x509.RFC822Name, address
    for name in san_values(certificate):
        yield type(name), name.value


def violation(constraints: x509.NameConstraints, names: Iterable[ConstrainedName]) -> str | None:
    """How the first name that breaks the constraints does so, to follow "the name constraints of …".

    None when every name keeps to them. A form without any constraint is free.
    """
    permitted, excluded = constraints.permitted_subtrees or (), constraints.excluded_subtrees or ()
    named = list(names)
    if len(named) * (len(permitted) + len(excluded)) > MOST_COMPARISONS:
        return f"are too many: with the {len(named)} names below they take more than {MOST_COMPARISONS} comparisons"
    for form, value in named:
        out, into = ([c.value for c in side if isinstance(c, form)] for side in (excluded, permitted))
        if (out or into) and (fault := _judge(form, value, out, into)):
            return fault
    return None


def is_host_name(text: str) -> bool:
    """Whether a URI may have that host, and a constraint can permit it: a DNS name, and no IP address."""
    return re.fullmatch(_HOST, text, _FLAGS) is not None


def _judge(form: type[x509.GeneralName], value: Any, excluded: list[Any], permitted: list[Any]) -> str | None:
    if form not in _WITHIN:
        return f"restrict names of the form {form.__name__}, and cannot be judged for {describe_name(value)}"
    within, hit = _WITHIN[form]
    try:
        # all of them: a constraint that cannot be used protects nothing, and makes Go refuse all that is below
        hits = [constraint for constraint in excluded if hit(value, constraint)]
        kept = [constraint for constraint in permitted if within(value, constraint)]
    except _UnusableError as error:
        return str(error)
    if hits:
        return f"exclude {describe_name(hits[0])}, and so {describe_name(value)}"
    if permitted and not kept:
        return f"permit {', '.join(map(describe_name, permitted[:_MOST_QUOTED]))}, but not {describe_name(value)}"
    return None


def _uri_within(uri: str, constraint: str) -> bool:
    """A bare host is that host alone; a leading dot stands for one or more labels before it."""
    wanted = constraint.lower()
    if not is_host_name(wanted.removeprefix(".")):
        raise _UnusableError(
            f"hold the URI {describe_name(constraint)}, which must be a DNS name such as 'demo.example', or "
            "'.demo.example' for all below it (RFC 5280 section 4.2.1.10): the CA must be issued anew"
        )
    match = re.fullmatch(_URI, uri, _FLAGS)
    host = match["host"].lower() if match else ""
    if not is_host_name(host):
        raise _UnusableError(
            f"restrict URIs by their host, which for Envoy must then be a DNS name, and that of {describe_name(uri)} "
            "is none: labels are of letters, digits and hyphens within, and the last is no number (RFC 5280 section "
            "4.2.1.10)"
        )
    return host.endswith(wanted) and host != wanted if wanted.startswith(".") else host == wanted


def _dns_within(name: str, constraint: str) -> bool:
    """The name itself or anything below it; a leading dot, which many CAs write, means only what is below."""
    name, constraint = name.lower(), constraint.lower()
    below = constraint if constraint.startswith(".") else f".{constraint}"
    return constraint in {"", name} or name.endswith(below)


def _dns_hit(name: str, constraint: str) -> bool:
    """Likewise without a dot at the end, and a wildcard is excluded too where it covers the one that is."""
    name, constraint = name.removesuffix("."), constraint.removesuffix(".")
    covered = name.startswith("*.") and name[2:].lower() == constraint.partition(".")[2].lower()
    return covered or _dns_within(name, constraint)


def _email_within(address: str | None, constraint: str) -> bool:
    """One address, all of a host, or with a leading dot all of the hosts below a domain."""
    (own, own_host), (local, host) = _mailbox(address), _mailbox_constraint(constraint)
    if host.startswith("."):
        return own_host.endswith(host)
    return own_host == host and local in {None, own}


def _email_hit(address: str | None, constraint: str) -> bool:
    """Likewise, whatever the case of the local part."""
    return _email_within(address.lower() if address else None, constraint.lower())


def _mailbox(address: str | None) -> tuple[str, str]:
    match = re.fullmatch(rf"({_LOCAL_PART})@({_DOMAIN})", address or "", _FLAGS)
    if match is None:
        raise _UnusableError(f"restrict e-mail addresses, and {describe_name(address or 'one')} is none in plain ASCII")
    return match[1], match[2].lower()


def _mailbox_constraint(constraint: str) -> tuple[str | None, str]:
    match = re.fullmatch(rf"(?:({_LOCAL_PART})@)?({_DOMAIN})", constraint, _FLAGS)
    if match is None:
        raise _UnusableError(f"hold {describe_name(constraint)}, which is no e-mail address and no domain")
    return match[1], match[2].lower()


def _directory_within(name: x509.Name, constraint: x509.Name) -> bool:
    """Whether the name begins with the constraint's RDNs, in their order."""
    wanted = canonical(constraint)
    return canonical(name)[: len(wanted)] == wanted


# By form: whether a name is within a permitted subtree, and whether it is within an excluded one.
_WITHIN: dict[type[x509.GeneralName], tuple[Callable[[Any, Any], bool], Callable[[Any, Any], bool]]] = {
    x509.UniformResourceIdentifier: (_uri_within, _uri_within),
    x509.DNSName: (_dns_within, _dns_hit),
    x509.RFC822Name: (_email_within, _email_hit),
    x509.DirectoryName: (_directory_within, _directory_within),
}
