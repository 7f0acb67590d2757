"""A real kube-apiserver and etcd: an agent that gets its certificates through the API, as its page says."""

import base64
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from ca_interop.driver import URI, agent
from ca_interop.kubernetes_cluster import ADMIN, CSRS, REQUESTS, SIGNER, Cluster, Object, Signer, cluster
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes.kubernetes_server import KubernetesServer
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures

from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import make_root

LIFETIME = timedelta(seconds=8)
FRACTION = 0.3


class Issuer:
    """A root that signs what a CSR asks for, for some seconds."""

    def __init__(self, name: str) -> None:
        now = datetime.now(UTC) - timedelta(hours=1)
        self._signer = make_root(generate(KeyType.EC_P256), name, now, timedelta(days=1))
        self.root = self._signer.certificate

    def sign(self, csr: x509.CertificateSigningRequest) -> list[x509.Certificate]:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        key: Any = csr.public_key()
        return [self._signer.sign(key, tuple(names), usages, datetime.now(UTC), LIFETIME), self.root]


@pytest.fixture(scope="module")
async def kube(tmp_path_factory: pytest.TempPathFactory, loop_of_the_module: None) -> AsyncIterator[Cluster]:  # noqa: ARG001, F811 - a fixture
    """The cluster of the module, with what the page shows applied to it."""
    async with cluster(tmp_path_factory.mktemp("kube")) as made:
        await made.apply_page()
        await made.install_cert_manager()
        yield made


@pytest.fixture
async def issuer(kube: Cluster) -> Issuer:
    """The issuer whose root is in the signer's ClusterTrustBundle."""
    made = Issuer("first")
    await kube.trust("roots", made.root)
    return made


@pytest.fixture
async def signer(kube: Cluster, issuer: Issuer) -> AsyncIterator[Signer]:
    """The controller, in a cluster without a request of an earlier test."""
    for collection in (CSRS, REQUESTS):
        for each in await kube.items(collection):
            await kube.ask("DELETE", f"{collection}/{each['metadata']['name']}")
    async with Signer(kube, issuer.sign).running() as running:
        yield running


@pytest.fixture
async def in_pod(kube: Cluster, place: Path, monkeypatch: pytest.MonkeyPatch) -> Object:
    """The keys for an agent that runs as a pod's service account."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kube.port))
    directory = await kube.service_account(place / "serviceaccount")
    keys = {"signer_name": SIGNER, "trust_bundle_signer": SIGNER, "service_account": str(directory)}
    return {"type": "kubernetes", "refresh_every": "1s", **keys}


async def test_first_certificate_and_three_renewals(
    kube: Cluster, signer: Signer, issuer: Issuer, in_pod: Object, place: Path
) -> None:
    async with agent(place, in_pod, fraction=FRACTION) as running:
        first = await running.first()
        newest = await running.renewed(3)
        assert first.serial_number != newest.serial_number
        assert set(running.bundle) == {issuer.root}
        assert running.events.named("retrying") == []
        assert running.events.named("request_not_deleted") == []
    asked = signer.seen[0]["spec"]
    assert asked["username"] == "system:serviceaccount:shop:sds-agent"
    assert asked["usages"] == ["digital signature", "client auth", "server auth"]
    assert asked["expirationSeconds"] == 600
    assert await kube.items(CSRS) == [], "each request is deleted once it is answered, and the last at the agent's end"


@pytest.mark.usefixtures("signer")
async def test_api_server_restart(kube: Cluster, in_pod: Object, place: Path) -> None:
    async with agent(place, in_pod, fraction=FRACTION) as running:
        before = await running.first()
        await kube.restart()
        after = await running.more(2)
        assert after.serial_number != before.serial_number


@pytest.mark.usefixtures("signer")
async def test_outage_of_several_renewals(kube: Cluster, in_pod: Object, place: Path) -> None:
    """The certificate stays until it ends; the first answer after the outage is served."""
    async with agent(place, in_pod, fraction=FRACTION) as running:
        await running.first()
        await running.more()
        await kube.api.stop()
        cause = str((await running.event("retrying"))["cause"])
        assert "cannot be reached" in cause or "ended the connection" in cause
        await running.event("retrying", count=4)
        await kube.api.start()
        await running.more()
    await kube.ready()


async def test_signer_key_rotation(kube: Cluster, signer: Signer, issuer: Issuer, in_pod: Object, place: Path) -> None:
    """As the page says: the new root beside the old one first, then the signer, then the old one is removed."""
    new = Issuer("second")
    async with agent(place, in_pod, fraction=FRACTION) as running:
        await running.first()
        await kube.trust("roots", issuer.root, new.root)
        await running.bundle_with(issuer.root, new.root)
        signer.sign = new.sign
        await running.more(2)
        assert running.chain()[0].issuer == new.root.subject
        await kube.trust("roots", new.root)
        await running.bundle_with(new.root)


async def test_a_root_of_which_nothing_was_told_is_not_accepted(
    signer: Signer, issuer: Issuer, in_pod: Object, place: Path
) -> None:
    async with agent(place, in_pod, fraction=FRACTION) as running:
        await running.first()
        signer.sign = Issuer("stranger").sign
        await running.event("retrying", kind="invalid")
        assert set(running.bundle) == {issuer.root}


async def test_a_request_that_waits_is_approved_once_by_hand(
    kube: Cluster, signer: Signer, in_pod: Object, place: Path
) -> None:
    signer.answer = signer.leave
    async with agent(place, in_pod, fraction=FRACTION) as running:
        waiting = await running.event("retrying", kind="pending", count=2)
        (there,) = await kube.items(CSRS)
        assert f"kubectl certificate approve {there['metadata']['name']}" in str(waiting["cause"])
        await signer.certify(there)
        await running.first()
        signer.answer = signer.certify
    assert (
        len({each["metadata"]["uid"] for each in signer.seen if each["spec"]["request"] == there["spec"]["request"]})
        == 1
    )


async def test_denied_and_failed_are_final_and_the_next_request_is_another(
    signer: Signer, in_pod: Object, place: Path
) -> None:
    signer.answer = signer.deny
    async with agent(place, in_pod, fraction=FRACTION) as running:
        denied = await running.event("retrying", kind="denied")
        assert "was denied (Policy: not this identity)" in str(denied["cause"])
        signer.answer = signer.fail
        failed = await running.event("retrying", kind="invalid")
        assert "failed (SignerError: no such usage)" in str(failed["cause"])
        signer.answer = signer.certify
        await running.first()
    assert len({each["metadata"]["name"] for each in signer.seen}) == len(signer.seen)


@pytest.mark.usefixtures("signer")
async def test_the_rule_in_the_error_is_the_one_that_rbac_lacks(kube: Cluster, issuer: Issuer, place: Path) -> None:
    """Each rule is taken from the error, as a reader would, until the agent has its certificate."""
    (place / "roots.pem").write_bytes(issuer.root.public_bytes(Encoding.PEM))
    keys = {"signer_name": SIGNER, "roots_file": "roots.pem", "kubeconfig": str(kube.kubeconfig(place, "outsider"))}
    path = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
    role: Object = {"metadata": {"name": "outsider"}, "rules": []}
    await kube.create(path, role)
    subject = {"kind": "User", "name": "outsider", "apiGroup": "rbac.authorization.k8s.io"}
    reference = {"kind": "ClusterRole", "name": "outsider", "apiGroup": "rbac.authorization.k8s.io"}
    await kube.create(
        f"{path[:-1]}bindings", {"metadata": role["metadata"], "roleRef": reference, "subjects": [subject]}
    )
    verbs: list[str] = []
    # the request that is there is kept where it cannot be followed: that is no answer to it
    lacks: list[tuple[str, Object]] = [
        ("retrying", {"kind": "denied"}),
        ("request_not_watched", {}),
        ("retrying", {"kind": "unauthenticated"}),
    ]
    async with agent(place, {"type": "kubernetes", **keys}, fraction=FRACTION) as running:
        for name, fields in lacks:
            denied = await running.event(name, **fields)
            rule = yaml.safe_load(re.findall(r"the rule (\{.*\}) in a ClusterRole", str(denied["cause"]))[0])
            verbs += rule["verbs"]
            role["rules"].append(rule)
            there = (await kube.ask("GET", f"{path}/outsider")).json()
            await kube.ask("PUT", f"{path}/outsider", {**there, "rules": role["rules"]})
        await running.first(within=90)
        reported = await running.event("request_not_deleted")
    assert verbs == ["create", "watch", "get"]
    assert 'verbs: ["delete"]' in str(reported["cause"])
    for each in await kube.items(CSRS):
        await kube.ask("DELETE", f"{CSRS}/{each['metadata']['name']}")


@pytest.mark.usefixtures("signer")
async def test_roots_from_a_config_map_once_the_rule_in_the_error_is_given(
    kube: Cluster, issuer: Issuer, in_pod: Object, place: Path
) -> None:
    content = {
        "metadata": {"name": "workload-roots"},
        "data": {"ca.crt": issuer.root.public_bytes(Encoding.PEM).decode()},
    }
    await kube.create("/api/v1/namespaces/shop/configmaps", content)
    keys = {key: value for key, value in in_pod.items() if key != "trust_bundle_signer"}
    async with agent(place, {**keys, "trust_config_map": "shop/workload-roots/ca.crt"}, fraction=FRACTION) as running:
        denied = await running.event("retrying", kind="denied")
        assert '{apiGroups: [""], resources: ["configmaps"], verbs: ["get"]} in a Role of the' in str(denied["cause"])
        rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"], "resourceNames": ["workload-roots"]}
        path = "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/roles"
        await kube.create(path, {"metadata": {"name": "roots"}, "rules": [rule]})
        reference = {"kind": "Role", "name": "roots", "apiGroup": "rbac.authorization.k8s.io"}
        subject = {"kind": "ServiceAccount", "name": "sds-agent", "namespace": "shop"}
        await kube.create(
            f"{path[:-1]}bindings", {"metadata": {"name": "roots"}, "roleRef": reference, "subjects": [subject]}
        )
        await running.first()
        assert set(running.bundle) == {issuer.root}


async def test_cert_managers_request_from_first_certificate_to_key_rotation(
    signer: Signer, issuer: Issuer, in_pod: Object, place: Path
) -> None:
    """The resource is in the real API server; the controller stands in."""
    signer.collections = [REQUESTS]
    keys = {key: in_pod[key] for key in ("type", "service_account")}
    chosen = {**keys, "issuer_name": "workloads", "trust_status_ca": True}
    new = Issuer("second")
    async with agent(place, chosen, ttl="30s", fraction=FRACTION) as running:
        await running.first()
        await running.renewed(3)
        assert set(running.bundle) == {issuer.root}
        signer.sign = new.sign
        await running.more(2)
        assert running.chain()[0].issuer == new.root.subject
        await running.bundle_with(new.root)
    asked = signer.seen[0]
    assert asked["spec"]["issuerRef"] == {"name": "workloads", "kind": "Issuer", "group": "cert-manager.io"}
    assert (asked["spec"]["duration"], asked["spec"]["isCA"], asked["metadata"]["namespace"]) == ("30s", False, "shop")


# What the stand-in of the ordinary tests says


def _request(**changed: object) -> Object:
    csr = make_csr(generate(KeyType.EC_P256), URI)
    spec = {"request": base64.b64encode(csr).decode(), "signerName": SIGNER, "usages": ["client auth"]}
    return {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "spec": {**spec, **changed}}


STRICT = f"{CSRS}?fieldValidation=Strict"
DER = base64.b64encode(b"\x30\x03\x02\x01\x00").decode()
ANSWERS: dict[str, tuple[str, str, Object | None, str]] = {
    "no token": ("GET", f"{CSRS}/x", None, "none"),
    "no such object": ("GET", f"{CSRS}/x", None, ADMIN),
    "no such version": ("GET", "/apis/certificates.k8s.io/v1/clustertrustbundles/x", None, ADMIN),
    "no such group": ("GET", "/apis/none.example/v1/things/x", None, ADMIN),
    "created": ("POST", STRICT, {**_request(), "metadata": {"name": "compared"}}, ADMIN),
    "the same name": ("POST", STRICT, {**_request(), "metadata": {"name": "compared"}}, ADMIN),
    "an unknown field": ("POST", STRICT, {**_request(no="x"), "metadata": {"name": "unknown"}}, ADMIN),
    "too short": ("POST", STRICT, {**_request(expirationSeconds=599), "metadata": {"name": "short"}}, ADMIN),
    "no pem": ("POST", STRICT, {**_request(request=DER), "metadata": {"name": "der"}}, ADMIN),
    "another uid": ("DELETE", f"{CSRS}/compared", {"preconditions": {"uid": "x"}}, ADMIN),
}


async def test_the_stand_in_of_the_ordinary_tests_answers_as_the_real_server(kube: Cluster, place: Path) -> None:
    """In all that the adapter reads: the code, the reason, whether an object is named, and the fields at fault."""
    stand_in = KubernetesServer()
    stand_in.token = ADMIN
    differ = {}
    async with stand_in.serving():
        other = Cluster(kube.api, place, stand_in.http.port)
        for name, (method, path, content, token) in ANSWERS.items():
            real, ours = [_read(await each.ask(method, path, content, token=token)) for each in (kube, other)]
            if real != ours:
                differ[name] = (real, ours)
    await kube.ask("DELETE", f"{CSRS}/compared")
    assert differ == {}


def _read(answer: Any) -> tuple[object, ...]:
    try:
        said = answer.json()
    except ValueError:
        return answer.status_code, answer.text
    details = said.get("details") or {}
    fields = [cause["field"] for cause in details.get("causes") or []]
    return answer.status_code, said.get("reason"), "name" in details, fields
