"""Test chains: a leaf, the certificates that came with it and the anchors, for us and for OpenSSL to judge."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from fakes.hierarchy import NOW, Ca, make_leaf
from fakes.openssl import verifies

from sds_agent.pki.validation.path import find_path


@dataclass(frozen=True)
class Case:
    """A leaf, the certificates that came with it, and the anchors."""

    leaf: x509.Certificate
    candidates: tuple[x509.Certificate, ...]
    anchors: tuple[x509.Certificate, ...]
    now: datetime = NOW

    def find(self, skew: timedelta = timedelta(0)) -> tuple[x509.Certificate, ...]:
        """The chain that our walk finds. Raises PathError."""
        return find_path(self.leaf, self.candidates, self.anchors, self.now, skew=skew)

    def openssl_verifies(self, directory: Path) -> bool:
        """OpenSSL's verdict; its files go to `directory`."""
        return verifies(directory, self.leaf, self.candidates, self.anchors, self.now)


def below(root: Ca, *intermediates: Ca, leaf: x509.Certificate | None = None) -> Case:
    """A leaf under the last CA; the root is the anchor."""
    issuer = intermediates[-1] if intermediates else root
    candidates = tuple(ca.certificate for ca in intermediates)
    return Case(leaf or make_leaf(issuer), candidates, (root.certificate,))
