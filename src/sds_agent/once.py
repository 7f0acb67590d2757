"""One certificate, obtained once and written to files: for init containers, cron jobs, and as a proof that a CA is set
up right.

It is asked for as a running agent asks: the same loop, delays, checks and trust. There is no server, and no lock on the
state directory that a running agent would have: only the embedded CA needs that, for its own root, and beside a running
agent it is given a copy. What other authorities store there they have in a copy too, for as long as the command runs.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from sds_agent import app, preflight
from sds_agent.authority import registry
from sds_agent.authority.kind import Kind
from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    Authority,
    CurrentIdentity,
    Issuance,
    IssueRequest,
    Supplier,
)
from sds_agent.clock import Clock
from sds_agent.config.settings import Settings
from sds_agent.configfile.durations import format_duration
from sds_agent.configfile.phrases import did_you_mean, quoted
from sds_agent.directories import LockedDirectory, locked_directory
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import fix_of, read_own
from sds_agent.issuance.acceptance import accept
from sds_agent.issuance.anchors_refresh import refresh
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload, secret_of
from sds_agent.live import assembly
from sds_agent.outputs.directory import (
    AGENT_ALONE,
    DATA,
    LOCK,
    MODE,
    File,
    FileAccess,
    OutputInUseError,
    access_of,
    write_set,
)
from sds_agent.outputs.layout import LAYOUTS, FileLayout, OutputContents
from sds_agent.pki.certificates import read_pem, serial_hex
from sds_agent.pki.keyfile import KeyFileError, read_private_key
from sds_agent.pki.validation.rules import Chain
from sds_agent.preflight import StateInUseError
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.readiness import complete
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import background_tasks
from sds_agent.text import printable

LARGEST = 4 << 20
"""Bytes of a file of an earlier set."""
LONGEST_NAME = 200
"""Characters of the issuer's name."""
COPY = ".once-"
"""How the name of a copy of a CA's state begins."""
LEFT_BEHIND = 7200.0
"""Seconds after which a copy belongs to a process that was killed."""


class NotIssuedError(SdsAgentError):
    """The CA issued no certificate in time. The message ends with its last words."""


class NotWrittenError(SdsAgentError):
    """The files cannot be written."""

    exit_code = 3


class Summary(Struct, frozen=True):
    """What was issued, without any key, as it is printed."""

    workload: str
    spiffe_id: str
    authority: str
    serial: str
    not_before: datetime
    not_after: datetime
    issuer: str
    anchors: int
    directory: str | None


class OnceRequest(Struct, frozen=True):
    """A certificate that is wanted: for which workload, as files in which directory (None for nowhere), how soon."""

    workload: str
    directory: Path | None
    timeout: timedelta


def chosen_workload(settings: Settings, name: str | None) -> str:
    """The name of a configured workload; without one that of the only one. Raises ConfigurationError."""
    names = [each.name for each in settings.workloads]
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise ConfigurationError(f"--workload is missing; with several workloads it must be one of {', '.join(names)}")
    if name not in names:
        near = did_you_mean(name, names)
        fix = f"it must be one of {', '.join(names)}"
        raise ConfigurationError(
            f"--workload is {quoted(name)}, which is no workload of the configuration; {near or fix}"
        )
    return name


async def issue(settings: Settings, request: OnceRequest, clock: Clock) -> Summary:
    """Obtain the certificate, and write it to the directory as one set of files with the bundle.

    Raises NotIssuedError, NotWrittenError, and ConfigurationError where a CA cannot be asked at all.
    """
    only = narrowed(settings, request.workload)
    target = _target(only, request)
    with _claimed(request.directory), _state(only) as placed:
        issued = await _obtain(placed, request, target, clock)
        if request.directory is not None:
            _write(request.directory, issued, target, clock.now())
    return _summary(only, request, issued)


class _Target(Struct, frozen=True):
    """How the files are named and who may read them: as the workload's own `output` says, if there is one."""

    layout: FileLayout
    access: FileAccess
    contents: OutputContents


def _target(settings: Settings, request: OnceRequest) -> _Target:
    chosen = settings.workloads[0].output
    contents = OutputContents(request.workload, {settings.trust_domain: settings.bundle_names[0]})
    if chosen is None or request.directory is None:
        return _Target(LAYOUTS["istio"], AGENT_ALONE, contents)
    access = access_of(chosen.owner, chosen.group, int(chosen.key_mode, 8), "output")
    return _Target(LAYOUTS[chosen.layout], access, contents)


def narrowed(settings: Settings, name: str) -> Settings:
    """The settings with this workload alone, and the authorities that it uses."""
    workload = next(each for each in settings.workloads if each.name == name)
    authorities = {used: settings.authorities[used] for used in settings.authorities_of(workload)}
    return structs.replace(settings, workloads=(workload,), authorities=authorities)


@contextmanager
def _claimed(directory: Path | None) -> Iterator[None]:
    """Lock the output before the CA is asked: an attempt may cost a token that serves once."""
    if directory is None:
        yield
        return
    in_use = OutputInUseError(f"another sds-agent writes to {directory}; give this certificate a directory of its own")
    locked = LockedDirectory(directory, "--output", in_use, mode=MODE, lock=LOCK, fills=True)
    try:
        locked.claim()
    except SdsAgentError as error:
        raise NotWrittenError(str(error)) from error
    try:
        yield
    finally:
        locked.release()


@contextmanager
def _state(settings: Settings) -> Iterator[Settings]:
    """The settings with a state directory for the CAs that need one: locked, or a copy beside a running agent.

    Two processes that write one CA's files would each take the other's root for a fault.
    """
    kinds = [registry.kind_of(chosen) for chosen in settings.authorities.values()]
    if not any(kind.holds_ca for kind in kinds):
        with copied_state(settings, None) as placed:
            yield placed
        return
    with ExitStack() as stack:
        try:
            in_use = preflight.in_use(settings.state_dir)
            stack.enter_context(locked_directory(settings.state_dir, "state_dir", in_use))
        except StateInUseError:
            _remove_left_behind(settings.state_dir)
            settings = stack.enter_context(copied_state(settings, settings.state_dir))
        yield settings


@contextmanager
def copied_state(settings: Settings, where: Path | None) -> Iterator[Settings]:
    """The settings with a copy, for this context, of what the authorities store: in `where`, or in the system's
    directory for temporary files. Raises ConfigurationError where none can be made.
    """
    kinds = {name: registry.kind_of(chosen) for name, chosen in settings.authorities.items()}
    storing = {name: kind for name, kind in kinds.items() if kind.stores_state}
    if not storing:
        yield settings
        return
    with ExitStack() as stack:
        try:
            copied = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=COPY, dir=where)))
        except OSError as error:
            raise ConfigurationError(_no_copy(where, error)) from error
        for name, kind in storing.items():
            _copy(settings.state_dir / "authorities" / name, copied / "authorities" / name, kind)
        yield structs.replace(settings, state_dir=copied)


def _no_copy(where: Path | None, error: OSError) -> str:
    user = f"this user (uid {os.geteuid()})"
    if where is not None:
        fix = fix_of(error, f"see that {user} can write there")
        return f"state_dir: no directory for a copy can be made in {where}: {error.strerror}; {fix}"
    fix = fix_of(error, f"let $TMPDIR name one that {user} can write to")
    return f"no directory for temporary files can be made: {error.strerror}; {fix}"


def _copy(source: Path, target: Path, kind: Kind[Any]) -> None:
    """Copy what is stored, without files that are being written. What cannot be read the authority makes again, but not
    a CA: its certificates would be below a root that no peer knows.
    """
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
    except FileNotFoundError:  # nothing is stored yet
        return
    except OSError as error:
        if kind.holds_ca:
            raise ConfigurationError(
                f"state_dir: cannot copy {source}, where the CA of a running agent is; see that this user (uid "
                f"{os.geteuid()}) can read it, and that there is room in {target.parents[1]}"
            ) from error


def _remove_left_behind(state_dir: Path) -> None:
    for path in state_dir.glob(f"{COPY}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > LEFT_BEHIND:
                shutil.rmtree(path)


class _Issued(Struct, frozen=True):
    """What was issued, by which authority."""

    secret: CertificateSecret
    bundle: BundleSecret
    authority: str
    files: Mapping[str, File]


async def _obtain(settings: Settings, request: OnceRequest, into: _Target, clock: Clock) -> _Issued:
    (workload,) = assembly.workloads(settings)
    store = SecretStore((workload.name, *settings.bundle_names))
    trust = Trust(store, settings.bundle_names, clock)
    former = _former(request.directory, into, workload, clock.now())
    if former is not None:  # peers may meet it until it ends
        trust.add_in_use(workload.authority, former.secret, former.anchors)
    issuer: Issuer | None = None
    try:
        async with asyncio.timeout(request.timeout.total_seconds()), app.authorities(settings, clock) as cas:
            asked = cas if former is None else _proving(cas, former)
            asked_so = assembly.issuing(settings, assembly.upstreams(settings, asked))[workload.name]
            issuer = asked_so.issuer(PublicationTarget(store, trust), clock)
            async with background_tasks() as start:
                for name, each in cas.items():
                    if isinstance(each, AdvertisesAnchors):
                        start(refresh(trust, name, each, clock))
                start(issuer.run())
                await complete(store)
    except TimeoutError as error:
        raise NotIssuedError(_why(issuer, workload, request.timeout)) from error
    secret, bundle = store.snapshot[workload.name], store.snapshot[settings.bundle_names[0]]
    if not isinstance(secret, CertificateSecret) or not isinstance(bundle, BundleSecret):
        raise TypeError("the store gives another kind of secret than was published")
    files = into.contents.files(into.layout, store.snapshot)
    return _Issued(secret, bundle, issuer.status.authority, files)


def _why(issuer: Issuer | None, workload: Workload, timeout: timedelta) -> str:
    said = f"no certificate for {workload.name} within {format_duration(timeout)}"
    if issuer is None:
        return f"{said}: the authority {workload.authority} could not be opened in that time"
    if issuer.status.coming:
        begins = min(each.valid_from for each in issuer.status.coming)
        return f"{said}: the one that came is valid only from {begins:%Y-%m-%d %H:%M:%S} UTC; compare the clocks"
    error, failure = issuer.last_error, issuer.status.failure
    if error is None or failure is None:
        return f"{said}: the authority {workload.authority} has not answered yet"
    attempts = "the only attempt" if failure.attempts == 1 else f"the last of {failure.attempts} attempts"
    where = f" at the authority {workload.authority}" if len(workload.authorities) == 1 else ""
    return f"{said}; {attempts}{where} failed ({error.kind.value}): {error}"


class _Former(Struct, frozen=True):
    """The certificate that lies in the output, and is still valid."""

    secret: CertificateSecret
    anchors: Chain

    @property
    def identity(self) -> CurrentIdentity:
        """What proves to a CA that renews over mTLS who is asking."""
        return CurrentIdentity(self.secret.chain_pem, self.secret.private_key_pem)


class _Proving:
    """An authority that is asked with the certificate of an earlier run, as long as there is no newer one."""

    def __init__(self, authority: Authority, identity: CurrentIdentity) -> None:
        self._authority = authority
        self._identity = identity

    async def issue(self, request: IssueRequest) -> Issuance:
        """As the authority's."""
        return await self._authority.issue(structs.replace(request, current=request.current or self._identity))


def _proving(cas: Mapping[str, Authority | Supplier], former: "_Former") -> Mapping[str, Authority | Supplier]:
    """The authorities, asked with the former certificate. Which of several issued it is not known."""
    if len(cas) > 1:
        return cas
    return {name: ca if isinstance(ca, Supplier) else _Proving(ca, former.identity) for name, ca in cas.items()}


def _former(directory: Path | None, into: _Target, workload: Workload, now: datetime) -> _Former | None:
    """The certificate of an earlier run; None where there is none that would be accepted from the CA.

    The user that the files were given to may have changed them, and reads what is written in their place.
    """
    if directory is None:
        return None
    layout = into.layout
    bundle = layout.bundle.replace("{trust_domain}", workload.identity.trust_domain.name)
    try:
        chain, key_pem, anchors = (
            read_own(directory / DATA / name, LARGEST, also=into.access.user)[0]
            for name in (layout.chain or layout.pair or "", layout.key or layout.pair or "", bundle)
        )
        key = read_private_key(key_pem)
        accepted = accept(
            Issuance(chain, anchors), identity=workload.identity, public_key=key.public_key(), anchors=(), now=now
        )
    except (OSError, SdsAgentError, KeyFileError):
        return None
    return _Former(secret_of(accepted, key), accepted.anchors)


def _write(directory: Path, issued: _Issued, target: _Target, now: datetime) -> None:
    try:
        write_set(directory, issued.files, now, target.access)
    except OSError as error:
        place = error.filename2 or error.filename or directory
        raise NotWrittenError(
            f"--output: cannot write to {place}: {error.strerror}; the certificate is lost"
        ) from error
    except SdsAgentError as error:
        raise NotWrittenError(f"--output: {error}; the certificate is lost") from error


def _summary(settings: Settings, request: OnceRequest, issued: _Issued) -> Summary:
    leaf, workload = read_pem(issued.secret.chain_pem)[0], settings.workloads[0]
    return Summary(
        workload=workload.name,
        spiffe_id=workload.spiffe_id,
        authority=issued.authority,
        serial=serial_hex(leaf),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        issuer=printable(leaf.issuer.rfc4514_string(), LONGEST_NAME),
        anchors=len(read_pem(issued.bundle.anchors_pem)),
        directory=None if request.directory is None else str(request.directory),
    )
