"""The agent's metrics: a scraper has to be able to read them, and no peer may make them grow."""

from datetime import timedelta

import pytest
from fakes import scraped
from fakes.hierarchy import NOW
from fakes.observed import ABOUT, CA, FAILURE, HOUR, LEAF, STREAM, Seen, workload
from fakes.scraped import Series, assert_promtool_accepts, samples
from msgspec import structs
from prometheus_client import ProcessCollector
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics

from sds_agent.admin import exposition
from sds_agent.admin.agent_families import MOST_ANCHORS, MOST_INTERMEDIATES, families
from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance import expiry
from sds_agent.issuance.status import AnchorStatus, AuthorityStatus, FederatedStatus, LeftOut, TrustStatus
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.status import NameStatus, StreamStatus

SCRAPER = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
)


def text(seen: Seen, accept: str = "") -> str:
    return exposition.render(families(seen.moment), accept)[0].decode()


def series(seen: Seen) -> Series:
    """Every series of the agent with its value, as a scraper reads it."""
    return scraped.series(text(seen))


def value(seen: Seen, metric: str, /, **labels: str) -> float | None:
    return scraped.value(series(seen), f"sds_agent_{metric}", **labels)


def certificate(seen: Seen, moment: str, kind: str, subject: str, **labels: str) -> float | None:
    whole = {"workload": "", "trust_domain": "", **labels}
    return value(seen, f"certificate_{moment}_timestamp_seconds", certificate=kind, subject=subject, **whole)


def busy() -> Seen:
    """An agent for which everything has happened once."""
    seen = Seen(workloads=(workload(failure=FAILURE),))
    seen.issuance_counts.succeeded("vault", "issued", timedelta(milliseconds=30))
    seen.issuance_counts.succeeded("vault", "renewed", timedelta(seconds=20))
    seen.issuance_counts.failed("vault", ErrorKind.DENIED)
    seen.issuance_counts.retries.add("vault")
    sds = seen.sds_counts
    for counter in (sds.responses, sds.pushes, sds.acks, sds.nacks):
        counter.add("web", by=2)
    sds.seconds_to_ack.observe(0.002)
    sds.streams.add("StreamSecrets")
    return seen


@pytest.mark.parametrize("seen", [Seen(), busy(), Seen(workloads=(workload(None, served=False),))])
def test_promtool_accepts_every_metric(seen: Seen) -> None:
    assert_promtool_accepts(text(seen))


def test_a_scraper_that_asks_for_open_metrics_gets_it_and_another_gets_the_text_format() -> None:
    body, kind = exposition.render(families(busy().moment), SCRAPER)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    found = open_metrics(body.decode())  # type: ignore[no-untyped-call] # prometheus_client leaves it without types
    assert dict(samples(found)).keys() == series(busy()).keys()
    assert exposition.render(families(busy().moment), "")[1] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("accept", ["text/plain;version=x", "application/openmetrics-text;version=;q", ";=,", "\x00é"])
def test_a_wrong_accept_header_gets_metrics_all_the_same(accept: str) -> None:
    assert "sds_agent_ready 1.0" in text(Seen(), accept)


def test_a_thousand_streams_add_no_series() -> None:
    """Node ids, peers and stream numbers are no labels, and names that clients make up share one."""
    streams = tuple(
        structs.replace(
            STREAM,
            number=number,
            node=f"edge-{number}",
            cluster=f"cluster-{number}",
            peer=f"pid {number} (uid 101)",
            names=(*STREAM.names, NameStatus(f"file-cert:/etc/{number}.pem"), NameStatus(f"spiffe://made.up/{number}")),
        )
        for number in range(1000)
    )
    before, after = series(Seen(streams=())), series(Seen(streams=streams))
    assert after.keys() == before.keys()
    assert value(Seen(streams=streams), "streams", method="StreamSecrets") == 1000
    assert value(Seen(streams=streams), "subscriptions", name=SdsCounts.OTHERS, state="unknown") == 2000
    assert value(Seen(streams=streams), "subscriptions", name="ROOTCA", state="refused") == 1000


def test_what_happens_adds_no_series_either() -> None:
    """Every counter begins at zero: a query sees the first failure as a rise, and not as a new series."""
    assert series(busy()).keys() == series(Seen()).keys()


def anchors(count: int) -> tuple[AnchorStatus, ...]:
    return tuple(
        AnchorStatus(f"'CN={number}'", "1", NOW, NOW + number * HOUR, ("vault",), None) for number in range(count)
    )


def test_a_ca_that_advertises_thousands_of_anchors_adds_a_bounded_number_of_series() -> None:
    """Those that end first have series of their own, and the others are counted."""
    ours, theirs = TrustStatus("v", anchors(2000)), FederatedStatus("other.example", "vault", "v", anchors(3000))
    seen = Seen(trust=ours, federated=(theirs,))
    named = [labels for name, labels in series(seen) if ("certificate", "anchor") in labels and "not_after" in name]
    assert len(named) == 2 * MOST_ANCHORS
    assert certificate(seen, "not_after", "anchor", "'CN=19'", trust_domain="demo.example")
    assert certificate(seen, "not_after", "anchor", "'CN=20'", trust_domain="demo.example") is None
    assert value(seen, "bundle_anchors", trust_domain="demo.example") == 2000
    assert value(seen, "bundle_anchors", trust_domain="other.example") == 3000
    assert len(series(seen)) < 300


def test_a_chain_of_a_hundred_intermediates_adds_a_bounded_number_of_series() -> None:
    chain = tuple(structs.replace(CA, subject=f"'CN={number}'") for number in range(100))
    seen = Seen(workloads=(workload(structs.replace(LEAF, intermediates=chain)),))
    named = [labels for _, labels in series(seen) if ("certificate", "intermediate") in labels]
    assert len(named) == 3 * MOST_INTERMEDIATES


def test_the_ends_of_leaf_intermediate_and_anchor_are_there_by_name() -> None:
    seen = Seen()
    leaf = {"kind": "leaf", "subject": "spiffe://demo.example/web", "workload": "web"}
    ca = {"kind": "intermediate", "subject": "'CN=ca'", "workload": "web"}
    root = {"kind": "anchor", "subject": "'CN=root'", "trust_domain": "demo.example"}
    assert certificate(seen, "not_after", **leaf) == (NOW + HOUR).timestamp()
    assert certificate(seen, "not_after", **ca) == (NOW + 5 * HOUR).timestamp()
    assert certificate(seen, "not_after", **root) == (NOW + HOUR).timestamp()
    assert value(seen, "workload_valid_until_timestamp_seconds", workload="web") == (NOW + HOUR / 2).timestamp()
    assert value(seen, "workload_renewal_timestamp_seconds", workload="web") == (NOW + HOUR / 4).timestamp()
    for each in expiry.watched(seen.workloads, seen.trust):
        labels = {"leaf": leaf, "intermediate": ca, "anchor": root}[each.certificate]
        assert certificate(seen, "warning", **labels) == each.warn_at.timestamp(), "the rules and the log agree"
        assert certificate(seen, "alarm", **labels) == each.alarm_at.timestamp()


def test_an_anchor_that_was_renewed_does_not_alarm() -> None:
    old = AnchorStatus("'CN=root'", "1", NOW, NOW + HOUR, ("vault",), None)
    seen = Seen(trust=TrustStatus("v", (old, structs.replace(old, serial="2", not_after=NOW + 9 * HOUR))))
    assert (
        certificate(seen, "not_after", "anchor", "'CN=root'", trust_domain="demo.example")
        == (NOW + 9 * HOUR).timestamp()
    )


def test_of_two_intermediates_of_one_name_the_first_to_end_counts() -> None:
    """A cross-signed CA, with which the chain ends."""
    chain = (structs.replace(CA, not_after=NOW + 2 * HOUR), CA)
    seen = Seen(workloads=(workload(structs.replace(LEAF, intermediates=chain)),))
    end = (NOW + 2 * HOUR).timestamp()
    assert certificate(seen, "not_after", "intermediate", "'CN=ca'", workload="web") == end
    warn = certificate(seen, "warning", "intermediate", "'CN=ca'", workload="web")
    assert warn is not None
    assert warn < end


def test_a_workload_that_fails_shows_how_often_and_by_which_authority_it_is_served() -> None:
    authorities = (AuthorityStatus("vault", in_use=False, failure=FAILURE), AuthorityStatus("local", in_use=True))
    seen = Seen(workloads=(workload(failure=FAILURE, authorities=authorities),), lacking=("web: expired",))
    assert value(seen, "workload_consecutive_failures", workload="web") == 3
    assert value(seen, "workload_authority_in_use", workload="web", authority="vault", rank="1") == 0
    assert value(seen, "workload_authority_in_use", workload="web", authority="local", rank="2") == 1
    assert (value(seen, "ready"), value(Seen(), "ready")) == (0, 1)
    assert value(Seen(workloads=(workload(None, served=False),)), "workload_served", workload="web") == 0


def test_what_was_counted_is_what_a_scraper_reads() -> None:
    seen = busy()
    for result, count in {"issued": 1, "renewed": 1, "denied": 1, "transient": 0}.items():
        assert value(seen, "issuance_attempts_total", authority="vault", result=result) == count
    assert value(seen, "issuance_retries_total", authority="vault") == 1
    took = {bound: value(seen, "issuance_duration_seconds_bucket", authority="vault", le=bound) for bound in BOUNDS}
    assert took == {"0.025": 0, "0.05": 1, "10.0": 1, "+Inf": 2}
    assert value(seen, "issuance_duration_seconds_count", authority="vault") == 2
    assert value(seen, "issuance_duration_seconds_sum", authority="vault") == 20.03
    for name in ("responses", "pushes", "acks", "nacks"):
        assert value(seen, f"{name}_total", name="web") == 2
        assert value(seen, f"{name}_total", name="ROOTCA") == 0
    assert value(seen, "ack_duration_seconds_bucket", le="0.0025") == 1
    assert value(seen, "streams_opened_total", method="StreamSecrets") == 1


BOUNDS = ("0.025", "0.05", "10.0", "+Inf")


def test_what_an_authority_advertises_in_vain_is_counted() -> None:
    trust = TrustStatus("v", (), (LeftOut("vault", ("too short a key", "expired")),))
    assert value(Seen(trust=trust), "bundle_left_out", authority="vault") == 2
    assert value(Seen(trust=trust), "bundle_left_out", authority="local") == 0


def test_the_process_and_the_build_are_described() -> None:
    found = series(Seen())
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= {
        name for name, _ in found
    }
    (labels,) = [dict(labels) for name, labels in found if name == "sds_agent_build_info"]
    assert labels["version"] == ABOUT.version
    assert value(Seen(), "start_time_seconds") == ABOUT.started_at.timestamp()


def test_the_start_of_the_process_follows_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel moves the time of the boot then, and prometheus_client adds the process's own to it."""

    def start(boot: float) -> float:
        monkeypatch.setattr(ProcessCollector, "_boot_time", lambda _: boot)
        return series(Seen())["process_start_time_seconds", ()]

    assert start(2e9) - start(1e9) == pytest.approx(1e9)


def test_a_fetch_that_waits_is_counted_by_its_method() -> None:
    fetch: StreamStatus = structs.replace(STREAM, method="FetchSecrets", names=(NameStatus("web"),))
    seen = Seen(streams=(STREAM, fetch))
    assert value(seen, "streams", method="FetchSecrets") == 1
    assert value(seen, "subscriptions", name="web", state="behind") == 1
