"""The keys of the kind `kubernetes`: each error names its key and line, and what to write instead."""

from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, problems, settings

from sds_agent.authority import registry
from sds_agent.authority.kind import Use
from sds_agent.authority.kubernetes.settings import KubernetesSettings, warnings
from sds_agent.config.settings import Settings

CSR = "signer_name: example.com/workloads"
CERT_MANAGER = "issuer_name: workloads"
ROOTS = "roots_file: roots.pem"


def text(keys: str, ttl: str = "1h") -> str:
    return f"{MINIMAL}    ttl: {ttl}\nauthorities: {{upstream: {{type: kubernetes, {keys}}}}}\n"


@pytest.mark.parametrize(
    ("keys", "key", "found"),
    [
        (ROOTS, "signer_name", "is missing"),
        (f"{CSR}, {CERT_MANAGER}, {ROOTS}", "issuer_name", "is given beside signer_name"),
        (f"{CSR}, namespace: shop, {ROOTS}", "namespace", "is given beside signer_name"),
        (f"{CSR}, trust_status_ca: true", "trust_status_ca", "is true beside signer_name"),
        (CSR, "trust_bundle", "is missing"),
        (f"{CSR}, {ROOTS}, trust_bundle: roots", "roots_file", "is given beside trust_bundle"),
        (f"{CSR}, {ROOTS}, kubeconfig: a, service_account: b", "service_account", "is given beside kubeconfig"),
        (f"signer_name: workloads, {ROOTS}", "signer_name", 'is "workloads"'),
        (f"{CSR}, trust_config_map: roots/ca.crt", "trust_config_map", 'is "roots/ca.crt"'),
        (f"{CERT_MANAGER}, namespace: Shop, {ROOTS}", "namespace", 'is "Shop"'),
    ],
)
def test_keys_that_do_not_go_together_are_named(tmp_path: Path, keys: str, key: str, found: str) -> None:
    (problem,) = problems(tmp_path, text(keys))
    assert (problem.key, problem.found) == (f"authorities.upstream.{key}", found)
    assert problem.line == 6
    assert problem.fix


@pytest.mark.parametrize(
    "keys",
    [
        f"{CSR}, trust_bundle: example.com:workloads:2026",
        f"{CSR}, trust_bundle_signer: example.com/workloads",
        f"{CSR}, trust_config_map: pki/roots/ca.crt",
        f"signer_name: issuers.cert-manager.io/shop.workloads, {ROOTS}",
        f"{CERT_MANAGER}, trust_status_ca: true",
        f"{CERT_MANAGER}, issuer_kind: AWSPCAIssuer, issuer_group: awspca.cert-manager.io, namespace: shop, {ROOTS}",
    ],
)
def test_each_way_is_taken_and_told_in_a_sentence(tmp_path: Path, keys: str) -> None:
    chosen = settings(tmp_path, text(keys)).authorities["upstream"]
    said = registry.kind("kubernetes").sentence(chosen, "upstream")
    assert said.startswith("The authority upstream sends Certificate")
    assert "as the pod that it runs in; the roots to trust are " in said


def warned(read: Settings) -> list[str]:
    chosen = read.authorities["upstream"]
    assert isinstance(chosen, KubernetesSettings)
    return list(warnings(chosen, Use("upstream", dict(enumerate(read.workloads)), keep_certificates=True)))


@pytest.mark.parametrize(
    ("keys", "ttl", "said"),
    [
        (f"{CSR}, {ROOTS}", "5m", "workloads[0].ttl: it is 5m, and a CertificateSigningRequest asks for 10m or more"),
        (
            f"signer_name: kubernetes.io/kubelet-serving, {ROOTS}",
            "1h",
            "authorities.upstream.signer_name: kubernetes.io/",
        ),
        (f"{CSR}, trust_config_map: shop/kube-root-ca.crt/ca.crt", "1h", "authorities.upstream.trust_config_map: "),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(tmp_path: Path, keys: str, ttl: str, said: str) -> None:
    (warning,) = warned(settings(tmp_path, text(keys, ttl)))
    assert warning.startswith(said)


def test_a_short_lifetime_is_no_matter_to_cert_manager(tmp_path: Path) -> None:
    assert warned(settings(tmp_path, text(f"{CERT_MANAGER}, {ROOTS}", "5m"))) == []
