"""`sds-agent doctor` where no agent runs, and before what says that it is an Envoy."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fakes.configurations import MINIMAL
from fakes.envoy_admin import admin_interface

from sds_agent.cli.main import main

Printed = pytest.CaptureFixture[str]


def answering(body: bytes) -> AbstractContextManager[str]:
    return admin_interface({"/config_dump": body})


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "agent.yaml"
    file.write_text(f"{MINIMAL}state_dir: state\nsds: {{socket: none.sock}}\n")
    return str(file)


@pytest.mark.parametrize("body", [b"", b"<html>", b"5", b"[]", b'{"configs": 5}', b'{"configs": [5]}', b"\xff"])
def test_what_is_no_envoy_is_said_to_be_none(body: bytes, config: str, capsys: Printed) -> None:
    with answering(body) as url:
        assert main(["doctor", "--config", config, "--envoy", url]) == 1
    said = capsys.readouterr()
    assert f"bad      Envoy {url}: what answers /config_dump is no Envoy" in said.out
    assert said.err == ""


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_dump_that_is_nested_too_deep_is_no_traceback(depth: int, config: str, capsys: Printed) -> None:
    with answering(b'{"configs": [{"x": ' + b"[" * depth + b"]" * depth + b"}]}") as url:
        assert main(["doctor", "--config", config, "--envoy", url]) == 1
    assert f"Envoy {url}: " in capsys.readouterr().out


def test_the_names_of_an_envoy_do_not_write_to_the_terminal(config: str, capsys: Printed) -> None:
    """Else a listener's name could colour a line, or add one that says good."""
    listener = {"name": "a\x1b[31m\ngood     socket: forged", "x": {"common_tls_context": {}}}
    with answering(json.dumps({"configs": [{"dynamic_listeners": [{"listener": listener}]}]}).encode()) as url:
        assert main(["doctor", "--config", config, "--envoy", url]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert not any(line.startswith("good     socket") for line in said.splitlines())


def test_a_name_is_shown_as_it_is_where_it_can_be(config: str, capsys: Printed) -> None:
    """As `sds-agent explain` takes it."""
    listener = {"name": "über", "x": {"common_tls_context": {}}}
    with answering(json.dumps({"configs": [{"dynamic_listeners": [{"listener": listener}]}]}).encode()) as url:
        assert main(["doctor", "--config", config, "--envoy", url]) == 1
    assert f"Envoy {url}, listener über: " in capsys.readouterr().out


def test_an_envoy_is_named_by_host_and_port_alone_too(config: str, capsys: Printed) -> None:
    """As `secret --envoy` takes it, and `--admin`: otherwise it is the path of a socket, which is not there."""
    with answering(b"<html>") as url:
        assert main(["doctor", "--config", config, "--envoy", url.removeprefix("http://")]) == 1
    assert f"bad      Envoy {url}: what answers /config_dump is no Envoy" in capsys.readouterr().out


def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: Printed) -> None:
    assert main(["doctor", "--config", str(tmp_path / "none.yaml")]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"bad      configuration: {tmp_path}/none.yaml: the file does not exist")


def test_a_configuration_that_cannot_be_examined_is_a_line_too(tmp_path: Path, capsys: Printed) -> None:
    """As where this user may not enter its directory, which root may."""
    assert main(["doctor", "--config", str(tmp_path / ("long" * 100))]) == 1
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"bad      configuration: {tmp_path}/longlong")
    assert "File name too long" in line
