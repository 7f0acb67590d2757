"""What continuous integration runs: each of its parts counts."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
LAST = "=== 5 passed in 1 s ==="


def program(path: Path, code: int | str, says: str) -> None:
    path.write_text(f'#!/bin/sh\necho "{says}"\nexit {code}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("demo", "tests", "servers", "code", "words"),
    [
        (0, 0, 0, 0, "scripts/compose-demo: ok; scripts/test: ok; scripts/ca-interop: ok; "),
        (1, 0, 0, 1, "scripts/compose-demo: FAILED; scripts/test: ok; scripts/ca-interop: ok; "),
        (0, 1, 0, 1, "scripts/compose-demo: ok; scripts/test: FAILED; scripts/ca-interop: ok; "),
        (0, 3, 0, 1, "scripts/compose-demo: ok; scripts/test: FAILED; scripts/ca-interop: ok; "),
        (0, 0, 1, 1, "scripts/compose-demo: ok; scripts/test: ok; scripts/ca-interop: FAILED; "),
        (3, 0, 0, 0, "scripts/compose-demo: not run, without a Docker engine; scripts/test: ok; "),
        (3, 1, 0, 1, "scripts/compose-demo: not run, without a Docker engine; scripts/test: FAILED; "),
        (0, 0, 3, 0, "scripts/compose-demo: ok; scripts/test: ok; scripts/ca-interop: not run, without a CA server"),
        (0, 1, 3, 1, "scripts/compose-demo: ok; scripts/test: FAILED; scripts/ca-interop: not run, "),
    ],
)
def test_a_part_that_fails_fails_the_whole(
    tmp_path: Path, demo: int, tests: int, servers: int, code: int, words: str
) -> None:
    """All the tests are run, by the command of the README, and what only prepares them decides nothing."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    program(tmp_path / "scripts" / "compose-demo", demo, "the containers")
    program(tmp_path / "scripts" / "test", f"$([ $# -gt 0 ] && echo 9 || echo {tests})", LAST)
    program(tmp_path / "scripts" / "ca-interop", servers, "the servers: $*")
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "the containers\n" in done.stdout
    assert "the servers: --quick\n" in done.stdout
    verdict, last = done.stdout.splitlines()[-2:]
    assert verdict.startswith(words)
    assert last == LAST


def test_with_arguments_it_runs_the_tests_alone(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    (tmp_path / "scripts" / "test").write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    (tmp_path / "scripts" / "test").chmod(0o755)
    done = subprocess.run([tmp_path / ".ci" / "run", "unit", "--", "-x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "unit -- -x\n")
