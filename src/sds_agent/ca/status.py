"""What can be seen of a running CA server at one moment, as frozen values: pure, with the time as an argument.

None holds key material, nor the name of a caller: these are in the audit log.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Literal

from cryptography import x509
from msgspec import Struct

from sds_agent.ca.counts import ISSUED, CaCounts
from sds_agent.pki.certificates import describe, describe_time, serial_hex
from sds_agent.pki.ending import near_end_of_ca
from sds_agent.pki.keys import describe_key
from sds_agent.signing.signer import SHORTEST_LIFE, SignerError
from sds_agent.signing.signing_set import SigningSet

FORMAT = 1
"""The version of this model, as the agent's status has one."""

Part = Literal["signer", "intermediate", "root"]


class SigningCertificate(Struct, frozen=True, kw_only=True):
    """A certificate that leaves are issued below, what it is for them, and from when on its end is near: as a warning
    at `warn_at`, as an error at `alarm_at`. These are None of a root that another one of its name outlives.
    """

    part: Part
    subject: str
    serial: str
    key: str
    not_before: datetime
    not_after: datetime
    warn_at: datetime | None
    alarm_at: datetime | None


class AuditStatus(Struct, frozen=True, kw_only=True):
    """Refusals that the audit log has not counted yet, and since when."""

    left_out: int = 0
    since: datetime | None = None


class CaCountsStatus(Struct, frozen=True, kw_only=True):
    """What happened since the start: certificates, refusals by their reason, lines that the audit log did not take, and
    worker processes that ended.
    """

    issued: int
    refused: Mapping[str, int]
    audit_lines_failed: int
    workers_ended: int


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """A process that answers calls for the server."""

    worker: int
    pid: int
    started_at: datetime
    connections: int
    in_work: int


class CaStatus(Struct, frozen=True, kw_only=True):
    """A running CA server at the time `at`. It is `ready` while it can sign; `lacks` says what keeps it from that.

    `signing` begins with the signer. `connections` are open, `in_work` are requests that are being answered.
    `workers` are those that are ready; there are none where the server itself answers.
    """

    format: int = FORMAT
    at: datetime
    version: str
    pid: int
    started_at: datetime
    uptime_seconds: float
    trust_domain: str
    address: str
    ready: bool
    lacks: tuple[str, ...]
    signing: tuple[SigningCertificate, ...]
    audit: AuditStatus
    connections: int
    in_work: int
    counts: CaCountsStatus
    workers: tuple[WorkerStatus, ...] = ()


def lacks(signing: SigningSet, now: datetime) -> tuple[str, ...]:
    """What keeps the CA from issuing certificates at `now` that are of use, in words; empty if nothing does."""
    return tuple(_lacks(signing, now))


def _lacks(signing: SigningSet, now: datetime) -> Iterator[str]:
    try:
        signing.signer.validity(now, SHORTEST_LIFE)
    except SignerError as error:
        yield str(error)
    for each in signing.intermediates:
        if each != signing.signer.certificate and now >= (end := each.not_valid_after_utc):
            yield f"the CA {describe(each)} above the signer expired on {describe_time(end)}: renew it"
    if all(now >= root.not_valid_after_utc for root in signing.roots):
        yield "every root has expired: put the new one in"


def certificates(signing: SigningSet) -> tuple[SigningCertificate, ...]:
    """The signer, the CAs above it, and the roots that callers are given."""
    signer = signing.signer.certificate
    ends = _last_ends(signing.roots)
    return (
        _certificate("signer", signer),
        *(_certificate("intermediate", each) for each in signing.intermediates if each != signer),
        *(
            _certificate("root", each, renewed=each.not_valid_after_utc < ends[each.subject])
            for each in signing.roots
            if each != signer
        ),
    )


def _last_ends(roots: Iterable[x509.Certificate]) -> Mapping[x509.Name, datetime]:
    """The last end of the roots of each name."""
    ends = dict[x509.Name, datetime]()
    for each in roots:
        ends[each.subject] = max(each.not_valid_after_utc, ends.get(each.subject, each.not_valid_after_utc))
    return ends


def _certificate(part: Part, found: x509.Certificate, *, renewed: bool = False) -> SigningCertificate:
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    warn_at, alarm_at = (None, None) if renewed else near_end_of_ca(begin, end)
    return SigningCertificate(
        part=part,
        subject=describe(found),
        serial=serial_hex(found),
        key=describe_key(found.public_key()),
        not_before=begin,
        not_after=end,
        warn_at=warn_at,
        alarm_at=alarm_at,
    )


def counted(counts: CaCounts) -> CaCountsStatus:
    """The sums over all proofs."""
    results = dict[str, int]()
    for (result, _), count in counts.requests.counts.items():
        results[result] = results.get(result, 0) + count
    return CaCountsStatus(
        issued=results.pop(ISSUED, 0),
        refused=results,
        audit_lines_failed=sum(counts.unwritten.counts.values()),
        workers_ended=sum(counts.workers_ended.counts.values()),
    )
