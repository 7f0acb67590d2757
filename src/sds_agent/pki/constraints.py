"""Name constraints: which names the certificates below a CA may have (RFC 5280 section 4.2.1.10).

SVIDs need the URI form, which cryptography's own verifier refuses altogether. URIs, DNS names, IP addresses and
directory names are judged here; a certificate with a name of another form is refused where a constraint of that form
applies, since nobody could tell whether it keeps to it.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from cryptography import x509
from cryptography.x509.oid import NameOID

from sds_agent.pki.certificates import describe_name, san_values

ConstrainedName: TypeAlias = tuple[type[x509.GeneralName], Any]
"""A name's form, and its value as cryptography gives it."""

# Compiled on use: few CAs have name constraints, and compiling costs more than reading a chain.
_FLAGS = re.IGNORECASE | re.ASCII
_HOST = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
_HOST_CONSTRAINT = rf"\.?{_HOST}"
# RFC 3986 section 3: scheme, authority (user part, host, port) and what follows. A host in brackets is an IPv6 address.
# What has an empty label (`a..b`, `a.`) is no host: Go refuses it in a constraint, and in a URI below any constraint.
_URI = rf"[a-z][a-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>{_HOST})(?::[0-9]*)?(?:[/?#].*)?"
_MOST_QUOTED = 5


def constrained_names(certificate: x509.Certificate) -> Iterator[ConstrainedName]:
    """Every name that constraints bind: a subject that is not empty, the e-mail addresses in it, and all SANs."""
    if certificate.subject.rdns:
        yield x509.DirectoryName, certificate.subject
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS):
        yield x509.RFC822Name, attribute.value
    for name in san_values(certificate):
        yield type(name), name.value


def violation(constraints: x509.NameConstraints, names: Iterable[ConstrainedName]) -> str | None:
    """How the constraints stand against the first name that breaks them, to follow "the name constraints of …".

    None when every name keeps to them. A form without any constraint is free.
    """
    for form, value in names:
        excluded = [c.value for c in constraints.excluded_subtrees or () if isinstance(c, form)]
        permitted = [c.value for c in constraints.permitted_subtrees or () if isinstance(c, form)]
        if (excluded or permitted) and (fault := _judge(form, value, excluded, permitted)):
            return fault
    return None


def is_host_name(text: str) -> bool:
    """Whether a URI may have that host, and a constraint can permit it: an IP address is no host name."""
    return _host(f"spiffe://{text}") == text.lower()


def _judge(form: type[x509.GeneralName], value: Any, excluded: list[Any], permitted: list[Any]) -> str | None:
    within = _WITHIN.get(form)
    if within is None or (form is x509.DNSName and "*" in value and excluded):
        return f"restrict names of the form {form.__name__}, and cannot be judged for {describe_name(value)}"
    if form is x509.UniformResourceIdentifier and (fault := _unusable_uri(value, [*excluded, *permitted])):
        return fault
    if hits := [constraint for constraint in excluded if within(value, constraint)]:
        return f"exclude {describe_name(hits[0])}, and so {describe_name(value)}"
    if permitted and not any(within(value, constraint) for constraint in permitted):
        return f"permit {', '.join(map(describe_name, permitted[:_MOST_QUOTED]))}, but not {describe_name(value)}"
    return None


def _unusable_uri(uri: str, constraints: list[str]) -> str | None:
    """A constraint that is no host name protects nothing; a URI without a host name must be refused under any."""
    if wrong := [c for c in constraints if not re.fullmatch(_HOST_CONSTRAINT, c, _FLAGS)]:
        return (
            f"hold the URI {describe_name(wrong[0])}, which must be a bare host such as 'demo.example', or "
            "'.demo.example' for every host below it (RFC 5280 section 4.2.1.10)"
        )
    if _host(uri) is None:
        return f"restrict URIs by their host name, and {describe_name(uri)} has none"
    return None


def _host(uri: str) -> str | None:
    """The URI's host in lower case; None without one, and for an IP address, which is no host name."""
    match = re.fullmatch(_URI, uri, _FLAGS)
    if match is None:
        return None
    host = match["host"].lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return None


def _uri_within(uri: str, constraint: str) -> bool:
    """A bare host is that host alone; a leading dot stands for one or more labels before it."""
    host, wanted = _host(uri) or "", constraint.lower()
    return host.endswith(wanted) and host != wanted if wanted.startswith(".") else host == wanted


def _dns_within(name: str, constraint: str) -> bool:
    """The name itself or anything below it; a leading dot, which many CAs write, means only what is below."""
    name, constraint = name.lower(), constraint.lower()
    below = constraint if constraint.startswith(".") else f".{constraint}"
    return constraint in {"", name} or name.endswith(below)


def _address_within(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, network: ipaddress.IPv4Network | ipaddress.IPv6Network
) -> bool:
    return address in network


def _directory_within(name: x509.Name, constraint: x509.Name) -> bool:
    """Whether the name begins with the constraint's RDNs, in their order."""
    begin = name.rdns[: len(constraint.rdns)]
    return [_comparable(rdn) for rdn in begin] == [_comparable(rdn) for rdn in constraint.rdns]


def _comparable(rdn: x509.RelativeDistinguishedName) -> frozenset[tuple[str, str | bytes]]:
    """An RDN without what section 7.1 ignores: case, runs of spaces, and how a string is encoded."""
    return frozenset((attribute.oid.dotted_string, _folded(attribute.value)) for attribute in rdn)


def _folded(value: str | bytes) -> str | bytes:
    return value if isinstance(value, bytes) else " ".join(unicodedata.normalize("NFKC", value).casefold().split())


_WITHIN: dict[type[x509.GeneralName], Callable[[Any, Any], bool]] = {
    x509.UniformResourceIdentifier: _uri_within,
    x509.DNSName: _dns_within,
    x509.IPAddress: _address_within,
    x509.DirectoryName: _directory_within,
}
