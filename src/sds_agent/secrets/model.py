"""The two kinds of secret that Envoy asks for, as immutable values.

A certificate and its key are one value, so nothing can pair a new chain with an old key. A secret's version is a hash
of its content: after a restart the same secret has the same version, and an unchanged one is recognised and never
pushed again.
"""

from datetime import datetime
from functools import lru_cache

from msgspec import Struct

from sds_agent.digest import sha256
from sds_agent.values import Sensitive


class CertificateSecret(Sensitive, frozen=True):
    """A private key and its certificate chain.

    `chain_pem` is the leaf, then its intermediates, never a root. `private_key_pem` is unencrypted PKCS#8.
    `not_after` is the end of the first certificate of the chain to expire: until then the secret is good.
    """

    chain_pem: bytes
    private_key_pem: bytes
    not_after: datetime

    @property
    def version(self) -> str:
        """A hash of the chain alone: the leaf's public key determines the private one, which so stays out of a value
        that is logged.
        """
        return _digest(b"certificate", self.chain_pem)


class BundleSecret(Struct, frozen=True):
    """The trust anchors of a trust domain, and the revocation lists of its CAs, each concatenated PEM.

    Without lists Envoys do not ask whether a certificate is revoked. With any they refuse each certificate whose
    issuer's list is missing, so there are all that are needed or none.
    """

    anchors_pem: bytes
    lists_pem: bytes = b""

    @property
    def version(self) -> str:
        """A hash of the content; the lists begin where the length of the anchors says."""
        if not self.lists_pem:
            return _digest(b"bundle", self.anchors_pem)
        return _digest(b"bundle with lists, %d" % len(self.anchors_pem), self.anchors_pem + self.lists_pem)


Secret = CertificateSecret | BundleSecret


@lru_cache(maxsize=64)
def _digest(kind: bytes, content: bytes) -> str:
    return sha256(kind + b"\n" + content).hex()[:16]
