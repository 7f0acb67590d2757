"""What an Envoy has loaded is read from several answers, none of which says by itself what is in use."""

import base64
import json
from datetime import timedelta

import pytest
from fakes.envoy_admin import admin_interface
from fakes.hierarchy import NOW

from sds_agent.cli.main import main
from sds_agent.inspection.envoy_admin import EnvoyAdmin, statistic
from sds_agent.pki.certificates import serial_hex, write_pem
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import make_root

ROOT, NEW = (make_root(generate(KeyType.EC_P256), "demo.example", NOW, timedelta(hours=9)) for _ in range(2))


def state(version: str, accepted: str) -> str:
    """Of a bundle whose first root is in use, sent in one version, with the version that was accepted last."""
    pem = base64.b64encode(write_pem([ROOT.certificate, NEW.certificate])).decode()
    secret = {"validation_context": {"trusted_ca": {"inline_bytes": pem}}}
    answers = {
        "/certs": {"certificates": [{"ca_cert": [{"serial_number": serial_hex(ROOT.certificate)}]}]},
        "/config_dump?resource=dynamic_active_secrets": {
            "configs": [{"name": "spiffe://a.example", "version_info": version, "secret": secret}]
        },
        "/config_dump?resource=dynamic_warming_secrets": {},
        "/stats?filter=version_text&format=json": {
            "stats": [{"name": "sds.spiffe_a.example.version_text", "value": accepted}]
        },
    }
    with admin_interface({path: json.dumps(each).encode() for path, each in answers.items()}) as url:
        (found,) = EnvoyAdmin(url).secrets()
    return found.state


def test_a_refused_bundle_that_begins_like_the_one_in_use_is_not_called_active() -> None:
    assert state("v2", accepted="v1") == "REJECTED"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("web.v1", "web.v1"),
        ("spiffe://a.example/web", "spiffe_a.example/web"),
        ("file-root:/etc/roots.pem", "file-root_etc/roots.pem"),
        ("a:b", "a_b"),
        ("a::/b", "a__b"),
        ("a:", "a_"),
        ("..two..", "..two"),
    ],
)
def test_a_statistic_is_named_as_envoy_names_it(name: str, written: str) -> None:
    """As a real one does."""
    assert statistic(name) == f"sds.{written}.version_text"


def test_a_bundle_is_active_by_its_accepted_version_or_by_its_root_where_there_is_no_version() -> None:
    assert state("v2", accepted="v2") == "ACTIVE"
    assert state("v2", accepted="") == "ACTIVE"


TICKETS = {"name": "tickets", "secret": {"session_ticket_keys": {"keys": [{"inline_bytes": "W3JlZGFjdGVkXQ=="}]}}}
OTHERS = {
    "of SPIRE": {"validation_context": {"custom_validator_config": {"name": "envoy.tls.cert_validator.spiffe"}}},
    "of the system": {"validation_context": {"system_root_certs": {}}},
    "PKCS #12": {"tls_certificate": {"pkcs12": {"inline_bytes": "W3JlZGFjdGVkXQ=="}}},
}
TOKEN = {"name": "token", "version_info": "2", "secret": {"generic_secret": {"secret": {"inline_bytes": "W10="}}}}


@pytest.mark.parametrize(("accepted", "rest"), [("2", "ACTIVE"), ("1", "REJECTED")])
def test_a_secret_of_a_kind_without_certificates_is_not_said_to_be_waited_for(accepted: str, rest: str) -> None:
    """As one from a file or from another server, which Envoy uses."""
    answers = {
        "/certs": {},
        "/config_dump?resource=dynamic_active_secrets": {
            "configs": [TICKETS, TOKEN, *({"name": name, "secret": each} for name, each in OTHERS.items())]
        },
        "/config_dump?resource=dynamic_warming_secrets": {"configs": [{**TICKETS, "name": "late"}]},
        "/stats?filter=version_text&format=json": {"stats": [{"name": "sds.token.version_text", "value": accepted}]},
    }
    with admin_interface({path: json.dumps(each).encode() for path, each in answers.items()}) as url:
        found = {each.name: each.state for each in EnvoyAdmin(url).secrets()}
    assert found == {"tickets": "ACTIVE", "token": rest, **dict.fromkeys(OTHERS, "ACTIVE"), "late": "WARMING"}


def test_an_envoy_without_a_secret_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Else the head of an empty table would be all that explains the exit code."""
    paths = (
        "/certs",
        "/config_dump?resource=dynamic_active_secrets",
        "/config_dump?resource=dynamic_warming_secrets",
        "/stats?filter=version_text&format=json",
    )
    with admin_interface(dict.fromkeys(paths, b"{}")) as url:
        for options, named in ([], ""), (["--socket", "/a b.sock"], " --socket '/a b.sock'"):
            assert main(["secret", "--envoy", url, *options]) == 1
            assert capsys.readouterr().err == (
                f"sds-agent: the Envoy at {url} has asked for no secret over SDS; `sds-agent doctor --envoy "
                f"{url}{named}` examines its configuration\n"
            )


def test_a_name_that_is_fit_to_be_shown_is_as_the_agent_has_it_and_another_is_escaped() -> None:
    names = ["über", "a\x1b[31mb", "x" * 10_000]
    answers = {
        "/certs": {},
        "/config_dump?resource=dynamic_active_secrets": {"configs": [{**TICKETS, "name": name} for name in names]},
        "/config_dump?resource=dynamic_warming_secrets": {},
        "/stats?filter=version_text&format=json": {},
    }
    with admin_interface({path: json.dumps(each).encode() for path, each in answers.items()}) as url:
        found = [each.name for each in EnvoyAdmin(url).secrets()]
    assert found[:2] == ["über", "a\\u001b[31mb"]
    assert len(found[2]) < 1000
