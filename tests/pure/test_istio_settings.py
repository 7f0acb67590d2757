"""The settings of an Istio CA: what they may be, and what of them does not go together."""

from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, problems, settings

from sds_agent.authority.istio.settings import IstioSettings

GOOD = {"address": "ca.example:15012", "ca_file": "roots.pem", "token_file": "token"}


def text(**keys: str | None) -> str:
    """A file whose authority has these keys, where None leaves one of the good ones out."""
    given = ", ".join(f"{key}: {value}" for key, value in (GOOD | keys).items() if value is not None)
    return f"{MINIMAL}authorities: {{mesh: {{type: istio, {given}}}}}\n"


def test_defaults_and_places(tmp_path: Path) -> None:
    mesh = settings(tmp_path, text()).authorities["mesh"]
    assert mesh == IstioSettings(
        address=("ca.example:15012",), ca_file=tmp_path / "roots.pem", token_file=tmp_path / "token"
    )
    assert isinstance(mesh, IstioSettings)
    assert (mesh.mtls, mesh.impersonate, mesh.plaintext_loopback) == (True, False, False)


def test_several_addresses_keep_their_order(tmp_path: Path) -> None:
    mesh = settings(tmp_path, text(address='["b:1", "[2001:db8::1]:15012", "10.0.0.1:3"]')).authorities["mesh"]
    assert isinstance(mesh, IstioSettings)
    assert mesh.address == ("b:1", "[2001:db8::1]:15012", "10.0.0.1:3")


@pytest.mark.parametrize(
    "address",
    ["ca", "https://ca:1", "ca:0", "ca:65536", "ca:1/x", "[]", '["a:1", "b"]', "2001:db8::1:1", "{}", '"a b:1"', "1"],
)
def test_the_error_for_a_wrong_address_shows_the_form_it_must_have(tmp_path: Path, address: str) -> None:
    (found,) = problems(tmp_path, text(address=address))
    assert found.key == "authorities.mesh.address"
    assert "HOST:PORT" in found.fix


@pytest.mark.parametrize("flag", ['"yes"', "1", "no way", "[]"])
def test_a_flag_is_true_or_false(tmp_path: Path, flag: str) -> None:
    (found,) = problems(tmp_path, text(mtls=flag))
    assert "it must be true or false" in found.fix


def test_a_variable_can_set_a_flag(tmp_path: Path) -> None:
    mesh = settings(tmp_path, text(), SDS_AGENT__AUTHORITIES__MESH__MTLS="false").authorities["mesh"]
    assert isinstance(mesh, IstioSettings)
    assert mesh.mtls is False


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"ca_file": None}, "ca_file", "nothing vouches"),
        ({"plaintext_loopback": "true", "address": "127.0.0.1:1"}, "ca_file", "keep one of the two"),
        ({"plaintext_loopback": "true", "ca_file": None}, "address", "never leaves it without TLS"),
        ({"plaintext_loopback": "true", "ca_file": None, "address": "127.evil.x:1"}, "address", "without TLS"),
        ({"token_file": None}, "token_file", "takes a token"),
        ({"token_file": None, "provisioned": "certs", "mtls": "false"}, "token_file", "without mtls"),
        ({"token_file": None, "provisioned": "certs", "impersonate": "true"}, "token_file", "impersonate"),
    ],
)
def test_the_error_for_keys_that_exclude_each_other_names_a_key(
    tmp_path: Path, keys: dict[str, str | None], key: str, said: str
) -> None:
    (found,) = problems(tmp_path, text(**keys))
    assert found.key == f"authorities.mesh.{key}"
    assert said in found.fix


@pytest.mark.parametrize(
    "keys",
    [
        {"plaintext_loopback": "true", "ca_file": None, "address": '["localhost:1", "127.0.0.1:2", "[::1]:3"]'},
        {"token_file": None, "provisioned": "certs"},
        {"impersonate": "true"},
    ],
)
def test_keys_that_go_together_are_accepted(tmp_path: Path, keys: dict[str, str | None]) -> None:
    assert problems(tmp_path, text(**keys)) == ()


def test_two_workloads_do_not_write_over_each_others_files(tmp_path: Path) -> None:
    more = "    output: certs\n  - {name: b, spiffe_id: spiffe://demo.example/b, output: x/../certs}\n"
    (found,) = problems(tmp_path, MINIMAL + more)
    assert found.key == "workloads[1].output"


SECOND = "  - {name: b, spiffe_id: spiffe://demo.example/b}\n"


def named(more: str) -> str:
    """Two authorities; the first workload's is the mesh."""
    mesh = ", ".join(f"{key}: {value}" for key, value in GOOD.items())
    both = f"authorities: {{mesh: {{type: istio, {mesh}}}, own: {{type: embedded}}}}\n"
    return f"{MINIMAL}    authority: mesh\n{more}{both}"


@pytest.mark.parametrize(
    "configuration",
    [text().replace("authorities", f"{SECOND}authorities"), named(SECOND.replace("}", ", authority: mesh}"))],
)
def test_a_second_identity_that_its_ca_would_never_sign_is_reported_beforehand(
    tmp_path: Path, configuration: str
) -> None:
    """The CA signs whom the token names; the second workload would retry for ever."""
    (found,) = problems(tmp_path, configuration)
    assert found.key == "workloads[1].spiffe_id"
    assert "a second identity from the authority mesh" in found.found
    assert "authorities.mesh.impersonate" in found.fix


@pytest.mark.parametrize(
    "configuration",
    [
        text(impersonate="true").replace("authorities", f"{SECOND}authorities"),
        named(SECOND.replace("}", ", authority: own}")),
    ],
)
def test_identities_that_are_signed_one_by_one_or_for_a_node_agent_are_taken(
    tmp_path: Path, configuration: str
) -> None:
    assert problems(tmp_path, configuration) == ()


def test_an_identity_that_cannot_be_read_is_reported_once(tmp_path: Path) -> None:
    broken = SECOND.replace("spiffe://demo.example/b", "b")
    (found,) = problems(tmp_path, text().replace("authorities", f"{broken}authorities"))
    assert found.key == "workloads[1].spiffe_id"


def test_a_second_workload_with_the_first_ones_identity_is_reported_once(tmp_path: Path) -> None:
    same = SECOND.replace("demo.example/b", "demo.example/web")
    (found,) = problems(tmp_path, text().replace("authorities", f"{same}authorities"))
    assert "the SPIFFE ID of workloads[0] too" in found.found
