"""What an operator sees of a running CA server: over real HTTP, after real requests."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from fakes.ca_servers import TRUST_DOMAIN, WEB, Served, Shifted, fresh, plug, served
from fakes.clocks import HandClock
from fakes.hierarchy import NOW, make_ca
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.scraped import Series, assert_promtool_accepts, series, value

from sds_agent.admin.exposition import render
from sds_agent.ca.audit import AuditLog, Entry
from sds_agent.ca.callers import Proof
from sds_agent.ca.counts import CaCounts
from sds_agent.ca.families import MOST_CERTIFICATES, families
from sds_agent.ca.observed import RunningCa
from sds_agent.ca.status import certificates, lacks
from sds_agent.clock import SET, Beginning
from sds_agent.pki.certificates import serial_hex
from sds_agent.signing.signer import Signer, make_root
from sds_agent.signing.signing_set import SigningSet

DAY = timedelta(days=1)
ADMIN = "admin: {socket: admin.sock}"


@asynccontextmanager
async def asking(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(folder / "admin.sock"))
    async with httpx.AsyncClient(base_url="http://localhost", transport=transport, timeout=30) as client:
        yield client


@contextmanager
def turned_away() -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError):
        yield


async def requests(ca: Served) -> None:
    """A certificate by each proof, and a refusal of some kinds."""
    first = await ca.ask(ca.issuer.token())
    await ca.ask(identity=first)
    await ca.ask(ca.join_token())
    with turned_away():
        await ca.ask()
    with turned_away():
        await ca.ask(ca.issuer.token(), csr="not a request")


async def scrape(ca: Served) -> tuple[dict[str, Any], str]:
    async with asking(ca.directory) as client:
        return (await client.get("/status")).json(), (await client.get("/metrics")).text


def count(found: Series, result: str, proof: str) -> float | None:
    return value(found, "sds_agent_ca_requests_total", result=result, proof=proof)


async def test_what_was_issued_and_refused_is_counted_by_reason_and_proof_and_nobody_is_named(tmp_path: Path) -> None:
    async with served(tmp_path, more=ADMIN) as ca:
        before = series((await scrape(ca))[1])
        await requests(ca)
        status, text = await scrape(ca)
        found = series(text)
    for result, proof in (
        ("issued", "jwt"),
        ("issued", "certificate"),
        ("issued", "join-token"),
        ("unauthenticated", "none"),
        ("invalid", "jwt"),
    ):
        assert (count(before, result, proof), count(found, result, proof)) == (0, 1), (result, proof)
    assert found.keys() == before.keys(), "a rate needs a value before the first request"
    assert value(found, "sds_agent_ca_issue_duration_seconds_count") == 3
    assert status["counts"] == {
        "issued": 3,
        "refused": {"unauthenticated": 1, "invalid": 1},
        "audit_lines_failed": 0,
        "workers_ended": 0,
    }
    assert WEB not in text + json.dumps(status), "callers are named in the audit log alone"
    assert "PRIVATE KEY" not in text + json.dumps(status)
    assert_promtool_accepts(text)


async def test_a_clock_that_is_set_back_moves_the_start_of_a_server_and_not_how_long_it_has_run(tmp_path: Path) -> None:
    """As at a boot, when the right time comes by the network."""
    clock = Shifted()
    async with served(tmp_path, more=ADMIN, clock=clock) as ca:
        clock.ahead = -DAY
        status, text = await scrape(ca)
    assert 0 <= status["uptime_seconds"] < DAY.total_seconds()
    began, at = datetime.fromisoformat(status["started_at"]), datetime.fromisoformat(status["at"])
    assert abs((at - began).total_seconds() - status["uptime_seconds"]) < SET.total_seconds()
    assert value(series(text), "sds_agent_ca_start_time_seconds") == pytest.approx(began.timestamp())


async def test_the_signer_with_the_cas_above_it_is_shown_with_their_ends(tmp_path: Path) -> None:
    root = fresh("root")
    middle = fresh("middle", root)
    signer = fresh("signer", middle)
    plug(tmp_path / "ca", signer, [middle], [root])
    async with served(tmp_path, signer="{cacerts: ca}", more=ADMIN, roots=b"") as ca:
        status, text = await scrape(ca)
    assert [(each["part"], each["subject"]) for each in status["signing"]] == [
        ("signer", "'CN=signer'"),
        ("intermediate", "'CN=middle'"),
        ("root", "'CN=root'"),
    ]
    end = signer.certificate.not_valid_after_utc
    labels = {"certificate": "signer", "subject": "'CN=signer'", "serial": serial_hex(signer.certificate)}
    found = series(text)
    assert value(found, "sds_agent_ca_certificate_not_after_timestamp_seconds", **labels) == end.timestamp()
    warning = value(found, "sds_agent_ca_certificate_warning_timestamp_seconds", **labels)
    assert warning == (end - timedelta(days=10.1)).timestamp(), "a tenth of 101 days"


async def test_a_ca_is_ready_while_it_can_sign_and_says_why_it_cannot(tmp_path: Path) -> None:
    clock = Shifted()
    root = fresh("root")
    plug(tmp_path / "ca", root, [], [root])
    started = served(tmp_path, more=ADMIN, clock=clock, signer="{cacerts: ca}", roots=b"")
    async with started as ca, asking(ca.directory) as client:
        assert ((await client.get("/readyz")).status_code, (await client.get("/livez")).text) == (200, "live\n")
        clock.ahead = 200 * DAY
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "'CN=root' expired on" in answer.text
        assert value(series((await client.get("/metrics")).text), "sds_agent_ca_ready") == 0
        nowhere = await client.get("/events")
        assert (nowhere.status_code, nowhere.text) == (404, "there are: /livez /readyz /status /metrics\n")
        assert (await client.post("/status")).status_code == 405


async def test_a_ca_without_an_admin_section_listens_nowhere_else(tmp_path: Path) -> None:
    async with served(tmp_path) as ca:
        assert not list(ca.directory.glob("*.sock"))


def signing_set(roots: int = 1, *, days: int = 100) -> SigningSet:
    root = make_root(fresh("x").key, TRUST_DOMAIN, NOW - DAY, days * DAY)  # type: ignore[arg-type] # an EC key
    others = [make_ca(f"root {n}", not_before=NOW - DAY, not_after=NOW + n * DAY) for n in range(1, roots)]
    return SigningSet(root, (), (root.certificate, *(each.certificate for each in others)))


def test_a_signer_that_is_not_valid_yet_or_no_more_and_a_ca_above_it_that_expired_cannot_sign() -> None:
    root = make_ca("root", not_before=NOW - DAY, not_after=NOW + 9 * DAY)
    middle = make_ca("middle", root, not_before=NOW - DAY, not_after=NOW + DAY)
    signer = make_ca("signer", middle, not_before=NOW, not_after=NOW + 5 * DAY)
    found = SigningSet(
        Signer(signer.certificate, signer.key),  # type: ignore[arg-type] # an EC key
        (signer.certificate, middle.certificate),
        (root.certificate,),
    )
    assert lacks(found, NOW) == ()
    assert "valid only from" in lacks(found, NOW - DAY / 2)[0]
    (above,) = lacks(found, NOW + DAY)
    assert "'CN=middle' above the signer expired on 2026-03-15" in above
    assert len(lacks(found, NOW + 10 * DAY)) == 3


def test_a_root_that_was_renewed_does_not_alarm() -> None:
    old, new = (make_ca("root", not_before=NOW - DAY, not_after=NOW + days * DAY) for days in (5, 500))
    signer = make_ca("signer", new)
    found = certificates(
        SigningSet(Signer(signer.certificate, signer.key), (), (old.certificate, new.certificate))  # type: ignore[arg-type]
    )
    assert [each.alarm_at is None for each in found] == [False, True, False]


class Part:
    """A stand-in for the CA server's parts, of which the views see these values."""

    in_work = 2
    connections = 7
    counts = CaCounts()


def running(signing: SigningSet, audit: AuditLog) -> RunningCa:
    part = Part()
    return RunningCa(
        beginning=Beginning(HandClock()),
        trust_domain=TRUST_DOMAIN,
        address="127.0.0.1:1",
        current=lambda: signing,
        ledger=part,
        audit=audit,
        acceptor=part,
    )


def metrics(ca: RunningCa, now: datetime) -> Series:
    return series(render(families(ca.status(now), ca.ledger.counts, {}), "")[0].decode())


def test_thousands_of_roots_add_a_bounded_number_of_series(tmp_path: Path) -> None:
    ca = running(signing_set(roots=200), AuditLog(tmp_path / "audit.log"))
    found = [name for name, _ in metrics(ca, NOW) if name.startswith("sds_agent_ca_certificate_not_after")]
    assert len(found) == MOST_CERTIFICATES
    assert (ca.status(NOW).connections, ca.status(NOW).in_work) == (7, 2)


def test_refusals_that_the_audit_log_leaves_out_show_as_its_lag(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    ca = running(signing_set(), audit)
    for _ in range(40):
        audit.refuse(Entry(outcome="unauthenticated", address="192.0.2.7:1", reason="no proof"), NOW)
    later = metrics(ca, NOW + timedelta(seconds=90))
    assert value(later, "sds_agent_ca_audit_left_out_lines") == 10
    assert value(later, "sds_agent_ca_audit_lag_seconds") == 90
    audit.settle(NOW + timedelta(seconds=90))
    assert value(metrics(ca, NOW + timedelta(seconds=91)), "sds_agent_ca_audit_lag_seconds") == 0


async def test_an_audit_log_that_takes_no_lines_is_counted(tmp_path: Path) -> None:
    async with served(tmp_path, more=ADMIN) as ca:
        (tmp_path / "audit.log").unlink()
        (tmp_path / "audit.log").mkdir()
        with turned_away():
            await ca.ask(ca.issuer.token())
        status, text = await scrape(ca)
    assert status["counts"]["issued"] == 0
    assert status["counts"]["refused"] == {"internal": 1}
    assert value(series(text), "sds_agent_ca_audit_failures_total") == 2, "of the certificate, and of its refusal"


def test_a_refusal_counts_by_the_proof_that_its_caller_brought() -> None:
    counts = CaCounts()
    counts.refused("denied", Proof.CERTIFICATE)
    counts.refused("denied", None)
    assert counts.requests.counts == {("denied", "certificate"): 1, ("denied", "none"): 1}
