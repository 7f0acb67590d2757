"""A running agent's statuses, given: what its views make of them needs no agent."""

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType

import msgspec
from fakes.hierarchy import NOW
from msgspec import Struct

from sds_agent.admin.moment import Moment, moment
from sds_agent.admin.observed import About
from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.status import (
    AnchorStatus,
    AuthorityStatus,
    CertificateEnd,
    FailureStatus,
    FederatedStatus,
    LeafStatus,
    TrustStatus,
    WorkloadStatus,
)
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.departed import DepartedStream
from sds_agent.sds.status import Nack, NameStatus, StreamStatus

HOUR = timedelta(hours=1)
ABOUT = About(
    version="0.1",
    pid=os.getpid(),
    started_at=NOW - HOUR,
    uptime_seconds=3600,
    trust_domain="demo.example",
    socket="/run/sds-agent/sds.sock",
    names={"web": ("web", "spiffe://demo.example/web")},
    kinds={"vault": "vault", "local": "embedded"},
    bundle_names=("ROOTCA", "spiffe://demo.example"),
)
ROOT = CertificateEnd("'CN=root'", "1", NOW - HOUR, NOW + 9 * HOUR, "'CN=root'", "EC secp384r1")
CA = CertificateEnd("'CN=ca'", "2", NOW - HOUR, NOW + 5 * HOUR, "'CN=root'", "EC secp256r1")
LEAF = LeafStatus(
    serial="4f",
    issued_at=NOW,
    not_before=NOW - HOUR / 60,
    not_after=NOW + HOUR,
    valid_from=NOW,
    valid_until=NOW + HOUR / 2,
    ends_with="'CN=root'",
    renew_at=NOW + HOUR / 4,
    authority="vault",
    intermediates=(CA,),
    anchor=ROOT,
    subject="'spiffe://demo.example/web'",
    issuer="'CN=ca'",
    key="EC secp256r1",
)
FAILURE = FailureStatus(ErrorKind.DENIED, NOW, 3, NOW + HOUR, "the role does not allow it")
STREAM = StreamStatus(
    number=7,
    method="StreamSecrets",
    node="edge-1",
    cluster="edge",
    peer="pid 9 (uid 101)",
    names=(NameStatus("web", "v1", "v1"), NameStatus("ROOTCA", "v2", None, Nack("v2", "Invalid path"))),
    connected_at=NOW - HOUR,
    responded_at=NOW,
    ack_ms=1.5,
    version="1.40.0",
)


def workload(
    current: LeafStatus | None = LEAF,
    *,
    served: bool = True,
    coming: tuple[LeafStatus, ...] = (),
    failure: FailureStatus | None = None,
    authorities: tuple[AuthorityStatus, ...] = (),
) -> WorkloadStatus:
    return WorkloadStatus(
        "web",
        "spiffe://demo.example/web",
        "vault",
        current,
        served=served,
        coming=coming,
        failure=failure,
        authorities=authorities,
    )


class Seen(Struct, frozen=True):
    """A running agent's statuses, given."""

    workloads: tuple[WorkloadStatus, ...] = (workload(),)
    trust: TrustStatus = TrustStatus("v2", (AnchorStatus("'CN=root'", "1", NOW, NOW + HOUR, ("vault",), None, "k"),))
    federated: tuple[FederatedStatus, ...] = (FederatedStatus("other.example", "spire"),)
    streams: tuple[StreamStatus, ...] = (STREAM,)
    departed: tuple[DepartedStream, ...] = ()
    about: About = ABOUT
    issuance_counts: IssuanceCounts = msgspec.field(default_factory=IssuanceCounts)
    sds_counts: SdsCounts = msgspec.field(default_factory=SdsCounts)
    lacking: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    log_counts: Mapping[str, int] = MappingProxyType({"info": 3, "error": 1})

    def each_workload(self) -> Iterator[WorkloadStatus]:
        return iter(self.workloads)

    @property
    def versions(self) -> Mapping[str, str | None]:
        return {
            "web": "v1",
            "spiffe://demo.example/web": "v1",
            "ROOTCA": "v2",
            "spiffe://demo.example": "v2",
        } | dict.fromkeys(self.waiting)

    def lacks(self, _now: object) -> tuple[str, ...]:
        return self.lacking

    @property
    def moment(self) -> Moment:
        return moment(self, NOW, self.workloads)
