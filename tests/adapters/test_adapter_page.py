"""docs/adapter.md has a whole adapter: whoever begins with its text gets one that passes the conformance suite."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import packages
from fakes.configurations import MINIMAL

PAGE = (Path(__file__).parents[2] / "docs" / "adapter.md").read_text()
MODULES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
OFFERS = dict(re.findall(r'^    (\w+) = "(\S+)"$', PAGE, re.MULTILINE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's modules, installed as a package for programs that are started there."""
    packages.install(tmp_path, "example-ca", OFFERS, MODULES)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_the_adapter_of_the_page_passes_the_conformance_suite_with_the_test_of_the_page(folder: Path) -> None:
    assert list(MODULES) == ["example_ca_kind", "example_ca_client", "test_example_ca"]
    done = python(folder, "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_example_ca.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d{2,} passed in", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("right", "wrong", "cases", "words"),
    [
        pytest.param(
            "body, headers)",
            "body, headers, unverified=True)",
            ["has a certificate of another root", "has an expired certificate", "has a certificate for another host"],
            "the adapter sent its request to a server that has",
            id="verifies-no-server",
        ),
        pytest.param(
            "raise AuthorityError(kind, said, ",
            "raise KeyError(said) if kind is ErrorKind.TRANSIENT else AuthorityError(kind, said, ",
            ["answers 503 with Retry-After", "answers 500"],
            "the adapter raised KeyError in place of an AuthorityError",
            id="translates-no-error",
        ),
    ],
)
def test_an_adapter_that_is_wrong_fails_the_cases_about_that_in_words(
    tmp_path: Path, right: str, wrong: str, cases: list[str], words: str
) -> None:
    client = MODULES["example_ca_client"]
    assert right in client
    modules = {**MODULES, "example_ca_client": client.replace(right, wrong)}
    packages.install(tmp_path, "example-ca", OFFERS, modules)
    chosen = [f"test_example_ca.py::test_the_adapter_conforms[fails in words where the CA {case}]" for case in cases]
    done = python(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *chosen)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(cases)} failed in" in done.stdout
    assert done.stdout.count(f"AssertionError: {words}") >= len(cases), done.stdout


def test_the_kind_of_the_page_is_one_of_the_kinds_of_a_configuration(folder: Path) -> None:
    (folder / "token").write_text("two words")
    keys = "type: example, url: 'https://127.0.0.1:1', ca_file: token, token_file: token"
    (folder / "sds-agent.yaml").write_text(f"{MINIMAL}authorities: {{own: {{{keys}}}}}\n")
    done = python(folder, "sds_agent", "check", "sds-agent.yaml")
    assert "The authority own is Example's CA at https://127.0.0.1:1." in " ".join(done.stdout.split())
    assert "warning: authorities.own.token_file: cannot be used: " in done.stderr
