"""Which of several issuers: key identifiers, anchors and intermediates of one name, cross-signed CAs."""

from collections.abc import Iterable, Iterator

from fakes import der
from fakes.der import Entity
from fakes.judge import Case
from fakes.oddities.fields import rsa_key
from fakes.oddities.places import (
    CA,
    EARLIER,
    ENDED,
    LATER,
    LEAF,
    ROOT,
    SPARE,
    SPIFFE_ID,
    Make,
    case,
    instead,
    parts,
    usual,
    without,
)

SERIAL = 77
_IDENTIFIERS = (der.SUBJECT_KEY_IDENTIFIER, der.AUTHORITY_KEY_IDENTIFIER)
_ROOT_NAME, _OTHER_NAME = der.directory(ROOT.name), der.directory(der.common_name("Other"))
_akid = der.authority_key_identifier
AUTHORITIES: dict[str, list[bytes]] = {
    "left out": [],
    "empty": [_akid()],
    "right": [_akid(ROOT.identifier)],
    "wrong": [_akid(b"wrong")],
    "serial number right": [_akid(None, [_ROOT_NAME], SERIAL)],
    "serial number wrong": [_akid(None, [_ROOT_NAME], SERIAL + 1)],
    "key right, serial number wrong": [_akid(ROOT.identifier, [_ROOT_NAME], SERIAL + 1)],
    "serial number alone": [_akid(None, (), SERIAL)],
    "serial number alone, wrong": [_akid(None, (), SERIAL + 1)],
    "issuer alone": [_akid(None, [_ROOT_NAME])],
    "issuer spelled otherwise": [_akid(None, [der.directory(der.common_name("DEMO root", der.PRINTABLE))], SERIAL)],
    "issuer wrong": [_akid(None, [_OTHER_NAME], SERIAL)],
    "issuer wrong, then right": [_akid(None, [_OTHER_NAME, _ROOT_NAME], SERIAL)],
    "issuer as URI": [_akid(None, [der.uri("x:y")], SERIAL)],
    "issuer as x400Address": [_akid(None, [der.explicit(3)], SERIAL)],
}
NO_AUTHORITY = instead(der.AUTHORITY_KEY_IDENTIFIER)
NAMED: dict[str, Make] = {"": usual, ", no AuthorityKeyIdentifier": NO_AUTHORITY}
"""With and without the extension that distinguishes anchors of one name."""


def _bare(subject: Entity, issuer: Entity, extensions: tuple[bytes, ...]) -> bytes:
    return der.certificate(subject, issuer, extensions=without(extensions, *_IDENTIFIERS), serial=der.integer(SERIAL))


def identifiers() -> Iterator[Case]:
    for label, below in AUTHORITIES.items():
        make, root = instead(der.AUTHORITY_KEY_IDENTIFIER, *below), parts(serial=der.integer(SERIAL))
        yield case(f"AuthorityKeyIdentifier: {label}", make_root=root, make_ca=make)
        yield case(f"AuthorityKeyIdentifier: {label}, root without identifiers", make_root=_bare, make_ca=make)


def _namesakes() -> dict[str, list[bytes]]:
    """Anchors beside the root, which ends in between EARLIER and the usual end."""
    other, third = Entity(ROOT.name, SPARE.key), der.entity("Demo Root")
    crl_only = [der.basic_constraints(), der.key_usage(der.CRL_SIGN)]
    respelled = Entity(der.common_name("DEMO  root", der.PRINTABLE), SPARE.key)
    return {
        "another key, longer": [der.certificate(other)],
        "another key, shorter": [der.certificate(other, not_after=EARLIER)],
        "another key, expired": [der.certificate(other, not_after=ENDED)],
        "another key, without identifiers": [_bare(other, other, der.ca_extensions(other, other))],
        "another key, spelled otherwise": [der.certificate(respelled)],
        "another key that may not sign": [der.certificate(other, extensions=crl_only)],
        "two other keys": [der.certificate(other, not_after=EARLIER), der.certificate(third)],
        "the same key, longer": [der.certificate(ROOT)],
        "the same key, shorter": [der.certificate(ROOT, not_after=EARLIER)],
        "the same key, expired": [der.certificate(ROOT, not_after=ENDED)],
        "the same key, not yet valid": [der.certificate(ROOT, not_before=EARLIER)],
        "the same key, no KeyUsage": [der.certificate(ROOT, extensions=[der.basic_constraints()])],
        "twenty other keys": [der.certificate(der.entity("Demo Root")) for _ in range(20)],
    }


def namesakes() -> Iterator[Case]:
    for label, beside in _namesakes().items():
        for named, make in NAMED.items():
            root = parts(not_after=LATER)
            yield case(f"namesake: {label}{named}", make_root=root, make_ca=make, beside=beside)


def intermediates() -> Iterator[Case]:
    """The CA, a CA of its name, and its own former certificate: sent in some order, or among the anchors."""
    twin = Entity(CA.name, SPARE.key)
    own = usual(CA, ROOT, der.ca_extensions(CA, ROOT))
    other = usual(twin, ROOT, der.ca_extensions(twin, ROOT))
    ended = der.certificate(CA, ROOT, not_after=ENDED)
    for named, make in NAMED.items():
        for label, above in {
            "own first": (own, other),
            "other first": (other, own),
            "expired first": (ended, own),
        }.items():
            yield case(f"two CAs of one name: {label}{named}", above=above, make_leaf=make)
        for label, anchor in {"another CA of its name": other, "the CA": own, "the CA, expired,": ended}.items():
            yield case(f"{label} is an anchor too{named}", beside=[anchor], make_leaf=make)
    root_ended = der.certificate(ROOT, not_after=ENDED)
    elsewhere = der.name_constraints([der.uri("other.example")])
    constrained = der.certificate(ROOT, extensions=der.ca_extensions(ROOT, ROOT, elsewhere))
    for label, anchors in {
        "alone": [own],
        "and its root that has ended": [own, root_ended],
        "and its root that excludes us": [own, constrained],
    }.items():
        yield _chain(f"the CA is the anchor, {label}", [own], anchors)


def cross_signed() -> Iterator[Case]:
    """A new root that the old one has certified."""
    old = der.entity("Old Root")
    cross = der.certificate(ROOT, old, extensions=der.ca_extensions(ROOT, old))
    own = usual(CA, ROOT, der.ca_extensions(CA, ROOT))
    new_root, old_root = der.certificate(ROOT), der.certificate(old)
    old_ended = der.certificate(old, not_after=ENDED)
    for label, above, anchors in (
        ("to the old", [own, cross], [old_root]),
        ("to the new", [own, cross], [new_root]),
        ("to both", [own, cross], [new_root, old_root]),
        ("to the new, and the old has ended", [own, cross], [new_root, old_ended]),
        ("the root sent instead", [own, new_root], [old_root]),
        ("the root sent too", [own, new_root, cross], [old_root]),
        ("the cross is an anchor", [own], [cross]),
        ("the cross is an anchor, and the old has ended", [own], [cross, old_ended]),
        ("the cross and the new are anchors", [own], [cross, new_root]),
        ("in another order", [cross, own], [old_root]),
    ):
        yield _chain(f"cross-signed: {label}", above, anchors)
    weak = der.entity("Old Root", rsa_key(1024))
    by_weak = der.certificate(ROOT, weak, extensions=der.ca_extensions(ROOT, weak))
    for label, above, anchors in (
        ("all are anchors", [own], [new_root, by_weak, der.certificate(weak)]),
        ("the cross and the old are anchors", [own], [by_weak, der.certificate(weak)]),
        ("the cross is sent", [own, by_weak], [new_root, der.certificate(weak)]),
    ):
        yield _chain(f"cross-signed by a weak root: {label}", above, anchors)


def self_issued() -> Iterator[Case]:
    """A root's new key, certified by its old one."""
    before = Entity(ROOT.name, SPARE.key)
    old_root, new_root = der.certificate(before), der.certificate(ROOT)
    own = usual(CA, ROOT, der.ca_extensions(CA, ROOT))
    bare = NO_AUTHORITY(ROOT, before, der.ca_extensions(ROOT, before))
    yield _chain("new key with old, not saying which", [own, bare], [old_root])
    for label, kinds in {"": (), ", no identifiers": _IDENTIFIERS}.items():
        link = der.certificate(ROOT, before, extensions=without(der.ca_extensions(ROOT, before), *kinds))
        below = der.certificate(CA, ROOT, extensions=without(der.ca_extensions(CA, ROOT), *kinds))
        yield _chain(f"new key with old{label}", [below, link], [old_root])
        yield _chain(f"new key with old, both roots{label}", [below, link], [old_root, new_root])
        yield _chain(f"new key with old, the new root{label}", [below, link], [new_root])


def _chain(label: str, above: Iterable[bytes], anchors: Iterable[bytes]) -> Case:
    leaf = usual(LEAF, CA, der.leaf_extensions(LEAF, CA, SPIFFE_ID))
    return Case(label, leaf, tuple(above), tuple(anchors), LEAF.key, SPIFFE_ID)
