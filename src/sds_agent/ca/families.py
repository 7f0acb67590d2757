"""The CA server's metrics: pure, made of its status and its counts. No caller's name is a label: the audit log has
them.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from sds_agent.admin.families import Family, counted, distributed, gauge, info, logged, moments
from sds_agent.ca.callers import Proof
from sds_agent.ca.counts import ISSUED, UNPROVEN, CaCounts
from sds_agent.ca.refusal import Reason
from sds_agent.ca.status import AuditStatus, CaStatus, SigningCertificate

MOST_CERTIFICATES = 30
"""Certificates with series of their own, the signer first and then those that end first."""
RESULTS = (ISSUED, *(reason.value for reason in Reason))
PROOFS = (UNPROVEN, *(proof.value for proof in Proof))
LABELS = ("certificate", "subject", "serial")


def families(status: CaStatus, counts: CaCounts, log_counts: Mapping[str, int]) -> Sequence[Family]:
    """All of them. `log_counts` are the events that were logged, by level."""
    return (
        *_server(status),
        logged("sds_agent_ca_log_events_total", log_counts),
        *_workers(status, counts),
        *_requests(counts),
        *_certificates(status.signing),
        *_audit(status.audit, counts, status.at),
    )


def _server(status: CaStatus) -> Iterator[Family]:
    facts = {"version": status.version, "python": platform.python_version(), "trust_domain": status.trust_domain}
    yield info("sds_agent_ca_build_info", "The server's version, that of its Python, and its trust domain.", facts)
    yield gauge("sds_agent_ca_start_time_seconds", "When the server started.", status.started_at.timestamp())
    yield gauge("sds_agent_ca_ready", "Whether the CA can sign (1) or not (0).", float(status.ready))
    yield gauge("sds_agent_ca_connections", "Connections that are open.", float(status.connections))
    yield gauge("sds_agent_ca_requests_in_work", "Requests that are being answered.", float(status.in_work))


def _workers(status: CaStatus, counts: CaCounts) -> Iterator[Family]:
    yield gauge(
        "sds_agent_ca_workers",
        "Worker processes that answer calls; 0 where the server itself does.",
        float(len(status.workers)),
    )
    yield counted(
        "sds_agent_ca_workers_ended_total",
        "Worker processes that ended while the server was to serve.",
        counts.workers_ended,
        [()],
    )


def _requests(counts: CaCounts) -> Iterator[Family]:
    yield counted(
        "sds_agent_ca_requests_total",
        "Requests that were answered: with a certificate (issued) or with a refusal, by its reason; and by what proved "
        "the caller.",
        counts.requests,
        [(result, proof) for result in RESULTS for proof in PROOFS if (result, proof) != (ISSUED, UNPROVEN)],
    )
    yield distributed("sds_agent_ca_issue_duration_seconds", "From the call to the certificate.", counts.seconds, [()])


def _certificates(signing: Sequence[SigningCertificate]) -> Iterator[Family]:
    signer, *others = signing
    shown = (signer, *sorted(others, key=lambda each: each.not_after)[: MOST_CERTIFICATES - 1])

    def of(moment: Callable[[SigningCertificate], datetime | None]) -> dict[tuple[str, ...], datetime | None]:
        return {(each.part, each.subject, each.serial): moment(each) for each in shown}

    yield moments(
        "sds_agent_ca_certificate_not_after_timestamp_seconds",
        "When the signer, a CA above it or a root ends.",
        of(lambda each: each.not_after),
        LABELS,
    )
    yield moments(
        "sds_agent_ca_certificate_warning_timestamp_seconds",
        "From when on that end is near. Absent for a root that another one of its name outlives.",
        of(lambda each: each.warn_at),
        LABELS,
    )
    yield moments(
        "sds_agent_ca_certificate_alarm_timestamp_seconds",
        "From when on it is so near that it is an error.",
        of(lambda each: each.alarm_at),
        LABELS,
    )


def _audit(audit: AuditStatus, counts: CaCounts, now: datetime) -> Iterator[Family]:
    behind = 0.0 if audit.since is None else max((now - audit.since).total_seconds(), 0.0)
    yield gauge(
        "sds_agent_ca_audit_left_out_lines",
        "Refusals without a line in the audit log that the log has not counted yet.",
        float(audit.left_out),
    )
    yield gauge("sds_agent_ca_audit_lag_seconds", "For how long the first of them has been left out.", behind)
    yield counted("sds_agent_ca_audit_failures_total", "Lines that the audit log did not take.", counts.unwritten, [()])
