"""What can be seen of issuance and trust at one moment: frozen values for views and tests.

None holds key material. Names from certificates, and what a CA said of a failure, are in printable ASCII and cut.
"""

from datetime import datetime
from typing import Literal

from msgspec import Struct

from sds_agent.authority.protocol import ErrorKind

AttemptStage = Literal["queued", "asking", "waiting"]
"""How far an attempt at a CA is: it waits until others have been answered, or the CA was asked. Where the CA makes keys
and certificates by itself, the attempt is waiting for the next of them, which is no delay.
"""


class CertificateEnd(Struct, frozen=True):
    """A CA's certificate, by its subject and serial, and from when until when it is valid; who issued it, and the kind
    of its public key.
    """

    subject: str
    serial: str
    not_before: datetime
    not_after: datetime
    issuer: str = ""
    key: str = ""


class LeafStatus(Struct, frozen=True):
    """A workload's certificate.

    `not_before` and `not_after` are the leaf's own. Envoys take it from `valid_from` until `valid_until`, the times of
    the whole chain with its trust anchor, and `ends_with` names the certificate that ends first. It is due for renewal
    at `renew_at`, which is None where the CA decides that. One that is `foreign` came from another CA than the workload
    has now, and is renewed at once. `authority` is the name of the one that issued it, and `intermediates` are the CAs
    between it and `anchor`, the trust anchor above it that ends last.
    """

    serial: str
    issued_at: datetime
    not_before: datetime
    not_after: datetime
    valid_from: datetime
    valid_until: datetime
    ends_with: str
    renew_at: datetime | None
    foreign: bool = False
    authority: str = ""
    intermediates: tuple[CertificateEnd, ...] = ()
    anchor: CertificateEnd | None = None
    subject: str = ""
    issuer: str = ""
    key: str = ""

    def valid(self, now: datetime) -> bool:
        """Whether Envoys take it at `now`."""
        return self.valid_from <= now < self.valid_until


class FailureStatus(Struct, frozen=True):
    """The last attempt at the CA failed: why, when, as the how many-th in a row, and when the next one is due.

    `cause` is what the log says, with the CA's own words.
    """

    kind: ErrorKind
    at: datetime
    attempts: int
    next_attempt: datetime
    cause: str = ""


class AuthorityStatus(Struct, frozen=True):
    """One of a workload's several authorities.

    `failure` is that of the last attempt since it issued, with the next attempt as it looks now: an authority before
    the one in use is asked again then, or at the next renewal if that comes sooner.
    """

    name: str
    in_use: bool
    failure: FailureStatus | None = None


class WorkloadStatus(Struct, frozen=True):
    """A workload's certificates, and how the attempts at its CA go.

    `current` was published last and is given to Envoys while it is `served`, which it is until it has ended. Those
    `coming` are accepted and not published yet, the newest last. Those `earlier` were served before and have not ended,
    so that their anchors are still trusted. `attempt` is how far the attempt at the CA is that is under way, if one is;
    `failure` is that of the last one that ended, if it failed. `authority` is the name of the one in use. Of several,
    `authorities` has all in order, and says why it is not the first.
    """

    name: str
    spiffe_id: str
    authority: str
    current: LeafStatus | None = None
    served: bool = False
    coming: tuple[LeafStatus, ...] = ()
    earlier: tuple[LeafStatus, ...] = ()
    attempt: AttemptStage | None = None
    failure: FailureStatus | None = None
    authorities: tuple[AuthorityStatus, ...] = ()

    @property
    def renew_at(self) -> datetime | None:
        """When the next certificate is due, by the age of the newest one; None without any or where the CA decides."""
        newest = self.coming[-1] if self.coming else self.current
        return None if newest is None else newest.renew_at


class AnchorStatus(Struct, frozen=True):
    """A trust anchor in the bundle that Envoys are given.

    `advertised_by` names the authorities that advertise it. Certificates that are in use, or were before the agent
    started, chain to it until `needed_until`; that is the only reason to serve an anchor that no authority advertises.
    """

    subject: str
    serial: str
    not_before: datetime
    not_after: datetime
    advertised_by: tuple[str, ...]
    needed_until: datetime | None
    key: str = ""


class FederatedStatus(Struct, frozen=True):
    """A trust domain that an authority is to give the anchors of, and what is served: the bundle's version (None
    without one) and its anchors.
    """

    trust_domain: str
    authority: str
    version: str | None = None
    anchors: tuple[AnchorStatus, ...] = ()


class LeftOut(Struct, frozen=True):
    """What an authority advertises and is not served, each with the reason."""

    authority: str
    causes: tuple[str, ...]


class TrustStatus(Struct, frozen=True):
    """The trust bundle: its version (None before there is one) and its anchors, in the order they are served in."""

    version: str | None
    anchors: tuple[AnchorStatus, ...]
    left_out: tuple[LeftOut, ...] = ()
