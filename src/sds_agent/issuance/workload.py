"""A workload as configured, and a certificate that was accepted for it."""

from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct

from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted
from sds_agent.issuance.schedule import Renewal
from sds_agent.pki.certificates import serial_hex, write_pem
from sds_agent.pki.keys import KeyType, PrivateKey, to_pkcs8_pem
from sds_agent.secrets.model import CertificateSecret
from sds_agent.values import Sensitive

Origin = Literal["issued", "renewed", "restored"]
"""How a certificate came: the first from the CA, a later one, or from the cache that an earlier process wrote."""


class Workload(Struct, frozen=True):
    """An identity that the agent keeps a certificate for.

    `names` are the resource names under which it is served; `authority` and `kind` are the name and the kind of its CA.
    """

    name: str
    identity: SpiffeId
    key_type: KeyType
    ttl: timedelta
    authority: str
    names: tuple[str, ...]
    kind: str = ""
    renewal: Renewal = Renewal()

    @property
    def ca(self) -> str:
        """Its CA, as a cached certificate names it."""
        return f"{self.kind} {self.authority}"


class Certificate(Sensitive, frozen=True):
    """An accepted certificate: what the CA sent, what is served of it, and how and when it came.

    The CA was asked for it at `asked_at` and answered at `issued_at`. One that is `foreign` came from another CA than
    the workload has now.
    """

    origin: Origin
    accepted: Accepted
    secret: CertificateSecret
    asked_at: datetime
    issued_at: datetime
    foreign: bool = False

    @property
    def serial(self) -> str:
        """The leaf's serial number in hexadecimal."""
        return serial_hex(self.accepted.leaf)


def secret_of(accepted: Accepted, key: PrivateKey) -> CertificateSecret:
    """What is served of an accepted answer, with its key."""
    return CertificateSecret(write_pem(accepted.chain), to_pkcs8_pem(key), accepted.not_after)
