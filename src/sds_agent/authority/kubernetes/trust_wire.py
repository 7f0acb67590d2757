"""Where the roots of a signer are, as values: a ClusterTrustBundle or a ConfigMap. No I/O.

Kubernetes serves ClusterTrustBundles as `v1` from 1.37 on, and before that as `v1beta1` behind a feature gate.
"""

from urllib.parse import quote

from msgspec import Struct

from sds_agent.authority.http_message import HttpAnswer
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.kubernetes.wire import ApiResource, decoded
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.pki.certificates import CertificateError, read_bundle

VERSIONS = ("v1", "v1beta1")
"""Of ClusterTrustBundle, in the order in which they are tried."""


class RootsPlace(Struct, frozen=True):
    """One request for the roots: `path` below the API server, `verb` as RBAC has it, and `place` for messages."""

    resource: ApiResource
    path: str
    verb: str
    place: str
    key: str = ""


class _TrustBundleSpec(Struct, rename="camel"):
    trust_bundle: str = ""


class _TrustBundleObject(Struct):
    spec: _TrustBundleSpec


class _TrustBundleList(Struct):
    items: list[_TrustBundleObject]


class _ConfigMap(Struct, rename="camel"):
    data: dict[str, str] | None = None
    binary_data: dict[str, bytes] | None = None


def roots_places(chosen: KubernetesSettings) -> tuple[RootsPlace, ...]:
    """The requests to try in turn, the next one where the API server does not serve the one before."""
    if chosen.trust_config_map is not None:
        namespace, name, key = chosen.trust_config_map.split("/")
        resource = ApiResource("", "v1", "configmaps", "ConfigMap", namespace)
        return (RootsPlace(resource, f"{resource.path}/{name}", "get", f"the ConfigMap {namespace}/{name}", key),)
    return tuple(_bundle_place(chosen, version) for version in VERSIONS)


def _bundle_place(chosen: KubernetesSettings, version: str) -> RootsPlace:
    resource = ApiResource("certificates.k8s.io", version, "clustertrustbundles", "ClusterTrustBundle")
    if chosen.trust_bundle is not None:
        path = f"{resource.path}/{quote(chosen.trust_bundle, safe='')}"
        return RootsPlace(resource, path, "get", f"the ClusterTrustBundle {chosen.trust_bundle}")
    signer = str(chosen.trust_bundle_signer)
    path = f"{resource.path}?fieldSelector={quote(f'spec.signerName={signer}', safe='')}"
    return RootsPlace(resource, path, "list", f"the ClusterTrustBundles of the signer {signer}")


def read_roots(place: RootsPlace, answer: HttpAnswer, what: str) -> bytes:
    """The roots in an answer of 200, in PEM: at least one. Raises AuthorityError INVALID."""
    found = _content(place, answer, what)
    try:
        reading = read_bundle(found)
    except CertificateError as error:
        raise _unusable(place, f"cannot be read: {error}") from error
    if not reading.certificates:
        raise _unusable(place, "has no certificate" + (f" in its key {place.key}" if place.key else ""))
    return found


def not_served(tried: tuple[RootsPlace, ...]) -> AuthorityError:
    """The error where no version of the resource is served."""
    (resource,) = {each.resource.plural for each in tried}
    fix = (
        "Kubernetes serves it from 1.37 on; before, start the API server with --feature-gates=ClusterTrustBundle=true "
        "and --runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true, or use trust_config_map"
    )
    return AuthorityError(ErrorKind.INVALID, f"the API server does not serve {resource}; {fix}")


def absent(place: RootsPlace) -> AuthorityError:
    """The error where the object is not there."""
    return _unusable(place, "is not there")


def _content(place: RootsPlace, answer: HttpAnswer, what: str) -> bytes:
    if place.verb == "list":
        bundles = decoded(answer.body, _TrustBundleList, what).items
        return "\n".join(each.spec.trust_bundle for each in bundles).encode()
    if not place.key:
        return decoded(answer.body, _TrustBundleObject, what).spec.trust_bundle.encode()
    config_map = decoded(answer.body, _ConfigMap, what)
    if place.key in (config_map.data or {}):
        return (config_map.data or {})[place.key].encode()
    if place.key in (config_map.binary_data or {}):
        return (config_map.binary_data or {})[place.key]
    raise _unusable(place, f"has no key {place.key}")


def _unusable(place: RootsPlace, found: str) -> AuthorityError:
    return AuthorityError(ErrorKind.INVALID, f"{place.place} {found}; put the roots of the signer there")
