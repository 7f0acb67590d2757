"""Chains of a leaf, a CA and a root that are good but for one thing, which stands in each place in turn."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fakes import der
from fakes.der import Entity
from fakes.judge import Case

SPIFFE_ID = "spiffe://demo.example/web"
ROOT, CA, LEAF, SPARE = (der.entity(text) for text in ("Demo Root", "Demo CA", "web", "Spare Root"))
ENDED, EARLIER, LATER = map(der.utc_time, ("210101000000Z", "480101000000Z", "490101000000Z"))
"""Ends of a validity: one that has passed, and two before the usual one."""

Extensions = tuple[bytes, ...]
Make = Callable[[Entity, Entity, Extensions], bytes]
"""Makes a certificate about the first below the second, with the extensions that are usual for its place."""


def usual(subject: Entity, issuer: Entity, extensions: Extensions) -> bytes:
    return der.certificate(subject, issuer, extensions=extensions)


def case(
    label: str,
    *,
    root: Entity = ROOT,
    ca: Entity = CA,
    leaf: Entity = LEAF,
    make_root: Make = usual,
    make_ca: Make = usual,
    make_leaf: Make = usual,
    spiffe_id: str = SPIFFE_ID,
    above: Iterable[bytes] | None = None,
    beside: Iterable[bytes] = (),
) -> Case:
    """Leaf, CA and root, each made as asked; `above` stands in place of the CA, `beside` follows the root."""
    anchor = make_root(root, root, der.ca_extensions(root, root))
    upper = (make_ca(ca, root, der.ca_extensions(ca, root)),) if above is None else tuple(above)
    lower = make_leaf(leaf, ca, der.leaf_extensions(leaf, ca, spiffe_id))
    return Case(label, lower, upper, (anchor, *beside), leaf.key, spiffe_id)


def in_each_place(label: str, make: Make, *, spare: bool = False) -> Iterator[Case]:
    """The oddity as the anchor, the intermediate and the leaf; with `spare` also as an anchor beside a good one."""
    yield case(f"{label} / anchor", make_root=make)
    yield case(f"{label} / intermediate", make_ca=make)
    yield case(f"{label} / leaf", make_leaf=make)
    if spare:
        yield case(f"{label} / spare", beside=[make(SPARE, SPARE, der.ca_extensions(SPARE, SPARE))])


def named(label: str, name: bytes) -> Iterator[Case]:
    """An odd name in each place; what is below it says the same of its issuer."""
    yield case(f"{label} / anchor", root=Entity(name, ROOT.key))
    yield case(f"{label} / intermediate", ca=Entity(name, CA.key))
    yield case(f"{label} / leaf", leaf=Entity(name, LEAF.key))
    yield case(f"{label} / spare", beside=[der.certificate(Entity(name, SPARE.key))])


def parts(**given: Any) -> Make:
    """With other parts than usual, as `der.certificate` names them."""
    return lambda subject, issuer, extensions: der.certificate(subject, issuer, extensions=extensions, **given)


def without(extensions: Extensions, *kinds: str) -> Extensions:
    # an extension begins with its kind, after a header of two to four bytes
    return tuple(each for each in extensions if not any(der.oid(kind) in each[:16] for kind in kinds))


def instead(kind: str, *others: bytes) -> Make:
    """With these extensions in place of the usual one of that kind."""
    return lambda subject, issuer, extensions: usual(subject, issuer, (*without(extensions, kind), *others))


def plus(*others: bytes) -> Make:
    """With these extensions besides the usual ones."""
    return lambda subject, issuer, extensions: usual(subject, issuer, (*extensions, *others))
