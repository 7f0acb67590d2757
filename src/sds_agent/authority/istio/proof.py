"""What the client of an Istio CA shows of itself beside a token: a provisioned or the current certificate."""

from datetime import datetime
from pathlib import Path

from sds_agent.authority.credentials import is_valid, leaf_of, read_pair
from sds_agent.authority.istio.wire import names_a_workload
from sds_agent.authority.protocol import CurrentIdentity
from sds_agent.pki.certificates import subject_alternative_uris


def read_provisioned(directory: Path) -> CurrentIdentity:
    """The pair `cert-chain.pem` and `key.pem`, as Istio's PROV_CERT has it. Raises AuthorityError UNAUTHENTICATED."""
    return read_pair(directory / "cert-chain.pem", directory / "key.pem", "the provisioned certificate")


def can_speak(identity: CurrentIdentity, now: datetime) -> bool:
    """Whether a CA can accept this certificate: it names a workload and is valid at `now`.

    With any other the whole connection fails, and the failure looks as if no server listened.
    """
    leaf = leaf_of(identity)
    return leaf is not None and is_valid(identity, now) and names_a_workload(subject_alternative_uris(leaf))
