"""A signer behind the API of Kubernetes: what a user gets, and what the agent says where there is no certificate.

The API server stands in for a real one (`fakes.kubernetes_server`), over real TLS.
"""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from fakes.events import recorded
from fakes.hierarchy import make_ca, make_leaf, new_key
from fakes.https_server import Reply, Request
from fakes.kubernetes_server import (
    BUNDLES,
    CONFIG_MAPS,
    CSRS,
    REQUESTS,
    SIGNER,
    TOKEN,
    KubernetesServer,
    status,
    write_kubeconfig,
)

from sds_agent.authority import registry
from sds_agent.authority.kind import Context
from sds_agent.authority.kubernetes.access import read_access
from sds_agent.authority.kubernetes.client import (
    TIMEOUT,
    KubernetesAuthority,
    KubernetesRootedAuthority,
    open_authority,
)
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.protocol import AdvertisesAnchors, AuthorityError, ErrorKind, IssueRequest
from sds_agent.clock import SystemClock
from sds_agent.conformance import SuiteCa
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.tasks import giving

ID = "spiffe://demo.example/web"
KEY = new_key()
CSR = make_csr(KEY, ID)
BRIEFLY = 0.2
"""Seconds that an attempt waits where no answer will come."""


def asked(ttl: timedelta = timedelta(hours=1), request_id: str = "one") -> IssueRequest:
    return IssueRequest(SpiffeId.parse(ID), CSR, ttl, request_id)


class Cluster:
    """An API server with a signer, and the settings of an agent that uses them."""

    def __init__(self, server: KubernetesServer, ca: SuiteCa, folder: Path) -> None:
        self.server = server
        self.ca = ca
        self.folder = folder
        self.chosen: dict[str, object] = {
            "signer_name": SIGNER,
            "roots_file": folder / "roots.pem",
            "kubeconfig": server.kubeconfig(folder),
        }
        (folder / "roots.pem").write_bytes(write_pem([ca.root]))
        self._opened: list[KubernetesAuthority] = []

    def settings(self, **changed: Any) -> KubernetesSettings:
        """Those of `chosen`, with these changes; None leaves a key out."""
        keys = {key: value for key, value in {**self.chosen, **changed}.items() if value is not None}
        return KubernetesSettings(**keys)

    def authority(self, *, timeout: float = TIMEOUT, **changed: Any) -> KubernetesAuthority:
        settings = self.settings(**changed)
        kind = KubernetesAuthority if settings.trust_status_ca else KubernetesRootedAuthority
        authority = kind(settings, SystemClock(), timeout=timeout)
        self._opened.append(authority)
        return authority

    async def end(self) -> None:
        """End the authorities: a deletion that outlived its test would be cut off at any point with the event loop."""
        for each in self._opened:
            await each.end()

    def with_cert_manager(self, **changed: Any) -> dict[str, Any]:
        """The keys for an issuer of cert-manager."""
        return {"signer_name": None, "issuer_name": "workloads", **changed}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    ca = SuiteCa()
    async with KubernetesServer(ca.answer).serving() as server:
        cluster = Cluster(server, ca, tmp_path)
        yield cluster
        await cluster.end()


@asynccontextmanager
async def by_hand(cluster: Cluster) -> AsyncIterator[KubernetesServer]:
    """A cluster in which nothing signs by itself."""
    sign, cluster.server.sign = cluster.server.sign, None
    yield cluster.server
    cluster.server.sign = sign


async def deleted(authority: KubernetesAuthority) -> None:
    """Wait for the deletions that its answers began."""
    while authority._deletions:
        await asyncio.wait(tuple(authority._deletions))


async def refused(authority: KubernetesAuthority, request: IssueRequest | None = None) -> AuthorityError:
    with pytest.raises(AuthorityError) as caught:
        await authority.issue(request or asked())
    await deleted(authority)
    assert TOKEN not in str(caught.value)
    return caught.value


async def test_a_signer_of_the_cluster_gives_a_certificate_that_the_agent_accepts(cluster: Cluster) -> None:
    authority = cluster.authority()
    answer = await authority.issue(asked())
    await authority.end()
    accepted = accept(
        answer, identity=SpiffeId.parse(ID), public_key=KEY.public_key(), anchors=(), now=datetime.now(UTC)
    )
    assert accepted.chain[1:] == (cluster.ca.intermediate,)
    assert accepted.anchors == (cluster.ca.root,)
    created = next(each for each in cluster.server.http.requests if each.method == "POST")
    assert created.path == f"{CSRS}?fieldValidation=Strict"
    assert created.json["spec"] == {
        "request": base64.b64encode(CSR).decode(),
        "signerName": SIGNER,
        "usages": ["digital signature", "client auth", "server auth"],
        "expirationSeconds": 3600,
    }


async def test_an_issuer_of_cert_manager_gives_a_certificate(cluster: Cluster) -> None:
    authority = cluster.authority(**cluster.with_cert_manager(issuer_kind="ClusterIssuer"))
    answer = await authority.issue(asked(timedelta(minutes=5)))
    assert read_pem(answer.chain_pem)[1:] == (cluster.ca.intermediate,)
    created = next(each for each in cluster.server.http.requests if each.method == "POST")
    assert created.path == f"{REQUESTS}?fieldValidation=Strict"
    assert created.json["spec"] == {
        "request": base64.b64encode(CSR).decode(),
        "issuerRef": {"name": "workloads", "kind": "ClusterIssuer", "group": "cert-manager.io"},
        "usages": ["digital signature", "client auth", "server auth"],
        "duration": "300s",
        "isCA": False,
    }


async def test_the_object_is_deleted_when_it_has_been_answered(cluster: Cluster) -> None:
    """Each renewal would otherwise leave one in the cluster for an hour, and with cert-manager for ever."""
    authority = cluster.authority()
    await authority.issue(asked())
    await authority.end()
    assert len(cluster.server.deleted) == 1
    assert cluster.server.objects == {}


async def test_the_answer_does_not_wait_for_the_deletion(cluster: Cluster) -> None:
    server, held = cluster.server, asyncio.Event()
    answered = server.http.answer

    async def slow(request: object) -> object:
        if request.method == "DELETE":  # type: ignore[attr-defined]
            await held.wait()
        return await answered(request)  # type: ignore[arg-type]

    server.http.answer = slow  # type: ignore[assignment]
    authority = cluster.authority()
    assert (await authority.issue(asked())).chain_pem
    assert server.deleted == []
    held.set()
    await authority.end()
    assert len(server.deleted) == 1


async def test_an_object_that_cannot_be_deleted_costs_no_certificate_and_is_reported_once(cluster: Cluster) -> None:
    cluster.server.forbidden.add(("delete", "certificatesigningrequests"))
    authority = cluster.authority()
    with recorded() as events:
        for request_id in ("one", "two"):
            assert (await authority.issue(asked(request_id=request_id))).chain_pem
            await deleted(authority)
    (event,) = events.named("request_not_deleted")
    assert 'resources: ["certificatesigningrequests"], verbs: ["delete"]' in str(event["cause"])


@pytest.mark.parametrize("verb", ["create", "delete"])
async def test_an_api_server_that_refuses_and_then_is_silent_is_quoted_and_not_waited_for(
    cluster: Cluster, verb: str
) -> None:
    """What a refusal means takes a second request, which tells whether the API server has started."""
    server, never = cluster.server, asyncio.Event()
    server.forbidden.add((verb, "certificatesigningrequests"))
    answered = server.http.answer

    async def silent_about_readiness(request: Request) -> Reply | bytes | None:
        if request.path == "/readyz":
            await never.wait()
        return await answered(request)

    server.http.answer = silent_about_readiness
    authority = cluster.authority()
    with recorded() as events:
        async with asyncio.timeout(TIMEOUT):
            if verb == "create":
                said = str(await refused(authority))
            else:
                await authority.issue(asked())
                await authority.end()
                said = str(events.named("request_not_deleted")[0]["cause"])
    assert f'verbs: ["{verb}"]' in said
    assert "it does not say that it is ready" in said


async def test_a_closed_authority_has_deleted_its_last_object(cluster: Cluster) -> None:
    """`sds-agent issue` ends right after its one certificate."""
    context = Context("upstream", "demo.example", cluster.folder, SystemClock())
    async with registry.kind("kubernetes").open(cluster.settings(), context) as authority:
        assert (await authority.issue(asked())).chain_pem  # type: ignore[union-attr]
    assert cluster.server.objects == {}


async def test_a_closed_authority_leaves_no_request_that_waits(cluster: Cluster) -> None:
    """Its key ends with the agent: whoever approved it later would do so for no agent."""
    async with by_hand(cluster) as server:
        authority, server.watch_seconds = cluster.authority(), 0.0
        with pytest.raises(AuthorityError):
            await authority.issue(asked())
        assert len(server.objects) == 1
        server.watch_seconds = 300.0
        attempt = asyncio.create_task(authority.issue(asked(request_id="two")))
        await server.watched(server.watches + 1)
        assert len(server.objects) == 2
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        await authority.end()
        assert server.objects == {}


@pytest.mark.parametrize("created", [True, False])
async def test_a_closed_authority_leaves_no_request_whose_creation_was_not_answered(
    cluster: Cluster, created: bool
) -> None:
    server = cluster.server
    answered = server.http.answer

    async def cut(request: Request) -> Reply | bytes | None:
        if created:
            await answered(request)
        return None

    async with by_hand(cluster):
        server.http.answer = cut
        authority = cluster.authority()
        assert (await refused(authority)).kind is ErrorKind.TRANSIENT
        assert len(server.objects) == created
        server.http.answer = answered
        with recorded() as events:
            await authority.end()
        assert server.objects == {}
        assert events.named("request_not_deleted") == []


async def test_roots_that_another_caller_has_read_meanwhile_are_not_dropped(cluster: Cluster) -> None:
    server, reached, go = cluster.server, asyncio.Event(), asyncio.Event()
    answered = server.http.answer

    def put(*roots: x509.Certificate) -> None:
        server.put(f"{CONFIG_MAPS}/roots", {"data": {"ca.crt": write_pem(roots).decode()}})

    async def holding(request: Request) -> Reply | bytes | None:
        reply = await answered(request)
        if not reached.is_set():
            reached.set()
            await go.wait()
        return reply

    put(cluster.ca.root)
    server.http.answer = holding
    authority = cluster.authority(roots_file=None, trust_config_map="pki/roots/ca.crt")
    assert isinstance(authority, AdvertisesAnchors)
    reading = asyncio.create_task(authority.anchors())
    await reached.wait()
    put(cluster.ca.root, make_ca("new root").certificate)
    new = await authority.anchors()
    assert len(read_pem(new)) == 2
    go.set()
    assert await reading == new


# Waiting


async def test_a_request_that_waits_for_approval_outlives_a_refused_token(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        authority = cluster.authority()
        server.replies["GET", CSRS] = status(401, "Unauthorized", "Unauthorized")
        assert (await refused(authority)).kind is ErrorKind.UNAUTHENTICATED
        (path,) = server.objects
        server.sign = cluster.ca.answer
        server.approve(path)
        server.certify(path)
        assert (await authority.issue(asked())).chain_pem
        await authority.end()
        assert server.deleted == [path]


async def test_a_certificate_comes_as_soon_as_it_is_signed(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        attempt = asyncio.create_task(cluster.authority().issue(asked()))
        path = await server.created()
        server.approve(path)
        server.sign = cluster.ca.answer
        server.certify(path)
        assert read_pem((await attempt).chain_pem)


async def test_approved_alone_is_not_done(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        answered = server.http.answer

        async def approved_at_once(request: Request) -> Reply | bytes | None:
            reply = await answered(request)
            if request.method == "POST":
                server.approve(await server.created())
            return reply

        server.http.answer, server.watch_seconds = approved_at_once, 0.0
        error = await refused(cluster.authority())
    assert error.kind is ErrorKind.PENDING
    assert str(error).endswith(f"check that the controller which signs for {SIGNER} runs")


async def test_a_request_that_waits_for_a_person_is_found_again_by_the_next_attempt(cluster: Cluster) -> None:
    """A second object would need a second approval, and the first one would be answered for nobody."""
    async with by_hand(cluster) as server:
        authority = cluster.authority(timeout=BRIEFLY)
        error = await refused(authority)
        assert error.kind is ErrorKind.PENDING
        (path,) = server.objects
        assert f"kubectl certificate approve {path.rpartition('/')[2]}" in str(error)
        assert (await refused(authority)).kind is ErrorKind.PENDING
        assert list(server.objects) == [path]
        server.approve(path)
        server.sign = cluster.ca.answer
        server.certify(path)
        assert read_pem((await authority.issue(asked())).chain_pem)
        await authority.end()
        assert server.deleted == [path]


async def test_a_request_is_said_to_be_pending_before_its_caller_gives_up(cluster: Cluster) -> None:
    """Or a short time-out would call a CA silent that waits for a person."""
    async with by_hand(cluster):
        authority = cluster.authority()
        async with asyncio.timeout(TIMEOUT / 2):
            with giving(BRIEFLY):
                assert (await refused(authority)).kind is ErrorKind.PENDING


async def test_another_request_has_another_object(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        authority = cluster.authority(timeout=BRIEFLY)
        for request_id in ("one", "two"):
            await refused(authority, asked(request_id=request_id))
        other = cluster.authority(timeout=BRIEFLY, signer_name="example.com/others")
        await refused(other)
        assert len(server.objects) == 3


async def test_an_object_of_the_same_name_with_another_csr_is_not_taken_for_ours(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        authority = cluster.authority(timeout=BRIEFLY)
        await refused(authority)
        (path,) = server.objects
        other = make_csr(new_key(), "spiffe://demo.example/other")
        server.put(path, {"spec": {"request": base64.b64encode(other).decode(), "signerName": SIGNER}})
        error = await refused(authority)
    assert error.kind is ErrorKind.INVALID
    assert "is there with another CSR" in str(error)
    assert path in server.objects, "what is not ours is not deleted"


@pytest.mark.parametrize("bookmarks", [False, True])
async def test_a_watch_that_the_server_ends_early_is_begun_again(cluster: Cluster, bookmarks: bool) -> None:
    async with by_hand(cluster) as server:
        server.watch_seconds, server.bookmarks = 0.05, bookmarks
        attempt = asyncio.create_task(cluster.authority().issue(asked()))
        path = await server.created()
        await server.watched(2)
        server.approve(path)
        server.sign = cluster.ca.answer
        server.certify(path)
        assert read_pem((await attempt).chain_pem)


async def test_a_version_that_is_too_old_is_read_anew(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        server.gone = 1
        attempt = asyncio.create_task(cluster.authority().issue(asked()))
        path = await server.created()
        server.approve(path)
        server.sign = cluster.ca.answer
        server.certify(path)
        assert read_pem((await attempt).chain_pem)
        assert server.gone == 0


async def test_an_object_that_is_deleted_while_the_agent_waits_is_created_again(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        authority = cluster.authority()
        attempt = asyncio.create_task(refused(authority))
        path = await server.created()
        await server.watched()
        server.remove(path)
        error = await attempt
        assert error.kind is ErrorKind.TRANSIENT
        server.sign = cluster.ca.answer
        assert (await authority.issue(asked())).chain_pem


# Refusals of a request


@pytest.mark.parametrize(
    ("conditions", "kind", "said"),
    [
        (
            [{"type": "Denied", "status": "True", "reason": "Policy", "message": "not in\nthis namespace"}],
            ErrorKind.DENIED,
            "was denied (Policy: not in this namespace)",
        ),
        ([{"type": "Failed", "status": "True", "reason": "SignerError"}], ErrorKind.INVALID, "failed (SignerError)"),
        (
            [{"type": "Approved", "status": "True"}, {"type": "Failed", "status": "True", "message": "no usage"}],
            ErrorKind.INVALID,
            "failed (no usage)",
        ),
    ],
    ids=["denied", "failed", "failed beside approved"],
)
async def test_a_request_that_was_refused_for_good_is_not_waited_for(
    cluster: Cluster, conditions: list[dict[str, str]], kind: ErrorKind, said: str
) -> None:
    async with by_hand(cluster) as server:
        attempt = asyncio.create_task(refused(cluster.authority()))
        server.conditions(await server.created(), *conditions)
        error = await attempt
        assert (error.kind, said in str(error)) == (kind, True), error
        assert server.objects == {}, "the next attempt has another key, so the object is deleted"


@pytest.mark.parametrize(
    ("condition", "kind"),
    [
        ({"type": "Denied", "status": "True", "reason": "policy"}, ErrorKind.DENIED),
        ({"type": "InvalidRequest", "status": "True", "message": "no"}, ErrorKind.INVALID),
        ({"type": "Ready", "status": "False", "reason": "Failed", "message": "no"}, ErrorKind.INVALID),
        ({"type": "Ready", "status": "False", "reason": "Pending"}, ErrorKind.PENDING),
        ({"type": "InvalidRequest", "status": "False"}, ErrorKind.PENDING),
    ],
    ids=["denied", "invalid", "failed", "pending", "not invalid"],
)
async def test_what_cert_manager_says_in_its_conditions_counts(
    cluster: Cluster, condition: dict[str, str], kind: ErrorKind
) -> None:
    async with by_hand(cluster) as server:
        waits = 0.5 if kind is ErrorKind.PENDING else TIMEOUT  # to its end, or until it is answered
        authority = cluster.authority(timeout=waits, **cluster.with_cert_manager())
        attempt = asyncio.create_task(refused(authority))
        server.conditions(await server.created(REQUESTS), condition)
        assert (await attempt).kind is kind


async def test_the_one_who_approves_is_told_the_command_and_the_namespace(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        error = await refused(cluster.authority(timeout=BRIEFLY, **cluster.with_cert_manager()))
        (path,) = server.objects
    assert f"cmctl approve {path.rpartition('/')[2]} -n shop" in str(error)


# Refusals by the API server


async def test_the_rule_that_rbac_lacks_is_the_fix(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        server.forbidden.add(("create", "certificatesigningrequests"))
        error = await refused(cluster.authority())
    assert error.kind is ErrorKind.DENIED
    rule = '{apiGroups: ["certificates.k8s.io"], resources: ["certificatesigningrequests"], verbs: ["create"]}'
    assert f"{rule} in a ClusterRole" in str(error)


async def test_an_object_that_may_not_be_watched_is_read_again_and_again(cluster: Cluster) -> None:
    async with by_hand(cluster) as server:
        server.forbidden.add(("watch", "certificatesigningrequests"))
        authority = cluster.authority()
        with recorded() as events:
            attempts = [asyncio.create_task(authority.issue(asked(request_id=each))) for each in ("one", "two")]
            await server.created(count=2)
            await server.until(lambda: len(server.reads) > 3)
            server.sign = cluster.ca.answer
            for path in tuple(server.objects):
                server.approve(path)
                server.certify(path)
            for attempt in attempts:
                assert (await attempt).chain_pem
    (event,) = events.named("request_not_watched")
    assert 'resources: ["certificatesigningrequests"], verbs: ["watch"]' in str(event["cause"])


@pytest.mark.parametrize("verbs", [{"get", "watch"}, {"create", "watch"}])
async def test_a_right_that_is_lost_meanwhile_costs_no_approval(cluster: Cluster, verbs: set[str]) -> None:
    """A person has to approve each new request."""
    rights = {(verb, "certificatesigningrequests") for verb in verbs}
    async with by_hand(cluster) as server:
        authority = cluster.authority(timeout=BRIEFLY)
        assert (await refused(authority)).kind is ErrorKind.PENDING
        (path,) = server.objects
        server.approve(path)
        server.forbidden |= rights
        error = await refused(authority)
        assert not error.kind.ends_request
        assert server.deleted == []
        if "get" in verbs:
            assert error.kind is ErrorKind.UNAUTHENTICATED
            assert 'resources: ["certificatesigningrequests"], verbs: ["get"]' in str(error)
            server.forbidden -= rights
        server.sign = cluster.ca.answer
        server.certify(path)
        assert (await authority.issue(asked())).chain_pem


@pytest.mark.parametrize("place", ["the object", "its watch"])
@pytest.mark.parametrize(
    "reply",
    [Reply(404, b"no such site"), Reply(200, b"<html>"), Reply(200, b"x" * ((4 << 20) + 1))],
    ids=["missing", "page", "huge"],
)
async def test_an_answer_that_is_no_api_servers_costs_no_approval(cluster: Cluster, reply: Reply, place: str) -> None:
    """A proxy before the API server may answer in its place for a moment."""
    async with by_hand(cluster) as server:
        authority = cluster.authority(timeout=BRIEFLY)
        assert (await refused(authority)).kind is ErrorKind.PENDING
        (path,) = server.objects
        server.replies["GET", path if place == "the object" else CSRS] = reply
        with giving(TIMEOUT):  # before it is over, the answer has come whole
            assert (await refused(authority)).kind is ErrorKind.TRANSIENT
        assert server.deleted == []
        server.approve(path)
        server.sign = cluster.ca.answer
        server.certify(path)
        assert (await authority.issue(asked())).chain_pem


@pytest.mark.parametrize("chosen", [{}, {"trust_bundle": "roots", "roots_file": None}])
async def test_a_refusal_by_an_api_server_that_starts_is_passing(cluster: Cluster, chosen: dict[str, Any]) -> None:
    """It does not know its rules or its resources yet: the next attempt must not wait as if a person had to act."""
    cluster.server.ready = False
    cluster.server.forbidden |= {("create", "certificatesigningrequests"), ("get", "clustertrustbundles")}
    error = await refused(cluster.authority(**chosen))
    assert error.kind is ErrorKind.TRANSIENT
    assert "verbs: [" in str(error), "the rule, should it not be starting"
    cluster.server.collections.clear()
    cluster.server.forbidden.clear()
    assert (await refused(cluster.authority(**chosen))).kind is ErrorKind.TRANSIENT


async def test_a_rule_for_cert_manager_belongs_into_its_namespace(cluster: Cluster) -> None:
    cluster.server.forbidden.add(("create", "certificaterequests"))
    error = await refused(cluster.authority(**cluster.with_cert_manager()))
    assert "in a Role of the namespace shop" in str(error)


@pytest.mark.parametrize(
    ("reply", "kind", "said", "delay"),
    [
        (status(401, "Unauthorized", "Unauthorized"), ErrorKind.UNAUTHENTICATED, "audience", None),
        (
            status(429, "TooManyRequests", "slow", retry_after="7"),
            ErrorKind.THROTTLED,
            "429 TooManyRequests: slow",
            7.0,
        ),
        (status(429, "TooManyRequests", "slow", {"retryAfterSeconds": 3}), ErrorKind.THROTTLED, "slow", 3.0),
        (status(500, "InternalError", "failed calling webhook"), ErrorKind.TRANSIENT, "webhook", None),
        (status(503, "ServiceUnavailable", "no"), ErrorKind.TRANSIENT, "etcd", None),
        (Reply(408, b"<html>"), ErrorKind.TRANSIENT, "check the API server", None),
        (status(400, "BadRequest", 'strict decoding error: unknown field "spec.x"'), ErrorKind.INVALID, "strict", None),
        (Reply(404, b"404 page not found\n"), ErrorKind.INVALID, "404: 404 page not found", None),
        (Reply(302, b"", {"location": "https://sso.example"}), ErrorKind.INVALID, "is an API server of", None),
        (Reply(201, b"{}"), ErrorKind.INVALID, "no SigningObject", None),
        (Reply(201, b"<html>"), ErrorKind.INVALID, "is an API server", None),
    ],
    ids=str,
)
async def test_each_refusal_says_who_has_to_act(
    cluster: Cluster, reply: Reply, kind: ErrorKind, said: str, delay: float | None
) -> None:
    cluster.server.replies["POST", CSRS] = reply
    error = await refused(cluster.authority())
    assert (error.kind, error.retry_after) == (kind, delay), error
    assert said in str(error)


async def test_the_fields_that_the_api_server_refuses_are_quoted(cluster: Cluster) -> None:
    causes = [{"field": "spec.expirationSeconds", "message": "may not be less than 600"}]
    cluster.server.replies["POST", CSRS] = status(422, "Invalid", "it is invalid", {"causes": causes})
    error = await refused(cluster.authority())
    assert error.kind is ErrorKind.INVALID
    assert "it is invalid; spec.expirationSeconds: may not be less than 600" in str(error)


async def test_a_lifetime_below_the_apis_least_is_asked_for_as_the_least(cluster: Cluster) -> None:
    """The API server would refuse it (422)."""
    await cluster.authority().issue(asked(timedelta(seconds=20)))
    created = next(each for each in cluster.server.http.requests if each.method == "POST")
    assert created.json["spec"]["expirationSeconds"] == 600


async def test_without_cert_manager_the_error_says_so(cluster: Cluster) -> None:
    cluster.server.collections.remove(REQUESTS)
    error = await refused(cluster.authority(**cluster.with_cert_manager()))
    assert error.kind is ErrorKind.INVALID
    assert str(error).endswith("install cert-manager in this cluster, and create the namespace shop")


async def test_a_token_that_a_server_sends_back_is_not_shown(cluster: Cluster) -> None:
    long = f"{'x' * 290}{TOKEN}"  # where the message is cut, half of it must not remain
    cluster.server.replies["POST", CSRS] = status(400, "BadRequest", long)
    error = await refused(cluster.authority())
    assert TOKEN[:5] not in str(error)
    cluster.server.replies["POST", CSRS] = status(400, "BadRequest", f"the token {TOKEN[:20]}... is not good")
    assert "the token [token]... is not good" in str(await refused(cluster.authority()))


# Roots


async def test_roots_are_read_from_a_cluster_trust_bundle_of_either_version(cluster: Cluster) -> None:
    server, root = cluster.server, write_pem([cluster.ca.root]).decode()
    authority = open_authority(cluster.settings(roots_file=None, trust_bundle="example.com:workloads:a"), SystemClock())
    assert isinstance(authority, AdvertisesAnchors)
    server.put(f"{BUNDLES}/example.com%3Aworkloads%3Aa", {"spec": {"signerName": SIGNER, "trustBundle": root}})
    assert read_pem(await authority.anchors()) == (cluster.ca.root,)
    newer = BUNDLES.replace("v1beta1", "v1")
    server.collections = {CSRS, newer}
    other = make_ca("newer").certificate
    server.put(f"{newer}/example.com%3Aworkloads%3Aa", {"spec": {"trustBundle": write_pem([other]).decode()}})
    assert read_pem(await authority.anchors()) == (other,)


async def test_the_roots_of_all_bundles_of_a_signer_count_and_of_no_other(cluster: Cluster) -> None:
    authority = open_authority(cluster.settings(roots_file=None, trust_bundle_signer=SIGNER), SystemClock())
    assert isinstance(authority, AdvertisesAnchors)
    roots = [make_ca(name).certificate for name in ("old", "new", "foreign")]
    for name, root, signer in zip("abc", roots, [SIGNER, SIGNER, "example.com/others"], strict=True):
        spec = {"signerName": signer, "trustBundle": write_pem([root]).decode()}
        cluster.server.put(f"{BUNDLES}/{name}", {"spec": spec})
    assert set(read_pem(await authority.anchors())) == set(roots[:2])


@pytest.mark.parametrize("field", ["data", "binaryData"])
async def test_roots_are_read_from_a_config_map(cluster: Cluster, field: str) -> None:
    pem = write_pem([cluster.ca.root])
    written = pem.decode() if field == "data" else base64.b64encode(pem).decode()
    cluster.server.put(f"{CONFIG_MAPS}/roots", {field: {"ca.crt": written}})
    authority = cluster.authority(roots_file=None, trust_config_map="pki/roots/ca.crt")
    answer = await authority.issue(asked())
    assert read_pem(answer.anchors_pem or b"") == (cluster.ca.root,)


@pytest.mark.parametrize(
    ("chosen", "content", "said"),
    [
        ({"trust_bundle": "none"}, {}, "the ClusterTrustBundle none is not there"),
        ({"trust_bundle_signer": "example.com/none"}, {}, "has no certificate; put the roots of the signer there"),
        ({"trust_config_map": "pki/none/ca.crt"}, {}, "the ConfigMap pki/none is not there"),
        ({"trust_config_map": "pki/roots/ca.crt"}, {"data": {"tls.crt": "x"}}, "has no key ca.crt"),
        (
            {"trust_config_map": "pki/roots/ca.crt"},
            {"data": {"ca.crt": "soon"}},
            "has no certificate in its key ca.crt",
        ),
    ],
    ids=str,
)
async def test_roots_that_are_not_there_are_named_before_anything_is_created(
    cluster: Cluster, chosen: dict[str, Any], content: dict[str, object], said: str
) -> None:
    cluster.server.put(f"{CONFIG_MAPS}/roots", content)
    error = await refused(cluster.authority(roots_file=None, **chosen))
    assert (error.kind, said in str(error)) == (ErrorKind.INVALID, True), error
    assert not [each for each in cluster.server.http.requests if each.method == "POST"]


async def test_a_cluster_without_trust_bundles_is_told_the_flags(cluster: Cluster) -> None:
    cluster.server.collections.remove(BUNDLES)
    error = await refused(cluster.authority(roots_file=None, trust_bundle="roots"))
    assert error.kind is ErrorKind.INVALID
    assert "--runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true" in str(error)


async def test_the_right_to_read_the_roots_is_the_fix_where_it_is_missing(cluster: Cluster) -> None:
    cluster.server.forbidden.add(("get", "configmaps"))
    error = await refused(cluster.authority(roots_file=None, trust_config_map="pki/roots/ca.crt"))
    assert error.kind is ErrorKind.DENIED
    assert '{apiGroups: [""], resources: ["configmaps"], verbs: ["get"]} in a Role of the namespace pki' in str(error)


async def test_roots_that_cannot_be_read_at_a_renewal_stay_in_use(cluster: Cluster) -> None:
    authority = cluster.authority()
    await authority.issue(asked())
    (cluster.folder / "roots.pem").write_text("half")
    answer = await authority.issue(asked(request_id="two"))
    assert read_pem(answer.anchors_pem or b"") == (cluster.ca.root,)
    (warning,) = answer.warnings
    assert warning.startswith("the roots that were read before stay in use: ")


async def test_the_ca_that_cert_manager_tells_is_trusted_by_choice(cluster: Cluster) -> None:
    authority = cluster.authority(**cluster.with_cert_manager(trust_status_ca=True, roots_file=None))
    assert not isinstance(authority, AdvertisesAnchors), "it is told with a certificate alone"
    async with by_hand(cluster) as server:
        attempt = asyncio.create_task(authority.issue(asked()))
        path = await server.created(REQUESTS)
        server.sign = cluster.ca.answer
        server.certify(path, ca=write_pem([cluster.ca.root]))
        assert read_pem((await attempt).anchors_pem or b"") == (cluster.ca.root,)


async def test_an_issuer_that_tells_no_ca_is_a_fault_of_the_configuration(cluster: Cluster) -> None:
    error = await refused(cluster.authority(**cluster.with_cert_manager(trust_status_ca=True, roots_file=None)))
    assert error.kind is ErrorKind.INVALID
    assert "in place of trust_status_ca" in str(error)


# Access


async def test_a_token_that_was_replaced_counts_for_the_next_request(cluster: Cluster) -> None:
    authority = cluster.authority()
    cluster.server.token = "another.token.y"
    assert (await refused(authority)).kind is ErrorKind.UNAUTHENTICATED
    (cluster.folder / "token").write_text("another.token.y")
    assert (await authority.issue(asked())).chain_pem


async def test_a_pod_finds_its_api_server_by_its_service_account(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cluster.folder / "serviceaccount"
    place.mkdir()
    (place / "token").write_text(TOKEN)
    (place / "ca.crt").write_bytes(cluster.server.http.roots_pem)
    (place / "namespace").write_text("shop")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.server.http.port))
    authority = cluster.authority(kubeconfig=None, service_account=place, **cluster.with_cert_manager())
    assert (await authority.issue(asked())).chain_pem, "in the pod's own namespace"


def test_outside_a_pod_the_error_names_the_kubeconfig(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match=r"there is no service account in .*; outside a pod, name"):
        read_access(KubernetesSettings(service_account=tmp_path / "serviceaccount"))


def test_an_address_of_version_6_is_written_as_a_url_has_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_bytes(write_pem([make_ca("any").certificate]))
    chosen = KubernetesSettings(service_account=tmp_path)
    access = read_access(chosen, {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"})
    assert (access.url, access.namespace) == ("https://[fd00::1]:443", "default")
    assert read_access(chosen, {}).url == "https://kubernetes.default.svc"
    assert TOKEN not in repr(access)


@pytest.mark.parametrize("inline", [True, False])
async def test_a_client_certificate_of_a_kubeconfig_is_shown(cluster: Cluster, inline: bool) -> None:
    now, day, key = datetime.now(UTC), timedelta(days=1), new_key()
    ca = make_ca("clients", not_before=now - day, not_after=now + day)
    leaf = make_leaf(ca, key=key, not_before=now - day, not_after=now + day)
    user: dict[str, object] = {"token": TOKEN}
    for name, content in {"client-certificate": write_pem([leaf]), "client-key": to_pkcs8_pem(key)}.items():
        (cluster.folder / name).write_bytes(content)
        # in lines, as `base64` writes it, which kubectl takes
        user |= {f"{name}-data": base64.encodebytes(content).decode()} if inline else {name: name}
    server = KubernetesServer(cluster.ca.answer)
    server.http.trust = (ca.certificate,)
    async with server.serving():
        kubeconfig = write_kubeconfig(cluster.folder, server.http.url, server.http.roots_pem, **user)
        authority = cluster.authority(kubeconfig=kubeconfig)
        assert (await authority.issue(asked())).chain_pem
        await authority.end()
        assert {each.certificate for each in server.http.requests} == {leaf}


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (
            {"exec": {"command": "aws"}, "token": None},
            'has a plugin (exec) for the user "me"; the agent runs no program',
        ),
        ({"auth-provider": {"name": "gcp"}}, "has a plugin (auth-provider)"),
        ({"username": "me", "password": "secret"}, "has a user name and password"),
        ({"as": "admin"}, "acts as another user (as)"),
        ({"client-certificate": "x"}, "has one of client-certificate and client-key"),
        ({"client-key-data": "!", "client-certificate": "x"}, "has no base64 in client-key-data"),
        ({"token": 7}, "is no kubeconfig (Expected `str`, got `int`"),
        ({"token": "two words", "tokenFile": ""}, "does not hold the token alone"),
        ({"tokenFile": ""}, "has no credentials for the user of its current context"),
        ({"tokenFile": "nowhere"}, "the token cannot be read from"),
    ],
    ids=str,
)
async def test_a_user_of_a_kubeconfig_that_cannot_be_used_is_said_beforehand(
    cluster: Cluster, user: dict[str, object], said: str
) -> None:
    given = {key: value for key, value in user.items() if value is not None}
    chosen = cluster.settings(kubeconfig=cluster.server.kubeconfig(cluster.folder, **given))
    context = Context("upstream", "demo.example", cluster.folder, SystemClock())
    (problem,) = registry.kind("kubernetes").credentials(chosen, context)
    assert (problem.where, said in problem.found + "; " + problem.fix) == (("kubeconfig",), True), problem
    assert "secret" not in str(problem)
    assert "two words" not in str(problem)
    assert cluster.server.http.requests == []
    error = await refused(open_authority(chosen, SystemClock()))
    assert error.kind is ErrorKind.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"current-context": ""}, "names no current-context"),
        ({"current-context": "x"}, 'has no context with the name "x"'),
        ({"clusters": []}, 'has no cluster with the name "here"'),
        ({"users": None}, 'has no user with the name "here"'),
        ({"clusters": [{"name": "here", "cluster": {}}]}, "names no server"),
        (
            {"clusters": [{"name": "here", "cluster": {"server": "https://x"}}]},
            "has nothing that vouches for the server",
        ),
        (
            {"clusters": [{"name": "here", "cluster": {"server": "http://192.0.2.1"}}]},
            "without TLS, with http, it has to be on this machine",
        ),
        ({"clusters": [{"name": "here", "cluster": {"server": "10.0.0.1:6443"}}]}, "names no URL of a server"),
        ({"clusters": [{"name": "here", "cluster": {"server": "https://[::1"}}]}, "names no URL of a server"),
        ({"clusters": [{"name": "here", "cluster": {"server": "https://u:p@h"}}]}, '"https://***@h" is no such URL'),
        (
            {"clusters": [{"name": "here", "cluster": {"server": "https://x", "insecure-skip-tls-verify": True}}]},
            "sets insecure-skip-tls-verify",
        ),
        (
            {"clusters": [{"name": "here", "cluster": {"server": "https://x", "proxy-url": "http://p"}}]},
            "sets proxy-url",
        ),
    ],
    ids=str,
)
def test_a_kubeconfig_that_leads_nowhere_says_what_it_lacks(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    file = tmp_path / "kubeconfig"
    content = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}],
        "clusters": [{"name": "here", "cluster": {"server": "https://127.0.0.1:1", "certificate-authority": "x"}}],
        "users": [{"name": "here", "user": {"token": "t"}}],
    }
    file.write_text(json.dumps({**content, **changed}))
    with pytest.raises(AuthorityError) as caught:
        read_access(KubernetesSettings(kubeconfig=file))
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"a: [", b"- 1", b"a: 1\na: 2", b"\xff", None])
def test_a_kubeconfig_that_is_none_says_so(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(AuthorityError) as caught:
        read_access(KubernetesSettings(kubeconfig=file))
    assert str(caught.value).startswith("the kubeconfig cannot be read: ")
    assert "\n" not in str(caught.value)


def test_a_kubeconfig_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """It is read for every request, and a thread would hang for each authority."""
    os.mkfifo(tmp_path / "kubeconfig")
    with pytest.raises(AuthorityError, match="it is a pipe, and not a file"):
        read_access(KubernetesSettings(kubeconfig=tmp_path / "kubeconfig"))


def problems(cluster: Cluster, **user: object) -> list[str]:
    chosen = cluster.settings(kubeconfig=cluster.server.kubeconfig(cluster.folder, **user))
    context = Context("upstream", "demo.example", cluster.folder, SystemClock())
    return [f"{each.found}; {each.fix}" for each in registry.kind("kubernetes").credentials(chosen, context)]


async def test_credentials_that_have_expired_are_said_before_the_first_call(cluster: Cluster) -> None:
    past, day = datetime.now(UTC) - timedelta(hours=1), timedelta(days=1)
    assert problems(cluster) == [], "an opaque token does not tell its end"
    good = jwt.encode({"exp": past + day}, "k" * 32)
    assert problems(cluster, token=good, tokenFile="") == []
    (found,) = problems(cluster, token=jwt.encode({"exp": past}, "k" * 32), tokenFile="")
    assert found.startswith("cannot be used: the token in the kubeconfig ")
    assert "expired at" in found
    key = new_key()
    leaf = make_leaf(make_ca("clients"), key=key, not_before=past - day, not_after=past)
    encoded = [base64.b64encode(each).decode() for each in (write_pem([leaf]), to_pkcs8_pem(key))]
    (found,) = problems(cluster, **{"client-certificate-data": encoded[0], "client-key-data": encoded[1]})
    assert found.startswith("cannot be used: the kubeconfig ")
    assert "has a certificate that expired at" in found
    assert cluster.server.http.requests == []
