"""Istio's variables mean here what they mean to pilot-agent, as far as the documentation says so."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, UID, settings

from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.config.loading import Loaded, load
from sds_agent.errors import Problem, ProblemsError
from sds_agent.pki.keys import KeyType

LEAST = {"CA_ADDR": "istiod.istio-system.svc:15012", "POD_NAMESPACE": "shop", "SERVICE_ACCOUNT": "web"}
PAGE = (Path(__file__).parents[2] / "docs" / "istio.md").read_text()


def loaded(**more: str) -> Loaded:
    return load(None, LEAST | more, uid=UID)


def authority(**more: str) -> IstioSettings:
    (only,) = loaded(**more).settings.authorities.values()
    assert isinstance(only, IstioSettings)
    return only


def wrong(environ: dict[str, str]) -> tuple[Problem, ...]:
    with pytest.raises(ProblemsError) as caught:
        load(None, environ, uid=UID)
    return caught.value.problems


def test_the_least_gives_what_pilot_agent_would_do() -> None:
    read = loaded().settings
    (workload,) = read.workloads
    assert authority().address == ("istiod.istio-system.svc:15012",)
    assert authority().ca_file == Path("/var/run/secrets/istio/root-cert.pem")
    assert authority().token_file == Path("/var/run/secrets/tokens/istio-token")
    assert read.trust_domain == "cluster.local"
    assert workload.names == ("default", "spiffe://cluster.local/ns/shop/sa/web")
    assert (workload.key, workload.ttl, workload.output) == (KeyType.RSA_2048, timedelta(hours=24), None)
    assert read.renewal.fraction == 0.5


def test_the_ca_and_its_roots() -> None:
    read = authority(CA_ROOT_CA="/etc/roots.pem", ISTIO_META_CLUSTER_ID="c2", ISTIO_META_CERT_SIGNER="clusterissuers/x")
    assert (read.ca_file, read.cluster_id, read.cert_signer) == (Path("/etc/roots.pem"), "c2", "clusterissuers/x")


def test_a_ca_at_localhost_is_an_istiod_whose_port_is_forwarded() -> None:
    assert authority(CA_ADDR="localhost:15012").server_name == "istiod.istio-system.svc"
    assert authority(CA_ADDR="127.0.0.1:15012").server_name is None
    assert authority().server_name is None
    reported = authority(CA_ADDR="localhost:15012", SDS_AGENT__AUTHORITIES__ISTIO__SERVER_NAME="ca.example")
    assert reported.server_name == "ca.example"


def test_a_machines_provisioned_certificate_brings_its_roots() -> None:
    read = authority(PROV_CERT="/etc/certs")
    assert (read.provisioned, read.ca_file) == (Path("/etc/certs"), Path("/etc/certs/root-cert.pem"))
    assert authority(PROV_CERT="/etc/certs", CA_ROOT_CA="/r.pem").ca_file == Path("/r.pem")


def test_the_identity_follows_the_trust_domain() -> None:
    read = loaded(TRUST_DOMAIN="demo.example").settings
    assert (read.trust_domain, read.workloads[0].spiffe_id) == ("demo.example", "spiffe://demo.example/ns/shop/sa/web")


def test_lifetime_and_files() -> None:
    (workload,) = loaded(SECRET_TTL="1h0m0s", OUTPUT_CERTS="/etc/certs").settings.workloads
    assert workload.output is not None
    assert (workload.ttl, workload.output.directory) == (timedelta(hours=1), Path("/etc/certs"))


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({"WORKLOAD_RSA_KEY_SIZE": "4096"}, KeyType.RSA_4096),
        ({"ECC_SIGNATURE_ALGORITHM": "ECDSA"}, KeyType.EC_P256),
        ({"ECC_SIGNATURE_ALGORITHM": "ECDSA", "ECC_CURVE": "P384"}, KeyType.EC_P384),
        ({"ECC_SIGNATURE_ALGORITHM": "ECDSA", "WORKLOAD_RSA_KEY_SIZE": "4096"}, KeyType.EC_P256),
        ({"ECC_CURVE": "P384"}, KeyType.RSA_2048),
        ({"ECC_SIGNATURE_ALGORITHM": ""}, KeyType.RSA_2048),
    ],
)
def test_the_key_is_rsa_unless_ecdsa_is_wanted(variables: dict[str, str], key: KeyType) -> None:
    assert loaded(**variables).settings.workloads[0].key is key


@pytest.mark.parametrize(("ratio", "fraction"), [("0.5", 0.5), ("0.2", 0.8), ("0.3", 0.7), ("0.8", 0.2)])
def test_the_grace_period_counts_back_from_the_expiry(ratio: str, fraction: float) -> None:
    assert loaded(SECRET_GRACE_PERIOD_RATIO=ratio).settings.renewal.fraction == fraction


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CA_ADDR", "https://istiod"),
        ("CA_ROOT_CA", "SYSTEM"),
        ("TRUST_DOMAIN", "Demo"),
        ("SECRET_TTL", "3600"),
        ("WORKLOAD_RSA_KEY_SIZE", "1024"),
        ("ECC_SIGNATURE_ALGORITHM", "ED25519"),
        ("SECRET_GRACE_PERIOD_RATIO", "half"),
        ("SECRET_GRACE_PERIOD_RATIO", "0.95"),
        ("SECRET_GRACE_PERIOD_RATIO", "nan"),
    ],
)
def test_a_value_that_cannot_be_is_reported_with_its_variable(name: str, value: str) -> None:
    found = wrong({**LEAST, name: value})
    assert (f"${name}",) in {each.where for each in found}


def test_a_curve_that_cannot_be_is_reported_with_its_variable() -> None:
    (found,) = wrong({**LEAST, "ECC_SIGNATURE_ALGORITHM": "ECDSA", "ECC_CURVE": "P521"})
    assert str(found).startswith('$ECC_CURVE: workloads[0].key is "P521"; it must be one of P256, P384')


def test_a_missing_part_of_the_identity_is_reported() -> None:
    found = wrong({"CA_ADDR": "ca:15012"})
    assert {each.where for each in found} == {("$POD_NAMESPACE",), ("$SERVICE_ACCOUNT",)}
    given = {"CA_ADDR": "ca:15012", "SDS_AGENT__WORKLOADS__0__SPIFFE_ID": "spiffe://cluster.local/vm"}
    assert load(None, given, uid=UID).settings.workloads[0].spiffe_id == "spiffe://cluster.local/vm"


@pytest.mark.parametrize(
    ("name", "value"),
    [("POD_NAMESPACE", "a shop"), ("POD_NAMESPACE", "shop/sa/x"), ("POD_NAMESPACE", ".."), ("SERVICE_ACCOUNT", "w%b")],
)
def test_a_part_of_the_identity_that_cannot_be_one_is_reported_once_with_its_own_variable(
    name: str, value: str
) -> None:
    (found,) = wrong({**LEAST, name: value})
    assert str(found).startswith(f'${name}: workloads[0].spiffe_id is "{value}"; it must be of a-z')


def test_a_trust_domain_that_cannot_be_one_is_reported_once() -> None:
    (found,) = wrong({**LEAST, "TRUST_DOMAIN": "Demo"})
    assert found.where == ("$TRUST_DOMAIN",)


def test_variables_of_ours_add_what_istio_has_no_name_for() -> None:
    read = authority(SDS_AGENT__AUTHORITIES__ISTIO__SERVER_NAME="istiod.istio-system.svc")
    assert read.server_name == "istiod.istio-system.svc"


def test_a_ca_on_this_machine_can_be_spoken_to_without_tls() -> None:
    plaintext = {"SDS_AGENT__AUTHORITIES__ISTIO__PLAINTEXT_LOOPBACK": "true", "CA_ADDR": "localhost:15010"}
    assert authority(**plaintext).ca_file is None
    (found,) = wrong({**LEAST, **plaintext, "CA_ROOT_CA": "/etc/roots.pem"})
    assert str(found).startswith("$CA_ROOT_CA: authorities.istio.ca_file is given; plaintext_loopback speaks without")


def test_with_a_file_the_agent_ignores_all_of_them(tmp_path: Path) -> None:
    read = settings(tmp_path, MINIMAL, **LEAST, TRUST_DOMAIN="other.example")
    assert read.trust_domain == "demo.example"
    assert list(read.authorities) == ["local"]


def test_without_the_cas_address_the_agent_ignores_all_of_them() -> None:
    environ = {name: value for name, value in LEAST.items() if name != "CA_ADDR"}
    for given in (environ, environ | {"CA_ADDR": ""}):
        assert load(None, given, uid=UID).settings.trust_domain == "sds-agent.local"


def test_the_agent_says_which_variables_had_a_say() -> None:
    assert loaded().source.startswith("the defaults, $CA_ADDR")
    assert set(LEAST) <= set(loaded().variables)


def test_the_page_lists_what_is_understood() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (yes|no)", PAGE, re.MULTILINE))
    understood = {name for name, known in rows.items() if known == "yes"}
    given = dict.fromkeys(["TRUST_DOMAIN", "OUTPUT_CERTS", "PROV_CERT", "CA_ROOT_CA"], "x") | {
        "SECRET_TTL": "1h",
        "WORKLOAD_RSA_KEY_SIZE": "2048",
        "SECRET_GRACE_PERIOD_RATIO": "0.4",
        "ISTIO_META_CLUSTER_ID": "c",
        "ISTIO_META_CERT_SIGNER": "s",
    }
    heard = set(loaded(**given).variables) | set(loaded(ECC_SIGNATURE_ALGORITHM="ECDSA", ECC_CURVE="P256").variables)
    assert heard | {"ECC_SIGNATURE_ALGORITHM"} == understood
