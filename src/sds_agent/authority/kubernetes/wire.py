"""The two kinds of request, as values: what is created, how its state is read, and what a refusal means. No I/O.

A request is an object that the agent creates and a controller answers, in the object's status. For a
CertificateSigningRequest of Kubernetes (`certificates.k8s.io/v1`) somebody approves it and a signer puts the
certificate there, in that order: approved alone is not done. Denied and Failed are final; Failed may stand beside
Approved. cert-manager's CertificateRequest says the same in other conditions.

A name stands for one request of one workload to one signer: the agent that asks again finds its own object, and no
other's, also where the answer to its creation was lost.
"""

import hashlib
from datetime import datetime
from enum import Enum
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct, field

from sds_agent.authority import answers
from sds_agent.authority.http_message import REQUEST_TIMEOUT, HttpAnswer
from sds_agent.authority.kubernetes.settings import LEAST_TTL, KubernetesSettings
from sds_agent.authority.protocol import AuthorityError, ErrorKind, IssueRequest

T = TypeVar("T")

LABELS = {"app.kubernetes.io/managed-by": "sds-agent"}
MOST_CAUSES = 20
"""Causes of a refusal that are read."""
_USAGES = ["digital signature", "client auth", "server auth"]


class ApiResource(Struct, frozen=True):
    """A resource of the API, in a namespace or, without one, in the cluster."""

    group: str
    version: str
    plural: str
    kind: str
    namespace: str | None = None

    @property
    def path(self) -> str:
        """The path of the collection."""
        start = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{start}/namespaces/{self.namespace}/{self.plural}" if self.namespace else f"{start}/{self.plural}"

    def rule(self, verb: str) -> str:
        """The rule of RBAC that allows this, and where it belongs."""
        place = f"a Role of the namespace {self.namespace}" if self.namespace else "a ClusterRole"
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.plural}"], verbs: ["{verb}"]}} in {place}'


class Flavour(Enum):
    """Which of the two APIs carries the request."""

    KUBERNETES = "CertificateSigningRequest"
    CERT_MANAGER = "CertificateRequest"


class SigningTarget(Struct, frozen=True):
    """Where requests go, and `signer`, who answers them, as messages name it."""

    flavour: Flavour
    resource: ApiResource
    signer: str


class Cause(Struct):
    """A field that the API server does not accept."""

    field: str = ""
    message: str = ""


class StatusDetails(Struct):
    """What a Status says beside its message."""

    name: str = ""
    causes: list[Cause] | None = None
    retry_after: float = field(name="retryAfterSeconds", default=0)


class ApiStatus(Struct):
    """A Status: the API server's answer where it gives no object."""

    reason: str = ""
    message: str = ""
    code: int = 0
    details: StatusDetails | None = None

    def words(self) -> str:
        """What it says, on one line."""
        message = self.message[: answers.LONGEST_TEXT]
        listed = ((self.details and self.details.causes) or [])[:MOST_CAUSES]
        causes = [f"{each.field}: {each.message}" for each in listed]
        return answers.words("; ".join([message, *(each for each in causes if each not in message)]))


class Condition(Struct):
    """A condition in a status. `status` is text: True, False or Unknown."""

    type: str
    status: str = "True"
    reason: str = ""
    message: str = ""

    @property
    def words(self) -> str:
        """Why, in its own words."""
        said = ": ".join(filter(None, [self.reason, self.message]))
        return answers.words(said) or "it gives no reason"


class RequestStatus(Struct):
    """`ca` is cert-manager's."""

    conditions: list[Condition] | None = None
    certificate: bytes | None = None
    ca: bytes | None = None


class RequestSpec(Struct):
    """What was asked."""

    request: bytes


class ObjectMetadata(Struct, rename="camel"):
    """Which object, and in which version."""

    name: str
    uid: str
    resource_version: str


class SigningObject(Struct):
    """A CertificateSigningRequest or a CertificateRequest."""

    metadata: ObjectMetadata
    spec: RequestSpec
    status: RequestStatus | None = None

    def condition(self, *types: str) -> Condition | None:
        """The first condition of one of these types that is true."""
        conditions = (self.status and self.status.conditions) or ()
        return next((each for each in conditions if each.type in types and each.status == "True"), None)


class WatchEvent(Struct):
    """A line of a watch. The object is one of the resource's, or for ERROR a Status; that of a BOOKMARK is empty but
    for its version.
    """

    type: str
    object: Raw


class SigningChange(Struct, frozen=True):
    """What a line of a watch says: the object's newest state, or none, as in a bookmark."""

    found: SigningObject | None = None
    deleted: bool = False
    expired: bool = False
    """The version that the watch began with is too old: read the object again."""


def signing_target(chosen: KubernetesSettings, namespace: str) -> SigningTarget:
    """Where the requests of an authority go. `namespace` is that of the access, for where the settings name none."""
    if chosen.issuer_name is None:
        resource = ApiResource("certificates.k8s.io", "v1", "certificatesigningrequests", Flavour.KUBERNETES.value)
        return SigningTarget(Flavour.KUBERNETES, resource, str(chosen.signer_name))
    where = chosen.namespace or namespace
    resource = ApiResource("cert-manager.io", "v1", "certificaterequests", Flavour.CERT_MANAGER.value, where)
    signer = f"{chosen.issuer_kind}.{chosen.issuer_group}/{chosen.issuer_name}"
    return SigningTarget(Flavour.CERT_MANAGER, resource, signer)


def object_name(request: IssueRequest, target: SigningTarget) -> str:
    """The name of the request's object: the same for every attempt of one request at one signer."""
    named = "\0".join([request.request_id, target.signer, request.csr_pem.decode("ascii")])
    return f"sds-agent-{hashlib.sha256(named.encode()).hexdigest()[:40]}"


def object_bytes(request: IssueRequest, target: SigningTarget, chosen: KubernetesSettings) -> bytes:
    """The object to create."""
    seconds = int(request.ttl.total_seconds())
    spec: dict[str, object] = {"request": request.csr_pem, "usages": _USAGES}
    if target.flavour is Flavour.KUBERNETES:
        least = int(LEAST_TTL.total_seconds())
        spec |= {"signerName": chosen.signer_name, "expirationSeconds": max(least, seconds)}
    else:
        issuer = {"name": chosen.issuer_name, "kind": chosen.issuer_kind, "group": chosen.issuer_group}
        spec |= {"issuerRef": issuer, "duration": f"{max(1, seconds)}s", "isCA": False}
    return msgspec.json.encode(
        {
            "apiVersion": f"{target.resource.group}/{target.resource.version}",
            "kind": target.resource.kind,
            "metadata": {"name": object_name(request, target), "labels": LABELS},
            "spec": spec,
        }
    )


def deletion_bytes(uid: str | None) -> bytes:
    """What deletes the object of this UID, and no later one of its name; without a UID, whichever has the name."""
    only = {} if uid is None else {"preconditions": {"uid": uid}}
    return msgspec.json.encode({"kind": "DeleteOptions", "apiVersion": "v1", **only})


def read_object(answer: HttpAnswer, what: str) -> SigningObject:
    """The object in an answer of 2xx. Raises AuthorityError INVALID for what is none."""
    return decoded(answer.body, SigningObject, what)


def read_change(line: bytes, what: str) -> SigningChange:
    """What a line of a watch says. Raises AuthorityError INVALID for what is none, and what an ERROR means."""
    event = decoded(line, WatchEvent, what)
    content = bytes(event.object)
    if event.type == "BOOKMARK":
        return SigningChange()
    if event.type == "ERROR":
        status = decoded(content, ApiStatus, what)
        if status.code == 410:  # Gone, with the reason Expired
            return SigningChange(expired=True)
        raise AuthorityError(ErrorKind.TRANSIENT, f"{what} ended the watch ({status.words()}); it is begun again")
    return SigningChange(decoded(content, SigningObject, what), deleted=event.type == "DELETED")


def certificate_in(found: SigningObject, target: SigningTarget) -> RequestStatus | None:
    """The status with the certificate; None while there is none.

    Raises AuthorityError DENIED or INVALID where the request was refused for good.
    """
    who = f"the {target.resource.kind} {found.metadata.name} to {target.signer}"
    if denied := found.condition("Denied"):
        fix = "the approver's policy has to allow this identity"
        raise AuthorityError(ErrorKind.DENIED, f"{who} was denied ({denied.words}); {fix}")
    if failed := found.condition("Failed", "InvalidRequest") or _not_ready(found):
        fix = "read the signer's log, and what it signs: the URI SAN, these usages, this lifetime"
        raise AuthorityError(ErrorKind.INVALID, f"{who} failed ({failed.words}); {fix}")
    status = found.status
    return status if status is not None and status.certificate else None


def _not_ready(found: SigningObject) -> Condition | None:
    """cert-manager's condition of a request that was given up: Ready is false, with the reason Failed or Denied."""
    conditions = (found.status and found.status.conditions) or ()
    ready = (each for each in conditions if each.type == "Ready" and each.status == "False")
    return next((each for each in ready if each.reason in {"Failed", "Denied"}), None)


def waits(found: SigningObject, target: SigningTarget) -> AuthorityError:
    """The error for a request that has no answer yet."""
    who = f"the {target.resource.kind} {found.metadata.name}"
    approved = found.condition("Approved") is not None
    if approved:
        fix = f"check that the controller which signs for {target.signer} runs"
        return AuthorityError(ErrorKind.PENDING, f"{who} is approved and has no certificate yet; {fix}")
    tool = "kubectl certificate approve" if target.flavour is Flavour.KUBERNETES else "cmctl approve"
    place = f" -n {target.resource.namespace}" if target.resource.namespace else ""
    fix = f"approve it ({tool} {found.metadata.name}{place}), or run an approver for {target.signer}"
    return AuthorityError(ErrorKind.PENDING, f"{who} waits for approval; {fix}")


def read_status(body: bytes) -> ApiStatus:
    """The Status in an answer; an empty one where there is none, as from a proxy before the API server."""
    return answers.decoded(body, ApiStatus) or ApiStatus()


def is_missing(answer: HttpAnswer) -> bool:
    """Whether an answer of 404 is about an object, and not about a resource or version that is not served."""
    return _names_object(read_status(answer.body))


def _names_object(status: ApiStatus) -> bool:
    return status.details is not None and status.details.name != ""


def refusal(answer: HttpAnswer, resource: ApiResource, verb: str, what: str, now: datetime) -> AuthorityError:
    """What an answer means that is neither a success nor expected. `verb` is RBAC's, such as create."""
    status = read_status(answer.body)
    words = status.words() or answer.words()
    kind, fix = _meaning(answer.status, status, resource, verb)
    delay = answer.retry_after(now) or (status.details.retry_after if status.details else None) or None
    reason = answers.words(status.reason)
    said = f"{answer.status} {reason}: {words}" if reason else f"{answer.status}: {words}"
    message = f"{what} did not {verb} {resource.plural} ({said.removesuffix(': ')}); {fix}"
    return AuthorityError(kind, message, retry_after=delay)


def _meaning(code: int, status: ApiStatus, resource: ApiResource, verb: str) -> tuple[ErrorKind, str]:
    if code == 403:
        return ErrorKind.DENIED, f"give its user the rule {resource.rule(verb)}, unless an admission policy refused"
    if code == 404:
        if verb == "create" or not _names_object(status):
            return ErrorKind.INVALID, _absent(resource)
        return ErrorKind.TRANSIENT, "it was deleted meanwhile, and is created again"
    if 500 <= code < 600 or code == REQUEST_TIMEOUT:
        return ErrorKind.TRANSIENT, "check the API server, its etcd, and the webhooks that it calls"
    return _MEANINGS.get(code, _NO_API_SERVER)


_NOT_ACCEPTED = ErrorKind.INVALID, "check what the authority's keys name, and the workload's ttl and key"
_NO_API_SERVER = ErrorKind.INVALID, "check that the server at this address is an API server of Kubernetes"
_MEANINGS = {
    400: _NOT_ACCEPTED,
    401: (
        ErrorKind.UNAUTHENTICATED,
        "the token or the client certificate is not accepted: check that it has not expired, is of this cluster, and "
        "has the API server's audience",
    ),
    409: (ErrorKind.TRANSIENT, "another change came first; it is tried again"),
    422: _NOT_ACCEPTED,
    429: (ErrorKind.THROTTLED, "it is asked less often from now on"),
}


def _absent(resource: ApiResource) -> str:
    if resource.group == "cert-manager.io":
        return f"install cert-manager in this cluster, and create the namespace {resource.namespace}"
    return f"use an API server that serves {resource.group}/{resource.version}, which Kubernetes does since 1.19"


def decoded(data: bytes, of: type[T], what: str) -> T:
    """What an answer of `what` holds, as this struct. Raises AuthorityError INVALID."""
    found = answers.decoded(data, of)
    if found is None:
        message = f"{what} answered what is no {of.__name__}; check that it is an API server"
        raise AuthorityError(ErrorKind.INVALID, message)
    return found
