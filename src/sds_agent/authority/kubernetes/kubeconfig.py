"""What a kubeconfig says of its current context: where the API server is, what vouches for it, and who asks. No I/O.

Of the format (kubectl's `config` API, v1) that is what names a server, its roots, and a token or a client's
certificate. A plugin that makes credentials (`exec`, `auth-provider`) would be a program of the user's; the agent runs
none, and says so.
"""

from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct, field

from sds_agent.authority.http_settings import server_url
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.configfile.phrases import quoted
from sds_agent.configfile.types import UnacceptableError
from sds_agent.values import Sensitive

N = TypeVar("N", bound="_NamedEntry")

DEFAULT_NAMESPACE = "default"
"""The namespace of a context that names none, as kubectl has it."""
LONGEST_FAULT = 200
"""Characters of what is wrong with a file's form."""


class KubeContext(Sensitive, frozen=True):
    """The current context. What is in PEM is in a file, or the bytes that the kubeconfig itself has.

    Of `token` and `token_file` the file counts, where there is one.
    """

    server: str
    server_name: str | None
    roots: Path | bytes | None
    token: str | None
    token_file: Path | None
    certificate: Path | bytes | None
    key: Path | bytes | None
    namespace: str


class _Cluster(Struct, rename="kebab"):
    server: str = ""
    tls_server_name: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    proxy_url: str = ""


class _User(Sensitive, rename="kebab", frozen=True):
    token: str = ""
    token_file: str = field(name="tokenFile", default="")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    username: str = ""
    impersonated: str = field(name="as", default="")
    plugin: dict[str, object] | None = field(name="exec", default=None)
    auth_provider: dict[str, object] | None = None


class _ContextKeys(Struct):
    cluster: str = ""
    user: str = ""
    namespace: str = ""


class _NamedEntry(Struct):
    name: str


class _NamedCluster(_NamedEntry):
    cluster: _Cluster


class _NamedUser(_NamedEntry):
    user: _User | None = None


class _NamedContext(_NamedEntry):
    context: _ContextKeys


class _Kubeconfig(Struct, rename="kebab"):
    current_context: str = ""
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None
    contexts: list[_NamedContext] | None = None


def current_context(tree: Mapping[str, object], file: Path) -> KubeContext:
    """The current context of the kubeconfig `file`, whose content is `tree`; its relative paths start beside it.

    Raises AuthorityError UNAUTHENTICATED, which quotes nothing of a credential.
    """
    try:
        config = msgspec.convert(tree, _Kubeconfig)
    except msgspec.ValidationError as error:
        raise _unusable(
            file, f"is no kubeconfig ({str(error)[:LONGEST_FAULT]}); check that it is the right file"
        ) from error
    if not config.current_context:
        raise _unusable(file, "names no current-context; set it with kubectl config use-context")
    context = _named(config.contexts, config.current_context, "context", file).context
    cluster = _named(config.clusters, context.cluster, "cluster", file).cluster
    user = _named(config.users, context.user, "user", file).user or _User()
    _check_cluster(cluster, context.cluster, file)
    _check_user(user, context.user, file)
    return KubeContext(
        cluster.server.rstrip("/"),
        cluster.tls_server_name or None,
        _source(cluster.certificate_authority, cluster.certificate_authority_data, "certificate-authority", file),
        user.token or None,
        _beside(file, user.token_file),
        _source(user.client_certificate, user.client_certificate_data, "client-certificate", file),
        _source(user.client_key, user.client_key_data, "client-key", file),
        context.namespace or DEFAULT_NAMESPACE,
    )


def _named(entries: list[N] | None, name: str, what: str, file: Path) -> N:
    for each in entries or ():
        if each.name == name:
            return each
    raise _unusable(file, f"has no {what} with the name {quoted(name)}, which its current-context needs; add it")


def _check_cluster(cluster: _Cluster, name: str, file: Path) -> None:
    if not cluster.server:
        raise _unusable(file, f"names no server for the cluster {quoted(name)}; add it")
    try:
        server_url(cluster.server, file)
    except UnacceptableError as error:
        found = f"names no URL of a server such as https://10.0.0.1:6443 for the cluster {quoted(name)}"
        raise _unusable(file, f"{found}; {error}") from error
    if cluster.insecure_skip_tls_verify:
        fix = "the agent verifies every server: name its roots in certificate-authority"
        raise _unusable(file, f"sets insecure-skip-tls-verify for the cluster {quoted(name)}; {fix}")
    if cluster.proxy_url:
        fix = "the agent uses no proxy: name a server that it reaches directly"
        raise _unusable(file, f"sets proxy-url for the cluster {quoted(name)}; {fix}")
    if cluster.server.startswith("https:") and not (
        cluster.certificate_authority or cluster.certificate_authority_data
    ):
        fix = "name its roots in certificate-authority, or put them into certificate-authority-data"
        raise _unusable(file, f"has nothing that vouches for the server of the cluster {quoted(name)}; {fix}")


def _check_user(user: _User, name: str, file: Path) -> None:
    for key, given in (("exec", user.plugin), ("auth-provider", user.auth_provider)):
        if given is not None:
            fix = (
                "the agent runs no program for credentials: give it a service account's token in tokenFile, which "
                "kubectl create token writes, or a client certificate"
            )
            raise _unusable(file, f"has a plugin ({key}) for the user {quoted(name)}; {fix}")
    if user.username:
        fix = "API servers since 1.19 take no password: use tokenFile or a client certificate"
        raise _unusable(file, f"has a user name and password for the user {quoted(name)}; {fix}")
    if user.impersonated:
        raise _unusable(file, f"acts as another user (as) for the user {quoted(name)}; use that user's own credentials")
    if bool(user.client_certificate or user.client_certificate_data) != bool(user.client_key or user.client_key_data):
        fix = "a client certificate needs its key, and a key its certificate: add the other one"
        raise _unusable(file, f"has one of client-certificate and client-key for the user {quoted(name)}; {fix}")


def _source(path: str, data: str, key: str, file: Path) -> Path | bytes | None:
    """Data counts more than a file, as in kubectl, which passes over line breaks in it."""
    if data:
        try:
            return b64decode("".join(data.splitlines()), validate=True)
        except (Base64Error, ValueError) as error:
            raise _unusable(file, f"has no base64 in {key}-data; write the file again") from error
    return _beside(file, path)


def _beside(file: Path, path: str) -> Path | None:
    return file.parent / path if path else None


def _unusable(file: Path, found: str) -> AuthorityError:
    return AuthorityError(ErrorKind.UNAUTHENTICATED, f"the kubeconfig {file} {found}")
