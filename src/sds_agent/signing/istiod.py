"""What istiod would not take of a plugged-in CA's files, though it may be good for us (as tried on istiod's own code).

istiod reads PEM by Go's `encoding/pem` and compares names byte by byte. Our own readers do both as Envoy does.
"""

import itertools
import re
from collections.abc import Iterator, Mapping

from sds_agent.errors import Problem
from sds_agent.pki import pem
from sds_agent.pki.certificates import CertificateError, describe, has_key, read_bundle
from sds_agent.pki.keyfile import KeyFileError, is_encrypted, read_private_key
from sds_agent.pki.names import same_encoding
from sds_agent.pki.validation.signatures import fault_of_signature
from sds_agent.signing.cacerts import CERT_MANAGER, ISTIO, Layout, layout_of
from sds_agent.signing.signing_set import SigningSet

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GO_LINE = re.compile(rb"^-----(BEGIN|END) ([^\r\n]*)-----[ \t\r]*$", re.MULTILINE)
"""How encoding/pem, by which istiod reads all its files, knows a block."""
_GO_KEYS = frozenset({"PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "ENCRYPTED PRIVATE KEY"})


def refused_by_istiod(files: Mapping[str, bytes]) -> tuple[Problem, ...]:
    """What istiod would not take of these files."""
    return tuple(_faults_for_istiod(files, layout_of(files)))


def spelled_otherwise(signing: SigningSet) -> tuple[Problem, ...]:
    """Where a certificate of the chain spells its issuer's name in another way than the issuer does.

    For Envoy, and by RFC 5280 section 7.1, the two are one name (`names`). Go compares their bytes.
    """
    pairs = list(itertools.pairwise(signing.intermediates))
    if signing.intermediates:
        top = signing.intermediates[-1]
        roots = [root for root in signing.roots if fault_of_signature(top, root) is None]
        if not any(same_encoding(top.issuer, root.subject) for root in roots):
            pairs += [(top, root) for root in roots[:1]]
    return tuple(
        Problem(
            (describe(below),),
            f"spells its issuer's name in another way than {describe(above)} does: as another type of string, or with "
            "other capitals or spaces",
            "have it issued anew with the name as the issuer has it; Envoy takes both, Go does not",
        )
        for below, above in pairs
        if not same_encoding(below.issuer, above.subject)
    )


def _faults_for_istiod(files: Mapping[str, bytes], layout: Layout) -> Iterator[Problem]:
    for name in (each for each in layout.required if each in files):
        if files[name].startswith(BYTE_ORDER_MARK + b"-----BEGIN"):
            yield Problem((name,), "begins with a byte order mark", "remove it: `sed -i '1s/^\\xEF\\xBB\\xBF//' FILE`")
        else:
            yield from _blocks_for_istiod(files[name], name, layout)
    if _needs_passphrase(files.get(layout.key, b"")):
        yield Problem(
            (layout.key,), "is encrypted", "istiod has no way to be given a passphrase: decrypt the key for it"
        )
    yield from _order_for_istiod(files, layout)


def _blocks_for_istiod(data: bytes, name: str, layout: Layout) -> Iterator[Problem]:
    """istiod's reader knows BEGIN and END only as lines of their own, and takes a first block for the one it wants."""
    lines = _GO_LINE.findall(data)
    labels = [label.decode(errors="replace") for kind, label in lines if kind == b"BEGIN"]
    if len(lines) < 2 * len(list(pem.labels(data))):
        fix = "let each of these begin a line and end it"
        yield Problem((name,), "holds a BEGIN or an END of a block that shares its line with something else", fix)
    elif name == layout.key and labels[:1] == ["EC PARAMETERS"]:
        fix = "remove that block: `openssl pkcs8 -topk8 -nocrypt -in FILE` writes the key alone"
        yield Problem((name,), "begins with an EC PARAMETERS block", fix)
    elif name == layout.key and _GO_KEYS.intersection(labels[1:]) and labels[0] not in _GO_KEYS:
        yield Problem((name,), f"begins with a block {labels[0]}", "move the key to the front")
    elif name != layout.key and "X509 CERTIFICATE" in labels:
        yield Problem((name,), "holds an X509 CERTIFICATE", "`sed -i 's/X509 CERTIFICATE/CERTIFICATE/' FILE`")
    elif name == layout.signer and "CERTIFICATE" in labels[1:] and labels[0] != "CERTIFICATE":
        yield Problem((name,), f"begins with a block {labels[0]}", "move the signer's certificate to the front")


def _needs_passphrase(key: bytes) -> bool:
    try:
        return is_encrypted(key)
    except KeyFileError:
        return False


def _order_for_istiod(files: Mapping[str, bytes], layout: Layout) -> Iterator[Problem]:
    """istiod takes the first certificate of the signer's file, and `tls.crt` before `ca-cert.pem`."""
    if CERT_MANAGER.signer in files and ISTIO.signer in files:
        yield Problem(
            (f"{CERT_MANAGER.signer} and {ISTIO.signer}",),
            f"both are there, and {CERT_MANAGER.signer} is the one that is taken, here and by istiod",
            "keep the files of one kind",
        )
    try:
        own = read_bundle(files.get(layout.signer, b"")).certificates
        key = read_private_key(files.get(layout.key, b""))
    except (CertificateError, KeyFileError):
        return
    if own and not has_key(own[0], key.public_key()) and any(has_key(c, key.public_key()) for c in own):
        yield Problem((layout.signer,), "the signer is not the first certificate in it", "move it to the front")
