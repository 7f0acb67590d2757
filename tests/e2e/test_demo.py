"""The demonstration is a newcomer's first minute: it has to work, to tell the truth, and to leave nothing behind."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from select import select

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEADLINE = 60.0


def start(directory: Path, *arguments: str, before: Path = SCRIPTS) -> subprocess.Popen[str]:
    """The demonstration, keeping its files in `directory`. What scripts/demo does, but for making the environment.

    It finds modules in `before` first.
    """
    path = os.pathsep.join([str(before), str(SCRIPTS), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "demo_app", *arguments],
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def until_line(demo: subprocess.Popen[str], pattern: str) -> str:
    """The first line that holds `pattern`."""
    assert demo.stdout is not None
    seen = []
    for line in demo.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"the demonstration ended before it said {pattern!r}:\n{''.join(seen)}")


def programs(directory: Path) -> list[int]:
    """The processes that were started with a path in `directory` on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if os.fsencode(directory) in command:
            found.append(int(entry.parent.name))
    return found


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a short path, because Unix sockets are made in it."""
    path = tmp_path_factory.mktemp("d")
    yield path
    assert programs(path) == []


def test_certificates_change_under_traffic_and_no_request_fails(directory: Path) -> None:
    with start(directory, "--seconds", "8", "--ttl", "5", "--rotations", "2") as demo:
        output, _ = demo.communicate(timeout=DEADLINE)
    assert demo.returncode == 0, output
    assert "No request failed while the certificates changed." in output
    assert len(set(re.findall(r"Envoy B presents certificate (\w+)", output))) >= 3
    assert re.search(r"Envoy A took web after [\d.]+ ms", output)
    assert output.index("What happens now:") < output.index("Envoy B presents") < output.index("Next steps:")
    assert "a certificate that lives 5 s" in output
    assert list(directory.iterdir()) == []


def test_one_that_is_told_to_stay_can_be_tried_by_hand_with_the_commands_it_shows(directory: Path) -> None:
    # certificates that live long: at the moment of a renewal the two sides differ, as --diff then says
    with start(directory, "--seconds", "2", "--ttl", "3600", "--rotations", "0", "--keep") as demo:
        page = until_line(demo, r"http://127\.0\.0\.1:\d+/ shows the same live")
        until_line(demo, "To try by hand")
        assert demo.stdout is not None
        demo.stdout.readline()
        commands = [demo.stdout.readline().strip() for _ in range(6)]
        for command in (f"curl -sSf {re.search(r'http://[^ ]+', page)[0]}", *commands):  # type: ignore[index]  # matched
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=DEADLINE
            )
            assert (done.returncode, done.stdout != "") == (0, True), f"{command}: {done.stdout}{done.stderr}"
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=DEADLINE)
    assert demo.returncode == 0, output
    assert "No request failed while the certificates changed." in output


def test_fewer_rotations_than_promised_are_a_failure(directory: Path) -> None:
    with start(directory, "--seconds", "1", "--ttl", "3600") as demo:
        output, _ = demo.communicate(timeout=DEADLINE)
    assert demo.returncode == 1
    assert "Envoy B's certificate changed 0 times, not 3." in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demonstration_that_is_stopped_early_cleans_up(directory: Path, number: signal.Signals) -> None:
    with start(directory) as demo:
        until_line(demo, "Envoy B presents certificate")
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=DEADLINE)
    assert demo.returncode == 130
    assert "Stopped before the end." in output
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_stopped_while_it_imports_its_libraries_ends_without_a_word(
    directory: Path, number: signal.Signals
) -> None:
    """The first second, in which a newcomer may think better of it."""
    os.mkfifo(directory / "go")
    (directory / "rich.py").write_text(f"open({str(directory / 'go')!r}).read()\n")
    with start(directory, before=directory) as demo, (directory / "go").open("w"):  # once the other side reads
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=DEADLINE)
    assert (demo.returncode, output) == (130, "")


def test_a_demonstration_that_is_killed_leaves_no_program_running(directory: Path) -> None:
    with start(directory) as demo:
        until_line(demo, "Envoy B presents certificate")
        watched = [os.pidfd_open(pid) for pid in programs(directory)]
        demo.kill()
    assert len(watched) == 3
    for descriptor in watched:
        assert select([descriptor], [], [], DEADLINE)[0]
        os.close(descriptor)


def test_a_program_that_ends_by_itself_is_named_with_the_end_of_its_log(directory: Path) -> None:
    with start(directory) as demo:
        until_line(demo, "Envoy B presents certificate")
        (agent,) = (pid for pid in programs(directory) if b"sds_agent" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(agent, signal.SIGKILL)
        output, _ = demo.communicate(timeout=DEADLINE)
    assert demo.returncode == 1
    assert "sds-agent ended by itself (killed by SIGKILL); the end of its log:" in output
    assert '"event":"acked"' in output


class Installation:
    """The part of the script that waits for pip, in a terminal, with another program in pip's place."""

    def __init__(self, directory: Path, program: str) -> None:
        fake = directory / "python"
        fake.write_text(f"#!{sys.executable}\n{program}")
        fake.chmod(0o700)
        (directory / "install.sh").write_text(
            f"set -euo pipefail\nsource {SCRIPTS}/_environment\nvenv={directory}\npip_with_log {fake} install\n"
        )
        self.terminal, inside = pty.openpty()
        # the shell around the script is the one that the terminal belongs to, as a user's is
        shell = f"trap : INT; bash {directory}/install.sh; echo code $?; read -r"
        command = ["setsid", "--ctty", "bash", "-c", shell]
        self.shell = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside)
        os.close(inside)

    def until(self, end: str) -> str:
        """What is shown up to that text."""
        shown = ""
        while end not in shown:
            assert select([self.terminal], [], [], DEADLINE)[0], shown
            shown += os.read(self.terminal, 4096).decode()
        return shown

    def end(self) -> None:
        """End the shell."""
        os.write(self.terminal, b"\n")
        self.shell.wait(DEADLINE)
        os.close(self.terminal)


def test_the_wait_for_pip_shows_dots_and_no_control_characters(directory: Path) -> None:
    os.mkfifo(directory / "go")
    pip = Installation(directory, f"open({str(directory / 'go')!r}).read()\nprint('installed')\n")
    assert pip.until(".") == "."
    (directory / "go").write_text("")
    rest = pip.until("code 0")
    pip.end()
    assert set(rest.partition("code")[0]) <= {".", "\r", "\n"}
    assert (directory / "install.log").read_text() == "installed\n"


def test_ctrl_c_ends_pip_too(directory: Path) -> None:
    """One that went on would change the environment under the next call."""
    program = f"""
try:
    open({str(directory / "go")!r}).read()
except KeyboardInterrupt:
    open({str(directory / "interrupted")!r}, "w").close()
    raise
"""
    os.mkfifo(directory / "go")
    pip = Installation(directory, program)
    pip.until(".")
    os.write(pip.terminal, b"\x03")
    pip.until("code 1")
    pip.end()
    assert (directory / "interrupted").exists()
