"""Without a file every command speaks of the agent of the working directory, and of none that another user chose."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.configurations import MINIMAL

from sds_agent.cli.config_file import who_could_change
from sds_agent.cli.main import main
from sds_agent.errors import ConfigurationError


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a configuration, in an environment without variables of the agent's."""
    for name in [each for each in os.environ if each.upper().startswith("SDS_AGENT")] + ["CA_ADDR"]:
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory() as short:  # a socket's path has little room
        folder = Path(short, "work")
        folder.mkdir()
        folder.chmod(0o755)
        file = folder / "sds-agent.yaml"
        file.write_text(f"{MINIMAL}state_dir: state\nsds: {{socket: of-the-file.sock}}\nlog: {{format: json}}\n")
        file.chmod(0o644)
        monkeypatch.chdir(folder)
        yield folder
        monkeypatch.chdir("/")


def test_run_uses_the_file_of_the_working_directory_and_says_so(here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "sds_agent", "run", "--socket", "other.sock"]
    with subprocess.Popen(command, env=environment, cwd=here, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said, configured = process.stderr.readline(), json.loads(process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert said == f"sds-agent: no FILE is named: using {here}/sds-agent.yaml, which is in the working directory\n"
    assert (configured["event"], configured["source"]) == ("configured", f"{here}/sds-agent.yaml and --socket")


@pytest.mark.parametrize("command", ["ready", "status", "explain default", "secret", "check", "envoy-config default"])
def test_every_command_speaks_of_the_agent_of_the_working_directory(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(command.split())
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"{here}/of-the-file." in said
    assert code == (0 if command in {"check", "envoy-config default"} else 1), "no agent runs there"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SOCKET", "{here}/elsewhere.sock", "no agent answers at {here}/elsewhere.sock ("),
        ("ADDRESS", "127.0.0.1:1", " nor at http://127.0.0.1:1 ("),
        (
            "ENABLED",
            "false",
            "(the defaults, $SDS_AGENT__ADMIN__ENABLED and $SDS_AGENT__STATE_DIR) has admin.enabled: false",
        ),
    ],
)
@pytest.mark.parametrize("command", ["status", "explain default", "doctor"])
def test_without_a_file_the_variables_say_where_the_admin_server_is(
    command: str,
    key: str,
    value: str,
    said: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as in a container, whose agent and whose commands have the same ones."""
    (here / "sds-agent.yaml").unlink()
    monkeypatch.setenv("SDS_AGENT__STATE_DIR", str(here / "state"))
    monkeypatch.setenv(f"SDS_AGENT__ADMIN__{key}", value.format(here=here))
    assert main(command.split()) == 1
    assert said.format(here=here) in "".join(capsys.readouterr())


def test_issue_uses_the_file_of_the_working_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["issue", "--output", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["spiffe_id"].startswith("spiffe://demo.example/")
    assert (here / "state").is_dir()


@pytest.mark.parametrize("command", ["ready", "status", "secret"])
def test_a_named_socket_reads_no_file(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "sds-agent.yaml").write_text("nonsense")
    assert main([command, "--socket", "other.sock"]) == 1
    assert "other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["check", "issue --output -", "envoy-config default", "ca bundle", "ready", "status", "secret", "doctor"]
)
def test_istios_variables_keep_precedence_and_the_file_is_not_passed_over_in_silence(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a user who edits the file would not learn why nothing changes."""
    variables = {
        "CA_ADDR": "127.0.0.1:9",
        "POD_NAMESPACE": "shop",
        "SERVICE_ACCOUNT": "web",
        "PILOT_CERT_PROVIDER": "istiod",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SDS_AGENT__STATE_DIR", str(here / "state"))
    monkeypatch.setenv("SDS_AGENT__SDS__SOCKET", str(here / "a.sock"))
    main([*command.split(), *(["--timeout", "0.1s"] if command.startswith("issue") else [])])
    said = "".join(capsys.readouterr())
    assert f"{here}/sds-agent.yaml is not used: no FILE is named and CA_ADDR is set" in said
    main(["check", "--config", "sds-agent.yaml"])
    assert "is not used" not in "".join(capsys.readouterr())


def test_the_log_of_an_agent_names_the_file_that_it_does_not_use(here: Path) -> None:
    variables = {"CA_ADDR": "127.0.0.1:9", "POD_NAMESPACE": "shop", "SERVICE_ACCOUNT": "web"}
    places = {"SDS_AGENT__STATE_DIR": str(here / "state"), "SDS_AGENT__SDS__SOCKET": str(here / "a.sock")}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables | places
    command = [sys.executable, "-P", "-m", "sds_agent", "run", "--log-format", "json"]
    with subprocess.Popen(command, env=environment, cwd=here, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    configured = next(json.loads(line) for line in lines if line.startswith("{"))
    assert (configured["event"], configured["ignored"]) == ("configured", f"{here}/sds-agent.yaml")


@pytest.mark.parametrize(
    ("changed", "mode", "words"),
    [
        ("sds-agent.yaml", 0o666, "every user could change what is read from"),
        ("sds-agent.yaml", 0o664, "could change what is read from"),
        (".", 0o777, "others may write to"),
        (".", 0o775, "it may write to"),
        ("..", 0o777, "others may write to"),
    ],
)
@pytest.mark.parametrize("command", ["run", "status"])
def test_a_file_that_others_could_change_is_refused(
    command: str, changed: str, mode: int, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / changed).resolve().chmod(mode)
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert f"{here}/sds-agent.yaml is not used unless it is named: " in said
    assert words in said
    assert "--config sds-agent.yaml" in said
    assert main(["check", "--config", "sds-agent.yaml"]) != 2, "the user trusts it"


def test_a_file_of_another_user_is_refused(here: Path) -> None:
    file = here / "sds-agent.yaml"
    if file.stat().st_uid == 0:  # whom every user trusts
        os.chown(file, 12345, -1)
    owner = file.stat().st_uid
    (cause,) = [each for each in who_could_change(file, owner + 1) if str(file) in each.partition(": ")[2]]
    assert cause.startswith(f"uid {owner} could change what is read from {file}")
    assert list(who_could_change(file, owner)) == []


def test_a_file_that_is_no_configuration_is_reported_and_not_passed_over(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link that leads nowhere, such as to a disk that is not mounted."""
    (here / "sds-agent.yaml").unlink()
    (here / "sds-agent.yaml").symlink_to("nowhere/sds-agent.yaml")
    assert main(["check"]) == 2
    assert f"{here}/sds-agent.yaml leads to no file (No such file or directory); remove it" in capsys.readouterr().err


@pytest.mark.parametrize("link_to", [None, "nowhere.yaml"])
def test_a_file_that_another_user_makes_after_the_check_is_not_read(link_to: str | None, here: Path) -> None:
    """In a directory such as /tmp every user can make the file, or what the link leads to, in this moment."""
    here.chmod(0o1777)
    file = here / "sds-agent.yaml"
    file.unlink()
    if link_to is not None:
        file.symlink_to(link_to)
    with pytest.raises(ConfigurationError, match="remove it, or name a file with --config"):
        list(who_could_change(file, os.geteuid()))


def test_the_other_ending_of_yaml_is_found_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the agent would run on the defaults beside the file."""
    (here / "sds-agent.yaml").rename(here / "sds-agent.yml")
    assert main(["check"]) == 0
    assert f"{here}/sds-agent.yml" in " ".join(capsys.readouterr().out.split())
    (here / "sds-agent.yml").chmod(0o666)
    assert main(["check"]) == 2
    assert "--config sds-agent.yml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "status"])
def test_two_files_are_refused_and_none_is_guessed(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "sds-agent.yml").touch(0o644)
    assert main([command]) == 2
    assert f"{here} has sds-agent.yaml and sds-agent.yml; remove one of them" in capsys.readouterr().err
