"""What the documentation shows is what a reader types: configuration, commands, scripts and links have to work."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)

YAML = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
CONFIGURATIONS = [example for example in YAML if re.search(r"^workloads:", example, re.MULTILINE)]
SNIPPETS = [example for example in YAML if example not in CONFIGURATIONS]

# indented lines and `code` in the text
CODE = "\n".join(re.findall(r"^    .*$|`[^`\n]+`", TEXT, re.MULTILINE))
COMMANDS = sorted(set(re.findall(r"\bsds-agent ([a-z][a-z-]+)(?=[ `\n]|$)", CODE, re.MULTILINE)))
SCRIPTS = sorted(set(re.findall(r"(?<![\w/])(scripts/[\w-]+)(?![\w/])", CODE)))
LINKS = [
    (page.relative_to(ROOT), link)
    for page in PAGES
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
]


def sds_agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "sds_agent", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_there_is_something_to_check() -> None:
    assert CONFIGURATIONS
    assert SNIPPETS
    assert COMMANDS
    assert SCRIPTS
    assert LINKS


@pytest.mark.parametrize("example", [*CONFIGURATIONS, (ROOT / "envoy" / "agent.yaml").read_text()])
def test_the_configurations_shown_are_good(example: str, tmp_path: Path) -> None:
    file = tmp_path / "sds-agent.yaml"
    file.write_text(example)
    done = sds_agent("check", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_of_envoy_configuration_come_from_files_that_envoy_takes(snippet: str) -> None:
    """Comments aside: the files are read by themselves, the pages explain around the snippet."""
    files = [without_comments(path.read_text()) for path in (ROOT / "envoy").glob("*.yaml")]
    assert any(without_comments(snippet) in file for file in files)


def without_comments(yaml: str) -> str:
    """The lines without comments and without indentation."""
    kept = (re.sub(r"(^| )#.*", "", line).strip() for line in textwrap.dedent(yaml).splitlines())
    return "\n".join(line for line in kept if line)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_shown_exist(command: str) -> None:
    done = sds_agent(command, "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_shown_exist(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_is_asked_for_help_explains_itself_and_does_nothing_else(script: str) -> None:
    """`scripts/demo` hands its arguments to demo_app, behind the environment that it makes first."""
    command = {
        "scripts/demo": [sys.executable, "-m", "demo_app"],
        "scripts/gen-schema": [sys.executable, str(ROOT / script)],
    }.get(script, [str(ROOT / script)])
    path = os.pathsep.join([str(ROOT / "scripts"), *filter(None, sys.path)])
    environment = os.environ | {"PATH": "/usr/bin:/bin", "PYTHONPATH": path}
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(script).name in done.stdout


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"scripts/demo", "scripts/gen-schema"}))
def test_a_script_refuses_an_argument_that_it_does_not_know(script: str) -> None:
    done = subprocess.run([ROOT / script, "--hepl"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{script} does not know '--hepl'" in done.stderr


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_the_links_lead_somewhere(page: Path, link: str) -> None:
    assert (ROOT / page.parent / link).exists()
