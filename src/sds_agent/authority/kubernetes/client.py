"""The client of a signer behind the API of Kubernetes.

An attempt creates the request's object, or finds the one that an earlier attempt created, and watches it until its
status has the certificate or a refusal. A request that waits for a person is left as it is; the next attempt, with the
same CSR, finds it again by its name. What was answered for good, and what no attempt will come back for, is deleted
beside the answer, which does not wait for that; what still waits when the agent ends is deleted then.

A watch is an answer that goes on: a line for each change. The server ends it when its time is over, and with the code
410 (Gone) where it no longer knows the version to begin with; then the object is read again. Where the agent may not
watch, it reads the object every second.

A refusal to read or to watch an object, and an answer to that which is none, is no refusal of the request, which may
have been approved: the object stays, and the next attempt looks for it.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress

from sds_agent import log
from sds_agent.authority.answers import Questions, keeping_request
from sds_agent.authority.http_client import HttpAnswer
from sds_agent.authority.kubernetes.api import KubernetesApi, server
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.kubernetes.trust import SignerRoots
from sds_agent.authority.kubernetes.wire import (
    RequestStatus,
    SigningObject,
    SigningTarget,
    certificate_in,
    deletion_bytes,
    is_missing,
    object_bytes,
    object_name,
    read_change,
    read_object,
    signing_target,
    waits,
)
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import Clock
from sds_agent.tasks import NoThreadError, part_of_time

LOG = logging.getLogger(__name__)

TIMEOUT = 8.0
"""Seconds that an attempt waits for an answer before it says that the request is pending, where the caller does not say
how long it may take."""
OWN_SHARE = 0.8
"""The same as a part of what the caller gives."""
DELETION_TIMEOUT = 3.0
"""Seconds. An object that is not deleted within them stays, and the cluster's own cleaner takes it."""
MOST_WATCHES = 4
"""Watches in one attempt, should the server end them early."""
READ_EVERY = 1.0
"""Seconds between two readings of an object that cannot be watched."""


class _UnwatchedError(AuthorityError):
    """The agent may not watch the object."""


class KubernetesAuthority:
    """Asks a signer through the API server."""

    def __init__(self, settings: KubernetesSettings, clock: Clock, *, timeout: float = TIMEOUT) -> None:
        self._settings = settings
        self._timeout = timeout
        self._api = KubernetesApi(settings, clock)
        self._waiting: dict[str, tuple[str | None, SigningTarget]] = {}  # with the UID, once an answer has told it
        self._deletions = set[asyncio.Task[None]]()
        self._undeleted = log.LogOnChange(LOG, "request_not_deleted")
        self._unwatched = log.LogOnChange(LOG, "request_not_watched")

    async def issue(self, request: IssueRequest) -> Issuance:
        """Create the request or find it, and wait for the answer. Raises AuthorityError: PENDING without one."""
        status = await self._signed(request)
        if not status.ca:
            raise AuthorityError(
                ErrorKind.INVALID,
                f"the issuer {self._settings.issuer_name} tells no CA with its certificate (status.ca); name what "
                "holds its roots in trust_config_map, trust_bundle or roots_file, in place of trust_status_ca",
            )
        return Issuance(status.certificate or b"", status.ca)

    async def end(self) -> None:
        """Delete what still waits for an answer, as the keys of these requests end with the agent, and wait for all
        deletions, each of which is bounded in time.
        """
        for name, (uid, target) in tuple(self._waiting.items()):
            self._delete(name, uid, target)
        if self._deletions:
            await asyncio.wait(tuple(self._deletions))

    @property
    def _wait(self) -> float:
        """The seconds that an attempt waits for an answer."""
        return part_of_time(OWN_SHARE, self._timeout)

    async def _signed(self, request: IssueRequest) -> RequestStatus:
        """The status with the certificate. Raises AuthorityError."""
        end = asyncio.get_running_loop().time() + self._wait
        target = signing_target(self._settings, (await self._api.access()).namespace)
        name = object_name(request, target)
        uid, _ = self._waiting.setdefault(name, (None, target))  # before it is there: the answer to that may be lost
        try:
            found = await (self._create(request, name, target) if uid is None else self._again(request, name, target))
        except AuthorityError as error:
            if error.kind.ends_request:  # there is none of this name, or none of ours
                del self._waiting[name]
            raise
        uid = found.metadata.uid
        self._waiting[name] = uid, target
        try:
            status = await self._answered(found, target, end)
        except AuthorityError as error:
            if error.kind.ends_request:  # the next attempt has another key, and so another object
                self._delete(name, uid, target)
            raise
        self._delete(name, uid, target)
        return status

    async def _create(self, request: IssueRequest, name: str, target: SigningTarget) -> SigningObject:
        resource = target.resource
        # Strict: the API server otherwise drops a field that it does not know, without a word
        path = f"{resource.path}?fieldValidation=Strict"
        answer = await self._api.send("POST", path, object_bytes(request, target, self._settings))
        if answer.status == 409:
            return _own(await self._get(name, target), request, target)
        if answer.status not in {200, 201}:
            raise await self._api.refusal(answer, target.resource, "create")
        return read_object(answer, server(answer))

    async def _again(self, request: IssueRequest, name: str, target: SigningTarget) -> SigningObject:
        """The object that an earlier attempt created, or a new one where it is gone.

        To create it once more would fail with 409 at best: who may create may have changed meanwhile, and is asked
        first.
        """
        answer = await self._read(name, target)
        if answer.status == 404 and is_missing(answer):
            return await self._create(request, name, target)
        return _own(await self._found(answer, target), request, target)

    async def _get(self, name: str, target: SigningTarget) -> SigningObject:
        return await self._found(await self._read(name, target), target)

    async def _read(self, name: str, target: SigningTarget) -> HttpAnswer:
        with _keeping_request():
            return await self._api.send("GET", f"{target.resource.path}/{name}")

    async def _found(self, answer: HttpAnswer, target: SigningTarget) -> SigningObject:
        if answer.status != 200:
            raise await self._refusal(answer, target, "get")
        with _keeping_request():
            return read_object(answer, server(answer))

    async def _refusal(self, answer: HttpAnswer, target: SigningTarget, verb: str) -> AuthorityError:
        """The error that an answer means which says nothing of a request that is there."""
        error = await self._api.refusal(answer, target.resource, verb)
        kept = keeping_request(error)
        if verb == "watch" and error.kind is ErrorKind.DENIED:
            return _UnwatchedError(kept.kind, str(kept))
        return kept

    async def _answered(self, created: SigningObject, target: SigningTarget, end: float) -> RequestStatus:
        """Follow the object until it is answered or the time is over. Raises AuthorityError."""
        newest = created
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end), aclosing(self._states(created, target)) as states:
                async for state in states:
                    newest = state
                    if (status := certificate_in(newest, target)) is not None:
                        return status
        raise waits(newest, target)

    async def _states(self, created: SigningObject, target: SigningTarget) -> AsyncGenerator[SigningObject, None]:
        """The object as it is, and after each change. Raises AuthorityError."""
        newest, name = created, created.metadata.name
        yield newest
        try:
            for _ in range(MOST_WATCHES):
                async with aclosing(self._changes(newest, target)) as changes:
                    async for state in changes:
                        yield state
                newest = await self._get(name, target)
                yield newest
        except _UnwatchedError as error:
            self._unwatched.report(f"{error}; meanwhile the object is read every {READ_EVERY:g} s")
        else:
            return
        while True:
            await asyncio.sleep(READ_EVERY)
            yield await self._get(name, target)

    async def _changes(self, found: SigningObject, target: SigningTarget) -> AsyncGenerator[SigningObject, None]:
        """One watch: the object after each change since this state, until the server ends it. Raises AuthorityError."""
        resource, name = target.resource, found.metadata.name
        path = (
            f"{resource.path}?watch=1&fieldSelector=metadata.name%3D{name}"
            f"&resourceVersion={found.metadata.resource_version}&timeoutSeconds={math.ceil(self._wait)}"
        )
        with _keeping_request():
            async with aclosing(self._api.lines(path)) as lines:
                async for line in lines:
                    if isinstance(line, HttpAnswer):
                        if line.status == 410:
                            return
                        raise await self._refusal(line, target, "watch")
                    self._unwatched.resolved()
                    change = read_change(line, f"the watch of {resource.plural}")
                    if change.expired:
                        return
                    if change.deleted:
                        raise _deleted(name, target)
                    if change.found is not None:
                        yield change.found

    def _delete(self, name: str, uid: str | None, target: SigningTarget) -> None:
        """Begin to delete it; the caller does not wait."""
        self._waiting.pop(name, None)
        task = asyncio.create_task(self._deletion(name, uid, target))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def _deletion(self, name: str, uid: str | None, target: SigningTarget) -> None:
        try:
            async with asyncio.timeout(DELETION_TIMEOUT):
                answer = await self._api.send("DELETE", f"{target.resource.path}/{name}", deletion_bytes(uid))
                gone = answer.status in {200, 202} or (answer.status == 404 and is_missing(answer))
                self._undeleted.report("" if gone else str(await self._api.refusal(answer, target.resource, "delete")))
        except (AuthorityError, NoThreadError) as error:
            self._undeleted.report(str(error))
        except TimeoutError:
            self._undeleted.report(f"the API server did not delete within {DELETION_TIMEOUT:.0f} s")
        except Exception as error:  # noqa: BLE001 - a bug here must not be lost with its task
            log.fault(LOG, f"the deletion of {name}", error)


class KubernetesRootedAuthority(KubernetesAuthority):
    """The same where the roots are in a ClusterTrustBundle, a ConfigMap or a file, which can be read at any time."""

    def __init__(self, settings: KubernetesSettings, clock: Clock, *, timeout: float = TIMEOUT) -> None:
        super().__init__(settings, clock, timeout=timeout)
        self.refresh_every = settings.refresh_every
        self._roots = SignerRoots(settings, self._api)
        self._known: bytes | None = None
        self._readings = Questions()

    async def anchors(self) -> bytes:
        """The roots at present, in PEM. Raises AuthorityError."""
        number = self._readings.ask()
        found = await self._roots.read()
        if self._readings.counts(number) or self._known is None:
            self._known = found
        return self._known  # those of a later reading, where that ended first

    async def issue(self, request: IssueRequest) -> Issuance:
        """As above. The roots come first: without any a certificate would prove nothing, and nothing is created."""
        warnings: tuple[str, ...] = ()
        try:
            await self.anchors()
        except AuthorityError as error:
            if self._known is None:
                raise
            warnings = (f"the roots that were read before stay in use: {error}",)
        status = await self._signed(request)
        return Issuance(status.certificate or b"", self._known, warnings)


@contextmanager
def _keeping_request() -> Iterator[None]:
    """Have no error in this context end the request."""
    try:
        yield
    except AuthorityError as error:
        if error.kind.ends_request:
            raise keeping_request(error) from error
        raise


def open_authority(settings: KubernetesSettings, clock: Clock) -> KubernetesAuthority:
    """The client that these settings need. Raises ProblemsError."""
    return (KubernetesAuthority if settings.trust_status_ca else KubernetesRootedAuthority)(settings, clock)


def _own(found: SigningObject, request: IssueRequest, target: SigningTarget) -> SigningObject:
    """The object, if it has this request's CSR. Raises AuthorityError INVALID."""
    if found.spec.request == request.csr_pem:
        return found
    raise AuthorityError(
        ErrorKind.INVALID,
        f"the {target.resource.kind} {found.metadata.name} is there with another CSR; delete it, and find out who "
        "created it",
    )


def _deleted(name: str, target: SigningTarget) -> AuthorityError:
    return AuthorityError(
        ErrorKind.TRANSIENT,
        f"the {target.resource.kind} {name} was deleted before it was answered; it is created again",
    )
