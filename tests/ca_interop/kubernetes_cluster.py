"""A real kube-apiserver with etcd, and a signer that stands in for a controller: it approves, signs, denies and fails.

There is no kubelet, no scheduler and no cert-manager: its CustomResourceDefinition here is of our own making and has
what the adapter uses, and the same controller answers its requests.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from ca_interop.driver import Server, program, server
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.hierarchy import new_key
from fakes.istio_parts import free_port
from fakes.kubernetes_server import write_kubeconfig

from sds_agent.pki.certificates import write_pem

ADMIN = "an-administrators-token"
SIGNER = "example.com/workloads"
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
REQUESTS = "/apis/cert-manager.io/v1/namespaces/shop/certificaterequests"
BUNDLES = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles"
PAGE = Path(__file__).parents[2] / "docs" / "authorities" / "kubernetes.md"

Object = dict[str, Any]
Sign = Callable[[x509.CertificateSigningRequest], list[x509.Certificate]]

_COLLECTIONS = {
    "ServiceAccount": "/api/v1/namespaces/shop/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/rolebindings",
}


class ApiAwayError(Exception):
    """The API server does not answer, or is shutting down."""


class Cluster:
    """The API server, and what its administrator does."""

    def __init__(self, api: Server, place: Path, port: int) -> None:
        self.api = api
        self.place = place
        self.url = f"https://127.0.0.1:{port}"
        self.port = port

    @property
    def roots_pem(self) -> bytes:
        """What vouches for the API server: it makes a certificate for itself."""
        return (self.place / "certs" / "apiserver.crt").read_bytes()

    async def ask(self, method: str, path: str, content: object = None, *, token: str = ADMIN) -> httpx.Response:
        """One request in the name of the administrator. Raises ApiAwayError."""
        headers = {"authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=20) as client:  # noqa: S501 - the test's own
            try:
                answer = await client.request(method, self.url + path, json=content, headers=headers)
            except httpx.HTTPError as error:
                raise ApiAwayError(str(error)) from error
        if answer.status_code >= 500:
            raise ApiAwayError(answer.text)
        return answer

    async def create(self, path: str, content: Object) -> Object:
        """Create an object, and return it."""
        answer = await self.ask("POST", path, content)
        assert answer.status_code in {200, 201}, answer.text
        created: Object = answer.json()
        return created

    async def items(self, path: str) -> list[Object]:
        """All objects of a collection."""
        answer = await self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        found: list[Object] = answer.json()["items"]
        return found

    async def ready(self) -> None:
        """Wait until the API server has made what it makes for itself, the rules of its own accounts for one."""
        await self._answers("/readyz")

    async def _answers(self, path: str) -> None:
        """Wait until it answers there; it tells nobody when it will."""
        for _ in range(600):
            try:
                if (await self.ask("GET", path)).status_code == 200:
                    return
            except ApiAwayError:
                assert "command failed" not in self.api.output, self.api.output[-2000:]
            await asyncio.sleep(0.1)
        raise AssertionError(self.api.output[-2000:])

    async def restart(self) -> None:
        """Stop the API server and start it again."""
        await self.api.stop()
        await self.api.start()
        await self.ready()

    async def apply_page(self) -> None:
        """Create what the page of the kind shows: the account and its rules, as a reader pastes them."""
        blocks = PAGE.read_text().split("<<'EOT'\n")[1:]
        manifests = [
            block.split("EOT\n")[0] for block in blocks if "kind: ServiceAccount\n" in block or "Role" in block
        ]
        for each in (each for manifest in manifests for each in yaml.safe_load_all(manifest)):
            if each["kind"] in _COLLECTIONS:
                await self.create(_COLLECTIONS[each["kind"]], each)

    async def service_account(self, directory: Path) -> Path:
        """A directory as the kubelet mounts it, with a token that the API server signs."""
        path = "/api/v1/namespaces/shop/serviceaccounts/sds-agent/token"
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}}
        made = await self.create(path, review)
        files = {"token": made["status"]["token"].encode(), "ca.crt": self.roots_pem, "namespace": b"shop"}
        for name, content in files.items():
            _write(directory / name, content)
        return directory

    def kubeconfig(self, directory: Path, token: str) -> Path:
        """A kubeconfig with that token."""
        return write_kubeconfig(directory, self.url, self.roots_pem, token=token)

    async def trust(self, name: str, *roots: x509.Certificate) -> None:
        """Put these roots into a ClusterTrustBundle of the signer, created if it is not there."""
        full = f"example.com:workloads:{name}"
        content: Object = {
            "apiVersion": "certificates.k8s.io/v1beta1",
            "kind": "ClusterTrustBundle",
            "metadata": {"name": full},
            "spec": {"signerName": SIGNER, "trustBundle": write_pem(roots).decode()},
        }
        if (await self.ask("POST", BUNDLES, content)).status_code == 409:
            there = (await self.ask("GET", f"{BUNDLES}/{full}")).json()
            answer = await self.ask("PUT", f"{BUNDLES}/{full}", {**there, "spec": content["spec"]})
            assert answer.status_code == 200, answer.text

    async def install_cert_manager(self) -> None:
        """Its CustomResourceDefinition, as far as the adapter uses it."""
        anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        issuer = {"type": "object", "properties": {key: {"type": "string"} for key in ("name", "kind", "group")}}
        spec = {
            "type": "object",
            "required": ["request", "issuerRef"],
            "properties": {
                "request": {"type": "string", "format": "byte"},
                "issuerRef": issuer,
                "duration": {"type": "string"},
                "usages": {"type": "array", "items": {"type": "string"}},
                "isCA": {"type": "boolean"},
            },
        }
        schema = {"type": "object", "properties": {"spec": spec, "status": anything}}
        version = {
            "name": "v1",
            "served": True,
            "storage": True,
            "schema": {"openAPIV3Schema": schema},
            "subresources": {"status": {}},
        }
        names = {"plural": "certificaterequests", "singular": "certificaterequest", "kind": "CertificateRequest"}
        await self.create(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {
                    "name": "certificaterequests.cert-manager.io",
                    "annotations": {"api-approved.kubernetes.io": "unapproved, a test's own"},
                },
                "spec": {"group": "cert-manager.io", "scope": "Namespaced", "names": names, "versions": [version]},
            },
        )
        await self._answers(REQUESTS)


class Signer:
    """The controller. `answer` is what it does with each request that it has not seen: one of its methods."""

    def __init__(self, cluster: Cluster, sign: Sign) -> None:
        self.cluster = cluster
        self.sign = sign
        self.answer: Callable[[Object], Awaitable[None]] = self.certify
        self.collections = [CSRS]
        self.seen: list[Object] = []
        self._known = set[str]()
        self._more = asyncio.Event()
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Signer"]:
        """Answer requests inside this context, also while the API server comes and goes."""
        task = asyncio.create_task(self._run())
        try:
            yield self
        finally:
            self._stopping = True  # not cancelled: httpcore forgets a connection that is cancelled in its handshake
            await asyncio.wait([task])
        task.result()

    async def asked(self, count: int = 1) -> Object:
        """Wait for so many requests, and return the newest."""
        async with asyncio.timeout(30):
            while len(self.seen) < count:
                self._more.clear()
                await self._more.wait()
        return self.seen[-1]

    async def certify(self, request: Object) -> None:
        """Approve it and sign it, one after the other, as an approver and a signer do."""
        await self.approve(request)
        await self.put_certificate(request)

    async def approve(self, request: Object) -> None:
        """What `kubectl certificate approve` and `cmctl approve` do."""
        await self._condition(request, {"type": "Approved", "reason": "Test", "message": "it may"})

    async def deny(self, request: Object) -> None:
        """What `kubectl certificate deny` does."""
        await self._condition(request, {"type": "Denied", "reason": "Policy", "message": "not this identity"})

    async def fail(self, request: Object) -> None:
        """What a signer does that cannot sign what was approved."""
        await self.approve(request)
        failed = {"type": "Failed", "reason": "SignerError", "message": "no such usage"}
        await self._condition(request, failed, subresource="status")

    async def leave(self, _request: Object) -> None:
        """Nothing, as where no controller runs."""

    async def put_certificate(self, request: Object) -> None:
        """Sign it. cert-manager also tells the root."""
        *chain, root = self.sign(x509.load_pem_x509_csr(base64.b64decode(request["spec"]["request"])))

        def change(status: Object) -> Object:
            told = {"ca": _encoded(root)} if self._of_cert_manager(request) else {}
            return {**status, "certificate": _encoded(*chain), **told}

        await self._update(request, "status", change)

    def _of_cert_manager(self, request: Object) -> bool:
        return bool(request["spec"].get("issuerRef"))

    async def _condition(self, request: Object, condition: Object, subresource: str = "approval") -> None:
        place = "status" if self._of_cert_manager(request) else subresource

        def change(status: Object) -> Object:
            return {**status, "conditions": [*status.get("conditions", []), {"status": "True", **condition}]}

        await self._update(request, place, change)

    async def _update(self, request: Object, subresource: str, change: Callable[[Object], Object]) -> None:
        collection = REQUESTS if self._of_cert_manager(request) else CSRS
        path = f"{collection}/{request['metadata']['name']}"
        there = (await self.cluster.ask("GET", path)).json()
        changed = {**there, "status": change(there.get("status", {}))}
        answer = await self.cluster.ask("PUT", f"{path}/{subresource}", changed)
        assert answer.status_code in {200, 404}, answer.text  # it may be gone, as after an outage

    async def _run(self) -> None:
        while not self._stopping:
            try:
                for collection in self.collections:
                    for request in await self.cluster.items(collection):
                        await self._meet(request)
            except ApiAwayError:
                pass
            await asyncio.sleep(0.05)

    async def _meet(self, request: Object) -> None:
        """Requests that an earlier controller began to answer are left to the cluster's cleaner, as nobody waits."""
        if (uid := request["metadata"]["uid"]) not in self._known and not request.get("status"):
            await self.answer(request)
            self._known.add(uid)
            self.seen.append(request)
            self._more.set()


def _encoded(*certificates: x509.Certificate) -> str:
    return base64.b64encode(write_pem(certificates)).decode()


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


def _ec_key() -> bytes:
    """A key of the API server's, which does not read PKCS#8 where it wants a public key."""
    return new_key().private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


@asynccontextmanager
async def cluster(place: Path) -> AsyncIterator[Cluster]:
    """etcd and the API server, with the namespace `shop`, inside this context."""
    _write(place / "sa.key", _ec_key())
    _write(place / "tokens.csv", f"{ADMIN},admin,admin,system:masters\noutsider,outsider,outsider\n".encode())
    store, peers, port = "unix://localhost:1", "http://127.0.0.1:0", free_port()
    etcd = [program("etcd"), "--data-dir", str(place / "etcd"), "--listen-client-urls", store]
    etcd += ["--advertise-client-urls", store, "--listen-peer-urls", peers]
    etcd += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
    options = {
        "etcd-servers": store,  # a socket in the directory that both run in
        "bind-address": "127.0.0.1",
        "secure-port": str(port),
        "cert-dir": str(place / "certs"),
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-signing-key-file": str(place / "sa.key"),
        "service-account-key-file": str(place / "sa.key"),
        "service-cluster-ip-range": "10.0.0.0/24",
        "token-auth-file": str(place / "tokens.csv"),
        "authorization-mode": "RBAC",
        "endpoint-reconciler-type": "none",
        "feature-gates": "ClusterTrustBundle=true",
        "runtime-config": "certificates.k8s.io/v1beta1/clustertrustbundles=true",
    }
    command = [program("kube-apiserver"), *(f"--{key}={value}" for key, value in options.items())]
    async with (
        server(Server(place / "etcd.log", etcd, says="ready to serve client requests", directory=place)),
        server(Server(place / "api.log", command, port=port, directory=place)) as api,
    ):
        made = Cluster(api, place, port)
        await made.ready()
        shop = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
        await made.create("/api/v1/namespaces", shop)
        yield made
