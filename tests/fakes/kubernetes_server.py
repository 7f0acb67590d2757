"""A stand-in for the API server of Kubernetes, and for a signer behind it, written from the client's contract.

It stands in for kube-apiserver 1.36 as far as certificates go: CertificateSigningRequests, cert-manager's
CertificateRequests, ClusterTrustBundles and ConfigMaps, with watches, and with the answers of a real one to what is
wrong: a Status. `tests/ca_interop/test_kubernetes.py` runs the same client with a real one.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography import x509
from fakes.https_server import CHUNKED, GoingOn, HttpsServer, Reply, Request, chunk, json_reply

from sds_agent.pki.certificates import write_pem

TOKEN = "a.token.of-the-service-account-of-the-agent"
SIGNER = "example.com/workloads"
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
REQUESTS = "/apis/cert-manager.io/v1/namespaces/shop/certificaterequests"
BUNDLES = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles"
CONFIG_MAPS = "/api/v1/namespaces/pki/configmaps"

Object = dict[str, Any]
Sign = Callable[[bytes], tuple[x509.Certificate, ...]]

_FIELDS = {
    CSRS: {"request", "signerName", "usages", "expirationSeconds", "username", "uid", "groups", "extra"},
    REQUESTS: {"request", "issuerRef", "duration", "usages", "isCA", "username", "uid", "groups", "extra"},
}
"""What a spec may hold, by collection."""


class KubernetesServer:
    """The API server. `sign`, where it is given, approves and signs every request as soon as it is created.

    `collections` are served, and no other path is. `forbidden` are pairs of a verb and a plural. `watch_seconds` is how
    long a watch may be at most, and `gone` how many watches begin too late. `replies` take the place of an answer:
    each is removed when it is used. `reads` are the paths that were read.
    """

    def __init__(self, sign: Sign | None = None) -> None:
        self.sign = sign
        self.token = TOKEN
        self.objects: dict[str, Object] = {}
        self.collections = {CSRS, REQUESTS, BUNDLES, CONFIG_MAPS}
        self.forbidden: set[tuple[str, str]] = set()
        self.watch_seconds = 300.0
        self.bookmarks = False
        self.gone = 0
        self.replies: dict[tuple[str, str], Reply] = {}
        self.deleted: list[str] = []
        self.reads: list[str] = []
        self.watches = 0
        self.ready = True
        self.http = HttpsServer(self._answer)
        self._events: list[tuple[int, str, Object]] = []
        self._version = 100
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["KubernetesServer"]:
        """Serve on loopback inside this context."""
        async with self.http.serving():
            yield self

    # what controllers and administrators do

    def put(self, path: str, content: Object) -> None:
        """Create or replace an object."""
        self._store(path, {**content, "metadata": {"name": unquote(path.rpartition("/")[2])}})

    def conditions(self, path: str, *conditions: Object) -> None:
        """Add conditions to the status of a request."""
        status = self.objects[path].get("status", {})
        held = status.get("conditions", [])
        self._store(path, {**self.objects[path], "status": {**status, "conditions": [*held, *conditions]}})

    def approve(self, path: str) -> None:
        """What `kubectl certificate approve` does."""
        self.conditions(path, {"type": "Approved", "status": "True", "reason": "ByHand"})

    def certify(self, path: str, ca: bytes | None = None) -> None:
        """What a signer does: the certificate comes with no condition in Kubernetes' own request."""
        assert self.sign is not None
        chain = self.sign(base64.b64decode(self.objects[path]["spec"]["request"]))
        # a real API server accepts no certificate without PEM; a controller of cert-manager may write anything
        pem = write_pem(chain) if chain else b"nothing"
        status = {**self.objects[path].get("status", {}), "certificate": base64.b64encode(pem).decode()}
        if ca is not None:
            status["ca"] = base64.b64encode(ca).decode()
        self._store(path, {**self.objects[path], "status": status})

    def remove(self, path: str) -> None:
        """Delete an object."""
        gone = self.objects.pop(path)
        self.deleted.append(path)
        self._version += 1
        self._event("DELETED", {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._version)}})

    async def until(self, seen: Callable[[], bool]) -> None:
        """Wait until a change of an object, or a watch that begins, makes this true."""
        async with asyncio.timeout(10):
            while not seen():
                await self._changed.wait()

    async def created(self, collection: str = CSRS, count: int = 1) -> str:
        """Wait for so many objects in a collection, and return the path of the newest."""

        def found() -> list[str]:
            return [path for path in self.objects if path.startswith(f"{collection}/")]

        await self.until(lambda: len(found()) >= count)
        return found()[-1]

    async def watched(self, count: int = 1) -> None:
        """Wait for so many watches to have begun."""
        await self.until(lambda: self.watches >= count)

    def kubeconfig(self, directory: Path, **user: object) -> Path:
        """A file that leads to the server with the token in another file."""
        (directory / "token").write_text(f"{TOKEN}\n")
        return write_kubeconfig(directory, self.http.url, self.http.roots_pem, **({"tokenFile": "token"} | user))

    # the API

    def _store(self, path: str, content: Object) -> None:
        kind = "MODIFIED" if path in self.objects else "ADDED"
        old = self.objects.get(path, {}).get("metadata", {})
        self._version += 1
        metadata = {"uid": f"uid-{self._version}", **content["metadata"], **old}
        self.objects[path] = {**content, "metadata": {**metadata, "resourceVersion": str(self._version)}}
        self._event(kind, self.objects[path])

    def _event(self, kind: str, content: Object) -> None:
        self._events.append((self._version, kind, content))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, request: Request) -> Reply | None:
        url = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = url.path
        if (reply := self.replies.pop((request.method, path), None)) is not None:
            return reply
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return status(401, "Unauthorized", "Unauthorized")
        if path == "/readyz":
            return Reply(200, b"ok") if self.ready else Reply(500, b"[-]informer-sync failed")
        collection = path if path in self.collections else path.rpartition("/")[0]
        verb = _verb(request.method, query, whole=collection == path)
        plural = collection.rpartition("/")[2]
        if (verb, plural) in self.forbidden:
            said = f'{plural} is forbidden: User "agent" cannot {verb} resource "{plural}"'
            return status(403, "Forbidden", said, {"kind": plural})
        if collection not in self.collections:
            known = path.startswith("/apis/certificates.k8s.io/")
            missing = "the server could not find the requested resource"
            return status(404, "NotFound", missing, {}) if known else Reply(404, b"404 page not found\n")
        return self._do(verb, request, path, query)

    def _do(self, verb: str, request: Request, path: str, query: dict[str, str]) -> Reply:
        if verb == "create":
            return self._create(path, request.json, strict=query.get("fieldValidation") == "Strict")
        if verb == "watch":
            return GoingOn(parts=self._watch(query))
        if verb == "list":
            items = [each for name, each in self.objects.items() if name.startswith(f"{path}/")]
            return json_reply({"items": [each for each in items if _selected(each, query)]})
        if path not in self.objects:
            return status(404, "NotFound", "it is not found", {"name": unquote(path.rpartition("/")[2])})
        if verb == "get":
            self.reads.append(path)
            self._wake()
            return json_reply(self.objects[path])
        return self._delete(path, request.json)

    def _delete(self, path: str, options: Object) -> Reply:
        uid = self.objects[path]["metadata"]["uid"]
        if options.get("preconditions", {}).get("uid", uid) != uid:
            return status(409, "Conflict", "Precondition failed: UID", {"name": unquote(path.rpartition("/")[2])})
        self.remove(path)
        return json_reply({"kind": "Status", "status": "Success"})

    def _create(self, collection: str, sent: Object, *, strict: bool) -> Reply:
        unknown = set(sent["spec"]) - _FIELDS[collection]
        if unknown and strict:
            return status(400, "BadRequest", f"strict decoding error: unknown field {unknown}")
        name = sent["metadata"]["name"]
        path = f"{collection}/{name}"
        if path in self.objects:
            return status(409, "AlreadyExists", f'"{name}" already exists', {"name": name})
        causes = []
        if b"-----BEGIN CERTIFICATE REQUEST-----" not in base64.b64decode(sent["spec"]["request"]):
            causes.append({"field": "spec.request", "message": "PEM block type must be CERTIFICATE REQUEST"})
        if sent["spec"].get("expirationSeconds", 600) < 600:
            causes.append({"field": "spec.expirationSeconds", "message": "may not specify a duration less than 600"})
        if causes:
            return status(422, "Invalid", "the request is invalid", {"name": name, "causes": causes})
        self._store(path, sent)
        created = self.objects[path]
        if self.sign is not None:
            self.approve(path)
            self.certify(path)
        return json_reply(created, 201)

    async def _watch(self, query: dict[str, str]) -> AsyncIterator[bytes]:
        since, name = int(query["resourceVersion"]), query["fieldSelector"].removeprefix("metadata.name=")
        yield CHUNKED
        self.watches += 1
        self._wake()
        if self.gone:
            self.gone -= 1
            expired = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            yield chunk(_line("ERROR", expired))
            yield chunk(b"")
            return
        sent = 0
        if self.bookmarks:
            yield chunk(_line("BOOKMARK", {"metadata": {"resourceVersion": str(self._version)}}))
        try:
            async with asyncio.timeout(min(self.watch_seconds, float(query["timeoutSeconds"]))):
                while True:
                    while sent < len(self._events):
                        version, kind, content = self._events[sent]
                        sent += 1
                        if version > since and content["metadata"]["name"] == name:
                            yield chunk(_line(kind, content))
                    await self._changed.wait()
        except TimeoutError:
            yield chunk(b"")


def _line(kind: str, content: Object) -> bytes:
    return json.dumps({"type": kind, "object": content}).encode() + b"\n"


def _verb(method: str, query: dict[str, str], *, whole: bool) -> str:
    if method == "GET":
        return "watch" if "watch" in query else "list" if whole else "get"
    return {"POST": "create", "DELETE": "delete"}[method]


def _selected(each: Object, query: dict[str, str]) -> bool:
    wanted = query.get("fieldSelector", "").removeprefix("spec.signerName=")
    return not wanted or each["spec"].get("signerName") == wanted


def status(code: int, reason: str, message: str, details: Object | None = None, **headers: str) -> Reply:
    """A Status of a failure."""
    said = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    extra = {} if details is None else {"details": details}
    return json_reply({**said, "message": message, "reason": reason, "code": code, **extra}, code, **headers)


def write_kubeconfig(directory: Path, url: str, roots_pem: bytes, **user: object) -> Path:
    """A kubeconfig with one context, whose user has these keys."""
    file = directory / "kubeconfig"
    cluster = {"server": url, "certificate-authority-data": base64.b64encode(roots_pem).decode()}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "shop"}}],
        "clusters": [{"name": "here", "cluster": cluster}],
        "users": [{"name": "me", "user": user}],
    }
    file.write_text(json.dumps(content))
    return file
