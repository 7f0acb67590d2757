"""Test chains: a leaf with what a CA sent along and whom to trust, as it goes before us or before OpenSSL."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from fakes.hierarchy import NOW, Ca, make_leaf
from fakes.openssl import verifies

from sds_agent.pki.validation.path import find_path


@dataclass(frozen=True)
class Case:
    """A leaf, what came with it, and whom to trust."""

    leaf: x509.Certificate
    candidates: tuple[x509.Certificate, ...]
    anchors: tuple[x509.Certificate, ...]
    now: datetime = NOW

    def find(self, skew: timedelta = timedelta(0)) -> tuple[x509.Certificate, ...]:
        """The chain that we find. Raises PathError."""
        return find_path(self.leaf, self.candidates, self.anchors, self.now, skew=skew)

    def openssl_verifies(self, directory: Path) -> bool:
        """OpenSSL's verdict; its files go to `directory`."""
        return verifies(directory, self.leaf, self.candidates, self.anchors, self.now)


def below(root: Ca, *intermediates: Ca, leaf: x509.Certificate | None = None) -> Case:
    """A leaf under the last CA; the root is the anchor."""
    issuer = intermediates[-1] if intermediates else root
    candidates = tuple(ca.certificate for ca in intermediates)
    return Case(leaf or make_leaf(issuer), candidates, (root.certificate,))
