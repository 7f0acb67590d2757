"""A stand-in for a Kubernetes API server, as far as istiod asks one: empty but for pods and their tokens.

It answers lists, gives watches that nothing ever comes of, reviews tokens, and keeps what is created. Beside that it
serves the key set of the issuer of its tokens.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fakes.ca_servers import TokenIssuer

KEY_SET = "/openid/v1/jwks"


@dataclass(frozen=True)
class Pod:
    """A pod, all on one node. Its token is its name."""

    namespace: str
    account: str
    name: str

    def listed(self) -> dict[str, Any]:
        """As an API server lists it."""
        return {
            "metadata": {"namespace": self.namespace, "name": self.name, "uid": self.name, "resourceVersion": "1"},
            "spec": {"serviceAccountName": self.account, "nodeName": "node"},
            "status": {"phase": "Running"},
        }

    def user(self) -> dict[str, Any]:
        """As a token review names the pod's user."""
        return {
            "username": f"system:serviceaccount:{self.namespace}:{self.account}",
            "groups": ["system:serviceaccounts"],
            "extra": {
                "authentication.kubernetes.io/pod-name": [self.name],
                "authentication.kubernetes.io/pod-uid": [self.name],
            },
        }


WEB_POD = Pod("default", "web", "web-1")
ZTUNNEL = Pod("istio-system", "ztunnel", "ztunnel-1")


@dataclass
class Kubernetes:
    """The server's state; `created` has what clients created, by its path."""

    pods: tuple[Pod, ...]
    address: str
    issuer: TokenIssuer = field(default_factory=TokenIssuer)
    created: dict[str, Any] = field(default_factory=dict)
    gone: threading.Event = field(default_factory=threading.Event)

    def kubeconfig(self, directory: Path) -> Path:
        """A file that leads kubectl and its like to the server."""
        file = directory / "kubeconfig"
        content = {
            "clusters": [{"name": "here", "cluster": {"server": self.address}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "current-context": "here",
            "users": [{"name": "me", "user": {}}],
        }
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **content}))
        return file

    def reviewed(self, token: str) -> dict[str, Any]:
        """The status of a TokenReview."""
        for pod in self.pods:
            if pod.name == token:
                return {"authenticated": True, "user": pod.user()}
        return {"authenticated": False, "error": "no pod has this token"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    known: Kubernetes


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known, url = self.server.known, urlsplit(self.path)
        query = parse_qs(url.query)
        parts = url.path.strip("/").split("/")
        if url.path == KEY_SET:
            self._answer(200, json.loads(known.issuer.key_set()))
        elif url.path == "/version":
            self._answer(200, {"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
        elif url.path in known.created:
            self._answer(200, known.created[url.path])
        elif "sendInitialEvents" in query:
            self._refuse(422, "Invalid")  # so the client lists instead
        elif "watch" in query:
            self._watch()
        elif _is_collection(parts):
            items = [pod.listed() for pod in known.pods] if parts[-1] == "pods" else []
            self._answer(200, {**self._kind(), "metadata": {"resourceVersion": "1"}, "items": items})
        else:
            self._refuse(404, "NotFound")

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        sent = json.loads(self.rfile.read(length))
        if self.path.endswith("/tokenreviews"):
            self._answer(201, {**sent, "status": self.server.known.reviewed(sent["spec"]["token"])})
            return
        path = f"{urlsplit(self.path).path}/{sent['metadata'].get('name')}"
        self.server.known.created[path] = sent
        self._answer(201, sent)

    def do_PUT(self) -> None:
        self.do_POST()

    def _kind(self) -> dict[str, str]:
        """Only a client that wants metadata alone needs the kind in the answer."""
        if "as=PartialObjectMetadataList" in self.headers.get("accept", ""):
            return {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"}
        return {}

    def _watch(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        self.server.known.gone.wait()
        self.close_connection = True

    def _refuse(self, code: int, reason: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self._answer(code, status)

    def _answer(self, code: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the standard library's name
        """Log nothing."""


def _is_collection(parts: list[str]) -> bool:
    """Whether a path names all resources of a kind: `api/v1/pods`, `apis/GROUP/VERSION/namespaces/NAMESPACE/KIND`."""
    inside = parts[2:] if parts[0] == "api" else parts[3:]
    return len(inside) in {1, 3}


@contextmanager
def kubernetes(*pods: Pod) -> Iterator[Kubernetes]:
    """Serve on loopback inside this context."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        known = server.known = Kubernetes(pods, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield known
        finally:
            known.gone.set()
            server.shutdown()
            thread.join()
