"""What our CA answers beside what istiod answers for the same directory, element by element."""

from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from fakes.ca_servers import Identity, ask, served
from fakes.istio_parts import ISTIOD, add_root, istiod, plugged
from fakes.kubernetes import Kubernetes

from sds_agent.pki.certificates import extended_key_usages, is_ca, is_self_signed, read_pem


def two_roots(folder: Path) -> Path:
    directory = plugged(folder)
    add_root(folder, directory)
    return directory


def with_its_root(folder: Path) -> Path:
    """The root in the chain too, where the signer's own certificate is missing, and no newline at the end."""
    directory = plugged(folder)
    root = (directory / "root-cert.pem").read_bytes()
    (directory / "cert-chain.pem").write_bytes(root + (directory / "ca-cert.pem").read_bytes().strip())
    (directory / "root-cert.pem").write_bytes(b"text before\n" + root.strip())
    return directory


async def answer_of_istiod(folder: Path, cluster: Kubernetes, directory: Path) -> Identity:
    async with istiod(folder, cluster, directory) as running:
        credentials = grpc.ssl_channel_credentials(running.roots)
        options = [("grpc.ssl_target_name_override", ISTIOD)]
        async with grpc.aio.secure_channel(running.address, credentials, options=options) as channel:
            return await ask(channel, cluster.issuer.token("RS256"))


async def answer_of_ours(folder: Path, signer: str, directory: Path) -> Identity:
    roots = (directory / "root-cert.pem").read_bytes() if signer == "cacerts" else None
    async with served(folder, signer=f"{{{signer}: {directory.name}}}", roots=roots) as ca:
        return await ca.ask(ca.join_token())


def described(element: str) -> str:
    """One element: what its certificates are, how long it is, and how it ends."""
    kinds = [
        "leaf" if not is_ca(each) else "root" if is_self_signed(each) else "intermediate"
        for each in read_pem(element.encode())
    ]
    newlines = len(element) - len(element.rstrip("\n"))
    return f"{' + '.join(kinds)}, {len(element)} bytes, {newlines} newline(s) at the end"


def beside(istio: Identity, ours: Identity) -> str:
    lines = []
    for name, identity in (("istiod", istio), ("ca serve", ours)):
        lines.append(f"          {name}: {len(identity.elements)} elements")
        lines += [f"            {number}. {described(each)}" for number, each in enumerate(identity.elements, 1)]
    return "\n".join(lines)


def certificates(elements: tuple[str, ...]) -> list[x509.Certificate]:
    return [each for element in elements for each in read_pem(element.encode())]


def promises(leaf: x509.Certificate) -> dict[str, object]:
    """What a workload's certificate says of its holder."""
    identity = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {
        "subject": leaf.subject.rdns,
        "identity": (identity.critical, list(identity.value)),
        "usages": {usage.dotted_string for usage in extended_key_usages(leaf)},
        "CA": is_ca(leaf),
    }


@pytest.mark.parametrize("make", [plugged, two_roots, with_its_root])
async def test_our_ca_answers_as_istiod_does_but_for_roots_in_the_chain(
    tmp_path: Path, cluster: Kubernetes, record_property: Callable[[str, object], None], make: Callable[[Path], Path]
) -> None:
    directory = make(tmp_path)
    istio, ours = (
        await answer_of_istiod(tmp_path, cluster, directory),
        await answer_of_ours(tmp_path, "cacerts", directory),
    )
    record_property("elements", beside(istio, ours))
    between = [each for each in certificates(istio.elements[1:-1]) if not is_self_signed(each)]
    assert certificates(ours.elements[1:-1]) == between
    # both have the operator's roots, and ours in an order of its own: of those that end together any may come first
    assert set(certificates(ours.elements[-1:])) == set(certificates(istio.elements[-1:]))
    assert len(certificates(ours.elements[-1:])) == len(certificates(istio.elements[-1:]))
    assert all(len(read_pem(each.encode())) == 1 for each in ours.elements[:-1])
    assert all(each.endswith("-----\n") for each in ours.elements)
    assert promises(ours.leaf) == promises(istio.leaf)


async def test_our_self_signed_ca_answers_as_istiod_does(
    tmp_path: Path, cluster: Kubernetes, record_property: Callable[[str, object], None]
) -> None:
    istio = await answer_of_istiod(tmp_path, cluster, tmp_path / "nothing")
    ours = await answer_of_ours(tmp_path, "self_signed", tmp_path / "own")
    record_property("elements", beside(istio, ours))
    assert len(ours.elements) == len(istio.elements) == 2
    assert is_self_signed(read_pem(ours.roots)[0])
