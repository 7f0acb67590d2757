"""The names that programs expect for a certificate, its key and the roots to trust. Pure."""

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct

from sds_agent.outputs.directory import File
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import Snapshot

_TRUST_DOMAIN = "{trust_domain}"


class FileLayout(Struct, frozen=True):
    """Names of files. `pair` is one file with the key and then the chain. In `bundle`, {trust_domain} stands for the
    name of a trust domain; there is a file for each then, and without it one for the agent's own.
    """

    bundle: str
    chain: str | None = None
    key: str | None = None
    pair: str | None = None

    @property
    def federates(self) -> bool:
        """Whether the bundles of other trust domains have a place."""
        return _TRUST_DOMAIN in self.bundle


LAYOUTS: Mapping[str, FileLayout] = MappingProxyType(
    {
        "istio": FileLayout("root-cert.pem", chain="cert-chain.pem", key="key.pem"),  # as OUTPUT_CERTS has them
        "kubernetes": FileLayout("ca.crt", chain="tls.crt", key="tls.key"),  # of a Secret of the type kubernetes.io/tls
        "spiffe-helper": FileLayout("svid_bundle.pem", chain="svid.pem", key="svid_key.pem"),
        # the draft "SPIFFE Filesystem Delivery" of 2026, sections 2 and 3
        "spiffe": FileLayout(f"{_TRUST_DOMAIN}.spiffe-trust-bundle.pem", pair="credential-bundle.private-key.pem"),
    }
)
"""By the names of `config.settings.FileLayout`."""


class OutputContents(Struct, frozen=True):
    """Which secrets of the store go into an output: the certificate served as `name`, and the bundles of trust domains
    by their resource names, the agent's own domain first.
    """

    name: str
    bundles: Mapping[str, str]

    def files(self, layout: FileLayout, snapshot: Snapshot) -> dict[str, File]:
        """The files of a set by name; none while the certificate or the own bundle is missing."""
        certificate = snapshot.get(self.name)
        own, *_ = self.bundles.values()
        if not isinstance(certificate, CertificateSecret) or not isinstance(snapshot.get(own), BundleSecret):
            return {}
        files: dict[str, File] = {}
        if layout.chain is not None:
            files[layout.chain] = File(certificate.chain_pem)
        if layout.key is not None:
            files[layout.key] = File(certificate.private_key_pem, private=True)
        if layout.pair is not None:
            files[layout.pair] = File(certificate.private_key_pem + certificate.chain_pem, private=True)
        for trust_domain, name in self.bundles.items():
            bundle = snapshot.get(name)
            if isinstance(bundle, BundleSecret) and (layout.federates or name == own):
                files[layout.bundle.replace(_TRUST_DOMAIN, trust_domain)] = File(bundle.anchors_pem)
        return files
