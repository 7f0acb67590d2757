"""How the agent reaches the API server and what it shows there, read from files for every request.

In a pod that is the service account's directory, in which the kubelet replaces the token while the agent runs; outside
a kubeconfig. All functions block for a moment on the disk and raise AuthorityError UNAUTHENTICATED.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sds_agent.authority.credentials import (
    CLIENT_CERTIFICATE,
    Token,
    leaf_of,
    pair,
    read_certificates,
    read_roots,
    read_token,
    time_fault,
    token,
    token_end,
)
from sds_agent.authority.kubernetes.kubeconfig import DEFAULT_NAMESPACE, KubeContext, current_context
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.configfile import source
from sds_agent.errors import ProblemsError
from sds_agent.files import looked_up
from sds_agent.named_files import NamedFileError, read_named_file
from sds_agent.pki.certificates import CertificateError, ParsedBundle, describe_time, read_bundle, write_pem
from sds_agent.values import Sensitive

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts a pod's token (Kubernetes, "Accessing the API from a Pod")."""
SERVICE_NAME = "kubernetes.default.svc"
"""The API server's name in every pod."""
LONGEST_NAMESPACE = 63

_ROOTS = "the roots that vouch for the API server"


class ApiAccess(Sensitive, frozen=True):
    """Where the API server is and what to show it: a token, a certificate, or both. `origin` is where that is from."""

    url: str
    roots: bytes | None
    token: Token | None
    certificate: CurrentIdentity | None
    server_name: str | None
    namespace: str
    origin: str

    @property
    def what(self) -> str:
        """The server for messages."""
        return f"the API server at {self.url}"

    @property
    def secrets(self) -> tuple[Token, ...]:
        """What must not be shown in a message."""
        return () if self.token is None else (self.token,)


def read_access(chosen: KubernetesSettings, environ: Mapping[str, str] = os.environ) -> ApiAccess:
    """The access that these settings and the environment give at present."""
    if chosen.kubeconfig is not None:
        return _by_kubeconfig(chosen.kubeconfig)
    return _in_pod(chosen.service_account or SERVICE_ACCOUNT, environ)


def check_times(access: ApiAccess, now: datetime) -> None:
    """Raise AuthorityError where a credential has ended at `now`, as far as it tells."""
    if access.token is not None and (end := token_end(access.token)) is not None and end <= now:
        raise _unusable(f"the token in {access.origin} expired at {describe_time(end)}; a new one has to be put there")
    leaf = None if access.certificate is None else leaf_of(access.certificate)
    if leaf is not None and (fault := time_fault(leaf, now)) is not None:
        raise _unusable(f"{access.origin} {fault}")


def _in_pod(directory: Path, environ: Mapping[str, str]) -> ApiAccess:
    with suppress(OSError):  # where it cannot be examined, the reads below say why
        if looked_up(directory) is None:
            raise _unusable(f"there is no service account in {directory}; outside a pod, name a file in kubeconfig")
    return ApiAccess(
        _service_url(environ),
        read_roots(directory / "ca.crt", _ROOTS),
        read_token(directory / "token", "the service account's token"),
        None,
        None,
        _namespace(directory / "namespace"),
        str(directory),
    )


def _service_url(environ: Mapping[str, str]) -> str:
    """The kubelet sets the variables for every pod, and they need no DNS."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port.isdecimal():
        return f"https://{SERVICE_NAME}"
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _namespace(file: Path) -> str:
    """A projected token alone comes without it."""
    try:
        if looked_up(file) is None:
            return DEFAULT_NAMESPACE
        return read_named_file(file, "the pod's namespace", LONGEST_NAMESPACE).decode().strip()
    except (NamedFileError, OSError, UnicodeDecodeError) as error:
        raise _unusable(f"the pod's namespace cannot be read from {file}; set namespace") from error


def _by_kubeconfig(file: Path) -> ApiAccess:
    context = _context(file)
    shown = _shown_token(context, file)
    certificate = _certificate(context, file)
    if shown is None and certificate is None and context.server.startswith("https:"):
        fix = "add tokenFile, or client-certificate and client-key"
        raise _unusable(f"the kubeconfig {file} has no credentials for the user of its current context; {fix}")
    return ApiAccess(
        context.server,
        None if context.roots is None else write_pem(_certificates(context.roots, _ROOTS, file).certificates),
        shown,
        certificate,
        context.server_name,
        context.namespace,
        f"the kubeconfig {file}",
    )


def _context(file: Path) -> KubeContext:
    try:
        document, problems = source.read(file, minimum="kubectl config view --raw writes one", waits=False)
    except ProblemsError as error:
        raise _unusable(f"the kubeconfig cannot be read: {error.problems[0]}") from error
    if problems:
        raise _unusable(f"the kubeconfig cannot be read: {problems[0]}")
    return current_context(document.tree, file)


def _shown_token(context: KubeContext, file: Path) -> Token | None:
    if context.token_file is not None:
        return read_token(context.token_file)
    return None if context.token is None else token(context.token.encode(), f"the kubeconfig {file}")


def _certificate(context: KubeContext, file: Path) -> CurrentIdentity | None:
    chain, key = context.certificate, context.key
    if chain is None or key is None:
        return None
    key_pem = key if isinstance(key, bytes) else _content(key, f"the key of {CLIENT_CERTIFICATE}")
    places = (str(each) if isinstance(each, Path) else f"data in {file}" for each in (chain, key))
    return pair(_certificates(chain, CLIENT_CERTIFICATE, file), key_pem, *places)


def _content(file: Path, what: str) -> bytes:
    try:
        return read_named_file(file, what, source.LARGEST_FILE)
    except NamedFileError as error:
        raise _unusable(str(error)) from error


def _certificates(given: Path | bytes, what: str, file: Path) -> ParsedBundle:
    if isinstance(given, Path):
        return read_certificates(given, what)
    try:
        reading = read_bundle(given)
    except CertificateError as error:
        raise _unusable(f"{what} in the kubeconfig {file} cannot be read: {error}; write it again") from error
    if not reading.certificates:
        raise _unusable(f"the kubeconfig {file} should hold {what}, and there is no certificate; write it again")
    return reading


def _unusable(message: str) -> AuthorityError:
    return AuthorityError(ErrorKind.UNAUTHENTICATED, message)
