"""What a CA says of all that is below it: name constraints, policies, path lengths."""

from collections.abc import Iterator

from fakes import der
from fakes.der import Entity, policies, sequence
from fakes.der import inhibit_any_policy as inhibit
from fakes.der import policy_constraints as demand
from fakes.der import policy_mappings as mapped
from fakes.judge import Case
from fakes.oddities.places import CA, LEAF, ROOT, SPIFFE_ID, case, plus

HOSTS = (
    "demo.example",
    *("demo.example.", "demo..example", ".demo.example", "*.demo.example"),
    *("demo_x", "a_b.example", "demo-.example", "-demo.example", "de--mo.example", "xn--caf-dma.example"),
    *(
        "12345",
        "demo.123",
        "123.demo",
        "demo.0x1f",
        "demo.0x",
        "demo.0xyz",
        "demo.1a",
        "127.0.0.1",
        "1.2.3.4.5",
        "[::1]",
    ),
    *("a", "a" * 63 + ".example", "a" * 64 + ".example", "DEMO.example", ""),
    *("demo.example:8080", "demo.example:", "u@demo.example", "demo.example?q", "demo.example#f"),
)
Subtrees = list[bytes]
ONE, TWO, THREE, ANY = "1.2.3.4", "1.2.3.5", "1.2.3.6", der.ANY_POLICY


def host_constraints() -> Iterator[Case]:
    """A trust domain under constraints that have nothing against it, and a good one under odd constraints."""
    other, mine = [der.uri("other.example")], der.uri("demo.example")
    for host in HOSTS:
        own, spiffe_id = der.uri(host), f"spiffe://{host}/web"
        around = der.uri(f".{host.partition('.')[2] or host}")
        yield case(f"host {host!r}", spiffe_id=spiffe_id)
        for label, permitted, excluded in (
            ("permitted", [own], []),
            ("permitted by its domain", [around], []),
            ("with another excluded", [], other),
        ):
            limits = plus(der.name_constraints(permitted, excluded))
            yield case(f"host {host!r} {label}", spiffe_id=spiffe_id, make_ca=limits)
        for label, permitted, excluded in (
            ("permitted beside it", [own, mine], []),
            ("excluded", [], [own]),
        ):
            limits = plus(der.name_constraints(permitted, excluded))
            yield case(f"demo.example with {host!r} {label}", make_ca=limits)


_ADDRESS = der.attribute(der.EMAIL_ADDRESS, "a@demo.example", der.IA5)
WITH_ADDRESS = der.name(_ADDRESS, der.attribute(der.COMMON_NAME, "b"))
ORGANIZATION = der.name(der.attribute(der.ORGANIZATION, "Demo"))
WITHIN = der.name(der.attribute(der.ORGANIZATION, "Demo"), der.attribute(der.COMMON_NAME, "x"))
RESPELLED = der.name(der.attribute(der.ORGANIZATION, "demo", der.PRINTABLE))
_UPPER, _LOWER = (der.name(der.attribute(der.ORGANIZATION, text)) for text in ("É", "é"))
_NET, _HOST = der.ip(bytes([10, 0, 0, 0, 255, 0, 0, 0])), der.ip(bytes([10, 0, 0, 1]))
_OTHER = der.explicit(0, der.oid("1.2.3.4"), der.explicit(0, der.tlv(der.UTF8, b"x")))
_REGISTERED = der.tlv(0x88, der.oid("1.2.3.4")[2:])
# Permitted and excluded by the anchor; then the CA's subject, or its alternative name.
URIS_AND_NONE: dict[str, tuple[Subtrees, Subtrees]] = {
    "none": ([], []),
    "a host, not critical": ([der.uri("demo.example")], []),
    "another host": ([der.uri("other.example")], []),
    "a host excluded": ([], [der.uri("demo.example")]),
    "a domain excluded": ([], [der.uri(".example")]),
    "every host excluded": ([], [der.uri("")]),
    "every host": ([der.uri("")], []),
    "a whole URI": ([der.uri("spiffe://demo.example")], []),
    "a dot": ([der.uri(".")], []),
    "DNS names, and there is none": ([der.dns("demo.example")], []),
    "addresses, and there is none": ([_NET], []),
    "a network with a gap": ([der.ip(bytes([10, 0, 0, 0, 255, 0, 255, 0]))], []),
    "a network of 5 bytes": ([der.ip(bytes(5))], []),
    "otherNames, and there is none": ([_OTHER], []),
    "x400Addresses": ([der.explicit(3)], []),
    "e-mail addresses, and there is none": ([der.email("demo.example")], []),
    "another directory": ([der.directory(ORGANIZATION)], []),
    "another directory excluded": ([], [der.directory(ORGANIZATION)]),
    "the empty directory": ([der.directory(sequence())], []),
    "the empty directory excluded": ([], [der.directory(sequence())]),
}
OF_SUBJECTS: dict[str, tuple[bytes, Subtrees, Subtrees]] = {
    "an address's host": (WITH_ADDRESS, [der.email("demo.example")], []),
    "an address's domain": (WITH_ADDRESS, [der.email(".example")], []),
    "an address": (WITH_ADDRESS, [der.email("a@demo.example")], []),
    "an address in another case": (WITH_ADDRESS, [der.email("A@DEMO.example")], []),
    "an address in another case excluded": (WITH_ADDRESS, [], [der.email("A@demo.example")]),
    "another address": (WITH_ADDRESS, [der.email("b@demo.example")], []),
    "another address's host": (WITH_ADDRESS, [der.email("other.example")], []),
    "another address's host excluded": (WITH_ADDRESS, [], [der.email("other.example")]),
    "an address's host that is none, excluded": (WITH_ADDRESS, [], [der.email("other example")]),
    "every address": (WITH_ADDRESS, [der.email("")], []),
    "two @": (WITH_ADDRESS, [der.email("a@b@demo.example")], []),
    "an address in a UTF8String": (
        der.name(der.attribute(der.EMAIL_ADDRESS, "a@demo.example")),
        [der.email("demo.example")],
        [],
    ),
    "an address with a space": (
        der.name(der.attribute(der.EMAIL_ADDRESS, "a b@demo.example", der.IA5)),
        [der.email("demo.example")],
        [],
    ),
    "a directory": (WITHIN, [der.directory(ORGANIZATION)], []),
    "a directory, itself": (ORGANIZATION, [der.directory(ORGANIZATION)], []),
    "a directory spelled otherwise": (RESPELLED, [der.directory(ORGANIZATION)], []),
    "a directory with É": (_LOWER, [der.directory(_UPPER)], []),
    "a directory with É excluded": (_LOWER, [], [der.directory(_UPPER)]),
    "a directory excluded": (WITHIN, [], [der.directory(ORGANIZATION)]),
}
_CA, _STAR = der.dns("ca.example"), der.dns("*.example")
OF_ALTERNATIVES: dict[str, tuple[bytes, Subtrees, Subtrees]] = {
    "a DNS domain": (_CA, [der.dns("example")], []),
    "a DNS name": (der.dns("CA.example"), [_CA], []),
    "a DNS domain that ends in a dot": (_CA, [der.dns("example.")], []),
    "a DNS name that ends in a dot": (der.dns("ca.example."), [der.dns("example")], []),
    "a DNS name that ends in a dot, excluded": (der.dns("ca.example."), [], [der.dns("example")]),
    "a DNS domain that ends in a dot, excluded": (_CA, [], [der.dns("example.")]),
    "a DNS domain below a dot": (_CA, [der.dns(".example")], []),
    "a DNS domain below a dot, and it is not": (_CA, [der.dns(".ca.example")], []),
    "a part of a DNS label": (_CA, [der.dns("a.example")], []),
    "every DNS name": (_CA, [der.dns("")], []),
    "another DNS domain": (_CA, [der.dns("other")], []),
    "a wildcard's domain": (_STAR, [der.dns("example")], []),
    "a wildcard, of which one host": (_STAR, [_CA], []),
    "a wildcard, of which one host excluded": (_STAR, [], [_CA]),
    "a wildcard's domain excluded": (_STAR, [], [der.dns("example")]),
    "a wildcard, another domain excluded": (_STAR, [], [der.dns("other")]),
    "a wildcard, a deeper host excluded": (_STAR, [], [der.dns("a.b.example")]),
    "a star within a label, another domain excluded": (der.dns("a*.example"), [], [der.dns("other")]),
    "an IP address": (_HOST, [_NET], []),
    "another IP address excluded": (der.ip(bytes([127, 0, 0, 1])), [], [_NET]),
    "an otherName": (_OTHER, [_OTHER], []),
    "an otherName excluded": (_OTHER, [], [_OTHER]),
    "a registeredID": (_REGISTERED, [_REGISTERED], []),
    "an alternative e-mail address": (der.email("a@demo.example"), [der.email("demo.example")], []),
    "another alternative e-mail address": (der.email("a@x.example"), [der.email("demo.example")], []),
    "an alternative e-mail address in another case excluded": (
        der.email("a@x.example"),
        [],
        [der.email("A@x.example")],
    ),
}


def name_constraints() -> Iterator[Case]:
    nameless = Entity(sequence(), LEAF.key)
    for label, (permitted, excluded) in URIS_AND_NONE.items():
        limits = der.name_constraints(permitted, excluded, critical=None if "not critical" in label else True)
        yield case(f"constraints: {label}", make_root=plus(limits), leaf=nameless)
    for label, (subject, permitted, excluded) in OF_SUBJECTS.items():
        limits = der.name_constraints(permitted, excluded)
        yield case(f"constraints: {label}", make_root=plus(limits), ca=Entity(subject, CA.key), leaf=nameless)
    for label, (name, permitted, excluded) in OF_ALTERNATIVES.items():
        limits, names = der.name_constraints(permitted, excluded), der.alternative_names(name)
        yield case(f"constraints: {label}", make_root=plus(limits), make_ca=plus(names), leaf=nameless)
    yield from _odd_subtrees()


def _odd_subtrees() -> Iterator[Case]:
    kind, mine = der.NAME_CONSTRAINTS, der.uri("demo.example")
    ends = {
        "minimum 0": der.implicit(0, b"\0"),
        "minimum 1": der.implicit(0, b"\1"),
        "maximum 5": der.implicit(1, b"\5"),
    }
    for label, end in ends.items():
        for form, base in {"our form": mine, "another form": der.dns("x")}.items():
            value = sequence(der.explicit(0, sequence(base, end)))
            limits = der.extension(kind, value, critical=True)
            yield case(f"constraints: {label} of {form}", make_ca=plus(limits))
    empty = der.extension(kind, sequence(der.explicit(0)), critical=True)
    yield case("constraints: an empty list of what is permitted", make_ca=plus(empty))
    many = der.name_constraints([*(der.uri(f"h{number}.example") for number in range(3000)), mine])
    yield case("constraints: 3001", make_ca=plus(many))
    outside = plus(der.name_constraints([der.directory(ORGANIZATION)]))
    self_issued, within = Entity(ROOT.name, CA.key), Entity(WITHIN, LEAF.key)
    yield case("constraints: a self-issued CA outside", ca=self_issued, make_root=outside, leaf=within)


Four = tuple[list[bytes], list[bytes], list[bytes], list[bytes]]
_HOLDS = [policies(ONE)]
# Extensions of the anchor, the upper CA, the lower CA and the leaf.
DEMANDS: dict[str, Four] = {
    "none anywhere": ([], [demand(0)], [], []),
    "not critical": ([], [demand(0, critical=None)], [], []),
    "everywhere": ([], [demand(0), policies(ONE)], _HOLDS, _HOLDS),
    "not in the leaf": ([], [demand(0), policies(ONE)], _HOLDS, []),
    "not in the lower": ([], [demand(0), policies(ONE)], [], _HOLDS),
    "another in the leaf": ([], [demand(0), policies(ONE)], _HOLDS, [policies(TWO)]),
    "after 1": ([], [demand(1), policies(ONE)], _HOLDS, []),
    "after 2": ([], [demand(2), policies(ONE)], _HOLDS, []),
    "after 3": ([], [demand(3)], [], []),
    "after 3, and by the lower at once": ([], [demand(3)], [demand(0)], []),
    "by the lower, not in the leaf": ([], [], [demand(0), policies(ONE)], []),
    "by the lower, not in the upper": ([], [], [demand(0), policies(ONE)], _HOLDS),
    "by the lower, everywhere": ([], _HOLDS, [demand(0), policies(ONE)], _HOLDS),
    "by the leaf": ([], [], [], [demand(0)]),
    "by the leaf, everywhere": ([], _HOLDS, _HOLDS, [demand(0), policies(ONE)]),
    "by the leaf after 1": ([], [], [], [demand(1)]),
    "by the anchor": ([demand(0)], [], [], []),
    "by the anchor, not critical": ([demand(0, critical=None)], [], [], []),
    "of nothing": ([], [demand()], [], []),
    "of nothing, not critical": ([], [demand(critical=None)], [], []),
    "of nothing by the leaf": ([], [], [], [demand()]),
    "of nothing by the anchor": ([demand()], [], [], []),
    "negative": ([], [demand(-1)], [], []),
    "after 2**70": ([], [demand(2**70)], [], []),
    "that none is mapped": ([], [demand(None, 0)], [], []),
}
_ANY_DOWN = ([policies(ANY)], [policies(ANY)])
ANY_POLICIES: dict[str, Four] = {
    "everywhere": ([], [demand(0), policies(ANY)], *_ANY_DOWN),
    "above one": ([], [demand(0), policies(ANY)], [policies(ANY)], _HOLDS),
    "below one": ([], [demand(0), policies(ONE)], _HOLDS, [policies(ANY)]),
    "inhibited": ([], [demand(0), inhibit(0), policies(ANY)], *_ANY_DOWN),
    "inhibited after 1": ([], [demand(0), inhibit(1), policies(ANY)], *_ANY_DOWN),
    "inhibited after 1, above one": ([], [demand(0), inhibit(1), policies(ANY)], [policies(ANY)], _HOLDS),
    "inhibited, above one": ([], [demand(0), inhibit(0), policies(ANY)], _HOLDS, _HOLDS),
    "inhibited, none demanded": ([], [inhibit(0), policies(ANY)], *_ANY_DOWN),
    "inhibited, not critical": ([], [inhibit(0, critical=None)], [], []),
    "inhibited after -1": ([], [inhibit(-1)], [], []),
}
_TO_TWO = mapped((ONE, TWO))
MAPPINGS: dict[str, Four] = {
    "none demanded": ([], [_TO_TWO, policies(ONE)], [policies(TWO)], [policies(TWO)]),
    "not critical": ([], [mapped((ONE, TWO), critical=None)], [], []),
    "demanded": ([], [demand(0), _TO_TWO, policies(ONE)], [policies(TWO)], [policies(TWO)]),
    "the unmapped below": ([], [demand(0), _TO_TWO, policies(ONE)], _HOLDS, _HOLDS),
    "twice": ([], [demand(0), _TO_TWO, policies(ONE)], [mapped((TWO, ONE)), policies(TWO)], _HOLDS),
    "inhibited": ([], [demand(0, 0), _TO_TWO, policies(ONE)], [policies(TWO)], [policies(TWO)]),
    "inhibited below": ([], [demand(0, 0), policies(ONE)], [_TO_TWO, policies(ONE)], [policies(TWO)]),
    "inhibited below, the unmapped": ([], [demand(0, 0), policies(ONE)], [_TO_TWO, policies(ONE)], _HOLDS),
    "inhibited below after 1": ([], [demand(0, 1), policies(ONE)], [_TO_TWO, policies(ONE)], [policies(TWO)]),
    "from one that any stands for": ([], [demand(0), _TO_TWO, policies(ANY)], [policies(TWO)], [policies(TWO)]),
    "to several": (
        [],
        [demand(0), mapped((ONE, TWO), (ONE, THREE)), policies(ONE)],
        [policies(THREE)],
        [policies(THREE)],
    ),
    "to any": ([], [mapped((ONE, ANY))], [], []),
    "from any": ([], [mapped((ANY, ONE))], [], []),
    "empty": ([], [mapped()], [], []),
    "in the leaf": ([], [], [], [_TO_TWO]),
    "to any in the leaf": ([], [], [], [mapped((ONE, ANY))]),
    "empty in the leaf": ([], [], [], [mapped()]),
    "empty in the anchor": ([mapped()], [], [], []),
}


def _qualified(kind: str, qualifier: bytes) -> bytes:
    information = sequence(der.oid(ONE), sequence(sequence(der.oid(kind), qualifier)))
    return der.extension(der.POLICIES, sequence(information))


LISTS: dict[str, Four] = {
    "empty": ([], [policies()], [], []),
    "empty in the leaf": ([], [], [], [policies()]),
    "one twice": ([], [policies(ONE, ONE)], [], []),
    "one twice in the leaf": ([], [], [], [policies(ONE, ONE)]),
    "one twice in the anchor": ([policies(ONE, ONE)], [], [], []),
    "critical": ([], [policies(ONE, critical=True)], [], [policies(TWO, critical=True)]),
    "with a qualifier of an unknown kind": ([], [_qualified("1.2.3.9", der.NULL)], [], []),
    "with a notice in a BMPString": (
        [],
        [_qualified("1.3.6.1.5.5.7.2.2", sequence(der.tlv(der.BMP, b"\0x")))],
        [],
        [],
    ),
    "with a CPS in a UTF8String": ([], [_qualified("1.3.6.1.5.5.7.2.1", der.tlv(der.UTF8, b"x"))], [], []),
}


def certificate_policies() -> Iterator[Case]:
    for family, cases in (
        ("a policy is demanded", DEMANDS),
        ("anyPolicy", ANY_POLICIES),
        ("policies mapped", MAPPINGS),
        ("list of policies", LISTS),
    ):
        for label, extensions in cases.items():
            yield _policed(f"{family}: {label}", *extensions)


def _policed(label: str, root: list[bytes], upper: list[bytes], lower: list[bytes], leaf: list[bytes]) -> Case:
    middle = der.entity("Demo Upper")
    above = (
        der.certificate(CA, middle, extensions=der.ca_extensions(CA, middle, *lower)),
        der.certificate(middle, ROOT, extensions=der.ca_extensions(middle, ROOT, *upper)),
    )
    return case(label, make_root=plus(*root), above=above, make_leaf=plus(*leaf))


# The CAs' names from the anchor's downwards, and the path length of each.
TOWERS: dict[str, list[tuple[str, int | None]]] = {
    "anchor 0, one CA": [("", 0), ("CA", None)],
    "anchor 0, two CAs": [("", 0), ("Upper", None), ("CA", None)],
    "anchor 1, two CAs": [("", 1), ("Upper", None), ("CA", None)],
    "upper 0, two CAs": [("", None), ("Upper", 0), ("CA", None)],
    "upper 1, two CAs": [("", None), ("Upper", 1), ("CA", None)],
    "lower 0, two CAs": [("", None), ("Upper", None), ("CA", 0)],
    "anchor 0, self-issued": [("", 0), ("Demo Root", None)],
    "upper 0, self-issued": [("", None), ("Upper", 0), ("Upper", None)],
    "upper 0, self-issued, one more": [("", None), ("Upper", 0), ("Upper", None), ("CA", None)],
    "upper 1, self-issued, one more": [("", None), ("Upper", 1), ("Upper", None), ("CA", None)],
    "8 CAs": [("", None), *((f"CA {number}", None) for number in range(8))],
    "9 CAs": [("", None), *((f"CA {number}", None) for number in range(9))],
}


def path_lengths() -> Iterator[Case]:
    for label, ((_, limit), *tower) in TOWERS.items():
        anchor = der.certificate(ROOT, extensions=der.ca_extensions(ROOT, ROOT, path_length=limit))
        issuer, above = ROOT, list[bytes]()
        for text, each in tower:
            own = der.entity(text)
            above.insert(0, der.certificate(own, issuer, extensions=der.ca_extensions(own, issuer, path_length=each)))
            issuer = own
        leaf = der.certificate(LEAF, issuer, extensions=der.leaf_extensions(LEAF, issuer, SPIFFE_ID))
        yield Case(f"path length: {label}", leaf, tuple(above), (anchor,), LEAF.key, SPIFFE_ID)
