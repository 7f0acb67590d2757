"""The status model: what an operator reads at night has to follow from the statuses, field by field."""

import msgspec
import pytest
from fakes.hierarchy import NOW
from fakes.observed import ABOUT, FAILURE, HOUR, LEAF, Seen, workload

from sds_agent.admin.model import AnchorView, IdentityView, Status, SubscriptionView
from sds_agent.admin.view import anchor, delivery, identity, status, subscription
from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.status import AnchorStatus, AuthorityStatus, LeftOut, TrustStatus, WorkloadStatus
from sds_agent.sds.status import Nack, NameStatus


def test_every_part_of_the_agent_is_in_the_status() -> None:
    found = status(Seen(), NOW)
    assert (found.at, found.agent.uptime_seconds, found.agent.ready) == (NOW, 3600, True)
    assert [each.name for each in found.identities] == ["web"]
    assert [(each.trust_domain, each.federated, each.version) for each in found.bundles] == [
        ("demo.example", False, "v2"),
        ("other.example", True, None),
    ]
    (subscriber,) = found.subscribers
    assert (subscriber.stream, subscriber.node, subscriber.version, subscriber.ack_ms) == (7, "edge-1", "1.40.0", 1.5)
    assert [each.state for each in subscriber.subscriptions] == ["current", "refused"]


def test_an_agent_that_lacks_a_certificate_is_not_ready_and_says_which() -> None:
    found = status(Seen(lacking=("web: not issued yet",)), NOW).agent
    assert (found.ready, found.lacks) == (False, ("web: not issued yet",))


def test_its_json_reads_back_as_the_same_status() -> None:
    found = status(Seen(workloads=(workload(failure=FAILURE, coming=(LEAF,)), workload(None, served=False))), NOW)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Status) == found


def test_what_is_counted_is_summed_over_names_and_authorities() -> None:
    seen = Seen()
    seen.issuance_counts.succeeded("vault", "issued", HOUR / 3600)
    seen.issuance_counts.succeeded("local", "renewed", None)
    seen.issuance_counts.failed("vault", ErrorKind.DENIED)
    for counter, by in ((seen.sds_counts.responses, 5), (seen.sds_counts.pushes, 4), (seen.sds_counts.acks, 3)):
        counter.add("web", by=by)
    seen.sds_counts.nacks.add("ROOTCA", by=2)
    counts = status(seen, NOW).agent.counts
    assert (counts.issued, counts.failed) == (2, 1)
    assert (counts.responses, counts.pushes, counts.acks, counts.nacks) == (5, 4, 3, 2)


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (workload(), "serving"),
        (workload(None, served=False), "pending"),
        (workload(None, served=False, coming=(LEAF,)), "pending"),
        (workload(served=False), "expired"),
    ],
)
def test_the_state_of_an_identity_is_what_envoys_are_given(given: WorkloadStatus, state: str) -> None:
    assert identity(given, ABOUT).state == state


def test_an_identity_shows_its_chain_up_to_the_anchor_with_every_end() -> None:
    found = identity(workload(), ABOUT).current
    assert found is not None
    assert found.anchor is not None
    assert [(each.subject, each.issuer, each.not_after) for each in (*found.chain, found.anchor)] == [
        ("'spiffe://demo.example/web'", "'CN=ca'", NOW + HOUR),
        ("'CN=ca'", "'CN=root'", NOW + 5 * HOUR),
        ("'CN=root'", "'CN=root'", NOW + 9 * HOUR),
    ]
    assert (found.valid_until, found.ends_with) == (NOW + HOUR / 2, "'CN=root'")


def names(view: IdentityView) -> list[tuple[str, str, bool, bool]]:
    return [(each.name, each.kind, each.in_use, each.failure is not None) for each in view.authorities]


def test_the_one_authority_of_a_workload_has_its_failure() -> None:
    assert names(identity(workload(failure=FAILURE), ABOUT)) == [("vault", "vault", True, True)]


def test_several_authorities_are_shown_in_order_with_the_one_in_use() -> None:
    several = (
        AuthorityStatus("vault", in_use=False, failure=FAILURE),
        AuthorityStatus("local", in_use=True, failure=None),
    )
    assert names(identity(workload(authorities=several), ABOUT)) == [
        ("vault", "vault", False, True),
        ("local", "embedded", True, False),
    ]


def why(*advertised_by: str, needed: bool = False) -> str:
    until = NOW + HOUR if needed else None
    view: AnchorView = anchor(AnchorStatus("'CN=root'", "1", NOW, NOW + HOUR, advertised_by, until))
    return view.why


def test_an_anchor_says_why_it_is_still_trusted() -> None:
    until = f"certificates chain to it until {NOW + HOUR:%Y-%m-%d %H:%M:%S UTC}"
    assert why("vault") == "vault advertises it"
    assert why("vault", "local") == "vault and local advertise it"
    assert why("vault", "local", "mesh") == "vault, local, mesh advertise it"
    assert why("vault", needed=True) == f"vault advertises it; {until}"
    assert why(needed=True) == until


def test_what_is_advertised_and_not_served_is_named() -> None:
    trust = TrustStatus("v2", (), (LeftOut("vault", ("it has ended",)),))
    (left_out,) = status(Seen(trust=trust, federated=()), NOW).bundles[0].left_out
    assert (left_out.authority, left_out.causes) == ("vault", ("it has ended",))


REFUSED = Nack("v2", "Invalid path")


@pytest.mark.parametrize(
    ("name", "state"),
    [
        (NameStatus("a", "v2", "v2"), "current"),
        (NameStatus("a", "v2", "v1"), "behind"),
        (NameStatus("a", "v1", "v1"), "behind"),  # the push is on its way
        (NameStatus("a", None, "v1"), "behind"),
        (NameStatus("a", "v2", "v1", REFUSED), "refused"),
        (NameStatus("a", "v2", None, REFUSED), "refused"),
        (NameStatus("a", "v1", None, Nack("v1", "of an earlier one")), "behind"),
        (NameStatus("pending"), "waiting"),
        (NameStatus("pending", "v1", "v1"), "waiting"),  # withheld later: what it has is no longer good
        (NameStatus("nowhere"), "unknown"),
        (NameStatus("file-root:/etc/roots.pem"), "unknown"),
        (NameStatus("file-root:/etc/roots.pem", waits=True), "waiting"),
        (NameStatus("file-root:/etc/roots.pem", "v9", "v9", waits=True), "waiting"),
        (NameStatus("a", denied=True), "denied"),
        (NameStatus("a", "", "", denied=True), "denied"),  # over Delta, which says so
        (NameStatus("a", "v2", "v2", denied=True), "denied"),  # what it has is from before
        (NameStatus("pending", denied=True), "denied"),
        (NameStatus("file-root:/etc/roots.pem", "v9", "v9"), "current"),
        (NameStatus("file-root:/etc/roots.pem", "v9"), "behind"),
        (NameStatus("file-root:/etc/roots.pem", "v3", "v1", REFUSED), "behind"),
        (NameStatus("file-root:/etc/roots.pem", "v2", "v1", REFUSED), "refused"),
        (NameStatus("file-root:/etc/roots.pem", "v1", "v1", REFUSED), "refused"),  # which is what it was sent again
    ],
)
def test_the_state_of_a_subscription_is_how_the_envoy_stands_to_what_is_served(name: NameStatus, state: str) -> None:
    versions = {"a": "v2", "pending": None}
    assert delivery(name, versions) == state
    view: SubscriptionView = subscription(name, versions)
    assert (view.name, view.state, view.acked) == (name.name, state, name.acked)
