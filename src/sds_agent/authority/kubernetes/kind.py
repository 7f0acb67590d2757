"""The kind `kubernetes`. Each request has a connection of its own; at the end the objects of requests that were
answered last are deleted.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from sds_agent.authority.kind import Context, Kind, reject
from sds_agent.authority.kubernetes.settings import KubernetesSettings, conflicts, warnings
from sds_agent.authority.protocol import Authority, AuthorityError
from sds_agent.errors import Problem


@asynccontextmanager
async def _open(chosen: KubernetesSettings, context: Context) -> AsyncIterator[Authority]:
    """A client of the API server. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.kubernetes.client import open_authority  # noqa: PLC0415 - measured: 70 ms
    from sds_agent.tasks import uninterrupted  # noqa: PLC0415 - measured: 22 ms, asyncio's

    reject(conflicts(chosen), context)
    authority = open_authority(chosen, context.clock)
    try:
        yield authority
    finally:
        await uninterrupted(authority.end())


def _sentence(chosen: KubernetesSettings, name: str) -> str:
    if chosen.signer_name is not None:
        asks = f"CertificateSigningRequests to the signer {chosen.signer_name}"
    else:
        where = f" in the namespace {chosen.namespace}" if chosen.namespace else ""
        asks = f"CertificateRequests to the {chosen.issuer_kind} {chosen.issuer_name} of cert-manager{where}"
    access = "as the pod that it runs in" if chosen.kubeconfig is None else f"with the kubeconfig {chosen.kubeconfig}"
    return (
        f"The authority {name} sends {asks} through the API of Kubernetes, {access}; the roots to trust are "
        f"{_roots(chosen)}."
    )


def _roots(chosen: KubernetesSettings) -> str:
    if chosen.trust_bundle is not None:
        return f"in the ClusterTrustBundle {chosen.trust_bundle}"
    if chosen.trust_bundle_signer is not None:
        return f"in the ClusterTrustBundles of the signer {chosen.trust_bundle_signer}"
    if chosen.trust_config_map is not None:
        return f"in the ConfigMap {chosen.trust_config_map}"
    return (
        f"in {chosen.roots_file}"
        if chosen.roots_file is not None
        else "those that each CertificateRequest has in status.ca"
    )


def _credentials(chosen: KubernetesSettings, context: Context) -> Iterator[Problem]:
    """Whether the token or the kubeconfig can be read, and has not expired."""
    from sds_agent.authority.credentials import as_problem  # noqa: PLC0415 - measured: as below
    from sds_agent.authority.kubernetes import access  # noqa: PLC0415 - measured: 27 ms, in a thread

    key = "service_account" if chosen.kubeconfig is None else "kubeconfig"
    try:
        access.check_times(access.read_access(chosen), context.clock.now())
    except AuthorityError as error:
        yield as_problem(key, error)


KIND = Kind(
    settings=KubernetesSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    warnings=warnings,
    secrets=("kubeconfig",),
    credentials=_credentials,
)
