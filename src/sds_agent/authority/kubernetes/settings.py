"""The settings of the kind `kubernetes`, and which of them do not go together."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from sds_agent.authority.http_settings import RefreshEvery
from sds_agent.authority.kind import Use
from sds_agent.configfile.durations import format_duration
from sds_agent.configfile.phrases import quoted
from sds_agent.configfile.types import FilePath, matching
from sds_agent.errors import Problem

LEAST_TTL = timedelta(seconds=600)
"""The API takes no shorter expirationSeconds (ValidateCertificateSigningRequestCreate)."""

_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_SUBDOMAIN = "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"

SignerName: TypeAlias = Annotated[
    str,
    matching(
        rf"^{_SUBDOMAIN}/[a-z0-9]([a-z0-9.-]{{0,315}}[a-z0-9])?$",
        "a signer's name, DOMAIN/PATH, such as example.com/workloads",
    ),
]
BundleName: TypeAlias = Annotated[
    str,
    matching(
        r"^[a-z0-9]([a-z0-9.:-]{0,315}[a-z0-9])?$",
        "the name of a ClusterTrustBundle such as example.com:workloads:roots",
    ),
]
ConfigMapKey: TypeAlias = Annotated[
    str,
    matching(
        rf"^{_LABEL}/{_SUBDOMAIN}/[A-Za-z0-9._-]{{1,253}}$",
        "a ConfigMap's namespace, name and key, NAMESPACE/NAME/KEY, such as pki/roots/ca.crt",
    ),
]
ObjectName: TypeAlias = Annotated[str, matching(f"^{_SUBDOMAIN}$", "the name of an object such as workloads")]
Namespace: TypeAlias = Annotated[str, matching(f"^{_LABEL}$", "the name of a namespace such as shop")]
ResourceKind: TypeAlias = Annotated[
    str, matching("^[A-Za-z][A-Za-z0-9]{0,62}$", "the kind of an issuer such as ClusterIssuer")
]
Group: TypeAlias = Annotated[str, matching(f"^{_SUBDOMAIN}$", "the API group of an issuer such as cert-manager.io")]


class KubernetesSettings(Struct, frozen=True, kw_only=True, tag="kubernetes", tag_field="type"):
    """A signer that is reached through the API of Kubernetes: by a CertificateSigningRequest, or by cert-manager's
    CertificateRequest.
    """

    kubeconfig: Annotated[
        FilePath | None,
        Meta(
            description="How to reach the API: the current context of this file. Left out: as the pod that the agent "
            "runs in."
        ),
    ] = None
    service_account: Annotated[
        FilePath | None,
        Meta(
            description="The directory with the pod's token, ca.crt and namespace. Left out: "
            "/var/run/secrets/kubernetes.io/serviceaccount."
        ),
    ] = None
    signer_name: Annotated[
        SignerName | None,
        Meta(description="The signer of a CertificateSigningRequest (signerName). This or issuer_name is required."),
    ] = None
    issuer_name: Annotated[
        ObjectName | None,
        Meta(description="The issuer of cert-manager (issuerRef.name), by a CertificateRequest."),
    ] = None
    issuer_kind: Annotated[
        ResourceKind, Meta(description="Its kind (issuerRef.kind): Issuer, ClusterIssuer, or another issuer's own.")
    ] = "Issuer"
    issuer_group: Annotated[Group, Meta(description="Its API group (issuerRef.group).")] = "cert-manager.io"
    namespace: Annotated[
        Namespace | None,
        Meta(
            description="Where the CertificateRequest is created, which for an Issuer is its own namespace. Left out: "
            "the pod's own, or that of the kubeconfig's context."
        ),
    ] = None
    trust_bundle: Annotated[
        BundleName | None, Meta(description="The roots to trust: those in the ClusterTrustBundle of this name.")
    ] = None
    trust_bundle_signer: Annotated[
        SignerName | None,
        Meta(description="The roots to trust: those in every ClusterTrustBundle of this signer (spec.signerName)."),
    ] = None
    trust_config_map: Annotated[
        ConfigMapKey | None, Meta(description="The roots to trust: those in a ConfigMap, NAMESPACE/NAME/KEY.")
    ] = None
    roots_file: Annotated[
        FilePath | None, Meta(description="The roots to trust: those in this file (PEM), read again as it changes.")
    ] = None
    trust_status_ca: Annotated[
        bool,
        Meta(
            description="The roots to trust: what cert-manager tells beside the certificate (status.ca). Not every "
            "issuer tells it, and a root that is replaced is known no earlier than its first certificate."
        ),
    ] = False
    refresh_every: RefreshEvery = timedelta(minutes=1)


TRUST = ("trust_bundle", "trust_bundle_signer", "trust_config_map", "roots_file", "trust_status_ca")
"""The keys that say where the roots are; one of them is given."""


def conflicts(chosen: KubernetesSettings) -> Iterator[Problem]:
    """The keys of one authority that contradict each other. A problem's place is its key alone: `("issuer_name",)`.

    A value that could not be read is false; no check reports it as missing or as wrong.
    """
    yield from _signers(chosen)
    yield from _trust(chosen)
    if chosen.kubeconfig and chosen.service_account:
        yield Problem(("service_account",), "is given beside kubeconfig", "keep the one that reaches the API")


def _signers(chosen: KubernetesSettings) -> Iterator[Problem]:
    if chosen.signer_name is None and chosen.issuer_name is None:
        fix = "name the signer of a CertificateSigningRequest, or cert-manager's issuer in issuer_name"
        yield Problem(("signer_name",), "is missing", fix)
    if chosen.signer_name and chosen.issuer_name:
        yield Problem(("issuer_name",), "is given beside signer_name", "one of the two signs: keep that one")
    if chosen.signer_name and chosen.namespace:
        fix = "a CertificateSigningRequest has no namespace: remove it, or name cert-manager's issuer in issuer_name"
        yield Problem(("namespace",), "is given beside signer_name", fix)
    if chosen.signer_name and chosen.trust_status_ca:
        fix = "a CertificateSigningRequest tells no CA: name a ClusterTrustBundle, a ConfigMap or a file"
        yield Problem(("trust_status_ca",), "is true beside signer_name", fix)


def _trust(chosen: KubernetesSettings) -> Iterator[Problem]:
    # what could not be read is no default either, and counts as given
    defaults = {"trust_status_ca": False}
    given = [key for key in TRUST if getattr(chosen, key) is not defaults.get(key)]
    if not given:
        fix = (
            "the API tells no root with a certificate: name what holds the roots to trust in one of "
            f"{', '.join(TRUST[:-1])}, or set trust_status_ca with an issuer of cert-manager"
        )
        yield Problem(("trust_bundle",), "is missing", fix)
    read = [key for key in given if getattr(chosen, key)]
    for key in read[1:]:
        yield Problem((key,), f"is given beside {read[0]}", "one place holds the roots to trust: keep that one")


def warnings(chosen: KubernetesSettings, use: Use) -> Iterator[str]:
    """What is allowed and probably not meant."""
    if chosen.signer_name is not None:
        for index, each in use.workloads.items():
            if each.ttl < LEAST_TTL:
                yield (
                    f"workloads[{index}].ttl: it is {format_duration(each.ttl)}, and a CertificateSigningRequest asks "
                    f"for {format_duration(LEAST_TTL)} or more, so the agent asks the authority {use.name} for "
                    f"{format_duration(LEAST_TTL)}; the signer may issue shorter ones by itself"
                )
        if chosen.signer_name.startswith("kubernetes.io/"):
            yield (
                f"authorities.{use.name}.signer_name: {chosen.signer_name} is one of Kubernetes' own signers, which "
                "sign for the cluster's components and refuse a SPIFFE ID; name the signer of your workloads"
            )
    if chosen.trust_config_map is not None and "/kube-root-ca.crt/" in chosen.trust_config_map:
        yield (
            f"authorities.{use.name}.trust_config_map: {quoted(chosen.trust_config_map)} holds the roots of the API "
            "server, not those of the workloads; name the ConfigMap with the roots of the signer"
        )
