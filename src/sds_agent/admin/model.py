"""The status model: everything that can be seen of a running agent at one moment, as frozen values.

Every view renders these values and nothing else: `/status` and `-o json` are their JSON
(sds-agent-status.schema.json), the page, the tables of `sds-agent status` and the metrics show parts of them. Times are
in UTC (RFC 3339). None holds key material. What a peer or a CA wrote is in printable ASCII and cut, so a view can
print it as it is.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Annotated, Literal

from msgspec import Meta, Struct

TIME = "%Y-%m-%d %H:%M:%S UTC"
"""The form of a time in words."""
FORMAT = 1
"""The version of the model. A field may be added without a change of it; one that changes its meaning or goes changes
it.
"""

ASKS_AGAIN = timedelta(minutes=2)
"""An Envoy whose stream was ended opens another within half a minute. What it does not ask for any more is past."""

Moment = Annotated[datetime, Meta(tz=True)]
"""A time that names its zone."""
Uptime = Annotated[float, Meta(ge=0, le=1e12)]
"""Seconds, no more than a timedelta holds."""

IdentityState = Literal["serving", "pending", "expired"]
"""Whether Envoys are given the certificate: it is `serving`; there is none yet (`pending`); or the last one has ended
and is withheld (`expired`).
"""
DeliveryState = Literal["current", "behind", "refused", "waiting", "unknown", "denied"]
"""How a subscriber stands to what is served under one name now: it has acknowledged it (`current`), not yet (`behind`),
or refused it (`refused`); it waits for a secret that does not exist yet or has ended (`waiting`); the agent does not
serve the name (`unknown`); or it is for other users (`denied`).
"""


class CertificateView(Struct, frozen=True, kw_only=True):
    """A certificate: `key` is the kind of its public key (`EC secp256r1`, `RSA 2048`), `serial` is hexadecimal."""

    subject: str
    issuer: str
    serial: str
    key: str
    not_before: Moment
    not_after: Moment


class LeafView(Struct, frozen=True, kw_only=True):
    """A workload's certificate.

    `chain` is what Envoys are given: the leaf, then each intermediate after what it issued. `anchor` is the trust
    anchor above it that ends last. Envoys take the leaf from `valid_from` until `valid_until`, the times of all these
    together; `ends_with` is the subject of the certificate that ends first. `renew_at` is absent where the CA decides
    that. One that is `foreign` came from another CA than the workload has now, and is renewed at once. From `warn_at`
    on the agent warns that the leaf, or a CA between it and the anchor, nears its end (the event `expiring`).
    """

    serial: str
    issuer: str
    key: str
    authority: str
    issued_at: Moment
    not_before: Moment
    not_after: Moment
    valid_from: Moment
    valid_until: Moment
    ends_with: str
    renew_at: Moment | None
    foreign: bool
    chain: tuple[CertificateView, ...]
    anchor: CertificateView | None
    warn_at: Moment | None = None


class FailureView(Struct, frozen=True, kw_only=True):
    """The last attempt at an authority failed: its kind, why in words, when, as the how many-th in a row, and when the
    next is due.
    """

    kind: str
    cause: str
    at: Moment
    attempts: int
    next_attempt: Moment


class AuthorityView(Struct, frozen=True, kw_only=True):
    """One of a workload's authorities: its name and kind in the configuration."""

    name: str
    kind: str
    in_use: bool
    failure: FailureView | None


class IdentityView(Struct, frozen=True, kw_only=True):
    """A configured workload. `names` are the resource names under which Envoys get its certificate.

    `current` is the newest that was published, `coming` wait to be, `earlier` were served before and have not ended.
    `attempt` says how far the request at the CA is that is under way: it waits for others (`queued`), the CA was asked
    (`asking`), or the CA sends by itself (`waiting`).
    """

    name: str
    spiffe_id: str
    names: tuple[str, ...]
    state: IdentityState
    authority: str
    authorities: tuple[AuthorityView, ...]
    current: LeafView | None
    coming: tuple[LeafView, ...]
    earlier: tuple[LeafView, ...]
    next_renewal: Moment | None
    attempt: Literal["queued", "asking", "waiting"] | None
    failure: FailureView | None


class AnchorView(Struct, frozen=True, kw_only=True):
    """A trust anchor in a bundle, and why it is still there: in `why` as a sentence.

    `advertised_by` names the authorities that advertise it; certificates chain to it until `needed_until`. Its end is
    near from `warn_at` on, which is absent where another one of its name outlives it, or no authority advertises it.
    """

    subject: str
    serial: str
    key: str
    not_before: Moment
    not_after: Moment
    advertised_by: tuple[str, ...]
    needed_until: Moment | None
    why: str
    warn_at: Moment | None = None


class LeftOutView(Struct, frozen=True, kw_only=True):
    """What an authority advertises and is not served, with the reasons."""

    authority: str
    causes: tuple[str, ...]


class BundleView(Struct, frozen=True, kw_only=True):
    """The trust bundle of a trust domain, and the resource names under which Envoys get it. Without a version there is
    none yet. `federated` bundles are those of other trust domains.
    """

    trust_domain: str
    names: tuple[str, ...]
    federated: bool
    version: str | None
    anchors: tuple[AnchorView, ...]
    left_out: tuple[LeftOutView, ...]


class NackView(Struct, frozen=True, kw_only=True):
    """A version that an Envoy refused, and Envoy's own words."""

    version: str
    reason: str


class SubscriptionView(Struct, frozen=True, kw_only=True):
    """A name that a subscriber asked for: the versions last sent, last acknowledged and last refused, and the `state`
    that follows from them.
    """

    name: str
    state: DeliveryState
    sent: str | None
    acked: str | None
    nacked: NackView | None


class SubscriberView(Struct, frozen=True, kw_only=True):
    """An open stream, by its number in the log, or a Fetch that waits.

    `node`, `cluster` and `version` are what the client says it is, empty where it does not say: the version of Envoy,
    or name and version of another program. `peer` is the process at the other end as the kernel says. `ack_ms` are the
    milliseconds from the last answer to its ACK.
    """

    stream: int
    method: str
    node: str
    cluster: str
    version: str
    peer: str
    since: Moment
    last_response: Moment | None
    ack_ms: float | None
    subscriptions: tuple[SubscriptionView, ...]


class DepartedView(Struct, frozen=True, kw_only=True):
    """A stream that has ended, with the first of its names, whose Envoy has none for these names now.

    `cause` says why the agent ended it; it is empty where the client did.
    """

    stream: int
    method: str
    node: str
    peer: str
    names: tuple[str, ...]
    since: Moment
    left_at: Moment
    cause: str


class CountsView(Struct, frozen=True, kw_only=True):
    """What happened since the start: certificates that were issued and attempts that failed, and of answers to Envoys
    how many were sent (`pushes` are those that a changed secret caused), acknowledged and refused.
    """

    issued: int
    failed: int
    responses: int
    pushes: int
    acks: int
    nacks: int


class AgentView(Struct, frozen=True, kw_only=True):
    """The agent itself. It is `ready` while every workload has a valid certificate; `lacks` says what is missing.

    `reload_refused` says why its configuration as it is now was not taken; it is empty where the one in force is that.
    """

    version: str
    pid: int
    started_at: Moment
    uptime_seconds: Uptime
    trust_domain: str
    socket: str
    ready: bool
    lacks: tuple[str, ...]
    counts: CountsView
    reload_refused: tuple[str, ...] = ()


def why_unusable(identity: IdentityView, at: datetime) -> str | None:
    """Why Envoys are not given the workload's certificate at that time, or do not take it, in words; None where they
    do, and where there is none.
    """
    leaf, withheld = identity.current, identity.state == "expired"
    if leaf is None:
        return None
    if at < leaf.valid_from:
        return f"is not valid before {leaf.valid_from:{TIME}}, and this machine's clock says {at:{TIME}}"
    if at >= leaf.valid_until:
        return f"ended at {leaf.valid_until:{TIME}}{' and is withheld' if withheld else ''}"
    return "had ended and is withheld" if withheld else None


def nears_its_end(identity: IdentityView, at: datetime) -> bool:
    """Whether the agent warns at that time that the workload's certificate nears its end."""
    leaf = identity.current
    return leaf is not None and leaf.warn_at is not None and leaf.warn_at <= at


def roots_near_their_end(bundle: BundleView, at: datetime) -> list[AnchorView]:
    """Its roots that have not ended at that time, and will soon."""
    return [each for each in bundle.anchors if each.warn_at is not None and each.warn_at <= at < each.not_after]


def why_no_peer_is_accepted(bundle: BundleView, at: datetime) -> str | None:
    """Why Envoys with these roots accept nobody at that time, in words; None where they do, or there is no root yet."""
    last = max((each.not_after for each in bundle.anchors), default=None)
    if last is None or last > at:
        return None
    return f"its last root ended at {last:{TIME}}, so no peer is accepted; give the CA a new root"


def is_taken_back(subscription: SubscriptionView) -> bool:
    """Whether an Envoy that has refused a secret was sent the one before once more, and so takes others."""
    return subscription.nacked is None or subscription.sent != subscription.nacked.version


def goes_on(subscription: SubscriptionView) -> str:
    """What an Envoy that has refused a secret does from then on, in words."""
    uses = "has none" if subscription.acked is None else f"goes on with version {subscription.acked}"
    if is_taken_back(subscription):
        return f"it {uses}"
    return (
        f"it {uses}; these words may be about another secret of its own, for which it refuses all until it is restarted"
    )


def first_name(bundle: BundleView) -> str:
    """The name by which people know a bundle."""
    return next(iter(bundle.names), bundle.trust_domain)


def refused_again(status: "Status") -> "Iterator[DepartedView]":
    """The streams that the agent has ended of late, of Envoys that have others: they ask again and again."""
    connected = {(each.node, each.peer) for each in status.subscribers}
    for left in status.departed or ():
        if left.cause and (left.node, left.peer) in connected and status.at - left.left_at < ASKS_AGAIN:
            yield left


def served_names(status: "Status") -> list[str]:
    """Every name that Envoys can ask for."""
    return [
        *(name for identity in status.identities for name in identity.names),
        *(name for bundle in status.bundles for name in bundle.names),
    ]


class OmittedView(Struct, frozen=True, kw_only=True):
    """How many identities, subscribers and `lacks` of the agent a status leaves out, because its reader asked for the
    first of them alone.
    """

    identities: int
    subscribers: int
    lacks: int = 0


class Status(Struct, frozen=True, kw_only=True):
    """A running agent at the time `at`.

    `departed` are streams that have ended, the last to end last; the agent remembers a thousand. It is absent where an
    agent of an earlier version does not say. With `?most=N`, `identities` and `subscribers` have at most so many, those
    in trouble first, as has `lacks` of the agent, and `omitted` says how many are left out.
    """

    format: int = FORMAT
    at: Moment
    agent: AgentView
    identities: tuple[IdentityView, ...]
    bundles: tuple[BundleView, ...]
    subscribers: tuple[SubscriberView, ...]
    departed: tuple[DepartedView, ...] | None = None
    omitted: OmittedView | None = None
