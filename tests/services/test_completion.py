"""The shell completes what the program takes: commands, options, their values and file names."""

import subprocess
from pathlib import Path

import pytest

from sds_agent.cli.commands import COMMANDS, Group
from sds_agent.cli.completion import script

COMPLETE = """\
source "$1"
shift
read -ra declared < <(complete -p sds-agent)
for at in "${!declared[@]}"; do
    if [ "${declared[at]}" = -F ]; then function=${declared[at + 1]}; fi
done
COMP_WORDS=(sds-agent "$@")
COMP_CWORD=$#
"$function" sds-agent "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Completes the last of the words, as bash does when a user presses the tabulator."""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "sds-agent"
    path.write_text(script("bash"))
    return path


def completed(bash: Path, folder: Path, words: list[str]) -> list[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(bash), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return sorted(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ch"], ["check"]),
        (["envoy"], ["envoy-config"]),
        (["ca", "t"], ["token"]),
        (["install", ""], ["systemd"]),
        (["help", "ver"], ["version"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["run", "--log-l"], ["--log-level"]),
        (["run", "--log-level", "w"], ["warning"]),
        (["envoy-config", "web", "--post"], ["--post-quantum"]),
        (["status", "--output", "j"], ["json"]),
        (["check", "sds"], ["sds-agent.yaml"]),
        (["run", "--config", "sds"], ["sds-agent.yaml"]),
        (["ca", "root", "c"], ["cluster1"]),
    ],
)
def test_bash_completes(words: list[str], offered: list[str], bash: Path, tmp_path: Path) -> None:
    (tmp_path / "sds-agent.yaml").touch()
    (tmp_path / "cluster1").mkdir()
    (tmp_path / "c.txt").touch()
    assert completed(bash, tmp_path, words) == offered


def test_bash_offers_every_command(bash: Path, tmp_path: Path) -> None:
    assert set(COMMANDS) <= set(completed(bash, tmp_path, [""]))


def test_the_script_of_fish_names_every_command_and_its_options() -> None:
    made = script("fish")
    for name in COMMANDS:
        assert f"-a {name} -d " in made
        assert f"_shtab_sds_agent_using {name}' " in made
    assert "using install systemd' -l socket-unit " in made


def test_the_script_of_zsh_names_every_command_and_its_options() -> None:
    made = script("zsh")
    assert made.startswith("#compdef sds-agent\n")
    for name in COMMANDS:
        assert f"\n    {name}:'" in made
        assert f"_shtab_sds_agent_{name.replace('-', '_')}_options=(" in made or isinstance(COMMANDS[name], Group)
    assert '"--socket-unit[' in made
