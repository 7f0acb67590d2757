"""For which trust domains a CA can issue: it is what the walk says of every host, however constraints meet."""

import itertools
from collections.abc import Sequence

import pytest
from cryptography import x509
from fakes.hierarchy import NOW, Ca, make_ca, make_leaf, new_key, uris
from hypothesis import given, settings
from hypothesis import strategies as st

from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.signing.reach import MOST_TRIED, Prover, Reach, ReachError
from sds_agent.signing.signer import Signer

KEYS = [new_key() for _ in range(4)]


def hierarchy(root: x509.NameConstraints | None, signer: x509.NameConstraints | None) -> tuple[Ca, Ca]:
    above = make_ca("root", key=KEYS[0], constraints=root)
    return above, make_ca("signer", above, key=KEYS[1], constraints=signer)


def prover(signer: Ca, *anchors: Ca, candidates: Sequence[Ca] = ()) -> Prover:
    key = signer.key
    assert key is KEYS[1]
    chain = tuple(ca.certificate for ca in (signer, *candidates))
    return Prover(Signer(signer.certificate, KEYS[1]), chain, tuple(ca.certificate for ca in anchors), NOW)


SHOWN: dict[str, tuple[x509.NameConstraints | None, x509.NameConstraints | None, str]] = {
    "no constraint": (None, None, "any"),
    "one host": (None, uris(permitted=["Demo.Example"]), "'demo.example'"),
    "the second of two": (
        uris(excluded=["one.example"]),
        uris(permitted=["one.example", "two.example"]),
        "'two.example'",
    ),
    "one host of a domain": (uris(permitted=["demo.example"]), uris(permitted=[".example"]), "'demo.example'"),
    "a domain within a domain": (
        uris(permitted=[".demo.example"]),
        uris(permitted=[".example"]),
        "any below 'demo.example'",
    ),
    "a domain and its host": (
        None,
        uris(permitted=[".demo.example", "demo.example", "a.demo.example"]),
        "any below 'demo.example', 'demo.example'",
    ),
    "a part of a domain": (
        uris(excluded=[".dev.example", "old.example", "elsewhere"]),
        uris(permitted=[".example"]),
        "any below 'example'; but not any below 'dev.example', 'old.example'",
    ),
    "all but one": (uris(excluded=["demo.example"]), None, "any that is a DNS name; but not 'demo.example'"),
    "a host that stands below what is excluded": (
        uris(excluded=[".example"]),
        uris(permitted=["example", "a.example"]),
        "'example'",
    ),
}


@pytest.mark.parametrize(("root", "signer", "words"), SHOWN.values(), ids=SHOWN)
def test_an_operator_reads_which_trust_domains_a_ca_can_issue_for(
    root: x509.NameConstraints | None, signer: x509.NameConstraints | None, words: str
) -> None:
    above, below = hierarchy(root, signer)
    proved = prover(below, above)
    assert str(proved.reach()) == words
    assert proved.chain() == (below.certificate,)


NONE = {
    "they permit what the other does not": (
        uris(permitted=["a.example"]),
        uris(permitted=["b.example"]),
        "'a.example'",
    ),
    "the domain is excluded": (uris(excluded=[".example"]), uris(permitted=["a.example", ".b.example"]), "'.example'"),
    "no host name": (None, uris(permitted=["spiffe://demo.example"]), "must be a DNS name"),
    "an underscore": (None, uris(permitted=["demo_x"]), "must be a DNS name"),
    "an address": (None, uris(permitted=["10.0.0.1"]), "must be a DNS name"),
}


@pytest.mark.parametrize(("root", "signer", "words"), NONE.values(), ids=NONE)
def test_a_ca_that_can_issue_for_no_trust_domain_is_refused(
    root: x509.NameConstraints | None, signer: x509.NameConstraints, words: str
) -> None:
    above, below = hierarchy(root, signer)
    with pytest.raises(ReachError, match=words):
        prover(below, above).chain()


def test_another_way_up_permits_other_trust_domains() -> None:
    """A region's CA that two roots have signed: each binds it in its own way."""
    roots = [make_ca(f"root{n}", key=KEYS[2 + n]) for n in range(2)]
    regions = [
        make_ca("region", root, key=KEYS[0], constraints=uris(permitted=[host]))
        for root, host in zip(roots, ("one.example", "two.example"), strict=True)
    ]
    signer = make_ca("signer", regions[0], key=KEYS[1])
    proved = prover(signer, *roots, candidates=regions)
    assert set(proved.reach().within) == {"one.example", "two.example"}
    assert proved.chain("two.example") == (signer.certificate, regions[1].certificate)
    with pytest.raises(ReachError, match=r"three\.example"):
        proved.chain("three.example")


def test_the_number_of_constraints_that_are_examined_is_bounded() -> None:
    hosts = [f"h{number}.example" for number in range(4 * MOST_TRIED)]
    above, below = hierarchy(None, uris(permitted=hosts))
    reach = prover(below, above).reach()
    assert hosts[0] in reach.within
    assert "only the first 256 name constraints were tried" in str(reach)


LABELS = ("a", "b")
HOSTS = [".".join(labels) for depth in (1, 2, 3) for labels in itertools.product(LABELS, repeat=depth)]
SCOPES = st.lists(
    st.sampled_from([f"{dot}{host}" for host in HOSTS if host.count(".") < 2 for dot in ("", ".")]), max_size=3
)
CONSTRAINTS = st.tuples(SCOPES, SCOPES).map(
    lambda both: uris(permitted=both[0], excluded=both[1]) if any(both) else None
)


@settings(max_examples=40)
@given(CONSTRAINTS, CONSTRAINTS)
def test_the_reach_permits_exactly_the_hosts_that_the_walk_permits(
    root: x509.NameConstraints | None, signer: x509.NameConstraints | None
) -> None:
    above, below = hierarchy(root, signer)
    reach = prover(below, above).reach()
    for host in HOSTS:
        leaf = make_leaf(below, f"spiffe://{host}/web", key=KEYS[3])
        assert found(leaf, below, above) == permits(reach, host), host


def found(leaf: x509.Certificate, signer: Ca, root: Ca) -> bool:
    try:
        return bool(find_path(leaf, [signer.certificate], [root.certificate], NOW))
    except PathError:
        return False


def permits(reach: Reach, host: str) -> bool:
    """The narrowest scope that the host lies in decides."""
    around = [s for s in (*reach.within, *reach.without) if s == host or (s[:1] in {"", "."} and host.endswith(s))]
    return max(around, key=lambda scope: (scope == host, len(scope)), default=None) in reach.within
