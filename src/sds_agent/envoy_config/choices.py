"""What an Envoy configuration is to be like: pure values."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct


class SecretFiles(Struct, frozen=True, kw_only=True):
    """The files of a workload's output, and the directory of the files in which Envoy finds their paths."""

    chain: Path
    key: Path
    roots: Path
    resources: Path

    @property
    def certificate_resource(self) -> Path:
        """The file that names the certificate and its key."""
        return self.resources / "certificate.yaml"

    @property
    def roots_resource(self) -> Path:
        """The file that names the roots."""
        return self.resources / "roots.yaml"


class EnvoyChoices(Struct, frozen=True, kw_only=True):
    """What to build: for the workload `name` with `bundle` as the name of its roots, over the agent's `socket`.

    `peers` are the SPIFFE IDs that are accepted; without any, every workload of the trust domain is. With `files` Envoy
    reads the files of an output, and no agent is asked.
    """

    name: str
    spiffe_id: str
    trust_domain: str
    bundle: str
    socket: Path
    peers: Sequence[str] = ()
    delta: bool = False
    files: SecretFiles | None = None
    tls13: bool = False
    post_quantum: bool = False
    no_resumption: bool = False

    @property
    def is_tls13_alone(self) -> bool:
        """Whether TLS 1.2 is refused: the key exchange X25519MLKEM768 is one of TLS 1.3."""
        return self.tls13 or self.post_quantum
