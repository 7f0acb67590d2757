"""The scripts can be stopped at any moment, and called by any path: the next call works as if nothing had been."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
WITH_USAGE = ["bench", "ca-interop", "compose-demo", "gen-protos", "istio-interop", "plots", "screenshots", "test"]
DEADLINE = 60.0
PYTHON = """#!/bin/bash
case "$*" in
"-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    echo made >>{folder}/made
    if [ -e {folder}/kill ]; then
        rm {folder}/kill
        kill -KILL $PPID
    fi
    ;;
*" --target "*) exec cat {folder}/wait ;;
*.py*) exec {python} "$@" ;;
esac
"""
"""Stands for the machine's Python and for an environment's: it makes one at once, and can be told to be killed then; an
Envoy takes its time.
"""


class Checkout:
    """A checkout with the scripts and nothing else, on a machine with that Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(SCRIPTS, folder / "scripts")
        (folder / "pyproject.toml").touch()
        (folder / "bin").mkdir()
        python = folder / "bin" / "python3"
        python.write_text(PYTHON.format(folder=folder, python=sys.executable))
        python.chmod(0o700)
        self.environment = os.environ | {"PATH": f"{python.parent}:/usr/bin:/bin"}

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=DEADLINE
        )

    def environments_made(self) -> int:
        """How often an environment was made."""
        return len((self.folder / "made").read_text().split())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_an_environment_that_was_not_finished_is_made_anew_and_a_finished_one_is_used(checkout: Checkout) -> None:
    """What a killed call leaves may have a Python and half of a pip: no later call could install anything with it."""
    bench = checkout.folder / "scripts" / "bench"
    (checkout.folder / "benchmarks").mkdir()
    (checkout.folder / "benchmarks" / "cold.py").write_text("print('measured')")
    (checkout.folder / "kill").touch()
    assert checkout.run(bench, "cold").returncode == -signal.SIGKILL
    for _ in range(2):
        done = checkout.run(bench, "cold")
        assert (done.returncode, done.stdout.split()[-1]) == (0, "measured"), done.stderr
    assert checkout.environments_made() == 2


def test_ctrl_c_ends_the_benchmarks_whatever_the_first_of_them_makes_of_it(checkout: Checkout) -> None:
    """One whose server ends by the same Ctrl-C calls that something is missing."""
    (checkout.folder / "benchmarks").mkdir()
    os.mkfifo(checkout.folder / "wait")
    (checkout.folder / "benchmarks" / "cold.py").write_text(f"""
import sys
print("runs", flush=True)
try:
    open({str(checkout.folder / "wait")!r}).read()
except KeyboardInterrupt:
    sys.exit(3)
""")
    (checkout.folder / "benchmarks" / "push.py").write_text("print('the next runs')")
    command = [str(checkout.folder / "scripts" / "bench"), "cold", "push"]
    with subprocess.Popen(
        command, env=checkout.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        assert bench.stdout is not None
        assert "runs\n" in iter(bench.stdout.readline, "")
        os.killpg(bench.pid, signal.SIGINT)
        rest, _ = bench.communicate(timeout=DEADLINE)
    assert (bench.returncode, rest) == (130, "")


def test_an_envoy_that_was_not_whole_when_ctrl_c_came_is_not_left_behind(checkout: Checkout) -> None:
    """Each has a hundred megabytes, and no later call would look at it."""
    os.mkfifo(checkout.folder / "wait")
    command = [str(checkout.folder / "scripts" / "test"), "--envoy", "1.40.0"]
    with (
        subprocess.Popen(
            command, env=checkout.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as tests,
        (checkout.folder / "wait").open("w"),  # once it waits for the Envoy
    ):
        (partial,) = (checkout.folder / ".venvs").iterdir()
        os.killpg(tests.pid, signal.SIGINT)
        tests.communicate(timeout=DEADLINE)
    assert not partial.exists()


def test_a_program_beside_the_benchmarks_is_not_taken_for_one(checkout: Checkout) -> None:
    """The bare server, given the option for a small run as its socket's path, would serve there for ever."""
    (checkout.folder / "benchmarks").mkdir()
    (checkout.folder / "benchmarks" / "floor.py").touch()
    done = checkout.run(checkout.folder / "scripts" / "bench", "floor", "--small")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scripts/bench does not know 'floor'.\n")


DOCKER = """#!/bin/bash
echo "$*" >>{folder}/asked
case "$*" in *" build setup") exec cat {folder}/wait ;; esac
"""
"""Stands for docker with an engine that has no containers and takes its time for an image."""


def test_a_second_demonstration_with_containers_leaves_those_of_the_first_alone(checkout: Checkout) -> None:
    """It removes what an earlier one left that was killed, by the name of the project, which both have."""
    os.mkfifo(checkout.folder / "wait")
    docker = checkout.folder / "bin" / "docker"
    docker.write_text(DOCKER.format(folder=checkout.folder))
    docker.chmod(0o700)
    (checkout.folder / "bin" / "python3").unlink()
    (checkout.folder / "bin" / "python3").symlink_to(sys.executable)
    checkout.environment |= {"DOCKER_HOST": str(checkout.folder), "WEB_PORT": "0", "BACKEND_ENVOY_PORT": "0"}
    command = str(checkout.folder / "scripts" / "compose-demo")
    with (
        subprocess.Popen(
            [command], env=checkout.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as first,
        (checkout.folder / "wait").open("w"),
    ):  # once the first one waits for its image
        asked = (checkout.folder / "asked").read_text()
        second = checkout.run(command)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=DEADLINE)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == "compose-demo: another one runs on this machine: start this one when that has ended\n"
    assert (checkout.folder / "asked").read_text().startswith(f"{asked}info\ncompose version\n")
    assert first.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("name", WITH_USAGE)
def test_a_script_can_be_called_through_a_link(name: str, tmp_path: Path) -> None:
    link = tmp_path / "another-name"
    link.symlink_to(SCRIPTS / name)
    done = subprocess.run([link, "--help"], capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{name}" in done.stdout
