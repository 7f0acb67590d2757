"""What continuous integration runs: both of its parts count."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
LAST = "=== 5 passed in 1 s ==="


def program(path: Path, code: int, says: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("demo", "tests", "code", "words"),
    [
        (0, 0, 0, "scripts/compose-demo: ok; scripts/test: ok; "),
        (1, 0, 1, "scripts/compose-demo: FAILED; scripts/test: ok; "),
        (0, 1, 1, "scripts/compose-demo: ok; scripts/test: FAILED; "),
        (3, 0, 0, "scripts/compose-demo: not run, without a Docker engine; scripts/test: ok; "),
        (3, 1, 1, "scripts/compose-demo: not run, without a Docker engine; scripts/test: FAILED; "),
    ],
)
def test_a_part_that_fails_fails_the_whole(tmp_path: Path, demo: int, tests: int, code: int, words: str) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    program(tmp_path / "scripts" / "compose-demo", demo, "the containers")
    program(tmp_path / "scripts" / "test", tests, LAST)
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "the containers\n" in done.stdout
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
